//! The two products of attention, over tiles of rows and positions that fit the registers.
//!
//! A score is one dot product: V::LANES partial sums along the columns, added as `Vector::sum` says, then the columns past
//! the last whole vector one by one. A weighted sum of values goes position by position from the span's first,
//! starting at zero. So both are the same bits in every tile.

// Tiles are indexed by row and column, as the formulas are.
#![allow(clippy::needless_range_loop)]

use std::mem::MaybeUninit;

use super::{KvDtype, KvElement, PAGE_TOKENS, SPAN_PAGES};
use crate::backend::cpu::kernels::vector::{Element, Vector};

/// Bytes that come from memory at once.
const MEMORY_LINE: usize = 64;

/// Runs `body` over tiles of rows: with four keys or four vectors of values for each, six rows fill 32 registers and three
/// 16. The last ones by two rather than one: a single row's sums hide less of a multiply-add's latency.
macro_rules! for_each_tile {
    ($v:ident, $rows:expr, $body:ident) => {{
        let std::ops::Range { start: mut row, end } = $rows;
        while $v::REGISTERS >= 32 && row + 6 <= end {
            $body!(row, 6);
            row += 6;
        }
        while row + 3 <= end && row + 4 != end {
            $body!(row, 3);
            row += 3;
        }
        while row + 2 <= end {
            $body!(row, 2);
            row += 2;
        }
        if row < end {
            $body!(row, 1);
        }
    }};
}
pub(super) use for_each_tile;

/// Memory to ask for, from an address on.
#[derive(Clone, Copy)]
pub struct Ahead {
    from: *const u8,
}

impl Ahead {
    /// What begins there; null where nothing does.
    pub fn to<E>(from: *const E) -> Self {
        Ahead { from: from.cast() }
    }

    /// Asks for the next bytes.
    ///
    /// # Safety
    /// The instruction set of V is present.
    #[inline(always)]
    unsafe fn ask<V: Vector>(&mut self, bytes: usize) {
        if !self.from.is_null() {
            for offset in (0..bytes).step_by(MEMORY_LINE) {
                // SAFETY: the caller's promise; the address need not be readable.
                unsafe { V::prefetch_far(self.from.wrapping_add(offset)) };
            }
            self.from = self.from.wrapping_add(bytes);
        }
    }
}

/// `out[t][r] = keys[r] . queries[t]` for R keys, one behind the other, R a multiple of 4.
///
/// # Safety
/// The instruction set of V is present; `keys` is readable for `R * columns` elements, each query for `columns`, and each
/// out writable for R.
#[inline(always)]
pub unsafe fn score<V: Vector, E: Element, const R: usize, const T: usize>(
    keys: *const E,
    queries: [*const f32; T],
    columns: usize,
    outs: [*mut f32; T],
    mut ahead: Ahead,
) {
    let whole = columns / V::LANES * V::LANES;
    // SAFETY: all offsets stay below R keys of `columns` elements, `columns` in a query and R in an out, which the caller
    // promises; so is the instruction set.
    unsafe {
        let mut sums = [[V::zero(); R]; T];
        let mut column = 0;
        while column < whole {
            // A little at a time: all at once would keep the keys at hand waiting.
            ahead.ask::<V>(R * V::LANES * size_of::<E>());
            // The rows' queries in registers and key by key: the other way round is one register more than there are.
            let mut inputs = [V::zero(); T];
            for t in 0..T {
                inputs[t] = V::load_f32(queries[t].add(column));
            }
            for r in 0..R {
                let key = E::load::<V>(keys.add(r * columns + column));
                for t in 0..T {
                    sums[t][r] = key.mul_add(inputs[t], sums[t][r]);
                }
            }
            column += V::LANES;
        }
        for (sums, out) in sums.iter().zip(&outs) {
            for (group, four) in sums.as_chunks::<4>().0.iter().enumerate() {
                V::store_sums(*four, out.add(4 * group));
            }
        }
        // Apart from the above, so that the sums stay in registers.
        for column in whole..columns {
            for (query, out) in queries.iter().zip(&outs) {
                for r in 0..R {
                    *out.add(r) += (*keys.add(r * columns + column)).widen() * *query.add(column);
                }
            }
        }
    }
}

/// Elements of a span of positions.
#[derive(Clone, Copy)]
pub struct Span<E> {
    /// `[PAGE_TOKENS][stride]` each; null where there are none.
    pub pages: [*const E; SPAN_PAGES],
    /// Elements from one position to the next.
    pub stride: usize,
}

