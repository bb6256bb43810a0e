//! The library's own threads. They spin briefly between pieces of work, then sleep.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
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
        });
        let mut workers = Workers { shared, threads: try_with_capacity("threads", count)? };
        let (report, reports) = channel();
        for index in 1..count {
            let (shared, report) = (Arc::clone(&workers.shared), report.clone());
            let (processor, priority) = (processors.get(index).copied(), options.priority);
            let unavailable = |error| {
                let text = format!("thread {index} of {count} could not be started: {error}");
                Error::new(Status::ThreadUnavailable, text)
            };
            let live = move || {
                let _quiet = Quiet::enter();
                if settle(processor, priority, report) {
                    shared.serve(index);
                }
            };
            let thread = std::thread::Builder::new().name(format!("gemmoe-{index}")).spawn(live);
            workers.threads.push(thread.map_err(unavailable)?);
            // Each is what was asked for before the next one starts.
            let settled = reports.recv().unwrap_or_else(|_| Err(io::Error::other("it was lost")));
            settled.map_err(unavailable)?;
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

/// Makes this thread what was asked for and reports how that went; whether it may work.
fn settle(processor: Option<usize>, priority: Priority, report: Sender<io::Result<()>>) -> bool {
    let niceness = match priority {
        Priority::Normal => 0,
        Priority::Low => 5,
        Priority::Lowest => platform::MAX_NICENESS,
    };
    let pinned = processor.map_or(Ok(()), platform::pin_this_thread);
    let settled = pinned.and_then(|()| if niceness > 0 { platform::lower_this_thread(niceness) } else { Ok(()) });
    let may_work = settled.is_ok();
    report.send(settled).is_ok() && may_work
}

impl Shared {
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
