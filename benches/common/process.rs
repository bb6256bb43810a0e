//! What the system tells about this process: how a figure from a machine that others use as well is to be read.

use std::time::Duration;

/// How long so far its threads were ready to run and had no processor, because others had them; zero where the system
/// does not tell.
pub fn waited() -> Duration {
    let Ok(threads) = std::fs::read_dir("/proc/self/task") else { return Duration::ZERO };
    let waits = threads.filter_map(|thread| {
        let numbers = std::fs::read_to_string(thread.ok()?.path().join("schedstat")).ok()?;
        numbers.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    Duration::from_nanos(waits.sum())
}

/// Shorter waits come with every wake-up.
pub const NOTABLE_WAIT: Duration = Duration::from_micros(20);

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

/// The most memory it has had resident so far, in bytes; zero where the system does not tell.
pub fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<usize>().ok()).map_or(0, |kilobytes| kilobytes << 10)
}

#[cfg(unix)]
fn usage() -> libc::rusage {
    // SAFETY: all zeros are a value of rusage, a struct of integers.
    let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
    // SAFETY: `usage` is writable; the call changes nothing else.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
    usage
}
