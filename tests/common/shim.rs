//! The SIMT shim (`kernels/shim`): a CUDA driver that runs the kernels on the CPU. It is built once per content, and loaded
//! before the library looks for `libcuda.so`, so that the library finds this one.
//!
//! ```ignore
//! let Some(shim) = Shim::take() else { return }; // no C++ compiler; says so
//! shim.fail(7, 719);                             // the seventh call from now on
//! let model = Model::load(...);
//! assert_eq!(shim.live_allocations(), 0);
//! ```
#![allow(dead_code)] // Each test file uses its own part.

#[path = "shim/build.rs"]
mod build;
#[path = "shim/checked.rs"]
mod checked;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use parking_lot::{Mutex, MutexGuard};

#[allow(unused_imports)] // Not every test file has checks.
pub use checked::{Check, fails_checked, passes_checked};

/// Whether tests are to run on the machine's own driver: `GEMMOE_TEST_DRIVER` is `hardware`.
pub fn is_hardware() -> bool {
    match std::env::var("GEMMOE_TEST_DRIVER") {
        Err(_) => false,
        Ok(driver) if driver == "shim" => false,
        Ok(driver) if driver == "hardware" => true,
        Ok(driver) => panic!("GEMMOE_TEST_DRIVER is {driver:?}, expected \"shim\" or \"hardware\""),
    }
}

/// Says that the test that runs does nothing.
pub fn skip(why: &str) {
    println!("skipped: {why}: {}", std::thread::current().name().unwrap_or("a test"));
}

/// The order in which lanes, warps and blocks run where nothing makes one wait for another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Order {
    Forward,
    Reverse,
    Random(u64),
}

/// Orders that results must not depend on.
pub const ORDERS: [Order; 4] = [Order::Forward, Order::Reverse, Order::Random(1), Order::Random(2)];

/// The driver's library, for a process of its own; none without a C++ compiler.
pub fn library() -> Option<PathBuf> {
    build::library(None)
}

/// The loaded driver, for one test at a time: what it is told holds for the whole process.
pub struct Shim {
    loaded: &'static Loaded,
    _turn: MutexGuard<'static, ()>,
}

impl Shim {
    /// Waits for its turn; controls and counters are as in the beginning, work is deferred. None without a C++ compiler, and
    /// where tests run on hardware, which it says.
    pub fn take() -> Option<Shim> {
        if is_hardware() {
            skip("needs the shim");
            return None;
        }
        static TURN: Mutex<()> = Mutex::new(());
        static LOADED: OnceLock<Option<Loaded>> = OnceLock::new();
        let turn = TURN.lock();
        let loaded =
            LOADED.get_or_init(|| Some(Loaded::open(&build::library(checked::of_this_process())?))).as_ref()?;
        let shim = Shim { loaded, _turn: turn };
        // SAFETY: the functions have these signatures in kernels/shim/controls.cpp, and the library is never closed.
        unsafe { (shim.loaded.reset)() };
        shim.deferred(true);
        Some(shim)
    }

    /// The `nth` driver call from now on (1 is the next one) fails with a status. After 700, 719, 999 and their like every
    /// later call in the context fails too; frees still free.
    pub fn fail(&self, nth: u64, status: i32) {
        // SAFETY: as in `take`; so in all functions below.
        unsafe { (self.loaded.fail)(nth, status) }
    }

