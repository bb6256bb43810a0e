//! What each kernel is given: one struct by value, the same bytes in Rust and in CUDA C++. `kernels/arguments.h` is
//! generated from this file (`make header`), so sizes and layouts are said once.
//!
//! Pointers are addresses on the device. Counts are below 2^32, products of them are taken in 64 bits.

#![allow(missing_debug_implementations)] // Addresses on a device say nothing.

/// A weight matrix `[rows, columns]` in the layout of `quant/panels.rs`, with pairs of columns in f16 as in bf16: panel p
/// has `columns / columns of a line` lines of 64 bytes, each `[16 rows]` words of four bytes: one f32, two bf16 or f16, four
/// int8 plus 128, or eight int4 plus 8 (low halves first, columns 0 to 3, then 4 to 7). Scales are `[panels][groups][16 rows]`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MatrixArguments {
    pub lines: *const u8,
    /// Null in formats without.
    pub scales: *const u8,
    pub rows: u32,
    /// Columns, filled up with zeros to whole lines and groups.
    pub columns: u32,
    /// A group of weights has `32 << group_shift` columns.
    pub group_shift: u32,
    /// Whether scales are f16; else they are bf16.
    pub half_scales: u32,
}

/// A block of 32 columns of one token in int8: each is its whole number times `scale`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct BlockArguments {
    pub scale: f32,
    /// Of the whole numbers.
    pub sum: i32,
}

/// Activations that meet weights: rows of `stride` columns, a multiple of 128, zeros past the real ones. Formats without
/// scales take `numbers`, or on tensor cores `halves`, those with scales `integers` and `blocks`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ActivationArguments {
    /// `[rows, stride]`
    pub numbers: *const f32,
    /// `[rows, stride / 4]`: four int8 a word.
    pub integers: *const u32,
    /// `[rows, stride / 32]`
    pub blocks: *const BlockArguments,
    /// `[rows, stride]`: bf16 where weights are, f16 where they are.
    pub halves: *const u16,
    /// The row of each token; null where token i is row i.
    pub index: *const u32,
    pub stride: u32,
}

/// Where a token stands.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlaceArguments {
    /// Its position in its sequence.
    pub position: u32,
    /// Which sequence of the batch it is in.
    pub sequence: u32,
    /// Index into the page table of its sequence's first page.
    pub first_page: u32,
    /// How its sequence's keys and values are stored: 0 f32, 1 bf16, 2 f16, 3 int8.
    pub kv_dtype: u32,
}

/// Consecutive tokens of one sequence whose attention is made together, on tensor cores.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileArguments {
    /// The first one's row in the batch.
    pub first: u32,
    /// 1 to 64.
    pub count: u32,
}

/// What the layout of a page (`backend/kv.rs`) depends on.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CacheArguments {
    /// The page table: addresses of pages, sequence after sequence.
    pub pages: *const *mut u8,
    pub layers: u32,
    /// num_key_value_heads
    pub key_value_heads: u32,
    pub head_dim: u32,
    /// Positions in a page.
    pub page_tokens: u32,
}

/// `embed`: `x[token] = E[id] * scale`. A block a token.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct EmbedArguments {
    pub embedding: MatrixArguments,
    /// 0 f32, 1 bf16, 2 f16, 3 int8, 4 int4.
    pub format: u32,
    pub scale: f32,
    /// `[tokens]`: ids.
    pub tokens: *const u32,
    /// `[tokens, hidden_size]`
    pub x: *mut f32,
    pub hidden_size: u32,
}

/// `norm`: RMSNorm of rows, `x / sqrt(mean(x^2) + eps) * (1 + weight)`, as f32 and, where asked for, in int8 and in
/// bf16 or f16. A block a row.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NormArguments {
    /// `[any, columns]`
    pub x: *const f32,
    /// The row of x of each row of the result; null where they are the same.
    pub index: *const u32,
    /// `[columns]`, without the 1.
    pub weight: *const f32,
    /// `[rows, stride]`; the columns past the real ones stay as they are.
    pub numbers: *mut f32,
    /// `[rows, stride / 4]`, or null.
    pub integers: *mut u32,
    /// `[rows, stride / 32]`
    pub blocks: *mut BlockArguments,
    /// `[rows, stride]`, or null.
    pub halves: *mut u16,
    pub eps: f64,
    pub columns: u32,
    pub stride: u32,
    /// Whether halves are f16; else they are bf16.
    pub halves_are_f16: u32,
}

