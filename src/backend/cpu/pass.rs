//! The stages of a forward pass on the CPU. Each splits its work into items for the pool; no item's result depends
//! on how many there are.

use std::ops::Range;
use std::sync::Arc;

use super::Shared;
use super::kernels::attention::HeadView;
use super::kernels::math::{rms_norm, rotate};
use super::kernels::matmul::{Output, TokenRows};
use super::routing::Routing;
use crate::backend::kv::{KvBlock, KvDtype, KvGeometry, KvHalf, PAGE_TOKENS, shared_page};
use crate::backend::ops::{Batch, Cancel, Pass, PassLimits, Routes};
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, try_with_capacity};
use crate::model::weights::Matrix;

/// Multiply-adds of one item: about 100 microseconds of one core, so that threads balance and a cancel is quick.
const ITEM_MULTIPLY_ADDS: usize = 1 << 20;
/// Rows of an item come in whole tiles.
const ROW_TILE: usize = 8;

/// Activations of one batch; see `Pass` for the stages.
pub struct CpuPass {
    shared: Arc<Shared>,
    /// Of every page it gets, the dtype apart.
    geometry: KvGeometry,
    limits: PassLimits,
    /// Tokens of the current batch.
    tokens: usize,
    /// `[max_tokens]`: each token's sequence and position.
    places: Vec<(u32, u32)>,
    /// `[max_tokens, head_dim / 2]` each: the rotary angles of each token's position.
    cosines: Buffer<f32>,
    sines: Buffer<f32>,
    /// `[max_tokens, hidden_size]`: the residual stream.
    x: Buffer<f32>,
    /// `[max_tokens, hidden_size]`: the normed input of a stage.
    normed: Buffer<f32>,
    /// `[max_tokens, query_size]`
    query: Buffer<f32>,
    /// `[max_tokens, key_value_size]`
    key: Buffer<f32>,
    /// `[max_tokens, key_value_size]`
    value: Buffer<f32>,
    /// `[max_tokens, query_size]`: attention of all heads, before the output projection.
    attended: Buffer<f32>,
    /// `[threads, max_context]`: scores of one head.
    scores: Buffer<f32>,
    /// `[max_tokens, num_local_experts]`
    router_logits: Buffer<f32>,
    routing: Routing,
    /// `[slots, intermediate_size]`
    activated: Buffer<f32>,
    /// `[max(slots, max_tokens), hidden_size]`: output of a projection, before it joins the residual stream.
    projected: Buffer<f32>,
    /// `[max_sequences, vocab_size]`
    logits: Buffer<f32>,
    /// `[max_sequences]`: the row of `logits` each sequence of the last batch has.
    logit_rows: Vec<Option<u32>>,
}

impl CpuPass {
    pub fn new(shared: Arc<Shared>, limits: PassLimits) -> Result<Self> {
        let config = &shared.config;
        let what = "the workspace of a forward pass";
        let tokens = limits.max_tokens;
        // A host of the Rust API may give any limits: their products are checked.
        let times = |rows: usize, columns: usize| {
            rows.checked_mul(columns).ok_or_else(|| Error::out_of_memory(what, usize::MAX))
        };
        let zeroed = |rows: usize, columns: usize| Buffer::zeroed(what, times(rows, columns)?);
        let slots = times(tokens, config.num_experts_per_tok)?;
        Ok(CpuPass {
            geometry: KvGeometry::of(config, KvDtype::F32),
            limits,
            tokens: 0,
            places: try_with_capacity(what, tokens)?,
            cosines: zeroed(tokens, config.head_dim / 2)?,
            sines: zeroed(tokens, config.head_dim / 2)?,
            x: zeroed(tokens, config.hidden_size)?,
            normed: zeroed(tokens.max(limits.max_sequences), config.hidden_size)?,
            query: zeroed(tokens, config.query_size())?,
            key: zeroed(tokens, config.key_value_size())?,
            value: zeroed(tokens, config.key_value_size())?,
            attended: zeroed(tokens, config.query_size())?,
            scores: zeroed(shared.pool.threads(), limits.max_context)?,
            router_logits: zeroed(tokens, config.num_local_experts)?,
            routing: Routing::new(
                config.num_hidden_layers,
                config.num_local_experts,
                config.num_experts_per_tok,
                tokens,
            )?,
            activated: zeroed(slots, config.intermediate_size)?,
            projected: zeroed(slots, config.hidden_size)?,
            logits: zeroed(limits.max_sequences, config.vocab_size)?,
            logit_rows: try_with_capacity(what, limits.max_sequences)?,
            shared,
        })
    }

