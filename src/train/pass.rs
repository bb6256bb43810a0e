//! The workspace of one batch's forward and backward pass, which `forward.rs` and `backward.rs` go through.
//!
//! # What is kept
//!
//! Of the forward pass each layer's input `[T, hidden_size]` is kept and its routes, which are small. The backward pass goes
//! through the layers from the last to the first: it computes a layer's activations again from its input, by the very
//! operations of the forward pass and therefore with the same bits, and takes the gradient of the layer's output to that of
//! its input. So a batch takes `layers + 1` rows of the residual stream for each token, and the activations of one layer,
//! unless `keep_activations` is asked for, which takes those of all and computes nothing twice:
//!
//! ```text
//! n = norm(x)   q, k, v = n W^T   q, k = rotate   a = attention   m = x + a Wo^T
//! p = norm(m)   logits = p G^T    y_e = ((gelu(p W1^T) * (p W3^T)) W2^T)          x' = m + sum of w_e y_e
//! ```
//!
//! In layer 0 the gradient ends at the gate: what lies below it has none that anybody needs. So of that layer `m` and `y` are all
//! that is ever needed; they have a place of their own, and the last layer's activations are still there when its turn
//! comes: neither of the two is computed again.

use std::ops::Range;
use std::sync::Arc;

use super::document::Packed;
use super::routing::{Choice, Routes};
use crate::backend::cpu::training::workspace_bytes;
use crate::backend::ops::{Backend, Cancel};
use crate::backend::training::{Rows, Training, TrainingLimits};
use crate::error::{Error, Result, Status};
use crate::model::Config;

/// What a pass is sized for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PassSize {
    /// Tokens of a batch.
    pub max_tokens: usize,
    /// Response tokens of a batch.
    pub max_targets: usize,
    /// Each layer's activations have a place of their own.
    pub keep_activations: bool,
}

impl PassSize {
    /// Of batches of which every token may be a response's.
    pub fn new(max_tokens: usize, keep_activations: bool) -> PassSize {
        PassSize { max_tokens, max_targets: max_tokens, keep_activations }
    }
}

/// A forward pass over a batch, and the backward pass that follows it.
pub struct RouterPass {
    pub(super) device: Box<dyn Training>,
    pub(super) layers: usize,
    pub(super) choice: Choice,
    pub(super) parts: Parts,
    /// Of the last batch, layer by layer.
    pub(super) routes: Vec<Routes>,
    /// `[tokens, experts]` and `[slots]` on the host.
    pub(super) logits: Vec<f32>,
    pub(super) products: Vec<f32>,
    /// `[R, 2]`
    pub(super) log_sums: Vec<f32>,
    size: PassSize,
}

/// The parts of the workspace, of full size; a batch uses the first rows of each.
pub(super) struct Parts {
    /// `[layers * experts, hidden_size]`
    pub gates: Rows,
    /// As `gates`.
    pub gate_gradients: Rows,
    /// `[layers + 1][T, hidden_size]`: the input of each layer, and of the final norm.
    pub inputs: Vec<Rows>,
    /// The activations of each layer, which layers share unless they are kept.
    pub of_layers: Vec<Activations>,
    /// `[T, hidden_size]`: what a norm gave.
    pub normed: Rows,
    /// `[T, experts]`: logits, or their gradients.
    pub logits: Rows,
    /// `[S, hidden_size]`: inputs of experts, or gradients.
    pub slot_inputs: Rows,
    /// `[S, intermediate_size]`: what the last projection is given, then its gradient.
    pub slot_hidden: Rows,
    /// `[S, 1]`
    pub products: Rows,
    /// `[T, hidden_size]`: the gradient of the residual stream where the backward pass is.
    pub gradient: Rows,
    /// `[T, hidden_size]`: of what a norm gave.
    pub normed_gradient: Rows,
    /// As `qkv`.
    pub qkv_gradients: [Rows; 3],
    /// `[T, query_size]`
    pub attended_gradient: Rows,
    /// `[R, hidden_size]`: what the head is given, and the gradients of its targets' log-probabilities.
    pub head_inputs: Rows,
    pub head_gradient: Rows,
    /// `[R, 2]`
    pub head_sums: Rows,
}

/// Memory of training, beside that of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrainingBytes {
    /// The workspace of a batch.
    pub workspace: u64,
    /// Gates, reference, gradients and moments, in host memory.
    pub optimiser: u64,
    /// A checkpoint, without its header.
    pub checkpoint: u64,
}

