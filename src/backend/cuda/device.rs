//! The devices of the NVIDIA driver, and one of them in use.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::context::Current;
use super::driver::{Attribute, Context, DeviceHandle, Driver, Fault, StreamHandle};
use super::lent;
use super::stream::Stream;
use crate::backend::device::{DeviceInfo, LentContext};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;

/// The oldest compute capability the kernels run on.
const OLDEST_CAPABILITY: (u32, u32) = (8, 0);

/// A device that the kernels run on, and what it says about itself.
struct Found {
    handle: DeviceHandle,
    name: String,
    memory_bytes: usize,
    capability: (u32, u32),
    multiprocessors: u32,
}

impl Found {
    fn read(driver: &Driver, index: usize) -> std::result::Result<Found, Fault> {
        let handle = driver.device(index)?;
        let attribute = |attribute| driver.attribute(handle, attribute);
        Ok(Found {
            handle,
            name: driver.device_name(handle)?,
            memory_bytes: driver.device_memory(handle)?,
            capability: (attribute(Attribute::CapabilityMajor)?, attribute(Attribute::CapabilityMinor)?),
            multiprocessors: attribute(Attribute::Multiprocessors)?,
        })
    }

    /// Those that the kernels run on, in the driver's order, and how many it shows in all. Their places are what they are
    /// chosen by.
    fn all(driver: &Driver) -> Result<(Vec<Found>, usize)> {
        let start_error = |fault| driver.start_error(fault);
        let count = driver.device_count().map_err(start_error)?;
        let mut all = try_with_capacity("a list of devices", count)?;
        for index in 0..count {
            let found = Found::read(driver, index).map_err(start_error)?;
            if found.capability >= OLDEST_CAPABILITY {
                all.push(found);
            }
        }
        Ok((all, count))
    }
}

/// As [`crate::backend::devices`]. To ask how much memory is free, the driver makes a context on each device for a moment,
/// where this process has none.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    let driver = match Driver::get() {
        Err(error) if error.status() == Status::NoDevice => return Ok(Vec::new()),
        driver => driver?,
    };
    let (all, _) = Found::all(driver)?;
    let info = |(index, found): (usize, Found)| DeviceInfo {
        index,
        name: found.name.clone(),
        memory_bytes: found.memory_bytes as u64,
        capability: found.capability,
        // A device that another process has for itself has nothing free for this one.
        free_bytes: Device::begin(driver, index, found, None)
            .and_then(|device| Ok(device.enter()?.memory()?.0))
            .unwrap_or(0) as u64,
    };
    Ok(all.into_iter().enumerate().map(info).collect())
}

/// A device in use: its primary context, which the process shares, or one that the host lends, and a stream of our own, for what
/// is waited for where it is asked for: weights, pages, small copies. Usable from any thread.
///
/// After an error that ends everything on the device every call fails with `DeviceLost`; freeing goes on to work, in silence.
pub struct Device {
    driver: &'static Driver,
    index: usize,
    found: Found,
    context: Context,
    /// For a lent stream, that one.
    stream: StreamHandle,
    /// What of these two is the host's.
    lent: Option<LentContext>,
    /// The code of the error that ended everything; 0 while there was none.
    lost: AtomicU32,
}

// SAFETY: handles of the driver may be used from any thread, at the same time; making the context current is done by each
// thread for itself, in `Current`, which is not Send.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    /// Opens the device of this index, or that of a lent context, with which index 0 says nothing. Fails with `NoDevice`,
    /// `DriverTooOld`, `InvalidArgument` where the two do not agree, and what a driver can answer.
    pub fn open(index: usize, lent: Option<LentContext>) -> Result<Arc<Device>> {
        let driver = Driver::get()?;
        let (mut all, count) = Found::all(driver)?;
        let index = match &lent {
            Some(lent) => place_of(driver, &all, lent, index)?,
            None => index,
        };
        if index >= all.len() {
            return Err(no_device(index, all.len(), count));
        }
        Device::begin(driver, index, all.swap_remove(index), lent)
    }

    /// Takes a device that was found into use.
    fn begin(driver: &'static Driver, index: usize, found: Found, lent: Option<LentContext>) -> Result<Arc<Device>> {
        let retained = || {
            driver.retain(found.handle).map_err(|fault| match fault.is_out_of_memory() {
                true => {
                    let text =
                        format!("no memory on device {index} ({}) to begin with: other programs use it", found.name);
                    Error::new(Status::DeviceOutOfMemory, text)
                }
                false => driver.start_error(fault),
            })
        };
        let context = lent.as_ref().map_or_else(retained, |lent| Ok(lent::context_of(lent)))?;
        let lent_stream = lent.as_ref().and_then(lent::stream_of);
        // From here on dropping it gives back what was taken.
        let stream = lent_stream.unwrap_or(std::ptr::null_mut());
        let mut device = Device { driver, index, found, context, stream, lent, lost: AtomicU32::new(0) };
        if lent_stream.is_none() {
            let stream = device.enter()?.create_stream()?;
            device.stream = stream;
        }
        Ok(Arc::new(device))
    }

    /// Its name, for people.
    pub fn name(&self) -> &str {
        &self.found.name
    }

    /// Its compute capability.
    pub fn capability(&self) -> (u32, u32) {
        self.found.capability
    }

    /// Its multiprocessors.
    pub fn multiprocessors(&self) -> usize {
        self.found.multiprocessors as usize
    }

    /// For error texts: `device 0 (NVIDIA H100 80GB HBM3)`.
    pub fn described(&self) -> String {
        format!("device {} ({})", self.index, self.found.name)
    }

    /// Makes its context this thread's current one as long as the answer lives; work goes onto the device's stream. Fails with
    /// `DeviceLost` after an error that ended everything.
    pub fn enter(&self) -> Result<Current<'_>> {
        self.enter_with(self.stream)
    }

    /// As `enter`; work goes onto a pass's own stream, which lives as long as the answer, or onto the host's where it lent one.
    pub fn enter_on(&self, stream: &Stream) -> Result<Current<'_>> {
        self.enter_with(self.lent_stream().unwrap_or(stream.handle()))
    }

    /// As `enter`, to record on a pass's own stream: nobody else can put work in between there.
    pub fn enter_to_record(&self, stream: &Stream) -> Result<Current<'_>> {
        self.enter_with(stream.handle())
    }

    fn lent_stream(&self) -> Option<StreamHandle> {
        self.lent.as_ref().and_then(lent::stream_of)
    }

    fn enter_with(&self, stream: StreamHandle) -> Result<Current<'_>> {
        match self.lost.load(Ordering::Acquire) {
            0 => Current::new(self, self.driver, stream),
            code => {
                let text = format!(
                    "{} was lost by an earlier error, {} ({code}): destroy its sessions and models, and load anew",
                    self.described(),
                    self.driver.name_of(code)
                );
                Err(Error::new(Status::DeviceLost, text))
            }
        }
    }

    /// As `enter`, to give back what was taken: also from a lost device, of which the driver may then know nothing. Tried
    /// again where it fails, since what is not given back now never is.
    pub(super) fn enter_to_free(&self) -> Option<Current<'_>> {
        self.enter_to_free_with(self.stream)
    }

    /// As `enter_to_free`, to end a recording.
    pub(super) fn enter_to_stop(&self, stream: &Stream) -> Option<Current<'_>> {
        self.enter_to_free_with(stream.handle())
    }

    fn enter_to_free_with(&self, stream: StreamHandle) -> Option<Current<'_>> {
        let enter = || Current::new(self, self.driver, stream);
        enter().or_else(|_| enter()).ok()
    }

    /// The error of a call on this device, which is lost from here on if the driver says so.
    pub(super) fn fault(&self, fault: Fault) -> Error {
        if fault.is_fatal() {
            self.lost.store(fault.code, Ordering::Release);
        }
        fault.error(&self.driver.name_of(fault.code))
    }

    pub(super) fn context(&self) -> Context {
        self.context
    }
}

