/* Hosts with threads of their own: on pthreads, one task after the other, from within which others are stepped, and hosts that
 * do not keep to what they were told. Every one of them generates the same tokens as the library's own threads.
 * argv[1] is a model. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <pthread.h>
#include <time.h>

#include "check.h"

#define THREADS 3
#define MOST_KEPT 4096

static const char *directory;
/* What the library's own threads generate. */
static uint32_t expected[8];

struct call {
    gemmoe_task task;
    void *task_context;
    uint32_t index;
};

static void *make_call(void *argument) {
    const struct call *call = (const struct call *)argument;
    call->task(call->task_context, call->index);
    return NULL;
}

/* What a host's context may be. */
struct host {
    void (*run)(struct host *host, uint32_t count, gemmoe_task task, void *task_context);
    unsigned calls;
    struct call kept[MOST_KEPT];
    pthread_t threads[MOST_KEPT];
    unsigned kept_count;
    gemmoe_session *inner, *outer;
};

static void parallel_for(void *context, uint32_t count, gemmoe_task task, void *task_context) {
    struct host *host = (struct host *)context;
    CHECK(count >= 2 && count <= THREADS);
    host->calls++;
    host->run(host, count, task, task_context);
}

static void on_pthreads(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    pthread_t threads[THREADS];
    struct call calls[THREADS];
    uint32_t index;
    (void)host;
    for (index = 0; index < count; index++) {
        calls[index].task = task;
        calls[index].task_context = task_context;
        calls[index].index = index;
        if (index > 0) CHECK(pthread_create(&threads[index], NULL, make_call, &calls[index]) == 0);
    }
    make_call(&calls[0]);
    for (index = 1; index < count; index++) CHECK(pthread_join(threads[index], NULL) == 0);
}

static void in_turn(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    uint32_t index;
    (void)host;
    for (index = 0; index < count; index++) task(task_context, index);
}

/* ---- Those that do not keep to it. ---- */

static void not_at_all(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    (void)host, (void)count, (void)task, (void)task_context;
}

static void wrong_indices(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    (void)host;
    task(task_context, count);
    task(task_context, 0xFFFFFFFFu);
    task(task_context, count - 1);
    task(task_context, count - 1);
}

static void wrong_contexts(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    task(NULL, 0);
    task(host, 0);
    task((char *)task_context + 1000, 0);
    in_turn(host, count, task, task_context);
}

/* Returns while its threads are at work, or about to begin. */
static void without_waiting(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    uint32_t index;
    for (index = 0; index < count && host->kept_count < MOST_KEPT; index++) {
        struct call *call = &host->kept[host->kept_count];
        call->task = task;
        call->task_context = task_context;
        call->index = index;
        CHECK(pthread_create(&host->threads[host->kept_count], NULL, make_call, call) == 0);
        host->kept_count++;
    }
}

/* Calls the tasks of earlier calls beside its own. */
static void old_ones_too(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    struct call call;
    if (host->kept_count > 0) make_call(&host->kept[host->kept_count / 2]);
    in_turn(host, count, task, task_context);
    call.task = task;
    call.task_context = task_context;
    call.index = 0;
    if (host->kept_count < MOST_KEPT) host->kept[host->kept_count++] = call;
}

/* ---- Sessions on the threads that run tasks. ---- */

/* Another session of the model is stepped where this one waits for its tasks; this one is busy. */
static void with_another_session(struct host *host, uint32_t count, gemmoe_task task, void *task_context) {
    gemmoe_session *inner = host->inner;
    gemmoe_error *error = NULL;
    uint32_t token = 5;
    if (inner != NULL) {
        host->inner = NULL;
        generate(inner, &token, 1);
        CHECK(token == expected[0]);
        SUCCEEDS(gemmoe_session_rewind(inner, 5, &error));
        host->inner = inner;
        FAILS(GEMMOE_STATUS_BUSY, gemmoe_session_step(host->outer, NULL, &token, &error));
    }
    on_pthreads(host, count, task, task_context);
}

static struct host *make_host(void (*run)(struct host *, uint32_t, gemmoe_task, void *)) {
    struct host *host = (struct host *)calloc(1, sizeof(struct host));
    CHECK(host != NULL);
    host->run = run;
    return host;
}

