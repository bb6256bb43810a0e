// What kernels are given. Generated from src/backend/cuda/arguments.rs by cbindgen; `make header` writes it.
// The fixed-width integers come from simt.cuh, which includes this file.

#pragma once

// Candidates of a row of logits, if it has so many.
#define CANDIDATES 256

// Tokens of a part of the vocabulary: what a block looks for candidates in.
#define CANDIDATE_PART 2048

// A weight matrix `[rows, columns]` in the layout of `quant/panels.rs`, with pairs of columns in f16 as in bf16: panel p
// has `columns / columns of a line` lines of 64 bytes, each `[16 rows]` words of four bytes: one f32, two bf16 or f16, four
// int8 plus 128, or eight int4 plus 8 (low halves first, columns 0 to 3, then 4 to 7). Scales are `[panels][groups][16 rows]`.
struct MatrixArguments {
    const uint8_t *lines;
    // Null in formats without.
    const uint8_t *scales;
    uint32_t rows;
    // Columns, filled up with zeros to whole lines and groups.
    uint32_t columns;
    // A group of weights has `32 << group_shift` columns.
    uint32_t group_shift;
    // Whether scales are f16; else they are bf16.
    uint32_t half_scales;
};

// `embed`: `x[token] = E[id] * scale`. A block a token.
struct EmbedArguments {
    struct MatrixArguments embedding;
    // 0 f32, 1 bf16, 2 f16, 3 int8, 4 int4.
    uint32_t format;
    float scale;
    // `[tokens]`: ids.
    const uint32_t *tokens;
    // `[tokens, hidden_size]`
    float *x;
    uint32_t hidden_size;
};

// A block of 32 columns of one token in int8: each is its whole number times `scale`.
struct BlockArguments {
    float scale;
    // Of the whole numbers.
    int32_t sum;
};

// `norm`: RMSNorm of rows, `x / sqrt(mean(x^2) + eps) * (1 + weight)`, as f32 and, where asked for, in int8 and in
// bf16 or f16. A block a row.
struct NormArguments {
    // `[any, columns]`
    const float *x;
    // The row of x of each row of the result; null where they are the same.
    const uint32_t *index;
    // `[columns]`, without the 1.
    const float *weight;
    // `[rows, stride]`; the columns past the real ones stay as they are.
    float *numbers;
    // `[rows, stride / 4]`, or null.
    uint32_t *integers;
    // `[rows, stride / 32]`
    struct BlockArguments *blocks;
    // `[rows, stride]`, or null.
    uint16_t *halves;
    double eps;
    uint32_t columns;
    uint32_t stride;
    // Whether halves are f16; else they are bf16.
    uint32_t halves_are_f16;
};

// `round_activations`: rows of f32 to int8, a scale for each 32 columns: absmax / 127, to nearest, ties to even; and to
// bf16 or f16, to nearest, ties to even; the rules of `cpu/kernels/store.rs`, bit for bit. A block a row, the y
// coordinate a part of it.
struct RoundArguments {
    // `[rows, stride]`
    const float *numbers;
    // `[rows, stride / 4]`, or null.
    uint32_t *integers;
    // `[rows, stride / 32]`
    struct BlockArguments *blocks;
    // `[rows, stride]`, or null.
    uint16_t *halves;
    uint32_t stride;
    // Whether halves are f16; else they are bf16.
    uint32_t halves_are_f16;
    // How many rows there are, on the device; null where the grid says it. Blocks past it do nothing.
    const uint32_t *rows;
};

// Activations that meet weights: rows of `stride` columns, a multiple of 128, zeros past the real ones. Formats without
// scales take `numbers`, or on tensor cores `halves`, those with scales `integers` and `blocks`.
struct ActivationArguments {
    // `[rows, stride]`
    const float *numbers;
    // `[rows, stride / 4]`: four int8 a word.
    const uint32_t *integers;
    // `[rows, stride / 32]`
    const struct BlockArguments *blocks;
    // `[rows, stride]`: bf16 where weights are, f16 where they are.
    const uint16_t *halves;
    // The row of each token; null where token i is row i.
    const uint32_t *index;
    uint32_t stride;
};

// `matmul_<format>_<tokens>`: `out[token][row] = weights[row] . x[token]` for up to three matrices of one format and one number
// of columns. A block of 128 threads a panel (those of all matrices after each other); the y coordinate is the tile of tokens.
// `matmul_tensor_<format>`: the same on tensor cores, in all formats but f32. Grid (tiles of 64 tokens, eights of
// panels, each matrix's rounded up, those of all matrices after each other), 128 threads.
struct MatmulArguments {
    struct MatrixArguments weights[3];
    // `[tokens, out_stride]` each.
    float *out[3];
    uint32_t out_stride[3];
    // Matrices there are.
    uint32_t count;
    struct ActivationArguments x;
    uint32_t tokens;
    // Whether results are added to what is in `out`.
    uint32_t accumulate;
};

