//! Memory whose size depends on input: every allocation here can fail, and says so.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::Mmap;

use crate::error::{Error, Result};
use crate::platform;

/// Byte alignment of weights and activations: one cache line, and the widest vector.
pub const ALIGNMENT: usize = 64;

/// Buffers at least this large ask for huge pages; below it they would mostly be padding.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// A vector of `length` copies of `value`, or an out-of-memory error naming `what`.
pub fn try_vec<T: Clone>(what: &str, length: usize, value: T) -> Result<Vec<T>> {
    let mut vector = try_with_capacity(what, length)?;
    vector.resize(length, value);
    Ok(vector)
}

/// An empty vector with room for `capacity` elements, or an out-of-memory error naming `what`.
pub fn try_with_capacity<T>(what: &str, capacity: usize) -> Result<Vec<T>> {
    let mut vector = Vec::new();
    vector
        .try_reserve_exact(capacity)
        .map_err(|_| Error::out_of_memory(what, capacity.saturating_mul(size_of::<T>())))?;
    Ok(vector)
}

/// An empty vector in the memory of another, whose elements have the same size: for scratch whose type has a lifetime.
/// Collecting in place keeps the memory.
pub fn recycle<A, B>(mut vector: Vec<A>) -> Vec<B> {
    vector.clear();
    vector.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}

/// Plain old numbers: any bit pattern is a value, and zero bytes are zero.
///
/// # Safety
/// Implementors have no padding, no invalid bit patterns, and no destructor.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}
// SAFETY: primitive numbers satisfy every condition of the trait.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above.
unsafe impl Plain for f64 {}
// SAFETY: transparent wrappers around u16.
unsafe impl Plain for half::bf16 {}
// SAFETY: as above.
unsafe impl Plain for half::f16 {}

/// A fixed-size, owned, 64-byte aligned array of plain numbers.
pub struct Buffer<T: Plain> {
    start: NonNull<T>,
    length: usize,
    /// What the allocator gave, which begins up to ALIGNMENT bytes before `start`; none for an empty buffer.
    block: Option<(NonNull<u8>, Layout)>,
}

// SAFETY: a Buffer owns its memory like a Box<[T]>, and T is Send + Sync.
unsafe impl<T: Plain> Send for Buffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Plain> Sync for Buffer<T> {}

impl<T: Plain> Buffer<T> {
    /// `length` zeros. The system commits pages when they are first touched, in huge pages where it can.
    pub fn zeroed(what: &str, length: usize) -> Result<Self> {
        let too_large = || Error::out_of_memory(what, length.saturating_mul(size_of::<T>()));
        let bytes = length.checked_mul(size_of::<T>()).ok_or_else(too_large)?;
        if bytes == 0 {
            return Ok(Buffer { start: NonNull::dangling(), length: 0, block: None });
        }
        // Asked for with more than the allocator's own alignment, zeroed memory is written to at once, page by small
        // page. Asked for like this, large blocks come untouched from the system, and can still become huge pages.
        let padded = bytes.checked_add(ALIGNMENT).ok_or_else(too_large)?;
        let layout = Layout::from_size_align(padded, align_of::<T>()).map_err(|_| too_large())?;
        // SAFETY: the layout's size is not zero.
        let block = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(too_large)?;
        if bytes >= HUGE_PAGE_BYTES {
            platform::advise_huge_pages(block.as_ptr(), padded);
        }
        let skipped = block.addr().get().wrapping_neg() % ALIGNMENT;
        // SAFETY: `skipped` is below ALIGNMENT, by which the block is longer than `bytes`.
        let start = unsafe { block.add(skipped) }.cast::<T>();
        Ok(Buffer { start, length, block: Some((block, layout)) })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.length * size_of::<T>()
    }

    /// The elements.
    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `start` points to `length` initialised elements owned by self (zero length: dangling is allowed).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.length) }
    }

    /// The elements, writable.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as in `as_slice`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }
}

