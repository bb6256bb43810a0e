//! The stages of a forward pass on a device: kernels, one after the other on the device's stream. Only at the end of a layer
//! does the host wait, for the layer two before, or for this one where time is short; and at the end for the results.
//!
//! Outside of calls nothing of a pass is in progress on the device: whatever leaves one early waits first. So pages and
//! buffers can be freed at any time in between.

use std::cell::OnceCell;
use std::sync::Arc;
use std::task::Poll;

use super::Shared;
use super::arguments::*;
use super::batch::{BatchShape, check_pages_are_own};
use super::context::Current;
use super::driver::Address;
use super::kernels::{MAX_TILED_TOKENS, Products, TENSOR_PANELS, TENSOR_TOKENS, WIDTHS, kind_of, width_of};
use super::memory::Mark;
use super::weights::{DeviceMatrix, DeviceVector, ExpertGroup};
use super::workspace::{ActivationBuffer, SPLIT_TOKENS, Workspace, at, spans_of};
use crate::backend::kv::PAGE_TOKENS;
use crate::backend::ops::{Batch, Limit, Pass, PassLimits, Routes, count_touched};
use crate::error::Result;
use crate::memory::{Buffer, as_bytes_mut};
use crate::quant::{Format, PANEL_ROWS};

/// Blocks of a kernel that are enough for each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// Columns of a block of `round_activations`.
const ROUND_COLUMNS: usize = 256;

/// Activations of one batch; see `Pass` for the stages.
pub struct CudaPass {
    shared: Arc<Shared>,
    limits: PassLimits,
    workspace: Workspace,
    /// The current batch.
    shape: BatchShape,
    /// Ends of layers, in turn; how many were set in this batch.
    marks: [Mark; 3],
    marked: usize,
    /// Tokens with targets that are done.
    scored: usize,
    /// Whether the device may still be at work on something of this pass.
    in_progress: bool,
    /// `[tokens, stride]`: hidden states of the last batch, once they were asked for.
    hidden: OnceCell<Buffer<f32>>,
}

/// No matrix: where a kernel takes fewer.
const NO_MATRIX: MatrixArguments = MatrixArguments {
    lines: std::ptr::null(),
    scales: std::ptr::null(),
    rows: 0,
    columns: 0,
    group_shift: 0,
    half_scales: 0,
};

/// What the activations of a stage are wanted in beside f32, for the weights they meet there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Wanted {
    integers: bool,
    /// BF16 or F16, for tensor cores.
    halves: Option<Format>,
    /// Whether there are tokens enough for tensor cores.
    tensor: bool,
}

impl Wanted {
    /// For weights of these formats. Halves have one format: where both are met, weights in either meet f32.
    fn new(formats: impl Iterator<Item = Format> + Clone, tensor: bool) -> Wanted {
        let integers = formats.clone().any(|format| format.groups().is_some());
        let mut halves = formats.filter(|format| matches!(format, Format::Bf16 | Format::F16));
        let first = halves.next().filter(|first| tensor && halves.all(|other| other == *first));
        Wanted { integers, halves: first, tensor }
    }

    fn is_something(&self) -> bool {
        self.integers || self.halves.is_some()
    }

    fn halves_are_f16(&self) -> u32 {
        (self.halves == Some(Format::F16)) as u32
    }

    /// Whether weights of a kind are met on tensor cores.
    fn uses_tensor(&self, kind: usize) -> bool {
        let is_kind = |format: Format| kind_of(format) == kind;
        let has_scales = is_kind(Format::INT8) || is_kind(Format::INT4);
        self.tensor && (has_scales || self.halves.is_some_and(is_kind))
    }
}

/// A matrix, where its products go, and the columns of a row there.
type Product<'a> = (&'a DeviceMatrix, Address, usize);

/// Parts of the context that attention is split into, each a block of its own: where tokens and heads alone are too few to keep
/// the device busy.
fn splits_of(tokens: usize, heads: usize, longest: usize, multiprocessors: usize) -> usize {
    if tokens > SPLIT_TOKENS {
        return 1;
    }
    let wanted = (BLOCKS_PER_MULTIPROCESSOR * multiprocessors).div_ceil((tokens * heads).max(1));
    wanted.clamp(1, spans_of(longest).max(1))
}

