//! Matrix products with the weights' rows as the outer loop: each row of weights is read once per tile of tokens.
//!
//! Every dot product has V::LANES partial sums along the columns, added in one fixed order, then the columns past the
//! last whole vector one by one. So a result does not depend on the tile it was computed in: any batch gives the
//! same bits as each token alone.
//!
//! While the tiles of some rows are computed, the next rows are asked for, spread evenly over the tiles: only the first
//! tile would read memory otherwise, and memory would be idle during the others.

use std::ops::Range;

use super::math::{gelu_erf, gelu_tanh};
use super::vector::{Element, Vector};

/// Activations of some tokens: rows `[columns]` of `data`, picked by `index` where there is one.
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

impl TokenRows<'_> {
    /// Some of the tokens.
    pub fn part(&self, tokens: Range<usize>) -> Self {
        assert!(tokens.start <= tokens.end && tokens.end <= self.count);
        let count = tokens.len();
        match self.index {
            Some(index) => TokenRows { index: Some(&index[tokens]), count, ..*self },
            None => TokenRows { data: &self.data[tokens.start * self.columns..], count, ..*self },
        }
    }

    #[inline(always)]
    fn row(&self, token: usize) -> &[f32] {
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
// write different elements (see `Output::write`).
unsafe impl Sync for Output {}
// SAFETY: as above.
unsafe impl Send for Output {}

impl Output {
    /// Results of `[tokens, stride]` into `data`.
    pub fn new(data: &mut [f32], stride: usize) -> Self {
        Output { start: data.as_mut_ptr(), stride, count: data.len() }
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
    pub unsafe fn row_part(&self, row: usize, columns: Range<usize>) -> &mut [f32] {
        // The row is compared with the number of rows first, so that nothing below can overflow.
        assert!(columns.start <= columns.end && columns.end <= self.stride && row < self.count / self.stride.max(1));
        let at = row * self.stride + columns.start;
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), columns.len()) }
    }

    /// Writes one element.
    ///
    /// # Safety
    /// The buffer is alive, and no other thread reads or writes this element during the job.
    #[inline(always)]
    unsafe fn write(&self, token: usize, row: usize, value: f32) {
        let at = token * self.stride + row;
        assert!(row < self.stride && at < self.count);
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise.
        unsafe { *self.start.add(at) = value };
    }
}

/// Memory that a tile asks for, `step` bytes further on with every vector of columns.
#[derive(Clone, Copy)]
pub struct Ahead {
    from: *const u8,
    step: usize,
}

impl Ahead {
    /// Nothing but what is read anyway.
    pub fn nothing<E>(weights: *const E) -> Self {
        Ahead { from: weights.cast(), step: 0 }
    }
}

/// Bytes that come from memory at once.
const MEMORY_LINE: usize = 64;

/// `R x T` dot products: R rows of weights, `stride` elements apart, with T tokens' activations.
///
/// # Safety
/// The instruction set of V is present; `weights` is readable for R rows and `x` for `columns` elements each.
#[inline(always)]
pub unsafe fn tile<V: Vector, E: Element, const R: usize, const T: usize>(
    weights: *const E,
    stride: usize,
    x: [*const f32; T],
    columns: usize,
    mut ahead: Ahead,
) -> [[f32; T]; R] {
    let whole = columns / V::LANES * V::LANES;
    let lines = (R * V::LANES * size_of::<E>()).div_ceil(MEMORY_LINE);
    // SAFETY: all offsets stay below `columns` in x and below R rows of `stride >= columns` in weights, which the
    // caller promises are readable; V's instruction set is present by the caller's promise.
    unsafe {
        let mut sums = [[V::zero(); T]; R];
        let mut column = 0;
        while column < whole {
            for line in 0..lines {
                V::prefetch_far(ahead.from.wrapping_add(line * MEMORY_LINE));
            }
            ahead.from = ahead.from.wrapping_add(ahead.step);
            let mut inputs = [V::zero(); T];
            for t in 0..T {
                inputs[t] = V::load_f32(x[t].add(column));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = E::load::<V>(weights.add(r * stride + column));
                for t in 0..T {
                    sums[t] = weight.mul_add(inputs[t], sums[t]);
                }
            }
            column += V::LANES;
        }
        let mut result = [[0.0; T]; R];
        for r in 0..R {
            for t in 0..T {
                let mut sum = sums[r][t].sum();
                for column in whole..columns {
                    sum += (*weights.add(r * stride + column)).widen() * *x[t].add(column);
                }
                result[r][t] = sum;
            }
        }
        result
    }
}

/// Rows of a matrix `[all rows, columns]` that one item computes.
#[derive(Clone, Copy)]
struct Rows<'a, E> {
    weights: &'a [E],
    columns: usize,
    /// The first of a tile.
    first: usize,
    /// The end of the item's.
    end: usize,
}

