//! Matrix products over whole panels of weights: which tiles there are, and what becomes of their sums.

use std::ops::Range;

use super::activations::{Packed, Precision, TILE};
use super::lanes::Lanes;
use super::math::{gelu_erf, gelu_tanh};
use super::tile::{Dot, PanelPart, PanelSums, Span, TokenPart, tile};
use crate::model::weights::{ExpertWeights, Matrix};
use crate::quant::{BLOCK, LINE_BYTES, PANEL_ROWS};

/// Activations of some tokens as they were computed: rows `[columns]` of `data`, picked by `index` where there is one.
#[derive(Clone, Copy)]
pub struct TokenRows<'a> {
    /// `[any, columns]`
    pub data: &'a [f32],
    /// Length of a row.
    pub columns: usize,
    /// Which row each token is; without it token i is row i.
    pub index: Option<&'a [u32]>,
    /// Tokens.
    pub count: usize,
}

impl<'a> TokenRows<'a> {
    /// Some of the tokens.
    pub fn part(&self, tokens: Range<usize>) -> Self {
        assert!(tokens.start <= tokens.end && tokens.end <= self.count);
        let count = tokens.len();
        match self.index {
            Some(index) => TokenRows { index: Some(&index[tokens]), count, ..*self },
            None => TokenRows { data: &self.data[tokens.start * self.columns..], count, ..*self },
        }
    }

    /// The row of a token.
    #[inline(always)]
    pub fn row(&self, token: usize) -> &'a [f32] {
        let row = self.index.map_or(token, |index| index[token] as usize);
        &self.data[row * self.columns..(row + 1) * self.columns]
    }
}

/// Where results go: element `(token, row)` at `start + token * stride + row`.
#[derive(Clone, Copy)]
pub struct Output {
    start: *mut f32,
    stride: usize,
    count: usize,
}

// SAFETY: an Output is a pointer into a buffer that outlives the job it is used in; the writers of different rows
// write different elements (see `Output::row_part`).
unsafe impl Sync for Output {}
// SAFETY: as above.
unsafe impl Send for Output {}

impl Output {
    /// Results of `[tokens, stride]` into `data`.
    pub fn new(data: &mut [f32], stride: usize) -> Self {
        Output { start: data.as_mut_ptr(), stride, count: data.len() }
    }

    /// Numbers from one token's results to the next's.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The same buffer without its first `rows` rows.
    pub fn skip_rows(&self, rows: usize) -> Output {
        let skipped = rows * self.stride;
        assert!(skipped <= self.count);
        // SAFETY: inside the buffer or one past its end, by the assertion.
        Output { start: unsafe { self.start.add(skipped) }, stride: self.stride, count: self.count - skipped }
    }

    /// Some elements of one row, for writing.
    ///
    /// # Safety
    /// The buffer is alive, and nobody else reads or writes these elements during the job.
    #[allow(clippy::mut_from_ref)] // Disjointness is the caller's promise, as for a raw pointer.
    #[inline(always)]
    pub unsafe fn row_part(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        // The row is compared with the number of rows first, so that nothing below can overflow.
        assert!(columns.start <= columns.end && columns.end <= self.stride && row < self.count / self.stride.max(1));
        let at = row * self.stride + columns.start;
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), columns.len()) }
    }
}

/// Panels that are computed at once for a single token: as many streams of weights are in flight.
const PANELS_ALONE: usize = 4;

/// Bytes of each panel that stay in the second cache while all tokens pass by.
pub const CACHED_BYTES: usize = 128 << 10;

/// A matrix's layout, in the numbers the loops below need.
struct Layout<'a> {
    matrix: &'a Matrix,
    panels: usize,
    panel_bytes: usize,
    panel_scale_bytes: usize,
    columns_per_line: usize,
    group_columns: usize,
    /// Bytes of the scales of one group of sixteen rows; 0 without scales.
    group_scale_bytes: usize,
}

