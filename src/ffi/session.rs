//! `gemmoe_session`: one sequence being generated.

use std::sync::Arc;

use parking_lot::Mutex;

use super::arguments::{Out, slice, slice_mut};
use super::error::GemmoeError;
use super::guard::{Poison, guard, guard_status};
use super::handles::{self, Held, Object};
use super::model::{GemmoeModel, ModelObject};
use super::structs::{self, Versioned, check_reserved};
use crate::backend::Cancel;
use crate::engine::{Sampling, Session, SessionOptions};
use crate::error::{Error, Result, Status};

/// How to make a session. Initialise with GEMMOE_SESSION_OPTIONS_INIT; zeros are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeSessionOptions {
    /// sizeof(gemmoe_session_options)
    pub struct_size: u32,
    /// Tokens the session can hold; memory for all of them is reserved at once. 0 is the model's
    /// max_position_embeddings, at most 8192.
    pub context_size: u32,
    /// Most prompt tokens run in one pass; the workspace is sized for it. 0 is 256.
    pub prefill_chunk: u32,
    /// Must be 0.
    pub reserved0: u32,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, four u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeSessionOptions {
    const NAME: &'static str = "gemmoe_session_options";
    const FIRST_SIZE: usize = 48;
}

/// How gemmoe_session_step draws. Initialise with GEMMOE_SAMPLING_INIT, which is greedy. The filters work in the order
/// top_k, top_p, min_p on the untempered distribution; then temperature shapes what is left and one token is drawn.
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
    /// Must be 0.
    pub reserved0: u32,
    /// Equal seeds, logits and positions give equal tokens.
    pub seed: u64,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, six 4-byte fields then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeSampling {
    const NAME: &'static str = "gemmoe_sampling";
    const FIRST_SIZE: usize = 64;
}

/// What a session holds and what it takes. Initialise with GEMMOE_SESSION_INFO_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeSessionInfo {
    /// sizeof(gemmoe_session_info)
    pub struct_size: u32,
    /// Tokens it can hold.
    pub context_size: u32,
    /// Tokens it holds.
    pub token_count: u32,
    /// Tokens among them that were drawn or given but not yet run through the model.
    pub pending_count: u32,
    /// Bytes of keys and values reserved.
    pub kv_bytes: u64,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, four u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeSessionInfo {
    const NAME: &'static str = "gemmoe_session_info";
    const FIRST_SIZE: usize = 64;
}

/// A session. One thread at a time: a second one gets BUSY. gemmoe_session_cancel is the exception.
pub struct GemmoeSession {
    _opaque: (),
}

pub struct SessionObject {
    session: Mutex<Session>,
    cancel: Arc<Cancel>,
    poison: Poison,
}

impl SessionObject {
    /// Uses the session alone; a panic in `body` poisons it.
    fn with<T>(&self, body: impl FnOnce(&mut Session) -> Result<T>) -> Result<T> {
        let busy = || Error::new(Status::Busy, "another thread is inside a call on this session");
        // Held until the poison is set: nobody gets in between a panic and its mark.
        let mut session = self.session.try_lock().ok_or_else(busy)?;
        self.poison.watch(|| body(&mut session))
    }
}

impl Held for SessionObject {
    type Opaque = GemmoeSession;
    const KIND: usize = 11;
    const NAME: &'static str = "gemmoe_session";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Session(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Session(object) = object { Some(object) } else { None }
    }
}

fn find(session: *const GemmoeSession) -> Result<Arc<SessionObject>> {
    handles::find::<SessionObject>(session, "session")
}

/// Makes a session, owned by the host; `options` may be NULL. All memory it will ever need is reserved here. The model
/// may be destroyed before it.
/// Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (context_size past the model's),
/// OUT_OF_MEMORY. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_create(
    model: *const GemmoeModel,
    options: *const GemmoeSessionOptions,
    session_out: *mut *mut GemmoeSession,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let model = handles::find::<ModelObject>(model, "model")?;
            let options = structs::read(options, "options")?;
            check_reserved(&options.reserved, "options")?;
            check_reserved(&[options.reserved0 as u64], "options")?;
            let session_out = Out::new(session_out, "session_out")?;
            let options = SessionOptions {
                context_size: options.context_size as usize,
                prefill_chunk: options.prefill_chunk as usize,
            };
            let session = model.with(|model| Session::new(Arc::clone(model), &options))?;
            let cancel = Arc::clone(session.cancel());
            let object = SessionObject { session: Mutex::new(session), cancel, poison: Poison::default() };
            session_out.set(handles::insert(object)?);
            Ok(())
        })
    }
}

