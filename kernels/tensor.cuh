// The inner loop of products on tensor cores: panels of weights by up to 64 tokens. shim/mma.hpp has what an mma is.
//
// Four warps have eight panels of a matrix, 128 rows; a block has four warps, or four more for the same panels of a
// second matrix. Each warp has two panels and all tokens. Weights are on the side of sixteen rows and go from memory
// into registers: lane 4 g + t reads sixteen bytes at a time, rows 4 (g % 4) and on of panel g / 4 in line t of four.
// Of its four rows the first and second are rows g and g + 8 of one mma, the third and fourth of another: which row is
// which only says where results go. Loads are two steps at a time and a stage ahead.
//
// k goes by steps of eight words of activations, one mma deep: 16 columns of bf16 or f16, 8 lines; 32 of int8, 8 lines;
// 32 of int4, 4 lines, whose words have two words' columns each. Four steps are a stage, 128 bytes of each token. Two
// stages of activations are in shared memory by turns, one barrier a stage: while one is multiplied the next comes from
// the caches into registers, each thread bringing a step of a token or two. Of a step lane t takes two words: t and 4 +
// t, as its lines are; in int4 2t and 2t + 1. Those of two steps lie beside each other as one unit of sixteen bytes,
// units of a token and two steps in 64; `unit_place` turns them by token and by steps, so that lanes that read or write
// at once use all banks once.
//
// A sum has one order whatever the token's company: over steps in rising order, in f32. In bf16 and f16 the mma adds
// (in the hardware's order within a step); with scales a step is a block of 32 columns, whose whole number is exact and
// then scaled as in formats.cuh.
//
// At the end sums go through shared memory, sixteen tokens at a time, so that products are stored row beside row; rows
// of a token are filled up by sixteen bytes, and again the lanes that write at once use all banks.

#pragma once

#include "formats.cuh"
#include "reduce.cuh"

// Threads for each matrix.
constexpr uint32_t TENSOR_THREADS = 128;
constexpr uint32_t TENSOR_PANELS = 8;
constexpr uint32_t TENSOR_ROWS = TENSOR_PANELS * PANEL_ROWS;
constexpr uint32_t TENSOR_TOKENS = 64;
// Tokens of an mma.
constexpr uint32_t MMA_TOKENS = 8;
constexpr uint32_t TENSOR_TILES = TENSOR_TOKENS / MMA_TOKENS;
constexpr uint32_t STEP_WORDS = 8;
// Two steps are a chunk, two chunks a stage.
constexpr uint32_t CHUNK_STEPS = 2;
constexpr uint32_t STAGE_CHUNKS = 2;
constexpr uint32_t STAGE_STEPS = CHUNK_STEPS * STAGE_CHUNKS;
// Units of a token and a chunk.
constexpr uint32_t CHUNK_UNITS = 4;
constexpr uint32_t STAGE_UNITS = STAGE_CHUNKS * CHUNK_UNITS * TENSOR_TOKENS;
// Scales of a step, filled up: those of four steps and eight tokens, written at once, are in banks of their own.
constexpr uint32_t STEP_SCALES = TENSOR_TOKENS + 8;
constexpr uint32_t STAGE_SCALES = STAGE_STEPS * STEP_SCALES;
// Of the way of sums to memory.
constexpr uint32_t ROUND_TILES = 2;
constexpr uint32_t ROUND_TOKENS = ROUND_TILES * MMA_TOKENS;
constexpr uint32_t ROUND_STRIDE = TENSOR_ROWS / 4 + 1;

struct Fragment {
    uint32_t word[4];
};

// Each format has, beside its numbers: STEP_LOADS, lines of a step / 4; SCALED; `activations`, a row of them;
// `unit_word`, which of the words of a step is lane t's i-th; `fragment`, rows 2 * pair and on of a lane's loads for a
// step; `mma`.

// What formats have in common whose words are words of activations too.
struct PlainWords {
    static constexpr uint32_t STEP_LOADS = 2;

    static DEVICE uint32_t unit_word(uint32_t t, uint32_t i) { return t + 4 * i; }
    static DEVICE Fragment fragment(const Words (&loads)[2], uint32_t pair) {
        return Fragment{{loads[0].word[2 * pair], loads[0].word[2 * pair + 1], loads[1].word[2 * pair],
                         loads[1].word[2 * pair + 1]}};
    }
};

