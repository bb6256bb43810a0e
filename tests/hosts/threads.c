/* Many threads: one session used by two, sessions shared by batches and forked meanwhile, many sessions of one model, and a
 * prefill cancelled at any moment.
 * argv[1] is a model; argv[2] how many prefills are cancelled. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>
#include <time.h>

#include "check.h"

#define PROMPT 300
#define DRAWN 8
#define CHUNK 16

static gemmoe_model *model;
static uint32_t prompt[PROMPT];

static uint64_t now_ns(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static uint64_t random_bits(void) {
    static uint64_t state = 0x2545F4914F6CDD1Du;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* ---- One session, two threads: OK or BUSY, nothing else. ---- */

struct rivalry {
    gemmoe_session *session;
    unsigned ok, busy, other;
};

/* Whether the call came through; if the other thread was inside one, it is to be tried again. */
static int came_through(struct rivalry *rivalry, gemmoe_status status) {
    struct timespec pause = {0, 1000};
    if (status == GEMMOE_STATUS_BUSY) {
        rivalry->busy++;
        nanosleep(&pause, NULL);
        return 0;
    }
    if (status == GEMMOE_STATUS_OK) {
        rivalry->ok++;
    } else {
        rivalry->other++;
    }
    return 1;
}

/* Each thread appends and takes back by turns, so that the session never fills. */
static void *compete(void *argument) {
    struct rivalry *rivalry = (struct rivalry *)argument;
    gemmoe_session *session = rivalry->session;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    uint32_t round, token;
    size_t count;
    const uint32_t *tokens;
    for (round = 0; round < 100; round++) {
        while (!came_through(rivalry, gemmoe_session_prefill(session, prompt, 20, NULL, NULL))) {}
        while (!came_through(rivalry, gemmoe_session_step(session, NULL, &token, NULL))) {}
        while (!came_through(rivalry, gemmoe_session_get_info(session, &info, NULL))) {}
        while (!came_through(rivalry, gemmoe_session_tokens(session, &tokens, &count, NULL))) {}
        while (!came_through(rivalry, gemmoe_session_rewind(session, 1, NULL))) {}
    }
    return NULL;
}

static void one_session_takes_one_thread(void) {
    struct rivalry rivals[2];
    pthread_t threads[2];
    gemmoe_error *error = NULL;
    gemmoe_session *session = make_session(model, 2048, CHUNK);
    uint32_t tokens[DRAWN], again[DRAWN];
    unsigned index;
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 1, NULL, &error));
    for (index = 0; index < 2; index++) {
        memset(&rivals[index], 0, sizeof rivals[index]);
        rivals[index].session = session;
        CHECK(pthread_create(&threads[index], NULL, compete, &rivals[index]) == 0);
    }
    for (index = 0; index < 2; index++) CHECK(pthread_join(threads[index], NULL) == 0);
    CHECK(rivals[0].other + rivals[1].other == 0);
    CHECK(rivals[0].ok == 500 && rivals[1].ok == 500);
    printf("one session, two threads: %u OK, %u BUSY\n", rivals[0].ok + rivals[1].ok, rivals[0].busy + rivals[1].busy);
    SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
    SUCCEEDS(gemmoe_session_prefill(session, prompt, 5, NULL, &error));
    generate(session, tokens, DRAWN);
    generate_once(model, again);
    CHECK(memcmp(tokens, again, sizeof tokens) == 0);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
}

/* ---- Batches that share sessions, forks and cancels meanwhile: OK, NEED_MORE, BUSY, CANCELLED, nothing else. ---- */

#define SHARED 4
#define STORM_ROUNDS 60

struct storm {
    gemmoe_session *sessions[SHARED];
    /* One that two threads step, one for the third. */
    gemmoe_batch *batches[2];
};

struct storm_thread {
    struct storm *storm;
    unsigned index;
    /* By status, OK to NEED_MORE. */
    unsigned seen[16];
};

static int see(struct storm_thread *thread, int32_t status) {
    CHECK(status == GEMMOE_STATUS_OK || status == GEMMOE_STATUS_NEED_MORE || status == GEMMOE_STATUS_BUSY ||
          status == GEMMOE_STATUS_CANCELLED);
    thread->seen[status]++;
    return status == GEMMOE_STATUS_OK;
}

