//! A trainer: a model's gates, their gradients for a step's documents or pairs, and the optimiser that moves them.

use std::sync::Arc;

use super::adamw::{AdamW, OptimiserOptions, norm};
use super::backward::Auxiliary;
use super::balance::{RouterLoad, RouterLosses};
use super::document::{Document, Packed};
use super::loss::{PairLogProbabilities, PairLoss, PreferenceOptions, supervised};
use super::pass::{PassSize, RouterPass};
use super::routing::Noise;
use crate::backend::ops::Cancel;
use crate::engine::Model;
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::random::mixed;

/// What a host may choose about training.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainOptions {
    /// Tokens of a batch, which is as much as goes through the model at once: a step of more takes several and adds their
    /// gradients. No document may be longer; of a pair, both together.
    pub max_tokens: usize,
    /// Batches are filled up to max_tokens with tokens that no loss counts, so that all have one size.
    pub fill: bool,
    /// The activations of all layers are kept for the backward pass, where those between the first and the last are else computed
    /// again: the same bits, sooner, in more memory (`pass::training_bytes`). Of the published geometry 0.50 MB more
    /// for each token of a batch and layer.
    pub keep_activations: bool,
    /// Every token is sent to all experts, with their probabilities as weights.
    pub soft: bool,
    /// Standard deviation of what is added to router logits while gates move; 0 is nothing.
    pub noise: f64,
    /// Of the noise.
    pub seed: u64,
    /// The router's own losses.
    pub router: RouterLosses,
    /// What is learned from pairs.
    pub preference: PreferenceOptions,
    /// How gates move.
    pub optimiser: OptimiserOptions,
}

impl Default for TrainOptions {
    fn default() -> Self {
        TrainOptions {
            max_tokens: 2048,
            fill: false,
            keep_activations: false,
            soft: false,
            noise: 0.0,
            seed: 0,
            // router_aux_loss_coef of the published models.
            router: RouterLosses { balance: 0.02, form: Default::default(), z: 0.0 },
            preference: PreferenceOptions::default(),
            optimiser: OptimiserOptions::default(),
        }
    }
}

impl TrainOptions {
    /// Fails with `InvalidArgument` where a number is out of range.
    pub fn check(&self) -> Result<()> {
        self.preference.check()?;
        self.optimiser.check()?;
        let numbers = [("noise", self.noise), ("balance", self.router.balance), ("z", self.router.z)];
        for (key, value) in numbers {
            if !(value >= 0.0 && value.is_finite()) {
                let text = format!("{key} is {value}, expected 0 (none) or more");
                return Err(Error::new(Status::InvalidArgument, text).at_key(key));
            }
        }
        if self.max_tokens == 0 || self.max_tokens > MAX_TOKENS {
            let text = format!("max_tokens is {}, expected 1 to {MAX_TOKENS}", self.max_tokens);
            return Err(Error::new(Status::InvalidArgument, text).at_key("max_tokens"));
        }
        Ok(())
    }
}

/// Most tokens of a batch.
pub const MAX_TOKENS: usize = 1 << 20;

/// A prompt's two answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Pair {
    /// The better one, with the prompt before it.
    pub chosen: Document,
    /// The other.
    pub rejected: Document,
    /// What the reference gates make of them; computed when it is first needed.
    pub reference: Option<PairLogProbabilities>,
}

impl Pair {
    /// Without its reference.
    pub fn new(chosen: Document, rejected: Document) -> Pair {
        Pair { chosen, rejected, reference: None }
    }
}

/// What a step, or an evaluation, came to. Means are over response tokens, pairs, or tokens and layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepMetrics {
    /// Steps taken, this one included.
    pub step: u64,
    /// Everything together, as its gradient was taken.
    pub loss: f64,
    /// The text's part: the mean negative log-likelihood, or the mean loss of pairs.
    pub text_loss: f64,
    /// The balancing loss, without its coefficient.
    pub balance: f64,
    /// The z-loss, without its coefficient.
    pub z: f64,
    /// Tokens, and those among them that were learned.
    pub tokens: usize,
    pub targets: usize,
    /// `[layers, experts]`: the share of choices each expert got; a layer's sum is 1.
    pub shares: Vec<f64>,
    /// Norm of all gradients before clipping; 0 where nothing was learned.
    pub gradient_norm: f64,
    /// The learning rate of the step.
    pub learning_rate: f64,
    /// Of pairs: mean rewards, and the share whose chosen answer has the higher one.
    pub rewards: PairLogProbabilities,
    pub accuracy: f64,
}

