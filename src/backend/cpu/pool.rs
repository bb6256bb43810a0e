//! The library's own threads. They belong to one model, spin briefly between pieces of work, then sleep.
//!
//! A job is a number of items that any thread may take, so a thread the system has put aside delays only the item
//! it holds: threads join a job when they get to it, and the caller waits for those that joined, not for all.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::backend::ops::Limit;
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::quiet::Quiet;

/// Most threads one pool has.
pub const MAX_THREADS: usize = 256;

/// How long an idle thread spins before it sleeps; about 50 microseconds.
const SPINS: usize = 2000;

/// What each item runs: the item's index and the index of the thread, 0 being the caller.
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

// `state` is [open: 1][epoch: 31][joined: 32].
const OPEN: u64 = 1 << 63;
const EPOCH_STEP: u64 = 1 << 32;
const JOINED_MASK: u64 = EPOCH_STEP - 1;

/// The standard library's locks, not parking_lot's, whose table of sleeping threads is allocated, without a way to fail,
/// when a thread first sleeps, and never given back. What these guard is whole whatever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One job; written by the caller while nobody has joined, read by those that have.
struct Job {
    work: *const Work<'static>,
    end: usize,
    limit: *const Limit<'static>,
}

struct Shared {
    state: AtomicU64,
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only while `state` is closed with nobody joined, and read only by threads that have
// joined, so the joining compare-exchange orders the two; the pointees outlive the job (see `run`).
unsafe impl Sync for Shared {}
// SAFETY: the raw pointers in `job` are only followed under the protocol above, from any thread.
unsafe impl Send for Shared {}

/// A fixed set of threads. `run` may be called from any thread; jobs run one after the other.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    turn: Mutex<()>,
}