impl<E> Span<E> {
    /// Where a column of a position is.
    #[inline(always)]
    fn at(&self, position: usize, column: usize) -> *const E {
        self.pages[position / PAGE_TOKENS].wrapping_add(position % PAGE_TOKENS * self.stride + column)
    }
}

/// Room for f32 copies of what several tiles of rows read: a page of keys, or some columns of a span of values. Widening
/// is exact, so they give the same bits.
#[repr(align(64))]
pub struct Wide(MaybeUninit<[f32; Wide::ELEMENTS]>);

impl Wide {
    /// Of a page of 256 columns; longer ones are widened tile by tile.
    pub const ELEMENTS: usize = PAGE_TOKENS * 256;

    /// Nothing yet.
    pub fn new() -> Self {
        Wide(MaybeUninit::uninit())
    }

    /// Whether it pays for so many rows. With 32 registers never, widening hides behind the products; with 16 for two
    /// tiles. In plain Rust always: compilers vectorise a copy, and not what a tile would do.
    pub fn pays<V: Vector, E: KvElement>(rows: usize) -> bool {
        let least = match V::REGISTERS {
            32.. => usize::MAX,
            16.. => 6,
            _ => 1,
        };
        E::DTYPE != KvDtype::F32 && rows >= least
    }

    /// Copies the first elements of a page, and asks for as many.
    ///
    /// # Safety
    /// The instruction set of V is present.
    #[inline(always)]
    pub unsafe fn page<V: Vector, E: Element>(&mut self, elements: &[E], ahead: *const E) -> *const f32 {
        let to = self.0.as_mut_ptr().cast::<f32>();
        assert!(elements.len() <= Wide::ELEMENTS);
        // SAFETY: as many elements as there are, and room for as many by the assertion; the rest is the caller's promise.
        unsafe {
            Ahead::to(ahead).ask::<V>(size_of_val(elements));
            let whole = elements.len() / V::LANES * V::LANES;
            for at in (0..whole).step_by(V::LANES) {
                E::load::<V>(elements.as_ptr().add(at)).store(to.add(at));
            }
            for (at, element) in elements.iter().enumerate().skip(whole) {
                *to.add(at) = element.widen();
            }
        }
        to
    }

    /// Copies W vectors from `column` on of the first positions of a span, and asks for as much of the `next`.
    ///
    /// # Safety
    /// The instruction set of V is present; the columns of the positions are readable.
    #[inline(always)]
    pub unsafe fn columns<V: Vector, E: Element, const W: usize>(
        &mut self,
        values: &Span<E>,
        next: &Span<E>,
        column: usize,
        positions: usize,
    ) -> Span<f32> {
        let to = self.0.as_mut_ptr().cast::<f32>();
        let stride = W * V::LANES;
        assert!(positions * stride <= Wide::ELEMENTS && positions <= SPAN_PAGES * PAGE_TOKENS);
        for position in 0..positions {
            let (from, to) = (values.at(position, column), to.wrapping_add(position * stride));
            // SAFETY: the caller's promise, and room by the assertion.
            unsafe {
                if !next.pages[position / PAGE_TOKENS].is_null() {
                    Ahead::to(next.at(position, column)).ask::<V>(stride * size_of::<E>());
                }
                for w in 0..W {
                    E::load::<V>(from.add(w * V::LANES)).store(to.add(w * V::LANES));
                }
            }
        }
        let mut pages = [std::ptr::null(); SPAN_PAGES];
        for (index, page) in pages.iter_mut().enumerate() {
            *page = to.wrapping_add(index * PAGE_TOKENS * stride).cast_const();
        }
        Span { pages, stride }
    }
}

/// Rows of a tile, each with its weights `[seen]`, what its sums are multiplied by before, and its sums `[head_dim]`.
#[derive(Clone, Copy)]
pub struct Tile<const T: usize> {
    /// Of each position.
    pub weights: [*const f32; T],
    /// Positions each row sees; they do not fall.
    pub seen: [usize; T],
    /// Factors.
    pub factors: [f32; T],
    /// Sums.
    pub outs: [*mut f32; T],
}

