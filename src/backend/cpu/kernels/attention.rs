//! Attention of a block of query rows over paged keys and values of any dtype: `softmax(q K^T / sqrt(head_dim)) V`.
//!
//! A row is one token's query of one head; a block's rows share a key-value head, and its tokens follow each other, so
//! that the rows go over each span of positions together: keys and values are read from memory once per block, and
//! widened once per block or tile of rows, whichever is faster (`tiles.rs`). The softmax is the one-pass kind (Milakov and
//! Gimelshein, 2018): a row keeps the largest score so far, the sum of its weights and the sum of its weighted values, both
//! relative to that score, and takes them to the new one with every span.
//!
//! Spans begin at multiples of SPAN, whatever the block; within one, every sum of a row has one order (`tiles.rs`). So a
//! row's bits depend neither on the block, nor on where the work was left between two spans. Limit: reads
//! `2 * positions * (head_dim * bytes_per_element + bytes_per_scale)` bytes of cache once per block.

mod tiles;

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use super::math::exp;
use super::matmul::Output;
use super::vector::{Element, Vector};
use crate::backend::kv::{KvBlock, KvDtype, KvElement, KvHalf, KvPage, PAGE_TOKENS};
use tiles::{Ahead, Span, Tile, Wide, for_each_tile, score};

/// Positions that weights are computed for at a time.
pub const SPAN: usize = SPAN_PAGES * PAGE_TOKENS;
const SPAN_PAGES: usize = 4;

/// Most rows of a block.
pub const MAX_ROWS: usize = 24;

/// Rows of queries that attend together.
pub struct QueryBlock<'a> {
    /// `[tokens, query_size]`: the queries of consecutive tokens of one sequence, rotated.
    pub queries: &'a [f32],
    /// At least one, and at most MAX_ROWS by the number of heads.
    pub tokens: usize,
    /// Position of the first; each looks at its own and all before.
    pub start: usize,
    /// Query heads, all of one key-value head.
    pub heads: Range<usize>,
    /// The sequence's pages, all of one geometry.
    pub pages: &'a [Arc<KvPage>],
    /// Layer.
    pub layer: usize,
    /// Key-value head.
    pub key_value_head: usize,
}

/// Takes a range of positions into the attention of a block: `out: [tokens, query_size]`, of which the block's heads are
/// written. Ranges come in order, from 0 up to the last token's position, and all but the last end at a multiple of SPAN.
/// Between them `state: [tokens, heads, 2]` has each row's largest score and the sum of its weights.
///
/// # Safety
/// The instruction set of V is present; nobody else touches the block's rows of `state` and `out` during the call, and
/// their buffers are alive.
#[inline(always)]
pub unsafe fn attend<V: Vector>(block: &QueryBlock, positions: Range<usize>, state: &Output, out: &Output) {
    // SAFETY: the caller's promises.
    unsafe {
        match block.pages[0].geometry().dtype {
            KvDtype::F32 => attend_to::<V, f32>(block, positions, state, out),
            KvDtype::Bf16 => attend_to::<V, bf16>(block, positions, state, out),
            KvDtype::F16 => attend_to::<V, f16>(block, positions, state, out),
            KvDtype::Int8 => attend_to::<V, i8>(block, positions, state, out),
        }
    }
}

/// What a block's rows have come to.
struct Rows<'a> {
    head_dim: usize,
    /// `[head_dim]` each.
    queries: [&'a [f32]; MAX_ROWS],
    /// `[head_dim]` each: the sums of weighted values.
    outs: [*mut f32; MAX_ROWS],
    /// The largest scores.
    largest: [f32; MAX_ROWS],
    /// The sums of weights.
    sums: [f32; MAX_ROWS],
    /// Scores of the span at hand, then weights.
    weights: [[f32; SPAN]; MAX_ROWS],
    /// How many of them each row may see.
    seen: [usize; MAX_ROWS],
    /// What the sums up to the span at hand are to be multiplied by.
    factors: [f32; MAX_ROWS],
}

