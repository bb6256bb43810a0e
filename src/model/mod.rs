//! A model on disk: its configuration, the files of its directory, and its weights as host memory.

pub mod beside;
pub mod checkpoint;
pub mod config;
pub mod formats;
pub mod header;
pub mod json;
pub mod loader;
pub mod names;
pub mod progress;
pub mod quantization;
pub mod router_patch;
pub mod weights;
pub mod writer;

pub use checkpoint::Checkpoint;
pub use config::Config;
pub use formats::Formats;
pub use progress::Progress;
pub use quantization::Quantization;
pub use router_patch::RouterPatch;
pub use weights::{Description, Destination, Weights};
pub use writer::ModelWriter;

#[cfg(target_endian = "big")]
compile_error!("safetensors files are little-endian and are read straight into memory");