/// `round_activations`: rows of f32 to int8, a scale for each 32 columns: absmax / 127, to nearest, ties to even; and to
/// bf16 or f16, to nearest, ties to even; the rules of `cpu/kernels/store.rs`, bit for bit. A block a row, the y
/// coordinate a part of it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RoundArguments {
    /// `[rows, stride]`
    pub numbers: *const f32,
    /// `[rows, stride / 4]`, or null.
    pub integers: *mut u32,
    /// `[rows, stride / 32]`
    pub blocks: *mut BlockArguments,
    /// `[rows, stride]`, or null.
    pub halves: *mut u16,
    pub stride: u32,
    /// Whether halves are f16; else they are bf16.
    pub halves_are_f16: u32,
    /// How many rows there are, on the device; null where the grid says it. Blocks past it do nothing.
    pub rows: *const u32,
}

/// `matmul_<format>_<tokens>`: `out[token][row] = weights[row] . x[token]` for up to three matrices of one format and one number
/// of columns. A block of 128 threads a panel (those of all matrices after each other); the y coordinate is the tile of tokens.
/// `matmul_tensor_<format>`: the same on tensor cores, in all formats but f32. Grid (tiles of 64 tokens, eights of
/// panels, each matrix's rounded up, those of all matrices after each other), 128 threads.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MatmulArguments {
    pub weights: [MatrixArguments; 3],
    /// `[tokens, out_stride]` each.
    pub out: [*mut f32; 3],
    pub out_stride: [u32; 3],
    /// Matrices there are.
    pub count: u32,
    pub x: ActivationArguments,
    pub tokens: u32,
    /// Whether results are added to what is in `out`.
    pub accumulate: u32,
}

/// `rotate_and_store`: RoPE on queries and keys in place, then keys and values to their place in the pages. A block a token.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RotateArguments {
    /// `[tokens, heads * head_dim]`
    pub query: *mut f32,
    /// `[tokens, key_value_heads * head_dim]`
    pub key: *mut f32,
    /// As key.
    pub value: *const f32,
    /// `[head_dim / 2]`: radians per position.
    pub frequencies: *const f32,
    /// `[tokens]`
    pub places: *const PlaceArguments,
    pub cache: CacheArguments,
    pub layer: u32,
    /// num_attention_heads
    pub heads: u32,
}

/// `attention`: causal attention of one head of one token over its sequence's pages, an online softmax over spans of 256
/// positions: `softmax(q . k / sqrt(head_dim)) v`. Grid (tokens, heads, splits). With one split a block goes through all
/// spans and writes `attended`; with more, block z takes the spans z, z + splits ... each on its own, writes their states to
/// `partial`, and `attention_merge` joins them in the order of the spans, which one split does too: the same bits.
/// `attention_tensor_<dtype>`: the same on tensor cores for tiles of up to 64 tokens, whose keys and values are bf16, f16
/// or int8, with a head_dim that is a multiple of 8, 256 at most. Grid (heads, tiles), 128 threads.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct AttentionArguments {
    /// `[tokens, heads * head_dim]`
    pub query: *const f32,
    /// `[tokens]`
    pub places: *const PlaceArguments,
    /// The row of each token that `attention` is for; null where token i is row i.
    pub index: *const u32,
    /// What `attention_tensor_<dtype>` is for: `[tiles]`, all of its dtype.
    pub tiles: *const TileArguments,
    pub cache: CacheArguments,
    /// `[tokens, heads, spans, head_dim + 2]`: weighted values, largest score, sum of weights of one span.
    pub partial: *mut f32,
    /// `[tokens, stride]`
    pub attended: *mut f32,
    pub stride: u32,
    /// Spans that there is room for in `partial`; 0 where there is one split.
    pub spans: u32,
    pub layer: u32,
    pub heads: u32,
}

