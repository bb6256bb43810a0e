//! What a run leaves on the disk: a line of metrics for every step and every evaluation, checkpoints, and its result.
//!
//! A line is on the disk before a checkpoint that comes after it. So a run that goes on cuts the metrics back to where its
//! checkpoint is, and they become what they would have been: nothing in them depends on time, or on where a run was stopped.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::recipe::{Objective, OutputKind};
use super::run::Run;
use super::trainer::StepMetrics;
use crate::error::{Error, Result, Status};
use crate::model::Progress;
use crate::platform;

/// How a run begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Begin {
    /// At its first step. Fails with `AlreadyExists` where there is a checkpoint.
    #[default]
    New,
    /// At its checkpoint.
    Resume,
    /// At its first step, whatever there is.
    Restart,
}

/// What `advance` did.
#[derive(Clone, Debug, PartialEq)]
pub enum Advance {
    /// A step.
    Step(StepMetrics),
    /// An evaluation of the held-out files.
    Evaluation(StepMetrics),
    /// Nothing: all steps are taken.
    Finished,
}

/// A run with its files.
pub struct RecordedRun {
    run: Run,
    metrics: File,
    /// Steps that had been taken when the held-out files were last evaluated.
    evaluated: Option<u64>,
    /// Steps of the last checkpoint.
    saved: Option<u64>,
}

impl RecordedRun {
    /// Opens the files of a run, and goes on from its checkpoint where that is asked for. Whether the result can be written is
    /// checked first.
    ///
    /// Fails as [`TrainRecipe::check_output`] does, with `AlreadyExists` where the result is in the way and `Busy` where another run
    /// has the metrics open; as [`Run::resume`] and [`NewGates::check`](super::result::NewGates::check) do; with `WriteFailed`.
    pub fn open(mut run: Run, begin: Begin) -> Result<RecordedRun> {
        run.recipe().check_output(begin)?;
        check_result(&run)?;
        let output = run.recipe().output.clone();
        // Before the checkpoint is read, which another run would still be writing.
        let mut metrics = open_metrics(&output.metrics)?;
        if begin == Begin::Resume {
            run.resume(&output.checkpoint)?;
        }
        cut_metrics(&mut metrics, run.steps()).map_err(|error| unwritable(&output.metrics, &error))?;
        let saved = (begin == Begin::Resume).then_some(run.steps());
        Ok(RecordedRun { run, metrics, evaluated: None, saved })
    }

    /// The run.
    pub fn run(&self) -> &Run {
        &self.run
    }

    /// Does what is next: an evaluation, where one is due before the first step, every `evaluate_every` steps and after the last;
    /// else a step, with a checkpoint where one is due. After an error, such as `Cancelled`, all is as before.
    pub fn advance(&mut self) -> Result<Advance> {
        let (steps, total) = (self.run.steps(), self.run.total_steps());
        let every = self.run.recipe().evaluate_every;
        let is_due = steps == 0 || steps == total || (every > 0 && steps.is_multiple_of(every));
        if is_due && self.evaluated != Some(steps) {
            let evaluation = self.run.evaluate()?;
            self.evaluated = Some(steps);
            if let Some(metrics) = evaluation {
                let line = json!({"step": steps, "held_out": self.json_of(&metrics)});
                self.record(&line)?;
                return Ok(Advance::Evaluation(metrics));
            }
        }
        let Some(metrics) = self.run.step()? else {
            self.save()?;
            return Ok(Advance::Finished);
        };
        let mut line = Map::from_iter([("step".to_owned(), json!(metrics.step))]);
        line.extend(self.json_of(&metrics));
        self.record(&Value::Object(line))?;
        let every = self.run.recipe().output.checkpoint_every;
        if every > 0 && metrics.step.is_multiple_of(every) {
            self.save()?;
        }
        Ok(Advance::Step(metrics))
    }

    /// Writes the checkpoint, unless it is there.
    pub fn save(&mut self) -> Result<()> {
        if self.saved == Some(self.run.steps()) {
            return Ok(());
        }
        let output = &self.run.recipe().output;
        self.metrics.sync_data().map_err(|error| unwritable(&output.metrics, &error))?;
        self.run.save(&output.checkpoint)?;
        self.saved = Some(self.run.steps());
        Ok(())
    }

