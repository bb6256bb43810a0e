//! The layout of key and value memory: pages of a few positions, each holding all layers of them.
//!
//! A page is one block of bytes, aligned to a cache line: elements `[layers][key, value][heads][PAGE_TOKENS][head_dim]`
//! in the dtype, so that one head's positions are read as one stream. For int8 there follow f32 scales
//! `[layers][key, value][heads][PAGE_TOKENS]`: an element is its i8 times the scale of its head and position.
//! This file is the only one that knows.

use std::ops::Range;

use half::{bf16, f16};

use super::device_bytes::DeviceBytes;
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, Plain, view, view_mut};
use crate::model::Config;

/// Positions in one page.
pub const PAGE_TOKENS: usize = 16;

/// How keys and values are stored. What each does to a number is in `cpu/kernels/store.rs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// As they were computed.
    F32,
    /// bfloat16: a relative error up to 2^-8.
    Bf16,
    /// Half precision: a relative error up to 2^-11, numbers past 65504 as 65504.
    F16,
    /// Eight bits and a scale per head and position: an error up to 1/254 of the largest of the head's elements.
    Int8,
}

impl KvDtype {
    /// All of them.
    pub const ALL: [KvDtype; 4] = [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Int8];

    /// The default for a model whose embedding has this dtype, one that weights can have.
    pub fn of_weights(dtype: safetensors::Dtype) -> KvDtype {
        match dtype {
            safetensors::Dtype::BF16 => KvDtype::Bf16,
            safetensors::Dtype::F16 => KvDtype::F16,
            _ => KvDtype::F32,
        }
    }

    /// Its name, for people.
    pub fn name(self) -> &'static str {
        match self {
            KvDtype::F32 => "f32",
            KvDtype::Bf16 => "bf16",
            KvDtype::F16 => "f16",
            KvDtype::Int8 => "int8",
        }
    }

    /// Bytes of one element, int8's scales apart.
    pub fn bytes_per_element(self) -> usize {
        match self {
            KvDtype::F32 => 4,
            KvDtype::Bf16 | KvDtype::F16 => 2,
            KvDtype::Int8 => 1,
        }
    }

    /// Bytes of the scale of one head's elements at one position.
    fn bytes_per_scale(self) -> usize {
        match self {
            KvDtype::F32 | KvDtype::Bf16 | KvDtype::F16 => 0,
            KvDtype::Int8 => size_of::<f32>(),
        }
    }
}

/// The Rust type of a dtype's elements.
pub trait KvElement: Plain {
    /// The dtype.
    const DTYPE: KvDtype;
}

impl KvElement for f32 {
    const DTYPE: KvDtype = KvDtype::F32;
}
impl KvElement for bf16 {
    const DTYPE: KvDtype = KvDtype::Bf16;
}
impl KvElement for f16 {
    const DTYPE: KvDtype = KvDtype::F16;
}
impl KvElement for i8 {
    const DTYPE: KvDtype = KvDtype::Int8;
}

/// What a page's layout depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// num_hidden_layers
    pub layers: usize,
    /// num_key_value_heads
    pub heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Of the elements.
    pub dtype: KvDtype,
}

/// Which half of a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvHalf {
    /// Keys, after RoPE.
    Key = 0,
    /// Values.
    Value = 1,
}

/// One head's part of a page: elements `[PAGE_TOKENS][head_dim]` and, for int8, scales `[PAGE_TOKENS]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvBlock {
    /// Layer.
    pub layer: usize,
    /// Keys or values.
    pub half: KvHalf,
    /// Key-value head.
    pub head: usize,
}

impl KvGeometry {
    /// The geometry of a model's pages in `dtype`.
    pub fn of(config: &Config, dtype: KvDtype) -> Self {
        KvGeometry {
            layers: config.num_hidden_layers,
            heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            dtype,
        }
    }

    /// Whether both are geometries of the same model, in whatever dtypes.
    pub fn same_model(&self, other: &KvGeometry) -> bool {
        *self == KvGeometry { dtype: self.dtype, ..*other }
    }

