//! Attention over what is stored, in every dtype, blocked in every way.

use std::sync::Arc;

use super::super::attention::{MAX_ROWS, SPAN};
use super::cache::{HEAD, LAYER, block, bound, geometry, page, stored};
use super::*;
use crate::backend::kv::{KvDtype, KvGeometry, KvHalf, PAGE_TOKENS};

#[cfg(all(target_arch = "x86_64", unix))]
mod speed;

/// Keys or values, `[positions][head_dim]`.
type Rows = Vec<Vec<f32>>;

/// Rows of different sizes, so that each position's scale counts.
fn rows(random: &mut Random, positions: usize, head_dim: usize) -> Rows {
    let row = |_| random.vector(head_dim);
    (0..positions).map(row).map(|row| row.iter().map(|x| x * (0.1 + row[0].abs())).collect()).collect()
}

/// Pages of them, with bytes that no kernel may use in what is left of the last.
fn pages(keys: &Rows, values: &Rows, dtype: KvDtype) -> Vec<Arc<KvPage>> {
    let geometry = geometry(keys[0].len(), dtype);
    let mut pages: Vec<KvPage> = (0..KvGeometry::pages_for(keys.len())).map(|_| page(&geometry)).collect();
    for (half, rows) in [(KvHalf::Key, keys), (KvHalf::Value, values)] {
        for (position, row) in rows.iter().enumerate() {
            all_kernels()[0].store(row, &mut pages[position / PAGE_TOKENS], block(half), position % PAGE_TOKENS);
        }
    }
    pages.into_iter().map(Arc::new).collect()
}

/// The last tokens of a sequence, `[tokens, heads * head_dim]`, all their heads on one key-value head.
struct Queries {
    rows: Vec<f32>,
    tokens: usize,
    heads: usize,
    /// Position of the first.
    start: usize,
}

impl Queries {
    fn new(random: &mut Random, tokens: usize, heads: usize, positions: usize, head_dim: usize) -> Self {
        let rows = random.vector(tokens * heads * head_dim).into_iter().map(|q| q * 3.0).collect();
        Queries { rows, tokens, heads, start: positions - tokens }
    }

    /// Attention in blocks of some tokens and heads, a few positions at a time.
    fn attend(&self, kernels: &Kernels, pages: &[Arc<KvPage>], cut: (usize, usize, usize)) -> Vec<f32> {
        let (tokens, heads, positions) = cut;
        let mut out = vec![f32::NAN; self.rows.len()];
        let mut state = vec![f32::NAN; self.tokens * self.heads * 2];
        let query_size = self.rows.len() / self.tokens;
        let (out_rows, state_rows) = (Output::new(&mut out, query_size), Output::new(&mut state, 2 * self.heads));
        for first in (0..self.start + self.tokens).step_by(positions) {
            for token in (0..self.tokens).step_by(tokens) {
                let end = self.tokens.min(token + tokens);
                for head in (0..self.heads).step_by(heads) {
                    if first >= self.start + end {
                        continue;
                    }
                    let block = QueryBlock {
                        queries: &self.rows[token * query_size..end * query_size],
                        tokens: end - token,
                        start: self.start + token,
                        heads: head..self.heads.min(head + heads),
                        pages,
                        layer: LAYER,
                        key_value_head: HEAD,
                    };
                    let (state, out) = (state_rows.skip_rows(token), out_rows.skip_rows(token));
                    // SAFETY: this is the only thread, and the buffers live on.
                    unsafe { kernels.attend(&block, first..first + positions, &state, &out) };
                }
            }
        }
        out
    }

    /// The same in f64 over given keys and values, and how much a score may be off if each element of a key is by `element`.
    fn expected(&self, keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
        let head_dim = keys[0].len();
        let root = (head_dim as f64).sqrt();
        let attend = |(row, query): (usize, &[f32])| {
            let seen = self.start + row / self.heads + 1;
            let score = |key: &Vec<f64>| query.iter().zip(key).map(|(q, k)| *q as f64 * k).sum::<f64>() / root;
            let scores: Vec<f64> = keys[..seen].iter().map(score).collect();
            let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
            let sum: f64 = weights.iter().sum();
            let mut out = vec![0.0; head_dim];
            for (weight, value) in weights.iter().zip(values) {
                out.iter_mut().zip(value).for_each(|(out, value)| *out += weight / sum * value);
            }
            out
        };
        self.rows.chunks_exact(head_dim).enumerate().flat_map(attend).collect()
    }
}

fn read(pages: &[Arc<KvPage>], half: KvHalf, positions: usize) -> Vec<Vec<f64>> {
    (0..positions).map(|position| stored(&pages[position / PAGE_TOKENS], half, position % PAGE_TOKENS)).collect()
}

fn wide(rows: &Rows) -> Vec<Vec<f64>> {
    rows.iter().map(|row| row.iter().map(|x| *x as f64).collect()).collect()
}

