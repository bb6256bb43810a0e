//! What a forward pass works in: its buffers on the device, and the host's ends of what goes there and comes back.

use std::sync::Arc;

use super::arguments::{ActivationArguments, BlockArguments};
use super::batch::BatchLayout;
use super::device::Device;
use super::driver::Address;
use super::kernels::WIDTHS;
use super::logits::{parts_of, result_bytes};
use super::memory::{Arena, PinnedBlock};
use crate::backend::logits::MAX_CANDIDATES;
use crate::backend::ops::PassLimits;
use crate::error::{Error, Result, Status};
use crate::model::Config;
use crate::quant::BLOCK;

/// Positions that attention goes through at a time, each time with a state of its own.
pub const SPAN: usize = 256;

/// Tokens up to which attention may be split over the context.
pub const SPLIT_TOKENS: usize = 16;

/// Activations have rows of a multiple of so many columns: the largest group of weights.
const PADDING: usize = 128;

/// Most tiles of tokens in one launch, which is most blocks in one but the first dimension of a grid.
const MAX_TILES: usize = 65_535;

const WHAT: &str = "the workspace of a forward pass";

/// Columns of a row of activations, with what fills them up.
pub fn stride_of(columns: usize) -> usize {
    columns.next_multiple_of(PADDING)
}

/// The address as kernels take it.
pub fn at<T>(address: Address) -> *mut T {
    address as *mut T
}

/// Rows that meet weights, in f32, in int8 and in bf16 or f16; zeros past their columns.
pub struct ActivationBuffer {
    /// `[rows, stride]` f32
    pub numbers: Address,
    /// `[rows, stride / 4]` u32
    pub integers: Address,
    /// `[rows, stride / 32]` BlockArguments
    pub blocks: Address,
    /// `[rows, stride]` u16
    pub halves: Address,
    /// Columns and what fills them up.
    pub stride: usize,
}

impl ActivationBuffer {
    /// The same without its first rows.
    pub fn skip_rows(&self, rows: usize) -> ActivationBuffer {
        let columns = (rows * self.stride) as Address;
        ActivationBuffer {
            numbers: self.numbers + columns * size_of::<f32>() as Address,
            integers: self.integers + columns,
            blocks: self.blocks + columns / BLOCK as Address * size_of::<BlockArguments>() as Address,
            halves: self.halves + columns * size_of::<u16>() as Address,
            stride: self.stride,
        }
    }

    /// For kernels: the row of each token from `index` on, or token i's row i where that is 0.
    pub fn arguments(&self, index: Address) -> ActivationArguments {
        ActivationArguments {
            numbers: at(self.numbers),
            integers: at(self.integers),
            blocks: at(self.blocks),
            halves: at(self.halves),
            index: at(index),
            stride: self.stride as u32,
        }
    }
}

/// Addresses of the buffers on the device.
pub struct Parts {
    /// As `BatchLayout` has it.
    pub batch: Address,
    /// `[max_tokens, hidden_size]` f32: the residual stream.
    pub x: Address,
    /// `[max(max_tokens, logit_rows), hidden_size]`: the normed input of a stage.
    pub normed: ActivationBuffer,
    /// `[max_tokens, query_size]` f32
    pub query: Address,
    /// `[max_tokens, key_value_size]` f32 each
    pub key: Address,
    pub value: Address,
    /// `[max_tokens, query_size]`: attention of all heads, before the output projection.
    pub attended: ActivationBuffer,
    /// `[min(max_tokens, SPLIT_TOKENS), heads, spans, head_dim + 2]` f32
    pub partial: Address,
    /// `[layers, tokens, top_k]` u32 of the batch's tokens, and behind it as many f32.
    pub routes: Address,
    /// `[max_tokens, top_k]` f64: of the current layer, as the rest.
    pub exact_weights: Address,
    /// `[max_tokens, top_k]` u32
    pub slots: Address,
    /// `[max_tokens * top_k]` u32
    pub slot_tokens: Address,
    /// `[experts + 1]` u32
    pub starts: Address,
    /// `[slots, intermediate_size]`
    pub activated: ActivationBuffer,
    /// `[slots, hidden_size]` f32
    pub projected: Address,
    /// `[logit_rows, vocab_size]` f32
    pub logits: Address,
    /// `[max_tokens]` f32: of the tokens with targets.
    pub log_probabilities: Address,
    /// `[max_sequences, parts of the vocabulary, CANDIDATES]` u64
    pub candidates_of_parts: Address,
    /// As `CandidateArguments::results`, of max_sequences.
    pub candidates: Address,
}

