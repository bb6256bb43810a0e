//! Where a job is posted: threads join it, take its items, and leave.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use super::{Work, lock, spin};
use crate::backend::ops::Limit;

// `state` is [open: 1][awaited: 1][epoch: 30][joined: 32].
const OPEN: u64 = 1 << 63;
const AWAITED: u64 = 1 << 62;
const EPOCH_STEP: u64 = 1 << 32;
const JOINED_MASK: u64 = EPOCH_STEP - 1;
const EPOCH_MASK: u64 = !(OPEN | AWAITED | JOINED_MASK);

/// One job; written by the caller while nobody has joined, read by those that have.
struct Job {
    work: *const Work<'static>,
    end: usize,
    limit: *const Limit<'static>,
}

/// The board of one pool, with one job at a time.
pub struct Board {
    state: AtomicU64,
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// The caller sleeps here until the last thread has left.
    sleep: Mutex<()>,
    left: Condvar,
}

// SAFETY: `job` is written only while `state` is closed with nobody joined, and read only by threads that have
// joined, so the joining compare-exchange orders the two; the pointees outlive the job (see `post`).
unsafe impl Sync for Board {}
// SAFETY: the raw pointers in `job` are only followed under the protocol above, from any thread.
unsafe impl Send for Board {}

impl Board {
    pub fn new() -> Board {
        Board {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job { work: &|_, _| {}, end: 0, limit: std::ptr::null() }),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleep: Mutex::new(()),
            left: Condvar::new(),
        }
    }

    /// Opens a job, to be ended by `close` and `finish`.
    ///
    /// # Safety
    /// One thread at a time posts jobs, its job before was finished, and `work` and `limit` live until this one is.
    pub unsafe fn post(&self, items: Range<usize>, limit: &Limit, work: &Work<'_>) {
        // SAFETY: the state is closed and nobody has joined, so nobody reads the job; the caller promises that the
        // pointees, whose lifetimes are erased, live until the job is finished.
        unsafe {
            let work: *const Work<'static> = std::mem::transmute(work as *const Work<'_>);
            let limit = (limit as *const Limit<'_>).cast::<Limit<'static>>();
            *self.job.get() = Job { work, end: items.end, limit };
        }
        self.next.store(items.start, Ordering::Relaxed);
        let epoch = (self.state.load(Ordering::Relaxed) & EPOCH_MASK).wrapping_add(EPOCH_STEP) & EPOCH_MASK;
        self.state.store(OPEN | epoch, Ordering::SeqCst);
    }

    /// Whether a job is open whose epoch is not `seen`.
    pub fn is_open(&self, seen: u64) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        state & OPEN != 0 && state & EPOCH_MASK != seen
    }

    /// Joins the open job unless its epoch is `seen`, and answers its epoch. It is not finished before `leave`.
    pub fn join(&self, seen: u64) -> Option<u64> {
        let mut state = self.state.load(Ordering::Acquire);
        while state & OPEN != 0 && state & EPOCH_MASK != seen {
            match self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(state & EPOCH_MASK),
                Err(found) => state = found,
            }
        }
        None
    }

    /// What every `join` ends with.
    pub fn leave(&self) {
        let before = self.state.fetch_sub(1, Ordering::AcqRel);
        if before & AWAITED != 0 && before & JOINED_MASK == 1 {
            let _sleep = lock(&self.sleep);
            self.left.notify_one();
        }
    }

    /// Takes items until none is left, the limit is reached, or one panics.
    ///
    /// # Safety
    /// This thread has joined the job, or posted it and not finished it; no other has this `thread` meanwhile.
    pub unsafe fn take_items(&self, thread: usize) {
        // SAFETY: the job is not written before it is finished.
        let job = unsafe { &*self.job.get() };
        // SAFETY: both pointees live until the job is finished.
        let (work, limit) = unsafe { (&*job.work, &*job.limit) };
        while !limit.is_reached() {
            let item = self.next.fetch_add(1, Ordering::Relaxed);
            if item >= job.end {
                return;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(item, thread))) {
                self.next.store(job.end, Ordering::Relaxed);
                lock(&self.panic).get_or_insert(panic);
                return;
            }
            limit.note_work();
        }
    }

    /// Lets nobody join any more, and waits until all that joined have left: spinning for `spin_time`, then asleep, so that
    /// even a caller of real-time priority leaves the processor to a thread that the system has put aside.
    pub fn close(&self, spin_time: Duration) {
        self.state.fetch_and(!OPEN, Ordering::AcqRel);
        let have_left = || self.state.load(Ordering::Acquire) & JOINED_MASK == 0;
        if spin(spin_time, have_left) {
            return;
        }
        let mut sleep = lock(&self.sleep);
        // Who leaves after this sees that it is awaited; who left before is seen here.
        self.state.fetch_or(AWAITED, Ordering::AcqRel);
        while !have_left() {
            sleep = self.left.wait(sleep).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// After `close`: passes on a panic, or answers the first item not done.
    pub fn finish(&self, end: usize) -> usize {
        let panic = lock(&self.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        // Who takes an item finishes it, so every item below `next` is done.
        self.next.load(Ordering::Relaxed).min(end)
    }
}