struct TensorHalves : PlainWords {
    static constexpr bool SCALED = false;

    static DEVICE const uint8_t *activations(const ActivationArguments &x, size_t row) {
        return reinterpret_cast<const uint8_t *>(x.halves + row * x.stride);
    }
};

struct TensorBf16 : TensorHalves {
    typedef Bf16 Format;
    static DEVICE void mma(float (&sums)[4], const Fragment &a, const uint32_t (&b)[2]) { mma_bf16(sums, a.word, b); }
};

struct TensorF16 : TensorHalves {
    typedef F16 Format;
    static DEVICE void mma(float (&sums)[4], const Fragment &a, const uint32_t (&b)[2]) { mma_f16(sums, a.word, b); }
};

struct TensorIntegers {
    static constexpr bool SCALED = true;

    static DEVICE const uint8_t *activations(const ActivationArguments &x, size_t row) {
        return reinterpret_cast<const uint8_t *>(x.integers) + row * x.stride;
    }
    static DEVICE void mma(int32_t (&sums)[4], const Fragment &a, const uint32_t (&b)[2]) { mma_int8(sums, a.word, b); }
};

struct TensorInt8 : TensorIntegers, PlainWords {
    typedef Int8 Format;
    // What mma gives is this many times too much.
    static constexpr float FACTOR = 1.0f;

    static DEVICE Fragment fragment(const Words (&loads)[2], uint32_t pair) {
        Fragment words = PlainWords::fragment(loads, pair);
        UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            words.word[i] = Int8::weights(words.word[i]).signed_bytes;
        }
        return words;
    }
};

struct TensorInt4 : TensorIntegers {
    typedef Int4 Format;
    static constexpr float FACTOR = 16.0f;
    static constexpr uint32_t STEP_LOADS = 1;

    static DEVICE uint32_t unit_word(uint32_t t, uint32_t i) { return 2 * t + i; }
    static DEVICE Fragment fragment(const Words (&loads)[1], uint32_t pair) {
        Int4::Weights first = Int4::weights(loads[0].word[2 * pair]);
        Int4::Weights second = Int4::weights(loads[0].word[2 * pair + 1]);
        return Fragment{{first.low, second.low, first.high, second.high}};
    }
};

// A lane's weights for a stage.
template <class Tensor> struct StageWeights {
    Words loads[STAGE_STEPS][Tensor::STEP_LOADS];
    TwoWords scale_bits[Tensor::SCALED ? STAGE_STEPS : 1];
};

// Where a lane reads the weights of a stage.
template <class Tensor> struct WeightsPlace {
    static constexpr uint32_t STEP_LINES = 4 * Tensor::STEP_LOADS;

    const uint8_t *lines;
    // From the lane's first one on; below zero past the end.
    int32_t lines_left;
    // Of the stage.
    uint32_t column;

    static constexpr uint32_t STAGE_LINES = STAGE_STEPS * STEP_LINES;

    DEVICE explicit WeightsPlace(const Panel &panel, uint32_t stage = 0) {
        uint32_t quarter = thread_index() / 4 % 4, place = thread_index() % 4;
        uint32_t line = stage * STAGE_LINES + place;
        lines = panel.lines + static_cast<size_t>(line) * LINE_BYTES + 16 * quarter;
        lines_left = static_cast<int32_t>(panel.line_count - line);
        column = stage * STAGE_LINES * Tensor::Format::COLUMNS;
    }

    DEVICE void move_to_next_stage() {
        lines += STAGE_LINES * LINE_BYTES;
        lines_left -= static_cast<int32_t>(STAGE_LINES);
        column += STAGE_LINES * Tensor::Format::COLUMNS;
    }

    static DEVICE uint32_t stages(const Panel &panel) { return (panel.line_count + STAGE_LINES - 1) / STAGE_LINES; }
};

