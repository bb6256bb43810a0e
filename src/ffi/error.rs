//! `gemmoe_error`: what went wrong, owned by the host.

use std::ffi::{CStr, CString, c_char};
use std::sync::Arc;

use super::guard::guard_status;
use super::handles::{self, Held, Object};
use crate::error::{Error, Status};

/// Why a call failed. Made by the failing call, destroyed by the host; never shared with another call.
pub struct GemmoeError {
    _opaque: (),
}

pub struct ErrorObject {
    status: Status,
    text: CString,
    file: Option<CString>,
    key: Option<CString>,
}

impl ErrorObject {
    pub fn new(error: Error) -> Self {
        let c_string = |text: &str| CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default();
        ErrorObject {
            status: error.status(),
            text: c_string(&error.to_string()),
            file: error.file().map(c_string),
            key: error.key().map(c_string),
        }
    }

    pub fn text(&self) -> &CStr {
        &self.text
    }
}

impl Held for ErrorObject {
    type Opaque = GemmoeError;
    const KIND: usize = 8;
    const NAME: &'static str = "gemmoe_error";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Error(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Error(object) = object { Some(object) } else { None }
    }
}

/// A string of an error, NULL if it has none or the handle is not a live error.
fn string_of(error: *const GemmoeError, part: impl FnOnce(&ErrorObject) -> Option<&CStr>) -> *const c_char {
    let mut pointer = std::ptr::null();
    guard_status(|| {
        // The pointer stays good as long as the handle does: the table holds the object.
        pointer = part(&*handles::find::<ErrorObject>(error, "error")?).map_or(std::ptr::null(), CStr::as_ptr);
        Ok(())
    });
    pointer
}

/// The status the failed call returned; the status of the misuse if `error` is not a live error. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_error_status(error: *const GemmoeError) -> Status {
    let mut status = Status::Ok;
    let misuse = guard_status(|| {
        status = handles::find::<ErrorObject>(error, "error")?.status;
        Ok(())
    });
    if misuse == Status::Ok { status } else { misuse }
}

/// A sentence for a person, UTF-8: what was found and what was expected, with file and key. Borrowed from `error`.
/// NULL if `error` is not a live error. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_error_text(error: *const GemmoeError) -> *const c_char {
    string_of(error, |error| Some(&error.text))
}

/// The file the error is about, relative to the model directory; NULL if there is none. Borrowed from `error`.
/// Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_error_file(error: *const GemmoeError) -> *const c_char {
    string_of(error, |error| error.file.as_deref())
}

/// The tensor, JSON key, option or parameter the error is about; NULL if there is none. Borrowed from `error`.
/// Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_error_key(error: *const GemmoeError) -> *const c_char {
    string_of(error, |error| error.key.as_deref())
}

/// Destroys an error. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_error_destroy(error: *mut GemmoeError) -> Status {
    guard_status(|| handles::remove::<ErrorObject>(error, "error"))
}
