// What training does to rows of activations and gradients, all f32.
//
// training_norm_gradient: out += r (g (1 + w)) - x r^3 / n <g (1 + w), x>, the gradient of x where that of its RMSNorm is
// g, r the inverse root mean square of x (Zhang and Sennrich 2019, section 4, without its centring). Moves 20 bytes a
// column, 12 of them once more from the cache. Sums are in f64, as in cpu/training/rows.rs.
// training_rotate: each head of a row by the angles of its token's position, or back. Moves 8 bytes a number.
// training_gather: out[slot] = weight x[token of the slot], or without the weight. Moves 8 bytes a number.
// training_combine: out[token] += sum of weight y[slot] over the token's slots in their order, or without the weight.
// Moves 4 bytes a slot's number and 8 a result.
// training_row_products: out[row] = <a[row], b[row]>, in f64, rounded once. Moves 8 bytes a number.
// training_geglu: out = gelu(gate) * up. Moves 12 bytes a number.
// training_geglu_gradient: gate and up become their gradients where that of the result is given. Moves 20 bytes a number.
// All of it is the least but for training_norm_gradient. Grids (rows), 256 threads. Limit: memory.

#include "math.cuh"
#include "reduce.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / LANES;
constexpr uint32_t NO_SLOT = 0xffffffff;

KERNEL(training_norm_gradient, TrainingNormArguments, 256) {
    uint32_t columns = arguments.columns;
    size_t start = static_cast<size_t>(block_x()) * columns;
    const float *x = arguments.x + start, *gradient = arguments.gradient + start;
    double squares = 0.0, product = 0.0;
    for (uint32_t column = thread_index(); column < columns; column += THREADS) {
        double value = x[column];
        squares = multiply_add(value, value, squares);
        product += gradient[column] * (1.0 + arguments.weight[column]) * value;
    }
    double mean = join_block<WARPS>(squares, Sum()) / columns;
    product = join_block<WARPS>(product, Sum());
    double scale = 1.0 / square_root(mean + arguments.eps);
    double along = scale * scale * scale * product / columns;
    float *out = arguments.out + start;
    for (uint32_t column = thread_index(); column < columns; column += THREADS) {
        double straight = scale * gradient[column] * (1.0 + arguments.weight[column]);
        out[column] += static_cast<float>(straight - along * x[column]);
    }
}

KERNEL(training_rotate, TrainingRotateArguments, 256) {
    uint32_t pairs = arguments.head_dim / 2;
    float *row = arguments.heads + static_cast<size_t>(block_x()) * arguments.columns;
    size_t angles = static_cast<size_t>(arguments.positions[block_x()]) * pairs;
    for (uint32_t index = thread_index(); index < arguments.columns / 2; index += THREADS) {
        uint32_t pair = index % pairs;
        float cosine = arguments.cosines[angles + pair], sine = arguments.sines[angles + pair];
        sine = arguments.back ? -sine : sine;
        float *first = row + index / pairs * arguments.head_dim + pair, *second = first + pairs;
        float x = *first, y = *second;
        *first = x * cosine - y * sine;
        *second = y * cosine + x * sine;
    }
}

KERNEL(training_gather, TrainingSlotArguments, 256) {
    const float *from = arguments.from + static_cast<size_t>(arguments.index[block_x()]) * arguments.columns;
    float *out = arguments.out + static_cast<size_t>(block_x()) * arguments.columns;
    float weight = arguments.weights ? arguments.weights[block_x()] : 1.0f;
    for (uint32_t column = thread_index(); column < arguments.columns; column += THREADS) {
        out[column] = weight * from[column];
    }
}

KERNEL(training_combine, TrainingSlotArguments, 256) {
    const uint32_t *slots = arguments.index + static_cast<size_t>(block_x()) * arguments.choices;
    float *out = arguments.out + static_cast<size_t>(block_x()) * arguments.columns;
    for (uint32_t column = thread_index(); column < arguments.columns; column += THREADS) {
        float sum = out[column];
        for (uint32_t choice = 0; choice < arguments.choices; choice++) {
            uint32_t slot = slots[choice];
            if (slot != NO_SLOT) {
                float weight = arguments.weights ? arguments.weights[slot] : 1.0f;
                sum += weight * arguments.from[static_cast<size_t>(slot) * arguments.columns + column];
            }
        }
        out[column] = sum;
    }
}

KERNEL(training_row_products, TrainingRowProductArguments, 256) {
    size_t start = static_cast<size_t>(block_x()) * arguments.columns;
    const float *a = arguments.a + start, *b = arguments.b + start;
    double product = 0.0;
    for (uint32_t column = thread_index(); column < arguments.columns; column += THREADS) {
        product = multiply_add(static_cast<double>(a[column]), static_cast<double>(b[column]), product);
    }
    product = join_block<WARPS>(product, Sum());
    if (thread_index() == 0) {
        arguments.out[block_x()] = static_cast<float>(product);
    }
}

KERNEL(training_geglu, TrainingGegluArguments, 256) {
    size_t start = static_cast<size_t>(block_x()) * arguments.columns;
    for (uint32_t column = thread_index(); column < arguments.columns; column += THREADS) {
        float gate = arguments.gate[start + column];
        float value = arguments.exact_gelu ? gelu_erf(gate) : gelu_tanh(gate);
        arguments.out[start + column] = value * arguments.up[start + column];
    }
}

// GeLU's derivative. By the tanh approximation, with s = 1 / (1 + e^-u) and u = 2 sqrt(2/pi) (x + 0.044715 x^3), it is s
// + x s (1 - s) u'; by the definition P(x) + x p(x), P and p of the normal distribution.
DEVICE float gelu_derivative(float x, bool exact) {
    const float twice_root = 1.5957692f;    // 2 sqrt(2/pi)
    const float inverse_root = 0.3989423f;  // 1 / sqrt(2 pi)
    if (exact) {
        float below = 0.5f * (1.0f + error_function(x * 0.70710678f));
        return below + x * inverse_root * e_to_the(-0.5f * x * x);
    }
    float s = 1.0f / (1.0f + e_to_the(-twice_root * (x + 0.044715f * x * x * x)));
    float slope = twice_root * (1.0f + 3.0f * 0.044715f * x * x);
    return s + x * s * (1.0f - s) * slope;
}

KERNEL(training_geglu_gradient, TrainingGegluArguments, 256) {
    size_t start = static_cast<size_t>(block_x()) * arguments.columns;
    bool exact = arguments.exact_gelu != 0;
    for (uint32_t column = thread_index(); column < arguments.columns; column += THREADS) {
        size_t at = start + column;
        float gate = arguments.gate[at], up = arguments.up[at], gradient = arguments.gradient[at];
        arguments.gate[at] = gradient * up * gelu_derivative(gate, exact);
        arguments.up[at] = gradient * (exact ? gelu_erf(gate) : gelu_tanh(gate));
    }
}
