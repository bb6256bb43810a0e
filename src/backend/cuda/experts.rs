//! The experts of all layers: which are on the device and which in host memory, what kernels are given of them, and how
//! they move while passes go on.
//!
//! Passes borrow this for as long as they enqueue kernels that read it, no longer. Whoever moves experts borrows it too, so
//! that nothing is enqueued meanwhile, and first waits for what was, on the streams of all passes. A pass that records a graph
//! has nothing in progress; what it recorded is of one `generation` and no use in the next.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::CudaOptions;
use super::arguments::MatrixArguments;
use super::context::Current;
use super::device::Device;
use super::driver::Address;
use super::kernels::kind_of;
use super::memory::{Arena, DeviceBlock, Mark};
use super::residency::{self, ExpertLayout, Residency, STAGING_BUFFERS, Sizes};
use super::stream::Stream;
use super::upload::Upload;
use super::weights::{DeviceMatrix, NO_MATRIX};
use crate::backend::cpu::{CpuOptions, HostExperts};
use crate::backend::device_bytes::DeviceBytes;
use crate::backend::residency::WeightResidency;
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, Bytes, as_bytes, try_with_capacity};
use crate::model::weights::{ExpertPart, ExpertWeights, Matrix};
use crate::quant::{Format, unpair_halves};

/// Where an expert is.
pub enum Home {
    /// In a block of its own, as [`ExpertLayout`] has it.
    Device(DeviceBlock),
    /// As the CPU backend has it. A pass that computes it may hold it longer than this does.
    Host(Arc<ExpertWeights>),
}

/// Experts of one layer whose matrices have formats of one kind.
#[derive(Clone, Copy)]
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
    /// `[experts]` MatrixArguments each, on the device. Entries of experts in host memory point to the buffer they are
    /// copied to.
    pub gate: Address,
    pub up: Address,
    pub down: Address,
    /// Those on the device, by the kind of gate and up, which have one format.
    pub gate_up_groups: Vec<ExpertGroup>,
    pub down_groups: Vec<ExpertGroup>,
    /// Whether the device's copy is what it should be.
    is_current: bool,
}

/// What experts are copied through.
struct Staging {
    buffers: [DeviceBlock; STAGING_BUFFERS],
    /// Behind what reads each, on whichever stream that is.
    read: [Mark; STAGING_BUFFERS],
    upload: Upload,
}

/// See above.
pub struct Experts {
    device: Arc<Device>,
    sizes: Sizes,
    homes: Vec<Vec<Home>>,
    tables: Vec<ExpertTables>,
    /// `[experts]` u32 on the device: 0, 1, 2 ...: the list of expert e alone begins at entry e.
    numbers: Address,
    staging: Option<Staging>,
    /// The processor's options, and whether GeLU is exact; none where host experts are always copied.
    cpu: Option<(CpuOptions, bool)>,
    threads: Option<Arc<HostExperts>>,
    /// How often experts were told to move.
    generation: u64,
    /// Of all passes.
    streams: Vec<Weak<Stream>>,
}

const PARTS: [ExpertPart; 3] = [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down];

impl Experts {
    /// Bytes of a layer's tables: `[3, experts]` MatrixArguments and `[2, experts]` u32.
    pub fn table_bytes(experts: usize) -> usize {
        experts * (3 * size_of::<MatrixArguments>() + 2 * size_of::<u32>())
    }

