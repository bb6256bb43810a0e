//! A thread that cancels calls from outside.
#![allow(dead_code)] // Each test file uses its own part.

use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use gemmoe::backend::Cancel;

/// Cancels what it is told to, a moment later. It allocates nothing once it runs, so that tests can count.
pub struct Canceller {
    shared: Arc<(Mutex<Order>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Order {
    /// What to cancel, and how long to wait before.
    wanted: Option<(Arc<Cancel>, Duration)>,
    /// When it was.
    requested: Option<Instant>,
    over: bool,
}

impl Canceller {
    /// A thread that ends when this is dropped.
    pub fn start() -> Canceller {
        let shared: Arc<(Mutex<Order>, Condvar)> = Arc::default();
        let served = Arc::clone(&shared);
        Canceller { shared, thread: Some(std::thread::spawn(move || serve(&served.0, &served.1))) }
    }

    /// Runs `call` with a cancel on its way, if `after` says when. No cancel is left over.
    pub fn around<T>(&self, cancel: &Arc<Cancel>, after: Option<Duration>, call: impl FnOnce() -> T) -> T {
        match after {
            None => call(),
            Some(after) => self.timed(cancel, after, call).0,
        }
    }

    /// Runs `call` with a cancel on its way; tells how long it went on after that.
    pub fn timed<T>(&self, cancel: &Arc<Cancel>, after: Duration, call: impl FnOnce() -> T) -> (T, Duration) {
        let (order, change) = &*self.shared;
        order.lock().unwrap().wanted = Some((Arc::clone(cancel), after));
        change.notify_all();
        let result = call();
        let returned = Instant::now();
        let mut order = change.wait_while(order.lock().unwrap(), |order| order.requested.is_none()).unwrap();
        let requested = order.requested.take().unwrap();
        cancel.take();
        (result, returned.saturating_duration_since(requested))
    }
}

impl Drop for Canceller {
    fn drop(&mut self) {
        let (order, change) = &*self.shared;
        order.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).over = true;
        change.notify_all();
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn serve(order: &Mutex<Order>, change: &Condvar) {
    loop {
        let waiting = |order: &mut Order| order.wanted.is_none() && !order.over;
        let Some((cancel, after)) = change.wait_while(order.lock().unwrap(), waiting).unwrap().wanted.take() else {
            return;
        };
        let start = Instant::now();
        while start.elapsed() < after {
            std::hint::spin_loop();
        }
        let requested = Instant::now();
        cancel.request();
        order.lock().unwrap().requested = Some(requested);
        change.notify_all();
    }
}
