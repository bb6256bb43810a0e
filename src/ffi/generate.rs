//! What a `gemmoe_session` runs: tokens in, tokens out, and what can be read in between.

use std::task::Poll;

use super::arguments::{Out, slice, slice_mut};
use super::budget::{self, GemmoeBudget};
use super::error::GemmoeError;
use super::guard::{guard, guard_poll};
use super::session::{GemmoeSession, find};
use super::structs::{self, Versioned, check_reserved};
use crate::engine::sample::LogitBias;
use crate::engine::{Pooling, Sampling};
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};

/// How gemmoe_session_step draws. Initialise with GEMMOE_SAMPLING_INIT, which is greedy. The order: logit_bias; then
/// repetition_penalty, frequency_penalty and presence_penalty, over the last penalty_window tokens; then the session's
/// grammar; then the filters top_k, top_p, min_p on the untempered distribution; then temperature shapes what is left and one
/// token is drawn.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeSampling {
    /// sizeof(gemmoe_sampling)
    pub struct_size: u32,
    /// 0 takes the most probable token; above, up to 100, logits are divided by it.
    pub temperature: f32,
    /// Keep this many most probable tokens, up to vocab_size; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest most probable tokens whose probabilities reach this sum, 0 to 1; 0 or 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this share as probable as the most probable, 0 to 1; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of tokens in the window are divided by it, negative ones multiplied, 0.1 to 10; 0 or 1 changes none.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens in the window for each time they occur, -2 to 2.
    pub frequency_penalty: f32,
    /// Taken from the logits of tokens in the window once, -2 to 2.
    pub presence_penalty: f32,
    /// Last tokens the penalties look at; 0 is all the session holds.
    pub penalty_window: u32,
    /// Must be 0.
    pub reserved0: u32,
    /// Equal seeds, logits and positions give equal tokens.
    pub seed: u64,
    /// logit_bias_count tokens, each once, and what is added to their logits; -infinity forbids a token. Only read during
    /// the call; both may be NULL if there are none.
    pub logit_bias_tokens: *const u32,
    /// See logit_bias_tokens.
    pub logit_bias_values: *const f32,
    /// See logit_bias_tokens.
    pub logit_bias_count: u64,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, ten 4-byte fields, then u64s and two pointers leave no padding, plain numbers
// and pointers.
unsafe impl Versioned for GemmoeSampling {
    const NAME: &'static str = "gemmoe_sampling";
    const FIRST_SIZE: usize = 72 + 2 * size_of::<*const u32>() + 16;
}

/// Sets how tokens are drawn from now on. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, SAMPLING_VALUE, OUT_OF_MEMORY,
/// BUSY; the settings are then as before. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_set_sampling(
    session: *mut GemmoeSession,
    sampling: *const GemmoeSampling,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            Out::new(sampling.cast_mut(), "sampling")?;
            let sampling = structs::read(sampling, "sampling")?;
            check_reserved(&sampling.reserved, "sampling")?;
            check_reserved(&[sampling.reserved0 as u64], "sampling")?;
            let count = usize::try_from(sampling.logit_bias_count).unwrap_or(usize::MAX);
            session.with(|session| {
                // Before the arrays are read: a count that cannot be is no reason to read so much memory.
                LogitBias::check_count(count, session.model().config().vocab_size)?;
                let tokens = slice(sampling.logit_bias_tokens, count, "logit_bias_tokens")?;
                let values = slice(sampling.logit_bias_values, count, "logit_bias_values")?;
                let mut pairs = try_with_capacity("a logit bias", count)?;
                pairs.extend(tokens.iter().copied().zip(values.iter().copied()));
                let bias = LogitBias::new(&pairs, session.model().config().vocab_size)?;
                session.set_sampling(sampling.settings())?;
                session.set_logit_bias(bias);
                Ok(())
            })
        })
    }
}

/// The error out of what may be unfinished.
fn settled<T>(poll: Poll<Result<T>>) -> Result<Poll<T>> {
    match poll {
        Poll::Pending => Ok(Poll::Pending),
        Poll::Ready(result) => result.map(Poll::Ready),
    }
}

impl GemmoeSampling {
    fn settings(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: if self.repetition_penalty == 0.0 { 1.0 } else { self.repetition_penalty },
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            penalty_window: self.penalty_window,
            seed: self.seed,
        }
    }
}

