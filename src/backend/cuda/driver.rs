//! The NVIDIA driver: whether there is one, its functions, and what its error codes mean to us. The only file that knows
//! the crate that finds it.
//!
//! Functions are looked up by name, once, before the first of them is called: a driver that lacks one is an error and no
//! panic. Codes are plain numbers, since a driver may be newer than any list of them.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;

use cudarc::driver::sys;

use crate::error::{Error, Result, Status};

/// A device of the driver.
pub type DeviceHandle = sys::CUdevice;
/// What a process has on a device.
pub type Context = sys::CUcontext;
/// A queue of work on a device.
pub type StreamHandle = sys::CUstream;
/// Work of a stream that was written down.
pub type GraphHandle = sys::CUgraph;
/// A graph that can be launched.
pub type GraphExec = sys::CUgraphExec;
/// A point in a stream.
pub type Event = sys::CUevent;
/// Code that was loaded onto a device.
pub type Module = sys::CUmodule;
/// A kernel of a module.
pub type Function = sys::CUfunction;
/// An address on a device.
pub type Address = sys::CUdeviceptr;

/// Numbers a device tells about itself.
#[derive(Clone, Copy, Debug)]
pub enum Attribute {
    /// The first number of its compute capability.
    CapabilityMajor = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as isize,
    /// The second.
    CapabilityMinor = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as isize,
    /// Its multiprocessors.
    Multiprocessors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as isize,
    /// Bytes of the cache that they share.
    #[cfg(feature = "bench")]
    CacheBytes = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE as isize,
}

/// The oldest driver that takes our kernels, as `cuDriverGetVersion` tells it, and for people.
const OLDEST: c_int = 12010;
const OLDEST_FOR_PEOPLE: &str = "driver 530 or newer (CUDA 12.1)";

/// The oldest driver whose graphs keep what `DependentLaunch` says of a launch; it says so of all launches.
const OLDEST_DEPENDENT_LAUNCH: c_int = 12030;

/// What a call answers where it did what it says.
const SUCCESS: u32 = 0;
const OUT_OF_MEMORY: u32 = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32;
/// What a driver answers to a name or an event that is not there (yet).
pub const NOT_FOUND: u32 = sys::CUresult::CUDA_ERROR_NOT_FOUND as u32;

/// Codes of a context, or of a stream, that is none.
pub const NO_HANDLE: [u32; 4] = [
    sys::CUresult::CUDA_ERROR_INVALID_VALUE as u32,
    sys::CUresult::CUDA_ERROR_INVALID_CONTEXT as u32,
    sys::CUresult::CUDA_ERROR_INVALID_HANDLE as u32,
    sys::CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED as u32,
];

/// Codes that say there is no such device, or none at all.
const NO_DEVICE: [u32; 3] = [
    sys::CUresult::CUDA_ERROR_NO_DEVICE as u32,
    sys::CUresult::CUDA_ERROR_INVALID_DEVICE as u32,
    sys::CUresult::CUDA_ERROR_STUB_LIBRARY as u32,
];

/// Codes of a driver that does not know what we ask for.
const TOO_OLD: [u32; 3] = [
    // A call that needs a newer driver; later versions of the list have it.
    36,
    sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION as u32,
    sys::CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH as u32,
];

/// Codes after which nothing on the device works in this process any more.
const FATAL: [u32; 17] = [
    sys::CUresult::CUDA_ERROR_DEINITIALIZED as u32,
    sys::CUresult::CUDA_ERROR_ECC_UNCORRECTABLE as u32,
    sys::CUresult::CUDA_ERROR_NVLINK_UNCORRECTABLE as u32,
    // A fault contained to this process; later versions of the list have it.
    226,
    sys::CUresult::CUDA_ERROR_ILLEGAL_ADDRESS as u32,
    sys::CUresult::CUDA_ERROR_LAUNCH_TIMEOUT as u32,
    sys::CUresult::CUDA_ERROR_CONTEXT_IS_DESTROYED as u32,
    sys::CUresult::CUDA_ERROR_ASSERT as u32,
    sys::CUresult::CUDA_ERROR_HARDWARE_STACK_ERROR as u32,
    sys::CUresult::CUDA_ERROR_ILLEGAL_INSTRUCTION as u32,
    sys::CUresult::CUDA_ERROR_MISALIGNED_ADDRESS as u32,
    sys::CUresult::CUDA_ERROR_INVALID_ADDRESS_SPACE as u32,
    sys::CUresult::CUDA_ERROR_INVALID_PC as u32,
    sys::CUresult::CUDA_ERROR_LAUNCH_FAILED as u32,
    sys::CUresult::CUDA_ERROR_MPS_CLIENT_TERMINATED as u32,
    sys::CUresult::CUDA_ERROR_EXTERNAL_DEVICE as u32,
    sys::CUresult::CUDA_ERROR_UNKNOWN as u32,
];

