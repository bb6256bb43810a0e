//! A device to run kernels on, by the driver API.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::hash::Hasher;
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::OnceLock;

use xxhash_rust::xxh3::Xxh3Default;

use crate::driver::Driver;
use crate::root::repository;
use crate::shim::Order;

/// Calls a function of the driver by name; every status but 0 is a failure.
macro_rules! call {
    ($driver:expr, $name:literal($($value:expr => $type:ty),*)) => {{
        // SAFETY: the function has this signature, and pointers are to what it documents.
        let status = unsafe {
            let function: unsafe extern "C" fn($($type),*) -> c_int = std::mem::transmute($driver.symbol($name));
            function($($value),*)
        };
        assert!(status == 0, "{}: status {status}: {}", $name, $driver.explain(status));
    }};
}

/// A kernel of the committed PTX.
#[derive(Clone, Copy)]
struct Entry {
    /// Which file has it.
    module: usize,
    /// Threads of a block.
    threads: c_uint,
}

struct Generated {
    files: Vec<CString>,
    entries: BTreeMap<String, Entry>,
}

/// What `kernels/generated` has.
fn generated() -> &'static Generated {
    static GENERATED: OnceLock<Generated> = OnceLock::new();
    GENERATED.get_or_init(|| {
        let (mut files, mut entries) = (Vec::new(), BTreeMap::new());
        for file in std::fs::read_dir(repository().join("kernels/generated")).unwrap() {
            let path = file.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "ptx") {
                continue;
            }
            let text = std::fs::read_to_string(path).unwrap();
            for entry in text.split(".entry ").skip(1) {
                let (name, rest) = entry.split_once('(').unwrap();
                let threads = rest.split(".maxntid ").nth(1).unwrap().split(',').next().unwrap();
                entries.insert(name.to_owned(), Entry { module: files.len(), threads: threads.parse().unwrap() });
            }
            files.push(CString::new(text).unwrap());
        }
        Generated { files, entries }
    })
}

/// Its primary context is current, and all kernels are loaded. Dropped, it gives all that back.
pub struct Device {
    driver: Driver,
    modules: Vec<*mut c_void>,
    functions: RefCell<BTreeMap<String, *mut c_void>>,
    /// Of all that was read since `forget_results`.
    results: RefCell<Xxh3Default>,
    live: Cell<usize>,
}

/// Memory on the device. What nobody wrote is all ones.
pub struct Array<'a, T> {
    device: &'a Device,
    address: u64,
    count: usize,
    elements: PhantomData<T>,
}

impl Device {
    /// None where the shim is wanted and there is no C++ compiler for it, which it says.
    pub fn take() -> Option<Device> {
        let driver = Driver::take()?;
        let mut context: *mut c_void = null_mut();
        call!(driver, "cuInit"(0 => c_uint));
        call!(driver, "cuDevicePrimaryCtxRetain"(&mut context => *mut *mut c_void, 0 => c_int));
        call!(driver, "cuCtxPushCurrent_v2"(context => *mut c_void));
        let load = |text: &CString| {
            let mut module: *mut c_void = null_mut();
            let text = text.as_ptr().cast();
            call!(driver, "cuModuleLoadData"(&mut module => *mut *mut c_void, text => *const c_void));
            module
        };
        let modules = generated().files.iter().map(load).collect();
        let results = RefCell::new(Xxh3Default::new());
        Some(Device { driver, modules, functions: RefCell::default(), results, live: Cell::default() })
    }

    pub fn order(&self, order: Order) {
        self.driver.order(order);
    }

    /// Whether it is a GPU, whose own rules hold where CUDA leaves them open.
    pub fn is_hardware(&self) -> bool {
        self.driver.shim().is_none()
    }

    pub fn has(&self, name: &str) -> bool {
        generated().entries.contains_key(name) && !self.function(name).is_null()
    }

    pub fn forget_results(&self) {
        self.results.replace(Xxh3Default::new());
    }

    pub fn digest_of_results(&self) -> u64 {
        self.results.borrow().finish()
    }

