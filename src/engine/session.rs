//! A sequence with a workspace of its own: what a host steps.

use std::ops::Deref;
use std::sync::Arc;

use super::forward::forward;
use super::model::Model;
use super::sample::Sampling;
use super::sequence::Sequence;
use crate::backend::{Batch, Cancel, KvDtype, Pass, PassLimits};
use crate::error::{Error, Result, Status};

/// Tokens a prompt is cut into where the host does not say.
pub const DEFAULT_PREFILL_CHUNK: usize = 256;
/// Largest context a session gets where the host does not say; a smaller limit of the model wins.
pub const DEFAULT_CONTEXT: usize = 8192;

/// What a host may choose when it makes a session. Zeros take the defaults.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionOptions {
    /// Tokens the session can hold; memory for all of them is reserved at once.
    pub context_size: usize,
    /// Most tokens of one forward pass; the workspace is sized for it.
    pub prefill_chunk: usize,
    /// How keys and values are stored; None is the dtype of the checkpoint.
    pub kv_dtype: Option<KvDtype>,
}

impl SessionOptions {
    /// The options with defaults filled in, or an error naming the one that is out of range.
    fn resolve(&self, model: &Model) -> Result<SessionOptions> {
        let longest = model.config().max_position_embeddings;
        let context_size = if self.context_size == 0 { longest.min(DEFAULT_CONTEXT) } else { self.context_size };
        if context_size > longest {
            let text = format!("context_size is {context_size}, the model's max_position_embeddings is {longest}");
            return Err(Error::new(Status::InvalidArgument, text).at_key("context_size"));
        }
        let chunk = if self.prefill_chunk == 0 { DEFAULT_PREFILL_CHUNK } else { self.prefill_chunk };
        Ok(SessionOptions { context_size, prefill_chunk: chunk.min(context_size), ..*self })
    }
}

/// A sequence being generated. Reading it goes through to its [`Sequence`].
///
/// Not to be used by two threads at once; its `cancel` is the exception. A cancel that comes while no call is running
/// stops the next one.
pub struct Session {
    sequence: Sequence,
    pass: Box<dyn Pass>,
    max_tokens: usize,
    cancel: Arc<Cancel>,
}

impl Deref for Session {
    type Target = Sequence;
    fn deref(&self) -> &Sequence {
        &self.sequence
    }
}

impl Session {
    /// A session without tokens. All memory it will ever need is reserved here.
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Session> {
        let SessionOptions { context_size, prefill_chunk, kv_dtype } = options.resolve(&model)?;
        let limits = PassLimits { max_tokens: prefill_chunk, max_sequences: 1, max_context: context_size };
        let pass = model.backend().new_pass(limits)?;
        let sequence = Sequence::new(model, context_size, kv_dtype)?;
        Ok(Session { sequence, pass, max_tokens: prefill_chunk, cancel: Arc::default() })
    }

    /// Bytes of its own: keys and values, and workspace.
    pub fn bytes(&self) -> usize {
        self.sequence.kv_bytes() + self.pass.bytes()
    }

    /// Stops the call in progress, from any thread.
    pub fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// How `step` draws from now on.
    pub fn set_sampling(&mut self, sampling: Sampling) -> Result<()> {
        self.sequence.set_sampling(sampling)
    }

    /// Appends tokens without running them; `step` and `SessionBatch` will.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        self.sequence.push(tokens)
    }

    /// Appends tokens and runs them, so that the logits after the last are ready.
    ///
    /// On `Cancelled` the session keeps the tokens that were run; the others are as if never given.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        let held = self.sequence.tokens().len();
        self.sequence.push(tokens)?;
        self.run_pending().inspect_err(|_| self.sequence.drop_pending(held))
    }

    /// Runs what is pending and draws the next token, which is appended and returned.
    pub fn step(&mut self) -> Result<u32> {
        self.sequence.check_step()?;
        self.run_pending()?;
        self.sequence.draw()
    }

    /// Keeps the first `token_count` tokens. What follows is bit for bit what a session fed only those would give.
    pub fn rewind(&mut self, token_count: usize) -> Result<()> {
        self.sequence.rewind(token_count)
    }

    pub(super) fn sequence_mut(&mut self) -> &mut Sequence {
        &mut self.sequence
    }

    fn run_pending(&mut self) -> Result<()> {
        if self.cancel.take() {
            return Err(Cancel::error());
        }
        let layers = self.sequence.model().config().num_hidden_layers;
        while self.sequence.pending() > 0 {
            let count = self.sequence.pending().min(self.max_tokens);
            let mut slices = [self.sequence.slice(count)];
            let mut batch = Batch { sequences: &mut slices, cancel: &self.cancel };
            if let Err(error) = forward(&mut *self.pass, layers, &mut batch) {
                if error.status() == Status::Cancelled {
                    self.cancel.take();
                }
                return Err(error);
            }
            self.sequence.finish(&*self.pass, 0, count, count - 1);
        }
        Ok(())
    }
}
