//! The operations a backend provides, in the order a token meets them.
//!
//! A `Backend` holds a model's weights on one device. A `Pass` is that device's workspace for one forward pass:
//! its methods are the stages of a layer, each a single fused piece of work, and the engine's forward pass calls
//! them. Neither knows about sessions: a `Batch` says which tokens stand at which positions of which pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Instant;

use super::gates::{AppliedGates, GateMatrices};
use super::kv::{KvDtype, KvGeometry, KvPage, PAGE_TOKENS};
use super::logits::{Logits, LogitsPlace, PassLogits};
use super::observer::Observer;
use super::residency::{OffloadCounts, WeightResidency};
use super::training::{Training, TrainingLimits};
use crate::error::{Error, Result, Status};
use crate::model::Config;

/// A wish to stop, set from any thread; passes look at it between pieces of work.
#[derive(Debug, Default)]
pub struct Cancel(AtomicBool);

impl Cancel {
    /// Asks the running or next pass to stop.
    pub fn request(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether a stop has been asked for.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Takes the wish back, answering whether there was one.
    pub fn take(&self) -> bool {
        self.0.swap(false, Ordering::AcqRel)
    }

    /// The error of work that stopped because of the wish.
    pub fn error() -> Error {
        Error::new(Status::Cancelled, "the work was cancelled")
    }
}

/// How far one call may go: until it is cancelled, its time is over, or its layers are used up. Passes look at it
/// between pieces of work.
#[derive(Debug)]
pub struct Limit<'a> {
    cancel: &'a Cancel,
    deadline: Option<Instant>,
    /// Layers left, the head counted as one; usize::MAX for any number.
    layers: AtomicUsize,
    /// Whether a piece of work was done under this limit: every call may do one, or the smallest budgets would get
    /// nowhere.
    worked: AtomicBool,
}

impl<'a> Limit<'a> {
    /// A limit of time, layers, or both; `None` is no limit.
    pub fn new(cancel: &'a Cancel, deadline: Option<Instant>, layers: Option<usize>) -> Self {
        let layers = AtomicUsize::new(layers.unwrap_or(usize::MAX));
        Limit { cancel, deadline, layers, worked: AtomicBool::new(false) }
    }

    /// Only a cancel ends the work.
    pub fn none(cancel: &'a Cancel) -> Self {
        Limit::new(cancel, None, None)
    }

    /// The same without time and layers: only a cancel ends the work.
    pub fn without_budget(&self) -> Limit<'a> {
        Limit::none(self.cancel)
    }

    /// Whether no further piece of work may begin.
    pub fn is_reached(&self) -> bool {
        self.cancel.is_requested() || self.is_spent()
    }

    /// Whether time or layers are used up, and something was done in them.
    pub fn is_spent(&self) -> bool {
        let over = self.layers.load(Ordering::Relaxed) == 0
            || self.deadline.is_some_and(|deadline| Instant::now() >= deadline);
        over && self.worked.load(Ordering::Relaxed)
    }

    /// Whether nothing but a cancel ends the work.
    pub fn is_cancel_alone(&self) -> bool {
        self.deadline.is_none() && self.layers.load(Ordering::Relaxed) == usize::MAX
    }

    /// Whether the work has to be done by a time.
    pub fn has_deadline(&self) -> bool {
        self.deadline.is_some()
    }

    /// Fails with `Cancelled` if a cancel was asked for.
    pub fn check_cancel(&self) -> Result<()> {
        if self.cancel.is_requested() { Err(Cancel::error()) } else { Ok(()) }
    }

    /// A piece of work was done.
    pub fn note_work(&self) {
        self.worked.store(true, Ordering::Relaxed);
    }

    /// A layer, or the head, was finished.
    pub fn note_layer(&self) {
        let left = self.layers.load(Ordering::Relaxed);
        if left != usize::MAX {
            self.layers.store(left.saturating_sub(1), Ordering::Relaxed);
        }
    }
}

/// What a host changes about a sequence's router.
#[derive(Clone, Copy, Debug)]
pub struct RouterControl<'a> {
    /// `[layers]`: a bit for each expert that may be chosen; at least one in each layer.
    pub allowed: &'a [u64],
    /// `[layers, num_local_experts]`: added to the router's logits; finite.
    pub bias: &'a [f32],
}

/// The mask that allows all of `experts` experts, 1 to 64 of them.
pub fn every_expert(experts: usize) -> u64 {
    u64::MAX >> (64 - experts.clamp(1, 64))
}

/// How many experts are among choices, NO_EXPERT not counted.
pub fn count_touched(chosen: &[u32]) -> usize {
    let bits = chosen.iter().filter(|expert| **expert != NO_EXPERT).fold(0u64, |bits, expert| bits | 1 << expert);
    bits.count_ones() as usize
}

/// In routes: no expert, where fewer than num_experts_per_tok are allowed. Its weight is 0.
pub const NO_EXPERT: u32 = u32::MAX;

