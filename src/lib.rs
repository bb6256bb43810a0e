//! gemmoe runs GemMoE, the mixture of experts made from Gemma, inside any host.
//!
//! A token goes one way through the rooms of this house:
//! [`ffi`] (the C ABI) -> [`engine`] (sessions and the forward pass) -> [`backend`] (operations on a device) ->
//! kernels. Beside the way stand [`model`] (a checkpoint on disk), [`text`] (the tokenizer), [`quant`] (how weights are
//! held); above, [`quantize`], which makes one model directory from another, [`mix`], which makes one from several, and
//! [`train`], which trains routers; and below everything [`error`], [`memory`] and [`platform`]. `docs/architecture.md` draws it.

pub mod backend;
pub mod engine;
pub mod error;
pub mod evaluate;
pub mod ffi;
pub mod memory;
pub mod mix;
pub mod model;
mod parallel;
pub mod platform;
pub mod quant;
pub mod quantize;
mod quiet;
mod random;
pub mod text;
mod toml_table;
pub mod train;

pub use engine::sample::LogitBias;
pub use engine::{
    BatchOptions, Budget, LoadOptions, MemoryPlan, Model, Overflow, Pooling, Sampling, Session, SessionBatch,
    SessionOptions,
};
pub use error::{Error, Result, Status};
pub use mix::{MixOptions, MixPlan, MixReport, Recipe, mix};
pub use model::{Formats, Progress, RouterPatch};
pub use quantize::{Importance, QuantizeOptions, QuantizeReport, quantize};
