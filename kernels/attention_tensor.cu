// Causal attention of many tokens of a sequence at once, on tensor cores: softmax(q . k / sqrt(head_dim)) v over paged
// keys and values, with a one-pass softmax as in attention.cu (FlashAttention, Dao et al., 2022; rows are shared out to
// warps as in FlashAttention-2, Dao, 2023).
//
// In: query [tokens, heads * head_dim] f32, rotated; pages in bf16, f16 or int8. Out: attended [tokens, stride] f32.
// A block has one head of a tile: up to 64 consecutive tokens of one sequence, sixteen a warp, the rows of an mma. It
// goes over the sequence's positions sixteen at a time, from the first to its last token's own. Queries, in bf16 or f16
// as keys are, stay in registers, sixteen rows of up to 256 columns a warp, and so do the weighted values of these
// rows, in f32. Of sixteen positions: scores by mma; weights, powers of two relative to the largest score so far; where
// that has grown, sums and weighted values scaled down to it; weighted values by mma, of weights in the values' dtype.
// Numbers of int8 are whole and so exact in bf16; keys' scales multiply scores, values' scales weights.
//
// Keys and values of sixteen positions are a stage in shared memory, [key, value][16][256] of two bytes. There are two
// stages, one barrier each: while one is multiplied the next is copied, by copies that take no registers. A thread
// copies eight columns of one position at a time; those of int8 land in half of their place, and the thread that copied
// them widens them there before the barrier. Units of sixteen bytes are turned by their position (`unit_place`), so
// that lanes that copy or read at once use all banks once: keys are read sixteen bytes a lane, which are columns 8 t to
// 8 t + 7 of 32 (columns of an mma may be any, if they are the same on both sides), values as matrices turned over.
// Columns past head_dim are zeros, up to whole parts of 64.
//
// A row's sums go over the positions in one order, whatever else is in the tile and wherever it begins: results do not
// depend on it. But a value that is not finite makes NaN of up to thirty tokens before it too: the warp that comes to
// its sixteen positions multiplies it by their weight, 0.
// Moves 4 head_dim bytes (2 in int8) a head, tile and position from the second cache: 64 times less than a token alone.
// Grid (heads, tiles of one dtype), 128 threads; the longest tiles come first, so that short ones fill up the end.
// Limit: mma; registers leave room for two blocks a multiprocessor.

#include "halves.cuh"
#include "pages.cuh"
#include "reduce.cuh"

// Tokens of a warp, and rows of an mma.
constexpr uint32_t ROWS = 16;
// Positions of a stage.
constexpr uint32_t POSITIONS = 16;
// Columns that are there or not together.
constexpr uint32_t PART = 64;
constexpr uint32_t PARTS = 4;
// Columns of a unit of sixteen bytes, and units.
constexpr uint32_t UNIT = 8;
constexpr uint32_t PART_UNITS = PART / UNIT;
constexpr uint32_t ROW_UNITS = PARTS * PART_UNITS;
// Of keys; values are behind them.
constexpr uint32_t KEY_UNITS = POSITIONS * ROW_UNITS;
constexpr uint32_t STAGE_UNITS = 2 * KEY_UNITS;
constexpr uint32_t STAGE_SCALES = 2 * POSITIONS;
constexpr float LOG2_E = 1.44269504f;

struct TileBf16 {
    static constexpr uint32_t BYTES = 2;
    static constexpr bool SCALED = false;
    static constexpr uint32_t IS_F16 = 0;

    static DEVICE uint32_t two(float first, float second) { return two_bf16(first, second); }
    static DEVICE void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(sums, a, b); }
};

struct TileF16 {
    static constexpr uint32_t BYTES = 2;
    static constexpr bool SCALED = false;
    static constexpr uint32_t IS_F16 = 1;

    static DEVICE uint32_t two(float first, float second) { return two_f16(first, second); }
    static DEVICE void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(sums, a, b); }
};

struct TileInt8 : TileBf16 {
    static constexpr uint32_t BYTES = 1;
    static constexpr bool SCALED = true;
};

// Where a unit of a position of a stage's keys or values is.
DEVICE uint32_t unit_place(uint32_t position, uint32_t unit) {
    return position * ROW_UNITS + (unit ^ (4 * (position % 2)) ^ (position / 2 % 4));
}