impl Layout<'_> {
    fn of(matrix: &Matrix) -> Layout<'_> {
        let shape = matrix.shape();
        let groups = shape.format.groups();
        Layout {
            matrix,
            panels: shape.panels(),
            panel_bytes: shape.panel_bytes(),
            panel_scale_bytes: shape.panel_scale_bytes(),
            columns_per_line: shape.columns_per_line(),
            group_columns: groups.map_or(BLOCK, |groups| groups.size),
            group_scale_bytes: groups.map_or(0, |_| 2 * PANEL_ROWS),
        }
    }

    /// Panel `panel` from `column` on, which begins a group; for a panel past the end the last one.
    fn part(&self, panel: usize, column: usize) -> PanelPart {
        let panel = panel.min(self.panels - 1);
        let lines = panel * self.panel_bytes + column / self.columns_per_line * LINE_BYTES;
        let scales = panel * self.panel_scale_bytes + column / self.group_columns * self.group_scale_bytes;
        PanelPart { lines: self.matrix.lines()[lines..].as_ptr(), scales: self.matrix.scales()[scales..].as_ptr() }
    }

    /// The rows of panel `panel`; none where it is not one of `panels`.
    fn rows(&self, panel: usize, panels: &Range<usize>) -> Range<usize> {
        let rows = self.matrix.rows();
        let end = if panel < panels.end { rows.min((panel + 1) * PANEL_ROWS) } else { 0 };
        (panel * PANEL_ROWS).min(end)..end
    }

    fn span(&self, columns: usize) -> Span {
        Span { lines: columns / self.columns_per_line, group_shift: (self.group_columns / BLOCK).trailing_zeros() }
    }
}

/// The tiles of one format on one instruction set. Products of whole matrices call them through a pointer, so that each tile is
/// compiled once for all that is made of its sums, and what is made of them once for all formats.
#[derive(Clone, Copy)]
pub struct TileKernel {
    /// What activations are to be packed as.
    pub precision: Precision,
    /// [`add_tile`], compiled for the instruction set.
    pub add: unsafe fn(&Panels, (TokenPart, usize), Span, &mut Sums),
}

/// Panels that pass by a tile of tokens.
pub type Panels = [PanelPart; PANELS_ALONE];
/// Their sums.
pub type Sums = [PanelSums; PANELS_ALONE];

/// Adds the products of some panels with a tile of tokens to `sums`: PANELS_ALONE panels for a single token, else two.
///
/// # Safety
/// The instruction set of D is present; the panels and `x` hold the span.
#[inline(always)]
pub unsafe fn add_tile<D: Dot>(panels: &Panels, (x, tokens): (TokenPart, usize), span: Span, sums: &mut Sums) {
    // SAFETY: the caller's promises.
    unsafe {
        if tokens == 1 {
            return tile::<D, PANELS_ALONE, 1>(*panels, x, span, 0, sums);
        }
        let [a, b, ..] = *panels;
        let mut first = 0;
        while first < tokens {
            let count = (tokens - first).min(D::Lanes::TILE.1);
            let x = x.skip(first);
            if D::Lanes::TILE.0 == 2 {
                add_tokens::<D, 2>([a, b], x, count, span, first, sums);
            } else {
                for (panel, sums) in [a, b].into_iter().zip(sums.chunks_mut(1)) {
                    add_tokens::<D, 1>([panel], x, count, span, first, sums);
                }
            }
            first += count;
        }
    }
}

/// One tile of R panels by `count` tokens.
///
/// # Safety
/// As for [`add_tile`]; `sums` has R panels.
#[inline(always)]
unsafe fn add_tokens<D: Dot, const R: usize>(
    panels: [PanelPart; R],
    x: TokenPart,
    count: usize,
    span: Span,
    first: usize,
    sums: &mut [PanelSums],
) {
    let Some(sums) = sums.first_chunk_mut::<R>() else { return };
    // SAFETY: the caller's promises.
    unsafe {
        match count {
            1 => tile::<D, R, 1>(panels, x, span, first, sums),
            2 => tile::<D, R, 2>(panels, x, span, first, sums),
            // What an instruction set has no registers for, the compiler leaves out.
            3 if D::Lanes::TILE.1 >= 3 => tile::<D, R, 3>(panels, x, span, first, sums),
            4 if D::Lanes::TILE.1 >= 4 => tile::<D, R, 4>(panels, x, span, first, sums),
            5 if D::Lanes::TILE.1 >= 5 => tile::<D, R, 5>(panels, x, span, first, sums),
            6 if D::Lanes::TILE.1 >= 6 => tile::<D, R, 6>(panels, x, span, first, sums),
            7 if D::Lanes::TILE.1 >= 7 => tile::<D, R, 7>(panels, x, span, first, sums),
            8 if D::Lanes::TILE.1 >= 8 => tile::<D, R, 8>(panels, x, span, first, sums),
            _ => unreachable!("a tile has {count} tokens"),
        }
    }
}

