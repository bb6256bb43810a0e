/* Sessions, experts, snapshots and batches with values that cannot be: each gets its own status, and the session it
 * was tried on goes on like its twin, which was left alone. argv[1] is a model. */
#include "misuse.h"

static gemmoe_model *model;
static const char *directory;

/* Of the model. */
#define HIDDEN 40
#define VOCABULARY 320
#define EXPERTS 4
#define LAYERS 2

#define LOGITS(session) gemmoe_session_logits(session, (const float **)&out[0], &out[1].size, &error)
#define TOP(session) \
    gemmoe_session_top_log_probabilities(session, &out[0].number, &out[1].real, 4, &out[2].size, &error)
#define ROUTES(session) \
    gemmoe_session_routes(session, 0, (const uint32_t **)&out[0], (const float **)&out[1], &out[2].size, &error)

/* ---- How tokens are drawn. ---- */

static void sampling_values(void) {
    enum field { TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE, TOP_K };
    static const char *const keys[] = {"temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
                                       "presence_penalty", "top_k"};
    static const struct {
        enum field field;
        float values[4];
    } rows[] = {
        {TEMPERATURE, {-1.0f, -1e-30f, 100.1f, 1e38f}}, {TOP_P, {-0.1f, 1.0001f, 50.0f, -1e38f}},
        {MIN_P, {-0.1f, 1.0001f, 50.0f, -1e38f}},       {REPETITION, {-1.0f, 0.01f, 10.1f, 1e38f}},
        {FREQUENCY, {-2.1f, 2.1f, 1e38f, -1e38f}},      {PRESENCE, {-2.1f, 2.1f, 1e38f, -1e38f}},
        {TOP_K, {VOCABULARY + 1, 1e6f, 2e9f, 4e9f}},
    };
    const uint32_t good[3] = {1, 2, 3}, twice[3] = {1, 2, 1}, past[3] = {1, 2, VOCABULARY}, far_past[3] = {1, 2, 0xFFFFFFFF};
    float fine[3] = {1.0f, -1.0f, 0.0f}, impossible[3] = {1.0f, -1.0f, 0.0f};
    static uint32_t all[VOCABULARY + 1];
    static float values[VOCABULARY + 1];
    gemmoe_error *error = NULL;
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    size_t row, index;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        for (index = 0; index < 7; index++) {
            gemmoe_sampling absurd = GEMMOE_SAMPLING_INIT;
            float value = index < 4 ? rows[row].values[index]
                        : index == 4 ? not_a_number() : index == 5 ? infinity() : -infinity();
            if (rows[row].field == TOP_K && index > 3) continue;
            switch (rows[row].field) {
                case TEMPERATURE: absurd.temperature = value; break;
                case TOP_P: absurd.top_p = value; break;
                case MIN_P: absurd.min_p = value; break;
                case REPETITION: absurd.repetition_penalty = value; break;
                case FREQUENCY: absurd.frequency_penalty = value; break;
                case PRESENCE: absurd.presence_penalty = value; break;
                case TOP_K: absurd.top_k = (uint32_t)value; break;
            }
            CHECK(gemmoe_session_set_sampling(subject, &absurd, &error) == GEMMOE_STATUS_SAMPLING_VALUE);
            CHECK(strcmp(gemmoe_error_key(error), keys[rows[row].field]) == 0 && gemmoe_error_file(error) == NULL);
            FAILS(GEMMOE_STATUS_SAMPLING_VALUE, GEMMOE_STATUS_SAMPLING_VALUE);
        }
    }
    TWINS_AGREE();

