//! A hostile directory: a good one, how it is broken, and how the library must answer.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use gemmoe::Status;
use serde_json::{Value, json};

use crate::common::Directory;
use crate::file::WeightFile;
use crate::tokenizer_sample;

pub const CONFIG: &str = "config.json";
pub const WEIGHTS: &str = "model.safetensors";
pub const INDEX: &str = "model.safetensors.index.json";
pub const TOKENIZER: &str = "tokenizer.json";

/// What a case does to the good directory.
pub type Break = Box<dyn Fn(&Path) + Send>;

/// One row of a table.
pub struct Case {
    pub name: String,
    pub break_it: Break,
    pub follow_links: bool,
    /// The path to load, told from the directory's.
    pub path: fn(&Path) -> PathBuf,
    pub status: Status,
    pub file: Option<String>,
    pub key: Option<String>,
    /// What the message must contain.
    pub says: Vec<String>,
}

/// A row whose error has no file, key or text to check yet.
pub fn case(name: impl Into<String>, break_it: impl Fn(&Path) + Send + 'static, status: Status) -> Case {
    Case {
        name: name.into(),
        break_it: Box::new(break_it),
        follow_links: false,
        path: Path::to_path_buf,
        status,
        file: None,
        key: None,
        says: Vec::new(),
    }
}

impl Case {
    pub fn file(mut self, file: &str) -> Case {
        self.file = Some(file.to_owned());
        self
    }

    pub fn key(mut self, key: &str) -> Case {
        self.key = Some(key.to_owned());
        self
    }

    pub fn says(mut self, parts: &[&str]) -> Case {
        self.says.extend(parts.iter().map(|part| (*part).to_owned()));
        self
    }

    pub fn following_links(mut self) -> Case {
        self.follow_links = true;
        self
    }

    pub fn at(mut self, path: fn(&Path) -> PathBuf) -> Case {
        self.path = path;
        self
    }
}

/// The model every case starts from.
pub fn good() -> &'static Directory {
    static GOOD: OnceLock<Directory> = OnceLock::new();
    GOOD.get_or_init(|| Directory::random_with(1, json!({"vocab_size": tokenizer_sample::VOCAB_SIZE})))
}

/// Writes the good directory.
pub fn write_good(path: &Path) {
    static FILES: OnceLock<(String, Vec<u8>)> = OnceLock::new();
    let (config, weights) = FILES.get_or_init(|| (good().config.to_string(), good().safetensors(|_| true)));
    std::fs::write(path.join(CONFIG), config).unwrap();
    std::fs::write(path.join(WEIGHTS), weights).unwrap();
}

/// Replaces a file by these bytes.
pub fn bytes(file: &'static str, bytes: impl Into<Vec<u8>>) -> impl Fn(&Path) + Send {
    let bytes = bytes.into();
    move |path| std::fs::write(path.join(file), &bytes).unwrap()
}

/// Sets keys of config.json.
pub fn config(changes: Value) -> impl Fn(&Path) + Send {
    move |path| {
        let mut config = good().config.clone();
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        std::fs::write(path.join(CONFIG), config.to_string()).unwrap();
    }
}

/// Changes the tensors of the single weight file.
pub fn weights(change: impl Fn(&mut WeightFile) + Send) -> impl Fn(&Path) + Send {
    move |path| {
        let mut file = WeightFile::of(good());
        change(&mut file);
        std::fs::write(path.join(WEIGHTS), file.to_bytes()).unwrap();
    }
}

/// Changes the weight file's header as JSON and leaves its data as it is.
pub fn header(change: impl Fn(&mut Value) + Send) -> impl Fn(&Path) + Send {
    move |path| {
        let (mut header, data) = WeightFile::of(good()).to_parts();
        change(&mut header);
        write_weights(path, header.to_string().as_bytes(), &data);
    }
}

/// Changes the weight file's header as text, for what a JSON value cannot hold.
pub fn header_text(change: impl Fn(String) -> String + Send) -> impl Fn(&Path) + Send {
    move |path| {
        let (header, data) = WeightFile::of(good()).to_parts();
        write_weights(path, change(header.to_string()).as_bytes(), &data);
    }
}

/// A weight file of this header and no data.
pub fn bare_header(header: impl Into<Vec<u8>>) -> impl Fn(&Path) + Send {
    let header = header.into();
    move |path| write_weights(path, &header, &[])
}

