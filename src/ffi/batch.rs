//! `gemmoe_batch`: many sessions stepped together.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::task::Poll;

use parking_lot::{Mutex, MutexGuard};

use super::arguments::{Out, slice, slice_mut};
use super::budget::{self, GemmoeBudget};
use super::error::{ErrorObject, GemmoeError};
use super::guard::{Poison, guard, guard_status};
use super::handles::{self, Held, Object};
use super::model::{GemmoeModel, ModelObject};
use super::session::{GemmoeSession, SessionObject, find as find_session};
use super::structs::{self, Versioned, check_reserved};
use crate::backend::Cancel;
use crate::engine::{BatchOptions, Budget, Session, SessionBatch};
use crate::error::{Error, Result, Status};
use crate::memory::recycle;

/// What a batch is made for. Initialise with GEMMOE_BATCH_OPTIONS_INIT; zeros are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeBatchOptions {
    /// sizeof(gemmoe_batch_options)
    pub struct_size: u32,
    /// Most sessions of one step. 0 is 16.
    pub max_sessions: u32,
    /// Most tokens of one pass, at least one for each session. 0 is 256, or max_sessions if that is more.
    pub max_tokens: u32,
    /// Most tokens of one session in one pass. The longer, the sooner a prompt is done and the longer the others wait for
    /// their next token meanwhile. 0 is 64.
    pub prefill_chunk: u32,
    /// Longest context_size of the sessions. 0 is the model's max_position_embeddings, at most 8192.
    pub max_context: u32,
    /// Must be 0.
    pub reserved0: u32,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, six u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeBatchOptions {
    const NAME: &'static str = "gemmoe_batch_options";
    const FIRST_SIZE: usize = 56;
}

/// What a batch takes, and what its last pass did. Initialise with GEMMOE_BATCH_INFO_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeBatchInfo {
    /// sizeof(gemmoe_batch_info)
    pub struct_size: u32,
    /// Must not be relied on.
    pub reserved0: u32,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
    /// Experts whose weights the last pass read, on average over the layers.
    pub touched_experts: f64,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, two u32 then 8-byte fields leave no padding, plain numbers.
unsafe impl Versioned for GemmoeBatchInfo {
    const NAME: &'static str = "gemmoe_batch_info";
    const FIRST_SIZE: usize = 56;
}

/// A workspace that steps sessions of one model together: each expert is read once for all of them. One thread at a time.
pub struct GemmoeBatch {
    _opaque: (),
}

pub struct BatchObject {
    batch: Mutex<Workplace>,
    cancel: Arc<Cancel>,
    poison: Poison,
}

/// The batch and its scratch, which keeps its memory from step to step.
struct Workplace {
    batch: SessionBatch,
    results: Vec<Poll<Result<u32>>>,
    /// The session of each place that could be had, and that place.
    objects: Vec<(usize, Arc<SessionObject>)>,
    /// Empty memory of the size of a lock each, and of a reference.
    guards: Vec<usize>,
    sessions: Vec<usize>,
}

impl Held for BatchObject {
    type Opaque = GemmoeBatch;
    const KIND: usize = 13;
    const NAME: &'static str = "gemmoe_batch";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Batch(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Batch(object) = object { Some(object) } else { None }
    }
}

impl BatchObject {
    fn with<T>(&self, body: impl FnOnce(&mut Workplace) -> Result<T>) -> Result<T> {
        let busy = || Error::new(Status::Busy, "another thread is inside a call on this batch");
        // Held until the poison is set: nobody gets in between a panic and its mark.
        let mut batch = self.batch.try_lock().ok_or_else(busy)?;
        self.poison.watch(|| body(&mut batch))
    }
}

fn find(batch: *const GemmoeBatch) -> Result<Arc<BatchObject>> {
    handles::find::<BatchObject>(batch, "batch")
}

/// Makes a batch, owned by the host; `options` may be NULL. All memory it will ever need is reserved here. The model may
/// be destroyed before it.
/// Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (max_tokens below max_sessions), OUT_OF_MEMORY.
/// Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_batch_create(
    model: *const GemmoeModel,
    options: *const GemmoeBatchOptions,
    batch_out: *mut *mut GemmoeBatch,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let model = handles::find::<ModelObject>(model, "model")?;
            let options = structs::read(options, "options")?;
            check_reserved(&options.reserved, "options")?;
            check_reserved(&[options.reserved0 as u64], "options")?;
            let batch_out = Out::new(batch_out, "batch_out")?;
            let options = BatchOptions {
                max_sessions: options.max_sessions as usize,
                max_tokens: options.max_tokens as usize,
                prefill_chunk: options.prefill_chunk as usize,
                max_context: options.max_context as usize,
            };
            let batch = model.with(|model| SessionBatch::new(Arc::clone(model), &options))?;
            let cancel = Arc::clone(batch.cancel());
            let workplace =
                Workplace { batch, results: Vec::new(), objects: Vec::new(), guards: Vec::new(), sessions: Vec::new() };
            let object = BatchObject { batch: Mutex::new(workplace), cancel, poison: Poison::default() };
            batch_out.set(handles::insert(object)?);
            Ok(())
        })
    }
}

