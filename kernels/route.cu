// Which experts each token goes to, and each expert's list of tokens. A slot is one token's choice of one expert; slots
// are numbered expert by expert.
//
// route, in: normed [tokens, stride] f32, the router [experts, hidden_size] in f32 panels; allowed and bias of each
// sequence. Out: chosen, weights and exact_weights [tokens, top_k]. Logits in f32, softmax over the allowed experts and
// weights in f64; the lower index where two are equal; weights are divided by their sum.
// Moves 4 bytes a weight of the router once per token, from the second cache after the first; the rows that fill up the
// panel are read only where they share sixteen bytes with real ones. Grid (tokens), 256 threads, up to 64 experts.
// Limit: the wait for memory, four loads in flight a thread.
// group, in: chosen [tokens, top_k]. Out: slots [tokens, top_k], slot_tokens [slots], starts [experts + 1], an expert's
// tokens in rising order. Moves 4 bytes a choice twice, and 8. One block of 256 threads, up to 64 experts. Limit: as
// many votes as experts for every 32 choices of a warp.
// Formulas: Mixtral's router; cpu/routing.rs.

#include "formats.cuh"
#include "reduce.cuh"

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARPS = THREADS / LANES;
constexpr uint32_t MAX_EXPERTS = 64;
constexpr uint32_t NO_EXPERT = 0xffffffff;
constexpr uint32_t DEPTH = 4;

// Logits of all experts into `logits: [MAX_EXPERTS]`. A thread has four rows of every few lines.
DEVICE void router_logits(const RouteArguments &arguments, const float *x, float *logits) {
    SHARED(float, of_warps, WARPS * MAX_EXPERTS);
    uint32_t lane = thread_index() % LANES, warp = thread_index() / LANES;
    // Quarters of a line with real rows, a power of two, the same for all panels, so that equal rows have equal logits.
    uint32_t quarters = arguments.experts <= 4 ? 1 : arguments.experts <= 8 ? 2 : 4;
    uint32_t quarter = thread_index() % quarters, step = THREADS / quarters;
    for (uint32_t index = 0; index < panel_count(arguments.router); index++) {
        Panel panel = panel_of<F32>(arguments.router, index);
        float sums[4] = {};
        for (uint32_t first = thread_index() / quarters; first < panel.line_count; first += DEPTH * step) {
            Words words[DEPTH] = {};
            float inputs[DEPTH] = {};
            UNROLL
            for (uint32_t i = 0; i < DEPTH; i++) {
                uint32_t line = first + i * step;
                if (line < panel.line_count) {
                    words[i] = load_words(panel.lines + static_cast<size_t>(line) * LINE_BYTES + 16 * quarter);
                    inputs[i] = x[line];
                }
            }
            UNROLL
            for (uint32_t i = 0; i < DEPTH; i++) {
                UNROLL
                for (uint32_t row = 0; row < 4; row++) {
                    sums[row] = multiply_add(float_of_bits(words[i].word[row]), inputs[i], sums[row]);
                }
            }
        }
        UNROLL
        for (uint32_t row = 0; row < 4; row++) {
            for (uint32_t mask = quarters; mask < LANES; mask *= 2) {
                sums[row] += shuffle_xor(sums[row], mask);
            }
            if (lane < quarters) {
                of_warps[warp * MAX_EXPERTS + index * PANEL_ROWS + 4 * quarter + row] = sums[row];
            }
        }
    }
    barrier();
    if (thread_index() < arguments.experts) {
        float logit = of_warps[thread_index()];
        for (uint32_t from = 1; from < WARPS; from++) {
            logit += of_warps[from * MAX_EXPERTS + thread_index()];
        }
        logits[thread_index()] = logit;
    }
    barrier();
}