    /// `normed[token] = rms_norm(x[token])`
    fn norm(&mut self, weight: &[f32]) {
        let config = &self.shared.config;
        let rows = self.x.chunks_exact(config.hidden_size).zip(self.normed.chunks_exact_mut(config.hidden_size));
        for (x, normed) in rows.take(self.tokens) {
            rms_norm(x, weight, config.rms_norm_eps, normed);
        }
    }

    /// `x += projected`, token by token.
    fn add_projected(&mut self) {
        let count = self.tokens * self.shared.config.hidden_size;
        for (x, projected) in self.x[..count].iter_mut().zip(&self.projected[..count]) {
            *x += projected;
        }
    }

    /// RoPE on all heads of `rows: [tokens, heads * head_dim]`.
    fn rotate_heads(rows: &mut [f32], row_length: usize, head_dim: usize, cosines: &[f32], sines: &[f32]) {
        let half = head_dim / 2;
        for (token, row) in rows.chunks_exact_mut(row_length).enumerate() {
            let angles = token * half..(token + 1) * half;
            for head in row.chunks_exact_mut(head_dim) {
                rotate(head, &cosines[angles.clone()], &sines[angles.clone()]);
            }
        }
    }

    /// Copies the batch's keys and values `[tokens, heads * head_dim]` to their places in the pages.
    fn write_cache(&self, layer: usize, batch: &mut Batch) -> Result<()> {
        let head_dim = self.geometry.head_dim;
        let row_length = self.geometry.heads * head_dim;
        let mut token = 0;
        for sequence in batch.sequences.iter_mut() {
            for position in sequence.start..sequence.start + sequence.tokens.len() {
                let page = Arc::get_mut(&mut sequence.pages[position / PAGE_TOKENS]).ok_or_else(shared_page)?;
                for (half, rows) in [(KvHalf::Key, &self.key), (KvHalf::Value, &self.value)] {
                    let row = &rows[token * row_length..(token + 1) * row_length];
                    for (head, row) in row.chunks_exact(head_dim).enumerate() {
                        let block = KvBlock { layer, half, head };
                        self.shared.kernels.store(row, page, block, position % PAGE_TOKENS);
                    }
                }
                token += 1;
            }
        }
        Ok(())
    }
}

/// Splits `rows` rows of `columns` columns for `tokens` tokens into items of about ITEM_MULTIPLY_ADDS each.
struct Split {
    rows: usize,
    per_item: usize,
}

impl Split {
    fn new(rows: usize, columns: usize, tokens: usize) -> Split {
        let per_item = ITEM_MULTIPLY_ADDS / (columns * tokens).max(1);
        Split { rows, per_item: per_item.next_multiple_of(ROW_TILE).max(ROW_TILE) }
    }

    fn items(&self) -> usize {
        self.rows.div_ceil(self.per_item)
    }

    fn rows_of(&self, item: usize) -> Range<usize> {
        item * self.per_item..((item + 1) * self.per_item).min(self.rows)
    }
}

impl Shared {
    /// `out[token] = weights x[token]` for every token of `x`, over the pool.
    fn matmul(&self, weights: &Matrix, x: TokenRows, out: &mut [f32], cancel: &Cancel) -> Result<()> {
        let split = Split::new(weights.rows, weights.columns, x.count);
        let out = Output::new(out, weights.rows);
        self.pool.run(split.items(), cancel, &|item, _| {
            // SAFETY: items have disjoint rows, and `out`'s buffer outlives the job.
            unsafe { self.kernels.matmul(weights, split.rows_of(item), &x, &out) }
        })
    }
}

impl Pass for CpuPass {
    fn begin(&mut self, batch: &Batch) -> Result<()> {
        let tokens = batch.token_count();
        let longest = batch.sequences.iter().map(|s| s.start + s.tokens.len()).max().unwrap_or(0);
        let (vocab_size, limits) = (self.shared.config.vocab_size, self.limits);
        let fits = tokens <= limits.max_tokens
            && batch.sequences.len() <= limits.max_sequences
            && longest <= limits.max_context
            && batch.sequences.iter().all(|s| {
                s.pages.len() * PAGE_TOKENS >= s.start + s.tokens.len()
                    && s.pages.iter().all(|page| page.geometry() == s.pages[0].geometry())
                    && s.pages.first().is_none_or(|page| page.geometry().same_model(&self.geometry))
                    && s.tokens.iter().all(|token| (*token as usize) < vocab_size)
            });
        if !fits {
            return Err(Error::new(Status::Internal, "a batch is larger than its pass or has tokens it may not have"));
        }
        self.tokens = tokens;
        self.places.clear();
        self.logit_rows.clear();
        for (index, sequence) in batch.sequences.iter().enumerate() {
            self.logit_rows.push(None);
            for position in sequence.start..sequence.start + sequence.tokens.len() {
                self.places.push((index as u32, position as u32));
            }
        }
        let half = self.shared.rotary_frequencies.len();
        for (token, (_, position)) in self.places.iter().enumerate() {
            for (pair, frequency) in self.shared.rotary_frequencies.iter().enumerate() {
                // The product in f32, as the published code has it; its sine and cosine as exact as f32 holds them.
                let angle = (*position as f32 * frequency) as f64;
                let (sine, cosine) = angle.sin_cos();
                self.cosines[token * half + pair] = cosine as f32;
                self.sines[token * half + pair] = sine as f32;
            }
        }
        Ok(())
    }

