//! Weights on a device: copied there part by part as they are read, in one block of memory.

#[cfg(feature = "bench")]
pub mod generated;

use std::collections::BTreeMap;
use std::sync::Arc;

use safetensors::Dtype;
use xxhash_rust::xxh3::Xxh3Default;

use super::arguments::MatrixArguments;
use super::device::Device;
use super::driver::Address;
use super::kernels::kind_of;
use super::memory::{Arena, Mark, PinnedBlock};
use crate::error::Result;
use crate::memory::{Buffer, as_bytes, try_with_capacity};
use crate::model::weights::{Destination, ExpertWeights, LayerWeights, Matrix, Weights, sample};
use crate::model::{Checkpoint, Description, Progress};
use crate::quant::{Format, LINE_BYTES, ScaleDtype, Shape, pair_halves};

/// Bytes that are copied to the device at once; while one such block is on its way the next is filled.
const STAGING_BYTES: usize = 16 << 20;

/// A matrix on a device, in the layout of `quant/panels.rs`, with pairs of columns in f16 as in bf16.
pub struct DeviceMatrix {
    shape: Shape,
    lines: Address,
    /// 0 in formats without.
    scales: Address,
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

/// A norm's weights on a device, `[columns]` f32.
pub struct DeviceVector(pub Address);

/// Experts of one layer whose matrices have formats of one kind.
pub struct ExpertGroup {
    /// The kind, as `kind_of` tells.
    pub kind: usize,
    /// The experts, a list on the device; 0 where they are all of the layer's.
    pub selected: Address,
    /// How many.
    pub count: usize,
}

/// What kernels are given of one layer's experts.
pub struct ExpertTables {
    /// `[experts]` MatrixArguments each, on the device.
    pub gate: Address,
    pub up: Address,
    pub down: Address,
    /// Of gate and up, which have one format.
    pub gate_up_groups: Vec<ExpertGroup>,
    pub down_groups: Vec<ExpertGroup>,
}

/// All weights of a model on a device.
pub struct DeviceWeights {
    pub embedding: DeviceMatrix,
    pub layers: Vec<LayerWeights<DeviceMatrix, DeviceVector>>,
    /// As `layers`.
    pub expert_tables: Vec<ExpertTables>,
    pub final_norm: DeviceVector,
    pub head: Option<DeviceMatrix>,
    pub embedding_dtype: Dtype,
    /// `[head_dim / 2]` f32.
    pub rotary_frequencies: Address,
    /// Bytes of everything, and of the experts, as [`Weights::bytes`] has them.
    pub bytes: (usize, usize),
    /// Of all parts, in the order they were read.
    pub hash: u64,
    /// What all of it is in.
    arena: Arena,
}

/// Bytes on the device of the weights of a model that has these.
pub fn planned_bytes(description: &Description) -> usize {
    let config = &description.config;
    let (layers, experts) = (config.num_hidden_layers, config.num_local_experts);
    // Lines and scales of each matrix, norms, tables and lists are parts of their own, padded by less than one alignment.
    let parts_of_layer = 2 * (5 + 3 * experts) + 2 + 3 + 10;
    let padding = Arena::padded(1) * (2 * 2 + 2 + layers * parts_of_layer);
    let tables = layers * experts * (3 * size_of::<MatrixArguments>() + 2 * size_of::<u32>());
    let frequencies = config.head_dim / 2 * size_of::<f32>();
    description.loaded_bytes.0 as usize + padding + tables + frequencies
}

impl DeviceWeights {
    /// Reads every weight of a checkpoint as [`Weights::load_to`] does and copies it to the device. `hasher` has taken in what
    /// else tells models apart.
    pub fn load(
        device: &Arc<Device>,
        description: &Description,
        checkpoint: &Checkpoint,
        (threads, map): (usize, bool),
        progress: &Progress,
        rotary_frequencies: &[f32],
        hasher: Xxh3Default,
    ) -> Result<DeviceWeights> {
        DeviceWeights::take(device, description, rotary_frequencies, hasher, |uploader| {
            Weights::load_to(uploader, description, checkpoint, threads, map, progress)
        })
    }