impl Pool {
    /// A pool of `threads` threads, the caller of `run` counted in. They end when the pool is dropped.
    pub fn new(threads: usize) -> Result<Pool> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job { work: &|_, _| {}, end: 0, limit: std::ptr::null() }),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Pool { shared, threads: try_with_capacity("threads", threads)?, turn: Mutex::new(()) };
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("gemmoe-{index}"))
                .spawn(move || shared.serve(index))
                .map_err(|error| {
                    let text = format!("thread {index} of {threads} could not be started: {error}");
                    Error::new(Status::ThreadUnavailable, text)
                })?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Threads that work, the caller of `run` counted in.
    pub fn threads(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `work(item, thread)` once for each of `items`, in rising order as far as threads take them, until all are
    /// done or `limit` is reached, by a cancel or otherwise. Returns the first item not done; all before it are. A panic
    /// in `work` is passed on to the caller.
    pub fn run(&self, items: Range<usize>, limit: &Limit, work: &Work<'_>) -> usize {
        if self.threads.is_empty() || items.len() <= 1 {
            for item in items.clone() {
                if limit.is_reached() {
                    return item;
                }
                work(item, 0);
                limit.note_work();
            }
            return items.end;
        }
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: the state is closed and nobody has joined (`turn` admits one caller, which waits for all who
        // joined before it returns), so nobody reads the job. Erasing the lifetimes is sound because
        // this function does not return, and does not unwind, before every thread that joined has left.
        unsafe {
            let work: *const Work<'static> = std::mem::transmute(work as *const Work<'_>);
            let limit = (limit as *const Limit<'_>).cast::<Limit<'static>>();
            *shared.job.get() = Job { work, end: items.end, limit };
        }
        shared.next.store(items.start, Ordering::Relaxed);
        let epoch = (shared.state.load(Ordering::Relaxed) & !(OPEN | JOINED_MASK)).wrapping_add(EPOCH_STEP) & !OPEN;
        shared.state.store(OPEN | epoch, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _sleep = lock(&shared.sleep);
            shared.wake.notify_all();
        }
        shared.take_items(0);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while shared.state.load(Ordering::Acquire) & JOINED_MASK != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = lock(&shared.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
        // Who takes an item finishes it, so every item below `next` is done.
        shared.next.load(Ordering::Relaxed).min(items.end)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        {
            let _sleep = lock(&self.shared.sleep);
            self.shared.wake.notify_all();
        }
        for thread in self.threads.drain(..) {
            // A worker catches the panics of its work, so joining cannot fail in a way that matters here.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A worker's life: wait for a job it has not seen, join it, take items, leave.
    fn serve(&self, thread: usize) {
        let _quiet = Quiet::enter();
        let mut seen = 0;
        while let Some(epoch) = self.join(seen) {
            seen = epoch;
            self.take_items(thread);
            self.state.fetch_sub(1, Ordering::AcqRel);
        }
    }

    /// Joins the next open job whose epoch is not `seen`; `None` when the pool ends.
    fn join(&self, seen: u64) -> Option<u64> {
        let mut spins = 0;
        loop {
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            let state = self.state.load(Ordering::Acquire);
            let epoch = state & !(OPEN | JOINED_MASK);
            if state & OPEN != 0 && epoch != seen {
                if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    return Some(epoch);
                }
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                self.sleep_until_open(seen);
                spins = 0;
            }
        }
    }

    fn sleep_until_open(&self, seen: u64) {
        let sleep = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // Checked after `sleepers` is raised, as the caller checks `sleepers` after opening: one of the two sees the other.
        let state = self.state.load(Ordering::SeqCst);
        let open = state & OPEN != 0 && state & !(OPEN | JOINED_MASK) != seen;
        if !open && !self.stop.load(Ordering::SeqCst) {
            drop(self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner));
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// Takes items until none is left, the limit is reached, or one panics.
    fn take_items(&self, thread: usize) {
        // SAFETY: this thread has joined the job (or is its caller), so it is not written until it leaves.
        let job = unsafe { &*self.job.get() };
        // SAFETY: the caller of `run` keeps both pointees alive until every thread that joined has left.
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::ops::Cancel;

    #[test]
    fn every_item_runs_exactly_once_for_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = Pool::new(threads).unwrap();
            for round in 0..200 {
                let count = round % 37;
                let hits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(0..count, &Limit::none(&Cancel::default()), &|item, thread| {
                    assert!(thread < threads);
                    hits[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(0..11, &Limit::none(&Cancel::default()), &|_, _| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 11);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_works_on() {
        let pool = Pool::new(2).unwrap();
        for bad in [0, 5, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(0..100, &Limit::none(&Cancel::default()), &|item, _| {
                    if item == bad {
                        resume_unwind(Box::new("planted"));
                    }
                })
            }));
            assert!(result.is_err());
        }
        assert_eq!(pool.run(0..100, &Limit::none(&Cancel::default()), &|_, _| {}), 100);
    }

    #[test]
    fn a_cancelled_job_stops_and_says_where() {
        let pool = Pool::new(2).unwrap();
        let cancel = Cancel::default();
        let done = AtomicUsize::new(0);
        let next = pool.run(0..1_000_000, &Limit::none(&cancel), &|item, _| {
            done.fetch_add(1, Ordering::Relaxed);
            if item == 10 {
                cancel.request();
            }
        });
        assert_eq!(next, done.load(Ordering::Relaxed));
        assert!(next < 1000);
    }

    #[test]
    fn a_job_whose_time_is_over_goes_on_where_it_stopped_and_runs_every_item_once() {
        for threads in [1, 3] {
            let pool = Pool::new(threads).unwrap();
            let cancel = Cancel::default();
            let hits: Vec<AtomicUsize> = (0..500).map(|_| AtomicUsize::new(0)).collect();
            let (mut next, mut calls) = (0, 0);
            while next < hits.len() {
                // Already over: each call does the least it may, one item a thread.
                let limit = Limit::new(&cancel, Some(std::time::Instant::now()), None);
                let before = next;
                next = pool.run(next..hits.len(), &limit, &|item, _| {
                    hits[item].fetch_add(1, Ordering::Relaxed);
                });
                assert!(next > before, "a call makes progress, however small its budget");
                calls += 1;
            }
            assert!(calls * (threads + 1) >= hits.len(), "{calls} calls with {threads} threads");
            assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
        }
    }
}
