// Softmaxes of training and their gradients: of attention's scores, a block of queries at a time, and of logits, a part
// of the vocabulary at a time.
//
// training_softmax, in: scores [heads, queries, keys], each row of which sees the keys up to its own. Out: weights in
// their place, zeros past what is seen; log_sums [queries, heads]. Moves 12 bytes read and 8 written a score, the least
// would be 4 each. training_softmax_gradient, in: scores and the gradients of weights, [heads, queries, keys]; out and its
// gradient, [queries, heads * head_dim]. Out: weights in the place of scores, gradients of scores in that of their own.
// Moves 8 bytes a score each way, the least. Grids (queries, heads), 256 threads. Limit: memory.
// training_log_sum, in: logits [rows, width] of tokens `first` and on, of which `sums` has seen those before. Out: sums
// [rows, 3] f64, the largest logit, the sum of e^(logit - largest) and the target's logit; results [rows, 2], the
// logarithm of the sum of all e^logit and the log-probability of the target, as far as logits are seen. Moves 4 bytes a
// logit twice. training_logit_gradient, in: logits as above, results, gradients [rows]. Out: gradients of logits in their
// place. Moves 4 bytes a logit each way, the least. Grids (rows), 256 threads. Limit: memory.
// Formulas: Milakov and Gimelshein 2018 for sums in parts, Dao 2023 (FlashAttention-2, algorithm 2) for weights computed
// again from log_sums: P = e^(S scale - log_sum), dS = P (dP - <do, o>) scale; and dlogit = g (onehot(target) - softmax).
// Exponentials are in f32, their sums in f64.

#include "math.cuh"
#include "reduce.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / LANES;

DEVICE float negative_infinity() { return float_of_bits(0xff800000); }

// Where the scores of the block's query and head begin.
DEVICE size_t scores_of(const TrainingSoftmaxArguments &arguments) {
    return (static_cast<size_t>(block_y()) * arguments.queries + block_x()) * arguments.keys;
}

KERNEL(training_softmax, TrainingSoftmaxArguments, 256) {
    float *scores = arguments.scores + scores_of(arguments);
    uint32_t seen = arguments.first + block_x() + 1;
    float largest = negative_infinity();
    for (uint32_t key = thread_index(); key < seen; key += THREADS) {
        largest = maximum(largest, scores[key]);
    }
    largest = join_block<WARPS>(largest, Largest());
    double sum = 0.0;
    for (uint32_t key = thread_index(); key < seen; key += THREADS) {
        float weight = e_to_the((scores[key] - largest) * arguments.scale);
        scores[key] = weight;
        sum += weight;
    }
    sum = join_block<WARPS>(sum, Sum());
    float norm = static_cast<float>(1.0 / sum);
    for (uint32_t key = thread_index(); key < arguments.keys; key += THREADS) {
        scores[key] = key < seen ? scores[key] * norm : 0.0f;
    }
    if (thread_index() == 0) {
        double log_sum = static_cast<double>(largest * arguments.scale) + logarithm(sum);
        arguments.log_sums[static_cast<size_t>(block_x()) * arguments.heads + block_y()] = static_cast<float>(log_sum);
    }
}

KERNEL(training_softmax_gradient, TrainingSoftmaxArguments, 256) {
    float *scores = arguments.scores + scores_of(arguments), *gradients = arguments.gradients + scores_of(arguments);
    uint32_t seen = arguments.first + block_x() + 1;
    size_t row = static_cast<size_t>(block_x()) * arguments.heads + block_y();
    const float *out = arguments.out + row * arguments.head_dim;
    const float *out_gradient = arguments.out_gradient + row * arguments.head_dim;
    double product = 0.0;
    for (uint32_t column = thread_index(); column < arguments.head_dim; column += THREADS) {
        product = multiply_add(static_cast<double>(out[column]), static_cast<double>(out_gradient[column]), product);
    }
    float mean = static_cast<float>(join_block<WARPS>(product, Sum()));
    float log_sum = arguments.log_sums[row];
    for (uint32_t key = thread_index(); key < arguments.keys; key += THREADS) {
        float weight = key < seen ? e_to_the(scores[key] * arguments.scale - log_sum) : 0.0f;
        scores[key] = weight;
        gradients[key] = key < seen ? weight * (gradients[key] - mean) * arguments.scale : 0.0f;
    }
}

KERNEL(training_log_sum, TrainingLogitArguments, 256) {
    const float *logits = arguments.logits + static_cast<size_t>(block_x()) * arguments.width;
    float largest = negative_infinity();
    for (uint32_t index = thread_index(); index < arguments.width; index += THREADS) {
        largest = maximum(largest, logits[index]);
    }
    largest = join_block<WARPS>(largest, Largest());
    double sum = 0.0;
    for (uint32_t index = thread_index(); index < arguments.width; index += THREADS) {
        sum += e_to_the(logits[index] - largest);
    }
    sum = join_block<WARPS>(sum, Sum());
    if (thread_index() > 0) {
        return;
    }
    double *sums = arguments.sums + 3 * static_cast<size_t>(block_x());
    float *results = arguments.results + 2 * static_cast<size_t>(block_x());
    double both = largest, logit = 0.0;
    if (arguments.first > 0) {
        both = maximum(sums[0], both);
        sum = sums[1] * exponential(sums[0] - both) + sum * exponential(static_cast<double>(largest) - both);
        logit = sums[2];
    }
    uint32_t target = arguments.targets[block_x()] - arguments.first;
    if (target < arguments.width) {
        logit = logits[target];
    }
    sums[0] = both;
    sums[1] = sum;
    sums[2] = logit;
    double log_sum = both + logarithm(sum);
    results[0] = static_cast<float>(log_sum);
    results[1] = static_cast<float>(logit - log_sum);
}

KERNEL(training_logit_gradient, TrainingLogitArguments, 256) {
    float *logits = arguments.logits + static_cast<size_t>(block_x()) * arguments.width;
    float log_sum = arguments.results[2 * static_cast<size_t>(block_x())], gradient = arguments.gradients[block_x()];
    uint32_t target = arguments.targets[block_x()] - arguments.first;
    for (uint32_t index = thread_index(); index < arguments.width; index += THREADS) {
        float of_logit = -gradient * e_to_the(logits[index] - log_sum);
        logits[index] = index == target ? of_logit + gradient : of_logit;
    }
}
