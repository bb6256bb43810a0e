//! Everything that differs between operating systems. Unix calls first, a portable fallback for the rest.

use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

/// A directory whose files are opened by plain name only, without leaving it.
pub struct Directory {
    path: PathBuf,
    #[cfg(unix)]
    handle: File,
}

/// Why a file could not be opened inside a directory.
pub enum OpenError {
    /// There is no file of that name.
    NotFound,
    /// The name or the kind of file is not allowed; the reason completes "is ...".
    NotAllowed(&'static str),
    /// The system refused.
    Io(io::Error),
}

/// Whether `name` is a single file name: no separator, no parent, no drive, no NUL.
pub fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\\', '\0', ':'])
}

impl Directory {
    /// Opens `path` as a directory. The path itself may go through links: it is the caller's own.
    pub fn open(path: &Path) -> io::Result<Self> {
        if !std::fs::metadata(path)?.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, "not a directory"));
        }
        Ok(Directory {
            path: path.to_path_buf(),
            #[cfg(unix)]
            handle: File::open(path)?,
        })
    }

    /// The path the directory was opened by, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a regular file of this directory for reading.
    ///
    /// A symbolic link is refused unless `follow_links`, which a download cache's layout needs.
    pub fn open_file(&self, name: &str, follow_links: bool) -> Result<File, OpenError> {
        if !is_plain_name(name) {
            return Err(OpenError::NotAllowed("not a plain file name"));
        }
        let file = self.open_entry(name, follow_links)?;
        let metadata = file.metadata().map_err(OpenError::Io)?;
        if metadata.is_file() { Ok(file) } else { Err(OpenError::NotAllowed("not a regular file")) }
    }

    #[cfg(unix)]
    fn open_entry(&self, name: &str, follow_links: bool) -> Result<File, OpenError> {
        use std::os::fd::{AsRawFd, FromRawFd};
        let c_name = std::ffi::CString::new(name).map_err(|_| OpenError::NotAllowed("not a plain file name"))?;
        // O_NONBLOCK: opening a pipe must not wait for a writer. It has no effect on regular files.
        let mut flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
        if !follow_links {
            flags |= libc::O_NOFOLLOW;
        }
        // SAFETY: the descriptor is open as long as self, and c_name is a NUL-terminated string that outlives the call.
        let descriptor = unsafe { libc::openat(self.handle.as_raw_fd(), c_name.as_ptr(), flags) };
        if descriptor >= 0 {
            // SAFETY: openat just returned this descriptor; nobody else owns it.
            return Ok(unsafe { File::from_raw_fd(descriptor) });
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOENT) => Err(OpenError::NotFound),
            Some(libc::ELOOP) => {
                Err(OpenError::NotAllowed("a symbolic link, which the follow-links option would allow"))
            }
            Some(libc::ENXIO) => Err(OpenError::NotAllowed("not a regular file")),
            _ => Err(OpenError::Io(error)),
        }
    }

    #[cfg(not(unix))]
    fn open_entry(&self, name: &str, follow_links: bool) -> Result<File, OpenError> {
        let path = self.path.join(name);
        let metadata = std::fs::symlink_metadata(&path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => OpenError::NotFound,
            _ => OpenError::Io(error),
        })?;
        if metadata.is_symlink() && !follow_links {
            return Err(OpenError::NotAllowed("a symbolic link"));
        }
        if !metadata.is_file() && !metadata.is_symlink() {
            return Err(OpenError::NotAllowed("not a regular file"));
        }
        File::open(&path).map_err(OpenError::Io)
    }
}

/// Reads exactly `bytes.len()` bytes at `offset`, whatever other threads read from the same file.
#[cfg(unix)]
pub fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

