//! A training recipe: what routers learn, from what and how, read from TOML and checked as far as it can be by itself.
//! `docs/training.md` lists every key.

use std::path::{Path, PathBuf};

use super::adamw::Decay;
use super::balance::{BalanceForm, RouterLosses};
use super::data::{BadRows, LongRows, Rows};
use super::loss::{PreferenceLoss, PreferenceOptions};
use super::trainer::{MAX_TOKENS, TrainOptions};
use crate::backend::Device;
use crate::backend::cpu::CpuOptions;
use crate::backend::cpu::threads::MAX_THREADS;
use crate::engine::LoadOptions;
use crate::error::Result;
use crate::model::Formats;
use crate::toml_table::{Place, Table, parse, read_formats, read_text};

/// Most rows of a step.
const MAX_ROWS: u64 = 1 << 20;
/// Most steps, and most epochs.
const MAX_STEPS: u64 = 1 << 40;

/// What routers learn, from what and how.
#[derive(Clone, Debug)]
pub struct TrainRecipe {
    /// What errors call it.
    pub name: String,
    /// The model directory.
    pub model: PathBuf,
    /// How it is loaded.
    pub load: LoadOptions,
    /// What is learned.
    pub objective: Objective,
    /// The gates to begin from, a router patch; without one the model's.
    pub router: Option<PathBuf>,
    /// What is learned from.
    pub data: DataRecipe,
    /// How long.
    pub length: Length,
    /// Rows, that is documents or pairs, whose mean gradient is a step's.
    pub rows_per_step: usize,
    /// How the learning rate begins.
    pub warmup: Warmup,
    /// How it goes on.
    pub schedule: Schedule,
    /// Steps between two evaluations of the held-out files; 0 is only before the first step and after the last.
    pub evaluate_every: u64,
    /// What pairs are compared with.
    pub reference: Reference,
    /// Everything else. Its warm-up and decay take the number of steps: [`TrainRecipe::options`] has them.
    pub fixed: TrainOptions,
    /// What becomes of it.
    pub output: Output,
    /// Where its warm-up stands, which may be found wrong only with the data.
    warmup_place: Place,
}

/// What is learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// Responses, token by token: supervised fine-tuning.
    Sft,
    /// To prefer one response to another: direct preference optimisation.
    Dpo,
}

impl Objective {
    /// All of them, the default first.
    pub const ALL: [Objective; 2] = [Objective::Sft, Objective::Dpo];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Objective::Sft => "sft",
            Objective::Dpo => "dpo",
        }
    }

    /// What a row of its data is.
    pub fn rows(self) -> Rows {
        match self {
            Objective::Sft => Rows::Texts,
            Objective::Dpo => Rows::Pairs,
        }
    }
}

/// What is learned from.
#[derive(Clone, Debug, PartialEq)]
pub struct DataRecipe {
    /// Its files, in order.
    pub files: Vec<PathBuf>,
    /// Files that only losses are computed of.
    pub held_out: Vec<PathBuf>,
    /// What becomes of rows that are longer than a batch.
    pub long_rows: LongRows,
    /// What becomes of rows that cannot be used.
    pub bad_rows: BadRows,
    /// Prompts are learned too.
    pub learn_prompts: bool,
}

/// How long training takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// So many times through the data.
    Epochs(u64),
    /// So many steps.
    Steps(u64),
}

/// How the learning rate rises.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// In so many steps.
    Steps(u64),
    /// In this share of all steps.
    Share(f64),
}

/// What becomes of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Schedule {
    /// Nothing.
    Constant,
    /// Half a cosine, down to this share of it at the last step.
    Cosine(f64),
}

/// What pairs are compared with.
#[derive(Clone, Debug, PartialEq)]
pub enum Reference {
    /// The gates that training begins with.
    Start,
    /// The gates of the model directory.
    Model,
    /// Those of a router patch.
    Patch(PathBuf),
}

/// What is written.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// What the result is.
    pub kind: OutputKind,
    /// Where it is written.
    pub path: PathBuf,
    /// Where training can go on from.
    pub checkpoint: PathBuf,
    /// Steps between two checkpoints; 0 is only after the last step and where training is stopped.
    pub checkpoint_every: u64,
    /// A line of JSON for every step and every evaluation.
    pub metrics: PathBuf,
    /// Bytes of one weight file of a model, about; none is as the model has them.
    pub shard_bytes: Option<u64>,
}

/// What the result is called, beside the recipe, where nobody says.
const RESULT: &str = "router.safetensors";

