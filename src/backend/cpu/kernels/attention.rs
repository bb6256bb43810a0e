//! One head's attention for one token, over paged keys and values of any dtype.
//!
//! `softmax(q K^T / sqrt(head_dim)) V` with the scores of all positions in a scratch row: position by position, in
//! one order, so that the result does not depend on how the prompt was cut. Keys and values are widened to f32 in
//! registers; int8's scales, one per position, multiply its score and its weight. Limit: reads
//! `2 * positions * (head_dim * bytes_per_element + bytes_per_scale)` bytes of cache once.

use std::sync::Arc;

use half::{bf16, f16};

use super::math::exp;
use super::rows::{Ahead, tile};
use super::vector::{Element, LANES, Vector};
use crate::backend::kv::{KvBlock, KvDtype, KvElement, KvHalf, KvPage, PAGE_TOKENS};

/// What one head of one token looks at.
pub struct HeadView<'a> {
    /// [head_dim], rotated.
    pub query: &'a [f32],
    /// The sequence's pages, all of one geometry.
    pub pages: &'a [Arc<KvPage>],
    /// Layer.
    pub layer: usize,
    /// Key-value head.
    pub head: usize,
    /// Positions it may look at: its own and all before; at least one.
    pub positions: usize,
}

/// Attends into `out: [head_dim]`; `scores` is scratch for at least `positions` values.
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
pub unsafe fn attend<V: Vector>(view: &HeadView, scores: &mut [f32], out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match view.pages[0].geometry().dtype {
            KvDtype::F32 => attend_to::<V, f32>(view, scores, out),
            KvDtype::Bf16 => attend_to::<V, bf16>(view, scores, out),
            KvDtype::F16 => attend_to::<V, f16>(view, scores, out),
            KvDtype::Int8 => attend_to::<V, i8>(view, scores, out),
        }
    }
}

/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn attend_to<V: Vector, E: Element + KvElement>(view: &HeadView, scores: &mut [f32], out: &mut [f32]) {
    let head_dim = view.query.len();
    assert!(view.positions <= view.pages.len() * PAGE_TOKENS);
    let scores = &mut scores[..view.positions];
    let scale = 1.0 / (head_dim as f32).sqrt();
    let block = |half| KvBlock { layer: view.layer, half, head: view.head };
    for (index, (page, scores)) in view.pages.iter().zip(scores.chunks_mut(PAGE_TOKENS)).enumerate() {
        // SAFETY: V's instruction set is present by the caller's promise.
        unsafe { prefetch::<V, E>(view.pages.get(index + 1), block(KvHalf::Key)) };
        // SAFETY: V's instruction set is present by the caller's promise.
        unsafe { dot_products::<V, E>(page.elements(block(KvHalf::Key)), view.query, scores) };
        scores.iter_mut().for_each(|score| *score *= scale);
        for (score, key_scale) in scores.iter_mut().zip(page.scales(block(KvHalf::Key))) {
            *score *= key_scale;
        }
    }
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f64;
    for score in scores.iter_mut() {
        *score = exp(*score - max);
        sum += *score as f64;
    }
    out.fill(0.0);
    for (index, (page, weights)) in view.pages.iter().zip(scores.chunks_mut(PAGE_TOKENS)).enumerate() {
        // SAFETY: V's instruction set is present by the caller's promise.
        unsafe { prefetch::<V, E>(view.pages.get(index + 1), block(KvHalf::Value)) };
        for (weight, value_scale) in weights.iter_mut().zip(page.scales(block(KvHalf::Value))) {
            *weight *= value_scale;
        }
        // SAFETY: V's instruction set is present by the caller's promise.
        unsafe { add_scaled_rows::<V, E>(out, page.elements(block(KvHalf::Value)), weights) };
    }
    let norm = (1.0 / sum) as f32;
    out.iter_mut().for_each(|value| *value *= norm);
}