/// Products of sizes that a host may have chosen.
fn product(factors: &[usize]) -> Result<usize> {
    let product = factors.iter().try_fold(1usize, |product, factor| product.checked_mul(*factor));
    product.filter(|bytes| *bytes <= isize::MAX as usize).ok_or_else(|| Error::out_of_memory(WHAT, usize::MAX))
}

/// Spans that a context takes.
pub fn spans_of(positions: usize) -> usize {
    positions.div_ceil(SPAN)
}

impl Parts {
    /// Asks `take` for each part in turn, by its size in bytes.
    fn lay_out(
        config: &Config,
        limits: &PassLimits,
        layout: &BatchLayout,
        take: &mut dyn FnMut(usize) -> Result<Address>,
    ) -> Result<Parts> {
        let (tokens, top_k) = (limits.max_tokens, config.num_experts_per_tok);
        let slots = product(&[tokens, top_k])?;
        let (f32s, f64s) = (size_of::<f32>(), size_of::<f64>());
        let activations = |rows: usize, columns: usize, take: &mut dyn FnMut(usize) -> Result<Address>| {
            let stride = stride_of(columns);
            Ok::<_, Error>(ActivationBuffer {
                numbers: take(product(&[rows, stride, f32s])?)?,
                integers: take(product(&[rows, stride])?)?,
                blocks: take(product(&[rows, stride / BLOCK, size_of::<BlockArguments>()])?)?,
                halves: take(product(&[rows, stride, size_of::<u16>()])?)?,
                stride,
            })
        };
        let state = config.head_dim + 2;
        let partial = [tokens.min(SPLIT_TOKENS), config.num_attention_heads, spans_of(limits.max_context), state, f32s];
        Ok(Parts {
            batch: take(layout.bytes())?,
            x: take(product(&[tokens, config.hidden_size, f32s])?)?,
            normed: activations(tokens.max(limits.logit_rows), config.hidden_size, take)?,
            query: take(product(&[tokens, config.query_size(), f32s])?)?,
            key: take(product(&[tokens, config.key_value_size(), f32s])?)?,
            value: take(product(&[tokens, config.key_value_size(), f32s])?)?,
            attended: activations(tokens, config.query_size(), take)?,
            partial: take(product(&partial)?)?,
            routes: take(route_bytes(config, tokens)?)?,
            exact_weights: take(product(&[slots, f64s])?)?,
            slots: take(product(&[slots, f32s])?)?,
            slot_tokens: take(product(&[slots, f32s])?)?,
            starts: take(product(&[config.num_local_experts + 1, f32s])?)?,
            activated: activations(slots, config.intermediate_size, take)?,
            projected: take(product(&[slots, config.hidden_size, f32s])?)?,
            logits: take(product(&[limits.logit_rows, config.vocab_size, f32s])?)?,
            log_probabilities: take(product(&[tokens, f32s])?)?,
            candidates_of_parts: take(product(&[
                limits.max_sequences,
                parts_of(config.vocab_size),
                MAX_CANDIDATES,
                size_of::<u64>(),
            ])?)?,
            candidates: take(product(&[limits.max_sequences, result_bytes(config.vocab_size)])?)?,
        })
    }
}

/// Bytes of the choices and weights of every layer for so many tokens.
fn route_bytes(config: &Config, tokens: usize) -> Result<usize> {
    product(&[config.num_hidden_layers, tokens, config.num_experts_per_tok, size_of::<u32>() + size_of::<f32>()])
}

