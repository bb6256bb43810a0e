// Embedding: x[token] = E[tokens[token]] * scale.
//
// In: the embedding [vocab_size, hidden_size] in panels of any format, tokens [tokens] ids. Out: x [tokens,
// hidden_size] f32. Moves a row of weights and 4 bytes written a column, the least; a row of a panel is one word in
// each line of 64 bytes, so that memory delivers sectors of 32 for 4. Once per token and pass: nothing beside one
// layer.
// Grid (tokens), 256 threads. Limit: the wait for memory. Formula: Gemma scales embeddings by the root of hidden_size.

#include "formats.cuh"

constexpr uint32_t THREADS = 256;

template <class Format> DEVICE void embed_row(const EmbedArguments &arguments) {
    uint32_t id = arguments.tokens[block_x()];
    const MatrixArguments &embedding = arguments.embedding;
    Panel panel = panel_of<Format>(embedding, id / PANEL_ROWS);
    uint32_t row = id % PANEL_ROWS;
    float *x = arguments.x + static_cast<size_t>(block_x()) * arguments.hidden_size;
    for (uint32_t column = thread_index(); column < arguments.hidden_size; column += THREADS) {
        const uint8_t *line = panel.lines + static_cast<size_t>(column / Format::COLUMNS) * LINE_BYTES;
        uint32_t word = reinterpret_cast<const uint32_t *>(line)[row];
        float number = Format::number(word, column % Format::COLUMNS) * scale_of<Format>(panel, column, row);
        x[column] = number * arguments.scale;
    }
}

KERNEL(embed, EmbedArguments, 256) {
    switch (arguments.format) {
        case 0: return embed_row<F32>(arguments);
        case 1: return embed_row<Bf16>(arguments);
        case 2: return embed_row<F16>(arguments);
        case 3: return embed_row<Int8>(arguments);
        default: return embed_row<Int4>(arguments);
    }
}