impl Rows<'_> {
    /// T rows from `row` on.
    #[inline(always)]
    fn tile<const T: usize>(&self, row: usize) -> Tile<T> {
        let mut tile =
            Tile { weights: [std::ptr::null(); T], seen: [0; T], factors: [0.0; T], outs: [std::ptr::null_mut(); T] };
        for t in 0..T {
            tile.weights[t] = self.weights[row + t].as_ptr();
            tile.seen[t] = self.seen[row + t];
            tile.factors[t] = self.factors[row + t];
            tile.outs[t] = self.outs[row + t];
        }
        tile
    }
}

/// # Safety
/// As for [`attend`].
#[inline(always)]
unsafe fn attend_to<V: Vector, E: Element + KvElement>(
    block: &QueryBlock,
    positions: Range<usize>,
    state: &Output,
    out: &Output,
) {
    let head_dim = block.pages[0].geometry().head_dim;
    let (width, query_size) = (block.heads.len(), block.queries.len() / block.tokens);
    let rows = block.tokens * width;
    let end = positions.end.min(block.start + block.tokens);
    let is_last = end == block.start + block.tokens;
    assert!(rows <= MAX_ROWS && end <= block.pages.len() * PAGE_TOKENS);
    assert!(positions.start.is_multiple_of(SPAN) && (is_last || end.is_multiple_of(SPAN)));
    // Of the first row that sees a position, in a range or a span.
    let first_row = |position: usize| position.saturating_sub(block.start).min(block.tokens) * width;

    let mut wide = Wide::new();
    let mut all = Rows {
        head_dim,
        queries: [&[]; MAX_ROWS],
        outs: [std::ptr::null_mut(); MAX_ROWS],
        largest: [f32::NEG_INFINITY; MAX_ROWS],
        sums: [0.0; MAX_ROWS],
        weights: [[0.0; SPAN]; MAX_ROWS],
        seen: [0; MAX_ROWS],
        factors: [0.0; MAX_ROWS],
    };
    let place = |row: usize| (row / width, block.heads.start + row % width);
    for row in first_row(positions.start)..rows {
        let (token, head) = place(row);
        let columns = head * head_dim..(head + 1) * head_dim;
        // SAFETY: exclusive by the caller's promise.
        let (out, state) =
            unsafe { (out.row_part(token, columns.clone()), state.row_part(token, 2 * head..2 * head + 2)) };
        if positions.start == 0 {
            out.fill(0.0);
        } else {
            (all.largest[row], all.sums[row]) = (state[0], state[1]);
        }
        all.queries[row] = &block.queries[token * query_size..][columns];
        all.outs[row] = out.as_mut_ptr();
    }

    let kv = |half| KvBlock { layer: block.layer, half, head: block.key_value_head };
    let scale = 1.0 / (head_dim as f32).sqrt();
    for span in (positions.start..end).step_by(SPAN) {
        let count = SPAN.min(end - span);
        let first = first_row(span);
        for row in first..rows {
            all.seen[row] = SPAN.min(block.start + row / width + 1 - span);
        }
        let pages = |from: usize, count: usize| {
            let from = (from / PAGE_TOKENS).min(block.pages.len());
            &block.pages[from..(from + count.div_ceil(PAGE_TOKENS)).min(block.pages.len())]
        };
        let here = pages(span, count);
        for (index, page) in here.iter().enumerate() {
            let count = PAGE_TOKENS.min(count - index * PAGE_TOKENS);
            let (keys, values) = (page.elements::<E>(kv(KvHalf::Key)), page.elements::<E>(kv(KvHalf::Value)));
            // SAFETY: the caller's promise.
            unsafe { score_page::<V, E>(&mut all, first..rows, &mut wide, (keys, values), index * PAGE_TOKENS, count) };
        }
        for row in first..rows {
            weigh(&mut all, row, scale, here, kv);
        }
        let next = if span + SPAN < end { pages(span + SPAN, SPAN) } else { &[] };
        // SAFETY: the caller's promise.
        unsafe { add_values::<V, E>(&all, first..rows, &mut wide, here, next, kv) };
    }

    for row in first_row(positions.start)..rows {
        let (token, head) = place(row);
        // SAFETY: as above; what `outs` has is not used again.
        unsafe {
            if block.start + token < end {
                let norm = 1.0 / all.sums[row];
                out.row_part(token, head * head_dim..(head + 1) * head_dim).iter_mut().for_each(|value| *value *= norm);
            } else {
                state.row_part(token, 2 * head..2 * head + 2).copy_from_slice(&[all.largest[row], all.sums[row]]);
            }
        }
    }
}

