/* The life of a session as a host would write it: in slices of time, forked, taken back, kept as bytes, in batches, held to
 * a grammar, with its experts in view. Whatever way the tokens come, they are those of a session that is simply stepped;
 * they are printed. argv[1] is a model with the tokenizer of the tests; argv[2] n does only every n-th of the slow cases. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <time.h>

#include "check.h"

#define PROMPT 40
#define DRAWN 12
#define CHUNK 16
/* Of the model. */
#define LAYERS 2
#define EXPERTS 4
#define TOP_K 2

static gemmoe_model *model;
static const char *directory;
static unsigned stride = 1;
static uint32_t prompt[PROMPT];
/* What a session draws after the prompt when nothing happens to it. */
static uint32_t expected[DRAWN];

static void print(const char *what, const uint32_t *tokens, size_t count) {
    size_t index;
    printf("%s:", what);
    for (index = 0; index < count; index++) printf(" %u", (unsigned)tokens[index]);
    printf("\n");
}

static void set_seed(gemmoe_session *session, uint64_t seed) {
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    gemmoe_error *error = NULL;
    sampling.temperature = 1.0f;
    sampling.seed = seed;
    SUCCEEDS(gemmoe_session_set_sampling(session, &sampling, &error));
}

/* A session that has been given the prompt. */
static gemmoe_session *prompted(void) {
    gemmoe_session *session = make_session(model, 128, CHUNK);
    gemmoe_error *error = NULL;
    SUCCEEDS(gemmoe_session_prefill(session, prompt, PROMPT, NULL, &error));
    set_seed(session, 5);
    return session;
}

/* Draws tokens `from` to `to` and compares them with what is expected. */
static void go_on(gemmoe_session *session, size_t from, size_t to) {
    gemmoe_error *error = NULL;
    uint32_t token;
    for (; from < to; from++) {
        SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
        CHECK(token == expected[from]);
    }
}

static void destroy(gemmoe_session *session) {
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
}

/* ---- In slices. ---- */

/* What a call within a budget leaves in its error: nothing, also when there is more to do. */
static int needs_more(gemmoe_status status, const gemmoe_error *error) {
    CHECK(error == NULL);
    CHECK(status == GEMMOE_STATUS_OK || status == GEMMOE_STATUS_NEED_MORE);
    return status == GEMMOE_STATUS_NEED_MORE;
}

static void budgets(void) {
    static const struct {
        uint32_t max_layers;
        uint64_t max_us;
    } rows[] = {{1, 0}, {2, 0}, {3, 0}, {0, 1}, {0, 20}, {1, 1}};
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    size_t row, index;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row += stride) {
        gemmoe_session *session = make_session(model, 128, CHUNK);
        gemmoe_budget budget = GEMMOE_BUDGET_INIT;
        gemmoe_status status;
        unsigned calls = 1;
        budget.max_layers = rows[row].max_layers;
        budget.max_us = rows[row].max_us;
        set_seed(session, 5);
        status = gemmoe_session_prefill(session, prompt, PROMPT, &budget, &error);
        while (needs_more(status, error)) {
            SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
            CHECK(info.token_count == PROMPT && info.pending_count > 0);
            status = gemmoe_session_prefill(session, NULL, 0, &budget, &error);
            calls++;
        }
        /* Three passes of two layers, and the head for the last. */
        if (budget.max_layers == 1) CHECK(calls >= 3 * LAYERS + 1);
        SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
        CHECK(info.token_count == PROMPT && info.pending_count == 0);
        for (index = 0; index < DRAWN; index++) {
            uint32_t token = 999;
            do {
                CHECK(token == 999);
                status = gemmoe_session_step(session, &budget, &token, &error);
            } while (needs_more(status, error));
            CHECK(token == expected[index]);
        }
        destroy(session);
        /* Only pushed, and everything left to the steps. */
        session = make_session(model, 128, CHUNK);
        set_seed(session, 5);
        SUCCEEDS(gemmoe_session_push(session, prompt, PROMPT, &error));
        for (index = 0; index < DRAWN; index++) {
            uint32_t token = 999;
            while (needs_more(gemmoe_session_step(session, &budget, &token, &error), error)) {}
            CHECK(token == expected[index]);
        }
        destroy(session);
    }
}

/* ---- Forked, taken back, kept as bytes. ---- */

