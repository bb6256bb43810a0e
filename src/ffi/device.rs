//! Which devices there are.

use std::ffi::c_char;

use super::arguments::{Out, copy_out};
use super::error::GemmoeError;
use super::guard::guard;
use super::structs::{self, Versioned};
use crate::backend::device::{DeviceInfo, devices};
use crate::error::{Error, Result, Status};

/// A GPU that models can run on. Initialise with GEMMOE_DEVICE_INFO_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeDeviceInfo {
    /// sizeof(gemmoe_device_info)
    pub struct_size: u32,
    /// What it is chosen by: gemmoe_load_options.device_index.
    pub index: u32,
    /// Compute capability: 9 of 9.0.
    pub capability_major: u32,
    /// Compute capability: 0 of 9.0.
    pub capability_minor: u32,
    /// All its memory.
    pub memory_bytes: u64,
    /// What nobody uses at the moment.
    pub free_bytes: u64,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, four u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeDeviceInfo {
    const NAME: &'static str = "gemmoe_device_info";
    const FIRST_SIZE: usize = 64;
}

/// How many GPUs there are that models can run on; 0, and no error, on a machine without an NVIDIA driver.
/// Errors: NULL_ARGUMENT, DRIVER_TOO_OLD, DEVICE_FAILED. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_device_count(count_out: *mut u32, error_out: *mut *mut GemmoeError) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let out = Out::new(count_out, "count_out")?;
            out.set(devices()?.len() as u32);
            Ok(())
        })
    }
}

/// What a GPU is.
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, NO_DEVICE, DRIVER_TOO_OLD, DEVICE_FAILED. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_device_get_info(
    index: u32,
    info_out: *mut GemmoeDeviceInfo,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let found = find(index)?;
            let info = GemmoeDeviceInfo {
                index,
                capability_major: found.capability.0,
                capability_minor: found.capability.1,
                memory_bytes: found.memory_bytes,
                free_bytes: found.free_bytes,
                ..GemmoeDeviceInfo::zeroed()
            };
            structs::write(info_out, &info, "info_out")
        })
    }
}

/// Copies a GPU's name, UTF-8 without NUL, such as "NVIDIA H100 80GB HBM3". `count_out` receives its length; with `capacity` 0
/// nothing else is written.
/// Errors: NULL_ARGUMENT, BUFFER_TOO_SMALL, NO_DEVICE, DRIVER_TOO_OLD, DEVICE_FAILED. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_device_name(
    index: u32,
    text: *mut c_char,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || copy_out(find(index)?.name.as_bytes(), text.cast::<u8>(), capacity, count_out, "text"))
    }
}

fn find(index: u32) -> Result<DeviceInfo> {
    let mut found = devices()?;
    let count = found.len();
    if index as usize >= count {
        let text = format!("index is {index}, this machine has {count} devices that models can run on, the CPU apart");
        return Err(Error::new(Status::NoDevice, text).at_key("index"));
    }
    Ok(found.swap_remove(index as usize))
}
