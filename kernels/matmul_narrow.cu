// Products with dense weights for up to 16 tokens, on tensor cores: out[token][row] = weights[row] . x[token], or that
// much more, for up to three matrices of one format and one number of columns.
//
// In: weights in panels, activations [tokens, stride] in bf16 or f16 as the weights, or in int8 with a scale for each
// 32 columns where weights have scales. Out: [tokens, out_stride] f32 each; rows past the last are not written.
// Moves weights once, which is the least, and activations once per 32 rows, from the caches.
// Grid (twos of panels, each matrix's rounded up, of all matrices after each other), 256 threads, 18 KiB of shared
// memory; the loop is in narrow.cuh. Limit: memory.

#include "narrow.cuh"
#include "results.cuh"

template <class Tensor> DEVICE void matmul_narrow(const MatmulArguments &arguments) {
    uint32_t group = block_x(), matrix = find_matrix(arguments, group, narrow_groups);
    Panel panels[1] = {narrow_panel<Tensor>(arguments.weights[matrix], group)};
    auto store = [&arguments, matrix, group](uint32_t token, uint32_t row_of_group, const float (&products)[1]) {
        store_product(arguments, matrix, token, group * NARROW_ROWS + row_of_group, products[0]);
    };
    narrow_products<Tensor, 1>(panels, arguments.x, 0, arguments.tokens, store);
}

#define MATMUL(format, Tensor)                                                                                         \
    KERNEL(matmul_narrow_##format, MatmulArguments, 256) { matmul_narrow<Tensor>(arguments); }
FOR_EACH_TENSOR_FORMAT(MATMUL)