// Where a token stands.
struct PlaceArguments {
    // Its position in its sequence.
    uint32_t position;
    // Which sequence of the batch it is in.
    uint32_t sequence;
    // Index into the page table of its sequence's first page.
    uint32_t first_page;
    // How its sequence's keys and values are stored: 0 f32, 1 bf16, 2 f16, 3 int8.
    uint32_t kv_dtype;
};

// What the layout of a page (`backend/kv.rs`) depends on.
struct CacheArguments {
    // The page table: addresses of pages, sequence after sequence.
    uint8_t *const *pages;
    uint32_t layers;
    // num_key_value_heads
    uint32_t key_value_heads;
    uint32_t head_dim;
    // Positions in a page.
    uint32_t page_tokens;
};

// `rotate_and_store`: RoPE on queries and keys in place, then keys and values to their place in the pages. A block a token.
struct RotateArguments {
    // `[tokens, heads * head_dim]`
    float *query;
    // `[tokens, key_value_heads * head_dim]`
    float *key;
    // As key.
    const float *value;
    // `[head_dim / 2]`: radians per position.
    const float *frequencies;
    // `[tokens]`
    const struct PlaceArguments *places;
    struct CacheArguments cache;
    uint32_t layer;
    // num_attention_heads
    uint32_t heads;
};

// Consecutive tokens of one sequence whose attention is made together, on tensor cores.
struct TileArguments {
    // The first one's row in the batch.
    uint32_t first;
    // 1 to 64.
    uint32_t count;
};

// `attention`: causal attention of one head of one token over its sequence's pages, an online softmax over spans of 256
// positions: `softmax(q . k / sqrt(head_dim)) v`. Grid (tokens, heads, splits). With one split a block goes through all
// spans and writes `attended`; with more, block z takes the spans z, z + splits ... each on its own, writes their states to
// `partial`, and `attention_merge` joins them in the order of the spans, which one split does too: the same bits.
// `attention_tensor_<dtype>`: the same on tensor cores for tiles of up to 64 tokens, whose keys and values are bf16, f16
// or int8, with a head_dim that is a multiple of 8, 256 at most. Grid (heads, tiles), 128 threads.
struct AttentionArguments {
    // `[tokens, heads * head_dim]`
    const float *query;
    // `[tokens]`
    const struct PlaceArguments *places;
    // The row of each token that `attention` is for; null where token i is row i.
    const uint32_t *index;
    // What `attention_tensor_<dtype>` is for: `[tiles]`, all of its dtype.
    const struct TileArguments *tiles;
    struct CacheArguments cache;
    // `[tokens, heads, spans, head_dim + 2]`: weighted values, largest score, sum of weights of one span.
    float *partial;
    // `[tokens, stride]`
    float *attended;
    uint32_t stride;
    // Spans that there is room for in `partial`; 0 where there is one split.
    uint32_t spans;
    uint32_t layer;
    uint32_t heads;
};

// `route`: router logits, softmax over the allowed experts, the top k and their weights, all in f64 from the logits on; the lower
// index where two are equal, the rules of `cpu/routing.rs`. A block a token.
struct RouteArguments {
    // In f32; lines are null in a dense model, whose only expert is taken.
    struct MatrixArguments router;
    // `[tokens, stride]`
    const float *normed;
    const struct PlaceArguments *places;
    // `[sequences, layers]`: a bit for each expert that may be chosen.
    const uint64_t *allowed;
    // `[sequences, layers, experts]`: added to the logits.
    const float *bias;
    // `[tokens, top_k]` of this layer: experts, highest weight first; 0xffffffff where fewer are allowed.
    uint32_t *chosen;
    // As chosen: weights, which sum to 1.
    float *weights;
    // As chosen: before they are rounded.
    double *exact_weights;
    uint32_t stride;
    uint32_t layer;
    uint32_t layers;
    uint32_t experts;
    uint32_t top_k;
};

// `group`: the choices of a layer by expert: count, prefix sum, scatter; an expert's tokens in rising order. One block.
struct GroupArguments {
    // `[tokens, top_k]`
    const uint32_t *chosen;
    // `[tokens, top_k]`: the slot of each choice.
    uint32_t *slots;
    // `[tokens * top_k]`: the token of each slot.
    uint32_t *slot_tokens;
    // `[experts + 1]`: expert e has the slots `starts[e]..starts[e + 1]`.
    uint32_t *starts;
    uint32_t tokens;
    uint32_t top_k;
    uint32_t experts;
};

