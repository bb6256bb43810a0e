//! A whole training run: a recipe's data in the order of its seed, step after step to the end.
//!
//! The rows of all epochs follow each other, each epoch in an order of its own; step n takes the n-th `rows_per_step` of them.
//! So where a run stands is its number of steps, and what it does next depends on nothing else but the recipe, the data and the
//! trainer's state.

use std::path::Path;
use std::sync::Arc;

use super::checkpoint::Course;
use super::data::{DataOptions, DataReport, DataSet, shuffled};
use super::document::Document;
use super::loss::PairLogProbabilities;
use super::pass::{PassSize, training_bytes};
use super::recipe::{Length, Objective, Reference, TrainRecipe};
use super::result::NewGates;
use super::trainer::{Pair, RouterTrainer, StepMetrics, TrainOptions};
use crate::backend::ops::Cancel;
use crate::engine::Model;
use crate::error::Result;
use crate::memory::{try_vec, try_with_capacity};
use crate::model::Progress;
use crate::model::router_patch::{RouterPatch, fingerprint};

/// Held-out rows that are in memory at the same time.
const EVALUATED_ROWS: usize = 64;

/// What a run will take, and come to.
#[derive(Clone, Debug, PartialEq)]
pub struct RunPlan {
    /// What is learned.
    pub objective: Objective,
    /// Documents or pairs in the data, and in the held-out files.
    pub rows: u64,
    pub held_out_rows: u64,
    /// Tokens of one epoch, and those among them that are learned.
    pub tokens: u64,
    pub targets: u64,
    /// Steps in all.
    pub steps: u64,
    /// Numbers that are trained.
    pub parameters: u64,
    /// Bytes of the model's weights.
    pub weight_bytes: u64,
    /// Of the workspace of a batch.
    pub workspace_bytes: u64,
    /// Of gates, gradients, moments and reference.
    pub optimiser_bytes: u64,
    /// Of what is kept of the data: where its rows are, and of pairs their reference.
    pub data_bytes: u64,
    /// Of a checkpoint, about.
    pub checkpoint_bytes: u64,
}

/// A recipe at work. One thread at a time.
pub struct Run {
    recipe: TrainRecipe,
    trainer: RouterTrainer,
    data: Source,
    held_out: Option<Source>,
    total_steps: u64,
    pub(super) course: Course,
    /// An epoch, and its order.
    order: Option<(u64, Vec<u32>)>,
}

/// Rows of one data set, and what the reference makes of its pairs.
struct Source {
    set: DataSet,
    /// Of each pair; NaN until it is computed.
    references: Vec<PairLogProbabilities>,
}

const UNKNOWN: PairLogProbabilities = PairLogProbabilities { chosen: f64::NAN, rejected: f64::NAN };

impl Source {
    fn new(set: DataSet, objective: Objective) -> Result<Source> {
        let pairs = if objective == Objective::Dpo { set.len() } else { 0 };
        Ok(Source { references: try_vec("references of pairs", pairs, UNKNOWN)?, set })
    }

    fn documents(&mut self, rows: &[u32]) -> Result<Vec<Document>> {
        rows.iter().map(|row| self.set.document(*row as usize)).collect()
    }

    fn pairs(&mut self, rows: &[u32]) -> Result<Vec<Pair>> {
        let pair = |row: &u32| {
            let mut pair = self.set.pair(*row as usize)?;
            pair.reference = Some(self.references[*row as usize]).filter(|reference| !reference.chosen.is_nan());
            Ok(pair)
        };
        rows.iter().map(pair).collect()
    }

    /// Does `work` with pairs, and keeps the references that it computed, even where it then failed.
    fn with_pairs<T>(&mut self, rows: &[u32], work: impl FnOnce(&mut [Pair]) -> Result<T>) -> Result<T> {
        let mut pairs = self.pairs(rows)?;
        let result = work(&mut pairs);
        for (row, pair) in rows.iter().zip(&pairs) {
            self.references[*row as usize] = pair.reference.unwrap_or(UNKNOWN);
        }
        result
    }
}

