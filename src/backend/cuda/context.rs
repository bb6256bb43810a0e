//! Calls that need a context: it is this thread's current one while they are made, and the host's is again afterwards.

use std::ffi::{CStr, c_void};
use std::marker::PhantomData;

use super::device::Device;
use super::driver::{
    Address, DependentLaunch, Driver, Event, Fault, Function, GraphExec, GraphHandle, Module, NOT_FOUND, StreamHandle,
};
use super::images::Image;
use crate::error::{Error, Result, Status};

/// Streams that do not wait for the host's default stream, nor it for them.
const NON_BLOCKING_STREAM: u32 = 1;
/// While a stream captures, calls of the capturing thread that would disturb it are refused, which shows mistakes of ours; those
/// of other threads, the host's among them, go on as ever.
const THREAD_LOCAL_CAPTURE: u32 = 1;
/// Events that only say that something is done, not when.
const EVENT_WITHOUT_TIME: u32 = 2;

/// A device whose context is the current one of this thread, until this is dropped, and the stream that work is enqueued on
/// meanwhile.
pub struct Current<'a> {
    device: &'a Device,
    driver: &'static Driver,
    stream: StreamHandle,
    /// Being current is a thread's matter.
    thread: PhantomData<*mut ()>,
}

impl<'a> Current<'a> {
    /// Makes the device's context the current one. The stream is one of this context's.
    pub(super) fn new(device: &'a Device, driver: &'static Driver, stream: StreamHandle) -> Result<Current<'a>> {
        // SAFETY: the device keeps its context alive.
        let code = unsafe { (driver.functions.cuCtxPushCurrent_v2)(device.context()) };
        driver.check("cuCtxPushCurrent_v2", code).map_err(|fault| device.fault(fault))?;
        Ok(Current { device, driver, stream, thread: PhantomData })
    }

    fn check(&self, call: &'static str, code: u32) -> Result<()> {
        self.driver.check(call, code).map_err(|fault| self.device.fault(fault))
    }

    /// Memory on the device, uninitialised.
    pub(super) fn allocate(&self, what: &str, bytes: usize) -> Result<Address> {
        let mut address = 0;
        // SAFETY: writes one address.
        let code = unsafe { (self.driver.functions.cuMemAlloc_v2)(&mut address, bytes.max(1)) };
        self.driver.check("cuMemAlloc_v2", code).map_err(|fault| self.memory_fault(fault, what, bytes))?;
        Ok(address)
    }

    fn memory_fault(&self, fault: Fault, what: &str, bytes: usize) -> Error {
        if !fault.is_out_of_memory() {
            return self.device.fault(fault);
        }
        let free = match self.memory() {
            Ok((free, total)) => format!(", {free} of {total} are free"),
            Err(_) => String::new(),
        };
        let text = format!("no memory on {} for {what}: {bytes} bytes{free}", self.device.described());
        Error::new(Status::DeviceOutOfMemory, text)
    }

    /// Frees what `allocate` gave. What the driver answers is of no use: nothing can be done about it.
    ///
    /// # Safety
    /// Nothing uses the memory any more, on the device neither.
    pub(super) unsafe fn free(&self, address: Address) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.functions.cuMemFree_v2)(address) };
    }

    /// Bytes of memory that are free, and that the device has.
    pub fn memory(&self) -> Result<(usize, usize)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two sizes.
        let code = unsafe { (self.driver.functions.cuMemGetInfo_v2)(&mut free, &mut total) };
        self.check("cuMemGetInfo_v2", code)?;
        Ok((free, total))
    }

    /// Memory of the host that the device reads and writes by itself, uninitialised.
    pub(super) fn allocate_pinned(&self, what: &str, bytes: usize) -> Result<*mut u8> {
        let mut start = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        let code = unsafe { (self.driver.functions.cuMemAllocHost_v2)(&mut start, bytes.max(1)) };
        self.driver.check("cuMemAllocHost_v2", code).map_err(|fault| match fault.is_out_of_memory() {
            // The host's, not the device's.
            true => Error::out_of_memory(what, bytes),
            false => self.device.fault(fault),
        })?;
        Ok(start.cast())
    }

    /// Frees what `allocate_pinned` gave.
    ///
    /// # Safety
    /// Nothing uses the memory any more, on the device neither.
    pub(super) unsafe fn free_pinned(&self, start: *mut u8) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.functions.cuMemFreeHost)(start.cast()) };
    }

    /// Enqueues a copy to the device.
    ///
    /// # Safety
    /// `from` may be read, and `to` written, for `bytes` bytes until the stream has come past the copy, and nobody else
    /// writes either meanwhile.
    pub(super) unsafe fn copy_to_device(&self, to: Address, from: *const u8, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver.functions.cuMemcpyHtoDAsync_v2)(to, from.cast(), bytes, self.stream) };
        self.check("cuMemcpyHtoDAsync_v2", code)
    }

    /// Enqueues a copy from the device.
    ///
    /// # Safety
    /// As `copy_to_device`.
    pub(super) unsafe fn copy_to_host(&self, to: *mut u8, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver.functions.cuMemcpyDtoHAsync_v2)(to.cast(), from, bytes, self.stream) };
        self.check("cuMemcpyDtoHAsync_v2", code)
    }

    /// Enqueues a copy on the device.
    ///
    /// # Safety
    /// As `copy_to_device`.
    pub(super) unsafe fn copy(&self, to: Address, from: Address, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver.functions.cuMemcpyDtoDAsync_v2)(to, from, bytes, self.stream) };
        self.check("cuMemcpyDtoDAsync_v2", code)
    }

    /// Enqueues the writing of zeros.
    ///
    /// # Safety
    /// As `copy_to_device`.
    pub(super) unsafe fn clear(&self, address: Address, bytes: usize) -> Result<()> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver.functions.cuMemsetD8Async)(address, 0, bytes, self.stream) };
        self.check("cuMemsetD8Async", code)
    }

    /// Waits until everything enqueued on the stream up to now is done. Where that fails it is tried again before it is said:
    /// callers go on to free what the work uses, and a device that is lost does nothing more.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: a stream of this context's.
        let wait = || unsafe { (self.driver.functions.cuStreamSynchronize)(self.stream) };
        self.check("cuStreamSynchronize", wait()).inspect_err(|_| {
            wait();
        })
    }

    pub(super) fn create_stream(&self) -> Result<StreamHandle> {
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.driver.functions.cuStreamCreate)(&mut stream, NON_BLOCKING_STREAM) };
        self.check("cuStreamCreate", code)?;
        Ok(stream)
    }

    /// # Safety
    /// Nobody uses the stream any more.
    pub(super) unsafe fn destroy_stream(&self, stream: StreamHandle) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.functions.cuStreamDestroy_v2)(stream) };
    }

    /// From now on what is enqueued on the stream is written down instead of done, up to `end_capture` on the same thread.
    pub(super) fn begin_capture(&self) -> Result<()> {
        // SAFETY: a stream of this context's.
        let code = unsafe { (self.driver.functions.cuStreamBeginCapture_v2)(self.stream, THREAD_LOCAL_CAPTURE) };
        self.check("cuStreamBeginCapture_v2", code)
    }

    /// What was written down. Where that fails it is tried again before it is said, since the stream is to work again.
    pub(super) fn end_capture(&self) -> Result<GraphHandle> {
        let end = || {
            let mut graph = std::ptr::null_mut();
            // SAFETY: a stream of this context's; writes one handle.
            let code = unsafe { (self.driver.functions.cuStreamEndCapture)(self.stream, &mut graph) };
            self.check("cuStreamEndCapture", code).map(|()| graph)
        };
        end().inspect_err(|_| {
            if let Ok(graph) = end() {
                // SAFETY: nobody else has it.
                unsafe { self.destroy_graph(graph) };
            }
        })
    }

    /// # Safety
    /// The graph is one of this context's, and nobody uses it any more.
    pub(super) unsafe fn destroy_graph(&self, graph: GraphHandle) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.functions.cuGraphDestroy)(graph) };
    }

    /// Makes something of a graph that can be launched, and needs the graph no more.
    ///
    /// # Safety
    /// The graph is one of this context's.
    pub(super) unsafe fn instantiate(&self, graph: GraphHandle) -> Result<GraphExec> {
        let mut executable = std::ptr::null_mut();
        // SAFETY: writes one handle; the graph by the caller's promise.
        let code = unsafe { (self.driver.functions.cuGraphInstantiateWithFlags)(&mut executable, graph, 0) };
        self.check("cuGraphInstantiateWithFlags", code)?;
        Ok(executable)
    }

    /// Enqueues all work of a graph.
    ///
    /// # Safety
    /// The graph is one of this context's, and all it reads and writes may be read and written until the stream has come past
    /// it.
    pub(super) unsafe fn launch_graph(&self, executable: GraphExec) -> Result<()> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver.functions.cuGraphLaunch)(executable, self.stream) };
        self.check("cuGraphLaunch", code)
    }

    /// # Safety
    /// The graph is one of this context's, and nobody uses it any more, on the device neither.
    pub(super) unsafe fn destroy_executable(&self, executable: GraphExec) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.functions.cuGraphExecDestroy)(executable) };
    }

    pub(super) fn create_event(&self) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (self.driver.functions.cuEventCreate)(&mut event, EVENT_WITHOUT_TIME) };
        self.check("cuEventCreate", code)?;
        Ok(event)
    }

    /// # Safety
    /// The event is one of this context's, and nobody uses it any more.
    pub(super) unsafe fn destroy_event(&self, event: Event) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.functions.cuEventDestroy_v2)(event) };
    }

    /// Sets an event behind everything enqueued up to now.
    ///
    /// # Safety
    /// The event is one of this context's.
    pub(super) unsafe fn record(&self, event: Event) -> Result<()> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver.functions.cuEventRecord)(event, self.stream) };
        self.check("cuEventRecord", code)
    }

    /// Waits until the stream has come past an event; not at all where it was never recorded.
    ///
    /// # Safety
    /// The event is one of this context's.
    pub(super) unsafe fn wait_for(&self, event: Event) -> Result<()> {
        // SAFETY: the caller's promise.
        let code = unsafe { (self.driver.functions.cuEventSynchronize)(event) };
        self.check("cuEventSynchronize", code)
    }

    /// Loads code.
    pub(super) fn load_module(&self, image: &Image) -> Result<Module> {
        let mut module = std::ptr::null_mut();
        // SAFETY: writes one handle, and reads to the end of the image, which is as the driver wants one.
        let code = unsafe { (self.driver.functions.cuModuleLoadData)(&mut module, image.as_ptr().cast()) };
        self.check("cuModuleLoadData", code)?;
        Ok(module)
    }

    /// # Safety
    /// Nobody uses the module or its functions any more.
    pub(super) unsafe fn unload_module(&self, module: Module) {
        // SAFETY: the caller's promise.
        unsafe { (self.driver.functions.cuModuleUnload)(module) };
    }

    /// A module's kernel of this name, if it has one.
    ///
    /// # Safety
    /// The module is one of this context's.
    pub(super) unsafe fn function(&self, module: Module, name: &CStr) -> Result<Option<Function>> {
        let mut function = std::ptr::null_mut();
        // SAFETY: writes one handle; the module by the caller's promise.
        let code = unsafe { (self.driver.functions.cuModuleGetFunction)(&mut function, module, name.as_ptr()) };
        match code {
            NOT_FOUND => Ok(None),
            code => self.check("cuModuleGetFunction", code).map(|()| Some(function)),
        }
    }

    /// Whether the driver can launch a kernel while the one before it runs.
    pub(super) fn has_dependent_launch(&self) -> Result<bool> {
        self.driver.has_dependent_launch().map_err(|fault| self.device.fault(fault))
    }

    /// Enqueues a kernel that takes one struct; a dependent one may be launched while the one before it runs.
    ///
    /// # Safety
    /// The function takes an `A`, and with these arguments and this grid it reads and writes only memory that may be read and
    /// written until the stream has come past it. A dependent one waits for the one before it, before anything else.
    pub(super) unsafe fn launch<A: Copy>(
        &self,
        function: Function,
        grid: [u32; 3],
        threads: u32,
        is_dependent: bool,
        arguments: &A,
    ) -> Result<()> {
        let mut parameters: [*mut c_void; 1] = [std::ptr::from_ref(arguments).cast_mut().cast()];
        if let Some(launch) = self.driver.launch_kernel_ex.filter(|_| is_dependent) {
            let mut dependent = DependentLaunch::new(grid, threads, self.stream);
            // SAFETY: the caller's promise; the driver copies all it is given before it returns.
            let code = unsafe { launch(&dependent.config(), function, parameters.as_mut_ptr(), std::ptr::null_mut()) };
            return self.check("cuLaunchKernelEx", code);
        }
        // SAFETY: the caller's promise; the driver copies the arguments before it returns.
        let code = unsafe {
            (self.driver.functions.cuLaunchKernel)(
                function,
                grid[0],
                grid[1],
                grid[2],
                threads,
                1,
                1,
                0,
                self.stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.check("cuLaunchKernel", code)
    }
}

#[cfg(feature = "bench")]
impl Current<'_> {
    /// An event that says when it was reached.
    pub(super) fn create_timed_event(&self) -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: writes one handle.
        self.check("cuEventCreate", unsafe { (self.driver.functions.cuEventCreate)(&mut event, 0) })?;
        Ok(event)
    }

    /// Milliseconds between two events.
    ///
    /// # Safety
    /// Both are events of this context.
    pub(super) unsafe fn elapsed(&self, from: Event, to: Event) -> Result<f32> {
        // SAFETY: the caller's promise.
        unsafe { self.driver.elapsed(from, to) }.map_err(|fault| self.device.fault(fault))
    }
}

impl Drop for Current<'_> {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: writes one handle. It takes back what `new` did on this thread, which is not Send.
        let code = unsafe { (self.driver.functions.cuCtxPopCurrent_v2)(&mut context) };
        // There is nobody to tell but the next call.
        let _ = self.check("cuCtxPopCurrent_v2", code);
    }
}
