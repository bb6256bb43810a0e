/* A character in a game talks while the frames stay on time.
 *
 *   game_loop MODEL_DIR [PROMPT [SECONDS [BUDGET_US]]]
 *
 * A loop of 60 frames a second gives the library 2 ms of each. A token of a large model takes many frames; the call comes
 * back with GEMMOE_STATUS_NEED_MORE, and the next frame's goes on where it stopped. At the end: how long the calls took.
 */
#define _POSIX_C_SOURCE 200112L
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gemmoe.h"

#define FRAMES_PER_SECOND 60
#define NANOSECONDS 1000000000L
/* Classes of the histogram, each an eighth of the budget wide; the last also takes all longer calls. */
#define CLASSES 20

struct timing {
    unsigned long frames, tokens, late, counts[CLASSES];
    double longest, *calls;
};

static double seconds_between(const struct timespec *from, const struct timespec *to)
{
    return (double)(to->tv_sec - from->tv_sec) + (double)(to->tv_nsec - from->tv_nsec) * 1e-9;
}

static int failed(const char *what, gemmoe_status status, gemmoe_error *error)
{
    const char *text = gemmoe_error_text(error);
    fprintf(stderr, "game_loop: %s: %s: %s\n", what, gemmoe_status_name(status), text != NULL ? text : "");
    gemmoe_error_destroy(error);
    return 1;
}

/* What a game does with the rest of its frame. */
static void simulate(double *world, size_t count)
{
    size_t at;
    for (at = 1; at < count; at++) {
        world[at] = 0.5 * (world[at] + world[at - 1]);
    }
}

/* Waits for the next frame; returns 0 if its time is over already. */
static int wait_for(struct timespec *next)
{
    struct timespec now;
    next->tv_nsec += NANOSECONDS / FRAMES_PER_SECOND;
    if (next->tv_nsec >= NANOSECONDS) {
        next->tv_nsec -= NANOSECONDS;
        next->tv_sec += 1;
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    if (seconds_between(&now, next) < 0.0) {
        *next = now;
        return 0;
    }
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, next, NULL) == EINTR) {
    }
    return 1;
}

/* One frame's share of the generation: some of the prompt, some of a token, or a whole one. */
static gemmoe_status talk(gemmoe_session *session, const gemmoe_budget *budget, gemmoe_text_stream *stream,
                          struct timing *timing, gemmoe_error **error)
{
    uint32_t token;
    const char *text;
    size_t bytes;
    gemmoe_status status = gemmoe_session_step(session, budget, &token, error);
    if (status == GEMMOE_STATUS_OK) {
        timing->tokens++;
        status = gemmoe_text_stream_push(stream, token, &text, &bytes, error);
        if (status == GEMMOE_STATUS_OK) {
            fwrite(text, 1, bytes, stdout);
            fflush(stdout);
        }
    }
    return status;
}

static void note(struct timing *timing, double seconds, double budget)
{
    unsigned long eighths = (unsigned long)(seconds / budget * 8.0);
    timing->counts[eighths < CLASSES ? eighths : CLASSES - 1]++;
    timing->calls[timing->frames++] = seconds;
    if (seconds > timing->longest) {
        timing->longest = seconds;
    }
}

static int by_length(const void *left, const void *right)
{
    double a = *(const double *)left, b = *(const double *)right;
    return (a > b) - (a < b);
}

static void report(struct timing *timing, double budget)
{
    static const char bar[] = "##################################################";
    unsigned long eighths, most = 1, last = 0;
    double p99;
    if (timing->frames == 0) {
        return;
    }
    qsort(timing->calls, timing->frames, sizeof *timing->calls, by_length);
    p99 = timing->calls[(timing->frames - 1) * 99 / 100];
    for (eighths = 0; eighths < CLASSES; eighths++) {
        most = timing->counts[eighths] > most ? timing->counts[eighths] : most;
        last = timing->counts[eighths] > 0 ? eighths : last;
    }
    printf("\n\n  time in the library per frame, of a budget of %.2f ms\n", budget * 1e3);
    for (eighths = 0; eighths <= last; eighths++) {
        unsigned long count = timing->counts[eighths];
        printf("  %s%5.2f ms %6lu %.*s\n", eighths == CLASSES - 1 ? ">=" : "  ", (double)eighths / 8.0 * budget * 1e3, count,
               (int)(count * (sizeof bar - 1) / most), bar);
    }
    printf("  %lu frames, %lu tokens, %.2f frames a token, %lu frames late\n", timing->frames, timing->tokens,
           (double)timing->frames / (double)(timing->tokens > 0 ? timing->tokens : 1), timing->late);
    printf("  99 of 100 calls within %.2f ms (%.2f budgets), the longest %.2f ms\n", p99 * 1e3, p99 / budget,
           timing->longest * 1e3);
}

