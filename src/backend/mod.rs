//! Devices that can run the forward pass: what each must provide, the CPU, and NVIDIA's.

pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod device_bytes;
pub mod gates;
pub mod kv;
pub mod logits;
pub mod numerics;
pub mod observer;
pub mod ops;
pub mod residency;
pub mod training;

pub use device::{Device, DeviceInfo, LentContext, devices};
pub use kv::{KvDtype, KvGeometry, KvPage};
pub use logits::Logits;
pub use numerics::Variants;
pub use ops::{Backend, Batch, Cancel, Limit, Pass, PassLimits, SequenceSlice};
pub use residency::{OffloadCounts, WeightResidency};