// Eight int8 as bf16.
DEVICE Words wide_unit(const TwoWords &bytes) {
    Words words;
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        // On 2^23 whole numbers are the low bits of a float; those of 128 more than a byte are its own, but for one.
        uint32_t two = (bytes.word[i / 2] ^ 0x80808080) >> 16 * (i % 2);
        float low = float_of_bits(0x4b000000 | (two & 0xff)) - 8388736.0f;
        float high = float_of_bits(0x4b000000 | (two >> 8 & 0xff)) - 8388736.0f;
        words.word[i] = bits_of_float(low) >> 16 | (bits_of_float(high) & 0xffff0000);
    }
    return words;
}

// What a thread brings of each stage: of one position's key and value a unit of each part.
template <class Kv> struct Bringer {
    const CacheArguments &cache;
    const PlaceArguments &place;
    uint32_t layer;
    uint32_t key_value_head;
    // Positions that the tile sees.
    uint32_t seen;

    // Where bytes land; those of a position and the next in banks of their own.
    static DEVICE TwoWords *landing(Words *unit) { return reinterpret_cast<TwoWords *>(unit) + position() % 2; }
    static DEVICE uint32_t position() { return thread_index() / PART_UNITS; }
    static DEVICE uint32_t unit() { return thread_index() % PART_UNITS; }

    DEVICE void begin(uint32_t first, Words *units, float *scales) const {
        // Past the last position the last again: no weight is for it.
        KvRow key = kv_row(cache, place, layer, 0, key_value_head, minimum(first + position(), seen - 1));
        size_t to_value = static_cast<size_t>(cache.key_value_heads) * cache.page_tokens;
        UNROLL
        for (uint32_t part = 0; part < PARTS; part++) {
            uint32_t its_unit = part * PART_UNITS + unit(), column = its_unit * UNIT;
            if (part * PART >= cache.head_dim) {
                break;
            }
            bool is_there = column < cache.head_dim;
            Words *to = units + unit_place(position(), its_unit);
            const uint8_t *from = key.elements + column * Kv::BYTES;
            const uint8_t *from_value = from + to_value * cache.head_dim * Kv::BYTES;
            if constexpr (Kv::SCALED) {
                copy_async<UNIT>(landing(to), from, is_there);
                copy_async<UNIT>(landing(to + KEY_UNITS), from_value, is_there);
            } else {
                copy_async<2 * UNIT>(to, from, is_there);
                copy_async<2 * UNIT>(to + KEY_UNITS, from_value, is_there);
            }
        }
        if (Kv::SCALED && unit() < 2) {
            copy_async<4>(scales + unit() * POSITIONS + position(), key.scale + unit() * to_value, true);
        }
    }

    DEVICE void finish(Words *units) const {
        wait_for_copies();
        if constexpr (Kv::SCALED) {
            UNROLL
            for (uint32_t part = 0; part < PARTS; part++) {
                if (part * PART >= cache.head_dim) {
                    break;
                }
                Words *key = units + unit_place(position(), part * PART_UNITS + unit()), *value = key + KEY_UNITS;
                *key = wide_unit(*landing(key));
                *value = wide_unit(*landing(value));
            }
        }
    }
};

// A lane's two rows of a warp's sixteen: g and g + 8.
struct TileRows {
    float values[PARTS * PART_UNITS][4];
    float largest[2];
    // Of the weights that this lane has made.
    float sums[2];
};

DEVICE float minus_infinity() { return float_of_bits(0xff800000); }

// Queries of the lane's rows as an mma takes them, two steps for each 32 columns: of these lane t has 8 t to 8 t + 7.
template <class Kv>
DEVICE void load_query(uint32_t (&query)[4 * PARTS][4], const float *row, uint32_t which, uint32_t head_dim) {
    UNROLL
    for (uint32_t i = 0; i < 2 * PARTS; i++) {
        uint32_t column = i * 4 * UNIT + thread_index() % 4 * UNIT;
        UNROLL
        for (uint32_t half = 0; half < 2; half++) {
            Words four = load_words_if(column < head_dim, row + column + 4 * half);
            UNROLL
            for (uint32_t pair = 0; pair < 2; pair++) {
                uint32_t first = to_half(float_of_bits(four.word[2 * pair]), Kv::IS_F16);
                uint32_t second = to_half(float_of_bits(four.word[2 * pair + 1]), Kv::IS_F16);
                query[2 * i + half][which + 2 * pair] = first | second << 16;
            }
        }
    }
}