/// Reads exactly `bytes.len()` bytes at `offset`, whatever other threads read from the same file.
#[cfg(windows)]
pub fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_read(bytes, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => {
                bytes = &mut bytes[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}

/// Asks the system to read a range of a file, soon to be read, while this process does something else. Advice only.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub fn advise_reading(file: &File, range: Range<u64>) {
    use std::os::fd::AsRawFd;
    // Of a longer range the system reads the beginning, as much as its read-ahead setting says: 128 KiB unless changed.
    const STEP: usize = 128 << 10;
    for start in range.clone().step_by(STEP) {
        let bytes = (range.end - start).min(STEP as u64);
        // SAFETY: an open descriptor and numbers; whatever they are, no memory of this process is touched.
        unsafe { libc::posix_fadvise64(file.as_raw_fd(), start as i64, bytes as i64, libc::POSIX_FADV_WILLNEED) };
    }
}

/// Asks the system to read a range of a file: this system reads ahead by itself.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub fn advise_reading(_file: &File, _range: Range<u64>) {}

/// Maps a whole file for reading, as it is on the disk: whoever changes it changes what is seen here, and reading where it was cut
/// off kills the process. `None` where its file system maps no files.
pub fn map_file(file: &File) -> io::Result<Option<Mmap>> {
    // SAFETY: nothing here writes to the file. That nobody else does is what the host promises where it asks for mapping,
    // as the option's documentation says.
    match unsafe { Mmap::map(file) } {
        Ok(mapped) => Ok(Some(mapped)),
        #[cfg(unix)]
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes all of `bytes` at `offset`.
#[cfg(unix)]
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
}

/// Writes all of `bytes` at `offset`.
#[cfg(windows)]
pub fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !bytes.is_empty() {
        match file.seek_write(bytes, offset)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => {
                bytes = &bytes[count..];
                offset += count as u64;
            }
        }
    }
    Ok(())
}

/// Takes a file for this process until it is closed; false where another one has taken it. Where the file system cannot tell,
/// nobody has.
#[cfg(unix)]
pub fn try_lock(file: &File) -> bool {
    !matches!(file.try_lock(), Err(std::fs::TryLockError::WouldBlock))
}

/// There what is taken could not be read by others either.
#[cfg(not(unix))]
pub fn try_lock(_file: &File) -> bool {
    true
}

/// The directory a path is in.
pub fn parent_directory(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether a directory, with this metadata, is on another disk than the one it is in.
#[cfg(unix)]
pub fn is_mount_point(directory: &Path, metadata: &Metadata) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(parent_directory(directory))?.dev() != metadata.dev())
}

/// Whether a directory is on another disk than the one it is in: this system is not asked.
#[cfg(not(unix))]
pub fn is_mount_point(_directory: &Path, _metadata: &Metadata) -> io::Result<bool> {
    Ok(false)
}

/// Bytes that this process may still write to the disk of a directory, where the system tells.
#[cfg(unix)]
pub fn free_disk_bytes(directory: &Path) -> Option<u64> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(directory.as_os_str().as_bytes()).ok()?;
    let mut space = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
    // SAFETY: a NUL-terminated path and a struct to fill in, both alive during the call.
    let result = unsafe { libc::statvfs(path.as_ptr(), space.as_mut_ptr()) };
    // SAFETY: zeros are a value of this struct of numbers, and the call has filled it in where it succeeded.
    let space = unsafe { space.assume_init() };
    // The fields are of different types on different systems.
    #[allow(clippy::unnecessary_cast)]
    let bytes = (space.f_bavail as u64).saturating_mul(space.f_frsize as u64);
    (result == 0).then_some(bytes)
}

/// Bytes that this process may still write to the disk of a directory: this system is not asked.
#[cfg(not(unix))]
pub fn free_disk_bytes(_directory: &Path) -> Option<u64> {
    None
}

/// Sees to it that a directory's entries are on the disk.
#[cfg(unix)]
pub fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// Sees to it that a directory's entries are on the disk: this system does so by itself.
#[cfg(not(unix))]
pub fn sync_directory(_directory: &Path) -> io::Result<()> {
    Ok(())
}