/// In targets: nothing is wanted after this token.
pub const NO_TARGET: u32 = u32::MAX;

/// Consecutive tokens of one sequence.
pub struct SequenceSlice<'a> {
    /// Token ids, all below vocab_size; at least one.
    pub tokens: &'a [u32],
    /// Position of the first of them: the number of positions already in the pages.
    pub start: usize,
    /// The sequence's pages, all of one dtype, enough for `start + tokens.len()` positions; those that hold positions
    /// from `start` on belong to this sequence alone.
    pub pages: &'a mut [Arc<KvPage>],
    /// Where the logits after the last token are wanted, if they are: a `Logits::place`.
    pub logits: Option<LogitsPlace>,
    /// Empty, or for each token the one whose log-probability after it is wanted, or NO_TARGET.
    pub targets: &'a [u32],
    /// What the host changed about the router.
    pub router: Option<RouterControl<'a>>,
}

/// The unit of work: any mix of prompt chunks and single steps of different sequences.
pub struct Batch<'a, 'b> {
    /// At least one, at most the pass's `max_sequences`; their tokens together at most its `max_tokens`.
    pub sequences: &'b mut [SequenceSlice<'a>],
    /// What routers choose by, the same from the batch's first stage to its last: the stored gates where there are none.
    pub gates: Option<&'b AppliedGates>,
}

impl Batch<'_, '_> {
    /// Tokens of all sequences together.
    pub fn token_count(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
    }

    /// Fails with `Internal` unless this is a batch that a pass of these limits can run.
    pub fn check(&self, config: &Config, limits: &PassLimits) -> Result<()> {
        let longest = self.sequences.iter().map(|s| s.start + s.tokens.len()).max().unwrap_or(0);
        let geometry = KvGeometry::of(config, KvDtype::F32);
        let is_token = |token: &u32| (*token as usize) < config.vocab_size;
        let fits = self.token_count() <= limits.max_tokens
            && self.sequences.len() <= limits.max_sequences
            && longest <= limits.max_context
            && self.sequences.iter().all(|s| {
                s.pages.len() * PAGE_TOKENS >= s.start + s.tokens.len()
                    && s.pages.iter().all(|page| page.geometry() == s.pages[0].geometry())
                    && s.pages.first().is_none_or(|page| page.geometry().same_model(&geometry))
                    && s.tokens.iter().all(is_token)
                    && (s.targets.is_empty() || s.targets.len() == s.tokens.len())
                    && s.targets.iter().all(|target| *target == NO_TARGET || is_token(target))
                    && s.router.is_none_or(|router| {
                        router.allowed.len() == config.num_hidden_layers
                            && router.bias.len() == config.num_hidden_layers * config.num_local_experts
                    })
            });
        match fits {
            true => Ok(()),
            false => {
                let text = "a batch is larger than its pass or has tokens it may not have";
                Err(Error::new(Status::Internal, text))
            }
        }
    }
}

/// What a pass's workspace is sized for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassLimits {
    /// Tokens in one batch.
    pub max_tokens: usize,
    /// Sequences in one batch.
    pub max_sequences: usize,
    /// Positions in any of them.
    pub max_context: usize,
    /// Positions whose logits are held at once: at least max_sequences; more make scoring read the head less often.
    pub logit_rows: usize,
}

/// The experts one token was sent to in one layer, highest weight first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routes<'a> {
    /// Expert indices, num_experts_per_tok of them; NO_EXPERT at the end where fewer were allowed.
    pub experts: &'a [u32],
    /// Their weights, which sum to 1.
    pub weights: &'a [f32],
}

/// A model's weights on a device.
pub trait Backend: Send + Sync {
    /// The device, for people.
    fn device_name(&self) -> String;

    /// Bytes of weights: all of them, and the experts among them.
    fn weight_bytes(&self) -> (usize, usize);

    /// Where they are.
    fn residency(&self) -> WeightResidency;

