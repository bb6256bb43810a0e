//! The stages of a forward pass on the CPU. Each is a list of jobs, split into items for the pool; no item's result
//! depends on how many there are, or on where the work was left between two of them.

use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, ready};

use super::Shared;
use super::attention_split::AttentionSplit;
use super::experts::{ExpertBuffers, ExpertJobs};
use super::jobs::Jobs;
use super::kernels::activations::{Activations, Place, Precision, TILE, tiles};
use super::kernels::attention::QueryBlock;
use super::kernels::math::{log_softmax_at, rms_norm, rotate};
use super::kernels::matmul::{Output, TokenRows};
use super::routing::Routing;
use crate::backend::kv::{KvBlock, KvDtype, KvGeometry, KvHalf, PAGE_TOKENS, shared_page};
use crate::backend::logits::PassLogits;
use crate::backend::observer::{Input, Observer};
use crate::backend::ops::{Batch, Limit, NO_TARGET, Pass, PassLimits, Routes};
use crate::error::{Error, Result};
use crate::memory::{Buffer, try_with_capacity};
use crate::model::Config;
use crate::model::weights::Matrix;
use crate::quant::{PANEL_ROWS, Shape};

/// Weights of one item, where few tokens share them: about 100 microseconds of one core, which waits for memory, so that
/// threads balance, a cancel is quick, and a time budget is kept.
const ITEM_BYTES: usize = 2 << 20;
/// Multiply-adds of one item where several tokens share the weights: as long.
const ITEM_MULTIPLY_ADDS: usize = 1 << 23;
/// Multiply-adds of one item at the most, where two panels of weights by all tokens would be more: fewer, and weights would be
/// read too often. A third of a millisecond.
const MAX_ITEM_MULTIPLY_ADDS: usize = 1 << 25;
/// Activations an item goes through where that is all it does.
const ITEM_ACTIVATIONS: usize = 1 << 16;
/// Panels of an item come in fours, which a single token's tiles take, or in pairs.
const ITEM_PANELS: usize = 4;

/// Activations of one batch; see `Pass` for the stages.
pub struct CpuPass {
    shared: Arc<Shared>,
    /// Of every page it gets, the dtype apart.
    geometry: KvGeometry,
    limits: PassLimits,
    /// How far the stage in progress has come.
    jobs: Jobs,
    /// Tokens of the current batch.
    tokens: usize,
    /// `[max_tokens]`: each token's sequence and position.
    places: Vec<(u32, u32)>,
    /// `[at most max_tokens]`: the batch's tokens in blocks that attend together, each of one sequence.
    blocks: Vec<Range<u32>>,
    /// `[max_tokens, head_dim / 2]` each: the rotary angles of each token's position.
    cosines: Buffer<f32>,
    sines: Buffer<f32>,
    /// `[max_tokens, hidden_size]`: the residual stream.
    x: Buffer<f32>,
    /// `[max(max_tokens, logit_rows), hidden_size]`: the normed input of a stage.
    normed: Buffer<f32>,
    /// `[max_tokens, query_size]`
    query: Buffer<f32>,
    /// `[max_tokens, key_value_size]`
    key: Buffer<f32>,
    /// `[max_tokens, key_value_size]`
    value: Buffer<f32>,
    /// `[max_tokens, query_size]`: attention of all heads, before the output projection.
    attended: Buffer<f32>,
    /// `[max_tokens, num_attention_heads, 2]`: attention between two ranges of positions.
    attention_state: Buffer<f32>,
    /// `[max_tokens, num_local_experts]`
    router_logits: Buffer<f32>,
    routing: Routing,
    /// Whatever is about to be multiplied with weights.
    packed: Activations,
    /// `[slots, intermediate_size]`
    activated: Buffer<f32>,
    /// `[slots, hidden_size]`: output of a projection, before it joins the residual stream.
    projected: Buffer<f32>,
    /// `[logit_rows, vocab_size]`
    logits: Buffer<f32>,
    /// `[max_sequences]`: the row of `logits` each sequence of the last batch has.
    logit_rows: Vec<Option<u32>>,
    /// `[max_tokens]`: the tokens of the batch that have a target, then the log-probability of each one's.
    scored: Vec<u32>,
    log_probabilities: Buffer<f32>,
    /// Shown what matrices are multiplied with.
    observer: Option<Arc<Observer>>,
}

