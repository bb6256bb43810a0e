// Causal attention over paged keys and values: softmax(q . k / sqrt(head_dim)) v.
//
// In: query [tokens, heads * head_dim] f32, rotated; pages in f32, bf16, f16 or int8, a dtype for each token's
// sequence. Out: attended [tokens, stride] f32.
// A block has one head of one token, and goes over spans of 256 positions. Of each: scores, a few lanes a key (eight
// elements a lane) and so many keys a warp; weights relative to the span's largest score; weighted values, the lanes as
// before, then the lanes of the same columns, then the warps. That is the span's state. States are joined in the order
// of the spans (the one-pass softmax of Milakov and Gimelshein, 2018), by the same function whether one block has all
// spans or several share them: the same bits.
// Moves 2 * positions * head_dim elements a head and token: the least where a token is alone in its sequence and heads
// do not share keys; else more, from the second cache. Partial states are 4 * (head_dim + 2) bytes a span each way.
// Grid (tokens, heads, splits), 128 threads; merge: (tokens, heads), 128. Limit: memory.

#include "math.cuh"
#include "pages.cuh"
#include "reduce.cuh"

constexpr uint32_t THREADS = 128;
constexpr uint32_t WARPS = THREADS / LANES;
constexpr uint32_t SPAN = 256;
constexpr uint32_t POSITIONS = SPAN / THREADS;
// Elements that a lane has side by side, and how often.
constexpr uint32_t ELEMENTS = 8;
constexpr uint32_t PARTS = MAX_HEAD_DIM / (ELEMENTS * LANES);
// Columns that a thread has of a state.
constexpr uint32_t COLUMNS = MAX_HEAD_DIM / THREADS;
// Rows that a lane has in flight.
constexpr uint32_t DEPTH = 4;

DEVICE float negative_infinity() { return float_of_bits(0xff800000); }

// Eight elements of a row, widened.
struct Eight {
    float of[ELEMENTS];
};

struct KvF32 {
    static DEVICE Eight eight(const uint8_t *from) {
        Words low = load_words(from), high = load_words(from + 16);
        Eight numbers;
        for (uint32_t i = 0; i < 4; i++) {
            numbers.of[i] = float_of_bits(low.word[i]);
            numbers.of[4 + i] = float_of_bits(high.word[i]);
        }
        return numbers;
    }
    static DEVICE float one(const uint8_t *row, uint32_t column) {
        return reinterpret_cast<const float *>(row)[column];
    }
    static constexpr uint32_t BYTES = 4;
    static constexpr bool SCALED = false;
};

template <bool BRAIN> struct KvHalves {
    static DEVICE float wide(uint32_t bits) {
        uint16_t half = static_cast<uint16_t>(bits);
        return BRAIN ? bf16_to_float(half) : f16_to_float(half);
    }
    static DEVICE Eight eight(const uint8_t *from) {
        Words words = load_words(from);
        Eight numbers;
        for (uint32_t i = 0; i < ELEMENTS; i++) {
            numbers.of[i] = wide(words.word[i / 2] >> 16 * (i % 2));
        }
        return numbers;
    }
    static DEVICE float one(const uint8_t *row, uint32_t column) {
        return wide(reinterpret_cast<const uint16_t *>(row)[column]);
    }
    static constexpr uint32_t BYTES = 2;
    static constexpr bool SCALED = false;
};

struct KvInt8 {
    static DEVICE Eight eight(const uint8_t *from) {
        uint64_t bytes = *reinterpret_cast<const uint64_t *>(from);
        Eight numbers;
        for (uint32_t i = 0; i < ELEMENTS; i++) {
            numbers.of[i] = static_cast<float>(static_cast<int8_t>(bytes >> 8 * i));
        }
        return numbers;
    }
    static DEVICE float one(const uint8_t *row, uint32_t column) {
        return static_cast<float>(reinterpret_cast<const int8_t *>(row)[column]);
    }
    static constexpr uint32_t BYTES = 1;
    static constexpr bool SCALED = true;
};

