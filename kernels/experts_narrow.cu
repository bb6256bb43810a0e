// The experts of a layer for up to 16 tokens, on tensor cores, on the slots that route.cu made.
//
// gate_up: out[slot] = gelu(gate x) * (up x), x being the row of the slot's token. down: out[slot] = down x[slot].
// In: weights of all experts in panels; activations in bf16 or f16 as the weights, or in int8 with a scale for each 32
// columns where weights have scales. Out: [slots, out_stride] f32; rows past a matrix's last are not written.
// Moves a touched expert's weights once, which is the least: it has at most one slot of a token; activations once per
// 32 rows, from the caches.
// Grid (twos of panels, experts); a block whose expert has no slots leaves at once. 256 threads, 18 KiB of shared memory,
// 36 for gate_up; the loop is in narrow.cuh. Limit: memory.
// Formulas: Mixtral's experts with Gemma's GeGLU, w2(gelu(w1 x) * (w3 x)).

#include "narrow.cuh"
#include "results.cuh"

template <class Tensor, uint32_t MATRICES> DEVICE void multiply_slots(const ExpertArguments &arguments) {
    uint32_t expert = arguments.selected ? arguments.selected[block_y()] : block_y();
    uint32_t begin = arguments.starts[expert], end = arguments.starts[expert + 1];
    const MatrixArguments &weights = arguments.weights[expert];
    if (begin >= end || block_x() >= narrow_groups(weights)) {
        return;
    }
    Panel panels[MATRICES];
    panels[0] = narrow_panel<Tensor>(weights, block_x());
    if constexpr (MATRICES == 2) {
        panels[1] = narrow_panel<Tensor>(arguments.up[expert], block_x());
    }
    auto store = [&arguments, expert](uint32_t slot, uint32_t row_of_group, const float (&products)[MATRICES]) {
        uint32_t rows = arguments.weights[expert].rows;
        store_slot(arguments, rows, slot, block_x() * NARROW_ROWS + row_of_group, products);
    };
    // One round, unless there are more tokens than these kernels are for.
    for (uint32_t first = begin; first < end; first += NARROW_TOKENS) {
        narrow_products<Tensor, MATRICES>(panels, arguments.x, first, end, store);
    }
}

#define GATE_UP(format, Tensor)                                                                                        \
    KERNEL(gate_up_narrow_##format, ExpertArguments, 256) { multiply_slots<Tensor, 2>(arguments); }
FOR_EACH_TENSOR_FORMAT(GATE_UP)

#define DOWN(format, Tensor)                                                                                           \
    KERNEL(down_narrow_##format, ExpertArguments, 256) { multiply_slots<Tensor, 1>(arguments); }
FOR_EACH_TENSOR_FORMAT(DOWN)
