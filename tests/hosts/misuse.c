/* Every function with every kind of wrong handle and argument: each returns its documented status, writes nothing it
 * should not, and leaves everything else working. argv[1] is a model with a tokenizer, argv[2] one without. */
#include "check.h"

/* One live and one destroyed object of every type, and what a good call takes. */
enum kind { ERROR, LOAD, MODEL, SESSION, STREAM, KINDS };
static void *live[KINDS];
static void *stale[KINDS];
static const char *directory;

/* A buffer for outputs, filled with a mark; a failed call must leave it so. */
#define MARK 0xA5
static union output {
    unsigned char bytes[512];
    uint64_t aligned[64];
    void *pointer;
    size_t size;
    uint32_t number;
} out[3];

static void mark_outputs(void) {
    memset(out, MARK, sizeof out);
}

static int outputs_untouched(void) {
    const unsigned char *bytes = (const unsigned char *)out;
    size_t index;
    for (index = 0; index < sizeof out; index++) {
        if (bytes[index] != MARK) return 0;
    }
    return 1;
}

/* ---- Every function that takes a handle, called with otherwise good arguments. ---- */

static gemmoe_status error_status(void *handle, gemmoe_error **error) {
    (void)error;
    CHECK(handle == live[ERROR] || gemmoe_error_text((gemmoe_error *)handle) == NULL);
    CHECK(handle == live[ERROR] || gemmoe_error_file((gemmoe_error *)handle) == NULL);
    CHECK(handle == live[ERROR] || gemmoe_error_key((gemmoe_error *)handle) == NULL);
    return gemmoe_error_status((gemmoe_error *)handle);
}
static gemmoe_status error_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_error_destroy((gemmoe_error *)handle);
}
static gemmoe_status load_poll(void *handle, gemmoe_error **error) {
    gemmoe_load_progress *progress = (gemmoe_load_progress *)&out[0];
    gemmoe_status status;
    progress->struct_size = sizeof *progress;
    status = gemmoe_load_poll((gemmoe_load *)handle, progress, error);
    memset(&progress->struct_size, MARK, sizeof progress->struct_size);
    return status;
}
static gemmoe_status load_cancel(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_load_cancel((gemmoe_load *)handle);
}
static gemmoe_status load_wait(void *handle, gemmoe_error **error) {
    return gemmoe_load_wait((gemmoe_load *)handle, (gemmoe_model **)&out[0], error);
}
static gemmoe_status load_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_load_destroy((gemmoe_load *)handle);
}
static gemmoe_status model_get_info(void *handle, gemmoe_error **error) {
    gemmoe_model_info *info = (gemmoe_model_info *)&out[0];
    gemmoe_status status;
    info->struct_size = sizeof *info;
    status = gemmoe_model_get_info((gemmoe_model *)handle, info, error);
    memset(&info->struct_size, MARK, sizeof info->struct_size);
    return status;
}
static gemmoe_status model_device(void *handle, gemmoe_error **error) {
    return gemmoe_model_device((gemmoe_model *)handle, (char *)&out[0], sizeof out[0], &out[1].size, error);
}
static gemmoe_status model_is_stop_token(void *handle, gemmoe_error **error) {
    return gemmoe_model_is_stop_token((gemmoe_model *)handle, 1, &out[0].number, error);
}
static gemmoe_status model_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_model_destroy((gemmoe_model *)handle);
}
static gemmoe_status tokenize(void *handle, gemmoe_error **error) {
    return gemmoe_tokenize((gemmoe_model *)handle, "hello", 5, 0, &out[0].number, 128, &out[1].size, error);
}
static gemmoe_status detokenize(void *handle, gemmoe_error **error) {
    static const uint32_t tokens[2] = {70, 71};
    return gemmoe_detokenize((gemmoe_model *)handle, tokens, 2, 0, (char *)&out[0], 512, &out[1].size, error);
}
/* Two messages, one struct_size apart. */
static gemmoe_message messages[2];
static void make_messages(void) {
    gemmoe_message message = GEMMOE_MESSAGE_INIT;
    message.role = "user";
    message.text = "hello";
    message.text_bytes = 5;
    messages[0] = message;
    messages[1] = message;
    messages[1].role = "assistant";
}
static gemmoe_status chat_tokenize(void *handle, gemmoe_error **error) {
    make_messages();
    return gemmoe_chat_tokenize((gemmoe_model *)handle, messages, 2, 0, &out[0].number, 128, &out[1].size, error);
}
static gemmoe_status text_stream_create(void *handle, gemmoe_error **error) {
    gemmoe_text_stream **stream = (gemmoe_text_stream **)&out[0];
    gemmoe_status status = gemmoe_text_stream_create((gemmoe_model *)handle, stream, error);
    if (status == GEMMOE_STATUS_OK) RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy(*stream));
    return status;
}
static gemmoe_status session_create(void *handle, gemmoe_error **error) {
    gemmoe_session **session = (gemmoe_session **)&out[0];
    gemmoe_status status = gemmoe_session_create((gemmoe_model *)handle, NULL, session, error);
    if (status == GEMMOE_STATUS_OK) RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(*session));
    return status;
}
static gemmoe_status text_stream_push(void *handle, gemmoe_error **error) {
    return gemmoe_text_stream_push((gemmoe_text_stream *)handle, 70, (const char **)&out[0], &out[1].size, error);
}
static gemmoe_status text_stream_finish(void *handle, gemmoe_error **error) {
    return gemmoe_text_stream_finish((gemmoe_text_stream *)handle, (const char **)&out[0], &out[1].size, error);
}
static gemmoe_status text_stream_set_stop_strings(void *handle, gemmoe_error **error) {
    static const char *const strings[1] = {"never"};
    return gemmoe_text_stream_set_stop_strings((gemmoe_text_stream *)handle, strings, 1, error);
}
static gemmoe_status text_stream_stopped(void *handle, gemmoe_error **error) {
    return gemmoe_text_stream_stopped((gemmoe_text_stream *)handle, &out[0].number, &out[1].size, error);
}
static gemmoe_status text_stream_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_text_stream_destroy((gemmoe_text_stream *)handle);
}
static gemmoe_status session_set_sampling(void *handle, gemmoe_error **error) {
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    return gemmoe_session_set_sampling((gemmoe_session *)handle, &sampling, error);
}
static gemmoe_status session_prefill(void *handle, gemmoe_error **error) {
    static const uint32_t tokens[2] = {3, 4};
    return gemmoe_session_prefill((gemmoe_session *)handle, tokens, 2, NULL, error);
}
static gemmoe_status session_step(void *handle, gemmoe_error **error) {
    return gemmoe_session_step((gemmoe_session *)handle, NULL, &out[0].number, error);
}
static gemmoe_status session_logits(void *handle, gemmoe_error **error) {
    return gemmoe_session_logits((gemmoe_session *)handle, (const float **)&out[0], &out[1].size, error);
}
static gemmoe_status session_top_log_probabilities(void *handle, gemmoe_error **error) {
    return gemmoe_session_top_log_probabilities((gemmoe_session *)handle, &out[0].number, (float *)&out[1], 4,
                                                &out[2].size, error);
}
static gemmoe_status session_routes(void *handle, gemmoe_error **error) {
    return gemmoe_session_routes((gemmoe_session *)handle, 0, (const uint32_t **)&out[0], (const float **)&out[1],
                                 &out[2].size, error);
}
static gemmoe_status session_tokens(void *handle, gemmoe_error **error) {
    return gemmoe_session_tokens((gemmoe_session *)handle, (const uint32_t **)&out[0], &out[1].size, error);
}
static gemmoe_status session_rewind(void *handle, gemmoe_error **error) {
    return gemmoe_session_rewind((gemmoe_session *)handle, 1, error);
}
static gemmoe_status session_get_info(void *handle, gemmoe_error **error) {
    gemmoe_session_info *info = (gemmoe_session_info *)&out[0];
    gemmoe_status status;
    info->struct_size = sizeof *info;
    status = gemmoe_session_get_info((gemmoe_session *)handle, info, error);
    memset(&info->struct_size, MARK, sizeof info->struct_size);
    return status;
}
static gemmoe_status session_cancel(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_session_cancel((gemmoe_session *)handle);
}
static gemmoe_status session_clear_cancel(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_session_clear_cancel((gemmoe_session *)handle);
}
static gemmoe_status session_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_session_destroy((gemmoe_session *)handle);
}