/// `route`: router logits, softmax over the allowed experts, the top k and their weights, all in f64 from the logits on; the lower
/// index where two are equal, the rules of `cpu/routing.rs`. A block a token.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct RouteArguments {
    /// In f32; lines are null in a dense model, whose only expert is taken.
    pub router: MatrixArguments,
    /// `[tokens, stride]`
    pub normed: *const f32,
    pub places: *const PlaceArguments,
    /// `[sequences, layers]`: a bit for each expert that may be chosen.
    pub allowed: *const u64,
    /// `[sequences, layers, experts]`: added to the logits.
    pub bias: *const f32,
    /// `[tokens, top_k]` of this layer: experts, highest weight first; 0xffffffff where fewer are allowed.
    pub chosen: *mut u32,
    /// As chosen: weights, which sum to 1.
    pub weights: *mut f32,
    /// As chosen: before they are rounded.
    pub exact_weights: *mut f64,
    pub stride: u32,
    pub layer: u32,
    pub layers: u32,
    pub experts: u32,
    pub top_k: u32,
}

/// `group`: the choices of a layer by expert: count, prefix sum, scatter; an expert's tokens in rising order. One block.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GroupArguments {
    /// `[tokens, top_k]`
    pub chosen: *const u32,
    /// `[tokens, top_k]`: the slot of each choice.
    pub slots: *mut u32,
    /// `[tokens * top_k]`: the token of each slot.
    pub slot_tokens: *mut u32,
    /// `[experts + 1]`: expert e has the slots `starts[e]..starts[e + 1]`.
    pub starts: *mut u32,
    pub tokens: u32,
    pub top_k: u32,
    pub experts: u32,
}

/// `gate_up_<format>_<tokens>` and `down_<format>_<tokens>`: products with the weights of the experts that slots were sent to.
/// `gate_up`: `out[slot] = gelu(gate x) * (up x)`, x being the row of the slot's token (`x.index`); `down`: `out[slot] = down x[slot]`.
/// Grid (panels, experts of the format); a block of 128 threads goes through its expert's slots, a tile of tokens at a time, and leaves
/// at once where there are none.
/// `gate_up_tensor_<format>` and `down_tensor_<format>`: the same on tensor cores, in all formats but f32. Grid (tiles of
/// 64 slots that one expert may have, eights of panels, experts of the format), 256 threads for `gate_up` and 128 for
/// `down`; a block past its expert's slots leaves at once.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ExpertArguments {
    /// `[experts]`: gate or down.
    pub weights: *const MatrixArguments,
    /// `[experts]`: up; null for `down`.
    pub up: *const MatrixArguments,
    /// The experts of this format; null where all are.
    pub selected: *const u32,
    pub x: ActivationArguments,
    /// `[experts + 1]`
    pub starts: *const u32,
    /// `[slots, out_stride]`
    pub out: *mut f32,
    pub out_stride: u32,
    /// GeLU by its definition instead of the tanh approximation.
    pub exact_gelu: u32,
}

/// `combine`: `x[token] += sum of weight * projected` over the token's slots in the order of the weights, in f64, rounded once. A
/// block a token.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CombineArguments {
    /// `[slots, hidden_size]`
    pub projected: *const f32,
    /// `[tokens, top_k]`
    pub slots: *const u32,
    /// `[tokens, top_k]`
    pub chosen: *const u32,
    /// `[tokens, top_k]`
    pub exact_weights: *const f64,
    /// `[tokens, hidden_size]`
    pub x: *mut f32,
    pub hidden_size: u32,
    pub top_k: u32,
}

/// `log_softmax_at`: the log-probability of each row's target; NaN where the largest logit is not finite, and a logit that is not a
/// number counts as minus infinity. A block a row.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct LogSoftmaxArguments {
    /// `[rows, vocab_size]`
    pub logits: *const f32,
    /// `[rows]`
    pub targets: *const u32,
    /// `[rows]`
    pub out: *mut f32,
    pub vocab_size: u32,
}

/// Candidates of a row of logits, if it has so many.
pub const CANDIDATES: u32 = 256;

/// Tokens of a part of the vocabulary: what a block looks for candidates in.
pub const CANDIDATE_PART: u32 = 2048;

