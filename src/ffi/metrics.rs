//! `gemmoe_session_metrics`: what a session measured.

use super::error::GemmoeError;
use super::guard::guard;
use super::session::{GemmoeSession, find};
use super::structs::{self, Versioned};
use crate::engine::metrics::STEP_TIME_CLASSES;
use crate::error::Status;

/// Times and counts since the session was made; waiting between calls is not counted. Initialise with
/// GEMMOE_SESSION_METRICS_INIT. Rates are counts by times: decode_tokens / decode_us is tokens per microsecond.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeSessionMetrics {
    /// sizeof(gemmoe_session_metrics)
    pub struct_size: u32,
    /// 1 once a token has been drawn after a prompt, else 0: time_to_first_token_us is then not known.
    pub has_first_token: u32,
    /// Microseconds from the first token of the latest prompt being given to the first token drawn after it.
    pub time_to_first_token_us: u64,
    /// Prompt tokens run.
    pub prefill_tokens: u64,
    /// Microseconds that took.
    pub prefill_us: u64,
    /// Tokens drawn.
    pub decode_tokens: u64,
    /// Microseconds spent running drawn tokens and drawing.
    pub decode_us: u64,
    /// Bytes of keys and values, on the model's device.
    pub kv_bytes: u64,
    /// Bytes of workspace, on the model's device.
    pub workspace_bytes: u64,
    /// Bytes of keys and values that all sessions of the model hold, each shared page counted once.
    pub model_kv_bytes: u64,
    /// Steps by how long they took: entry i counts those of 2^i to 2^(i+1) microseconds, entry 0 also the shorter and entry
    /// 31 also the longer ones.
    pub step_times: [u64; 32],
    /// What experts in host memory cost all sessions of a model on a GPU since it was loaded: experts that were computed on
    /// the CPU, one for each expert of a layer that tokens of a batch were sent to;
    pub model_host_expert_runs: u64,
    /// microseconds that took;
    pub model_host_expert_us: u64,
    /// experts that were copied to the GPU, counted alike;
    pub model_expert_copies: u64,
    /// bytes that were;
    pub model_expert_copy_bytes: u64,
    /// microseconds that calls spent on laying copies out and waiting for room.
    pub model_expert_copy_us: u64,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, two u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeSessionMetrics {
    const NAME: &'static str = "gemmoe_session_metrics";
    const FIRST_SIZE: usize = 400;
}

const _: () = assert!(STEP_TIME_CLASSES == 32);

/// Fills in what the session measured. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_get_metrics(
    session: *const GemmoeSession,
    metrics_out: *mut GemmoeSessionMetrics,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let metrics = find(session)?.with(|session| {
                let metrics = session.metrics();
                let kv_bytes = session.kv_bytes();
                let offload = session.model().offload_counts();
                Ok(GemmoeSessionMetrics {
                    has_first_token: metrics.time_to_first_token.is_some() as u32,
                    time_to_first_token_us: metrics.time_to_first_token.map_or(0, |time| time.as_micros() as u64),
                    prefill_tokens: metrics.prefill_tokens,
                    prefill_us: metrics.prefill_time.as_micros() as u64,
                    decode_tokens: metrics.decode_tokens,
                    decode_us: metrics.decode_time.as_micros() as u64,
                    kv_bytes: kv_bytes as u64,
                    workspace_bytes: (session.bytes() - kv_bytes) as u64,
                    model_kv_bytes: session.model().kv_account().used() as u64,
                    step_times: metrics.step_times,
                    model_host_expert_runs: offload.host_runs,
                    model_host_expert_us: offload.host_time.as_micros() as u64,
                    model_expert_copies: offload.copies,
                    model_expert_copy_bytes: offload.copied_bytes,
                    model_expert_copy_us: offload.copy_time.as_micros() as u64,
                    ..GemmoeSessionMetrics::zeroed()
                })
            })?;
            structs::write(metrics_out, &metrics, "metrics_out")
        })
    }
}
