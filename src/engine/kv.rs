//! A sequence's pages of keys and values.

use std::sync::Arc;

use crate::backend::kv::KvGeometry;
use crate::backend::{Backend, KvDtype, KvPage};
use crate::error::Result;
use crate::memory::try_with_capacity;

/// The page table of one sequence, reserved for its whole context when it is made, so that a step cannot run out.
///
/// Pages are counted references: a fork can share those it does not write. Rewinding needs no work here: positions
/// past the sequence's length are written again before they are read.
pub struct KvPages {
    pages: Vec<Arc<KvPage>>,
}

impl KvPages {
    /// Pages for `context` positions, stored as `dtype`.
    pub fn new(backend: &dyn Backend, dtype: KvDtype, context: usize) -> Result<Self> {
        let count = KvGeometry::pages_for(context);
        let mut pages = try_with_capacity("a page table", count)?;
        for _ in 0..count {
            pages.push(Arc::new(backend.new_kv_page(dtype)?));
        }
        Ok(KvPages { pages })
    }

    /// The pages, in the order of their positions.
    pub fn pages_mut(&mut self) -> &mut [Arc<KvPage>] {
        &mut self.pages
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.pages.iter().map(|page| page.geometry().page_bytes()).sum()
    }
}
