//! What the system tells about this process: how a figure from a machine that others use as well is to be read.

use std::time::Duration;

/// How often so far the system took the processor from one of its threads; 0 where it does not tell.
pub fn preemptions() -> i64 {
    #[cfg(unix)]
    #[allow(clippy::unnecessary_cast)] // Its width differs between systems.
    return usage().ru_nivcsw as i64;
    #[cfg(not(unix))]
    0
}

/// Processor time of all its threads so far; none where the system does not tell.
pub fn processor_time() -> Duration {
    #[cfg(unix)]
    {
        let usage = usage();
        let time = |time: libc::timeval| Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000);
        time(usage.ru_utime) + time(usage.ru_stime)
    }
    #[cfg(not(unix))]
    Duration::ZERO
}

#[cfg(unix)]
fn usage() -> libc::rusage {
    // SAFETY: all zeros are a value of rusage, a struct of integers.
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    // SAFETY: `usage` is writable; the call changes nothing else.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    usage
}
