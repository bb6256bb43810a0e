/* Every function of trainers with every kind of wrong handle, with NULL, with structs of other versions, with recipes and files that are none:
 * each returns its documented status, writes nothing it should not, and the trainer goes on. Called as train.c is. */
#include "misuse.h"

static char recipe[4096];
static size_t recipe_bytes;
static gemmoe_model *model;
static gemmoe_trainer *live, *stale;

/* Each function with otherwise good arguments. */
static gemmoe_status trainer_wait(void *handle, gemmoe_error **error) {
    return gemmoe_trainer_wait((gemmoe_trainer *)handle, NULL, error);
}
static gemmoe_status trainer_step(void *handle, gemmoe_error **error) {
    return gemmoe_trainer_step((gemmoe_trainer *)handle, 1, &out[0].aligned[0], error);
}
static gemmoe_status trainer_evaluate(void *handle, gemmoe_error **error) {
    gemmoe_trainer_metrics metrics = GEMMOE_TRAINER_METRICS_INIT;
    return gemmoe_trainer_evaluate((gemmoe_trainer *)handle, &metrics, error);
}
static gemmoe_status trainer_poll(void *handle, gemmoe_error **error) {
    gemmoe_trainer_metrics metrics = GEMMOE_TRAINER_METRICS_INIT;
    return gemmoe_trainer_poll((gemmoe_trainer *)handle, &metrics, error);
}
static gemmoe_status trainer_shares(void *handle, gemmoe_error **error) {
    return gemmoe_trainer_get_shares((gemmoe_trainer *)handle, &out[0].exact, 1, &out[1].size, error);
}
static gemmoe_status trainer_checkpoint(void *handle, gemmoe_error **error) {
    return gemmoe_trainer_checkpoint((gemmoe_trainer *)handle, "/nowhere/at/all/file", error);
}
static gemmoe_status trainer_resume(void *handle, gemmoe_error **error) {
    return gemmoe_trainer_resume((gemmoe_trainer *)handle, "/nowhere/at/all/file", error);
}
static gemmoe_status trainer_write_patch(void *handle, gemmoe_error **error) {
    return gemmoe_trainer_write_patch((gemmoe_trainer *)handle, "/nowhere/at/all/file", error);
}
static gemmoe_status trainer_write_model(void *handle, gemmoe_error **error) {
    return gemmoe_trainer_write_model((gemmoe_trainer *)handle, "/nowhere/at/all/directory", error);
}
static gemmoe_status trainer_start(void *handle, gemmoe_error **error) {
    /* NULL is the recipe's own model, which is no misuse. */
    if (handle == NULL) return gemmoe_trainer_start(NULL, recipe, recipe_bytes, NULL, (gemmoe_trainer **)&out[0], error);
    return gemmoe_trainer_start((gemmoe_model *)handle, recipe, recipe_bytes, "/", (gemmoe_trainer **)&out[0], error);
}

static void wrong_handles(void) {
    static gemmoe_status (*const calls[])(void *, gemmoe_error **) = {
        trainer_wait, trainer_step, trainer_evaluate, trainer_poll, trainer_shares, trainer_checkpoint,
        trainer_resume, trainer_write_patch, trainer_write_model, trainer_start,
    };
    gemmoe_error *error = NULL;
    size_t index, trial;
    for (index = 0; index < sizeof calls / sizeof *calls; index++) {
        int is_start = calls[index] == trainer_start;
        REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, calls[index](NULL, &error));
        REFUSES(is_start ? GEMMOE_STATUS_WRONG_HANDLE_TYPE : GEMMOE_STATUS_STALE_HANDLE, calls[index](stale, &error));
        REFUSES(GEMMOE_STATUS_WRONG_HANDLE_TYPE, calls[index](is_start ? (void *)live : (void *)model, &error));
        for (trial = 0; trial < 100; trial++) {
            void *made_up = (void *)(uintptr_t)(random_bits() | 1u << 19);
            gemmoe_status status;
            mark_outputs();
            status = calls[index](made_up, NULL);
            CHECK(status == GEMMOE_STATUS_STALE_HANDLE || status == GEMMOE_STATUS_WRONG_HANDLE_TYPE);
            CHECK(outputs_untouched());
        }
    }
    RETURNS(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_cancel(NULL));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_trainer_cancel(stale));
    RETURNS(GEMMOE_STATUS_STALE_HANDLE, gemmoe_trainer_destroy(stale));
    RETURNS(GEMMOE_STATUS_WRONG_HANDLE_TYPE, gemmoe_trainer_destroy((gemmoe_trainer *)model));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(NULL));
}

