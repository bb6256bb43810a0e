//! One head's attention for one token, over paged keys and values.
//!
//! `softmax(q K^T / sqrt(head_dim)) V` with the scores of all positions in a scratch row: position by position, in
//! one order, so that the result does not depend on how the prompt was cut. Limit: reads
//! `2 * positions * head_dim * 4` bytes of cache once.

use super::math::exp;
use super::matmul::tile;
use super::vector::{LANES, Vector};
use crate::backend::kv::PAGE_TOKENS;

/// What one head of one token looks at.
pub struct HeadView<'a> {
    /// [head_dim], rotated.
    pub query: &'a [f32],
    /// Blocks `[PAGE_TOKENS, head_dim]` of this head's keys and values in page `i`.
    pub blocks: &'a dyn Fn(usize) -> (&'a [f32], &'a [f32]),
    /// Positions it may look at: its own and all before.
    pub positions: usize,
}

/// Attends into `out: [head_dim]`; `scores` is scratch for at least `positions` values.
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
pub unsafe fn attend<V: Vector>(view: &HeadView, scores: &mut [f32], out: &mut [f32]) {
    let head_dim = view.query.len();
    let scores = &mut scores[..view.positions];
    let scale = 1.0 / (head_dim as f32).sqrt();
    for (page, scores) in scores.chunks_mut(PAGE_TOKENS).enumerate() {
        let (keys, _) = (view.blocks)(page);
        let keys = &keys[..scores.len() * head_dim];
        let mut slot = 0;
        // SAFETY: slot + R stays within the keys sliced above, R rows of head_dim each, as long as the query; V's
        // instruction set is present by the caller's promise.
        unsafe {
            while slot + 4 <= scores.len() {
                let at = keys.as_ptr().add(slot * head_dim);
                let four = tile::<V, f32, 4, 1>(at, head_dim, [view.query.as_ptr()], head_dim);
                for (score, [dot]) in scores[slot..slot + 4].iter_mut().zip(four) {
                    *score = dot * scale;
                }
                slot += 4;
            }
            while slot < scores.len() {
                let at = keys.as_ptr().add(slot * head_dim);
                let [[dot]] = tile::<V, f32, 1, 1>(at, head_dim, [view.query.as_ptr()], head_dim);
                scores[slot] = dot * scale;
                slot += 1;
            }
        }
    }
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0f64;
    for score in scores.iter_mut() {
        *score = exp(*score - max);
        sum += *score as f64;
    }
    out.fill(0.0);
    for (page, weights) in scores.chunks(PAGE_TOKENS).enumerate() {
        let (_, values) = (view.blocks)(page);
        for (weight, value) in weights.iter().zip(values.chunks_exact(head_dim)) {
            // SAFETY: V's instruction set is present by the caller's promise.
            unsafe { add_scaled::<V>(out, value, *weight) };
        }
    }
    let norm = (1.0 / sum) as f32;
    out.iter_mut().for_each(|value| *value *= norm);
}

/// `out += weight * value`
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
unsafe fn add_scaled<V: Vector>(out: &mut [f32], value: &[f32], weight: f32) {
    assert!(out.len() == value.len());
    let whole = out.len() / LANES * LANES;
    // SAFETY: both slices have `whole` elements at least, and V's instruction set is present.
    unsafe {
        let factor = V::splat(weight);
        for at in (0..whole).step_by(LANES) {
            let sum = factor.mul_add(V::load_f32(value.as_ptr().add(at)), V::load_f32(out.as_ptr().add(at)));
            sum.store(out.as_mut_ptr().add(at));
        }
    }
    for (out, value) in out[whole..].iter_mut().zip(&value[whole..]) {
        *out += weight * value;
    }
}