KERNEL(route, RouteArguments, 256) {
    SHARED(float, logits, MAX_EXPERTS);
    SHARED(double, probabilities, MAX_EXPERTS);
    size_t token = block_x();
    uint32_t *chosen = arguments.chosen + token * arguments.top_k;
    float *weights = arguments.weights + token * arguments.top_k;
    double *exact_weights = arguments.exact_weights + token * arguments.top_k;
    if (!arguments.router.lines) {
        for (uint32_t choice = thread_index(); choice < arguments.top_k; choice += THREADS) {
            chosen[choice] = choice == 0 ? 0 : NO_EXPERT;
            weights[choice] = choice == 0 ? 1.0f : 0.0f;
            exact_weights[choice] = choice == 0 ? 1.0 : 0.0;
        }
        return;
    }
    router_logits(arguments, arguments.normed + token * arguments.stride, logits);

    size_t at = static_cast<size_t>(arguments.places[token].sequence) * arguments.layers + arguments.layer;
    uint64_t allowed = arguments.allowed[at];
    const float *bias = arguments.bias + at * arguments.experts;
    uint32_t expert = thread_index();
    double negative_infinity = -1.0 / 0.0;
    double logit = negative_infinity;
    if (expert < arguments.experts && (allowed >> expert & 1)) {
        logit = static_cast<double>(logits[expert]) + static_cast<double>(bias[expert]);
    }
    double largest = join_block<WARPS>(logit, Largest());
    if (expert < arguments.experts) {
        probabilities[expert] = exponential(logit - largest);
    }
    barrier();
    if (thread_index() > 0) {
        return;
    }
    double sum = 0.0;
    for (uint32_t e = 0; e < arguments.experts; e++) {
        sum += probabilities[e];
    }
    for (uint32_t e = 0; e < arguments.experts; e++) {
        probabilities[e] /= sum;
    }
    uint64_t left = allowed;
    double chosen_sum = 0.0;
    for (uint32_t choice = 0; choice < arguments.top_k; choice++) {
        uint32_t best = NO_EXPERT;
        for (uint32_t e = 0; e < arguments.experts; e++) {
            // Without probabilities (NaN) this takes the first experts left, so that a choice is always made.
            if ((left >> e & 1) && (best == NO_EXPERT || probabilities[e] > probabilities[best])) {
                best = e;
            }
        }
        double weight = best == NO_EXPERT ? 0.0 : probabilities[best];
        left &= best == NO_EXPERT ? left : ~(static_cast<uint64_t>(1) << best);
        chosen[choice] = best;
        exact_weights[choice] = weight;
        chosen_sum += weight;
    }
    for (uint32_t choice = 0; choice < arguments.top_k; choice++) {
        double weight = exact_weights[choice] / chosen_sum;
        exact_weights[choice] = weight;
        weights[choice] = static_cast<float>(weight);
    }
}

// No expert past the last choice.
DEVICE uint32_t choice_at(const GroupArguments &arguments, uint32_t index, uint32_t end) {
    return index < end ? arguments.chosen[index] : NO_EXPERT;
}

KERNEL(group, GroupArguments, 256) {
    SHARED(uint32_t, counts, WARPS * MAX_EXPERTS);
    SHARED(uint32_t, totals, MAX_EXPERTS);
    uint32_t lane = thread_index() % LANES, warp = thread_index() / LANES;
    uint32_t choices = arguments.tokens * arguments.top_k, experts = arguments.experts;
    // Each warp has a part of the choices, whole steps of 32.
    uint32_t part = ((choices + THREADS - 1) / THREADS) * LANES;
    uint32_t begin = minimum(warp * part, choices), end = minimum(begin + part, choices);

    // A lane counts for two experts, that of its number and that of 32 more.
    uint32_t lower = 0, upper = 0;
    for (uint32_t first = begin; first < end; first += LANES) {
        uint32_t mine = choice_at(arguments, first + lane, end);
        for (uint32_t expert = 0; expert < experts; expert++) {
            uint32_t count = count_bits(ballot(mine == expert));
            lower += expert == lane ? count : 0;
            upper += expert == LANES + lane ? count : 0;
        }
    }
    counts[warp * MAX_EXPERTS + lane] = lower;
    counts[warp * MAX_EXPERTS + LANES + lane] = upper;
    barrier();
    if (thread_index() < MAX_EXPERTS) {
        uint32_t total = 0;
        for (uint32_t from = 0; from < WARPS; from++) {
            total += counts[from * MAX_EXPERTS + thread_index()];
        }
        totals[thread_index()] = total;
    }
    barrier();
    if (thread_index() <= experts) {
        uint32_t start = 0;
        for (uint32_t expert = 0; expert < thread_index(); expert++) {
            start += totals[expert];
        }
        arguments.starts[thread_index()] = start;
        // What the warps before have of the expert comes first.
        for (uint32_t to = 0; to < WARPS && thread_index() < experts; to++) {
            uint32_t count = counts[to * MAX_EXPERTS + thread_index()];
            counts[to * MAX_EXPERTS + thread_index()] = start;
            start += count;
        }
    }
    barrier();
    lower = counts[warp * MAX_EXPERTS + lane];
    upper = counts[warp * MAX_EXPERTS + LANES + lane];
    for (uint32_t first = begin; first < end; first += LANES) {
        uint32_t mine = choice_at(arguments, first + lane, end);
        for (uint32_t expert = 0; expert < experts; expert++) {
            uint32_t votes = ballot(mine == expert);
            uint32_t start = shuffle(expert < LANES ? lower : upper, expert % LANES);
            if (mine == expert) {
                uint32_t slot = start + count_bits(votes & ((1u << lane) - 1));
                arguments.slots[first + lane] = slot;
                arguments.slot_tokens[slot] = (first + lane) / arguments.top_k;
            }
            lower += expert == lane ? count_bits(votes) : 0;
            upper += expert == LANES + lane ? count_bits(votes) : 0;
        }
    }
}
