//! Weights on a device: copied there part by part as they are read, in one block of memory; each expert, which may leave
//! again, in one of its own (`experts`).

#[cfg(feature = "bench")]
pub mod generated;

use std::sync::Arc;

use safetensors::Dtype;
use xxhash_rust::xxh3::Xxh3Default;

use super::CudaOptions;
use super::arguments::MatrixArguments;
use super::device::Device;
use super::driver::Address;
use super::experts::{Experts, Home};
use super::memory::{Arena, DeviceBlock};
use super::residency::{MatrixLayout, Residency, Sizes};
use super::upload::Upload;
use crate::backend::device_bytes::DeviceBytes;
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, as_bytes, try_with_capacity};
use crate::model::weights::{
    Destination, ExpertPart, ExpertPlace, ExpertWeights, LayerWeights, Matrix, Weights, sample,
};
use crate::model::{Checkpoint, Description, Progress};
use crate::quant::{ScaleDtype, Shape};

/// A matrix on a device, in the layout of `quant/panels.rs`, with pairs of columns in f16 as in bf16.
pub struct DeviceMatrix {
    pub shape: Shape,
    pub lines: Address,
    /// 0 in formats without.
    pub scales: Address,
}

impl DeviceMatrix {
    /// Its size and format.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// For kernels.
    pub fn arguments(&self) -> MatrixArguments {
        let groups = self.shape.format.groups();
        MatrixArguments {
            lines: self.lines as *const u8,
            scales: self.scales as *const u8,
            rows: self.shape.rows as u32,
            columns: self.shape.padded_columns() as u32,
            group_shift: groups.map_or(0, |groups| (groups.size / 32).trailing_zeros()),
            half_scales: groups.is_some_and(|groups| groups.scales == ScaleDtype::F16) as u32,
        }
    }
}

/// No matrix: where a kernel takes fewer.
pub const NO_MATRIX: MatrixArguments = MatrixArguments {
    lines: std::ptr::null(),
    scales: std::ptr::null(),
    rows: 0,
    columns: 0,
    group_shift: 0,
    half_scales: 0,
};

/// A norm's weights on a device, `[columns]` f32.
pub struct DeviceVector(pub Address);

/// A layer on a device; of the experts, which are in [`Experts`], the sizes alone.
pub type DeviceLayer = LayerWeights<DeviceMatrix, DeviceVector, Shape>;

/// All weights of a model but the experts.
pub struct DeviceWeights {
    pub embedding: DeviceMatrix,
    pub layers: Vec<DeviceLayer>,
    pub final_norm: DeviceVector,
    pub head: Option<DeviceMatrix>,
    pub embedding_dtype: Dtype,
    /// `[head_dim / 2]` f32.
    pub rotary_frequencies: Address,
    /// Bytes of everything, and of the experts, as [`Weights::bytes`] has them.
    pub bytes: (usize, usize),
    /// Of all parts, in the order they were read.
    pub hash: u64,
    /// What all of it is in, and the experts' tables.
    _arena: Arena,
}

/// What the weights of a model that has these take on a device.
pub fn planned_sizes(description: &Description) -> Result<Sizes> {
    let config = &description.config;
    let (layers, experts) = (config.num_hidden_layers, config.num_local_experts);
    // Lines and scales of each matrix, norms and tables are parts of their own, padded by less than one alignment.
    let parts_of_layer = 2 * 5 + 2 + 1;
    let padding = Arena::padded(1) * (2 * 2 + 3 + layers * parts_of_layer);
    let tables = layers * Experts::table_bytes(experts) + experts * size_of::<u32>();
    let frequencies = config.head_dim / 2 * size_of::<f32>();
    let (all, of_experts) = description.loaded_bytes;
    Sizes::new(description, (all - of_experts) as usize + padding + tables + frequencies)
}

impl DeviceWeights {
    /// Reads every weight of a checkpoint as [`Weights::load_to`] does and copies it to the device, but for the experts that do
    /// not fit under the limit. `hasher` has taken in what else tells models apart.
    pub fn load(
        device: &Arc<Device>,
        description: &Description,
        checkpoint: &Checkpoint,
        options: &CudaOptions,
        progress: &Progress,
        rotary_frequencies: &[f32],
        hasher: Xxh3Default,
    ) -> Result<(DeviceWeights, Experts)> {
        DeviceWeights::take(device, description, options, rotary_frequencies, hasher, |uploader| {
            let threads = options.cpu.threads.resolved_count();
            Weights::load_to(uploader, description, checkpoint, threads, options.map, progress)
        })
    }

    /// Takes all parts that `read` hands over.
    fn take(
        device: &Arc<Device>,
        description: &Description,
        options: &CudaOptions,
        rotary_frequencies: &[f32],
        hasher: Xxh3Default,
        read: impl FnOnce(&mut Uploader) -> Result<Weights<DeviceMatrix, DeviceVector, Shape>>,
    ) -> Result<(DeviceWeights, Experts)> {
        let sizes = planned_sizes(description)?;
        let residency = Residency::choose(&sizes, options.memory_limit)?;
        let mut arena = Arena::new(device, "the weights", sizes.dense)?;
        let mut uploader = Uploader::new(&mut arena, hasher, &sizes, &residency)?;
        let loaded = read(&mut uploader)?;
        let hash = uploader.hasher.digest();
        let rotary_frequencies = uploader.bytes(as_bytes(rotary_frequencies))?;
        uploader.finish()?;
        // Not before: an error frees them only after what is on its way to them has arrived.
        let homes = std::mem::take(&mut uploader.homes);
        drop(uploader);
        let experts = Experts::new(&mut arena, sizes, homes, options)?;
        let (all, of_experts) = description.loaded_bytes;
        let Weights { embedding, layers, final_norm, head, embedding_dtype } = loaded;
        let weights = DeviceWeights {
            embedding,
            layers,
            final_norm,
            head,
            embedding_dtype,
            rotary_frequencies,
            bytes: (all as usize, of_experts as usize),
            hash,
            _arena: arena,
        };
        Ok((weights, experts))
    }

