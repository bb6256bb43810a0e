//! Attention within documents and its gradient, a (document, key-value head) at a time. Probabilities are not kept: with the
//! logarithm of each row's sum they are computed again (Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2):
//!
//! ```text
//! S = q K^T / sqrt(d)     P = e^(S - log_sums)     o = P V
//! D = <do, o>             dP = do V^T              dS = P (dP - D) / sqrt(d)
//! dq = dS K               dK = dS^T q              dV = P^T do
//! ```
//!
//! All seven products are those of `kernels/strips.rs`. A block of QUERIES queries meets all keys that its last one sees: per
//! thread, `[QUERIES, tokens of the document]` scores, and strips of its keys and values.

use std::ops::Range;

use crate::backend::cpu::kernels::Kernels;
use crate::backend::cpu::kernels::matmul::{Output, TokenRows};
use crate::backend::cpu::kernels::rows::RowWork;
use crate::backend::cpu::kernels::strips::{STRIP, Strips};

/// Queries of a block.
const QUERIES: usize = 48;

/// Heads of the model.
#[derive(Clone, Copy)]
pub struct Heads {
    pub query: usize,
    pub key_value: usize,
    pub head_dim: usize,
}

impl Heads {
    fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(STRIP)
    }

    /// Numbers of scratch a thread needs for documents of `tokens` tokens.
    pub fn scratch(&self, tokens: usize) -> usize {
        let tokens = tokens.next_multiple_of(STRIP);
        tokens * (self.head_dim * 2 + self.padded() + 4 * QUERIES) + 2 * QUERIES * self.padded()
    }
}

/// What both directions read.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    pub heads: Heads,
    /// `[T, query heads * head_dim]`
    pub query: &'a [f32],
    /// `[T, key-value heads * head_dim]`
    pub key: &'a [f32],
    /// As `key`.
    pub value: &'a [f32],
}

/// Columns of some rows of a matrix.
#[derive(Clone, Copy)]
struct Window<'a> {
    data: &'a [f32],
    stride: usize,
    first: usize,
    width: usize,
}

impl<'a> Window<'a> {
    fn row(&self, row: usize) -> &'a [f32] {
        &self.data[row * self.stride + self.first..][..self.width]
    }

    /// As strips `[width / 16][rows][16]`: what is multiplied by it has its rows as depth.
    fn strips(&self, rows: Range<usize>, out: &mut [f32]) {
        let count = rows.len();
        for (index, row) in rows.enumerate() {
            for (strip, numbers) in self.row(row).chunks(STRIP).enumerate() {
                let out = &mut out[(strip * count + index) * STRIP..][..STRIP];
                out.fill(0.0);
                out[..numbers.len()].copy_from_slice(numbers);
            }
        }
    }

    /// Of the transpose, `[rows / 16][width][16]`: what is multiplied by it has its columns as depth.
    fn transposed_strips(&self, rows: Range<usize>, out: &mut [f32]) {
        out[..rows.len().next_multiple_of(STRIP) * self.width].fill(0.0);
        for (index, row) in rows.enumerate() {
            let (strip, lane) = (index / STRIP, index % STRIP);
            for (column, number) in self.row(row).iter().enumerate() {
                out[(strip * self.width + column) * STRIP + lane] = *number;
            }
        }
    }
}

/// Strips in scratch, `rows` rows each.
fn strips_of(data: &[f32], rows: usize) -> Strips<'_> {
    Strips { data: data.as_chunks().0, rows }
}

/// Rows of a buffer from one on.
fn rows_of(data: &[f32], columns: usize, first: usize, count: usize) -> TokenRows<'_> {
    TokenRows { data: &data[first * columns..], columns, index: None, count }
}

/// Cuts scratch into parts.
fn cut<'a>(scratch: &mut &'a mut [f32], numbers: usize) -> &'a mut [f32] {
    let (part, rest) = std::mem::take(scratch).split_at_mut(numbers);
    *scratch = rest;
    part
}