/// Writes a file by way of `beside`, in the same directory: its old content is there until the new one is whole and on the disk.
pub fn replace_file(path: &Path, beside: &Path, bytes: &[u8]) -> io::Result<()> {
    let write = || {
        let mut file = File::create(beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        std::fs::rename(beside, path)?;
        sync_directory(parent_directory(path))
    };
    write().inspect_err(|_| {
        // What was begun is of no use to anybody; that it cannot be removed changes nothing.
        let _ = std::fs::remove_file(beside);
    })
}

/// Gives a directory another name, that of an empty directory perhaps.
pub fn rename_directory(from: &Path, to: &Path) -> io::Result<()> {
    // Unix replaces an empty directory by itself, at once.
    #[cfg(not(unix))]
    if to.is_dir() {
        std::fs::remove_dir(to)?;
    }
    std::fs::rename(from, to)
}

/// Asks the system to back a fresh block with huge pages. Advice only: a refusal changes nothing but speed.
#[cfg(target_os = "linux")]
pub fn advise_huge_pages(start: *mut u8, bytes: usize) {
    const PAGE: usize = 4096;
    let first = (start as usize).next_multiple_of(PAGE);
    let end = (start as usize + bytes) / PAGE * PAGE;
    if first < end {
        // SAFETY: [first, end) lies inside the caller's live block; MADV_HUGEPAGE does not change its contents.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

/// Asks the system to back a fresh block with huge pages: this system has no such call.
#[cfg(not(target_os = "linux"))]
pub fn advise_huge_pages(_start: *mut u8, _bytes: usize) {}

/// The processors this thread may run on.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub fn usable_processors() -> io::Result<Vec<usize>> {
    // SAFETY: all zeros are a value of cpu_set_t, the empty set.
    let mut set = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
    // SAFETY: `set` is writable and as large as told; 0 is the calling thread.
    if unsafe { libc::sched_getaffinity(0, size_of_val(&set), &mut set) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let processors = 0..libc::CPU_SETSIZE as usize;
    // SAFETY: the numbers are below the set's size.
    Ok(processors.filter(|processor| unsafe { libc::CPU_ISSET(*processor, &set) }).collect())
}

/// The processors this thread may run on: this system does not tell.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub fn usable_processors() -> io::Result<Vec<usize>> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "this system has no such call"))
}

/// Keeps this thread on one of its processors.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub fn pin_this_thread(processor: usize) -> io::Result<()> {
    if processor >= libc::CPU_SETSIZE as usize {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all zeros are a value of cpu_set_t, the empty set.
    let mut set = unsafe { std::mem::zeroed::<libc::cpu_set_t>() };
    // SAFETY: the number is below the set's size.
    unsafe { libc::CPU_SET(processor, &mut set) };
    // SAFETY: `set` is as large as told; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps this thread on one of its processors: this system has no such call.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub fn pin_this_thread(_processor: usize) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The highest nice value, the lowest priority.
pub const MAX_NICENESS: i32 = 19;

/// Whether `lower_this_thread` is possible. POSIX gives whole processes a nice value; on Linux a thread has its own.
pub const HAS_THREAD_PRIORITIES: bool = cfg!(any(target_os = "linux", target_os = "android"));

/// Makes this thread nicer by `step`, to `MAX_NICENESS` at most.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub fn lower_this_thread(step: i32) -> io::Result<()> {
    // SAFETY: plain numbers; 0 is the calling thread, which exists, so that the call cannot fail.
    let niceness = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    let niceness = niceness.saturating_add(step).min(MAX_NICENESS);
    // SAFETY: as above.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, niceness) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes this thread nicer: this system has no such call.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub fn lower_this_thread(_step: i32) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// A path as a C host gives it: any bytes where the system allows that.
#[cfg(unix)]
pub fn path_from_bytes(bytes: &[u8]) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
}

/// A path as a C host gives it: UTF-8.
#[cfg(not(unix))]
pub fn path_from_bytes(bytes: &[u8]) -> Option<PathBuf> {
    std::str::from_utf8(bytes).ok().map(PathBuf::from)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_that_maps_nothing_is_told_from_one_that_does() {
        let mapped = map_file(&File::open("Cargo.toml").unwrap()).unwrap();
        assert_eq!(&mapped.unwrap()[..], std::fs::read("Cargo.toml").unwrap());
        // The settings of Linux are files that nobody can map, where they are shown.
        let Ok(file) = File::open("/sys/kernel/mm/transparent_hugepage/enabled") else { return };
        assert!(map_file(&file).unwrap().is_none());
    }
}