static void *step_batches(void *argument) {
    struct storm_thread *thread = (struct storm_thread *)argument;
    struct storm *storm = thread->storm;
    gemmoe_batch *batch = storm->batches[thread->index / 2];
    gemmoe_batch_info info = GEMMOE_BATCH_INFO_INIT;
    gemmoe_budget budget = GEMMOE_BUDGET_INIT;
    unsigned round, index;
    budget.max_us = 50;
    for (round = 0; round < STORM_ROUNDS; round++) {
        gemmoe_session *sessions[SHARED];
        int32_t statuses[SHARED];
        uint32_t tokens[SHARED];
        /* Each in another order, one of them twice. */
        for (index = 0; index < SHARED; index++) sessions[index] = storm->sessions[(index + thread->index) % SHARED];
        if (round % 4 == 0) sessions[1] = sessions[0];
        if (see(thread, gemmoe_batch_step(batch, sessions, SHARED, round % 2 == 0 ? NULL : &budget, statuses, tokens, NULL,
                                          NULL))) {
            for (index = 0; index < SHARED; index++) see(thread, statuses[index]);
            CHECK(round % 4 != 0 || statuses[0] != GEMMOE_STATUS_OK || statuses[1] == GEMMOE_STATUS_BUSY);
        }
        see(thread, gemmoe_batch_get_info(batch, &info, NULL));
        see(thread, gemmoe_session_push(sessions[round % SHARED], prompt, 3, NULL));
    }
    return NULL;
}

/* Forks what the batches step, and checks that the fork is a session like any other: what it draws is what a session given
 * its tokens draws. */
static void *fork_and_step(void *argument) {
    struct storm_thread *thread = (struct storm_thread *)argument;
    gemmoe_error *error = NULL;
    gemmoe_session *fresh = make_session(model, 2048, CHUNK);
    unsigned round;
    for (round = 0; round < STORM_ROUNDS; round++) {
        gemmoe_session *fork = NULL;
        const uint32_t *tokens = NULL;
        uint32_t drawn, expected;
        size_t count = 0;
        if (!see(thread, gemmoe_session_fork(thread->storm->sessions[round % SHARED], &fork, NULL))) {
            CHECK(fork == NULL);
            continue;
        }
        SUCCEEDS(gemmoe_session_tokens(fork, &tokens, &count, &error));
        SUCCEEDS(gemmoe_session_rewind(fresh, 0, &error));
        SUCCEEDS(gemmoe_session_prefill(fresh, tokens, count, NULL, &error));
        generate(fork, &drawn, 1);
        generate(fresh, &expected, 1);
        CHECK(drawn == expected);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(fork));
    }
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(fresh));
    return NULL;
}

static void *cancel_and_look(void *argument) {
    struct storm_thread *thread = (struct storm_thread *)argument;
    struct storm *storm = thread->storm;
    gemmoe_session_metrics metrics = GEMMOE_SESSION_METRICS_INIT;
    unsigned round;
    for (round = 0; round < STORM_ROUNDS; round++) {
        struct timespec pause = {0, 50000};
        gemmoe_session *session = storm->sessions[round % SHARED];
        if (round % 3 == 0) CHECK(gemmoe_session_cancel(session) == GEMMOE_STATUS_OK);
        if (round % 7 == 0) CHECK(gemmoe_batch_cancel(storm->batches[round % 2]) == GEMMOE_STATUS_OK);
        nanosleep(&pause, NULL);
        see(thread, gemmoe_session_get_metrics(session, &metrics, NULL));
        see(thread, gemmoe_session_rewind(session, 1, NULL));
    }
    return NULL;
}

