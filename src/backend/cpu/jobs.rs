//! A stage as a list of jobs that can be left between any two items and taken up again.

use std::ops::Range;
use std::task::Poll;

use super::pool::Pool;
use crate::backend::ops::Limit;
use crate::error::Result;

/// How far a stage has come.
///
/// A stage runs its jobs one after the other, by `ready!(jobs.run(...))?` or `ready!(jobs.run_here(...))?`, and ends with
/// `jobs.done()`. When it is called again after `Pending`, the jobs that were done are passed over, and the one that
/// was left goes on at its item. So what stands between the jobs must be the same each time: no side effects.
#[derive(Debug, Default)]
pub struct Jobs {
    /// Jobs of this stage that are done.
    finished: usize,
    /// The next item of the job after those.
    item: usize,
    /// Jobs this call has come to.
    met: usize,
}

impl Jobs {
    /// A stage starts from its beginning: what was left unfinished is forgotten.
    pub fn reset(&mut self) {
        *self = Jobs::default();
    }

    /// Runs the items `0..count` of the stage's next job over the pool.
    pub fn run(
        &mut self,
        pool: &Pool,
        limit: &Limit,
        count: usize,
        work: &(dyn Fn(usize, usize) + Sync),
    ) -> Poll<Result<()>> {
        self.step(limit, count, |items| Ok(pool.run(items, limit, work)))
    }

    /// Runs the items `0..count` of the stage's next job on this thread, for work that cannot be shared.
    pub fn run_here(
        &mut self,
        limit: &Limit,
        count: usize,
        mut work: impl FnMut(usize) -> Result<()>,
    ) -> Poll<Result<()>> {
        self.step(limit, count, |items| {
            for item in items.clone() {
                if limit.is_reached() {
                    return Ok(item);
                }
                work(item)?;
                limit.note_work();
            }
            Ok(items.end)
        })
    }

    /// The stage is done.
    pub fn done(&mut self) -> Poll<Result<()>> {
        self.reset();
        Poll::Ready(Ok(()))
    }

    fn step(
        &mut self,
        limit: &Limit,
        count: usize,
        run: impl FnOnce(Range<usize>) -> Result<usize>,
    ) -> Poll<Result<()>> {
        if self.met < self.finished {
            self.met += 1;
            return Poll::Ready(Ok(()));
        }
        // The stage function returns to its caller unless the job is finished, and begins anew when it is called again.
        self.met = 0;
        if self.item < count && !limit.is_reached() {
            // Noted whatever ended it, a cancel too: an item may be one that must not run twice.
            self.item = run(self.item..count)?;
        }
        if self.item < count {
            return limit.check_cancel().map_or_else(|error| Poll::Ready(Err(error)), |()| Poll::Pending);
        }
        self.finished += 1;
        self.met = self.finished;
        self.item = 0;
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::task::ready;
    use std::time::Instant;

    use super::*;
    use crate::backend::ops::Cancel;
    use crate::error::Status;

    /// A stage of three jobs that writes down what it does.
    fn stage(jobs: &mut Jobs, pool: &Pool, limit: &Limit, log: &Mutex<Vec<(usize, usize)>>) -> Poll<Result<()>> {
        let note = |job: usize, item: usize| log.lock().unwrap().push((job, item));
        ready!(jobs.run(pool, limit, 4, &|item, _| note(0, item)))?;
        ready!(jobs.run_here(limit, 3, |item| {
            note(1, item);
            Ok(())
        }))?;
        ready!(jobs.run(pool, limit, 0, &|_, _| {}))?;
        ready!(jobs.run(pool, limit, 1, &|item, _| note(3, item)))?;
        jobs.done()
    }

    const ALL: [(usize, usize); 8] = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (3, 0)];

    #[test]
    fn a_stage_left_after_every_item_does_each_once_in_order() {
        let (pool, cancel) = (Pool::new(1).unwrap(), Cancel::default());
        let (mut jobs, log) = (Jobs::default(), Mutex::default());
        for round in 0..2 {
            let mut calls = 1;
            while stage(&mut jobs, &pool, &Limit::new(&cancel, Some(Instant::now()), None), &log).is_pending() {
                calls += 1;
            }
            assert_eq!((calls, log.lock().unwrap().len()), (8, 8 * (round + 1)));
        }
        assert_eq!(log.into_inner().unwrap(), [ALL, ALL].concat());
    }

    #[test]
    fn a_job_cancelled_between_its_items_goes_on_after_them() {
        for threads in [1, 3] {
            let (pool, cancel) = (Pool::new(threads).unwrap(), Cancel::default());
            for stop in 0..40 {
                let (mut jobs, log) = (Jobs::default(), Mutex::new(Vec::new()));
                let note = |job: usize, item: usize| {
                    let mut log = log.lock().unwrap();
                    let is_first = !log.contains(&(job, item));
                    log.push((job, item));
                    if is_first && job * 20 + item == stop {
                        cancel.request();
                    }
                };
                let mut stage = || {
                    ready!(jobs.run(&pool, &Limit::none(&cancel), 20, &|item, _| note(0, item)))?;
                    ready!(jobs.run_here(&Limit::none(&cancel), 20, |item| {
                        note(1, item);
                        Ok(())
                    }))?;
                    jobs.done()
                };
                while let Poll::Ready(Err(error)) = stage() {
                    assert_eq!(error.status(), Status::Cancelled);
                    assert!(cancel.take());
                }
                cancel.take();
                let mut done = log.into_inner().unwrap();
                done.sort_unstable();
                let once: Vec<_> = (0..40).map(|at| (at / 20, at % 20)).collect();
                assert_eq!(done, once, "cancelled at {stop}, {threads} threads");
            }
        }
    }

    #[test]
    fn a_cancelled_stage_can_go_on_or_begin_anew() {
        let (pool, cancel) = (Pool::new(1).unwrap(), Cancel::default());
        let (mut jobs, log) = (Jobs::default(), Mutex::default());
        let short = Limit::new(&cancel, Some(Instant::now()), None);
        assert!(stage(&mut jobs, &pool, &short, &log).is_pending());
        cancel.request();
        let Poll::Ready(Err(error)) = stage(&mut jobs, &pool, &Limit::none(&cancel), &log) else { panic!() };
        assert_eq!(error.status(), Status::Cancelled);
        cancel.take();
        assert!(stage(&mut jobs, &pool, &Limit::none(&cancel), &log).is_ready());
        assert_eq!(*log.lock().unwrap(), ALL);
        assert!(stage(&mut jobs, &pool, &Limit::new(&cancel, Some(Instant::now()), None), &log).is_pending());
        jobs.reset();
        assert!(stage(&mut jobs, &pool, &Limit::none(&cancel), &log).is_ready());
        assert_eq!(log.lock().unwrap()[9..], ALL);
    }
}
