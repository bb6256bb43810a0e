//! Sessions over a model: the forward pass, the cache, sampling.

pub mod batch;
pub mod forward;
pub mod kv;
pub mod model;
pub mod sample;
pub mod sequence;
pub mod session;

pub use batch::SessionBatch;
pub use model::{LoadOptions, Model};
pub use sample::Sampling;
pub use session::{Session, SessionOptions};