/// The products of some rows' queries with the keys of a page, of which `count` positions are needed. The values of the
/// same positions are asked for on the way.
///
/// # Safety
/// The instruction set of V is present.
#[inline(always)]
unsafe fn score_page<V: Vector, E: Element + KvElement>(
    all: &mut Rows,
    rows: Range<usize>,
    wide: &mut Wide,
    (keys, values): (&[E], &[E]),
    at: usize,
    count: usize,
) {
    assert!(keys.len() == values.len() && keys.len() == PAGE_TOKENS * all.head_dim && at + PAGE_TOKENS <= SPAN);
    // SAFETY: `keys` is a page's; the instruction set is the caller's promise.
    unsafe {
        if Wide::pays::<V, E>(rows.len()) && keys.len() <= Wide::ELEMENTS {
            let keys = wide.page::<V, E>(keys, values.as_ptr());
            score_rows::<V, f32>(all, rows, keys, std::ptr::null(), at, count);
        } else {
            score_rows::<V, E>(all, rows, keys.as_ptr(), values.as_ptr(), at, count);
        }
    }
}

/// The part of `score_page` for keys of any type, and as much memory to ask for.
///
/// # Safety
/// The instruction set of V is present, and `keys` readable for PAGE_TOKENS keys.
#[inline(always)]
unsafe fn score_rows<V: Vector, K: Element>(
    all: &mut Rows,
    rows: Range<usize>,
    keys: *const K,
    ahead: *const K,
    at: usize,
    count: usize,
) {
    let head_dim = all.head_dim;
    macro_rules! body {
        ($row:expr, $t:literal) => {{
            // One row's sums are few: eight keys at a time hide the latency of a multiply-add.
            const KEYS: usize = if $t == 1 { 8 } else { 4 };
            let mut queries = [std::ptr::null(); $t];
            let mut outs = [std::ptr::null_mut(); $t];
            for (t, (query, out)) in queries.iter_mut().zip(&mut outs).enumerate() {
                assert!(all.queries[$row + t].len() == head_dim);
                *query = all.queries[$row + t].as_ptr();
                *out = all.weights[$row + t][at..at + PAGE_TOKENS].as_mut_ptr();
            }
            let asks = $row == rows.start && !ahead.is_null();
            for key in (0..count).step_by(KEYS) {
                let ahead = if asks { ahead.wrapping_add(key * head_dim) } else { std::ptr::null() };
                let outs = outs.map(|out| out.wrapping_add(key));
                // SAFETY: there are PAGE_TOKENS keys, a multiple of KEYS, each as long as a query, and each row's weights
                // have room for as many from `at`; the rest is the caller's promise.
                unsafe {
                    let keys = keys.add(key * head_dim);
                    score::<V, K, KEYS, $t>(keys, queries, head_dim, outs, Ahead::to(ahead));
                }
            }
        }};
    }
    for_each_tile!(V, rows, body);
}

