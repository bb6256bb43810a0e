//! Weights on their way from the files into memory: threads read the rows of a few panels each and lay them out while the
//! system reads what follows.

use safetensors::Dtype;

use super::checkpoint::{Checkpoint, Tensor};
use super::names::{self, Part};
use super::progress::Progress;
use super::weights::{
    Destination, ExpertPart, ExpertPlace, ExpertWeights, LayerWeights, Matrix, Plan, dtype_of, find, not_finite_in,
};
use crate::error::{Error, Result, Status};
use crate::memory::{ALIGNMENT, Buffer, Bytes, try_vec, try_with_capacity};
use crate::parallel::share_out;
use crate::quant::{NotFinite, PANEL_ROWS, Shape, Source, pack};

/// Bytes that a thread reads at once, where a panel is not more: what was read is still in its cache when it is laid out.
const CHUNK_BYTES: usize = 1 << 20;

/// Bytes of chunks on all threads together, where there is more than one thread.
const MAX_STAGING_BYTES: usize = 128 << 20;

/// Reads parts as a plan has them.
pub(super) struct Loader<'a, M, V, E> {
    /// Takes what was read.
    pub destination: &'a mut dyn Destination<Matrix = M, Vector = V, Expert = E>,
    /// What is read.
    pub plan: &'a Plan,
    /// From where.
    pub checkpoint: &'a Checkpoint,
    /// Threads that read and lay out.
    pub threads: usize,
    /// Map what is laid out already instead of reading it.
    pub map: bool,
    /// Told of every chunk, and asked before it.
    pub progress: &'a Progress,
}

impl<M, V, E> Loader<'_, M, V, E> {
    /// All parts of a layer.
    pub fn layer(&mut self, layer: usize, parts: &names::LayerParts) -> Result<LayerWeights<M, V, E>> {
        let mut experts = try_with_capacity("experts", parts.experts.len())?;
        for (expert, parts) in parts.experts.iter().enumerate() {
            let [gate, up] = self.plan.gate_up_shapes(parts, self.checkpoint)?;
            let down = self.plan.shape(&parts.down, self.checkpoint)?;
            let mut hand_over = |part: &Part, shape, which| {
                let place = ExpertPlace { layer, expert, part: which };
                if let Some(unread) = self.destination.unread_expert(place, &part.tensor, &shape) {
                    return unread;
                }
                let matrix = self.read(part, shape)?;
                self.destination.expert(place, matrix)
            };
            experts.push(ExpertWeights {
                gate: hand_over(&parts.gate, gate, ExpertPart::Gate)?,
                up: hand_over(&parts.up, up, ExpertPart::Up)?,
                down: hand_over(&parts.down, down, ExpertPart::Down)?,
            });
        }
        Ok(LayerWeights {
            input_norm: self.vector(&parts.input_norm)?,
            query: self.matrix(&parts.query)?,
            key: self.matrix(&parts.key)?,
            value: self.matrix(&parts.value)?,
            output: self.matrix(&parts.output)?,
            post_attention_norm: self.vector(&parts.post_attention_norm)?,
            router: parts.router.as_ref().map(|router| self.matrix(router)).transpose()?,
            experts,
        })
    }

    /// A norm's weights, widened to f32.
    pub fn vector(&mut self, part: &Part) -> Result<V> {
        if let Some(unread) = self.destination.unread_vector(&part.tensor, part.columns) {
            return unread;
        }
        let mut vector = Buffer::zeroed(&part.tensor, part.columns)?;
        self.read(part, self.plan.shape(part, self.checkpoint)?)?.read_row(0, &mut vector);
        self.destination.vector(&part.tensor, vector)
    }

    /// A matrix in the format the plan has for it.
    pub fn matrix(&mut self, part: &Part) -> Result<M> {
        let shape = self.plan.shape(part, self.checkpoint)?;
        if let Some(unread) = self.destination.unread_matrix(&part.tensor, &shape) {
            return unread;
        }
        let matrix = self.read(part, shape)?;
        self.destination.matrix(&part.tensor, matrix)
    }

    /// A matrix, laid out.
    fn read(&self, part: &Part, shape: Shape) -> Result<Matrix> {
        if self.plan.stored_format(part).is_some() {
            let lines = self.laid_out(&part.tensor, shape.line_bytes(), ALIGNMENT)?;
            let scales = self.laid_out(&names::scales(&part.tensor), shape.scale_bytes(), size_of::<u16>())?;
            return Ok(Matrix::new(shape, lines, scales));
        }
        let mut lines = Buffer::zeroed(&part.tensor, shape.line_bytes())?;
        let mut scales = Buffer::zeroed(&part.tensor, shape.scale_bytes())?;
        let rows = Rows::new(part, self.checkpoint, CHUNK_BYTES)?;
        let mut scale_parts = scales.chunks_mut((rows.panels * shape.panel_scale_bytes()).max(1));
        let parts = lines.chunks_mut((rows.panels * shape.panel_bytes()).max(1));
        let parts = parts.map(|lines| (lines, scale_parts.next().unwrap_or_default())).enumerate();
        let threads = self.threads.min(MAX_STAGING_BYTES / rows.chunk_bytes().max(1)).max(1);
        share_out(threads, parts, |staging: &mut Vec<u8>, (chunk, (lines, scales))| {
            let source = rows.read(chunk, staging, self.progress)?;
            pack(&source, &shape, lines, scales).map(drop).map_err(|at| rows.not_finite(chunk, at))
        })?;
        Ok(Matrix::new(shape, Bytes::Owned(lines), Bytes::Owned(scales)))
    }

    /// The bytes of a tensor that is stored as it is held.
    fn laid_out(&self, name: &str, bytes: usize, alignment: usize) -> Result<Bytes> {
        let unchecked = || Error::new(Status::Internal, format!("tensor \"{name}\" was not checked"));
        let tensor = self.checkpoint.tensor(name).ok_or_else(unchecked)?;
        if self.map
            && tensor.info.offset.is_multiple_of(alignment as u64)
            && let Some(mapped) = self.checkpoint.map_tensor(tensor, bytes, self.progress)?
        {
            return Ok(mapped);
        }
        let mut buffer = Buffer::zeroed(name, bytes)?;
        let chunks = buffer.chunks_mut(CHUNK_BYTES).enumerate();
        share_out(self.threads, chunks, |_: &mut (), (chunk, bytes)| {
            self.checkpoint.read_tensor(tensor, (chunk * CHUNK_BYTES) as u64, bytes, self.progress)
        })?;
        Ok(Bytes::Owned(buffer))
    }
}

