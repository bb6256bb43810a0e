//! Router patches: the gates of all layers as a file of their own, for the model that they were trained on.
//!
//! A safetensors file. For each layer, `[experts, hidden_size]` in F32: `model.layers.{i}.block_sparse_moe.gate.weight`. The
//! metadata's one key has the version, the fingerprint of the model's stored gates, and a checksum (xxh3, 64 bits) of that
//! fingerprint, of the three sizes and of all numbers in the order of the layers, everything little-endian. What is read is
//! data from outside: nothing is taken from it before it was checked.

use std::fs::File;
use std::io;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use super::config::{Config, MAX_EXPERTS};
use crate::error::{Error, Result, Status};
use crate::memory::{as_bytes, as_bytes_mut, try_vec, try_with_capacity};
use crate::platform;

/// The metadata's key.
const KEY: &str = "gemmoe_router_patch";
/// Of the format: what this file writes, and all it reads.
const VERSION: u32 = 1;
/// A header takes no more, with as many layers as a model can have.
const MAX_HEADER_BYTES: u64 = 256 << 10;
/// As many as `Config` accepts.
const MAX_LAYERS: usize = 1024;
const MAX_HIDDEN_SIZE: usize = 1 << 16;
/// Bytes of a header's length.
const PREFIX_BYTES: usize = 8;
/// Data begins at a multiple of it.
const DATA_ALIGNMENT: usize = 8;

/// Gates of every layer, and of which model's they are.
#[derive(Clone, Debug, PartialEq)]
pub struct RouterPatch {
    sizes: GateSizes,
    /// `[layers, experts, hidden_size]`, finite.
    gates: Vec<f32>,
    base: u64,
}

/// How many gates there are, and of what size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GateSizes {
    /// Layers of the model.
    pub layers: usize,
    /// Rows of a gate.
    pub experts: usize,
    /// Columns of a gate.
    pub hidden_size: usize,
}

impl GateSizes {
    /// A model's. Fails with `PatchModel` for one without routers.
    pub fn of(config: &Config) -> Result<GateSizes> {
        let sizes = GateSizes {
            layers: config.num_hidden_layers,
            experts: config.num_local_experts,
            hidden_size: config.hidden_size,
        };
        match sizes.experts {
            1 => {
                let text = "the model has one expert, and so no routers that a patch could replace";
                Err(Error::new(Status::PatchModel, text).at_key("num_local_experts"))
            }
            _ => Ok(sizes),
        }
    }

    /// Numbers of all gates.
    pub fn count(&self) -> usize {
        self.layers * self.of_layer()
    }

    /// Numbers of a layer's gate.
    pub fn of_layer(&self) -> usize {
        self.experts * self.hidden_size
    }
}

impl std::fmt::Display for GateSizes {
    fn fmt(&self, formatter: &mut std::fmt::Formatter) -> std::fmt::Result {
        let GateSizes { layers, experts, hidden_size } = self;
        write!(formatter, "{layers} layers of {experts} experts, hidden_size {hidden_size}")
    }
}

/// What a model's stored gates are known by in patches: xxh3 of `[layers, experts, hidden_size]` in f32.
pub fn fingerprint(gates: &[f32]) -> u64 {
    xxh3_64(as_bytes(gates))
}

/// The metadata's value.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Key {
    version: u32,
    /// In hexadecimal, as all 64 bits are.
    base: String,
    checksum: String,
}

impl RouterPatch {
    /// `gates`, `[layers, experts, hidden_size]`, for a model of this geometry whose stored gates have the fingerprint `base`.
    /// Fails with `InvalidArgument` where there are more or fewer or they are not finite, `PatchModel` for a model without
    /// routers, `OutOfMemory`.
    pub fn new(config: &Config, gates: &[f32], base: u64) -> Result<RouterPatch> {
        let sizes = GateSizes::of(config)?;
        let wrong = |text: String| Error::new(Status::InvalidArgument, text).at_key("gates");
        if gates.len() != sizes.count() {
            return Err(wrong(format!("{} numbers, and the gates have {}: {sizes}", gates.len(), sizes.count())));
        }
        if let Some(layer) = layer_not_finite(&sizes, gates) {
            return Err(wrong(format!("the gate of layer {layer} has a number that is not finite")));
        }
        let mut copy = try_with_capacity("a router patch", gates.len())?;
        copy.extend_from_slice(gates);
        Ok(RouterPatch { sizes, gates: copy, base })
    }

