//! A thread that cancels calls from outside.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use gemmoe::backend::Cancel;

/// Cancels what it is told to, a moment later.
pub struct Canceller {
    orders: Sender<(Arc<Cancel>, Duration)>,
    done: Receiver<()>,
}

impl Canceller {
    /// A thread that ends when this is dropped.
    pub fn start() -> Canceller {
        let (orders, waiting) = channel::<(Arc<Cancel>, Duration)>();
        let (answer, done) = channel();
        std::thread::spawn(move || {
            for (cancel, after) in waiting {
                let start = Instant::now();
                while start.elapsed() < after {
                    std::hint::spin_loop();
                }
                cancel.request();
                if answer.send(()).is_err() {
                    return;
                }
            }
        });
        Canceller { orders, done }
    }

    /// Runs `call` with a cancel on its way, if `after` says when. No cancel is left over.
    pub fn around<T>(&self, cancel: &Arc<Cancel>, after: Option<Duration>, call: impl FnOnce() -> T) -> T {
        let Some(after) = after else { return call() };
        self.orders.send((Arc::clone(cancel), after)).unwrap();
        let result = call();
        self.done.recv().unwrap();
        cancel.take();
        result
    }
}
