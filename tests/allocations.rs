//! What the steady decode loop allocates: nothing. And what a model leaves behind: nothing either.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicIsize, AtomicUsize, Ordering};
use std::time::Duration;

use common::{Directory, load_with};
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::{Sampling, Session, SessionOptions};

/// Counts allocations and live bytes of all threads.
struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static LIVE_BYTES: AtomicIsize = AtomicIsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        LIVE_BYTES.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        LIVE_BYTES.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_step_allocates_nothing_and_a_dropped_model_leaves_nothing() {
    let directory = Directory::random(71).to_temporary();
    let round = || {
        let model = load_with(directory.path(), 3, Instructions::Detect);
        let options = SessionOptions { context_size: 256, prefill_chunk: 16, ..Default::default() };
        let mut session = Session::new(Arc::clone(&model), &options).unwrap();
        for temperature in [0.0, 0.9] {
            let sampling = Sampling { temperature, top_k: 40, top_p: 0.9, min_p: 0.01, seed: 1, ..Default::default() };
            session.rewind(0).unwrap();
            session.set_sampling(sampling).unwrap();
            session.prefill(&[2; 40]).unwrap();
            session.step().unwrap();
            // A thread's own beginning allocates; on a busy machine it may come late.
            std::thread::sleep(Duration::from_millis(20));
            let before = ALLOCATIONS.load(Ordering::Relaxed);
            for _ in 0..50 {
                session.step().unwrap();
            }
            session.prefill(&[3; 20]).unwrap();
            session.rewind(60).unwrap();
            session.step().unwrap();
            assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), before);
        }
    };
    round();
    let before = LIVE_BYTES.load(Ordering::Relaxed);
    (0..8).for_each(|_| round());
    assert_eq!(LIVE_BYTES.load(Ordering::Relaxed), before);
}