    /// Reads a file. Fails with `FileNotFound`, `ReadFailed`, `OutOfMemory`, and with `PatchDamaged` where it is cut off,
    /// altered, of another version, or no patch at all.
    pub fn read(path: &Path) -> Result<RouterPatch> {
        RouterPatch::read_file(path).map_err(|error| error.in_file(path.display().to_string()))
    }

    fn read_file(path: &Path) -> Result<RouterPatch> {
        let failed = |error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => Error::new(Status::FileNotFound, "not found"),
            _ => Error::new(Status::ReadFailed, format!("cannot be read: {error}")),
        };
        // Before it is opened: a pipe would wait for somebody to write.
        if !std::fs::metadata(path).map_err(failed)?.is_file() {
            return Err(damaged("is not a file"));
        }
        let file = File::open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        let mut prefix = [0; PREFIX_BYTES];
        if length < PREFIX_BYTES as u64 {
            return Err(too_short(length));
        }
        platform::read_exact_at(&file, &mut prefix, 0).map_err(failed)?;
        let mut header = try_vec("the header of a router patch", header_bytes(prefix, length)?, 0u8)?;
        platform::read_exact_at(&file, &mut header, PREFIX_BYTES as u64).map_err(failed)?;
        let header = Header::parse(&header, length)?;
        header.collect(|offset, gate| platform::read_exact_at(&file, gate, offset).map_err(failed))
    }

    /// The same of a file's bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<RouterPatch> {
        let length = bytes.len() as u64;
        let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() else { return Err(too_short(length)) };
        let header = Header::parse(&rest[..header_bytes(*prefix, length)?], length)?;
        header.collect(|offset, gate| {
            // All of them are inside, as `parse` has checked.
            gate.copy_from_slice(&bytes[offset as usize..offset as usize + gate.len()]);
            Ok(())
        })
    }

    /// The bytes of a file. Fails with `OutOfMemory`.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let GateSizes { layers, experts, hidden_size } = self.sizes;
        let size = self.sizes.of_layer() * size_of::<f32>();
        let key = Key { version: VERSION, base: hexadecimal(self.base), checksum: hexadecimal(self.checksum()) };
        let key = serde_json::to_string(&key)
            .map_err(|error| Error::new(Status::Internal, format!("a router patch has no key: {error}")))?;
        let mut header = Map::new();
        header.insert("__metadata__".to_owned(), json!({ KEY: key }));
        for layer in 0..layers {
            let entry = json!({"dtype": "F32", "shape": [experts, hidden_size], "data_offsets": [layer * size, (layer + 1) * size]});
            header.insert(tensor_name(layer), entry);
        }
        let mut header = Value::Object(header).to_string();
        while !header.len().is_multiple_of(DATA_ALIGNMENT) {
            header.push(' ');
        }
        let mut bytes = try_with_capacity("a router patch", PREFIX_BYTES + header.len() + layers * size)?;
        bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(as_bytes(&self.gates));
        Ok(bytes)
    }

    /// Writes a file, whose old content is there until the new one is whole and on the disk. Fails with `WriteFailed`,
    /// `DiskFull`, `OutOfMemory`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let bytes = self.to_bytes()?;
        let Some(name) = path.file_name() else {
            let text = format!("{} has no name that a file can be given", path.display());
            return Err(Error::new(Status::InvalidArgument, text).at_key("path"));
        };
        let mut partial = name.to_owned();
        partial.push(".partial");
        let partial = path.with_file_name(partial);
        platform::replace_file(path, &partial, &bytes).map_err(|error| super::writer::write_error(path, &error))
    }

    /// How many gates, and of what size.
    pub fn sizes(&self) -> GateSizes {
        self.sizes
    }

    /// `[layers, experts, hidden_size]`
    pub fn gates(&self) -> &[f32] {
        &self.gates
    }

    /// The fingerprint of the stored gates of the model it is for.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Fails with `PatchModel`, naming both sides' numbers, unless it is for a model of this geometry whose stored gates have
    /// this fingerprint.
    pub fn check_model(&self, config: &Config, stored: impl FnOnce() -> Result<u64>) -> Result<()> {
        let sizes = GateSizes::of(config)?;
        if self.sizes != sizes {
            let text = format!("the router patch is for {}, the model has {sizes}", self.sizes);
            return Err(Error::new(Status::PatchModel, text));
        }
        let stored = stored()?;
        if self.base != stored {
            let text = format!(
                "the router patch is for a model whose stored gates have fingerprint {:016x}, this one's have \
                 {stored:016x}",
                self.base
            );
            return Err(Error::new(Status::PatchModel, text));
        }
        Ok(())
    }

    fn checksum(&self) -> u64 {
        let mut hasher = Xxh3Default::new();
        let GateSizes { layers, experts, hidden_size } = self.sizes;
        for number in [self.base, layers as u64, experts as u64, hidden_size as u64] {
            hasher.update(&number.to_le_bytes());
        }
        hasher.update(as_bytes(&self.gates));
        hasher.digest()
    }
}