/// Advances each of `session_count` sessions by at most one token, in at most one pass over the weights, bit for bit as each
/// would alone. For session i, `statuses[i]` receives OK, with its token in `tokens[i]`; NEED_MORE if it needs another step
/// first, its prompt not being run yet or the budget spent; or its own error, which does not touch the others: what
/// gemmoe_session_step may return, BUSY also for a session given twice, CANCELLED after a gemmoe_session_cancel of it.
/// `errors` may be NULL, else `errors[i]` receives NULL or an error the host owns. `budget` may be NULL.
///
/// Sessions with one token to run come first; prompts (gemmoe_session_push) share the rest of the pass, so a long one starves
/// nobody. Sessions may join and leave between steps. After NEED_MORE by the budget give the same sessions in the same order
/// to go on where the step stopped; otherwise its work is begun anew. The results are the same.
/// Errors: handle errors of `batch`, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (too many sessions, one of another model or
/// with a longer context), CANCELLED, BUSY; every session is as before then. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_batch_step(
    batch: *mut GemmoeBatch,
    sessions: *const *mut GemmoeSession,
    session_count: usize,
    budget: *const GemmoeBudget,
    statuses: *mut i32,
    tokens: *mut u32,
    errors: *mut *mut GemmoeError,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let batch = find(batch)?;
            let budget = budget::read(budget)?;
            batch.with(|workplace| {
                // Before the arrays are read: a count that cannot be is no reason to read so much memory.
                workplace.batch.check_count(session_count)?;
                let sessions = slice(sessions, session_count, "sessions")?;
                let statuses = slice_mut(statuses, session_count, "statuses")?;
                let tokens = slice_mut(tokens, session_count, "tokens")?;
                let errors = if errors.is_null() { &mut [] } else { slice_mut(errors, session_count, "errors")? };
                workplace.step(sessions, &budget, &mut |index, result: Poll<Result<u32>>| {
                    let (status, error) = match result {
                        Poll::Pending => (Status::NeedMore, None),
                        Poll::Ready(Ok(token)) => {
                            tokens[index] = token;
                            (Status::Ok, None)
                        }
                        Poll::Ready(Err(error)) => (error.status(), Some(error)),
                    };
                    statuses[index] = status as i32;
                    if let Some(place) = errors.get_mut(index) {
                        let handle = error.and_then(|error| handles::insert(ErrorObject::new(error)).ok());
                        *place = handle.unwrap_or(std::ptr::null_mut());
                    }
                })
            })
        })
    }
}

impl Workplace {
    /// Steps the sessions that can be had, then tells `answer` what came of each place.
    fn step(
        &mut self,
        handles: &[*mut GemmoeSession],
        budget: &Budget,
        answer: &mut dyn FnMut(usize, Poll<Result<u32>>),
    ) -> Result<()> {
        let Workplace { batch, results, objects, guards, sessions } = self;
        let mut refused: Vec<(usize, Error)> = Vec::new();
        objects.clear();
        let no_memory = |_| Error::out_of_memory("a batch step", handles.len());
        objects.try_reserve(handles.len()).map_err(no_memory)?;
        let mut locked: Vec<Option<MutexGuard<Session>>> = recycle(std::mem::take(guards));
        locked.try_reserve(handles.len()).map_err(no_memory)?;
        let mut members: Vec<&mut Session> = recycle(std::mem::take(sessions));
        members.try_reserve(handles.len()).map_err(no_memory)?;

        for (place, handle) in handles.iter().enumerate() {
            match find_session(*handle) {
                Ok(object) => objects.push((place, object)),
                Err(error) => refused.push((place, error)),
            }
        }
        for (place, object) in objects.iter() {
            let guard = object.lock();
            locked.push(guard.map_err(|error| refused.push((*place, error))).ok());
        }
        members.extend(locked.iter_mut().flatten().map(|guard| &mut **guard));
        let stepped = catch_unwind(AssertUnwindSafe(|| batch.step(&mut members, budget, results)));
        *sessions = recycle(members);
        let outcome = match stepped {
            Ok(outcome) => outcome,
            Err(panic) => {
                objects.iter().for_each(|(_, object)| object.poison());
                resume_unwind(panic)
            }
        };
        if outcome.is_ok() {
            let held = objects.iter().zip(&locked).filter(|(_, guard)| guard.is_some());
            held.zip(results.drain(..)).for_each(|(((place, _), _), result)| answer(*place, result));
            refused.into_iter().for_each(|(place, error)| answer(place, Poll::Ready(Err(error))));
        }
        *guards = recycle(locked);
        objects.clear();
        outcome
    }
}

/// Stops the step in progress on this batch, which returns CANCELLED when the pieces of work in flight are done, as with
/// gemmoe_session_cancel; its sessions keep their tokens, and the next step goes on. If a session has its token or its
/// error by then, the step hands that out, the others get NEED_MORE, and the next step returns CANCELLED. While no step is
/// in progress, stops the next. Errors: handle errors. Any thread, never blocks. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_batch_cancel(batch: *const GemmoeBatch) -> Status {
    guard_status(|| {
        find(batch)?.cancel.request();
        Ok(())
    })
}

/// Takes back a cancel that has not stopped anything yet. Errors: handle errors. Any thread, never blocks. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_batch_clear_cancel(batch: *const GemmoeBatch) -> Status {
    guard_status(|| {
        find(batch)?.cancel.take();
        Ok(())
    })
}

/// Fills in what the batch takes and did. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_batch_get_info(
    batch: *const GemmoeBatch,
    info_out: *mut GemmoeBatchInfo,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let info = find(batch)?.with(|workplace| {
                Ok(GemmoeBatchInfo {
                    workspace_bytes: workplace.batch.bytes() as u64,
                    touched_experts: workplace.batch.touched_experts(),
                    ..GemmoeBatchInfo::zeroed()
                })
            })?;
            structs::write(info_out, &info, "info_out")
        })
    }
}

/// Destroys a batch; its sessions live on. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_batch_destroy(batch: *mut GemmoeBatch) -> Status {
    guard_status(|| handles::remove::<BatchObject>(batch, "batch"))
}
