/* Every function with every kind of wrong handle, with NULL, with structs of other versions and impossible sizes: each
 * returns its documented status, writes nothing it should not, and leaves everything else working. What values do is in
 * misuse_text.c and misuse_session.c. argv[1] is a model with a tokenizer. */
#include "misuse.h"
#include <unistd.h>

/* One live and one destroyed object of every type, and what a good call takes. */
enum kind { ERROR, LOAD, MODEL, SESSION, STREAM, BATCH, GRAMMAR, MIX, KINDS };
static void *live[KINDS];
static void *stale[KINDS];
static const char *directory;
/* Two experts of the model; a directory that is not there, in one that is, and one that cannot be written. */
static const char recipe[] = "[[experts]]\nmodel = \".\"\nexpert = 0\n[[experts]]\nmodel = \".\"\nexpert = 1\nname = \"b\"\n";
#define RECIPE recipe, sizeof recipe - 1
static char mixed[4096];
#define NOWHERE "/nowhere/at/all/mixed"

/* Of the model. */
#define HIDDEN 40
#define EXPERTS 4
#define LAYERS 2
#define TOP_K 2

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
static gemmoe_status mix_poll(void *handle, gemmoe_error **error) {
    gemmoe_load_progress *progress = (gemmoe_load_progress *)&out[0];
    gemmoe_status status;
    progress->struct_size = sizeof *progress;
    status = gemmoe_mix_poll((gemmoe_mix *)handle, progress, error);
    memset(&progress->struct_size, MARK, sizeof progress->struct_size);
    return status;
}
static gemmoe_status mix_cancel(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_mix_cancel((gemmoe_mix *)handle);
}
static gemmoe_status mix_wait(void *handle, gemmoe_error **error) {
    return gemmoe_mix_wait((gemmoe_mix *)handle, error);
}
static gemmoe_status mix_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_mix_destroy((gemmoe_mix *)handle);
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
static gemmoe_status model_get_residency(void *handle, gemmoe_error **error) {
    gemmoe_residency *residency = (gemmoe_residency *)&out[0];
    gemmoe_status status;
    residency->struct_size = sizeof *residency;
    status = gemmoe_model_get_residency((gemmoe_model *)handle, residency, error);
    memset(&residency->struct_size, MARK, sizeof residency->struct_size);
    return status;
}
static gemmoe_status model_set_device_memory_limit(void *handle, gemmoe_error **error) {
    return gemmoe_model_set_device_memory_limit((gemmoe_model *)handle, 1, error);
}
static gemmoe_status model_apply_router_patch(void *handle, gemmoe_error **error) {
    return gemmoe_model_apply_router_patch((gemmoe_model *)handle, NOWHERE, error);
}
static gemmoe_status model_apply_router_patch_bytes(void *handle, gemmoe_error **error) {
    return gemmoe_model_apply_router_patch_bytes((gemmoe_model *)handle, (const uint8_t *)"no patch", 8, error);
}
static gemmoe_status model_remove_router_patch(void *handle, gemmoe_error **error) {
    return gemmoe_model_remove_router_patch((gemmoe_model *)handle, error);
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
static gemmoe_status session_fork(void *handle, gemmoe_error **error) {
    return gemmoe_session_fork((gemmoe_session *)handle, (gemmoe_session **)&out[0], error);
}
static gemmoe_status session_push(void *handle, gemmoe_error **error) {
    static const uint32_t tokens[2] = {3, 4};
    return gemmoe_session_push((gemmoe_session *)handle, tokens, 2, error);
}
static gemmoe_status session_set_tokens(void *handle, gemmoe_error **error) {
    static const uint32_t tokens[2] = {3, 4};
    return gemmoe_session_set_tokens((gemmoe_session *)handle, tokens, 2, &out[0].size, error);
}
static gemmoe_status session_score(void *handle, gemmoe_error **error) {
    static const uint32_t tokens[2] = {3, 4};
    return gemmoe_session_score((gemmoe_session *)handle, tokens, 2, &out[0].real, error);
}
static gemmoe_status session_embed(void *handle, gemmoe_error **error) {
    static const uint32_t tokens[2] = {3, 4};
    return gemmoe_session_embed((gemmoe_session *)handle, tokens, 2, GEMMOE_POOLING_MEAN, &out[0].real, HIDDEN, error);
}
static gemmoe_status session_set_grammar(void *handle, gemmoe_error **error) {
    return gemmoe_session_set_grammar((gemmoe_session *)handle, NULL, error);
}
static gemmoe_status session_set_expert_mask(void *handle, gemmoe_error **error) {
    return gemmoe_session_set_expert_mask((gemmoe_session *)handle, GEMMOE_ALL_LAYERS, 1, error);
}
static gemmoe_status session_set_expert_bias(void *handle, gemmoe_error **error) {
    static const float bias[EXPERTS] = {1, 0, 0, 0};
    return gemmoe_session_set_expert_bias((gemmoe_session *)handle, GEMMOE_ALL_LAYERS, bias, EXPERTS, error);
}
static gemmoe_status session_clear_expert_control(void *handle, gemmoe_error **error) {
    return gemmoe_session_clear_expert_control((gemmoe_session *)handle, error);
}
static gemmoe_status session_expert_statistics(void *handle, gemmoe_error **error) {
    return gemmoe_session_expert_statistics((gemmoe_session *)handle, &out[0].aligned[0], &out[1].exact, 64, &out[2].size,
                                            error);
}
static gemmoe_status session_clear_expert_statistics(void *handle, gemmoe_error **error) {
    return gemmoe_session_clear_expert_statistics((gemmoe_session *)handle, error);
}
static gemmoe_status session_fetch_routes(void *handle, gemmoe_error **error) {
    gemmoe_route_arrays arrays = GEMMOE_ROUTE_ARRAYS_INIT;
    arrays.capacity = 8;
    arrays.positions = out[0].aligned;
    arrays.tokens = &out[1].number;
    arrays.experts = &out[2].number;
    arrays.weights = &out[3].real;
    return gemmoe_session_fetch_routes((gemmoe_session *)handle, &arrays, &out[4].size, &out[5].aligned[0], error);
}
static gemmoe_status session_snapshot(void *handle, gemmoe_error **error) {
    return gemmoe_session_snapshot((gemmoe_session *)handle, out[0].bytes, 512, &out[1].size, error);
}
static gemmoe_status session_restore(void *handle, gemmoe_error **error) {
    static const uint8_t bytes[64] = {'G', 'E', 'M'};
    return gemmoe_session_restore((gemmoe_model *)handle, bytes, 64, NULL, (gemmoe_session **)&out[0], error);
}
static gemmoe_status session_get_metrics(void *handle, gemmoe_error **error) {
    gemmoe_session_metrics *metrics = (gemmoe_session_metrics *)&out[0];
    gemmoe_status status;
    metrics->struct_size = sizeof *metrics;
    status = gemmoe_session_get_metrics((gemmoe_session *)handle, metrics, error);
    memset(&metrics->struct_size, MARK, sizeof metrics->struct_size);
    return status;
}
static gemmoe_status grammar_create(void *handle, gemmoe_error **error) {
    return gemmoe_grammar_create((gemmoe_model *)handle, GEMMOE_GRAMMAR_REGEX, "a", 1, (gemmoe_grammar **)&out[0], error);
}
static gemmoe_status session_set_grammar_to(void *handle, gemmoe_error **error) {
    if (handle == NULL) return gemmoe_session_set_grammar(NULL, NULL, error);
    return gemmoe_session_set_grammar((gemmoe_session *)live[SESSION], (gemmoe_grammar *)handle, error);
}
static gemmoe_status grammar_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_grammar_destroy((gemmoe_grammar *)handle);
}
static gemmoe_status batch_create(void *handle, gemmoe_error **error) {
    return gemmoe_batch_create((gemmoe_model *)handle, NULL, (gemmoe_batch **)&out[0], error);
}
static gemmoe_status batch_step(void *handle, gemmoe_error **error) {
    gemmoe_session *sessions[1];
    sessions[0] = (gemmoe_session *)live[SESSION];
    return gemmoe_batch_step((gemmoe_batch *)handle, sessions, 1, NULL, &out[0].status, &out[1].number,
                             (gemmoe_error **)&out[2], error);
}
/* The handles among the sessions of a batch: each has a status of its own. */
static gemmoe_status batch_step_with(void *handle, gemmoe_error **error) {
    gemmoe_session *sessions[1];
    gemmoe_error *mine = NULL;
    int32_t status = GEMMOE_STATUS_OK;
    sessions[0] = (gemmoe_session *)handle;
    CHECK(gemmoe_batch_step((gemmoe_batch *)live[BATCH], sessions, 1, NULL, &status, &out[0].number,
                            error == NULL ? NULL : &mine, error) == GEMMOE_STATUS_OK);
    CHECK(error == NULL || *error == NULL);
    if (error != NULL) *error = mine;
    return (gemmoe_status)status;
}
static gemmoe_status batch_cancel(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_batch_cancel((gemmoe_batch *)handle);
}
static gemmoe_status batch_clear_cancel(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_batch_clear_cancel((gemmoe_batch *)handle);
}
static gemmoe_status batch_get_info(void *handle, gemmoe_error **error) {
    gemmoe_batch_info *info = (gemmoe_batch_info *)&out[0];
    gemmoe_status status;
    info->struct_size = sizeof *info;
    status = gemmoe_batch_get_info((gemmoe_batch *)handle, info, error);
    memset(&info->struct_size, MARK, sizeof info->struct_size);
    return status;
}
static gemmoe_status batch_destroy(void *handle, gemmoe_error **error) {
    (void)error;
    return gemmoe_batch_destroy((gemmoe_batch *)handle);
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
    {"model_get_residency", MODEL, model_get_residency, REFUSES_NULL, WITH_ERROR},
    {"model_set_device_memory_limit", MODEL, model_set_device_memory_limit, REFUSES_NULL, WITH_ERROR},
    {"model_apply_router_patch", MODEL, model_apply_router_patch, REFUSES_NULL, WITH_ERROR},
    {"model_apply_router_patch_bytes", MODEL, model_apply_router_patch_bytes, REFUSES_NULL, WITH_ERROR},
    {"model_remove_router_patch", MODEL, model_remove_router_patch, REFUSES_NULL, WITH_ERROR},
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
    {"session_fork", SESSION, session_fork, REFUSES_NULL, WITH_ERROR},
    {"session_push", SESSION, session_push, REFUSES_NULL, WITH_ERROR},
    {"session_set_tokens", SESSION, session_set_tokens, REFUSES_NULL, WITH_ERROR},
    {"session_score", SESSION, session_score, REFUSES_NULL, WITH_ERROR},
    {"session_embed", SESSION, session_embed, REFUSES_NULL, WITH_ERROR},
    {"session_set_grammar", SESSION, session_set_grammar, REFUSES_NULL, WITH_ERROR},
    {"session_set_grammar_to", GRAMMAR, session_set_grammar_to, REFUSES_NULL, WITH_ERROR},
    {"session_set_expert_mask", SESSION, session_set_expert_mask, REFUSES_NULL, WITH_ERROR},
    {"session_set_expert_bias", SESSION, session_set_expert_bias, REFUSES_NULL, WITH_ERROR},
    {"session_clear_expert_control", SESSION, session_clear_expert_control, REFUSES_NULL, WITH_ERROR},
    {"session_expert_statistics", SESSION, session_expert_statistics, REFUSES_NULL, WITH_ERROR},
    {"session_clear_expert_statistics", SESSION, session_clear_expert_statistics, REFUSES_NULL, WITH_ERROR},
    {"session_fetch_routes", SESSION, session_fetch_routes, REFUSES_NULL, WITH_ERROR},
    {"session_snapshot", SESSION, session_snapshot, REFUSES_NULL, WITH_ERROR},
    {"session_restore", MODEL, session_restore, REFUSES_NULL, WITH_ERROR},
    {"session_get_metrics", SESSION, session_get_metrics, REFUSES_NULL, WITH_ERROR},
    {"grammar_create", MODEL, grammar_create, REFUSES_NULL, WITH_ERROR},
    {"grammar_destroy", GRAMMAR, grammar_destroy, IGNORES_NULL, SILENT},
    {"batch_create", MODEL, batch_create, REFUSES_NULL, WITH_ERROR},
    {"batch_step", BATCH, batch_step, REFUSES_NULL, WITH_ERROR},
    {"batch_step_with", SESSION, batch_step_with, REFUSES_NULL, WITH_ERROR},
    {"batch_cancel", BATCH, batch_cancel, REFUSES_NULL, SILENT},
    {"batch_clear_cancel", BATCH, batch_clear_cancel, REFUSES_NULL, SILENT},
    {"batch_get_info", BATCH, batch_get_info, REFUSES_NULL, WITH_ERROR},
    {"batch_destroy", BATCH, batch_destroy, IGNORES_NULL, SILENT},
    {"mix_poll", MIX, mix_poll, REFUSES_NULL, WITH_ERROR},
    {"mix_cancel", MIX, mix_cancel, REFUSES_NULL, SILENT},
    {"mix_wait", MIX, mix_wait, REFUSES_NULL, WITH_ERROR},
    {"mix_destroy", MIX, mix_destroy, IGNORES_NULL, SILENT},
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

#define NULL_ARGUMENT(call) REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, call)

static void null_arguments(void) {
    gemmoe_error *error = NULL;
    gemmoe_model *model = (gemmoe_model *)live[MODEL];
    gemmoe_session *session = (gemmoe_session *)live[SESSION];
    gemmoe_text_stream *stream = (gemmoe_text_stream *)live[STREAM];
    gemmoe_load *load = (gemmoe_load *)live[LOAD];
    gemmoe_batch *batch = (gemmoe_batch *)live[BATCH];
    static const char *const null_strings[2] = {"a", NULL};
    static const uint8_t bytes[64] = {0};
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
    gemmoe_mix_plan mix_plan = GEMMOE_MIX_PLAN_INIT;
    uint32_t token = 3, missing;

    NULL_ARGUMENT(gemmoe_mix_check(NULL, 5, directory, mixed, NULL, &mix_plan, &error));
    NULL_ARGUMENT(gemmoe_mix_check(RECIPE, NULL, mixed, NULL, &mix_plan, &error));
    NULL_ARGUMENT(gemmoe_mix_check(RECIPE, directory, NULL, NULL, &mix_plan, &error));
    NULL_ARGUMENT(gemmoe_mix_check(RECIPE, directory, mixed, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_mix_start(NULL, 5, directory, NOWHERE, NULL, (gemmoe_mix **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_mix_start(RECIPE, NULL, NOWHERE, NULL, (gemmoe_mix **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_mix_start(RECIPE, directory, NULL, NULL, (gemmoe_mix **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_mix_start(RECIPE, directory, NOWHERE, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_mix_poll((gemmoe_mix *)live[MIX], NULL, &error));
    NULL_ARGUMENT(gemmoe_load_start(NULL, NULL, (gemmoe_load **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_load_start(directory, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_load_poll(load, NULL, &error));
    NULL_ARGUMENT(gemmoe_load_wait(load, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_load(NULL, NULL, (gemmoe_model **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_model_load(directory, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_get_info(model, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_get_residency(model, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_apply_router_patch(model, NULL, &error));
    NULL_ARGUMENT(gemmoe_model_apply_router_patch_bytes(model, NULL, 8, &error));
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
    NULL_ARGUMENT(gemmoe_session_fork(session, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_push(session, NULL, 1, &error));
    NULL_ARGUMENT(gemmoe_session_set_tokens(session, NULL, 1, &out[0].size, &error));
    NULL_ARGUMENT(gemmoe_device_count(NULL, &error));
    NULL_ARGUMENT(gemmoe_plan_memory(NULL, NULL, NULL, &plan, &error));
    NULL_ARGUMENT(gemmoe_plan_memory(directory, NULL, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_score(session, NULL, 1, &out[0].real, &error));
    NULL_ARGUMENT(gemmoe_session_score(session, &token, 1, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_embed(session, NULL, 1, 0, &out[0].real, HIDDEN, &error));
    NULL_ARGUMENT(gemmoe_session_embed(session, &token, 1, 0, NULL, HIDDEN, &error));
    NULL_ARGUMENT(gemmoe_session_set_expert_bias(session, 0, NULL, EXPERTS, &error));
    NULL_ARGUMENT(gemmoe_session_expert_statistics(session, NULL, &out[1].exact, 8, &out[2].size, &error));
    NULL_ARGUMENT(gemmoe_session_expert_statistics(session, out[0].aligned, NULL, 8, &out[2].size, &error));
    NULL_ARGUMENT(gemmoe_session_expert_statistics(session, out[0].aligned, &out[1].exact, 8, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_fetch_routes(session, NULL, &out[0].size, &out[1].aligned[0], &error));
    for (missing = 0; missing < 5; missing++) {
        gemmoe_route_arrays arrays = GEMMOE_ROUTE_ARRAYS_INIT;
        arrays.capacity = 8;
        arrays.positions = missing == 0 ? NULL : out[0].aligned;
        arrays.tokens = missing == 1 ? NULL : &out[1].number;
        arrays.experts = missing == 2 ? NULL : &out[2].number;
        arrays.weights = missing == 3 ? NULL : &out[3].real;
        NULL_ARGUMENT(gemmoe_session_fetch_routes(session, &arrays, missing == 4 ? NULL : &out[4].size,
                                                  &out[5].aligned[0], &error));
    }
    NULL_ARGUMENT(gemmoe_session_snapshot(session, NULL, 512, &out[1].size, &error));
    NULL_ARGUMENT(gemmoe_session_snapshot(session, out[0].bytes, 512, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_restore(model, NULL, 64, NULL, (gemmoe_session **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_session_restore(model, bytes, sizeof bytes, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_session_get_metrics(session, NULL, &error));
    NULL_ARGUMENT(gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, NULL, 1, (gemmoe_grammar **)&out[0], &error));
    NULL_ARGUMENT(gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, "a", 1, NULL, &error));
    NULL_ARGUMENT(gemmoe_batch_create(model, NULL, NULL, &error));
    NULL_ARGUMENT(gemmoe_batch_step(batch, NULL, 1, NULL, &out[0].status, &out[1].number, NULL, &error));
    NULL_ARGUMENT(gemmoe_batch_step(batch, &session, 1, NULL, NULL, &out[1].number, (gemmoe_error **)&out[2], &error));
    NULL_ARGUMENT(gemmoe_batch_step(batch, &session, 1, NULL, &out[0].status, NULL, (gemmoe_error **)&out[2], &error));
    NULL_ARGUMENT(gemmoe_batch_get_info(batch, NULL, &error));
}

/* ---- Sizes: nothing, too little, more than can be. ---- */

static void sizes(void) {
    gemmoe_error *error = NULL;
    gemmoe_model *model = (gemmoe_model *)live[MODEL];
    gemmoe_session *session = (gemmoe_session *)live[SESSION];
    const size_t most = ~(size_t)0;
    /* More than any memory is, and more than there is. */
    const size_t counts[2] = {most, (size_t)1000000000000u};
    gemmoe_batch *batch = (gemmoe_batch *)live[BATCH];
    gemmoe_session *sessions[1];
    gemmoe_route_arrays arrays = GEMMOE_ROUTE_ARRAYS_INIT;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    uint64_t numbers[LAYERS * EXPERTS];
    double sums[LAYERS * EXPERTS];
    uint32_t tokens[16], token = 70;
    float logs[HIDDEN];
    char text[64];
    size_t count = 99, needed, whole, index;
    uint8_t *snapshot;
    void *odd = (char *)tokens + 1;

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
    SUCCEEDS(gemmoe_session_push(session, NULL, 0, &error));
    SUCCEEDS(gemmoe_session_score(session, NULL, 0, NULL, &error));
    SUCCEEDS(gemmoe_session_expert_statistics(session, NULL, NULL, 0, &count, &error));
    CHECK(count == LAYERS * EXPERTS);
    SUCCEEDS(gemmoe_session_fetch_routes(session, &arrays, &count, NULL, &error));
    CHECK(count == 0);
    SUCCEEDS(gemmoe_batch_step(batch, NULL, 0, NULL, NULL, NULL, NULL, &error));
    SUCCEEDS(gemmoe_session_snapshot(session, NULL, 0, &whole, &error));
    CHECK(whole > 1000);
    REFUSES(GEMMOE_STATUS_SNAPSHOT_DAMAGED,
            gemmoe_session_restore(model, NULL, 0, NULL, (gemmoe_session **)&out[0], &error));

    /* Too little: the count is written, the array is not. */
    snapshot = (uint8_t *)malloc(whole);
    CHECK(snapshot != NULL);
    memset(snapshot, MARK, whole);
    for (index = 1; index < whole; index += whole / 7) {
        size_t at;
        FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL, gemmoe_session_snapshot(session, snapshot, index, &count, &error));
        CHECK(count == whole);
        for (at = 0; at < whole; at++) CHECK(snapshot[at] == MARK);
    }
    SUCCEEDS(gemmoe_session_snapshot(session, snapshot, whole, &count, &error));
    CHECK(count == whole && memcmp(snapshot, "GEMMOE", 6) == 0);
    free(snapshot);
    memset(numbers, MARK, sizeof numbers);
    memset(sums, MARK, sizeof sums);
    FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL,
          gemmoe_session_expert_statistics(session, numbers, sums, LAYERS * EXPERTS - 1, &count, &error));
    CHECK(count == LAYERS * EXPERTS && *(unsigned char *)numbers == MARK && *(unsigned char *)sums == MARK);
    SUCCEEDS(gemmoe_session_expert_statistics(session, numbers, sums, LAYERS * EXPERTS, &count, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.pending_count == 0 && numbers[0] + numbers[1] + numbers[2] + numbers[3] == info.token_count * TOP_K);
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

    /* More than can be: refused before anything is read. */
    for (index = 0; index < 2; index++) {
        gemmoe_status impossible = index == 0 ? GEMMOE_STATUS_INVALID_ARGUMENT : GEMMOE_STATUS_CONTEXT_FULL;
        gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
        count = counts[index];
        REFUSES(impossible, gemmoe_session_prefill(session, &token, count, NULL, &error));
        REFUSES(impossible, gemmoe_session_push(session, &token, count, &error));
        REFUSES(impossible, gemmoe_session_set_tokens(session, &token, count, &out[0].size, &error));
        REFUSES(impossible, gemmoe_session_score(session, &token, count, &out[0].real, &error));
        REFUSES(impossible, gemmoe_session_embed(session, &token, count, 0, &out[0].real, HIDDEN, &error));
        REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
                gemmoe_session_embed(session, &token, 1, 0, &out[0].real, count, &error));
        REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_rewind(session, count, &error));
        REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_set_expert_bias(session, 0, logs, count, &error));
        REFUSES(GEMMOE_STATUS_GRAMMAR_LIMIT,
                gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, "a", count, (gemmoe_grammar **)&out[0], &error));
        REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
                gemmoe_batch_step(batch, &session, count, NULL, &out[0].status, &out[1].number, NULL, &error));
        sampling.logit_bias_tokens = &token;
        sampling.logit_bias_values = logs;
        sampling.logit_bias_count = count;
        REFUSES(GEMMOE_STATUS_SAMPLING_VALUE, gemmoe_session_set_sampling(session, &sampling, &error));
    }
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_prefill(session, &token, most / 4, NULL, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_tokenize(model, "a", most, 0, tokens, 16, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_tokenize(model, "a", 1, 0, tokens, most, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_detokenize(model, &token, most, 0, text, 64, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_detokenize(model, &token, 1, 0, text, most, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_model_device(model, text, most, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_top_log_probabilities(session, tokens, logs, most, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_expert_statistics(session, numbers, sums, most, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_snapshot(session, out[0].bytes, most, &out[1].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_restore(model, out[0].bytes, most, NULL, (gemmoe_session **)&out[1], &error));

    /* Misaligned arrays. */
    sessions[0] = session;
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_prefill(session, (uint32_t *)odd, 1, NULL, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_push(session, (uint32_t *)odd, 1, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_set_tokens(session, (uint32_t *)odd, 1, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_score(session, &token, 1, (float *)odd, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_embed(session, &token, 1, 0, (float *)odd, HIDDEN, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_set_expert_bias(session, 0, (float *)odd, EXPERTS, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_session_expert_statistics(session, out[0].aligned, (double *)odd, 8, &out[1].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_tokenize(model, "a", 1, 0, (uint32_t *)odd, 8, &out[0].size, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_batch_step(batch, sessions, 1, NULL, (int32_t *)odd, &out[0].number, NULL, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_batch_step(batch, sessions, 1, NULL, &out[0].status, (uint32_t *)odd, NULL, &error));
    REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT,
            gemmoe_batch_step(batch, sessions, 1, NULL, &out[0].status, &out[1].number, (gemmoe_error **)odd, &error));
    for (index = 0; index < 4; index++) {
        arrays.capacity = 4;
        arrays.positions = index == 0 ? (uint64_t *)odd : out[0].aligned;
        arrays.tokens = index == 1 ? (uint32_t *)odd : &out[1].number;
        arrays.experts = index == 2 ? (uint32_t *)odd : &out[2].number;
        arrays.weights = index == 3 ? (float *)odd : &out[3].real;
        REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_fetch_routes(session, &arrays, &out[4].size, NULL, &error));
    }
}

/* ---- Structs of other versions, reserved fields, values out of range. ---- */

/* A struct with room behind it. */
static union padded {
    gemmoe_device_info device;
    gemmoe_load_options load;
    gemmoe_session_options session;
    gemmoe_sampling sampling;
    gemmoe_model_info model_info;
    gemmoe_residency residency;
    gemmoe_session_info session_info;
    gemmoe_load_progress progress;
    gemmoe_message message;
    gemmoe_budget budget;
    gemmoe_route_arrays routes;
    gemmoe_session_metrics metrics;
    gemmoe_memory_plan plan;
    gemmoe_batch_options batch;
    gemmoe_batch_info batch_info;
    gemmoe_mix_options mix;
    gemmoe_mix_plan mix_plan;
    unsigned char bytes[8192];
} padded;

static gemmoe_status pass_load_options(gemmoe_error **error) {
    gemmoe_model *model = NULL;
    gemmoe_load *load = NULL;
    gemmoe_status status = gemmoe_model_load(directory, &padded.load, &model, error);
    /* Both ways of loading judge the options alike, and so does a plan. */
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
    gemmoe_status other = gemmoe_load_start(directory, &padded.load, &load, NULL);
    gemmoe_status planned = gemmoe_plan_memory(directory, &padded.load, NULL, &plan, NULL);
    CHECK(status == other && status == planned && (status == GEMMOE_STATUS_OK) == (plan.weight_bytes > 0));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy(load));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    return status;
}
/* A snapshot of the live session, to restore with options. */
static uint8_t *kept;
static size_t kept_bytes;

static gemmoe_status pass_session_options(gemmoe_error **error) {
    gemmoe_session *session = NULL, *restored = NULL;
    gemmoe_status status = gemmoe_session_create((gemmoe_model *)live[MODEL], &padded.session, &session, error);
    /* Making, planning and restoring a session judge the options alike. */
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
    gemmoe_status planned = gemmoe_plan_memory(directory, NULL, &padded.session, &plan, NULL);
    gemmoe_status other =
        gemmoe_session_restore((gemmoe_model *)live[MODEL], kept, kept_bytes, &padded.session, &restored, NULL);
    CHECK(status == other && (status == GEMMOE_STATUS_OK) == (session != NULL));
    CHECK((session == NULL) == (restored == NULL) && planned == status);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(restored));
    return status;
}
static gemmoe_status pass_budget(gemmoe_error **error) {
    gemmoe_session *session = (gemmoe_session *)live[SESSION];
    const uint32_t *tokens = NULL;
    size_t count = 0;
    uint32_t token = MARK;
    gemmoe_status status = gemmoe_session_prefill(session, NULL, 0, &padded.budget, error), others[2];
    others[0] = gemmoe_batch_step((gemmoe_batch *)live[BATCH], NULL, 0, &padded.budget, NULL, NULL, NULL, NULL);
    CHECK(gemmoe_session_tokens(session, &tokens, &count, NULL) == GEMMOE_STATUS_OK);
    others[1] = gemmoe_session_step(session, &padded.budget, &token, NULL);
    CHECK(status == others[0] && status == others[1] && (status == GEMMOE_STATUS_OK) == (token != MARK));
    if (token != MARK) CHECK(gemmoe_session_rewind(session, count, NULL) == GEMMOE_STATUS_OK);
    return status;
}
static gemmoe_status pass_routes(gemmoe_error **error) {
    size_t count = 99;
    gemmoe_status status =
        gemmoe_session_fetch_routes((gemmoe_session *)live[SESSION], &padded.routes, &count, NULL, error);
    CHECK(count == (status == GEMMOE_STATUS_OK ? 0u : 99u));
    return status;
}
static gemmoe_status pass_batch_options(gemmoe_error **error) {
    gemmoe_batch *batch = NULL;
    gemmoe_status status = gemmoe_batch_create((gemmoe_model *)live[MODEL], &padded.batch, &batch, error);
    CHECK((status == GEMMOE_STATUS_OK) == (batch != NULL));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch));
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
static gemmoe_status take_residency(gemmoe_error **error) {
    return gemmoe_model_get_residency((gemmoe_model *)live[MODEL], &padded.residency, error);
}
static gemmoe_status take_session_info(gemmoe_error **error) {
    return gemmoe_session_get_info((gemmoe_session *)live[SESSION], &padded.session_info, error);
}
static gemmoe_status take_progress(gemmoe_error **error) {
    return gemmoe_load_poll((gemmoe_load *)live[LOAD], &padded.progress, error);
}
static gemmoe_status pass_mix_options(gemmoe_error **error) {
    gemmoe_mix_plan plan = GEMMOE_MIX_PLAN_INIT;
    gemmoe_mix *mix = NULL;
    gemmoe_status status = gemmoe_mix_check(RECIPE, directory, mixed, &padded.mix, &plan, error);
    gemmoe_status other = gemmoe_mix_start(RECIPE, directory, NOWHERE, &padded.mix, &mix, NULL);
    CHECK(status == other && (status == GEMMOE_STATUS_OK) == (plan.parameters > 0));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_mix_destroy(mix));
    return status;
}
static gemmoe_status take_mix_plan(gemmoe_error **error) {
    return gemmoe_mix_check(RECIPE, directory, mixed, NULL, &padded.mix_plan, error);
}
static gemmoe_status take_mix_progress(gemmoe_error **error) {
    return gemmoe_mix_poll((gemmoe_mix *)live[MIX], &padded.progress, error);
}
static gemmoe_status take_plan(gemmoe_error **error) {
    return gemmoe_plan_memory(directory, NULL, NULL, &padded.plan, error);
}
static gemmoe_status take_metrics(gemmoe_error **error) {
    return gemmoe_session_get_metrics((gemmoe_session *)live[SESSION], &padded.metrics, error);
}
static gemmoe_status take_batch_info(gemmoe_error **error) {
    return gemmoe_batch_get_info((gemmoe_batch *)live[BATCH], &padded.batch_info, error);
}

/* `reserved` is where the first reserved field is that must be 0, `reserved0` where one in the middle is; 0 is nowhere. */
#define INPUT(call, type) {call, sizeof(type), 1, offsetof(type, reserved), 0}
#define INPUT_WITH_GAP(call, type) {call, sizeof(type), 1, offsetof(type, reserved), offsetof(type, reserved0)}
#define OUTPUT(call, type) {call, sizeof(type), 0, 0, 0}

static void struct_sizes(void) {
    static const struct {
        gemmoe_status (*call)(gemmoe_error **error);
        uint32_t size;
        int is_input;
        size_t reserved, reserved0;
    } rows[] = {
        INPUT(pass_load_options, gemmoe_load_options),
        INPUT(pass_session_options, gemmoe_session_options),
        INPUT(pass_budget, gemmoe_budget),
        INPUT_WITH_GAP(pass_message, gemmoe_message),
        INPUT_WITH_GAP(pass_sampling, gemmoe_sampling),
        INPUT_WITH_GAP(pass_batch_options, gemmoe_batch_options),
        INPUT_WITH_GAP(pass_mix_options, gemmoe_mix_options),
        {pass_routes, sizeof(gemmoe_route_arrays), 1, 0, 0},
        OUTPUT(take_model_info, gemmoe_model_info),
        OUTPUT(take_residency, gemmoe_residency),
        OUTPUT(take_session_info, gemmoe_session_info),
        OUTPUT(take_progress, gemmoe_load_progress),
        OUTPUT(take_plan, gemmoe_memory_plan),
        OUTPUT(take_metrics, gemmoe_session_metrics),
        OUTPUT(take_batch_info, gemmoe_batch_info),
        OUTPUT(take_mix_plan, gemmoe_mix_plan),
        OUTPUT(take_mix_progress, gemmoe_load_progress),
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
        /* Every byte of the reserved fields. */
        if (rows[row].is_input) {
            size_t at;
            memset(&padded, 0, sizeof padded);
            memcpy(&padded, &rows[row].size, sizeof size);
            SUCCEEDS(rows[row].call(&error));
            for (at = rows[row].reserved; rows[row].reserved != 0 && at < rows[row].size; at++) {
                padded.bytes[at] = 0x80;
                FAILS(GEMMOE_STATUS_STRUCT_SIZE, rows[row].call(&error));
                padded.bytes[at] = 0;
            }
            for (at = rows[row].reserved0; rows[row].reserved0 != 0 && at < rows[row].reserved0 + 4; at++) {
                padded.bytes[at] = 0x80;
                FAILS(GEMMOE_STATUS_STRUCT_SIZE, rows[row].call(&error));
                padded.bytes[at] = 0;
            }
            /* An unknown size one short of the first one. */
            size = rows[row].size - 1;
            memcpy(&padded, &size, sizeof size);
            FAILS(GEMMOE_STATUS_STRUCT_SIZE, rows[row].call(&error));
        }
    }
    /* The good ones set the sampling. */
    settle((gemmoe_session *)live[SESSION]);
}

static void run_tasks(void *context, uint32_t count, gemmoe_task task, void *task_context) {
    uint32_t index;
    (void)context;
    for (index = 0; index < count; index++) task(task_context, index);
}

static void load_values(void) {
    static const uint32_t rows[][4] = {{64, 0, 0, 0},
                                       {0xFFFFFFFF, 0, 0, 0},
                                       {0, 257, 0, 0},
                                       {0, 0xFFFFFFFF, 0, 0},
                                       {0, 0, 5, 0},
                                       {0, 0, 99, 0},
                                       {0, 0, 0xFFFFFFFF, 0},
                                       {0, 0, 0, 3},
                                       {0, 0, 0, 0xFFFFFFFF},
                                       {GEMMOE_LOAD_PIN_THREADS, 256, 0, 0}};
    static const uint32_t devices[][2] = {
        {4, 0}, {0xFFFFFFFF, 0}, {GEMMOE_DEVICE_DEFAULT, 1}, {GEMMOE_DEVICE_CPU, 1}, {GEMMOE_DEVICE_AUTO, 1}};
    static const uint32_t formats[] = {GEMMOE_FORMAT_BF16, GEMMOE_FORMAT_F16, GEMMOE_FORMAT_F32, 5, 12, 0x100,
                                       GEMMOE_FORMAT_INT4 | GEMMOE_FORMAT_GROUP_64 | GEMMOE_FORMAT_GROUP_128, 0x10004,
                                       0xFFFFFFFF};
    gemmoe_error *error = NULL;
    gemmoe_model *model = NULL;
    gemmoe_session *session = NULL;
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
    size_t row;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        memset(&padded, 0, sizeof padded);
        padded.load.struct_size = sizeof(gemmoe_load_options);
        padded.load.flags = rows[row][0];
        padded.load.threads = rows[row][1];
        padded.load.instructions = rows[row][2];
        padded.load.priority = rows[row][3];
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, pass_load_options(&error));
    }
    /* Devices that are none, and an index where none is to be chosen. */
    for (row = 0; row < sizeof devices / sizeof devices[0]; row++) {
        memset(&padded, 0, sizeof padded);
        padded.load.struct_size = sizeof(gemmoe_load_options);
        padded.load.device = devices[row][0];
        padded.load.device_index = devices[row][1];
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, pass_load_options(&error));
    }
    /* What is lent for a GPU, without one, and a stream of no context. */
    for (row = 0; row < 3; row++) {
        memset(&padded, 0, sizeof padded);
        padded.load.struct_size = sizeof(gemmoe_load_options);
        padded.load.device = row == 0 ? GEMMOE_DEVICE_CUDA : row == 1 ? GEMMOE_DEVICE_CPU : GEMMOE_DEVICE_AUTO;
        if (row > 0) padded.load.cuda_context = &padded;
        padded.load.cuda_stream = &padded;
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, pass_load_options(&error));
    }
    /* A GPU that no machine has; a load that is begun finds that out later. */
    memset(&padded, 0, sizeof padded);
    padded.load.struct_size = sizeof(gemmoe_load_options);
    padded.load.device = GEMMOE_DEVICE_CUDA;
    padded.load.device_index = 9999;
    REFUSES(GEMMOE_STATUS_NO_DEVICE, gemmoe_model_load(directory, &padded.load, (gemmoe_model **)&out[0], &error));
    FAILS(GEMMOE_STATUS_NO_DEVICE, gemmoe_plan_memory(directory, &padded.load, NULL, &plan, &error));
    for (row = GEMMOE_DEVICE_DEFAULT; row <= GEMMOE_DEVICE_CPU; row++) {
        memset(&padded, 0, sizeof padded);
        padded.load.struct_size = sizeof(gemmoe_load_options);
        padded.load.device = (uint32_t)row;
        SUCCEEDS(pass_load_options(&error));
    }
    /* Mapping asks nothing of a directory: what is stored row by row is read. */
    memset(&padded, 0, sizeof padded);
    padded.load.struct_size = sizeof(gemmoe_load_options);
    padded.load.flags = GEMMOE_LOAD_MAP | GEMMOE_LOAD_EXACT;
    SUCCEEDS(pass_load_options(&error));
    /* What is for the library's own threads, with those of the host. */
    for (row = 0; row < 3; row++) {
        memset(&padded, 0, sizeof padded);
        padded.load.struct_size = sizeof(gemmoe_load_options);
        padded.load.parallel_for = run_tasks;
        SUCCEEDS(pass_load_options(&error));
        if (row == 0) padded.load.flags = GEMMOE_LOAD_PIN_THREADS;
        if (row == 1) padded.load.priority = GEMMOE_PRIORITY_LOW;
        if (row == 2) padded.load.spin_us = 1;
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, pass_load_options(&error));
    }
    /* Formats that weights cannot be rounded to, for each part in turn. */
    for (row = 0; row < 4 * (sizeof formats / sizeof formats[0]); row++) {
        uint32_t format = formats[row / 4];
        memset(&padded, 0, sizeof padded);
        padded.load.struct_size = sizeof(gemmoe_load_options);
        padded.load.experts_format = row % 4 == 0 ? format : 0;
        padded.load.attention_format = row % 4 == 1 ? format : 0;
        padded.load.head_format = row % 4 == 2 ? format : 0;
        padded.load.embedding_format = row % 4 == 3 ? format : 0;
        FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, pass_load_options(&error));
    }
    /* A limit no session fits into, and one no session reaches. */
    memset(&padded, 0, sizeof padded);
    padded.load.struct_size = sizeof(gemmoe_load_options);
    padded.load.kv_limit_bytes = 1;
    SUCCEEDS(gemmoe_model_load(directory, &padded.load, &model, &error));
    options.context_size = 16;
    REFUSES(GEMMOE_STATUS_KV_LIMIT, gemmoe_session_create(model, &options, (gemmoe_session **)&out[0], &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    padded.load.kv_limit_bytes = ~(uint64_t)0;
    SUCCEEDS(gemmoe_model_load(directory, &padded.load, &model, &error));
    SUCCEEDS(gemmoe_session_create(model, &options, &session, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
}

/* ---- Loads, and the ends of objects. ---- */

static void loads(void) {
    gemmoe_error *error = NULL;
    gemmoe_load *load = NULL;
    gemmoe_model *model = NULL;
    gemmoe_load_progress progress = GEMMOE_LOAD_PROGRESS_INIT;
    gemmoe_device_info device = GEMMOE_DEVICE_INFO_INIT;
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;

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
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_plan_memory("/nowhere/at/all", NULL, NULL, &plan, &error));
    CHECK(plan.weight_bytes == 0 && plan.struct_size == sizeof plan);
    FAILS(GEMMOE_STATUS_NO_DEVICE, gemmoe_device_get_info(0xFFFFFFFF, &device, &error));
    CHECK(device.memory_bytes == 0 && device.struct_size == sizeof device);
    FAILS(GEMMOE_STATUS_NO_DEVICE, gemmoe_device_name(0xFFFFFFFF, (char *)&out[0], 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_model_load("", NULL, (gemmoe_model **)&out[0], &error));
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_model_load("\xff\xfe", NULL, (gemmoe_model **)&out[0], &error));
    CHECK(outputs_untouched());
}

/* ---- Mixes: what they refuse, and one that is written. ---- */

static void mixes(void) {
    gemmoe_error *error = NULL;
    gemmoe_mix *mix = NULL;
    gemmoe_model *model = NULL;
    gemmoe_load_progress progress = GEMMOE_LOAD_PROGRESS_INIT;
    gemmoe_mix_options options = GEMMOE_MIX_OPTIONS_INIT;
    gemmoe_mix_plan plan = GEMMOE_MIX_PLAN_INIT;
    uint32_t tokens[8];

    FAILS(GEMMOE_STATUS_RECIPE_SYNTAX, gemmoe_mix_check("a = ", 4, directory, mixed, NULL, &plan, &error));
    FAILS(GEMMOE_STATUS_RECIPE_VALUE, gemmoe_mix_check("a = 1", 5, directory, mixed, NULL, &plan, &error));
    FAILS(GEMMOE_STATUS_RECIPE_VALUE, gemmoe_mix_check(NULL, 0, directory, mixed, NULL, &plan, &error));
    FAILS(GEMMOE_STATUS_INVALID_UTF8, gemmoe_mix_check("\xff", 1, directory, mixed, NULL, &plan, &error));
    FAILS(GEMMOE_STATUS_RECIPE_VALUE, gemmoe_mix_start("a = 1", 5, directory, mixed, NULL, &mix, &error));
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_mix_check(RECIPE, "/nowhere", mixed, NULL, &plan, &error));
    FAILS(GEMMOE_STATUS_WRITE_FAILED, gemmoe_mix_check(RECIPE, directory, NOWHERE, NULL, &plan, &error));
    FAILS(GEMMOE_STATUS_ALREADY_EXISTS, gemmoe_mix_check(RECIPE, directory, directory, NULL, &plan, &error));
    options.flags = 2;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_mix_check(RECIPE, directory, mixed, &options, &plan, &error));
    options.flags = 0;
    options.threads = 257;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_mix_start(RECIPE, directory, mixed, &options, &mix, &error));
    CHECK(mix == NULL && plan.parameters == 0);

    /* What is wrong with the models, or the target, is told by waiting, once. */
    SUCCEEDS(gemmoe_mix_start(RECIPE, directory, NOWHERE, NULL, &mix, &error));
    FAILS(GEMMOE_STATUS_WRITE_FAILED, gemmoe_mix_wait(mix, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_mix_wait(mix, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_mix_destroy(mix));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_mix_destroy(mix));

    options.threads = 2;
    SUCCEEDS(gemmoe_mix_check(RECIPE, directory, mixed, &options, &plan, &error));
    CHECK(plan.num_local_experts == 2 && plan.num_experts_per_tok == 2 && plan.scratch_bytes == 0);
    SUCCEEDS(gemmoe_mix_start(RECIPE, directory, mixed, &options, &mix, &error));
    SUCCEEDS(gemmoe_mix_wait(mix, &error));
    SUCCEEDS(gemmoe_mix_poll(mix, &progress, &error));
    CHECK(progress.state == GEMMOE_LOAD_OVER && progress.bytes_read == progress.bytes_total);
    CHECK(progress.bytes_total == plan.bytes_read && plan.bytes_read > 0);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_mix_cancel(mix));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_mix_destroy(mix));
    model = load_model(mixed);
    generate_once(model, tokens);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
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
    gemmoe_error *error = NULL;
    gemmoe_model *model = load_model(directory);
    objects[MODEL] = model;
    make_twins(model);
    objects[SESSION] = subject;
    SUCCEEDS(gemmoe_text_stream_create(model, (gemmoe_text_stream **)&objects[STREAM], &error));
    SUCCEEDS(gemmoe_load_start(directory, NULL, (gemmoe_load **)&objects[LOAD], &error));
    SUCCEEDS(gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, "[ab]+", 5, (gemmoe_grammar **)&objects[GRAMMAR], &error));
    SUCCEEDS(gemmoe_batch_create(model, NULL, (gemmoe_batch **)&objects[BATCH], &error));
    SUCCEEDS(gemmoe_mix_start(RECIPE, directory, NOWHERE, NULL, (gemmoe_mix **)&objects[MIX], &error));
    CHECK(gemmoe_session_step(NULL, NULL, NULL, (gemmoe_error **)&objects[ERROR]) == GEMMOE_STATUS_NULL_ARGUMENT);
}

static void destroy_objects(void *objects[KINDS]) {
    RETURNS(GEMMOE_STATUS_OK, gemmoe_error_destroy((gemmoe_error *)objects[ERROR]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy((gemmoe_load *)objects[LOAD]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy((gemmoe_model *)objects[MODEL]));
    destroy_twins();
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy((gemmoe_text_stream *)objects[STREAM]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_grammar_destroy((gemmoe_grammar *)objects[GRAMMAR]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy((gemmoe_batch *)objects[BATCH]));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_mix_destroy((gemmoe_mix *)objects[MIX]));
}

int main(int argc, char **argv) {
    gemmoe_error *error = NULL;
    uint32_t before[8], after[8];
    CHECK(argc > 1);
    directory = argv[1];
    snprintf(mixed, sizeof mixed, "%s/mixed-%ld", directory, (long)getpid());
    make_objects(stale);
    destroy_objects(stale);
    make_objects(live);
    generate_once((gemmoe_model *)live[MODEL], before);

    wrong_handles();
    TWINS_AGREE();
    null_arguments();
    TWINS_AGREE();
    sizes();
    TWINS_AGREE();
    SUCCEEDS(gemmoe_session_snapshot(subject, NULL, 0, &kept_bytes, &error));
    kept = (uint8_t *)malloc(kept_bytes);
    CHECK(kept != NULL);
    SUCCEEDS(gemmoe_session_snapshot(subject, kept, kept_bytes, &kept_bytes, &error));
    struct_sizes();
    TWINS_AGREE();
    free(kept);
    load_values();
    loads();
    mixes();
    destroy_orders(before);
    errors();
    TWINS_AGREE();

    generate_once((gemmoe_model *)live[MODEL], after);
    CHECK(memcmp(before, after, sizeof before) == 0);
    destroy_objects(live);
    printf("%u functions with handles\n", (unsigned)FUNCTIONS);
    return 0;
}