/* What a function answers to NULL, and whether it can be tried on the live object of its type without ending it. */
enum null_answer { REFUSES_NULL, IGNORES_NULL };
enum reports { SILENT, WITH_ERROR };
static const struct function {
    const char *name;
    enum kind kind;
    gemmoe_status (*call)(void *handle, gemmoe_error **error);
    enum null_answer null_answer;
    enum reports reports;
} functions[] = {
    {"error_status", ERROR, error_status, REFUSES_NULL, SILENT},
    {"error_destroy", ERROR, error_destroy, IGNORES_NULL, SILENT},
    {"load_poll", LOAD, load_poll, REFUSES_NULL, WITH_ERROR},
    {"load_cancel", LOAD, load_cancel, REFUSES_NULL, SILENT},
    {"load_wait", LOAD, load_wait, REFUSES_NULL, WITH_ERROR},
    {"load_destroy", LOAD, load_destroy, IGNORES_NULL, SILENT},
    {"model_get_info", MODEL, model_get_info, REFUSES_NULL, WITH_ERROR},
    {"model_device", MODEL, model_device, REFUSES_NULL, WITH_ERROR},
    {"model_is_stop_token", MODEL, model_is_stop_token, REFUSES_NULL, WITH_ERROR},
    {"model_destroy", MODEL, model_destroy, IGNORES_NULL, SILENT},
    {"tokenize", MODEL, tokenize, REFUSES_NULL, WITH_ERROR},
    {"detokenize", MODEL, detokenize, REFUSES_NULL, WITH_ERROR},
    {"chat_tokenize", MODEL, chat_tokenize, REFUSES_NULL, WITH_ERROR},
    {"text_stream_create", MODEL, text_stream_create, REFUSES_NULL, WITH_ERROR},
    {"text_stream_push", STREAM, text_stream_push, REFUSES_NULL, WITH_ERROR},
    {"text_stream_finish", STREAM, text_stream_finish, REFUSES_NULL, WITH_ERROR},
    {"text_stream_set_stop_strings", STREAM, text_stream_set_stop_strings, REFUSES_NULL, WITH_ERROR},
    {"text_stream_stopped", STREAM, text_stream_stopped, REFUSES_NULL, WITH_ERROR},
    {"text_stream_destroy", STREAM, text_stream_destroy, IGNORES_NULL, SILENT},
    {"session_create", MODEL, session_create, REFUSES_NULL, WITH_ERROR},
    {"session_set_sampling", SESSION, session_set_sampling, REFUSES_NULL, WITH_ERROR},
    {"session_prefill", SESSION, session_prefill, REFUSES_NULL, WITH_ERROR},
    {"session_step", SESSION, session_step, REFUSES_NULL, WITH_ERROR},
    {"session_logits", SESSION, session_logits, REFUSES_NULL, WITH_ERROR},
    {"session_top_log_probabilities", SESSION, session_top_log_probabilities, REFUSES_NULL, WITH_ERROR},
    {"session_routes", SESSION, session_routes, REFUSES_NULL, WITH_ERROR},
    {"session_tokens", SESSION, session_tokens, REFUSES_NULL, WITH_ERROR},
    {"session_rewind", SESSION, session_rewind, REFUSES_NULL, WITH_ERROR},
    {"session_get_info", SESSION, session_get_info, REFUSES_NULL, WITH_ERROR},
    {"session_cancel", SESSION, session_cancel, REFUSES_NULL, SILENT},
    {"session_clear_cancel", SESSION, session_clear_cancel, REFUSES_NULL, SILENT},
    {"session_destroy", SESSION, session_destroy, IGNORES_NULL, SILENT},
};
#define FUNCTIONS (sizeof functions / sizeof functions[0])