    /// Bytes of one page.
    pub fn page_bytes(&self) -> usize {
        self.packed_bytes(PAGE_TOKENS)
    }

    /// Bytes of keys and values of one position.
    pub fn bytes_per_token(&self) -> usize {
        self.packed_bytes(1)
    }

    /// Bytes of `slots` positions that `copy_positions_out` packed.
    pub fn packed_bytes(&self, slots: usize) -> usize {
        self.blocks() * slots * (self.row_bytes() + self.dtype.bytes_per_scale())
    }

    /// Pages that hold `tokens` positions.
    pub fn pages_for(tokens: usize) -> usize {
        tokens.div_ceil(PAGE_TOKENS)
    }

    /// Blocks of a page.
    fn blocks(&self) -> usize {
        self.layers * 2 * self.heads
    }

    /// Bytes of one head's elements at one position.
    fn row_bytes(&self) -> usize {
        self.head_dim * self.dtype.bytes_per_element()
    }

    /// A block's place in the order of the layout.
    fn index(&self, block: KvBlock) -> usize {
        assert!(block.layer < self.layers && block.head < self.heads);
        (block.layer * 2 + block.half as usize) * self.heads + block.head
    }

    /// The bytes of block `index`'s elements, where blocks have `slots` positions.
    fn element_bytes(&self, index: usize, slots: usize) -> Range<usize> {
        let length = slots * self.row_bytes();
        index * length..(index + 1) * length
    }

    /// The same of its scales; empty where the dtype has none.
    fn scale_bytes(&self, index: usize, slots: usize) -> Range<usize> {
        let (start, length) = (self.blocks() * slots * self.row_bytes(), slots * self.dtype.bytes_per_scale());
        start + index * length..start + (index + 1) * length
    }
}

/// One page. It knows its layout, so that sequences of different dtypes can share a batch.
pub struct KvPage {
    geometry: KvGeometry,
    memory: Memory,
}

/// Where a page's bytes are: on the device of the backend that made it.
enum Memory {
    Host(Buffer<u8>),
    Device(Box<dyn DeviceBytes>),
}

impl KvPage {
    /// A page of zeros in host memory.
    pub fn host(geometry: &KvGeometry) -> Result<Self> {
        let memory = Memory::Host(Buffer::zeroed("a page of keys and values", geometry.page_bytes())?);
        Ok(KvPage { geometry: *geometry, memory })
    }

    /// A page in the memory of a device.
    pub fn on_device(geometry: &KvGeometry, page: Box<dyn DeviceBytes>) -> Self {
        KvPage { geometry: *geometry, memory: Memory::Device(page) }
    }

    /// Its layout.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Where it is on the device; none in host memory.
    pub fn device_address(&self) -> Option<u64> {
        match &self.memory {
            Memory::Host(_) => None,
            Memory::Device(page) => Some(page.address()),
        }
    }

    /// All its bytes, for a backend that computes in host memory; panics for a page elsewhere.
    pub fn bytes(&self) -> &[u8] {
        match &self.memory {
            Memory::Host(buffer) => buffer,
            Memory::Device(_) => panic!("the page is not in host memory"),
        }
    }

