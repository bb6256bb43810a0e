// What a token is drawn from: the largest logits of each row and their tokens, and the sum of all e^(logit - largest).
//
// In: logits [rows, vocab_size] f32. Out: copies [rows] x [vocab_size], a row where its sequence keeps it; of each row the
// sums over its parts of 2048 tokens, [parts] f64, and its 256 candidates, tokens and logits. Between the two launches:
// of_parts [rows, parts, 256], the candidates of each part.
//
// select_candidates moves 4 bytes read and 4 written a logit, and one for the candidates of its part: the least. Grid (parts,
// rows), 256 threads: a warp sorts 256 logits, then half of the warps that are left join the lists of the others to theirs,
// until one is left. Limit: the sort, 30 steps of eight shuffles each.
// merge_candidates moves as many read, from the second cache, and 8 a candidate. Grid (1 + parts, rows), 1024 threads: the
// first block of a row joins the parts' lists, a warp every 32nd, then the warps' as above; block i has the sum of part
// i - 1. Limit: the wait for memory, and eight steps for each list that is joined.
//
// A candidate is one number of 64 bits that is larger where it comes first: the logit's bits, turned so that they rise with it,
// then the token's, flipped. A list is 256 of them, falling, in the registers of a warp: element i is in register i / 32
// of lane i % 32. Lists are sorted and joined by bitonic networks (Batcher 1968): what happens never depends on the
// numbers, and no two candidates are equal, so the result is the same in any order of lanes and blocks.
// The sum is of e_to_the in f32, the weights of the CPU's sampler to the bit, in f64: a thread's, lanes, warps; the host
// adds the parts.

#include "math.cuh"
#include "reduce.cuh"

constexpr uint32_t NO_TOKEN = 0xffffffff;
constexpr uint32_t REGISTERS = CANDIDATES / LANES;

// A list of candidates, or one in the making.
struct List {
    uint64_t rank[REGISTERS];
};

// A token as a candidate; 0 where it is none.
DEVICE uint64_t rank_of(float logit, uint32_t token) {
    // Adding 0 makes the two zeros one.
    uint32_t bits = bits_of_float(logit + 0.0f);
    uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000;
    bool is_candidate = logit > float_of_bits(0xff800000);
    return is_candidate ? static_cast<uint64_t>(rising) << 32 | ~token : 0;
}

DEVICE float logit_of(uint64_t rank) {
    uint32_t rising = static_cast<uint32_t>(rank >> 32);
    return float_of_bits(rising >> 31 ? rising & 0x7fffffff : ~rising);
}

// The place in a list of what a lane has in a register.
DEVICE uint32_t place_of(uint32_t index) { return index * LANES + thread_index() % LANES; }

// Steps of a bitonic network: elements DISTANCE apart are put in order, then those half as far, down to neighbours. The order
// is falling where bit SIZE of the place is not set, else rising.
template <uint32_t SIZE, uint32_t DISTANCE> DEVICE void put_in_order(List &list) {
    UNROLL
    for (uint32_t index = 0; index < REGISTERS; index++) {
        bool is_falling = (place_of(index) & SIZE) == 0;
        if constexpr (DISTANCE >= LANES) {
            uint32_t partner = index ^ (DISTANCE / LANES);
            if (partner > index) {
                uint64_t larger = maximum(list.rank[index], list.rank[partner]);
                uint64_t smaller = minimum(list.rank[index], list.rank[partner]);
                list.rank[index] = is_falling ? larger : smaller;
                list.rank[partner] = is_falling ? smaller : larger;
            }
        } else {
            uint64_t other = shuffle_xor(list.rank[index], DISTANCE);
            bool is_first = (thread_index() & DISTANCE) == 0;
            uint64_t mine = list.rank[index];
            list.rank[index] = is_first == is_falling ? maximum(mine, other) : minimum(mine, other);
        }
    }
    if constexpr (DISTANCE > 1) {
        put_in_order<SIZE, DISTANCE / 2>(list);
    }
}

template <uint32_t SIZE = 2> DEVICE void sort(List &list) {
    put_in_order<SIZE, SIZE / 2>(list);
    if constexpr (SIZE < CANDIDATES) {
        sort<2 * SIZE>(list);
    }
}

DEVICE List load(const uint64_t *from) {
    List list;
    UNROLL
    for (uint32_t index = 0; index < REGISTERS; index++) {
        list.rank[index] = from[place_of(index)];
    }
    return list;
}

DEVICE void store(const List &list, uint64_t *to) {
    UNROLL
    for (uint32_t index = 0; index < REGISTERS; index++) {
        to[place_of(index)] = list.rank[index];
    }
}

// The first of both lists. The larger of each pair, one list backwards, are they, first falling, then rising or the other
// way round, which is what the last steps of the sort put in order.
DEVICE void join(List &list, const uint64_t *other) {
    UNROLL
    for (uint32_t index = 0; index < REGISTERS; index++) {
        list.rank[index] = maximum(list.rank[index], other[CANDIDATES - 1 - place_of(index)]);
    }
    put_in_order<CANDIDATES, CANDIDATES / 2>(list);
}