/// Where the results are in the host's end, in bytes: candidates first.
struct ResultLayout {
    /// Of the candidates of one sequence.
    candidates: usize,
    log_probabilities: usize,
    routes: usize,
    bytes: usize,
}

impl ResultLayout {
    fn new(config: &Config, limits: &PassLimits) -> Result<ResultLayout> {
        let sum = |a: usize, b: usize| a.checked_add(b).ok_or_else(|| Error::out_of_memory(WHAT, usize::MAX));
        let candidates = result_bytes(config.vocab_size);
        let log_probabilities = product(&[limits.max_sequences, candidates])?;
        let routes = sum(log_probabilities, product(&[limits.max_tokens, size_of::<f32>()])?)?;
        Ok(ResultLayout {
            candidates,
            log_probabilities,
            routes,
            bytes: sum(routes, route_bytes(config, limits.max_tokens)?)?,
        })
    }
}

/// Bytes on the device of a workspace for batches of these limits.
fn device_bytes(config: &Config, limits: &PassLimits, layout: &BatchLayout) -> Result<usize> {
    let mut bytes = 0usize;
    Parts::lay_out(config, limits, layout, &mut |part| {
        let padded = part.checked_next_multiple_of(Arena::padded(1)).and_then(|part| bytes.checked_add(part));
        bytes = padded.ok_or_else(|| Error::out_of_memory(WHAT, usize::MAX))?;
        Ok(0)
    })?;
    Ok(bytes)
}

/// Bytes of a workspace for batches of these limits, the host's ends of it included.
pub fn planned_bytes(config: &Config, limits: PassLimits) -> Result<usize> {
    check(config, &limits)?;
    let layout = BatchLayout::new(config, &limits)?;
    let host = layout.bytes() + ResultLayout::new(config, &limits)?.bytes;
    Ok(device_bytes(config, &limits, &layout)? + host)
}

/// Fails with `InvalidArgument` where the grids of kernels have no room for so many tokens or sequences.
fn check(config: &Config, limits: &PassLimits) -> Result<()> {
    let most = MAX_TILES * WIDTHS[WIDTHS.len() - 1] / config.num_experts_per_tok;
    let rows = limits.max_tokens.max(limits.logit_rows);
    if rows > most {
        let text = format!("a batch of up to {rows} tokens is wanted, the device's kernels take {most} at once");
        return Err(Error::new(Status::InvalidArgument, text).at_key("max_tokens"));
    }
    if limits.max_sequences > MAX_TILES {
        let sequences = limits.max_sequences;
        let text = format!("a batch of up to {sequences} sequences is wanted, the device's kernels take {MAX_TILES}");
        return Err(Error::new(Status::InvalidArgument, text).at_key("max_sequences"));
    }
    Ok(())
}

/// The buffers of one pass.
pub struct Workspace {
    pub layout: BatchLayout,
    pub parts: Parts,
    /// A batch on its way to the device.
    pub sent: PinnedBlock,
    /// Results on their way back.
    results: PinnedBlock,
    result_layout: ResultLayout,
    arena: Arena,
}

impl Workspace {
    /// For batches of these limits. Fails with `InvalidArgument`, `OutOfMemory` and `DeviceOutOfMemory`.
    pub fn new(device: &Arc<Device>, config: &Config, limits: &PassLimits) -> Result<Workspace> {
        check(config, limits)?;
        let layout = BatchLayout::new(config, limits)?;
        let mut arena = Arena::zeroed(device, WHAT, device_bytes(config, limits, &layout)?)?;
        let parts = Parts::lay_out(config, limits, &layout, &mut |bytes| arena.take(bytes))?;
        let result_layout = ResultLayout::new(config, limits)?;
        Ok(Workspace {
            sent: PinnedBlock::new(device, WHAT, layout.bytes())?,
            results: PinnedBlock::new(device, WHAT, result_layout.bytes)?,
            result_layout,
            parts,
            layout,
            arena,
        })
    }