impl Output {
    /// A patch, with the other files beside it.
    pub fn beside(path: PathBuf) -> Output {
        let with = |end: &str| {
            let mut name = path.file_name().unwrap_or_default().to_owned();
            name.push(end);
            path.with_file_name(name)
        };
        let (checkpoint, metrics) = (with(".checkpoint"), with(".metrics.jsonl"));
        Output { kind: OutputKind::Patch, checkpoint, metrics, path, checkpoint_every: 10, shard_bytes: None }
    }
}

/// What the result is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputKind {
    /// A router patch: a file of the gates alone.
    Patch,
    /// A model directory: the old one with other gates.
    Model,
}

impl OutputKind {
    /// All of them, the default first.
    pub const ALL: [OutputKind; 2] = [OutputKind::Patch, OutputKind::Model];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            OutputKind::Patch => "patch",
            OutputKind::Model => "model",
        }
    }
}

impl TrainRecipe {
    /// Reads a recipe's file; paths in it are relative to the file's directory.
    pub fn read(path: &Path) -> Result<TrainRecipe> {
        let name = path.display().to_string();
        let text = read_text(path, &name)?;
        TrainRecipe::parse(&text, &name, path.parent().unwrap_or(Path::new("")))
    }

    /// Reads the text of a recipe. Errors call it `name`; relative paths in it begin at `directory`.
    ///
    /// Fails with `RecipeSyntax`, `RecipeValue` and `FileTooLarge`; the error names the key and its line.
    pub fn parse(text: &str, name: &str, directory: &Path) -> Result<TrainRecipe> {
        parse(text, |root| read(&root, name, directory)).map_err(|error| error.in_file(name))
    }

    /// What a trainer is made with where there are so many rows: the number of steps, and its options.
    pub fn options(&self, rows: u64) -> Result<(u64, TrainOptions)> {
        let steps = match self.length {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => rows.saturating_mul(epochs).div_ceil(self.rows_per_step as u64),
        };
        let warmup_steps = match self.warmup {
            Warmup::Steps(warmup) => warmup,
            Warmup::Share(share) => (share * steps as f64) as u64,
        };
        let mut options = self.fixed;
        options.optimiser.warmup_steps = warmup_steps;
        if let Schedule::Cosine(final_share) = self.schedule {
            options.optimiser.decay = Decay::Cosine { total_steps: steps, final_share };
            if warmup_steps >= steps {
                let text =
                    format!("makes {warmup_steps} steps of warm-up, and there are {steps} in all: expected fewer");
                return Err(self.warmup_place.fault(&text).in_file(&*self.name));
            }
        }
        Ok((steps, options))
    }
}

const KEYS: [&str; 11] =
    ["model", "objective", "router", "device", "threads", "follow_links", "quantize", "data", "train", "dpo", "output"];

fn read(root: &Table, name: &str, directory: &Path) -> Result<TrainRecipe> {
    root.check_keys(&KEYS)?;
    let Some(model) = root.text("model")? else {
        return Err(root.place("model").fault("is missing, expected the directory of a GemMoE"));
    };
    let objective = Objective::ALL[root.choice("objective", &Objective::ALL.map(Objective::name))?.unwrap_or(0)];
    let data = required(root, "data", "files = [...] in it")?;
    let output = match root.table("output")? {
        Some(table) => read_output(&table, directory)?,
        None => Output::beside(directory.join(RESULT)),
    };
    let train = root.table("train")?;
    let (preference, reference) = match root.table("dpo")? {
        None => (PreferenceOptions::default(), Reference::Start),
        Some(table) if objective == Objective::Sft => {
            let text = "is given, but the objective is \"sft\": take it out, or say objective = \"dpo\"";
            return Err(table.own_place().fault(text));
        }
        Some(table) => read_dpo(&table, directory)?,
    };
    // BOS and a token to learn; for a pair twice.
    let least = if objective == Objective::Dpo { 4 } else { 2 };
    let mut recipe = TrainRecipe {
        name: name.to_owned(),
        model: directory.join(model),
        load: read_load(root)?,
        objective,
        router: root.text("router")?.map(|path| directory.join(path)),
        data: read_data(&data, objective, directory)?,
        length: Length::Epochs(1),
        rows_per_step: 16,
        warmup: Warmup::Share(0.05),
        schedule: Schedule::Cosine(0.1),
        evaluate_every: 100,
        reference,
        fixed: TrainOptions {
            max_tokens: data.count("max_tokens", least, MAX_TOKENS as u64)?.unwrap_or(2048) as usize,
            seed: data.count("seed", 0, i64::MAX as u64)?.unwrap_or(0),
            preference,
            ..TrainOptions::default()
        },
        output,
        warmup_place: Place::default(),
    };
    if let Some(train) = train {
        read_train(&train, &mut recipe)?;
    }
    Ok(recipe)
}

