// RMSNorm of rows: numbers[row] = x[index[row]] / sqrt(mean(x^2) + eps) * (1 + weight), and the same in int8, in
// bf16 or in f16 where asked for.
//
// In: x [any, columns] f32, weight [columns] f32. Out: numbers [rows, stride] f32, of which the real columns are
// written; integers [rows, stride / 4] and blocks [rows, stride / 32], halves [rows, stride], of which all are, zeros
// past the real columns.
// Moves 8 bytes read (x and the weight) and 4 written a column, 1.25 more in int8, 2 more in halves: the least; the second
// reading of x is from the cache.
// Grid (rows), 256 threads. Limit: one row is a round trip to memory and two barriers.
// The sum of squares is in f64 like cpu/kernels/math.rs, where no square overflows or vanishes: a thread has columns /
// 256 of them, on cards with few f64 units too less than the wait for the row.
// Formula: Gemma's RMSNorm, all in f32, the weight counted from 1.

#include "halves.cuh"
#include "int8.cuh"

constexpr uint32_t THREADS = 256;

KERNEL(norm, NormArguments, 256) {
    size_t row = block_x();
    size_t from = arguments.index ? arguments.index[row] : row;
    const float *x = arguments.x + from * arguments.columns;
    double squares = 0.0;
    for (uint32_t column = thread_index(); column < arguments.columns; column += THREADS) {
        double value = x[column];
        squares = multiply_add(value, value, squares);
    }
    double mean = join_block<THREADS / LANES>(squares, Sum()) / arguments.columns;
    float scale = static_cast<float>(1.0 / square_root(mean + arguments.eps));

    float *numbers = arguments.numbers + row * arguments.stride;
    int8_t *integers = reinterpret_cast<int8_t *>(arguments.integers);
    // A warp has 32 columns at a time, all its lanes to the end: they meet in round_block.
    for (uint32_t column = thread_index(); column < arguments.stride; column += THREADS) {
        float value = 0.0f;
        if (column < arguments.columns) {
            value = x[column] * scale * (1.0f + arguments.weight[column]);
            numbers[column] = value;
        }
        size_t at = row * arguments.stride + column;
        if (arguments.halves) {
            arguments.halves[at] = to_half(value, arguments.halves_are_f16);
        }
        if (arguments.integers) {
            round_block(value, integers + at / 32 * 32, arguments.blocks + at / 32);
        }
    }
}
