//! Products with weights and with their transposes, panel by panel: a thread widens a block of a few panels to f32, and all
//! tokens pass by it. Reads each weight once per batch, `T * 2` operations on each; the block stays in the second cache.

use std::ops::Range;

use crate::backend::cpu::kernels::Kernels;
use crate::backend::cpu::kernels::matmul::{Output, TokenRows};
use crate::backend::cpu::kernels::strips::{STRIP, Strips};
use crate::model::weights::Matrix;
use crate::quant::{PANEL_ROWS, unpack_columns};

/// Strips that are computed together: a row of x is read once for all of them.
const STRIPS: usize = 4;
/// Inputs of a block, or outputs where the product is transposed: sums over more are added up block by block.
const DEPTH: usize = 256;
/// Numbers a thread needs to hold a block.
pub const SCRATCH: usize = STRIPS * DEPTH * STRIP;

/// Which way a matrix is taken.
#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    /// `out += x W^T`, of outputs.
    Forward,
    /// `out += x W`, of gradients of outputs.
    Transposed,
}

/// A product of some rows with some panels of a matrix.
pub struct Product<'a> {
    pub weights: &'a Matrix,
    /// Only these panels: of the outputs they are what is written, of gradients what is read.
    pub panels: Range<usize>,
    pub way: Way,
    /// Forward `[tokens, inputs]`, transposed `[tokens, outputs of the panels]`.
    pub x: TokenRows<'a>,
    /// Forward `[tokens, outputs of the panels]`, transposed `[tokens, inputs]`.
    pub out: Output,
}

