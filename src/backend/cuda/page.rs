//! One page of keys and values in device memory.

use std::sync::Arc;

use super::device::Device;
use super::memory::DeviceBlock;
use crate::backend::kv::{KvGeometry, KvPage};
use crate::error::Result;

/// A page of this geometry, uninitialised, since no position is read before it was written. Fails with `DeviceOutOfMemory`.
pub fn new_page(device: &Arc<Device>, geometry: &KvGeometry) -> Result<KvPage> {
    let block = DeviceBlock::new(device, "a page of keys and values", geometry.page_bytes())?;
    Ok(KvPage::on_device(geometry, Box::new(block)))
}