static void forks(void) {
    gemmoe_session *session = prompted(), *fork = NULL, *grandchild = NULL;
    gemmoe_error *error = NULL;
    uint32_t other[DRAWN];
    size_t index;
    go_on(session, 0, 4);
    SUCCEEDS(gemmoe_session_fork(session, &fork, &error));
    for (index = 4; index < 8; index++) {
        go_on(session, index, index + 1);
        go_on(fork, index, index + 1);
    }
    SUCCEEDS(gemmoe_session_fork(fork, &grandchild, &error));
    destroy(fork);
    /* Another seed, another text; the parent does not notice. */
    set_seed(grandchild, 6);
    for (index = 0; index < DRAWN; index++) SUCCEEDS(gemmoe_session_step(grandchild, NULL, &other[index], &error));
    go_on(session, 8, DRAWN);
    CHECK(memcmp(other + 4, expected, sizeof other / 2) != 0);
    print("another seed", other, DRAWN);
    destroy(session);
    /* Back to the prompt, and the first seed again. */
    SUCCEEDS(gemmoe_session_rewind(grandchild, PROMPT, &error));
    set_seed(grandchild, 5);
    go_on(grandchild, 0, DRAWN);
    destroy(grandchild);
}

static void rewinds(void) {
    gemmoe_session *session = prompted();
    gemmoe_error *error = NULL;
    size_t index;
    for (index = 0; index < DRAWN; index++) {
        go_on(session, 0, index);
        SUCCEEDS(gemmoe_session_rewind(session, PROMPT, &error));
    }
    SUCCEEDS(gemmoe_session_rewind(session, 7, &error));
    SUCCEEDS(gemmoe_session_prefill(session, prompt + 7, PROMPT - 7, NULL, &error));
    go_on(session, 0, DRAWN);
    destroy(session);
}

/* A conversation that goes on: all its tokens each time, of which only the new ones are run. */
static void set_tokens(void) {
    gemmoe_session *session = make_session(model, 128, CHUNK);
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    uint32_t tokens[PROMPT + DRAWN];
    size_t count, reused = 99, held = 0;
    memcpy(tokens, prompt, sizeof prompt);
    memcpy(tokens + PROMPT, expected, sizeof expected);
    set_seed(session, 5);
    for (count = 10; count <= PROMPT; count += 10) {
        SUCCEEDS(gemmoe_session_set_tokens(session, tokens, count, &reused, &error));
        CHECK(reused == held);
        SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
        CHECK(info.token_count == count && info.pending_count == count - held);
        SUCCEEDS(gemmoe_session_prefill(session, NULL, 0, NULL, &error));
        held = count;
    }
    go_on(session, 0, DRAWN);
    /* Something else was said after the fifth answer. */
    SUCCEEDS(gemmoe_session_set_tokens(session, tokens, PROMPT + 5, &reused, &error));
    CHECK(reused == PROMPT + 5);
    go_on(session, 5, DRAWN);
    tokens[3] ^= 1;
    SUCCEEDS(gemmoe_session_set_tokens(session, tokens, PROMPT, &reused, &error));
    CHECK(reused == 3);
    tokens[3] ^= 1;
    SUCCEEDS(gemmoe_session_set_tokens(session, tokens, PROMPT, NULL, &error));
    go_on(session, 0, DRAWN);
    SUCCEEDS(gemmoe_session_set_tokens(session, NULL, 0, &reused, &error));
    CHECK(reused == 0);
    destroy(session);
}

