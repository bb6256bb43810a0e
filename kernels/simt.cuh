// The one way from a kernel to the machine it runs on. The same text of a kernel is compiled by NVRTC for a GPU and by a C++
// compiler for the CPU: each side of this header implements the same names (shim/simt_host.hpp documents them), and
// kernels use no built-in of CUDA past them.

#pragma once

#if defined(__CUDACC__) || defined(__CUDACC_RTC__)
#include "simt/device.cuh"
#else
#include "shim/simt_host.hpp"
#endif

#include "arguments.h"

struct alignas(8) TwoWords {
    uint32_t word[2];
};

struct alignas(8) TwoFloats {
    float number[2];
};

// Of integers they are the same on both sides.
DEVICE int32_t minimum(int32_t a, int32_t b) { return a < b ? a : b; }
DEVICE int32_t maximum(int32_t a, int32_t b) { return a < b ? b : a; }
DEVICE uint32_t minimum(uint32_t a, uint32_t b) { return a < b ? a : b; }
DEVICE uint32_t maximum(uint32_t a, uint32_t b) { return a < b ? b : a; }
DEVICE uint64_t minimum(uint64_t a, uint64_t b) { return a < b ? a : b; }
DEVICE uint64_t maximum(uint64_t a, uint64_t b) { return a < b ? b : a; }