impl<const T: usize> Tile<T> {
    /// `out[t] = out[t] * factors[t] + sum of weights[t][p] * values[p]`, p from 0 to `seen[t]`, for the columns
    /// `column..head_dim`.
    ///
    /// # Safety
    /// The instruction set of V is present; the values of the positions below `seen` are readable, each row's weights for
    /// `seen` elements, and its out writable for `head_dim`.
    #[inline(always)]
    pub unsafe fn add_weighted<V: Vector, E: Element>(
        &self,
        values: &Span<E>,
        next: &Span<E>,
        mut column: usize,
        head_dim: usize,
    ) {
        // SAFETY: the loops end before a vector would reach past `head_dim`; the rest is the caller's promise.
        unsafe {
            if T == 1 {
                // A whole head of 256 where there are 32 registers, so that a value is read in one go.
                while V::REGISTERS >= 32 && column + 16 * V::LANES <= head_dim {
                    self.add_columns::<V, E, 16>(values, next, column, column);
                    column += 16 * V::LANES;
                }
                while V::REGISTERS >= 16 && column + 8 * V::LANES <= head_dim {
                    self.add_columns::<V, E, 8>(values, next, column, column);
                    column += 8 * V::LANES;
                }
            }
            while column + 4 * V::LANES <= head_dim {
                self.add_columns::<V, E, 4>(values, next, column, column);
                column += 4 * V::LANES;
            }
            while column + V::LANES <= head_dim {
                self.add_columns::<V, E, 1>(values, next, column, column);
                column += V::LANES;
            }
            for column in column..head_dim {
                self.add_column(values, column);
            }
        }
    }

    /// The part of `add_weighted` for W vectors, from column `from` of the values to column `to` of the sums.
    ///
    /// # Safety
    /// As for `add_weighted`, and that many columns are there.
    #[inline(always)]
    pub unsafe fn add_columns<V: Vector, E: Element, const W: usize>(
        &self,
        values: &Span<E>,
        next: &Span<E>,
        from: usize,
        to: usize,
    ) {
        let mut all_see = self.seen[0];
        for seen in &self.seen {
            all_see = all_see.min(*seen);
        }
        // SAFETY: every access is to V::LANES elements from `column + w * V::LANES`, w < W, of a row of a position some row
        // sees: in bounds by the caller's promise.
        unsafe {
            let mut sums = [[V::zero(); W]; T];
            for (index, (page, next_page)) in values.pages.iter().zip(&next.pages).enumerate() {
                let first = index * PAGE_TOKENS;
                let mut value = page.wrapping_add(from);
                let mut ahead = next_page.wrapping_add(from);
                for position in first..all_see.min(first + PAGE_TOKENS) {
                    if !next_page.is_null() {
                        Ahead::to(ahead).ask::<V>(W * V::LANES * size_of::<E>());
                        ahead = ahead.wrapping_add(next.stride);
                    }
                    let mut weights = [V::zero(); T];
                    for t in 0..T {
                        weights[t] = V::splat(*self.weights[t].add(position));
                    }
                    for w in 0..W {
                        let value = E::load::<V>(value.add(w * V::LANES));
                        for t in 0..T {
                            sums[t][w] = value.mul_add(weights[t], sums[t][w]);
                        }
                    }
                    value = value.wrapping_add(values.stride);
                }
            }
            // A weight of zero would not do: it makes NaN of what is not a number in a position that a row may not see.
            let mut position = all_see;
            while T > 1 && position < self.seen[T - 1] {
                let value = values.at(position, from);
                for t in 0..T {
                    if position < self.seen[t] {
                        let weight = V::splat(*self.weights[t].add(position));
                        for w in 0..W {
                            sums[t][w] = E::load::<V>(value.add(w * V::LANES)).mul_add(weight, sums[t][w]);
                        }
                    }
                }
                position += 1;
            }
            for t in 0..T {
                let factor = V::splat(self.factors[t]);
                for w in 0..W {
                    let out = self.outs[t].add(to + w * V::LANES);
                    V::load_f32(out).mul_add(factor, sums[t][w]).store(out);
                }
            }
        }
    }

    /// The part of `add_weighted` for one column.
    ///
    /// # Safety
    /// As for `add_weighted`, and `column < head_dim`.
    #[inline(always)]
    unsafe fn add_column<E: Element>(&self, values: &Span<E>, column: usize) {
        // SAFETY: every access is to the column of a position that a row sees: in bounds by the caller's promise.
        unsafe {
            for t in 0..T {
                let mut sum = 0.0;
                for position in 0..self.seen[t] {
                    let value = *values.at(position, column);
                    sum += value.widen() * *self.weights[t].add(position);
                }
                let out = self.outs[t].add(column);
                *out = *out * self.factors[t] + sum;
            }
        }
    }
}
