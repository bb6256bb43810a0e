//! Ctrl-C, and other wishes that the program end: work that can be cancelled is, so that it leaves nothing half done behind.

use std::sync::{Arc, Mutex, Once, PoisonError};

use gemmoe::Progress;

/// What an interrupted program ends with, as shells have it.
const INTERRUPTED: i32 = 130;

/// The work in progress.
static WORK: Mutex<Option<Arc<Progress>>> = Mutex::new(None);

fn set(work: Option<Arc<Progress>>) -> Option<Arc<Progress>> {
    std::mem::replace(&mut *WORK.lock().unwrap_or_else(PoisonError::into_inner), work)
}

/// Does work that the first interrupt cancels; the second ends the program.
pub fn cancelling<T>(progress: &Arc<Progress>, work: impl FnOnce() -> T) -> T {
    static HANDLER: Once = Once::new();
    HANDLER.call_once(|| {
        // Without a handler an interrupt ends the program at once, as it did before.
        let _ = ctrlc::set_handler(|| match set(None) {
            Some(progress) => progress.cancel(),
            None => std::process::exit(INTERRUPTED),
        });
    });
    set(Some(Arc::clone(progress)));
    let result = work();
    set(None);
    result
}
