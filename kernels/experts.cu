// The experts of a layer, on the slots that route.cu made; a slot is one token's choice of one expert.
//
// gate_up: out[slot] = gelu(gate x) * (up x), x being the row of the slot's token. down: out[slot] = down x[slot].
// combine: x[token] += sum of weight * projected over the token's slots.
// In: weights of all experts in panels; activations in f32, or in int8 with a scale for each 32 columns where weights
// are. Out: [slots, out_stride] f32; rows past a matrix's last are not written.
// gate_up and down move each touched expert's weights once per tile of slots, which is the least with up to 8 slots an
// expert. Grid (panels, experts), 128 threads; a block goes through the slots of its expert. Limit: memory with few
// slots; with many, multiply-adds of f32 or dp4a. The loop is in products.cuh.
// combine moves 4 bytes a slot and column and 8 a column of x, the least. Grid (tokens), 256 threads. Limit: the wait
// for memory. Formulas: Mixtral's experts with Gemma's GeGLU, w2(gelu(w1 x) * (w3 x)).

#include "products.cuh"
#include "results.cuh"

constexpr uint32_t NO_EXPERT = 0xffffffff;

template <class Format, uint32_t MATRICES, uint32_t TOKENS>
DEVICE void multiply_slots(const ExpertArguments &arguments) {
    uint32_t expert = arguments.selected ? arguments.selected[block_y()] : block_y();
    uint32_t begin = arguments.starts[expert], end = arguments.starts[expert + 1];
    const MatrixArguments &weights = arguments.weights[expert];
    uint32_t rows = weights.rows;
    if (begin >= end || block_x() * PANEL_ROWS >= rows) {
        return;
    }
    Panel panels[MATRICES];
    panels[0] = panel_of<Format>(weights, block_x());
    if (MATRICES == 2) {
        panels[MATRICES - 1] = panel_of<Format>(arguments.up[expert], block_x());
    }
    uint32_t row = block_x() * PANEL_ROWS + thread_index() % PANEL_ROWS;
    for (uint32_t first = begin; first < end; first += TOKENS) {
        Starts<TOKENS> starts = starts_of<TOKENS>(arguments.x, first, end);
        Products<MATRICES> product = products<Format, MATRICES, TOKENS>(panels, arguments.x, starts);
        uint32_t slot = first + thread_index() / PANEL_ROWS;
        if (thread_index() < TOKENS * PANEL_ROWS && slot < end) {
            store_slot(arguments, rows, slot, row, product.of);
        }
    }
}

#define GATE_UP(format, Format, tokens)                                                                                \
    KERNEL(gate_up_##format##_##tokens, ExpertArguments, 128) { multiply_slots<Format, 2, tokens>(arguments); }
FOR_EACH_FORMAT_AND_TILE(GATE_UP)

#define DOWN(format, Format, tokens)                                                                                   \
    KERNEL(down_##format##_##tokens, ExpertArguments, 128) { multiply_slots<Format, 1, tokens>(arguments); }
FOR_EACH_FORMAT_AND_TILE(DOWN)

// In f64 and rounded once, so that the weights of identical experts, which sum to 1, give the dense model's bits.
KERNEL(combine, CombineArguments, 256) {
    size_t token = block_x();
    const uint32_t *chosen = arguments.chosen + token * arguments.top_k;
    const uint32_t *slots = arguments.slots + token * arguments.top_k;
    const double *weights = arguments.exact_weights + token * arguments.top_k;
    float *x = arguments.x + token * arguments.hidden_size;
    for (uint32_t column = thread_index(); column < arguments.hidden_size; column += 256) {
        double sum = 0.0;
        for (uint32_t choice = 0; choice < arguments.top_k && chosen[choice] != NO_EXPERT; choice++) {
            size_t at = static_cast<size_t>(slots[choice]) * arguments.hidden_size + column;
            sum += weights[choice] * arguments.projected[at];
        }
        x[column] += static_cast<float>(sum);
    }
}