/// What training the routers of a model with batches of this size takes on so many threads of the processor; none of them for a
/// GPU, where lists and scratch of its kernels come on top. With `soft`, all experts see every token. Fails as [`RouterPass::new`], but
/// asks for no memory.
pub fn training_bytes(config: &Config, size: PassSize, soft: bool, threads: Option<usize>) -> Result<TrainingBytes> {
    let choice = Choice { experts: config.num_local_experts, top_k: config.num_experts_per_tok, soft };
    check_trainable(&choice)?;
    let (parts, numbers) = Parts::new(config, &choice, size)?;
    let gates = (parts.gates.count() * size_of::<f32>()) as u64;
    let limits = TrainingLimits { numbers, max_tokens: size.max_tokens, max_targets: size.max_targets };
    let workspace = match threads {
        Some(threads) => workspace_bytes(config, &limits, threads),
        None => numbers * size_of::<f32>(),
    };
    Ok(TrainingBytes { workspace: workspace as u64, optimiser: 5 * gates, checkpoint: 4 * gates })
}

/// What the backward pass of a layer needs of its forward pass.
#[derive(Clone, Copy)]
pub(super) struct Activations {
    /// `[T, hidden_size]`: between attention and experts.
    pub middle: Rows,
    /// `[T, query_size]`, `[T, key_value_size]` twice.
    pub qkv: [Rows; 3],
    /// `[T, query_size]`
    pub attended: Rows,
    /// `[T, heads]`
    pub log_sums: Rows,
    /// `[S, intermediate_size]` each; then their gradients.
    pub slot_gates: Rows,
    pub slot_ups: Rows,
    /// `[S, hidden_size]`: outputs of experts, then their gradients.
    pub slot_outputs: Rows,
}

impl Activations {
    /// A place for those of one layer.
    fn new(plan: &mut Plan, config: &Config, tokens: usize, slots: usize) -> Result<Activations> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (query, key_value) = (config.query_size(), config.key_value_size());
        Ok(Activations {
            middle: plan.rows(tokens, hidden)?,
            qkv: [plan.rows(tokens, query)?, plan.rows(tokens, key_value)?, plan.rows(tokens, key_value)?],
            attended: plan.rows(tokens, query)?,
            log_sums: plan.rows(tokens, config.num_attention_heads)?,
            slot_gates: plan.rows(slots, inner)?,
            slot_ups: plan.rows(slots, inner)?,
            slot_outputs: plan.rows(slots, hidden)?,
        })
    }

    /// Those of all layers: in one place but for the part of layer 0 that its gradient needs, or each in its own.
    fn of_layers(plan: &mut Plan, config: &Config, size: PassSize, slots: usize) -> Result<Vec<Activations>> {
        let (layers, tokens) = (config.num_hidden_layers, size.max_tokens);
        if size.keep_activations {
            return (0..layers).map(|_| Activations::new(plan, config, tokens, slots)).collect();
        }
        let shared = Activations::new(plan, config, tokens, slots)?;
        let mut of_layers = vec![shared; layers];
        if layers > 1 {
            let (middle, slot_outputs) =
                (plan.rows(tokens, config.hidden_size)?, plan.rows(slots, config.hidden_size)?);
            of_layers[0] = Activations { middle, slot_outputs, ..shared };
        }
        Ok(of_layers)
    }
}

/// Hands out parts of a workspace one after the other.
#[derive(Default)]
struct Plan(usize);

/// Parts begin at multiples of this many numbers: a cache line.
const ALIGNED: usize = 16;

impl Plan {
    fn rows(&mut self, rows: usize, columns: usize) -> Result<Rows> {
        let too_large = || Error::out_of_memory("the workspace of training", usize::MAX);
        let count = rows.checked_mul(columns).filter(|count| *count <= usize::MAX / 64).ok_or_else(too_large)?;
        let start = self.0;
        let end = start.checked_add(count).and_then(|end| end.checked_next_multiple_of(ALIGNED));
        self.0 = end.ok_or_else(too_large)?;
        Ok(Rows { start, rows, columns })
    }
}

impl Parts {
    /// The parts and the numbers of all together.
    fn new(config: &Config, choice: &Choice, size: PassSize) -> Result<(Parts, usize)> {
        let (tokens, targets) = (size.max_tokens, size.max_targets);
        let slots = tokens.saturating_mul(choice.slots());
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (query, key_value) = (config.query_size(), config.key_value_size());
        let gates = config.num_hidden_layers * choice.experts;
        let mut plan = Plan::default();
        let parts = Parts {
            gates: plan.rows(gates, hidden)?,
            gate_gradients: plan.rows(gates, hidden)?,
            inputs: (0..=config.num_hidden_layers).map(|_| plan.rows(tokens, hidden)).collect::<Result<_>>()?,
            of_layers: Activations::of_layers(&mut plan, config, size, slots)?,
            normed: plan.rows(tokens, hidden)?,
            logits: plan.rows(tokens, choice.experts)?,
            slot_inputs: plan.rows(slots, hidden)?,
            slot_hidden: plan.rows(slots, inner)?,
            products: plan.rows(slots, 1)?,
            gradient: plan.rows(tokens, hidden)?,
            normed_gradient: plan.rows(tokens, hidden)?,
            qkv_gradients: [plan.rows(tokens, query)?, plan.rows(tokens, key_value)?, plan.rows(tokens, key_value)?],
            attended_gradient: plan.rows(tokens, query)?,
            head_inputs: plan.rows(targets, hidden)?,
            head_gradient: plan.rows(targets, hidden)?,
            head_sums: plan.rows(targets, 2)?,
        };
        Ok((parts, plan.0))
    }