/// `select_candidates` and `merge_candidates`: of each row of logits the largest, CANDIDATES of them, in the order of the sampler:
/// higher logits first, lower ids among equals; a logit that is not a number or minus infinity is none. And of each part of the
/// vocabulary the sum of `e^(logit - the row's largest)`, in f64. The first also copies the rows. Grids (parts, rows) and
/// (1 + parts, rows): there the first block of a row has its candidates, each other one a part's sum.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct CandidateArguments {
    /// `[rows, vocab_size]`
    pub logits: *const f32,
    /// `[rows]`: where each row is copied to, `[vocab_size]`.
    pub copies: *const *mut f32,
    /// `[rows, parts, CANDIDATES]`: candidates of a part, each as one number; 0 where it has fewer.
    pub of_parts: *mut u64,
    /// `[rows, parts + CANDIDATES]`: a row's sums, `[parts]` f64, its tokens, `[CANDIDATES]` u32, 0xffffffff past the last, and
    /// their logits, `[CANDIDATES]` f32. Sums are 0 where the largest logit is not finite.
    pub results: *mut u64,
    pub vocab_size: u32,
}

/// `training_product_<format>`: `out[t] += W x[t]`, and `training_product_gradient_<format>`: `out[t] += gradient[t] W`; of
/// one matrix, or of each expert's with its slots. Weights count as the f32 they stand for. Grid (tiles of 64 tokens, or of
/// slots that one expert may have; tiles of 64 outputs, or inputs; experts of the format, or 1), 256 threads.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingProductArguments {
    /// `[any, inputs]`, where there are no experts.
    pub weights: MatrixArguments,
    /// `[experts]`, or null.
    pub experts: *const MatrixArguments,
    /// The experts of this format; null where all are.
    pub selected: *const u32,
    /// `[experts + 1]`
    pub starts: *const u32,
    /// `[tokens, inputs]`, or the gradient `[tokens, outputs]`.
    pub x: *const f32,
    /// `[tokens, outputs]`, or `[tokens, inputs]`.
    pub out: *mut f32,
    /// Rows of x and out, where there are no experts.
    pub tokens: u32,
    pub inputs: u32,
    /// The first row of the matrix that takes part, and how many do.
    pub first: u32,
    pub outputs: u32,
}

/// `training_multiply`: `out = a b` for several matrices, a `[rows, depth]`, b `[depth, columns]`. Of a and b either rows or columns
/// are 1 apart. Grid (tiles of 64 rows, tiles of 64 columns, matrices), 256 threads.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingMultiplyArguments {
    pub a: *const f32,
    pub b: *const f32,
    pub out: *mut f32,
    /// Numbers from one matrix to the next.
    pub a_next: u32,
    pub b_next: u32,
    pub out_next: u32,
    /// How many consecutive matrices a share a matrix b.
    pub shared_by: u32,
    /// Numbers from a row to the next, from a column to the next.
    pub a_row: u32,
    pub a_column: u32,
    pub b_row: u32,
    pub b_column: u32,
    pub out_row: u32,
    pub rows: u32,
    pub columns: u32,
    pub depth: u32,
    /// Whether results are added to what is in `out`.
    pub accumulate: u32,
}

/// `training_softmax`: scores of consecutive queries of a document become weights; `training_softmax_gradient`: scores become
/// weights once more, and weights' gradients those of scores. Grid (queries, heads).
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingSoftmaxArguments {
    /// `[heads, queries, keys]`, not yet scaled.
    pub scores: *mut f32,
    /// As scores; of the gradient alone.
    pub gradients: *mut f32,
    /// `[queries, heads]`: the logarithm of the sum of all e^score.
    pub log_sums: *mut f32,
    /// `[queries, heads * head_dim]`: what attention gave, and its gradient; of the gradient alone.
    pub out: *const f32,
    pub out_gradient: *const f32,
    pub scale: f32,
    /// Place of the first query in its document: it sees so many keys and its own.
    pub first: u32,
    pub queries: u32,
    pub keys: u32,
    pub heads: u32,
    pub head_dim: u32,
}