    pub fn order(&self, order: Order) {
        let (kind, seed) = match order {
            Order::Forward => (0, 0),
            Order::Reverse => (1, 0),
            Order::Random(seed) => (2, seed),
        };
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.order)(kind, seed) }
    }

    /// Whether streams work only when somebody waits for them, or at once.
    pub fn deferred(&self, deferred: bool) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.deferred)(deferred.into()) }
    }

    /// 0 to 8, say; cuInit fails where there are none.
    pub fn device_count(&self, count: i32) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.device_count)(count) }
    }

    /// 12010 for 12.1, which takes PTX up to 8.1.
    pub fn driver_version(&self, version: i32) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.driver_version)(version) }
    }

    /// 80 for 8.0.
    pub fn compute_capability(&self, capability: i32) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.compute_capability)(capability) }
    }

    /// Native code is refused with this status; 0 takes it again, where the device runs it.
    pub fn refuse_native(&self, status: i32) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.refuse_native)(status) }
    }

    /// Bytes of each device; allocations past it fail with 2.
    pub fn total_memory(&self, bytes: usize) {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.total_memory)(bytes) }
    }

    /// Driver calls since the shim was taken.
    pub fn calls(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.calls)() }
    }

    /// Launches of kernels since the shim was taken; those in a graph count once, when it is captured.
    pub fn launches(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.launches)() }
    }

    /// Of those, launches of kernels that may begin while the grid before them runs.
    pub fn dependent_launches(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.dependent_launches)() }
    }

    /// Modules of native code that were loaded since the shim was taken.
    pub fn native_modules(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.native_modules)() }
    }

    /// Bytes copied from devices since the shim was taken.
    pub fn bytes_to_host(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.bytes_to_host)() }
    }

    /// Device memory and pinned memory.
    pub fn live_allocations(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.live_allocations)() }
    }

    /// Contexts, modules, streams, events and graphs.
    pub fn live_objects(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.live_objects)() }
    }

    /// Streams that are alive and had kernels, or graphs of them, launched on them.
    pub fn computing_streams(&self) -> u64 {
        // SAFETY: as in `fail`.
        unsafe { (self.loaded.computing_streams)() }
    }

    /// Why the last call that failed did, or what a kernel did wrong, with kernel, block and thread.
    pub fn last_error_text(&self) -> String {
        // SAFETY: as in `fail`; the text stays until this thread asks again.
        unsafe { CStr::from_ptr((self.loaded.last_error_text)()) }.to_string_lossy().into_owned()
    }

    /// A function of the driver.
    pub fn symbol(&self, name: &str) -> *mut c_void {
        symbol(self.loaded.library, name)
    }
}

/// The functions of `kernels/shim/controls.cpp`, each `gemmoe_shim_` and its name.
macro_rules! controls {
    ($($name:ident: fn($($type:ty),*) $(-> $result:ty)?;)*) => {
        struct Loaded {
            library: *mut c_void,
            $($name: unsafe extern "C" fn($($type),*) $(-> $result)?,)*
        }

        impl Loaded {
            fn of(library: *mut c_void) -> Loaded {
                Loaded {
                    library,
                    // SAFETY: the function's address; it has this signature.
                    $($name: unsafe {
                        let address = symbol(library, concat!("gemmoe_shim_", stringify!($name)));
                        std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) $(-> $result)?>(address)
                    },)*
                }
            }
        }
    };
}

controls! {
    fail: fn(u64, c_int);
    order: fn(c_int, u64);
    deferred: fn(c_int);
    device_count: fn(c_int);
    driver_version: fn(c_int);
    compute_capability: fn(c_int);
    refuse_native: fn(c_int);
    total_memory: fn(usize);
    calls: fn() -> u64;
    launches: fn() -> u64;
    dependent_launches: fn() -> u64;
    native_modules: fn() -> u64;
    bytes_to_host: fn() -> u64;
    live_allocations: fn() -> u64;
    live_objects: fn() -> u64;
    computing_streams: fn() -> u64;
    last_error_text: fn() -> *const c_char;
    reset: fn();
}

// SAFETY: addresses of functions, which any thread may call.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    fn open(path: &Path) -> Loaded {
        let name = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: the library was built from kernels/shim; its initialisers only fill the list of kernels.
        let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        assert!(!library.is_null(), "{} cannot be loaded", path.display());
        Loaded::of(library)
    }
}

fn symbol(library: *mut c_void, name: &str) -> *mut c_void {
    let c_name = CString::new(name).unwrap();
    // SAFETY: the library is open.
    let address = unsafe { libc::dlsym(library, c_name.as_ptr()) };
    assert!(!address.is_null(), "the shim has no {name}");
    address
}