/// A call that the driver did not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The function's name.
    pub call: &'static str,
    /// What it answered.
    pub code: u32,
}

impl Fault {
    /// Whether it ends everything this process has on the device.
    pub fn is_fatal(self) -> bool {
        FATAL.contains(&self.code)
    }

    /// Whether memory was asked for that is not there.
    pub fn is_out_of_memory(self) -> bool {
        self.code == OUT_OF_MEMORY
    }

    /// The status for it, from a call on a device that is open.
    pub fn status(self) -> Status {
        match self.code {
            _ if self.is_fatal() => Status::DeviceLost,
            OUT_OF_MEMORY => Status::DeviceOutOfMemory,
            code if TOO_OLD.contains(&code) => Status::DriverTooOld,
            code if NO_DEVICE.contains(&code) => Status::NoDevice,
            _ => Status::DeviceFailed,
        }
    }

    /// As an error, `name` being the driver's name of the code.
    pub fn error(self, name: &str) -> Error {
        let Fault { call, code } = self;
        let status = self.status();
        let advice = match status {
            Status::DeviceLost => "; the device is lost: destroy its sessions and models, and load anew",
            Status::DriverTooOld => "; install a newer NVIDIA driver, and restart after it was changed",
            Status::NoDevice => "; no such device can be used",
            _ => "",
        };
        Error::new(status, format!("{call} failed with {name} ({code}){advice}"))
    }
}

/// The functions we use, as C has them: each with its name and the types of its arguments.
macro_rules! functions {
    ($($name:ident($($argument:ty),*);)*) => {
        /// Their addresses.
        #[allow(non_snake_case)]
        pub(super) struct Functions {
            $(pub $name: unsafe extern "C" fn($($argument),*) -> u32,)*
        }

        impl Functions {
            /// Looks all of them up in the driver's library; the error is the name of one it does not have.
            fn find() -> std::result::Result<Functions, &'static str> {
                Ok(Functions {
                    // SAFETY: the driver's function of that name has this signature; the symbol is copied out of a library
                    // that is never unloaded.
                    $($name: *unsafe { sys::culib().get(stringify!($name).as_bytes()) }
                        .map_err(|_| stringify!($name))?,)*
                })
            }
        }
    };
}

functions! {
    cuDriverGetVersion(*mut c_int);
    cuInit(c_uint);
    cuGetErrorName(u32, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut DeviceHandle, c_int);
    cuDeviceGetName(*mut c_char, c_int, DeviceHandle);
    cuDeviceTotalMem_v2(*mut usize, DeviceHandle);
    cuDeviceGetAttribute(*mut c_int, u32, DeviceHandle);
    cuDevicePrimaryCtxRetain(*mut Context, DeviceHandle);
    cuDevicePrimaryCtxRelease_v2(DeviceHandle);
    cuCtxPushCurrent_v2(Context);
    cuCtxPopCurrent_v2(*mut Context);
    cuCtxGetDevice(*mut DeviceHandle);
    cuModuleLoadData(*mut Module, *const c_void);
    cuModuleUnload(Module);
    cuModuleGetFunction(*mut Function, Module, *const c_char);
    cuMemAlloc_v2(*mut Address, usize);
    cuMemFree_v2(Address);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemAllocHost_v2(*mut *mut c_void, usize);
    cuMemFreeHost(*mut c_void);
    cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, StreamHandle);
    cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, StreamHandle);
    cuMemcpyDtoDAsync_v2(Address, Address, usize, StreamHandle);
    cuMemsetD8Async(Address, u8, usize, StreamHandle);
    cuStreamCreate(*mut StreamHandle, c_uint);
    cuStreamDestroy_v2(StreamHandle);
    cuStreamSynchronize(StreamHandle);
    cuStreamGetCtx(StreamHandle, *mut Context);
    cuStreamBeginCapture_v2(StreamHandle, c_uint);
    cuStreamEndCapture(StreamHandle, *mut GraphHandle);
    cuGraphInstantiateWithFlags(*mut GraphExec, GraphHandle, c_ulonglong);
    cuGraphLaunch(GraphExec, StreamHandle);
    cuGraphExecDestroy(GraphExec);
    cuGraphDestroy(GraphHandle);
    cuEventCreate(*mut Event, c_uint);
    cuEventDestroy_v2(Event);
    cuEventRecord(Event, StreamHandle);
    cuEventSynchronize(Event);
    cuLaunchKernel(
        Function, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, StreamHandle, *mut *mut c_void, *mut *mut c_void
    );
}

