// Products of training whose sides are both activations, gradients or gates: out = a b, or out += a b, of several
// matrices at once. Scores of queries and keys, weighted values and their gradients, a matrix a head; router logits, the
// gradients of gates and of their inputs.
//
// In: a [rows, depth] and b [depth, columns], each along its rows or its columns. Out: [rows, columns]. All f32.
// Moves a once per 64 columns, b once per 64 rows, results once, or once each way. Grid (tiles of 64 rows, tiles of 64
// columns, matrices), 256 threads. The loop is in training.cuh. Limit: multiply-adds of f32.

#include "training.cuh"

KERNEL(training_multiply, TrainingMultiplyArguments, 256) {
    uint32_t row = block_x() * TILE, column = block_y() * TILE;
    if (row >= arguments.rows || column >= arguments.columns) {
        return;
    }
    size_t matrix = block_z();
    const float *a = arguments.a + matrix * arguments.a_next + static_cast<size_t>(row) * arguments.a_row;
    const float *b = arguments.b + matrix / arguments.shared_by * arguments.b_next +
                     static_cast<size_t>(column) * arguments.b_column;
    float *out =
        arguments.out + matrix * arguments.out_next + static_cast<size_t>(row) * arguments.out_row + column;
    uint32_t rows = arguments.rows - row, columns = arguments.columns - column;
    NumberSide of_rows{a, rows, arguments.depth, arguments.a_row, arguments.a_column};
    NumberSide of_columns{b, columns, arguments.depth, arguments.b_column, arguments.b_row};
    TileSums sums = multiply_tile(arguments.depth, of_rows, of_columns);
    for_each_sum(sums, rows, columns, TileOut{out, arguments.out_row, arguments.accumulate != 0});
}
