/* What the hosts of misuse share: outputs that a failed call must leave alone, and a session with a twin. The session is
 * misused, its twin is not; they must go on alike. */
#ifndef MISUSE_H
#define MISUSE_H

#include "check.h"

/* A buffer for outputs, filled with a mark; a failed call must leave it so. */
#define MARK 0xA5
static union output {
    unsigned char bytes[512];
    uint64_t aligned[64];
    void *pointer;
    size_t size;
    uint32_t number;
    int32_t status;
    float real;
    double exact;
} out[6];

static inline void mark_outputs(void) {
    memset(out, MARK, sizeof out);
}

static inline int outputs_untouched(void) {
    const unsigned char *bytes = (const unsigned char *)out;
    size_t index;
    for (index = 0; index < sizeof out; index++) {
        if (bytes[index] != MARK) return 0;
    }
    return 1;
}

/* The call fails and writes nothing to `out`. */
#define REFUSES(expected, call)     \
    do {                            \
        mark_outputs();             \
        FAILS(expected, call);      \
        CHECK(outputs_untouched()); \
    } while (0)

static inline uint64_t random_bits(void) {
    static uint64_t state = 0x9E3779B97F4A7C15u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static inline float infinity(void) {
    static const double large = 1e300;
    return (float)(large * large);
}

static inline float not_a_number(void) {
    return infinity() - infinity();
}

/* The session that is misused, and its twin. */
static gemmoe_session *subject, *twin;

static inline void settle(gemmoe_session *session) {
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    gemmoe_error *error = NULL;
    sampling.temperature = 1.0f;
    sampling.seed = 5;
    SUCCEEDS(gemmoe_session_set_sampling(session, &sampling, &error));
}

static inline void make_twins(const gemmoe_model *model) {
    static const uint32_t prompt[3] = {5, 6, 7};
    gemmoe_error *error = NULL;
    subject = make_session(model, 256, 0);
    twin = make_session(model, 256, 0);
    SUCCEEDS(gemmoe_session_prefill(subject, prompt, 3, NULL, &error));
    SUCCEEDS(gemmoe_session_prefill(twin, prompt, 3, NULL, &error));
    settle(subject);
    settle(twin);
}

/* The session goes on as if nothing had been done to it. Named by line, as this is asked often. */
#define TWINS_AGREE() twins_agree(__LINE__)
static inline void twins_agree(int line) {
    gemmoe_error *error = NULL;
    uint32_t token, expected;
    const uint32_t *tokens, *expected_tokens;
    const float *logits, *expected_logits;
    size_t count, expected_count;
    SUCCEEDS(gemmoe_session_step(twin, NULL, &expected, &error));
    SUCCEEDS(gemmoe_session_step(subject, NULL, &token, &error));
    SUCCEEDS(gemmoe_session_tokens(twin, &expected_tokens, &expected_count, &error));
    SUCCEEDS(gemmoe_session_tokens(subject, &tokens, &count, &error));
    if (token != expected || count != expected_count) fprintf(stderr, "line %d: ", line);
    CHECK(token == expected && count == expected_count);
    CHECK(memcmp(tokens, expected_tokens, count * sizeof *tokens) == 0);
    SUCCEEDS(gemmoe_session_logits(twin, &expected_logits, &expected_count, &error));
    SUCCEEDS(gemmoe_session_logits(subject, &logits, &count, &error));
    CHECK(count == expected_count && memcmp(logits, expected_logits, count * sizeof *logits) == 0);
}

static inline void destroy_twins(void) {
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(subject));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(twin));
}

#endif
