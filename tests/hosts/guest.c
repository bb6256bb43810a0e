/* A good guest: silent on both streams whatever happens, and of no use, but harmless, in a forked child.
 * argv[1] is a model, argv[2] a broken one, argv[3] a file to catch what is written. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

static int kept[2];

static void catch_output(const char *path) {
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(file >= 0);
    fflush(NULL);
    kept[0] = dup(1);
    kept[1] = dup(2);
    CHECK(dup2(file, 1) == 1 && dup2(file, 2) == 2);
    close(file);
}

static void expect_silence(const char *path) {
    struct stat found;
    fflush(NULL);
    CHECK(dup2(kept[0], 1) == 1 && dup2(kept[1], 2) == 2);
    CHECK(stat(path, &found) == 0);
    CHECK(found.st_size == 0);
}

/* Loads, generates, and does what fails. */
static void use_everything(const char *good, const char *broken) {
    gemmoe_error *error = NULL;
    gemmoe_model *model = load_model(good), *none = NULL;
    gemmoe_load *load = NULL;
    gemmoe_session *session = make_session(model, 16, 0);
    uint32_t tokens[8];
    generate_once(model, tokens);
    CHECK(gemmoe_model_load(broken, NULL, &none, NULL) != GEMMOE_STATUS_OK);
    FAILS(GEMMOE_STATUS_DIRECTORY_NOT_FOUND, gemmoe_model_load("/nowhere/at/all", NULL, &none, &error));
    SUCCEEDS(gemmoe_load_start(broken, NULL, &load, &error));
    CHECK(gemmoe_load_wait(load, &none, NULL) != GEMMOE_STATUS_OK);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy(load));
    FAILS(GEMMOE_STATUS_NO_LOGITS, gemmoe_session_step(session, NULL, tokens, &error));
    FAILS(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_session_step(NULL, NULL, tokens, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
}

/* In the child every call with a status says FORKED, at once, and writes nothing. Returns the line that is wrong. */
#define IN_CHILD(call) if ((call) != GEMMOE_STATUS_FORKED) return __LINE__

static int be_a_child(const char *directory, gemmoe_model *model, gemmoe_session *session, gemmoe_text_stream *stream,
                      gemmoe_load *load, gemmoe_error *old, gemmoe_batch *batch, gemmoe_grammar *grammar) {
    gemmoe_device_info device = GEMMOE_DEVICE_INFO_INIT;
    gemmoe_residency residency = GEMMOE_RESIDENCY_INIT;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_model_info model_info = GEMMOE_MODEL_INFO_INIT;
    gemmoe_load_progress progress = GEMMOE_LOAD_PROGRESS_INIT;
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    gemmoe_route_arrays arrays = GEMMOE_ROUTE_ARRAYS_INIT;
    gemmoe_session_metrics metrics = GEMMOE_SESSION_METRICS_INIT;
    gemmoe_batch_info batch_info = GEMMOE_BATCH_INFO_INIT;
    gemmoe_memory_plan plan = GEMMOE_MEMORY_PLAN_INIT;
    gemmoe_mix_plan mix_plan = GEMMOE_MIX_PLAN_INIT;
    gemmoe_mix *new_mix = NULL;
    gemmoe_message message = GEMMOE_MESSAGE_INIT;
    gemmoe_error *error = (gemmoe_error *)&info;
    gemmoe_batch *new_batch = NULL;
    gemmoe_grammar *new_grammar = NULL;
    uint64_t number = 5;
    double sum = 5.0;
    int32_t status = 5;
    uint8_t byte = 5;
    gemmoe_model *new_model = NULL;
    gemmoe_load *new_load = NULL;
    gemmoe_session *new_session = NULL;
    gemmoe_text_stream *new_stream = NULL;
    const uint32_t *tokens = NULL;
    const float *numbers = NULL;
    const char *text = NULL;
    char room[8];
    uint32_t token = 7;
    float log_probability = 5.0f;
    size_t count = 9;
    const char *const strings[1] = {"a"};
    message.role = "user";

    IN_CHILD(gemmoe_session_step(session, NULL, &token, &error));
    if (error != NULL || token != 7) return __LINE__;
    /* Before anything else is looked at: these would fail of themselves, or take long. */
    IN_CHILD(gemmoe_model_load("/nowhere/at/all", NULL, &new_model, NULL));
    IN_CHILD(gemmoe_session_step(NULL, NULL, NULL, NULL));
    IN_CHILD(gemmoe_model_destroy(NULL));
    IN_CHILD(gemmoe_model_load(directory, NULL, &new_model, NULL));
    IN_CHILD(gemmoe_load_start(directory, NULL, &new_load, NULL));
    IN_CHILD(gemmoe_load_poll(load, &progress, NULL));
    IN_CHILD(gemmoe_load_cancel(load));
    IN_CHILD(gemmoe_mix_check("", 0, directory, "/nowhere", NULL, &mix_plan, NULL));
    IN_CHILD(gemmoe_mix_start("", 0, directory, "/nowhere", NULL, &new_mix, NULL));
    IN_CHILD(gemmoe_mix_poll(NULL, &progress, NULL));
    IN_CHILD(gemmoe_mix_cancel(NULL));
    IN_CHILD(gemmoe_mix_wait(NULL, NULL));
    IN_CHILD(gemmoe_mix_destroy(NULL));
    if (new_mix != NULL || mix_plan.parameters != 0) return __LINE__;
    IN_CHILD(gemmoe_load_wait(load, &new_model, NULL));
    IN_CHILD(gemmoe_model_get_info(model, &model_info, NULL));
    IN_CHILD(gemmoe_model_get_residency(model, &residency, NULL));
    IN_CHILD(gemmoe_model_set_device_memory_limit(model, 0, NULL));
    IN_CHILD(gemmoe_model_apply_router_patch(model, "/nowhere/at/all", NULL));
    IN_CHILD(gemmoe_model_apply_router_patch_bytes(model, &byte, 1, NULL));
    IN_CHILD(gemmoe_model_remove_router_patch(model, NULL));
    IN_CHILD(gemmoe_model_device(model, room, 8, &count, NULL));
    IN_CHILD(gemmoe_model_is_stop_token(model, 1, &token, NULL));
    IN_CHILD(gemmoe_tokenize(model, "a", 1, 0, &token, 1, &count, NULL));
    IN_CHILD(gemmoe_detokenize(model, &token, 1, 0, room, 8, &count, NULL));
    IN_CHILD(gemmoe_text_stream_create(model, &new_stream, NULL));
    IN_CHILD(gemmoe_text_stream_push(stream, 3, &text, &count, NULL));
    IN_CHILD(gemmoe_text_stream_finish(stream, &text, &count, NULL));
    IN_CHILD(gemmoe_session_create(model, NULL, &new_session, NULL));
    IN_CHILD(gemmoe_session_set_sampling(session, &sampling, NULL));
    IN_CHILD(gemmoe_session_prefill(session, &token, 1, NULL, NULL));
    IN_CHILD(gemmoe_session_logits(session, &numbers, &count, NULL));
    IN_CHILD(gemmoe_session_top_log_probabilities(session, &token, &log_probability, 1, &count, NULL));
    IN_CHILD(gemmoe_session_routes(session, 0, &tokens, &numbers, &count, NULL));
    IN_CHILD(gemmoe_session_tokens(session, &tokens, &count, NULL));
    IN_CHILD(gemmoe_session_rewind(session, 0, NULL));
    IN_CHILD(gemmoe_session_get_info(session, &info, NULL));
    IN_CHILD(gemmoe_session_cancel(session));
    IN_CHILD(gemmoe_session_clear_cancel(session));
    IN_CHILD(gemmoe_chat_tokenize(model, &message, 1, 0, &token, 1, &count, NULL));
    IN_CHILD(gemmoe_text_stream_set_stop_strings(stream, strings, 1, NULL));
    IN_CHILD(gemmoe_text_stream_stopped(stream, &token, &count, NULL));
    IN_CHILD(gemmoe_session_fork(session, &new_session, NULL));
    IN_CHILD(gemmoe_plan_memory(directory, NULL, NULL, &plan, NULL));
    IN_CHILD(gemmoe_device_count(&token, NULL));
    IN_CHILD(gemmoe_device_get_info(0, &device, NULL));
    IN_CHILD(gemmoe_device_name(0, room, 8, &count, NULL));
    IN_CHILD(gemmoe_session_push(session, &token, 1, NULL));
    IN_CHILD(gemmoe_session_set_tokens(session, &token, 1, &count, NULL));
    IN_CHILD(gemmoe_session_score(session, &token, 1, &log_probability, NULL));
    IN_CHILD(gemmoe_session_embed(session, &token, 1, 0, &log_probability, 1, NULL));
    IN_CHILD(gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, "a", 1, &new_grammar, NULL));
    IN_CHILD(gemmoe_session_set_grammar(session, grammar, NULL));
    IN_CHILD(gemmoe_session_set_expert_mask(session, 0, 1, NULL));
    IN_CHILD(gemmoe_session_set_expert_bias(session, 0, &log_probability, 1, NULL));
    IN_CHILD(gemmoe_session_clear_expert_control(session, NULL));
    IN_CHILD(gemmoe_session_expert_statistics(session, &number, &sum, 1, &count, NULL));
    IN_CHILD(gemmoe_session_clear_expert_statistics(session, NULL));
    IN_CHILD(gemmoe_session_fetch_routes(session, &arrays, &count, &number, NULL));
    IN_CHILD(gemmoe_session_snapshot(session, &byte, 1, &count, NULL));
    IN_CHILD(gemmoe_session_restore(model, &byte, 1, NULL, &new_session, NULL));
    IN_CHILD(gemmoe_session_get_metrics(session, &metrics, NULL));
    IN_CHILD(gemmoe_batch_create(model, NULL, &new_batch, NULL));
    IN_CHILD(gemmoe_batch_step(batch, &session, 1, NULL, &status, &token, NULL, NULL));
    IN_CHILD(gemmoe_batch_cancel(batch));
    IN_CHILD(gemmoe_batch_clear_cancel(batch));
    IN_CHILD(gemmoe_batch_get_info(batch, &batch_info, NULL));
    IN_CHILD(gemmoe_batch_destroy(batch));
    IN_CHILD(gemmoe_grammar_destroy(grammar));
    if (new_batch != NULL || new_grammar != NULL || number != 5 || sum != 5.0 || status != 5 || byte != 5) return __LINE__;
    if (log_probability != 5.0f) return __LINE__;
    IN_CHILD(gemmoe_error_status(old));
    IN_CHILD(gemmoe_session_destroy(session));
    IN_CHILD(gemmoe_text_stream_destroy(stream));
    IN_CHILD(gemmoe_load_destroy(load));
    IN_CHILD(gemmoe_model_destroy(model));
    IN_CHILD(gemmoe_error_destroy(old));
    if (gemmoe_error_text(old) != NULL || token != 7 || count != 9) return __LINE__;
    if (new_model != NULL || new_load != NULL || new_session != NULL || new_stream != NULL) return __LINE__;
    return 0;
}