    /// Takes experts over where they are; `arena` has room for their tables.
    pub fn new(arena: &mut Arena, sizes: Sizes, homes: Vec<Vec<Home>>, options: &CudaOptions) -> Result<Experts> {
        let device = Arc::clone(arena.device());
        let mut tables = try_with_capacity("tables of experts", homes.len())?;
        let most = homes.iter().map(Vec::len).max().unwrap_or(0);
        let numbers = arena.take(most * size_of::<u32>())?;
        for layer in &homes {
            let experts = layer.len();
            let gate = arena.take(Self::table_bytes(experts))?;
            let table_bytes = (experts * size_of::<MatrixArguments>()) as Address;
            tables.push(ExpertTables {
                gate,
                up: gate + table_bytes,
                down: gate + 2 * table_bytes,
                gate_up_groups: Vec::new(),
                down_groups: Vec::new(),
                is_current: false,
            });
        }
        let cpu = (!options.exact).then_some((options.cpu, options.variants.exact_gelu));
        let (staging, threads, streams) = (None, None, Vec::new());
        let mut experts =
            Experts { sizes, homes, tables, numbers, staging, cpu, threads, generation: 0, streams, device };
        let device = Arc::clone(&experts.device);
        let current = device.enter()?;
        let mut list = try_with_capacity("tables of experts", most)?;
        list.extend(0..most as u32);
        write(&current, as_bytes(&list), numbers)?;
        if experts.needs_host() {
            experts.start_threads()?;
            experts.prepare_staging()?;
        }
        experts.write_tables(&current)?;
        Ok(experts)
    }

    /// Takes note of a pass's stream.
    pub fn attach(&mut self, stream: &Arc<Stream>) -> Result<()> {
        self.streams.retain(|stream| stream.strong_count() > 0);
        let one_more = self.streams.try_reserve(1);
        one_more.map_err(|_| Error::out_of_memory("a pass", self.streams.len() * size_of::<Weak<Stream>>()))?;
        self.streams.push(Arc::downgrade(stream));
        Ok(())
    }

    /// Changes whenever experts move: graphs of another one read what is not there any more.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a pass needs nothing of the host between its layers.
    pub fn are_all_on_device(&self) -> bool {
        !self.needs_host() && self.tables.iter().all(|tables| tables.is_current)
    }

    /// Whether experts of any layer are in host memory: work on them cannot be enqueued ahead.
    pub fn needs_host(&self) -> bool {
        (0..self.homes.len()).any(|layer| self.has_host(layer))
    }

    /// The same of one layer.
    pub fn has_host(&self, layer: usize) -> bool {
        self.homes[layer].iter().any(|home| matches!(home, Home::Host(_)))
    }

    /// What kernels are given of a layer's experts. What a move that failed has left undone is done first.
    pub fn tables(&mut self, current: &Current, layer: usize) -> Result<&ExpertTables> {
        if !self.tables[layer].is_current {
            self.write_table(current, layer)?;
        }
        Ok(&self.tables[layer])
    }

    /// An expert's weights, if they are in host memory.
    pub fn host_expert(&self, layer: usize, expert: usize) -> Option<&Arc<ExpertWeights>> {
        match &self.homes[layer][expert] {
            Home::Host(weights) => Some(weights),
            Home::Device(_) => None,
        }
    }

    /// The threads that compute experts in host memory.
    pub fn threads(&mut self) -> Result<Arc<HostExperts>> {
        self.start_threads()?;
        self.threads.clone().ok_or_else(|| Error::new(Status::Internal, "these experts are always copied"))
    }

    /// Has an expert copied to its buffer on the device, and answers the groups for its gate and up, and for its down. They are
    /// good until this is given back; `note_read` comes behind what reads them, or a wait.
    pub fn copy_expert(&mut self, current: &Current, layer: usize, expert: usize) -> Result<[ExpertGroup; 2]> {
        self.prepare_staging()?;
        if !self.tables[layer].is_current {
            self.write_table(current, layer)?;
        }
        let (Some(staging), Home::Host(weights)) = (&mut self.staging, &self.homes[layer][expert]) else {
            return Err(Error::new(Status::Internal, "an expert on the device was to be copied there"));
        };
        let index = buffer_of(&self.homes[layer], expert);
        staging.read[index].wait(current)?;
        let buffer = staging.buffers[index].address();
        let layout = &self.sizes.experts[layer][expert];
        // SAFETY: the buffer has room for any expert. What read it before, on another stream perhaps, is done.
        unsafe { staging.upload.send_expert(current, weights, layout, buffer) }?;
        let selected = self.numbers + (expert * size_of::<u32>()) as Address;
        let group = |part| ExpertGroup { kind: kind_of(layout.of(part).shape.format), selected, count: 1 };
        Ok([group(ExpertPart::Gate), group(ExpertPart::Down)])
    }

