// Products of training with frozen weights, and their gradients: out[t] += W x[t], and out[t] += gradient[t] W, which is
// that of the input. W is a matrix of a layer's attention, some rows of the head, or an expert's matrix with the
// expert's slots.
//
// In: weights in panels of any format, read as the f32 they stand for; x [tokens, inputs], or the gradient [tokens,
// outputs]. Out: [tokens, outputs], or [tokens, inputs]. All f32, rows without anything between them.
// Moves the weights once per 64 tokens, x or the gradient once per 64 numbers of a result row, results once each way.
// Grid (tiles of 64 tokens, or of slots that one expert may have; tiles of 64 numbers of a result row; experts of the
// format, or 1), 256 threads; a block past its expert's slots leaves at once. The loop is in training.cuh.
// Limit: multiply-adds of f32; tensor cores are not used.

#include "training.cuh"

struct Work {
    const MatrixArguments &weights;
    // Rows of x and of out.
    uint32_t begin;
    uint32_t end;
};

// Of the block: what it multiplies by, and the tokens of that from the block's first on.
DEVICE Work work_of(const TrainingProductArguments &arguments) {
    if (!arguments.experts) {
        return Work{arguments.weights, block_x() * TILE, arguments.tokens};
    }
    uint32_t expert = arguments.selected ? arguments.selected[block_z()] : block_z();
    const uint32_t *starts = arguments.starts + expert;
    return Work{arguments.experts[expert], starts[0] + block_x() * TILE, starts[1]};
}

template <class Format> DEVICE void product(const TrainingProductArguments &arguments) {
    Work work = work_of(arguments);
    uint32_t column = block_y() * TILE, inputs = arguments.inputs, outputs = arguments.outputs;
    if (work.begin >= work.end || column >= outputs) {
        return;
    }
    uint32_t tokens = work.end - work.begin;
    const float *x = arguments.x + static_cast<size_t>(work.begin) * inputs;
    float *out = arguments.out + static_cast<size_t>(work.begin) * outputs + column;
    WeightRows<Format> rows{work.weights, arguments.first + column, arguments.first + outputs, inputs};
    TileSums sums = multiply_tile(inputs, NumberSide{x, tokens, inputs, inputs, 1}, rows);
    for_each_sum(sums, tokens, outputs - column, TileOut{out, outputs, true});
}

template <class Format> DEVICE void product_gradient(const TrainingProductArguments &arguments) {
    Work work = work_of(arguments);
    uint32_t column = block_y() * TILE, inputs = arguments.inputs, outputs = arguments.outputs;
    if (work.begin >= work.end || column >= inputs) {
        return;
    }
    uint32_t tokens = work.end - work.begin;
    const float *gradient = arguments.x + static_cast<size_t>(work.begin) * outputs;
    float *out = arguments.out + static_cast<size_t>(work.begin) * inputs + column;
    WeightColumns<Format> columns{work.weights, arguments.first, arguments.first + outputs, column, inputs};
    TileSums sums = multiply_tile(outputs, NumberSide{gradient, tokens, outputs, outputs, 1}, columns);
    for_each_sum(sums, tokens, inputs - column, TileOut{out, inputs, true});
}

#define PRODUCTS(format, Format)                                                                                       \
    KERNEL(training_product_##format, TrainingProductArguments, 256) { product<Format>(arguments); }                   \
    KERNEL(training_product_gradient_##format, TrainingProductArguments, 256) { product_gradient<Format>(arguments); }
PRODUCTS(f32, F32)
PRODUCTS(bf16, Bf16)
PRODUCTS(f16, F16)
PRODUCTS(int8, Int8)
PRODUCTS(int4, Int4)
