//! Writing a model directory: tensors in any order and in pieces, in files of a bounded size. The directory has its name
//! only once all of it is on the disk.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result, Status};
use crate::memory::ALIGNMENT;
use crate::platform;

/// Bytes of one weight file where nobody says more.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Weight files a directory can have: as many as loading takes.
const MAX_SHARDS: usize = super::checkpoint::MAX_SHARDS;

/// A tensor to be written.
#[derive(Clone, Debug)]
pub struct NewTensor {
    /// Its name.
    pub name: String,
    /// Of its elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl NewTensor {
    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().map(|size| *size as u64).product::<u64>() * self.dtype.bitsize() as u64 / 8
    }
}

/// A model directory in the making, under the target's name with `.partial` after it. Dropped before it is finished, it is
/// deleted.
pub struct ModelWriter {
    target: PathBuf,
    partial: PathBuf,
    shards: Vec<Shard>,
    places: Vec<Place>,
    finished: bool,
}

/// A weight file. Open from its first tensor's first byte to its last one's: there may be more of them than files that a
/// process may have open.
struct Shard {
    path: PathBuf,
    file: Option<File>,
    /// Bytes of its tensors that are still to be written.
    left: u64,
}

/// Where a tensor is.
struct Place {
    name: String,
    shard: usize,
    /// From the start of the file.
    offset: u64,
    bytes: u64,
    written: u64,
}

impl ModelWriter {
    /// Begins a directory of these tensors, in files of about `shard_bytes`, of which each has at least one tensor. Where
    /// an empty directory of its name is there, it has that one's permissions.
    ///
    /// Fails with `AlreadyExists` where `target` is there and not an empty directory, or another write of it has begun or
    /// was cut off; with `InvalidArgument` where it is a mount point, which nothing can be renamed to; with `DiskFull`
    /// where the disk has not room for all; with `WriteFailed`.
    pub fn create(target: &Path, tensors: &[NewTensor], shard_bytes: u64) -> Result<ModelWriter> {
        let Checked { target, partial, replaced, layout } = Checked::new(target, tensors, shard_bytes)?;
        std::fs::create_dir(&partial).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => in_the_way(&partial),
            _ => write_error(&partial, &error),
        })?;
        let mut writer = ModelWriter { target, partial, shards: Vec::new(), places: layout.places, finished: false };
        if let Some(permissions) = replaced {
            writer.try_to_replace()?;
            std::fs::set_permissions(&writer.partial, permissions)
                .map_err(|error| write_error(&writer.partial, &error))?;
        }
        if layout.files.len() > 1 {
            let names: Vec<&str> = layout.files.iter().map(|file| &*file.name).collect();
            writer.write_file(INDEX_FILE, &index(&names, &writer.places))?;
        }
        for NewFile { name, header, bytes } in layout.files {
            writer.write_file(&name, &header)?;
            writer.shards.push(Shard { path: writer.partial.join(name), file: None, left: bytes });
        }
        Ok(writer)
    }

    /// Fails where `create` would, as far as can be told without writing anything.
    pub fn check(target: &Path, tensors: &[NewTensor], shard_bytes: u64) -> Result<()> {
        let checked = Checked::new(target, tensors, shard_bytes)?;
        match std::fs::symlink_metadata(&checked.partial) {
            Ok(_) => Err(in_the_way(&checked.partial)),
            Err(_) => Ok(()),
        }
    }

    /// Sees whether the empty directory that is there can be replaced, as one that something is mounted on cannot: moves it
    /// into the partial one and back.
    fn try_to_replace(&self) -> Result<()> {
        let aside = self.partial.join("replaced");
        platform::rename_directory(&self.target, &aside).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => mount_point(&self.target),
            _ => write_error(&self.target, &error),
        })?;
        platform::rename_directory(&aside, &self.target).map_err(|error| write_error(&self.target, &error))
    }

    /// Writes `bytes` of tensor `tensor`, counted as they were given to `create`, `skip` bytes after its first. Each byte is
    /// written once.
    pub fn write(&mut self, tensor: usize, skip: u64, bytes: &[u8]) -> Result<()> {
        let place = &mut self.places[tensor];
        assert!(skip + bytes.len() as u64 <= place.bytes, "{} is shorter", place.name);
        let shard = &mut self.shards[place.shard];
        shard.write(bytes, place.offset + skip).map_err(|error| write_error(&shard.path, &error))?;
        place.written += bytes.len() as u64;
        Ok(())
    }

    /// Writes a small file beside the weights.
    pub fn write_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.partial.join(name);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let written = file.and_then(|file| {
            platform::write_all_at(&file, bytes, 0)?;
            file.sync_all()
        });
        written.map_err(|error| write_error(&path, &error))
    }

    /// Sees to it that all of it is on the disk, and gives the directory its name.
    pub fn finish(mut self) -> Result<()> {
        if let Some(place) = self.places.iter().find(|place| place.written != place.bytes) {
            let text = format!("{} of {} bytes of \"{}\" were written", place.written, place.bytes, place.name);
            return Err(Error::new(Status::Internal, text));
        }
        platform::sync_directory(&self.partial).map_err(|error| write_error(&self.partial, &error))?;
        check_target(&self.target)?;
        platform::rename_directory(&self.partial, &self.target).map_err(|error| write_error(&self.target, &error))?;
        self.finished = true;
        let parent = platform::parent_directory(&self.target);
        platform::sync_directory(parent).map_err(|error| write_error(parent, &error))
    }
}