impl StepMetrics {
    /// By how much the chosen answers' reward is higher, in the mean.
    pub fn margin(&self) -> f64 {
        self.rewards.chosen - self.rewards.rejected
    }
}

/// Trains the routers of a model, which itself stays as it is. One thread at a time.
pub struct RouterTrainer {
    model: Arc<Model>,
    options: TrainOptions,
    pass: RouterPass,
    pub(super) gates: Vec<f32>,
    /// Those that pairs are compared with: the model's, until `set_reference`.
    pub(super) reference: Vec<f32>,
    gradients: Vec<f32>,
    pub(super) optimiser: AdamW,
    cancel: Arc<Cancel>,
}

/// What a step is made of: documents that go through the model in one batch.
enum Unit<'a> {
    Document(&'a Document),
    Pair(&'a Pair, PairLogProbabilities),
}

impl Unit<'_> {
    fn documents(&self) -> impl Iterator<Item = &Document> + Clone {
        match self {
            Unit::Document(document) => [Some(*document), None],
            Unit::Pair(pair, _) => [Some(&pair.chosen), Some(&pair.rejected)],
        }
        .into_iter()
        .flatten()
    }

    fn tokens(&self) -> usize {
        self.documents().map(|document| document.tokens.len()).sum()
    }
}

/// What a batch's part of a step is measured by.
struct Whole {
    tokens: usize,
    targets: usize,
    units: usize,
}

impl RouterTrainer {
    /// Allocates all that a step needs. Fails with `InvalidArgument` where the model has no router that could learn, some of
    /// its experts are not in its device's memory, or an option is out of range.
    pub fn new(model: &Arc<Model>, options: &TrainOptions) -> Result<RouterTrainer> {
        options.check()?;
        let cancel = Arc::new(Cancel::default());
        let size = PassSize::new(options.max_tokens, options.keep_activations);
        let pass = RouterPass::new(model.backend(), model.config(), size, options.soft, &cancel)?;
        let gates = pass.read_model_gates()?;
        Ok(RouterTrainer {
            model: Arc::clone(model),
            options: *options,
            reference: gates.clone(),
            gradients: try_vec("gradients of gates", gates.len(), 0f32)?,
            optimiser: AdamW::new(gates.len())?,
            gates,
            pass,
            cancel,
        })
    }

    /// The model whose routers are trained.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Ends the running or the next call with `Cancelled`, from any thread. What it was to change is then as before.
    pub fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// The gates, `[layers, experts, hidden_size]`.
    pub fn gates(&self) -> &[f32] {
        &self.gates
    }

    /// Puts other gates in their place, as they are laid out; the optimiser's moments stay.
    pub fn set_gates(&mut self, gates: &[f32]) -> Result<()> {
        if gates.len() != self.gates.len() {
            let text = format!("{} numbers, but the gates are {}", gates.len(), self.gates.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("gates"));
        }
        self.gates.copy_from_slice(gates);
        Ok(())
    }

    /// The gates as they are now become what pairs are compared with: a second stage of training begins. References that pairs
    /// already have are of the gates before.
    pub fn set_reference(&mut self) {
        self.reference.copy_from_slice(&self.gates);
    }

    /// Changes how the gates move from now on, such as a learning rate's schedule that takes the length of the data.
    pub fn set_optimiser(&mut self, options: &OptimiserOptions) -> Result<()> {
        options.check()?;
        self.options.optimiser = *options;
        Ok(())
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.optimiser.steps()
    }

    /// Moves the gates by the gradient of the mean over all response tokens of these documents.
    pub fn step(&mut self, documents: &[Document]) -> Result<StepMetrics> {
        let metrics = self.gradient(documents)?;
        self.update(metrics)
    }

    /// Moves the gates by the gradient of the mean over these pairs, whose references are computed where they have none.
    pub fn step_pairs(&mut self, pairs: &mut [Pair]) -> Result<StepMetrics> {
        let metrics = self.gradient_of_pairs(pairs)?;
        self.update(metrics)
    }

    /// What `step` would move the gates by, without moving them; see `gradients`.
    pub fn gradient(&mut self, documents: &[Document]) -> Result<StepMetrics> {
        self.run_documents(documents, true)
    }

    /// What `step_pairs` would move the gates by, without moving them; see `gradients`.
    pub fn gradient_of_pairs(&mut self, pairs: &mut [Pair]) -> Result<StepMetrics> {
        self.run_pairs(pairs, true)
    }