/// Appends tokens without running them: the next prefill, step or batch step will. This is how a host with a sampler of its
/// own continues: it reads the logits and pushes the token it chose. Under a grammar the tokens must follow it.
/// Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE, CONTEXT_FULL, GRAMMAR_VIOLATION, GRAMMAR_LIMIT, OUT_OF_MEMORY,
/// KV_LIMIT (a window that slides into pages shared with a fork), BUSY; nothing was appended then.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_push(
    session: *mut GemmoeSession,
    tokens: *const u32,
    token_count: usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let tokens = slice(tokens, token_count, "tokens")?;
            session.with(|session| session.push(tokens))
        })
    }
}

/// Makes the session hold exactly `tokens`: what they have in common with those it holds keeps its keys and values, the rest
/// is pushed. So a conversation goes on: gemmoe_chat_tokenize all its messages, set the tokens, and only the new ones are
/// run. `reused_out` may be NULL, else it receives how many tokens were in common.
/// Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE and CONTEXT_FULL (nothing has changed), GRAMMAR_VIOLATION and
/// GRAMMAR_LIMIT (the session holds what was in common), KV_LIMIT and OUT_OF_MEMORY (only where pages are shared with a fork), BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_set_tokens(
    session: *mut GemmoeSession,
    tokens: *const u32,
    token_count: usize,
    reused_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let tokens = slice(tokens, token_count, "tokens")?;
            let reused = session.with(|session| session.set_tokens(tokens))?;
            if let Ok(reused_out) = Out::new(reused_out, "reused_out") {
                reused_out.set(reused);
            }
            Ok(())
        })
    }
}

/// Appends tokens and runs them through the model, so that the logits after the last are ready. With `token_count` 0 it
/// runs what is pending: so logits are had after a rewind, after a token that was drawn, or after NEED_MORE, with which
/// the session holds all the tokens, those not run yet pending. `budget` may be NULL.
/// Errors: handle errors, STRUCT_SIZE, INVALID_ARGUMENT (a session for batches only), what gemmoe_session_push returns
/// (nothing was appended), CANCELLED (of this call's tokens those run so far are kept, the others as if never given;
/// gemmoe_session_get_info tells). One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_prefill(
    session: *mut GemmoeSession,
    tokens: *const u32,
    token_count: usize,
    budget: *const GemmoeBudget,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard_poll(error_out, || {
            let session = find(session)?;
            let tokens = slice(tokens, token_count, "tokens")?;
            let budget = budget::read(budget)?;
            session.with(|session| settled(session.prefill_within(tokens, &budget)))
        })
    }
}

/// Produces one token: runs what is pending, draws the next token, appends it and gives it out. Stop tokens are drawn
/// like others: ask gemmoe_model_is_stop_token. `budget` may be NULL; with NEED_MORE nothing was drawn, and the next step
/// goes on where this one stopped, inside a matrix if need be, and gives the same token as without a budget.
/// Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, NO_LOGITS (no tokens yet), CONTEXT_FULL, GRAMMAR_LIMIT, NOT_A_NUMBER
/// (no logit is finite: the model's, or because logit_bias and the grammar leave no token), OUT_OF_MEMORY and KV_LIMIT (with
/// a grammar, or a window that slides into pages shared with a fork),
/// CANCELLED (the next step goes on where this one stopped), INVALID_ARGUMENT (a session for batches only), BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_step(
    session: *mut GemmoeSession,
    budget: *const GemmoeBudget,
    token_out: *mut u32,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard_poll(error_out, || {
            let session = find(session)?;
            let token_out = Out::new(token_out, "token_out")?;
            let budget = budget::read(budget)?;
            let stepped = session.with(|session| settled(session.step_within(&budget)))?;
            Ok(stepped.map(|token| token_out.set(token)))
        })
    }
}

/// Appends tokens, runs them, and writes the natural logarithm of the probability of each, given all before it, to
/// `log_probabilities`, `token_count` of them. Their mean, negated and raised to e, is the perplexity. The session must hold
/// at least one token, such as BOS, to begin from; no window slides here.
/// Errors: handle errors, what gemmoe_session_push returns, NO_LOGITS (no token to begin from), NOT_A_NUMBER, CANCELLED
/// (the tokens not run are taken back), INVALID_ARGUMENT (a session for batches only). One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_score(
    session: *mut GemmoeSession,
    tokens: *const u32,
    token_count: usize,
    log_probabilities: *mut f32,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let tokens = slice(tokens, token_count, "tokens")?;
            let log_probabilities = slice_mut(log_probabilities, token_count, "log_probabilities")?;
            session.with(|session| {
                // Written on success only; more than fit are refused by `score`.
                let mut scores = try_vec("log-probabilities", token_count.min(session.context_size()), 0f32)?;
                session.score(tokens, &mut scores)?;
                log_probabilities.copy_from_slice(&scores);
                Ok(())
            })
        })
    }
}