fn required<'a>(root: &Table<'a>, key: &str, with: &str) -> Result<Table<'a>> {
    root.table(key)?.ok_or_else(|| root.place(key).fault(&format!("is missing, expected a table [{key}] with {with}")))
}

fn read_load(root: &Table) -> Result<LoadOptions> {
    let device = match root.text("device")? {
        None => Device::Cpu,
        Some(name) => Device::from_name(name)
            .ok_or_else(|| root.place("device").fault(&format!("is {name:?}, expected cpu, auto, cuda or cuda:N")))?,
    };
    let threads = root.count("threads", 0, MAX_THREADS as u64)?.unwrap_or(0) as usize;
    Ok(LoadOptions {
        device,
        cpu: CpuOptions { threads: threads.into(), ..CpuOptions::default() },
        formats: root.table("quantize")?.map_or(Ok(Formats::default()), |table| read_formats(&table))?,
        follow_links: root.flag("follow_links")?.unwrap_or(false),
        ..LoadOptions::default()
    })
}

fn read_data(table: &Table, objective: Objective, directory: &Path) -> Result<DataRecipe> {
    table.check_keys(&["files", "held_out", "max_tokens", "long_rows", "bad_rows", "learn_prompts", "seed"])?;
    let paths = |key: &str| -> Result<Vec<PathBuf>> {
        Ok(table.texts(key)?.into_iter().map(|(path, _)| directory.join(path)).collect())
    };
    let files = paths("files")?;
    if files.is_empty() {
        return Err(table.place("files").fault("is missing or empty, expected files of rows, one or a list"));
    }
    let learn_prompts = table.flag("learn_prompts")?;
    if objective == Objective::Dpo && learn_prompts == Some(true) {
        let text = "is true, but a pair's two responses share their prompt: it has no part in a preference";
        return Err(table.place("learn_prompts").fault(text));
    }
    Ok(DataRecipe {
        files,
        held_out: paths("held_out")?,
        long_rows: LongRows::ALL[table.choice("long_rows", &LongRows::ALL.map(LongRows::name))?.unwrap_or(0)],
        bad_rows: BadRows::ALL[table.choice("bad_rows", &BadRows::ALL.map(BadRows::name))?.unwrap_or(0)],
        learn_prompts: learn_prompts.unwrap_or(false),
    })
}

const TRAIN_KEYS: [&str; 19] = [
    "epochs",
    "steps",
    "rows_per_step",
    "learning_rate",
    "warmup_steps",
    "warmup_share",
    "schedule",
    "final_share",
    "betas",
    "epsilon",
    "weight_decay",
    "clip",
    "noise",
    "soft",
    "keep_activations",
    "balance",
    "balance_form",
    "z_loss",
    "evaluate_every",
];

fn read_train(table: &Table, recipe: &mut TrainRecipe) -> Result<()> {
    table.check_keys(&TRAIN_KEYS)?;
    let either = |one: &str, other: &str| match (table.has(one), table.has(other)) {
        (true, true) => Err(table.place(other).fault(&format!("is given beside {one:?}: only one of the two"))),
        _ => Ok(()),
    };
    either("epochs", "steps")?;
    either("warmup_steps", "warmup_share")?;
    if let Some(epochs) = table.count("epochs", 1, MAX_STEPS)? {
        recipe.length = Length::Epochs(epochs);
    }
    if let Some(steps) = table.count("steps", 1, MAX_STEPS)? {
        recipe.length = Length::Steps(steps);
    }
    if let Some(rows) = table.count("rows_per_step", 1, MAX_ROWS)? {
        recipe.rows_per_step = rows as usize;
    }
    if let Some(steps) = table.count("warmup_steps", 0, MAX_STEPS)? {
        recipe.warmup = Warmup::Steps(steps);
        recipe.warmup_place = table.place("warmup_steps");
    }
    if let Some(share) = table.number_in("warmup_share", "0 to below 1", |share| (0.0..1.0).contains(&share))? {
        recipe.warmup = Warmup::Share(share);
    }
    let final_share = table.number_in("final_share", "0 to 1", |share| (0.0..=1.0).contains(&share))?;
    match table.choice("schedule", &["cosine", "constant"])? {
        Some(1) if final_share.is_some() => {
            return Err(table.place("final_share").fault("is given, but the schedule is constant"));
        }
        Some(1) => recipe.schedule = Schedule::Constant,
        _ => recipe.schedule = Schedule::Cosine(final_share.unwrap_or(0.1)),
    }
    if let Some(every) = table.count("evaluate_every", 0, MAX_STEPS)? {
        recipe.evaluate_every = every;
    }
    let optimiser = &mut recipe.fixed.optimiser;
    if let Some(betas) = table.numbers("betas")? {
        let is_right = |beta: &f64| (0.0..1.0).contains(beta);
        let [first, second] = betas[..] else {
            return Err(table.place("betas").fault(&format!("has {} numbers, expected 2", betas.len())));
        };
        if let Some(beta) = betas.iter().find(|beta| !is_right(beta)) {
            return Err(table.place("betas").fault(&format!("has {beta} in it, expected 0 to below 1")));
        }
        optimiser.betas = (first, second);
    }
    let router = &mut recipe.fixed.router;
    let positive: [(&str, &mut f64); 2] =
        [("learning_rate", &mut optimiser.learning_rate), ("epsilon", &mut optimiser.epsilon)];
    for (key, value) in positive {
        *value = table.number_in(key, "a number above 0", |number| number > 0.0)?.unwrap_or(*value);
    }
    let natural: [(&str, &mut f64); 5] = [
        ("weight_decay", &mut optimiser.weight_decay),
        ("clip", &mut optimiser.clip),
        ("noise", &mut recipe.fixed.noise),
        ("balance", &mut router.balance),
        ("z_loss", &mut router.z),
    ];
    for (key, value) in natural {
        *value = table.number_in(key, "0 (none) or more", |number| number >= 0.0)?.unwrap_or(*value);
    }
    let RouterLosses { form, .. } = router;
    *form = BalanceForm::ALL[table.choice("balance_form", &BalanceForm::ALL.map(BalanceForm::name))?.unwrap_or(0)];
    recipe.fixed.soft = table.flag("soft")?.unwrap_or(false);
    recipe.fixed.keep_activations = table.flag("keep_activations")?.unwrap_or(false);
    Ok(())
}