    /// As `bytes`, for writing.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Host(buffer) => buffer,
            Memory::Device(_) => panic!("the page is not in host memory"),
        }
    }

    /// Becomes a copy of a page of the same geometry on the same device; of another it panics. Fails as the device does.
    pub fn copy_from(&mut self, other: &KvPage) -> Result<()> {
        assert_eq!(self.geometry, other.geometry);
        match (&mut self.memory, &other.memory) {
            (Memory::Host(to), Memory::Host(from)) => to.copy_from_slice(from),
            (Memory::Device(to), Memory::Device(from)) => to.copy_from(from.address())?,
            _ => panic!("the pages are not on the same device"),
        }
        Ok(())
    }

    /// A copy of a device's page in host memory.
    fn fetched(&self, page: &dyn DeviceBytes) -> Result<Buffer<u8>> {
        let mut bytes = Buffer::zeroed("a page of keys and values", self.geometry.page_bytes())?;
        page.read(&mut bytes)?;
        Ok(bytes)
    }

    /// A block's elements `[PAGE_TOKENS][head_dim]`. Panics where they are of another type.
    pub fn elements<E: KvElement>(&self, block: KvBlock) -> &[E] {
        assert!(E::DTYPE == self.geometry.dtype);
        view(&self.bytes()[self.geometry.element_bytes(self.geometry.index(block), PAGE_TOKENS)])
    }

    /// As `elements`, writable.
    pub fn elements_mut<E: KvElement>(&mut self, block: KvBlock) -> &mut [E] {
        assert!(E::DTYPE == self.geometry.dtype);
        let range = self.geometry.element_bytes(self.geometry.index(block), PAGE_TOKENS);
        view_mut(&mut self.bytes_mut()[range])
    }

    /// A block's scales `[PAGE_TOKENS]`; empty where the dtype has none.
    pub fn scales(&self, block: KvBlock) -> &[f32] {
        view(&self.bytes()[self.geometry.scale_bytes(self.geometry.index(block), PAGE_TOKENS)])
    }

    /// As `scales`, writable.
    pub fn scales_mut(&mut self, block: KvBlock) -> &mut [f32] {
        let range = self.geometry.scale_bytes(self.geometry.index(block), PAGE_TOKENS);
        view_mut(&mut self.bytes_mut()[range])
    }
}

/// Packs the first `slots` positions of a page into `packed`: the layout of a page, with `slots` for PAGE_TOKENS.
///
/// Panics unless the page is of this geometry and `packed` has `geometry.packed_bytes(slots)` bytes. Fails as the device does.
pub fn copy_positions_out(geometry: &KvGeometry, page: &KvPage, slots: usize, packed: &mut [u8]) -> Result<()> {
    assert_eq!(geometry, page.geometry());
    let ranges = position_ranges(geometry, slots, packed.len());
    let copy = |bytes: &[u8]| ranges.for_each(|(from, to)| packed[to].copy_from_slice(&bytes[from]));
    match &page.memory {
        Memory::Host(bytes) => copy(bytes),
        Memory::Device(memory) => copy(&page.fetched(&**memory)?),
    }
    Ok(())
}

/// Unpacks what `copy_positions_out` packed into the first `slots` positions of a page; the others stay as they are.
///
/// Panics and fails as `copy_positions_out`.
pub fn copy_positions_in(geometry: &KvGeometry, page: &mut KvPage, slots: usize, packed: &[u8]) -> Result<()> {
    assert_eq!(geometry, page.geometry());
    let ranges = position_ranges(geometry, slots, packed.len());
    let copy = |bytes: &mut [u8]| ranges.for_each(|(to, from)| bytes[to].copy_from_slice(&packed[from]));
    let fetched = match &page.memory {
        Memory::Host(_) => None,
        Memory::Device(memory) => Some(page.fetched(&**memory)?),
    };
    match (&mut page.memory, fetched) {
        (Memory::Device(memory), Some(mut bytes)) => {
            copy(&mut bytes);
            memory.write(&bytes)?;
        }
        _ => copy(page.bytes_mut()),
    }
    Ok(())
}

/// Pairs of byte ranges, in a page and packed, that hold the first `slots` positions.
fn position_ranges(
    geometry: &KvGeometry,
    slots: usize,
    packed_bytes: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    assert!(slots <= PAGE_TOKENS && packed_bytes == geometry.packed_bytes(slots));
    let geometry = *geometry;
    (0..geometry.blocks()).flat_map(move |index| {
        let pair = |paged: Range<usize>, packed: Range<usize>| (paged.start..paged.start + packed.len(), packed);
        [
            pair(geometry.element_bytes(index, PAGE_TOKENS), geometry.element_bytes(index, slots)),
            pair(geometry.scale_bytes(index, PAGE_TOKENS), geometry.scale_bytes(index, slots)),
        ]
    })
}

/// The error of a pass that would write a page somebody else can see.
pub fn shared_page() -> Error {
    Error::new(Status::Internal, "a page about to be written is shared with another session")
}