impl Run {
    /// Reads and checks the recipe's data and allocates all that a step needs. The model is the recipe's, loaded as
    /// [`TrainRecipe::load`] says; it stays as it is. `progress` counts bytes of the data files.
    ///
    /// Fails as [`RouterTrainer::new`] and [`DataSet::open`] do, with `RecipeValue` where the recipe does not fit the data, and as
    /// [`RouterPatch::read`] where it begins from a patch.
    pub fn new(model: Arc<Model>, recipe: &TrainRecipe, progress: &Progress) -> Result<Run> {
        // Before the data: what the model refuses needs none.
        let mut trainer = RouterTrainer::new(&model, &recipe.fixed)?;
        let course_gates = set_gates(&mut trainer, recipe)?;
        let rows = recipe.objective.rows();
        let options = data_options(recipe, &model);
        let set = DataSet::open(&model, &recipe.data.files, rows, &options, progress)?;
        let held_out = match recipe.data.held_out.as_slice() {
            [] => None,
            files => Some(Source::new(DataSet::open(&model, files, rows, &options, progress)?, recipe.objective)?),
        };
        let (total_steps, options) = recipe.options(set.len() as u64)?;
        trainer.set_optimiser(&options.optimiser)?;
        Ok(Run {
            course: Course::new(recipe, &options, &set, course_gates),
            recipe: recipe.clone(),
            trainer,
            data: Source::new(set, recipe.objective)?,
            held_out,
            total_steps,
            order: None,
        })
    }

    /// The recipe.
    pub fn recipe(&self) -> &TrainRecipe {
        &self.recipe
    }

    /// What reading the data came to.
    pub fn data_report(&self) -> &DataReport {
        self.data.set.report()
    }

    /// The same of the held-out files.
    pub fn held_out_report(&self) -> Option<&DataReport> {
        self.held_out.as_ref().map(|source| source.set.report())
    }

    /// What the run takes, and comes to.
    pub fn plan(&self) -> Result<RunPlan> {
        let (model, report) = (self.trainer.model(), self.data.set.report());
        let threads = (model.residency().device_bytes == 0).then(|| self.recipe.load.cpu.threads.resolved_count());
        let fixed = &self.recipe.fixed;
        let size = PassSize::new(fixed.max_tokens, fixed.keep_activations);
        let bytes = training_bytes(model.config(), size, fixed.soft, threads)?;
        let held_out_rows = self.held_out.as_ref().map_or(0, |source| source.set.len() as u64);
        let rows = self.data.set.len() as u64;
        let reference_bytes = if self.recipe.objective == Objective::Dpo { size_of_val(&UNKNOWN) as u64 } else { 0 };
        Ok(RunPlan {
            objective: self.recipe.objective,
            rows,
            held_out_rows,
            tokens: report.tokens,
            targets: report.targets,
            steps: self.total_steps,
            parameters: self.trainer.gates().len() as u64,
            weight_bytes: model.backend().weight_bytes().0 as u64,
            workspace_bytes: bytes.workspace,
            optimiser_bytes: bytes.optimiser,
            data_bytes: (rows + held_out_rows) * (ROW_BYTES + reference_bytes),
            checkpoint_bytes: bytes.checkpoint,
        })
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Steps that were taken.
    pub fn steps(&self) -> u64 {
        self.trainer.steps()
    }

    /// Takes a step; none where all were taken. After an error all is as before.
    pub fn step(&mut self) -> Result<Option<StepMetrics>> {
        if self.steps() >= self.total_steps {
            return Ok(None);
        }
        let rows = self.rows_of_step(self.steps())?;
        let (trainer, data) = (&mut self.trainer, &mut self.data);
        let metrics = match self.recipe.objective {
            Objective::Sft => trainer.step(&data.documents(&rows)?)?,
            Objective::Dpo => data.with_pairs(&rows, |pairs| trainer.step_pairs(pairs))?,
        };
        Ok(Some(metrics))
    }

    /// The losses of the held-out files; none where the recipe has none. Nothing is learned.
    pub fn evaluate(&mut self) -> Result<Option<StepMetrics>> {
        let Some(source) = &mut self.held_out else { return Ok(None) };
        let trainer = &mut self.trainer;
        let mut sum = MetricsSum::default();
        for first in (0..source.set.len()).step_by(EVALUATED_ROWS) {
            let rows: Vec<u32> = (first..source.set.len().min(first + EVALUATED_ROWS)).map(|row| row as u32).collect();
            let metrics = match self.recipe.objective {
                Objective::Sft => trainer.evaluate(&source.documents(&rows)?)?,
                Objective::Dpo => source.with_pairs(&rows, |pairs| trainer.evaluate_pairs(pairs))?,
            };
            sum.add(&metrics, self.recipe.objective, rows.len());
        }
        Ok(Some(sum.mean(&self.recipe.fixed)))
    }

    /// Ends the running or the next call with `Cancelled`, from any thread.
    pub fn cancel(&self) -> &Arc<Cancel> {
        self.trainer.cancel()
    }

    /// Writes where the run stands to a file, whose old content is there until the new one is whole.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.course.save(&self.trainer, self.rows_until(self.steps()), path)
    }

