//! One sequence: its tokens, their keys and values, and what its last position gave.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::experts::{self, ExpertControl, ExpertStatistics, RouteArrays, RouteRing};
use super::kv::KvPages;
use super::metrics::Metrics;
use super::model::Model;
use super::options::{Overflow, SessionOptions};
use super::sample::{Draw, LogitBias, Sampler, Sampling, top_log_probabilities};
use crate::backend::gates::{AppliedGates, number_of};
use crate::backend::{KvDtype, Logits, Pass, SequenceSlice, ops::Routes};
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, try_with_capacity};
use crate::text::grammar::{Grammar, GrammarState};

/// Tokens and state of one sequence, without the workspace that runs it.
///
/// The last tokens may be *pending*: held, but not yet run through the model. A token that was drawn stays pending
/// until somebody continues from it, so the last token of a generation is never computed.
pub struct Sequence {
    /// Differs from every other sequence of this process.
    id: u64,
    /// Changes whenever work on pending tokens that was begun would no longer be right.
    epoch: u64,
    pub(super) model: Arc<Model>,
    pub(super) options: SessionOptions,
    pub(super) pages: KvPages,
    /// The number of the gates that what is in the pages, the logits and the routes were computed under.
    pub(super) gates: u64,
    pub(super) tokens: Vec<u32>,
    /// Tokens that a sliding window has dropped.
    pub(super) dropped: u64,
    /// Tokens whose keys and values are in the pages; the rest are pending.
    pub(super) processed: usize,
    /// Whether `logits` and the routes are those of the last token that is not drawn from them.
    pub(super) ready: bool,
    /// Whether the last token was drawn from the logits.
    pub(super) drawn: bool,
    pub(super) logits: Logits,
    /// `[num_hidden_layers, num_experts_per_tok]` each: the last position's routes.
    pub(super) route_experts: Buffer<u32>,
    pub(super) route_weights: Buffer<f32>,
    pub(super) sampling: Sampling,
    pub(super) bias: LogitBias,
    sampler: Sampler,
    /// What the tokens that are appended must follow.
    pub(super) grammar: Option<GrammarState>,
    /// None until the host changes something.
    pub(super) control: Option<ExpertControl>,
    statistics: ExpertStatistics,
    ring: RouteRing,
    metrics: Metrics,
}

/// What is wanted of the tokens of a slice.
#[derive(Clone, Copy, Default)]
pub struct Wants<'a> {
    /// The logits after the last.
    pub logits: bool,
    /// As `SequenceSlice::targets`.
    pub targets: &'a [u32],
}

impl Sequence {
    /// A sequence without tokens. Memory for all it can hold is reserved here; `options` are resolved.
    pub(super) fn new(model: Arc<Model>, options: SessionOptions) -> Result<Sequence> {
        let dtype = options.kv_dtype.unwrap_or(model.backend().default_kv_dtype());
        let pages = KvPages::new(model.backend(), model.kv_account(), dtype, options.context_size)?;
        Sequence::with_pages(model, options, pages)
    }

