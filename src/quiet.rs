//! The library prints nothing, not even when it panics: its panics become statuses at the C boundary.
//!
//! The panic hook is one for all Rust code that shares this copy of the standard library. Ours is put in front of
//! the one it finds and only swallows messages of threads that are inside a call of this library.

use std::cell::Cell;
use std::panic;
use std::sync::Once;

thread_local! {
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// As long as it lives, panics of this thread print nothing.
pub struct Quiet(());

impl Quiet {
    /// Enters the library on this thread.
    pub fn enter() -> Quiet {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                if DEPTH.get() == 0 {
                    previous(info);
                }
            }));
        });
        DEPTH.set(DEPTH.get() + 1);
        Quiet(())
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        DEPTH.set(DEPTH.get() - 1);
    }
}

/// What a caught panic said.
pub fn panic_text(payload: &(dyn std::any::Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}
