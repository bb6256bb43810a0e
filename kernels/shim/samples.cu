// Kernels for the tests of the shim itself (tests/shim.rs): right ones, and wrong ones that it has to show.

#include "../simt.cuh"

// Rows of x: `x / sqrt(mean(x^2) + eps) * weight`. A block a row.
struct SampleNorm {
    const float *x;
    const float *weight;
    float *out;
    float eps;
    uint32_t columns;
};

DEVICE float sum_of_warp(float value) {
    for (uint32_t mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

DEVICE float sum_of_block(float value) {
    SHARED(float, sums, 8);
    value = sum_of_warp(value);
    if (thread_index() % 32 == 0) sums[thread_index() / 32] = value;
    barrier();
    float sum = 0;
    for (float part : sums) sum += part;
    return sum;
}

KERNEL(sample_norm, SampleNorm, 256) {
    const float *x = arguments.x + size_t(block_x()) * arguments.columns;
    float *out = arguments.out + size_t(block_x()) * arguments.columns;
    float squares = 0;
    for (uint32_t i = thread_index(); i < arguments.columns; i += 256) squares = multiply_add(x[i], x[i], squares);
    float factor = 1 / square_root(sum_of_block(squares) / float(arguments.columns) + arguments.eps);
    for (uint32_t i = thread_index(); i < arguments.columns; i += 256) out[i] = x[i] * factor * arguments.weight[i];
}

// What the others take.
struct Sample {
    const float *in;
    float *out;
    uint32_t mode;
};

// out[3 * thread ..]: the number of the thread `mode` lanes further on; two bits of the ballot of odd lanes; a
// neighbour's double.
KERNEL(sample_lanes, Sample, 64) {
    uint32_t thread = thread_index(), lane = thread % 32;
    float *out = arguments.out + 3 * thread;
    out[0] = float(shuffle(thread, lane + arguments.mode));
    out[1] = float(ballot(lane % 2 == 1) >> lane & 3);
    out[2] = float(shuffle_xor(double(thread) + 0.5, 1));
}

// Two rounds in which each thread reads what its neighbour wrote. Bit 0 of the mode: a barrier before reading; bit 1:
// one before the next round overwrites it.
KERNEL(sample_neighbour, Sample, 128) {
    SHARED(float, values, 128);
    uint32_t thread = thread_index();
    for (uint32_t round = 0; round < 2; round++) {
        values[thread] = arguments.in[thread] + float(round);
        if (arguments.mode & 1) barrier();
        arguments.out[thread] = values[(thread + 1) % 128];
        if (arguments.mode & 2) barrier();
    }
}

// Shared memory that nobody wrote.
KERNEL(sample_unwritten, Sample, 32) {
    SHARED(float, values, 32);
    arguments.out[thread_index()] = values[thread_index()];
}

// Half of a warp shuffles; the other half has returned, waits at a barrier or ballots. Mode 3: nobody is missing.
KERNEL(sample_divergent, Sample, 64) {
    float value = float(thread_index());
    if (thread_index() % 32 < 16 || arguments.mode == 3) {
        value = shuffle_xor(value, 1);
    } else if (arguments.mode == 1) {
        barrier();
    } else if (arguments.mode == 2) {
        ballot(true);
    }
    arguments.out[thread_index()] = value;
}

// Half of the threads are gone when the others wait.
KERNEL(sample_early_end, Sample, 64) {
    SHARED(float, values, 64);
    uint32_t thread = thread_index();
    if (thread % 2 == 1) return;
    values[thread] = float(thread);
    barrier();
    arguments.out[thread] = values[62 - thread];
}

// out[mode] = in[mode]
KERNEL(sample_at, Sample, 32) {
    if (thread_index() == 0) arguments.out[arguments.mode] = arguments.in[arguments.mode];
}

// Past the end of a shared array by `mode` elements.
KERNEL(sample_shared_at, Sample, 32) {
    SHARED(float, before, 4);
    SHARED(float, values, 4);
    if (thread_index() == 0) {
        // By a pointer: the compiler's own check of arrays would be first.
        float *at = values;
        before[0] = 1;
        at[3 + arguments.mode] = 2;
        arguments.out[0] = before[0];
    }
}

// Sixteen bytes from `mode` bytes on.
KERNEL(sample_words, Sample, 32) {
    const auto *bytes = reinterpret_cast<const unsigned char *>(arguments.in) + arguments.mode;
    if (thread_index() == 0) arguments.out[0] = float_of_bits(load_words(bytes).word[3]);
}

// out = 2 * in + 1
KERNEL(sample_step, Sample, 32) {
    uint32_t at = block_x() * 32 + thread_index();
    arguments.out[at] = 2 * arguments.in[at] + 1;
}

// Blocks that depend on each other: each adds to what the one before left.
KERNEL(sample_chain, Sample, 32) {
    if (thread_index() == 0) arguments.out[block_x() + 1] = arguments.out[block_x()] + 1;
}

// A block per 256 numbers: each as f16 in the low half of a word of out, as bf16 in the high half.
KERNEL(sample_narrow, Sample, 256) {
    uint32_t at = block_x() * 256 + thread_index();
    float value = arguments.in[at];
    arguments.out[at] = float_of_bits(float_to_f16(value) | uint32_t(float_to_bf16(value)) << 16);
}

// The f16 (mode 0) or bf16 (mode 1) whose bits are the index.
KERNEL(sample_widen, Sample, 256) {
    uint32_t at = block_x() * 256 + thread_index();
    arguments.out[at] = arguments.mode == 0 ? f16_to_float(uint16_t(at)) : bf16_to_float(uint16_t(at));
}

// `mode` shuffles.
KERNEL(sample_shuffles, Sample, 128) {
    float value = 1;
    for (uint32_t round = 0; round < arguments.mode; round++) value = shuffle_xor(value, 1);
    arguments.out[thread_index()] = value;
}

// `mode` barriers.
KERNEL(sample_barriers, Sample, 128) {
    for (uint32_t round = 0; round < arguments.mode; round++) barrier();
    arguments.out[thread_index()] = 1;
}

// out [16, 8] = c [16, 8] + a [16, k] . b [k, 8]: mode 0 in bf16, 1 in f16, 2 in int8. In `in` are the words of the
// rows of a, of the columns of b, eight each, and c.
KERNEL(sample_mma, Sample, 32) {
    const auto *words = reinterpret_cast<const uint32_t *>(arguments.in);
    const uint32_t *columns = words + 16 * 8, *c = columns + 8 * 8;
    auto *out = reinterpret_cast<uint32_t *>(arguments.out);
    uint32_t group = thread_index() / 4, place = thread_index() % 4;
    uint32_t a[4], b[2];
    for (uint32_t i = 0; i < 4; i++) a[i] = words[(group + 8 * (i % 2)) * 8 + place + 4 * (i / 2)];
    for (uint32_t i = 0; i < 2; i++) b[i] = columns[group * 8 + place + 4 * i];
    float sums[4];
    int32_t whole_sums[4];
    uint32_t at[4];
    for (uint32_t i = 0; i < 4; i++) {
        at[i] = (group + 8 * (i / 2)) * 8 + 2 * place + i % 2;
        sums[i] = float_of_bits(c[at[i]]);
        whole_sums[i] = int32_t(c[at[i]]);
    }
    if (arguments.mode == 0) mma_bf16(sums, a, b);
    if (arguments.mode == 1) mma_f16(sums, a, b);
    if (arguments.mode == 2) mma_int8(whole_sums, a, b);
    for (uint32_t i = 0; i < 4; i++) {
        out[at[i]] = arguments.mode == 2 ? uint32_t(whole_sums[i]) : bits_of_float(sums[i]);
    }
}

// Four matrices [8, 8] of 16 bits from `in`, row beside row, through shared memory: the words of a lane, beside each
// other. In mode 1 rows begin off their boundary.
KERNEL(sample_matrices, Sample, 32) {
    SHARED(Words, rows, 33);
    rows[thread_index()] = reinterpret_cast<const Words *>(arguments.in)[thread_index()];
    barrier();
    uint32_t words[4];
    load_matrices_transposed(words, reinterpret_cast<const uint8_t *>(&rows[thread_index()]) + 4 * arguments.mode);
    auto *out = reinterpret_cast<uint32_t *>(arguments.out);
    for (uint32_t i = 0; i < 4; i++) out[4 * thread_index() + i] = words[i];
}

// Each thread copies 28 bytes to shared memory, in pieces of 16, 8 and 4 of which the last is not wanted, and reads what
// its neighbour has. Bit 0 of the mode: a wait; bit 1: a barrier after it; bit 2: a second wait, at the end.
KERNEL(sample_copies, Sample, 64) {
    SHARED(Words, places, 2 * 64);
    uint32_t thread = thread_index(), neighbour = (thread + 1) % 64;
    const float *from = arguments.in + 8 * thread;
    float *to = reinterpret_cast<float *>(places) + 8 * thread;
    copy_async<16>(to, from, true);
    copy_async<8>(to + 4, from + 4, true);
    copy_async<4>(to + 6, from + 6, false);
    if (arguments.mode & 1) wait_for_copies();
    if (arguments.mode & 2) barrier();
    for (uint32_t i = 0; i < 7; i++) {
        arguments.out[7 * thread + i] = reinterpret_cast<const float *>(places)[8 * neighbour + i];
    }
    if (arguments.mode & 4) wait_for_copies();
}

// Sixteen bytes to shared memory from `mode` bytes on.
KERNEL(sample_copy_at, Sample, 32) {
    SHARED(Words, place, 1);
    if (thread_index() == 0) {
        copy_async<16>(place, reinterpret_cast<const uint8_t *>(arguments.in) + arguments.mode, true);
        wait_for_copies();
        arguments.out[0] = float_of_bits(place[0].word[3]);
    }
}

// A block per 256 numbers: two to the power of each, and it and its neighbour in a word, in bf16 and in f16.
KERNEL(sample_powers, Sample, 256) {
    uint32_t at = block_x() * 256 + thread_index();
    float value = arguments.in[at], next = arguments.in[at ^ 1];
    float *out = arguments.out + 3 * at;
    out[0] = power_of_two(value);
    out[1] = float_of_bits(two_bf16(value, next));
    out[2] = float_of_bits(two_f16(value, next));
}