    /// What reads the copy of an expert is enqueued.
    pub fn note_read(&mut self, current: &Current, layer: usize, expert: usize) -> Result<()> {
        let index = buffer_of(&self.homes[layer], expert);
        self.staging.as_mut().map_or(Ok(()), |staging| staging.read[index].set(current))
    }

    /// Bytes of an expert's matrices.
    pub fn matrix_bytes(&self, layer: usize, expert: usize) -> usize {
        self.sizes.experts[layer][expert].matrix_bytes
    }

    /// What is where.
    pub fn residency(&self) -> WeightResidency {
        let staging = self.staging.as_ref().map_or(0, |staging| staging.buffers.iter().map(DeviceBlock::bytes).sum());
        let mut total = WeightResidency {
            device_bytes: self.sizes.dense as u64,
            staging_bytes: staging as u64,
            ..Default::default()
        };
        for (homes, layouts) in self.homes.iter().zip(&self.sizes.experts) {
            for (home, layout) in homes.iter().zip(layouts) {
                residency::add(&mut total, layout, matches!(home, Home::Device(_)));
            }
        }
        total
    }

    /// Moves experts until the device holds what a load with this limit would leave there. Where it fails, experts are where they
    /// then are, and the model works.
    pub fn set_limit(&mut self, limit: u64) -> Result<()> {
        let wanted = Residency::choose(&self.sizes, limit)?;
        let device = Arc::clone(&self.device);
        self.generation += 1;
        // Nothing that reads what moves is in progress afterwards, and nothing is enqueued while this is borrowed.
        for stream in self.streams.iter().filter_map(Weak::upgrade).filter(|stream| !stream.is_recording()) {
            device.enter_on(&stream)?.wait()?;
        }
        let current = device.enter()?;
        let moved = self.move_experts(&current, &wanted);
        let written = self.write_tables(&current);
        moved.and(written)
    }

    fn move_experts(&mut self, current: &Current, wanted: &Residency) -> Result<()> {
        if !wanted.is_whole() {
            self.start_threads()?;
        }
        // Those that leave go first, and make room for buffers and for those that come.
        for layer in 0..self.homes.len() {
            for expert in 0..self.homes[layer].len() {
                if !wanted.has(layer, expert) {
                    self.take_off(current, layer, expert)?;
                }
            }
        }
        match wanted.is_whole() {
            true => self.drop_staging(),
            false => self.prepare_staging()?,
        }
        let mut upload = None;
        for layer in 0..self.homes.len() {
            for expert in 0..self.homes[layer].len() {
                if wanted.has(layer, expert) {
                    self.bring_back(current, &mut upload, layer, expert)?;
                }
            }
        }
        Ok(())
    }

    /// An expert to host memory.
    fn take_off(&mut self, current: &Current, layer: usize, expert: usize) -> Result<()> {
        if let Home::Device(block) = &self.homes[layer][expert] {
            let weights = fetch_expert(current, block.address(), &self.sizes.experts[layer][expert])?;
            self.tables[layer].is_current = false;
            self.homes[layer][expert] = Home::Host(Arc::new(weights));
        }
        Ok(())
    }

    /// An expert to the device, through `upload`, which is made where it is first needed.
    fn bring_back(
        &mut self,
        current: &Current,
        upload: &mut Option<Upload>,
        layer: usize,
        expert: usize,
    ) -> Result<()> {
        let Home::Host(weights) = &self.homes[layer][expert] else { return Ok(()) };
        let upload = match upload {
            Some(upload) => upload,
            None => upload.insert(Upload::new(&self.device, self.sizes.largest())?),
        };
        let layout = &self.sizes.experts[layer][expert];
        let block = DeviceBlock::new(&self.device, "the weights of an expert", layout.bytes)?;
        // SAFETY: the block is new and laid out for this; it is waited for before anybody uses or frees it.
        let sent = unsafe { upload.send_expert(current, weights, layout, block.address()) };
        let arrived = finish(current);
        sent.and(arrived)?;
        self.tables[layer].is_current = false;
        self.homes[layer][expert] = Home::Device(block);
        Ok(())
    }