#define BIAS(expected, tokens, numbers, count)                          \
    do {                                                                \
        sampling.logit_bias_tokens = (tokens);                          \
        sampling.logit_bias_values = (numbers);                         \
        sampling.logit_bias_count = (count);                            \
        FAILS(expected, gemmoe_session_set_sampling(subject, &sampling, &error)); \
    } while (0)
    BIAS(GEMMOE_STATUS_NULL_ARGUMENT, NULL, fine, 3);
    BIAS(GEMMOE_STATUS_NULL_ARGUMENT, good, NULL, 3);
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, twice, fine, 3);
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, past, fine, 3);
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, far_past, fine, 3);
    impossible[1] = not_a_number();
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, good, impossible, 3);
    impossible[1] = infinity();
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, good, impossible, 3);
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, all, values, VOCABULARY + 1);
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, good, fine, ~(uint64_t)0);
    BIAS(GEMMOE_STATUS_INVALID_ARGUMENT, (const uint32_t *)(const void *)((const char *)all + 1), fine, 3);
    /* A good bias with a bad setting: neither is taken over. */
    sampling.temperature = -1.0f;
    values[0] = -infinity();
    BIAS(GEMMOE_STATUS_SAMPLING_VALUE, good, values, 1);
    sampling.temperature = 0.0f;
    TWINS_AGREE();

    /* The ends of what is allowed. */
    sampling.temperature = 100.0f;
    sampling.top_k = VOCABULARY;
    sampling.top_p = 0.0f;
    sampling.min_p = 1.0f;
    sampling.repetition_penalty = 10.0f;
    sampling.frequency_penalty = -2.0f;
    sampling.presence_penalty = 2.0f;
    sampling.penalty_window = 0xFFFFFFFF;
    sampling.seed = ~(uint64_t)0;
    sampling.logit_bias_count = 0;
    SUCCEEDS(gemmoe_session_set_sampling(subject, &sampling, &error));
    SUCCEEDS(gemmoe_session_set_sampling(twin, &sampling, &error));
    TWINS_AGREE();
    settle(twin);
    /* Every token forbidden: none is drawn, and the session goes on once that is taken back. */
    for (index = 0; index < VOCABULARY; index++) {
        all[index] = (uint32_t)index;
        values[index] = -infinity();
    }
    settle(subject);
    {
        gemmoe_sampling nothing = GEMMOE_SAMPLING_INIT;
        nothing.logit_bias_tokens = all;
        nothing.logit_bias_values = values;
        nothing.logit_bias_count = VOCABULARY;
        SUCCEEDS(gemmoe_session_set_sampling(subject, &nothing, &error));
        REFUSES(GEMMOE_STATUS_NOT_A_NUMBER, gemmoe_session_step(subject, NULL, &out[0].number, &error));
        nothing.temperature = 1.0f;
        SUCCEEDS(gemmoe_session_set_sampling(subject, &nothing, &error));
        REFUSES(GEMMOE_STATUS_NOT_A_NUMBER, gemmoe_session_step(subject, NULL, &out[0].number, &error));
    }
    settle(subject);
    TWINS_AGREE();
}

/* ---- Tokens and positions that are not there. ---- */