/// `cuLaunchKernelEx`, which drivers from R520 on have.
type LaunchKernelEx =
    unsafe extern "C" fn(*const sys::CUlaunchConfig, Function, *mut *mut c_void, *mut *mut c_void) -> u32;

/// How `cuLaunchKernelEx` is told that a kernel may be launched while the one before it in the stream runs.
pub(super) struct DependentLaunch {
    grid: [u32; 3],
    threads: u32,
    stream: StreamHandle,
    attribute: sys::CUlaunchAttribute,
}

impl DependentLaunch {
    pub fn new(grid: [u32; 3], threads: u32, stream: StreamHandle) -> DependentLaunch {
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        value.programmaticStreamSerializationAllowed = 1;
        let id = sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        DependentLaunch { grid, threads, stream, attribute: sys::CUlaunchAttribute { id, pad: [0; 4], value } }
    }

    /// Points into this.
    pub fn config(&mut self) -> sys::CUlaunchConfig {
        sys::CUlaunchConfig {
            gridDimX: self.grid[0],
            gridDimY: self.grid[1],
            gridDimZ: self.grid[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: 0,
            hStream: self.stream,
            attrs: &mut self.attribute,
            numAttrs: 1,
        }
    }
}

/// The driver, loaded for the rest of the process.
pub struct Driver {
    pub(super) functions: Functions,
    /// None in drivers that are too old for it.
    pub(super) launch_kernel_ex: Option<LaunchKernelEx>,
}

impl Driver {
    /// The driver, initialised and new enough. Fails with `NoDevice` or `DriverTooOld` where there is none to use; asked
    /// again, it is looked for again.
    pub fn get() -> Result<&'static Driver> {
        static DRIVER: OnceLock<Driver> = OnceLock::new();
        let driver = match DRIVER.get() {
            Some(driver) => driver,
            None => {
                // SAFETY: loads the driver's library, whose initialisers are NVIDIA's.
                if !unsafe { sys::is_culib_present() } {
                    let text = "no NVIDIA driver was found: install it, or use the CPU";
                    return Err(Error::new(Status::NoDevice, text));
                }
                let functions = Functions::find().map_err(missing_function)?;
                // SAFETY: as in `Functions::find`.
                let found = unsafe { sys::culib().get::<LaunchKernelEx>(b"cuLaunchKernelEx") };
                let launch_kernel_ex = found.ok().map(|function| *function);
                DRIVER.get_or_init(|| Driver { functions, launch_kernel_ex })
            }
        };
        driver.check_version()?;
        // SAFETY: may be called again and from any thread.
        driver.check("cuInit", unsafe { (driver.functions.cuInit)(0) }).map_err(|fault| driver.start_error(fault))?;
        Ok(driver)
    }

    fn check_version(&self) -> Result<()> {
        let version = self.version().map_err(|fault| self.start_error(fault))?;
        if version < OLDEST { Err(too_old(version)) } else { Ok(()) }
    }

    /// The CUDA version it is for: 12010 for 12.1.
    pub fn version(&self) -> std::result::Result<c_int, Fault> {
        let mut version = 0;
        // SAFETY: writes one int; may be called before cuInit.
        self.check("cuDriverGetVersion", unsafe { (self.functions.cuDriverGetVersion)(&mut version) })?;
        Ok(version)
    }

    /// Whether kernels may be launched as a `DependentLaunch`.
    pub fn has_dependent_launch(&self) -> std::result::Result<bool, Fault> {
        Ok(self.launch_kernel_ex.is_some() && self.version()? >= OLDEST_DEPENDENT_LAUNCH)
    }

    /// Splits a call's answer into done and not.
    pub fn check(&self, call: &'static str, code: u32) -> std::result::Result<(), Fault> {
        if code == SUCCESS { Ok(()) } else { Err(Fault { call, code }) }
    }