// Eight elements from `column` on; zeros past the last.
template <class Kv> DEVICE Eight load_eight(const uint8_t *row, uint32_t column, uint32_t head_dim) {
    // Then rows begin at multiples of eight elements, and end there.
    if (head_dim % ELEMENTS == 0) {
        return Kv::eight(row + column * Kv::BYTES);
    }
    Eight numbers;
    for (uint32_t i = 0; i < ELEMENTS; i++) {
        numbers.of[i] = column + i < head_dim ? Kv::one(row, column + i) : 0.0f;
    }
    return numbers;
}

// What a head has come to: weighted values, of which a thread has the columns t, t + 128 ..., the largest score, and
// the sum of weights. Weights are relative to the largest score.
struct State {
    float values[COLUMNS];
    float largest;
    float sum;
};

DEVICE State nothing_seen() { return State{{}, negative_infinity(), 0.0f}; }

DEVICE void join(State &all, const State &span) {
    float largest = span.largest > all.largest ? span.largest : all.largest;
    float factor = e_to_the(all.largest - largest), span_factor = e_to_the(span.largest - largest);
    for (uint32_t i = 0; i < COLUMNS; i++) {
        all.values[i] = all.values[i] * factor + span.values[i] * span_factor;
    }
    all.sum = all.sum * factor + span.sum * span_factor;
    all.largest = largest;
}

// Of the block's token.
DEVICE size_t row_of_token(const AttentionArguments &arguments) {
    return arguments.index ? arguments.index[block_x()] : block_x();
}

// The result, of the block's token and head.
DEVICE void write_attended(const AttentionArguments &arguments, const State &all) {
    uint32_t head_dim = arguments.cache.head_dim;
    float *attended = arguments.attended + row_of_token(arguments) * arguments.stride + block_y() * head_dim;
    float norm = 1.0f / all.sum;
    for (uint32_t i = 0; i < COLUMNS; i++) {
        uint32_t column = thread_index() + i * THREADS;
        if (column < head_dim) {
            attended[column] = all.values[i] * norm;
        }
    }
}

struct LargestScore {
    DEVICE float operator()(float a, float b) const { return b > a ? b : a; }
};

// How the lanes of a warp share rows: `width` lanes a row, so many rows at a time.
struct Lanes {
    uint32_t width;
    // Of the rows at hand.
    uint32_t row;
    // First of eight.
    uint32_t column;
};

DEVICE Lanes lanes_for(uint32_t head_dim) {
    uint32_t width = 1;
    while (width < LANES && width * ELEMENTS < head_dim) {
        width *= 2;
    }
    uint32_t lane = thread_index() % LANES;
    return Lanes{width, lane / width, lane % width * ELEMENTS};
}

// What the block knows of the span at hand.
struct Span {
    // Positions seen.
    uint32_t count;
    // `[SPAN]` keys.
    const uint8_t *const *keys;
    // From a key to its value.
    size_t to_value;
    // `[SPAN]` scores, then weights.
    float *weights;
};

template <class Kv>
DEVICE void score(const Span &span, const Lanes &lanes, const float (&query)[PARTS][ELEMENTS], uint32_t head_dim) {
    uint32_t rows = LANES / lanes.width, warp = thread_index() / LANES;
    // All lanes to the end: they meet in shuffles.
    for (uint32_t first = warp * rows; first < span.count; first += WARPS * rows * DEPTH) {
        float sums[DEPTH] = {};
        UNROLL
        for (uint32_t part = 0; part < PARTS; part++) {
            uint32_t column = lanes.column + part * LANES * ELEMENTS;
            if (column < head_dim) {
                Eight keys[DEPTH];
                UNROLL
                for (uint32_t i = 0; i < DEPTH; i++) {
                    // Past the last the last again, whose score nobody stores.
                    uint32_t position = minimum(first + i * WARPS * rows + lanes.row, span.count - 1);
                    keys[i] = load_eight<Kv>(span.keys[position], column, head_dim);
                }
                UNROLL
                for (uint32_t i = 0; i < DEPTH; i++) {
                    UNROLL
                    for (uint32_t element = 0; element < ELEMENTS; element++) {
                        sums[i] = multiply_add(query[part][element], keys[i].of[element], sums[i]);
                    }
                }
            }
        }
        UNROLL
        for (uint32_t i = 0; i < DEPTH; i++) {
            for (uint32_t mask = lanes.width / 2; mask > 0; mask /= 2) {
                sums[i] += shuffle_xor(sums[i], mask);
            }
            uint32_t position = first + i * WARPS * rows + lanes.row;
            if (lanes.column == 0 && position < span.count) {
                span.weights[position] = sums[i];
            }
        }
    }
}

