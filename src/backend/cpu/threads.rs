//! What a host may choose about the threads that compute.

use std::ffi::c_void;

use crate::error::{Error, Result, Status};
use crate::platform;

/// Most threads one model has.
pub const MAX_THREADS: usize = 256;

/// Threads of a model: how many, and of what kind.
#[derive(Clone, Copy, Debug, Default)]
pub struct ThreadOptions {
    /// Threads, the calling one included; 0 means one per core the process may use.
    pub count: usize,
    /// Keep each worker on a processor of its own, among those the loading thread may use; one of them is left to the
    /// calling thread, which is never pinned. An error where there are fewer processors than threads, and on systems
    /// without such a call.
    pub pin: bool,
    /// Microseconds that an idle worker spins before it sleeps; 0 means 50. One that sleeps takes tens of microseconds to
    /// wake.
    pub spin_us: u32,
    /// Priority of the workers.
    pub priority: Priority,
    /// The host's own threads instead of workers; the other choices but `count` are then errors.
    pub parallel_for: Option<ParallelFor>,
}

/// Priority of a worker thread beside the thread that loads the model. Lowering needs no rights. An error on systems that
/// have none for single threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Priority {
    /// That of the loading thread.
    #[default]
    Normal,
    /// A nice value higher by 5: a quarter of the processor time where the two compete.
    Low,
    /// The highest nice value, 19: what others leave.
    Lowest,
}

/// What a `ParallelFor` calls: the `task_context` it was given, and an index below its `count`.
pub type Task = unsafe extern "C" fn(task_context: *mut c_void, index: u32);

/// A function of the host that spreads work over the host's threads.
pub type ParallelForFunction =
    unsafe extern "C" fn(context: *mut c_void, count: u32, task: Task, task_context: *mut c_void);

/// The host's threads, reached through a function of the host.
///
/// The function calls `task(task_context, index)` once for each index below `count`, from any threads, at the same time
/// or one after the other, and returns when all have returned. Each task shares what is left of the work with the
/// others, so one that comes late finds nothing to do. Wrong or repeated indices and calls after the return do nothing
/// or help with the work at hand; what was not called is done by the calling thread. Where a second call computes while
/// the function is in use, it computes on its own thread alone: a host may run sessions on the threads of `parallel_for`.
#[derive(Clone, Copy, Debug)]
pub struct ParallelFor {
    function: ParallelForFunction,
    context: *mut c_void,
}

// SAFETY: the creator promised that the function may be called with the context from any thread.
unsafe impl Send for ParallelFor {}
// SAFETY: as above, also at the same time.
unsafe impl Sync for ParallelFor {}

impl ParallelFor {
    /// # Safety
    /// As long as a model loaded with it lives, `function` may be called with `context` from any thread that computes with
    /// the model; it does not unwind, and ends no call of `task` but by its return.
    pub unsafe fn new(function: ParallelForFunction, context: *mut c_void) -> Self {
        ParallelFor { function, context }
    }

    /// Has the host call `task` with `task_context` and each index below `count`.
    ///
    /// # Safety
    /// `task` may be called with `task_context` and any index, from any thread, now and later.
    pub(super) unsafe fn call(&self, count: u32, task: Task, task_context: *mut c_void) {
        // SAFETY: the promises of the creator and of the caller.
        unsafe { (self.function)(self.context, count, task, task_context) }
    }
}

impl From<usize> for ThreadOptions {
    /// So many threads, everything else by default.
    fn from(count: usize) -> Self {
        ThreadOptions { count, ..Default::default() }
    }
}

impl ThreadOptions {
    /// Whether this machine can do as asked.
    pub fn check(&self) -> Result<()> {
        let invalid = |key: &str, text: String| Err(Error::new(Status::InvalidArgument, text).at_key(key));
        if self.count > MAX_THREADS {
            return invalid("threads", format!("threads is {}, expected 0 to {MAX_THREADS}", self.count));
        }
        if self.parallel_for.is_some() && (self.pin || self.spin_us != 0 || self.priority != Priority::Normal) {
            let text = "pin, spin_us and priority are for the library's own threads: they go with no parallel_for";
            return invalid("parallel_for", text.to_owned());
        }
        if self.pin {
            self.pinned_processors()?;
        }
        if self.priority != Priority::Normal && !platform::HAS_THREAD_PRIORITIES {
            let text = "this system has no priorities of single threads: priority must be normal";
            return invalid("priority", text.to_owned());
        }
        Ok(())
    }

    /// The number of threads these options lead to.
    pub fn resolved_count(&self) -> usize {
        match self.count {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
            count => count,
        }
    }

    /// A processor for each thread, the first one for the caller.
    pub(super) fn pinned_processors(&self) -> Result<Vec<usize>> {
        let invalid = |text: String| Error::new(Status::InvalidArgument, text).at_key("pin");
        let processors = platform::usable_processors()
            .map_err(|error| invalid(format!("threads cannot be pinned to processors: {error}")))?;
        let count = self.resolved_count();
        if processors.len() < count {
            let found = processors.len();
            return Err(invalid(format!(
                "pin takes a processor for each of {count} threads, this thread may use {found}"
            )));
        }
        Ok(processors)
    }
}
