// Scalar functions of the forward pass, from plain arithmetic: cpu/kernels/math.rs once more, the same bits on every
// device.

#pragma once

#include "simt.cuh"

// e^x with a relative error below 2e-7; 0 below -87.3, and never infinite.
//
// Cody-Waite reduction to 2^n * e^r, |r| <= ln2/2, and the degree-5 polynomial of Cephes expf.
DEVICE float e_to_the(float x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding and subtracting it rounds to a whole number.
    float clamped = x < -87.3f ? -87.3f : x > 88.0f ? 88.0f : x;
    float shifted = clamped * 1.44269504f + round;
    float n = shifted - round;
    float r = (clamped - n * 0.6933594f) - n * -2.1219444e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    float e = p * r * r + r + 1.0f;
    // The last bits of `shifted` are n, in two's complement.
    float scale = float_of_bits((bits_of_float(shifted) << 23) + (127u << 23));
    return x < -87.3f ? 0.0f : e * scale;
}

// GeLU by the tanh approximation, x/2 (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3).
DEVICE float gelu_tanh(float x) {
    const float twice_root = 1.5957692f;  // 2 sqrt(2/pi)
    float u = twice_root * (x + 0.044715f * x * x * x);
    return x / (1.0f + e_to_the(-u));
}

// GeLU by its definition, x/2 (1 + erf(x / sqrt 2)).
DEVICE float gelu_erf(float x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }
