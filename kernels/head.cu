// The log-probability of each row's target: logits[target] - log(sum of e^logit).
//
// In: logits [rows, vocab_size] f32, targets [rows]. Out: [rows] f32; NaN where the largest logit is not finite. A
// logit that is not a number counts as minus infinity.
// Moves 4 bytes a logit from memory, the least, and once more from the second cache. Grid (rows), 256 threads. Limit:
// what one block can read; rows are few, or many blocks.
// Formula: log_softmax_at of cpu/kernels/math.rs, exponentials in f32, their sum in f64.

#include "math.cuh"
#include "reduce.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / LANES;

KERNEL(log_softmax_at, LogSoftmaxArguments, 256) {
    const float *logits = arguments.logits + static_cast<size_t>(block_x()) * arguments.vocab_size;
    float negative_infinity = float_of_bits(0xff800000);
    float largest = negative_infinity;
    for (uint32_t index = thread_index(); index < arguments.vocab_size; index += THREADS) {
        largest = maximum(largest, logits[index]);
    }
    largest = join_block<WARPS>(largest, Largest());
    double weights = 0.0;
    for (uint32_t index = thread_index(); index < arguments.vocab_size; index += THREADS) {
        float logit = logits[index];
        weights += is_nan(logit) ? 0.0f : e_to_the(logit - largest);
    }
    weights = join_block<WARPS>(weights, Sum());
    if (thread_index() == 0) {
        float logit = logits[arguments.targets[block_x()]];
        double normalizer = static_cast<double>(largest) + logarithm(weights);
        double result = static_cast<double>(is_nan(logit) ? negative_infinity : logit) - normalizer;
        arguments.out[block_x()] = is_finite(largest) ? static_cast<float>(result) : float_of_bits(0x7fc00000);
    }
}
