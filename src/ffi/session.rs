//! `gemmoe_session`: one sequence being generated. What it runs is in `generate.rs`.

use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};

use super::arguments::Out;
use super::error::GemmoeError;
use super::grammar::grammar_state;
use super::guard::{Poison, guard, guard_status};
use super::handles::{self, Held, Object};
use super::model::{GemmoeModel, ModelObject};
use super::structs::{self, Versioned, check_reserved};
use crate::backend::Cancel;
use crate::backend::kv::KvDtype;
use crate::engine::{Overflow, Session, SessionOptions};
use crate::error::{Error, Result, Status};

/// gemmoe_session_options.flags: the session runs only in batches, and has no workspace of its own.
pub const GEMMOE_SESSION_BATCH_ONLY: u32 = 1;

/// kv_dtype: keys and values in the dtype of the model's weights.
pub const GEMMOE_KV_DEFAULT: u32 = 0;
/// kv_dtype: 32-bit floats, for checks.
pub const GEMMOE_KV_F32: u32 = 1;
/// kv_dtype: bfloat16.
pub const GEMMOE_KV_BF16: u32 = 2;
/// kv_dtype: IEEE half precision.
pub const GEMMOE_KV_F16: u32 = 3;
/// kv_dtype: 8-bit integers with a scale for each head and position.
pub const GEMMOE_KV_INT8: u32 = 4;

/// overflow: a full context is CONTEXT_FULL.
pub const GEMMOE_OVERFLOW_FAIL: u32 = 0;
/// overflow: a full context keeps its first keep_tokens tokens and drops the oldest after them, so that half of the rest
/// is free again. Those that stay are run again at their new positions; of more tokens given at once than fit, those in the
/// middle are never run.
pub const GEMMOE_OVERFLOW_SLIDE: u32 = 1;

/// How to make a session. Initialise with GEMMOE_SESSION_OPTIONS_INIT; zeros are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeSessionOptions {
    /// sizeof(gemmoe_session_options)
    pub struct_size: u32,
    /// Tokens the session can hold; memory for all of them is reserved at once. 0 is the model's
    /// max_position_embeddings, at most 8192, and at most what kv_limit_bytes has room for.
    pub context_size: u32,
    /// Most prompt tokens run in one pass; the workspace is sized for it. 0 is 256.
    pub prefill_chunk: u32,
    /// GEMMOE_SESSION_ flags.
    pub flags: u32,
    /// One of GEMMOE_KV_.
    pub kv_dtype: u32,
    /// One of GEMMOE_OVERFLOW_.
    pub overflow: u32,
    /// With GEMMOE_OVERFLOW_SLIDE: first tokens that are never dropped, at most context_size less two.
    pub keep_tokens: u32,
    /// Tokens whose routes wait for gemmoe_session_fetch_routes; 0 keeps none.
    pub route_capacity: u32,
    /// Most bytes of keys and values; 0 is no limit.
    pub kv_limit_bytes: u64,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, eight u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeSessionOptions {
    const NAME: &'static str = "gemmoe_session_options";
    const FIRST_SIZE: usize = 72;
}

impl GemmoeSessionOptions {
    pub fn resolve(&self) -> Result<SessionOptions> {
        check_reserved(&self.reserved, "options")?;
        let invalid = |key: &str, found: u32, expected: &str| {
            let text = format!("options.{key} is {found}, expected {expected}");
            Err(Error::new(Status::InvalidArgument, text).at_key(key))
        };
        if self.flags & !GEMMOE_SESSION_BATCH_ONLY != 0 {
            return invalid("flags", self.flags, "a sum of GEMMOE_SESSION_ flags");
        }
        let kv_dtype = match self.kv_dtype {
            GEMMOE_KV_DEFAULT => None,
            GEMMOE_KV_F32 => Some(KvDtype::F32),
            GEMMOE_KV_BF16 => Some(KvDtype::Bf16),
            GEMMOE_KV_F16 => Some(KvDtype::F16),
            GEMMOE_KV_INT8 => Some(KvDtype::Int8),
            other => return invalid("kv_dtype", other, "one of GEMMOE_KV_"),
        };
        let overflow = match (self.overflow, self.keep_tokens) {
            (GEMMOE_OVERFLOW_FAIL, 0) => Overflow::Fail,
            (GEMMOE_OVERFLOW_SLIDE, keep) => Overflow::Slide { keep: keep as usize },
            (GEMMOE_OVERFLOW_FAIL, keep) => return invalid("keep_tokens", keep, "0 without GEMMOE_OVERFLOW_SLIDE"),
            (other, _) => return invalid("overflow", other, "one of GEMMOE_OVERFLOW_"),
        };
        Ok(SessionOptions {
            context_size: self.context_size as usize,
            prefill_chunk: self.prefill_chunk as usize,
            kv_dtype,
            overflow,
            kv_limit_bytes: usize::try_from(self.kv_limit_bytes).unwrap_or(usize::MAX),
            route_capacity: self.route_capacity as usize,
            batch_only: self.flags & GEMMOE_SESSION_BATCH_ONLY != 0,
        })
    }
}

