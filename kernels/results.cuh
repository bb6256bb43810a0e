// Where products go: what the kernels of a family have in common, whichever way they multiply.

#pragma once

#include "math.cuh"

// Which of up to three matrices, whose blocks stand after each other in the grid, a block is of; `index` becomes its
// place among that one's. `blocks_of(matrix)` is how many a matrix has.
template <class BlocksOf>
DEVICE uint32_t find_matrix(const MatmulArguments &arguments, uint32_t &index, BlocksOf blocks_of) {
    uint32_t matrix = 0;
    while (matrix + 1 < arguments.count && index >= blocks_of(arguments.weights[matrix])) {
        index -= blocks_of(arguments.weights[matrix]);
        matrix++;
    }
    return matrix;
}

// Writes one product, or adds it to what is there; nothing of a row past the matrix's last.
DEVICE void store_product(const MatmulArguments &arguments, uint32_t matrix, uint32_t token, uint32_t row,
                          float product) {
    if (row < arguments.weights[matrix].rows) {
        float &out = arguments.out[matrix][static_cast<size_t>(token) * arguments.out_stride[matrix] + row];
        out = arguments.accumulate ? out + product : product;
    }
}

// Writes a row of a slot: its product, or of gate and up gelu(gate) * up; nothing of a row past the matrix's `rows`.
template <uint32_t MATRICES>
DEVICE void store_slot(const ExpertArguments &arguments, uint32_t rows, uint32_t slot, uint32_t row,
                       const float (&products)[MATRICES]) {
    if (row >= rows) {
        return;
    }
    float result = products[0];
    if constexpr (MATRICES == 2) {
        result = (arguments.exact_gelu ? gelu_erf(result) : gelu_tanh(result)) * products[1];
    }
    arguments.out[static_cast<size_t>(slot) * arguments.out_stride + row] = result;
}
