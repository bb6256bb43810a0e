//! Sessions over a model: the forward pass, the cache, sampling.

pub mod batch;
pub mod budget;
pub mod experts;
pub mod forward;
mod gates;
pub mod kv;
pub mod metrics;
pub mod model;
pub mod options;
mod placement;
pub mod plan;
pub mod sample;
pub mod score;
pub mod sequence;
pub mod session;
pub mod snapshot;

pub use batch::{BatchOptions, SessionBatch};
pub use budget::Budget;
pub use model::{LoadOptions, Model};
pub use options::{Overflow, SessionOptions};
pub use plan::MemoryPlan;
pub use sample::Sampling;
pub use score::{Perplexity, Pooling};
pub use session::Session;