fn write_weights(path: &Path, header: &[u8], data: &[u8]) {
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path.join(WEIGHTS), [&length, header, data].concat()).unwrap();
}

/// Replaces the single weight file by two shards and this index; `None` names each tensor's shard truly.
pub fn sharded(path: &Path, index: Option<&[u8]>) {
    std::fs::remove_file(path.join(WEIGHTS)).unwrap();
    let first = |name: &str| name.contains("layers.0.");
    std::fs::write(path.join("first.safetensors"), good().safetensors(first)).unwrap();
    std::fs::write(path.join("second.safetensors"), good().safetensors(|name| !first(name))).unwrap();
    match index {
        Some(index) => std::fs::write(path.join(INDEX), index).unwrap(),
        None => std::fs::write(path.join(INDEX), true_index().to_string()).unwrap(),
    }
}

/// The index that belongs to the shards of `sharded`.
pub fn true_index() -> Value {
    let shard = |name: &str| if name.contains("layers.0.") { "first.safetensors" } else { "second.safetensors" };
    let map: serde_json::Map<String, Value> =
        good().tensors.keys().map(|name| (name.clone(), json!(shard(name)))).collect();
    json!({"metadata": {"total_size": 1}, "weight_map": map})
}

/// Two shards and an index of these bytes.
pub fn index_bytes(bytes: impl Into<Vec<u8>>) -> impl Fn(&Path) + Send {
    let bytes = bytes.into();
    move |path| sharded(path, Some(&bytes))
}

/// Two shards and a changed index.
pub fn index(change: impl Fn(&mut Value) + Send) -> impl Fn(&Path) + Send {
    move |path| {
        let mut index = true_index();
        change(&mut index);
        sharded(path, Some(index.to_string().as_bytes()));
    }
}

/// Adds a tokenizer.json with this value at a JSON pointer; `None` removes what is there.
pub fn tokenizer(pointer: &'static str, value: Option<Value>) -> impl Fn(&Path) + Send {
    move |path| {
        let mut file = tokenizer_sample::sample();
        let (parent, name) = pointer.rsplit_once('/').unwrap();
        match (file.pointer_mut(parent).unwrap(), value.clone()) {
            (Value::Object(members), Some(value)) => drop(members.insert(name.to_owned(), value)),
            (Value::Object(members), None) => drop(members.remove(name).unwrap()),
            (list, Some(value)) => list[name.parse::<usize>().unwrap()] = value,
            (list, None) => drop(list.as_array_mut().unwrap().remove(name.parse().unwrap())),
        }
        std::fs::write(path.join(TOKENIZER), file.to_string()).unwrap();
    }
}

/// Makes a file of this length without contents, which takes no room on disk.
pub fn sparse(file: &'static str, start: &'static [u8], length: u64) -> impl Fn(&Path) + Send {
    move |path| {
        std::fs::write(path.join(file), start).unwrap();
        std::fs::File::options().write(true).open(path.join(file)).unwrap().set_len(length).unwrap();
    }
}

/// Replaces a file by a named pipe nobody writes to.
pub fn pipe(file: &'static str) -> impl Fn(&Path) + Send {
    move |path| {
        let path = path.join(file);
        let _ = std::fs::remove_file(&path);
        let name = std::ffi::CString::new(OsString::from(path).into_encoded_bytes()).unwrap();
        // SAFETY: a NUL-terminated path that lives during the call.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    }
}

/// Replaces a file by a folder.
pub fn folder(file: &'static str) -> impl Fn(&Path) + Send {
    move |path| {
        let _ = std::fs::remove_file(path.join(file));
        std::fs::create_dir(path.join(file)).unwrap();
    }
}

/// Replaces a file by a symbolic link.
pub fn link(file: &'static str, target: &'static str) -> impl Fn(&Path) + Send {
    move |path| {
        let _ = std::fs::remove_file(path.join(file));
        std::os::unix::fs::symlink(target, path.join(file)).unwrap();
    }
}

/// Moves a file aside within the directory and puts a symbolic link to it in its place.
pub fn moved_behind_link(file: &'static str) -> impl Fn(&Path) + Send {
    move |path| {
        std::fs::rename(path.join(file), path.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", path.join(file)).unwrap();
    }
}
