//! Where training stands, as a file: gates, the optimiser's moments and its steps, nothing of the frozen weights. What goes on
//! from it gives the same bits as what was never left.
//!
//! A safetensors file. For each layer, `[experts, hidden_size]` in f32: `model.layers.{i}.block_sparse_moe.gate.weight`, the same with
//! `.first_moment` and `.second_moment` after it, and with `.reference` what pairs are compared with. The metadata's one key has the
//! version, the steps, the model's fingerprint, and a checksum (xxh3, 64 bits) of those two, of what a run adds, and of all numbers, kind
//! after kind, everything little-endian.

use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::Xxh3;

use super::trainer::RouterTrainer;
use crate::error::{Error, Result, Status};
use crate::memory::as_bytes;
use crate::model::router_patch;
use crate::platform;

/// The metadata's key.
const KEY: &str = "gemmoe_router_training";
/// Of the format.
const VERSION: u32 = 1;
/// A header never takes more.
const MAX_HEADER_BYTES: u64 = 1 << 20;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    steps: u64,
    /// Of the model, in hexadecimal: another model's gates would fit, and be wrong.
    model: String,
    /// What a run adds. In one key with the rest: the order of several would not be the same in every file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    run: Option<Value>,
    /// In hexadecimal.
    checksum: String,
}

impl Header {
    /// Of the rest of the header and of the numbers in the order of `SUFFIXES`.
    fn checksum_with(&self, numbers: [&[f32]; 4]) -> String {
        let mut hasher = Xxh3::new();
        hasher.update(&self.steps.to_le_bytes());
        hasher.update(self.model.as_bytes());
        if let Some(run) = &self.run {
            hasher.update(run.to_string().as_bytes());
        }
        numbers.iter().for_each(|numbers| hasher.update(as_bytes(numbers)));
        format!("{:016x}", hasher.digest())
    }
}

/// What is saved of each gate, by the end of its tensor's name.
const SUFFIXES: [&str; 4] = ["", ".first_moment", ".second_moment", ".reference"];

fn tensor_name(layer: usize, suffix: &str) -> String {
    router_patch::tensor_name(layer) + suffix
}

pub(super) fn damaged(text: String) -> Error {
    Error::new(Status::SnapshotDamaged, text)
}

impl RouterTrainer {
    /// `[layers, experts, hidden_size]`
    fn sizes(&self) -> [usize; 3] {
        let config = self.model().config();
        [config.num_hidden_layers, config.num_local_experts, config.hidden_size]
    }

    fn fingerprint(&self) -> String {
        format!("{:016x}", self.model().loaded_fingerprint())
    }

    /// The state as the bytes of a file.
    pub fn state(&self) -> Result<Vec<u8>> {
        self.state_with(None)
    }

    /// The same with what a run adds to the header.
    pub(super) fn state_with(&self, run: Option<Value>) -> Result<Vec<u8>> {
        let [layers, experts, hidden_size] = self.sizes();
        let size = experts * hidden_size;
        let all: [&[f32]; 4] = [&self.gates, &self.optimiser.first, &self.optimiser.second, &self.reference];
        let views = (0..layers).flat_map(|layer| {
            SUFFIXES.iter().zip(all).map(move |(suffix, numbers)| {
                let bytes = as_bytes(&numbers[layer * size..(layer + 1) * size]);
                let view = TensorView::new(Dtype::F32, vec![experts, hidden_size], bytes);
                view.map(|view| (tensor_name(layer, suffix), view))
            })
        });
        let defect = |error| Error::new(Status::Internal, format!("a training state cannot be written: {error}"));
        let views: Vec<_> = views.collect::<std::result::Result<_, _>>().map_err(defect)?;
        let (steps, model) = (self.optimiser.step, self.fingerprint());
        let mut header = Header { version: VERSION, steps, model, run, checksum: String::new() };
        header.checksum = header.checksum_with(all);
        let header = serde_json::to_string(&header)
            .map_err(|error| Error::new(Status::Internal, format!("a training state has no header: {error}")))?;
        safetensors::serialize(views, Some(std::iter::once((KEY.to_owned(), header)).collect())).map_err(defect)
    }

    /// Steps that a state has taken and what a run has added, once its header is checked.
    pub(super) fn run_of_state(&self, bytes: &[u8]) -> Result<(u64, Option<Value>)> {
        let header = self.header_of_state(bytes)?;
        Ok((header.steps, header.run))
    }

