// Sums and maxima over the threads of a block, in one order: the lanes of a warp in a butterfly, then the warps one
// after the other. Every thread gets the result. Threads of a block: 32 * WARPS.

#pragma once

#include "simt.cuh"

constexpr uint32_t LANES = 32;

// Calls the steps of a butterfly over all lanes.
template <class T, class Join> DEVICE T join_lanes(T value, Join join) {
    for (uint32_t mask = LANES / 2; mask > 0; mask /= 2) {
        value = join(value, shuffle_xor(value, mask));
    }
    return value;
}

template <uint32_t WARPS, class T, class Join> DEVICE T join_block(T value, Join join) {
    SHARED(T, of_warps, WARPS);
    value = join_lanes(value, join);
    // Whoever still reads what an earlier call left is waited for.
    barrier();
    if (thread_index() % LANES == 0) {
        of_warps[thread_index() / LANES] = value;
    }
    barrier();
    value = of_warps[0];
    for (uint32_t warp = 1; warp < WARPS; warp++) {
        value = join(value, of_warps[warp]);
    }
    return value;
}

struct Sum {
    template <class T> DEVICE T operator()(T a, T b) const { return a + b; }
};

struct Largest {
    template <class T> DEVICE T operator()(T a, T b) const { return maximum(a, b); }
};