static void token_limits(void) {
    gemmoe_session *session = make_session(model, 16, 0);
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    const uint32_t last_bad[3] = {3, 4, 320}, worst[1] = {0xFFFFFFFF};
    uint32_t many[17], token, index;
    size_t count;
    for (index = 0; index < 17; index++) many[index] = prompt_token(index);

    /* An empty session. */
    mark_outputs();
    FAILS(GEMMOE_STATUS_NO_LOGITS, gemmoe_session_step(session, NULL, &out[0].number, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, LOGITS(session));
    FAILS(GEMMOE_STATUS_NO_LOGITS, TOP(session));
    FAILS(GEMMOE_STATUS_NO_LOGITS, ROUTES(session));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_rewind(session, 1, &error));
    CHECK(outputs_untouched());
    SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
    SUCCEEDS(gemmoe_session_prefill(session, NULL, 0, NULL, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, gemmoe_session_step(session, NULL, &token, &error));

    /* Tokens that are none: nothing is appended. */
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_prefill(session, last_bad, 3, NULL, &error));
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_prefill(session, worst, 1, NULL, &error));
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_push(session, last_bad, 3, &error));
    REFUSES(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_set_tokens(session, last_bad, 3, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE,
            gemmoe_session_embed(session, last_bad, 3, GEMMOE_POOLING_MEAN, &out[0].real, HIDDEN, &error));
    REFUSES(GEMMOE_STATUS_NO_LOGITS, gemmoe_session_score(session, many, 2, &out[0].real, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_embed(session, NULL, 0, GEMMOE_POOLING_MEAN, &out[0].real, HIDDEN, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_embed(session, last_bad, 2, 2, &out[0].real, HIDDEN, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_embed(session, last_bad, 2, GEMMOE_POOLING_MEAN, &out[0].real, HIDDEN - 1, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_embed(session, last_bad, 2, GEMMOE_POOLING_MEAN, &out[0].real, HIDDEN + 1, &error));

    /* A prompt longer than the context: nothing is appended, and what fits still does. */
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_prefill(session, many, 17, NULL, &error));
    REFUSES(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_set_tokens(session, many, 17, &out[0].size, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == 0 && info.pending_count == 0 && info.context_size == 16);
    SUCCEEDS(gemmoe_session_prefill(session, many, 15, NULL, &error));
    SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
    CHECK(token < 320);
    mark_outputs();
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_step(session, NULL, &out[0].number, &error));
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_push(session, many, 1, &error));
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_score(session, many, 1, &out[0].real, &error));
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_embed(session, many, 1, 0, &out[0].real, HIDDEN, &error));
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_prefill(session, many, 1, NULL, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_rewind(session, 17, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_session_routes(session, 2, (const uint32_t **)&out[0], (const float **)&out[1], &count, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_routes(session, 0xFFFFFFFF, (const uint32_t **)&out[0],
                                                                (const float **)&out[1], &count, &error));
    CHECK(outputs_untouched());
    /* What is refused takes nothing away, whatever there is in common. */
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_set_tokens(session, many, 17, NULL, &error));
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_set_tokens(session, last_bad, 3, NULL, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == 16);
    SUCCEEDS(gemmoe_session_rewind(session, 16, &error));
    SUCCEEDS(gemmoe_session_rewind(session, 3, &error));
    /* Out of the vocabulary, first where logits are ready and then where they are not. */
    for (index = 0; index < 2; index++) {
        REFUSES(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_score(session, worst, 1, &out[0].real, &error));
        REFUSES(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_score(session, last_bad, 3, &out[0].real, &error));
        SUCCEEDS(gemmoe_session_prefill(session, NULL, 0, NULL, &error));
    }
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == 3);
    SUCCEEDS(gemmoe_session_rewind(session, 2, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, LOGITS(session));
    SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
}

/* ---- Options of sessions and batches. ---- */

static void options(void) {
    static const struct {
        uint32_t context_size, flags, kv_dtype, overflow, keep_tokens;
        uint64_t kv_limit_bytes;
        gemmoe_status status;
        const char *key;
    } rows[] = {
        {4097, 0, 0, 0, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "context_size"},
        {0xFFFFFFFF, 0, 0, 0, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "context_size"},
        {16, 2, 0, 0, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "flags"},
        {16, 0xFFFFFFFF, 0, 0, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "flags"},
        {16, 0, 5, 0, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "kv_dtype"},
        {16, 0, 0xFFFFFFFF, 0, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "kv_dtype"},
        {16, 0, 0, 2, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "overflow"},
        {16, 0, 0, 0xFFFFFFFF, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "overflow"},
        {16, 0, 0, GEMMOE_OVERFLOW_FAIL, 4, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "keep_tokens"},
        {16, 0, 0, GEMMOE_OVERFLOW_SLIDE, 15, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "keep_tokens"},
        {16, 0, 0, GEMMOE_OVERFLOW_SLIDE, 0xFFFFFFFF, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "keep_tokens"},
        {1, 0, 0, GEMMOE_OVERFLOW_SLIDE, 0, 0, GEMMOE_STATUS_INVALID_ARGUMENT, "keep_tokens"},
        {16, 0, 0, 0, 0, 1, GEMMOE_STATUS_KV_LIMIT, "kv_limit_bytes"},
        {0, 0, 0, 0, 0, 1, GEMMOE_STATUS_KV_LIMIT, "kv_limit_bytes"},
        {16, 0, 0, GEMMOE_OVERFLOW_SLIDE, 14, ~(uint64_t)0, GEMMOE_STATUS_OK, NULL},
        {1, 0, GEMMOE_KV_INT8, 0, 0, 0, GEMMOE_STATUS_OK, NULL},
    };
    gemmoe_error *error = NULL;
    gemmoe_batch *batch = NULL;
    gemmoe_batch_options batch_options = GEMMOE_BATCH_OPTIONS_INIT;
    size_t row;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
        gemmoe_session *session = NULL;
        gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
        gemmoe_status status;
        uint32_t token = prompt_token(1);
        options.context_size = rows[row].context_size;
        options.flags = rows[row].flags;
        options.kv_dtype = rows[row].kv_dtype;
        options.overflow = rows[row].overflow;
        options.keep_tokens = rows[row].keep_tokens;
        options.kv_limit_bytes = rows[row].kv_limit_bytes;
        options.prefill_chunk = 0xFFFFFFFF;
        CHECK(gemmoe_plan_memory(directory, NULL, &options, &plan, NULL) == rows[row].status);
        CHECK((plan.kv_bytes > 0) == (rows[row].status == GEMMOE_STATUS_OK));
        status = gemmoe_session_create(model, &options, &session, &error);
        if (rows[row].status == GEMMOE_STATUS_OK) {
            SUCCEEDS(status);
            SUCCEEDS(gemmoe_session_prefill(session, &token, 1, NULL, &error));
            RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
        } else {
            CHECK(session == NULL && status == rows[row].status && strcmp(gemmoe_error_key(error), rows[row].key) == 0);
            FAILS(rows[row].status, status);
        }
    }
    {
        /* Only memory says how much is too much. */
        gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
        gemmoe_session *session = NULL;
        gemmoe_status status;
        options.context_size = 16;
        options.route_capacity = 0xFFFFFFFF;
        status = gemmoe_session_create(model, &options, &session, NULL);
        CHECK(status == GEMMOE_STATUS_OUT_OF_MEMORY || status == GEMMOE_STATUS_OK);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    }
    for (row = 0; row < 4; row++) {
        gemmoe_status status;
        batch_options.max_sessions = row == 0 ? 0xFFFFFFFF : 0;
        batch_options.max_tokens = row == 1 ? 0xFFFFFFFF : 0;
        batch_options.prefill_chunk = row == 2 ? 0xFFFFFFFF : 0;
        batch_options.max_context = row == 3 ? 0xFFFFFFFF : 0;
        status = gemmoe_batch_create(model, &batch_options, &batch, NULL);
        CHECK(status == GEMMOE_STATUS_OK || (status == GEMMOE_STATUS_OUT_OF_MEMORY && row < 2));
        RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch));
        batch = NULL;
    }
    batch_options.max_context = 0;
    batch_options.max_sessions = 4;
    batch_options.max_tokens = 3;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_batch_create(model, &batch_options, (gemmoe_batch **)&out[0], &error));
}

