//! Pointers from C, checked as far as a pointer can be: not NULL, aligned, of a size that can exist.

use std::ffi::{CStr, c_char};
use std::path::PathBuf;

use crate::error::{Error, Result, Status};
use crate::platform;

fn null(name: &str) -> Error {
    Error::new(Status::NullArgument, format!("{name} is NULL")).at_key(name)
}

/// Where a result goes; known not to be NULL.
pub struct Out<T>(*mut T);

impl<T> Out<T> {
    /// # Safety
    /// `pointer` is NULL or writable for one T.
    pub unsafe fn new(pointer: *mut T, name: &str) -> Result<Self> {
        if pointer.is_null() { Err(null(name)) } else { Ok(Out(pointer)) }
    }

    /// Writes the result.
    pub fn set(self, value: T) {
        // SAFETY: checked not NULL and promised writable in `new`; unaligned because C may give any address.
        unsafe { self.0.write_unaligned(value) }
    }
}

/// `length` elements for reading; `pointer` may be NULL if there are none.
///
/// # Safety
/// If not NULL, `pointer` is readable for `length` elements, unchanged by others, for `'a`.
pub unsafe fn slice<'a, T>(pointer: *const T, length: usize, name: &str) -> Result<&'a [T]> {
    if length == 0 {
        return Ok(&[]);
    }
    check_array(pointer, length, name)?;
    // SAFETY: not NULL, aligned and of a possible size (checked), readable by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(pointer, length) })
}

/// `length` elements for writing; `pointer` may be NULL if there are none.
///
/// # Safety
/// If not NULL, `pointer` is writable for `length` initialised elements, unused by others, for `'a`.
pub unsafe fn slice_mut<'a, T>(pointer: *mut T, length: usize, name: &str) -> Result<&'a mut [T]> {
    if length == 0 {
        return Ok(&mut []);
    }
    check_array(pointer, length, name)?;
    // SAFETY: not NULL, aligned and of a possible size (checked), writable by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(pointer, length) })
}

fn check_array<T>(pointer: *const T, length: usize, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(null(name));
    }
    let bytes = length.checked_mul(size_of::<T>()).filter(|bytes| *bytes <= isize::MAX as usize);
    if bytes.is_none() || !pointer.is_aligned() {
        let text = format!("{name} is not an array of {length} elements: it is misaligned or impossibly long");
        return Err(Error::new(Status::InvalidArgument, text).at_key(name));
    }
    Ok(())
}

/// `length` bytes of UTF-8; `pointer` may be NULL if there are none.
///
/// # Safety
/// As `slice`.
pub unsafe fn text<'a>(pointer: *const c_char, length: usize, name: &str) -> Result<&'a str> {
    // SAFETY: the caller's promises.
    let bytes = unsafe { slice(pointer.cast::<u8>(), length, name)? };
    utf8(bytes, name)
}

/// A NUL-terminated string of UTF-8.
///
/// # Safety
/// `pointer` is NULL or a NUL-terminated string that stays unchanged for `'a`.
pub unsafe fn string<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: not NULL, NUL-terminated by the caller's promise.
    utf8(unsafe { CStr::from_ptr(pointer) }.to_bytes(), name)
}

fn utf8<'a>(bytes: &'a [u8], name: &str) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| {
        let text = format!("{name} is not valid UTF-8 at byte {}", error.valid_up_to());
        Error::new(Status::InvalidUtf8, text).at_key(name)
    })
}

/// An error if a flag is set that the function does not know.
pub fn check_flags(flags: u32, known: u32) -> Result<()> {
    match flags & !known {
        0 => Ok(()),
        _ => Err(Error::new(Status::InvalidArgument, format!("flags is {flags}, known are {known}")).at_key("flags")),
    }
}

/// A path: NUL-terminated, UTF-8 where the system has no bytes.
///
/// # Safety
/// `pointer` is NULL or a NUL-terminated string.
pub unsafe fn path(pointer: *const c_char, name: &str) -> Result<PathBuf> {
    if pointer.is_null() {
        return Err(null(name));
    }
    // SAFETY: not NULL, NUL-terminated by the caller's promise; the bytes are copied before this returns.
    let bytes = unsafe { CStr::from_ptr(pointer) }.to_bytes();
    platform::path_from_bytes(bytes)
        .ok_or_else(|| Error::new(Status::InvalidUtf8, format!("{name} is not valid UTF-8")).at_key(name))
}

/// Copies `items` into the host's array and says how many there are; with no array at all, only says how many.
///
/// # Safety
/// `array` is NULL or writable for `capacity` elements; `count_out` is NULL or writable.
pub unsafe fn copy_out<T: Copy>(
    items: &[T],
    array: *mut T,
    capacity: usize,
    count_out: *mut usize,
    name: &str,
) -> Result<()> {
    // SAFETY: the caller's promises.
    let (array, count_out) = unsafe { (slice_mut(array, capacity, name)?, Out::new(count_out, "count_out")?) };
    count_out.set(items.len());
    if capacity == 0 {
        return Ok(());
    }
    match array.get_mut(..items.len()) {
        Some(array) => array.copy_from_slice(items),
        None => {
            let text = format!("{name} has room for {capacity} elements, {} are needed", items.len());
            return Err(Error::new(Status::BufferTooSmall, text).at_key(name));
        }
    }
    Ok(())
}
