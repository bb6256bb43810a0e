//! Tiles of row-major rows, for attention.

use super::vector::{Element, LANES, Vector};

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
    let whole = columns / LANES * LANES;
    let lines = (R * LANES * size_of::<E>()).div_ceil(MEMORY_LINE);
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
            column += LANES;
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
