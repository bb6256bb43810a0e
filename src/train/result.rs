//! What comes out of a run: a model directory that differs from the one it was made from in its gates alone. All other tensors
//! and files are copied byte by byte, in whatever layout and format they are; a gate is rounded to the dtype it is stored in,
//! to the nearest, ties to even.

use std::path::Path;

use crate::error::{Error, Result, Status};
use crate::memory::try_vec;
use crate::model::loader::each_rows;
use crate::model::narrow::narrow;
use crate::model::router_patch::{GateSizes, fingerprint};
use crate::model::weights::Matrix;
use crate::model::writer::NewTensor;
use crate::model::{Checkpoint, Config, Description, Formats, ModelWriter, Progress, beside};
use crate::quant::{Format, PANEL_ROWS, Shape};

/// Bytes of a tensor that are copied at once.
const COPIED_BYTES: u64 = 1 << 20;

/// A model directory, and how its routers are replaced.
pub struct NewGates<'a> {
    /// The directory.
    pub source: &'a Path,
    /// Whether symbolic links in it are followed.
    pub follow_links: bool,
    /// What the model is that was loaded from it, and the fingerprint of its stored gates.
    pub config: &'a Config,
    pub base: u64,
    /// Bytes of one weight file, about; none is as the largest has them.
    pub shard_bytes: Option<u64>,
}

/// A directory that is opened, and what is to be written.
struct Prepared {
    checkpoint: Checkpoint,
    /// All tensors, in the order of the files.
    tensors: Vec<NewTensor>,
    /// Of each tensor: the layer whose gate it is.
    layers: Vec<Option<usize>>,
    /// Files beside the weights.
    files: Vec<String>,
    shard_bytes: u64,
}

impl NewGates<'_> {
    /// Writes the directory with `gates: [layers, experts, hidden_size]` to `target`, which must not be there, or be empty.
    /// Weights of other formats beside the model's (`.bin`, `.gguf` and their like), which would be of the old routers, and folders are
    /// left out. `progress` counts bytes of tensors; after a cancel or an error nothing of the target is left.
    ///
    /// Fails as loading does; with `TensorValue` where a gate's dtype cannot hold a number; as [`ModelWriter::create`] does.
    pub fn write(&self, gates: &[f32], target: &Path, progress: &Progress) -> Result<()> {
        let Prepared { checkpoint, tensors, layers, files, shard_bytes } = self.prepare()?;
        progress.begin(tensors.iter().map(NewTensor::bytes).sum());
        progress.check()?;
        let mut writer = ModelWriter::create(target, &tensors, shard_bytes)?;
        for name in &files {
            writer.copy_file(name, checkpoint.open_file(name)?)?;
        }
        let size = self.config.num_local_experts * self.config.hidden_size;
        let (mut staging, mut rounded) = (Vec::new(), Vec::new());
        for (index, (tensor, layer)) in tensors.iter().zip(&layers).enumerate() {
            if let Some(layer) = layer {
                let gate = &gates[layer * size..(layer + 1) * size];
                narrow(gate, tensor.dtype, &mut rounded, &tensor.name, self.config.hidden_size, 0)?;
                writer.write(index, 0, &rounded)?;
                continue;
            }
            let unknown = || Error::new(Status::Internal, format!("tensor \"{}\" was not checked", tensor.name));
            let stored = checkpoint.tensor(&tensor.name).ok_or_else(unknown)?;
            let bytes = tensor.bytes();
            for skip in (0..bytes).step_by(COPIED_BYTES as usize) {
                let count = (bytes - skip).min(COPIED_BYTES) as usize;
                if staging.len() < count {
                    staging = try_vec(&tensor.name, count, 0u8)?;
                }
                checkpoint.read_tensor(stored, skip, &mut staging[..count], progress)?;
                writer.write(index, skip, &staging[..count])?;
            }
        }
        writer.finish()
    }

    /// Fails where `write` would before its first tensor, and writes nothing: to be asked before hours of training.
    pub fn check(&self, target: &Path) -> Result<()> {
        let prepared = self.prepare()?;
        for name in &prepared.files {
            prepared.checkpoint.open_file(name)?;
        }
        ModelWriter::check(target, &prepared.tensors, prepared.shard_bytes)
    }

    fn prepare(&self) -> Result<Prepared> {
        let mut checkpoint = Checkpoint::open(self.source, self.follow_links)?;
        let config = Config::from_json(&beside::read_config(&checkpoint, self.source)?)?;
        checkpoint.read_headers()?;
        let description = Description::new(&config, &checkpoint, Formats::default())?;
        if description.config != *self.config || fingerprint(&stored_gates(&description, &checkpoint)?) != self.base {
            let text = "is not the model any more that was loaded from it: its config.json or its routers have changed";
            return Err(Error::new(Status::PatchModel, text).in_file(self.source.display().to_string()));
        }
        let router = |layer| description.layer_parts(layer).router.as_ref().map(|part| part.tensor.as_str());
        let routers: Vec<Option<&str>> = (0..config.num_hidden_layers).map(router).collect();
        let (mut tensors, mut layers) = (Vec::new(), Vec::new());
        for name in checkpoint.tensor_names_in_order() {
            let Some(tensor) = checkpoint.tensor(name) else { continue };
            tensors.push(NewTensor {
                name: name.to_owned(),
                dtype: tensor.info.dtype,
                shape: tensor.info.shape.clone(),
            });
            layers.push(routers.iter().position(|router| *router == Some(name)));
        }
        let largest = checkpoint.bytes_of_files().into_iter().max().unwrap_or(0).max(1);
        Ok(Prepared {
            files: checkpoint.files_beside()?,
            shard_bytes: self.shard_bytes.unwrap_or(largest),
            tensors,
            layers,
            checkpoint,
        })
    }
}

/// The gates of a directory, `[layers, experts, hidden_size]`.
fn stored_gates(description: &Description, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
    let sizes = GateSizes::of(&description.config)?;
    let mut gates = try_vec("the gates of a model", sizes.count(), 0f32)?;
    for (layer, gate) in gates.chunks_exact_mut(sizes.of_layer()).enumerate() {
        let Some(part) = &description.layer_parts(layer).router else { continue };
        each_rows(part, checkpoint, &Progress::default(), |panel, source| {
            let shape = Shape { rows: source.rows(), columns: part.columns, format: Format::F32 };
            let matrix = Matrix::from_rows(&part.tensor, shape, source)?;
            let rows = gate.chunks_exact_mut(part.columns).skip(panel * PANEL_ROWS);
            rows.take(shape.rows).enumerate().for_each(|(row, out)| matrix.read_row(row, out));
            Ok(())
        })?;
    }
    Ok(gates)
}
