// Activations in int8, a scale for each 32 columns, by the rules of int8.cuh, or in bf16 or f16; or both.
//
// In: numbers [rows, stride] f32. Out: integers [rows, stride / 4], four int8 a word, and blocks [rows, stride / 32];
// halves [rows, stride]; each where asked for.
// Moves 4 bytes read and 1.25 or 2 written a column: the least. Grid (rows, parts), 256 threads: a warp has 32 columns
// at a time, and the parts of a row take them in turn, however many parts there are. Limit: memory.

#include "halves.cuh"
#include "int8.cuh"

constexpr uint32_t THREADS = 256;

KERNEL(round_activations, RoundArguments, 256) {
    size_t row = block_x();
    if (arguments.rows && row >= *arguments.rows) {
        return;
    }
    const float *numbers = arguments.numbers + row * arguments.stride;
    int8_t *integers = reinterpret_cast<int8_t *>(arguments.integers);
    uint32_t first = block_y() * THREADS + thread_index();
    for (uint32_t column = first; column < arguments.stride; column += THREADS * grid_y()) {
        size_t at = row * arguments.stride + column;
        if (arguments.halves) {
            arguments.halves[at] = to_half(numbers[column], arguments.halves_are_f16);
        }
        if (arguments.integers) {
            round_block(numbers[column], integers + at / 32 * 32, arguments.blocks + at / 32);
        }
    }
}
