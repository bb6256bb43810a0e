//! Products in f32 with strips: sixteen columns of a matrix in a row for each of its rows, `[depth][16]`, as training needs
//! them of weights, of their transposes, and of queries, keys and values.
//!
//! Limit: the rate of multiply-adds. A tile of six tokens by four strips (by one, with 16 registers) has its sums in registers;
//! no more tokens, for rows of x that lie a multiple of 4 KiB apart share the eight places of one set of the first cache.

use std::ops::Range;

use super::matmul::{Output, TokenRows};
use super::vector::Vector;
use crate::quant::PANEL_ROWS;

/// Columns of a strip.
pub const STRIP: usize = PANEL_ROWS;

/// Strips that lie one after the other: strip s has the rows from `s * rows` on, of which the first ones count.
#[derive(Clone, Copy)]
pub struct Strips<'a> {
    /// `[strips][rows][16]`
    pub data: &'a [[f32; STRIP]],
    /// Rows of each.
    pub rows: usize,
}

/// [`add_strips`] of an instruction set.
pub type AddStrips = unsafe fn(&TokenRows, Range<usize>, Strips, &Output, Range<usize>);

/// Registers of a strip's row at the most.
const PARTS: usize = 2;

/// `out[token][columns] += x[token][depth] . strips`, all tokens of `x`, as many strips as `columns` take, of which the first
/// `columns.len()` columns count. Each sum has the order of `depth`, whatever the tokens.
///
/// # Safety
/// The instruction set of V is present; nobody else touches these columns of `out` during the call, and its buffer is alive.
#[inline(always)]
pub unsafe fn add_strips<V: Vector>(
    x: &TokenRows,
    depth: Range<usize>,
    strips: Strips,
    out: &Output,
    columns: Range<usize>,
) {
    let mut first = 0;
    while first < columns.len() {
        let left = columns.len() - first;
        let wide = if V::REGISTERS >= 32 { left.div_ceil(STRIP) } else { 1 };
        let count = if wide >= 4 { 4 } else { wide.min(2) };
        let columns = columns.start + first..columns.start + first + left.min(count * STRIP);
        let strips = Strips { data: &strips.data[first / STRIP * strips.rows..], ..strips };
        // SAFETY: the caller's promises.
        unsafe {
            match count {
                4 => add_to_all::<V, 4>(x, depth.clone(), strips, out, columns),
                2 => add_to_all::<V, 2>(x, depth.clone(), strips, out, columns),
                _ => add_to_all::<V, 1>(x, depth.clone(), strips, out, columns),
            }
        }
        first += count * STRIP;
    }
}

/// The same of S strips.
///
/// # Safety
/// As for [`add_strips`].
#[inline(always)]
unsafe fn add_to_all<V: Vector, const S: usize>(
    x: &TokenRows,
    depth: Range<usize>,
    strips: Strips,
    out: &Output,
    columns: Range<usize>,
) {
    let mut token = 0;
    // SAFETY: the caller's promises.
    unsafe {
        while token + 6 <= x.count {
            add_tile::<V, 6, S>(x, token, depth.clone(), strips, out, columns.clone());
            token += 6;
        }
        while token + 2 <= x.count {
            add_tile::<V, 2, S>(x, token, depth.clone(), strips, out, columns.clone());
            token += 2;
        }
        if token < x.count {
            add_tile::<V, 1, S>(x, token, depth, strips, out, columns);
        }
    }
}

/// The same of T tokens from `token` on.
///
/// # Safety
/// As for [`add_strips`].
#[inline(always)]
unsafe fn add_tile<V: Vector, const T: usize, const S: usize>(
    x: &TokenRows,
    token: usize,
    depth: Range<usize>,
    strips: Strips,
    out: &Output,
    columns: Range<usize>,
) {
    let parts = STRIP / V::LANES;
    let steps = depth.len();
    assert!(columns.len() <= S * STRIP && parts <= PARTS);
    let mut rows = [std::ptr::null::<f32>(); T];
    for (t, row) in rows.iter_mut().enumerate() {
        *row = x.row(token + t)[depth.clone()].as_ptr();
    }
    let mut at = [std::ptr::null::<f32>(); S];
    for (s, at) in at.iter_mut().enumerate() {
        *at = strips.data[s * strips.rows..][..steps].as_ptr().cast();
    }
    // SAFETY: the instruction set is present by the caller's promise. A row of a strip has STRIP = parts * LANES numbers, `sums`
    // as many for each token and strip; the rows of x and the strips have `steps` of their numbers and rows.
    unsafe {
        let mut sums = [[[V::zero(); PARTS]; S]; T];
        for step in 0..steps {
            let mut lanes = [[V::zero(); PARTS]; S];
            for (lanes, at) in lanes.iter_mut().zip(at) {
                for (part, lanes) in lanes.iter_mut().enumerate().take(parts) {
                    *lanes = V::load_f32(at.add(step * STRIP + part * V::LANES));
                }
            }
            for (sums, row) in sums.iter_mut().zip(rows) {
                let x = V::splat(*row.add(step));
                for (sums, lanes) in sums.iter_mut().zip(lanes) {
                    for (sum, lanes) in sums.iter_mut().zip(lanes).take(parts) {
                        *sum = x.mul_add(lanes, *sum);
                    }
                }
            }
        }
        for (t, sums) in sums.iter().enumerate() {
            for (s, sums) in sums.iter().enumerate() {
                let start = columns.start + s * STRIP;
                let mut numbers = [0f32; STRIP];
                for (part, sum) in sums.iter().enumerate().take(parts) {
                    sum.store(numbers.as_mut_ptr().add(part * V::LANES));
                }
                let out = out.row_part(token + t, start..(start + STRIP).min(columns.end));
                match out.as_mut_array::<STRIP>() {
                    Some(out) => out.iter_mut().zip(numbers).for_each(|(out, number)| *out += number),
                    None => out.iter_mut().zip(numbers).for_each(|(out, number)| *out += number),
                }
            }
        }
    }
}
