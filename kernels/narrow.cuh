// The inner loop of products on tensor cores for few tokens: panels of weights by up to 16 tokens, at the speed of
// memory. tensor.cuh has the formats, and which lane has which weights.
//
// A block of eight warps has two panels of a matrix, 32 rows, or the same two of two matrices. The warps share the
// columns: stages of four steps, 64 columns of bf16 or f16 and 128 of int8 or int4, go to them in turn, so that a few
// panels are enough to keep many loads in flight: all of a stage, 128 bytes a lane and matrix (64 in int4), before the
// first is used. Activations come from the caches, as they are few.
//
// A warp's sums have the order of its steps; those of the warps are added in the order of the warps. So a token's sums
// have one order whatever its company, but another than in tensor.cuh.

#pragma once

#include "tensor.cuh"

constexpr uint32_t NARROW_TOKENS = 16;
constexpr uint32_t NARROW_TILES = NARROW_TOKENS / MMA_TOKENS;
constexpr uint32_t NARROW_PANELS = 2;
constexpr uint32_t NARROW_ROWS = NARROW_PANELS * PANEL_ROWS;
constexpr uint32_t NARROW_WARPS = 8;
constexpr uint32_t NARROW_THREADS = NARROW_WARPS * LANES;
// Fours of rows of a token, filled up so that the lanes that write at once use all banks.
constexpr uint32_t NARROW_STRIDE = NARROW_ROWS / 4 + 1;

// Twos of panels of a matrix.
DEVICE uint32_t narrow_groups(const MatrixArguments &matrix) { return (matrix.rows + NARROW_ROWS - 1) / NARROW_ROWS; }

// A lane's panel of two; where there is none the last one, whose products nobody stores.
template <class Tensor> DEVICE Panel narrow_panel(const MatrixArguments &matrix, uint32_t group) {
    uint32_t panel = group * NARROW_PANELS + thread_index() % LANES / 16;
    return panel_of<typename Tensor::Format>(matrix, minimum(panel, panel_count(matrix) - 1));
}

// What a lane reads of a tile's activations: words of the token its fours of lanes have, scales of the two tokens it has
// sums of.
template <class Tensor> struct NarrowInput {
    const uint32_t *words;
    const BlockArguments *blocks[2];

    // Past the last token the last again, whose products nobody stores.
    static DEVICE size_t row_of(const ActivationArguments &x, uint32_t token, uint32_t end) {
        token = minimum(token, end - 1);
        return x.index ? x.index[token] : token;
    }

    DEVICE void begin(const ActivationArguments &x, uint32_t first, uint32_t end) {
        uint32_t group = thread_index() % LANES / 4, place = thread_index() % 4;
        words = reinterpret_cast<const uint32_t *>(Tensor::activations(x, row_of(x, first + group, end)));
        UNROLL
        for (uint32_t i = 0; i < 2; i++) {
            blocks[i] = x.blocks + row_of(x, first + 2 * place + i, end) * (x.stride >> BLOCK_SHIFT);
        }
    }
};

// A lane's sums: of each matrix, pair of its four rows and tile of tokens those of an mma.
template <uint32_t MATRICES> struct NarrowSums {
    float of[MATRICES][2][NARROW_TILES][4];
};

// Adds the products of a stage whose weights are there.
template <class Tensor, uint32_t MATRICES>
DEVICE void add_stage(NarrowSums<MATRICES> &sums, const StageWeights<Tensor> (&weights)[MATRICES],
                      const Panel (&panels)[MATRICES], const NarrowInput<Tensor> (&inputs)[NARROW_TILES],
                      uint32_t first_step, uint32_t tiles) {
    uint32_t place = thread_index() % 4;
    UNROLL
    for (uint32_t step = 0; step < STAGE_STEPS; step++) {
        Fragment fragments[MATRICES][2];
        FourScales scales[MATRICES];
        UNROLL
        for (uint32_t m = 0; m < MATRICES; m++) {
            UNROLL
            for (uint32_t pair = 0; pair < 2; pair++) {
                fragments[m][pair] = Tensor::fragment(weights[m].loads[step], pair);
            }
            if constexpr (Tensor::SCALED) {
                scales[m] = wide_scales(panels[m], weights[m].scale_bits[step]);
            }
        }
        UNROLL
        for (uint32_t tile = 0; tile < NARROW_TILES; tile++) {
            if (tile >= tiles) {
                break;
            }
            const uint32_t *words = inputs[tile].words + (first_step + step) * STEP_WORDS;
            uint32_t b[2] = {words[Tensor::unit_word(place, 0)], words[Tensor::unit_word(place, 1)]};
            TwoFloats two_scales = {};
            if constexpr (Tensor::SCALED) {
                two_scales.number[0] = inputs[tile].blocks[0][first_step + step].scale;
                two_scales.number[1] = inputs[tile].blocks[1][first_step + step].scale;
            }
            UNROLL
            for (uint32_t m = 0; m < MATRICES; m++) {
                UNROLL
                for (uint32_t pair = 0; pair < 2; pair++) {
                    float(&to)[4] = sums.of[m][pair][tile];
                    if constexpr (Tensor::SCALED) {
                        add_block<Tensor>(to, fragments[m][pair], b, scales[m], pair, two_scales);
                    } else {
                        Tensor::mma(to, fragments[m][pair], b);
                    }
                }
            }
        }
    }
}