    /// Goes on from a file that `save` wrote. Fails as [`RouterTrainer::load_state`] does; with `DataChanged` where it was begun with
    /// other data and with `RecipeValue` where with a recipe of another course, which the error names the key of. The run is
    /// then as before.
    pub fn resume(&mut self, path: &Path) -> Result<()> {
        let rows_until = |steps: u64| rows_until(&self.recipe, self.data.set.len() as u64, steps);
        self.course.resume(&mut self.trainer, self.total_steps, rows_until, path)?;
        for source in [Some(&mut self.data), self.held_out.as_mut()].into_iter().flatten() {
            source.references.fill(UNKNOWN);
        }
        Ok(())
    }

    /// The gates as a router patch.
    pub fn patch(&self) -> Result<RouterPatch> {
        let model = self.trainer.model();
        RouterPatch::new(model.config(), self.trainer.gates(), model.gates_fingerprint()?)
    }

    /// Writes the model with these gates to a directory; see [`NewGates::write`].
    pub fn write_model(&self, directory: &Path, progress: &Progress) -> Result<()> {
        self.new_gates()?.write(self.trainer.gates(), directory, progress)
    }

    /// How the recipe's model gets other gates.
    pub(super) fn new_gates(&self) -> Result<NewGates<'_>> {
        let model = self.trainer.model();
        Ok(NewGates {
            source: &self.recipe.model,
            follow_links: self.recipe.load.follow_links,
            config: model.config(),
            base: model.gates_fingerprint()?,
            shard_bytes: self.recipe.output.shard_bytes,
        })
    }

    /// The trainer.
    pub fn trainer(&self) -> &RouterTrainer {
        &self.trainer
    }

    /// Rows that the first `steps` steps take.
    fn rows_until(&self, steps: u64) -> u64 {
        rows_until(&self.recipe, self.data.set.len() as u64, steps)
    }

    fn rows_of_step(&mut self, step: u64) -> Result<Vec<u32>> {
        let places = self.rows_until(step)..self.rows_until(step + 1);
        let length = self.data.set.len();
        let mut rows = try_with_capacity("rows of a step", (places.end - places.start) as usize)?;
        for place in places {
            let (epoch, index) = (place / length as u64, (place % length as u64) as usize);
            let order = match &self.order {
                Some((known, order)) if *known == epoch => order,
                _ => &self.order.insert((epoch, shuffled(length, self.recipe.fixed.seed, epoch)?)).1,
            };
            rows.push(order[index]);
        }
        Ok(rows)
    }
}

/// Bytes an index of data takes for a row, about.
const ROW_BYTES: u64 = 16;