    /// The matrix that gives logits.
    pub fn head(&self) -> &DeviceMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// Takes parts as they are read and has them copied while the next are.
struct Uploader<'a> {
    arena: &'a mut Arena,
    upload: Upload,
    hasher: Xxh3Default,
    sizes: &'a Sizes,
    residency: &'a Residency,
    /// The experts that are complete.
    homes: Vec<Vec<Home>>,
    /// The block of the expert that is not yet, where it is to be on the device; else its matrices so far.
    block: Option<DeviceBlock>,
    matrices: Vec<Matrix>,
}

impl<'a> Uploader<'a> {
    fn new(
        arena: &'a mut Arena,
        hasher: Xxh3Default,
        sizes: &'a Sizes,
        residency: &'a Residency,
    ) -> Result<Uploader<'a>> {
        let upload = Upload::new(arena.device(), sizes.dense.max(sizes.largest()))?;
        let mut homes = try_with_capacity("experts", sizes.experts.len())?;
        for layer in &sizes.experts {
            homes.push(try_with_capacity("experts", layer.len())?);
        }
        Ok(Uploader { upload, hasher, sizes, residency, homes, block: None, matrices: Vec::new(), arena })
    }

    /// Copies bytes to a part of their own.
    fn bytes(&mut self, bytes: &[u8]) -> Result<Address> {
        let address = self.arena.take(bytes.len())?;
        let device = Arc::clone(self.arena.device());
        // SAFETY: the part is new.
        unsafe { self.upload.send(&device.enter()?, bytes, address, |bytes, out| out.copy_from_slice(bytes)) }?;
        Ok(address)
    }

    /// Waits until everything has arrived.
    fn finish(&self) -> Result<()> {
        self.arena.device().enter()?.wait()
    }

    /// Has an expert's matrix brought by `send` to where its lines and its scales go in the expert's block, which is made for the
    /// first of them.
    fn send_part(
        &mut self,
        place: ExpertPlace,
        send: impl FnOnce(&mut Upload, Address, Address) -> Result<()>,
    ) -> Result<()> {
        let ExpertPlace { layer, expert, part } = place;
        let layout = &self.sizes.experts[layer][expert];
        let device = Arc::clone(self.arena.device());
        if part == ExpertPart::Gate {
            self.block = Some(DeviceBlock::new(&device, "the weights of an expert", layout.bytes)?);
        }
        let block = self.block.as_ref().ok_or_else(out_of_order)?;
        let MatrixLayout { lines, scales, .. } = *layout.of(part);
        let (lines, scales) = (block.address() + lines as Address, block.address() + scales as Address);
        send(&mut self.upload, lines, scales)?;
        if part == ExpertPart::Down
            && let Some(block) = self.block.take()
        {
            self.homes[layer].push(Home::Device(block));
        }
        Ok(())
    }
}

/// The error of parts that come otherwise than a destination is promised.
fn out_of_order() -> Error {
    Error::new(Status::Internal, "the matrices of an expert came in another order")
}

impl Destination for Uploader<'_> {
    type Matrix = DeviceMatrix;
    type Vector = DeviceVector;
    type Expert = Shape;

    fn matrix(&mut self, _name: &str, matrix: Matrix) -> Result<DeviceMatrix> {
        matrix.sample(&mut |bytes| self.hasher.update(bytes));
        let shape = *matrix.shape();
        let lines = self.arena.take(shape.line_bytes())?;
        let scales = if shape.scale_bytes() == 0 { 0 } else { self.arena.take(shape.scale_bytes())? };
        let device = Arc::clone(self.arena.device());
        // SAFETY: the parts are new.
        unsafe { self.upload.send_matrix(&device.enter()?, &matrix, lines, scales) }?;
        Ok(DeviceMatrix { shape, lines, scales })
    }

    fn vector(&mut self, _name: &str, vector: Buffer<f32>) -> Result<DeviceVector> {
        sample(as_bytes(&vector), &mut |bytes| self.hasher.update(bytes));
        self.bytes(as_bytes(&vector)).map(DeviceVector)
    }

    fn expert(&mut self, place: ExpertPlace, matrix: Matrix) -> Result<Shape> {
        matrix.sample(&mut |bytes| self.hasher.update(bytes));
        let shape = *matrix.shape();
        if self.residency.has(place.layer, place.expert) {
            let device = Arc::clone(self.arena.device());
            let current = device.enter()?;
            // SAFETY: the block is new, and laid out for this.
            self.send_part(place, |upload, lines, scales| unsafe {
                upload.send_matrix(&current, &matrix, lines, scales)
            })?;
            return Ok(shape);
        }
        self.matrices.push(matrix);
        if place.part == ExpertPart::Down {
            let matrices: [Matrix; 3] = std::mem::take(&mut self.matrices).try_into().map_err(|_| out_of_order())?;
            let [gate, up, down] = matrices;
            self.homes[place.layer].push(Home::Host(Arc::new(ExpertWeights { gate, up, down })));
        }
        Ok(shape)
    }
}

impl Drop for Uploader<'_> {
    fn drop(&mut self) {
        // After an error copies may be on their way out of the blocks, or to those, that are freed next.
        let _ = self.finish();
    }
}