// Reads one step of a lane's weights; past the last column they are zeros, and nothing is read.
template <class Tensor>
DEVICE void read_step(StageWeights<Tensor> &weights, const Panel &panel, const WeightsPlace<Tensor> &from,
                      uint32_t step) {
    constexpr uint32_t lines_of_step = WeightsPlace<Tensor>::STEP_LINES;
    UNROLL
    for (uint32_t i = 0; i < Tensor::STEP_LOADS; i++) {
        uint32_t line = step * lines_of_step + 4 * i;
        bool is_there = static_cast<int32_t>(line) < from.lines_left;
        weights.loads[step][i] = load_words_if(is_there, from.lines + line * LINE_BYTES);
    }
    if constexpr (Tensor::SCALED) {
        // Past the last column any scale will do.
        uint32_t column = from.column + step * lines_of_step * Tensor::Format::COLUMNS;
        uint32_t last = panel.line_count * Tensor::Format::COLUMNS - 1;
        weights.scale_bits[step] = four_scale_bits(panel, minimum(column, last), thread_index() / 4 % 4);
    }
}

// Where lane t's unit of a token and chunk of a stage is.
DEVICE uint32_t unit_place(uint32_t token, uint32_t chunk, uint32_t t) {
    return (chunk * TENSOR_TOKENS + token) * CHUNK_UNITS + (t ^ (token / 2 % 4) ^ (2 * chunk));
}

// One step of one token, on its way from the caches to shared memory.
template <class Tensor> struct Activations {
    const Words *words;
    const BlockArguments *block;
    Words read_words[STEP_WORDS / 4];
    float read_scale;

    DEVICE void begin(const ActivationArguments &x, size_t row, uint32_t step) {
        words = reinterpret_cast<const Words *>(Tensor::activations(x, row)) + step * (STEP_WORDS / 4);
        block = x.blocks + row * (x.stride >> BLOCK_SHIFT) + step;
    }

    DEVICE void read() {
        UNROLL
        for (uint32_t i = 0; i < STEP_WORDS / 4; i++) {
            read_words[i] = words[i];
        }
        if constexpr (Tensor::SCALED) {
            read_scale = block->scale;
        }
    }

    DEVICE void move_by(uint32_t stages) {
        words += stages * (STAGE_STEPS * STEP_WORDS / 4);
        block += stages * STAGE_STEPS;
    }

    DEVICE void write(Words *units, float *scales, uint32_t token, uint32_t step) const {
        TwoWords *halves = reinterpret_cast<TwoWords *>(units);
        UNROLL
        for (uint32_t t = 0; t < CHUNK_UNITS; t++) {
            TwoWords half;
            UNROLL
            for (uint32_t i = 0; i < 2; i++) {
                uint32_t word = Tensor::unit_word(t, i);
                half.word[i] = read_words[word / 4].word[word % 4];
            }
            halves[2 * unit_place(token, step / CHUNK_STEPS, t) + step % CHUNK_STEPS] = half;
        }
        if constexpr (Tensor::SCALED) {
            scales[step * STEP_SCALES + token] = read_scale;
        }
    }
};

// What a thread brings of each stage: steps t, t + the block's threads ... of the tokens, four of a token after each
// other.
template <class Tensor, uint32_t MATRICES> struct Bringer {
    static constexpr uint32_t THREADS = MATRICES * TENSOR_THREADS;
    static constexpr uint32_t COUNT = TENSOR_TOKENS * STAGE_STEPS / THREADS;
    static_assert(COUNT * THREADS == TENSOR_TOKENS * STAGE_STEPS, "all threads bring as much");

    Activations<Tensor> own[COUNT];

    // Past the last token the last again, whose products nobody stores.
    DEVICE Bringer(const ActivationArguments &x, uint32_t first, uint32_t end) {
        UNROLL
        for (uint32_t i = 0; i < COUNT; i++) {
            uint32_t token = minimum(first + number(i) / STAGE_STEPS, end - 1);
            own[i].begin(x, x.index ? x.index[token] : token, number(i) % STAGE_STEPS);
        }
    }

    static DEVICE uint32_t number(uint32_t i) { return thread_index() + i * THREADS; }

    DEVICE void read() {
        UNROLL
        for (uint32_t i = 0; i < COUNT; i++) {
            own[i].read();
        }
    }

    DEVICE void move_by(uint32_t stages) {
        UNROLL
        for (uint32_t i = 0; i < COUNT; i++) {
            own[i].move_by(stages);
        }
    }

    DEVICE void write(Words *units, float *scales) const {
        UNROLL
        for (uint32_t i = 0; i < COUNT; i++) {
            own[i].write(units, scales, number(i) / STAGE_STEPS, number(i) % STAGE_STEPS);
        }
    }
};

