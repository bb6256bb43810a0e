use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::*;
use crate::backend::cpu::threads::{ParallelFor, Priority, Task};
use crate::backend::ops::Cancel;
use crate::error::Status;

/// Runs jobs of all sizes and checks that each item runs once, and that no two threads have one index at a time.
fn check_every_item_runs_exactly_once(name: &str, pool: &Pool) {
    let in_use: Vec<AtomicBool> = (0..pool.threads()).map(|_| AtomicBool::new(false)).collect();
    for round in 0..200 {
        let count = round % 37;
        let hits: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        let done = pool.run(0..count, &Limit::none(&Cancel::default()), &|item, thread| {
            assert!(!in_use[thread].swap(true, Ordering::AcqRel), "{name}: two threads are {thread}");
            hits[item].fetch_add(1, Ordering::Relaxed);
            if round % 10 == 9 {
                std::thread::sleep(Duration::from_micros(100));
            }
            in_use[thread].store(false, Ordering::Release);
        });
        assert_eq!(done, count, "{name}");
        assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1), "{name}");
    }
}

#[test]
fn every_item_runs_exactly_once_for_any_number_and_kind_of_threads() {
    for threads in [1, 2, 3, 8] {
        check_every_item_runs_exactly_once(&format!("{threads} threads"), &Pool::new(threads).unwrap());
        for spin_us in [1, 3000] {
            let options = ThreadOptions { spin_us, ..threads.into() };
            check_every_item_runs_exactly_once(&format!("{options:?}"), &Pool::with(&options).unwrap());
        }
    }
}

#[test]
fn a_caller_asleep_is_woken_by_the_last_thread_to_leave() {
    let pool = Pool::with(&ThreadOptions { spin_us: 1, ..3.into() }).unwrap();
    for _ in 0..50 {
        let (both, ended) = (Barrier::new(3), AtomicUsize::new(0));
        pool.run(0..3, &Limit::none(&Cancel::default()), &|_, thread| {
            both.wait();
            // Far longer than the caller spins; the two leave one after the other.
            std::thread::sleep(Duration::from_millis(thread as u64));
            ended.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ended.into_inner(), 3);
    }
}

/// What a thread of the system is.
#[cfg(any(target_os = "linux", target_os = "android"))]
#[derive(Debug, PartialEq)]
struct Kind {
    processors: Vec<usize>,
    niceness: i32,
}

#[cfg(any(target_os = "linux", target_os = "android"))]
impl Kind {
    fn of_this_thread() -> Kind {
        // SAFETY: plain numbers; 0 is the calling thread.
        let niceness = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        Kind { processors: crate::platform::usable_processors().unwrap(), niceness }
    }

    /// Those of all threads of a pool, the caller's first.
    fn of_all(pool: &Pool) -> Vec<Kind> {
        let (all, kinds) = (Barrier::new(pool.threads()), Mutex::new(Vec::new()));
        pool.run(0..pool.threads(), &Limit::none(&Cancel::default()), &|_, thread| {
            lock(&kinds).push((thread, Kind::of_this_thread()));
            all.wait();
        });
        let mut kinds = kinds.into_inner().unwrap();
        kinds.sort_unstable_by_key(|(thread, _)| *thread);
        kinds.into_iter().map(|(_, kind)| kind).collect()
    }
}

#[cfg(any(target_os = "linux", target_os = "android"))]
#[test]
fn pinned_workers_have_a_processor_each_and_leave_one_to_the_caller_who_stays_free() {
    let caller = Kind::of_this_thread();
    let most = caller.processors.len();
    for count in 1..=most {
        let pool = Pool::with(&ThreadOptions { pin: true, ..count.into() }).unwrap();
        let kinds = Kind::of_all(&pool);
        assert_eq!(kinds[0], caller);
        for (worker, kind) in kinds.iter().enumerate().skip(1) {
            assert_eq!(kind.processors, [caller.processors[worker]]);
            assert_eq!(kind.niceness, caller.niceness);
        }
        check_every_item_runs_exactly_once("pinned", &pool);
    }
    let error = ThreadOptions { pin: true, ..(most + 1).into() }.check().unwrap_err();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("pin")));
}

#[cfg(any(target_os = "linux", target_os = "android"))]
#[test]
fn workers_have_the_priority_asked_for_and_the_caller_keeps_its_own() {
    let caller = Kind::of_this_thread();
    let low = (caller.niceness + 5).min(19);
    for (priority, niceness) in [(Priority::Normal, caller.niceness), (Priority::Low, low), (Priority::Lowest, 19)] {
        let pool = Pool::with(&ThreadOptions { priority, ..4.into() }).unwrap();
        let kinds = Kind::of_all(&pool);
        assert_eq!(kinds[0], caller);
        assert!(kinds[1..].iter().all(|kind| kind.niceness == niceness), "{priority:?}: {kinds:?}");
        assert!(kinds[1..].iter().all(|kind| kind.processors == caller.processors));
        check_every_item_runs_exactly_once("with a priority", &pool);
    }
}