/* What was planned is what it takes. */
static void plans(void) {
    gemmoe_load_options load_options = GEMMOE_LOAD_OPTIONS_INIT;
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
    gemmoe_model_info model_info = GEMMOE_MODEL_INFO_INIT;
    gemmoe_residency residency = GEMMOE_RESIDENCY_INIT;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    gemmoe_session *session = make_session(model, 128, CHUNK);
    load_options.threads = 2;
    options.context_size = 128;
    options.prefill_chunk = CHUNK;
    SUCCEEDS(gemmoe_plan_memory(directory, &load_options, &options, &plan, &error));
    SUCCEEDS(gemmoe_model_get_info(model, &model_info, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(plan.weight_bytes == model_info.weight_bytes && plan.expert_bytes == model_info.expert_bytes);
    CHECK(plan.kv_bytes_per_token == model_info.kv_bytes_per_token && plan.kv_dtype == info.kv_dtype);
    CHECK(plan.kv_bytes == info.kv_bytes && plan.workspace_bytes == info.workspace_bytes && plan.context_size == 128);
    /* On the CPU all weights are in host memory, whatever the limit. */
    SUCCEEDS(gemmoe_model_set_device_memory_limit(model, 1, &error));
    SUCCEEDS(gemmoe_model_get_residency(model, &residency, &error));
    CHECK(residency.host_bytes == plan.weight_bytes && residency.host_bytes == plan.host_bytes);
    CHECK(residency.host_experts > 0 && residency.host_experts == plan.host_experts);
    CHECK(residency.device_bytes == 0 && plan.device_bytes == 0 && residency.staging_bytes == 0);
    destroy(session);
}

/* Weights rounded on load: in the formats asked for, in less memory, as planned. */
static void rounded(void) {
    gemmoe_load_options load_options = GEMMOE_LOAD_OPTIONS_INIT;
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
    gemmoe_model_info plain = GEMMOE_MODEL_INFO_INIT, info = GEMMOE_MODEL_INFO_INIT;
    gemmoe_model *quantised = NULL;
    gemmoe_error *error = NULL;
    SUCCEEDS(gemmoe_model_get_info(model, &plain, &error));
    CHECK(plain.attention_format == GEMMOE_FORMAT_BF16 || plain.attention_format == GEMMOE_FORMAT_F16 ||
          plain.attention_format == GEMMOE_FORMAT_F32);
    load_options.experts_format = GEMMOE_FORMAT_INT4 | GEMMOE_FORMAT_GROUP_64;
    load_options.attention_format = GEMMOE_FORMAT_INT8;
    load_options.head_format = GEMMOE_FORMAT_INT8 | GEMMOE_FORMAT_SCALES_F16;
    load_options.embedding_format = load_options.head_format;
    SUCCEEDS(gemmoe_plan_memory(directory, &load_options, NULL, &plan, &error));
    SUCCEEDS(gemmoe_model_load(directory, &load_options, &quantised, &error));
    SUCCEEDS(gemmoe_model_get_info(quantised, &info, &error));
    CHECK(info.experts_format == load_options.experts_format && info.attention_format == load_options.attention_format);
    CHECK(info.head_format == load_options.head_format && info.embedding_format == load_options.embedding_format);
    CHECK(info.weight_bytes < plain.weight_bytes && info.expert_bytes < plain.expert_bytes);
    CHECK(info.weight_bytes == plan.weight_bytes && info.kv_bytes_per_token == plain.kv_bytes_per_token);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(quantised));
}

static void snapshots(void) {
    gemmoe_session *session = prompted();
    gemmoe_error *error = NULL;
    size_t index;
    for (index = 0; index < DRAWN; index += 3) {
        size_t count = 0, written = 0;
        uint8_t *bytes;
        go_on(session, index, index + 3);
        SUCCEEDS(gemmoe_session_snapshot(session, NULL, 0, &count, &error));
        bytes = (uint8_t *)malloc(count);
        CHECK(bytes != NULL);
        SUCCEEDS(gemmoe_session_snapshot(session, bytes, count, &written, &error));
        CHECK(written == count);
        destroy(session);
        SUCCEEDS(gemmoe_session_restore(model, bytes, count, NULL, &session, &error));
        free(bytes);
    }
    destroy(session);
}

/* ---- A batch: a long prompt beside short ones. ---- */

#define BATCHED 4
#define LONG 100
#define EACH 6

struct member {
    uint32_t first, count;
    uint32_t tokens[EACH];
};

static void prompt_of(const struct member *member, uint32_t *tokens) {
    uint32_t index;
    for (index = 0; index < member->count; index++) tokens[index] = prompt_token(member->first + index);
}

static void batches(uint32_t max_layers, uint64_t max_us) {
    static const struct member members[BATCHED] = {{1, 3, {0}}, {20, LONG, {0}}, {7, 1, {0}}, {50, 5, {0}}};
    gemmoe_batch_options options = GEMMOE_BATCH_OPTIONS_INIT;
    gemmoe_batch_info info = GEMMOE_BATCH_INFO_INIT;
    gemmoe_budget budget = GEMMOE_BUDGET_INIT;
    gemmoe_error *error = NULL, *errors[BATCHED];
    gemmoe_batch *batch = NULL;
    gemmoe_session *sessions[BATCHED], *waiting[BATCHED];
    uint32_t text[LONG], found[BATCHED][EACH], alone[BATCHED][EACH], drawn[BATCHED] = {0, 0, 0, 0}, tokens[BATCHED];
    int32_t statuses[BATCHED];
    uint32_t index, at, left = BATCHED, short_ones_first = 0;
    options.max_sessions = BATCHED;
    options.max_tokens = 24;
    budget.max_layers = max_layers;
    budget.max_us = max_us;
    for (index = 0; index < BATCHED; index++) {
        gemmoe_session *session = make_session(model, 128, CHUNK);
        prompt_of(&members[index], text);
        SUCCEEDS(gemmoe_session_prefill(session, text, members[index].count, NULL, &error));
        set_seed(session, index);
        for (at = 0; at < EACH; at++) SUCCEEDS(gemmoe_session_step(session, NULL, &alone[index][at], &error));
        destroy(session);
        sessions[index] = make_session(model, 128, CHUNK);
        set_seed(sessions[index], index);
        SUCCEEDS(gemmoe_session_push(sessions[index], text, members[index].count, &error));
    }
    SUCCEEDS(gemmoe_batch_create(model, &options, &batch, &error));
    while (left > 0) {
        uint32_t places[BATCHED], count = 0;
        for (index = 0; index < BATCHED; index++) {
            if (drawn[index] == EACH) continue;
            places[count] = index;
            waiting[count++] = sessions[index];
        }
        SUCCEEDS(gemmoe_batch_step(batch, waiting, count, &budget, statuses, tokens, errors, &error));
        for (at = 0; at < count; at++) {
            index = places[at];
            if (needs_more((gemmoe_status)statuses[at], errors[at])) continue;
            found[index][drawn[index]++] = tokens[at];
            left -= drawn[index] == EACH;
            short_ones_first += index != 1 && drawn[1] == 0;
        }
    }
    CHECK(memcmp(found, alone, sizeof found) == 0);
    /* The long prompt kept nobody waiting. */
    CHECK(short_ones_first >= 2 * (BATCHED - 1));
    SUCCEEDS(gemmoe_batch_get_info(batch, &info, &error));
    CHECK(info.workspace_bytes > 0 && info.touched_experts >= TOP_K && info.touched_experts <= EXPERTS);
    if (max_layers == 0 && max_us == 0) {
        for (index = 0; index < BATCHED; index++) print("in a batch", found[index], EACH);
    }
    /* They live on, with the batch or without it. */
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch));
    for (index = 0; index < BATCHED; index++) {
        SUCCEEDS(gemmoe_session_step(sessions[index], NULL, &tokens[index], &error));
        destroy(sessions[index]);
    }
}

