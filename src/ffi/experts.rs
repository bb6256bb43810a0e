//! Experts in the open: masks, biases, statistics and routes of a `gemmoe_session`.

use super::arguments::{Out, copy_out, slice, slice_mut};
use super::error::GemmoeError;
use super::guard::guard;
use super::session::{GemmoeSession, find};
use super::structs::{self, Versioned};
use crate::engine::experts::RouteArrays;
use crate::error::Status;

/// A layer argument: every layer.
pub const GEMMOE_ALL_LAYERS: u32 = u32::MAX;

/// In routes: no expert, where a mask allows fewer than num_experts_per_tok. Its weight is 0.
pub const GEMMOE_NO_EXPERT: u32 = u32::MAX;

fn layer_of(layer: u32) -> Option<usize> {
    (layer != GEMMOE_ALL_LAYERS).then_some(layer as usize)
}

/// Lets the router choose only experts whose bits are set in `allowed` (bit e is expert e) from now on, in `layer` or in
/// GEMMOE_ALL_LAYERS. At least one must be; if fewer than num_experts_per_tok are, they share the whole weight.
/// Errors: handle errors, EXPERT_VALUE (no bit, or one past the experts), INVALID_ARGUMENT (no such layer), OUT_OF_MEMORY,
/// BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_set_expert_mask(
    session: *mut GemmoeSession,
    layer: u32,
    allowed: u64,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe { guard(error_out, || find(session)?.with(|session| session.set_allowed_experts(layer_of(layer), allowed))) }
}

/// Adds `bias`, num_local_experts values, to the router's logits from now on, in `layer` or in GEMMOE_ALL_LAYERS, in place
/// of an earlier one.
/// Errors: handle errors, NULL_ARGUMENT, EXPERT_VALUE (not a finite number), INVALID_ARGUMENT (another count, no such
/// layer), OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_set_expert_bias(
    session: *mut GemmoeSession,
    layer: u32,
    bias: *const f32,
    bias_count: usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let bias = slice(bias, bias_count, "bias")?;
            session.with(|session| session.set_expert_bias(layer_of(layer), bias))
        })
    }
}

/// Takes all masks and biases off again. Errors: handle errors, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_clear_expert_control(
    session: *mut GemmoeSession,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            find(session)?.with(|session| {
                session.clear_expert_control();
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

/// Copies how many tokens were sent to each expert, and the sum of the weights they were sent with, since the session was
/// made or the statistics were cleared: `[num_hidden_layers, num_local_experts]` each. `capacity` is the room in each array
/// (either may be NULL if it is 0); `count_out` receives how many values there are, also with BUFFER_TOO_SMALL; with
/// `capacity` 0 nothing else is written.
/// Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_expert_statistics(
    session: *const GemmoeSession,
    counts: *mut u64,
    weight_sums: *mut f64,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            // Before anything is written.
            slice_mut(weight_sums, capacity, "weight_sums")?;
            session.with(|session| {
                let statistics = session.expert_statistics();
                copy_out(statistics.counts(), counts, capacity, count_out, "counts")?;
                copy_out(statistics.weight_sums(), weight_sums, capacity, count_out, "weight_sums")
            })
        })
    }
}

/// Starts the expert statistics anew. Errors: handle errors, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_clear_expert_statistics(
    session: *mut GemmoeSession,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            find(session)?.with(|session| {
                session.clear_expert_statistics();
                Ok(())
            })
        })
    }
}

/// Where gemmoe_session_fetch_routes writes. Initialise with GEMMOE_ROUTE_ARRAYS_INIT and set the pointers and capacity.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeRouteArrays {
    /// sizeof(gemmoe_route_arrays)
    pub struct_size: u32,
    /// Tokens there is room for in each array.
    pub capacity: u32,
    /// `[capacity]`: how many tokens came before each since the session began, those a sliding window dropped included.
    pub positions: *mut u64,
    /// `[capacity]`: the tokens.
    pub tokens: *mut u32,
    /// `[capacity, num_hidden_layers, num_experts_per_tok]`: their experts, highest weight first, or GEMMOE_NO_EXPERT.
    pub experts: *mut u32,
    /// `[capacity, num_hidden_layers, num_experts_per_tok]`: the weights.
    pub weights: *mut f32,
}

// SAFETY: repr(C), begins with struct_size, two u32 then pointers leave no padding, plain numbers and pointers.
unsafe impl Versioned for GemmoeRouteArrays {
    const NAME: &'static str = "gemmoe_route_arrays";
    const FIRST_SIZE: usize = 8 + 4 * size_of::<*mut u32>();
}

/// Moves the routes of tokens that were run since the last fetch out, oldest first. The session keeps those of its last
/// route_capacity tokens (gemmoe_session_options). `count_out` receives how many tokens were written, `lost_out` (may be
/// NULL) how many were overwritten since the last fetch because nobody fetched them.
/// Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (impossible arrays), BUSY.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_fetch_routes(
    session: *mut GemmoeSession,
    arrays: *const GemmoeRouteArrays,
    count_out: *mut usize,
    lost_out: *mut u64,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            Out::new(arrays.cast_mut(), "arrays")?;
            let arrays = structs::read(arrays, "arrays")?;
            let count_out = Out::new(count_out, "count_out")?;
            session.with(|session| {
                let config = session.model().config();
                let capacity = arrays.capacity as usize;
                let row = config.num_hidden_layers * config.num_experts_per_tok;
                let mut arrays = RouteArrays {
                    positions: slice_mut(arrays.positions, capacity, "positions")?,
                    tokens: slice_mut(arrays.tokens, capacity, "tokens")?,
                    experts: slice_mut(arrays.experts, capacity.saturating_mul(row), "experts")?,
                    weights: slice_mut(arrays.weights, capacity.saturating_mul(row), "weights")?,
                };
                let (count, lost) = session.fetch_routes(&mut arrays);
                count_out.set(count);
                if let Ok(lost_out) = Out::new(lost_out, "lost_out") {
                    lost_out.set(lost);
                }
                Ok(())
            })
        })
    }
}