    fn with_pages(model: Arc<Model>, options: SessionOptions, pages: KvPages) -> Result<Sequence> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(0);
        let config = model.config();
        let routes = config.num_hidden_layers * config.num_experts_per_tok;
        Ok(Sequence {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            epoch: 0,
            options,
            pages,
            gates: model.gates_number(),
            tokens: try_with_capacity("a session's tokens", options.context_size)?,
            dropped: 0,
            processed: 0,
            ready: false,
            drawn: false,
            logits: model.backend().new_logits()?,
            route_experts: Buffer::zeroed("routes", routes)?,
            route_weights: Buffer::zeroed("routes", routes)?,
            sampling: Sampling::default(),
            bias: LogitBias::default(),
            sampler: Sampler::new(config.vocab_size)?,
            grammar: None,
            control: None,
            statistics: ExpertStatistics::new(config)?,
            ring: RouteRing::new(config, options.route_capacity)?,
            metrics: Metrics::default(),
            model,
        })
    }

    /// A second sequence in the same state, with statistics and metrics of its own. It shares the pages that are full.
    pub fn fork(&self) -> Result<Sequence> {
        let pages = self.pages.fork(self.model.backend(), self.processed)?;
        let mut fork = Sequence::with_pages(Arc::clone(&self.model), self.options, pages)?;
        fork.tokens.extend_from_slice(&self.tokens);
        fork.gates = self.gates;
        fork.dropped = self.dropped;
        fork.processed = self.processed;
        fork.ready = self.ready;
        fork.drawn = self.drawn;
        if self.ready {
            fork.logits.copy_from(&self.logits)?;
        }
        fork.route_experts.copy_from_slice(&self.route_experts);
        fork.route_weights.copy_from_slice(&self.route_weights);
        fork.sampling = self.sampling;
        fork.bias = self.bias.try_clone()?;
        fork.grammar = self.grammar.as_ref().map(GrammarState::try_clone).transpose()?;
        fork.control = self.control.as_ref().map(ExpertControl::try_clone).transpose()?;
        Ok(fork)
    }

    /// The model it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The options it was made with, defaults filled in.
    pub fn options(&self) -> &SessionOptions {
        &self.options
    }

    /// All tokens it holds, the pending ones included.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Tokens it can hold.
    pub fn context_size(&self) -> usize {
        self.options.context_size
    }

    /// Tokens that the window dropped before the last ones held; none after a rewind to before them.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// How its keys and values are stored.
    pub fn kv_dtype(&self) -> KvDtype {
        self.pages.dtype()
    }

    /// Bytes of its keys and values, those it shares with forks included.
    pub fn kv_bytes(&self) -> usize {
        self.pages.bytes()
    }

    /// How `step` draws from now on.
    pub fn set_sampling(&mut self, sampling: Sampling) -> Result<()> {
        sampling.check(self.model.config().vocab_size)?;
        self.sampling = sampling;
        Ok(())
    }

    /// What `step` adds to the logits of single tokens from now on.
    pub fn set_logit_bias(&mut self, bias: LogitBias) {
        self.bias = bias;
    }

    /// Lets only what follows `grammar` be drawn or appended from now on; `None` lifts an earlier one.
    pub fn set_grammar(&mut self, grammar: Option<&Grammar>) -> Result<()> {
        if let Some(grammar) = grammar
            && !Arc::ptr_eq(grammar.vocabulary(), self.model.grammar_vocabulary()?)
        {
            let text = "the grammar was compiled for another model";
            return Err(Error::new(Status::InvalidArgument, text).at_key("grammar"));
        }
        self.grammar = grammar.map(GrammarState::start).transpose()?;
        Ok(())
    }

    /// Where the session stands in its grammar.
    pub fn grammar(&self) -> Option<&GrammarState> {
        self.grammar.as_ref()
    }

    /// Whether the text since the grammar was set is a whole output of it; `None` without a grammar.
    pub fn is_grammar_complete(&mut self) -> Result<Option<bool>> {
        self.grammar.as_mut().map(GrammarState::is_complete).transpose()
    }

    /// How `step` draws.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// Appends tokens, pending. A window that slides makes room for them; of more than it can keep at once, the first
    /// and the last stay.
    pub fn push(&mut self, tokens: &[u32]) -> Result<()> {
        self.push_after(tokens).map(drop)
    }

    /// Does what `push` does, and answers how many of the tokens held before are left in front of the new ones.
    pub(super) fn push_after(&mut self, tokens: &[u32]) -> Result<usize> {
        self.check_room(tokens.len())?;
        self.check_tokens(tokens)?;
        self.follow_grammar(tokens)?;
        let appended = self.append(tokens);
        if appended.is_err()
            && let Some(state) = &mut self.grammar
        {
            state.rewind(tokens.len())?;
        }
        appended
    }

    /// Makes the session hold exactly `tokens`, the last of them pending where they were not run: what they have in common
    /// with those it holds keeps its keys and values. Returns how many that are.
    ///
    /// So a conversation goes on: all its messages as tokens, of which only the new ones are run. Fails as `push` and
    /// `rewind` do; when the grammar refuses a token the session holds what was in common.
    pub fn set_tokens(&mut self, tokens: &[u32]) -> Result<usize> {
        if tokens.len() > self.context_size() && self.options.overflow == Overflow::Fail {
            let text = format!("{} tokens do not fit in a context of {}", tokens.len(), self.context_size());
            return Err(Error::new(Status::ContextFull, text).at_key("context_size"));
        }
        self.check_tokens(tokens)?;
        let alike = self.tokens.iter().zip(tokens).take_while(|(held, wanted)| held == wanted).count();
        // What a window has dropped is no part of these tokens: all that came after it goes too.
        let common = match self.options.overflow {
            Overflow::Slide { keep } if self.dropped > 0 => alike.min(keep),
            _ => alike,
        };
        self.rewind(common)?;
        self.push(&tokens[common..])?;
        Ok(common)
    }

    /// Fails where `count` tokens more do not fit and the window does not slide. Before the tokens are looked at: a length
    /// that cannot be is no reason to read so much memory.
    fn check_room(&self, count: usize) -> Result<()> {
        if self.options.overflow == Overflow::Fail { self.check_fits(count) } else { Ok(()) }
    }

    /// Fails where `count` tokens more do not fit, whatever the window does.
    pub(super) fn check_fits(&self, count: usize) -> Result<()> {
        let held = self.tokens.len();
        if count > self.context_size() - held {
            let text = format!("{count} tokens do not fit: {held} of {} are used", self.context_size());
            return Err(Error::new(Status::ContextFull, text).at_key("context_size"));
        }
        Ok(())
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocab_size = self.model.config().vocab_size;
        match tokens.iter().position(|token| *token as usize >= vocab_size) {
            None => Ok(()),
            Some(at) => {
                let text = format!("token {at} of the input is {}, the vocabulary has {vocab_size}", tokens[at]);
                Err(Error::new(Status::TokenOutOfRange, text))
            }
        }
    }

    /// Takes all tokens into the grammar, or none.
    fn follow_grammar(&mut self, tokens: &[u32]) -> Result<()> {
        let Some(state) = &mut self.grammar else { return Ok(()) };
        for (taken, token) in tokens.iter().enumerate() {
            if let Err(error) = state.accept(*token) {
                state.rewind(taken)?;
                return Err(error);
            }
        }
        Ok(())
    }

    fn append(&mut self, tokens: &[u32]) -> Result<usize> {
        let mut held = self.tokens.len();
        match self.options.overflow {
            Overflow::Slide { keep } if tokens.len() > self.context_size() - held => held = self.slide(keep, tokens)?,
            _ => self.tokens.extend_from_slice(tokens),
        }
        if !tokens.is_empty() {
            self.ready = false;
            self.drawn = false;
            self.metrics.note_prompt();
        }
        Ok(held)
    }

    /// Appends `tokens` and drops the oldest after the first `keep`, so that of the context past those half is free.
    /// Answers how many tokens held before are left.
    fn slide(&mut self, keep: usize, tokens: &[u32]) -> Result<usize> {
        let tail = ((self.context_size() - keep) / 2).max(1);
        let held = self.tokens.len();
        let drop = held + tokens.len() - keep - tail;
        // New tokens among the first `keep`, then what is dropped of the held ones and of the rest of the new.
        let (first, rest) = tokens.split_at(keep.saturating_sub(held).min(tokens.len()));
        let held_drop = held.saturating_sub(keep).min(drop);
        if held_drop > 0 {
            let processed = self.processed.min(keep);
            // The last token kept too: if those after it are taken back, it is run again for its logits.
            self.pages.own_from(self.model.backend(), processed.saturating_sub(1), processed)?;
            self.processed = processed;
            self.tokens.drain(keep..keep + held_drop);
        }
        self.tokens.extend_from_slice(first);
        self.tokens.extend_from_slice(&rest[drop - held_drop..]);
        self.dropped += drop as u64;
        self.ready = false;
        self.epoch += 1;
        Ok(held - held_drop)
    }

    /// Keeps the first `token_count` tokens. What follows is bit for bit what a session fed only those would give.
    ///
    /// Fails with `InvalidArgument`, or, where pages are shared with a fork, `OutOfMemory` or `KvLimit`; nothing has
    /// changed then.
    pub fn rewind(&mut self, token_count: usize) -> Result<()> {
        if token_count > self.tokens.len() {
            let text = format!("cannot rewind to {token_count} tokens, the session holds {}", self.tokens.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("token_count"));
        }
        if token_count < self.tokens.len() {
            // The last token kept becomes pending: its logits are gone, its cache entry will be written again.
            let processed = self.processed.min(token_count.saturating_sub(1));
            self.pages.own_from(self.model.backend(), processed, processed)?;
            self.rewind_grammar(token_count)?;
            self.truncate(token_count, processed);
        }
        Ok(())
    }

    /// Takes the tokens after the first `token_count` out of the grammar, with those a window dropped among them; of more
    /// than it has accepted, it begins anew.
    fn rewind_grammar(&mut self, token_count: usize) -> Result<()> {
        let dropped = if self.forgets_dropped(token_count) { self.dropped } else { 0 };
        let count = (self.tokens.len() - token_count) as u64 + dropped;
        match &mut self.grammar {
            None => Ok(()),
            Some(state) => state.rewind(count.min(state.accepted().len() as u64) as usize),
        }
    }

    /// Whether keeping the first `token_count` tokens gives up all that came after those a window dropped.
    fn forgets_dropped(&self, token_count: usize) -> bool {
        matches!(self.options.overflow, Overflow::Slide { keep } if token_count <= keep)
    }

    fn truncate(&mut self, token_count: usize, processed: usize) {
        self.tokens.truncate(token_count);
        // With all tokens that came after those a window dropped, those are forgotten too: positions, and with them the
        // random numbers, are again those of a session that was never given them.
        if self.forgets_dropped(token_count) {
            self.dropped = 0;
        }
        self.processed = processed;
        self.ready = false;
        self.drawn = false;
        self.epoch += 1;
    }

    /// Logits `[vocab_size]` after the last token that was run. Fails with `NoLogits`, and, where they are on a device, as the
    /// first call fetches them, as that does.
    pub fn logits(&self) -> Result<&[f32]> {
        self.check_ready()?;
        self.logits.numbers()
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
        match (self.ready, self.is_under_model_gates()) {
            (true, true) => Ok(()),
            (true, false) => {
                let text =
                    "no logits under the gates now in force: prefill, no tokens if there are no more, or step, first";
                Err(Error::new(Status::NoLogits, text))
            }
            (false, _) => Err(Error::new(Status::NoLogits, "no logits: prefill tokens, or step, first")),
        }
    }

    /// How often each expert was chosen since the session was made, or the statistics were cleared.
    pub fn expert_statistics(&self) -> &ExpertStatistics {
        &self.statistics
    }

    /// Starts counting anew.
    pub fn clear_expert_statistics(&mut self) {
        self.statistics.clear();
    }

    /// Moves the routes of tokens run since the last fetch out; see [`RouteRing::fetch`].
    pub fn fetch_routes(&mut self, arrays: &mut RouteArrays) -> (usize, u64) {
        self.ring.fetch(arrays)
    }

    /// Lets only some experts be chosen from now on; see [`ExpertControl::set_allowed`].
    pub fn set_allowed_experts(&mut self, layer: Option<usize>, allowed: u64) -> Result<()> {
        self.change_control(|control| control.set_allowed(layer, allowed))
    }

    /// Biases the router from now on; see [`ExpertControl::set_bias`].
    pub fn set_expert_bias(&mut self, layer: Option<usize>, bias: &[f32]) -> Result<()> {
        self.change_control(|control| control.set_bias(layer, bias))
    }

    /// Lets the router choose by itself again.
    pub fn clear_expert_control(&mut self) {
        self.control = None;
        self.epoch += 1;
    }

    fn change_control(&mut self, change: impl FnOnce(&mut ExpertControl) -> Result<()>) -> Result<()> {
        let mut control = match self.control.take() {
            Some(control) => control,
            None => ExpertControl::new(self.model.config())?,
        };
        let result = change(&mut control);
        self.control = Some(control);
        self.epoch += 1;
        result
    }

    /// What the session measured.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Makes sure a step can be taken: there is something to continue, and room for one token more.
    pub(super) fn prepare_step(&mut self) -> Result<()> {
        if self.tokens.is_empty() {
            return Err(Error::new(Status::NoLogits, "the session holds no tokens: prefill at least one first"));
        }
        if self.tokens.len() < self.context_size() {
            return Ok(());
        }
        match self.options.overflow {
            Overflow::Slide { keep } => self.slide(keep, &[]).map(drop),
            Overflow::Fail => {
                let text = format!("no room for another token: {} of {0} are used", self.context_size());
                Err(Error::new(Status::ContextFull, text).at_key("context_size"))
            }
        }
    }

    /// Tokens to run before the next can be drawn. After a rewind that is at least the last token kept; after the model was given
    /// other gates, all.
    pub fn pending(&self) -> usize {
        if self.is_under_model_gates() { self.unrun() } else { self.tokens.len() }
    }

    /// Tokens that are not run under the gates that the others were run under: those pending, in a call that has met its gates.
    pub(super) fn unrun(&self) -> usize {
        self.tokens.len() - self.processed
    }

    /// Whether what was run was run under the gates now in force.
    fn is_under_model_gates(&self) -> bool {
        self.gates == self.model.gates_number()
    }

    /// The gates now in force, and the sequence ready to be run under them; see `meet`.
    pub(super) fn meet_model_gates(&mut self) -> Result<Option<Arc<AppliedGates>>> {
        let gates = self.model.gates();
        self.meet(number_of(gates.as_deref()))?;
        Ok(gates)
    }

    /// Makes ready to be run under the gates of this number: what was run under others is pending again, from the first token
    /// on. Fails with `OutOfMemory` or `KvLimit` where pages are shared with a fork; nothing has changed then.
    pub(super) fn meet(&mut self, gates: u64) -> Result<()> {
        if self.gates != gates {
            self.pages.own_from(self.model.backend(), 0, 0)?;
            self.gates = gates;
            self.processed = 0;
            self.ready = false;
            self.drawn = false;
            self.epoch += 1;
        }
        Ok(())
    }

    /// What identifies this sequence and the state its pending tokens can be run in.
    pub(super) fn stamp(&self) -> (u64, u64, usize) {
        (self.id, self.epoch, self.processed)
    }

    /// The next `count` pending tokens, as a part of a batch.
    pub(super) fn slice<'a>(&'a mut self, count: usize, wants: Wants<'a>) -> SequenceSlice<'a> {
        SequenceSlice {
            tokens: &self.tokens[self.processed..self.processed + count],
            start: self.processed,
            pages: self.pages.pages_mut(),
            logits: wants.logits.then(|| self.logits.place()),
            targets: wants.targets,
            router: self.control.as_ref().map(ExpertControl::as_router_control),
        }
    }

    /// Takes over the results of a pass of `time` in which this was sequence `sequence`, with `count` tokens of which
    /// the first was token `first` of the batch.
    pub(super) fn finish(&mut self, pass: &dyn Pass, sequence: usize, count: usize, first: usize, time: Duration) {
        let tokens = &self.tokens[self.processed..self.processed + count];
        // What was dropped came after the first tokens, which the window keeps.
        let kept = if let Overflow::Slide { keep } = self.options.overflow { keep } else { 0 };
        let (dropped, processed) = (self.dropped, self.processed);
        let position = |index| (processed + index) as u64 + if processed + index < kept { 0 } else { dropped };
        experts::record(pass, first, tokens, position, &mut self.statistics, &mut self.ring);
        self.processed += count;
        let is_last = self.processed == self.tokens.len();
        self.metrics.note_pass(count, time, is_last && self.drawn && count == 1);
        // Tokens may have been appended while the pass was suspended: then these logits are not the last.
        let Some(logits) = pass.logits(sequence).filter(|_| is_last) else { return };
        self.logits.take(logits);
        let top_k = self.model.config().num_experts_per_tok;
        let rows = self.route_experts.chunks_exact_mut(top_k).zip(self.route_weights.chunks_exact_mut(top_k));
        for (layer, (experts, weights)) in rows.enumerate() {
            let routes = pass.routes(layer, first + count - 1);
            experts.copy_from_slice(routes.experts);
            weights.copy_from_slice(routes.weights);
        }
        self.ready = true;
        self.drawn = false;
    }

    /// Finds out what the grammar allows next, which `draw` would do otherwise: on its own, so that a budget can come
    /// between the two. Answers whether there was anything to find out.
    pub(super) fn prepare_draw(&mut self) -> Result<bool> {
        let Some(state) = self.grammar.as_mut().filter(|state| !state.knows_mask()) else { return Ok(false) };
        state.mask()?;
        Ok(true)
    }

    /// Draws from the ready logits and appends the token, pending.
    pub(super) fn draw(&mut self) -> Result<u32> {
        let started = Instant::now();
        let allowed = self.grammar.as_mut().map(GrammarState::mask).transpose()?;
        let draw = Draw {
            logits: &[],
            tokens: &self.tokens,
            counter: self.dropped + self.tokens.len() as u64,
            bias: &self.bias,
            allowed,
        };
        let candidates = self.logits.candidates();
        let token = match candidates.and_then(|candidates| self.sampler.draw_among(&self.sampling, &candidates, &draw))
        {
            Some(token) => token,
            None => self.sampler.draw(&self.sampling, Draw { logits: self.logits.numbers()?, ..draw })?,
        };
        if let Some(state) = &mut self.grammar {
            state.accept(token)?;
        }
        self.tokens.push(token);
        self.drawn = true;
        self.metrics.note_draw(started.elapsed());
        Ok(token)
    }

    /// Gives up pending tokens past the first `length`, which were never run.
    pub(super) fn drop_pending(&mut self, length: usize) -> Result<()> {
        let length = length.max(self.processed);
        if length < self.tokens.len() {
            self.rewind_grammar(length)?;
            // Only the prompt's end gives logits: the last token kept becomes pending, as after a rewind.
            self.truncate(length, self.processed.min(length.saturating_sub(1)));
        }
        Ok(())
    }
}