/// How a host runs tasks, rightly or not.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Manner {
    OnThreads,
    InTurn,
    Backwards,
    NotAtAll,
    OnlyTheLast,
    EachTwiceOnThreads,
    WithWrongIndices,
    /// Returns while its threads are at work or about to begin.
    WithoutWaiting,
    /// Calls the tasks of earlier calls as well.
    AlsoOldOnes,
}

const MANNERS: [Manner; 9] = [
    Manner::OnThreads,
    Manner::InTurn,
    Manner::Backwards,
    Manner::NotAtAll,
    Manner::OnlyTheLast,
    Manner::EachTwiceOnThreads,
    Manner::WithWrongIndices,
    Manner::WithoutWaiting,
    Manner::AlsoOldOnes,
];

/// A task and its context, as a host may keep them.
#[derive(Clone, Copy)]
struct Kept(Task, usize);

impl Kept {
    fn call(self, index: u32) {
        // SAFETY: a task may be called with any index at any time.
        unsafe { (self.0)(std::ptr::without_provenance_mut(self.1), index) }
    }
}

/// A host with a manner; lives longer than its pool.
struct Host {
    manner: Manner,
    calls: AtomicUsize,
    returns: AtomicUsize,
    kept: Mutex<Vec<Kept>>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Host {
    fn new(manner: Manner) -> Host {
        let (calls, returns) = Default::default();
        Host { manner, calls, returns, kept: Mutex::default(), threads: Mutex::default() }
    }

    fn options(&self, threads: usize) -> ThreadOptions {
        let context = (&raw const *self).cast_mut().cast();
        // SAFETY: `parallel_for` reads a `Host`, which is shared by threads, and outlives the pool in every test.
        let parallel_for = unsafe { ParallelFor::new(parallel_for, context) };
        ThreadOptions { parallel_for: Some(parallel_for), ..threads.into() }
    }

    fn run(&self, count: u32, task: Kept) {
        let on_threads = |times: u32| {
            std::thread::scope(|scope| {
                (0..count * times).for_each(|index| drop(scope.spawn(move || task.call(index % count))));
            });
        };
        match self.manner {
            Manner::OnThreads => on_threads(1),
            Manner::InTurn => (0..count).for_each(|index| task.call(index)),
            Manner::Backwards => (0..count).rev().for_each(|index| task.call(index)),
            Manner::NotAtAll => {}
            Manner::OnlyTheLast => task.call(count - 1),
            Manner::EachTwiceOnThreads => on_threads(2),
            Manner::WithWrongIndices => [count, u32::MAX, 1 << 31, 0, 256].into_iter().for_each(|i| task.call(i)),
            Manner::WithoutWaiting => {
                let threads = (0..count).map(|index| std::thread::spawn(move || task.call(index)));
                lock(&self.threads).extend(threads);
            }
            Manner::AlsoOldOnes => {
                let kept = lock(&self.kept).clone();
                kept.iter().rev().take(3).for_each(|old| old.call(0));
                (0..count).for_each(|index| task.call(index));
                lock(&self.kept).push(task);
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.threads.get_mut().unwrap().drain(..).for_each(|thread| thread.join().unwrap());
    }
}

unsafe extern "C" fn parallel_for(context: *mut c_void, count: u32, task: Task, task_context: *mut c_void) {
    // SAFETY: `Host::options` gave a `Host` that outlives the pool.
    let host = unsafe { &*context.cast::<Host>() };
    assert!(count > 1);
    host.calls.fetch_add(1, Ordering::Relaxed);
    host.run(count, Kept(task, task_context.addr()));
    host.returns.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn every_item_runs_exactly_once_however_the_host_runs_its_tasks() {
    for manner in MANNERS {
        let host = Host::new(manner);
        for threads in [1, 2, 5] {
            let pool = Pool::with(&host.options(threads)).unwrap();
            assert_eq!(pool.threads(), threads);
            check_every_item_runs_exactly_once(&format!("{manner:?}, {threads} threads"), &pool);
            assert_eq!(host.calls.load(Ordering::Relaxed) > 0, threads > 1, "{manner:?}");
        }
    }
}

#[test]
fn a_panic_in_a_task_leaves_the_host_in_peace_and_reaches_the_caller() {
    for manner in MANNERS {
        let host = Host::new(manner);
        let pool = Pool::with(&host.options(3)).unwrap();
        for bad in [0, 5, 99] {
            let work = AssertUnwindSafe(|| {
                pool.run(0..100, &Limit::none(&Cancel::default()), &|item, _| {
                    if item == bad {
                        resume_unwind(Box::new("planted"));
                    }
                })
            });
            let payload = catch_unwind(work).unwrap_err();
            assert_eq!(payload.downcast_ref::<&str>(), Some(&"planted"), "{manner:?}");
            assert_eq!(host.returns.load(Ordering::Relaxed), host.calls.load(Ordering::Relaxed), "{manner:?}");
        }
        check_every_item_runs_exactly_once("after panics", &pool);
    }
}

#[test]
fn a_task_called_when_its_job_or_its_pool_is_gone_does_nothing() {
    let host = Host::new(Manner::AlsoOldOnes);
    let pool = Pool::with(&host.options(2)).unwrap();
    check_every_item_runs_exactly_once("kept", &pool);
    let kept = lock(&host.kept).clone();
    kept.iter().for_each(|task| task.call(0));
    // Others call it all the time while the pool works, and go on when it is gone.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for index in 0..3 {
            let (stop, task) = (&stop, kept[0]);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    task.call(index);
                }
            });
        }
        check_every_item_runs_exactly_once("beside callers of old tasks", &pool);
        drop(pool);
        stop.store(true, Ordering::Relaxed);
    });
    kept.iter().for_each(|task| task.call(0));
}

