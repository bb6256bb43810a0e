//! The driver that tests run on: the SIMT shim, or with `GEMMOE_TEST_DRIVER=hardware` the machine's own, and then its first
//! device. A test that tells the driver what to do, or counts its calls, takes the shim (`Shim::take`) and is skipped on
//! hardware; all others take whichever it is.
#![allow(dead_code)] // Each test file uses its own part.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use crate::shim::{Order, Shim, is_hardware};

pub enum Driver {
    Shim(Shim),
    Hardware(Hardware),
}

/// The library of the machine's driver, which stays loaded.
#[derive(Clone, Copy)]
pub struct Hardware(*mut c_void);

// SAFETY: the handle of a library, which any thread may ask for functions.
unsafe impl Send for Hardware {}
// SAFETY: as above.
unsafe impl Sync for Hardware {}

impl Driver {
    /// None where the shim is wanted and there is no C++ compiler, which it says.
    pub fn take() -> Option<Driver> {
        if is_hardware() { Some(Driver::Hardware(Hardware::open())) } else { Shim::take().map(Driver::Shim) }
    }

    /// For what of a test only the shim can show.
    pub fn shim(&self) -> Option<&Shim> {
        match self {
            Driver::Shim(shim) => Some(shim),
            Driver::Hardware(_) => None,
        }
    }

    /// The order of lanes, warps and blocks; hardware has its own.
    pub fn order(&self, order: Order) {
        if let Driver::Shim(shim) = self {
            shim.order(order);
        }
    }

    /// Asserts that nothing is left of what was allocated and made; hardware does not tell.
    pub fn assert_all_is_freed(&self) {
        if let Driver::Shim(shim) = self {
            assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
        }
    }

    /// A function of the driver.
    pub fn symbol(&self, name: &str) -> *mut c_void {
        match self {
            Driver::Shim(shim) => shim.symbol(name),
            Driver::Hardware(hardware) => hardware.symbol(name),
        }
    }

    /// What the driver says of a call that answered `status`.
    pub fn explain(&self, status: c_int) -> String {
        match self {
            Driver::Shim(shim) => shim.last_error_text(),
            Driver::Hardware(hardware) => hardware.name_of(status),
        }
    }
}

impl Hardware {
    fn open() -> Hardware {
        static LOADED: OnceLock<Hardware> = OnceLock::new();
        *LOADED.get_or_init(|| {
            // SAFETY: loads the driver's library, whose initialisers are NVIDIA's.
            let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
            assert!(!library.is_null(), "GEMMOE_TEST_DRIVER is hardware, and libcuda.so.1 cannot be loaded");
            Hardware(library)
        })
    }

    fn symbol(self, name: &str) -> *mut c_void {
        let c_name = CString::new(name).unwrap();
        // SAFETY: the library is open.
        let address = unsafe { libc::dlsym(self.0, c_name.as_ptr()) };
        assert!(!address.is_null(), "the driver has no {name}");
        address
    }

    fn name_of(self, status: c_int) -> String {
        type Name = unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int;
        // SAFETY: the driver's function of that name has this signature.
        let name_of = unsafe { std::mem::transmute::<*mut c_void, Name>(self.symbol("cuGetErrorName")) };
        let mut name = std::ptr::null();
        // SAFETY: takes any number and writes one pointer, to a text that is never freed, or null.
        let is_known = unsafe { name_of(status, &mut name) } == 0 && !name.is_null();
        // SAFETY: as above.
        if is_known { unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned() } else { "no name".to_owned() }
    }
}
