//! Memory on a device, and memory of the host that a device reads and writes by itself.

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::context::Current;
use super::device::Device;
use super::driver::{Address, Event};
use crate::backend::device_bytes::DeviceBytes;
use crate::error::{Error, Result, Status};

/// Parts of an arena begin at a multiple of this: what the driver promises of every allocation.
pub const PART_ALIGNMENT: usize = 256;

/// A block of memory on a device, freed when it is dropped.
///
/// Nothing keeps work of the device from outliving it: whoever enqueues work on a block waits before it lets go.
pub struct DeviceBlock {
    device: Arc<Device>,
    address: Address,
    bytes: usize,
}

impl DeviceBlock {
    /// `bytes` bytes of `what`, uninitialised. Fails with `DeviceOutOfMemory`.
    pub fn new(device: &Arc<Device>, what: &str, bytes: usize) -> Result<DeviceBlock> {
        let address = device.enter()?.allocate(what, bytes)?;
        Ok(DeviceBlock { device: Arc::clone(device), address, bytes })
    }

    /// Zeros.
    pub fn zeroed(device: &Arc<Device>, what: &str, bytes: usize) -> Result<DeviceBlock> {
        let block = DeviceBlock::new(device, what, bytes)?;
        let current = device.enter()?;
        // SAFETY: the block is new, and waited for below.
        unsafe { current.clear(block.address, bytes) }?;
        current.wait()?;
        Ok(block)
    }

    /// The device it is on.
    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The address of a part of it. Panics where it is none.
    pub fn part(&self, range: Range<usize>) -> Address {
        assert!(range.start <= range.end && range.end <= self.bytes, "a part outside of its block");
        self.address + range.start as Address
    }

    /// Fills its first bytes, and waits until that is done. Nothing else of the device uses them meanwhile.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let to = self.part(0..bytes.len());
        let current = self.device.enter()?;
        // SAFETY: both are as long, and borrowed until the wait is over.
        unsafe { current.copy_to_device(to, bytes.as_ptr(), bytes.len()) }?;
        current.wait()
    }

    /// Reads its first bytes. Nothing else of the device writes them meanwhile.
    pub fn read(&self, bytes: &mut [u8]) -> Result<()> {
        let from = self.part(0..bytes.len());
        let current = self.device.enter()?;
        // SAFETY: both are as long, and borrowed until the wait is over.
        unsafe { current.copy_to_host(bytes.as_mut_ptr(), from, bytes.len()) }?;
        current.wait()
    }

    /// Becomes a copy of as many bytes from `address` on, which are on the same device and not written meanwhile.
    pub fn copy_from(&mut self, address: Address) -> Result<()> {
        let current = self.device.enter()?;
        // SAFETY: this is borrowed until the wait is over; of the other the caller knows, and a wrong address fails on the
        // device alone.
        unsafe { current.copy(self.address, address, self.bytes) }?;
        current.wait()
    }
}

impl DeviceBytes for DeviceBlock {
    fn address(&self) -> u64 {
        self.address
    }

    fn read(&self, out: &mut [u8]) -> Result<()> {
        DeviceBlock::read(self, out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        DeviceBlock::write(self, bytes)
    }

    fn copy_from(&mut self, address: u64) -> Result<()> {
        DeviceBlock::copy_from(self, address)
    }
}

impl Drop for DeviceBlock {
    fn drop(&mut self) {
        if let Some(current) = self.device.enter_to_free() {
            // SAFETY: allocated by `new`, freed once; whoever enqueued work on it has waited.
            unsafe { current.free(self.address) };
        }
    }
}

/// A block of memory on a device that is given out in parts.
pub struct Arena {
    block: DeviceBlock,
    used: usize,
}

impl Arena {
    /// One with room for `bytes` bytes, uninitialised; `padded` tells what a part takes.
    pub fn new(device: &Arc<Device>, what: &str, bytes: usize) -> Result<Arena> {
        Ok(Arena { block: DeviceBlock::new(device, what, bytes)?, used: 0 })
    }

    /// The same of zeros.
    pub fn zeroed(device: &Arc<Device>, what: &str, bytes: usize) -> Result<Arena> {
        Ok(Arena { block: DeviceBlock::zeroed(device, what, bytes)?, used: 0 })
    }

    /// Bytes that a part of `bytes` bytes takes.
    pub fn padded(bytes: usize) -> usize {
        bytes.next_multiple_of(PART_ALIGNMENT)
    }

