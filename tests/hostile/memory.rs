//! Counts what a thread allocates, to see that refusing a directory takes little memory.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::path::Path;

use crate::case::{CONFIG, INDEX, TOKENIZER, WEIGHTS};

/// What any refusal may take, and how much more for each byte of metadata.
const ALWAYS: usize = 64 << 20;
const FOR_EACH_BYTE: usize = 3;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn count(change: isize) {
    // A thread that is ending has no counters any more; nobody asks for them either.
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + change);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

// SAFETY: every call is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises.
        let start = unsafe { System.alloc(layout) };
        if !start.is_null() {
            count(layout.size() as isize);
        }
        start
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises.
        let start = unsafe { System.alloc_zeroed(layout) };
        if !start.is_null() {
            count(layout.size() as isize);
        }
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(start, layout) }
    }

    unsafe fn realloc(&self, start: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller's promises.
        let moved = unsafe { System.realloc(start, layout, size) };
        if !moved.is_null() {
            // A block may have to be copied: both exist for a moment.
            count(size as isize);
            count(-(layout.size() as isize));
        }
        moved
    }
}

/// Counts this thread from now on.
pub fn start() {
    LIVE.set(0);
    PEAK.set(0);
}

/// The most this thread held at once since `start`.
pub fn peak() -> usize {
    PEAK.get().max(0) as usize
}

/// What refusing a directory may take: its metadata decides, as far as the library parses it at all.
pub fn allowed_to_refuse(directory: &Path) -> usize {
    let length = |file: &str| std::fs::metadata(directory.join(file)).map_or(0, |metadata| metadata.len());
    let parsed = [(CONFIG, 1u64 << 20), (INDEX, 16 << 20), (TOKENIZER, 64 << 20), (WEIGHTS, 16 << 20)];
    let metadata: u64 = parsed.into_iter().map(|(file, most)| length(file).min(most)).sum();
    ALWAYS + FOR_EACH_BYTE * metadata as usize
}
