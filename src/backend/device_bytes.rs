//! Memory on a device that the host does not compute on.

use crate::error::Result;

/// A block of bytes on a device.
///
/// All calls wait for the work on the device that came before them. They fail as the device does.
pub trait DeviceBytes: Send + Sync {
    /// Where it is, for the device's own kernels.
    fn address(&self) -> u64;

    /// Copies all its bytes to `out`, which has as many.
    fn read(&self, out: &mut [u8]) -> Result<()>;

    /// Replaces all its bytes.
    fn write(&mut self, bytes: &[u8]) -> Result<()>;

    /// Becomes a copy of as many bytes at an address of the same device.
    fn copy_from(&mut self, address: u64) -> Result<()>;
}