/// `training_log_sum` and `training_logit_gradient`: of logits of a part of the vocabulary. A block a row.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingLogitArguments {
    /// `[rows, width]`: of tokens `first` and on.
    pub logits: *mut f32,
    /// `[rows]`
    pub targets: *const u32,
    /// `[rows]`, of log-probabilities; of the gradient alone.
    pub gradients: *const f32,
    /// `[rows, 3]`: of the parts before, the largest logit, the sum of e^(logit - largest), and the target's logit or 0.
    pub sums: *mut f64,
    /// `[rows, 2]`: the logarithm of the sum of all e^logit so far, the target's log-probability.
    pub results: *mut f32,
    pub first: u32,
    pub width: u32,
}

/// `training_norm_gradient`: adds to `out` the gradient of x where that of its norm is given. A block a row.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingNormArguments {
    /// `[rows, columns]`
    pub x: *const f32,
    /// `[columns]`, without the 1.
    pub weight: *const f32,
    /// As x.
    pub gradient: *const f32,
    /// As x.
    pub out: *mut f32,
    pub eps: f64,
    pub columns: u32,
}

/// `training_rotate`: RoPE on heads in place, or its inverse. A block a token.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingRotateArguments {
    /// `[tokens, columns]`, heads of head_dim.
    pub heads: *mut f32,
    /// `[tokens]`
    pub positions: *const u32,
    /// `[positions, head_dim / 2]` each.
    pub cosines: *const f32,
    pub sines: *const f32,
    pub columns: u32,
    pub head_dim: u32,
    pub back: u32,
}

/// `training_gather`: `out[slot] = weight from[token]`, and `training_combine`: `out[token] += sum of weight from[slot]`. A
/// block a row of `out`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingSlotArguments {
    /// `[tokens, columns]`, or `[slots, columns]`.
    pub from: *const f32,
    /// `[slots]`: tokens of slots; or `[tokens, choices]`: slots of tokens, 0xffffffff where there are fewer.
    pub index: *const u32,
    /// `[slots]`, or null: all are 1.
    pub weights: *const f32,
    /// `[slots, columns]`, or `[tokens, columns]`.
    pub out: *mut f32,
    pub columns: u32,
    /// Of `training_combine` alone.
    pub choices: u32,
}

/// `training_row_products`: `out[row] = <a[row], b[row]>`. A block a row.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingRowProductArguments {
    /// `[rows, columns]` each.
    pub a: *const f32,
    pub b: *const f32,
    /// `[rows]`
    pub out: *mut f32,
    pub columns: u32,
}

/// `training_geglu`: `out = gelu(gate) * up`; `training_geglu_gradient`: gate and up become their gradients. A block a row.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TrainingGegluArguments {
    /// `[rows, columns]` each.
    pub gate: *mut f32,
    pub up: *mut f32,
    /// Of the result; of the gradient alone.
    pub gradient: *const f32,
    /// Of `training_geglu` alone.
    pub out: *mut f32,
    pub columns: u32,
    /// GeLU by its definition instead of the tanh approximation.
    pub exact_gelu: u32,
}

/// `fill`, of the bench: random words, see `kernels/bench.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct FillArguments {
    /// `[words]`
    pub to: *mut u32,
    pub words: u64,
    /// What they are: 0 bits, 1 numbers in f32, 2 in bf16, 3 in f16, 4 scales of groups in bf16, 5 in f16.
    pub content: u32,
    pub seed: u32,
    pub scale: f32,
    /// Of the grid.
    pub blocks: u32,
}

/// `read`, of the bench: every byte once.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct ReadArguments {
    pub from: *const u8,
    /// Times sixteen bytes.
    pub count: u64,
    /// `[blocks]`: the exclusive or of all words that a block read.
    pub seen: *mut u32,
    /// Of the grid.
    pub blocks: u32,
}

/// `mma_rate_bf16` and `mma_rate_int8`, of the bench: products on tensor cores from and to registers.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct MmaRateArguments {
    /// `[blocks * 256]`: a sum of all that a thread has.
    pub out: *mut f32,
    /// Each of eight products a warp.
    pub rounds: u32,
    /// Of the factors; where it is 0 all are 1.
    pub seed: u32,
}
