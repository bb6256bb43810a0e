//! Ctrl-C, and other wishes that the program end: work that can be cancelled is, so that it leaves nothing half done behind.

use std::sync::{Arc, Mutex, Once, PoisonError};

use gemmoe::Progress;

/// What an interrupted program ends with, as shells have it.
const INTERRUPTED: i32 = 130;

/// What stops the work in progress.
type Stop = Box<dyn Fn() + Send>;

static STOP: Mutex<Option<Stop>> = Mutex::new(None);

fn set(stop: Option<Stop>) -> Option<Stop> {
    std::mem::replace(&mut *STOP.lock().unwrap_or_else(PoisonError::into_inner), stop)
}

/// Does work that the first interrupt cancels; the second ends the program.
pub fn cancelling<T>(progress: &Arc<Progress>, work: impl FnOnce() -> T) -> T {
    let progress = Arc::clone(progress);
    stopping(Box::new(move || progress.cancel()), work)
}

/// The same of work that `stop` stops.
pub fn stopping<T>(stop: Stop, work: impl FnOnce() -> T) -> T {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // Without a handler an interrupt ends the program at once, as it did before.
        let _ = ctrlc::set_handler(|| match set(None) {
            Some(stop) => stop(),
            None => std::process::exit(INTERRUPTED),
        });
    });
    set(Some(stop));
    let result = work();
    set(None);
    result
}