    /// Takes all parts that `read` hands over.
    fn take(
        device: &Arc<Device>,
        description: &Description,
        rotary_frequencies: &[f32],
        hasher: Xxh3Default,
        read: impl FnOnce(&mut Uploader) -> Result<Weights<DeviceMatrix, DeviceVector>>,
    ) -> Result<DeviceWeights> {
        let mut arena = Arena::new(device, "the weights", planned_bytes(description))?;
        let mut uploader = Uploader::new(&mut arena, hasher)?;
        let loaded = read(&mut uploader)?;
        let hash = uploader.hasher.digest();
        let mut expert_tables = try_with_capacity("tables of experts", loaded.layers.len())?;
        for layer in &loaded.layers {
            expert_tables.push(uploader.tables(&layer.experts)?);
        }
        let rotary_frequencies = uploader.bytes(as_bytes(rotary_frequencies))?;
        uploader.finish()?;
        drop(uploader);
        let (all, experts) = description.loaded_bytes;
        let Weights { embedding, layers, final_norm, head, embedding_dtype } = loaded;
        Ok(DeviceWeights {
            embedding,
            layers,
            expert_tables,
            final_norm,
            head,
            embedding_dtype,
            rotary_frequencies,
            bytes: (all as usize, experts as usize),
            hash,
            arena,
        })
    }

    /// The matrix that gives logits.
    pub fn head(&self) -> &DeviceMatrix {
        self.head.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes they take on the device.
    pub fn device_bytes(&self) -> usize {
        self.arena.bytes()
    }
}

/// Takes parts as they are read and has them copied while the next are.
struct Uploader<'a> {
    arena: &'a mut Arena,
    staging: [(PinnedBlock, Mark); 2],
    /// Which of them is filled next.
    next: usize,
    hasher: Xxh3Default,
}

impl Uploader<'_> {
    fn new(arena: &mut Arena, hasher: Xxh3Default) -> Result<Uploader<'_>> {
        let device = Arc::clone(arena.device());
        let staging_bytes = arena.bytes().clamp(LINE_BYTES, STAGING_BYTES);
        let block = || Ok((PinnedBlock::new(&device, "weights on their way", staging_bytes)?, Mark::new(&device)?));
        Ok(Uploader { staging: [block()?, block()?], next: 0, hasher, arena })
    }

    /// Copies bytes to a part of their own; `fill` writes them, or what becomes of them in as many bytes, to where they are
    /// copied from.
    fn part(&mut self, bytes: &[u8], fill: impl Fn(&[u8], &mut [u8])) -> Result<Address> {
        let address = self.arena.take(bytes.len())?;
        let device = Arc::clone(self.arena.device());
        let current = device.enter()?;
        let step = self.staging[0].0.bytes() / LINE_BYTES * LINE_BYTES;
        for (index, bytes) in bytes.chunks(step).enumerate() {
            let (block, mark) = &mut self.staging[self.next];
            // What was in it last has arrived.
            mark.wait(&current)?;
            fill(bytes, &mut block.as_mut_slice()[..bytes.len()]);
            // SAFETY: the block is not touched before the mark is passed, by `finish` or `drop` neither; the part is new.
            unsafe { block.send(&current, bytes.len(), address + (index * step) as Address) }?;
            mark.set(&current)?;
            self.next = 1 - self.next;
        }
        Ok(address)
    }

    fn bytes(&mut self, bytes: &[u8]) -> Result<Address> {
        self.part(bytes, |bytes, out| out.copy_from_slice(bytes))
    }

    fn tables(&mut self, experts: &[ExpertWeights<DeviceMatrix>]) -> Result<ExpertTables> {
        type Part = fn(&ExpertWeights<DeviceMatrix>) -> &DeviceMatrix;
        let parts: [Part; 3] = [|expert| &expert.gate, |expert| &expert.up, |expert| &expert.down];
        let mut tables = [0; 3];
        for (table, part) in tables.iter_mut().zip(parts) {
            let mut bytes = try_with_capacity("a table of experts", experts.len() * size_of::<MatrixArguments>())?;
            experts.iter().for_each(|expert| bytes.extend_from_slice(&matrix_bytes(part(expert).arguments())));
            *table = self.bytes(&bytes)?;
        }
        let kinds = |part: Part| experts.iter().map(|expert| kind_of(part(expert).shape.format)).collect::<Vec<_>>();
        Ok(ExpertTables {
            gate: tables[0],
            up: tables[1],
            down: tables[2],
            gate_up_groups: self.groups(&kinds(parts[0]))?,
            down_groups: self.groups(&kinds(parts[2]))?,
        })
    }

    /// The experts by their kind, `kinds` being that of each.
    fn groups(&mut self, kinds: &[usize]) -> Result<Vec<ExpertGroup>> {
        let mut groups = Vec::new();
        for (kind, experts) in by_kind(kinds) {
            let selected = if experts.len() == kinds.len() { 0 } else { self.bytes(as_bytes(&experts))? };
            groups.push(ExpertGroup { kind, selected, count: experts.len() });
        }
        Ok(groups)
    }

    /// Waits until everything has arrived.
    fn finish(&self) -> Result<()> {
        self.arena.device().enter()?.wait()
    }
}