/* A session that only batches run. */
static void batch_only(void) {
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    gemmoe_session *session = NULL;
    gemmoe_batch *batch = NULL;
    const uint32_t tokens[2] = {3, 4};
    uint32_t drawn, token = 999;
    int32_t status = GEMMOE_STATUS_NEED_MORE;
    options.context_size = 64;
    options.flags = GEMMOE_SESSION_BATCH_ONLY;
    SUCCEEDS(gemmoe_session_create(model, &options, &session, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_prefill(session, tokens, 2, NULL, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == 0 && info.workspace_bytes == 0);
    SUCCEEDS(gemmoe_session_push(session, tokens, 2, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_prefill(session, NULL, 0, NULL, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_step(session, NULL, &out[0].number, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_score(session, tokens, 2, &out[0].real, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_embed(session, tokens, 2, 0, &out[0].real, HIDDEN, &error));
    REFUSES(GEMMOE_STATUS_NO_LOGITS, LOGITS(session));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == 2 && info.pending_count == 2);
    SUCCEEDS(gemmoe_batch_create(model, NULL, &batch, &error));
    while (status == GEMMOE_STATUS_NEED_MORE) {
        SUCCEEDS(gemmoe_batch_step(batch, &session, 1, NULL, &status, &token, NULL, &error));
    }
    CHECK(status == GEMMOE_STATUS_OK);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    session = make_session(model, 64, 0);
    SUCCEEDS(gemmoe_session_prefill(session, tokens, 2, NULL, &error));
    SUCCEEDS(gemmoe_session_step(session, NULL, &drawn, &error));
    CHECK(drawn == token);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch));
}

/* ---- Budgets. ---- */

static void budgets(void) {
    static const struct {
        uint32_t max_layers;
        uint64_t max_us;
        int is_enough;
    } rows[] = {
        {0, 0, 1}, {1, 0, 0}, {0, 1, 0}, {1, 1, 0}, {0xFFFFFFFF, 0, 1}, {0, ~(uint64_t)0, 1}, {0xFFFFFFFF, ~(uint64_t)0, 1},
        {1, ~(uint64_t)0, 0},
    };
    gemmoe_error *error = NULL;
    size_t row, index;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        for (index = 0; index < 3; index++) {
            gemmoe_budget budget = GEMMOE_BUDGET_INIT;
            gemmoe_status status;
            uint32_t expected, calls = 0;
            budget.max_layers = rows[row].max_layers;
            budget.max_us = rows[row].max_us;
            SUCCEEDS(gemmoe_session_step(twin, NULL, &expected, &error));
            do {
                mark_outputs();
                error = (gemmoe_error *)&out;
                status = gemmoe_session_step(subject, &budget, &out[0].number, &error);
                CHECK(error == NULL);
                CHECK(status == GEMMOE_STATUS_OK || (status == GEMMOE_STATUS_NEED_MORE && outputs_untouched()));
                calls++;
            } while (status == GEMMOE_STATUS_NEED_MORE);
            CHECK(out[0].number == expected);
            /* Two layers and the head. */
            CHECK(!rows[row].is_enough || calls == 1);
            CHECK(rows[row].max_layers != 1 || calls > LAYERS);
        }
    }
    TWINS_AGREE();
}

/* ---- Experts. ---- */

static void experts(void) {
    static const uint32_t layers[4] = {LAYERS, 1000, 0x7FFFFFFF, 0xFFFFFFFE};
    static const uint64_t masks[5] = {0, (uint64_t)1 << EXPERTS, 0x1F, (uint64_t)1 << 63, ~(uint64_t)0};
    float bias[EXPERTS + 1] = {0, 0, 0, 0, 0};
    gemmoe_error *error = NULL;
    size_t index;
    for (index = 0; index < 5; index++) {
        FAILS(GEMMOE_STATUS_EXPERT_VALUE, gemmoe_session_set_expert_mask(subject, 0, masks[index], &error));
        FAILS(GEMMOE_STATUS_EXPERT_VALUE,
              gemmoe_session_set_expert_mask(subject, GEMMOE_ALL_LAYERS, masks[index], &error));
    }
    for (index = 0; index < 4; index++) {
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_set_expert_mask(subject, layers[index], 1, &error));
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
              gemmoe_session_set_expert_bias(subject, layers[index], bias, EXPERTS, &error));
        REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
                gemmoe_session_routes(subject, layers[index], (const uint32_t **)&out[0], (const float **)&out[1],
                                      &out[2].size, &error));
    }
    TWINS_AGREE();
    for (index = 0; index < 3; index++) {
        bias[0] = 100.0f;
        bias[EXPERTS - 1] = index == 0 ? not_a_number() : index == 1 ? infinity() : -infinity();
        FAILS(GEMMOE_STATUS_EXPERT_VALUE, gemmoe_session_set_expert_bias(subject, 0, bias, EXPERTS, &error));
        FAILS(GEMMOE_STATUS_EXPERT_VALUE,
              gemmoe_session_set_expert_bias(subject, GEMMOE_ALL_LAYERS, bias, EXPERTS, &error));
    }
    bias[EXPERTS - 1] = 0.0f;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_set_expert_bias(subject, 0, bias, EXPERTS - 1, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_set_expert_bias(subject, 0, bias, EXPERTS + 1, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_set_expert_bias(subject, 0, NULL, 0, &error));
    TWINS_AGREE();
    /* What is set and taken off before a token runs changes nothing. */
    SUCCEEDS(gemmoe_session_set_expert_mask(subject, GEMMOE_ALL_LAYERS, 1, &error));
    SUCCEEDS(gemmoe_session_set_expert_bias(subject, 0, bias, EXPERTS, &error));
    SUCCEEDS(gemmoe_session_clear_expert_control(subject, &error));
    SUCCEEDS(gemmoe_session_clear_expert_statistics(subject, &error));
    TWINS_AGREE();
}

