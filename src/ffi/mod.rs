//! The C ABI. Each function makes four moves: check the pointers, find the objects, call the engine, hand the result
//! or the error over. Nothing is decided here.
//!
//! `include/gemmoe.h` is generated from this folder by cbindgen (`make header`) and committed; the comments below are
//! its documentation. Names, order and layout of everything public here are ABI.

mod arguments;
mod batch;
mod budget;
mod chat;
mod device;
mod error;
mod experts;
mod generate;
mod grammar;
mod guard;
mod handles;
mod job;
mod load;
mod metrics;
mod mix;
mod model;
mod plan;
mod residency;
mod router_patch;
mod session;
mod snapshot;
mod structs;
mod text;
mod version;

pub use batch::*;
pub use budget::*;
pub use chat::*;
pub use device::*;
pub use error::*;
pub use experts::*;
pub use generate::*;
pub use grammar::*;
pub use load::*;
pub use metrics::*;
pub use mix::*;
pub use model::*;
pub use plan::*;
pub use residency::*;
pub use router_patch::*;
pub use session::*;
pub use snapshot::*;
pub use text::*;
pub use version::*;