// `gate_up_<format>_<tokens>` and `down_<format>_<tokens>`: products with the weights of the experts that slots were sent to.
// `gate_up`: `out[slot] = gelu(gate x) * (up x)`, x being the row of the slot's token (`x.index`); `down`: `out[slot] = down x[slot]`.
// Grid (panels, experts of the format); a block of 128 threads goes through its expert's slots, a tile of tokens at a time, and leaves
// at once where there are none.
// `gate_up_tensor_<format>` and `down_tensor_<format>`: the same on tensor cores, in all formats but f32. Grid (tiles of
// 64 slots that one expert may have, eights of panels, experts of the format), 256 threads for `gate_up` and 128 for
// `down`; a block past its expert's slots leaves at once.
struct ExpertArguments {
    // `[experts]`: gate or down.
    const struct MatrixArguments *weights;
    // `[experts]`: up; null for `down`.
    const struct MatrixArguments *up;
    // The experts of this format; null where all are.
    const uint32_t *selected;
    struct ActivationArguments x;
    // `[experts + 1]`
    const uint32_t *starts;
    // `[slots, out_stride]`
    float *out;
    uint32_t out_stride;
    // GeLU by its definition instead of the tanh approximation.
    uint32_t exact_gelu;
};

// `combine`: `x[token] += sum of weight * projected` over the token's slots in the order of the weights, in f64, rounded once. A
// block a token.
struct CombineArguments {
    // `[slots, hidden_size]`
    const float *projected;
    // `[tokens, top_k]`
    const uint32_t *slots;
    // `[tokens, top_k]`
    const uint32_t *chosen;
    // `[tokens, top_k]`
    const double *exact_weights;
    // `[tokens, hidden_size]`
    float *x;
    uint32_t hidden_size;
    uint32_t top_k;
};

// `log_softmax_at`: the log-probability of each row's target; NaN where the largest logit is not finite, and a logit that is not a
// number counts as minus infinity. A block a row.
struct LogSoftmaxArguments {
    // `[rows, vocab_size]`
    const float *logits;
    // `[rows]`
    const uint32_t *targets;
    // `[rows]`
    float *out;
    uint32_t vocab_size;
};

// `select_candidates` and `merge_candidates`: of each row of logits the largest, CANDIDATES of them, in the order of the sampler:
// higher logits first, lower ids among equals; a logit that is not a number or minus infinity is none. And of each part of the
// vocabulary the sum of `e^(logit - the row's largest)`, in f64. The first also copies the rows. Grids (parts, rows) and
// (1 + parts, rows): there the first block of a row has its candidates, each other one a part's sum.
struct CandidateArguments {
    // `[rows, vocab_size]`
    const float *logits;
    // `[rows]`: where each row is copied to, `[vocab_size]`.
    float *const *copies;
    // `[rows, parts, CANDIDATES]`: candidates of a part, each as one number; 0 where it has fewer.
    uint64_t *of_parts;
    // `[rows, parts + CANDIDATES]`: a row's sums, `[parts]` f64, its tokens, `[CANDIDATES]` u32, 0xffffffff past the last, and
    // their logits, `[CANDIDATES]` f32. Sums are 0 where the largest logit is not finite.
    uint64_t *results;
    uint32_t vocab_size;
};

// `training_product_<format>`: `out[t] += W x[t]`, and `training_product_gradient_<format>`: `out[t] += gradient[t] W`; of
// one matrix, or of each expert's with its slots. Weights count as the f32 they stand for. Grid (tiles of 64 tokens, or of
// slots that one expert may have; tiles of 64 outputs, or inputs; experts of the format, or 1), 256 threads.
struct TrainingProductArguments {
    // `[any, inputs]`, where there are no experts.
    struct MatrixArguments weights;
    // `[experts]`, or null.
    const struct MatrixArguments *experts;
    // The experts of this format; null where all are.
    const uint32_t *selected;
    // `[experts + 1]`
    const uint32_t *starts;
    // `[tokens, inputs]`, or the gradient `[tokens, outputs]`.
    const float *x;
    // `[tokens, outputs]`, or `[tokens, inputs]`.
    float *out;
    // Rows of x and out, where there are no experts.
    uint32_t tokens;
    uint32_t inputs;
    // The first row of the matrix that takes part, and how many do.
    uint32_t first;
    uint32_t outputs;
};

// `training_multiply`: `out = a b` for several matrices, a `[rows, depth]`, b `[depth, columns]`. Of a and b either rows or columns
// are 1 apart. Grid (tiles of 64 rows, tiles of 64 columns, matrices), 256 threads.
struct TrainingMultiplyArguments {
    const float *a;
    const float *b;
    float *out;
    // Numbers from one matrix to the next.
    uint32_t a_next;
    uint32_t b_next;
    uint32_t out_next;
    // How many consecutive matrices a share a matrix b.
    uint32_t shared_by;
    // Numbers from a row to the next, from a column to the next.
    uint32_t a_row;
    uint32_t a_column;
    uint32_t b_row;
    uint32_t b_column;
    uint32_t out_row;
    uint32_t rows;
    uint32_t columns;
    uint32_t depth;
    // Whether results are added to what is in `out`.
    uint32_t accumulate;
};

