//! Threads that share a model's work: the library's own, or the host's.
//!
//! A job is a number of items that any thread may take, so a thread the system has put aside delays only the item
//! it holds: threads join a job when they get to it, and the caller waits for those that joined, not for all.

mod board;
mod host;
#[cfg(test)]
mod tests;
mod workers;

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::threads::ThreadOptions;
use crate::backend::ops::Limit;
use crate::error::Result;
use board::Board;
use host::HostThreads;
use workers::Workers;

/// How long an idle worker spins before it sleeps, unless it is told.
const SPIN_US: u32 = 50;
/// How long a caller spins for the last items of others: most items take less, and to wake costs a good part of one.
const LAST_ITEMS: Duration = Duration::from_micros(200);

/// What each item runs: the item's index and the index of the thread; the caller is 0 where the library has its own.
type Work<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The standard library's locks, not parking_lot's, whose table of sleeping threads is allocated, without a way to fail,
/// when a thread first sleeps, and never given back. What these guard is whole whatever panicked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spins until `is_done`, for so long at most; whether it is.
fn spin(time: Duration, mut is_done: impl FnMut() -> bool) -> bool {
    /// About a microsecond, so that looking at the clock costs little.
    const SPINS: usize = 32;
    let mut started = None;
    loop {
        for _ in 0..SPINS {
            if is_done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if started.get_or_insert_with(Instant::now).elapsed() >= time {
            return false;
        }
    }
}

/// A fixed number of threads. `run` may be called from any thread.
pub struct Pool {
    board: Arc<Board>,
    helpers: Helpers,
    turn: Mutex<()>,
}

enum Helpers {
    Workers(Workers),
    Host(HostThreads),
}

impl Pool {
    /// A pool of `threads` threads of its own, the caller of `run` counted in.
    pub fn new(threads: usize) -> Result<Pool> {
        Pool::with(&threads.into())
    }

    /// A pool as `options` say. Its threads end when it is dropped.
    pub fn with(options: &ThreadOptions) -> Result<Pool> {
        let spin_time = Duration::from_micros(if options.spin_us == 0 { SPIN_US } else { options.spin_us }.into());
        let board = Arc::new(Board::new());
        let helpers = match options.parallel_for {
            Some(host) => Helpers::Host(HostThreads::new(&board, host, options.resolved_count())?),
            None => Helpers::Workers(Workers::start(&board, options, spin_time)?),
        };
        Ok(Pool { board, helpers, turn: Mutex::new(()) })
    }

    /// Threads that work, the caller of `run` counted in.
    pub fn threads(&self) -> usize {
        match &self.helpers {
            Helpers::Workers(workers) => workers.count() + 1,
            Helpers::Host(host) => host.count(),
        }
    }

    /// Calls `work(item, thread)` once for each of `items`, in rising order as far as threads take them, until all are
    /// done or `limit` is reached, by a cancel or otherwise. Returns the first item not done; all before it are. A panic
    /// in `work` is passed on to the caller.
    pub fn run(&self, items: Range<usize>, limit: &Limit, work: &Work<'_>) -> usize {
        if self.threads() == 1 || items.len() <= 1 {
            return run_alone(items, limit, work);
        }
        match &self.helpers {
            Helpers::Workers(workers) => {
                let _turn = lock(&self.turn);
                // SAFETY: `turn` admits one caller at a time, which does not return or unwind before the job is finished.
                unsafe { self.board.post(items.clone(), limit, work) };
                workers.wake();
                // SAFETY: posted above and not finished; the workers' indices begin with 1.
                unsafe { self.board.take_items(0) };
                self.board.close(LAST_ITEMS);
                self.board.finish(items.end)
            }
            Helpers::Host(host) => {
                // Waiting for the turn could be for ever: the host may have put this call on a thread that the one whose
                // turn it is needs for its tasks, or on the very thread that waits for them.
                let _turn = match self.turn.try_lock() {
                    Ok(turn) => turn,
                    Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
                    Err(TryLockError::WouldBlock) => return run_alone(items, limit, work),
                };
                // SAFETY: as above.
                unsafe { self.board.post(items.clone(), limit, work) };
                host.help(items.len());
                self.board.close(LAST_ITEMS);
                // What the host did not call. SAFETY: posted above and not finished; whoever had joined has left.
                unsafe { self.board.take_items(0) };
                self.board.finish(items.end)
            }
        }
    }
}

/// The same on this thread alone.
fn run_alone(items: Range<usize>, limit: &Limit, work: &Work<'_>) -> usize {
    for item in items.clone() {
        if limit.is_reached() {
            return item;
        }
        work(item, 0);
        limit.note_work();
    }
    items.end
}