/* ---- Snapshots. ---- */

#define RESTORE(of, bytes, count, options) \
    gemmoe_session_restore(of, bytes, count, options, (gemmoe_session **)&out[0], &error)

static void snapshots(void) {
    static const uint32_t prompt[3] = {5, 6, 7};
    gemmoe_load_options other_options = GEMMOE_LOAD_OPTIONS_INIT;
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_error *error = NULL;
    gemmoe_model *other = NULL;
    gemmoe_session *session = make_session(model, 16, 0), *restored = NULL;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    uint32_t expected, token;
    uint8_t *bytes;
    size_t count = 0, index;
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 3, NULL, &error));
    settle(session);
    SUCCEEDS(gemmoe_session_snapshot(session, NULL, 0, &count, &error));
    bytes = (uint8_t *)malloc(count + 1);
    CHECK(bytes != NULL);
    SUCCEEDS(gemmoe_session_snapshot(session, bytes, count, &count, &error));
    SUCCEEDS(gemmoe_session_step(session, NULL, &expected, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));

    /* Every byte changed, every length but the right one. */
    for (index = 0; index < count; index++) {
        uint8_t was = bytes[index];
        bytes[index] = (uint8_t)(was ^ (1u << random_bits() % 8));
        REFUSES(GEMMOE_STATUS_SNAPSHOT_DAMAGED, RESTORE(model, bytes, count, NULL));
        bytes[index] = was;
        REFUSES(GEMMOE_STATUS_SNAPSHOT_DAMAGED, RESTORE(model, bytes, index, NULL));
    }
    bytes[count] = 0;
    REFUSES(GEMMOE_STATUS_SNAPSHOT_DAMAGED, RESTORE(model, bytes, count + 1, NULL));

    /* The same weights with other arithmetic. */
    other_options.flags = GEMMOE_LOAD_EXACT_GELU;
    other_options.threads = 1;
    SUCCEEDS(gemmoe_model_load(directory, &other_options, &other, &error));
    REFUSES(GEMMOE_STATUS_SNAPSHOT_MODEL, RESTORE(other, bytes, count, NULL));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(other));

    /* Options that contradict it. */
    options.kv_dtype = GEMMOE_KV_F32;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, RESTORE(model, bytes, count, &options));
    options.kv_dtype = GEMMOE_KV_INT8;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, RESTORE(model, bytes, count, &options));
    options.kv_dtype = 5;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, RESTORE(model, bytes, count, &options));
    options.kv_dtype = GEMMOE_KV_BF16;
    options.context_size = 2;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, RESTORE(model, bytes, count, &options));
    options.context_size = 4097;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, RESTORE(model, bytes, count, &options));
    options.context_size = 32;
    options.kv_limit_bytes = 1;
    REFUSES(GEMMOE_STATUS_KV_LIMIT, RESTORE(model, bytes, count, &options));
    options.kv_limit_bytes = 0;
    options.flags = 2;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, RESTORE(model, bytes, count, &options));
    options.flags = 0;
    options.overflow = GEMMOE_OVERFLOW_SLIDE;
    options.keep_tokens = 31;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, RESTORE(model, bytes, count, &options));

    /* And after all that it is still good, with what can be chosen anew. */
    options.keep_tokens = 2;
    for (index = 0; index < 2; index++) {
        SUCCEEDS(gemmoe_session_restore(model, bytes, count, index == 0 ? NULL : &options, &restored, &error));
        SUCCEEDS(gemmoe_session_get_info(restored, &info, &error));
        CHECK(info.context_size == (index == 0 ? 16u : 32u) && info.kv_dtype == GEMMOE_KV_BF16 && info.token_count == 3);
        SUCCEEDS(gemmoe_session_step(restored, NULL, &token, &error));
        CHECK(token == expected);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(restored));
    }
    free(bytes);
}

