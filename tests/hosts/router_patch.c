/* Router patches as a host uses them: applied from a file and from bytes while sessions go on, refused where they are damaged or
 * another model's, taken off again. argv[1] is a model, argv[2] a patch for it, argv[3] a patch for other gates, argv[4] a
 * file cut off in the middle. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <pthread.h>

#include "check.h"

#define TOKENS 8
#define ROUNDS 200

static gemmoe_model *model;

static unsigned char *read_file(const char *path, size_t *count) {
    FILE *file = fopen(path, "rb");
    unsigned char *bytes;
    long length;
    CHECK(file != NULL && fseek(file, 0, SEEK_END) == 0);
    length = ftell(file);
    CHECK(length > 0 && fseek(file, 0, SEEK_SET) == 0);
    bytes = (unsigned char *)malloc((size_t)length);
    CHECK(bytes != NULL && fread(bytes, 1, (size_t)length, file) == (size_t)length);
    fclose(file);
    *count = (size_t)length;
    return bytes;
}

static int alike(const uint32_t *a, const uint32_t *b) {
    return memcmp(a, b, TOKENS * sizeof *a) == 0;
}

static void *generate_meanwhile(void *unused) {
    gemmoe_session *session = make_session(model, 64, 0);
    gemmoe_error *error = NULL;
    size_t round;
    uint32_t token;
    const uint32_t prompt[3] = {5, 6, 7};
    (void)unused;
    for (round = 0; round < ROUNDS; round++) {
        SUCCEEDS(gemmoe_session_rewind(session, 0, &error));
        SUCCEEDS(gemmoe_session_prefill(session, prompt, 3, NULL, &error));
        SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
    }
    return session;
}

/* Once nothing changes any more, sessions that ran meanwhile show what fresh ones show. */
static void threads(const char *patch) {
    pthread_t workers[2];
    gemmoe_error *error = NULL;
    gemmoe_session *sessions[2];
    size_t index, round;
    for (index = 0; index < 2; index++) CHECK(pthread_create(&workers[index], NULL, generate_meanwhile, NULL) == 0);
    for (round = 0; round < ROUNDS; round++) {
        SUCCEEDS(gemmoe_model_apply_router_patch(model, patch, &error));
        SUCCEEDS(gemmoe_model_remove_router_patch(model, &error));
    }
    for (index = 0; index < 2; index++) {
        void *session = NULL;
        CHECK(pthread_join(workers[index], &session) == 0);
        sessions[index] = (gemmoe_session *)session;
    }
    for (index = 0; index < 2; index++) {
        gemmoe_session *fresh = make_session(model, 64, 0);
        const float *logits, *expected;
        const uint32_t *tokens;
        size_t count;
        SUCCEEDS(gemmoe_session_tokens(sessions[index], &tokens, &count, &error));
        SUCCEEDS(gemmoe_session_prefill(fresh, tokens, count, NULL, &error));
        SUCCEEDS(gemmoe_session_prefill(sessions[index], NULL, 0, NULL, &error));
        SUCCEEDS(gemmoe_session_logits(fresh, &expected, &count, &error));
        SUCCEEDS(gemmoe_session_logits(sessions[index], &logits, &count, &error));
        CHECK(memcmp(logits, expected, count * sizeof *logits) == 0);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(fresh));
        RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(sessions[index]));
    }
}

int main(int argc, char **argv) {
    gemmoe_error *error = NULL;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_session *session, *restored = NULL;
    uint32_t stored[TOKENS], patched[TOKENS], found[TOKENS];
    const float *logits;
    unsigned char *bytes, *snapshot;
    size_t count, snapshot_count, at;
    CHECK(argc == 5);
    model = load_model(argv[1]);
    generate_once(model, stored);
    session = make_session(model, 64, 0);
    SUCCEEDS(gemmoe_session_prefill(session, stored, TOKENS, NULL, &error));

    SUCCEEDS(gemmoe_model_apply_router_patch(model, argv[2], &error));
    generate_once(model, patched);
    CHECK(!alike(stored, patched));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.pending_count == TOKENS && info.token_count == TOKENS);
    FAILS(GEMMOE_STATUS_NO_LOGITS, gemmoe_session_logits(session, &logits, &count, &error));
    SUCCEEDS(gemmoe_session_prefill(session, NULL, 0, NULL, &error));
    SUCCEEDS(gemmoe_session_logits(session, &logits, &count, &error));

    /* A snapshot under the patch, for the patch alone. */
    SUCCEEDS(gemmoe_session_snapshot(session, NULL, 0, &snapshot_count, &error));
    snapshot = (unsigned char *)malloc(snapshot_count);
    CHECK(snapshot != NULL);
    SUCCEEDS(gemmoe_session_snapshot(session, snapshot, snapshot_count, &snapshot_count, &error));
    SUCCEEDS(gemmoe_model_remove_router_patch(model, &error));
    FAILS(GEMMOE_STATUS_SNAPSHOT_MODEL,
          gemmoe_session_restore(model, snapshot, snapshot_count, NULL, &restored, &error));
    generate_once(model, found);
    CHECK(alike(found, stored));
    SUCCEEDS(gemmoe_model_remove_router_patch(model, &error));

    bytes = read_file(argv[2], &count);
    SUCCEEDS(gemmoe_model_apply_router_patch_bytes(model, bytes, count, &error));
    generate_once(model, found);
    CHECK(alike(found, patched));
    SUCCEEDS(gemmoe_session_restore(model, snapshot, snapshot_count, NULL, &restored, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(restored));

    /* What is refused leaves the patch in force. */
    FAILS(GEMMOE_STATUS_PATCH_MODEL, gemmoe_model_apply_router_patch(model, argv[3], &error));
    CHECK(gemmoe_model_apply_router_patch(model, argv[4], &error) == GEMMOE_STATUS_PATCH_DAMAGED);
    CHECK(error != NULL && strcmp(gemmoe_error_file(error), argv[4]) == 0);
    FAILS(GEMMOE_STATUS_PATCH_DAMAGED, GEMMOE_STATUS_PATCH_DAMAGED);
    FAILS(GEMMOE_STATUS_PATCH_DAMAGED, gemmoe_model_apply_router_patch(model, argv[1], &error));
    FAILS(GEMMOE_STATUS_FILE_NOT_FOUND, gemmoe_model_apply_router_patch(model, "/nowhere/at/all", &error));
    FAILS(GEMMOE_STATUS_FILE_NOT_FOUND, gemmoe_model_apply_router_patch(model, "", &error));
    FAILS(GEMMOE_STATUS_PATCH_DAMAGED, gemmoe_model_apply_router_patch_bytes(model, NULL, 0, &error));
    for (at = 0; at < count; at += 1 + count / 64) {
        FAILS(GEMMOE_STATUS_PATCH_DAMAGED, gemmoe_model_apply_router_patch_bytes(model, bytes, at, &error));
    }
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_model_apply_router_patch_bytes(model, bytes, ~(size_t)0, &error));
    bytes[count - 1] ^= 1;
    FAILS(GEMMOE_STATUS_PATCH_DAMAGED, gemmoe_model_apply_router_patch_bytes(model, bytes, count, &error));
    generate_once(model, found);
    CHECK(alike(found, patched));

    threads(argv[2]);
    generate_once(model, found);
    CHECK(alike(found, stored));

    /* The session outlives the model, and the gates it was last run under. */
    SUCCEEDS(gemmoe_model_apply_router_patch(model, argv[2], &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    SUCCEEDS(gemmoe_session_step(session, NULL, found, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
    free(bytes);
    free(snapshot);
    printf("patched\n");
    return 0;
}