fn read_dpo(table: &Table, directory: &Path) -> Result<(PreferenceOptions, Reference)> {
    table.check_keys(&["beta", "loss", "label_smoothing", "mean", "reference"])?;
    let usual = PreferenceOptions::default();
    let loss = PreferenceLoss::ALL[table.choice("loss", &PreferenceLoss::ALL.map(PreferenceLoss::name))?.unwrap_or(0)];
    let smoothing = table.number_in("label_smoothing", "0 to below 0.5", |share| (0.0..0.5).contains(&share))?;
    if loss == PreferenceLoss::Ipo && smoothing.is_some_and(|share| share > 0.0) {
        return Err(table.place("label_smoothing").fault("has no meaning for the loss \"ipo\": leave it out"));
    }
    let preference = PreferenceOptions {
        loss,
        beta: table.number_in("beta", "a number above 0", |beta| beta > 0.0)?.unwrap_or(usual.beta),
        label_smoothing: smoothing.unwrap_or(usual.label_smoothing),
        mean_log_probability: table.flag("mean")?.unwrap_or(usual.mean_log_probability),
    };
    let reference = match table.text("reference")? {
        None | Some("start") => Reference::Start,
        Some("model") => Reference::Model,
        Some(path) => Reference::Patch(directory.join(path)),
    };
    Ok((preference, reference))
}

fn read_output(table: &Table, directory: &Path) -> Result<Output> {
    table.check_keys(&["kind", "path", "checkpoint", "checkpoint_every", "metrics", "shard_bytes"])?;
    let file = |key: &str| -> Result<Option<PathBuf>> {
        let path = table.text(key)?.map(|path| directory.join(path));
        match path.as_ref().is_none_or(|path| path.file_name().is_some()) {
            true => Ok(path),
            false => Err(table.place(key).fault("has no name that a file can be given")),
        }
    };
    let mut output = Output::beside(file("path")?.unwrap_or_else(|| directory.join(RESULT)));
    output.kind = OutputKind::ALL[table.choice("kind", &OutputKind::ALL.map(OutputKind::name))?.unwrap_or(0)];
    output.shard_bytes = table.count("shard_bytes", 1, i64::MAX as u64)?;
    if output.kind == OutputKind::Patch && output.shard_bytes.is_some() {
        return Err(table.place("shard_bytes").fault("is given, but a patch is one file"));
    }
    if let Some(steps) = table.count("checkpoint_every", 0, MAX_STEPS)? {
        output.checkpoint_every = steps;
    }
    for (key, place) in [("checkpoint", &mut output.checkpoint), ("metrics", &mut output.metrics)] {
        if let Some(path) = file(key)? {
            *place = path;
        }
    }
    let Output { path, checkpoint, metrics, .. } = &output;
    for (key, other, is_same) in [
        ("checkpoint", "path", checkpoint == path),
        ("metrics", "path", metrics == path),
        ("metrics", "checkpoint", metrics == checkpoint),
    ] {
        if is_same {
            return Err(table.place(key).fault(&format!("is the same file as {other:?}")));
        }
    }
    Ok(output)
}