#[test]
fn attention_agrees_with_f64_over_page_and_span_edges_in_every_dtype() {
    let mut random = Random::fresh();
    for head_dim in [2, 8, 16, 30, 64, 128, 130, 192, 256, 258] {
        for (index, positions) in [1, 2, 15, 16, 17, 63, 64, 65, 129, 300].into_iter().enumerate() {
            let (keys, values) = (rows(&mut random, positions, head_dim), rows(&mut random, positions, head_dim));
            let heads = 1 + (index + head_dim) % 3;
            let tokens = positions.min(1 + (index * 7 + head_dim) % 12).min(MAX_ROWS / heads);
            let queries = Queries::new(&mut random, tokens, heads, positions, head_dim);
            let unrounded = queries.expected(&wide(&keys), &wide(&values));
            for dtype in KvDtype::ALL {
                let pages = pages(&keys, &values, dtype);
                let read = |half| read(&pages, half, positions);
                let expected = queries.expected(&read(KvHalf::Key), &read(KvHalf::Value));
                // No element is above 1.1: a score is off by the query's sum times an element's error at most.
                let element = bound(dtype, 1.1, &[1.1]);
                let sum = |query: &[f32]| query.iter().map(|q| q.abs() as f64).sum::<f64>();
                let sum = queries.rows.chunks_exact(head_dim).map(sum).fold(0.0, f64::max);
                let score = sum / (head_dim as f64).sqrt() * element;
                let tolerance = 2e-6 + element + 1.1 * ((2.0 * score).exp() - 1.0);
                for kernels in all_kernels() {
                    let found = queries.attend(&kernels, &pages, (tokens, heads, SPAN));
                    let case = format!("{} {} {head_dim} {positions} {tokens}", kernels.name, dtype.name());
                    for ((found, expected), unrounded) in found.iter().zip(&expected).zip(&unrounded) {
                        assert!((*found as f64 - expected).abs() < 2e-6, "{case}: {found} for {expected}");
                        assert!((*found as f64 - unrounded).abs() < tolerance, "{case}: {found} for {unrounded}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_gets_the_same_bits_alone_and_in_every_block_in_one_range_of_positions_and_in_many() {
    let mut random = Random::fresh();
    for (head_dim, positions, heads) in [(2, 40, 1), (30, 130, 2), (64, 140, 1), (72, 300, 3), (256, 333, 1)] {
        let (keys, values) = (rows(&mut random, positions, head_dim), rows(&mut random, positions, head_dim));
        let queries = Queries::new(&mut random, 30, heads, positions, head_dim);
        for dtype in KvDtype::ALL {
            let pages = pages(&keys, &values, dtype);
            for kernels in all_kernels() {
                let bits =
                    |cut| queries.attend(&kernels, &pages, cut).into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let alone = bits((1, 1, 16 * SPAN));
                for (tokens, width) in (1..=MAX_ROWS).flat_map(|tokens| (1..=heads).map(move |width| (tokens, width))) {
                    if tokens * width <= MAX_ROWS {
                        let range = SPAN * (1 + tokens % 4);
                        let case = format!("{} {} {head_dim} {tokens} {width} {range}", kernels.name, dtype.name());
                        assert!(bits((tokens, width, range)) == alone, "{case}");
                    }
                }
            }
        }
    }
}

/// Scores that rise or fall by a hundred a span: what came before, or comes after, weighs nothing or almost nothing.
#[test]
fn attention_agrees_with_f64_where_the_largest_score_rises_and_falls_far() {
    let mut random = Random::fresh();
    let (head_dim, positions) = (4, 250);
    for slope in [-1.5, -0.1, 0.1, 1.5] {
        let mut keys = rows(&mut random, positions, head_dim);
        for (position, key) in keys.iter_mut().enumerate() {
            key.copy_from_slice(&[position as f32 * slope, 0.0, 0.0, 0.0]);
        }
        let values = rows(&mut random, positions, head_dim);
        let mut queries = Queries::new(&mut random, 9, 1, positions, head_dim);
        queries.rows.chunks_exact_mut(head_dim).for_each(|query| query[0] = 2.0);
        for dtype in KvDtype::ALL {
            let pages = pages(&keys, &values, dtype);
            let expected =
                queries.expected(&read(&pages, KvHalf::Key, positions), &read(&pages, KvHalf::Value, positions));
            for kernels in all_kernels() {
                // A score of 375 has steps of 2^-15 in f32.
                for (found, expected) in queries.attend(&kernels, &pages, (9, 1, SPAN)).iter().zip(&expected) {
                    let case = format!("{} {} {slope}", kernels.name, dtype.name());
                    assert!((*found as f64 - expected).abs() < 5e-5, "{case}: {found} for {expected}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_a_number_shows_in_the_rows_that_see_it_and_no_others() {
    for (dtype, kernels) in
        KvDtype::ALL.into_iter().flat_map(|dtype| all_kernels().into_iter().map(move |kernels| (dtype, kernels)))
    {
        for (head_dim, positions, spoilt) in [(8, 9, 4), (34, 90, 63), (34, 90, 64), (256, 90, 85)] {
            for half in [KvHalf::Key, KvHalf::Value] {
                let mut rows = [vec![vec![0.5; head_dim]; positions], vec![vec![0.5; head_dim]; positions]];
                rows[half as usize][spoilt][1] = f32::NAN;
                let pages = pages(&rows[0], &rows[1], dtype);
                let start = positions - 9;
                let queries = Queries { rows: vec![1.0; 9 * head_dim], tokens: 9, heads: 1, start };
                let found = queries.attend(&kernels, &pages, (9, 1, SPAN));
                for (token, row) in found.chunks_exact(head_dim).enumerate() {
                    let case = format!("{} {} {head_dim} {spoilt} {token}", kernels.name, dtype.name());
                    if start + token < spoilt {
                        assert!(row.iter().all(|value| (value - 0.5).abs() < 2e-3), "{case}");
                    } else {
                        assert!(row[1].is_nan(), "{case}");
                    }
                }
            }
        }
    }
}
