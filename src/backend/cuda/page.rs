//! One page of keys and values in device memory.

use std::sync::Arc;

use super::device::Device;
use super::memory::DeviceBlock;
use crate::backend::kv::{DevicePage, KvGeometry, KvPage};
use crate::error::Result;

/// The bytes of a page; uninitialised at first, since no position is read before it was written.
struct CudaPage(DeviceBlock);

/// A page of this geometry. Fails with `DeviceOutOfMemory`.
pub fn new_page(device: &Arc<Device>, geometry: &KvGeometry) -> Result<KvPage> {
    let block = DeviceBlock::new(device, "a page of keys and values", geometry.page_bytes())?;
    Ok(KvPage::on_device(geometry, Box::new(CudaPage(block))))
}

impl DevicePage for CudaPage {
    fn address(&self) -> u64 {
        self.0.address()
    }

    fn read(&self, out: &mut [u8]) -> Result<()> {
        self.0.read(out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.0.write(bytes)
    }

    fn copy_from(&mut self, address: u64) -> Result<()> {
        self.0.copy_from(address)
    }
}