impl CudaPass {
    pub fn new(shared: Arc<Shared>, limits: PassLimits) -> Result<Self> {
        let workspace = Workspace::new(&shared.device, &shared.config, &limits)?;
        let mark = || Mark::new(&shared.device);
        Ok(CudaPass {
            workspace,
            shape: BatchShape::new(&limits)?,
            marks: [mark()?, mark()?, mark()?],
            marked: 0,
            scored: 0,
            in_progress: false,
            hidden: OnceCell::new(),
            limits,
            shared,
        })
    }

    /// Does a stage's work, after which the device may go on alone; where it fails, what was begun is waited for.
    fn stage(&mut self, work: impl FnOnce(&mut Self, &Current) -> Result<()>) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let current = shared.device.enter()?;
        self.in_progress = true;
        let result = work(self, &current);
        drop(current);
        if result.is_err() {
            // The first error is the one to tell.
            let _ = self.settle();
        }
        result
    }

    /// Waits until the device has done all that this pass asked for.
    fn settle(&mut self) -> Result<()> {
        if !self.in_progress {
            return Ok(());
        }
        // Also after an error: a device that is lost does nothing more.
        self.in_progress = false;
        self.shared.device.enter()?.wait()
    }

    /// Answers for a stage that may not begin because its limit is reached.
    fn stopped(&mut self, limit: &Limit) -> Option<Poll<Result<()>>> {
        if !limit.is_reached() {
            return None;
        }
        let result = self.settle().and_then(|()| limit.check_cancel());
        Some(result.map_or_else(|error| Poll::Ready(Err(error)), |()| Poll::Pending))
    }

    /// Keeps the host from running ahead: a cancel is to be heard, and time to be kept.
    fn pace(&mut self, current: &Current, limit: &Limit) -> Result<()> {
        let this = self.marked % self.marks.len();
        self.marks[this].set(current)?;
        // The one after this in the round was set two layers before, or never.
        let awaited = if limit.has_deadline() { this } else { (this + 1) % self.marks.len() };
        self.marks[awaited].wait(current)?;
        self.marked += 1;
        limit.note_work();
        Ok(())
    }

    /// The address of a part of the batch on the device.
    fn batch_part(&self, part: &std::ops::Range<usize>) -> Address {
        self.workspace.parts.batch + part.start as Address
    }

    fn cache(&self) -> CacheArguments {
        let config = &self.shared.config;
        CacheArguments {
            pages: at(self.batch_part(&self.workspace.layout.pages)),
            layers: config.num_hidden_layers as u32,
            key_value_heads: config.num_key_value_heads as u32,
            head_dim: config.head_dim as u32,
            page_tokens: PAGE_TOKENS as u32,
        }
    }

    /// What a stage of so many tokens with these weights wants of their activations.
    fn wanted<'a>(&self, weights: impl Iterator<Item = &'a DeviceMatrix> + Clone, tokens: usize) -> Wanted {
        let tensor = tokens > MAX_TILED_TOKENS && !self.shared.exact;
        Wanted::new(weights.map(|matrix| matrix.shape().format), tensor)
    }

    /// `normed[row] = rms_norm(x[index[row]])`, in f32 and what else is wanted.
    fn norm(
        &self,
        current: &Current,
        weight: &DeviceVector,
        index: Address,
        rows: usize,
        wanted: Wanted,
    ) -> Result<()> {
        let (parts, config) = (&self.workspace.parts, &self.shared.config);
        let arguments = NormArguments {
            x: at(parts.x),
            index: at(index),
            weight: at(weight.0),
            numbers: at(parts.normed.numbers),
            integers: at(if wanted.integers { parts.normed.integers } else { 0 }),
            blocks: at(if wanted.integers { parts.normed.blocks } else { 0 }),
            halves: at(if wanted.halves.is_some() { parts.normed.halves } else { 0 }),
            eps: config.rms_norm_eps,
            columns: config.hidden_size as u32,
            stride: parts.normed.stride as u32,
            halves_are_f16: wanted.halves_are_f16(),
        };
        // SAFETY: buffers of this pass with room for `rows` rows, and weights; all outlive the work, see above.
        unsafe { self.shared.kernels.norm.launch(current, [rows, 1, 1], &arguments) }
    }

    /// Rows in what is wanted beside f32: `rows` of them, or as many of those as the device says at `counted`.
    fn round(
        &self,
        current: &Current,
        buffer: &ActivationBuffer,
        rows: usize,
        counted: Address,
        wanted: Wanted,
    ) -> Result<()> {
        if !wanted.is_something() {
            return Ok(());
        }
        let arguments = RoundArguments {
            numbers: at(buffer.numbers),
            integers: at(if wanted.integers { buffer.integers } else { 0 }),
            blocks: at(if wanted.integers { buffer.blocks } else { 0 }),
            halves: at(if wanted.halves.is_some() { buffer.halves } else { 0 }),
            stride: buffer.stride as u32,
            halves_are_f16: wanted.halves_are_f16(),
            rows: at(counted),
        };
        let most = buffer.stride.div_ceil(ROUND_COLUMNS);
        let parts = self.enough_blocks().div_ceil(rows.max(1)).clamp(1, most);
        // SAFETY: as in `norm`.
        unsafe { self.shared.kernels.round_activations.launch(current, [rows, parts, 1], &arguments) }
    }

    /// Blocks that keep the device busy.
    fn enough_blocks(&self) -> usize {
        BLOCKS_PER_MULTIPROCESSOR * self.shared.device.multiprocessors()
    }

    /// `out[token] = weights x[token]` for each product, of as many columns all of them, or `out[token] +=`.
    fn multiply(
        &self,
        current: &Current,
        products: &[Product],
        x: ActivationArguments,
        (tokens, wanted): (usize, Wanted),
        accumulate: bool,
    ) -> Result<()> {
        let kernels = &self.shared.kernels.matmul;
        // One kind, but for checkpoints of mixed dtypes.
        for (kind, tensor) in kernels.tensor.iter().enumerate() {
            let mut arguments = MatmulArguments {
                weights: [NO_MATRIX; 3],
                out: [std::ptr::null_mut(); 3],
                out_stride: [0; 3],
                count: 0,
                x,
                tokens: tokens as u32,
                accumulate: accumulate as u32,
            };
            let (mut count, mut panels, mut groups) = (0, 0, 0);
            for (matrix, out, stride) in products.iter().filter(|(matrix, ..)| kind_of(matrix.shape().format) == kind) {
                arguments.weights[count] = matrix.arguments();
                arguments.out[count] = at(*out);
                arguments.out_stride[count] = *stride as u32;
                panels += matrix.shape().panels();
                groups += matrix.shape().panels().div_ceil(TENSOR_PANELS);
                count += 1;
            }
            if count > 0 {
                arguments.count = count as u32;
                let width = width_of(tokens);
                let (kernel, grid) = match tensor.as_ref().filter(|_| wanted.uses_tensor(kind)) {
                    Some(tensor) => (tensor, [tokens.div_ceil(TENSOR_TOKENS), groups, 1]),
                    None => (&kernels.tiled[kind][width], [panels, tokens.div_ceil(WIDTHS[width]), 1]),
                };
                // SAFETY: as in `norm`; the outputs have room for `tokens` rows of the matrices.
                unsafe { kernel.launch(current, grid, &arguments) }?;
            }
        }
        Ok(())
    }

    /// Products of slots with the experts' weights, whichever experts have any.
    fn multiply_slots(
        &self,
        current: &Current,
        kernels: &Products<ExpertArguments>,
        groups: &[ExpertGroup],
        (panels, wanted): (usize, Wanted),
        arguments: ExpertArguments,
    ) -> Result<()> {
        // An expert has at most one slot of each token.
        let tokens = self.shape.tokens;
        for group in groups {
            let arguments = ExpertArguments { selected: at(group.selected), ..arguments };
            let tensor = kernels.tensor[group.kind].as_ref().filter(|_| wanted.uses_tensor(group.kind));
            let (kernel, grid) = match tensor {
                Some(tensor) => (tensor, [tokens.div_ceil(TENSOR_TOKENS), panels.div_ceil(TENSOR_PANELS), group.count]),
                None => (&kernels.tiled[group.kind][width_of(tokens)], [panels, group.count, 1]),
            };
            // SAFETY: as in `norm`; slots are numbered on the device, below tokens times top_k.
            unsafe { kernel.launch(current, grid, &arguments) }?;
        }
        Ok(())
    }

    /// Addresses of a layer's choices, and of their weights.
    fn routes_of(&self, layer: usize) -> (Address, Address) {
        let of_layer = self.shape.tokens * self.shared.config.num_experts_per_tok * size_of::<u32>();
        let all = of_layer * self.shared.config.num_hidden_layers;
        let routes = self.workspace.parts.routes + (layer * of_layer) as Address;
        (routes, routes + all as Address)
    }

    /// Choices of all layers in this batch.
    fn choices(&self) -> usize {
        let config = &self.shared.config;
        self.shape.tokens * config.num_experts_per_tok * config.num_hidden_layers
    }

    fn embed_tokens(&self, current: &Current) -> Result<()> {
        let (parts, layout, shared) = (&self.workspace.parts, &self.workspace.layout, &self.shared);
        let embedding = &shared.weights.embedding;
        let arguments = EmbedArguments {
            embedding: embedding.arguments(),
            format: kind_of(embedding.shape().format) as u32,
            scale: shared.numerics.embedding_scale,
            tokens: at(self.batch_part(&layout.tokens)),
            x: at(parts.x),
            hidden_size: shared.config.hidden_size as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.embed.launch(current, [self.shape.tokens, 1, 1], &arguments) }
    }

    fn project_and_store(&self, current: &Current, layer: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let (config, weights, tokens) = (&shared.config, &shared.weights.layers[layer], self.shape.tokens);
        let matrices = [&weights.query, &weights.key, &weights.value];
        let wanted = self.wanted(matrices.into_iter(), tokens);
        self.norm(current, &weights.input_norm, 0, tokens, wanted)?;
        let products = [
            (&weights.query, parts.query, config.query_size()),
            (&weights.key, parts.key, config.key_value_size()),
            (&weights.value, parts.value, config.key_value_size()),
        ];
        self.multiply(current, &products, parts.normed.arguments(0), (tokens, wanted), false)?;
        let arguments = RotateArguments {
            query: at(parts.query),
            key: at(parts.key),
            value: at(parts.value),
            frequencies: at(shared.weights.rotary_frequencies),
            places: at(self.batch_part(&self.workspace.layout.places)),
            cache: self.cache(),
            layer: layer as u32,
            heads: config.num_attention_heads as u32,
        };
        // SAFETY: as in `norm`; the pages are the batch's, which has them all and alone.
        unsafe { shared.kernels.rotate_and_store.launch(current, [tokens, 1, 1], &arguments) }
    }

    fn attend(&self, current: &Current, layer: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let (config, kernels, tokens) = (&shared.config, &shared.kernels, self.shape.tokens);
        let heads = config.num_attention_heads;
        let multiprocessors = shared.device.multiprocessors();
        let splits = splits_of(tokens, heads, self.shape.longest, multiprocessors);
        let is_split = splits > 1;
        let arguments = AttentionArguments {
            query: at(parts.query),
            places: at(self.batch_part(&self.workspace.layout.places)),
            cache: self.cache(),
            partial: at(if is_split { parts.partial } else { 0 }),
            attended: at(parts.attended.numbers),
            stride: parts.attended.stride as u32,
            spans: if is_split { spans_of(self.limits.max_context) as u32 } else { 0 },
            layer: layer as u32,
            heads: heads as u32,
        };
        // SAFETY: as in `norm`; `partial` has room for all spans of a context where tokens are few enough to be split.
        unsafe { kernels.attention.launch(current, [tokens, heads, splits], &arguments) }?;
        if is_split {
            // SAFETY: as above.
            unsafe { kernels.attention_merge.launch(current, [tokens, heads, 1], &arguments) }?;
        }
        let output = &shared.weights.layers[layer].output;
        let wanted = self.wanted(std::iter::once(output), tokens);
        self.round(current, &parts.attended, tokens, 0, wanted)?;
        let product = [(output, parts.x, config.hidden_size)];
        self.multiply(current, &product, parts.attended.arguments(0), (tokens, wanted), true)
    }

    fn choose_experts(&self, current: &Current, layer: usize) -> Result<()> {
        let (parts, layout, shared) = (&self.workspace.parts, &self.workspace.layout, &self.shared);
        let (config, weights, tokens) = (&shared.config, &shared.weights.layers[layer], self.shape.tokens);
        let wanted = self.wanted(weights.experts.iter().map(|expert| &expert.gate), tokens);
        self.norm(current, &weights.post_attention_norm, 0, tokens, wanted)?;
        let (chosen, chosen_weights) = self.routes_of(layer);
        let top_k = config.num_experts_per_tok as u32;
        let arguments = RouteArguments {
            router: weights.router.as_ref().map_or(NO_MATRIX, DeviceMatrix::arguments),
            normed: at(parts.normed.numbers),
            places: at(self.batch_part(&layout.places)),
            allowed: at(self.batch_part(&layout.allowed)),
            bias: at(self.batch_part(&layout.bias)),
            chosen: at(chosen),
            weights: at(chosen_weights),
            exact_weights: at(parts.exact_weights),
            stride: parts.normed.stride as u32,
            layer: layer as u32,
            layers: config.num_hidden_layers as u32,
            experts: config.num_local_experts as u32,
            top_k,
        };
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.route.launch(current, [tokens, 1, 1], &arguments) }?;
        let arguments = GroupArguments {
            chosen: at(chosen),
            slots: at(parts.slots),
            slot_tokens: at(parts.slot_tokens),
            starts: at(parts.starts),
            tokens: tokens as u32,
            top_k,
            experts: config.num_local_experts as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.group.launch(current, [1, 1, 1], &arguments) }
    }

    fn run_experts(&self, current: &Current, layer: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let (config, tokens) = (&shared.config, self.shape.tokens);
        let (weights, tables) = (&shared.weights.layers[layer], &shared.weights.expert_tables[layer]);
        // activated[slot] = gelu(gate x) * (up x), x being the normed input of the slot's token.
        let gate_up = ExpertArguments {
            weights: at(tables.gate),
            up: at(tables.up),
            selected: std::ptr::null(),
            x: parts.normed.arguments(parts.slot_tokens),
            starts: at(parts.starts),
            out: at(parts.activated.numbers),
            out_stride: parts.activated.stride as u32,
            exact_gelu: shared.numerics.exact_gelu as u32,
        };
        let panels = config.intermediate_size.div_ceil(PANEL_ROWS);
        let wanted = self.wanted(weights.experts.iter().map(|expert| &expert.gate), tokens);
        self.multiply_slots(current, &shared.kernels.gate_up, &tables.gate_up_groups, (panels, wanted), gate_up)?;

        // projected[slot] = down activated[slot]
        let wanted = self.wanted(weights.experts.iter().map(|expert| &expert.down), tokens);
        let slot_count = parts.starts + (config.num_local_experts * size_of::<u32>()) as Address;
        self.round(current, &parts.activated, tokens * config.num_experts_per_tok, slot_count, wanted)?;
        let down = ExpertArguments {
            weights: at(tables.down),
            up: std::ptr::null(),
            x: parts.activated.arguments(0),
            out: at(parts.projected),
            out_stride: config.hidden_size as u32,
            ..gate_up
        };
        let panels = config.hidden_size.div_ceil(PANEL_ROWS);
        self.multiply_slots(current, &shared.kernels.down, &tables.down_groups, (panels, wanted), down)?;

        // x += sum of weight * projected over the token's slots, in the order of the weights, rounded once.
        let arguments = CombineArguments {
            projected: at(parts.projected),
            slots: at(parts.slots),
            chosen: at(self.routes_of(layer).0),
            exact_weights: at(parts.exact_weights),
            x: at(parts.x),
            hidden_size: config.hidden_size as u32,
            top_k: config.num_experts_per_tok as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.combine.launch(current, [tokens, 1, 1], &arguments) }
    }

    /// `logits[row]` of the tokens in the batch's rows from `first` on.
    fn project_head(&self, current: &Current, first: usize, rows: usize) -> Result<()> {
        let (parts, shared) = (&self.workspace.parts, &self.shared);
        let index = self.batch_part(&self.workspace.layout.rows) + (first * size_of::<u32>()) as Address;
        let head = shared.weights.head();
        let wanted = self.wanted(std::iter::once(head), rows);
        self.norm(current, &shared.weights.final_norm, index, rows, wanted)?;
        let product = [(head, parts.logits, shared.config.vocab_size)];
        self.multiply(current, &product, parts.normed.arguments(0), (rows, wanted), false)
    }

    /// Log-probabilities of the targets of the next scored tokens, as many as there are rows of logits.
    fn score(&mut self, current: &Current) -> Result<()> {
        let (first, rows) = (self.scored, self.limits.logit_rows.min(self.shape.scored.len() - self.scored));
        self.project_head(current, first, rows)?;
        let parts = &self.workspace.parts;
        let skipped = (first * size_of::<u32>()) as Address;
        let arguments = LogSoftmaxArguments {
            logits: at(parts.logits),
            targets: at(self.batch_part(&self.workspace.layout.targets) + skipped),
            out: at(parts.log_probabilities + skipped),
            vocab_size: self.shared.config.vocab_size as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { self.shared.kernels.log_softmax_at.launch(current, [rows, 1, 1], &arguments) }?;
        self.scored += rows;
        Ok(())
    }

    /// Logits where they are wanted, and everything that the host reads, fetched and waited for.
    fn fetch_results(&mut self, current: &Current) -> Result<()> {
        let (scored, wanted, choices) = (self.shape.scored.len(), self.shape.wanted, self.choices());
        if wanted > 0 {
            self.project_head(current, scored, wanted)?;
        }
        let (logits, log_probabilities) = (self.workspace.parts.logits, self.workspace.parts.log_probabilities);
        let routes = self.workspace.parts.routes;
        let logit_bytes = wanted * self.shared.config.vocab_size * size_of::<f32>();
        let (results, [logits_at, log_probabilities_at, routes_at]) = self.workspace.results_mut();
        let copies = [
            (logits_at, logits, logit_bytes),
            (log_probabilities_at, log_probabilities, scored * size_of::<f32>()),
            (routes_at, routes, choices * (size_of::<u32>() + size_of::<f32>())),
        ];
        for (offset, from, bytes) in copies.into_iter().filter(|(.., bytes)| *bytes > 0) {
            // SAFETY: results are read after the wait below, or another of `settle`; the buffers are this pass's.
            unsafe { results.fetch(current, offset, from, bytes) }?;
        }
        current.wait()?;
        self.in_progress = false;
        Ok(())
    }

    /// Hidden states of all tokens of the last batch, rows of the stride of `normed`.
    fn fetch_hidden(&self) -> Result<Buffer<f32>> {
        let (tokens, normed) = (self.shape.tokens, &self.workspace.parts.normed);
        let mut hidden = Buffer::zeroed("hidden states", tokens * normed.stride)?;
        let current = self.shared.device.enter()?;
        self.norm(&current, &self.shared.weights.final_norm, 0, tokens, Wanted::default())?;
        let bytes = as_bytes_mut(&mut hidden);
        // SAFETY: both are as long; `hidden` is kept until the wait is over, also where that fails: then the device does
        // nothing more.
        unsafe { current.copy_to_host(bytes.as_mut_ptr(), normed.numbers, bytes.len()) }?;
        current.wait()?;
        Ok(hidden)
    }
}

