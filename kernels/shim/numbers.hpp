// Numbers in the formats of kernels, by the rules of src/backend/cpu/kernels/store.rs, bit for bit.

#pragma once

#include <cstdint>
#include <cstring>

#include "simt_macros.hpp"

DEVICE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

DEVICE uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

DEVICE float bf16_to_float(uint16_t value) { return float_of_bits(uint32_t(value) << 16); }

DEVICE float f16_to_float(uint16_t value) {
    uint32_t sign = uint32_t(value & 0x8000) << 16;
    uint32_t magnitude = value & 0x7fff;
    if (magnitude >= 0x7c00) {
        // Infinity stays, and what is not a number becomes quiet.
        uint32_t quiet = magnitude > 0x7c00 ? 0x00400000 : 0;
        return float_of_bits(sign | 0x7f800000 | quiet | magnitude << 13);
    }
    if (magnitude < 0x0400) {
        // Multiples of 2^-24, exact in f32.
        float value = float(magnitude) * 0x1p-24f;
        return float_of_bits(sign | bits_of_float(value));
    }
    return float_of_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
}

// To nearest, ties to even. Numbers past the largest become infinite.
DEVICE uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Two numbers in a word, the first in its low half.
DEVICE uint32_t two_bf16(float first, float second) {
    return float_to_bf16(first) | uint32_t(float_to_bf16(second)) << 16;
}

// To nearest, ties to even. Numbers past 65504, the largest, become 65504; infinity stays.
DEVICE uint16_t float_to_f16(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude == 0x7f800000) return uint16_t(sign | 0x7c00);
    uint32_t largest = bits_of_float(65504.0f);
    uint32_t finite = magnitude < largest ? magnitude : largest;
    if (finite < uint32_t(127 - 14) << 23) {
        // Adding 1/2 makes the processor round to multiples of 2^-24, the step of subnormals; the sum's low bits count them.
        return uint16_t(sign | (bits_of_float(float_of_bits(finite) + 0.5f) - bits_of_float(0.5f)));
    }
    // Moves the exponent's bias from 127 to 15, then rounds the 13 mantissa bits away.
    return uint16_t(sign | (finite - (uint32_t(127 - 15) << 23) + 0xfff + (finite >> 13 & 1)) >> 13);
}

// As two_bf16, of numbers that are none or not past 65504.
DEVICE uint32_t two_f16(float first, float second) {
    return float_to_f16(first) | uint32_t(float_to_f16(second)) << 16;
}
