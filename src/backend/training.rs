//! The operations a backend provides to train routers: the forward pass that keeps what its gradient needs, and the gradient of
//! each of its steps with respect to the step's input. No weight but the gates has a gradient.
//!
//! The pass itself is written once, in `train/`; a backend has the operations, each named after what it computes. All
//! activations and gradients are f32 and lie in one workspace; the pass says by [`Rows`] which part of it an operation reads and
//! which it writes. Parts that one call writes overlap no other part of that call. Products add to what is there, so
//! that residuals and sums of gradients need no operation of their own.
//!
//! Weights stay as the model holds them. Here they are numbers: what a product computes with is the f32 that a
//! format's number stands for, never a rounded activation, so that what is differentiated is the function itself.
//!
//! A result depends neither on the number of threads nor on what else is in the batch, with one exception: gates' gradients
//! are sums over all tokens, in their order.

use std::ops::Range;

use crate::error::Result;
use crate::memory::try_vec;

/// A part of the workspace: `[rows, columns]`, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// Where it begins, in numbers.
    pub start: usize,
    /// Its rows.
    pub rows: usize,
    /// Its columns.
    pub columns: usize,
}

impl Rows {
    /// Numbers in it.
    pub fn count(&self) -> usize {
        self.rows * self.columns
    }

    /// Its place in the workspace.
    pub fn range(&self) -> Range<usize> {
        self.start..self.start + self.count()
    }

    /// Its first `rows` rows, of as many as it has.
    pub fn first(&self, rows: usize) -> Rows {
        assert!(rows <= self.rows);
        Rows { rows, ..*self }
    }

    /// Its rows from `range.start` up to `range.end`.
    pub fn part(&self, range: Range<usize>) -> Rows {
        assert!(range.start <= range.end && range.end <= self.rows);
        Rows { start: self.start + range.start * self.columns, rows: range.len(), columns: self.columns }
    }
}

/// What a training workspace is sized for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainingLimits {
    /// Numbers in the parts the pass uses.
    pub numbers: usize,
    /// Tokens of a batch, and of its longest document.
    pub max_tokens: usize,
    /// Tokens of a batch whose log-probabilities are computed.
    pub max_targets: usize,
}

/// A norm of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// Before the attention of a layer.
    Input(usize),
    /// Before the router and the experts of a layer.
    PostAttention(usize),
    /// Before the head.
    Final,
}

/// A matrix of a layer's attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projection {
    /// `[query_size, hidden_size]`
    Query,
    /// `[key_value_size, hidden_size]`
    Key,
    /// `[key_value_size, hidden_size]`
    Value,
    /// `[hidden_size, query_size]`
    Output,
}

/// A matrix of each expert of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertProjection {
    /// `[intermediate_size, hidden_size]`, the branch that gets the GeLU.
    Gate,
    /// `[intermediate_size, hidden_size]`
    Up,
    /// `[hidden_size, intermediate_size]`
    Down,
}

/// In a token's list of slots: none.
pub const NO_SLOT: u32 = u32::MAX;

/// The (token, choice) pairs of a layer, numbered expert by expert, an expert's tokens in rising order.
#[derive(Clone, Debug, Default)]
pub struct Slots {
    /// `[experts + 1]`: expert e has the slots `starts[e]..starts[e + 1]`.
    pub starts: Vec<u32>,
    /// `[slots]`: each slot's token.
    pub tokens: Vec<u32>,
    /// `[slots]`: the weight its token gives it.
    pub weights: Vec<f32>,
    /// Choices a token has.
    pub choices: usize,
    /// `[tokens, choices]`: the slots of each token, highest weight first; NO_SLOT where it has fewer.
    pub of_tokens: Vec<u32>,
}

impl Slots {
    /// The slots of an expert.
    pub fn of_expert(&self, expert: usize) -> Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }

    /// Slots there are.
    pub fn count(&self) -> usize {
        self.tokens.len()
    }
}

/// A workspace of one device for training the routers of one model. T are a batch's tokens, S the slots of a layer, R the
/// tokens whose log-probabilities are wanted. Every operation fails with `Cancelled` where that was asked for, and leaves what it
/// was to write undefined.
pub trait Training: Send {
    /// Copies the model's own gates to `out`, `[layers, experts, hidden_size]`.
    fn read_gates(&self, out: &mut [f32]) -> Result<()>;

    /// Copies numbers of the host to a part of the workspace.
    fn write(&mut self, numbers: &[f32], to: Rows) -> Result<()>;

    /// Copies a part of the workspace to the host.
    fn read(&mut self, from: Rows, numbers: &mut [f32]) -> Result<()>;

    /// `out = 0`
    fn clear(&mut self, out: Rows) -> Result<()>;

    /// `out = x`
    fn copy(&mut self, x: Rows, out: Rows) -> Result<()>;

    /// `out[t] = E[tokens[t]] * s`; out: `[T, hidden_size]`.
    fn embed(&mut self, tokens: &[u32], out: Rows) -> Result<()>;

    /// `out = x / sqrt(mean(x^2) + eps) * (1 + w)`; both `[T, hidden_size]`.
    fn norm(&mut self, norm: Norm, x: Rows, out: Rows) -> Result<()>;

    /// Adds to `out` the gradient of `x` where that of `norm(x)` is `gradient`; all `[T, hidden_size]`.
    fn add_norm_gradient(&mut self, norm: Norm, x: Rows, gradient: Rows, out: Rows) -> Result<()>;

