//! The library's own threads. They spin briefly between pieces of work, then sleep.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::board::Board;
use super::{lock, spin};
use crate::backend::cpu::threads::{Priority, ThreadOptions};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::platform;
use crate::quiet::Quiet;

/// The threads of one pool. They end when it is dropped.
pub struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    board: Arc<Board>,
    spin_time: Duration,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    start: Mutex<Start>,
    told: Condvar,
}

/// How the thread that was started last has begun.
enum Start {
    Awaited,
    Settled(io::Result<()>),
    Lost,
}

impl Workers {
    /// Starts one thread less than `options` lead to: the caller is the first.
    pub fn start(board: &Arc<Board>, options: &ThreadOptions, spin_time: Duration) -> Result<Workers> {
        let count = options.resolved_count();
        let processors = if options.pin { options.pinned_processors()? } else { Vec::new() };
        let shared = Arc::new(Shared {
            board: Arc::clone(board),
            spin_time,
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            start: Mutex::new(Start::Awaited),
            told: Condvar::new(),
        });
        let mut workers = Workers { shared, threads: try_with_capacity("threads", count)? };
        // The first to enter makes the panic hook, and a new thread must not allocate.
        drop(Quiet::enter());
        for index in 1..count {
            let shared = Arc::clone(&workers.shared);
            let mut report = Report { shared: Arc::clone(&shared), start: Start::Lost };
            let (processor, priority) = (processors.get(index).copied(), options.priority);
            let unavailable = |error| {
                let text = format!("thread {index} of {count} could not be started: {error}");
                Error::new(Status::ThreadUnavailable, text)
            };
            let live = move || {
                let _quiet = Quiet::enter();
                let settled = settle(processor, priority);
                let may_work = settled.is_ok();
                report.start = Start::Settled(settled);
                drop(report);
                if may_work {
                    shared.serve(index);
                }
            };
            let thread = std::thread::Builder::new().name(format!("gemmoe-{index}")).spawn(live);
            workers.threads.push(thread.map_err(unavailable)?);
            // Each is what was asked for before the next one starts.
            workers.shared.started().map_err(unavailable)?;
        }
        Ok(workers)
    }

    /// Threads among them.
    pub fn count(&self) -> usize {
        self.threads.len()
    }

    /// To be called after a job was posted: wakes those that sleep.
    pub fn wake(&self) {
        if self.shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _sleep = lock(&self.shared.sleep);
            self.shared.wake.notify_all();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.wake();
        for thread in self.threads.drain(..) {
            // A worker catches the panics of its work, so joining cannot fail in a way that matters here.
            let _ = thread.join();
        }
    }
}

/// A new thread's word to the one that waits for it, given when this is dropped. Nothing is allocated for it: a thread
/// that finds no memory when it begins cannot say so, and ends the process.
struct Report {
    shared: Arc<Shared>,
    start: Start,
}

impl Drop for Report {
    fn drop(&mut self) {
        *lock(&self.shared.start) = std::mem::replace(&mut self.start, Start::Lost);
        self.shared.told.notify_one();
    }
}

/// Makes this thread what was asked for.
fn settle(processor: Option<usize>, priority: Priority) -> io::Result<()> {
    let niceness = match priority {
        Priority::Normal => 0,
        Priority::Low => 5,
        Priority::Lowest => platform::MAX_NICENESS,
    };
    let pinned = processor.map_or(Ok(()), platform::pin_this_thread);
    pinned.and_then(|()| if niceness > 0 { platform::lower_this_thread(niceness) } else { Ok(()) })
}

impl Shared {
    /// Waits until the thread that was started last says how it has begun.
    fn started(&self) -> io::Result<()> {
        let is_awaited = |start: &mut Start| matches!(start, Start::Awaited);
        let start = self.told.wait_while(lock(&self.start), is_awaited);
        let mut start = start.unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut *start, Start::Awaited) {
            Start::Settled(settled) => settled,
            Start::Awaited | Start::Lost => Err(io::Error::other("it was lost")),
        }
    }

    /// A worker's life: wait for a job it has not seen, join it, take items, leave.
    fn serve(&self, thread: usize) {
        let mut seen = 0;
        while let Some(epoch) = self.join(seen) {
            seen = epoch;
            // SAFETY: this thread has joined, and each worker has an index of its own.
            unsafe { self.board.take_items(thread) };
            self.board.leave();
        }
    }

    /// Joins the next open job whose epoch is not `seen`; `None` when the pool ends.
    fn join(&self, seen: u64) -> Option<u64> {
        loop {
            let mut joined = None;
            spin(self.spin_time, || {
                joined = self.board.join(seen);
                joined.is_some() || self.stop.load(Ordering::Acquire)
            });
            if joined.is_some() {
                return joined;
            }
            if self.stop.load(Ordering::Acquire) {
                return None;
            }
            self.sleep_until_open(seen);
        }
    }

    fn sleep_until_open(&self, seen: u64) {
        let sleep = lock(&self.sleep);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        // Checked after `sleepers` is raised, as the caller checks `sleepers` after opening: one of the two sees the other.
        if !self.board.is_open(seen) && !self.stop.load(Ordering::SeqCst) {
            drop(self.wake.wait(sleep).unwrap_or_else(PoisonError::into_inner));
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_lost_before_it_settles_is_answered_and_so_is_the_next() {
        let workers = Workers::start(&Arc::new(Board::new()), &1.into(), Duration::ZERO).unwrap();
        let begin = |start: Start| {
            let report = Report { shared: Arc::clone(&workers.shared), start };
            let thread = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                drop(report);
            });
            let started = workers.shared.started();
            thread.join().unwrap();
            started.map_err(|error| error.to_string())
        };
        assert_eq!(begin(Start::Lost), Err("it was lost".to_owned()));
        assert_eq!(begin(Start::Settled(Ok(()))), Ok(()));
        assert_eq!(begin(Start::Settled(Err(io::ErrorKind::TimedOut.into()))), Err("timed out".to_owned()));
    }
}