/// Elements of each buffer of a pass.
struct Sizes {
    rotary: usize,
    x: usize,
    normed: usize,
    query: usize,
    key_value: usize,
    attention_state: usize,
    router_logits: usize,
    activated: usize,
    projected: usize,
    logits: usize,
    tokens: usize,
    /// Tokens and columns of the largest activations.
    packed: (usize, usize),
}

impl Sizes {
    fn new(config: &Config, limits: PassLimits) -> Result<Sizes> {
        // A host of the Rust API may give any limits: their products are checked.
        let times = |rows: usize, columns: usize| {
            let elements = rows.checked_mul(columns).filter(|elements| *elements <= usize::MAX / 64);
            elements.ok_or_else(|| Error::out_of_memory(WHAT, usize::MAX))
        };
        let tokens = limits.max_tokens;
        let slots = times(tokens, config.num_experts_per_tok)?;
        let most_rows = slots.max(limits.logit_rows);
        let widest = config.hidden_size.max(config.query_size()).max(config.intermediate_size);
        Ok(Sizes {
            rotary: times(tokens, config.head_dim / 2)?,
            x: times(tokens, config.hidden_size)?,
            normed: times(tokens.max(limits.logit_rows), config.hidden_size)?,
            query: times(tokens, config.query_size())?,
            key_value: times(tokens, config.key_value_size())?,
            attention_state: times(tokens, 2 * config.num_attention_heads)?,
            router_logits: times(tokens, config.num_local_experts)?,
            activated: times(slots, config.intermediate_size)?,
            projected: times(slots, config.hidden_size)?,
            logits: times(limits.logit_rows, config.vocab_size)?,
            tokens,
            packed: (most_rows, widest),
        })
    }

    fn bytes(&self) -> usize {
        let twice = self.rotary + self.query + self.key_value;
        let once = self.x + self.normed + self.attention_state + self.router_logits + self.activated + self.projected;
        (2 * twice + once + self.logits + self.tokens) * size_of::<f32>()
    }
}

const WHAT: &str = "the workspace of a forward pass";

/// Bytes a pass of these limits takes, without making it.
pub fn planned_bytes(config: &Config, limits: PassLimits) -> Result<usize> {
    let routing = Routing::planned_bytes(
        config.num_hidden_layers,
        config.num_local_experts,
        config.num_experts_per_tok,
        limits.max_tokens,
    )?;
    let sizes = Sizes::new(config, limits)?;
    Ok(sizes.bytes() + Activations::planned_bytes(WHAT, sizes.packed.0, sizes.packed.1)? + routing)
}

impl CpuPass {
    pub fn new(shared: Arc<Shared>, limits: PassLimits) -> Result<Self> {
        let config = &shared.config;
        let sizes = Sizes::new(config, limits)?;
        let zeroed = |elements: usize| Buffer::zeroed(WHAT, elements);
        let observer = shared.observer.lock().upgrade();
        Ok(CpuPass {
            geometry: KvGeometry::of(config, KvDtype::F32),
            limits,
            jobs: Jobs::default(),
            tokens: 0,
            places: try_with_capacity(WHAT, limits.max_tokens)?,
            blocks: try_with_capacity(WHAT, limits.max_tokens)?,
            cosines: zeroed(sizes.rotary)?,
            sines: zeroed(sizes.rotary)?,
            x: zeroed(sizes.x)?,
            normed: zeroed(sizes.normed)?,
            query: zeroed(sizes.query)?,
            key: zeroed(sizes.key_value)?,
            value: zeroed(sizes.key_value)?,
            attended: zeroed(sizes.query)?,
            attention_state: zeroed(sizes.attention_state)?,
            router_logits: zeroed(sizes.router_logits)?,
            routing: Routing::new(
                config.num_hidden_layers,
                config.num_local_experts,
                config.num_experts_per_tok,
                limits.max_tokens,
            )?,
            packed: Activations::new(WHAT, sizes.packed.0, sizes.packed.1)?,
            activated: zeroed(sizes.activated)?,
            projected: zeroed(sizes.projected)?,
            logits: zeroed(sizes.logits)?,
            logit_rows: try_with_capacity(WHAT, limits.max_sequences)?,
            scored: try_with_capacity(WHAT, limits.max_tokens)?,
            log_probabilities: zeroed(sizes.tokens)?,
            observer,
            shared,
        })
    }

