//! Tensors on their way into the mixture, a few panels at a time: read, added up, rounded once, written.

use safetensors::Dtype;

use super::sources::{Source as Model, Sources};
use super::tensors::{From, Planned, Share};
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::model::loader::{Rows, SHARED_BYTES};
use crate::model::narrow::narrow;
use crate::model::{ModelWriter, Progress};
use crate::quant::{NotFinite, PANEL_ROWS, Rounded, Source};
use crate::quantize::matrix::RoundedMatrix;

/// Writes tensors.
pub struct Merge<'a> {
    /// What they are made from.
    pub sources: &'a Sources,
    /// Where they go.
    pub writer: &'a mut ModelWriter,
    /// Threads that quantise.
    pub threads: usize,
    /// Told of what is read, and asked before.
    pub progress: &'a Progress,
}

impl Merge<'_> {
    /// Writes a planned tensor, which is tensor `index` of the new directory and, if it is quantised, `index + 1` too; answers
    /// how far off quantising is. `router` has a layer's numbers, `[num_local_experts, hidden_size]`.
    pub fn write(
        &mut self,
        planned: &Planned,
        index: usize,
        router: &dyn Fn(usize) -> Result<Vec<f32>>,
    ) -> Result<Option<Rounded>> {
        let name = &planned.target.tensor;
        let shares = match &planned.from {
            From::Shares(shares) => shares,
            From::Router(layer) => {
                let mut bytes = Vec::new();
                narrow(&router(*layer)?, planned.dtype, &mut bytes, name, planned.target.columns, 0)?;
                self.writer.write(index, 0, &bytes)?;
                return Ok(None);
            }
        };
        let mut pieces = Pieces::new(self.sources, shares, planned.dtype, SHARED_BYTES)?;
        let columns = planned.target.columns;
        let Some(shape) = planned.quantised_shape() else {
            let mut skip = 0;
            for chunk in 0..pieces.chunks() {
                let bytes = pieces.read(chunk, self.progress)?;
                self.writer.write(index, skip, bytes)?;
                skip += bytes.len() as u64;
            }
            return Ok(None);
        };
        let mut rounded = RoundedMatrix::new(name, shape, index, self.threads);
        // Not finite numbers were refused when they were read.
        let not_finite = |_| Error::new(Status::Internal, format!("tensor \"{name}\" was not checked"));
        for chunk in 0..pieces.chunks() {
            let panel = pieces.first_panel(chunk);
            let bytes = pieces.read(chunk, self.progress)?;
            let source = Source { dtype: planned.dtype, bytes, columns, importance: None };
            rounded.write(self.writer, panel, &source, &not_finite)?;
        }
        Ok(Some(rounded.rounded))
    }
}

/// One of several parts that are added up.
struct Term<'a> {
    rows: Rows<'a>,
    source: &'a Model,
    divisor: f32,
}

/// The sum of shares, piece by piece.
pub struct Pieces<'a> {
    terms: Vec<Term<'a>>,
    dtype: Dtype,
    columns: usize,
    name: &'a str,
    first_row: usize,
    staging: Vec<u8>,
    /// A piece's numbers: of the first model, the sum up to now, and whether all models have had the same.
    first: Vec<f32>,
    sum: Vec<f32>,
    same: Vec<bool>,
    out: Vec<u8>,
}