/// Rows that the first `steps` steps take of data of `length` rows.
fn rows_until(recipe: &TrainRecipe, length: u64, steps: u64) -> u64 {
    let most = match recipe.length {
        Length::Epochs(epochs) => length.saturating_mul(epochs),
        Length::Steps(_) => u64::MAX,
    };
    steps.saturating_mul(recipe.rows_per_step as u64).min(most)
}

fn data_options(recipe: &TrainRecipe, model: &Model) -> DataOptions {
    let data = &recipe.data;
    // Of a pair there are two.
    let longest = model.config().max_position_embeddings * if recipe.objective == Objective::Dpo { 2 } else { 1 };
    DataOptions {
        max_tokens: recipe.fixed.max_tokens.min(longest),
        long_rows: data.long_rows,
        bad_rows: data.bad_rows,
        learn_prompts: data.learn_prompts,
    }
}

/// Fingerprints of the gates that a run begins with, and of those that its pairs are compared with.
pub(super) struct CourseGates {
    pub start: u64,
    pub reference: u64,
}

/// Puts the gates in place that the recipe begins with, and those that its pairs are compared with.
fn set_gates(trainer: &mut RouterTrainer, recipe: &TrainRecipe) -> Result<CourseGates> {
    let model = Arc::clone(trainer.model());
    let stored = model.stored_gates()?;
    let of_patch = |path: &Path| -> Result<Vec<f32>> {
        let patch = RouterPatch::read(path)?;
        let checked = patch.check_model(model.config(), || model.gates_fingerprint());
        checked.map_err(|error| error.in_file(path.display().to_string()))?;
        Ok(patch.gates().to_vec())
    };
    let start = recipe.router.as_deref().map(of_patch).transpose()?.unwrap_or_else(|| stored.clone());
    let reference = match &recipe.reference {
        Reference::Start => start.clone(),
        Reference::Model => stored,
        Reference::Patch(path) => of_patch(path)?,
    };
    trainer.set_gates(&reference)?;
    trainer.set_reference();
    trainer.set_gates(&start)?;
    Ok(CourseGates { start: fingerprint(&start), reference: fingerprint(&reference) })
}

/// Means of evaluations, weighted by what each of them is a mean over.
#[derive(Default)]
struct MetricsSum {
    sum: StepMetrics,
    /// What `text_loss` and rewards are means over.
    weight: f64,
}

impl MetricsSum {
    fn add(&mut self, metrics: &StepMetrics, objective: Objective, rows: usize) {
        let weight = if objective == Objective::Sft { metrics.targets } else { rows } as f64;
        let tokens = metrics.tokens as f64;
        let sum = &mut self.sum;
        self.weight += weight;
        sum.step = metrics.step;
        sum.tokens += metrics.tokens;
        sum.targets += metrics.targets;
        sum.text_loss += weight * metrics.text_loss;
        sum.rewards.chosen += weight * metrics.rewards.chosen;
        sum.rewards.rejected += weight * metrics.rewards.rejected;
        sum.accuracy += weight * metrics.accuracy;
        sum.balance += tokens * metrics.balance;
        sum.z += tokens * metrics.z;
        sum.shares.resize(metrics.shares.len(), 0.0);
        sum.shares.iter_mut().zip(&metrics.shares).for_each(|(sum, share)| *sum += tokens * share);
    }

    fn mean(self, options: &TrainOptions) -> StepMetrics {
        let MetricsSum { mut sum, weight } = self;
        let tokens = sum.tokens as f64;
        for part in [&mut sum.text_loss, &mut sum.rewards.chosen, &mut sum.rewards.rejected, &mut sum.accuracy] {
            *part /= weight;
        }
        [&mut sum.balance, &mut sum.z].into_iter().chain(&mut sum.shares).for_each(|part| *part /= tokens);
        sum.loss = sum.text_loss + options.router.balance * sum.balance + options.router.z * sum.z;
        sum
    }
}
