// Numbers to whole numbers of eight bits with a scale: to_int8 of cpu/kernels/store.rs, bit for bit.
//
// The scale is absmax / 127, rounding to nearest, ties to even. Zeros, and numbers whose absmax is below 1.5e-36, where
// the scale would lose its digits, have scale 0. Where one is not finite, the scale is not a number.

#pragma once

#include "reduce.cuh"

struct Int8Scale {
    float scale;
    float inverse;
};

// Of a lane's number, for the largest of many: as whole numbers magnitudes have the same order, and what is not a
// number comes last.
DEVICE uint32_t magnitude(float value) { return bits_of_float(value) & 0x7fffffff; }

DEVICE Int8Scale int8_scale(uint32_t largest_magnitude) {
    float absmax = float_of_bits(largest_magnitude);
    float scale = absmax / 127.0f;
    if (largest_magnitude >= 0x7f800000) {
        return Int8Scale{float_of_bits(0x7fc00000), 0.0f};
    }
    // The smallest normal number.
    if (scale < float_of_bits(0x00800000)) {
        return Int8Scale{0.0f, 0.0f};
    }
    return Int8Scale{scale, 127.0f / absmax};
}

DEVICE int8_t to_int8(float value, float inverse) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to a whole number.
    float whole = (value * inverse + round) - round;
    return static_cast<int8_t>(is_nan(whole) ? 0 : static_cast<int32_t>(whole));
}

// A warp rounds 32 columns, each lane one, to `integers: [32]` and `block`.
DEVICE void round_block(float value, int8_t *integers, BlockArguments *block) {
    uint32_t lane = thread_index() % LANES;
    Int8Scale scale = int8_scale(join_lanes(magnitude(value), Largest()));
    int8_t integer = to_int8(value, scale.inverse);
    integers[lane] = integer;
    int32_t sum = join_lanes(static_cast<int32_t>(integer), Sum());
    if (lane == 0) {
        *block = BlockArguments{scale.scale, sum};
    }
}