// The weighted values of the span into `of_warps: [WARPS][MAX_HEAD_DIM]`.
template <class Kv> DEVICE void weigh_values(const Span &span, const Lanes &lanes, uint32_t head_dim, float *of_warps) {
    uint32_t rows = LANES / lanes.width, warp = thread_index() / LANES;
    UNROLL
    for (uint32_t part = 0; part < PARTS; part++) {
        uint32_t column = lanes.column + part * LANES * ELEMENTS;
        float sums[ELEMENTS] = {};
        if (column < head_dim) {
            for (uint32_t first = warp * rows + lanes.row; first < span.count; first += WARPS * rows * DEPTH) {
                Eight values[DEPTH];
                UNROLL
                for (uint32_t i = 0; i < DEPTH; i++) {
                    uint32_t position = first + i * WARPS * rows;
                    if (position < span.count) {
                        values[i] = load_eight<Kv>(span.keys[position] + span.to_value, column, head_dim);
                    }
                }
                UNROLL
                for (uint32_t i = 0; i < DEPTH; i++) {
                    uint32_t position = first + i * WARPS * rows;
                    if (position < span.count) {
                        UNROLL
                        for (uint32_t element = 0; element < ELEMENTS; element++) {
                            sums[element] = multiply_add(span.weights[position], values[i].of[element], sums[element]);
                        }
                    }
                }
            }
        }
        UNROLL
        for (uint32_t element = 0; element < ELEMENTS; element++) {
            for (uint32_t mask = lanes.width; mask < LANES; mask *= 2) {
                sums[element] += shuffle_xor(sums[element], mask);
            }
            if (lanes.row == 0 && column + element < head_dim) {
                of_warps[warp * MAX_HEAD_DIM + column + element] = sums[element];
            }
        }
    }
}

// What the threads of a block share; the arrays are those of Span, and weighted values of each warp.
struct Shared {
    const uint8_t **keys;
    float *weights;
    // `[WARPS][MAX_HEAD_DIM]`
    float *of_warps;
};