// scores of the lane's rows: columns 2 t and 2 t + 1 of each eight positions. Each is made of two sums, so that four mma
// of a warp do not wait for each other.
template <class Kv>
DEVICE void multiply_keys(float (&scores)[2][4], const uint32_t (&query)[4 * PARTS][4], const Words *keys,
                          uint32_t head_dim) {
    uint32_t group = thread_index() % LANES / 4, place = thread_index() % 4;
    float sums[2][2][4] = {};
    UNROLL
    for (uint32_t part = 0; part < PARTS; part++) {
        if (part * PART >= head_dim) {
            break;
        }
        UNROLL
        for (uint32_t i = 2 * part; i < 2 * part + 2; i++) {
            UNROLL
            for (uint32_t eight = 0; eight < 2; eight++) {
                Words unit = keys[unit_place(8 * eight + group, 4 * i + place)];
                UNROLL
                for (uint32_t step = 0; step < 2; step++) {
                    uint32_t b[2] = {unit.word[2 * step], unit.word[2 * step + 1]};
                    Kv::mma(sums[step][eight], query[2 * i + step], b);
                }
            }
        }
    }
    UNROLL
    for (uint32_t i = 0; i < 8; i++) {
        scores[i / 4][i % 4] = sums[0][i / 4][i % 4] + sums[1][i / 4][i % 4];
    }
}

// Scores to weights, relative to what is now the largest score of their row. Returns by what all before is to be
// multiplied.
DEVICE TwoFloats weigh(TileRows &rows, float (&scores)[2][4]) {
    TwoFloats factors;
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        float largest = rows.largest[row];
        UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            // What is not a number is not the largest, and its weight is not a number.
            float score = scores[i / 2][2 * row + i % 2];
            largest = score > largest ? score : largest;
        }
        UNROLL
        for (uint32_t mask = 1; mask < 4; mask *= 2) {
            float other = shuffle_xor(largest, mask);
            largest = other > largest ? other : largest;
        }
        // Among nothing but negative infinities all weights are 0.
        float base = largest == minus_infinity() ? 0.0f : largest;
        factors.number[row] = power_of_two(rows.largest[row] - base);
        rows.largest[row] = largest;
        rows.sums[row] *= factors.number[row];
        UNROLL
        for (uint32_t i = 0; i < 4; i++) {
            float &score = scores[i / 2][2 * row + i % 2];
            score = power_of_two(score - base);
            rows.sums[row] += score;
        }
    }
    return factors;
}

DEVICE void scale_values(TileRows &rows, const TwoFloats &factors, uint32_t head_dim) {
    UNROLL
    for (uint32_t part = 0; part < PARTS; part++) {
        if (part * PART >= head_dim) {
            break;
        }
        UNROLL
        for (uint32_t unit = part * PART_UNITS; unit < (part + 1) * PART_UNITS; unit++) {
            UNROLL
            for (uint32_t i = 0; i < 4; i++) {
                rows.values[unit][i] *= factors.number[i / 2];
            }
        }
    }
}

template <class Kv>
DEVICE void add_values(TileRows &rows, const float (&weights)[2][4], const Words *values, uint32_t head_dim) {
    uint32_t lane = thread_index() % LANES;
    uint32_t a[4];
    UNROLL
    for (uint32_t i = 0; i < 4; i++) {
        a[i] = Kv::two(weights[i / 2][2 * (i % 2)], weights[i / 2][2 * (i % 2) + 1]);
    }
    UNROLL
    for (uint32_t part = 0; part < PARTS; part++) {
        if (part * PART >= head_dim) {
            break;
        }
        UNROLL
        for (uint32_t unit = part * PART_UNITS; unit < (part + 1) * PART_UNITS; unit += 2) {
            uint32_t words[4];
            load_matrices_transposed(words, values + unit_place(lane % POSITIONS, unit + lane / POSITIONS));
            UNROLL
            for (uint32_t i = 0; i < 2; i++) {
                uint32_t b[2] = {words[2 * i], words[2 * i + 1]};
                Kv::mma(rows.values[unit + i], a, b);
            }
        }
    }
}