impl Pass for CudaPass {
    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.settle()?;
        let config = &self.shared.config;
        batch.check(config, &self.limits)?;
        let Workspace { layout, sent, .. } = &mut self.workspace;
        self.shape.fill(batch, config, layout, sent.as_mut_slice())?;
        self.marked = 0;
        self.scored = 0;
        self.hidden.take();
        self.stage(|pass, current| {
            let workspace = &pass.workspace;
            // SAFETY: the block is filled again in `begin` alone, after a wait; the part is as large.
            unsafe { workspace.sent.send(current, pass.shape.bytes, workspace.parts.batch) }
        })
    }

    fn embed(&mut self, _batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        if let Some(stopped) = self.stopped(limit) {
            return stopped;
        }
        Poll::Ready(self.stage(|pass, current| pass.embed_tokens(current)))
    }

    fn norm_qkv_rope(&mut self, layer: usize, batch: &mut Batch, limit: &Limit) -> Poll<Result<()>> {
        if let Some(stopped) = self.stopped(limit) {
            return stopped;
        }
        Poll::Ready(self.stage(|pass, current| {
            if layer == 0 {
                check_pages_are_own(batch)?;
            }
            pass.project_and_store(current, layer)
        }))
    }

    fn attention(&mut self, layer: usize, _batch: &Batch, _limit: &Limit) -> Poll<Result<()>> {
        Poll::Ready(self.stage(|pass, current| pass.attend(current, layer)))
    }

    fn router(&mut self, layer: usize, _batch: &Batch, _limit: &Limit) -> Poll<Result<()>> {
        Poll::Ready(self.stage(|pass, current| pass.choose_experts(current, layer)))
    }

    fn experts(&mut self, layer: usize, _batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        Poll::Ready(self.stage(|pass, current| {
            pass.run_experts(current, layer)?;
            pass.pace(current, limit)
        }))
    }

    fn head(&mut self, _batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        // As many scored tokens at a time as there are rows of logits.
        while self.scored < self.shape.scored.len() {
            if let Some(stopped) = self.stopped(limit) {
                return stopped;
            }
            self.stage(|pass, current| {
                pass.score(current)?;
                pass.pace(current, limit)
            })?;
        }
        if let Some(stopped) = self.stopped(limit) {
            return stopped;
        }
        self.stage(|pass, current| pass.fetch_results(current))?;
        limit.note_work();
        Poll::Ready(Ok(()))
    }

    fn logits(&self, sequence: usize) -> Option<&[f32]> {
        let vocab_size = self.shared.config.vocab_size;
        let row = (*self.shape.logit_rows.get(sequence)?)? as usize;
        Some(&self.workspace.results().logits()[row * vocab_size..(row + 1) * vocab_size])
    }

    fn log_probability(&self, token: usize) -> f32 {
        let scored = self.shape.scored_index(token);
        scored.map_or(0.0, |index| self.workspace.results().log_probabilities()[index])
    }

    fn hidden_state(&self, token: usize, out: &mut [f32]) -> Result<()> {
        let hidden = match self.hidden.get() {
            Some(hidden) => hidden,
            None => {
                let fetched = self.fetch_hidden()?;
                self.hidden.get_or_init(|| fetched)
            }
        };
        let (stride, hidden_size) = (self.workspace.parts.normed.stride, self.shared.config.hidden_size);
        out.copy_from_slice(&hidden[token * stride..token * stride + hidden_size]);
        Ok(())
    }

    fn routes(&self, layer: usize, token: usize) -> Routes<'_> {
        let top_k = self.shared.config.num_experts_per_tok;
        let (experts, weights) = self.workspace.results().routes(self.choices());
        let at = (layer * self.shape.tokens + token) * top_k;
        Routes { experts: &experts[at..at + top_k], weights: &weights[at..at + top_k] }
    }

    fn touched_experts(&self, layer: usize) -> usize {
        let of_layer = self.shape.tokens * self.shared.config.num_experts_per_tok;
        count_touched(&self.workspace.results().routes(self.choices()).0[layer * of_layer..(layer + 1) * of_layer])
    }

    fn bytes(&self) -> usize {
        self.workspace.bytes()
    }
}