/* ---- A batch cancelled from another thread. ---- */

struct cancel {
    gemmoe_batch *batch;
    long after_ns;
};

static void *cancel_later(void *argument) {
    const struct cancel *cancel = (const struct cancel *)argument;
    struct timespec pause = {0, 0};
    pause.tv_nsec = cancel->after_ns;
    nanosleep(&pause, NULL);
    CHECK(gemmoe_batch_cancel(cancel->batch) == GEMMOE_STATUS_OK);
    return NULL;
}

static void cancelled_batches(void) {
    gemmoe_error *error = NULL;
    gemmoe_batch *batch = NULL;
    unsigned round, cancelled = 0;
    SUCCEEDS(gemmoe_batch_create(model, NULL, &batch, &error));
    for (round = 0; round < 20; round += stride) {
        gemmoe_session *session = make_session(model, 128, CHUNK);
        struct cancel cancel;
        pthread_t thread;
        uint32_t drawn = 0, token;
        unsigned before = cancelled;
        int32_t status;
        set_seed(session, 5);
        SUCCEEDS(gemmoe_session_push(session, prompt, PROMPT, &error));
        cancel.batch = batch;
        cancel.after_ns = (long)round * 20000;
        CHECK(pthread_create(&thread, NULL, cancel_later, &cancel) == 0);
        while (drawn < DRAWN) {
            gemmoe_status whole = gemmoe_batch_step(batch, &session, 1, NULL, &status, &token, NULL, NULL);
            CHECK(whole == GEMMOE_STATUS_OK || whole == GEMMOE_STATUS_CANCELLED);
            if (whole == GEMMOE_STATUS_CANCELLED) {
                cancelled++;
            } else if (status == GEMMOE_STATUS_OK) {
                CHECK(token == expected[drawn]);
                drawn++;
            } else {
                CHECK(status == GEMMOE_STATUS_NEED_MORE);
            }
        }
        CHECK(pthread_join(thread, NULL) == 0);
        /* One that came after the last token stops the next step, and every one stops one step. */
        if (cancelled == before) {
            FAILS(GEMMOE_STATUS_CANCELLED,
                  gemmoe_batch_step(batch, &session, 1, NULL, &status, &token, NULL, &error));
            cancelled++;
        }
        CHECK(cancelled == before + 1);
        SUCCEEDS(gemmoe_batch_step(batch, &session, 1, NULL, &status, &token, NULL, &error));
        CHECK(status == GEMMOE_STATUS_OK);
        destroy(session);
    }
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch));
}

