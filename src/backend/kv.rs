//! The layout of key and value memory: pages of a few positions, each holding all layers of them.

use crate::error::{Error, Result, Status};
use crate::memory::Buffer;
use crate::model::Config;

/// Positions in one page.
pub const PAGE_TOKENS: usize = 16;

/// What a page's layout depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// num_hidden_layers
    pub layers: usize,
    /// num_key_value_heads
    pub heads: usize,
    /// Width of one head.
    pub head_dim: usize,
}

/// Which half of a layer's cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvHalf {
    /// Keys, after RoPE.
    Key = 0,
    /// Values.
    Value = 1,
}

impl KvGeometry {
    /// The geometry of a model.
    pub fn of(config: &Config) -> Self {
        KvGeometry { layers: config.num_hidden_layers, heads: config.num_key_value_heads, head_dim: config.head_dim }
    }

    /// Elements of one page: `[layers][key, value][heads][PAGE_TOKENS][head_dim]`, so that one head's positions
    /// are read as one stream.
    pub fn page_elements(&self) -> usize {
        self.layers * 2 * self.heads * PAGE_TOKENS * self.head_dim
    }

    /// First element of a head's `[PAGE_TOKENS][head_dim]` block in a page.
    pub fn block(&self, layer: usize, half: KvHalf, head: usize) -> usize {
        ((layer * 2 + half as usize) * self.heads + head) * PAGE_TOKENS * self.head_dim
    }

    /// Pages that hold `tokens` positions.
    pub fn pages_for(tokens: usize) -> usize {
        tokens.div_ceil(PAGE_TOKENS)
    }
}

/// The memory of one page, on the device of the backend that made it.
pub enum KvPage {
    /// f32 in host memory.
    Host(Buffer<f32>),
}

impl KvPage {
    /// A page of zeros in host memory.
    pub fn host(geometry: &KvGeometry) -> Result<Self> {
        Ok(KvPage::Host(Buffer::zeroed("a page of keys and values", geometry.page_elements())?))
    }

    /// The page's elements, for a backend that computes in host memory.
    pub fn as_host(&self) -> &[f32] {
        match self {
            KvPage::Host(buffer) => buffer,
        }
    }

    /// The page's elements for writing, for a backend that computes in host memory.
    pub fn as_host_mut(&mut self) -> &mut [f32] {
        match self {
            KvPage::Host(buffer) => buffer,
        }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        match self {
            KvPage::Host(buffer) => buffer.bytes(),
        }
    }
}

/// The error of a pass that would write a page somebody else can see.
pub fn shared_page() -> Error {
    Error::new(Status::Internal, "a page about to be written is shared with another session")
}
