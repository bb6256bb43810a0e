// The words of simt.cuh on a GPU: thin names for what NVRTC and nvcc have built in. The processor's side is in shim/.

#pragma once

#ifdef __CUDACC_RTC__
// NVRTC comes without headers.
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#else
#include <stdint.h>
#endif

#define DEVICE __device__ __forceinline__

// Before a loop of a number of rounds known here, whose arrays are to be registers.
#define UNROLL _Pragma("unroll")

// What every thread of every kernel begins with. From sm_90 on a grid may be launched while the one before it in the stream
// still runs (programmatic dependent launch): the first word lets the next grid begin once all blocks of this one have
// begun, the second waits until the grid before is complete and its writes can be seen. Until then no thread has read or
// written anything, nor ended, so a grid is complete only after the one before it. That makes chains safe: a grid waits
// for its neighbour alone, which has waited for its own, however many have begun. Older GPUs have neither.
DEVICE void let_next_grid_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
DEVICE void wait_for_grid_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A kernel and what it is given: `KERNEL(name, NameArguments, threads of a block) { ... arguments.x ... }`.
#define KERNEL(name, Arguments, threads)                                                                               \
    DEVICE void body_of_##name(const Arguments &arguments);                                                            \
    extern "C" __global__ void __launch_bounds__(threads, 1) name(const __grid_constant__ Arguments arguments) {       \
        let_next_grid_begin();                                                                                         \
        wait_for_grid_before();                                                                                        \
        body_of_##name(arguments);                                                                                     \
    }                                                                                                                  \
    DEVICE void body_of_##name(const Arguments &arguments)

// An array that the threads of a block share. It begins with anything.
#define SHARED(type, name, count) __shared__ type name[count]

DEVICE uint32_t thread_index() { return threadIdx.x; }
DEVICE uint32_t block_x() { return blockIdx.x; }
DEVICE uint32_t block_y() { return blockIdx.y; }
DEVICE uint32_t block_z() { return blockIdx.z; }
DEVICE uint32_t grid_y() { return gridDim.y; }
DEVICE uint32_t grid_z() { return gridDim.z; }
DEVICE void barrier() { __syncthreads(); }

// All lanes of a warp take part in these.
DEVICE void warp_barrier() { __syncwarp(); }
template <class T> DEVICE T shuffle_xor(T value, uint32_t mask) { return __shfl_xor_sync(0xffffffff, value, mask); }
template <class T> DEVICE T shuffle(T value, uint32_t lane) { return __shfl_sync(0xffffffff, value, lane); }
// Renamed because the compilers have an old function of this very name.
#define ballot votes_of_lanes
DEVICE uint32_t ballot(bool vote) { return __ballot_sync(0xffffffff, vote); }

// sum + four products of bytes: both sides signed, or the first unsigned.
DEVICE int32_t dot4(int32_t sum, uint32_t a, uint32_t b) {
    int32_t result;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}
DEVICE int32_t dot4_unsigned(int32_t sum, uint32_t a, uint32_t b) {
    int32_t result;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(sum));
    return result;
}