    /// Limits the bytes of weights on the device, 0 being no limit: experts move until those are there that a load with this
    /// limit would leave there. Passes go on; what they have begun is waited for. Where it fails, with `InvalidArgument` for a
    /// limit below the least, `OutOfMemory` or as devices do, experts are where `residency` says. In host memory nothing is to
    /// be done.
    fn set_device_memory_limit(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// What experts in host memory have cost, where the device is another.
    fn offload_counts(&self) -> OffloadCounts {
        OffloadCounts::default()
    }

    /// What keys and values are stored as where nobody asks for anything else: the dtype of the checkpoint.
    fn default_kv_dtype(&self) -> KvDtype;

    /// Memory for one more page of keys and values.
    fn new_kv_page(&self, dtype: KvDtype) -> Result<KvPage>;

    /// Memory for the logits of a sequence.
    fn new_logits(&self) -> Result<Logits>;

    /// A workspace; everything a pass within `limits` needs is allocated here.
    fn new_pass(&self, limits: PassLimits) -> Result<Box<dyn Pass>>;

    /// Begins to collect what matrices are multiplied with in passes that are made while somebody holds the collection.
    /// Fails with `OutOfMemory`.
    fn observe(&self) -> Result<Arc<Observer>>;

    /// A workspace for training the model's routers. A cancel ends what runs in it. Fails with `InvalidArgument` on a
    /// device that does not train yet.
    fn new_training(&self, _limits: TrainingLimits, _cancel: &Arc<Cancel>) -> Result<Box<dyn Training>> {
        let text = format!("{} does not train routers; load the model on the CPU for that", self.device_name());
        Err(Error::new(Status::InvalidArgument, text).at_key("device"))
    }

    /// Reads the gates of all layers as they were loaded, whatever patch is applied, to `out: [layers, experts, hidden_size]`;
    /// a dense model has none. Fails as devices do.
    fn read_gates(&self, out: &mut [f32]) -> Result<()>;

    /// Brings gates `[layers, experts, hidden_size]`, finite, to the device, for batches that name them; the stored ones stay.
    /// Fails with `OutOfMemory` and as devices do; nothing has changed then. Not for a dense model.
    fn new_gates(&self, gates: &[f32]) -> Result<GateMatrices>;

    /// A number that differs between models that give different results: of sizes, numerical options, and bytes from
    /// all over the weights.
    fn fingerprint(&self) -> u64;
}

/// The stages of one forward pass over one batch, in the order they are called.
///
/// A stage whose limit is reached answers `Pending` and is called again, with the same batch, to go on where it
/// stopped, inside a matrix if need be. Until the last stage is done no other batch may come between; `begin`
/// forgets one that was left unfinished.
///
/// Results for a token depend only on its own sequence, never on what else is in the batch, on where a stage
/// stopped, or on the number of threads: every sum has one order.
pub trait Pass: Send {
    /// Takes in a batch's shape.
    fn begin(&mut self, batch: &Batch) -> Result<()>;

    /// `x = E[token] * s` for every token, and the rotary angles of its position; `x: [tokens, hidden_size]`.
    fn embed(&mut self, batch: &Batch, limit: &Limit) -> Poll<Result<()>>;

    /// Input norm, queries, keys and values, RoPE on queries and keys; keys and values go to the pages.
    fn norm_qkv_rope(&mut self, layer: usize, batch: &mut Batch, limit: &Limit) -> Poll<Result<()>>;

    /// Causal attention over the pages, the output projection, and the residual: `x += attn`.
    fn attention(&mut self, layer: usize, batch: &Batch, limit: &Limit) -> Poll<Result<()>>;

    /// Post-attention norm, router logits, softmax over all allowed experts, the top k and their weights.
    fn router(&mut self, layer: usize, batch: &Batch, limit: &Limit) -> Poll<Result<()>>;

    /// The chosen experts, combined by weight, and the residual: `x += moe`.
    fn experts(&mut self, layer: usize, batch: &Batch, limit: &Limit) -> Poll<Result<()>>;

    /// Final norm and head: the log-probabilities of targets, and the logits after the last token of each sequence
    /// that wants them.
    fn head(&mut self, batch: &Batch, limit: &Limit) -> Poll<Result<()>>;

    /// Whether the stages are wanted as a recording: then they are all called once, which does nothing but write them down, and
    /// `end_recording` follows, on the same thread. Comes after `begin`.
    fn begin_recording(&mut self, _limit: &Limit) -> Result<bool> {
        Ok(false)
    }

    /// Ends what `begin_recording` began, the stages having ended with `recorded`. A recording that came to nothing is no error:
    /// the batch goes on by stages.
    fn end_recording(&mut self, _recorded: Result<()>) -> Result<()> {
        Ok(())
    }

    /// Does all stages at once, where they were recorded for batches of this one's shape and the limit allows it: nothing but a
    /// cancel may end it, and that not before all is done. Whether it did; if not, nothing was done.
    fn replay(&mut self, _batch: &mut Batch, _limit: &Limit) -> Result<bool> {
        Ok(false)
    }

    /// What there is of the logits of sequence `sequence` of the last batch, if it wanted them.
    fn logits(&self, sequence: usize) -> Option<PassLogits<'_>>;

    /// The log-probability of token `token`'s target (tokens counted over all sequences of the last batch), in nats.
    fn log_probability(&self, token: usize) -> f32;

    /// Writes the hidden state of token `token` of the last batch after the final norm to `out: [hidden_size]`. Fails where
    /// it has to be fetched from a device and cannot.
    fn hidden_state(&self, token: usize, out: &mut [f32]) -> Result<()>;

    /// Where token `token` of the last batch (counted over all sequences) was sent in `layer`.
    fn routes(&self, layer: usize, token: usize) -> Routes<'_>;

    /// Experts that tokens of the last batch were sent to in `layer`: those whose weights were read.
    fn touched_experts(&self, layer: usize) -> usize;

    /// Size of the workspace in bytes.
    fn bytes(&self) -> usize;
}