/// Turns a row's scores into weights relative to the largest so far, and takes its sum of weights along.
#[inline(always)]
fn weigh(all: &mut Rows, row: usize, scale: f32, pages: &[Arc<KvPage>], kv: impl Fn(KvHalf) -> KvBlock) {
    /// Partial sums and maxima, on every instruction set.
    const PARTS: usize = 16;
    let (weights, seen) = (&mut all.weights[row], all.seen[row]);
    weights.iter_mut().for_each(|score| *score *= scale);
    for (scores, page) in weights.chunks_exact_mut(PAGE_TOKENS).zip(pages) {
        for (score, key_scale) in scores.iter_mut().zip(page.scales(kv(KvHalf::Key))) {
            *score *= key_scale;
        }
    }
    weights[seen..].fill(f32::NEG_INFINITY);
    let (parts, _) = weights.as_chunks::<PARTS>();
    let mut largest = [all.largest[row]; PARTS];
    for part in parts {
        for (largest, score) in largest.iter_mut().zip(part) {
            *largest = if *score > *largest { *score } else { *largest };
        }
    }
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    weights.iter_mut().for_each(|score| *score = exp(*score - largest));
    let (parts, _) = weights.as_chunks::<PARTS>();
    let mut sums = [0.0; PARTS];
    for part in parts {
        for (sum, weight) in sums.iter_mut().zip(part) {
            *sum += weight;
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
    }
    all.factors[row] = exp(all.largest[row] - largest);
    all.sums[row] = all.sums[row] * all.factors[row] + sums[0];
    all.largest[row] = largest;
    for (weights, page) in weights.chunks_exact_mut(PAGE_TOKENS).zip(pages) {
        for (weight, value_scale) in weights.iter_mut().zip(page.scales(kv(KvHalf::Value))) {
            *weight *= value_scale;
        }
    }
}

/// `out = out * factor + sum of weight * value` for some rows over the pages of a span. The keys of the `next` are asked
/// for on the way.
///
/// # Safety
/// The instruction set of V is present, and the rows' outs are writable for `head_dim` elements.
#[inline(always)]
unsafe fn add_values<V: Vector, E: Element + KvElement>(
    all: &Rows,
    rows: Range<usize>,
    wide: &mut Wide,
    pages: &[Arc<KvPage>],
    next: &[Arc<KvPage>],
    kv: impl Fn(KvHalf) -> KvBlock,
) {
    let head_dim = all.head_dim;
    let elements = |pages: &[Arc<KvPage>], half| {
        let mut span = Span { pages: [std::ptr::null(); SPAN_PAGES], stride: head_dim };
        for (to, page) in span.pages.iter_mut().zip(pages) {
            *to = page.elements::<E>(kv(half)).as_ptr();
        }
        span
    };
    let values = elements(pages, KvHalf::Value);
    let (next, nothing) = (elements(next, KvHalf::Key), elements(&[], KvHalf::Key));
    let positions = all.seen[rows.end - 1];
    assert!(positions <= pages.len() * PAGE_TOKENS);

    let mut column = 0;
    if Wide::pays::<V, E>(rows.len()) {
        while column + 4 * V::LANES <= head_dim {
            // SAFETY: a page has PAGE_TOKENS values of `head_dim` elements; the rest is the caller's promise.
            let wide = unsafe { wide.columns::<V, E, 4>(&values, &next, column, positions) };
            let asked = Span { pages: [std::ptr::null(); SPAN_PAGES], stride: 0 };
            macro_rules! body {
                ($row:expr, $t:literal) => {
                    // SAFETY: `wide` has the columns of all positions that a row sees; the rest is the caller's promise.
                    unsafe { all.tile::<$t>($row).add_columns::<V, f32, 4>(&wide, &asked, 0, column) }
                };
            }
            for_each_tile!(V, rows.clone(), body);
            column += 4 * V::LANES;
        }
    }
    macro_rules! body {
        ($row:expr, $t:literal) => {{
            let next = if $row == rows.start { &next } else { &nothing };
            // SAFETY: a page has PAGE_TOKENS values of `head_dim` elements, and no row sees more than the pages have; the
            // rest is the caller's promise.
            unsafe { all.tile::<$t>($row).add_weighted::<V, E>(&values, next, column, head_dim) };
        }};
    }
    for_each_tile!(V, rows.clone(), body);
}