    /// The driver's name of a code.
    pub fn name_of(&self, code: u32) -> String {
        let mut name = std::ptr::null();
        // SAFETY: takes any number, and writes one pointer: to a text that is never freed, or null.
        let found = unsafe { (self.functions.cuGetErrorName)(code, &mut name) };
        if found != SUCCESS || name.is_null() {
            return "an error without a name".to_owned();
        }
        // SAFETY: the driver's text ends with a zero byte.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }

    /// The error of a call before any device is open, where nothing can be lost.
    pub fn start_error(&self, fault: Fault) -> Error {
        let error = fault.error(&self.name_of(fault.code));
        match error.status() {
            Status::DeviceLost => {
                let (Fault { call, code }, name) = (fault, self.name_of(fault.code));
                let text = format!(
                    "{call} failed with {name} ({code}): the NVIDIA driver does not start; nvidia-smi may tell why, and a \
                     restart of the machine may help"
                );
                Error::new(Status::DeviceFailed, text)
            }
            _ => error,
        }
    }

    /// Devices there are; none is no error.
    pub fn device_count(&self) -> std::result::Result<usize, Fault> {
        let mut count = 0;
        // SAFETY: writes one int.
        self.check("cuDeviceGetCount", unsafe { (self.functions.cuDeviceGetCount)(&mut count) })?;
        Ok(usize::try_from(count).unwrap_or(0))
    }

    /// The device of an index below `device_count`.
    pub fn device(&self, index: usize) -> std::result::Result<DeviceHandle, Fault> {
        let mut device = 0;
        let index = c_int::try_from(index).unwrap_or(c_int::MAX);
        // SAFETY: writes one handle.
        self.check("cuDeviceGet", unsafe { (self.functions.cuDeviceGet)(&mut device, index) })?;
        Ok(device)
    }

    /// A device's name, for people.
    pub fn device_name(&self, device: DeviceHandle) -> std::result::Result<String, Fault> {
        let mut name = [0u8; 256];
        // SAFETY: writes at most the length it is given.
        let code =
            unsafe { (self.functions.cuDeviceGetName)(name.as_mut_ptr().cast(), name.len() as c_int - 1, device) };
        self.check("cuDeviceGetName", code)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }

    /// Bytes of memory a device has.
    pub fn device_memory(&self, device: DeviceHandle) -> std::result::Result<usize, Fault> {
        let mut bytes = 0;
        // SAFETY: writes one size.
        self.check("cuDeviceTotalMem_v2", unsafe { (self.functions.cuDeviceTotalMem_v2)(&mut bytes, device) })?;
        Ok(bytes)
    }

    /// One of the numbers a device tells about itself.
    pub fn attribute(&self, device: DeviceHandle, attribute: Attribute) -> std::result::Result<u32, Fault> {
        let mut value = 0;
        // SAFETY: writes one int.
        let code = unsafe { (self.functions.cuDeviceGetAttribute)(&mut value, attribute as u32, device) };
        self.check("cuDeviceGetAttribute", code)?;
        Ok(u32::try_from(value).unwrap_or(0))
    }

    /// The device of a context.
    pub fn device_of(&self, context: Context) -> std::result::Result<DeviceHandle, Fault> {
        let mut device = 0;
        self.within(context, || {
            // SAFETY: writes one handle.
            self.check("cuCtxGetDevice", unsafe { (self.functions.cuCtxGetDevice)(&mut device) })
        })?;
        Ok(device)
    }

    /// The context of a stream; of one that stands for a stream in each context, `context`.
    pub fn context_of(&self, context: Context, stream: StreamHandle) -> std::result::Result<Context, Fault> {
        let mut found = std::ptr::null_mut();
        self.within(context, || {
            // SAFETY: writes one handle; the stream is alive, as whoever lent it promised.
            self.check("cuStreamGetCtx", unsafe { (self.functions.cuStreamGetCtx)(stream, &mut found) })
        })?;
        Ok(found)
    }

    /// Makes a call with a context as this thread's current one.
    fn within(
        &self,
        context: Context,
        call: impl FnOnce() -> std::result::Result<(), Fault>,
    ) -> std::result::Result<(), Fault> {
        // SAFETY: the context is alive, as whoever lent it promised.
        self.check("cuCtxPushCurrent_v2", unsafe { (self.functions.cuCtxPushCurrent_v2)(context) })?;
        let result = call();
        let mut popped = std::ptr::null_mut();
        // SAFETY: writes one handle; takes back the push above.
        unsafe { (self.functions.cuCtxPopCurrent_v2)(&mut popped) };
        result
    }

    /// What this process has, or will have, on a device, shared with everybody else in it; it lives until it was released
    /// as often as it was retained.
    pub fn retain(&self, device: DeviceHandle) -> std::result::Result<Context, Fault> {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.functions.cuDevicePrimaryCtxRetain)(&mut context, device) };
        self.check("cuDevicePrimaryCtxRetain", code)?;
        Ok(context)
    }

    /// Takes a `retain` back. What it answers is of no use: there is nothing left to do about it.
    pub fn release(&self, device: DeviceHandle) {
        // SAFETY: the caller retained it once, and uses what it got no more.
        unsafe { (self.functions.cuDevicePrimaryCtxRelease_v2)(device) };
    }
}