// Joins the lists of the first `count` warps, at least one; the first warp has the result.
template <uint32_t WARPS> DEVICE void join_warps(List &list, uint32_t count) {
    SHARED(uint64_t, lists, WARPS / 2 * CANDIDATES);
    uint32_t warp = thread_index() / LANES;
    for (uint32_t half = WARPS / 2; half > 0; half /= 2) {
        if (half >= count) {
            continue;
        }
        if (half <= warp && warp < count) {
            store(list, lists + (warp - half) * CANDIDATES);
        }
        barrier();
        if (warp < half && half + warp < count) {
            join(list, lists + warp * CANDIDATES);
        }
        barrier();
        count = half;
    }
}

DEVICE uint32_t parts_of(const CandidateArguments &arguments) {
    return (arguments.vocab_size + CANDIDATE_PART - 1) / CANDIDATE_PART;
}

KERNEL(select_candidates, CandidateArguments, 256) {
    constexpr uint32_t WARPS = CANDIDATE_PART / CANDIDATES;
    static_assert(WARPS * LANES == 256, "a list for each warp");
    size_t row = block_y();
    const float *logits = arguments.logits + row * arguments.vocab_size;
    float *copy = arguments.copies[row];
    uint32_t warp = thread_index() / LANES;
    uint32_t begin = block_x() * CANDIDATE_PART;
    uint32_t end = minimum(begin + CANDIDATE_PART, arguments.vocab_size);
    uint32_t first = begin + warp * CANDIDATES;
    List list = {};
    if (first < end) {
        UNROLL
        for (uint32_t index = 0; index < REGISTERS; index++) {
            uint32_t token = first + place_of(index);
            if (token < end) {
                float logit = logits[token];
                copy[token] = logit;
                list.rank[index] = rank_of(logit, token);
            }
        }
        sort(list);
    }
    join_warps<WARPS>(list, (end - begin + CANDIDATES - 1) / CANDIDATES);
    if (warp == 0) {
        store(list, arguments.of_parts + (row * parts_of(arguments) + block_x()) * CANDIDATES);
    }
}

constexpr uint32_t THREADS = 1024;
constexpr uint32_t WARPS = THREADS / LANES;

// The sum of the weights of a part of a row; 0 where the row's largest logit is not finite.
DEVICE double sum_of_part(const CandidateArguments &arguments, size_t row, uint32_t part) {
    uint32_t parts = parts_of(arguments);
    float largest = float_of_bits(0xff800000);
    for (uint32_t other = thread_index(); other < parts; other += THREADS) {
        uint64_t first = arguments.of_parts[(row * parts + other) * CANDIDATES];
        largest = first == 0 ? largest : maximum(largest, logit_of(first));
    }
    largest = join_block<WARPS>(largest, Largest());
    const float *logits = arguments.logits + row * arguments.vocab_size;
    uint32_t begin = part * CANDIDATE_PART;
    uint32_t end = minimum(begin + CANDIDATE_PART, arguments.vocab_size);
    double sum = 0.0;
    for (uint32_t token = begin + thread_index(); token < end; token += THREADS) {
        float logit = logits[token];
        sum += is_nan(logit) ? 0.0f : e_to_the(logit - largest);
    }
    sum = join_block<WARPS>(sum, Sum());
    return is_finite(largest) ? sum : 0.0;
}

KERNEL(merge_candidates, CandidateArguments, 1024) {
    size_t row = block_y();
    uint32_t parts = parts_of(arguments), warp = thread_index() / LANES;
    uint64_t *results = arguments.results + row * (parts + CANDIDATES);
    if (block_x() > 0) {
        uint32_t part = block_x() - 1;
        double sum = sum_of_part(arguments, row, part);
        if (thread_index() == 0) {
            reinterpret_cast<double *>(results)[part] = sum;
        }
        return;
    }
    const uint64_t *of_parts = arguments.of_parts + row * parts * CANDIDATES;
    List list = {};
    if (warp < parts) {
        list = load(of_parts + warp * CANDIDATES);
        for (uint32_t part = warp + WARPS; part < parts; part += WARPS) {
            join(list, of_parts + static_cast<size_t>(part) * CANDIDATES);
        }
    }
    join_warps<WARPS>(list, minimum(parts, WARPS));
    if (warp == 0) {
        uint32_t *tokens = reinterpret_cast<uint32_t *>(results + parts);
        float *logits = reinterpret_cast<float *>(tokens + CANDIDATES);
        UNROLL
        for (uint32_t index = 0; index < REGISTERS; index++) {
            uint64_t rank = list.rank[index];
            tokens[place_of(index)] = rank == 0 ? NO_TOKEN : ~static_cast<uint32_t>(rank);
            logits[place_of(index)] = rank == 0 ? float_of_bits(0xff800000) : logit_of(rank);
        }
    }
}