    fn start_threads(&mut self) -> Result<()> {
        if let (None, Some((options, exact_gelu))) = (&self.threads, &self.cpu) {
            self.threads = Some(Arc::new(HostExperts::new(options, *exact_gelu)?));
        }
        Ok(())
    }

    fn prepare_staging(&mut self) -> Result<()> {
        if self.staging.is_none() {
            let largest = self.sizes.largest();
            let buffer = || DeviceBlock::new(&self.device, "experts on their way", largest);
            let (buffers, upload) = ([buffer()?, buffer()?], Upload::new(&self.device, largest)?);
            let read = [Mark::new(&self.device)?, Mark::new(&self.device)?];
            self.staging = Some(Staging { buffers, read, upload });
            self.forget_tables();
        }
        Ok(())
    }

    /// Nothing reads it any more.
    fn drop_staging(&mut self) {
        self.staging = None;
        self.forget_tables();
    }

    /// Tables of layers with experts in host memory point to the buffers.
    fn forget_tables(&mut self) {
        for layer in 0..self.tables.len() {
            self.tables[layer].is_current &= !self.has_host(layer);
        }
    }

    fn write_tables(&mut self, current: &Current) -> Result<()> {
        for layer in 0..self.tables.len() {
            if !self.tables[layer].is_current {
                self.write_table(current, layer)?;
            }
        }
        Ok(())
    }

    /// Brings the device's copy of a layer's tables up to date, after everything enqueued before.
    fn write_table(&mut self, current: &Current, layer: usize) -> Result<()> {
        let (homes, layouts) = (&self.homes[layer], &self.sizes.experts[layer]);
        let table = self.tables[layer].gate;
        let mut bytes = try_with_capacity("a table of experts", Self::table_bytes(homes.len()))?;
        for part in PARTS {
            for (expert, (home, layout)) in homes.iter().zip(layouts).enumerate() {
                let block = match (home, &self.staging) {
                    (Home::Device(block), _) => Some(block.address()),
                    (Home::Host(_), Some(staging)) => Some(staging.buffers[buffer_of(homes, expert)].address()),
                    // Nobody looks at it.
                    (Home::Host(_), None) => None,
                };
                bytes.extend_from_slice(&matrix_bytes(
                    block.map_or(NO_MATRIX, |block| matrix_at(block, layout, part).arguments()),
                ));
            }
        }
        let mut groups = [ExpertPart::Gate, ExpertPart::Down].map(|part| {
            let first = table + bytes.len() as Address;
            let on_device = homes.iter().zip(layouts).enumerate();
            let on_device = on_device.filter(|(_, (home, _))| matches!(home, Home::Device(_)));
            let on_device = on_device.map(|(expert, (_, layout))| (expert, kind_of(layout.of(part).shape.format)));
            let (groups, list) = groups_of(on_device, homes.len(), first);
            bytes.extend_from_slice(as_bytes(&list));
            bytes.resize(bytes.len() + (homes.len() - list.len()) * size_of::<u32>(), 0);
            groups
        });
        write(current, &bytes, table)?;
        let tables = &mut self.tables[layer];
        let [gate_up, down] = &mut groups;
        (tables.gate_up_groups, tables.down_groups) = (std::mem::take(gate_up), std::mem::take(down));
        tables.is_current = true;
        Ok(())
    }
}

/// Which buffer an expert in host memory is copied to: those of a layer take turns.
fn buffer_of(homes: &[Home], expert: usize) -> usize {
    homes[..expert].iter().filter(|home| matches!(home, Home::Host(_))).count() % STAGING_BUFFERS
}

/// Experts with their kinds, in rising order of experts, as groups of a layer of `all` experts, and the list that begins at
/// `first` on the device.
fn groups_of(
    experts: impl Iterator<Item = (usize, usize)>,
    all: usize,
    first: Address,
) -> (Vec<ExpertGroup>, Vec<u32>) {
    let mut by_kind: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
    for (expert, kind) in experts {
        by_kind.entry(kind).or_default().push(expert as u32);
    }
    let (mut groups, mut list) = (Vec::new(), Vec::new());
    for (kind, experts) in by_kind {
        let selected = if experts.len() == all { 0 } else { first + (list.len() * size_of::<u32>()) as Address };
        groups.push(ExpertGroup { kind, selected, count: experts.len() });
        list.extend(experts);
    }
    (groups, list)
}

