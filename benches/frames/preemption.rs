//! Whether the system took the processor away from a thread of this process: what a call cannot be blamed for.

/// How often so far; 0 where the system does not tell.
pub fn count() -> i64 {
    #[cfg(unix)]
    {
        // SAFETY: all zeros are a value of rusage, a struct of integers.
        let mut usage = unsafe { std::mem::zeroed::<libc::rusage>() };
        // SAFETY: `usage` is writable; the call changes nothing else.
        unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut usage) };
        #[allow(clippy::unnecessary_cast)] // Its width differs between systems.
        return usage.ru_nivcsw as i64;
    }
    #[cfg(not(unix))]
    0
}
