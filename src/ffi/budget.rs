//! `gemmoe_budget`: how much of the host's time one call may take.

use std::time::Duration;

use super::structs::{self, Versioned, check_reserved};
use crate::engine::Budget;
use crate::error::Result;

/// What one call may use up before it returns NEED_MORE. Initialise with GEMMOE_BUDGET_INIT, which is no limit. Every call
/// does at least one piece of work (about 100 microseconds of one core), so the smallest budget gets on. Results do not
/// depend on budgets.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeBudget {
    /// sizeof(gemmoe_budget)
    pub struct_size: u32,
    /// Layers, the head counted as one; 0 is no limit.
    pub max_layers: u32,
    /// Microseconds from the beginning of the call; 0 is no limit.
    pub max_us: u64,
    /// Must be 0.
    pub reserved: [u64; 2],
}

// SAFETY: repr(C), begins with struct_size, two u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeBudget {
    const NAME: &'static str = "gemmoe_budget";
    const FIRST_SIZE: usize = 32;
}

/// The budget a host passes; NULL is no limit.
///
/// # Safety
/// `budget` is NULL or readable for as many bytes as its `struct_size` says.
pub unsafe fn read(budget: *const GemmoeBudget) -> Result<Budget> {
    // SAFETY: the caller's promise.
    let budget = unsafe { structs::read(budget, "budget") }?;
    check_reserved(&budget.reserved, "budget")?;
    Ok(Budget {
        time: (budget.max_us > 0).then(|| Duration::from_micros(budget.max_us)),
        layers: (budget.max_layers > 0).then_some(budget.max_layers as usize),
    })
}
