/* What the hosts share: checks that stop with the line and the error's text, and a model to begin with.
 * Every host is compiled as C99 and as C++11. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gemmoe.h"

/* Stops unless `condition` holds. */
#define CHECK(condition) check_that(__FILE__, __LINE__, (condition) ? 1 : 0, #condition)

/* The call returns OK and leaves no error. The call names `&error` as its error_out. */
#define SUCCEEDS(call) check_success(__FILE__, __LINE__, (call), &error, #call)

/* The call returns `expected` and an error object that says the same in words. */
#define FAILS(expected, call) check_failure(__FILE__, __LINE__, (expected), (call), &error, #call)

/* For calls without an error object. */
#define RETURNS(expected, call) check_status(__FILE__, __LINE__, (expected), (call), #call)

static inline void check_that(const char *file, int line, int holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "%s:%d: not so: %s\n", file, line, what);
        exit(1);
    }
}

static inline void check_status(const char *file, int line, gemmoe_status expected, gemmoe_status found,
                                const char *what) {
    if (found != expected) {
        fprintf(stderr, "%s:%d: %s, expected %s: %s\n", file, line, gemmoe_status_name(found),
                gemmoe_status_name(expected), what);
        exit(1);
    }
}

static inline void check_success(const char *file, int line, gemmoe_status found, gemmoe_error **error,
                                 const char *what) {
    if (found != GEMMOE_STATUS_OK && *error != NULL) {
        fprintf(stderr, "%s:%d: %s\n", file, line, gemmoe_error_text(*error));
    }
    check_status(file, line, GEMMOE_STATUS_OK, found, what);
    check_that(file, line, *error == NULL, "a call that succeeds leaves no error");
}

static inline void check_failure(const char *file, int line, gemmoe_status expected, gemmoe_status found,
                                 gemmoe_error **error, const char *what) {
    const char *text;
    if (found != expected && *error != NULL) {
        fprintf(stderr, "%s:%d: %s\n", file, line, gemmoe_error_text(*error));
    }
    check_status(file, line, expected, found, what);
    check_that(file, line, *error != NULL, "a call that fails leaves an error");
    check_status(file, line, expected, gemmoe_error_status(*error), what);
    text = gemmoe_error_text(*error);
    check_that(file, line, text != NULL && strlen(text) > 0, "an error has a text");
    check_status(file, line, GEMMOE_STATUS_OK, gemmoe_error_destroy(*error), "an error can be destroyed");
    *error = NULL;
}

static inline gemmoe_model *load_model(const char *directory) {
    gemmoe_load_options options = GEMMOE_LOAD_OPTIONS_INIT;
    gemmoe_error *error = NULL;
    gemmoe_model *model = NULL;
    options.threads = 2;
    SUCCEEDS(gemmoe_model_load(directory, &options, &model, &error));
    CHECK(model != NULL);
    return model;
}

static inline gemmoe_session *make_session(const gemmoe_model *model, uint32_t context_size, uint32_t prefill_chunk) {
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_error *error = NULL;
    gemmoe_session *session = NULL;
    options.context_size = context_size;
    options.prefill_chunk = prefill_chunk;
    SUCCEEDS(gemmoe_session_create(model, &options, &session, &error));
    CHECK(session != NULL);
    return session;
}

/* Prompt token `index`: any, but always the same, and below every test model's vocabulary. */
static inline uint32_t prompt_token(uint32_t index) {
    return (index * 7919u + 13u) % 97u;
}

/* Draws `count` tokens with a fixed seed. */
static inline void generate(gemmoe_session *session, uint32_t *tokens, size_t count) {
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    gemmoe_error *error = NULL;
    size_t index;
    sampling.temperature = 1.0f;
    sampling.seed = 5;
    SUCCEEDS(gemmoe_session_set_sampling(session, &sampling, &error));
    for (index = 0; index < count; index++) {
        SUCCEEDS(gemmoe_session_step(session, NULL, &tokens[index], &error));
    }
}

/* A prompt of five tokens and eight drawn ones, in a session of its own. */
static inline void generate_once(const gemmoe_model *model, uint32_t tokens[8]) {
    gemmoe_session *session = make_session(model, 64, 0);
    gemmoe_error *error = NULL;
    uint32_t prompt[5];
    uint32_t index;
    for (index = 0; index < 5; index++) {
        prompt[index] = prompt_token(index);
    }
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 5, NULL, &error));
    generate(session, tokens, 8);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
}

#endif