/* ---- Held to a JSON schema. ---- */

static void schema(void) {
    static const char source[] =
        "{\"type\": \"object\", \"properties\": {\"name\": {\"enum\": [\"ant\", \"bee\"]}, \"flies\": {\"type\": \"boolean\"}},"
        " \"required\": [\"name\", \"flies\"], \"additionalProperties\": false}";
    static const char *const answers[] = {
        "{\"name\":\"ant\",\"flies\":true}", "{\"name\":\"ant\",\"flies\":false}",
        "{\"name\":\"bee\",\"flies\":true}", "{\"name\":\"bee\",\"flies\":false}",
    };
    /* No white space: byte b is token 6 + b of the tests' tokenizer, 262 is a space. */
    const uint32_t white[5] = {6 + ' ', 6 + '\t', 6 + '\n', 6 + '\r', 262};
    float never[5];
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    gemmoe_grammar *grammar = NULL;
    gemmoe_text_stream *stream = NULL;
    gemmoe_session *session;
    size_t index;
    uint64_t seed;
    for (index = 0; index < 5; index++) never[index] = -1e30f;
    SUCCEEDS(gemmoe_grammar_create(model, GEMMOE_GRAMMAR_JSON_SCHEMA, source, strlen(source), &grammar, &error));
    SUCCEEDS(gemmoe_text_stream_create(model, &stream, &error));
    for (seed = 0; seed < 3; seed++) {
        char answer[256];
        size_t length = 0, bytes = 0;
        const char *text = NULL;
        uint32_t stop = 0, token, steps;
        session = prompted();
        SUCCEEDS(gemmoe_session_set_grammar(session, grammar, &error));
        sampling.temperature = 1.0f;
        sampling.seed = seed;
        sampling.logit_bias_tokens = white;
        sampling.logit_bias_values = never;
        sampling.logit_bias_count = 5;
        SUCCEEDS(gemmoe_session_set_sampling(session, &sampling, &error));
        for (steps = 0; stop == 0; steps++) {
            CHECK(steps < 64);
            SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
            CHECK(info.grammar_state != GEMMOE_GRAMMAR_NONE);
            SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
            SUCCEEDS(gemmoe_model_is_stop_token(model, token, &stop, &error));
            SUCCEEDS(gemmoe_text_stream_push(stream, token, &text, &bytes, &error));
            CHECK(length + bytes < sizeof answer);
            memcpy(answer + length, text, bytes);
            length += bytes;
        }
        CHECK(info.grammar_state == GEMMOE_GRAMMAR_COMPLETE);
        SUCCEEDS(gemmoe_text_stream_finish(stream, &text, &bytes, &error));
        CHECK(bytes == 0);
        answer[length] = 0;
        printf("json: %s\n", answer);
        for (index = 0; index < 4 && strcmp(answer, answers[index]) != 0; index++) {}
        CHECK(index < 4);
        destroy(session);
    }
    RETURNS(GEMMOE_STATUS_OK, gemmoe_grammar_destroy(grammar));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy(stream));
}

/* ---- Experts in view. ---- */

#define ROUTES 64

