pub mod error;
pub mod memory;
pub mod model;
pub mod platform;
pub mod text;