    /// The losses of documents, without noise; nothing is learned.
    pub fn evaluate(&mut self, documents: &[Document]) -> Result<StepMetrics> {
        self.run_documents(documents, false)
    }

    /// The losses of pairs, without noise; nothing is learned.
    pub fn evaluate_pairs(&mut self, pairs: &mut [Pair]) -> Result<StepMetrics> {
        self.run_pairs(pairs, false)
    }

    /// The gradients of the last `step`, `gradient` and their like, laid out as the gates.
    pub fn gradients(&self) -> &[f32] {
        &self.gradients
    }

    fn update(&mut self, mut metrics: StepMetrics) -> Result<StepMetrics> {
        let options = &self.options.optimiser;
        metrics.learning_rate = options.learning_rate_at(self.optimiser.steps());
        self.optimiser.update(options, metrics.gradient_norm, &self.gradients, &mut self.gates)?;
        metrics.step = self.optimiser.steps();
        Ok(metrics)
    }

    fn run_documents(&mut self, documents: &[Document], learn: bool) -> Result<StepMetrics> {
        let mut units = try_with_capacity("documents of a step", documents.len())?;
        units.extend(documents.iter().map(Unit::Document));
        self.run(&units, learn)
    }

    fn run_pairs(&mut self, pairs: &mut [Pair], learn: bool) -> Result<StepMetrics> {
        self.add_references(pairs)?;
        let units: Vec<Unit> = pairs.iter().map(|pair| Unit::Pair(pair, pair.reference.unwrap_or_default())).collect();
        self.run(&units, learn)
    }

    /// Computes what the reference gates make of the pairs that have none yet.
    pub fn add_references(&mut self, pairs: &mut [Pair]) -> Result<()> {
        let missing: Vec<usize> = (0..pairs.len()).filter(|index| pairs[*index].reference.is_none()).collect();
        let units: Vec<Unit> =
            missing.iter().map(|index| Unit::Pair(&pairs[*index], PairLogProbabilities::default())).collect();
        self.check(&units)?;
        let mut found = Vec::new();
        self.pass.set_gates(&self.reference)?;
        for units in self.batches(&units) {
            let batch = self.packed(units)?;
            self.forward(&batch, None, false)?;
            found.extend((0..units.len()).map(|pair| self.pair_log_probabilities(&batch, pair)));
        }
        for (index, reference) in missing.into_iter().zip(found) {
            pairs[index].reference = Some(reference);
        }
        Ok(())
    }

    fn check(&self, units: &[Unit]) -> Result<()> {
        let (config, max_tokens) = (self.model.config(), self.options.max_tokens);
        for unit in units {
            unit.documents().try_for_each(|document| document.check(config, max_tokens))?;
            if unit.tokens() > max_tokens {
                let tokens = unit.tokens();
                let text = format!("a pair has {tokens} tokens, more than the {max_tokens} of a batch (max_tokens)");
                return Err(Error::new(Status::InvalidArgument, text).at_key("pair"));
            }
        }
        Ok(())
    }