static uint64_t positions[ROUTES];
static uint32_t route_tokens[ROUTES], route_experts[ROUTES][LAYERS][TOP_K];
static float route_weights[ROUTES][LAYERS][TOP_K];

static size_t fetch(gemmoe_session *session, uint32_t capacity, uint64_t *lost) {
    gemmoe_route_arrays arrays = GEMMOE_ROUTE_ARRAYS_INIT;
    gemmoe_error *error = NULL;
    size_t count = 0;
    arrays.capacity = capacity;
    arrays.positions = positions;
    arrays.tokens = route_tokens;
    arrays.experts = &route_experts[0][0][0];
    arrays.weights = &route_weights[0][0][0];
    SUCCEEDS(gemmoe_session_fetch_routes(session, &arrays, &count, lost, &error));
    return count;
}

/* The sums over a layer's experts. */
static void check_statistics(const gemmoe_session *session, uint64_t tokens) {
    uint64_t counts[LAYERS * EXPERTS];
    double weights[LAYERS * EXPERTS];
    gemmoe_error *error = NULL;
    size_t count = 0, layer, expert;
    SUCCEEDS(gemmoe_session_expert_statistics(session, counts, weights, LAYERS * EXPERTS, &count, &error));
    CHECK(count == LAYERS * EXPERTS);
    for (layer = 0; layer < LAYERS; layer++) {
        uint64_t total = 0;
        double weight = 0.0;
        for (expert = 0; expert < EXPERTS; expert++) {
            total += counts[layer * EXPERTS + expert];
            weight += weights[layer * EXPERTS + expert];
        }
        CHECK(total == tokens * TOP_K);
        CHECK(weight >= (double)tokens * 0.9999 && weight <= (double)tokens * 1.0001);
    }
}