impl<'a> Product<'a> {
    /// With a whole matrix.
    pub fn new(weights: &'a Matrix, way: Way, x: TokenRows<'a>, out: Output) -> Product<'a> {
        Product { weights, panels: 0..weights.shape().panels(), way, x, out }
    }

    /// Rows of the matrix that the panels have.
    fn rows(&self) -> usize {
        (self.panels.end * PANEL_ROWS).min(self.weights.rows()) - self.panels.start * PANEL_ROWS
    }

    /// Columns that are written.
    fn width(&self) -> usize {
        match self.way {
            Way::Forward => self.rows(),
            Way::Transposed => self.weights.columns(),
        }
    }

    /// Into how many items the work is split; their number changes no result.
    pub fn items(&self) -> usize {
        if self.x.count == 0 { 0 } else { self.width().div_ceil(STRIPS * STRIP) }
    }

    /// Does one item, in scratch of SCRATCH numbers.
    ///
    /// # Safety
    /// The buffer of `out` is alive, and nobody else touches the rows of this product and this item's columns of them.
    pub unsafe fn run(&self, kernels: &Kernels, item: usize, scratch: &mut [f32]) {
        let block = scratch[..SCRATCH].as_chunks_mut::<STRIP>().0;
        let first = item * STRIPS * STRIP;
        let columns = first..(first + STRIPS * STRIP).min(self.width());
        let all = if self.way == Way::Forward { self.weights.columns() } else { self.rows() };
        for start in (0..all).step_by(DEPTH) {
            let depth = start..(start + DEPTH).min(all);
            match self.way {
                Way::Forward => self.widen(columns.clone(), depth.clone(), block),
                Way::Transposed => self.widen_transposed(columns.clone(), depth.clone(), block),
            }
            let strips = Strips { data: block, rows: DEPTH };
            // SAFETY: the caller's promise.
            unsafe { kernels.add_strips(&self.x, depth, strips, &self.out, columns.clone()) };
        }
    }

    /// A strip for each panel: its rows are the matrix's columns of `depth`.
    fn widen(&self, columns: Range<usize>, depth: Range<usize>, block: &mut [[f32; STRIP]]) {
        for (strip, column) in block.chunks_mut(DEPTH).zip(columns.step_by(STRIP)) {
            let (panel, weights) = (self.panels.start + column / PANEL_ROWS, self.weights);
            let strip = &mut strip[..depth.len()];
            unpack_columns(weights.shape(), weights.lines(), weights.scales(), panel, depth.clone(), strip);
        }
    }

    /// A strip for each sixteen columns: its rows are the matrix's rows of `depth`.
    fn widen_transposed(&self, columns: Range<usize>, depth: Range<usize>, block: &mut [[f32; STRIP]]) {
        let weights = self.weights;
        let mut widened = [[0f32; PANEL_ROWS]; STRIPS * STRIP];
        let widened = &mut widened[..columns.len()];
        for (index, row) in depth.clone().step_by(PANEL_ROWS).enumerate() {
            let panel = self.panels.start + row / PANEL_ROWS;
            unpack_columns(weights.shape(), weights.lines(), weights.scales(), panel, columns.clone(), widened);
            let rows = index * PANEL_ROWS..((index + 1) * PANEL_ROWS).min(depth.len());
            for (strip, columns) in block.chunks_mut(DEPTH).zip(widened.chunks(STRIP)) {
                for (row, strip) in strip[rows.clone()].iter_mut().enumerate() {
                    strip.iter_mut().zip(columns).for_each(|(out, column)| *out = column[row]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use safetensors::Dtype;

    use super::*;
    use crate::backend::cpu::kernels::Instructions;
    use crate::quant::{Format, Shape, Source};

    /// Numbers from -1 to 1 that differ.
    fn number(index: usize) -> f32 {
        (index * 2_654_435_761 % 4093) as f32 / 2046.5 - 1.0
    }

    /// Every way, format and instruction set, with sizes past a block and odd at every end, against f64.
    #[test]
    fn products_both_ways_are_those_of_f64() {
        let formats = [(Format::F32, Dtype::F32), (Format::Bf16, Dtype::BF16), (Format::INT4, Dtype::F32)];
        for (rows, columns) in [(300, 517), (5, 3), (16, 256), (257, 64)] {
            for (format, dtype) in formats {
                let numbers = (0..rows * columns).map(number);
                let bytes: Vec<u8> = match dtype {
                    Dtype::BF16 => numbers.flat_map(|number| bf16::from_f32(number).to_le_bytes()).collect(),
                    _ => numbers.flat_map(f32::to_le_bytes).collect(),
                };
                let source = Source { dtype, bytes: &bytes, columns, importance: None };
                let matrix = Matrix::from_rows("a test", Shape { rows, columns, format }, &source).unwrap();
                let mut weights = vec![0f32; rows * columns];
                weights.chunks_exact_mut(columns).enumerate().for_each(|(row, out)| matrix.read_row(row, out));
                for tokens in [1, 31] {
                    check(&matrix, &weights, tokens);
                }
            }
        }
    }

    fn check(matrix: &Matrix, weights: &[f32], tokens: usize) {
        let (rows, columns) = (matrix.rows(), matrix.columns());
        // All panels, and those from the middle on.
        for panels in [0..matrix.shape().panels(), matrix.shape().panels() / 2..matrix.shape().panels()] {
            let first = panels.start * PANEL_ROWS;
            for way in [Way::Forward, Way::Transposed] {
                let (inputs, outputs) =
                    if way == Way::Forward { (columns, rows - first) } else { (rows - first, columns) };
                let x: Vec<f32> = (0..tokens * inputs).map(|index| number(index + 7)).collect();
                let expected = |token: usize, output: usize| -> f64 {
                    let weight = |input: usize| match way {
                        Way::Forward => weights[(first + output) * columns + input],
                        Way::Transposed => weights[(first + input) * columns + output],
                    };
                    (0..inputs).map(|input| f64::from(x[token * inputs + input]) * f64::from(weight(input))).sum()
                };
                for set in Instructions::ALL {
                    let Ok(kernels) = Kernels::get(set) else { continue };
                    let mut out = vec![1f32; tokens * outputs];
                    let rows = TokenRows { data: &x, columns: inputs, index: None, count: tokens };
                    let output = Output::new(&mut out, outputs);
                    let product = Product { panels: panels.clone(), ..Product::new(matrix, way, rows, output) };
                    let mut scratch = vec![f32::NAN; SCRATCH];
                    // SAFETY: `out` is ours alone.
                    (0..product.items()).for_each(|item| unsafe { product.run(&kernels, item, &mut scratch) });
                    // The ends, where blocks and strips do, and some between.
                    for token in [0, tokens / 2, tokens - 1] {
                        for output in (0..outputs).filter(|output| output % 13 < 2 || *output + 2 > outputs) {
                            let (found, expected) = (out[token * outputs + output], 1.0 + expected(token, output));
                            let error = (f64::from(found) - expected).abs();
                            assert!(error < 2e-5 * (inputs as f64).sqrt(), "{} {found} {expected}", kernels.name);
                        }
                    }
                }
            }
        }
    }
}