    /// The gate of a layer, or its gradient.
    pub fn of_layer(gates: Rows, layer: usize, experts: usize) -> Rows {
        gates.part(layer * experts..(layer + 1) * experts)
    }
}

impl RouterPass {
    /// Allocates everything a batch within `size` needs. With `soft`, all experts see every token. Fails with
    /// `InvalidArgument` where the model has no router that could learn, and with `OutOfMemory`.
    pub fn new(
        backend: &dyn Backend,
        config: &Config,
        size: PassSize,
        soft: bool,
        cancel: &Arc<Cancel>,
    ) -> Result<RouterPass> {
        let choice = Choice { experts: config.num_local_experts, top_k: config.num_experts_per_tok, soft };
        check_trainable(&choice)?;
        let (parts, numbers) = Parts::new(config, &choice, size)?;
        let limits = TrainingLimits { numbers, max_tokens: size.max_tokens, max_targets: size.max_targets };
        let mut pass = RouterPass {
            device: backend.new_training(limits, cancel)?,
            layers: config.num_hidden_layers,
            choice,
            parts,
            routes: Vec::new(),
            logits: Vec::new(),
            products: Vec::new(),
            log_sums: Vec::new(),
            size,
        };
        let gates = pass.read_model_gates()?;
        pass.set_gates(&gates)?;
        Ok(pass)
    }

    /// Numbers in all gates.
    pub fn gate_count(&self) -> usize {
        self.parts.gates.count()
    }

    /// The gates the model was loaded with, `[layers, experts, hidden_size]`.
    pub fn read_model_gates(&self) -> Result<Vec<f32>> {
        let mut gates = crate::memory::try_vec("gates", self.gate_count(), 0f32)?;
        self.device.read_gates(&mut gates)?;
        Ok(gates)
    }

    /// The gates of the batches that follow.
    pub fn set_gates(&mut self, gates: &[f32]) -> Result<()> {
        self.device.write(gates, self.parts.gates)
    }

    /// Copies the gradients of all batches since `clear_gradients` to `out`, as gates are laid out.
    pub fn read_gradients(&mut self, out: &mut [f32]) -> Result<()> {
        self.device.read(self.parts.gate_gradients, out)
    }

    /// Forgets the gradients.
    pub fn clear_gradients(&mut self) -> Result<()> {
        self.device.clear(self.parts.gate_gradients)
    }

    /// The routes of the last batch, layer by layer.
    pub fn routes(&self) -> &[Routes] {
        &self.routes
    }

    /// How the model routes.
    pub fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Whether a layer's activations are still there in the backward pass.
    pub(super) fn has_activations(&self, layer: usize) -> bool {
        self.size.keep_activations || layer == 0 || layer + 1 == self.layers
    }

    /// Fails with `Internal` where a batch is larger than the pass.
    pub(super) fn check(&self, batch: &Packed) -> Result<()> {
        if batch.tokens.len() <= self.size.max_tokens && batch.targets.len() <= self.size.max_targets {
            return Ok(());
        }
        Err(Error::new(Status::Internal, "a batch is larger than the training pass it was given to"))
    }

    /// The log-probabilities of the targets of the last batch, by the ranges that are asked for.
    pub fn log_probabilities(&self, range: Range<usize>) -> impl ExactSizeIterator<Item = f32> {
        self.log_sums.as_chunks::<2>().0[range].iter().map(|[_, log_probability]| *log_probability)
    }
}

/// Makes `numbers` that many zeros.
pub(super) fn host_numbers(numbers: &mut Vec<f32>, count: usize) -> Result<()> {
    numbers.clear();
    let too_many = |_| Error::out_of_memory("numbers of a training pass", count.saturating_mul(size_of::<f32>()));
    numbers.try_reserve(count).map_err(too_many)?;
    numbers.resize(count, 0.0);
    Ok(())
}

/// Fails with `InvalidArgument` where nothing could be learned.
fn check_trainable(choice: &Choice) -> Result<()> {
    let wrong = |key: &str, text: String| Err(Error::new(Status::InvalidArgument, text).at_key(key));
    if choice.experts < 2 {
        return wrong("num_local_experts", "the model has one expert, so there is no router to train".into());
    }
    if choice.top_k == 1 && !choice.soft {
        let text = "the model sends each token to one expert (num_experts_per_tok is 1), whose weight is then always 1: \
                    the text's loss has no gradient for the router. Train with soft routing, or with 2 experts a token";
        return wrong("num_experts_per_tok", text.into());
    }
    Ok(())
}