    /// Writes the result. `progress` counts bytes of a model's tensors.
    pub fn write_result(&self, progress: &Progress) -> Result<()> {
        let output = &self.run.recipe().output;
        match output.kind {
            OutputKind::Patch => self.run.patch()?.write(&output.path),
            OutputKind::Model => self.run.write_model(&output.path, progress),
        }
    }

    /// Metrics as they are recorded.
    pub fn json_of(&self, metrics: &StepMetrics) -> Map<String, Value> {
        metrics.to_json(self.run.recipe().objective, self.run.trainer().model().config().num_local_experts)
    }

    fn record(&mut self, line: &Value) -> Result<()> {
        let path = &self.run.recipe().output.metrics;
        self.metrics.write_all(format!("{line}\n").as_bytes()).map_err(|error| unwritable(path, &error))
    }
}

/// Fails where the result could not be written.
fn check_result(run: &Run) -> Result<()> {
    match run.recipe().output.kind {
        OutputKind::Patch => Ok(()),
        OutputKind::Model => run.new_gates()?.check(&run.recipe().output.path),
    }
}

/// What a line of metrics begins with.
const LINE: &[u8] = b"{\"step\":";

/// Opens the file of metrics for this run alone. Fails with `Busy` where another run has it, and with `AlreadyExists` where what is in it is
/// something else, which would be lost.
fn open_metrics(path: &Path) -> Result<File> {
    let failed = |error: io::Error| unwritable(path, &error);
    let fail = |status, text: &str| Err(Error::new(status, text).in_file(path.display().to_string()));
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
    if !platform::try_lock(&file) {
        let text = "is being written by another run: wait for it, or give this one files of its own";
        return fail(Status::Busy, text);
    }
    let mut start = Vec::new();
    (&mut file).take(LINE.len() as u64).read_to_end(&mut start).map_err(failed)?;
    // A line that was cut off is one too.
    if !LINE.starts_with(&start) {
        return fail(Status::AlreadyExists, "is there already and has no metrics in it: nothing is overwritten");
    }
    file.rewind().map_err(failed)?;
    Ok(file)
}

/// Goes to the end of the line of step `steps`; what comes after it is cut off.
fn cut_metrics(file: &mut File, steps: u64) -> io::Result<()> {
    let mut end = 0;
    if steps > 0 {
        let mut lines = BufReader::new(&*file);
        let (mut line, mut at) = (Vec::new(), 0);
        while lines.read_until(b'\n', &mut line)? > 0 {
            at += line.len() as u64;
            let parsed = serde_json::from_slice::<Value>(&line).ok().filter(|_| line.ends_with(b"\n"));
            // The evaluation after the last of them is made again.
            let Some(step) = parsed.as_ref().and_then(|value| value.get("step")?.as_u64()) else { break };
            if step > steps {
                break;
            }
            if parsed.is_some_and(|value| value.get("held_out").is_none()) || step < steps {
                end = at;
            }
            line.clear();
        }
    }
    file.set_len(end)?;
    file.seek(SeekFrom::Start(end))?;
    Ok(())
}

fn unwritable(path: &Path, error: &io::Error) -> Error {
    Error::new(Status::WriteFailed, format!("cannot be written: {error}")).in_file(path.display().to_string())
}

impl StepMetrics {
    /// As JSON: of an evaluation what it has, of a step the norm of its gradient and its learning rate too, and of pairs what people
    /// watch. `shares` is a list of each layer's `experts`.
    pub fn to_json(&self, objective: Objective, experts: usize) -> Map<String, Value> {
        let mut object = Map::new();
        let mut add = |key: &str, value: Value| object.insert(key.to_owned(), value);
        for (key, value) in
            [("loss", self.loss), ("text_loss", self.text_loss), ("balance", self.balance), ("z", self.z)]
        {
            add(key, json!(value));
        }
        add("tokens", json!(self.tokens));
        add("targets", json!(self.targets));
        if self.learning_rate > 0.0 {
            add("gradient_norm", json!(self.gradient_norm));
            add("learning_rate", json!(self.learning_rate));
        }
        if objective == Objective::Dpo {
            add("accuracy", json!(self.accuracy));
            add("margin", json!(self.margin()));
            add("chosen_reward", json!(self.rewards.chosen));
            add("rejected_reward", json!(self.rewards.rejected));
        }
        add("shares", json!(self.shares.chunks(experts.max(1)).collect::<Vec<_>>()));
        object
    }
}