/// A header whose tensors are known to be a patch's, and to be in the file.
struct Header {
    sizes: GateSizes,
    base: u64,
    checksum: u64,
    /// Of each layer's gate, from the start of the file.
    offsets: Vec<u64>,
}

impl Header {
    /// Of a file of `length` bytes.
    fn parse(bytes: &[u8], length: u64) -> Result<Header> {
        let data_start = (PREFIX_BYTES + bytes.len()) as u64;
        let parsed: Metadata = serde_json::from_slice(bytes)
            .map_err(|error| damaged(&format!("has a header that cannot be read: {error}")))?;
        let key = parsed.metadata().as_ref().and_then(|entries| entries.get(KEY));
        let key = key.ok_or_else(|| damaged(&format!("has no \"{KEY}\" in its metadata")))?;
        let version = serde_json::from_str::<Value>(key).ok().and_then(|key| key.get("version")?.as_u64());
        if let Some(version) = version.filter(|version| *version != u64::from(VERSION)) {
            return Err(damaged(&format!("is of version {version}, this library reads {VERSION}")));
        }
        let key: Key =
            serde_json::from_str(key).map_err(|error| damaged(&format!("has a \"{KEY}\" that is none: {error}")))?;
        let number = |name: &str, digits: &str| {
            let is_number = digits.len() == 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            let value = u64::from_str_radix(digits, 16).ok().filter(|_| is_number);
            value.ok_or_else(|| damaged(&format!("has a {name} in its \"{KEY}\" that is not 16 hexadecimal digits")))
        };
        let (base, checksum) = (number("base", &key.base)?, number("checksum", &key.checksum)?);
        let tensors = parsed.tensors();
        let shape = tensors.get(&tensor_name(0)).map(|tensor| tensor.shape.as_slice());
        let sizes = match shape {
            Some([experts, hidden_size]) => {
                GateSizes { layers: tensors.len(), experts: *experts, hidden_size: *hidden_size }
            }
            _ => return Err(damaged(&format!("has no \"{}\" of two dimensions", tensor_name(0)))),
        };
        if !(1..=MAX_LAYERS).contains(&sizes.layers)
            || !(2..=MAX_EXPERTS).contains(&sizes.experts)
            || !(1..=MAX_HIDDEN_SIZE).contains(&sizes.hidden_size)
        {
            return Err(damaged(&format!("has {sizes}, which no model has")));
        }
        let size = (sizes.of_layer() * size_of::<f32>()) as u64;
        let expected = data_start + sizes.layers as u64 * size;
        if length != expected {
            return Err(damaged(&format!("has {length} bytes, its header describes {expected}")));
        }
        let mut offsets = try_with_capacity("the header of a router patch", sizes.layers)?;
        for layer in 0..sizes.layers {
            let name = tensor_name(layer);
            let tensor = tensors.get(&name).ok_or_else(|| {
                damaged(&format!("has {} tensors and not \"{name}\" among them", sizes.layers)).at_key(&*name)
            })?;
            if tensor.dtype != Dtype::F32 || tensor.shape != [sizes.experts, sizes.hidden_size] {
                let (experts, hidden_size) = (sizes.experts, sizes.hidden_size);
                let (dtype, shape) = (tensor.dtype, &tensor.shape);
                let text = format!("has \"{name}\" as {dtype} {shape:?}, expected F32 [{experts}, {hidden_size}]");
                return Err(damaged(&text).at_key(name));
            }
            // One gate follows the other, as parsing has seen to: with all of them of this size, each is in the file.
            offsets.push(data_start + tensor.data_offsets.0 as u64);
        }
        Ok(Header { sizes, base, checksum, offsets })
    }