static void experts(void) {
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_session_metrics metrics = GEMMOE_SESSION_METRICS_INIT;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    gemmoe_session *session = NULL;
    const uint32_t *chosen = NULL;
    const float *weights = NULL, bias[EXPERTS] = {0.0f, 0.0f, 0.0f, 1000.0f};
    uint64_t lost = 99, steps = 0;
    uint32_t token, layer, rank;
    size_t count = 0, index, fetched;
    options.context_size = 128;
    options.prefill_chunk = CHUNK;
    options.route_capacity = ROUTES;
    SUCCEEDS(gemmoe_session_create(model, &options, &session, &error));
    SUCCEEDS(gemmoe_session_get_metrics(session, &metrics, &error));
    CHECK(metrics.has_first_token == 0 && metrics.prefill_tokens == 0 && metrics.decode_tokens == 0);
    set_seed(session, 5);
    SUCCEEDS(gemmoe_session_prefill(session, prompt, PROMPT, NULL, &error));
    go_on(session, 0, DRAWN);
    /* The last token drawn has not been run. */
    check_statistics(session, PROMPT + DRAWN - 1);
    fetched = fetch(session, 30, &lost);
    CHECK(fetched == 30 && lost == 0);
    for (index = 0; index < 30; index++) CHECK(positions[index] == index && route_tokens[index] == prompt[index]);
    fetched = fetch(session, ROUTES, &lost);
    CHECK(fetched == PROMPT + DRAWN - 1 - 30 && lost == 0);
    for (index = 0; index < fetched; index++) {
        size_t at = index + 30;
        CHECK(positions[index] == at);
        CHECK(route_tokens[index] == (at < PROMPT ? prompt[at] : expected[at - PROMPT]));
    }
    /* The last of them is what gemmoe_session_routes shows. */
    for (layer = 0; layer < LAYERS; layer++) {
        SUCCEEDS(gemmoe_session_routes(session, layer, &chosen, &weights, &count, &error));
        CHECK(count == TOP_K && weights[0] >= weights[1]);
        CHECK(memcmp(chosen, route_experts[fetched - 1][layer], TOP_K * sizeof *chosen) == 0);
        CHECK(memcmp(weights, route_weights[fetched - 1][layer], TOP_K * sizeof *weights) == 0);
    }
    CHECK(fetch(session, ROUTES, &lost) == 0 && lost == 0);

    SUCCEEDS(gemmoe_session_get_metrics(session, &metrics, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(metrics.has_first_token == 1 && metrics.prefill_tokens == PROMPT && metrics.decode_tokens == DRAWN);
    CHECK(metrics.time_to_first_token_us >= metrics.prefill_us && metrics.time_to_first_token_us < 60000000);
    CHECK(metrics.prefill_us < 60000000 && metrics.decode_us < 60000000);
    CHECK(metrics.kv_bytes == info.kv_bytes && metrics.workspace_bytes == info.workspace_bytes);
    CHECK(metrics.kv_bytes > 0 && metrics.model_kv_bytes == metrics.kv_bytes);
    for (index = 0; index < 32; index++) steps += metrics.step_times[index];
    CHECK(steps == DRAWN);

    /* One expert allowed in the first layer, one preferred in the second. */
    SUCCEEDS(gemmoe_session_clear_expert_statistics(session, &error));
    check_statistics(session, 0);
    SUCCEEDS(gemmoe_session_set_expert_mask(session, 0, (uint64_t)1 << 2, &error));
    SUCCEEDS(gemmoe_session_set_expert_bias(session, 1, bias, EXPERTS, &error));
    for (index = 0; index < 5; index++) SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
    CHECK(fetch(session, ROUTES, NULL) == 5);
    for (index = 0; index < 5; index++) {
        CHECK(route_experts[index][0][0] == 2 && route_weights[index][0][0] == 1.0f);
        CHECK(route_experts[index][0][1] == GEMMOE_NO_EXPERT && route_weights[index][0][1] == 0.0f);
        CHECK(route_experts[index][1][0] == 3);
    }
    SUCCEEDS(gemmoe_session_routes(session, 0, &chosen, &weights, &count, &error));
    for (rank = 0; rank < TOP_K; rank++) CHECK(chosen[rank] == (rank == 0 ? 2u : GEMMOE_NO_EXPERT));
    /* And as if nothing had been. */
    SUCCEEDS(gemmoe_session_clear_expert_control(session, &error));
    SUCCEEDS(gemmoe_session_clear_expert_statistics(session, &error));
    SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
    SUCCEEDS(gemmoe_session_prefill(session, prompt, PROMPT, NULL, &error));
    go_on(session, 0, DRAWN);
    check_statistics(session, PROMPT + DRAWN - 1);
    for (index = 0; index < 2; index++) {
        SUCCEEDS(gemmoe_session_prefill(session, prompt, PROMPT - index * 10, NULL, &error));
        SUCCEEDS(gemmoe_session_rewind(session, PROMPT, &error));
    }
    /* More than anybody fetched: the last ROUTES are kept, the others counted. Before each of the two prompts a pending
     * token was run. */
    fetched = fetch(session, ROUTES, &lost);
    CHECK(fetched == ROUTES && lost == (PROMPT + DRAWN - 1) + (1 + PROMPT) + (1 + PROMPT - 10) - ROUTES);
    destroy(session);
}

/* ---- Scores and states. ---- */

static void scores(void) {
    gemmoe_session *session = make_session(model, 128, CHUNK), *stepped = make_session(model, 128, CHUNK);
    gemmoe_error *error = NULL;
    float scored[PROMPT - 1], mean[40], last[40];
    uint32_t tokens[320];
    float log_probabilities[320];
    size_t count = 0, index, at;
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 1, NULL, &error));
    SUCCEEDS(gemmoe_session_score(session, prompt + 1, PROMPT - 1, scored, &error));
    SUCCEEDS(gemmoe_session_prefill(stepped, prompt, 1, NULL, &error));
    for (index = 1; index < PROMPT; index++) {
        SUCCEEDS(gemmoe_session_top_log_probabilities(stepped, tokens, log_probabilities, 320, &count, &error));
        for (at = 0; tokens[at] != prompt[index]; at++) {}
        CHECK(scored[index - 1] - log_probabilities[at] < 1e-5f && log_probabilities[at] - scored[index - 1] < 1e-5f);
        SUCCEEDS(gemmoe_session_prefill(stepped, prompt + index, 1, NULL, &error));
    }
    set_seed(session, 5);
    go_on(session, 0, DRAWN);
    SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
    SUCCEEDS(gemmoe_session_embed(session, prompt, 1, GEMMOE_POOLING_MEAN, mean, 40, &error));
    SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
    SUCCEEDS(gemmoe_session_embed(session, prompt, 1, GEMMOE_POOLING_LAST, last, 40, &error));
    CHECK(memcmp(mean, last, sizeof mean) == 0);
    destroy(session);
    destroy(stepped);
}