static int play(gemmoe_model *model, const char *prompt, unsigned long frames, const gemmoe_budget *budget)
{
    gemmoe_error *error = NULL;
    gemmoe_session *session = NULL;
    gemmoe_text_stream *stream = NULL;
    gemmoe_session_options options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    gemmoe_status status;
    struct timing timing = { 0, 0, 0, { 0 }, 0.0, NULL };
    struct timespec next, before, after;
    uint32_t tokens[1024];
    static double world[4096];
    size_t count = 0;
    int result = 1;

    /* A character never stops talking: what it said first slides out of its memory. */
    options.overflow = GEMMOE_OVERFLOW_SLIDE;
    options.keep_tokens = 1;
    options.context_size = 1024;
    sampling.temperature = 0.8f;
    sampling.top_k = 40;
    sampling.repetition_penalty = 1.1f;
    sampling.penalty_window = 64;
    timing.calls = (double *)malloc(frames * sizeof *timing.calls);
    status = gemmoe_tokenize(model, prompt, strlen(prompt), GEMMOE_TOKENIZE_ADD_BOS, tokens, 1000, &count, &error);
    if (status == GEMMOE_STATUS_OK) status = gemmoe_session_create(model, &options, &session, &error);
    if (status == GEMMOE_STATUS_OK) status = gemmoe_session_set_sampling(session, &sampling, &error);
    if (status == GEMMOE_STATUS_OK) status = gemmoe_session_push(session, tokens, count, &error);
    if (status == GEMMOE_STATUS_OK) status = gemmoe_text_stream_create(model, &stream, &error);
    if (status != GEMMOE_STATUS_OK || timing.calls == NULL) {
        failed("session", status, error);
        goto done;
    }

    printf("%s", prompt);
    clock_gettime(CLOCK_MONOTONIC, &next);
    while (timing.frames < frames) {
        simulate(world, sizeof world / sizeof world[0]);
        clock_gettime(CLOCK_MONOTONIC, &before);
        status = talk(session, budget, stream, &timing, &error);
        clock_gettime(CLOCK_MONOTONIC, &after);
        if (status != GEMMOE_STATUS_OK && status != GEMMOE_STATUS_NEED_MORE) {
            failed("step", status, error);
            goto done;
        }
        note(&timing, seconds_between(&before, &after), (double)budget->max_us * 1e-6);
        timing.late += !wait_for(&next);
    }
    report(&timing, (double)budget->max_us * 1e-6);
    result = 0;

done:
    free(timing.calls);
    gemmoe_text_stream_destroy(stream);
    gemmoe_session_destroy(session);
    return result;
}

int main(int argc, char **argv)
{
    gemmoe_error *error = NULL;
    gemmoe_model *model = NULL;
    gemmoe_budget budget = GEMMOE_BUDGET_INIT;
    gemmoe_status status;
    unsigned long seconds = argc > 3 ? strtoul(argv[3], NULL, 10) : 5;
    int result;

    if (argc < 2 || seconds == 0 || seconds > 3600) {
        fprintf(stderr, "usage: game_loop MODEL_DIR [PROMPT [SECONDS [BUDGET_US]]]\n");
        return 2;
    }
    budget.max_us = argc > 4 ? strtoul(argv[4], NULL, 10) : 2000;
    budget.max_us = budget.max_us > 0 ? budget.max_us : 2000;
    status = gemmoe_model_load(argv[1], NULL, &model, &error);
    if (status != GEMMOE_STATUS_OK) {
        return failed(argv[1], status, error);
    }
    result = play(model, argc > 2 ? argv[2] : "The reason", seconds * FRAMES_PER_SECOND, &budget);
    gemmoe_model_destroy(model);
    return result;
}
