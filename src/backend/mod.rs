//! Devices that can run the forward pass: what each must provide, and the CPU, which is the first.

pub mod cpu;
pub mod device;
pub mod kv;
pub mod numerics;
pub mod observer;
pub mod ops;

pub use device::{Device, DeviceInfo, devices};
pub use kv::{KvDtype, KvGeometry, KvPage};
pub use numerics::Variants;
pub use ops::{Backend, Batch, Cancel, Limit, Pass, PassLimits, SequenceSlice};