    /// Copies the keys and values of one token of the batch, `[heads * head_dim]` each, to their place in the pages.
    fn write_cache(&self, layer: usize, batch: &mut Batch, token: usize) -> Result<()> {
        let (sequence, position) = self.places[token];
        let position = position as usize;
        let pages = &mut batch.sequences[sequence as usize].pages;
        let page = Arc::get_mut(&mut pages[position / PAGE_TOKENS]).ok_or_else(shared_page)?;
        let head_dim = self.geometry.head_dim;
        let row_length = self.geometry.heads * head_dim;
        for (half, rows) in [(KvHalf::Key, &self.key), (KvHalf::Value, &self.value)] {
            let row = &rows[token * row_length..(token + 1) * row_length];
            for (head, row) in row.chunks_exact(head_dim).enumerate() {
                self.shared.kernels.store(row, page, KvBlock { layer, half, head }, position % PAGE_TOKENS);
            }
        }
        Ok(())
    }
}

/// The job of showing an observer, where there is one, what a product's input is.
pub(super) fn observe(
    jobs: &mut Jobs,
    limit: &Limit,
    observer: &Option<Arc<Observer>>,
    input: Input,
    x: TokenRows,
) -> Poll<Result<()>> {
    let Some(observer) = observer else { return Poll::Ready(Ok(())) };
    jobs.run_here(limit, 1, |_| {
        observer.see(input, (0..x.count).map(|token| x.row(token)));
        Ok(())
    })
}

/// Splits a matrix's panels, and many tokens, into items of about ITEM_BYTES or ITEM_MULTIPLY_ADDS each, whichever is less.
pub(super) struct Split {
    panels: usize,
    panels_per_item: usize,
    tokens: usize,
    tokens_per_item: usize,
}

impl Split {
    /// For `matrices` matrices of one shape that are computed together.
    pub fn new(shape: &Shape, matrices: usize, tokens: usize) -> Split {
        let bytes = ITEM_BYTES / (shape.panel_bytes() * matrices).max(1);
        let token_multiply_adds = (PANEL_ROWS * shape.columns * matrices).max(1);
        let multiply_adds = ITEM_MULTIPLY_ADDS / (token_multiply_adds * tokens.max(1));
        let most_tokens = MAX_ITEM_MULTIPLY_ADDS / (2 * token_multiply_adds);
        let panels = bytes.min(multiply_adds);
        Split {
            panels: shape.panels(),
            panels_per_item: if panels < ITEM_PANELS && tokens > 1 { 2 } else { panels.next_multiple_of(ITEM_PANELS) }
                .max(2),
            tokens,
            tokens_per_item: (most_tokens / TILE * TILE).max(TILE),
        }
    }

    fn token_blocks(&self) -> usize {
        self.tokens.div_ceil(self.tokens_per_item)
    }

    pub fn items(&self) -> usize {
        self.panels.div_ceil(self.panels_per_item) * self.token_blocks()
    }

    /// An item's panels, and its tokens if there are `tokens` of them. Items of the same panels follow each other.
    pub fn parts_of(&self, item: usize, tokens: usize) -> (Range<usize>, Range<usize>) {
        let (panels, block) = (item / self.token_blocks(), item % self.token_blocks());
        let part = |index: usize, size: usize, all: usize| (index * size).min(all)..((index + 1) * size).min(all);
        (part(panels, self.panels_per_item, self.panels), part(block, self.tokens_per_item, tokens))
    }
}