/* The parent's child, watched: a hang is ended and told. */
static void fork_and_go_on(const char *directory) {
    gemmoe_error *error = NULL, *old = NULL;
    gemmoe_model *model = load_model(directory);
    gemmoe_session *session = make_session(model, 64, 0);
    gemmoe_text_stream *stream = NULL;
    gemmoe_load *load = NULL;
    gemmoe_batch *batch = NULL;
    gemmoe_grammar *grammar = NULL;
    const uint32_t prompt[2] = {3, 4};
    uint32_t before[8], after[8];
    int status = 0, waits, round;
    generate_once(model, before);
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 2, NULL, &error));
    SUCCEEDS(gemmoe_text_stream_create(model, &stream, &error));
    SUCCEEDS(gemmoe_load_start(directory, NULL, &load, &error));
    SUCCEEDS(gemmoe_batch_create(model, NULL, &batch, &error));
    SUCCEEDS(gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, "a", 1, &grammar, &error));
    CHECK(gemmoe_session_step(NULL, NULL, NULL, &old) == GEMMOE_STATUS_NULL_ARGUMENT);
    for (round = 0; round < 5; round++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            int line = be_a_child(directory, model, session, stream, load, old, batch, grammar);
            if (line != 0) fprintf(stderr, "guest.c:%d: not FORKED in the child\n", line);
            _exit(line != 0);
        }
        for (waits = 0; waits < 6000 && waitpid(child, &status, WNOHANG) == 0; waits++) {
            struct timespec pause = {0, 10000000};
            nanosleep(&pause, NULL);
        }
        CHECK(waits < 6000);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
        generate_once(model, after);
        CHECK(memcmp(before, after, sizeof before) == 0);
    }
    RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(batch));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_grammar_destroy(grammar));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_error_destroy(old));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_load_destroy(load));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy(stream));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
}

/* Without objects at the fork, a child is a process like any other. */
static void fork_first(const char *directory) {
    int status = 0;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        gemmoe_model *model = load_model(directory);
        uint32_t tokens[8];
        generate_once(model, tokens);
        _exit(gemmoe_model_destroy(model) != GEMMOE_STATUS_OK);
    }
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(int argc, char **argv) {
    CHECK(argc > 3);
    catch_output(argv[3]);
    use_everything(argv[1], argv[2]);
    expect_silence(argv[3]);
    fork_first(argv[1]);
    fork_and_go_on(argv[1]);
    return 0;
}
