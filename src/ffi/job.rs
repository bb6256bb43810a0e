//! Work on a thread of its own, to be polled, cancelled and waited for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use parking_lot::Mutex;

use super::load::{GEMMOE_LOAD_OVER, GEMMOE_LOAD_RUNNING, GemmoeLoadProgress};
use crate::error::{Error, Result, Status};
use crate::model::Progress;
use crate::quiet::{Quiet, panic_text};

/// Work that ends with a `T`. Dropped, it is cancelled and waited for.
pub struct Job<T> {
    progress: Arc<Progress>,
    state: Arc<AtomicU32>,
    thread: Mutex<Option<JoinHandle<Result<T>>>>,
}

impl<T> Drop for Job<T> {
    fn drop(&mut self) {
        self.progress.cancel();
        if let Some(thread) = self.thread.get_mut().take() {
            // The thread's result, even a panic, is of no interest to anybody any more.
            let _ = thread.join();
        }
    }
}

impl<T: Send + 'static> Job<T> {
    /// Begins; the thread's name is `name`.
    pub fn start(name: &str, work: impl FnOnce(&Progress) -> Result<T> + Send + 'static) -> Result<Job<T>> {
        let (progress, state) = (Arc::new(Progress::default()), Arc::new(AtomicU32::new(GEMMOE_LOAD_RUNNING)));
        let (its_progress, its_state) = (Arc::clone(&progress), Arc::clone(&state));
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _quiet = Quiet::enter();
            let result = catch_unwind(AssertUnwindSafe(|| work(&its_progress))).unwrap_or_else(|payload| {
                let text = format!("a defect of gemmoe was caught: {}", panic_text(&*payload));
                Err(Error::new(Status::Internal, text))
            });
            its_state.store(GEMMOE_LOAD_OVER, Ordering::Release);
            result
        });
        let thread = thread.map_err(|error| {
            Error::new(Status::ThreadUnavailable, format!("the thread {name} could not be started: {error}"))
        })?;
        Ok(Job { progress, state, thread: Mutex::new(Some(thread)) })
    }

    /// How far it has come.
    pub fn progress(&self) -> GemmoeLoadProgress {
        GemmoeLoadProgress {
            struct_size: 0,
            state: self.state.load(Ordering::Acquire),
            bytes_total: self.progress.bytes_total(),
            bytes_read: self.progress.bytes_read(),
        }
    }

    /// Asks it to stop.
    pub fn cancel(&self) {
        self.progress.cancel();
    }

    /// Waits for it and answers its result, once. `name` is the parameter's in messages.
    pub fn wait(&self, name: &str) -> Result<T> {
        let busy = || Error::new(Status::Busy, format!("another thread waits for this {name}"));
        let mut thread = self.thread.try_lock().ok_or_else(busy)?;
        let over = || {
            Error::new(Status::InvalidArgument, format!("this {name}'s outcome was handed over before")).at_key(name)
        };
        let thread = thread.take().ok_or_else(over)?;
        thread.join().map_err(|_| Error::new(Status::Internal, format!("the thread of this {name} was lost")))?
    }
}
