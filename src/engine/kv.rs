//! Sequences' pages of keys and values: reserved ahead, shared by forks, counted against the model's limit.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::backend::kv::{KvGeometry, PAGE_TOKENS};
use crate::backend::{Backend, KvDtype, KvPage};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;

/// Bytes of keys and values that all sessions of a model hold, and how many they may.
#[derive(Debug)]
pub struct KvAccount {
    limit: Option<usize>,
    used: AtomicUsize,
}

impl KvAccount {
    /// An account of nothing yet; no limit if `None`.
    pub fn new(limit: Option<usize>) -> Self {
        KvAccount { limit, used: AtomicUsize::new(0) }
    }

    /// Bytes held now.
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes `bytes`, or fails with `KvLimit` and takes nothing.
    pub(super) fn take(&self, bytes: usize) -> Result<()> {
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|sum| self.limit.is_none_or(|limit| *sum <= limit))
        });
        taken.map(drop).map_err(|used| {
            let limit = self.limit.unwrap_or(usize::MAX);
            let text =
                format!("{bytes} bytes of keys and values are wanted, {used} of the model's limit of {limit} are used");
            Error::new(Status::KvLimit, text).at_key("kv_limit_bytes")
        })
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The page table of one sequence, reserved for its whole context when it is made, so that a step cannot run out.
///
/// Pages are counted references. A fork shares those that are full, and a page that others see is never written:
/// `own_from` replaces it first. So only `fork` and what rewinds into shared pages need memory, and can fail.
pub struct KvPages {
    pages: Vec<Arc<KvPage>>,
    dtype: KvDtype,
    account: Arc<KvAccount>,
}

impl KvPages {
    /// Pages for `context` positions, stored as `dtype`. Fails with `KvLimit` or `OutOfMemory`.
    pub fn new(backend: &dyn Backend, account: &Arc<KvAccount>, dtype: KvDtype, context: usize) -> Result<Self> {
        let count = KvGeometry::pages_for(context);
        let pages = try_with_capacity("a page table", count)?;
        let mut table = KvPages { pages, dtype, account: Arc::clone(account) };
        table.add_fresh(backend, count)?;
        Ok(table)
    }

    /// The pages of a second sequence that holds the first `positions` of this one: full pages are shared, the one
    /// with the last position is copied, so that either sequence may run that position again; the rest are its own.
    /// Fails with `KvLimit` or `OutOfMemory`.
    pub fn fork(&self, backend: &dyn Backend, positions: usize) -> Result<Self> {
        let full = positions.saturating_sub(1) / PAGE_TOKENS;
        let mut pages = try_with_capacity("a page table", self.pages.len())?;
        pages.extend(self.pages[..full].iter().cloned());
        let mut table = KvPages { pages, dtype: self.dtype, account: Arc::clone(&self.account) };
        table.add_fresh(backend, self.pages.len() - full)?;
        if positions > 0 {
            table.copy_page(full, &self.pages[full])?;
        }
        Ok(table)
    }

    /// Makes every page that holds a position from `position` on this sequence's alone, keeping the first `held` positions:
    /// up to `position`, or one more. Fails with `KvLimit`, `OutOfMemory`, or as the device does, having changed nothing that
    /// the pages say.
    pub fn own_from(&mut self, backend: &dyn Backend, position: usize, held: usize) -> Result<()> {
        let first = position / PAGE_TOKENS;
        let is_shared = |page: &mut Arc<KvPage>| Arc::get_mut(page).is_none();
        let shared = self.pages[first..].iter_mut().map(is_shared).filter(|shared| *shared).count();
        if shared == 0 {
            return Ok(());
        }
        let pages = try_with_capacity("a page table", shared)?;
        let mut fresh = KvPages { pages, dtype: self.dtype, account: Arc::clone(&self.account) };
        fresh.add_fresh(backend, shared)?;
        for at in first..self.pages.len() {
            // Another sequence may have given a page up meanwhile: then a fresh one is left over.
            if is_shared(&mut self.pages[at])
                && let Some(page) = fresh.pages.pop()
            {
                let old = std::mem::replace(&mut self.pages[at], page);
                if held > at * PAGE_TOKENS
                    && let Err(error) = self.copy_page(at, &old)
                {
                    // The old page still says what it said.
                    fresh.pages.push(std::mem::replace(&mut self.pages[at], old));
                    return Err(error);
                }
                self.release(old);
            }
        }
        Ok(())
    }

    /// The pages, in the order of their positions.
    pub fn pages(&self) -> &[Arc<KvPage>] {
        &self.pages
    }

    /// The pages, in the order of their positions.
    pub fn pages_mut(&mut self) -> &mut [Arc<KvPage>] {
        &mut self.pages
    }

    /// How they are stored.
    pub fn dtype(&self) -> KvDtype {
        self.dtype
    }

    /// Size in bytes, pages shared with others included.
    pub fn bytes(&self) -> usize {
        self.pages.iter().map(|page| page.geometry().page_bytes()).sum()
    }

    fn add_fresh(&mut self, backend: &dyn Backend, count: usize) -> Result<()> {
        for _ in 0..count {
            let page = backend.new_kv_page(self.dtype)?;
            self.account.take(page.geometry().page_bytes())?;
            self.pages.push(Arc::new(page));
        }
        Ok(())
    }

    /// Copies a page's contents to this table's page `at`, which nobody shares.
    fn copy_page(&mut self, at: usize, from: &KvPage) -> Result<()> {
        Arc::get_mut(&mut self.pages[at]).map_or(Ok(()), |page| page.copy_from(from))
    }

    fn release(&self, page: Arc<KvPage>) {
        // Whoever lets the last reference go gives the bytes back.
        if let Some(page) = Arc::into_inner(page) {
            self.account.give_back(page.geometry().page_bytes());
        }
    }
}

impl Drop for KvPages {
    fn drop(&mut self) {
        for page in std::mem::take(&mut self.pages) {
            self.release(page);
        }
    }
}
