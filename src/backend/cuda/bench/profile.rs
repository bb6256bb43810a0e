//! The time of each kernel that a model launches, from events on both sides of it.
//!
//! Where the host is slower than the device, a time begins when the device comes to the first event, before the kernel
//! has been enqueued: of kernels of a few microseconds it is how fast they are launched.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{BenchDevice, seconds_between};
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Event;
use crate::error::{Error, Result, Status};

/// A kernel that ran.
#[derive(Clone, Debug)]
pub struct Launch {
    /// Its name.
    pub kernel: Arc<str>,
    /// Its blocks.
    pub grid: [u32; 3],
    /// How long it took.
    pub seconds: f64,
}

/// One that was launched.
struct Record {
    kernel: Arc<str>,
    grid: [u32; 3],
    events: [Event; 2],
}

/// What is launched while a profile is on, in the whole process.
struct Profile {
    records: Vec<Record>,
    /// Events that nobody uses.
    spare: Vec<Event>,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Profile {}

static PROFILE: Mutex<Profile> = Mutex::new(Profile { records: Vec::new(), spare: Vec::new() });
static IS_ON: AtomicBool = AtomicBool::new(false);

/// Whether kernels are timed one by one: a pass then has to launch them one by one.
pub fn is_on() -> bool {
    IS_ON.load(Ordering::Acquire)
}

/// The launches of models on a device while `work` runs, in their order. `work` leaves nothing running on it. One profile at
/// a time in a process: another is an error.
pub fn profile(device: &BenchDevice, work: impl FnOnce() -> Result<()>) -> Result<Vec<Launch>> {
    if IS_ON.swap(true, Ordering::AcqRel) {
        return Err(Error::new(Status::InvalidArgument, "kernels are timed already"));
    }
    let done = work();
    IS_ON.store(false, Ordering::Release);
    let current = device.device.enter()?;
    let mut profile = PROFILE.lock();
    let (mut launches, records) = (Vec::new(), std::mem::take(&mut profile.records));
    for Record { kernel, grid, events: [from, to] } in records {
        launches.push(seconds_between(&current, from, to).map(|seconds| Launch { kernel, grid, seconds }));
    }
    // SAFETY: created below, used by nobody any more.
    profile.spare.drain(..).for_each(|event| unsafe { current.destroy_event(event) });
    done?;
    launches.into_iter().collect()
}

/// Launches a kernel, between two events where kernels are timed.
pub(in crate::backend::cuda) fn around(
    current: &Current,
    kernel: &Arc<str>,
    grid: [u32; 3],
    launch: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if !is_on() {
        return launch();
    }
    let mut profile = PROFILE.lock();
    let events = [current.create_timed_event()?, current.create_timed_event()?];
    profile.spare.extend(events);
    let [from, to] = events;
    // SAFETY: events of this context; so below.
    unsafe { current.record(from) }?;
    launch()?;
    // SAFETY: as above.
    unsafe { current.record(to) }?;
    profile.records.push(Record { kernel: Arc::clone(kernel), grid, events });
    Ok(())
}
