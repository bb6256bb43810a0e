//! Which devices there are, and which of them a model is to run on.

use crate::error::Result;

/// Where a model is to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by its index among [`devices`].
    Cuda(usize),
    /// The GPU with most free memory if the model and a session of it fit there, else the processor.
    Auto,
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