    /// The address of the next part, of `bytes` bytes.
    pub fn take(&mut self, bytes: usize) -> Result<Address> {
        let end = self.used.checked_add(bytes).filter(|end| *end <= self.block.bytes()).ok_or_else(|| {
            let (used, all) = (self.used, self.block.bytes());
            Error::new(Status::Internal, format!("{bytes} bytes more than planned: {used} of {all} are used"))
        })?;
        let address = self.block.part(self.used..end);
        self.used = Arena::padded(end).min(self.block.bytes());
        Ok(address)
    }

    /// The device it is on.
    pub fn device(&self) -> &Arc<Device> {
        self.block.device()
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.block.bytes()
    }
}

/// Memory of the host that a device reads and writes by itself, without the processor; zeros at first.
pub struct PinnedBlock {
    device: Arc<Device>,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its memory like a Box<[u8]>.
unsafe impl Send for PinnedBlock {}
// SAFETY: as above; shared access only reads.
unsafe impl Sync for PinnedBlock {}

impl PinnedBlock {
    /// `bytes` bytes of `what`. Fails with `OutOfMemory`.
    pub fn new(device: &Arc<Device>, what: &str, bytes: usize) -> Result<PinnedBlock> {
        let start = device.enter()?.allocate_pinned(what, bytes)?;
        let start = NonNull::new(start).ok_or_else(|| Error::out_of_memory(what, bytes))?;
        // SAFETY: the driver gave that many bytes.
        unsafe { start.write_bytes(0, bytes) };
        Ok(PinnedBlock { device: Arc::clone(device), start, bytes })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// All its bytes. The device writes none of them: whoever has it do so waits first.
    pub fn as_slice(&self) -> &[u8] {
        // SAFETY: that many initialised bytes, owned by self.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// All its bytes, for writing. The device reads none of them: as above.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }

    /// Enqueues a copy of its first `bytes` bytes to the device. Panics where it has fewer.
    ///
    /// # Safety
    /// Until the stream has come past the copy nobody writes or frees this, or uses `to`, which has room.
    pub unsafe fn send(&self, current: &Current, bytes: usize, to: Address) -> Result<()> {
        assert!(bytes <= self.bytes);
        // SAFETY: the caller's promise.
        unsafe { current.copy_to_device(to, self.start.as_ptr(), bytes) }
    }

    /// The same of some of its bytes.
    ///
    /// # Safety
    /// As `send`.
    pub unsafe fn send_part(&self, current: &Current, part: Range<usize>, to: Address) -> Result<()> {
        let bytes = &self.as_slice()[part];
        // SAFETY: the caller's promise.
        unsafe { current.copy_to_device(to, bytes.as_ptr(), bytes.len()) }
    }

    /// Enqueues a copy from the device into the bytes from `offset` on. Panics where it has fewer.
    ///
    /// # Safety
    /// Until the stream has come past the copy nobody reads, writes or frees this, or writes `from`, which has as many.
    pub unsafe fn fetch(&mut self, current: &Current, offset: usize, from: Address, bytes: usize) -> Result<()> {
        assert!(offset <= self.bytes && bytes <= self.bytes - offset);
        // SAFETY: the caller's promise; the offset is inside.
        unsafe { current.copy_to_host(self.start.as_ptr().add(offset), from, bytes) }
    }
}

impl Drop for PinnedBlock {
    fn drop(&mut self) {
        if let Some(current) = self.device.enter_to_free() {
            // SAFETY: allocated by `new`, freed once; whoever enqueued work on it has waited.
            unsafe { current.free_pinned(self.start.as_ptr()) };
        }
    }
}

/// A point in a stream that can be waited for.
pub struct Mark {
    device: Arc<Device>,
    event: Event,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Mark {}
// SAFETY: as above.
unsafe impl Sync for Mark {}

impl Mark {
    /// One that was never set: waiting for it takes no time.
    pub fn new(device: &Arc<Device>) -> Result<Mark> {
        let event = device.enter()?.create_event()?;
        Ok(Mark { device: Arc::clone(device), event })
    }

    /// Moves it behind everything enqueued on the stream up to now.
    pub fn set(&mut self, current: &Current) -> Result<()> {
        // SAFETY: an event of this device's context.
        unsafe { current.record(self.event) }
    }

    /// Waits until the stream has come past it.
    pub fn wait(&self, current: &Current) -> Result<()> {
        // SAFETY: as above.
        unsafe { current.wait_for(self.event) }
    }
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Some(current) = self.device.enter_to_free() {
            // SAFETY: created by `new`, destroyed once.
            unsafe { current.destroy_event(self.event) };
        }
    }
}