static void try_handle(const struct function *function, void *handle, gemmoe_status expected, const char *what) {
    gemmoe_error *error = NULL;
    gemmoe_status found;
    mark_outputs();
    found = function->call(handle, &error);
    if (found != expected || !outputs_untouched()) {
        fprintf(stderr, "gemmoe_%s with %s: ", function->name, what);
    }
    CHECK(outputs_untouched());
    if (function->reports == WITH_ERROR && expected != GEMMOE_STATUS_OK) {
        FAILS(expected, found);
    } else {
        RETURNS(expected, found);
        CHECK(error == NULL);
    }
    /* The same without an error object. */
    RETURNS(expected, function->call(handle, NULL));
}

static uint64_t random_bits(void) {
    static uint64_t state = 0x9E3779B97F4A7C15u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static void wrong_handles(void) {
    size_t row, kind, round;
    int on_stack = 0;
    for (row = 0; row < FUNCTIONS; row++) {
        const struct function *function = &functions[row];
        try_handle(function, NULL,
                   function->null_answer == IGNORES_NULL ? GEMMOE_STATUS_OK : GEMMOE_STATUS_NULL_ARGUMENT, "NULL");
        try_handle(function, stale[function->kind], GEMMOE_STATUS_STALE_HANDLE, "a destroyed object");
        for (kind = 0; kind < KINDS; kind++) {
            if (kind == (size_t)function->kind) continue;
            try_handle(function, live[kind], GEMMOE_STATUS_WRONG_HANDLE_TYPE, "an object of another type");
            try_handle(function, stale[kind], GEMMOE_STATUS_WRONG_HANDLE_TYPE, "a destroyed object of another type");
        }
        try_handle(function, (void *)1, GEMMOE_STATUS_STALE_HANDLE, "1");
        try_handle(function, (void *)~(uintptr_t)0, GEMMOE_STATUS_STALE_HANDLE, "all bits set");
        try_handle(function, &on_stack, GEMMOE_STATUS_STALE_HANDLE, "a stack address");
        try_handle(function, (void *)out, GEMMOE_STATUS_STALE_HANDLE, "a static address");
        /* The right type and index, another generation. */
        try_handle(function, (void *)((uintptr_t)live[function->kind] ^ ((uintptr_t)1 << (sizeof(void *) * 8 - 6))),
                   GEMMOE_STATUS_STALE_HANDLE, "another generation");
        for (round = 0; round < 2000; round++) {
            void *garbage = (void *)(uintptr_t)random_bits();
            gemmoe_status status;
            mark_outputs();
            status = function->call(garbage, NULL);
            CHECK(status == GEMMOE_STATUS_STALE_HANDLE || status == GEMMOE_STATUS_WRONG_HANDLE_TYPE);
            CHECK(outputs_untouched());
        }
    }
}

/* ---- NULL where something must be, one argument at a time. ---- */

#define NULL_ARGUMENT(call)                      \
    do {                                         \
        mark_outputs();                          \
        FAILS(GEMMOE_STATUS_NULL_ARGUMENT, call); \
        CHECK(outputs_untouched());              \
    } while (0)

static void null_arguments(void) {
    gemmoe_error *error = NULL;
    gemmoe_model *model = (gemmoe_model *)live[MODEL];
    gemmoe_session *session = (gemmoe_session *)live[SESSION];
    gemmoe_text_stream *stream = (gemmoe_text_stream *)live[STREAM];
    gemmoe_load *load = (gemmoe_load *)live[LOAD];
    static const char *const null_strings[2] = {"a", NULL};
    uint32_t token = 3;

    NULL_ARGUMENT(gemmoe_load_start(NULL, NULL, (gemmoe_load **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_load_start(directory, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_load_poll(load, NULL, &error));
    NULL_ARGUMENT(gemmoe_load_wait(load, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_load(NULL, NULL, (gemmoe_model **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_model_load(directory, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_get_info(model, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_device(model, NULL, 8, &out[0].size, &error));
    NULL_ARGUMENT(gemmoe_model_device(model, (char *)&out[0], 512, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_is_stop_token(model, 1, NULL, &error));
    NULL_ARGUMENT(gemmoe_tokenize(model, NULL, 5, 0, &out[0].number, 8, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_tokenize(model, "hello", 5, 0, NULL, 8, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_tokenize(model, "hello", 5, 0, &out[0].number, 8, NULL, &error));
    NULL_ARGUMENT(gemmoe_detokenize(model, NULL, 1, 0, (char *)&out[0], 8, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_detokenize(model, &token, 1, 0, NULL, 8, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_detokenize(model, &token, 1, 0, (char *)&out[0], 8, NULL, &error));
    make_messages();
    NULL_ARGUMENT(gemmoe_chat_tokenize(model, NULL, 1, 0, &out[0].number, 8, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_chat_tokenize(model, messages, 1, 0, NULL, 8, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_chat_tokenize(model, messages, 1, 0, &out[0].number, 8, NULL, &error));
    messages[1].role = NULL;
    NULL_ARGUMENT(gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].text = NULL;
    NULL_ARGUMENT(gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_text_stream_create(model, NULL, &error));
    NULL_ARGUMENT(gemmoe_text_stream_set_stop_strings(stream, NULL, 1, &error));
    NULL_ARGUMENT(gemmoe_text_stream_set_stop_strings(stream, null_strings, 2, &error));
    NULL_ARGUMENT(gemmoe_text_stream_stopped(stream, NULL, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_text_stream_stopped(stream, &out[0].number, NULL, &error));
    NULL_ARGUMENT(gemmoe_text_stream_push(stream, 70, NULL, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_text_stream_push(stream, 70, (const char **)&out[0], NULL, &error));
    NULL_ARGUMENT(gemmoe_text_stream_finish(stream, NULL, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_text_stream_finish(stream, (const char **)&out[0], NULL, &error));
    NULL_ARGUMENT(gemmoe_session_create(model, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_set_sampling(session, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_prefill(session, NULL, 1, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_step(session, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_logits(session, NULL, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_session_logits(session, (const float **)&out[0], NULL, &error));
    NULL_ARGUMENT(gemmoe_session_top_log_probabilities(session, NULL, (float *)&out[1], 4, &out[2].size, &error));
    NULL_ARGUMENT(gemmoe_session_top_log_probabilities(session, &out[0].number, NULL, 4, &out[2].size, &error));
    NULL_ARGUMENT(
        gemmoe_session_top_log_probabilities(session, &out[0].number, (float *)&out[1], 4, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_routes(session, 0, NULL, (const float **)&out[1], &out[2].size, &error));
    NULL_ARGUMENT(gemmoe_session_routes(session, 0, (const uint32_t **)&out[0], NULL, &out[2].size, &error));
    NULL_ARGUMENT(
        gemmoe_session_routes(session, 0, (const uint32_t **)&out[0], (const float **)&out[1], NULL, &error));
    NULL_ARGUMENT(gemmoe_session_tokens(session, NULL, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_session_tokens(session, (const uint32_t **)&out[0], NULL, &error));
    NULL_ARGUMENT(gemmoe_session_get_info(session, NULL, &error));
}

/* ---- Sizes: nothing, too little, more than can be. ---- */

static void sizes(void) {
    gemmoe_error *error = NULL;
    gemmoe_model *model = (gemmoe_model *)live[MODEL];
    gemmoe_session *session = (gemmoe_session *)live[SESSION];
    const size_t most = ~(size_t)0;
    uint32_t tokens[16], token = 70;
    float logs[16];
    char text[64];
    size_t count = 99, needed;

    /* Nothing: allowed, and says how much there is. */
    SUCCEEDS(gemmoe_tokenize(model, NULL, 0, 0, NULL, 0, &count, &error));
    CHECK(count == 0);
    SUCCEEDS(gemmoe_tokenize(model, "hello", 5, GEMMOE_TOKENIZE_ADD_BOS, NULL, 0, &needed, &error));
    CHECK(needed > 1 && needed <= 6);
    SUCCEEDS(gemmoe_detokenize(model, NULL, 0, 0, NULL, 0, &count, &error));
    CHECK(count == 0);
    SUCCEEDS(gemmoe_session_prefill(session, NULL, 0, NULL, &error));
    SUCCEEDS(gemmoe_session_top_log_probabilities(session, NULL, NULL, 0, &count, &error));
    CHECK(count == 0);
    SUCCEEDS(gemmoe_model_device(model, NULL, 0, &count, &error));
    CHECK(count > 3);

    /* Too little: the count is written, the array is not. */
    memset(text, MARK, sizeof text);
    FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL, gemmoe_model_device(model, text, 1, &count, &error));
    CHECK(count > 3 && (unsigned char)text[0] == MARK);
    memset(tokens, MARK, sizeof tokens);
    FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL,
          gemmoe_tokenize(model, "hello", 5, GEMMOE_TOKENIZE_ADD_BOS, tokens, needed - 1, &count, &error));
    CHECK(count == needed && tokens[0] == 0xA5A5A5A5u);
    SUCCEEDS(gemmoe_tokenize(model, "hello", 5, GEMMOE_TOKENIZE_ADD_BOS, tokens, needed, &count, &error));
    CHECK(count == needed && tokens[0] == 2);
    SUCCEEDS(gemmoe_detokenize(model, tokens, count, GEMMOE_DETOKENIZE_KEEP_SPECIAL, NULL, 0, &needed, &error));
    CHECK(needed == 10);
    FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL,
          gemmoe_detokenize(model, tokens, count, GEMMOE_DETOKENIZE_KEEP_SPECIAL, text, 9, &needed, &error));
    SUCCEEDS(gemmoe_detokenize(model, tokens, count, GEMMOE_DETOKENIZE_KEEP_SPECIAL, text, 10, &needed, &error));
    CHECK(memcmp(text, "<bos>hello", 10) == 0);
    SUCCEEDS(gemmoe_session_top_log_probabilities(session, tokens, logs, 16, &count, &error));
    CHECK(count == 16 && logs[0] >= logs[15] && logs[0] <= 0.0f);

    /* More than can be. */
    mark_outputs();
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_prefill(session, &token, most, NULL, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_prefill(session, &token, most / 4, NULL, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_tokenize(model, "a", most, 0, tokens, 16, &out[0].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_tokenize(model, "a", 1, 0, tokens, most, &out[0].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_detokenize(model, &token, most, 0, text, 64, &out[0].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_detokenize(model, &token, 1, 0, text, most, &out[0].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_model_device(model, text, most, &out[0].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_session_top_log_probabilities(session, tokens, logs, most, &out[0].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_rewind(session, most, &error));
    /* Misaligned arrays. */
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_session_prefill(session, (const uint32_t *)(const void *)((const char *)tokens + 1), 1, NULL, &error));
    CHECK(outputs_untouched());
}

/* ---- Structs of other versions, reserved fields, values out of range. ---- */

/* A struct with room behind it. */
static union padded {
    gemmoe_load_options load;
    gemmoe_session_options session;
    gemmoe_sampling sampling;
    gemmoe_model_info model_info;
    gemmoe_session_info session_info;
    gemmoe_load_progress progress;
    gemmoe_message message;
    unsigned char bytes[8192];
} padded;

static gemmoe_status pass_load_options(gemmoe_error **error) {
    gemmoe_model *model = NULL;
    gemmoe_load *load = NULL;
    gemmoe_status status = gemmoe_model_load(directory, &padded.load, &model, error);
    /* Both ways of loading judge the options alike. */
    gemmoe_status other = gemmoe_load_start(directory, &padded.load, &load, NULL);
    CHECK(status == other);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy(load));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    return status;
}
static gemmoe_status pass_session_options(gemmoe_error **error) {
    gemmoe_session *session = NULL;
    gemmoe_status status = gemmoe_session_create((gemmoe_model *)live[MODEL], &padded.session, &session, error);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    return status;
}
static gemmoe_status pass_sampling(gemmoe_error **error) {
    return gemmoe_session_set_sampling((gemmoe_session *)live[SESSION], &padded.sampling, error);
}
static gemmoe_status pass_message(gemmoe_error **error) {
    size_t count;
    padded.message.role = "user";
    return gemmoe_chat_tokenize((gemmoe_model *)live[MODEL], &padded.message, 1, 0, NULL, 0, &count, error);
}
static gemmoe_status take_model_info(gemmoe_error **error) {
    return gemmoe_model_get_info((gemmoe_model *)live[MODEL], &padded.model_info, error);
}
static gemmoe_status take_session_info(gemmoe_error **error) {
    return gemmoe_session_get_info((gemmoe_session *)live[SESSION], &padded.session_info, error);
}
static gemmoe_status take_progress(gemmoe_error **error) {
    return gemmoe_load_poll((gemmoe_load *)live[LOAD], &padded.progress, error);
}

static void struct_sizes(void) {
    static const struct {
        gemmoe_status (*call)(gemmoe_error **error);
        uint32_t size;
        int is_input;
    } rows[] = {
        {pass_load_options, sizeof(gemmoe_load_options), 1}, {pass_session_options, sizeof(gemmoe_session_options), 1},
        {pass_message, sizeof(gemmoe_message), 1},
        {pass_sampling, sizeof(gemmoe_sampling), 1},         {take_model_info, sizeof(gemmoe_model_info), 0},
        {take_session_info, sizeof(gemmoe_session_info), 0}, {take_progress, sizeof(gemmoe_load_progress), 0},
    };
    static const uint32_t wrong[] = {0, 1, 3, 4, 8, 4097, 0x7FFFFFFF, 0xFFFFFFFF};
    gemmoe_error *error = NULL;
    size_t row, index;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        uint32_t size = rows[row].size;
        for (index = 0; index < sizeof wrong / sizeof wrong[0]; index++) {
            memset(&padded, 0, sizeof padded);
            memcpy(&padded, &wrong[index], sizeof(uint32_t));
            FAILS(GEMMOE_STATUS_STRUCT_SIZE, rows[row].call(&error));
            CHECK(padded.bytes[4] == 0 && padded.bytes[size] == 0);
        }
        /* A later version: fine as long as it asks for nothing new. */
        memset(&padded, 0, sizeof padded);
        size += 64;
        memcpy(&padded, &size, sizeof size);
        padded.bytes[size] = MARK;
        SUCCEEDS(rows[row].call(&error));
        CHECK(padded.bytes[size] == MARK);
        padded.bytes[size - 1] = 1;
        if (rows[row].is_input) {
            FAILS(GEMMOE_STATUS_STRUCT_SIZE, rows[row].call(&error));
        } else {
            /* What the library does not know of an output becomes 0. */
            SUCCEEDS(rows[row].call(&error));
            CHECK(padded.bytes[size - 1] == 0 && padded.bytes[size] == MARK);
        }
        /* The last reserved field, which every input ends with. */
        if (rows[row].is_input) {
            memset(&padded, 0, sizeof padded);
            memcpy(&padded, &rows[row].size, sizeof size);
            SUCCEEDS(rows[row].call(&error));
            padded.bytes[rows[row].size - 1] = 1;
            FAILS(GEMMOE_STATUS_STRUCT_SIZE, rows[row].call(&error));
        }
    }
    memset(&padded, 0, sizeof padded);
    padded.sampling.struct_size = sizeof(gemmoe_sampling);
    padded.sampling.reserved0 = 1;
    FAILS(GEMMOE_STATUS_STRUCT_SIZE, pass_sampling(&error));
    memset(&padded, 0, sizeof padded);
    padded.session.struct_size = sizeof(gemmoe_session_options);
    padded.session.reserved0 = 1;
    FAILS(GEMMOE_STATUS_STRUCT_SIZE, pass_session_options(&error));
}

static void load_values(void) {
    static const gemmoe_load_options rows[] = {
        {sizeof(gemmoe_load_options), 8, 0, 0, {0, 0, 0, 0}},
        {sizeof(gemmoe_load_options), 0xFFFFFFFF, 0, 0, {0, 0, 0, 0}},
        {sizeof(gemmoe_load_options), 0, 257, 0, {0, 0, 0, 0}},
        {sizeof(gemmoe_load_options), 0, 0xFFFFFFFF, 0, {0, 0, 0, 0}},
        {sizeof(gemmoe_load_options), 0, 0, 99, {0, 0, 0, 0}},
    };
    gemmoe_error *error = NULL;
    size_t row;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        padded.load = rows[row];
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, pass_load_options(&error));
    }
}

static void sampling_values(void) {
    static const float not_a_number = (float)(1e300 * 1e300 * 0.0);
    static const float infinite = (float)(1e300 * 1e300);
    struct {
        float temperature;
        uint32_t top_k;
        float top_p, min_p;
        const char *key;
    } rows[13] = {
        {-1.0f, 0, 1.0f, 0.0f, "temperature"},  {101.0f, 0, 1.0f, 0.0f, "temperature"},
        {0.0f, 0, -0.1f, 0.0f, "top_p"},        {0.0f, 0, 1.5f, 0.0f, "top_p"},
        {0.0f, 0, 1.0f, -0.1f, "min_p"},        {0.0f, 0, 1.0f, 1.5f, "min_p"},
        {0.0f, 0xFFFFFFFF, 1.0f, 0.0f, "top_k"}, {0.0f, 321, 1.0f, 0.0f, "top_k"},
        {0.0f, 0, 1.0f, 0.0f, NULL},            {0.0f, 0, 1.0f, 0.0f, NULL},
        {0.0f, 0, 1.0f, 0.0f, NULL},            {0.0f, 0, 1.0f, 0.0f, NULL},
        {0.0f, 0, 1.0f, 0.0f, NULL},
    };
    gemmoe_session *session = (gemmoe_session *)live[SESSION];
    gemmoe_error *error = NULL;
    size_t row;
    rows[8].temperature = not_a_number;
    rows[9].temperature = infinite;
    rows[10].top_p = not_a_number;
    rows[11].min_p = not_a_number;
    rows[12].temperature = -infinite;
    for (row = 0; row < 13; row++) {
        gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
        sampling.temperature = rows[row].temperature;
        sampling.top_k = rows[row].top_k;
        sampling.top_p = rows[row].top_p;
        sampling.min_p = rows[row].min_p;
        CHECK(gemmoe_session_set_sampling(session, &sampling, &error) == GEMMOE_STATUS_SAMPLING_VALUE);
        CHECK(gemmoe_error_key(error) != NULL && gemmoe_error_file(error) == NULL);
        CHECK(rows[row].key == NULL || strcmp(gemmoe_error_key(error), rows[row].key) == 0);
        FAILS(GEMMOE_STATUS_SAMPLING_VALUE, GEMMOE_STATUS_SAMPLING_VALUE);
    }
}

/* ---- Tokens and positions that are not there. ---- */

static void token_limits(void) {
    gemmoe_model *model = (gemmoe_model *)live[MODEL];
    gemmoe_session *session = make_session(model, 16, 0);
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_error *error = NULL;
    gemmoe_text_stream *stream = (gemmoe_text_stream *)live[STREAM];
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    const uint32_t last_bad[3] = {3, 4, 320}, worst[1] = {0xFFFFFFFF};
    uint32_t many[17], token, index;
    size_t count;

    /* An empty session. */
    mark_outputs();
    FAILS(GEMMOE_STATUS_NO_LOGITS, gemmoe_session_step(session, NULL, &out[0].number, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, session_logits(session, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, session_top_log_probabilities(session, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, session_routes(session, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_rewind(session, 1, &error));
    CHECK(outputs_untouched());
    SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
    SUCCEEDS(gemmoe_session_prefill(session, NULL, 0, NULL, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, session_step(session, &error));

    /* Tokens that are none: nothing is appended. */
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_prefill(session, last_bad, 3, NULL, &error));
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_prefill(session, worst, 1, NULL, &error));
    mark_outputs();
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE,
          gemmoe_text_stream_push(stream, 320, (const char **)&out[0], &out[1].size, &error));
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE,
          gemmoe_detokenize(model, last_bad, 3, 0, (char *)&out[0], 512, &out[1].size, &error));
    CHECK(outputs_untouched());
    SUCCEEDS(gemmoe_model_is_stop_token(model, 0xFFFFFFFF, &token, &error));
    CHECK(token == 0);

    /* A prompt longer than the context: nothing is appended, and what fits still does. */
    for (index = 0; index < 17; index++) many[index] = prompt_token(index);
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_prefill(session, many, 17, NULL, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == 0 && info.pending_count == 0 && info.context_size == 16);
    SUCCEEDS(gemmoe_session_prefill(session, many, 15, NULL, &error));
    SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
    CHECK(token < 320);
    mark_outputs();
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, session_step(session, &error));
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_prefill(session, many, 1, NULL, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_rewind(session, 17, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_session_routes(session, 2, (const uint32_t **)&out[0], (const float **)&out[1], &count, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_routes(session, 0xFFFFFFFF, (const uint32_t **)&out[0],
                                                                (const float **)&out[1], &count, &error));
    CHECK(outputs_untouched());
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == 16);
    SUCCEEDS(gemmoe_session_rewind(session, 16, &error));
    SUCCEEDS(gemmoe_session_rewind(session, 3, &error));
    FAILS(GEMMOE_STATUS_NO_LOGITS, session_logits(session, &error));
    SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));

    /* Contexts the model does not have, chunks no prompt has. */
    session = NULL;
    options.context_size = 4097;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_create(model, &options, &session, &error));
    options.context_size = 0xFFFFFFFF;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_create(model, &options, &session, &error));
    CHECK(session == NULL);
    options.context_size = 1;
    options.prefill_chunk = 0xFFFFFFFF;
    SUCCEEDS(gemmoe_session_create(model, &options, &session, &error));
    SUCCEEDS(gemmoe_session_prefill(session, many, 1, NULL, &error));
    FAILS(GEMMOE_STATUS_CONTEXT_FULL, gemmoe_session_step(session, NULL, &token, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
}

static void text_values(const char *without_tokenizer) {
    gemmoe_error *error = NULL;
    gemmoe_model *model = (gemmoe_model *)live[MODEL];
    gemmoe_model *silent = load_model(without_tokenizer);
    gemmoe_model_info info = GEMMOE_MODEL_INFO_INIT;
    static const char *const not_utf8[] = {"\xff", "\xc3", "\xed\xa0\x80", "\xf5\x80\x80\x80", "\xc0\x80"};
    size_t index;
    mark_outputs();
    for (index = 0; index < sizeof not_utf8 / sizeof not_utf8[0]; index++) {
        FAILS(GEMMOE_STATUS_INVALID_UTF8, gemmoe_tokenize(model, not_utf8[index], strlen(not_utf8[index]), 0,
                                                          &out[0].number, 8, &out[1].size, &error));
    }
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_tokenize(model, "a", 1, 4, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_detokenize(model, NULL, 0, 2, (char *)&out[0], 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_NO_TOKENIZER, tokenize(silent, &error));
    FAILS(GEMMOE_STATUS_NO_TOKENIZER, detokenize(silent, &error));
    FAILS(GEMMOE_STATUS_NO_TOKENIZER, text_stream_create(silent, &error));
    CHECK(outputs_untouched());
    SUCCEEDS(gemmoe_model_get_info(silent, &info, &error));
    CHECK(info.has_tokenizer == 0 && info.vocab_size == 320);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(silent));
    /* NUL is a character like others. */
    SUCCEEDS(gemmoe_tokenize(model, "h\0h", 3, 0, &out[0].number, 128, &out[1].size, &error));
    CHECK(out[1].size == 3);
}

/* ---- Conversations. ---- */

static void conversations(const char *without_tokenizer) {
    static const char *const not_roles[] = {"", "User", "us er", "<bos>", "tool"};
    gemmoe_error *error = NULL;
    gemmoe_model *model = (gemmoe_model *)live[MODEL];
    gemmoe_model *silent = load_model(without_tokenizer);
    const size_t most = ~(size_t)0;
    union {
        gemmoe_message message;
        unsigned char bytes[sizeof(gemmoe_message) + 16];
    } wide[2];
    uint32_t tokens[64];
    size_t count = 0, needed = 0, index;

    mark_outputs();
    FAILS(GEMMOE_STATUS_NO_TOKENIZER, chat_tokenize(silent, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(silent));
    make_messages();
    FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
          gemmoe_chat_tokenize(model, NULL, 0, 0, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
          gemmoe_chat_tokenize(model, messages, most, 0, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
          gemmoe_chat_tokenize(model, messages, 16385, 0, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_chat_tokenize(model, messages, 1, 2, &out[0].number, 8, &out[1].size, &error));
    for (index = 0; index < sizeof not_roles / sizeof not_roles[0]; index++) {
        messages[0].role = not_roles[index];
        FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
              gemmoe_chat_tokenize(model, messages, 1, 0, &out[0].number, 8, &out[1].size, &error));
    }
    messages[0].role = "\xff";
    FAILS(GEMMOE_STATUS_INVALID_UTF8,
          gemmoe_chat_tokenize(model, messages, 1, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].text = "h\xff";
    FAILS(GEMMOE_STATUS_INVALID_UTF8,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].text_bytes = ~(uint64_t)0;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].reserved0 = 1;
    FAILS(GEMMOE_STATUS_STRUCT_SIZE,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].struct_size += 8;
    FAILS(GEMMOE_STATUS_STRUCT_SIZE,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    CHECK(outputs_untouched());

    /* What comes out, whatever the distance of the messages. */
    make_messages();
    messages[1].text = "<bos>";
    SUCCEEDS(gemmoe_chat_tokenize(model, messages, 2, GEMMOE_CHAT_ADD_GENERATION_PROMPT, NULL, 0, &needed, &error));
    CHECK(needed > 10 && needed <= 64);
    memset(tokens, MARK, sizeof tokens);
    FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL,
          gemmoe_chat_tokenize(model, messages, 2, GEMMOE_CHAT_ADD_GENERATION_PROMPT, tokens, needed - 1, &count, &error));
    CHECK(count == needed && tokens[0] == 0xA5A5A5A5u);
    memset(wide, 0, sizeof wide);
    for (index = 0; index < 2; index++) {
        wide[index].message = messages[index];
        wide[index].message.struct_size = sizeof wide[0];
    }
    SUCCEEDS(gemmoe_chat_tokenize(model, &wide[0].message, 2, GEMMOE_CHAT_ADD_GENERATION_PROMPT, tokens, needed, &count,
                                  &error));
    CHECK(count == needed && tokens[0] == 2);
    for (index = 1; index < needed; index++) CHECK(tokens[index] != 2);
    wide[1].message.struct_size = sizeof(gemmoe_message);
    FAILS(GEMMOE_STATUS_STRUCT_SIZE, gemmoe_chat_tokenize(model, &wide[0].message, 2, 0, tokens, 64, &count, &error));
    wide[1].message.struct_size = sizeof wide[1];
    wide[1].bytes[sizeof wide[1] - 1] = 1;
    FAILS(GEMMOE_STATUS_STRUCT_SIZE, gemmoe_chat_tokenize(model, &wide[0].message, 2, 0, tokens, 64, &count, &error));
}

static void expect_text(gemmoe_text_stream *stream, uint32_t token, const char *expected) {
    gemmoe_error *error = NULL;
    const char *text = NULL;
    size_t bytes = 0;
    SUCCEEDS(gemmoe_text_stream_push(stream, token, &text, &bytes, &error));
    CHECK(bytes == strlen(expected) && memcmp(text, expected, bytes) == 0);
}

static void expect_stop(gemmoe_text_stream *stream, uint32_t reason, size_t index) {
    gemmoe_error *error = NULL;
    uint32_t found_reason = 99;
    size_t found_index = 99;
    SUCCEEDS(gemmoe_text_stream_stopped(stream, &found_reason, &found_index, &error));
    CHECK(found_reason == reason && found_index == index);
}

static void stops(void) {
    gemmoe_error *error = NULL;
    gemmoe_text_stream *stream = NULL;
    const char *strings[65];
    static char longest[4098];
    const char *text = NULL;
    size_t bytes = 0, index;

    SUCCEEDS(gemmoe_text_stream_create((gemmoe_model *)live[MODEL], &stream, &error));
    for (index = 0; index < 65; index++) strings[index] = "never";
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, 65, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, ~(size_t)0, &error));
    SUCCEEDS(gemmoe_text_stream_set_stop_strings(stream, strings, 64, &error));
    memset(longest, 'x', 4097);
    strings[1] = longest;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));
    strings[1] = "";
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));
    strings[1] = "\xff";
    FAILS(GEMMOE_STATUS_INVALID_UTF8, gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));

    /* Byte token b of the sample is 6 + b; 1 is EOS. */
    strings[1] = "bc";
    SUCCEEDS(gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));
    for (index = 0; index < 2; index++) {
        expect_stop(stream, GEMMOE_STOPPED_NO, 0);
        expect_text(stream, 6 + 'a', "a");
        expect_text(stream, 6 + 'b', "");
        expect_text(stream, 6 + 'c', "");
        expect_stop(stream, GEMMOE_STOPPED_STRING, 1);
        expect_text(stream, 6 + 'a', "");
        SUCCEEDS(gemmoe_text_stream_finish(stream, &text, &bytes, &error));
        CHECK(bytes == 0);
    }
    expect_text(stream, 6 + 'b', "");
    expect_text(stream, 1, "");
    expect_stop(stream, GEMMOE_STOPPED_TOKEN, 0);
    expect_text(stream, 6 + 'c', "");
    SUCCEEDS(gemmoe_text_stream_finish(stream, &text, &bytes, &error));
    CHECK(bytes == 1 && text[0] == 'b');
    SUCCEEDS(gemmoe_text_stream_set_stop_strings(stream, NULL, 0, &error));
    expect_text(stream, 6 + 'b', "b");
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy(stream));
}

/* ---- Loads, and the ends of objects. ---- */

static void loads(void) {
    gemmoe_error *error = NULL;
    gemmoe_load *load = NULL;
    gemmoe_model *model = NULL;
    gemmoe_load_progress progress = GEMMOE_LOAD_PROGRESS_INIT;

    SUCCEEDS(gemmoe_load_start(directory, NULL, &load, &error));
    SUCCEEDS(gemmoe_load_wait(load, &model, &error));
    SUCCEEDS(gemmoe_load_poll(load, &progress, &error));
    CHECK(progress.state == GEMMOE_LOAD_OVER && progress.bytes_read == progress.bytes_total);
    CHECK(progress.bytes_total > 0);
    mark_outputs();
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_load_wait(load, (gemmoe_model **)&out[0], &error));
    CHECK(outputs_untouched());
    /* The load before its model, twice. */
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy(load));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_load_destroy(load));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_model_destroy(model));

    /* A load nobody waits for, and one that fails. */
    SUCCEEDS(gemmoe_load_start(directory, NULL, &load, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_cancel(load));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy(load));
    SUCCEEDS(gemmoe_load_start("/nowhere/at/all", NULL, &load, &error));
    mark_outputs();
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_load_wait(load, (gemmoe_model **)&out[0], &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_load_wait(load, (gemmoe_model **)&out[0], &error));
    CHECK(outputs_untouched());
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy(load));
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_model_load("", NULL, (gemmoe_model **)&out[0], &error));
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_model_load("\xff\xfe", NULL, (gemmoe_model **)&out[0], &error));
    CHECK(outputs_untouched());
}

static void destroy_orders(const uint32_t expected[8]) {
    gemmoe_error *error = NULL;
    gemmoe_model *model = load_model(directory);
    gemmoe_session *session = make_session(model, 64, 0);
    gemmoe_text_stream *stream = NULL;
    const char *text = NULL;
    size_t bytes = 0, index;
    uint32_t prompt[5], tokens[8];

    SUCCEEDS(gemmoe_text_stream_create(model, &stream, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    FAILS(GEMMOE_STATUS_STALE_HANDLE, session_create(model, &error));
    for (index = 0; index < 5; index++) prompt[index] = prompt_token((uint32_t)index);
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 5, NULL, &error));
    generate(session, tokens, 8);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_session_destroy(session));
    FAILS(GEMMOE_STATUS_STALE_HANDLE, session_step(session, &error));
    SUCCEEDS(gemmoe_text_stream_push(stream, 262, &text, &bytes, &error));
    CHECK(bytes == 1 && text[0] == ' ');
    SUCCEEDS(gemmoe_text_stream_finish(stream, &text, &bytes, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy(stream));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_text_stream_destroy(stream));
}

/* An error object of its own life: it outlives what it is about, and says where. */
static void errors(void) {
    gemmoe_error *error = NULL, *second = NULL;
    gemmoe_model *model = NULL;
    CHECK(gemmoe_model_load("/nowhere/at/all", NULL, &model, &error) == GEMMOE_STATUS_DIRECTORY_NOT_FOUND);
    CHECK(gemmoe_error_status(error) == GEMMOE_STATUS_DIRECTORY_NOT_FOUND);
    CHECK(strstr(gemmoe_error_text(error), "/nowhere/at/all") != NULL);
    CHECK(gemmoe_error_file(error) == NULL && gemmoe_error_key(error) == NULL);
    CHECK(gemmoe_session_step(NULL, NULL, NULL, &second) == GEMMOE_STATUS_NULL_ARGUMENT);
    CHECK(second != error && strcmp(gemmoe_error_key(second), "session") == 0);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_error_destroy(error));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_error_destroy(error));
    CHECK(gemmoe_error_status(error) == GEMMOE_STATUS_STALE_HANDLE && gemmoe_error_text(error) == NULL);
    CHECK(gemmoe_error_status(second) == GEMMOE_STATUS_NULL_ARGUMENT);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_error_destroy(second));
    CHECK(strcmp(gemmoe_status_name(GEMMOE_STATUS_OK), "OK") == 0);
    CHECK(strcmp(gemmoe_status_name(-1), "UNKNOWN") == 0);
    CHECK(strcmp(gemmoe_status_name(0x7FFFFFFF), "UNKNOWN") == 0);
    CHECK(gemmoe_abi_version() == GEMMOE_ABI_VERSION && strlen(gemmoe_version()) >= 5);
}

/* One of everything. */
static void make_objects(void *objects[KINDS]) {
    static const uint32_t prompt[3] = {5, 6, 7};
    gemmoe_error *error = NULL;
    objects[MODEL] = load_model(directory);
    objects[SESSION] = make_session((gemmoe_model *)objects[MODEL], 256, 0);
    SUCCEEDS(gemmoe_session_prefill((gemmoe_session *)objects[SESSION], prompt, 3, NULL, &error));
    SUCCEEDS(gemmoe_text_stream_create((gemmoe_model *)objects[MODEL], (gemmoe_text_stream **)&objects[STREAM],
                                       &error));
    SUCCEEDS(gemmoe_load_start(directory, NULL, (gemmoe_load **)&objects[LOAD], &error));
    CHECK(gemmoe_session_step(NULL, NULL, NULL, (gemmoe_error **)&objects[ERROR]) == GEMMOE_STATUS_NULL_ARGUMENT);
}

static void destroy_objects(void *objects[KINDS]) {
    RETURNS(GEMMOE_STATUS_OK, gemmoe_error_destroy((gemmoe_error *)objects[ERROR]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy((gemmoe_load *)objects[LOAD]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy((gemmoe_model *)objects[MODEL]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy((gemmoe_session *)objects[SESSION]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy((gemmoe_text_stream *)objects[STREAM]));
}

int main(int argc, char **argv) {
    uint32_t before[8], after[8];
    CHECK(argc > 2);
    directory = argv[1];
    make_objects(stale);
    destroy_objects(stale);
    make_objects(live);
    generate_once((gemmoe_model *)live[MODEL], before);

    wrong_handles();
    null_arguments();
    sizes();
    struct_sizes();
    load_values();
    sampling_values();
    token_limits();
    text_values(argv[2]);
    conversations(argv[2]);
    stops();
    loads();
    destroy_orders(before);
    errors();

    generate_once((gemmoe_model *)live[MODEL], after);
    CHECK(memcmp(before, after, sizeof before) == 0);
    destroy_objects(live);
    printf("%u functions with handles\n", (unsigned)FUNCTIONS);
    return 0;
}
