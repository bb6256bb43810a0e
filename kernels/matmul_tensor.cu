// Products with dense weights for many tokens, on tensor cores: out[token][row] = weights[row] . x[token], or that much
// more, for up to three matrices of one format and one number of columns.
//
// In: weights in panels, activations [tokens, stride] in bf16 or f16 as the weights, or in int8 with a scale for each
// 32 columns where weights have scales. Out: [tokens, out_stride] f32 each; rows past the last are not written.
// Moves weights once per 64 tokens and activations once per 128 rows. Blocks of the same weights are beside each other
// in the grid: weights come from memory once, and from the second cache after.
// Grid (tiles of 64 tokens, eights of panels, each matrix's rounded up, of all matrices after each other), 128 threads,
// 16 KiB of shared memory, 18 with scales; the loop is in tensor.cuh. A lane has 64 sums, and 32 words of weights (16 in
// int4) and 16 of activations on their way: some 160 registers, three blocks a multiprocessor; with scales 250, two.
// Limit: in bf16 and f16 the second cache and tensor cores; with scales the three operations of f32 for each product
// and block of 32 columns.

#include "results.cuh"
#include "tensor.cuh"

template <class Tensor> DEVICE void matmul_tensor(const MatmulArguments &arguments) {
    uint32_t first = block_x() * TENSOR_TOKENS;
    uint32_t group = block_y(), matrix = find_matrix(arguments, group, tensor_groups);
    if (first >= arguments.tokens) {
        return;
    }
    const MatrixArguments &weights = arguments.weights[matrix];
    Panel panel = tensor_panel<Tensor>(weights, group);
    // What is only needed for results is read at the end: registers are dear before.
    auto store = [&arguments, matrix, group](uint32_t token, uint32_t row_of_group, const float (&products)[1]) {
        store_product(arguments, matrix, token, group * TENSOR_ROWS + row_of_group, products[0]);
    };
    tensor_products<Tensor, 1>(panel, arguments.x, first, arguments.tokens, store);
}

#define MATMUL(format, Tensor)                                                                                         \
    KERNEL(matmul_tensor_##format, MatmulArguments, 128) { matmul_tensor<Tensor>(arguments); }
FOR_EACH_TENSOR_FORMAT(MATMUL)