static void batches_share_sessions(void) {
    static void *(*const tasks[5])(void *) = {step_batches, step_batches, step_batches, fork_and_step, cancel_and_look};
    struct storm storm;
    struct storm_thread threads[5];
    pthread_t handles[5];
    gemmoe_error *error = NULL;
    uint32_t expected[DRAWN], tokens[DRAWN];
    unsigned index, status, sum[16];
    memset(sum, 0, sizeof sum);
    generate_once(model, expected);
    for (index = 0; index < SHARED; index++) {
        storm.sessions[index] = make_session(model, 2048, CHUNK);
        SUCCEEDS(gemmoe_session_prefill(storm.sessions[index], prompt + index, 5, NULL, &error));
    }
    for (index = 0; index < 2; index++) SUCCEEDS(gemmoe_batch_create(model, NULL, &storm.batches[index], &error));
    for (index = 0; index < 5; index++) {
        memset(&threads[index], 0, sizeof threads[index]);
        threads[index].storm = &storm;
        threads[index].index = index;
        CHECK(pthread_create(&handles[index], NULL, tasks[index], &threads[index]) == 0);
    }
    for (index = 0; index < 5; index++) {
        CHECK(pthread_join(handles[index], NULL) == 0);
        for (status = 0; status < 16; status++) sum[status] += threads[index].seen[status];
    }
    printf("batches, forks and cancels: %u OK, %u NEED_MORE, %u BUSY, %u CANCELLED\n", sum[GEMMOE_STATUS_OK],
           sum[GEMMOE_STATUS_NEED_MORE], sum[GEMMOE_STATUS_BUSY], sum[GEMMOE_STATUS_CANCELLED]);
    CHECK(sum[GEMMOE_STATUS_OK] > 0 && sum[GEMMOE_STATUS_BUSY] > 0);
    /* Every one of them is as good as new. */
    for (index = 0; index < 2; index++) {
        RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_clear_cancel(storm.batches[index]));
    }
    for (index = 0; index < SHARED; index++) {
        gemmoe_session *session = storm.sessions[index];
        uint32_t drawn = 0;
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_clear_cancel(session));
        SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
        SUCCEEDS(gemmoe_session_prefill(session, prompt, 5, NULL, &error));
        generate(session, tokens, DRAWN / 2);
        for (drawn = DRAWN / 2; drawn < DRAWN; drawn++) {
            int32_t one = GEMMOE_STATUS_NEED_MORE;
            SUCCEEDS(gemmoe_batch_step(storm.batches[index % 2], &session, 1, NULL, &one, &tokens[drawn], NULL, &error));
            CHECK(one == GEMMOE_STATUS_OK);
        }
        CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    }
    for (index = 0; index < 2; index++) RETURNS(GEMMOE_STATUS_OK, gemmoe_batch_destroy(storm.batches[index]));
}

/* ---- Many sessions, each on its thread: the tokens of each alone. ---- */

struct work {
    uint32_t first;
    uint32_t tokens[30];
};

static void *work_alone(void *argument) {
    struct work *work = (struct work *)argument;
    gemmoe_error *error = NULL;
    gemmoe_session *session = make_session(model, 128, CHUNK);
    SUCCEEDS(gemmoe_session_prefill(session, prompt + work->first, 40, NULL, &error));
    generate(session, work->tokens, 30);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    return NULL;
}

static void sessions_do_not_disturb_each_other(void) {
    struct work alone[6], together[6];
    pthread_t threads[6];
    uint32_t index, round;
    for (index = 0; index < 6; index++) {
        alone[index].first = index * 50;
        work_alone(&alone[index]);
    }
    for (round = 0; round < 5; round++) {
        for (index = 0; index < 6; index++) {
            together[index].first = index * 50;
            CHECK(pthread_create(&threads[index], NULL, work_alone, &together[index]) == 0);
        }
        for (index = 0; index < 6; index++) CHECK(pthread_join(threads[index], NULL) == 0);
        CHECK(memcmp(alone, together, sizeof alone) == 0);
    }
}

/* ---- A prefill cancelled at a random moment. ---- */

struct cancel {
    gemmoe_session *session;
    uint64_t at_ns;
};

static void *cancel_later(void *argument) {
    const struct cancel *cancel = (const struct cancel *)argument;
    while (now_ns() < cancel->at_ns) {
        struct timespec pause = {0, 1000};
        nanosleep(&pause, NULL);
    }
    CHECK(gemmoe_session_cancel(cancel->session) == GEMMOE_STATUS_OK);
    return NULL;
}

/* The token a fresh session draws after the first `count` tokens of the prompt. */
static uint32_t next_token(gemmoe_session *session, size_t count) {
    gemmoe_error *error = NULL;
    uint32_t token;
    SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
    SUCCEEDS(gemmoe_session_prefill(session, prompt, count, NULL, &error));
    generate(session, &token, 1);
    return token;
}