    fn function(&self, name: &str) -> *mut c_void {
        let entry = generated().entries.get(name).unwrap_or_else(|| panic!("no PTX has {name}"));
        *self.functions.borrow_mut().entry(name.to_owned()).or_insert_with(|| {
            let mut function: *mut c_void = null_mut();
            let (module, name) = (self.modules[entry.module], CString::new(name).unwrap());
            let (place, name) = (&mut function, name.as_ptr());
            call!(self.driver, "cuModuleGetFunction"(
                place => *mut *mut c_void, module => *mut c_void, name => *const c_char
            ));
            function
        })
    }

    pub fn array<T: Copy>(&self, elements: &[T]) -> Array<'_, T> {
        let array = self.room(elements.len());
        array.write(elements);
        array
    }

    pub fn room<T>(&self, count: usize) -> Array<'_, T> {
        let mut address = 0;
        // The driver gives nothing for nothing.
        let bytes = (count * size_of::<T>()).max(1);
        call!(self.driver, "cuMemAlloc_v2"(&mut address => *mut u64, bytes => usize));
        self.live.set(self.live.get() + 1);
        // The shim does so by itself.
        if self.is_hardware() {
            let stream: *mut c_void = null_mut();
            call!(self.driver, "cuMemsetD8Async"(
                address => u64, 0xff => u8, bytes => usize, stream => *mut c_void
            ));
            call!(self.driver, "cuCtxSynchronize"());
        }
        Array { device: self, address, count, elements: PhantomData }
    }

    /// Runs a kernel to its end.
    pub fn launch<A>(&self, name: &str, grid: [usize; 3], arguments: &A) {
        let (function, threads) = (self.function(name), generated().entries[name].threads);
        let mut parameters = [std::ptr::from_ref(arguments).cast_mut().cast::<c_void>()];
        let [x, y, z] = grid.map(|size| size as c_uint);
        call!(self.driver, "cuLaunchKernel"(
            function => *mut c_void, x => c_uint, y => c_uint, z => c_uint, threads => c_uint, 1 => c_uint, 1 => c_uint,
            0 => c_uint, null_mut() => *mut c_void, parameters.as_mut_ptr() => *mut *mut c_void,
            null_mut() => *mut *mut c_void
        ));
        call!(self.driver, "cuCtxSynchronize"());
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        assert_eq!(self.live.get(), 0, "arrays outlive their device");
        for module in &self.modules {
            call!(self.driver, "cuModuleUnload"(*module => *mut c_void));
        }
        let mut context: *mut c_void = null_mut();
        call!(self.driver, "cuCtxPopCurrent_v2"(&mut context => *mut *mut c_void));
        call!(self.driver, "cuDevicePrimaryCtxRelease_v2"(0 => c_int));
    }
}

impl<T> Array<'_, T> {
    pub fn pointer(&self) -> *const T {
        self.address as *const T
    }

    pub fn pointer_mut(&self) -> *mut T {
        self.address as *mut T
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn write(&self, elements: &[T]) {
        assert!(elements.len() <= self.count);
        if elements.is_empty() {
            return;
        }
        let stream: *mut c_void = null_mut();
        let (from, bytes) = (elements.as_ptr().cast(), size_of_val(elements));
        call!(self.device.driver, "cuMemcpyHtoDAsync_v2"(
            self.address => u64, from => *const c_void, bytes => usize, stream => *mut c_void
        ));
        call!(self.device.driver, "cuCtxSynchronize"());
    }
}

impl<T: Copy + Default> Array<'_, T> {
    pub fn read(&self) -> Vec<T> {
        let mut elements = vec![T::default(); self.count];
        let stream: *mut c_void = null_mut();
        let (to, bytes) = (elements.as_mut_ptr().cast(), size_of_val(elements.as_slice()));
        call!(self.device.driver, "cuMemcpyDtoHAsync_v2"(
            to => *mut c_void, self.address => u64, bytes => usize, stream => *mut c_void
        ));
        call!(self.device.driver, "cuCtxSynchronize"());
        // SAFETY: plain numbers, as many as were read.
        let bytes = unsafe { std::slice::from_raw_parts(elements.as_ptr().cast::<u8>(), bytes) };
        self.device.results.borrow_mut().write(bytes);
        elements
    }
}

impl<T> Drop for Array<'_, T> {
    fn drop(&mut self) {
        self.device.live.set(self.device.live.get() - 1);
        if !std::thread::panicking() {
            call!(self.device.driver, "cuMemFree_v2"(self.address => u64));
        }
    }
}