static gemmoe_model *load_with(struct host *host) {
    gemmoe_load_options options = GEMMOE_LOAD_OPTIONS_INIT;
    gemmoe_error *error = NULL;
    gemmoe_model *model = NULL;
    options.threads = THREADS;
    options.parallel_for = parallel_for;
    options.parallel_for_context = host;
    SUCCEEDS(gemmoe_model_load(directory, &options, &model, &error));
    return model;
}

/* Whether the process has so many threads; one that was joined is in the list for a moment still. */
static int has_threads(int expected_count) {
    int waits, count = 0;
    for (waits = 0; waits < 1000 && count != expected_count; waits++) {
        struct timespec pause = {0, 1000000};
        DIR *tasks = opendir("/proc/self/task");
        CHECK(tasks != NULL);
        if (waits > 0) nanosleep(&pause, NULL);
        for (count = -2; readdir(tasks) != NULL;) count++;
        closedir(tasks);
    }
    return count == expected_count;
}

static void every_host_gives_the_same_tokens(void) {
    static void (*const runs[])(struct host *, uint32_t, gemmoe_task, void *) = {
        on_pthreads, in_turn, not_at_all, wrong_indices, wrong_contexts, without_waiting, old_ones_too,
    };
    size_t row;
    for (row = 0; row < sizeof runs / sizeof runs[0]; row++) {
        struct host *host = make_host(runs[row]);
        gemmoe_model *model = load_with(host);
        uint32_t tokens[8];
        unsigned index;
        /* The library starts none. */
        CHECK(has_threads(1));
        generate_once(model, tokens);
        CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
        CHECK(host->calls > 0);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
        /* What was kept is called when the model is gone, or ends then. */
        for (index = 0; index < host->kept_count; index++) {
            if (runs[row] == without_waiting) CHECK(pthread_join(host->threads[index], NULL) == 0);
            make_call(&host->kept[index]);
        }
        printf("host %u: %u calls\n", (unsigned)row, host->calls);
        free(host);
    }
}

static void sessions_run_on_the_threads_of_tasks(void) {
    struct host *host = make_host(with_another_session);
    gemmoe_model *model = load_with(host);
    gemmoe_error *error = NULL;
    gemmoe_session *inner = make_session(model, 64, 0), *outer = make_session(model, 64, 0);
    uint32_t prompt[5], tokens[8], index;
    for (index = 0; index < 5; index++) prompt[index] = prompt_token(index);
    SUCCEEDS(gemmoe_session_prefill(inner, prompt, 5, NULL, &error));
    host->inner = inner;
    host->outer = outer;
    SUCCEEDS(gemmoe_session_prefill(outer, prompt, 5, NULL, &error));
    generate(outer, tokens, 8);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    host->inner = NULL;
    generate(inner, tokens, 8);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(inner));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(outer));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    free(host);
}

/* One thread needs no help. */
static void one_thread_never_calls(void) {
    gemmoe_load_options options = GEMMOE_LOAD_OPTIONS_INIT;
    gemmoe_error *error = NULL;
    gemmoe_model *model = NULL;
    uint32_t tokens[8];
    options.threads = 1;
    /* Without a context it would crash. */
    options.parallel_for = parallel_for;
    SUCCEEDS(gemmoe_model_load(directory, &options, &model, &error));
    generate_once(model, tokens);
    CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
}

/* The library's own threads, of every kind there is. */
static void own_threads_of_every_kind(void) {
    static const uint32_t rows[][4] = {{1, GEMMOE_LOAD_PIN_THREADS, GEMMOE_PRIORITY_LOW, 0},
                                       {4, 0, GEMMOE_PRIORITY_LOW, 1},
                                       {4, 0, GEMMOE_PRIORITY_LOWEST, 1000}};
    size_t row;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        gemmoe_load_options options = GEMMOE_LOAD_OPTIONS_INIT;
        gemmoe_error *error = NULL;
        gemmoe_model *model = NULL;
        uint32_t tokens[8];
        options.threads = rows[row][0];
        options.flags = rows[row][1];
        options.priority = rows[row][2];
        options.spin_us = rows[row][3];
        SUCCEEDS(gemmoe_model_load(directory, &options, &model, &error));
        CHECK(has_threads((int)options.threads));
        generate_once(model, tokens);
        CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    }
}

int main(int argc, char **argv) {
    gemmoe_model *model;
    CHECK(argc > 1);
    directory = argv[1];
    model = load_model(directory);
    generate_once(model, expected);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    every_host_gives_the_same_tokens();
    sessions_run_on_the_threads_of_tasks();
    one_thread_never_calls();
    own_threads_of_every_kind();
    return 0;
}
