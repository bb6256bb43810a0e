//! One sequence: its tokens, their keys and values, and what its last position gave.

use std::sync::Arc;

use super::kv::KvPages;
use super::model::Model;
use super::sample::{Draw, LogitBias, Sampler, Sampling, top_log_probabilities};
use crate::backend::{Pass, SequenceSlice, ops::Routes};
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, try_with_capacity};

/// Tokens and state of one sequence, without the workspace that runs it.
///
/// The last tokens may be *pending*: held, but not yet run through the model. A token that was drawn stays pending
/// until somebody continues from it, so the last token of a generation is never computed.
pub struct Sequence {
    model: Arc<Model>,
    context_size: usize,
    pages: KvPages,
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the pages; the rest are pending.
    processed: usize,
    /// Whether `logits` and the routes are those of the last token that is not drawn from them.
    ready: bool,
    /// `[vocab_size]`
    logits: Buffer<f32>,
    /// `[num_hidden_layers, num_experts_per_tok]` each: the last position's routes.
    route_experts: Buffer<u32>,
    route_weights: Buffer<f32>,
    sampling: Sampling,
    sampler: Sampler,
}

impl Sequence {
    /// A sequence without tokens. Memory for `context_size` of them is reserved here.
    pub fn new(model: Arc<Model>, context_size: usize) -> Result<Sequence> {
        let config = model.config();
        let routes = config.num_hidden_layers * config.num_experts_per_tok;
        Ok(Sequence {
            context_size,
            pages: KvPages::new(model.backend(), context_size)?,
            tokens: try_with_capacity("a session's tokens", context_size)?,
            processed: 0,
            ready: false,
            logits: Buffer::zeroed("logits", config.vocab_size)?,
            route_experts: Buffer::zeroed("routes", routes)?,
            route_weights: Buffer::zeroed("routes", routes)?,
            sampling: Sampling::default(),
            sampler: Sampler::new(config.vocab_size)?,
            model,
        })
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// All tokens it holds, the pending ones included.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens it can hold.
    pub fn context_size(&self) -> usize {
        self.context_size
    }

    /// Bytes of its keys and values among them.
    pub fn kv_bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// How `step` draws from now on.
    pub fn set_sampling(&mut self, sampling: Sampling) -> Result<()> {
        sampling.check(self.model.config().vocab_size)?;
        self.sampling = sampling;
        Ok(())
    }

    /// Appends tokens, pending.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.model.config().vocab_size;
        if let Some(at) = tokens.iter().position(|token| *token as usize >= vocab_size) {
            let text = format!("token {at} of the input is {}, the vocabulary has {vocab_size}", tokens[at]);
            return Err(Error::new(Status::TokenOutOfRange, text));
        }
        let room = self.context_size - self.tokens.len();
        if tokens.len() > room {
            let held = self.tokens.len();
            let text = format!("{} tokens do not fit: {held} of {} are used", tokens.len(), self.context_size);
            return Err(Error::new(Status::ContextFull, text).at_key("context_size"));
        }
        self.tokens.extend_from_slice(tokens);
        self.ready &= tokens.is_empty();
        Ok(())
    }

    /// Keeps the first `token_count` tokens. What follows is bit for bit what a session fed only those would give.
    pub fn rewind(&mut self, token_count: usize) -> Result<()> {
        if token_count > self.tokens.len() {
            let text = format!("cannot rewind to {token_count} tokens, the session holds {}", self.tokens.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("token_count"));
        }
        if token_count < self.tokens.len() {
            self.tokens.truncate(token_count);
            // The last token kept becomes pending: its logits are gone, its cache entry will be written again.
            self.processed = self.processed.min(token_count.saturating_sub(1));
            self.ready = false;
        }
        Ok(())
    }

    /// Logits `[vocab_size]` after the last token that was run.
    pub fn logits(&self) -> Result<&[f32]> {
        self.check_ready()?;
        Ok(&self.logits)
    }

    /// The most probable next tokens and their log-probabilities; fills both slices as far as the vocabulary goes.
    pub fn top_log_probabilities(&self, ids: &mut [u32], log_probabilities: &mut [f32]) -> Result<()> {
        top_log_probabilities(self.logits()?, ids, log_probabilities)
    }

    /// Where the last token that was run was sent in `layer`.
    pub fn routes(&self, layer: usize) -> Result<Routes<'_>> {
        self.check_ready()?;
        let config = self.model.config();
        if layer >= config.num_hidden_layers {
            let text = format!("layer is {layer}, the model has {}", config.num_hidden_layers);
            return Err(Error::new(Status::InvalidArgument, text).at_key("layer"));
        }
        let at = layer * config.num_experts_per_tok..(layer + 1) * config.num_experts_per_tok;
        Ok(Routes { experts: &self.route_experts[at.clone()], weights: &self.route_weights[at] })
    }

    fn check_ready(&self) -> Result<()> {
        // A token drawn by `step` is pending: the logits are still those it was drawn from.
        match self.ready {
            true => Ok(()),
            false => Err(Error::new(Status::NoLogits, "no logits: prefill tokens, or step, first")),
        }
    }

    /// Whether a step can be taken: there is something to continue and room for one token more.
    pub fn check_step(&self) -> Result<()> {
        if self.tokens.is_empty() {
            return Err(Error::new(Status::NoLogits, "the session holds no tokens: prefill at least one first"));
        }
        if self.tokens.len() == self.context_size {
            let text = format!("no room for another token: {} of {0} are used", self.context_size);
            return Err(Error::new(Status::ContextFull, text).at_key("context_size"));
        }
        Ok(())
    }

    /// Tokens to run before the next can be drawn. After a rewind that is at least the last token kept.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.processed
    }

    /// The next `count` pending tokens, as a part of a batch.
    pub fn slice(&mut self, count: usize) -> SequenceSlice<'_> {
        let end = self.processed + count;
        SequenceSlice {
            tokens: &self.tokens[self.processed..end],
            start: self.processed,
            pages: self.pages.pages_mut(),
            wants_logits: end == self.tokens.len(),
        }
    }

    /// Takes over the results of a pass in which this session was sequence `sequence`, with `count` tokens of which
    /// the last was token `last_token` of the batch.
    pub fn finish(&mut self, pass: &dyn Pass, sequence: usize, count: usize, last_token: usize) {
        self.processed += count;
        let Some(logits) = pass.logits(sequence) else { return };
        self.logits.copy_from_slice(logits);
        let top_k = self.model.config().num_experts_per_tok;
        let rows = self.route_experts.chunks_exact_mut(top_k).zip(self.route_weights.chunks_exact_mut(top_k));
        for (layer, (experts, weights)) in rows.enumerate() {
            let routes = pass.routes(layer, last_token);
            experts.copy_from_slice(routes.experts);
            weights.copy_from_slice(routes.weights);
        }
        self.ready = true;
    }

    /// Draws from the ready logits and appends the token, pending.
    pub fn draw(&mut self) -> Result<u32> {
        let counter = self.tokens.len() as u64;
        let bias = &LogitBias::default();
        let draw = Draw { logits: &self.logits, tokens: &self.tokens, counter, bias, allowed: None };
        let token = self.sampler.draw(&self.sampling, draw)?;
        self.tokens.push(token);
        Ok(token)
    }

    /// Gives up pending tokens past the first `length`, which were never run.
    pub fn drop_pending(&mut self, length: usize) {
        self.tokens.truncate(length.max(self.processed));
        // Only the prompt's end gave logits: the last token kept becomes pending, as after a rewind.
        self.processed = self.processed.min(self.tokens.len().saturating_sub(1));
    }
}
