//! What a host can ask before it has any object.

use std::ffi::{CStr, c_char};

use crate::error::Status;

/// The ABI this header describes. A library is compatible if `gemmoe_abi_version()` returns the same number.
pub const GEMMOE_ABI_VERSION: u32 = 1;

/// The ABI of the library that is loaded: compare it with GEMMOE_ABI_VERSION. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_abi_version() -> u32 {
    GEMMOE_ABI_VERSION
}

/// The library's version, "major.minor.patch". The string is static. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}

/// The name of a status, such as "TENSOR_SHAPE"; "UNKNOWN" for a number that is none. The string is static.
/// Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_status_name(status: i32) -> *const c_char {
    Status::from_value(status).map_or(c"UNKNOWN", Status::name).as_ptr()
}
