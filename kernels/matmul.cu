// Products with dense weights: out[token][row] = weights[row] . x[token], or that much more, for up to three matrices
// of one format and one number of columns (query, key and value; the output projection; the head).
//
// In: weights in panels, activations [tokens, stride] in f32, or in int8 with a scale for each 32 columns where weights
// are. Out: [tokens, out_stride] f32 each; rows past the last are not written.
// Moves the weights once per tile of tokens, which is the least with up to 8; activations and results are small beside
// them. Grid (panels of all matrices after each other, tiles of tokens), 128 threads; the loop is in products.cuh.
// Limit: memory with few tokens; with many, multiply-adds of f32 or dp4a.

#include "products.cuh"
#include "results.cuh"

template <class Format, uint32_t TOKENS> DEVICE void matmul(const MatmulArguments &arguments) {
    uint32_t first = block_y() * TOKENS;
    uint32_t panel = block_x(), matrix = find_matrix(arguments, panel, panel_count);
    if (first >= arguments.tokens) {
        return;
    }
    Panel panels[1] = {panel_of<Format>(arguments.weights[matrix], panel)};
    Starts<TOKENS> starts = starts_of<TOKENS>(arguments.x, first, arguments.tokens);
    float product = products<Format, 1, TOKENS>(panels, arguments.x, starts).of[0];
    uint32_t token = first + thread_index() / PANEL_ROWS, row = panel * PANEL_ROWS + thread_index() % PANEL_ROWS;
    if (thread_index() < TOKENS * PANEL_ROWS && token < arguments.tokens) {
        store_product(arguments, matrix, token, row, product);
    }
}

#define MATMUL(format, Format, tokens)                                                                                 \
    KERNEL(matmul_##format##_##tokens, MatmulArguments, 128) { matmul<Format, tokens>(arguments); }
FOR_EACH_FORMAT_AND_TILE(MATMUL)
