//! Router patches: gates put in place of a model's own while its sessions go on, and taken off again.

use std::ffi::c_char;

use super::arguments::slice;
use super::error::GemmoeError;
use super::guard::guard;
use super::handles;
use super::model::{GemmoeModel, ModelObject};
use crate::error::Status;
use crate::model::RouterPatch;

/// Applies the router patch in the file `path`, a path of the host's choosing: the patch's gates are in force in place of the
/// stored ones, or of an earlier patch's. The file is not needed afterwards.
///
/// Sessions and batches go on. A call that runs tokens meanwhile ends under the gates it began under, and this waits for none.
/// From then on a session shows, bit for bit, what one made under the new gates and given the same tokens would: all its tokens
/// are pending (gemmoe_session_info.pending_count), its logits are gone until they were run again, which the next step,
/// prefill (of no tokens too), score or embed does, in budgets if it is given any. That takes no memory, but where pages are
/// shared with a fork (KV_LIMIT, OUT_OF_MEMORY). Snapshots belong to the gates they were taken under: others refuse them with
/// SNAPSHOT_MODEL. Routes and statistics of tokens that are run again are counted again.
///
/// The gates take layers x experts x hidden_size x 4 bytes beside the stored ones, on a GPU in its memory, where
/// device_memory_limit does not count them.
/// Errors, after which the gates in force are what they were: handle errors, NULL_ARGUMENT, INVALID_UTF8, FILE_NOT_FOUND,
/// READ_FAILED, PATCH_DAMAGED (cut off, altered, of another version, or no patch), PATCH_MODEL (for other sizes, or made from
/// other gates than the model's stored ones: the text has both sides' numbers), OUT_OF_MEMORY, DEVICE_OUT_OF_MEMORY,
/// DEVICE_FAILED, DEVICE_LOST. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_apply_router_patch(
    model: *const GemmoeModel,
    path: *const c_char,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let model = handles::find::<ModelObject>(model, "model")?;
            let file = super::arguments::path(path, "path")?;
            model.with(|model| model.apply_router_patch(&RouterPatch::read(&file)?))
        })
    }
}

/// The same of a patch's bytes, `byte_count` of them, as its file has them. They are not needed afterwards.
/// Errors: as gemmoe_model_apply_router_patch, but for those of paths and files. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_apply_router_patch_bytes(
    model: *const GemmoeModel,
    bytes: *const u8,
    byte_count: usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let model = handles::find::<ModelObject>(model, "model")?;
            let bytes = slice(bytes, byte_count, "bytes")?;
            model.with(|model| model.apply_router_patch(&RouterPatch::from_bytes(bytes)?))
        })
    }
}

/// Takes the applied patch off: the stored gates are in force again, bit for bit. Without a patch nothing changes. What sessions
/// show then is as said of gemmoe_model_apply_router_patch; one that was not run under the patch goes on where it stood.
/// Errors: handle errors. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_remove_router_patch(
    model: *const GemmoeModel,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || handles::find::<ModelObject>(model, "model")?.with(|model| model.remove_router_patch()))
    }
}