/// Splits tokens into items of about ITEM_ACTIVATIONS activations, `width` a token.
struct TokenSplit {
    tokens: usize,
    per_item: usize,
}

impl TokenSplit {
    fn new(tokens: usize, width: usize) -> TokenSplit {
        TokenSplit { tokens, per_item: (ITEM_ACTIVATIONS / width.max(1)).max(1) }
    }

    fn items(&self) -> usize {
        self.tokens.div_ceil(self.per_item)
    }

    fn tokens_of(&self, item: usize) -> Range<usize> {
        item * self.per_item..((item + 1) * self.per_item).min(self.tokens)
    }
}

/// A matrix and where its products go, `[tokens, rows]`.
type Product<'a> = (&'a Matrix, &'a mut [f32]);

impl Shared {
    /// What activations are packed as for a matrix.
    fn precision(&self, weights: &Matrix) -> Precision {
        self.kernels.precision(weights.shape().format)
    }

    /// The jobs `out[token] = weights x[token]` for every token of `x` and every product; `packed` is scratch.
    fn matmul<const N: usize>(
        &self,
        jobs: &mut Jobs,
        limit: &Limit,
        packed: &mut Activations,
        x: TokenRows,
        products: [Product; N],
    ) -> Poll<Result<()>> {
        let products = products
            .map(|(weights, out)| (weights, Output::new(out, weights.rows()), Split::new(weights.shape(), 1, x.count)));
        // One precision, but for checkpoints of mixed dtypes.
        for precision in Precision::ALL {
            let of_precision = || products.iter().filter(|(weights, ..)| self.precision(weights) == precision);
            if of_precision().next().is_none() {
                continue;
            }
            let place = Place { precision, tokens: 0..x.count, columns: x.columns };
            let packing = packed.packing();
            ready!(jobs.run(&self.pool, limit, tiles(x.count), &|tile, _| {
                let tokens = tile * TILE..((tile + 1) * TILE).min(x.count);
                // SAFETY: items have tiles of their own, and the buffer outlives the job.
                unsafe { self.kernels.pack(&packing, &place, tile, &x.part(tokens)) }
            }))?;
            let x = packed.packed(&place);
            let items = of_precision().map(|(_, _, split)| split.items()).sum();
            ready!(jobs.run(&self.pool, limit, items, &|item, _| {
                let mut item = item;
                for (weights, out, split) in of_precision() {
                    if item < split.items() {
                        let (panels, tokens) = split.parts_of(item, x.tokens());
                        let out = out.skip_rows(tokens.start);
                        // SAFETY: items have different rows or tokens, and the buffer outlives the job.
                        unsafe { self.kernels.matmul(weights, panels, &x.part(tokens), &out) };
                        return;
                    }
                    item -= split.items();
                }
            }))?;
        }
        Poll::Ready(Ok(()))
    }

    /// The job `normed[token] = rms_norm(x[token])` for `tokens` tokens.
    fn norm(
        &self,
        jobs: &mut Jobs,
        limit: &Limit,
        weight: &[f32],
        x: &[f32],
        tokens: usize,
        normed: &mut [f32],
    ) -> Poll<Result<()>> {
        let (hidden_size, eps) = (self.config.hidden_size, self.config.rms_norm_eps);
        let split = TokenSplit::new(tokens, hidden_size);
        let normed = Output::new(normed, hidden_size);
        jobs.run(&self.pool, limit, split.items(), &|item, _| {
            for token in split.tokens_of(item) {
                // SAFETY: items have different tokens, and the buffer outlives the job.
                let normed = unsafe { normed.row_part(token, 0..hidden_size) };
                rms_norm(&x[token * hidden_size..(token + 1) * hidden_size], weight, eps, normed);
            }
        })
    }
}