static void wrong_arguments(const char *here) {
    gemmoe_error *error = NULL;
    gemmoe_trainer **trainer = (gemmoe_trainer **)&out[0];
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_start(model, NULL, 5, here, trainer, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_start(model, recipe, recipe_bytes, NULL, trainer, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_start(model, recipe, recipe_bytes, here, NULL, &error));
    REFUSES(GEMMOE_STATUS_RECIPE_SYNTAX, gemmoe_trainer_start(model, "a = ", 4, here, trainer, &error));
    REFUSES(GEMMOE_STATUS_RECIPE_VALUE, gemmoe_trainer_start(model, "a = 1", 5, here, trainer, &error));
    REFUSES(GEMMOE_STATUS_RECIPE_VALUE, gemmoe_trainer_start(model, NULL, 0, here, trainer, &error));
    REFUSES(GEMMOE_STATUS_INVALID_UTF8, gemmoe_trainer_start(model, "\xff", 1, here, trainer, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_evaluate(live, NULL, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_poll(live, NULL, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_get_shares(live, NULL, 8, &out[1].size, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_get_shares(live, &out[0].exact, 8, NULL, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_checkpoint(live, NULL, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_resume(live, NULL, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_write_patch(live, NULL, &error));
    REFUSES(GEMMOE_STATUS_NULL_ARGUMENT, gemmoe_trainer_write_model(live, NULL, &error));
    REFUSES(GEMMOE_STATUS_WRITE_FAILED, gemmoe_trainer_checkpoint(live, "/nowhere/at/all/file", &error));
    REFUSES(GEMMOE_STATUS_WRITE_FAILED, gemmoe_trainer_write_patch(live, "/nowhere/at/all/file", &error));
    REFUSES(GEMMOE_STATUS_WRITE_FAILED, gemmoe_trainer_write_model(live, "/nowhere/at/all/directory", &error));
    REFUSES(GEMMOE_STATUS_READ_FAILED, gemmoe_trainer_resume(live, "/nowhere/at/all/file", &error));
}

/* Sizes of structs: impossible ones, the first version's, and a later version's with and without something in its tail. */
static void other_versions(void) {
    union {
        gemmoe_trainer_metrics metrics;
        gemmoe_trainer_plan plan;
        unsigned char bytes[1024];
    } padded;
    static const uint32_t impossible[] = {0, 4, 143, 5000, 0xFFFFFFFF};
    gemmoe_error *error = NULL;
    size_t index;
    for (index = 0; index < sizeof impossible / sizeof *impossible; index++) {
        memset(&padded, MARK, sizeof padded);
        padded.metrics.struct_size = impossible[index];
        FAILS(GEMMOE_STATUS_STRUCT_SIZE, gemmoe_trainer_poll(live, &padded.metrics, &error));
        FAILS(GEMMOE_STATUS_STRUCT_SIZE, gemmoe_trainer_evaluate(live, &padded.metrics, &error));
        FAILS(GEMMOE_STATUS_STRUCT_SIZE, gemmoe_trainer_wait(live, &padded.plan, &error));
        CHECK(padded.bytes[4] == MARK && padded.bytes[sizeof padded - 1] == MARK);
    }
    memset(&padded, MARK, sizeof padded);
    padded.metrics.struct_size = sizeof padded.metrics + 64;
    SUCCEEDS(gemmoe_trainer_poll(live, &padded.metrics, &error));
    CHECK(padded.bytes[sizeof padded.metrics + 63] == 0 && padded.bytes[sizeof padded.metrics + 64] == MARK);
    memset(&padded, MARK, sizeof padded);
    padded.plan.struct_size = sizeof padded.plan + 64;
    SUCCEEDS(gemmoe_trainer_wait(live, &padded.plan, &error));
    CHECK(padded.bytes[sizeof padded.plan + 63] == 0 && padded.bytes[sizeof padded.plan + 64] == MARK);
}

int main(int argc, char **argv) {
    gemmoe_error *error = NULL;
    gemmoe_trainer_metrics metrics = GEMMOE_TRAINER_METRICS_INIT;
    FILE *file;
    uint64_t taken;
    double shares[7];
    size_t count;
    CHECK(argc > 3);
    file = fopen(argv[2], "rb");
    CHECK(file != NULL);
    recipe_bytes = fread(recipe, 1, sizeof recipe, file);
    fclose(file);
    model = load_model(argv[1]);
    SUCCEEDS(gemmoe_trainer_start(model, recipe, recipe_bytes, argv[3], &live, &error));
    SUCCEEDS(gemmoe_trainer_start(model, recipe, recipe_bytes, argv[3], &stale, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(stale));
    SUCCEEDS(gemmoe_trainer_wait(live, NULL, &error));

    wrong_handles();
    wrong_arguments(argv[3]);
    other_versions();

    /* A model or anything else is no checkpoint; too little room for the shares is told. */
    FAILS(GEMMOE_STATUS_SNAPSHOT_DAMAGED, gemmoe_trainer_resume(live, argv[2], &error));
    SUCCEEDS(gemmoe_trainer_step(live, 0, &taken, &error));
    CHECK(taken == 0);
    SUCCEEDS(gemmoe_trainer_step(live, 1, NULL, &error));
    FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL, gemmoe_trainer_get_shares(live, shares, 7, &count, &error));
    SUCCEEDS(gemmoe_trainer_poll(live, &metrics, &error));
    CHECK(metrics.steps == 1 && metrics.total_steps == 6);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(live));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    return 0;
}
