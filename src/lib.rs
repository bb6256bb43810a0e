pub mod error;
pub mod memory;
pub mod platform;
pub mod text;