    /// Consecutive units that fit in a batch together.
    fn batches<'u, 'a>(&self, units: &'u [Unit<'a>]) -> Vec<&'u [Unit<'a>]> {
        let (mut batches, mut first, mut tokens) = (Vec::new(), 0, 0);
        for (index, unit) in units.iter().enumerate() {
            if index > first && tokens + unit.tokens() > self.options.max_tokens {
                batches.push(&units[first..index]);
                (first, tokens) = (index, 0);
            }
            tokens += unit.tokens();
        }
        if first < units.len() {
            batches.push(&units[first..]);
        }
        batches
    }

    fn packed(&self, units: &[Unit]) -> Result<Packed> {
        let length = if self.options.fill { self.options.max_tokens } else { 0 };
        Packed::new(units.iter().flat_map(Unit::documents), length, PADDING)
    }

    fn forward(&mut self, batch: &Packed, noise: Option<&Noise>, learn: bool) -> Result<()> {
        let result = self.pass.forward(batch, noise, learn);
        self.answered(result)
    }

    /// A wish to stop counts once.
    fn answered(&self, result: Result<()>) -> Result<()> {
        if result.is_err() {
            self.cancel.take();
        }
        result
    }

    /// Of the two responses of a batch's pair.
    fn pair_log_probabilities(&self, batch: &Packed, pair: usize) -> PairLogProbabilities {
        let of = |document: usize| {
            let tokens = self.pass.log_probabilities(batch.target_ranges[document].clone());
            self.options.preference.of_response(tokens)
        };
        PairLogProbabilities { chosen: of(2 * pair), rejected: of(2 * pair + 1) }
    }

    fn run(&mut self, units: &[Unit], learn: bool) -> Result<StepMetrics> {
        self.check(units)?;
        if units.is_empty() {
            return Err(Error::new(Status::InvalidArgument, "there is nothing to learn from: no document was given"));
        }
        let documents = || units.iter().flat_map(Unit::documents);
        let whole = Whole {
            tokens: documents().map(|document| document.tokens.len()).sum(),
            targets: documents().map(Document::targets).sum(),
            units: units.len(),
        };
        let layers_experts = self.model.config().num_hidden_layers * self.model.config().num_local_experts;
        let mut metrics = StepMetrics {
            step: self.optimiser.steps(),
            tokens: whole.tokens,
            targets: whole.targets,
            shares: vec![0.0; layers_experts],
            ..StepMetrics::default()
        };
        self.pass.set_gates(&self.gates)?;
        self.pass.clear_gradients()?;
        for (index, units) in self.batches(units).into_iter().enumerate() {
            self.run_batch(units, &whole, learn.then_some(index), &mut metrics)?;
        }
        let losses = &self.options.router;
        metrics.loss = metrics.text_loss + losses.balance * metrics.balance + losses.z * metrics.z;
        if learn {
            self.pass.read_gradients(&mut self.gradients)?;
            metrics.gradient_norm = norm(&self.gradients);
        }
        Ok(metrics)
    }

    /// One batch of a step, `index` of those that learn.
    fn run_batch(
        &mut self,
        units: &[Unit],
        whole: &Whole,
        index: Option<usize>,
        metrics: &mut StepMetrics,
    ) -> Result<()> {
        let batch = self.packed(units)?;
        let noise = index.filter(|_| self.options.noise > 0.0).map(|index| Noise {
            deviation: self.options.noise,
            seed: mixed(mixed(self.options.seed ^ mixed(self.optimiser.steps())) ^ index as u64),
        });
        self.forward(&batch, noise.as_ref(), index.is_some())?;
        let mut derivatives = try_vec("derivatives of targets", batch.targets.len(), 0f32)?;
        match units[0] {
            Unit::Document(_) => {
                let log_probabilities = self.pass.log_probabilities(0..batch.targets.len());
                let (loss, derivative) = supervised(log_probabilities, whole.targets);
                metrics.text_loss += loss;
                derivatives.fill(derivative);
            }
            Unit::Pair(..) => {
                for (index, unit) in units.iter().enumerate() {
                    let Unit::Pair(_, reference) = unit else { continue };
                    let policy = self.pair_log_probabilities(&batch, index);
                    let pair = self.options.preference.of_pair(policy, *reference);
                    metrics.add_pair(&pair, 1.0 / whole.units as f64);
                    let responses = [2 * index, 2 * index + 1].map(|document| batch.target_ranges[document].clone());
                    let share = 1.0 / whole.units as f64;
                    self.options.preference.write_derivatives(&pair, share, responses, &mut derivatives);
                }
            }
        }
        let losses = self.options.router;
        let load = RouterLoad::new(self.pass.choice(), self.pass.routes(), losses.form);
        // The router's own losses are means over tokens: a batch counts by its tokens.
        let share = batch.counted as f64 / whole.tokens as f64;
        metrics.balance += share * load.balance;
        metrics.z += share * load.z;
        metrics.shares.iter_mut().zip(&load.shares).for_each(|(all, of_batch)| *all += share * of_batch);
        if index.is_none() {
            return Ok(());
        }
        let auxiliary = Auxiliary { load: &load, losses: &losses, share };
        let result = self.pass.backward(&batch, &derivatives, &auxiliary);
        self.answered(result)
    }
}

/// The token batches are filled up with: any would do.
const PADDING: u32 = 0;

impl StepMetrics {
    fn add_pair(&mut self, pair: &PairLoss, share: f64) {
        self.text_loss += share * pair.loss;
        self.rewards.chosen += share * pair.rewards.chosen;
        self.rewards.rejected += share * pair.rewards.rejected;
        if pair.rewards.chosen > pair.rewards.rejected {
            self.accuracy += share;
        }
    }
}
