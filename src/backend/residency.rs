//! Where a model's weights are, and what it costs that some are not on its device.

use std::time::Duration;

/// How a model's weights are shared out between a device and host memory. On the CPU all of it is in host memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightResidency {
    /// Bytes of weights on the device, with what lies between them.
    pub device_bytes: u64,
    /// Bytes on the device beside them that experts are copied through; 0 where all are there. With `device_bytes` it is what
    /// a limit on device memory counts.
    pub staging_bytes: u64,
    /// Bytes of weights in host memory.
    pub host_bytes: u64,
    /// Experts on the device, those of all layers together.
    pub device_experts: u64,
    /// Experts in host memory.
    pub host_experts: u64,
}

/// What experts in host memory have cost all sessions of a model since it was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OffloadCounts {
    /// Experts that were computed on the processor: one for each expert of a layer that tokens of a batch were sent to.
    pub host_runs: u64,
    /// Time that took.
    pub host_time: Duration,
    /// Experts that were copied to the device, counted alike.
    pub copies: u64,
    /// Bytes that were.
    pub copied_bytes: u64,
    /// Time that calls spent on laying copies out and waiting for room.
    pub copy_time: Duration,
}
