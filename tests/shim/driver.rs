//! The driver API, as little of it as the tests of the shim need. Every status but 0 is an `Err`.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

use super::shim::Shim;

/// What most kernels of `samples.cu` take.
#[repr(C)]
pub struct Sample {
    pub input: u64,
    pub out: u64,
    pub mode: u32,
}

/// Calls a function of the driver by name.
macro_rules! call {
    ($shim:expr, $name:literal($($value:expr => $type:ty),*)) => {{
        // SAFETY: the function has this signature, and pointers are to what it documents.
        let status = unsafe {
            let function: unsafe extern "C" fn($($type),*) -> c_int = std::mem::transmute($shim.symbol($name));
            function($($value),*)
        };
        if status == 0 { Ok(()) } else { Err(status) }
    }};
}

pub fn count_devices(shim: &Shim) -> Result<i32, i32> {
    let mut count = 0;
    call!(shim, "cuInit"(0 => c_uint))?;
    call!(shim, "cuDeviceGetCount"(&mut count => *mut c_int))?;
    Ok(count)
}

/// A device whose primary context is current, with a stream and the module of all kernels. Dropped, it gives back its
/// context, and with it all else.
pub struct Gpu<'a> {
    shim: &'a Shim,
    device: c_int,
    stream: Cell<*mut c_void>,
    module: *mut c_void,
    functions: RefCell<HashMap<String, *mut c_void>>,
}

// SAFETY: handles of the driver, which any thread may use; the cells are used by one thread at a time in these tests.
unsafe impl Sync for Gpu<'_> {}

/// What a launch is to be like, as `cuLaunchKernelEx` takes it.
#[repr(C)]
pub struct Attribute {
    pub id: c_uint,
    pub padding: c_uint,
    pub value: c_int,
    pub rest: [u32; 15],
}

#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: *mut c_void,
    attributes: *const Attribute,
    attribute_count: c_uint,
}