// The products of two panels of each of MATRICES matrices with the tokens `first` to `end`, of which the first 16 count.
// All threads of the block take part. Calls store(token, row of the two panels, one product of each matrix).
template <class Tensor, uint32_t MATRICES, class Store>
DEVICE void narrow_products(const Panel (&panels)[MATRICES], const ActivationArguments &x, uint32_t first, uint32_t end,
                            Store store) {
    constexpr uint32_t matrix_room = NARROW_TOKENS * NARROW_STRIDE, warp_room = MATRICES * matrix_room;
    SHARED(Words, room, NARROW_WARPS * warp_room);
    end = minimum(end, first + NARROW_TOKENS);
    uint32_t tiles = (end - first + MMA_TOKENS - 1) / MMA_TOKENS;
    uint32_t warp = thread_index() / LANES, lane = thread_index() % LANES;

    NarrowInput<Tensor> inputs[NARROW_TILES];
    UNROLL
    for (uint32_t tile = 0; tile < NARROW_TILES; tile++) {
        inputs[tile].begin(x, first + tile * MMA_TOKENS, end);
    }
    NarrowSums<MATRICES> sums = {};
    uint32_t stages = WeightsPlace<Tensor>::stages(panels[0]);
    for (uint32_t stage = warp; stage < stages; stage += NARROW_WARPS) {
        StageWeights<Tensor> weights[MATRICES];
        UNROLL
        for (uint32_t step = 0; step < STAGE_STEPS; step++) {
            UNROLL
            for (uint32_t m = 0; m < MATRICES; m++) {
                read_step(weights[m], panels[m], WeightsPlace<Tensor>(panels[m], stage), step);
            }
        }
        add_stage(sums, weights, panels, inputs, stage * STAGE_STEPS, tiles);
    }

    // Whoever still reads the products of an earlier tile of slots is waited for.
    barrier();
    UNROLL
    for (uint32_t m = 0; m < MATRICES; m++) {
        UNROLL
        for (uint32_t tile = 0; tile < NARROW_TILES; tile++) {
            UNROLL
            for (uint32_t i = 0; i < 2; i++) {
                Words words;
                UNROLL
                for (uint32_t row = 0; row < 4; row++) {
                    words.word[row] = bits_of_float(sums.of[m][row / 2][tile][2 * (row % 2) + i]);
                }
                uint32_t token = tile * MMA_TOKENS + 2 * (lane % 4) + i;
                room[warp * warp_room + m * matrix_room + token * NARROW_STRIDE + lane / 4] = words;
            }
        }
    }
    barrier();
    const float *of_room = reinterpret_cast<const float *>(room);
    for (uint32_t i = thread_index(); i < (end - first) * NARROW_ROWS; i += NARROW_THREADS) {
        uint32_t token = i / NARROW_ROWS, row = i % NARROW_ROWS;
        float products[MATRICES];
        UNROLL
        for (uint32_t m = 0; m < MATRICES; m++) {
            const float *of_warp = of_room + 4 * (m * matrix_room + token * NARROW_STRIDE) + row;
            products[m] = of_warp[0];
            UNROLL
            for (uint32_t w = 1; w < NARROW_WARPS; w++) {
                products[m] += of_warp[4 * w * warp_room];
            }
        }
        store(first + token, row, products);
    }
}