#[cfg(feature = "bench")]
impl Driver {
    /// Milliseconds between two events.
    ///
    /// # Safety
    /// Both are events of the current context.
    pub unsafe fn elapsed(&self, from: Event, to: Event) -> std::result::Result<f32, Fault> {
        type Elapsed = unsafe extern "C" fn(*mut f32, Event, Event) -> u32;
        const NAME: &str = "cuEventElapsedTime";
        // SAFETY: the driver's function of that name has this signature.
        let found = unsafe { sys::culib().get::<Elapsed>(NAME.as_bytes()) };
        let elapsed = found.map_err(|_| Fault { call: NAME, code: NOT_FOUND })?;
        let mut milliseconds = 0.0;
        // SAFETY: writes one number; the rest by the caller's promise.
        self.check(NAME, unsafe { elapsed(&mut milliseconds, from, to) })?;
        Ok(milliseconds)
    }
}

/// The error of a driver of this version.
fn too_old(version: c_int) -> Error {
    let (major, minor) = (version / 1000, version % 1000 / 10);
    let text = format!(
        "the NVIDIA driver is for CUDA {major}.{minor}, this library needs {OLDEST_FOR_PEOPLE}: install a newer one"
    );
    Error::new(Status::DriverTooOld, text)
}

/// The error of a driver that lacks a function.
fn missing_function(function: &'static str) -> Error {
    type Version = unsafe extern "C" fn(*mut c_int) -> u32;
    // SAFETY: the driver's function of that name has this signature.
    let found = unsafe { sys::culib().get::<Version>(b"cuDriverGetVersion") };
    let mut version = 0;
    // SAFETY: writes one int; may be called before cuInit.
    let known = found.is_ok_and(|get| unsafe { get(&mut version) } == SUCCESS);
    let of = if known { format!(" for CUDA {}.{}", version / 1000, version % 1000 / 10) } else { String::new() };
    let text = format!("the NVIDIA driver{of} has no function {function}: install {OLDEST_FOR_PEOPLE}");
    Error::new(Status::DriverTooOld, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_reads_as_the_call_the_code_and_what_to_do() {
        let fault = |code| Fault { call: "cuMemAlloc_v2", code }.error("CUDA_ERROR_SOMETHING");
        let lost = fault(700);
        assert_eq!(lost.status(), Status::DeviceLost);
        assert_eq!(
            lost.to_string(),
            "cuMemAlloc_v2 failed with CUDA_ERROR_SOMETHING (700); the device is lost: destroy its sessions and models, \
             and load anew"
        );
        assert_eq!(fault(2).status(), Status::DeviceOutOfMemory);
        assert_eq!(fault(1).to_string(), "cuMemAlloc_v2 failed with CUDA_ERROR_SOMETHING (1)");
        assert_eq!(fault(1).status(), Status::DeviceFailed);
        assert_eq!(fault(222).status(), Status::DriverTooOld);
        assert_eq!(fault(101).status(), Status::NoDevice);
        // A code that only newer drivers know.
        assert_eq!(fault(4000).status(), Status::DeviceFailed);
    }

    #[test]
    fn an_old_driver_is_told_by_its_version() {
        let error = too_old(11080);
        assert_eq!(error.status(), Status::DriverTooOld);
        assert!(error.to_string().contains("CUDA 11.8,"), "{error}");
        assert!(error.to_string().contains("driver 530"), "{error}");
    }
}