impl<'a> Pieces<'a> {
    /// Of shares that are rounded to `dtype`, in pieces of about `bytes` in f32.
    pub fn new(sources: &'a Sources, shares: &'a [Share], dtype: Dtype, bytes: usize) -> Result<Pieces<'a>> {
        let part = &shares[0].part;
        let panels = (bytes / (PANEL_ROWS * part.columns * size_of::<f32>()).max(1)).max(1);
        let mut terms = try_with_capacity(&part.tensor, shares.len())?;
        for share in shares {
            let source = &sources.all[share.source];
            let mut rows = Rows::new(&share.part, &source.checkpoint, bytes)?;
            rows.panels = panels.min(part.rows.div_ceil(PANEL_ROWS).max(1));
            terms.push(Term { rows, source, divisor: share.divisor });
        }
        Ok(Pieces {
            terms,
            dtype,
            columns: part.columns,
            name: &part.tensor,
            first_row: part.first_row,
            staging: Vec::new(),
            first: Vec::new(),
            sum: Vec::new(),
            same: Vec::new(),
            out: Vec::new(),
        })
    }

    /// How many pieces there are.
    pub fn chunks(&self) -> usize {
        self.terms[0].rows.chunks()
    }

    /// The first panel of a piece.
    pub fn first_panel(&self, chunk: usize) -> usize {
        chunk * self.terms[0].rows.panels
    }

    /// A piece's numbers as they are written, all finite.
    ///
    /// They are `x_1 / d_1 + x_2 / d_2 + ...` in f32, in the order of the recipe, rounded once; but where all models have the
    /// same number, that one: thirds of a number do not always add up to it.
    pub fn read(&mut self, chunk: usize, progress: &Progress) -> Result<&[u8]> {
        let Pieces { terms, staging, first, sum, same, columns, .. } = self;
        let alone = terms.len() == 1;
        let mut count = 0;
        for (index, term) in terms.iter().enumerate() {
            let in_model = |error: Error| error.in_directory(&term.source.directory);
            let source = term.rows.read(chunk, staging, progress).map_err(in_model)?;
            if let Some(at) = first_not_finite(&source) {
                let at = NotFinite { row: at / *columns, column: at % *columns };
                return Err(in_model(term.rows.not_finite(chunk, at)));
            }
            if alone && source.dtype == self.dtype {
                let length = source.bytes.len();
                return Ok(&staging[..length]);
            }
            count = source.rows() * *columns;
            if sum.is_empty() {
                *first = try_vec(self.name, count, 0f32)?;
                *sum = try_vec(self.name, count, 0f32)?;
                *same = try_vec(self.name, count, true)?;
            }
            let mut block = [0f32; 1024];
            for start in (0..count).step_by(block.len()) {
                let range = start..(start + block.len()).min(count);
                let numbers = &mut block[..range.len()];
                source.read(0, start, numbers);
                let (first, sum, same) = (&mut first[range.clone()], &mut sum[range.clone()], &mut same[range]);
                if index == 0 {
                    first.copy_from_slice(numbers);
                    sum.iter_mut().zip(&*numbers).for_each(|(sum, x)| *sum = x / term.divisor);
                    same.fill(true);
                } else {
                    for (((x, first), sum), same) in numbers.iter().zip(&*first).zip(sum).zip(same) {
                        *sum += x / term.divisor;
                        *same &= x == first;
                    }
                }
            }
        }
        for ((sum, first), same) in sum[..count].iter_mut().zip(&*first).zip(&*same) {
            *sum = if *same { *first } else { *sum };
        }
        let row = self.first_row + terms[0].rows.first_row(chunk);
        narrow(&self.sum[..count], self.dtype, &mut self.out, self.name, self.columns, row)?;
        Ok(&self.out)
    }
}

/// The place of the first number of some rows that is infinite or NaN.
fn first_not_finite(source: &Source) -> Option<usize> {
    let halves = |exponent: u16| {
        let is_not = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & exponent == exponent;
        // Without a way out of the loop all of a block is looked at in vectors.
        let blocks = source
            .bytes
            .chunks(4096)
            .position(|block| block.as_chunks().0.iter().fold(false, |found, bytes| found | is_not(bytes)));
        blocks.and_then(|block| {
            let rest = &source.bytes[block * 4096..];
            rest.as_chunks().0.iter().position(is_not).map(|at| block * 2048 + at)
        })
    };
    match source.dtype {
        Dtype::BF16 => halves(0x7f80),
        Dtype::F16 => halves(0x7c00),
        _ => source.bytes.as_chunks().0.iter().position(|bytes| !f32::from_le_bytes(*bytes).is_finite()),
    }
}