/// Sets how tokens are drawn from now on. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, SAMPLING_VALUE, BUSY;
/// the settings are then as before. One thread at a time. Since 0.1.
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
            session.with(|session| {
                session.set_sampling(Sampling {
                    temperature: sampling.temperature,
                    top_k: sampling.top_k,
                    top_p: sampling.top_p,
                    min_p: sampling.min_p,
                    seed: sampling.seed,
                    ..Sampling::default()
                })
            })
        })
    }
}

/// Appends tokens and runs them through the model, so that the logits after the last are ready. With `token_count` 0 it
/// runs what is pending: so logits are had after a rewind, or after a token that was drawn.
/// Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE and CONTEXT_FULL (nothing was appended), CANCELLED (the
/// chunks run so far are kept, the others as if never given; gemmoe_session_get_info tells), BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_prefill(
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
            session.with(|session| session.prefill(tokens))
        })
    }
}

/// Produces one token: runs what is pending, draws the next token, appends it and gives it out. Stop tokens are drawn
/// like others: ask gemmoe_model_is_stop_token.
/// Errors: handle errors, NULL_ARGUMENT, NO_LOGITS (no tokens yet), CONTEXT_FULL, NOT_A_NUMBER, CANCELLED (the next
/// step goes on where this one stopped), BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_step(
    session: *mut GemmoeSession,
    token_out: *mut u32,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let token_out = Out::new(token_out, "token_out")?;
            token_out.set(session.with(Session::step)?);
            Ok(())
        })
    }
}

/// Gives the logits after the last token that was run: after a step, those its token was drawn from. `count_out`
/// receives vocab_size. Borrowed until the next call that changes the session.
/// Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, BUSY. One thread at a time. Since 0.1.
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
/// Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, NOT_A_NUMBER, OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
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

/// Gives the experts the last token that was run was sent to in `layer`, and their weights, which sum to 1, highest
/// first. `count_out` receives num_experts_per_tok. Borrowed until the next call that changes the session.
/// Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, INVALID_ARGUMENT (no such layer), BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_routes(
    session: *const GemmoeSession,
    layer: u32,
    experts_out: *mut *const u32,
    weights_out: *mut *const f32,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let experts_out = Out::new(experts_out, "experts_out")?;
            let weights_out = Out::new(weights_out, "weights_out")?;
            let count_out = Out::new(count_out, "count_out")?;
            session.with(|session| {
                let routes = session.routes(layer as usize)?;
                experts_out.set(routes.experts.as_ptr());
                weights_out.set(routes.weights.as_ptr());
                count_out.set(routes.experts.len());
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
/// Errors: handle errors, INVALID_ARGUMENT (more than it holds), BUSY. One thread at a time. Since 0.1.
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

/// Fills in what the session holds. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_get_info(
    session: *const GemmoeSession,
    info_out: *mut GemmoeSessionInfo,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let info = find(session)?.with(|session| {
                Ok(GemmoeSessionInfo {
                    context_size: session.context_size() as u32,
                    token_count: session.tokens().len() as u32,
                    pending_count: session.pending() as u32,
                    kv_bytes: session.kv_bytes() as u64,
                    workspace_bytes: (session.bytes() - session.kv_bytes()) as u64,
                    ..GemmoeSessionInfo::zeroed()
                })
            })?;
            structs::write(info_out, &info, "info_out")
        })
    }
}

/// Stops the call in progress on this session, which returns CANCELLED when the pieces of work in flight are done: about
/// 100 microseconds each in a step, a few milliseconds in a prefill with the default prefill_chunk, longer with a larger
/// one. While no call is in progress, stops the next prefill or step.
/// Errors: handle errors. Any thread, never blocks. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_session_cancel(session: *const GemmoeSession) -> Status {
    guard_status(|| {
        find(session)?.cancel.request();
        Ok(())
    })
}

/// Takes back a cancel that has not stopped anything yet. Errors: handle errors. Any thread, never blocks. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_session_clear_cancel(session: *const GemmoeSession) -> Status {
    guard_status(|| {
        find(session)?.cancel.take();
        Ok(())
    })
}

/// Destroys a session; a call in progress on another thread is finished first by that thread. NULL is nothing.
/// Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_session_destroy(session: *mut GemmoeSession) -> Status {
    guard_status(|| handles::remove::<SessionObject>(session, "session"))
}
