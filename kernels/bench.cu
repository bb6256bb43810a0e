// What the bench on a GPU (benches/gpu) needs beside the library's kernels: weights out of nothing, and roofs. The library
// does not have them.
//
// fill: words [words] of 4 bytes, random by their place and the seed: bits as they come (the lines of int8 and int4), or
// numbers around zero in f32, bf16 or f16, nearly normal (the sum of four bytes) with the standard deviation `scale`, or
// scales of groups, bf16 or f16, 0.8 to 1.2 times `scale`. Moves 4 bytes written a word. Limit: arithmetic, 30 operations
// a word.
// read: every byte of a buffer once, `count` times sixteen of them; a word for each block is the exclusive or of what it
// read. Moves the bytes. Limit: the bandwidth of memory, whose roof it is.
// mma_rate_bf16, mma_rate_int8: products on tensor cores from and to registers, `rounds` times eight a warp, of 16 x 8 x 16
// and 16 x 8 x 32 multiply-adds. Moves nothing. Limit: the rate of mma.sync, whose roof they are.
// Grid (blocks), 256 threads each: as many as keep the device busy.

#include "reduce.cuh"

constexpr uint32_t THREADS = 256;

DEVICE uint64_t random_bits(uint32_t seed, uint64_t place) {
    // SplitMix64 (Steele, Lea, Flood 2014).
    uint64_t bits = (static_cast<uint64_t>(seed) << 40) + (place + 1) * 0x9e3779b97f4a7c15;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return bits ^ bits >> 31;
}

// Mean 0 and standard deviation 1, from -3.45 to 3.45.
DEVICE float near_normal(uint32_t bits) {
    uint32_t sum = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24);
    return (static_cast<float>(sum) - 510.0f) * (1.0f / 147.80f);
}

DEVICE float near_one(uint32_t bits) { return 0.8f + static_cast<float>(bits & 0xffff) * (0.4f / 65536.0f); }

KERNEL(fill, FillArguments, 256) {
    uint64_t stride = static_cast<uint64_t>(arguments.blocks) * THREADS;
    auto bf16 = [](float number) { return static_cast<uint32_t>(float_to_bf16(number)); };
    auto f16 = [](float number) { return static_cast<uint32_t>(float_to_f16(number)); };
    for (uint64_t at = static_cast<uint64_t>(block_x()) * THREADS + thread_index(); at < arguments.words; at += stride) {
        uint64_t bits = random_bits(arguments.seed, at);
        uint32_t low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
        float scale = arguments.scale;
        uint32_t word = low;
        switch (arguments.content) {
            case 1: word = bits_of_float(near_normal(low) * scale); break;
            case 2: word = bf16(near_normal(low) * scale) | bf16(near_normal(high) * scale) << 16; break;
            case 3: word = f16(near_normal(low) * scale) | f16(near_normal(high) * scale) << 16; break;
            case 4: word = bf16(near_one(low) * scale) | bf16(near_one(high) * scale) << 16; break;
            case 5: word = f16(near_one(low) * scale) | f16(near_one(high) * scale) << 16; break;
        }
        arguments.to[at] = word;
    }
}

struct Either {
    DEVICE uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};

KERNEL(read, ReadArguments, 256) {
    // Loads in flight of a thread.
    constexpr uint32_t LOADS = 8;
    uint64_t stride = static_cast<uint64_t>(arguments.blocks) * THREADS;
    uint32_t seen = 0;
    for (uint64_t at = static_cast<uint64_t>(block_x()) * THREADS + thread_index(); at < arguments.count;
         at += LOADS * stride) {
        Words words[LOADS];
        UNROLL
        for (uint32_t load = 0; load < LOADS; load++) {
            uint64_t its = at + load * stride;
            words[load] = load_words_if(its < arguments.count, arguments.from + its * sizeof(Words));
        }
        UNROLL
        for (uint32_t load = 0; load < LOADS; load++) {
            const Words &its = words[load];
            seen ^= its.word[0] ^ its.word[1] ^ its.word[2] ^ its.word[3];
        }
    }
    seen = join_block<THREADS / LANES>(seen, Either());
    if (thread_index() == 0) {
        arguments.seen[block_x()] = seen;
    }
}

// Products that do not wait for each other.
constexpr uint32_t CHAINS = 8;

// A word of a or b: ones where there is no seed, so that sums are known, else what costs as much as real numbers do.
DEVICE uint32_t operand(uint32_t seed, uint32_t which, uint32_t ones, uint32_t kept) {
    if (seed == 0) {
        return ones;
    }
    uint64_t place = (static_cast<uint64_t>(block_x()) * THREADS + thread_index()) * 8 + which;
    return (static_cast<uint32_t>(random_bits(seed, place)) & kept) | (ones & ~kept);
}

template <class Sum, class Multiply>
DEVICE void measure_rate(const MmaRateArguments &arguments, uint32_t ones, uint32_t kept, Multiply multiply) {
    uint32_t a[4], b[2];
    UNROLL
    for (uint32_t word = 0; word < 4; word++) {
        a[word] = operand(arguments.seed, word, ones, kept);
    }
    UNROLL
    for (uint32_t word = 0; word < 2; word++) {
        b[word] = operand(arguments.seed, 4 + word, ones, kept);
    }
    Sum sums[CHAINS][4] = {};
    for (uint32_t round = 0; round < arguments.rounds; round++) {
        UNROLL
        for (uint32_t chain = 0; chain < CHAINS; chain++) {
            multiply(sums[chain], a, b);
        }
    }
    Sum sum = 0;
    UNROLL
    for (uint32_t chain = 0; chain < CHAINS; chain++) {
        sum += sums[chain][0] + sums[chain][1] + sums[chain][2] + sums[chain][3];
    }
    arguments.out[block_x() * THREADS + thread_index()] = static_cast<float>(sum);
}

// 1.0 and 1.0; of random bits the signs and the digits are kept.
KERNEL(mma_rate_bf16, MmaRateArguments, 256) {
    auto multiply = [](float(&sums)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { mma_bf16(sums, a, b); };
    measure_rate<float>(arguments, 0x3f803f80, 0x807f807f, multiply);
}

// Four ones.
KERNEL(mma_rate_int8, MmaRateArguments, 256) {
    auto multiply = [](int32_t(&sums)[4], const uint32_t(&a)[4], const uint32_t(&b)[2]) { mma_int8(sums, a, b); };
    measure_rate<int32_t>(arguments, 0x01010101, 0xffffffff, multiply);
}
