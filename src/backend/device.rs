//! Which devices there are, and which of them a model is to run on.

use std::ffi::c_void;
use std::ptr::NonNull;

use crate::error::Result;

/// Where a model is to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its index among [`devices`]; with a [`LentContext`] 0 is whichever the context is of.
    Cuda(usize),
    /// The GPU with most free memory if the model and a session of it fit there, else the processor.
    Auto,
}

impl Device {
    /// Takes `cpu`, `auto`, `cuda` and `cuda:1`.
    pub fn from_name(name: &str) -> Option<Device> {
        match name {
            "cpu" => Some(Device::Cpu),
            "auto" => Some(Device::Auto),
            "cuda" => Some(Device::Cuda(0)),
            _ => name.strip_prefix("cuda:")?.parse().ok().map(Device::Cuda),
        }
    }
}

/// A CUDA context of the host's, and perhaps a stream in it, that a model is to use instead of its own. Nothing of them is
/// retained or destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LentContext {
    context: NonNull<c_void>,
    stream: Option<NonNull<c_void>>,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for LentContext {}
// SAFETY: as above.
unsafe impl Sync for LentContext {}

impl LentContext {
    /// A `CUcontext`, and a `CUstream` in it. With a stream all work of the model goes onto it in order, that of all its
    /// sessions; without, each session has a stream of its own in the context.
    ///
    /// # Safety
    /// Both are live handles of the driver, and stay so as long as a model that was loaded with them, or a session or batch of
    /// it, is there. The stream is not capturing while a call with any of these is running.
    pub unsafe fn new(context: NonNull<c_void>, stream: Option<NonNull<c_void>>) -> LentContext {
        LentContext { context, stream }
    }

    /// The `CUcontext`.
    pub fn context(&self) -> *mut c_void {
        self.context.as_ptr()
    }

    /// The `CUstream`.
    pub fn stream(&self) -> Option<*mut c_void> {
        self.stream.map(NonNull::as_ptr)
    }
}

/// A GPU that models can run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it is chosen by.
    pub index: usize,
    /// As its maker calls it.
    pub name: String,
    /// All its memory in bytes.
    pub memory_bytes: u64,
    /// What nobody uses at the moment.
    pub free_bytes: u64,
    /// Compute capability, as in 9.0.
    pub capability: (u32, u32),
}

/// The GPUs there are; none, and no error, where there is no driver. Fails with `DriverTooOld` and as drivers do.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    #[cfg(feature = "cuda")]
    return super::cuda::devices();
    #[cfg(not(feature = "cuda"))]
    return Ok(Vec::new());
}
