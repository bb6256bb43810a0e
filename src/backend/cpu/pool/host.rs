//! The host's threads, through its `parallel_for`: what it is handed, and what it may do wrong with it.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::board::Board;
use crate::backend::cpu::threads::ParallelFor;
use crate::error::{Error, Result};
use crate::memory::try_with_capacity;
use crate::quiet::Quiet;

/// The host's threads as helpers of one pool.
pub struct HostThreads {
    parallel_for: ParallelFor,
    /// What `task_context` is: no address but a number, which stands for nothing once the pool is gone.
    number: usize,
    count: usize,
}

struct Shared {
    board: Arc<Board>,
    /// For each thread index, the epoch of the last job somebody took it in. Two with one index would share a workspace.
    taken: Vec<AtomicU64>,
}

/// The pools that tasks may be called for. Empty, and without memory, when the last one is gone.
static POOLS: RwLock<Vec<(usize, Arc<Shared>)>> = RwLock::new(Vec::new());

impl HostThreads {
    pub fn new(board: &Arc<Board>, parallel_for: ParallelFor, count: usize) -> Result<HostThreads> {
        static NUMBERS: AtomicUsize = AtomicUsize::new(1);
        let mut taken = try_with_capacity("threads", count)?;
        taken.resize_with(count, || AtomicU64::new(0));
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let mut pools = POOLS.write().unwrap_or_else(PoisonError::into_inner);
        let bytes = size_of::<(usize, Arc<Shared>)>();
        pools.try_reserve(1).map_err(|_| Error::out_of_memory("the table of pools", bytes))?;
        pools.push((number, Arc::new(Shared { board: Arc::clone(board), taken })));
        Ok(HostThreads { parallel_for, number, count })
    }

    /// Tasks that may run at the same time.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Has the host run the posted job in at most `tasks` tasks. It may have done any part of it, and some may still run.
    pub fn help(&self, tasks: usize) {
        let count = tasks.min(self.count) as u32;
        // SAFETY: `task` may be called with anything at any time.
        unsafe { self.parallel_for.call(count, task, std::ptr::without_provenance_mut(self.number)) }
    }
}

impl Drop for HostThreads {
    fn drop(&mut self) {
        let mut pools = POOLS.write().unwrap_or_else(PoisonError::into_inner);
        pools.retain(|(number, _)| *number != self.number);
        if pools.is_empty() {
            *pools = Vec::new();
        }
    }
}

/// What the host calls: takes part in the job of the pool that `context` stands for, if there is one and `index` is free.
/// No panic leaves it: those of the work are kept for the pool's caller.
extern "C" fn task(context: *mut c_void, index: u32) {
    let _quiet = Quiet::enter();
    let shared = {
        let pools = POOLS.read().unwrap_or_else(PoisonError::into_inner);
        pools.iter().find(|(number, _)| *number == context.addr()).map(|(_, shared)| Arc::clone(shared))
    };
    if let Some(shared) = shared {
        shared.take_part(index as usize);
    }
}

impl Shared {
    fn take_part(&self, index: usize) {
        /// No epoch has it, so that the first job's differs from what `taken` begins with.
        const TAKEN: u64 = 1;
        let Some(taken) = self.taken.get(index) else { return };
        // One that comes after the job is over finds it closed; the next job's it may as well help with.
        let Some(epoch) = self.board.join(u64::MAX) else { return };
        if taken.swap(epoch | TAKEN, Ordering::AcqRel) != epoch | TAKEN {
            // SAFETY: this thread has joined, and was the first in this job to take the index.
            unsafe { self.board.take_items(index) };
        }
        self.board.leave();
    }
}
