//! `gemmoe_plan_memory`: what a model and a session will take, before anything is loaded.

use std::ffi::c_char;

use super::arguments::path;
use super::error::GemmoeError;
use super::guard::guard;
use super::load::GemmoeLoadOptions;
use super::session::{GemmoeSessionOptions, kv_constant};
use super::structs::{self, Versioned};
use crate::engine::Model;
use crate::error::Status;

/// Memory of a model and of each of its sessions, on the device the load options choose. Initialise with
/// GEMMOE_MEMORY_PLAN_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeMemoryPlan {
    /// sizeof(gemmoe_memory_plan)
    pub struct_size: u32,
    /// Tokens a session can hold, the default filled in.
    pub context_size: u32,
    /// One of GEMMOE_KV_F32 to GEMMOE_KV_INT8, the default filled in.
    pub kv_dtype: u32,
    /// Must not be relied on.
    pub reserved0: u32,
    /// Bytes of weights: what gemmoe_model_get_info says after loading.
    pub weight_bytes: u64,
    /// Bytes of experts among them.
    pub expert_bytes: u64,
    /// Bytes of the tokenizer in host memory, about; 0 if there is none.
    pub tokenizer_bytes: u64,
    /// Bytes of keys and values of one token.
    pub kv_bytes_per_token: u64,
    /// Bytes of keys and values of one session: what gemmoe_session_get_info will say.
    pub kv_bytes: u64,
    /// Bytes of workspace of one session: what gemmoe_session_get_info will say.
    pub workspace_bytes: u64,
    /// Bytes of weights on the GPU, as gemmoe_residency has them; 0 on the CPU.
    pub device_bytes: u64,
    /// Bytes there that experts are copied through.
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

// SAFETY: repr(C), begins with struct_size, four u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeMemoryPlan {
    const NAME: &'static str = "gemmoe_memory_plan";
    const FIRST_SIZE: usize = 136;
}

/// Tells what gemmoe_model_load and gemmoe_session_create with these options would take, from the headers of the weight files
/// alone. Both options may be NULL. The workspace of a batch comes on top: gemmoe_batch_get_info tells it.
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, KV_LIMIT, and everything that can be wrong with a model directory,
/// as gemmoe_load_wait. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_plan_memory(
    directory: *const c_char,
    load_options: *const GemmoeLoadOptions,
    session_options: *const GemmoeSessionOptions,
    plan_out: *mut GemmoeMemoryPlan,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let directory = path(directory, "directory")?;
            let load = structs::read(load_options, "load_options")?.resolve()?;
            let session = structs::read(session_options, "session_options")?.resolve()?;
            let plan = Model::plan(&directory, &load, &session)?;
            let plan = GemmoeMemoryPlan {
                context_size: plan.context_size as u32,
                kv_dtype: kv_constant(plan.kv_dtype),
                weight_bytes: plan.weight_bytes,
                expert_bytes: plan.expert_bytes,
                tokenizer_bytes: plan.tokenizer_bytes,
                kv_bytes_per_token: plan.kv_bytes_per_token,
                kv_bytes: plan.kv_bytes,
                workspace_bytes: plan.workspace_bytes,
                device_bytes: plan.residency.device_bytes,
                staging_bytes: plan.residency.staging_bytes,
                host_bytes: plan.residency.host_bytes,
                device_experts: plan.residency.device_experts,
                host_experts: plan.residency.host_experts,
                ..GemmoeMemoryPlan::zeroed()
            };
            structs::write(plan_out, &plan, "plan_out")
        })
    }
}
