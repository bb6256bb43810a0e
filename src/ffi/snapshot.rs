//! Snapshots of a `gemmoe_session`: to bytes, and back in this process or another.

use std::sync::Arc;

use super::arguments::{Out, slice, slice_mut};
use super::error::GemmoeError;
use super::guard::guard;
use super::handles;
use super::model::{GemmoeModel, ModelObject};
use super::session::{GemmoeSession, GemmoeSessionOptions, SessionObject, find};
use super::structs;
use crate::engine::Session;
use crate::error::{Error, Status};

/// Writes all that decides what comes next (tokens, keys and values, sampling and its random numbers, masks, biases, grammar)
/// to `bytes`. `count_out` receives how many bytes that takes, also with BUFFER_TOO_SMALL; with `capacity` 0 nothing else
/// is written. Statistics, metrics and routes that wait are not part of it.
/// Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_snapshot(
    session: *const GemmoeSession,
    bytes: *mut u8,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let bytes = slice_mut(bytes, capacity, "bytes")?;
            let count_out = Out::new(count_out, "count_out")?;
            session.with(|session| {
                let needed = session.snapshot_bytes();
                count_out.set(needed);
                if capacity == 0 {
                    return Ok(());
                }
                let too_small = || {
                    let text = format!("bytes has room for {capacity} bytes, {needed} are needed");
                    Error::new(Status::BufferTooSmall, text).at_key("bytes")
                };
                session.snapshot(bytes.get_mut(..needed).ok_or_else(too_small)?)
            })
        })
    }
}

/// Makes a session, owned by the host, that goes on where the one that wrote the snapshot stood, with the same model in this
/// process or another: bit for bit, if both use the same instruction set. Zeros in `options`, which may be NULL, take what that session had; prefill_chunk,
/// route_capacity, kv_limit_bytes and flags are always those of `options`. The bytes are checked as a file from outside is.
/// Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, SNAPSHOT_DAMAGED, SNAPSHOT_VERSION, SNAPSHOT_MODEL, INVALID_ARGUMENT
/// (another kv_dtype, a context too small, other keep_tokens once the window has dropped tokens), KV_LIMIT, OUT_OF_MEMORY;
/// with a grammar what gemmoe_grammar_create returns.
/// Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_restore(
    model: *const GemmoeModel,
    bytes: *const u8,
    byte_count: usize,
    options: *const GemmoeSessionOptions,
    session_out: *mut *mut GemmoeSession,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let model = handles::find::<ModelObject>(model, "model")?;
            let bytes = slice(bytes, byte_count, "bytes")?;
            let options = structs::read(options, "options")?.resolve()?;
            let session_out = Out::new(session_out, "session_out")?;
            let session = model.with(|model| Session::restore(Arc::clone(model), bytes, &options))?;
            session_out.set(handles::insert(SessionObject::new(session))?);
            Ok(())
        })
    }
}