template <class Kv>
DEVICE void attend(const AttentionArguments &arguments, const PlaceArguments &place, const Shared &shared) {
    const uint8_t **keys = shared.keys;
    float *weights = shared.weights, *of_warps = shared.of_warps;
    const CacheArguments &cache = arguments.cache;
    uint32_t head_dim = cache.head_dim, head = block_y(), thread = thread_index();
    uint32_t key_value_head = head / (arguments.heads / cache.key_value_heads);
    const float *from = arguments.query + (row_of_token(arguments) * arguments.heads + head) * head_dim;
    Lanes lanes = lanes_for(head_dim);
    float query[PARTS][ELEMENTS];
    UNROLL
    for (uint32_t part = 0; part < PARTS; part++) {
        UNROLL
        for (uint32_t element = 0; element < ELEMENTS; element++) {
            uint32_t column = lanes.column + part * LANES * ELEMENTS + element;
            query[part][element] = column < head_dim ? from[column] : 0.0f;
        }
    }
    float scale = 1.0f / square_root(static_cast<float>(head_dim));
    size_t to_value = static_cast<size_t>(cache.key_value_heads) * cache.page_tokens * head_dim * Kv::BYTES;
    bool is_alone = arguments.spans == 0;
    uint32_t step = is_alone ? 1 : grid_z();
    uint32_t spans = place.position / SPAN + 1;
    State all = nothing_seen();
    for (uint32_t index = is_alone ? 0 : block_z(); index < spans; index += step) {
        uint32_t start = index * SPAN;
        Span span = {minimum(SPAN, place.position + 1 - start), keys, to_value, weights};
        float key_scales[POSITIONS] = {}, value_scales[POSITIONS] = {};
        for (uint32_t i = 0; i < POSITIONS; i++) {
            uint32_t position = thread + i * THREADS;
            if (position < span.count) {
                KvRow key = kv_row(cache, place, arguments.layer, 0, key_value_head, start + position);
                keys[position] = key.elements;
                if (Kv::SCALED) {
                    key_scales[i] = *key.scale;
                    value_scales[i] = key.scale[static_cast<size_t>(cache.key_value_heads) * cache.page_tokens];
                }
            }
        }
        barrier();
        score<Kv>(span, lanes, query, head_dim);
        barrier();

        State state = nothing_seen();
        float scores[POSITIONS];
        for (uint32_t i = 0; i < POSITIONS; i++) {
            uint32_t position = thread + i * THREADS;
            scores[i] = negative_infinity();
            if (position < span.count) {
                scores[i] = weights[position] * scale;
                if (Kv::SCALED) {
                    scores[i] *= key_scales[i];
                }
            }
            // What is not a number is not the largest, and its weight is not a number.
            state.largest = LargestScore()(state.largest, scores[i]);
        }
        state.largest = join_block<WARPS>(state.largest, LargestScore());
        // In a span of nothing but negative infinities all weights are 0.
        float base = state.largest == negative_infinity() ? 0.0f : state.largest;
        for (uint32_t i = 0; i < POSITIONS; i++) {
            uint32_t position = thread + i * THREADS;
            float weight = e_to_the(scores[i] - base);
            state.sum += weight;
            if (position < span.count) {
                weights[position] = Kv::SCALED ? weight * value_scales[i] : weight;
            }
        }
        // Its barriers are those of the weights as well.
        state.sum = join_block<WARPS>(state.sum, Sum());
        weigh_values<Kv>(span, lanes, head_dim, of_warps);
        barrier();
        for (uint32_t i = 0; i < COLUMNS; i++) {
            uint32_t column = thread + i * THREADS;
            if (column < head_dim) {
                float value = of_warps[column];
                for (uint32_t warp = 1; warp < WARPS; warp++) {
                    value += of_warps[warp * MAX_HEAD_DIM + column];
                }
                state.values[i] = value;
            }
        }
        if (is_alone) {
            join(all, state);
            continue;
        }
        size_t row = static_cast<size_t>(block_x()) * arguments.heads + head;
        float *partial = arguments.partial + (row * arguments.spans + index) * (head_dim + 2);
        for (uint32_t i = 0; i < COLUMNS; i++) {
            uint32_t column = thread + i * THREADS;
            if (column < head_dim) {
                partial[column] = state.values[i];
            }
        }
        if (thread == 0) {
            partial[head_dim] = state.largest;
            partial[head_dim + 1] = state.sum;
        }
    }
    if (is_alone) {
        write_attended(arguments, all);
    }
}

KERNEL(attention, AttentionArguments, 128) {
    SHARED(const uint8_t *, keys, SPAN);
    SHARED(float, weights, SPAN);
    SHARED(float, of_warps, WARPS * MAX_HEAD_DIM);
    Shared shared = {keys, weights, of_warps};
    PlaceArguments place = arguments.places[row_of_token(arguments)];
    switch (place.kv_dtype) {
        case KV_F32: return attend<KvF32>(arguments, place, shared);
        case KV_BF16: return attend<KvHalves<true>>(arguments, place, shared);
        case KV_F16: return attend<KvHalves<false>>(arguments, place, shared);
        default: return attend<KvInt8>(arguments, place, shared);
    }
}

KERNEL(attention_merge, AttentionArguments, 128) {
    uint32_t head_dim = arguments.cache.head_dim, head = block_y();
    size_t row = static_cast<size_t>(block_x()) * arguments.heads + head;
    uint32_t spans = arguments.places[row_of_token(arguments)].position / SPAN + 1;
    State all = nothing_seen();
    for (uint32_t index = 0; index < spans; index++) {
        const float *partial = arguments.partial + (row * arguments.spans + index) * (head_dim + 2);
        State state = {{}, partial[head_dim], partial[head_dim + 1]};
        for (uint32_t i = 0; i < COLUMNS; i++) {
            uint32_t column = thread_index() + i * THREADS;
            if (column < head_dim) {
                state.values[i] = partial[column];
            }
        }
        join(all, state);
    }
    write_attended(arguments, all);
}
