//! Attention within documents and its gradient, as products: a block of queries of all heads at a time meets the keys that its
//! last one sees. Probabilities are not kept: the gradient computes them again (Dao, FlashAttention-2, arXiv 2307.08691,
//! algorithm 2):
//!
//! ```text
//! S = q K^T / sqrt(d)     P = e^(S - log_sums)     o = P V
//! D = <do, o>             dP = do V^T              dS = P (dP - D) / sqrt(d)
//! dq = dS K               dK = dS^T q              dV = P^T do
//! ```

use std::ops::Range;

use super::CudaTraining;
use super::products::{Multiply, Side};
use crate::backend::cuda::arguments::TrainingSoftmaxArguments;
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::workspace::at;
use crate::error::Result;

/// Queries of a block.
pub const QUERIES: usize = 128;

/// What both directions are given, `[T, heads * head_dim]` each but the last.
#[derive(Clone, Copy)]
pub struct Attention {
    pub query: Address,
    pub key: Address,
    pub value: Address,
    pub out: Address,
    /// `[T, heads]`
    pub log_sums: Address,
}

/// What the gradient is given beside, and what it adds to.
#[derive(Clone, Copy)]
pub struct AttentionGradient {
    pub out: Address,
    pub query: Address,
    pub key: Address,
    pub value: Address,
}

/// Consecutive queries of a document.
struct Block {
    /// Their first row in the batch, and the document's.
    row: usize,
    document: usize,
    /// The first one's place in its document.
    first: usize,
    queries: usize,
    /// Keys that the last one sees.
    keys: usize,
}

/// Heads of the model, and the numbers of a row of each kind.
struct Heads {
    query: usize,
    key_value: usize,
    head_dim: usize,
}

impl Heads {
    fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// The numbers of rows of queries, or of what is as long, from a row on: a matrix a head.
    fn query_rows(&self, start: Address, row: usize) -> Side {
        let stride = self.query * self.head_dim;
        Side::rows(skip(start, row * stride), stride, self.head_dim)
    }

    /// The same of keys and values.
    fn key_rows(&self, start: Address, row: usize) -> Side {
        let stride = self.key_value * self.head_dim;
        Side::rows(skip(start, row * stride), stride, self.head_dim)
    }

    fn transposed_keys(&self, start: Address, row: usize) -> Side {
        let Side { start, row: stride, next, .. } = self.key_rows(start, row);
        Side::transposed(start, stride, next)
    }
}

fn skip(start: Address, numbers: usize) -> Address {
    start + (numbers * size_of::<f32>()) as Address
}

fn blocks(document: &Range<usize>) -> impl Iterator<Item = Block> {
    let document = document.clone();
    (0..document.len()).step_by(QUERIES).map(move |first| {
        let queries = QUERIES.min(document.len() - first);
        Block { row: document.start + first, document: document.start, first, queries, keys: first + queries }
    })
}

impl CudaTraining {
    fn heads(&self) -> Heads {
        let config = &self.shared.config;
        Heads { query: config.num_attention_heads, key_value: config.num_key_value_heads, head_dim: config.head_dim }
    }

    /// `[heads, queries, keys]`: rows of scores, or of what is as large.
    fn score_rows(&self, start: Address, block: &Block) -> Side {
        Side::rows(start, block.keys, block.queries * block.keys)
    }

    /// Rows of all query heads by keys, or values, of theirs.
    fn multiply_by_keys(
        &self,
        current: &Current,
        block: &Block,
        rows: Address,
        keys: Address,
        out: Address,
    ) -> Result<()> {
        let heads = self.heads();
        let multiply = Multiply {
            a: heads.query_rows(rows, block.row),
            b: heads.transposed_keys(keys, block.document),
            out: self.score_rows(out, block),
            size: [block.queries, heads.head_dim, block.keys],
            count: heads.query,
            shared_by: heads.group(),
            accumulate: false,
        };
        self.multiply(current, &multiply)
    }

