//! How far a load, or another reading of a model, has come, and the wish to stop it; shared between the loading thread and any other.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result, Status};

/// Bytes read and to be read. All methods may be called from any thread at any time.
#[derive(Debug, Default)]
pub struct Progress {
    bytes_total: AtomicU64,
    bytes_read: AtomicU64,
    cancelled: AtomicBool,
}

impl Progress {
    /// Bytes of weights to read; 0 until the headers have been checked.
    pub fn bytes_total(&self) -> u64 {
        self.bytes_total.load(Ordering::Relaxed)
    }

    /// Bytes of weights read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes_read.load(Ordering::Relaxed)
    }

    /// Asks it to stop; it ends with `Cancelled` when each thread has done its chunk: 1 MiB, or the 16 rows of a panel.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Work that reads so many bytes begins; where there are several one after the other, each counts from 0.
    pub(crate) fn begin(&self, bytes_total: u64) {
        self.bytes_read.store(0, Ordering::Relaxed);
        self.bytes_total.store(bytes_total, Ordering::Relaxed);
    }

    pub(crate) fn advance(&self, bytes: u64) {
        self.bytes_read.fetch_add(bytes, Ordering::Relaxed);
    }

    /// An error if it has been cancelled.
    pub fn check(&self) -> Result<()> {
        match self.cancelled.load(Ordering::Relaxed) {
            true => Err(Error::new(Status::Cancelled, "reading the model was cancelled")),
            false => Ok(()),
        }
    }
}
