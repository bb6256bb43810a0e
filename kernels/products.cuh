// The inner loop of all products: panels of weights by a few tokens.
//
// A block of four warps has one panel, or the same panel of two matrices. A warp reads eight lines, 512 bytes, at a
// time: lane l has rows 4 * (l % 4) and on of line l / 4, sixteen bytes. The warps take turns: warp w has lines 8 w..8
// w + 8 of every 32. Each lane has a sum for each of its rows and tokens, over its lines in rising order; then come
// those of the lanes of the same rows, then the warps one after the other. So a token's sums have one order, whatever
// the other tokens and however many.
//
// Weights are read once per tile of tokens, up to four loads of each panel in flight a lane; activations are read from
// the caches.

#pragma once

#include "formats.cuh"
#include "reduce.cuh"

constexpr uint32_t PRODUCT_WARPS = 4;
constexpr uint32_t LINES_OF_WARP = 8;
constexpr uint32_t LINES_OF_BLOCK = PRODUCT_WARPS * LINES_OF_WARP;
// Steps that a lane has in flight; fewer where many sums leave less room for them.
template <uint32_t TOKENS> constexpr uint32_t DEPTH = TOKENS < 8 ? 4 : 2;

// Where the rows of some tokens' activations start, in columns.
template <uint32_t TOKENS> struct Starts {
    size_t of[TOKENS];
};

// Of `TOKENS` tokens from `first` on; past the last one the last again, whose products nobody stores.
template <uint32_t TOKENS> DEVICE Starts<TOKENS> starts_of(const ActivationArguments &x, uint32_t first, uint32_t end) {
    Starts<TOKENS> starts;
    UNROLL
    for (uint32_t t = 0; t < TOKENS; t++) {
        uint32_t token = minimum(first + t, end - 1);
        starts.of[t] = static_cast<size_t>(x.index ? x.index[token] : token) * x.stride;
    }
    return starts;
}

// A lane's sums of its four rows.
template <uint32_t MATRICES, uint32_t TOKENS> struct LaneSums {
    float of[MATRICES][TOKENS][4];
};

// Adds a lane's products of the lines `line`, `line + LINES_OF_BLOCK` ..., COUNT of them, all loaded before the first
// is used.
template <class Format, uint32_t COUNT, uint32_t MATRICES, uint32_t TOKENS>
DEVICE void add_lines(LaneSums<MATRICES, TOKENS> &sums, const Panel (&panels)[MATRICES], const ActivationArguments &x,
                      const Starts<TOKENS> &starts, uint32_t line) {
    uint32_t quarter = thread_index() % 4;
    Words words[COUNT][MATRICES];
    UNROLL
    for (uint32_t i = 0; i < COUNT; i++) {
        UNROLL
        for (uint32_t m = 0; m < MATRICES; m++) {
            size_t offset = static_cast<size_t>(line + i * LINES_OF_BLOCK) * LINE_BYTES + 16 * quarter;
            words[i][m] = load_words(panels[m].lines + offset);
        }
    }
    UNROLL
    for (uint32_t i = 0; i < COUNT; i++) {
        uint32_t at = line + i * LINES_OF_BLOCK;
        typename Format::Input inputs[TOKENS];
        UNROLL
        for (uint32_t t = 0; t < TOKENS; t++) {
            inputs[t] = Format::input(x, starts.of[t], at);
        }
        UNROLL
        for (uint32_t m = 0; m < MATRICES; m++) {
            FourScales scales = four_scales<Format>(panels[m], at * Format::COLUMNS, quarter);
            UNROLL
            for (uint32_t row = 0; row < 4; row++) {
                typename Format::Weights weights = Format::weights(words[i][m].word[row]);
                UNROLL
                for (uint32_t t = 0; t < TOKENS; t++) {
                    float &sum = sums.of[m][t][row];
                    sum = Format::add(sum, weights, scales.row[row], inputs[t]);
                }
            }
        }
    }
}

// A thread's products of one panel of each matrix: thread t has row t % 16 of token t / 16, and those past the tokens
// nothing.
template <uint32_t MATRICES> struct Products {
    float of[MATRICES];
};

// The products of a panel of each matrix with TOKENS tokens. All threads of the block take part.
template <class Format, uint32_t MATRICES, uint32_t TOKENS>
DEVICE Products<MATRICES> products(const Panel (&panels)[MATRICES], const ActivationArguments &x,
                                   const Starts<TOKENS> &starts) {
    static_assert(TOKENS * PANEL_ROWS <= PRODUCT_WARPS * LANES, "a thread a product");
    uint32_t lane = thread_index() % LANES, warp = thread_index() / LANES;
    LaneSums<MATRICES, TOKENS> sums = {};
    uint32_t line = warp * LINES_OF_WARP + lane / 4;
    constexpr uint32_t depth = DEPTH<TOKENS>;
    for (; line + (depth - 1) * LINES_OF_BLOCK < panels[0].line_count; line += depth * LINES_OF_BLOCK) {
        add_lines<Format, depth>(sums, panels, x, starts, line);
    }
    for (; line < panels[0].line_count; line += LINES_OF_BLOCK) {
        add_lines<Format, 1>(sums, panels, x, starts, line);
    }

    SHARED(float, of_warps, MATRICES * PRODUCT_WARPS * TOKENS * PANEL_ROWS);
    // Whoever still reads the products of an earlier tile is waited for.
    barrier();
    UNROLL
    for (uint32_t m = 0; m < MATRICES; m++) {
        UNROLL
        for (uint32_t t = 0; t < TOKENS; t++) {
            UNROLL
            for (uint32_t row = 0; row < 4; row++) {
                float sum = sums.of[m][t][row];
                UNROLL
                for (uint32_t mask = 4; mask < LANES; mask *= 2) {
                    sum += shuffle_xor(sum, mask);
                }
                if (lane < 4) {
                    of_warps[((m * PRODUCT_WARPS + warp) * TOKENS + t) * PANEL_ROWS + 4 * lane + row] = sum;
                }
            }
        }
    }
    barrier();
    Products<MATRICES> results = {};
    if (thread_index() < TOKENS * PANEL_ROWS) {
        UNROLL
        for (uint32_t m = 0; m < MATRICES; m++) {
            const float *of_warp = of_warps + m * PRODUCT_WARPS * TOKENS * PANEL_ROWS + thread_index();
            float sum = of_warp[0];
            UNROLL
            for (uint32_t w = 1; w < PRODUCT_WARPS; w++) {
                sum += of_warp[w * TOKENS * PANEL_ROWS];
            }
            results.of[m] = sum;
        }
    }
    return results;
}

// One kernel for each format and each tile of tokens: MAKE(format, Format, tokens).
#define FOR_EACH_FORMAT_AND_TILE(MAKE)                                                                                 \
    FOR_EACH_TILE(MAKE, f32, F32)                                                                                      \
    FOR_EACH_TILE(MAKE, bf16, Bf16)                                                                                    \
    FOR_EACH_TILE(MAKE, f16, F16)                                                                                      \
    FOR_EACH_TILE(MAKE, int8, Int8)                                                                                    \
    FOR_EACH_TILE(MAKE, int4, Int4)
#define FOR_EACH_TILE(MAKE, format, Format)                                                                            \
    MAKE(format, Format, 1) MAKE(format, Format, 2) MAKE(format, Format, 4) MAKE(format, Format, 8)
