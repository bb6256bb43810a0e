//! `gemmoe train-router`

use std::io::IsTerminal;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gemmoe::train::pass::{PassSize, training_bytes};
use gemmoe::train::recipe::{Length, Schedule};
use gemmoe::train::{Advance, Begin, DataReport, Objective, RecordedRun, Run, RunPlan, StepMetrics, TrainRecipe};
use gemmoe::{Error, Model, Result, Status};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::interrupt::stopping;
use crate::load::{bar, watch};
use crate::units::{count, grouped, size};

#[derive(clap::Args)]
pub struct TrainRouter {
    /// The recipe, a TOML file; paths in it are relative to its directory. docs/training.md lists its keys.
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Load the model, read and check all data, print what would be done and what it takes, and write nothing.
    #[arg(long)]
    check: bool,
    /// Go on from the checkpoint of a run that was stopped; the result has the bits of one that was not.
    #[arg(long, conflicts_with_all = ["check", "restart"])]
    resume: bool,
    /// Begin anew where there is a checkpoint, which is lost.
    #[arg(long, conflicts_with = "check")]
    restart: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What the held-out files were evaluated to, first and last.
#[derive(Default)]
struct Evaluations {
    first: Option<StepMetrics>,
    last: Option<StepMetrics>,
}

impl TrainRouter {
    pub fn run(&self) -> Result<()> {
        let recipe = TrainRecipe::read(&self.recipe)?;
        if !self.check {
            recipe.check_output(self.begin())?;
        }
        // What cannot be trained is refused before its weights are read.
        let (description, _) = Model::inspect(&recipe.model, &recipe.load)?;
        training_bytes(
            &description.config,
            PassSize::new(recipe.fixed.max_tokens, recipe.fixed.keep_activations),
            recipe.fixed.soft,
            None,
        )?;
        let parameters = description.parameters;
        let model = watch("loading", |progress| Model::load(&recipe.model, &recipe.load, progress))?;
        let run = watch("reading data", |progress| Run::new(model, &recipe, progress))?;
        let plan = run.plan()?;
        for report in [Some(run.data_report()), run.held_out_report()].into_iter().flatten() {
            print_left_out(report);
        }
        if !self.json {
            print_plan(&run, &plan, parameters);
        }
        if self.check {
            match self.json {
                true => println!("{}", plan_json(&run, &plan)),
                false => println!("\nall checks passed; nothing was written"),
            }
            return Ok(());
        }
        let planned = plan_json(&run, &plan);
        let mut run = RecordedRun::open(run, self.begin())?;
        let begun = run.run().steps();
        if !self.json && begun > 0 {
            println!("\ngoing on after step {} of {}", grouped(begun), grouped(plan.steps));
        }
        let (evaluations, last) = self.train(&mut run)?;
        let finished = &mut run;
        let written = watch("writing", move |progress| finished.write_result(progress));
        written.map_err(|error| match error.status() {
            Status::Cancelled => self.stopped("was stopped while its result was written"),
            _ => error,
        })?;
        let output = &recipe.output.path;
        if self.json {
            let mut object = planned;
            object["written"] = json!(true);
            object["begun_after_step"] = json!(begun);
            let metrics = |metrics: &Option<StepMetrics>| metrics.as_ref().map(|metrics| run.json_of(metrics));
            object["last_step"] = json!(metrics(&last));
            object["held_out_first"] = json!(metrics(&evaluations.first));
            object["held_out_last"] = json!(metrics(&evaluations.last));
            println!("{object}");
        } else {
            print_evaluations(&evaluations);
            println!("\nwritten to {}", output.display());
        }
        Ok(())
    }

    fn begin(&self) -> Begin {
        match (self.resume, self.restart) {
            (true, _) => Begin::Resume,
            (_, true) => Begin::Restart,
            _ => Begin::New,
        }
    }

    /// Takes the steps that are left.
    fn train(&self, run: &mut RecordedRun) -> Result<(Evaluations, Option<StepMetrics>)> {
        let cancel = Arc::clone(run.run().cancel());
        let mut display = Display::new(run.run());
        let (mut evaluations, mut last) = (Evaluations::default(), None);
        let result = stopping(Box::new(move || cancel.request()), || {
            loop {
                match run.advance()? {
                    Advance::Finished => return Ok(()),
                    Advance::Step(metrics) => {
                        display.step(&metrics);
                        last = Some(metrics);
                    }
                    Advance::Evaluation(metrics) => {
                        display.evaluation(&metrics);
                        evaluations.first.get_or_insert_with(|| metrics.clone());
                        evaluations.last = Some(metrics);
                    }
                }
            }
        });
        display.bar.finish_and_clear();
        match result {
            Err(error) if Error::status(&error) == Status::Cancelled => {
                run.save()?;
                let (steps, total) = (run.run().steps(), run.run().total_steps());
                Err(self.stopped(&format!("was stopped after step {steps} of {total}")))
            }
            Err(error) => Err(error),
            Ok(()) => Ok((evaluations, last)),
        }
    }

