//! Products in f32 with strips: sixteen columns of a matrix in a row for each of its rows, `[depth][16]`, as training needs
//! them of weights, of their transposes, and of queries, keys and values.

use std::ops::Range;

use super::matmul::{Output, TokenRows};
use super::vector::Vector;
use crate::quant::PANEL_ROWS;

/// Columns of a strip.
pub const STRIP: usize = PANEL_ROWS;

/// [`add_strip`] of an instruction set.
pub type AddStrip = unsafe fn(&TokenRows, Range<usize>, &[[f32; STRIP]], &Output, Range<usize>);

/// Tokens of a tile with 16 registers, and with 32: two or one of them for each token's sums.
const TILE: usize = 6;
const WIDE_TILE: usize = 12;

/// `out[token][columns] += x[token][depth] . strip`, all tokens of `x`; strip: `[depth][16]`, of which the first
/// `columns.len()` columns count. Each sum has the order of `depth`, whatever the tokens.
///
/// # Safety
/// The instruction set of V is present; nobody else touches these columns of `out` during the call, and its buffer is alive.
#[inline(always)]
pub unsafe fn add_strip<V: Vector>(
    x: &TokenRows,
    depth: Range<usize>,
    strip: &[[f32; STRIP]],
    out: &Output,
    columns: Range<usize>,
) {
    assert!(columns.len() <= STRIP && depth.len() == strip.len());
    let mut token = 0;
    // SAFETY: the caller's promises.
    unsafe {
        if V::REGISTERS >= 32 {
            while token + WIDE_TILE <= x.count {
                add_tile::<V, WIDE_TILE>(x, token, depth.clone(), strip, out, columns.clone());
                token += WIDE_TILE;
            }
        }
        while token + TILE <= x.count {
            add_tile::<V, TILE>(x, token, depth.clone(), strip, out, columns.clone());
            token += TILE;
        }
        while token < x.count {
            add_tile::<V, 1>(x, token, depth.clone(), strip, out, columns.clone());
            token += 1;
        }
    }
}

/// The same of T tokens from `token` on.
///
/// # Safety
/// As for [`add_strip`].
#[inline(always)]
unsafe fn add_tile<V: Vector, const T: usize>(
    x: &TokenRows,
    token: usize,
    depth: Range<usize>,
    strip: &[[f32; STRIP]],
    out: &Output,
    columns: Range<usize>,
) {
    let parts = STRIP / V::LANES;
    let mut rows = [std::ptr::null::<f32>(); T];
    for (t, row) in rows.iter_mut().enumerate() {
        *row = x.row(token + t)[depth.clone()].as_ptr();
    }
    // SAFETY: the instruction set is present by the caller's promise. A row of the strip has STRIP = parts * LANES numbers,
    // `sums` as many for each token, and the rows of x have `depth.len()` numbers, which is the strip's length.
    unsafe {
        let mut sums = [[V::zero(); 2]; T];
        for (k, weights) in strip.iter().enumerate() {
            let mut lanes = [V::zero(); 2];
            for (part, lanes) in lanes.iter_mut().enumerate().take(parts) {
                *lanes = V::load_f32(weights.as_ptr().add(part * V::LANES));
            }
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = V::splat(*row.add(k));
                for (sum, lanes) in sums.iter_mut().zip(lanes).take(parts) {
                    *sum = x.mul_add(lanes, *sum);
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            let mut numbers = [0f32; STRIP];
            for (part, sum) in sums.iter().enumerate().take(parts) {
                sum.store(numbers.as_mut_ptr().add(part * V::LANES));
            }
            let out = out.row_part(token + t, columns.clone());
            out.iter_mut().zip(numbers).for_each(|(out, number)| *out += number);
        }
    }
}
