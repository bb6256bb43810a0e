//! The operations a backend provides, in the order a token meets them.
//!
//! A `Backend` holds a model's weights on one device. A `Pass` is that device's workspace for one forward pass:
//! its methods are the stages of a layer, each a single fused piece of work, and the engine's forward pass calls
//! them. Neither knows about sessions: a `Batch` says which tokens stand at which positions of which pages.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::kv::{KvDtype, KvPage};
use crate::error::{Error, Result, Status};

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

/// Consecutive tokens of one sequence.
pub struct SequenceSlice<'a> {
    /// Token ids, all below vocab_size; at least one.
    pub tokens: &'a [u32],
    /// Position of the first of them: the number of positions already in the pages.
    pub start: usize,
    /// The sequence's pages, all of one dtype, enough for `start + tokens.len()` positions; those that hold positions
    /// from `start` on belong to this sequence alone.
    pub pages: &'a mut [Arc<KvPage>],
    /// Whether the logits after the last token are wanted.
    pub wants_logits: bool,
}

/// The unit of work: any mix of prompt chunks and single steps of different sequences.
pub struct Batch<'a> {
    /// At least one, at most the pass's `max_sequences`; their tokens together at most its `max_tokens`.
    pub sequences: &'a mut [SequenceSlice<'a>],
    /// Stops the pass early, with `Cancelled`.
    pub cancel: &'a Cancel,
}

impl Batch<'_> {
    /// Tokens of all sequences together.
    pub fn token_count(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.tokens.len()).sum()
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
}

/// The experts one token was sent to in one layer, highest weight first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routes<'a> {
    /// Expert indices, num_experts_per_tok of them.
    pub experts: &'a [u32],
    /// Their weights, which sum to 1.
    pub weights: &'a [f32],
}

/// A model's weights on a device.
pub trait Backend: Send + Sync {
    /// The device, for people.
    fn device_name(&self) -> String;

    /// Bytes of weights on the device: all of them, and the experts among them.
    fn weight_bytes(&self) -> (usize, usize);

    /// What keys and values are stored as where nobody asks for anything else: the dtype of the checkpoint.
    fn default_kv_dtype(&self) -> KvDtype;

    /// Memory for one more page of keys and values.
    fn new_kv_page(&self, dtype: KvDtype) -> Result<KvPage>;

    /// A workspace; everything a pass within `limits` needs is allocated here.
    fn new_pass(&self, limits: PassLimits) -> Result<Box<dyn Pass>>;
}

/// The stages of one forward pass over one batch, in the order they are called.
///
/// Results for a token depend only on its own sequence, never on what else is in the batch or on the number of
/// threads: every sum has one order.
pub trait Pass: Send {
    /// Takes in a batch's shape: token positions, and the rotary angles that go with them.
    fn begin(&mut self, batch: &Batch) -> Result<()>;

    /// `x = E[token] * s` for every token; `x: [tokens, hidden_size]`.
    fn embed(&mut self, batch: &Batch) -> Result<()>;

    /// Input norm, queries, keys and values, RoPE on queries and keys; keys and values go to the pages.
    fn norm_qkv_rope(&mut self, layer: usize, batch: &mut Batch) -> Result<()>;

    /// Causal attention over the pages, the output projection, and the residual: `x += attn`.
    fn attention(&mut self, layer: usize, batch: &Batch) -> Result<()>;

    /// Post-attention norm, router logits, softmax over all experts, the top k and their weights.
    fn router(&mut self, layer: usize, batch: &Batch) -> Result<()>;

    /// The chosen experts, combined by weight, and the residual: `x += moe`.
    fn experts(&mut self, layer: usize, batch: &Batch) -> Result<()>;

    /// Final norm and head for the last token of each sequence that wants logits.
    fn head(&mut self, batch: &Batch) -> Result<()>;

    /// Logits `[vocab_size]` of sequence `sequence` of the last batch, if it wanted them.
    fn logits(&self, sequence: usize) -> Option<&[f32]>;

    /// Where token `token` of the last batch (counted over all sequences) was sent in `layer`.
    fn routes(&self, layer: usize, token: usize) -> Routes<'_>;

    /// Size of the workspace in bytes.
    fn bytes(&self) -> usize;
}