    /// The error of a run that was interrupted.
    fn stopped(&self, how: &str) -> Error {
        let recipe = self.recipe.display();
        Error::new(Status::Cancelled, format!("training {how}; `gemmoe train-router {recipe} --resume` goes on"))
    }
}

/// How far a run is: a bar, or a line now and then where there is no terminal.
struct Display {
    bar: ProgressBar,
    is_terminal: bool,
    objective: Objective,
    experts: usize,
    begun: Instant,
    /// Steps that were taken before.
    before: u64,
    total: u64,
    tokens: u64,
    printed: Option<Instant>,
}

/// Without a terminal, between two lines.
const LINE_EVERY: Duration = Duration::from_secs(10);

impl Display {
    fn new(run: &Run) -> Display {
        let (before, total) = (run.steps(), run.total_steps());
        let bar = bar(total, "training {wide_bar} {pos} of {len} steps, {msg}{eta} left").with_position(before);
        let is_terminal = std::io::stderr().is_terminal();
        bar.reset_eta();
        if is_terminal {
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        Display {
            bar,
            is_terminal,
            objective: run.recipe().objective,
            experts: run.trainer().model().config().num_local_experts,
            begun: Instant::now(),
            before,
            total,
            tokens: 0,
            printed: None,
        }
    }

    fn step(&mut self, metrics: &StepMetrics) {
        self.tokens += metrics.tokens as u64;
        let seconds = self.begun.elapsed().as_secs_f64().max(1e-9);
        let losses = self.losses(metrics);
        let speed = format!("{:.0} tokens/s", self.tokens as f64 / seconds);
        let shares = shares(metrics, self.experts);
        self.bar.set_message(format!("{losses}, experts {shares}, {speed}, "));
        self.bar.set_position(metrics.step);
        let is_due = self.printed.is_none_or(|printed| printed.elapsed() >= LINE_EVERY) || metrics.step == self.total;
        if !self.is_terminal && is_due {
            let left = seconds / (metrics.step - self.before) as f64 * (self.total - metrics.step) as f64;
            let left = indicatif::HumanDuration(Duration::from_secs_f64(left.min(1e9)));
            eprintln!("step {} of {}: {losses}, experts {shares}, {speed}, {left} left", metrics.step, self.total);
            self.printed = Some(Instant::now());
        }
    }

    fn evaluation(&self, metrics: &StepMetrics) {
        let line = format!("after step {}, held out: {}", metrics.step, self.losses(metrics));
        match self.is_terminal {
            true => self.bar.println(line),
            false => eprintln!("{line}"),
        }
    }

    fn losses(&self, metrics: &StepMetrics) -> String {
        let preference = match self.objective {
            Objective::Sft => String::new(),
            Objective::Dpo => {
                format!(", accuracy {:.1} %, margin {:.3}", 100.0 * metrics.accuracy, metrics.margin())
            }
        };
        format!("loss {:.4}{preference}, balance {:.3}", metrics.text_loss, metrics.balance)
    }
}

/// The share of choices each expert got over all layers, in per cent: `24/26/25/25 %`; of many the least and the most.
fn shares(metrics: &StepMetrics, experts: usize) -> String {
    let layers = (metrics.shares.len() / experts.max(1)).max(1) as f64;
    let mean = |expert: usize| 100.0 * metrics.shares.iter().skip(expert).step_by(experts).sum::<f64>() / layers;
    let means: Vec<f64> = (0..experts).map(mean).collect();
    match experts {
        0..=8 => format!("{} %", means.iter().map(|mean| format!("{mean:.0}")).collect::<Vec<_>>().join("/")),
        _ => {
            let (least, most) = means.iter().fold((100f64, 0f64), |(l, m), mean| (l.min(*mean), m.max(*mean)));
            format!("{least:.1} to {most:.1} %")
        }
    }
}

fn print_evaluations(evaluations: &Evaluations) {
    let (Some(first), Some(last)) = (&evaluations.first, &evaluations.last) else { return };
    println!("\n{:<10} {:>10} {:>10}", "held out", format!("step {}", first.step), format!("step {}", last.step));
    println!("{:<10} {:>10.4} {:>10.4}", "loss", first.text_loss, last.text_loss);
    println!("{:<10} {:>10.4} {:>10.4}", "balance", first.balance, last.balance);
    if first.rewards != Default::default() || last.rewards != Default::default() {
        println!("{:<10} {:>8.1} % {:>8.1} %", "accuracy", 100.0 * first.accuracy, 100.0 * last.accuracy);
        println!("{:<10} {:>10.4} {:>10.4}", "margin", first.margin(), last.margin());
    }
}

/// Rows that are left out, the first ones one by one.
fn print_left_out(report: &DataReport) {
    if report.skipped == 0 {
        return;
    }
    for row in &report.left_out {
        eprintln!("left out: {row}");
    }
    let (skipped, rows, long) = (grouped(report.skipped), grouped(report.rows), grouped(report.too_long));
    eprintln!("left out: {skipped} of {rows} rows in all, {long} of them for their length");
}

fn data_line(report: &DataReport, objective: Objective) -> String {
    let what = if objective == Objective::Sft { "documents" } else { "pairs" };
    let mut line = format!(
        "{} {what}, {} tokens, {} of them learned, the longest of {}",
        grouped(report.documents),
        grouped(report.tokens),
        grouped(report.targets),
        grouped(report.longest as u64)
    );
    for (rows, how) in
        [(report.cut, "cut at its end"), (report.split, "split into several"), (report.skipped, "left out")]
    {
        if rows > 0 {
            line.push_str(&format!("; {} of {} rows {how}", grouped(rows), grouped(report.rows)));
        }
    }
    line
}

fn print_plan(run: &Run, plan: &RunPlan, parameters: u64) {
    let (recipe, model) = (run.recipe(), run.trainer().model());
    println!("{:<12} {}", "model", recipe.model.display());
    println!("{:<12} {}", "on", model.backend().device_name());
    println!("{:<12} {}, of {}", "trained", count(plan.parameters), count(parameters));
    if let Some(router) = &recipe.router {
        println!("{:<12} {}", "from", router.display());
    }
    println!("{:<12} {}", recipe.objective.name(), data_line(run.data_report(), plan.objective));
    if let Some(report) = run.held_out_report() {
        println!("{:<12} {}", "held out", data_line(report, plan.objective));
    }
    let length = match recipe.length {
        Length::Epochs(1) => "1 epoch".to_owned(),
        Length::Epochs(epochs) => format!("{} epochs", grouped(epochs)),
        Length::Steps(_) => "as the recipe says".to_owned(),
    };
    println!("{:<12} {} of {} rows, {length}", "steps", grouped(plan.steps), grouped(recipe.rows_per_step as u64));
    let schedule = match recipe.schedule {
        Schedule::Constant => "constant".to_owned(),
        Schedule::Cosine(share) => format!("cosine to {:.0} %", 100.0 * share),
    };
    println!("{:<12} {}, {schedule}", "rate", recipe.fixed.optimiser.learning_rate);
    let row = |name: &str, bytes: u64| println!("{name:<12} {:>18} bytes {:>9}", grouped(bytes), size(bytes));
    println!();
    for (name, bytes) in memory(plan) {
        row(name, bytes);
    }
    row("in all", memory(plan).iter().map(|(_, bytes)| bytes).sum());
    row("checkpoint", plan.checkpoint_bytes);
}

/// What a run takes in memory.
fn memory(plan: &RunPlan) -> [(&'static str, u64); 4] {
    [
        ("weights", plan.weight_bytes),
        ("workspace", plan.workspace_bytes),
        ("optimiser", plan.optimiser_bytes),
        ("data", plan.data_bytes),
    ]
}

fn report_json(report: &DataReport) -> Value {
    let left_out = report.left_out.iter();
    let left_out = left_out.map(|row| json!({"file": row.file, "line": row.line, "reason": row.reason}));
    json!({
        "rows": report.rows,
        "good": report.good,
        "cut": report.cut,
        "split": report.split,
        "skipped": report.skipped,
        "too_long": report.too_long,
        "documents": report.documents,
        "tokens": report.tokens,
        "targets": report.targets,
        "longest": report.longest,
        "left_out": left_out.collect::<Vec<_>>(),
    })
}

fn plan_json(run: &Run, plan: &RunPlan) -> Value {
    let recipe = run.recipe();
    json!({
        "objective": plan.objective.name(),
        "data": report_json(run.data_report()),
        "held_out": run.held_out_report().map(report_json),
        "steps": plan.steps,
        "parameters": plan.parameters,
        "weight_bytes": plan.weight_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "optimiser_bytes": plan.optimiser_bytes,
        "data_bytes": plan.data_bytes,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "output": {"kind": recipe.output.kind.name(), "path": recipe.output.path.display().to_string()},
        "checkpoint": recipe.output.checkpoint.display().to_string(),
        "metrics": recipe.output.metrics.display().to_string(),
        "written": false,
    })
}
