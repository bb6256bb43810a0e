// Products of small matrices by a warp, as tensor cores have them: sums [16, 8] += a [16, k] . b [k, 8].
//
// Both sides come in words of four bytes along k: two bf16 or f16, or four signed bytes, lower ones first; k is eight
// words. Of them lane 4 g + t holds, in a kernel on either side of simt.cuh:
//
// | | | | | |
// |---|---|---|---|---|
// | a    | row g, word t    | row g + 8, word t    | row g, word t + 4 | row g + 8, word t + 4    |
// | b    | word t, column g | word t + 4, column g | | |
// | sums | row g, column 2t | row g, column 2t + 1  | row g + 8, column 2t | row g + 8, column 2t + 1 |
//
// (mma.m16n8k16 and m16n8k32 in the PTX manual.) Sums of bytes are exact. Those in f32 are here made in rising k,
// rounded at each of the exact products; in which order a GPU does it, and how it rounds between, is not documented.

#pragma once

#include <cstdint>
#include <cstring>

#include "block.hpp"
#include "numbers.hpp"

namespace shim {

// What a lane's sums are made of: rows g and g + 8 of a, columns 2t and 2t + 1 of b.
struct Operands {
    uint32_t rows[2][8];
    uint32_t columns[2][8];
};

DEVICE Operands exchange(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    uint32_t lane = running.thread % WARP, group = lane / 4, place = lane % 4;
    Operands operands;
    for (uint32_t half = 0; half < 2; half++) {
        const uint64_t *pairs = meet(Meeting::mma, a[2 * half] | uint64_t(a[2 * half + 1]) << 32);
        for (uint32_t word = 0; word < 4; word++) {
            uint64_t pair = pairs[4 * group + word];
            operands.rows[0][4 * half + word] = uint32_t(pair);
            operands.rows[1][4 * half + word] = uint32_t(pair >> 32);
        }
    }
    const uint64_t *pairs = meet(Meeting::mma, b[0] | uint64_t(b[1]) << 32);
    for (uint32_t column = 0; column < 2; column++) {
        for (uint32_t word = 0; word < 4; word++) {
            uint64_t pair = pairs[4 * (2 * place + column) + word];
            operands.columns[column][word] = uint32_t(pair);
            operands.columns[column][word + 4] = uint32_t(pair >> 32);
        }
    }
    return operands;
}

// Each sum with `add` of a word of a and one of b, in rising k.
template <typename Number, typename Add>
DEVICE void mma(Number (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Add add) {
    Operands operands = exchange(a, b);
    for (uint32_t sum = 0; sum < 4; sum++) {
        for (uint32_t word = 0; word < 8; word++) {
            sums[sum] = add(sums[sum], operands.rows[sum / 2][word], operands.columns[sum % 2][word]);
        }
    }
}

}  // namespace shim

// Four matrices [8, 8] of two bytes, turned over: `row` of lane 8 i + r is row r of matrix i, sixteen aligned bytes in
// shared memory. Word i of lane 4 g + t has rows 2t and 2t + 1 of column g of matrix i (ldmatrix.trans in the PTX
// manual).
DEVICE void load_matrices_transposed(uint32_t (&words)[4], const void *row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) shim::stop(716, "load_matrices_transposed: not on 16 bytes");
    uint64_t halves[2];
    memcpy(halves, row, sizeof halves);
    uint32_t lane = shim::running.thread % shim::WARP, group = lane / 4, place = lane % 4;
    for (uint32_t i = 0; i < 4; i++) words[i] = 0;
    for (uint32_t half = 0; half < 2; half++) {
        const uint64_t *rows = shim::meet(shim::Meeting::load_matrices, halves[half]);
        for (uint32_t i = 0; half == group / 4 && i < 4; i++) {
            uint32_t first = uint16_t(rows[8 * i + 2 * place] >> 16 * (group % 4));
            uint32_t second = uint16_t(rows[8 * i + 2 * place + 1] >> 16 * (group % 4));
            words[i] = first | second << 16;
        }
    }
}

DEVICE void mma_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    shim::mma(sums, a, b, [](float sum, uint32_t a, uint32_t b) {
        sum = __builtin_fmaf(bf16_to_float(uint16_t(a)), bf16_to_float(uint16_t(b)), sum);
        return __builtin_fmaf(bf16_to_float(uint16_t(a >> 16)), bf16_to_float(uint16_t(b >> 16)), sum);
    });
}

DEVICE void mma_f16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    shim::mma(sums, a, b, [](float sum, uint32_t a, uint32_t b) {
        sum = __builtin_fmaf(f16_to_float(uint16_t(a)), f16_to_float(uint16_t(b)), sum);
        return __builtin_fmaf(f16_to_float(uint16_t(a >> 16)), f16_to_float(uint16_t(b >> 16)), sum);
    });
}

DEVICE void mma_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    shim::mma(sums, a, b, [](int32_t sum, uint32_t a, uint32_t b) {
        for (uint32_t shift = 0; shift < 32; shift += 8) sum += int32_t(int8_t(a >> shift)) * int8_t(b >> shift);
        return sum;
    });
}
