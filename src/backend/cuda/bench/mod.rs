//! A device as a bench uses it, beside the models on it: code of its own, memory, and time. With the feature `bench` alone.

mod profile;

use std::ffi::{CStr, CString, c_void};
use std::sync::Arc;

use super::context::Current;
use super::device::Device;
use super::driver::{Event, Module};
use super::images::Image;
pub use super::memory::DeviceBlock;
pub use super::weights::generated::{Content, Fill, Part};
use crate::error::{Error, Result, Status};
pub(super) use profile::around;
pub use profile::{Launch, is_on, profile};

/// A device in use, with a stream of its own.
pub struct BenchDevice {
    device: Arc<Device>,
    /// Before and after what is timed.
    events: [Event; 2],
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for BenchDevice {}
// SAFETY: as above; `time` takes `&mut self`.
unsafe impl Sync for BenchDevice {}

/// A module of code on a device; it stays loaded.
pub struct Code(Module);

impl BenchDevice {
    /// Opens the device of this index, as loading a model there does.
    pub fn open(index: usize) -> Result<BenchDevice> {
        let device = Device::open(index, None)?;
        let current = device.enter()?;
        let events = [current.create_timed_event()?, current.create_timed_event()?];
        drop(current);
        Ok(BenchDevice { device, events })
    }

    /// Its name, for people.
    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Its compute capability.
    pub fn capability(&self) -> (u32, u32) {
        self.device.capability()
    }

    /// Its multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.device.multiprocessors()
    }

    /// Bytes of the cache that all multiprocessors share.
    pub fn cache_bytes(&self) -> Result<usize> {
        self.device.cache_bytes()
    }

    /// Bytes of memory that are free, and that there are.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.device.enter()?.memory()
    }

    /// The CUDA version its driver is for: 12010 for 12.1.
    pub fn driver_version(&self) -> Result<i32> {
        self.device.driver_version()
    }

    /// The stream, for other libraries.
    pub fn stream(&self) -> *mut c_void {
        self.device.stream().cast()
    }

    /// Calls `work` while the device's context is this thread's current one.
    pub fn within<T>(&self, work: impl FnOnce() -> T) -> Result<T> {
        let _current = self.device.enter()?;
        Ok(work())
    }

    /// Loads PTX.
    pub fn load(&self, code: &CStr) -> Result<Code> {
        self.device.enter()?.load_module(&Image::of_text(code)?).map(Code)
    }

    /// Memory, uninitialised.
    pub fn allocate(&self, what: &str, bytes: usize) -> Result<DeviceBlock> {
        DeviceBlock::new(&self.device, what, bytes)
    }

    /// Enqueues a kernel of `blocks` blocks that takes one struct.
    ///
    /// # Safety
    /// The kernel takes an `A`, has `threads` threads a block, and with these arguments reads and writes only memory that may
    /// be read and written until `wait`.
    pub unsafe fn launch<A: Copy>(
        &self,
        code: &Code,
        name: &str,
        (blocks, threads): (usize, usize),
        arguments: &A,
    ) -> Result<()> {
        let missing = || Error::new(Status::Internal, format!("there is no kernel \"{name}\""));
        let current = self.device.enter()?;
        let text = CString::new(name).map_err(|_| missing())?;
        // SAFETY: a module of this device.
        let function = unsafe { current.function(code.0, &text) }?.ok_or_else(missing)?;
        // SAFETY: the caller's promise.
        unsafe { current.launch(function, [blocks as u32, 1, 1], threads as u32, false, arguments) }
    }

    /// Enqueues a copy of the first `bytes` bytes of one block to another. Panics where one has fewer.
    pub fn copy(&self, to: &mut DeviceBlock, from: &DeviceBlock, bytes: usize) -> Result<()> {
        let (to, from) = (to.part(0..bytes), from.part(0..bytes));
        // SAFETY: both are on this device and as long; whoever frees one has waited.
        unsafe { self.device.enter()?.copy(to, from, bytes) }
    }

    /// Waits for everything that was enqueued here.
    pub fn wait(&self) -> Result<()> {
        self.device.enter()?.wait()
    }

    /// Seconds the device takes for what `work` enqueues here.
    pub fn time(&mut self, work: impl FnOnce(&BenchDevice) -> Result<()>) -> Result<f64> {
        let device = Arc::clone(&self.device);
        let current = device.enter()?;
        let [from, to] = self.events;
        self.wait()?;
        // SAFETY: events of this context; so below.
        unsafe { current.record(from) }?;
        work(self)?;
        // SAFETY: as above.
        unsafe { current.record(to) }?;
        self.wait()?;
        seconds_between(&current, from, to)
    }
}

impl Drop for BenchDevice {
    fn drop(&mut self) {
        if let Some(current) = self.device.enter_to_free() {
            let _ = current.wait();
            // SAFETY: created by `open`, destroyed once.
            self.events.iter().for_each(|event| unsafe { current.destroy_event(*event) });
        }
    }
}

fn seconds_between(current: &Current, from: Event, to: Event) -> Result<f64> {
    // SAFETY: events of this context, both recorded and waited for.
    Ok(f64::from(unsafe { current.elapsed(from, to) }?) / 1e3)
}