/* ---- The model first, then the rest in every order. ---- */

enum part { SESSION, FORK, BATCH, GRAMMAR, PARTS };

static void destroy_order(const enum part order[PARTS]) {
    gemmoe_error *error = NULL;
    gemmoe_model *brief = load_model(directory);
    gemmoe_session *session = make_session(brief, 64, 0), *fork = NULL;
    gemmoe_batch *batch = NULL;
    gemmoe_grammar *grammar = NULL;
    int lives[PARTS] = {1, 1, 1, 1}, step;
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 5, NULL, &error));
    SUCCEEDS(gemmoe_session_fork(session, &fork, &error));
    SUCCEEDS(gemmoe_batch_create(brief, NULL, &batch, &error));
    SUCCEEDS(gemmoe_grammar_create(brief, GEMMOE_GRAMMAR_REGEX, "[a-z]+", 6, &grammar, &error));
    SUCCEEDS(gemmoe_session_set_grammar(session, grammar, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(brief));
    for (step = 0; step < PARTS; step++) {
        uint32_t tokens[2] = {0, 0};
        int32_t statuses[2];
        if (lives[SESSION]) {
            SUCCEEDS(gemmoe_session_step(session, NULL, tokens, &error));
            CHECK(tokens[0] >= 6 + 'a' && tokens[0] < 320);
        }
        if (lives[FORK]) SUCCEEDS(gemmoe_session_step(fork, NULL, tokens, &error));
        if (lives[FORK] && lives[GRAMMAR]) {
            SUCCEEDS(gemmoe_session_set_grammar(fork, grammar, &error));
            SUCCEEDS(gemmoe_session_set_grammar(fork, NULL, &error));
        }
        if (lives[BATCH]) {
            gemmoe_session *sessions[2];
            sessions[0] = session;
            sessions[1] = fork;
            SUCCEEDS(gemmoe_batch_step(batch, sessions, 2, NULL, statuses, tokens, NULL, &error));
            RETURNS(lives[SESSION] ? GEMMOE_STATUS_OK : GEMMOE_STATUS_STALE_HANDLE, (gemmoe_status)statuses[0]);
            RETURNS(lives[FORK] ? GEMMOE_STATUS_OK : GEMMOE_STATUS_STALE_HANDLE, (gemmoe_status)statuses[1]);
        }
        switch (order[step]) {
            case SESSION: destroy(session); break;
            case FORK: destroy(fork); break;
            case BATCH: RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch)); break;
            case GRAMMAR: RETURNS(GEMMOE_STATUS_OK, gemmoe_grammar_destroy(grammar)); break;
            case PARTS: break;
        }
        lives[order[step]] = 0;
    }
}

static void destroy_in_every_order(void) {
    static const enum part parts[PARTS] = {SESSION, FORK, BATCH, GRAMMAR};
    unsigned count = 0;
    int a, b, c;
    for (a = 0; a < 4; a++) {
        for (b = 0; b < 4; b++) {
            for (c = 0; c < 4; c++) {
                enum part order[PARTS];
                if (a == b || a == c || b == c || count++ % stride != 0) continue;
                order[0] = parts[a];
                order[1] = parts[b];
                order[2] = parts[c];
                order[3] = parts[6 - a - b - c];
                destroy_order(order);
            }
        }
    }
}

int main(int argc, char **argv) {
    uint32_t index;
    gemmoe_session *session;
    gemmoe_error *error = NULL;
    CHECK(argc > 1);
    directory = argv[1];
    if (argc > 2) stride = (unsigned)atoi(argv[2]);
    model = load_model(directory);
    for (index = 0; index < PROMPT; index++) prompt[index] = prompt_token(index);
    session = prompted();
    for (index = 0; index < DRAWN; index++) SUCCEEDS(gemmoe_session_step(session, NULL, &expected[index], &error));
    destroy(session);
    print("simply stepped", expected, DRAWN);

    budgets();
    forks();
    rewinds();
    set_tokens();
    plans();
    rounded();
    snapshots();
    batches(0, 0);
    batches(1, 0);
    batches(0, 1);
    cancelled_batches();
    schema();
    experts();
    scores();
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    destroy_in_every_order();
    return 0;
}