impl<E: Element> Rows<'_, E> {
    /// The tile of some tokens, the `turn`th of `turns` over these rows.
    ///
    /// # Safety
    /// The instruction set of V is present.
    #[inline(always)]
    unsafe fn tile<V: Vector, const R: usize, const T: usize>(
        &self,
        x: &TokenRows,
        token: usize,
        (turn, turns): (usize, usize),
    ) -> [[f32; T]; R] {
        let weights = &self.weights[self.first * self.columns..(self.first + R) * self.columns];
        let mut inputs = [std::ptr::null(); T];
        for (t, input) in inputs.iter_mut().enumerate() {
            let row = x.row(token + t);
            assert!(row.len() == self.columns);
            *input = row.as_ptr();
        }
        // Past the item's end the next rows are another thread's.
        let ahead = if self.first + R < self.end {
            let step = (R * V::LANES * size_of::<E>()).div_ceil(turns);
            let from = weights.as_ptr_range().end.cast::<u8>();
            Ahead { from: from.wrapping_add(turn * step * (self.columns / V::LANES)), step }
        } else {
            Ahead::nothing(weights.as_ptr())
        };
        // SAFETY: `weights` holds R rows and each input `columns` elements, both checked above.
        unsafe { tile::<V, E, R, T>(weights.as_ptr(), self.columns, inputs, self.columns, ahead) }
    }
}

/// Runs `body` over tiles of `rows x tokens`. Eight rows for a single token, so that eight streams of weights are in
/// flight; else four rows by three tokens, which fills sixteen registers, and by two rather than one where three do not
/// go into the tokens: four sums are too few to hide a multiply-add's latency.
macro_rules! for_each_tile {
    ($rows:expr, $tokens:expr, $body:ident) => {{
        let rows: Range<usize> = $rows;
        let tokens: usize = $tokens;
        let turns = tokens.div_ceil(3);
        let mut row = rows.start;
        if tokens == 1 {
            while row + 8 <= rows.end {
                $body!(row, 0, 8, 1, (0, 1));
                row += 8;
            }
        }
        while row + 4 <= rows.end {
            let (mut token, mut turn) = (0, 0);
            while tokens - token >= 3 && tokens - token != 4 {
                $body!(row, token, 4, 3, (turn, turns));
                (token, turn) = (token + 3, turn + 1);
            }
            while tokens - token >= 2 {
                $body!(row, token, 4, 2, (turn, turns));
                (token, turn) = (token + 2, turn + 1);
            }
            if token < tokens {
                $body!(row, token, 4, 1, (turn, turns));
            }
            row += 4;
        }
        while row < rows.end {
            for token in 0..tokens {
                $body!(row, token, 1, 1, (token, tokens));
            }
            row += 1;
        }
    }};
}

/// `out[token][row] = weights[row] . x[token]` for the given rows.
///
/// # Safety
/// The instruction set of V is present; nobody else touches these rows of `out` during the call.
#[inline(always)]
pub unsafe fn matmul<V: Vector, E: Element>(weights: &[E], rows: Range<usize>, x: &TokenRows, out: &Output) {
    let end = rows.end;
    macro_rules! body {
        ($row:expr, $token:expr, $r:literal, $t:literal, $turn:expr) => {{
            let part = Rows { weights, columns: x.columns, first: $row, end };
            // SAFETY: the caller's promises.
            unsafe {
                let sums = part.tile::<V, $r, $t>(x, $token, $turn);
                for (r, sums) in sums.iter().enumerate() {
                    for (t, sum) in sums.iter().enumerate() {
                        out.write($token + t, $row + r, *sum);
                    }
                }
            }
        }};
    }
    for_each_tile!(rows, x.count, body);
}

/// `out[token][row] = gelu(gate[row] . x[token]) * (up[row] . x[token])` for the given rows.
///
/// # Safety
/// As for [`matmul`].
#[inline(always)]
pub unsafe fn geglu<V: Vector, E: Element>(
    gate: &[E],
    up: &[E],
    rows: Range<usize>,
    x: &TokenRows,
    exact_gelu: bool,
    out: &Output,
) {
    let end = rows.end;
    macro_rules! body {
        ($row:expr, $token:expr, $r:literal, $t:literal, $turn:expr) => {{
            let gate = Rows { weights: gate, columns: x.columns, first: $row, end };
            let up = Rows { weights: up, columns: x.columns, first: $row, end };
            // SAFETY: the caller's promises.
            unsafe {
                let mut gates = gate.tile::<V, $r, $t>(x, $token, $turn);
                let ups = up.tile::<V, $r, $t>(x, $token, $turn);
                for gate in gates.as_flattened_mut() {
                    *gate = if exact_gelu { gelu_erf(*gate) } else { gelu_tanh(*gate) };
                }
                for (r, (gates, ups)) in gates.iter().zip(&ups).enumerate() {
                    for (t, (gate, up)) in gates.iter().zip(ups).enumerate() {
                        out.write($token + t, $row + r, gate * up);
                    }
                }
            }
        }};
    }
    for_each_tile!(rows, x.count, body);
}
