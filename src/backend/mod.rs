//! Devices that can run the forward pass: what each must provide, the CPU, and NVIDIA's.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod kv;
pub mod numerics;
pub mod observer;
pub mod ops;
pub mod training;

pub use device::{Device, DeviceInfo, devices};
pub use kv::{KvDtype, KvGeometry, KvPage};
pub use numerics::Variants;
pub use ops::{Backend, Batch, Cancel, Limit, Pass, PassLimits, SequenceSlice};