#[test]
fn callers_beside_the_one_the_host_works_for_go_on_alone() {
    let host = Host::new(Manner::OnThreads);
    let pool = Pool::with(&host.options(3)).unwrap();
    let (first_is_in, others_are_done) = (Barrier::new(2), Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            pool.run(0..2, &Limit::none(&Cancel::default()), &|item, _| {
                if item == 0 {
                    first_is_in.wait();
                    others_are_done.wait();
                }
            });
        });
        first_is_in.wait();
        let calls = host.calls.load(Ordering::Relaxed);
        for count in [2, 50] {
            let here = std::thread::current().id();
            let check = |_, thread| assert!(thread == 0 && std::thread::current().id() == here);
            assert_eq!(pool.run(0..count, &Limit::none(&Cancel::default()), &check), count);
        }
        assert_eq!(host.calls.load(Ordering::Relaxed), calls);
        others_are_done.wait();
    });
    check_every_item_runs_exactly_once("again", &pool);
}

#[test]
fn own_threads_and_the_hosts_are_not_mixed() {
    let host = Host::new(Manner::InTurn);
    let plain = host.options(2);
    assert!(plain.check().is_ok());
    let mixed = [
        ThreadOptions { pin: true, ..plain },
        ThreadOptions { spin_us: 1, ..plain },
        ThreadOptions { priority: Priority::Low, ..plain },
    ];
    for options in mixed {
        let error = options.check().unwrap_err();
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("parallel_for")), "{options:?}");
    }
}

#[test]
fn callers_on_several_threads_take_turns() {
    let pool = Pool::new(3).unwrap();
    let total = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.run(0..11, &Limit::none(&Cancel::default()), &|_, _| {
                        total.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 4 * 200 * 11);
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_works_on() {
    let pool = Pool::new(2).unwrap();
    for bad in [0, 5, 99] {
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(0..100, &Limit::none(&Cancel::default()), &|item, _| {
                if item == bad {
                    resume_unwind(Box::new("planted"));
                }
            })
        }));
        assert!(result.is_err());
    }
    assert_eq!(pool.run(0..100, &Limit::none(&Cancel::default()), &|_, _| {}), 100);
}

#[test]
fn a_cancelled_job_stops_and_says_where() {
    let pool = Pool::new(2).unwrap();
    let cancel = Cancel::default();
    let done = AtomicUsize::new(0);
    let next = pool.run(0..1_000_000, &Limit::none(&cancel), &|item, _| {
        done.fetch_add(1, Ordering::Relaxed);
        if item == 10 {
            cancel.request();
        }
    });
    assert_eq!(next, done.load(Ordering::Relaxed));
    assert!(next < 1000);
}

#[test]
fn a_job_whose_time_is_over_goes_on_where_it_stopped_and_runs_every_item_once() {
    for threads in [1, 3] {
        let pool = Pool::new(threads).unwrap();
        let cancel = Cancel::default();
        let hits: Vec<AtomicUsize> = (0..500).map(|_| AtomicUsize::new(0)).collect();
        let (mut next, mut calls) = (0, 0);
        while next < hits.len() {
            // Already over: each call does the least it may, one item a thread.
            let limit = Limit::new(&cancel, Some(std::time::Instant::now()), None);
            let before = next;
            next = pool.run(next..hits.len(), &limit, &|item, _| {
                hits[item].fetch_add(1, Ordering::Relaxed);
            });
            assert!(next > before, "a call makes progress, however small its budget");
            calls += 1;
        }
        assert!(calls * (threads + 1) >= hits.len(), "{calls} calls with {threads} threads");
        assert!(hits.iter().all(|hit| hit.load(Ordering::Relaxed) == 1));
    }
}