/// A matrix's arguments as the device reads them from a table.
fn matrix_bytes(matrix: MatrixArguments) -> [u8; size_of::<MatrixArguments>()] {
    // SAFETY: two pointers and four u32 in C's order leave no padding: 32 initialised bytes.
    unsafe { std::mem::transmute(matrix) }
}

/// Places by the kind that stands there, kinds in rising order.
fn by_kind(kinds: &[usize]) -> BTreeMap<usize, Vec<u32>> {
    let mut places: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for (place, kind) in kinds.iter().enumerate() {
        places.entry(*kind).or_default().push(place as u32);
    }
    places
}

impl Destination for Uploader<'_> {
    type Matrix = DeviceMatrix;
    type Vector = DeviceVector;

    fn matrix(&mut self, _name: &str, matrix: Matrix) -> Result<DeviceMatrix> {
        matrix.sample(&mut |bytes| self.hasher.update(bytes));
        let lines = match matrix.shape().format {
            Format::F16 => self.part(matrix.lines(), pair_halves)?,
            _ => self.bytes(matrix.lines())?,
        };
        let scales = if matrix.scales().is_empty() { 0 } else { self.bytes(matrix.scales())? };
        Ok(DeviceMatrix { shape: *matrix.shape(), lines, scales })
    }

    fn vector(&mut self, _name: &str, vector: Buffer<f32>) -> Result<DeviceVector> {
        sample(as_bytes(&vector), &mut |bytes| self.hasher.update(bytes));
        self.bytes(as_bytes(&vector)).map(DeviceVector)
    }
}

impl Drop for Uploader<'_> {
    fn drop(&mut self) {
        // After an error copies may be on their way out of the blocks that are freed next.
        let _ = self.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_are_listed_by_the_kind_of_their_format() {
        let lists: Vec<(usize, Vec<u32>)> = by_kind(&[4, 1, 4, 4, 0]).into_iter().collect();
        assert_eq!(lists, [(0, vec![4]), (1, vec![1]), (4, vec![0, 2, 3])]);
    }

    #[test]
    fn a_matrix_in_a_table_has_the_bytes_of_its_arguments() {
        let shape = Shape { rows: 20, columns: 100, format: Format::INT8 };
        let bytes = matrix_bytes(DeviceMatrix { shape, lines: 0x1122, scales: 0x3344 }.arguments());
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        assert_eq!((word(0), word(8), word(16), word(20), word(24), word(28)), (0x1122, 0x3344, 20, 128, 0, 0));
    }
}