// A lane's sums: of each pair of its four rows and each tile of eight tokens those of an mma.
struct TensorSums {
    float of[2][TENSOR_TILES][4];
};

// sums += the whole numbers of a block times both scales.
template <class Tensor>
DEVICE void add_block(float (&sums)[4], const Fragment &a, const uint32_t (&b)[2], const FourScales &scales,
                      uint32_t pair, const TwoFloats &two_scales) {
    // 1.5 * 2^23 is a sum of 0: on it, whole numbers below 2^22 are the low bits of a float, and no conversion is
    // needed. The largest of a block is 32 * 128 * 127.
    const float zero = 12582912.0f;
    int32_t zero_bits = static_cast<int32_t>(bits_of_float(zero));
    int32_t whole[4] = {zero_bits, zero_bits, zero_bits, zero_bits};
    Tensor::mma(whole, a, b);
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        float product = float_of_bits(static_cast<uint32_t>(whole[i])) - zero;
        float scale = scales.row[2 * pair + i / 2] * (1.0f / Tensor::FACTOR);
        sums[i] = multiply_add(product, scale * two_scales.number[i % 2], sums[i]);
    }
}

// One chunk of the products of a lane's panel; the second half of the tiles where they have tokens.
template <class Tensor>
DEVICE void multiply_chunk(TensorSums &sums, const StageWeights<Tensor> &weights, const Panel &panel,
                           const Words *units, const float *token_scales, uint32_t chunk, bool both_halves) {
    uint32_t group = thread_index() % LANES / 4, place = thread_index() % 4;
    Fragment fragments[CHUNK_STEPS][2];
    FourScales scales[CHUNK_STEPS];
    UNROLL
    for (uint32_t step = 0; step < CHUNK_STEPS; step++) {
        UNROLL
        for (uint32_t pair = 0; pair < 2; pair++) {
            fragments[step][pair] = Tensor::fragment(weights.loads[chunk * CHUNK_STEPS + step], pair);
        }
        if constexpr (Tensor::SCALED) {
            scales[step] = wide_scales(panel, weights.scale_bits[chunk * CHUNK_STEPS + step]);
        }
    }
    UNROLL
    for (uint32_t tile = 0; tile < TENSOR_TILES; tile++) {
        if (tile == TENSOR_TILES / 2 && !both_halves) {
            break;
        }
        Words unit = units[unit_place(tile * MMA_TOKENS + group, chunk, place)];
        UNROLL
        for (uint32_t step = 0; step < CHUNK_STEPS; step++) {
            uint32_t b[2] = {unit.word[2 * step], unit.word[2 * step + 1]};
            TwoFloats two_scales = {};
            if constexpr (Tensor::SCALED) {
                uint32_t row = (chunk * CHUNK_STEPS + step) * STEP_SCALES;
                two_scales = reinterpret_cast<const TwoFloats *>(token_scales + row)[tile * MMA_TOKENS / 2 + place];
            }
            UNROLL
            for (uint32_t pair = 0; pair < 2; pair++) {
                float(&to)[4] = sums.of[pair][tile];
                if constexpr (Tensor::SCALED) {
                    add_block<Tensor>(to, fragments[step][pair], b, scales[step], pair, two_scales);
                } else {
                    Tensor::mma(to, fragments[step][pair], b);
                }
            }
        }
    }
}

// Hands the products of ROUND_TOKENS tokens on: store(token, row of the eight panels, one of each matrix).
template <uint32_t MATRICES, class Store>
DEVICE void store_round(const TensorSums &sums, uint32_t round, uint32_t first, uint32_t end, Words *room,
                        Store store) {
    uint32_t place = thread_index() % 4, matrix = thread_index() / TENSOR_THREADS;
    // A lane's rows are four of the 32 fours of its matrix.
    uint32_t four = thread_index() % TENSOR_THREADS / 4;
    // Whoever still reads what was here before is waited for.
    barrier();
    UNROLL
    for (uint32_t tile = 0; tile < ROUND_TILES; tile++) {
        UNROLL
        for (uint32_t i = 0; i < 2; i++) {
            Words words;
            UNROLL
            for (uint32_t row = 0; row < 4; row++) {
                words.word[row] = bits_of_float(sums.of[row / 2][round * ROUND_TILES + tile][2 * (row % 2) + i]);
            }
            room[(matrix * ROUND_TOKENS + tile * MMA_TOKENS + 2 * place + i) * ROUND_STRIDE + four] = words;
        }
    }
    barrier();
    const float *of_room = reinterpret_cast<const float *>(room);
    uint32_t left = minimum(end - minimum(end, first + round * ROUND_TOKENS), ROUND_TOKENS);
    for (uint32_t i = thread_index(); i < left * TENSOR_ROWS; i += MATRICES * TENSOR_THREADS) {
        uint32_t token = i / TENSOR_ROWS, row = i % TENSOR_ROWS;
        float products[MATRICES];
        UNROLL
        for (uint32_t m = 0; m < MATRICES; m++) {
            products[m] = of_room[(m * ROUND_TOKENS + token) * 4 * ROUND_STRIDE + row];
        }
        store(first + round * ROUND_TOKENS + token, row, products);
    }
}