// `training_softmax`: scores of consecutive queries of a document become weights; `training_softmax_gradient`: scores become
// weights once more, and weights' gradients those of scores. Grid (queries, heads).
struct TrainingSoftmaxArguments {
    // `[heads, queries, keys]`, not yet scaled.
    float *scores;
    // As scores; of the gradient alone.
    float *gradients;
    // `[queries, heads]`: the logarithm of the sum of all e^score.
    float *log_sums;
    // `[queries, heads * head_dim]`: what attention gave, and its gradient; of the gradient alone.
    const float *out;
    const float *out_gradient;
    float scale;
    // Place of the first query in its document: it sees so many keys and its own.
    uint32_t first;
    uint32_t queries;
    uint32_t keys;
    uint32_t heads;
    uint32_t head_dim;
};

// `training_log_sum` and `training_logit_gradient`: of logits of a part of the vocabulary. A block a row.
struct TrainingLogitArguments {
    // `[rows, width]`: of tokens `first` and on.
    float *logits;
    // `[rows]`
    const uint32_t *targets;
    // `[rows]`, of log-probabilities; of the gradient alone.
    const float *gradients;
    // `[rows, 3]`: of the parts before, the largest logit, the sum of e^(logit - largest), and the target's logit or 0.
    double *sums;
    // `[rows, 2]`: the logarithm of the sum of all e^logit so far, the target's log-probability.
    float *results;
    uint32_t first;
    uint32_t width;
};

// `training_norm_gradient`: adds to `out` the gradient of x where that of its norm is given. A block a row.
struct TrainingNormArguments {
    // `[rows, columns]`
    const float *x;
    // `[columns]`, without the 1.
    const float *weight;
    // As x.
    const float *gradient;
    // As x.
    float *out;
    double eps;
    uint32_t columns;
};

// `training_rotate`: RoPE on heads in place, or its inverse. A block a token.
struct TrainingRotateArguments {
    // `[tokens, columns]`, heads of head_dim.
    float *heads;
    // `[tokens]`
    const uint32_t *positions;
    // `[positions, head_dim / 2]` each.
    const float *cosines;
    const float *sines;
    uint32_t columns;
    uint32_t head_dim;
    uint32_t back;
};

// `training_gather`: `out[slot] = weight from[token]`, and `training_combine`: `out[token] += sum of weight from[slot]`. A
// block a row of `out`.
struct TrainingSlotArguments {
    // `[tokens, columns]`, or `[slots, columns]`.
    const float *from;
    // `[slots]`: tokens of slots; or `[tokens, choices]`: slots of tokens, 0xffffffff where there are fewer.
    const uint32_t *index;
    // `[slots]`, or null: all are 1.
    const float *weights;
    // `[slots, columns]`, or `[tokens, columns]`.
    float *out;
    uint32_t columns;
    // Of `training_combine` alone.
    uint32_t choices;
};

// `training_row_products`: `out[row] = <a[row], b[row]>`. A block a row.
struct TrainingRowProductArguments {
    // `[rows, columns]` each.
    const float *a;
    const float *b;
    // `[rows]`
    float *out;
    uint32_t columns;
};

// `training_geglu`: `out = gelu(gate) * up`; `training_geglu_gradient`: gate and up become their gradients. A block a row.
struct TrainingGegluArguments {
    // `[rows, columns]` each.
    float *gate;
    float *up;
    // Of the result; of the gradient alone.
    const float *gradient;
    // Of `training_geglu` alone.
    float *out;
    uint32_t columns;
    // GeLU by its definition instead of the tanh approximation.
    uint32_t exact_gelu;
};

// `fill`, of the bench: random words, see `kernels/bench.cu`.
struct FillArguments {
    // `[words]`
    uint32_t *to;
    uint64_t words;
    // What they are: 0 bits, 1 numbers in f32, 2 in bf16, 3 in f16, 4 scales of groups in bf16, 5 in f16.
    uint32_t content;
    uint32_t seed;
    float scale;
    // Of the grid.
    uint32_t blocks;
};

// `read`, of the bench: every byte once.
struct ReadArguments {
    const uint8_t *from;
    // Times sixteen bytes.
    uint64_t count;
    // `[blocks]`: the exclusive or of all words that a block read.
    uint32_t *seen;
    // Of the grid.
    uint32_t blocks;
};

// `mma_rate_bf16` and `mma_rate_int8`, of the bench: products on tensor cores from and to registers.
struct MmaRateArguments {
    // `[blocks * 256]`: a sum of all that a thread has.
    float *out;
    // Each of eight products a warp.
    uint32_t rounds;
    // Of the factors; where it is 0 all are 1.
    uint32_t seed;
};
