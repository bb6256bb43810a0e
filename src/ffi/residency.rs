//! `gemmoe_residency`: where a model's weights are, and moving them.

use super::error::GemmoeError;
use super::guard::guard;
use super::handles;
use super::model::{GemmoeModel, ModelObject};
use super::structs::{self, Versioned};
use crate::error::Status;

/// How a model's weights are shared out between a GPU and host memory; on the CPU all of it is in host memory. Initialise with
/// GEMMOE_RESIDENCY_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeResidency {
    /// sizeof(gemmoe_residency)
    pub struct_size: u32,
    /// Must not be relied on.
    pub reserved0: u32,
    /// Bytes of weights on the GPU, with what lies between them.
    pub device_bytes: u64,
    /// Bytes on the GPU beside them that experts are copied through; 0 where all are there. With device_bytes it is what
    /// gemmoe_load_options.device_memory_limit counts.
    pub staging_bytes: u64,
    /// Bytes of weights in host memory.
    pub host_bytes: u64,
    /// Experts on the GPU, those of all layers together.
    pub device_experts: u64,
    /// Experts in host memory.
    pub host_experts: u64,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, two u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeResidency {
    const NAME: &'static str = "gemmoe_residency";
    const FIRST_SIZE: usize = 80;
}

/// Fills in where the model's weights are now. Waits while gemmoe_model_set_device_memory_limit moves experts.
/// Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_get_residency(
    model: *const GemmoeModel,
    residency_out: *mut GemmoeResidency,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let found = handles::find::<ModelObject>(model, "model")?.with(|model| Ok(model.residency()))?;
            let residency = GemmoeResidency {
                device_bytes: found.device_bytes,
                staging_bytes: found.staging_bytes,
                host_bytes: found.host_bytes,
                device_experts: found.device_experts,
                host_experts: found.host_experts,
                ..GemmoeResidency::zeroed()
            };
            structs::write(residency_out, &residency, "residency_out")
        })
    }
}

/// Changes gemmoe_load_options.device_memory_limit of a loaded model to `bytes`, 0 being no limit. Returns when experts have moved:
/// to host memory, and their memory on the GPU is freed, or back. Sessions go on; calls that run tokens wait meanwhile, and
/// this waits for what they have begun. On the CPU any limit holds, and nothing is done.
/// Errors: handle errors, INVALID_ARGUMENT (below the least that the model takes, which the error names), OUT_OF_MEMORY,
/// DEVICE_OUT_OF_MEMORY, DEVICE_FAILED, DEVICE_LOST, THREAD_UNAVAILABLE. Unless the GPU is lost, the model works after an error,
/// with some of the experts moved. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_set_device_memory_limit(
    model: *const GemmoeModel,
    bytes: u64,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            handles::find::<ModelObject>(model, "model")?.with(|model| model.set_device_memory_limit(bytes))
        })
    }
}