impl Drop for ModelWriter {
    fn drop(&mut self) {
        // Deleting what is in a directory takes a descriptor, which may be the last one.
        self.shards.clear();
        if !self.finished && std::fs::remove_dir_all(&self.partial).is_err() {
            // An empty one takes none. Where even that fails, the next write says that the directory is in the way.
            let _ = std::fs::remove_dir(&self.partial);
        }
    }
}

impl Shard {
    fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let file = match self.file.take() {
            Some(file) => file,
            None => OpenOptions::new().write(true).open(&self.path)?,
        };
        platform::write_all_at(&file, bytes, offset)?;
        self.left -= bytes.len() as u64;
        match self.left {
            0 => file.sync_all(),
            _ => {
                self.file = Some(file);
                Ok(())
            }
        }
    }
}

/// Which of the files each tensor is in.
fn index(names: &[&str], places: &[Place]) -> Vec<u8> {
    let total: u64 = places.iter().map(|place| place.bytes).sum();
    let map: Map<String, Value> = places.iter().map(|place| (place.name.clone(), json!(names[place.shard]))).collect();
    let index = json!({"metadata": {"total_size": total}, "weight_map": map});
    format!("{index:#}\n").into_bytes()
}

/// Which tensor is where, and what stands before them in each file.
struct Layout {
    files: Vec<NewFile>,
    places: Vec<Place>,
    bytes: u64,
}

struct NewFile {
    name: String,
    header: Vec<u8>,
    /// Of its tensors.
    bytes: u64,
}

impl Layout {
    fn new(tensors: &[NewTensor], shard_bytes: u64) -> Result<Layout> {
        let mut shards: Vec<Vec<usize>> = vec![Vec::new()];
        let mut bytes_of_shard = 0;
        for (index, tensor) in tensors.iter().enumerate() {
            if bytes_of_shard > 0 && bytes_of_shard + tensor.bytes() > shard_bytes {
                shards.push(Vec::new());
                bytes_of_shard = 0;
            }
            bytes_of_shard += tensor.bytes();
            shards.last_mut().into_iter().for_each(|shard| shard.push(index));
        }
        if shards.len() > MAX_SHARDS {
            let text = format!("{} files of at most {shard_bytes} bytes, expected at most {MAX_SHARDS}", shards.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("shard_bytes"));
        }
        let mut places: Vec<Option<Place>> = tensors.iter().map(|_| None).collect();
        let (mut files, mut bytes) = (Vec::new(), 0);
        let count = shards.len();
        for (shard, mut indices) in shards.into_iter().enumerate() {
            // Tensors follow each other without gaps. So that each begins at a multiple of ALIGNMENT, those whose size is
            // none come last, the best aligned first.
            indices.sort_by_key(|index| std::cmp::Reverse(alignment(tensors[*index].bytes())));
            let (header, offsets) = header(tensors, &indices);
            let mut of_tensors = 0;
            for (index, offset) in indices.iter().zip(&offsets) {
                let NewTensor { name, .. } = &tensors[*index];
                let size = tensors[*index].bytes();
                places[*index] = Some(Place { name: name.clone(), shard, offset: *offset, bytes: size, written: 0 });
                of_tensors += size;
            }
            bytes += header.len() as u64 + of_tensors;
            let name = match count {
                1 => SINGLE_FILE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
            };
            files.push(NewFile { name, header, bytes: of_tensors });
        }
        Ok(Layout { files, places: places.into_iter().flatten().collect(), bytes })
    }
}