    /// Sums of values, or keys, with the weights that each query's row of scores has for them.
    fn weigh(
        &self,
        current: &Current,
        block: &Block,
        weights: Address,
        values: Address,
        (out, accumulate): (Address, bool),
    ) -> Result<()> {
        let heads = self.heads();
        let multiply = Multiply {
            a: self.score_rows(weights, block),
            b: heads.key_rows(values, block.document),
            out: heads.query_rows(out, block.row),
            size: [block.queries, block.keys, heads.head_dim],
            count: heads.query,
            shared_by: heads.group(),
            accumulate,
        };
        self.multiply(current, &multiply)
    }

    /// Adds to keys, or values, the sums of rows of queries with the weights that those have for them: of the query heads of a
    /// key-value head one after the other.
    fn add_weighed_queries(
        &self,
        current: &Current,
        block: &Block,
        weights: Address,
        rows: Address,
        out: Address,
    ) -> Result<()> {
        let (heads, scores) = (self.heads(), block.queries * block.keys);
        for member in 0..heads.group() {
            let rows = heads.query_rows(skip(rows, member * heads.head_dim), block.row);
            let weights = skip(weights, member * scores);
            let multiply = Multiply {
                a: Side::transposed(weights, block.keys, heads.group() * scores),
                b: Side { next: heads.group() * heads.head_dim, ..rows },
                out: heads.key_rows(out, block.document),
                size: [block.keys, block.queries, heads.head_dim],
                count: heads.key_value,
                shared_by: 1,
                accumulate: true,
            };
            self.multiply(current, &multiply)?;
        }
        Ok(())
    }

    fn softmax_arguments(&self, block: &Block, attention: &Attention) -> TrainingSoftmaxArguments {
        let (heads, parts) = (self.heads(), &self.workspace.parts);
        let stride = heads.query * heads.head_dim;
        TrainingSoftmaxArguments {
            scores: at(parts.scores),
            gradients: at(parts.score_gradients),
            log_sums: at(skip(attention.log_sums, block.row * heads.query)),
            out: at(skip(attention.out, block.row * stride)),
            out_gradient: std::ptr::null(),
            scale: 1.0 / (heads.head_dim as f32).sqrt(),
            first: block.first as u32,
            queries: block.queries as u32,
            keys: block.keys as u32,
            heads: heads.query as u32,
            head_dim: heads.head_dim as u32,
        }
    }

    /// `Training::attention`
    pub(super) fn attend(&self, current: &Current, documents: &[Range<usize>], attention: &Attention) -> Result<()> {
        let scores = self.workspace.parts.scores;
        for block in documents.iter().flat_map(blocks) {
            self.multiply_by_keys(current, &block, attention.query, attention.key, scores)?;
            let arguments = self.softmax_arguments(&block, attention);
            // SAFETY: scores of this block, and its rows of the parts; they outlive the work.
            unsafe { self.launch(current, &self.kernels.softmax, [block.queries, self.heads().query, 1], &arguments) }?;
            self.weigh(current, &block, scores, attention.value, (attention.out, false))?;
        }
        Ok(())
    }

    /// `Training::add_attention_gradient`
    pub(super) fn attend_backward(
        &self,
        current: &Current,
        documents: &[Range<usize>],
        attention: &Attention,
        gradient: &AttentionGradient,
    ) -> Result<()> {
        let (scores, score_gradients) = (self.workspace.parts.scores, self.workspace.parts.score_gradients);
        let heads = self.heads();
        for block in documents.iter().flat_map(blocks) {
            self.multiply_by_keys(current, &block, attention.query, attention.key, scores)?;
            self.multiply_by_keys(current, &block, gradient.out, attention.value, score_gradients)?;
            let out_gradient = at(heads.query_rows(gradient.out, block.row).start);
            let arguments = TrainingSoftmaxArguments { out_gradient, ..self.softmax_arguments(&block, attention) };
            let grid = [block.queries, heads.query, 1];
            // SAFETY: as in `attend`.
            unsafe { self.launch(current, &self.kernels.softmax_gradient, grid, &arguments) }?;
            self.weigh(current, &block, score_gradients, attention.key, (gradient.query, true))?;
            self.add_weighed_queries(current, &block, score_gradients, attention.query, gradient.key)?;
            self.add_weighed_queries(current, &block, scores, gradient.out, gradient.value)?;
        }
        Ok(())
    }
}