    fn embed(&mut self, batch: &Batch) -> Result<()> {
        let scale = self.shared.embedding_scale;
        let tokens = batch.sequences.iter().flat_map(|sequence| sequence.tokens);
        for (token, x) in tokens.zip(self.x.chunks_exact_mut(self.shared.config.hidden_size)) {
            self.shared.weights.embedding.read_row(*token as usize, x);
            x.iter_mut().for_each(|value| *value *= scale);
        }
        Ok(())
    }

    fn norm_qkv_rope(&mut self, layer: usize, batch: &mut Batch) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let weights = &shared.weights.layers[layer];
        self.norm(&weights.input_norm);
        let x = TokenRows { data: &self.normed, columns: shared.config.hidden_size, index: None, count: self.tokens };
        shared.matmul(&weights.query, x, &mut self.query[..self.tokens * weights.query.rows], batch.cancel)?;
        shared.matmul(&weights.key, x, &mut self.key[..self.tokens * weights.key.rows], batch.cancel)?;
        shared.matmul(&weights.value, x, &mut self.value[..self.tokens * weights.value.rows], batch.cancel)?;
        let head_dim = self.geometry.head_dim;
        for (rows, row_length) in [(&mut self.query, weights.query.rows), (&mut self.key, weights.key.rows)] {
            let rows = &mut rows[..self.tokens * row_length];
            Self::rotate_heads(rows, row_length, head_dim, &self.cosines, &self.sines);
        }
        self.write_cache(layer, batch)
    }

    fn attention(&mut self, layer: usize, batch: &Batch) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (config, geometry) = (&shared.config, &self.geometry);
        let (heads, head_dim) = (config.num_attention_heads, geometry.head_dim);
        let queries_per_key = heads / geometry.heads;
        let max_context = self.limits.max_context;
        let scores = Output::new(&mut self.scores, max_context);
        let attended = Output::new(&mut self.attended, config.query_size());
        let (places, query) = (&self.places, &self.query);
        // One item is one token's heads, as many as make an item at the longest position there is; items of single
        // tokens are split by head instead, so that all threads help.
        let longest = places.iter().map(|(_, position)| *position as usize + 1).max().unwrap_or(1);
        let enough = (ITEM_MULTIPLY_ADDS / (2 * longest * head_dim)).clamp(1, heads);
        let heads_per_item = if self.tokens >= shared.pool.threads() { enough } else { 1 };
        let items_per_token = heads.div_ceil(heads_per_item);
        shared.pool.run(self.tokens * items_per_token, batch.cancel, &|item, thread| {
            let (token, first) = (item / items_per_token, item % items_per_token * heads_per_item);
            let (sequence, position) = places[token];
            let pages = &batch.sequences[sequence as usize].pages;
            for head in first..(first + heads_per_item).min(heads) {
                let at = (token * heads + head) * head_dim;
                let view = HeadView {
                    query: &query[at..at + head_dim],
                    pages,
                    layer,
                    head: head / queries_per_key,
                    positions: position as usize + 1,
                };
                // SAFETY: each thread has its own row of `scores`, and each (token, head) its own part of
                // `attended`; both buffers outlive the job.
                unsafe {
                    let scores = scores.row_part(thread, 0..max_context);
                    let out = attended.row_part(token, head * head_dim..(head + 1) * head_dim);
                    shared.kernels.attend(&view, scores, out);
                }
            }
        })?;
        let output = &shared.weights.layers[layer].output;
        let x = TokenRows { data: &self.attended, columns: output.columns, index: None, count: self.tokens };
        shared.matmul(output, x, &mut self.projected[..self.tokens * output.rows], batch.cancel)?;
        self.add_projected();
        Ok(())
    }

    fn router(&mut self, layer: usize, _batch: &Batch) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let weights = &shared.weights.layers[layer];
        self.norm(&weights.post_attention_norm);
        let (hidden_size, experts) = (shared.config.hidden_size, shared.config.num_local_experts);
        match &weights.router {
            None => self.routing.choose_only_expert(layer, self.tokens),
            Some(router) => {
                let x = TokenRows { data: &self.normed, columns: hidden_size, index: None, count: self.tokens };
                let out = Output::new(&mut self.router_logits, experts);
                // SAFETY: this is the only thread in this call.
                unsafe { shared.kernels.matmul_f32(router, 0..experts, &x, &out) };
                for token in 0..self.tokens {
                    let logits = &self.router_logits[token * experts..(token + 1) * experts];
                    self.routing.choose(layer, token, logits.iter().copied());
                }
            }
        }
        self.routing.group(layer, self.tokens);
        Ok(())
    }

    fn experts(&mut self, layer: usize, batch: &Batch) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let config = &shared.config;
        let (hidden_size, intermediate_size) = (config.hidden_size, config.intermediate_size);
        let experts = &shared.weights.layers[layer].experts;
        let routing = &self.routing;
        let touched = routing.touched();
        let slots_per_expert = (self.tokens * config.num_experts_per_tok).div_ceil(touched.len().max(1));

        // activated[slot] = gelu(gate x) * (up x), x being the normed input of the slot's token.
        let split = Split::new(intermediate_size, 2 * hidden_size, slots_per_expert);
        let activated = Output::new(&mut self.activated, intermediate_size);
        let normed = &self.normed;
        shared.pool.run(touched.len() * split.items(), batch.cancel, &|item, _| {
            let expert = touched[item / split.items()] as usize;
            let slots = routing.slots_of(expert);
            let x = TokenRows {
                data: normed,
                columns: hidden_size,
                index: Some(&routing.slot_tokens()[slots.clone()]),
                count: slots.len(),
            };
            let out = activated.skip_rows(slots.start);
            // SAFETY: items have different slots or different rows, and the buffer outlives the job.
            unsafe {
                shared.kernels.geglu(&experts[expert], split.rows_of(item % split.items()), &x, shared.exact_gelu, &out)
            }
        })?;

        // projected[slot] = down activated[slot]
        let split = Split::new(hidden_size, intermediate_size, slots_per_expert);
        let projected = Output::new(&mut self.projected, hidden_size);
        let activated = &self.activated;
        shared.pool.run(touched.len() * split.items(), batch.cancel, &|item, _| {
            let expert = touched[item / split.items()] as usize;
            let slots = routing.slots_of(expert);
            let x = TokenRows {
                data: &activated[slots.start * intermediate_size..slots.end * intermediate_size],
                columns: intermediate_size,
                index: None,
                count: slots.len(),
            };
            let out = projected.skip_rows(slots.start);
            // SAFETY: items have different slots or different rows, and the buffer outlives the job.
            unsafe { shared.kernels.matmul(&experts[expert].down, split.rows_of(item % split.items()), &x, &out) }
        })?;

        // x += sum of weight * projected over the token's slots, in the order of the weights, rounded once.
        for (token, x) in self.x.chunks_exact_mut(hidden_size).take(self.tokens).enumerate() {
            for (column, x) in x.iter_mut().enumerate() {
                let terms = self.routing.combination(token);
                let sum: f64 = terms.map(|(slot, w)| w * self.projected[slot * hidden_size + column] as f64).sum();
                *x += sum as f32;
            }
        }
        Ok(())
    }

    fn head(&mut self, batch: &Batch) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let config = &shared.config;
        let hidden_size = config.hidden_size;
        let (mut next_token, mut rows) = (0, 0);
        for (index, sequence) in batch.sequences.iter().enumerate() {
            next_token += sequence.tokens.len();
            if !sequence.wants_logits {
                continue;
            }
            let x = &self.x[(next_token - 1) * hidden_size..next_token * hidden_size];
            let normed = &mut self.normed[rows * hidden_size..(rows + 1) * hidden_size];
            rms_norm(x, &shared.weights.final_norm, config.rms_norm_eps, normed);
            self.logit_rows[index] = Some(rows as u32);
            rows += 1;
        }
        let head = shared.weights.head.as_ref().unwrap_or(&shared.weights.embedding);
        let x = TokenRows { data: &self.normed, columns: hidden_size, index: None, count: rows };
        shared.matmul(head, x, &mut self.logits[..rows * head.rows], batch.cancel)
    }

    fn logits(&self, sequence: usize) -> Option<&[f32]> {
        let vocab_size = self.shared.config.vocab_size;
        let row = (*self.logit_rows.get(sequence)?)? as usize;
        Some(&self.logits[row * vocab_size..(row + 1) * vocab_size])
    }

    fn routes(&self, layer: usize, token: usize) -> Routes<'_> {
        self.routing.routes(layer, token)
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
            &self.scores,
            &self.router_logits,
            &self.activated,
            &self.projected,
            &self.logits,
        ];
        buffers.iter().map(|buffer| buffer.bytes()).sum::<usize>() + self.routing.bytes()
    }
}
