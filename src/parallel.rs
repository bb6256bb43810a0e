//! Work on whole matrices, shared out to threads that are started for it: reading, laying out, rounding. What a pass
//! computes has threads that stay, in `backend/cpu/pool/`.

use std::iter::Enumerate;
use std::panic::resume_unwind;
use std::thread;

use parking_lot::Mutex;

use crate::quiet::Quiet;

/// What is left to do, and the first error in the order of the items.
struct Queue<I, E> {
    items: Enumerate<I>,
    error: Option<(usize, E)>,
}

impl<I: Iterator, E> Queue<I, E> {
    /// The next item and its number; none after an error.
    fn next(&mut self) -> Option<(usize, I::Item)> {
        if self.error.is_some() { None } else { self.items.next() }
    }

    /// Keeps the error of the first item: those before a failed one have been handed out, and may still fail.
    fn fail(&mut self, index: usize, error: E) {
        if self.error.as_ref().is_none_or(|(first, _)| index < *first) {
            self.error = Some((index, error));
        }
    }
}

/// Does `work` with each item, handed out in order to as many as `threads` threads, this one included; one that the system
/// refuses is done without. Each thread has scratch of its own. Returns the error of the first item that failed. A panic on any of
/// the threads goes on here.
pub fn share_out<I, S, E>(
    threads: usize,
    items: I,
    work: impl Fn(&mut S, I::Item) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: ExactSizeIterator + Send,
    S: Default,
    E: Send,
{
    let threads = threads.min(items.len());
    let queue = Mutex::new(Queue { items: items.enumerate(), error: None });
    let take_part = || {
        let mut scratch = S::default();
        loop {
            let next = queue.lock().next();
            let Some((index, item)) = next else { return };
            if let Err(error) = work(&mut scratch, item) {
                queue.lock().fail(index, error);
            }
        }
    };
    thread::scope(|scope| {
        let quiet = || {
            let _quiet = Quiet::enter();
            take_part();
        };
        let others: Vec<_> =
            (1..threads).filter_map(|_| thread::Builder::new().spawn_scoped(scope, quiet).ok()).collect();
        take_part();
        for other in others {
            other.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
    });
    queue.into_inner().error.map_or(Ok(()), |(_, error)| Err(error))
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn every_item_is_done_once_on_any_number_of_threads() {
        for threads in [0, 1, 2, 7, 300] {
            let mut items = vec![0u32; 100];
            let done: Result<(), ()> =
                share_out(threads, items.iter_mut().enumerate(), |scratch: &mut u32, (index, item)| {
                    *scratch += 1;
                    *item += index as u32 + 1;
                    Ok(())
                });
            assert!(done.is_ok() && items.iter().enumerate().all(|(index, item)| *item == index as u32 + 1));
        }
        assert_eq!(share_out(2, [0u8; 0].iter(), |_: &mut (), _| Err("nothing to do")), Ok(()));
    }

    #[test]
    fn of_several_errors_the_first_items_is_returned_and_no_more_is_begun() {
        let (together, begun) = (Barrier::new(2), AtomicUsize::new(0));
        let error = share_out(2, 0..1000usize, |_: &mut (), item| {
            begun.fetch_add(1, Ordering::Relaxed);
            // The first two fail at the same time, the first of them later.
            together.wait();
            if item == 0 {
                thread::sleep(std::time::Duration::from_millis(20));
            }
            Err(item)
        });
        assert_eq!((error, begun.into_inner()), (Err(0), 2));
    }

    #[test]
    fn a_panic_on_any_thread_is_not_lost() {
        for panicking in 0..2usize {
            let together = Barrier::new(2);
            let work = || {
                share_out(2, 0..2usize, |_: &mut (), item| {
                    together.wait();
                    if item == panicking {
                        resume_unwind(Box::new("a test"));
                    }
                    Ok::<(), ()>(())
                })
            };
            let panic = catch_unwind(AssertUnwindSafe(work)).unwrap_err();
            assert_eq!(crate::quiet::panic_text(&*panic), "a test");
        }
    }
}