/* ---- Batches. ---- */

static void batches(void) {
    enum place { FIRST, STALE, MISSING, TWICE, NOT_ONE, EMPTY, FULL, CANCELLED, LAST, PLACES };
    static const gemmoe_status expected[PLACES] = {
        GEMMOE_STATUS_OK,        GEMMOE_STATUS_STALE_HANDLE, GEMMOE_STATUS_NULL_ARGUMENT,
        GEMMOE_STATUS_BUSY,      GEMMOE_STATUS_WRONG_HANDLE_TYPE, GEMMOE_STATUS_NO_LOGITS,
        GEMMOE_STATUS_CONTEXT_FULL, GEMMOE_STATUS_CANCELLED, GEMMOE_STATUS_OK,
    };
    static const uint32_t prompt[3] = {5, 6, 7};
    gemmoe_error *error = NULL, *errors[PLACES];
    gemmoe_batch_options options = GEMMOE_BATCH_OPTIONS_INIT;
    gemmoe_batch *batch = NULL, *small = NULL;
    gemmoe_model *other = load_model(directory);
    gemmoe_session *sessions[PLACES], *foreign = make_session(other, 64, 0), *last_alone = make_session(model, 64, 0);
    int32_t statuses[PLACES];
    uint32_t tokens[PLACES], alone, last;
    size_t round, place;

    SUCCEEDS(gemmoe_batch_create(model, NULL, &batch, &error));
    sessions[STALE] = make_session(model, 64, 0);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(sessions[STALE]));
    sessions[FIRST] = sessions[TWICE] = subject;
    sessions[MISSING] = NULL;
    sessions[NOT_ONE] = (gemmoe_session *)model;
    sessions[EMPTY] = make_session(model, 64, 0);
    sessions[FULL] = make_session(model, 3, 0);
    sessions[CANCELLED] = make_session(model, 64, 0);
    sessions[LAST] = make_session(model, 64, 0);
    SUCCEEDS(gemmoe_session_prefill(sessions[FULL], prompt, 3, NULL, &error));
    SUCCEEDS(gemmoe_session_prefill(sessions[CANCELLED], prompt, 3, NULL, &error));
    SUCCEEDS(gemmoe_session_prefill(sessions[LAST], prompt + 1, 2, NULL, &error));
    SUCCEEDS(gemmoe_session_prefill(last_alone, prompt + 1, 2, NULL, &error));
    SUCCEEDS(gemmoe_session_prefill(foreign, prompt, 3, NULL, &error));

    for (round = 0; round < 6; round++) {
        /* With and without a place for errors. */
        gemmoe_error **errors_or_none = round % 2 == 0 ? errors : NULL;
        SUCCEEDS(gemmoe_session_step(twin, NULL, &alone, &error));
        SUCCEEDS(gemmoe_session_step(last_alone, NULL, &last, &error));
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_cancel(sessions[CANCELLED]));
        memset(statuses, MARK, sizeof statuses);
        memset(tokens, MARK, sizeof tokens);
        memset(errors, MARK, sizeof errors);
        SUCCEEDS(gemmoe_batch_step(batch, sessions, PLACES, NULL, statuses, tokens, errors_or_none, &error));
        for (place = 0; place < PLACES; place++) {
            if (statuses[place] != expected[place]) fprintf(stderr, "place %u: ", (unsigned)place);
            RETURNS(expected[place], (gemmoe_status)statuses[place]);
            CHECK(expected[place] == GEMMOE_STATUS_OK || tokens[place] == 0xA5A5A5A5u);
            if (errors_or_none == NULL) continue;
            if (expected[place] == GEMMOE_STATUS_OK) {
                CHECK(errors[place] == NULL);
            } else {
                RETURNS(expected[place], gemmoe_error_status(errors[place]));
                RETURNS(GEMMOE_STATUS_OK, gemmoe_error_destroy(errors[place]));
            }
        }
        CHECK(tokens[FIRST] == alone && tokens[LAST] == last);
    }
    /* The cancel was for one step, and left the session as it was. */
    SUCCEEDS(gemmoe_session_step(sessions[CANCELLED], NULL, &alone, &error));
    SUCCEEDS(gemmoe_session_rewind(sessions[CANCELLED], 3, &error));
    SUCCEEDS(gemmoe_batch_step(batch, &sessions[CANCELLED], 1, NULL, statuses, tokens, NULL, &error));
    CHECK(statuses[0] == GEMMOE_STATUS_OK && tokens[0] == alone);

    /* What is wrong with the whole step: nothing is written, and every session is as before. */