static void a_cancelled_prefill_goes_on_as_if_nothing_had_been(unsigned rounds) {
    gemmoe_error *error = NULL;
    gemmoe_session *fresh = make_session(model, 1024, CHUNK);
    gemmoe_session *session = make_session(model, 1024, CHUNK);
    uint32_t expected[DRAWN], tokens[DRAWN];
    unsigned round, cancelled = 0, partial = 0;
    uint64_t start = now_ns(), whole_ns;
    SUCCEEDS(gemmoe_session_prefill(fresh, prompt, PROMPT, NULL, &error));
    whole_ns = now_ns() - start;
    generate(fresh, expected, DRAWN);
    for (round = 0; round < rounds; round++) {
        gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
        struct cancel cancel;
        pthread_t thread;
        gemmoe_status status;
        const uint32_t *held = NULL;
        size_t count = 0;
        /* Some rounds begin with a part of the prompt already there. */
        size_t before = round % 3 == 0 ? random_bits() % 50 : 0;
        SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
        SUCCEEDS(gemmoe_session_prefill(session, prompt, before, NULL, &error));
        cancel.session = session;
        cancel.at_ns = now_ns() + random_bits() % (whole_ns * 5 / 4);
        CHECK(pthread_create(&thread, NULL, cancel_later, &cancel) == 0);
        status = gemmoe_session_prefill(session, prompt + before, PROMPT - before, NULL, NULL);
        CHECK(pthread_join(thread, NULL) == 0);
        CHECK(status == GEMMOE_STATUS_OK || status == GEMMOE_STATUS_CANCELLED);
        /* It may have come too late: then it waits for the next call, unless it is taken back. */
        CHECK(gemmoe_session_clear_cancel(session) == GEMMOE_STATUS_OK);
        SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
        SUCCEEDS(gemmoe_session_tokens(session, &held, &count, &error));
        CHECK(info.token_count == count && count >= before && count <= PROMPT);
        CHECK(count == 0 || memcmp(held, prompt, count * sizeof *held) == 0);
        CHECK(info.pending_count <= 1);
        CHECK(status == GEMMOE_STATUS_CANCELLED || (count == PROMPT && info.pending_count == 0));
        cancelled += status == GEMMOE_STATUS_CANCELLED;
        partial += count > before && count < PROMPT;
        /* Going on from where it stopped: a step gives what a session of just these tokens gives. */
        if (round % 2 == 0 && count > 0) {
            generate(session, tokens, 1);
            CHECK(tokens[0] == next_token(fresh, count));
            SUCCEEDS(gemmoe_session_rewind(session, count, &error));
        } else if (count == 0) {
            FAILS(GEMMOE_STATUS_NO_LOGITS, gemmoe_session_step(session, NULL, &tokens[0], &error));
        }
        SUCCEEDS(gemmoe_session_prefill(session, prompt + count, PROMPT - count, NULL, &error));
        generate(session, tokens, DRAWN);
        CHECK(memcmp(tokens, expected, sizeof tokens) == 0);
    }
    printf("%u prefills: %u cancelled, %u of them in the middle\n", rounds, cancelled, partial);
    CHECK(cancelled > 0 && partial > 0);

    /* A cancel while nothing runs stops the next call, once. */
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_cancel(session));
    FAILS(GEMMOE_STATUS_CANCELLED, gemmoe_session_step(session, NULL, &tokens[0], &error));
    SUCCEEDS(gemmoe_session_step(session, NULL, &tokens[0], &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(fresh));
}

/* ---- Objects destroyed while others use them. ---- */

static void *step_until_gone(void *argument) {
    gemmoe_session *session = (gemmoe_session *)argument;
    gemmoe_status status = GEMMOE_STATUS_OK;
    uint32_t token;
    while (status == GEMMOE_STATUS_OK) status = gemmoe_session_step(session, NULL, &token, NULL);
    CHECK(status == GEMMOE_STATUS_STALE_HANDLE || status == GEMMOE_STATUS_CONTEXT_FULL);
    return NULL;
}

static void a_session_may_be_destroyed_while_it_works(void) {
    gemmoe_error *error = NULL;
    unsigned round;
    for (round = 0; round < 20; round++) {
        struct timespec pause = {0, 100000};
        gemmoe_session *session = make_session(model, 1024, CHUNK);
        pthread_t thread;
        SUCCEEDS(gemmoe_session_prefill(session, prompt, 3, NULL, &error));
        CHECK(pthread_create(&thread, NULL, step_until_gone, session) == 0);
        nanosleep(&pause, NULL);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
        CHECK(pthread_join(thread, NULL) == 0);
    }
}

int main(int argc, char **argv) {
    uint32_t index;
    CHECK(argc > 2);
    for (index = 0; index < PROMPT; index++) prompt[index] = prompt_token(index);
    model = load_model(argv[1]);
    one_session_takes_one_thread();
    batches_share_sessions();
    sessions_do_not_disturb_each_other();
    a_cancelled_prefill_goes_on_as_if_nothing_had_been((unsigned)atoi(argv[2]));
    a_session_may_be_destroyed_while_it_works();
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    return 0;
}