impl<T: Plain> Drop for Buffer<T> {
    fn drop(&mut self) {
        if let Some((block, layout)) = self.block {
            // SAFETY: the block came from the global allocator with this very layout and is freed once.
            unsafe { dealloc(block.as_ptr(), layout) };
        }
    }
}

impl<T: Plain> std::ops::Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        self.as_slice()
    }
}

impl<T: Plain> std::ops::DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.as_mut_slice()
    }
}

/// Bytes that are never written again: in memory of their own, or in a file that is mapped.
pub enum Bytes {
    /// Memory of their own.
    Owned(Buffer<u8>),
    /// A range of a file.
    Mapped(Arc<Mmap>, Range<usize>),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Owned(buffer) => buffer,
            Bytes::Mapped(file, range) => &file[range.clone()],
        }
    }
}

/// The bytes of a slice of plain numbers.
pub fn as_bytes<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: Plain types have no padding; the length is the slice's size in bytes.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of a slice of plain numbers, writable.
pub fn as_bytes_mut<T: Plain>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: Plain types have no padding and accept any bit pattern; the length is the slice's size in bytes.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Bytes seen as plain numbers. Panics unless they begin at an address and have a length that suit T.
pub fn view<T: Plain>(bytes: &[u8]) -> &[T] {
    // SAFETY: Plain types accept any bit pattern, and `align_to` keeps the address, the length and the alignment right.
    let (before, values, after) = unsafe { bytes.align_to::<T>() };
    assert!(before.is_empty() && after.is_empty(), "bytes that are no whole, aligned numbers");
    values
}

/// As [`view`], writable.
pub fn view_mut<T: Plain>(bytes: &mut [u8]) -> &mut [T] {
    // SAFETY: as in `view`; and whatever T is written is initialised bytes, because Plain types have no padding.
    let (before, values, after) = unsafe { bytes.align_to_mut::<T>() };
    assert!(before.is_empty() && after.is_empty(), "bytes that are no whole, aligned numbers");
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[test]
    fn a_buffer_larger_than_any_memory_is_an_error_and_not_an_abort() {
        let error = Buffer::<f32>::zeroed("a test", usize::MAX / 8).err().unwrap();
        assert_eq!(error.status(), Status::OutOfMemory);
        assert!(Buffer::<f32>::zeroed("a test", usize::MAX).is_err());
        assert!(try_vec("a test", usize::MAX / 16, 0u64).is_err());
    }

    #[test]
    fn a_recycled_vector_keeps_its_memory() {
        let vector: Vec<Option<&u8>> = Vec::with_capacity(7);
        let start = vector.as_ptr().addr();
        let recycled: Vec<usize> = recycle(vector);
        assert_eq!((recycled.as_ptr().addr(), recycled.len(), recycled.capacity()), (start, 0, 7));
    }

    #[test]
    fn buffers_are_aligned_and_zero() {
        let small = Buffer::<u16>::zeroed("a test", 3).unwrap();
        assert_eq!(small.as_ptr() as usize % ALIGNMENT, 0);
        assert_eq!(&small[..], [0, 0, 0]);
        let large = Buffer::<f32>::zeroed("a test", HUGE_PAGE_BYTES).unwrap();
        assert!(large.iter().all(|value| *value == 0.0));
    }

    #[test]
    fn bytes_are_seen_as_numbers_only_where_they_are_whole_and_aligned() {
        let mut buffer = Buffer::<u8>::zeroed("a test", 12).unwrap();
        view_mut::<f32>(&mut buffer[4..8])[0] = 1.5;
        assert_eq!(view::<f32>(&buffer), [0.0, 1.5, 0.0]);
        for range in [1..5, 0..6, 2..6] {
            assert!(std::panic::catch_unwind(|| view::<f32>(&buffer[range]).len()).is_err());
        }
    }
}