/// A part that is stored row by row, in chunks of the rows of whole panels.
pub struct Rows<'a> {
    part: &'a Part,
    checkpoint: &'a Checkpoint,
    tensor: &'a Tensor,
    dtype: Dtype,
    /// Panels of a chunk, but for the last one.
    pub panels: usize,
}

impl<'a> Rows<'a> {
    /// In chunks of at most `chunk_bytes`, where a panel is not more.
    pub fn new(part: &'a Part, checkpoint: &'a Checkpoint, chunk_bytes: usize) -> Result<Rows<'a>> {
        let dtype = dtype_of(part, checkpoint)?;
        let tensor = find(&part.tensor, &part.shape, part.meaning, checkpoint)?;
        let mut rows = Rows { part, checkpoint, tensor, dtype, panels: 1 };
        rows.panels = (chunk_bytes / rows.chunk_bytes().max(1)).clamp(1, part.rows.div_ceil(PANEL_ROWS).max(1));
        Ok(rows)
    }

    fn row_bytes(&self) -> usize {
        self.part.columns * self.dtype.bitsize() / 8
    }

    fn chunk_bytes(&self) -> usize {
        self.panels * PANEL_ROWS * self.row_bytes()
    }

    /// How many chunks it has.
    pub fn chunks(&self) -> usize {
        self.part.rows.div_ceil(self.panels * PANEL_ROWS)
    }

    /// The first row of a chunk.
    pub fn first_row(&self, chunk: usize) -> usize {
        chunk * self.panels * PANEL_ROWS
    }

    /// Reads a chunk into `staging`, which it makes large enough.
    pub fn read<'s>(&self, chunk: usize, staging: &'s mut Vec<u8>, progress: &Progress) -> Result<Source<'s>> {
        let (first, end) = (self.first_row(chunk), self.first_row(chunk + 1).min(self.part.rows));
        let chunk_bytes = self.chunk_bytes().min(self.part.rows * self.row_bytes());
        if staging.len() < chunk_bytes {
            *staging = try_vec(&self.part.tensor, chunk_bytes, 0u8)?;
        }
        let bytes = &mut staging[..(end - first) * self.row_bytes()];
        let skip = ((self.part.first_row + first) * self.row_bytes()) as u64;
        self.checkpoint.read_tensor(self.tensor, skip, bytes, progress)?;
        Ok(Source { dtype: self.dtype, bytes, columns: self.part.columns, importance: None })
    }

    /// The error of a number in a chunk that cannot be rounded.
    pub fn not_finite(&self, chunk: usize, at: NotFinite) -> Error {
        not_finite_in(self.part, NotFinite { row: self.first_row(chunk) + at.row, ..at }, self.checkpoint)
    }
}

/// Bytes that `each_rows` reads at once, where a panel is not more: enough to be shared out to threads.
pub const SHARED_BYTES: usize = 16 << 20;

/// Reads a part that is stored row by row, and shows `see` the rows of a few panels at a time, with the number of the first
/// panel.
pub fn each_rows(
    part: &Part,
    checkpoint: &Checkpoint,
    progress: &Progress,
    mut see: impl FnMut(usize, &Source) -> Result<()>,
) -> Result<()> {
    let rows = Rows::new(part, checkpoint, SHARED_BYTES)?;
    let mut staging = Vec::new();
    for chunk in 0..rows.chunks() {
        see(chunk * rows.panels, &rows.read(chunk, &mut staging, progress)?)?;
    }
    Ok(())
}