#define STEP(of, count) \
    gemmoe_batch_step(of, sessions, count, NULL, &out[0].status, &out[1].number, (gemmoe_error **)&out[2], &error)
    sessions[STALE] = foreign;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, STEP(batch, PLACES));
    TWINS_AGREE();
    options.max_sessions = 1;
    SUCCEEDS(gemmoe_batch_create(model, &options, &small, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, STEP(small, 2));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(small));
    options.max_context = 255;
    SUCCEEDS(gemmoe_batch_create(model, &options, &small, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, STEP(small, 1));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(small));
    TWINS_AGREE();
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_cancel(batch));
    REFUSES(GEMMOE_STATUS_CANCELLED, STEP(batch, 1));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_cancel(batch));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_clear_cancel(batch));
    SUCCEEDS(gemmoe_session_step(twin, NULL, &alone, &error));
    SUCCEEDS(gemmoe_batch_step(batch, sessions, 1, NULL, statuses, tokens, NULL, &error));
    CHECK(statuses[0] == GEMMOE_STATUS_OK && tokens[0] == alone);
    /* The foreign one, in a batch of its own model, which is gone. */
    SUCCEEDS(gemmoe_batch_create(other, NULL, &small, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(other));
    SUCCEEDS(gemmoe_batch_step(small, &foreign, 1, NULL, statuses, tokens, NULL, &error));
    CHECK(statuses[0] == GEMMOE_STATUS_OK);

    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(small));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(foreign));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(last_alone));
    for (place = EMPTY; place < PLACES; place++) RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(sessions[place]));
}

int main(int argc, char **argv) {
    CHECK(argc > 1);
    directory = argv[1];
    model = load_model(directory);
    make_twins(model);
    sampling_values();
    token_limits();
    TWINS_AGREE();
    options();
    batch_only();
    TWINS_AGREE();
    budgets();
    experts();
    snapshots();
    TWINS_AGREE();
    batches();
    TWINS_AGREE();
    destroy_twins();
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    return 0;
}