/// The constant of a dtype.
pub fn kv_constant(dtype: KvDtype) -> u32 {
    match dtype {
        KvDtype::F32 => GEMMOE_KV_F32,
        KvDtype::Bf16 => GEMMOE_KV_BF16,
        KvDtype::F16 => GEMMOE_KV_F16,
        KvDtype::Int8 => GEMMOE_KV_INT8,
    }
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
    /// What its keys and values are stored in, one of GEMMOE_KV_F32 to GEMMOE_KV_INT8.
    pub kv_dtype: u32,
    /// One of GEMMOE_GRAMMAR_NONE, GEMMOE_GRAMMAR_OPEN, GEMMOE_GRAMMAR_COMPLETE.
    pub grammar_state: u32,
    /// Tokens that a sliding window has dropped.
    pub dropped_count: u64,
    /// Bytes of keys and values reserved, those shared with forks included.
    pub kv_bytes: u64,
    /// Bytes of workspace; on a GPU of its logits too, which a session for batches only has as well.
    pub workspace_bytes: u64,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, six u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeSessionInfo {
    const NAME: &'static str = "gemmoe_session_info";
    const FIRST_SIZE: usize = 80;
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

/// The error of a second thread.
pub fn busy() -> Error {
    Error::new(Status::Busy, "another call is using this session: one of another thread, or it is twice in a batch")
}

impl SessionObject {
    pub fn new(session: Session) -> Self {
        let cancel = Arc::clone(session.cancel());
        SessionObject { session: Mutex::new(session), cancel, poison: Poison::default() }
    }

    /// Uses the session alone; a panic in `body` poisons it.
    pub fn with<T>(&self, body: impl FnOnce(&mut Session) -> Result<T>) -> Result<T> {
        // Held until the poison is set: nobody gets in between a panic and its mark.
        let mut session = self.session.try_lock().ok_or_else(busy)?;
        self.poison.watch(|| body(&mut session))
    }

    /// The session for a batch, which watches for panics itself.
    pub fn lock(&self) -> Result<MutexGuard<'_, Session>> {
        let session = self.session.try_lock().ok_or_else(busy)?;
        self.poison.check()?;
        Ok(session)
    }

    /// Marks the session unusable.
    pub fn poison(&self) {
        self.poison.set();
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

pub fn find(session: *const GemmoeSession) -> Result<Arc<SessionObject>> {
    handles::find::<SessionObject>(session, "session")
}

/// Makes a session, owned by the host; `options` may be NULL. All memory it will ever need is reserved here. The model
/// may be destroyed before it.
/// Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (context_size past the model's, an unknown flag or
/// constant, keep_tokens too large), KV_LIMIT, OUT_OF_MEMORY. Any thread. Since 0.1.
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
            let options = structs::read(options, "options")?.resolve()?;
            let session_out = Out::new(session_out, "session_out")?;
            let session = model.with(|model| Session::new(Arc::clone(model), &options))?;
            session_out.set(handles::insert(SessionObject::new(session))?);
            Ok(())
        })
    }
}

/// Makes a second session that holds the same tokens and goes on from the same state, bit for bit: sampling, random
/// numbers, grammar, expert masks and biases. Keys and values of full pages are shared until one of the two rewinds into
/// them. Both draw the same tokens unless one is given another seed. It has the same options and a workspace of its own. Statistics,
/// metrics and waiting routes begin anew, a pending cancel stays behind.
/// Errors: handle errors, NULL_ARGUMENT, KV_LIMIT, OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_fork(
    session: *const GemmoeSession,
    fork_out: *mut *mut GemmoeSession,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let fork_out = Out::new(fork_out, "fork_out")?;
            let fork = session.with(|session| session.fork())?;
            fork_out.set(handles::insert(SessionObject::new(fork))?);
            Ok(())
        })
    }
}

/// Fills in what the session holds. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, GRAMMAR_LIMIT, BUSY.
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
                    kv_dtype: kv_constant(session.kv_dtype()),
                    grammar_state: grammar_state(session)?,
                    dropped_count: session.dropped(),
                    kv_bytes: session.kv_bytes() as u64,
                    workspace_bytes: (session.bytes() - session.kv_bytes()) as u64,
                    ..GemmoeSessionInfo::zeroed()
                })
            })?;
            structs::write(info_out, &info, "info_out")
        })
    }
}

/// Stops the call in progress on this session, which returns CANCELLED when the pieces of work in flight are done: one for
/// each thread, 100 to 200 microseconds long in a step, and in a prefill half a millisecond at the most. On a GPU a piece is a
/// layer, or two; a step without a budget is one piece, some milliseconds long, which ends as it would have. While no call is in
/// progress, stops the next prefill, step, score or embed; in a batch, the session's part of the next step.
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