impl Inputs<'_> {
    fn group(&self) -> usize {
        self.heads.query / self.heads.key_value
    }

    fn window<'a>(&self, data: &'a [f32], heads: usize, head: usize) -> Window<'a> {
        let head_dim = self.heads.head_dim;
        Window { data, stride: heads * head_dim, first: head * head_dim, width: head_dim }
    }

    /// Scores of a block of queries, `[queries, keys]` of `stride` numbers a row, not scaled.
    fn scores(
        &self,
        kernels: &Kernels,
        block: Range<usize>,
        head: usize,
        keys: (&[f32], usize),
        scores: &mut [f32],
        stride: usize,
    ) {
        let head_dim = self.heads.head_dim;
        let scores = &mut scores[..block.len() * stride];
        scores.fill(0.0);
        let out = Output::new(scores, stride);
        let x = rows_of(self.query, self.heads.query * head_dim, block.start, block.len());
        let depth = head * head_dim..(head + 1) * head_dim;
        // SAFETY: `scores` is ours alone.
        unsafe { kernels.add_strips(&x, depth, strips_of(keys.0, head_dim), &out, 0..keys.1) };
    }

    /// One document and key-value head of `Training::attention`.
    ///
    /// # Safety
    /// Nobody else touches the heads' columns in the document's rows of `out` and `log_sums`, whose buffers are alive.
    pub unsafe fn forward(
        &self,
        kernels: &Kernels,
        document: Range<usize>,
        head: usize,
        (out, log_sums): (&Output, &Output),
        mut scratch: &mut [f32],
    ) {
        let (tokens, head_dim) = (document.len(), self.heads.head_dim);
        let padded = tokens.next_multiple_of(STRIP);
        let keys = cut(&mut scratch, padded * head_dim);
        let values = cut(&mut scratch, tokens * self.heads.padded());
        let scores = cut(&mut scratch, QUERIES * padded);
        self.window(self.key, self.heads.key_value, head).transposed_strips(document.clone(), keys);
        self.window(self.value, self.heads.key_value, head).strips(document.clone(), values);
        let scale = 1.0 / (head_dim as f32).sqrt();
        for query_head in head * self.group()..(head + 1) * self.group() {
            for start in (0..tokens).step_by(QUERIES) {
                let block = start..(start + QUERIES).min(tokens);
                let rows = document.start + block.start..document.start + block.end;
                self.scores(kernels, rows.clone(), query_head, (keys, block.end), scores, padded);
                for (row, scores) in block.clone().zip(scores.chunks_exact_mut(padded)) {
                    let (seen, unseen) = scores[..block.end].split_at_mut(row + 1);
                    unseen.fill(0.0);
                    // SAFETY: the caller's promise.
                    let log_sum = unsafe { log_sums.row_part(document.start + row, query_head..query_head + 1) };
                    kernels.run_row(RowWork::Softmax { scores: seen, scale, log_sum: &mut log_sum[0] });
                }
                let columns = query_head * head_dim..(query_head + 1) * head_dim;
                let out = out.skip_rows(rows.start);
                let weights = rows_of(scores, padded, 0, block.len());
                // SAFETY: the caller's promise.
                unsafe {
                    for row in 0..block.len() {
                        out.row_part(row, columns.clone()).fill(0.0);
                    }
                    kernels.add_strips(&weights, 0..block.end, strips_of(values, tokens), &out, columns);
                }
            }
        }
    }

    /// One document and key-value head of `Training::add_attention_gradient`; `out`, `log_sums` and `gradient` as there.
    ///
    /// # Safety
    /// Nobody else touches the heads' columns in the document's rows of `gradients`, whose buffers are alive.
    pub unsafe fn backward(
        &self,
        kernels: &Kernels,
        document: Range<usize>,
        head: usize,
        (out, log_sums, gradient): (&[f32], &[f32], &[f32]),
        gradients: &[Output; 3],
        mut scratch: &mut [f32],
    ) {
        let (tokens, head_dim) = (document.len(), self.heads.head_dim);
        let padded = tokens.next_multiple_of(STRIP);
        let transposed_keys = cut(&mut scratch, padded * head_dim);
        let transposed_values = cut(&mut scratch, padded * head_dim);
        let keys = cut(&mut scratch, tokens * self.heads.padded());
        let weights = cut(&mut scratch, QUERIES * padded);
        let score_gradients = cut(&mut scratch, QUERIES * padded);
        let transposed = cut(&mut scratch, QUERIES * padded);
        let queries = cut(&mut scratch, QUERIES * self.heads.padded());
        let (key, value) =
            (self.window(self.key, self.heads.key_value, head), self.window(self.value, self.heads.key_value, head));
        key.transposed_strips(document.clone(), transposed_keys);
        value.transposed_strips(document.clone(), transposed_values);
        key.strips(document.clone(), keys);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let key_columns = head * head_dim..(head + 1) * head_dim;
        let [query_gradient, key_gradient, value_gradient] = gradients.map(|output| output.skip_rows(document.start));
        for query_head in head * self.group()..(head + 1) * self.group() {
            let query = self.window(self.query, self.heads.query, query_head);
            let (out, gradient) =
                (self.window(out, self.heads.query, query_head), self.window(gradient, self.heads.query, query_head));
            let columns = query_head * head_dim..(query_head + 1) * head_dim;
            for start in (0..tokens).step_by(QUERIES) {
                let block = start..(start + QUERIES).min(tokens);
                let rows = document.start + block.start..document.start + block.end;
                let count = block.len();
                self.scores(kernels, rows.clone(), query_head, (transposed_keys, block.end), weights, padded);
                score_gradients[..count * padded].fill(0.0);
                let weight_gradients = Output::new(&mut score_gradients[..count * padded], padded);
                let x = rows_of(gradient.data, gradient.stride, rows.start, count);
                let depth = gradient.first..gradient.first + head_dim;
                let values = strips_of(transposed_values, head_dim);
                // SAFETY: `score_gradients` is ours alone.
                unsafe { kernels.add_strips(&x, depth, values, &weight_gradients, 0..block.end) };

                for index in 0..count {
                    let row = rows.start + index;
                    let mut mean = 0.0;
                    kernels.run_row(RowWork::Product { a: gradient.row(row), b: out.row(row), out: &mut mean });
                    let log_sum = log_sums[row * self.heads.query + query_head];
                    let weights = &mut weights[index * padded..(index + 1) * padded];
                    let gradients = &mut score_gradients[index * padded..(index + 1) * padded];
                    let seen = block.start + index + 1;
                    weights[seen..block.end].fill(0.0);
                    gradients[seen..block.end].fill(0.0);
                    let (scores, gradients) = (&mut weights[..seen], &mut gradients[..seen]);
                    kernels.run_row(RowWork::SoftmaxGradient { scores, gradients, scale, log_sum, mean });
                }

                let x = rows_of(score_gradients, padded, 0, count);
                let (keys, query_gradient) = (strips_of(keys, tokens), query_gradient.skip_rows(block.start));
                // SAFETY: the caller's promise, here and below.
                unsafe { kernels.add_strips(&x, 0..block.end, keys, &query_gradient, columns.clone()) };
                let of_rows = [(&query, &*score_gradients, &key_gradient), (&gradient, &*weights, &value_gradient)];
                for (source, numbers, out) in of_rows {
                    for (index, numbers) in numbers[..count * padded].chunks_exact(padded).enumerate() {
                        for (key, number) in numbers[..block.end].iter().enumerate() {
                            transposed[key * QUERIES + index] = *number;
                        }
                    }
                    source.strips(rows.clone(), queries);
                    let x = rows_of(transposed, QUERIES, 0, block.end);
                    // SAFETY: as above.
                    unsafe { kernels.add_strips(&x, 0..count, strips_of(queries, count), out, key_columns.clone()) };
                }
            }
        }
    }
}
