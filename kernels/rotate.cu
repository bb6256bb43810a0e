// RoPE on queries and keys in place, then keys and values to their pages.
//
// In: query [tokens, heads * head_dim], key and value [tokens, key_value_heads * head_dim] f32, frequencies [head_dim /
// 2]. Out: query and key rotated; the token's position in its sequence's pages, in f32, bf16, f16, or int8 with a scale
// for each head. Moves query and key once each way, the value once, and the page's elements once; the key is read again
// from the cache. Grid (tokens), 256 threads. Limit: the wait for memory; a sine and a cosine in f64 for each pair of a
// head. Formulas: pairs are (i, i + head_dim / 2), the angle is position * frequency in f32, as the published code has
// it, its sine and cosine as exact as f32 holds them. Rounding: cpu/kernels/store.rs.

#include "int8.cuh"
#include "pages.cuh"

constexpr uint32_t THREADS = 256;

DEVICE void rotate_heads(float *heads, uint32_t count, uint32_t head_dim, const float *cosines, const float *sines) {
    uint32_t pairs = head_dim / 2;
    for (uint32_t index = thread_index(); index < count * pairs; index += THREADS) {
        uint32_t pair = index % pairs;
        float *first = heads + index / pairs * head_dim + pair;
        float *second = first + pairs;
        float x = *first, y = *second;
        *first = x * cosines[pair] - y * sines[pair];
        *second = y * cosines[pair] + x * sines[pair];
    }
}

// A warp stores `numbers: [head_dim]`.
DEVICE void store(const float *numbers, uint32_t head_dim, uint32_t kv_dtype, const KvRow &row) {
    uint32_t lane = thread_index() % LANES;
    Int8Scale scale = {};
    if (kv_dtype == KV_INT8) {
        uint32_t largest = 0;
        for (uint32_t column = lane; column < head_dim; column += LANES) {
            largest = maximum(largest, magnitude(numbers[column]));
        }
        scale = int8_scale(join_lanes(largest, Largest()));
        if (lane == 0) {
            *row.scale = scale.scale;
        }
    }
    for (uint32_t column = lane; column < head_dim; column += LANES) {
        float number = numbers[column];
        switch (kv_dtype) {
            case KV_F32: reinterpret_cast<float *>(row.elements)[column] = number; break;
            case KV_BF16: reinterpret_cast<uint16_t *>(row.elements)[column] = float_to_bf16(number); break;
            case KV_F16: reinterpret_cast<uint16_t *>(row.elements)[column] = float_to_f16(number); break;
            default: reinterpret_cast<int8_t *>(row.elements)[column] = to_int8(number, scale.inverse);
        }
    }
}

KERNEL(rotate_and_store, RotateArguments, 256) {
    SHARED(float, cosines, MAX_HEAD_DIM / 2);
    SHARED(float, sines, MAX_HEAD_DIM / 2);
    size_t token = block_x();
    const CacheArguments &cache = arguments.cache;
    PlaceArguments place = arguments.places[token];
    uint32_t head_dim = cache.head_dim, heads = cache.key_value_heads;
    for (uint32_t pair = thread_index(); pair < head_dim / 2; pair += THREADS) {
        double sine, cosine;
        sine_cosine(static_cast<float>(place.position) * arguments.frequencies[pair], sine, cosine);
        cosines[pair] = static_cast<float>(cosine);
        sines[pair] = static_cast<float>(sine);
    }
    barrier();
    float *key = arguments.key + token * heads * head_dim;
    const float *value = arguments.value + token * heads * head_dim;
    rotate_heads(arguments.query + token * arguments.heads * head_dim, arguments.heads, head_dim, cosines, sines);
    rotate_heads(key, heads, head_dim, cosines, sines);
    barrier();
    for (uint32_t index = thread_index() / LANES; index < 2 * heads; index += THREADS / LANES) {
        uint32_t half = index / heads, head = index % heads;
        const float *numbers = (half == 0 ? key : value) + head * head_dim;
        store(numbers, head_dim, place.kv_dtype, kv_row(cache, place, arguments.layer, half, head, place.position));
    }
}