    /// Bytes it takes, on the device and of the host.
    pub fn bytes(&self) -> usize {
        self.arena.bytes() + self.sent.bytes() + self.results.bytes()
    }

    /// What came back of the last batch.
    pub fn results(&self) -> Results<'_> {
        Results { bytes: self.results.as_slice(), layout: &self.result_layout }
    }

    /// The host's end of results, and where in it candidates, log-probabilities and routes come.
    pub fn results_mut(&mut self) -> (&mut PinnedBlock, [usize; 3]) {
        let ResultLayout { log_probabilities, routes, .. } = self.result_layout;
        (&mut self.results, [0, log_probabilities, routes])
    }
}

/// What came back from the device.
pub struct Results<'a> {
    bytes: &'a [u8],
    layout: &'a ResultLayout,
}

impl<'a> Results<'a> {
    /// Of the sequence that has this row of logits, as `CandidateArguments::results`.
    pub fn candidates(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.layout.candidates..(row + 1) * self.layout.candidates]
    }

    /// `[max_tokens]`: of the tokens with targets.
    pub fn log_probabilities(&self) -> &'a [f32] {
        crate::memory::view(&self.bytes[self.layout.log_probabilities..self.layout.routes])
    }

    /// `[layers * tokens * top_k]` each, `choices` of them: experts and weights.
    pub fn routes(&self, choices: usize) -> (&'a [u32], &'a [f32]) {
        let bytes = &self.bytes[self.layout.routes..self.layout.bytes];
        let (experts, weights) = (&bytes[..4 * choices], &bytes[4 * choices..8 * choices]);
        (crate::memory::view(experts), crate::memory::view(weights))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config::from_json(br#"{"model_type":"gemmoe","num_local_experts":4}"#).unwrap()
    }

    #[test]
    fn parts_take_what_is_planned_and_none_overlaps_another() {
        let limits = PassLimits { max_tokens: 5, max_sequences: 2, max_context: 700, logit_rows: 9 };
        let layout = BatchLayout::new(&config(), &limits).unwrap();
        let (mut taken, mut end) = (Vec::new(), 0);
        let parts = Parts::lay_out(&config(), &limits, &layout, &mut |bytes| {
            taken.push(bytes);
            let address = end as Address;
            end += Arena::padded(bytes);
            Ok(address)
        })
        .unwrap();
        assert_eq!(device_bytes(&config(), &limits, &layout).unwrap(), end);
        assert_eq!(taken.iter().map(|bytes| Arena::padded(*bytes)).sum::<usize>(), end);
        // Three spans of 258 numbers for each of 16 heads and five tokens.
        assert_eq!(parts.routes - parts.partial, Arena::padded(5 * 16 * 3 * 258 * 4) as Address);
        assert_eq!((parts.normed.stride, parts.activated.stride), (3072, 24_576));
        assert_eq!(parts.normed.halves - parts.normed.blocks, Arena::padded(9 * 3072 / 32 * 8) as Address);
        assert_eq!(parts.query - parts.normed.halves, Arena::padded(9 * 3072 * 2) as Address);
    }

    #[test]
    fn sizes_past_all_memory_and_past_a_grid_are_refused() {
        let limits = PassLimits { max_tokens: 1, max_sequences: 1, max_context: usize::MAX, logit_rows: 1 };
        assert_eq!(planned_bytes(&config(), limits).unwrap_err().status(), Status::OutOfMemory);
        let limits = PassLimits { max_tokens: 1 << 20, max_context: 1 << 20, ..limits };
        assert_eq!(planned_bytes(&config(), limits).unwrap_err().key(), Some("max_tokens"));
        let limits = PassLimits { max_tokens: 70_000, max_sequences: 70_000, max_context: 16, logit_rows: 1 };
        let error = planned_bytes(&config(), limits).unwrap_err();
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("max_sequences")));
    }
}