/// The largest power of two, ALIGNMENT at the most, that divides a size.
fn alignment(bytes: u64) -> u64 {
    1 << bytes.trailing_zeros().min(ALIGNMENT.trailing_zeros())
}

/// A file's header with its length, padded so that what follows begins at a multiple of ALIGNMENT, and where each tensor
/// begins.
fn header(tensors: &[NewTensor], indices: &[usize]) -> (Vec<u8>, Vec<u64>) {
    let (mut entries, mut starts, mut end) = (Vec::new(), Vec::new(), 0);
    for index in indices {
        let NewTensor { name, dtype, shape } = &tensors[*index];
        starts.push(end);
        let next = end + tensors[*index].bytes();
        let entry = json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": [end, next]});
        entries.push(format!("{}:{entry}", json!(name)));
        end = next;
    }
    let json = format!(
        "{{\"__metadata__\":{{\"format\":\"pt\"}}{}{}}}",
        if entries.is_empty() { "" } else { "," },
        entries.join(",")
    );
    let length = (8 + json.len()).next_multiple_of(ALIGNMENT) - 8;
    let mut header = (length as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json.as_bytes());
    header.resize(8 + length, b' ');
    let first = header.len() as u64;
    (header, starts.into_iter().map(|start| first + start).collect())
}

/// A directory that can be written, as far as can be told.
struct Checked {
    target: PathBuf,
    partial: PathBuf,
    /// The permissions of the empty directory that is there.
    replaced: Option<Permissions>,
    layout: Layout,
}

impl Checked {
    fn new(target: &Path, tensors: &[NewTensor], shard_bytes: u64) -> Result<Checked> {
        let Some(name) = target.file_name() else {
            let text = format!("{} has no name that a directory can be given", target.display());
            return Err(Error::new(Status::InvalidArgument, text).at_key("target"));
        };
        let mut partial_name = name.to_owned();
        partial_name.push(".partial");
        // Without a separator at its end, which would lead through a link.
        let target = target.with_file_name(name);
        let partial = target.with_file_name(partial_name);
        let replaced = check_target(&target)?;
        let layout = Layout::new(tensors, shard_bytes)?;
        let parent = platform::parent_directory(&target);
        std::fs::metadata(parent).map_err(|error| write_error(parent, &error))?;
        if let Some(free) = platform::free_disk_bytes(parent)
            && free < layout.bytes
        {
            let text = format!("{} has {free} bytes free, {} are to be written", parent.display(), layout.bytes);
            return Err(Error::new(Status::DiskFull, text));
        }
        Ok(Checked { target, partial, replaced, layout })
    }
}

fn in_the_way(partial: &Path) -> Error {
    let text = "is in the way: another write is under way, or one was cut off, and then it is to be deleted";
    Error::new(Status::AlreadyExists, text).in_file(partial.display().to_string())
}

/// A directory is written where nothing is, or an empty one, whose permissions these are.
fn check_target(target: &Path) -> Result<Option<Permissions>> {
    let metadata = match std::fs::symlink_metadata(target) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(write_error(target, &error)),
    };
    if metadata.is_symlink() {
        let text = "is a symbolic link, which is not followed: name the directory it leads to";
        return Err(Error::new(Status::AlreadyExists, text).in_file(target.display().to_string()));
    }
    if metadata.is_dir() {
        if platform::is_mount_point(target, &metadata).map_err(|error| write_error(target, &error))? {
            return Err(mount_point(target));
        }
        let mut entries = std::fs::read_dir(target).map_err(|error| write_error(target, &error))?;
        if entries.next().is_none() {
            return Ok(Some(metadata.permissions()));
        }
    }
    let text = "is there already and is not an empty directory: nothing is overwritten";
    Err(Error::new(Status::AlreadyExists, text).in_file(target.display().to_string()))
}

fn mount_point(target: &Path) -> Error {
    let text = "is a mount point: name a directory inside it";
    Error::new(Status::InvalidArgument, text).in_file(target.display().to_string()).at_key("target")
}

pub(super) fn write_error(path: &Path, error: &io::Error) -> Error {
    let (status, reason) = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => (Status::DiskFull, error.to_string()),
        io::ErrorKind::FileTooLarge => {
            let limit = "this process has a file size limit (ulimit -f), or the file system has one";
            (Status::WriteFailed, format!("{error}: {limit}"))
        }
        _ => (Status::WriteFailed, error.to_string()),
    };
    Error::new(status, format!("cannot be written: {reason}")).in_file(path.display().to_string())
}
