//! The boundary no panic crosses, and what a caught one does to the object it happened in.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use super::error::{ErrorObject, GemmoeError};
use super::handles;
use crate::error::{Error, Result, Status};
use crate::quiet::{Quiet, panic_text};

/// Runs the body of an export: errors and panics become a status and, where the host asked for one, an error object.
///
/// # Safety
/// `error_out` is NULL or points to a pointer the host lets this call write.
pub unsafe fn guard(error_out: *mut *mut GemmoeError, body: impl FnOnce() -> Result<()>) -> Status {
    // SAFETY: the caller's promise.
    unsafe { guard_poll(error_out, || body().map(Poll::Ready)) }
}

/// As `guard`, for a body that a budget may stop: `Pending` becomes NEED_MORE, which is no error.
///
/// # Safety
/// As for `guard`.
pub unsafe fn guard_poll(error_out: *mut *mut GemmoeError, body: impl FnOnce() -> Result<Poll<()>>) -> Status {
    let _quiet = Quiet::enter();
    let outcome = catch_panic(|| handles::check_process().and_then(|()| body()));
    let (status, error) = match outcome {
        Ok(Poll::Ready(())) => (Status::Ok, None),
        Ok(Poll::Pending) => (Status::NeedMore, None),
        Err(error) => (error.status(), Some(error)),
    };
    if !error_out.is_null() {
        let handle = error.and_then(|error| handles::insert(ErrorObject::new(error)).ok());
        // SAFETY: not NULL, so writable by the caller's promise; written unaligned because C may give any address.
        unsafe { error_out.write_unaligned(handle.unwrap_or(std::ptr::null_mut())) };
    }
    status
}

/// Runs the body of an export that reports no error object.
pub fn guard_status(body: impl FnOnce() -> Result<()>) -> Status {
    // SAFETY: a NULL error_out is always allowed.
    unsafe { guard(std::ptr::null_mut(), body) }
}

/// A panic in `body`, as an error.
fn catch_panic<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    // Unwind safety: what a panic leaves half-changed is either dropped here or poisoned by `Poison::watch`.
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
        let text = format!("a defect of gemmoe was caught: {}", panic_text(&*payload));
        Err(Error::new(Status::Internal, text))
    })
}

/// Whether a panic has left an object unusable.
#[derive(Default)]
pub struct Poison(AtomicBool);

impl Poison {
    /// Runs `body` on a healthy object; a panic in it poisons the object.
    pub fn watch<T>(&self, body: impl FnOnce() -> Result<T>) -> Result<T> {
        self.check()?;
        let result = catch_panic(body);
        if matches!(&result, Err(error) if error.status() == Status::Internal) {
            self.set();
        }
        result
    }

    /// An error if the object is unusable.
    pub fn check(&self) -> Result<()> {
        match self.0.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(Error::new(Status::Poisoned, "an earlier internal error left this object unusable")),
        }
    }

    /// Makes the object unusable.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_status_and_poisons_its_object() {
        let poison = Poison::default();
        assert!(poison.watch(|| Ok(())).is_ok());
        let status = guard_status(|| poison.watch(|| panic!("planted")));
        assert_eq!(status, Status::Internal);
        assert_eq!(poison.watch(|| Ok(())).unwrap_err().status(), Status::Poisoned);
    }

    #[test]
    fn an_error_becomes_an_object_that_says_where_it_happened() {
        let mut handle = std::ptr::null_mut();
        let fail = || Err(Error::new(Status::TensorShape, "too small").in_file("a.safetensors").at_key("w"));
        // SAFETY: `handle` is a local this call may write.
        assert_eq!(unsafe { guard(&mut handle, fail) }, Status::TensorShape);
        let object = handles::find::<ErrorObject>(handle, "error").unwrap();
        assert_eq!(object.text().to_str().unwrap(), "a.safetensors: too small");
        drop(object);
        handles::remove::<ErrorObject>(handle, "error").unwrap();
        assert_eq!(handles::find::<ErrorObject>(handle, "error").err().unwrap().status(), Status::StaleHandle);
    }
}
