/* Trains the routers of the model directory argv[1] on the data beside the recipe argv[2], in the directory argv[3]: prepares, steps,
 * saves and goes on, stops, writes a patch and a model, and generates with both. Prints the losses. */
#include "check.h"
#include <pthread.h>
#include <sys/stat.h>

static const char *directory, *here;
static char recipe[4096];
static size_t recipe_bytes;

static char *beside(const char *name) {
    static char paths[8][4096];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", here, name);
    return path;
}

static size_t read_file(const char *path, char *bytes, size_t capacity) {
    FILE *file = fopen(path, "rb");
    size_t count;
    CHECK(file != NULL);
    count = fread(bytes, 1, capacity, file);
    CHECK(count < capacity);
    fclose(file);
    return count;
}

static int same_files(const char *one, const char *other) {
    static char a[1 << 20], b[1 << 20];
    size_t count = read_file(one, a, sizeof a);
    return count == read_file(other, b, sizeof b) && memcmp(a, b, count) == 0;
}

static gemmoe_trainer *start(const gemmoe_model *model) {
    gemmoe_error *error = NULL;
    gemmoe_trainer *trainer = NULL;
    SUCCEEDS(gemmoe_trainer_start(model, recipe, recipe_bytes, here, &trainer, &error));
    CHECK(trainer != NULL);
    return trainer;
}

static void *step_for_ever(void *trainer) {
    gemmoe_error *error = NULL;
    static gemmoe_status status;
    status = gemmoe_trainer_step((gemmoe_trainer *)trainer, UINT64_MAX, NULL, &error);
    gemmoe_error_destroy(error);
    return &status;
}

/* A second thread gets BUSY or is first; polling and cancelling go on; what was cancelled goes on later. */
static void from_two_threads(gemmoe_trainer *trainer) {
    gemmoe_error *error = NULL;
    gemmoe_trainer_metrics metrics = GEMMOE_TRAINER_METRICS_INIT;
    pthread_t thread;
    void *result = NULL;
    gemmoe_status status, first;
    uint64_t taken;
    CHECK(pthread_create(&thread, NULL, step_for_ever, trainer) == 0);
    do {
        SUCCEEDS(gemmoe_trainer_poll(trainer, &metrics, &error));
    } while (metrics.steps == 0);
    first = gemmoe_trainer_checkpoint(trainer, beside("busy.checkpoint"), NULL);
    CHECK(first == GEMMOE_STATUS_BUSY || first == GEMMOE_STATUS_OK);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_cancel(trainer));
    CHECK(pthread_join(thread, &result) == 0);
    status = *(gemmoe_status *)result;
    CHECK(status == GEMMOE_STATUS_CANCELLED || status == GEMMOE_STATUS_OK);
    if (status == GEMMOE_STATUS_OK) {
        /* It came after the last step: the next evaluation hears it. */
        FAILS(GEMMOE_STATUS_CANCELLED, gemmoe_trainer_evaluate(trainer, &metrics, &error));
    }
    SUCCEEDS(gemmoe_trainer_step(trainer, UINT64_MAX, NULL, &error));
    SUCCEEDS(gemmoe_trainer_step(trainer, 1, &taken, &error));
    CHECK(taken == 0);
}

