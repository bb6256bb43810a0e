//! A model directory: one safetensors file or several with an index, and small files beside them.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use parking_lot::Mutex;
use serde::Deserialize;

use super::header::{self, TensorInfo};
use super::json::UniqueMembers;
use super::progress::Progress;
use crate::error::{Error, Result, Status};
use crate::memory::{Bytes, try_vec};
use crate::platform::{self, Directory, OpenError};

pub(super) const SINGLE_FILE: &str = "model.safetensors";
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
const MAX_INDEX_BYTES: u64 = 16 << 20;
pub(super) const MAX_SHARDS: usize = 1024;
/// The longest read after which a cancel is noticed.
const READ_BYTES: usize = 1 << 20;

/// A tensor's description and the file it is in.
pub struct Tensor {
    /// Type, shape and place inside the file.
    pub info: TensorInfo,
    shard: usize,
}

struct Shard {
    name: String,
    file: File,
    read_ahead: Mutex<ReadAhead>,
    /// The whole file, once a tensor of it was asked for mapped.
    mapped: Mutex<Option<Arc<Mmap>>>,
}

/// The range of a file that the system has been asked to read.
#[derive(Default)]
struct ReadAhead {
    asked: Range<u64>,
}

impl ReadAhead {
    /// One to two of them are being read beyond what is asked for.
    const WINDOW: u64 = 16 << 20;

    /// What to ask the system for when `read` is about to be read, also across the ends of tensors; often nothing.
    fn advance(&mut self, read: Range<u64>) -> Range<u64> {
        if !(self.asked.start..=self.asked.end).contains(&read.start) {
            self.asked = read.start..read.start;
        }
        let from = self.asked.end;
        if from < read.end + Self::WINDOW {
            self.asked.end = read.end + 2 * Self::WINDOW;
        }
        from..self.asked.end
    }
}

/// An opened model directory: every tensor's place is known and lies inside its file.
pub struct Checkpoint {
    directory: Directory,
    follow_links: bool,
    shards: Vec<Shard>,
    tensors: HashMap<String, Tensor>,
}

impl Checkpoint {
    /// Opens a directory that holds `model.safetensors`, or shards with `model.safetensors.index.json`.
    ///
    /// No file outside the directory is opened; symbolic links are refused unless `follow_links`.
    pub fn open(path: &Path, follow_links: bool) -> Result<Self> {
        let directory = Directory::open(path).map_err(|error| {
            Error::new(
                Status::DirectoryNotFound,
                format!("{}: cannot be opened as a directory: {error}", path.display()),
            )
        })?;
        Ok(Checkpoint { directory, follow_links, shards: Vec::new(), tensors: HashMap::new() })
    }

    /// Reads and checks the headers of all weight files.
    pub fn read_headers(&mut self) -> Result<()> {
        match self.open_file(SINGLE_FILE) {
            Ok(file) => self.add_shard(SINGLE_FILE, file, None),
            Err(error) if error.status() == Status::FileNotFound => self.read_index(),
            Err(error) => Err(error),
        }
    }

