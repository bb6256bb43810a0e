// The interface of kernels, CPU side: a block's threads are fibers of one OS thread (block.hpp).
//
// simt/device.cuh has the same names for a GPU. Contraction of a * b + c is off on both sides: where one rounding is
// wanted, say multiply_add.

#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.hpp"
#include "copies.hpp"
#include "mma.hpp"
#include "numbers.hpp"
#include "simt_macros.hpp"

// Where the thread stands. Blocks are one-dimensional, grids are not.

DEVICE uint32_t thread_index() { return shim::running.thread; }
DEVICE uint32_t block_x() { return shim::running.block[0]; }
DEVICE uint32_t block_y() { return shim::running.block[1]; }
DEVICE uint32_t block_z() { return shim::running.block[2]; }
DEVICE uint32_t grid_y() { return shim::running.grid[1]; }
DEVICE uint32_t grid_z() { return shim::running.grid[2]; }

// Grids. One runs after the other here, so there is nothing to let begin and nothing to wait for.

DEVICE void let_next_grid_begin() {}
DEVICE void wait_for_grid_before() {}

// Meetings. All threads of the block that have not ended take part in a barrier, all 32 lanes of the warp in the
// others.

DEVICE void barrier() { shim::wait_for_block(); }
DEVICE void warp_barrier() { shim::meet(shim::Meeting::warp_barrier, 0); }

// The value that `lane`, modulo 32, gives.
template <typename T>
DEVICE T shuffle(T value, uint32_t lane) {
    static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "four or eight bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shim::meet(shim::Meeting::shuffle, bits)[lane % shim::WARP];
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The value of the lane whose number differs in the bits of `mask`.
template <typename T>
DEVICE T shuffle_xor(T value, uint32_t mask) {
    return shuffle(value, (thread_index() ^ mask) % shim::WARP);
}

// A bit for each lane.
DEVICE uint32_t ballot(bool vote) {
    const uint64_t *all = shim::meet(shim::Meeting::ballot, vote);
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < shim::WARP; lane++) votes |= uint32_t(all[lane]) << lane;
    return votes;
}

// Products of bytes.

// sum + a . b, four signed bytes each.
DEVICE int32_t dot4(int32_t sum, uint32_t a, uint32_t b) {
    for (uint32_t shift = 0; shift < 32; shift += 8) sum += int32_t(int8_t(a >> shift)) * int32_t(int8_t(b >> shift));
    return sum;
}

// sum + a . b, four unsigned bytes by four signed ones.
DEVICE int32_t dot4_unsigned(int32_t sum, uint32_t a, uint32_t b) {
    for (uint32_t shift = 0; shift < 32; shift += 8) sum += int32_t(uint8_t(a >> shift)) * int32_t(int8_t(b >> shift));
    return sum;
}

// Memory.

struct alignas(16) Words {
    uint32_t word[4];
};

// Sixteen bytes that are read once: on a boundary of sixteen, and not kept in the first cache.
DEVICE Words load_words(const void *address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(Words) != 0) shim::stop(716, "load_words: not on 16 bytes");
    Words words;
    memcpy(&words, address, sizeof words);
    return words;
}

// The same, or zeros where it is not wanted: nothing is read then.
DEVICE Words load_words_if(bool wanted, const void *address) { return wanted ? load_words(address) : Words{}; }

// Arithmetic.

DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }

// 2^x with an error of two units in the last place; 0 below 2^-126.
DEVICE float power_of_two(float x) {
    float power = std::exp2(x);
    return power < 0x1p-126f ? 0 : power;
}
DEVICE float exponential(float x) { return std::exp(x); }
DEVICE double exponential(double x) { return std::exp(x); }
DEVICE double logarithm(double x) { return std::log(x); }
DEVICE float square_root(float x) { return std::sqrt(x); }
DEVICE double square_root(double x) { return std::sqrt(x); }
DEVICE float error_function(float x) { return std::erf(x); }

DEVICE void sine_cosine(double angle, double &sine, double &cosine) {
    sine = std::sin(angle);
    cosine = std::cos(angle);
}

DEVICE uint32_t count_bits(uint32_t bits) { return uint32_t(__builtin_popcount(bits)); }

// The other one where one is not a number.
DEVICE float minimum(float a, float b) { return __builtin_fminf(a, b); }
DEVICE double minimum(double a, double b) { return __builtin_fmin(a, b); }
DEVICE float maximum(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE double maximum(double a, double b) { return __builtin_fmax(a, b); }

DEVICE bool is_finite(float x) { return std::isfinite(x); }
DEVICE bool is_finite(double x) { return std::isfinite(x); }
DEVICE bool is_nan(float x) { return std::isnan(x); }
DEVICE bool is_nan(double x) { return std::isnan(x); }
