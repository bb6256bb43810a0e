// Pages of keys and values (backend/kv.rs has the layout): elements [layers][key, value][heads][page_tokens][head_dim]
// in the sequence's dtype, and for int8 f32 scales [layers][key, value][heads][page_tokens] after them.

#pragma once

#include "simt.cuh"

constexpr uint32_t MAX_HEAD_DIM = 512;

enum KvDtype : uint32_t { KV_F32 = 0, KV_BF16 = 1, KV_F16 = 2, KV_INT8 = 3 };

DEVICE uint32_t element_bytes(uint32_t kv_dtype) { return kv_dtype == KV_F32 ? 4 : kv_dtype == KV_INT8 ? 1 : 2; }

// One head's key or value at one position.
struct KvRow {
    // `[head_dim]`
    uint8_t *elements;
    // For int8.
    float *scale;
};

// `half` is 0 for the key and 1 for the value.
DEVICE KvRow kv_row(const CacheArguments &cache, const PlaceArguments &place, uint32_t layer, uint32_t half,
                    uint32_t head, uint32_t position) {
    uint8_t *page = cache.pages[place.first_page + position / cache.page_tokens];
    size_t block = (static_cast<size_t>(layer) * 2 + half) * cache.key_value_heads + head;
    size_t row = block * cache.page_tokens + position % cache.page_tokens;
    size_t rows = static_cast<size_t>(cache.layers) * 2 * cache.key_value_heads * cache.page_tokens;
    size_t row_bytes = static_cast<size_t>(cache.head_dim) * element_bytes(place.kv_dtype);
    return KvRow{page + row * row_bytes, reinterpret_cast<float *>(page + rows * row_bytes) + row};
}