// Eights of panels of a matrix.
DEVICE uint32_t tensor_groups(const MatrixArguments &matrix) { return (matrix.rows + TENSOR_ROWS - 1) / TENSOR_ROWS; }

// A lane's panel of an eight of them; where there is none the last one, whose products nobody stores.
template <class Tensor> DEVICE Panel tensor_panel(const MatrixArguments &matrix, uint32_t group) {
    uint32_t panel = group * TENSOR_PANELS + thread_index() % TENSOR_THREADS / 16;
    return panel_of<typename Tensor::Format>(matrix, minimum(panel, panel_count(matrix) - 1));
}

// The products of eight panels of each of MATRICES matrices with the tokens `first` to `end`, of which the first 64
// count. The threads t and t + TENSOR_THREADS have the same panel of two matrices. Calls store(token, row of the eight
// panels, one product of each matrix).
template <class Tensor, uint32_t MATRICES, class Store>
DEVICE void tensor_products(const Panel &panel, const ActivationArguments &x, uint32_t first, uint32_t end,
                            Store store) {
    constexpr uint32_t round_units = MATRICES * ROUND_TOKENS * ROUND_STRIDE;
    SHARED(Words, units, 2 * STAGE_UNITS > round_units ? 2 * STAGE_UNITS : round_units);
    SHARED(TwoFloats, scale_pairs, Tensor::SCALED ? STAGE_SCALES : 1);
    float *scales = reinterpret_cast<float *>(scale_pairs);
    end = minimum(end, first + TENSOR_TOKENS);
    bool both_halves = end - first > TENSOR_TOKENS / 2;

    Bringer<Tensor, MATRICES> bringer(x, first, end);
    WeightsPlace<Tensor> from(panel);
    TensorSums sums = {};
    StageWeights<Tensor> weights;
    UNROLL
    for (uint32_t step = 0; step < STAGE_STEPS; step++) {
        read_step(weights, panel, from, step);
    }
    bringer.read();
    bringer.write(units, scales);
    uint32_t stages = WeightsPlace<Tensor>::stages(panel);
    for (uint32_t stage = 0; stage < stages; stage++) {
        // The activations of this stage are there, and whoever still multiplied those of the one before has ended.
        barrier();
        from.move_to_next_stage();
        // After the last stage it comes once more: a branch would cost more.
        bringer.move_by(stage + 1 < stages ? 1 : 0);
        bringer.read();
        uint32_t turn = stage % 2, other = 1 - turn;
        UNROLL
        for (uint32_t chunk = 0; chunk < STAGE_CHUNKS; chunk++) {
            multiply_chunk(sums, weights, panel, units + turn * STAGE_UNITS, scales + turn * STAGE_SCALES, chunk,
                           both_halves);
            UNROLL
            for (uint32_t step = 0; step < CHUNK_STEPS; step++) {
                read_step(weights, panel, from, chunk * CHUNK_STEPS + step);
            }
        }
        bringer.write(units + other * STAGE_UNITS, scales + other * STAGE_SCALES);
    }
    UNROLL
    for (uint32_t round = 0; round < TENSOR_TILES / ROUND_TILES; round++) {
        store_round<MATRICES>(sums, round, first, end, units, store);
    }
}

// One kernel for each format with tensor cores: MAKE(format, Tensor).
#define FOR_EACH_TENSOR_FORMAT(MAKE)                                                                                   \
    MAKE(bf16, TensorBf16) MAKE(f16, TensorF16) MAKE(int8, TensorInt8) MAKE(int4, TensorInt4)