    /// The whole of a small file of the directory, `None` if there is none.
    pub fn read_small_file(&self, name: &str, max_bytes: u64) -> Result<Option<Vec<u8>>> {
        let file = match self.open_file(name) {
            Ok(file) => file,
            Err(error) if error.status() == Status::FileNotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = file_length(name, &file)?;
        if length > max_bytes {
            let text = format!("is {length} bytes, at most {max_bytes} are parsed");
            return Err(Error::new(Status::FileTooLarge, text).in_file(name));
        }
        read_bytes(name, &file, 0, length as usize).map(Some)
    }

    /// A tensor by name.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// All tensor names, in no particular order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensor names, file by file and in the order of their bytes.
    pub fn tensor_names_in_order(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensor_names().collect();
        names.sort_unstable_by_key(|name| {
            self.tensors.get(*name).map(|tensor| (tensor.shard, tensor.info.offset, *name))
        });
        names
    }

    /// Bytes of the tensors of each weight file.
    pub fn bytes_of_files(&self) -> Vec<u64> {
        let mut bytes = vec![0; self.shards.len()];
        self.tensors.values().for_each(|tensor| bytes[tensor.shard] += tensor.info.bytes());
        bytes
    }

    /// Names of the files beside the weights, sorted; folders are left out. Fails with `FileNotAllowed` where a name is none that
    /// could be opened.
    pub fn files_beside(&self) -> Result<Vec<String>> {
        let path = self.directory.path();
        let unreadable =
            |error: io::Error| Error::new(Status::ReadFailed, format!("{} cannot be listed: {error}", path.display()));
        let mut names = Vec::new();
        for entry in std::fs::read_dir(path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            if entry.file_type().map_err(unreadable)?.is_dir() {
                continue;
            }
            match entry.file_name().to_str().filter(|name| platform::is_plain_name(name)) {
                Some(name) if holds_weights(name) => {}
                Some(name) => names.push(name.to_owned()),
                None => {
                    let text = "has a name that is not a plain one";
                    return Err(Error::new(Status::FileNotAllowed, text).in_file(entry.path().display().to_string()));
                }
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The file a tensor is stored in.
    pub fn file_of(&self, tensor: &Tensor) -> &str {
        &self.shards[tensor.shard].name
    }

    /// The file that lists all tensors: the index, or the single weight file.
    pub fn table_of_contents(&self) -> &str {
        match self.shards.as_slice() {
            [only] if only.name == SINGLE_FILE => SINGLE_FILE,
            _ => INDEX_FILE,
        }
    }

    /// Reads `bytes.len()` bytes of a tensor, `skip` bytes after its first, in steps that report and can be cancelled.
    pub fn read_tensor(&self, tensor: &Tensor, skip: u64, bytes: &mut [u8], progress: &Progress) -> Result<()> {
        let shard = &self.shards[tensor.shard];
        let mut offset = tensor.info.offset + skip;
        for part in bytes.chunks_mut(READ_BYTES) {
            progress.check()?;
            let following = shard.read_ahead.lock().advance(offset..offset + part.len() as u64);
            platform::advise_reading(&shard.file, following);
            platform::read_exact_at(&shard.file, part, offset)
                .map_err(|error| read_error(&shard.name, offset, &error))?;
            offset += part.len() as u64;
            progress.advance(part.len() as u64);
        }
        Ok(())
    }

    /// The first `bytes` bytes of a tensor, in its mapped file; `None` where the file system maps no files.
    pub fn map_tensor(&self, tensor: &Tensor, bytes: usize, progress: &Progress) -> Result<Option<Bytes>> {
        progress.check()?;
        let shard = &self.shards[tensor.shard];
        let mut mapped = shard.mapped.lock();
        let file = match &*mapped {
            Some(file) => file,
            None => match platform::map_file(&shard.file).map_err(|error| map_error(&shard.name, &error))? {
                Some(file) => mapped.insert(Arc::new(file)),
                None => return Ok(None),
            },
        };
        let start = tensor.info.offset as usize;
        if start + bytes > file.len() {
            return Err(read_error(&shard.name, file.len() as u64, &io::ErrorKind::UnexpectedEof.into()));
        }
        progress.advance(bytes as u64);
        Ok(Some(Bytes::Mapped(Arc::clone(file), start..start + bytes)))
    }

    /// Opens a regular file of the directory.
    pub fn open_file(&self, name: &str) -> Result<File> {
        self.directory.open_file(name, self.follow_links).map_err(|error| match error {
            OpenError::NotFound => {
                let text = format!("not found in {}", self.directory.path().display());
                Error::new(Status::FileNotFound, text).in_file(name)
            }
            OpenError::NotAllowed(what) => {
                Error::new(Status::FileNotAllowed, format!("is {what}; only regular files of the directory are opened"))
                    .in_file(name)
            }
            OpenError::Io(error) => Error::new(Status::ReadFailed, format!("cannot be opened: {error}")).in_file(name),
        })
    }

    fn read_index(&mut self) -> Result<()> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: UniqueMembers<String>,
        }

        let Some(bytes) = self.read_small_file(INDEX_FILE, MAX_INDEX_BYTES)? else {
            let text = format!("not found in {}, and no {INDEX_FILE} either", self.directory.path().display());
            return Err(Error::new(Status::FileNotFound, text).in_file(SINGLE_FILE));
        };
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| {
            Error::new(Status::IndexSyntax, format!("not a valid index: {error}")).in_file(INDEX_FILE)
        })?;
        let mut tensors_of: Vec<(String, Vec<String>)> = Vec::new();
        let mut shard_of: HashMap<String, usize> = HashMap::new();
        for (tensor, file) in index.weight_map.0 {
            if !platform::is_plain_name(&file) {
                let text = format!("\"{tensor}\" is said to be in {file:?}, which is not a plain file name");
                return Err(Error::new(Status::FileNotAllowed, text).in_file(INDEX_FILE).at_key(tensor));
            }
            let shard = *shard_of.entry(file).or_insert_with_key(|file| {
                tensors_of.push((file.clone(), Vec::new()));
                tensors_of.len() - 1
            });
            tensors_of[shard].1.push(tensor);
            if tensors_of.len() > MAX_SHARDS {
                let text = format!("names more than {MAX_SHARDS} files");
                return Err(Error::new(Status::IndexValue, text).in_file(INDEX_FILE).at_key("weight_map"));
            }
        }
        if tensors_of.is_empty() {
            let text = "\"weight_map\" is empty, expected one entry per tensor";
            return Err(Error::new(Status::IndexValue, text).in_file(INDEX_FILE).at_key("weight_map"));
        }
        for (name, tensors) in tensors_of {
            let file = self.open_file(&name)?;
            self.add_shard(&name, file, Some(&tensors))?;
        }
        Ok(())
    }

    /// Adds the tensors of one file: those the index assigns to it, or all of them without an index.
    fn add_shard(&mut self, name: &str, file: File, assigned: Option<&[String]>) -> Result<()> {
        let shard = self.shards.len();
        let mut found = header::read(name, &file)?;
        match assigned {
            None => self.tensors = found.into_iter().map(|(name, info)| (name, Tensor { info, shard })).collect(),
            Some(assigned) => {
                for tensor in assigned {
                    let Some(info) = found.remove(tensor) else {
                        let text = format!("\"{tensor}\" is said to be in {name}, which does not hold it");
                        return Err(Error::new(Status::IndexValue, text).in_file(INDEX_FILE).at_key(tensor));
                    };
                    self.tensors.insert(tensor.clone(), Tensor { info, shard });
                }
            }
        }
        self.shards.push(Shard { name: name.to_owned(), file, read_ahead: Mutex::default(), mapped: Mutex::default() });
        Ok(())
    }
}

/// Whether a file of this name has weights, in this format or another, or says where they are.
fn holds_weights(name: &str) -> bool {
    const ENDS: [&str; 11] = [
        ".safetensors",
        ".safetensors.index.json",
        ".bin",
        ".bin.index.json",
        ".pt",
        ".pth",
        ".ckpt",
        ".gguf",
        ".h5",
        ".msgpack",
        ".onnx",
    ];
    ENDS.iter().any(|end| name.ends_with(end))
}

/// A file's length in bytes.
pub(super) fn file_length(name: &str, file: &File) -> Result<u64> {
    Ok(file.metadata().map_err(|error| read_error(name, 0, &error))?.len())
}

/// `length` bytes of a file, which the caller has checked against the file's length.
pub(super) fn read_bytes(name: &str, file: &File, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = try_vec(name, length, 0u8)?;
    platform::read_exact_at(file, &mut bytes, offset).map_err(|error| read_error(name, offset, &error))?;
    Ok(bytes)
}

/// A mapping that was refused, as the error for the file it was of.
fn map_error(name: &str, error: &io::Error) -> Error {
    let status = match error.kind() {
        // Of addresses there may be too few where there is memory.
        io::ErrorKind::OutOfMemory => Status::OutOfMemory,
        _ => Status::ReadFailed,
    };
    Error::new(status, format!("cannot be mapped: {error}")).in_file(name)
}

/// A failed read, as the error for the file it happened in.
pub(super) fn read_error(name: &str, offset: u64, error: &io::Error) -> Error {
    let (status, text) = match error.kind() {
        io::ErrorKind::UnexpectedEof => (Status::FileLength, format!("ends after byte {offset}, while being read")),
        _ => (Status::ReadFailed, format!("cannot be read at byte {offset}: {error}")),
    };
    Error::new(status, text).in_file(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_asked_once_for_each_byte_and_is_always_a_window_ahead() {
        const MIB: u64 = 1 << 20;
        let mut read_ahead = ReadAhead::default();
        let mut asked = Vec::new();
        for start in (5 * MIB..100 * MIB).step_by(MIB as usize) {
            asked.push(read_ahead.advance(start..start + MIB));
            assert!(read_ahead.asked.end >= start + MIB + ReadAhead::WINDOW);
        }
        asked.retain(|range| !range.is_empty());
        assert_eq!(asked[..2], [5 * MIB..38 * MIB, 38 * MIB..55 * MIB]);
        assert!(asked.windows(2).all(|pair| pair[0].end == pair[1].start));
        // Threads read a little out of order, and another tensor may be elsewhere.
        assert!(read_ahead.advance(98 * MIB..99 * MIB).is_empty());
        for elsewhere in [900 * MIB, 2 * MIB] {
            let asked = read_ahead.advance(elsewhere..elsewhere + MIB);
            assert_eq!(asked, elsewhere..elsewhere + MIB + 2 * ReadAhead::WINDOW);
        }
    }
}