impl Drop for CudaPass {
    fn drop(&mut self) {
        let _ = self.settle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_wanted_as_the_weights_meet_them() {
        let wanted = |formats: &[Format], tensor| Wanted::new(formats.iter().copied(), tensor);
        let found = wanted(&[Format::Bf16, Format::INT4, Format::F32], true);
        assert_eq!(found, Wanted { integers: true, halves: Some(Format::Bf16), tensor: true });
        let uses = |wanted: Wanted| [0, 1, 2, 3, 4].map(|kind| wanted.uses_tensor(kind));
        assert_eq!(uses(found), [false, true, false, true, true]);
        // Halves of one format alone.
        assert_eq!(uses(wanted(&[Format::F16, Format::Bf16], true)), [false, false, false, true, true]);
        assert_eq!(wanted(&[Format::F16, Format::F16], true).halves_are_f16(), 1);
        let few = wanted(&[Format::F16, Format::INT8], false);
        assert_eq!((few.integers, few.halves, uses(few)), (true, None, [false; 5]));
        assert!(!wanted(&[Format::F32, Format::Bf16], false).is_something());
    }

    #[test]
    fn attention_is_split_where_blocks_are_few_and_spans_are_many() {
        // (tokens, positions) and the splits of 16 heads on 132 multiprocessors.
        for (tokens, longest, splits) in [(1, 1, 1), (1, 256, 1), (1, 257, 2), (1, 8192, 32), (1, 100_000, 33)] {
            assert_eq!(splits_of(tokens, 16, longest, 132), splits, "{tokens} tokens, {longest} positions");
        }
        for (tokens, longest, splits) in [(4, 8192, 9), (16, 8192, 3), (17, 8192, 1), (512, 8192, 1)] {
            assert_eq!(splits_of(tokens, 16, longest, 132), splits, "{tokens} tokens, {longest} positions");
        }
    }
}
