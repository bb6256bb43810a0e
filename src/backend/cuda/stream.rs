//! Streams: queues of work, each in its order, side by side with the others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::device::Device;
use super::driver::StreamHandle;
use crate::error::Result;

/// A stream of one pass, destroyed when it is dropped. Where the host lends a stream work goes onto that one, and this is for
/// recording alone.
///
/// Streams do not wait for each other. They need not: what one pass shares with another, or with the device's own stream, are
/// weights and pages, and whoever enqueues work on them has waited for it before the call is over. Whoever moves weights
/// meanwhile waits for all streams (`experts.rs`).
pub struct Stream {
    device: Arc<Device>,
    handle: StreamHandle,
    /// Whether it records what its pass does instead of doing it, so that nothing of it is in progress, and nobody may wait
    /// for it.
    is_recording: AtomicBool,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}

impl Stream {
    /// One without work.
    pub fn new(device: &Arc<Device>) -> Result<Stream> {
        let handle = device.enter()?.create_stream()?;
        Ok(Stream { device: Arc::clone(device), handle, is_recording: AtomicBool::new(false) })
    }

    /// Called with the model's experts borrowed where it begins to record: whoever moves them looks at it.
    pub fn set_recording(&self, is_recording: bool) {
        self.is_recording.store(is_recording, Ordering::Release);
    }

    pub fn is_recording(&self) -> bool {
        self.is_recording.load(Ordering::Acquire)
    }

    pub(super) fn handle(&self) -> StreamHandle {
        self.handle
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(current) = self.device.enter_to_free() {
            // SAFETY: created by `new`, destroyed once; its pass is gone.
            unsafe { current.destroy_stream(self.handle) };
        }
    }
}