/// gemmoe_session_embed: the mean of the tokens' hidden states.
pub const GEMMOE_POOLING_MEAN: u32 = 0;
/// gemmoe_session_embed: the last token's hidden state.
pub const GEMMOE_POOLING_LAST: u32 = 1;

/// Appends tokens, runs them, and writes their hidden states after the final norm, pooled as `pooling` (GEMMOE_POOLING_)
/// says, to `values`; `value_count` must be hidden_size.
/// Errors: handle errors, what gemmoe_session_push returns, CANCELLED (the tokens not run are taken back), INVALID_ARGUMENT
/// (no tokens, another `value_count`, no such pooling, a session for batches only). One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_embed(
    session: *mut GemmoeSession,
    tokens: *const u32,
    token_count: usize,
    pooling: u32,
    values: *mut f32,
    value_count: usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let tokens = slice(tokens, token_count, "tokens")?;
            let values = slice_mut(values, value_count, "values")?;
            let pooling = match pooling {
                GEMMOE_POOLING_MEAN => Pooling::Mean,
                GEMMOE_POOLING_LAST => Pooling::Last,
                other => {
                    let text = format!("pooling is {other}, expected one of GEMMOE_POOLING_");
                    return Err(Error::new(Status::InvalidArgument, text).at_key("pooling"));
                }
            };
            session.with(|session| session.embed(tokens, pooling, values))
        })
    }
}

/// Gives the logits after the last token that was run: after a step, those its token was drawn from. `count_out`
/// receives vocab_size. Borrowed until the next call that changes the session. Logits stay on a GPU until they are asked for: the
/// first call after each token copies them from there.
/// Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, DEVICE_FAILED, DEVICE_LOST, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_logits(
    session: *const GemmoeSession,
    logits_out: *mut *const f32,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let (logits_out, count_out) = (Out::new(logits_out, "logits_out")?, Out::new(count_out, "count_out")?);
            session.with(|session| {
                let logits = session.logits()?;
                logits_out.set(logits.as_ptr());
                count_out.set(logits.len());
                Ok(())
            })
        })
    }
}

/// Writes the `capacity` most probable next tokens and the natural logarithms of their probabilities, most probable
/// first. `count_out` receives how many were written: `capacity` or vocab_size, whichever is less.
/// Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, NOT_A_NUMBER, OUT_OF_MEMORY, DEVICE_FAILED, DEVICE_LOST, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_top_log_probabilities(
    session: *const GemmoeSession,
    tokens: *mut u32,
    log_probabilities: *mut f32,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let tokens = slice_mut(tokens, capacity, "tokens")?;
            let log_probabilities = slice_mut(log_probabilities, capacity, "log_probabilities")?;
            let count_out = Out::new(count_out, "count_out")?;
            session.with(|session| {
                session.top_log_probabilities(tokens, log_probabilities)?;
                count_out.set(capacity.min(session.model().config().vocab_size));
                Ok(())
            })
        })
    }
}

/// Gives the tokens the session holds, prompt and drawn ones. Borrowed until the next call that changes the session.
/// Errors: handle errors, NULL_ARGUMENT, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_tokens(
    session: *const GemmoeSession,
    tokens_out: *mut *const u32,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let (tokens_out, count_out) = (Out::new(tokens_out, "tokens_out")?, Out::new(count_out, "count_out")?);
            session.with(|session| {
                tokens_out.set(session.tokens().as_ptr());
                count_out.set(session.tokens().len());
                Ok(())
            })
        })
    }
}

/// Keeps the first `token_count` tokens. What follows is bit for bit what a session given only those would produce. If
/// tokens were given up, the last one kept is pending and its logits are not ready before the next prefill or step.
/// Errors: handle errors, INVALID_ARGUMENT (more than it holds), KV_LIMIT and OUT_OF_MEMORY (only where pages are shared
/// with a fork), GRAMMAR_LIMIT, BUSY; nothing has changed then. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_rewind(
    session: *mut GemmoeSession,
    token_count: usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe { guard(error_out, || find(session)?.with(|session| session.rewind(token_count))) }
}