#[cfg(feature = "bench")]
impl Device {
    /// The stream of work that is no pass's.
    pub(super) fn stream(&self) -> StreamHandle {
        self.stream
    }

    /// Bytes of the cache that its multiprocessors share.
    pub fn cache_bytes(&self) -> Result<usize> {
        let bytes = self.driver.attribute(self.found.handle, Attribute::CacheBytes);
        bytes.map(|bytes| bytes as usize).map_err(|fault| self.fault(fault))
    }

    /// As [`Driver::version`].
    pub fn driver_version(&self) -> Result<i32> {
        self.driver.version().map_err(|fault| self.fault(fault))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if !self.stream.is_null()
            && self.lent_stream().is_none()
            && let Some(current) = self.enter_to_free()
        {
            // SAFETY: everything that uses the stream holds the device, so there is nothing any more.
            unsafe { current.destroy_stream(self.stream) };
        }
        if self.lent.is_none() {
            self.driver.release(self.found.handle);
        }
    }
}

/// The index of the device that a lent context is of.
pub fn index_of(lent: &LentContext, index: usize) -> Result<usize> {
    let driver = Driver::get()?;
    place_of(driver, &Found::all(driver)?.0, lent, index)
}

/// The place among `all` of a lent context's device, which is at `index` if that is not 0.
fn place_of(driver: &Driver, all: &[Found], lent: &LentContext, index: usize) -> Result<usize> {
    let handle = lent::device_of(driver, lent)?;
    let Some(place) = all.iter().position(|found| found.handle == handle) else {
        let (oldest, _) = OLDEST_CAPABILITY;
        let text =
            format!("the device of cuda_context has not the compute capability {oldest}.0 that the kernels need");
        return Err(Error::new(Status::NoDevice, text).at_key("cuda_context"));
    };
    if index != 0 && index != place {
        let text = format!("device_index is {index}, the device of cuda_context is {place}");
        return Err(Error::new(Status::InvalidArgument, text).at_key("device_index"));
    }
    Ok(place)
}

/// The error of an index past the devices that can be used, `usable` of the `count` that the driver shows.
fn no_device(index: usize, usable: usize, count: usize) -> Error {
    let (oldest, _) = OLDEST_CAPABILITY;
    let text = match (usable, count) {
        (0, 0) => "the NVIDIA driver shows this process no device: use the CPU, or see CUDA_VISIBLE_DEVICES".to_owned(),
        (0, _) => {
            format!("the kernels need compute capability {oldest}.0, none of {count} devices has it: use the CPU")
        }
        _ => format!("device is {index}, expected 0 to {}: there are {usable} that the kernels run on", usable - 1),
    };
    Error::new(Status::NoDevice, text).at_key("device")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_said() {
        for (numbers, expected) in [
            ((0, 0, 0), "the NVIDIA driver shows this process no device: use the CPU, or see CUDA_VISIBLE_DEVICES"),
            ((1, 0, 2), "the kernels need compute capability 8.0, none of 2 devices has it: use the CPU"),
            ((3, 2, 2), "device is 3, expected 0 to 1: there are 2 that the kernels run on"),
        ] {
            let (index, usable, count) = numbers;
            let error = no_device(index, usable, count);
            assert_eq!((error.status(), error.to_string()), (Status::NoDevice, expected.to_owned()));
        }
    }
}