template <class Kv>
DEVICE void attend_tile(const AttentionArguments &arguments, const TileArguments &tile, const PlaceArguments &place,
                        Words *units, float *scales) {
    const CacheArguments &cache = arguments.cache;
    uint32_t head_dim = cache.head_dim, head = block_x();
    uint32_t group = thread_index() % LANES / 4, lane_of_four = thread_index() % 4;
    // The warp's first token, and how many positions its last one sees; none where it has no token.
    uint32_t warp_first = thread_index() / LANES * ROWS;
    uint32_t warp_seen = warp_first < tile.count ? place.position + minimum(warp_first + ROWS, tile.count) : 0;
    // Past the last token the last again, whose results nobody stores.
    uint32_t token[2], query[4 * PARTS][4];
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        token[row] = minimum(warp_first + group + 8 * row, tile.count - 1);
        size_t query_row = static_cast<size_t>(tile.first + token[row]) * arguments.heads + head;
        load_query<Kv>(query, arguments.query + query_row * head_dim, row, head_dim);
    }
    float scale = LOG2_E / square_root(static_cast<float>(head_dim));
    uint32_t seen = place.position + tile.count;
    Bringer<Kv> bringer{cache, place, arguments.layer, head / (arguments.heads / cache.key_value_heads), seen};
    TileRows rows = {{}, {minus_infinity(), minus_infinity()}, {}};
    bringer.begin(0, units, scales);
    for (uint32_t first = 0; first < seen; first += POSITIONS) {
        uint32_t turn = first / POSITIONS % 2, other = 1 - turn;
        Words *keys = units + turn * STAGE_UNITS;
        bringer.finish(keys);
        // This stage is there for all, and whoever still multiplied the one before has ended.
        barrier();
        if (first + POSITIONS < seen) {
            bringer.begin(first + POSITIONS, units + other * STAGE_UNITS, scales + other * STAGE_SCALES);
        }
        if (first >= warp_seen) {
            continue;
        }
        float scores[2][4];
        multiply_keys<Kv>(scores, query, keys, head_dim);
        const TwoFloats *its_scales = reinterpret_cast<const TwoFloats *>(scales + turn * STAGE_SCALES);
        UNROLL
        for (uint32_t eight = 0; eight < 2; eight++) {
            TwoFloats factors = {{scale, scale}};
            if constexpr (Kv::SCALED) {
                TwoFloats of_keys = its_scales[4 * eight + lane_of_four];
                factors = TwoFloats{{scale * of_keys.number[0], scale * of_keys.number[1]}};
            }
            UNROLL
            for (uint32_t i = 0; i < 4; i++) {
                scores[eight][i] *= factors.number[i % 2];
            }
        }
        // Past the warp's first token there are positions that not all see.
        if (first + POSITIONS > place.position + warp_first + 1) {
            UNROLL
            for (uint32_t i = 0; i < 8; i++) {
                uint32_t position = first + 8 * (i / 4) + 2 * lane_of_four + i % 2;
                if (position > place.position + token[i / 2 % 2]) {
                    scores[i / 4][i % 4] = minus_infinity();
                }
            }
        }
        TwoFloats factors = weigh(rows, scores);
        // By 1 nothing changes.
        if (ballot(factors.number[0] != 1.0f || factors.number[1] != 1.0f)) {
            scale_values(rows, factors, head_dim);
        }
        if constexpr (Kv::SCALED) {
            UNROLL
            for (uint32_t i = 0; i < 8; i++) {
                scores[i / 4][i % 4] *= its_scales[POSITIONS / 2 + 4 * (i / 4) + lane_of_four].number[i % 2];
            }
        }
        add_values<Kv>(rows, scores, keys + KEY_UNITS, head_dim);
    }
    UNROLL
    for (uint32_t row = 0; row < 2; row++) {
        float sum = rows.sums[row];
        UNROLL
        for (uint32_t mask = 1; mask < 4; mask *= 2) {
            sum += shuffle_xor(sum, mask);
        }
        float norm = 1.0f / sum;
        bool is_stored = warp_first + group + 8 * row < tile.count;
        size_t attended_row = static_cast<size_t>(tile.first + token[row]) * arguments.stride + head * head_dim;
        TwoFloats *attended = reinterpret_cast<TwoFloats *>(arguments.attended + attended_row);
        UNROLL
        for (uint32_t unit = 0; unit < ROW_UNITS; unit++) {
            if (is_stored && unit * UNIT < head_dim) {
                const float(&values)[4] = rows.values[unit];
                attended[4 * unit + lane_of_four] = TwoFloats{{values[2 * row] * norm, values[2 * row + 1] * norm}};
            }
        }
    }
}

// Kernels of their own, as one of all needs more registers than there are.
#define MAKE_ATTENTION(dtype, Kv)                                                                                      \
    KERNEL(attention_tensor_##dtype, AttentionArguments, 128) {                                                        \
        SHARED(Words, units, 2 * STAGE_UNITS);                                                                         \
        SHARED(TwoFloats, scales, Kv::SCALED ? STAGE_SCALES : 1);                                                      \
        TileArguments tile = arguments.tiles[block_y()];                                                               \
        attend_tile<Kv>(arguments, tile, arguments.places[tile.first], units, reinterpret_cast<float *>(scales));      \
    }
MAKE_ATTENTION(bf16, TileBf16)
MAKE_ATTENTION(f16, TileF16)
MAKE_ATTENTION(int8, TileInt8)