int main(int argc, char **argv) {
    gemmoe_error *error = NULL;
    gemmoe_model *model, *trained;
    gemmoe_trainer *trainer, *resumed, *third, *none;
    gemmoe_trainer_plan plan = GEMMOE_TRAINER_PLAN_INIT;
    gemmoe_trainer_metrics metrics = GEMMOE_TRAINER_METRICS_INIT, before = GEMMOE_TRAINER_METRICS_INIT;
    double shares[8], sum;
    size_t count, index;
    uint64_t taken = 0;
    uint32_t plain[8], patched[8], written[8], again[8];

    CHECK(argc > 3);
    directory = argv[1];
    here = argv[3];
    recipe_bytes = read_file(argv[2], recipe, sizeof recipe);

    /* The recipe's own model, and one that the host has. */
    trainer = start(NULL);
    SUCCEEDS(gemmoe_trainer_wait(trainer, &plan, &error));
    CHECK(plan.steps == 6 && plan.rows == 12 && plan.held_out_rows == 4 && plan.skipped_rows == 0);
    CHECK(plan.num_hidden_layers == 2 && plan.num_local_experts == 4 && plan.parameters == 2 * 4 * 40);
    CHECK(plan.is_preference == 0 && plan.targets > 0 && plan.tokens > plan.targets && plan.workspace_bytes > 0);
    SUCCEEDS(gemmoe_trainer_get_shares(trainer, NULL, 0, &count, &error));
    CHECK(count == 0);
    SUCCEEDS(gemmoe_trainer_evaluate(trainer, &before, &error));
    CHECK(before.state == GEMMOE_TRAINER_READY && before.steps == 0 && before.total_steps == 6 && before.loss > 0);
    SUCCEEDS(gemmoe_trainer_step(trainer, 2, &taken, &error));
    SUCCEEDS(gemmoe_trainer_poll(trainer, &metrics, &error));
    CHECK(taken == 2 && metrics.steps == 2 && metrics.learning_rate > 0 && metrics.gradient_norm > 0);
    SUCCEEDS(gemmoe_trainer_get_shares(trainer, shares, 8, &count, &error));
    CHECK(count == 8);
    for (sum = 0, index = 0; index < 4; index++) sum += shares[index];
    CHECK(sum > 0.999 && sum < 1.001);
    SUCCEEDS(gemmoe_trainer_checkpoint(trainer, beside("two.checkpoint"), &error));
    SUCCEEDS(gemmoe_trainer_step(trainer, 100, &taken, &error));
    CHECK(taken == 4);
    SUCCEEDS(gemmoe_trainer_write_patch(trainer, beside("whole.patch"), &error));

    /* Gone on from the checkpoint, on a model of the host's, it comes to the same bits. */
    model = load_model(directory);
    resumed = start(model);
    SUCCEEDS(gemmoe_trainer_resume(resumed, beside("two.checkpoint"), &error));
    SUCCEEDS(gemmoe_trainer_step(resumed, UINT64_MAX, &taken, &error));
    CHECK(taken == 4);
    SUCCEEDS(gemmoe_trainer_write_patch(resumed, beside("resumed.patch"), &error));
    CHECK(same_files(beside("whole.patch"), beside("resumed.patch")));
    third = start(model);
    from_two_threads(third);
    SUCCEEDS(gemmoe_trainer_write_patch(third, beside("third.patch"), &error));
    CHECK(same_files(beside("whole.patch"), beside("third.patch")));
    SUCCEEDS(gemmoe_trainer_evaluate(third, &metrics, &error));
    CHECK(metrics.text_loss < before.text_loss);
    printf("held out: %.4f, then %.4f\n", before.text_loss, metrics.text_loss);

    /* The patch on a loaded model, the model that was written, and the model without the patch again. */
    SUCCEEDS(gemmoe_trainer_write_model(trainer, beside("trained"), &error));
    FAILS(GEMMOE_STATUS_ALREADY_EXISTS, gemmoe_trainer_write_model(trainer, beside("trained"), &error));
    generate_once(model, plain);
    SUCCEEDS(gemmoe_model_apply_router_patch(model, beside("whole.patch"), &error));
    generate_once(model, patched);
    SUCCEEDS(gemmoe_model_remove_router_patch(model, &error));
    generate_once(model, again);
    trained = load_model(beside("trained"));
    generate_once(trained, written);
    CHECK(memcmp(patched, written, sizeof patched) == 0 && memcmp(plain, again, sizeof plain) == 0);

    /* What cannot be prepared says so as often as it is asked; what still prepares can be destroyed. */
    SUCCEEDS(gemmoe_trainer_start(model, recipe, recipe_bytes, "/nowhere/at/all", &none, &error));
    FAILS(GEMMOE_STATUS_FILE_NOT_FOUND, gemmoe_trainer_wait(none, &plan, &error));
    FAILS(GEMMOE_STATUS_FILE_NOT_FOUND, gemmoe_trainer_step(none, 1, &taken, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(none));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(start(NULL)));

    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    SUCCEEDS(gemmoe_trainer_evaluate(resumed, &metrics, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(trainer));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(resumed));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_trainer_destroy(third));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(trained));
    return 0;
}
