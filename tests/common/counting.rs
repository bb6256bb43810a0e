//! An allocator that counts, for tests of what is allocated and what is given back.
#![allow(dead_code)] // Each test file uses its own part.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering};

/// Counts allocations and live bytes of all threads.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES: AtomicIsize = AtomicIsize::new(0);
static PEAK_BYTES: AtomicIsize = AtomicIsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if refuses(layout.size()) {
            return std::ptr::null_mut();
        }
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        OWN_ALLOCATIONS.set(OWN_ALLOCATIONS.get() + 1);
        let live = LIVE_BYTES.fetch_add(layout.size() as isize, Ordering::Relaxed) + layout.size() as isize;
        PEAK_BYTES.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

thread_local! {
    /// Large allocations of this thread before one fails.
    static LEFT: Cell<usize> = const { Cell::new(usize::MAX) };
    static OWN_ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// What is smaller never fails: it may be of a size that nobody's input decides.
const LARGE: usize = 2048;

fn refuses(bytes: usize) -> bool {
    if bytes < LARGE {
        return false;
    }
    let left = LEFT.get();
    LEFT.set(left.wrapping_sub(1).min(usize::MAX - 1));
    left == 0
}

/// Runs `work`, in which this thread's first large allocation after `count` others fails; tells whether one did.
pub fn failing_after<T>(count: usize, work: impl FnOnce() -> T) -> (T, bool) {
    LEFT.set(count);
    let result = work();
    let left = LEFT.replace(usize::MAX);
    (result, left > count)
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations so far, of all threads.
pub fn allocations() -> usize {
    ALLOCATIONS.load(Ordering::Relaxed)
}

/// Those of this thread among them.
pub fn own_allocations() -> usize {
    OWN_ALLOCATIONS.get()
}

/// Bytes that are allocated now.
pub fn live_bytes() -> isize {
    LIVE_BYTES.load(Ordering::Relaxed)
}

/// The most bytes that `work` had allocated at once, beyond those from before.
pub fn peak_bytes<T>(work: impl FnOnce() -> T) -> (T, isize) {
    let before = live_bytes();
    PEAK_BYTES.store(before, Ordering::Relaxed);
    let result = work();
    (result, PEAK_BYTES.load(Ordering::Relaxed) - before)
}