    /// `out += x W^T`; x: `[T, inputs]`, out: `[T, outputs]`.
    fn add_product(&mut self, layer: usize, projection: Projection, x: Rows, out: Rows) -> Result<()>;

    /// `out += gradient W`, the gradient of the product's input; gradient: `[T, outputs]`, out: `[T, inputs]`.
    fn add_product_gradient(&mut self, layer: usize, projection: Projection, gradient: Rows, out: Rows) -> Result<()>;

    /// Rotates each head of `heads: [T, heads * head_dim]` by the angles of its token's position, or back: the rotation's
    /// inverse is its transpose, which is the way of the gradient.
    fn rotate(&mut self, positions: &[u32], back: bool, heads: Rows) -> Result<()>;

    /// Causal attention within each document, a range of the T tokens: `out = softmax(q K^T / sqrt(head_dim)) V`.
    /// query, out: `[T, query_size]`; key, value: `[T, key_value_size]`; log_sums: `[T, heads]`, the logarithm of the sum of all
    /// e^score.
    fn attention(&mut self, documents: &[Range<usize>], qkv: [Rows; 3], out: Rows, log_sums: Rows) -> Result<()>;

    /// Adds the gradients of query, key and value where that of `out` is `gradient`. Probabilities are computed again
    /// from `log_sums`.
    fn add_attention_gradient(
        &mut self,
        documents: &[Range<usize>],
        qkv: [Rows; 3],
        out: Rows,
        log_sums: Rows,
        gradient: Rows,
        qkv_gradients: [Rows; 3],
    ) -> Result<()>;

    /// `out += x gate^T`; x: `[T, hidden_size]`, gate: `[experts, hidden_size]`, out: `[T, experts]`.
    fn add_gate_product(&mut self, x: Rows, gate: Rows, out: Rows) -> Result<()>;

    /// `out += gradient gate`, the gradient of the router's input; gradient: `[T, experts]`, out: `[T, hidden_size]`.
    fn add_gate_input_gradient(&mut self, gradient: Rows, gate: Rows, out: Rows) -> Result<()>;

    /// `out += gradient^T x`, the gradient of the gate; gradient: `[T, experts]`, x: `[T, hidden_size]`, out: `[experts,
    /// hidden_size]`.
    fn add_gate_gradient(&mut self, gradient: Rows, x: Rows, out: Rows) -> Result<()>;

    /// `out[s] = x[token of s]`, times the slot's weight where `weighted`; x: `[T, columns]`, out: `[S, columns]`.
    fn gather(&mut self, slots: &Slots, weighted: bool, x: Rows, out: Rows) -> Result<()>;

    /// `out[t] += ` the sum of `y[s]` over the slots of t, times their weights where `weighted`; the reverse of `gather`.
    fn add_combined(&mut self, slots: &Slots, weighted: bool, y: Rows, out: Rows) -> Result<()>;

    /// `out[s] = <a[s], b[s]>`; a, b: `[S, columns]`, out: `[S, 1]`.
    fn row_products(&mut self, a: Rows, b: Rows, out: Rows) -> Result<()>;

    /// `add_product` of each expert's matrix and slots; x: `[S, inputs]`, out: `[S, outputs]`.
    fn add_expert_product(
        &mut self,
        layer: usize,
        projection: ExpertProjection,
        slots: &Slots,
        x: Rows,
        out: Rows,
    ) -> Result<()>;

    /// `add_product_gradient` of each expert's matrix and slots; gradient: `[S, outputs]`, out: `[S, inputs]`.
    fn add_expert_product_gradient(
        &mut self,
        layer: usize,
        projection: ExpertProjection,
        slots: &Slots,
        gradient: Rows,
        out: Rows,
    ) -> Result<()>;

    /// `out = gelu(gate) * up`; all `[S, intermediate_size]`.
    fn geglu(&mut self, gate: Rows, up: Rows, out: Rows) -> Result<()>;

    /// Turns `gate` and `up` into their gradients where that of `geglu` is `gradient`; all `[S, intermediate_size]`.
    fn geglu_gradient(&mut self, gradient: Rows, gate: Rows, up: Rows) -> Result<()>;

    /// Of each row of `x: [R, hidden_size]`, through the head: `out[r] = (log of the sum of all e^logit, log-probability of
    /// targets[r])`; out: `[R, 2]`. Never holds more logits than those of a few thousand tokens of the vocabulary.
    fn log_probabilities(&mut self, targets: &[u32], x: Rows, out: Rows) -> Result<()>;

    /// Adds to `out` the gradient of `x` where that of row r's log-probability is `gradients[r]`; `log_sums` is what
    /// `log_probabilities` wrote; out: `[R, hidden_size]`.
    fn add_log_probability_gradient(
        &mut self,
        targets: &[u32],
        x: Rows,
        log_sums: Rows,
        gradients: &[f32],
        out: Rows,
    ) -> Result<()>;

    /// `log_probabilities`, and as `gradient: [R, hidden_size]` those of `x` where each row's log-probability has 1. A backend that
    /// can do both in one pass over the vocabulary computes no logit twice.
    fn log_probabilities_and_gradients(&mut self, targets: &[u32], x: Rows, out: Rows, gradient: Rows) -> Result<()> {
        self.log_probabilities(targets, x, out)?;
        self.clear(gradient)?;
        self.add_log_probability_gradient(targets, x, out, &try_vec("ones", x.rows, 1f32)?, gradient)
    }
}