impl<'a> Gpu<'a> {
    pub fn new(shim: &'a Shim) -> Gpu<'a> {
        Gpu::try_new(shim).unwrap()
    }

    pub fn try_new(shim: &'a Shim) -> Result<Gpu<'a>, i32> {
        Gpu::on_device(shim, 0)
    }

    pub fn on_device(shim: &'a Shim, device: c_int) -> Result<Gpu<'a>, i32> {
        let mut context = null_mut();
        call!(shim, "cuInit"(0 => c_uint))?;
        call!(shim, "cuDevicePrimaryCtxRetain"(&mut context => *mut *mut c_void, device => c_int))?;
        let stream = Cell::new(null_mut());
        let mut gpu = Gpu { shim, device, stream, module: null_mut(), functions: RefCell::default() };
        if let Err(status) = call!(shim, "cuCtxPushCurrent_v2"(context => *mut c_void)) {
            // Nothing to pop.
            let _ = call!(shim, "cuDevicePrimaryCtxRelease_v2"(device => c_int));
            std::mem::forget(gpu);
            return Err(status);
        }
        gpu.stream.set(gpu.create_stream()?);
        gpu.module = gpu.load_module("shim")?;
        Ok(gpu)
    }

    fn create_stream(&self) -> Result<*mut c_void, i32> {
        let mut stream = null_mut();
        call!(self.shim, "cuStreamCreate"(&mut stream => *mut *mut c_void, 1 => c_uint))?;
        Ok(stream)
    }

    pub fn another_stream(&self) -> *mut c_void {
        self.create_stream().unwrap()
    }

    /// Everything inside goes to another stream.
    pub fn use_stream(&self, stream: *mut c_void, work: impl FnOnce()) {
        let before = self.stream.replace(stream);
        work();
        self.stream.set(before);
    }

    pub fn load_module(&self, text: &str) -> Result<*mut c_void, i32> {
        self.load_image(CString::new(text).unwrap().as_bytes_with_nul())
    }

    /// Native code, or a text that ends with a zero byte.
    pub fn load_image(&self, image: &[u8]) -> Result<*mut c_void, i32> {
        let mut module = null_mut();
        call!(self.shim, "cuModuleLoadData"(&mut module => *mut *mut c_void, image.as_ptr().cast() => *const c_void))?;
        Ok(module)
    }

    pub fn unload_module(&self, module: *mut c_void) -> Result<(), i32> {
        call!(self.shim, "cuModuleUnload"(module => *mut c_void))
    }

    pub fn function(&self, module: *mut c_void, name: &str) -> Result<*mut c_void, i32> {
        let name = CString::new(name).unwrap();
        let mut function = null_mut();
        let (place, name) = (&mut function, name.as_ptr());
        call!(self.shim, "cuModuleGetFunction"(place => *mut *mut c_void, module => *mut c_void, name => *const c_char))?;
        Ok(function)
    }

    pub fn memory(&self) -> (usize, usize) {
        let (mut free, mut total) = (0, 0);
        call!(self.shim, "cuMemGetInfo_v2"(&mut free => *mut usize, &mut total => *mut usize)).unwrap();
        (free, total)
    }

    pub fn try_alloc(&self, bytes: usize) -> Result<u64, i32> {
        let mut address = 0;
        call!(self.shim, "cuMemAlloc_v2"(&mut address => *mut u64, bytes => usize))?;
        Ok(address)
    }

    pub fn alloc(&self, bytes: usize) -> u64 {
        self.try_alloc(bytes).unwrap()
    }

    pub fn free(&self, address: u64) -> Result<(), i32> {
        call!(self.shim, "cuMemFree_v2"(address => u64))
    }

    pub fn copy_to(&self, to: u64, from: &[u8]) -> Result<(), i32> {
        let (stream, from, bytes) = (self.stream.get(), from.as_ptr(), size_of_val(from));
        call!(self.shim, "cuMemcpyHtoDAsync_v2"(to => u64, from => *const u8, bytes => usize, stream => *mut c_void))
    }

    pub fn copy_from(&self, to: &mut [u8], from: u64) -> Result<(), i32> {
        let (stream, to, bytes) = (self.stream.get(), to.as_mut_ptr(), size_of_val(to));
        call!(self.shim, "cuMemcpyDtoHAsync_v2"(to => *mut u8, from => u64, bytes => usize, stream => *mut c_void))
    }

    pub fn set(&self, to: u64, value: u8, bytes: usize) -> Result<(), i32> {
        let stream = self.stream.get();
        call!(self.shim, "cuMemsetD8Async"(to => u64, value => u8, bytes => usize, stream => *mut c_void))
    }

    pub fn upload(&self, values: &[f32]) -> u64 {
        let address = self.alloc(size_of_val(values));
        self.upload_to(address, values);
        address
    }

    pub fn upload_words(&self, words: &[u32]) -> u64 {
        self.upload(&words.iter().copied().map(f32::from_bits).collect::<Vec<_>>())
    }

    pub fn upload_to(&self, address: u64, values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        self.copy_to(address, &bytes).unwrap();
        self.synchronize().unwrap();
    }

    /// Numbers of four bytes.
    pub fn download<T: Copy>(&self, address: u64, count: usize) -> Vec<T> {
        assert_eq!(size_of::<T>(), 4);
        let mut bytes = vec![0; count * 4];
        self.copy_from(&mut bytes, address).unwrap();
        self.synchronize().unwrap_or_else(|status| panic!("{status}: {}", self.shim.last_error_text()));
        // SAFETY: T is a number of four bytes; any bits are one.
        bytes.chunks(4).map(|bytes| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }).collect()
    }

    pub fn synchronize(&self) -> Result<(), i32> {
        call!(self.shim, "cuStreamSynchronize"(self.stream.get() => *mut c_void))
    }

    pub fn launch<A>(&self, name: &str, grid: u32, block: u32, arguments: &A) -> Result<(), i32> {
        self.launch_with(name, grid, block, 0, arguments)
    }

    pub fn launch_with<A>(&self, name: &str, grid: u32, block: u32, shared: u32, arguments: &A) -> Result<(), i32> {
        let known = self.functions.borrow().get(name).copied();
        let function = match known {
            Some(function) => function,
            None => self.function(self.module, name)?,
        };
        self.functions.borrow_mut().insert(name.to_owned(), function);
        let mut parameters = [std::ptr::from_ref(arguments).cast::<c_void>()];
        call!(self.shim, "cuLaunchKernel"(
            function => *mut c_void,
            grid => c_uint, 1 => c_uint, 1 => c_uint,
            block => c_uint, 1 => c_uint, 1 => c_uint,
            shared => c_uint,
            self.stream.get() => *mut c_void,
            parameters.as_mut_ptr() => *mut *const c_void,
            null_mut() => *mut *mut c_void
        ))
    }

    /// One block by `cuLaunchKernelEx`.
    pub fn launch_with_attributes<A>(
        &self,
        function: *mut c_void,
        block: u32,
        attributes: &[Attribute],
        arguments: &A,
    ) -> Result<(), i32> {
        let config = LaunchConfig {
            grid: [1; 3],
            block: [block, 1, 1],
            shared_bytes: 0,
            stream: self.stream.get(),
            attributes: attributes.as_ptr(),
            attribute_count: attributes.len() as c_uint,
        };
        let mut parameters = [std::ptr::from_ref(arguments).cast::<c_void>()];
        call!(self.shim, "cuLaunchKernelEx"(
            &config => *const LaunchConfig,
            function => *mut c_void,
            parameters.as_mut_ptr() => *mut *const c_void,
            null_mut() => *mut *mut c_void
        ))
    }

    pub fn event(&self) -> *mut c_void {
        self.event_with(2)
    }

    /// 2 is one without time.
    pub fn event_with(&self, flags: c_uint) -> *mut c_void {
        let mut event = null_mut();
        call!(self.shim, "cuEventCreate"(&mut event => *mut *mut c_void, flags => c_uint)).unwrap();
        event
    }

    /// Milliseconds between two events.
    pub fn elapsed(&self, from: *mut c_void, to: *mut c_void) -> Result<f32, i32> {
        let mut milliseconds = f32::NAN;
        let place = &mut milliseconds;
        call!(self.shim, "cuEventElapsedTime"(place => *mut f32, from => *mut c_void, to => *mut c_void))?;
        Ok(milliseconds)
    }

    pub fn record(&self, event: *mut c_void) -> Result<(), i32> {
        call!(self.shim, "cuEventRecord"(event => *mut c_void, self.stream.get() => *mut c_void))
    }

    pub fn query(&self, event: *mut c_void) -> Result<(), i32> {
        call!(self.shim, "cuEventQuery"(event => *mut c_void))
    }

    pub fn wait(&self, event: *mut c_void) -> Result<(), i32> {
        call!(self.shim, "cuEventSynchronize"(event => *mut c_void))
    }

    pub fn wait_in_stream(&self, event: *mut c_void) -> Result<(), i32> {
        let stream = self.stream.get();
        call!(self.shim, "cuStreamWaitEvent"(stream => *mut c_void, event => *mut c_void, 0 => c_uint))
    }

    pub fn begin_capture(&self) -> Result<(), i32> {
        call!(self.shim, "cuStreamBeginCapture_v2"(self.stream.get() => *mut c_void, 1 => c_int))
    }

    /// The graph, ready to be launched.
    pub fn end_capture(&self) -> Result<*mut c_void, i32> {
        let (mut graph, mut executable) = (null_mut(), null_mut());
        call!(self.shim, "cuStreamEndCapture"(self.stream.get() => *mut c_void, &mut graph => *mut *mut c_void))?;
        let place = &mut executable;
        call!(self.shim, "cuGraphInstantiateWithFlags"(place => *mut *mut c_void, graph => *mut c_void, 0 => u64))?;
        call!(self.shim, "cuGraphDestroy"(graph => *mut c_void))?;
        Ok(executable)
    }

    pub fn launch_graph(&self, graph: *mut c_void) -> Result<(), i32> {
        call!(self.shim, "cuGraphLaunch"(graph => *mut c_void, self.stream.get() => *mut c_void))
    }

    pub fn destroy_graph(&self, graph: *mut c_void) -> Result<(), i32> {
        call!(self.shim, "cuGraphExecDestroy"(graph => *mut c_void))
    }
}

impl Drop for Gpu<'_> {
    fn drop(&mut self) {
        // What fails here was made to.
        let _ = call!(self.shim, "cuCtxPopCurrent_v2"(null_mut() => *mut *mut c_void));
        let _ = call!(self.shim, "cuDevicePrimaryCtxRelease_v2"(self.device => c_int));
    }
}