/// `out[token][row] = weights[row] . x[token]` for the rows of some panels.
///
/// # Safety
/// The instruction set of `kernel` is present, and it is the one of the weights' format; nobody else touches these rows of
/// `out` during the call.
#[inline(always)]
pub unsafe fn matmul(kernel: TileKernel, weights: &Matrix, panels: Range<usize>, x: &Packed, out: &Output) {
    let layout = Layout::of(weights);
    assert!(x.precision() == kernel.precision && weights.shape().padded_columns() <= x.columns());
    let columns = weights.shape().padded_columns();
    let tiles = x.tokens().div_ceil(TILE);
    let step = if x.tokens() == 1 { PANELS_ALONE } else { 2 };
    let cached = CACHED_BYTES / LINE_BYTES * layout.columns_per_line;
    let part_columns = if tiles > 1 { cached } else { columns.max(1) };
    let mut sums = [PanelSums::default(); PANELS_ALONE];
    for panel in panels.clone().step_by(step) {
        for column in (0..columns).step_by(part_columns) {
            let parts = std::array::from_fn(|index| layout.part(panel + index, column));
            let count = part_columns.min(columns - column);
            for tile in 0..tiles {
                let tokens = tile * TILE..((tile + 1) * TILE).min(x.tokens());
                for (index, sums) in sums.iter_mut().enumerate().take(step) {
                    let rows = layout.rows(panel + index, &panels);
                    for (token, sums) in tokens.clone().zip(sums) {
                        sums.fill(0.0);
                        if column > 0 {
                            // SAFETY: the caller's promise.
                            let out = unsafe { out.row_part(token, rows.clone()) };
                            sums[..out.len()].copy_from_slice(out);
                        }
                    }
                }
                // SAFETY: the caller's promise; the span ends with the columns, which `x` has too.
                unsafe { (kernel.add)(&parts, x.tile(tile, column), layout.span(count), &mut sums) };
                for (index, sums) in sums.iter().enumerate().take(step) {
                    let rows = layout.rows(panel + index, &panels);
                    for (token, sums) in tokens.clone().zip(sums) {
                        // SAFETY: the caller's promise.
                        let out = unsafe { out.row_part(token, rows.clone()) };
                        out.copy_from_slice(&sums[..out.len()]);
                    }
                }
            }
        }
    }
}

/// `out[token][row] = gelu(gate[row] . x[token]) * (up[row] . x[token])` for the rows of some panels.
///
/// # Safety
/// As for [`matmul`].
#[inline(always)]
pub unsafe fn geglu(
    kernel: TileKernel,
    expert: &ExpertWeights,
    panels: Range<usize>,
    x: &Packed,
    exact_gelu: bool,
    out: &Output,
) {
    let (gate, up) = (Layout::of(&expert.gate), Layout::of(&expert.up));
    let columns = expert.gate.shape().padded_columns();
    assert!(x.precision() == kernel.precision && columns <= x.columns() && expert.up.shape() == expert.gate.shape());
    let step = if x.tokens() == 1 { PANELS_ALONE / 2 } else { 1 };
    let mut sums = [PanelSums::default(); PANELS_ALONE];
    for panel in panels.clone().step_by(step) {
        // Gates first, then ups.
        let parts = std::array::from_fn(|index| match index / step {
            0 => gate.part(panel + index, 0),
            _ => up.part(panel + index % step, 0),
        });
        for tile in 0..x.tokens().div_ceil(TILE) {
            let tokens = TILE.min(x.tokens() - tile * TILE);
            sums[..2 * step].iter_mut().for_each(|sums| sums[..tokens].fill([0.0; PANEL_ROWS]));
            // SAFETY: the caller's promise; the span ends with the columns, which `x` has too.
            unsafe { (kernel.add)(&parts, x.tile(tile, 0), gate.span(columns), &mut sums) };
            for index in 0..step {
                let rows = gate.rows(panel + index, &panels);
                for (token, (gates, ups)) in sums[index].iter().zip(&sums[step + index]).enumerate().take(tokens) {
                    let mut products = [0f32; PANEL_ROWS];
                    for row in 0..PANEL_ROWS {
                        let gate = if exact_gelu { gelu_erf(gates[row]) } else { gelu_tanh(gates[row]) };
                        products[row] = gate * ups[row];
                    }
                    // SAFETY: the caller's promise.
                    let out = unsafe { out.row_part(tile * TILE + token, rows.clone()) };
                    out.copy_from_slice(&products[..out.len()]);
                }
            }
        }
    }
}