impl Pass for CpuPass {
    fn begin(&mut self, batch: &Batch) -> Result<()> {
        let config = &self.shared.config;
        batch.check(config, &self.limits)?;
        self.jobs.reset();
        self.tokens = batch.token_count();
        self.places.clear();
        self.blocks.clear();
        self.logit_rows.clear();
        self.scored.clear();
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let first = self.places.len();
            let targets = sequence.targets.iter().enumerate().filter(|(_, target)| **target != NO_TARGET);
            self.scored.extend(targets.map(|(at, _)| (first + at) as u32));
            self.logit_rows.push(None);
            for position in sequence.start..sequence.start + sequence.tokens.len() {
                self.places.push((index as u32, position as u32));
            }
            let tokens = first as u32..self.places.len() as u32;
            let block = AttentionSplit::most_tokens(config) as u32;
            self.blocks.extend(tokens.clone().step_by(block as usize).map(|at| at..tokens.end.min(at + block)));
        }
        Ok(())
    }

    fn embed(&mut self, batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        let shared = Arc::clone(&self.shared);
        let (hidden_size, pairs) = (shared.config.hidden_size, shared.numerics.rotary_frequencies.len());
        let x = Output::new(&mut self.x, hidden_size);
        let (cosines, sines) = (Output::new(&mut self.cosines, pairs), Output::new(&mut self.sines, pairs));
        let places = &self.places;
        // A sine and a cosine cost about as much as sixteen activations.
        let split = TokenSplit::new(self.tokens, hidden_size + 16 * pairs);
        ready!(self.jobs.run(&shared.pool, limit, split.items(), &|item, _| {
            for token in split.tokens_of(item) {
                let (sequence, position) = places[token];
                let sequence = &batch.sequences[sequence as usize];
                // SAFETY: items have different tokens, and the buffers outlive the job.
                let (x, cosines, sines) = unsafe {
                    (
                        x.row_part(token, 0..hidden_size),
                        cosines.row_part(token, 0..pairs),
                        sines.row_part(token, 0..pairs),
                    )
                };
                shared.weights.embedding.read_row(sequence.tokens[position as usize - sequence.start] as usize, x);
                x.iter_mut().for_each(|value| *value *= shared.numerics.embedding_scale);
                for (pair, frequency) in shared.numerics.rotary_frequencies.iter().enumerate() {
                    // The product in f32, as the published code has it; its sine and cosine as exact as f32 holds them.
                    let (sine, cosine) = ((position as f32 * frequency) as f64).sin_cos();
                    cosines[pair] = cosine as f32;
                    sines[pair] = sine as f32;
                }
            }
        }))?;
        self.jobs.done()
    }

    fn norm_qkv_rope(&mut self, layer: usize, batch: &mut Batch, limit: &Limit) -> Poll<Result<()>> {
        let shared = Arc::clone(&self.shared);
        let (weights, hidden_size, tokens) = (&shared.weights.layers[layer], shared.config.hidden_size, self.tokens);
        let jobs = &mut self.jobs;
        ready!(shared.norm(jobs, limit, &weights.input_norm, &self.x, tokens, &mut self.normed))?;
        let x = TokenRows { data: &self.normed, columns: hidden_size, index: None, count: tokens };
        ready!(observe(jobs, limit, &self.observer, Input::Attention(layer), x))?;
        let products = [
            (&weights.query, &mut self.query[..tokens * weights.query.rows()]),
            (&weights.key, &mut self.key[..tokens * weights.key.rows()]),
            (&weights.value, &mut self.value[..tokens * weights.value.rows()]),
        ];
        ready!(shared.matmul(jobs, limit, &mut self.packed, x, products))?;

        let (head_dim, pairs) = (self.geometry.head_dim, shared.numerics.rotary_frequencies.len());
        let rows = [(&mut self.query, weights.query.rows()), (&mut self.key, weights.key.rows())];
        let rows = rows.map(|(rows, width)| (Output::new(rows, width), width));
        let (cosines, sines) = (&self.cosines, &self.sines);
        let split = TokenSplit::new(tokens, weights.query.rows() + weights.key.rows());
        ready!(jobs.run(&shared.pool, limit, split.items(), &|item, _| {
            for token in split.tokens_of(item) {
                let angles = token * pairs..(token + 1) * pairs;
                for (rows, width) in &rows {
                    // SAFETY: items have different tokens, and the buffers outlive the job.
                    for head in unsafe { rows.row_part(token, 0..*width) }.chunks_exact_mut(head_dim) {
                        rotate(head, &cosines[angles.clone()], &sines[angles.clone()]);
                    }
                }
            }
        }))?;

        // Taken out, so that the job can borrow the rest.
        let mut jobs = std::mem::take(&mut self.jobs);
        let written = jobs.run_here(limit, tokens, |token| self.write_cache(layer, batch, token));
        self.jobs = jobs;
        ready!(written)?;
        self.jobs.done()
    }

    fn attention(&mut self, layer: usize, batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        let shared = Arc::clone(&self.shared);
        let config = &shared.config;
        let (heads, query_size) = (config.num_attention_heads, config.query_size());
        let longest = self.places.iter().map(|(_, position)| *position as usize + 1).max().unwrap_or(0);
        let most_tokens = self.blocks.iter().map(|block| block.len()).max().unwrap_or(0);
        let split = AttentionSplit::new(config, self.blocks.len(), most_tokens, longest, shared.pool.threads());
        let state = Output::new(&mut self.attention_state, 2 * heads);
        let attended = Output::new(&mut self.attended, query_size);
        let (places, blocks, query) = (&self.places, &self.blocks, &self.query);
        // A range of positions after the other, each by all threads.
        for first in (0..longest).step_by(split.positions) {
            ready!(self.jobs.run(&shared.pool, limit, split.items(), &|item, _| {
                for unit in split.units_of(item) {
                    let (block, key_value_head, heads) = split.parts_of(unit);
                    let tokens = blocks[block].start as usize..blocks[block].end as usize;
                    let (sequence, position) = places[tokens.start];
                    let start = position as usize;
                    if first >= start + tokens.len() {
                        continue;
                    }
                    let block = QueryBlock {
                        queries: &query[tokens.start * query_size..tokens.end * query_size],
                        tokens: tokens.len(),
                        start,
                        heads,
                        pages: batch.sequences[sequence as usize].pages,
                        layer,
                        key_value_head,
                    };
                    let (state, attended) = (state.skip_rows(tokens.start), attended.skip_rows(tokens.start));
                    // SAFETY: units have different tokens or heads, and both buffers outlive the job.
                    unsafe { shared.kernels.attend(&block, first..first + split.positions, &state, &attended) };
                }
            }))?;
        }

        let output = &shared.weights.layers[layer].output;
        let x = TokenRows { data: &self.attended, columns: output.columns(), index: None, count: self.tokens };
        let projected = &mut self.projected[..self.tokens * output.rows()];
        ready!(observe(&mut self.jobs, limit, &self.observer, Input::Output(layer), x))?;
        ready!(shared.matmul(&mut self.jobs, limit, &mut self.packed, x, [(output, projected)]))?;

        let (hidden_size, projected) = (config.hidden_size, &self.projected);
        let x = Output::new(&mut self.x, hidden_size);
        let split = TokenSplit::new(self.tokens, hidden_size);
        ready!(self.jobs.run(&shared.pool, limit, split.items(), &|item, _| {
            for token in split.tokens_of(item) {
                // SAFETY: items have different tokens, and the buffer outlives the job.
                let x = unsafe { x.row_part(token, 0..hidden_size) };
                for (x, projected) in x.iter_mut().zip(&projected[token * hidden_size..]) {
                    *x += projected;
                }
            }
        }))?;
        self.jobs.done()
    }

    fn router(&mut self, layer: usize, batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        let shared = Arc::clone(&self.shared);
        let (weights, tokens) = (&shared.weights.layers[layer], self.tokens);
        let (hidden_size, experts) = (shared.config.hidden_size, shared.config.num_local_experts);
        let jobs = &mut self.jobs;
        ready!(shared.norm(jobs, limit, &weights.post_attention_norm, &self.x, tokens, &mut self.normed))?;
        if let Some(observer) = &self.observer {
            let normed = &self.normed[..tokens * hidden_size];
            ready!(jobs.run_here(limit, 1, |_| {
                observer.see_router(layer, normed.chunks_exact(hidden_size));
                Ok(())
            }))?;
        }
        if let Some(router) = shared.gate(batch.gates, layer) {
            let x = TokenRows { data: &self.normed, columns: hidden_size, index: None, count: tokens };
            let out = &mut self.router_logits[..tokens * experts];
            ready!(shared.matmul(jobs, limit, &mut self.packed, x, [(router, out)]))?;
        }
        let (routing, logits, places) = (&mut self.routing, &self.router_logits, &self.places);
        ready!(jobs.run_here(limit, 1, |_| {
            if weights.router.is_none() {
                routing.choose_only_expert(layer, tokens);
            } else {
                for token in 0..tokens {
                    let logits = &logits[token * experts..(token + 1) * experts];
                    let router = batch.sequences[places[token].0 as usize].router;
                    let allowed = router.map_or(u64::MAX, |router| router.allowed[layer]);
                    let bias = router.map(|router| &router.bias[layer * experts..(layer + 1) * experts]);
                    routing.choose(layer, token, logits, allowed, bias);
                }
            }
            routing.group(layer, tokens);
            Ok(())
        }))?;
        self.jobs.done()
    }

    fn experts(&mut self, layer: usize, _batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        let shared = Arc::clone(&self.shared);
        let config = &shared.config;
        let hidden_size = config.hidden_size;
        let experts = &shared.weights.layers[layer].experts;
        let routing = &self.routing;
        let run = ExpertJobs {
            kernels: &shared.kernels,
            pool: &shared.pool,
            exact_gelu: shared.numerics.exact_gelu,
            weights: &|expert| &experts[expert],
            slots: routing.by_expert(),
            layer,
            observer: &self.observer,
        };
        let rows = TokenRows { data: &self.normed, columns: hidden_size, index: None, count: self.tokens };
        let buffers =
            ExpertBuffers { packed: &mut self.packed, activated: &mut self.activated, projected: &mut self.projected };
        ready!(run.run(&mut self.jobs, limit, rows, buffers))?;

        // x += sum of weight * projected over the token's slots, in the order of the weights, rounded once.
        let projected = &self.projected;
        let x = Output::new(&mut self.x, hidden_size);
        let split = TokenSplit::new(self.tokens, hidden_size * config.num_experts_per_tok);
        ready!(self.jobs.run(&shared.pool, limit, split.items(), &|item, _| {
            for token in split.tokens_of(item) {
                // SAFETY: items have different tokens, and the buffer outlives the job.
                let x = unsafe { x.row_part(token, 0..hidden_size) };
                for (column, x) in x.iter_mut().enumerate() {
                    let terms = routing.combination(token);
                    let sum: f64 = terms.map(|(slot, w)| w * projected[slot * hidden_size + column] as f64).sum();
                    *x += sum as f32;
                }
            }
        }))?;
        self.jobs.done()
    }

    fn head(&mut self, batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        let shared = Arc::clone(&self.shared);
        let (hidden_size, eps) = (shared.config.hidden_size, shared.config.rms_norm_eps);
        let vocab_size = shared.config.vocab_size;
        let head = shared.weights.head.as_ref().unwrap_or(&shared.weights.embedding);
        let norm = |token: usize, row: usize, x: &[f32], normed: &mut [f32]| {
            let x = &x[token * hidden_size..(token + 1) * hidden_size];
            let normed = &mut normed[row * hidden_size..(row + 1) * hidden_size];
            rms_norm(x, &shared.weights.final_norm, eps, normed);
        };

        // As many scored tokens at a time as there are rows of logits.
        for first in (0..self.scored.len()).step_by(self.limits.logit_rows) {
            let scored = &self.scored[first..(first + self.limits.logit_rows).min(self.scored.len())];
            let (x, normed) = (&self.x, &mut self.normed);
            ready!(self.jobs.run_here(limit, scored.len(), |row| {
                norm(scored[row] as usize, row, x, normed);
                Ok(())
            }))?;
            let x = TokenRows { data: &self.normed, columns: hidden_size, index: None, count: scored.len() };
            let logits = &mut self.logits[..scored.len() * vocab_size];
            ready!(observe(&mut self.jobs, limit, &self.observer, Input::Head, x))?;
            ready!(shared.matmul(&mut self.jobs, limit, &mut self.packed, x, [(head, logits)]))?;
            let (logits, places) = (&self.logits, &self.places);
            let out = Output::new(&mut self.log_probabilities, 1);
            ready!(self.jobs.run(&shared.pool, limit, scored.len(), &|row, _| {
                let token = scored[row] as usize;
                let (sequence, position) = places[token];
                let sequence = &batch.sequences[sequence as usize];
                let target = sequence.targets[position as usize - sequence.start] as usize;
                // SAFETY: items have different tokens, and the buffer outlives the job.
                let out = unsafe { out.row_part(token, 0..1) };
                out[0] = log_softmax_at(&logits[row * vocab_size..(row + 1) * vocab_size], target);
            }))?;
        }

        let (mut next_token, mut rows) = (0, 0);
        for (index, sequence) in batch.sequences.iter().enumerate() {
            next_token += sequence.tokens.len();
            if sequence.logits.is_none() {
                continue;
            }
            let (x, normed) = (&self.x, &mut self.normed);
            ready!(self.jobs.run_here(limit, 1, |_| {
                norm(next_token - 1, rows, x, normed);
                Ok(())
            }))?;
            self.logit_rows[index] = Some(rows as u32);
            rows += 1;
        }
        let x = TokenRows { data: &self.normed, columns: hidden_size, index: None, count: rows };
        ready!(observe(&mut self.jobs, limit, &self.observer, Input::Head, x))?;
        let logits = &mut self.logits[..rows * vocab_size];
        ready!(shared.matmul(&mut self.jobs, limit, &mut self.packed, x, [(head, logits)]))?;
        self.jobs.done()
    }

    fn logits(&self, sequence: usize) -> Option<PassLogits<'_>> {
        let vocab_size = self.shared.config.vocab_size;
        let row = (*self.logit_rows.get(sequence)?)? as usize;
        Some(PassLogits::Numbers(&self.logits[row * vocab_size..(row + 1) * vocab_size]))
    }

    fn log_probability(&self, token: usize) -> f32 {
        self.log_probabilities[token]
    }

    fn hidden_state(&self, token: usize, out: &mut [f32]) -> Result<()> {
        let hidden_size = self.shared.config.hidden_size;
        let x = &self.x[token * hidden_size..(token + 1) * hidden_size];
        rms_norm(x, &self.shared.weights.final_norm, self.shared.config.rms_norm_eps, out);
        Ok(())
    }

    fn routes(&self, layer: usize, token: usize) -> Routes<'_> {
        self.routing.routes(layer, token)
    }

    fn touched_experts(&self, layer: usize) -> usize {
        self.routing.count_touched(layer, self.tokens)
    }

    fn bytes(&self) -> usize {
        let buffers = [
            &self.cosines,
            &self.sines,
            &self.x,
            &self.normed,
            &self.query,
            &self.key,
            &self.value,
            &self.attended,
            &self.attention_state,
            &self.router_logits,
            &self.activated,
            &self.projected,
            &self.logits,
            &self.log_probabilities,
        ];
        buffers.iter().map(|buffer| buffer.bytes()).sum::<usize>() + self.packed.bytes() + self.routing.bytes()
    }
}