    /// The patch whose numbers `read` reads from offsets of the file.
    fn collect(self, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<RouterPatch> {
        let mut gates = try_vec("a router patch", self.sizes.count(), 0f32)?;
        for (offset, gate) in self.offsets.iter().zip(gates.chunks_exact_mut(self.sizes.of_layer())) {
            read(*offset, as_bytes_mut(gate))?;
        }
        let patch = RouterPatch { sizes: self.sizes, gates, base: self.base };
        if patch.checksum() != self.checksum {
            return Err(damaged("does not match its checksum"));
        }
        match layer_not_finite(&patch.sizes, &patch.gates) {
            None => Ok(patch),
            Some(layer) => {
                let name = tensor_name(layer);
                Err(damaged(&format!("has a number in \"{name}\" that is not finite")).at_key(name))
            }
        }
    }
}

/// The header's length, as the first bytes of a file of `length` bytes have it.
fn header_bytes(prefix: [u8; PREFIX_BYTES], length: u64) -> Result<usize> {
    let bytes = u64::from_le_bytes(prefix);
    match bytes {
        _ if bytes > MAX_HEADER_BYTES => {
            Err(damaged(&format!("announces a header of {bytes} bytes, a patch's has at most {MAX_HEADER_BYTES}")))
        }
        _ if bytes > length - PREFIX_BYTES as u64 => {
            let left = length - PREFIX_BYTES as u64;
            Err(damaged(&format!("announces a header of {bytes} bytes, but only {left} follow")))
        }
        _ => Ok(bytes as usize),
    }
}

fn too_short(length: u64) -> Error {
    damaged(&format!("has {length} bytes, a safetensors file at least {PREFIX_BYTES}"))
}

fn damaged(what: &str) -> Error {
    Error::new(Status::PatchDamaged, format!("the router patch {what}"))
}

/// What a layer's gate is called in files of gates alone.
pub(crate) fn tensor_name(layer: usize) -> String {
    format!("model.layers.{layer}.block_sparse_moe.gate.weight")
}

fn hexadecimal(number: u64) -> String {
    format!("{number:016x}")
}

fn layer_not_finite(sizes: &GateSizes, gates: &[f32]) -> Option<usize> {
    gates.chunks_exact(sizes.of_layer()).position(|gate| gate.iter().any(|number| !number.is_finite()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patch() -> RouterPatch {
        let sizes = GateSizes { layers: 3, experts: 4, hidden_size: 5 };
        let gates = (0..sizes.count()).map(|index| index as f32 * 0.37 - 7.0).collect();
        RouterPatch { sizes, gates, base: 0x0123_4567_89ab_cdef }
    }

    /// The file with some text of its header, or of what its checksum covers, replaced by as much.
    fn with(from: &str, to: &str) -> Vec<u8> {
        let bytes = patch().to_bytes().unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = std::str::from_utf8(&bytes[8..8 + length]).unwrap();
        assert!(header.contains(from), "{from} is not in {header}");
        let header = header.replace(from, to);
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[8 + length..]].concat()
    }

    fn refusal(bytes: &[u8]) -> String {
        let error = RouterPatch::from_bytes(bytes).unwrap_err();
        assert_eq!(error.status(), Status::PatchDamaged, "{error}");
        error.to_string()
    }

    #[test]
    fn what_is_written_is_read_bit_for_bit_from_bytes_and_from_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("expert.safetensors");
        let patch = patch();
        assert_eq!(RouterPatch::from_bytes(&patch.to_bytes().unwrap()).unwrap(), patch);
        std::fs::write(&path, "what was there").unwrap();
        patch.write(&path).unwrap();
        assert_eq!(RouterPatch::read(&path).unwrap(), patch);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "a file was left beside it");
        // Any reader of the format has it.
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let tensor = file.tensor("model.layers.2.block_sparse_moe.gate.weight").unwrap();
        assert_eq!((tensor.shape(), tensor.data()), (&[4, 5][..], as_bytes(&patch.gates[40..])));
    }