    fn header_of_state(&self, bytes: &[u8]) -> Result<Header> {
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(not_a_file)?;
        let header = metadata.metadata().as_ref().and_then(|entries| entries.get(KEY));
        let header = header.ok_or_else(|| damaged(format!("this is no training state: its header lacks \"{KEY}\"")))?;
        let header: Header = serde_json::from_str(header)
            .map_err(|error| damaged(format!("the header of a training state cannot be read: {error}")))?;
        if header.version != VERSION {
            let text = format!("the training state is of version {}, expected {VERSION}", header.version);
            return Err(Error::new(Status::SnapshotVersion, text));
        }
        if header.model != self.fingerprint() {
            let text = "the training state is of another model, or of the same one loaded with other options";
            return Err(Error::new(Status::SnapshotModel, text));
        }
        Ok(header)
    }

    /// Goes on from a state. Fails with `SnapshotDamaged`, `SnapshotVersion` or `SnapshotModel`, and is then as before.
    pub fn set_state(&mut self, bytes: &[u8]) -> Result<()> {
        let [layers, experts, hidden_size] = self.sizes();
        let header = self.header_of_state(bytes)?;
        let file = SafeTensors::deserialize(bytes).map_err(not_a_file)?;
        let mut all = [(); SUFFIXES.len()].map(|()| Vec::new());
        for layer in 0..layers {
            for (suffix, numbers) in SUFFIXES.iter().zip(&mut all) {
                let name = tensor_name(layer, suffix);
                let tensor = file.tensor(&name).map_err(|_| damaged(format!("the training state lacks \"{name}\"")))?;
                if (tensor.dtype(), tensor.shape()) != (Dtype::F32, &[experts, hidden_size]) {
                    let (dtype, shape) = (tensor.dtype(), tensor.shape());
                    let text = format!("\"{name}\" is {dtype} {shape:?}, expected F32 [{experts}, {hidden_size}]");
                    return Err(damaged(text));
                }
                numbers.extend(tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)));
            }
        }
        if let Some(suffix) = all.iter().position(|numbers| numbers.iter().any(|number| !number.is_finite())) {
            return Err(damaged(format!("a gate{} of the training state is not finite", SUFFIXES[suffix])));
        }
        if header.checksum != header.checksum_with([&all[0], &all[1], &all[2], &all[3]]) {
            return Err(damaged("the training state does not match its checksum: the file was altered".into()));
        }
        [self.gates, self.optimiser.first, self.optimiser.second, self.reference] = all;
        self.optimiser.step = header.steps;
        Ok(())
    }

    /// Writes the state to a file, whose old content is there until the new one is whole.
    pub fn save_state(&self, path: &Path) -> Result<()> {
        write_file(path, &self.state()?)
    }

    /// Goes on from a file; see `set_state`.
    pub fn load_state(&mut self, path: &Path) -> Result<()> {
        let bytes = self.read_file(path)?;
        self.set_state(&bytes).map_err(|error| error.in_file(name_of(path)))
    }

    /// The bytes of a file that is not longer than a state of this model can be.
    pub(super) fn read_file(&self, path: &Path) -> Result<Vec<u8>> {
        let read_failed = |error: std::io::Error| {
            let text = format!("{} cannot be read: {error}", path.display());
            Error::new(Status::ReadFailed, text).in_file(name_of(path))
        };
        let most = (self.gates().len() * SUFFIXES.len() * size_of::<f32>()) as u64 + MAX_HEADER_BYTES;
        let length = std::fs::metadata(path).map_err(read_failed)?.len();
        if length > most {
            let text = format!("it has {length} bytes, and a training state of this model at most {most}");
            return Err(damaged(text).in_file(name_of(path)));
        }
        std::fs::read(path).map_err(read_failed)
    }
}

fn not_a_file(error: safetensors::SafeTensorError) -> Error {
    damaged(format!("this is no training state: {error}"))
}

/// What messages call a file.
pub(super) fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Writes a file, whose old content is there until the new one is whole.
pub(super) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let beside = path.with_file_name(format!(".{}.part", name_of(path)));
    platform::replace_file(path, &beside, bytes).map_err(|error| {
        let text = format!("the training state cannot be written to {}: {error}", path.display());
        Error::new(Status::WriteFailed, text).in_file(name_of(path))
    })
}