// sums [16, 8] += a [16, k] . b [k, 8] of all lanes: which parts a lane holds is in shim/mma.hpp.
DEVICE void mma_bf16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_int8(int32_t (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An address in shared memory as the instructions for it take it.
DEVICE uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four matrices [8, 8] of two bytes, turned over: which row and what a lane has of them is in shim/mma.hpp.
DEVICE void load_matrices_transposed(uint32_t (&words)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// A copy to shared memory that goes on while its thread does (shim/copies.hpp has the rules); one of 16 bytes goes past
// the first cache.
template <uint32_t BYTES> DEVICE void copy_async(void *to, const void *from, bool wanted) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "4, 8 or 16 bytes");
    uint32_t address = shared_address(to), bytes = wanted ? BYTES : 0;
    if constexpr (BYTES == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(address), "l"(from), "r"(bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;"
                     :
                     : "r"(address), "l"(from), "r"(bytes), "n"(BYTES)
                     : "memory");
    }
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }

struct alignas(16) Words {
    uint32_t word[4];
};

// A load of what nobody writes during the kernel, which may come from a cache that is not kept coherent. From sm_90 on the
// grid before this one may still write when the kernel has begun, so the load is an ordinary one.
#if __CUDA_ARCH__ >= 900
#define LOAD_OF_WORDS "ld.global.L1::no_allocate.v4.u32"
#else
#define LOAD_OF_WORDS "ld.global.nc.L1::no_allocate.v4.u32"
#endif

// Sixteen aligned bytes that nobody writes during the kernel and this block does not read again.
DEVICE Words load_words(const void *from) {
    Words words;
    asm(LOAD_OF_WORDS " {%0, %1, %2, %3}, [%4];"
        : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
        : "l"(from));
    return words;
}

// The same, or zeros where it is not wanted: nothing is read then.
DEVICE Words load_words_if(bool wanted, const void *from) {
    Words words;
    asm("{\n"
        ".reg .pred wanted;\n"
        "setp.ne.u32 wanted, %5, 0;\n"
        "mov.u32 %0, 0;\n"
        "mov.u32 %1, 0;\n"
        "mov.u32 %2, 0;\n"
        "mov.u32 %3, 0;\n"
        "@wanted " LOAD_OF_WORDS " {%0, %1, %2, %3}, [%4];\n"
        "}"
        : "=&r"(words.word[0]), "=&r"(words.word[1]), "=&r"(words.word[2]), "=&r"(words.word[3])
        : "l"(from), "r"(static_cast<uint32_t>(wanted)));
    return words;
}

DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
DEVICE uint32_t bits_of_float(float value) { return __float_as_uint(value); }
DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
DEVICE float f16_to_float(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

// These two by the rules of cpu/kernels/store.rs.
DEVICE uint16_t float_to_bf16(float value) {
    uint32_t bits = bits_of_float(value);
    bool is_number = (bits & 0x7fffffff) <= 0x7f800000;
    return static_cast<uint16_t>((is_number ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16);
}
DEVICE uint16_t float_to_f16(float value) {
    uint32_t magnitude = bits_of_float(value) & 0x7fffffff, sign = bits_of_float(value) >> 16 & 0x8000;
    if (magnitude >= 0x7f800000) {
        return static_cast<uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    }
    // 65504, the largest.
    uint32_t finite = magnitude < 0x477fe000 ? magnitude : 0x477fe000;
    uint16_t rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded) : "f"(float_of_bits(finite)));
    return static_cast<uint16_t>(sign | rounded);
}

// Two numbers in a word, the first in its low half; which NaN comes of one is the hardware's choice.
DEVICE uint32_t two_bf16(float first, float second) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}
// Of numbers that are none or not past 65504.
DEVICE uint32_t two_f16(float first, float second) {
    uint32_t both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// a * b + c, rounded once.
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

DEVICE float power_of_two(float x) {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
    return power;
}
DEVICE float exponential(float x) { return expf(x); }
DEVICE double exponential(double x) { return exp(x); }
DEVICE double logarithm(double x) { return log(x); }
DEVICE float square_root(float x) { return __fsqrt_rn(x); }
DEVICE double square_root(double x) { return __dsqrt_rn(x); }
DEVICE float error_function(float x) { return erff(x); }
DEVICE void sine_cosine(double angle, double &sine, double &cosine) { sincos(angle, &sine, &cosine); }

DEVICE uint32_t count_bits(uint32_t bits) { return static_cast<uint32_t>(__popc(bits)); }

// The other one where one is not a number.
DEVICE float minimum(float a, float b) { return fminf(a, b); }
DEVICE double minimum(double a, double b) { return fmin(a, b); }
DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE double maximum(double a, double b) { return fmax(a, b); }

DEVICE bool is_finite(float x) { return isfinite(x); }
DEVICE bool is_finite(double x) { return isfinite(x); }
DEVICE bool is_nan(float x) { return isnan(x); }
DEVICE bool is_nan(double x) { return isnan(x); }
