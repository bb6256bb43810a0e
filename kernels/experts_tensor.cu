// The experts of a layer for many tokens, on tensor cores, on the slots that route.cu made.
//
// gate_up: out[slot] = gelu(gate x) * (up x), x being the row of the slot's token. down: out[slot] = down x[slot].
// In: weights of all experts in panels; activations in bf16 or f16 as the weights, or in int8 with a scale for each 32
// columns where weights have scales. Out: [slots, out_stride] f32; rows past a matrix's last are not written.
// Moves a touched expert's weights once per 64 of its slots, and activations once per 128 rows. Blocks of the same
// weights are beside each other in the grid: weights come from memory once, and from the second cache after.
// Grid (tiles of 64 slots that one expert may have, eights of panels, experts); a block past its expert's slots leaves
// at once. gate_up has 256 threads, four warps for either matrix, down 128; 16 KiB of shared memory, 19 with scales. The
// loop is in tensor.cuh. A lane has 64 sums, and 32 words of weights (16 in int4) on their way: some 160 registers,
// three blocks of down a multiprocessor or one of gate_up; with scales 250, two or one.
// Limit: in bf16 and f16 the second cache and tensor cores; with scales the three operations of f32 for each product
// and block of 32 columns.
// Formulas: Mixtral's experts with Gemma's GeGLU, w2(gelu(w1 x) * (w3 x)).

#include "results.cuh"
#include "tensor.cuh"

template <class Tensor, uint32_t MATRICES> DEVICE void multiply_slots(const ExpertArguments &arguments) {
    uint32_t expert = arguments.selected ? arguments.selected[block_z()] : block_z();
    uint32_t first = arguments.starts[expert] + block_x() * TENSOR_TOKENS, end = arguments.starts[expert + 1];
    const MatrixArguments &weights = arguments.weights[expert];
    if (first >= end || block_y() >= tensor_groups(weights)) {
        return;
    }
    // The second four warps have `up`.
    const MatrixArguments *matrices = thread_index() < TENSOR_THREADS ? arguments.weights : arguments.up;
    Panel panel = tensor_panel<Tensor>(matrices[expert], block_y());
    // What is only needed for results is read at the end: registers are dear before.
    auto store = [&arguments, expert](uint32_t slot, uint32_t row_of_group, const float (&products)[MATRICES]) {
        uint32_t rows = arguments.weights[expert].rows;
        store_slot(arguments, rows, slot, block_y() * TENSOR_ROWS + row_of_group, products);
    };
    tensor_products<Tensor, MATRICES>(panel, arguments.x, first, end, store);
}

#define GATE_UP(format, Tensor)                                                                                        \
    KERNEL(gate_up_tensor_##format, ExpertArguments, 256) { multiply_slots<Tensor, 2>(arguments); }
FOR_EACH_TENSOR_FORMAT(GATE_UP)

#define DOWN(format, Tensor)                                                                                           \
    KERNEL(down_tensor_##format, ExpertArguments, 128) { multiply_slots<Tensor, 1>(arguments); }
FOR_EACH_TENSOR_FORMAT(DOWN)