    #[test]
    fn every_byte_that_is_missing_or_altered_is_noticed() {
        let bytes = patch().to_bytes().unwrap();
        for length in 0..bytes.len() {
            refusal(&bytes[..length]);
        }
        refusal(&[&bytes[..], &[0]].concat());
        let spaces = bytes.len() - patch().gates.len() * 4;
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut altered = bytes.clone();
                altered[at] ^= 1 << bit;
                // What is left is the patch itself: a digit in upper case, a space of the padding that became another.
                match RouterPatch::from_bytes(&altered) {
                    Ok(found) => assert!(found == patch() && at < spaces, "byte {at}, bit {bit}"),
                    Err(error) => assert_eq!(error.status(), Status::PatchDamaged, "byte {at}, bit {bit}: {error}"),
                }
            }
        }
    }

    #[test]
    fn a_file_that_is_no_patch_is_refused_for_what_is_wrong() {
        let wrong = |from: &str, to: &str, expected: &str| {
            let found = refusal(&with(from, to));
            assert!(found.contains(expected), "{found}, expected {expected}");
        };
        wrong("\\\"version\\\":1", "\\\"version\\\":2", "is of version 2, this library reads 1");
        wrong("\\\"version\\\":1", "\\\"other\\\":1", "that is none");
        wrong("gemmoe_router_patch", "gemmoe_router_train", "has no \"gemmoe_router_patch\"");
        wrong("0123456789abcdef", "0123456789abcdee", "does not match its checksum");
        wrong("0123456789abcdef", "+123456789abcdef", "not 16 hexadecimal digits");
        wrong("layers.1.", "layers.7.", "and not \"model.layers.1.");
        wrong("layers.0.", "layers.9.", "has no \"model.layers.0.");
        wrong("[4,5]", "[5,4]", "does not match its checksum");
        wrong("[4,5]", "[2,10]", "does not match its checksum");
        wrong("[4,5]", "[20]", "of two dimensions");
        wrong("[4,5]", "[1,20]", "which no model has");
        wrong("\"F32\"", "\"I32\"", "expected F32");
        for offsets in ["[80,161]", "[81,161]", "[160,80]", "[0,80]", "[80,18446744073709551615]"] {
            wrong("[80,160]", offsets, "a header that cannot be read");
        }
        for shape in ["[4,6]", "[4294967296,4294967296]", "[4,-5]"] {
            wrong("[4,5]", shape, "a header that cannot be read");
        }
        let fourth = "\"model.layers.3.block_sparse_moe.gate.weight\":{\"dtype\":\"F32\",\"shape\":[4,5],\"data_offsets\":[240,320]}";
        wrong("{\"__metadata__\"", &format!("{{{fourth},\"__metadata__\""), "its header describes");
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused_when_made_and_when_read() {
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut patch = patch();
            patch.gates[41] = number;
            let found = refusal(&patch.to_bytes().unwrap());
            assert!(found.contains("model.layers.2.") && found.contains("not finite"), "{found}");
            let keys = r#""num_hidden_layers":3,"num_local_experts":4,"hidden_size":5"#;
            let config = Config::from_json(format!(r#"{{"model_type":"gemmoe",{keys}}}"#).as_bytes()).unwrap();
            let error = RouterPatch::new(&config, &patch.gates, 1).unwrap_err();
            assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("gates")));
            assert!(error.to_string().contains("layer 2"), "{error}");
            assert!(RouterPatch::new(&config, &[0.0; 59], 1).is_err());
            assert!(RouterPatch::new(&config, &[0.0; 60], 1).is_ok());
        }
    }

    #[test]
    fn a_header_that_would_grow_is_not_read_at_all() {
        for announced in [MAX_HEADER_BYTES + 1, 1 << 40, u64::MAX, u64::MAX - 8] {
            let mut bytes = vec![b' '; 512 << 10];
            bytes[..8].copy_from_slice(&announced.to_le_bytes());
            assert!(refusal(&bytes).contains("at most 262144"));
        }
        let text = format!("{{\"__metadata__\":{}", "[".repeat(200_000));
        refusal(&[&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat());
    }

    #[test]
    fn files_that_are_none_or_are_not_there_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let status = |path: &Path| {
            let error = RouterPatch::read(path).unwrap_err();
            assert_eq!(error.file(), Some(&*path.display().to_string()));
            error.status()
        };
        assert_eq!(status(&directory.path().join("absent")), Status::FileNotFound);
        assert_eq!(status(directory.path()), Status::PatchDamaged);
        let path = directory.path().join("short");
        std::fs::write(&path, [0; 7]).unwrap();
        assert_eq!(status(&path), Status::PatchDamaged);
        assert_eq!(patch().write(&directory.path().join("no/where")).unwrap_err().status(), Status::WriteFailed);
    }
}
