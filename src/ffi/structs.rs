//! Structs of the C ABI grow at their end. Each begins with its size in the host's header, which tells both sides what
//! the other knows.

use crate::error::{Error, Result, Status};

/// A struct of the C ABI.
///
/// # Safety
/// The type is `repr(C)`, begins with `struct_size: u32`, has no padding, and any bits are a value.
pub unsafe trait Versioned: Copy {
    /// Its name in the header.
    const NAME: &'static str;
    /// Its size in the first header that had it.
    const FIRST_SIZE: usize;
    /// All bytes 0.
    fn zeroed() -> Self {
        // SAFETY: any bits are a value.
        unsafe { std::mem::zeroed() }
    }
}

/// The options a host passes; NULL means all defaults, which is what zeros mean.
///
/// # Safety
/// `pointer` is NULL or readable for as many bytes as its `struct_size` says.
pub unsafe fn read<T: Versioned>(pointer: *const T, name: &str) -> Result<T> {
    let mut value = T::zeroed();
    if pointer.is_null() {
        return Ok(value);
    }
    // SAFETY: the caller's promise covers `size` bytes.
    let (size, known) = unsafe {
        let size = struct_size::<T>(pointer, name)?;
        let tail = std::slice::from_raw_parts(pointer.cast::<u8>(), size).get(size_of::<T>()..).unwrap_or_default();
        if tail.iter().any(|byte| *byte != 0) {
            let text = format!("{name} is a {} of a later version and uses fields this library does not know", T::NAME);
            return Err(Error::new(Status::StructSize, text).at_key(name));
        }
        (size, size.min(size_of::<T>()))
    };
    debug_assert!(known <= size);
    // SAFETY: `known` bytes are readable at `pointer` and writable in `value`, of which any bits are a value.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    Ok(value)
}

/// Fills a struct the host passes, as far as its version goes; what it knows beyond ours becomes 0.
///
/// # Safety
/// `pointer` is NULL or writable for as many bytes as its `struct_size` says.
pub unsafe fn write<T: Versioned>(pointer: *mut T, value: &T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(Error::new(Status::NullArgument, format!("{name} is NULL")).at_key(name));
    }
    // SAFETY: the caller's promise covers `size` bytes; the first four, the size itself, are left as they are.
    unsafe {
        let size = struct_size::<T>(pointer, name)?;
        let known = size.min(size_of::<T>());
        let target = pointer.cast::<u8>();
        target.add(4).write_bytes(0, size - 4);
        std::ptr::copy_nonoverlapping((&raw const *value).cast::<u8>().add(4), target.add(4), known - 4);
    }
    Ok(())
}

/// # Safety
/// `pointer` is readable for four bytes.
unsafe fn struct_size<T: Versioned>(pointer: *const T, name: &str) -> Result<usize> {
    const LARGEST: usize = 4096;
    // SAFETY: the caller's promise; unaligned because C may give any address.
    let size = unsafe { pointer.cast::<u32>().read_unaligned() } as usize;
    if !(T::FIRST_SIZE..=LARGEST).contains(&size) {
        let text =
            format!("{name}.struct_size is {size}, a {} has {}: set it by the init macro", T::NAME, size_of::<T>());
        return Err(Error::new(Status::StructSize, text).at_key("struct_size"));
    }
    Ok(size)
}

/// An error if a reserved field is not 0.
pub fn check_reserved(reserved: &[u64], name: &str) -> Result<()> {
    match reserved.iter().all(|value| *value == 0) {
        true => Ok(()),
        false => Err(Error::new(Status::StructSize, format!("{name}.reserved is not 0")).at_key("reserved")),
    }
}