/// Asks for a block of the page that comes next: the processor's own prefetching stops at the block's end.
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
unsafe fn prefetch<V: Vector, E: KvElement>(next: Option<&Arc<KvPage>>, block: KvBlock) {
    let Some(page) = next else { return };
    for line in page.elements::<E>(block).chunks(64 / size_of::<E>()) {
        // SAFETY: V's instruction set is present by the caller's promise.
        unsafe { V::prefetch_near(line.as_ptr().cast()) };
    }
}

/// `out[row] = rows[row] . query`
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
unsafe fn dot_products<V: Vector, E: Element>(rows: &[E], query: &[f32], out: &mut [f32]) {
    let columns = query.len();
    let rows = &rows[..out.len() * columns];
    let mut row = 0;
    // SAFETY: row + R stays within the rows sliced above, R rows of `columns` each, as long as the query; V's
    // instruction set is present by the caller's promise.
    unsafe {
        while row + 8 <= out.len() {
            let keys = rows.as_ptr().add(row * columns);
            let eight = tile::<V, E, 8, 1>(keys, columns, [query.as_ptr()], columns, Ahead::nothing(keys));
            for (out, [dot]) in out[row..row + 8].iter_mut().zip(eight) {
                *out = dot;
            }
            row += 8;
        }
        while row < out.len() {
            let key = rows.as_ptr().add(row * columns);
            let [[dot]] = tile::<V, E, 1, 1>(key, columns, [query.as_ptr()], columns, Ahead::nothing(key));
            out[row] = dot;
            row += 1;
        }
    }
}

/// `out += sum of weights[row] * rows[row]`, row by row, with a few columns at a time kept in registers.
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
unsafe fn add_scaled_rows<V: Vector, E: Element>(out: &mut [f32], rows: &[E], weights: &[f32]) {
    /// Vectors in registers: enough independent sums to hide the latency of a multiply-add.
    const WIDTH: usize = 4;
    let columns = out.len();
    assert!(rows.len() >= weights.len() * columns);
    let mut column = 0;
    // SAFETY: `rows` has `columns` elements for each weight by the assertion, and `columns` is the length of `out`; the
    // loops end before a vector would reach past it; V's instruction set is present by the caller's promise.
    unsafe {
        while column + WIDTH * LANES <= columns {
            add_scaled_columns::<V, E, WIDTH>(out.as_mut_ptr(), rows.as_ptr(), columns, column, weights);
            column += WIDTH * LANES;
        }
        while column + LANES <= columns {
            add_scaled_columns::<V, E, 1>(out.as_mut_ptr(), rows.as_ptr(), columns, column, weights);
            column += LANES;
        }
    }
    for (row, weight) in rows.chunks_exact(columns).zip(weights) {
        for (out, value) in out[column..].iter_mut().zip(&row[column..]) {
            *out += weight * value.widen();
        }
    }
}

/// The part of `add_scaled_rows` for WIDTH vectors from `column` on.
///
/// # Safety
/// The instruction set of V is present; `out` has `columns` elements and `rows` as many per weight, and
/// `column + WIDTH * LANES <= columns`.
#[inline(always)]
unsafe fn add_scaled_columns<V: Vector, E: Element, const WIDTH: usize>(
    out: *mut f32,
    rows: *const E,
    columns: usize,
    column: usize,
    weights: &[f32],
) {
    // SAFETY: every access is to LANES elements from `column + i * LANES`, i < WIDTH, of a row: in bounds by the
    // caller's promise.
    unsafe {
        let (out, mut row) = (out.add(column), rows.add(column));
        let mut sums = [V::zero(); WIDTH];
        for (i, sum) in sums.iter_mut().enumerate() {
            *sum = V::load_f32(out.add(i * LANES));
        }
        for weight in weights {
            let factor = V::splat(*weight);
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = factor.mul_add(E::load::<V>(row.add(i * LANES)), *sum);
            }
            row = row.wrapping_add(columns);
        }
        for (i, sum) in sums.into_iter().enumerate() {
            sum.store(out.add(i * LANES));
        }
    }
}