/// A matrix of the expert whose block begins at `block`.
fn matrix_at(block: Address, layout: &ExpertLayout, part: ExpertPart) -> DeviceMatrix {
    let matrix = layout.of(part);
    let has_scales = matrix.shape.format.groups().is_some();
    DeviceMatrix {
        shape: matrix.shape,
        lines: block + matrix.lines as Address,
        scales: if has_scales { block + matrix.scales as Address } else { 0 },
    }
}

/// A matrix's arguments as the device reads them from a table.
fn matrix_bytes(matrix: MatrixArguments) -> [u8; size_of::<MatrixArguments>()] {
    // SAFETY: two pointers and four u32 in C's order leave no padding: 32 initialised bytes.
    unsafe { std::mem::transmute(matrix) }
}

/// Waits until everything enqueued is done, because memory is freed next that it reads or writes: again where that fails and
/// the device goes on.
fn finish(current: &Current) -> Result<()> {
    current.wait().inspect_err(|_| drop(current.wait()))
}

/// Writes bytes, such as a table, after everything enqueued before.
pub fn write(current: &Current, bytes: &[u8], to: Address) -> Result<()> {
    // SAFETY: a part of the arena, or a block, with room for them; they are kept until the wait is over.
    let sent = unsafe { current.copy_to_device(to, bytes.as_ptr(), bytes.len()) };
    let arrived = finish(current);
    sent.and(arrived)
}

/// An expert's weights, back from the block where nobody writes them.
fn fetch_expert(current: &Current, block: Address, layout: &ExpertLayout) -> Result<ExpertWeights> {
    let matrix = |part| {
        let matrix = layout.of(part);
        let fetch = |offset: usize, bytes: usize| {
            let mut buffer = Buffer::zeroed("an expert in host memory", bytes)?;
            if bytes > 0 {
                // SAFETY: both are as long; the buffer is kept until the wait is over.
                unsafe { current.copy_to_host(buffer.as_mut_slice().as_mut_ptr(), block + offset as Address, bytes) }?;
                finish(current)?;
            }
            Ok::<_, Error>(buffer)
        };
        let shape = matrix.shape;
        let mut lines = fetch(matrix.lines, shape.line_bytes())?;
        if shape.format == Format::F16 {
            unpair_halves(&mut lines);
        }
        let scales = fetch(matrix.scales, shape.scale_bytes())?;
        Ok::<_, Error>(Matrix::new(shape, Bytes::Owned(lines), Bytes::Owned(scales)))
    };
    Ok(ExpertWeights { gate: matrix(ExpertPart::Gate)?, up: matrix(ExpertPart::Up)?, down: matrix(ExpertPart::Down)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Shape;

    #[test]
    fn experts_on_the_device_are_listed_by_the_kind_of_their_format() {
        let experts = [(0, 4), (1, 1), (3, 4), (4, 0), (6, 4)];
        let (groups, list) = groups_of(experts.into_iter(), 7, 1000);
        let groups: Vec<_> = groups.iter().map(|group| (group.kind, group.selected, group.count)).collect();
        assert_eq!((groups, list), (vec![(0, 1000, 1), (1, 1004, 1), (4, 1008, 3)], vec![4, 1, 0, 3, 6]));
        let (groups, _) = groups_of([(0, 2), (1, 2)].into_iter(), 2, 1000);
        assert_eq!((groups.len(), groups[0].selected, groups[0].count), (1, 0, 2));
        assert_eq!(groups_of(std::iter::empty(), 2, 1000).0.len(), 0);
    }

    #[test]
    fn a_matrix_in_a_table_has_the_bytes_of_its_arguments() {
        let shape = Shape { rows: 20, columns: 100, format: Format::INT8 };
        let bytes = matrix_bytes(DeviceMatrix { shape, lines: 0x1122, scales: 0x3344 }.arguments());
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        assert_eq!((word(0), word(8), word(16), word(20), word(24), word(28)), (0x1122, 0x3344, 20, 128, 0, 0));
    }
}
