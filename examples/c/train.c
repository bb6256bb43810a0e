/* Trains the routers of a GemMoE as a recipe says, and writes a router patch.
 *
 *   train RECIPE.toml PATCH
 *
 * What a host needs beside the calls that train: progress from the numbers of a step, errors, and where the experts' work went.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gemmoe.h"

static int failed(const char *what, gemmoe_status status, gemmoe_error *error)
{
    const char *text = gemmoe_error_text(error);
    fprintf(stderr, "train: %s: %s: %s\n", what, gemmoe_status_name(status), text != NULL ? text : "");
    gemmoe_error_destroy(error);
    return 1;
}

/* The text of a file; NULL if it cannot be read. */
static char *read_text(const char *path, size_t *bytes)
{
    static char text[1 << 16];
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return NULL;
    }
    *bytes = fread(text, 1, sizeof text, file);
    fclose(file);
    return text;
}

/* The directory of a file, where the recipe's relative paths begin. */
static const char *directory_of(const char *path)
{
    static char directory[4096];
    const char *end = strrchr(path, '/');
    size_t bytes = end == NULL ? 0 : (size_t)(end - path);
    if (end == NULL || bytes >= sizeof directory) {
        return ".";
    }
    memcpy(directory, path, bytes);
    return bytes == 0 ? "/" : directory;
}

/* The share of choices each expert got, over all layers. */
static void print_shares(const gemmoe_trainer *trainer, const gemmoe_trainer_plan *plan)
{
    const size_t experts = plan->num_local_experts, count = experts * plan->num_hidden_layers;
    double *shares = (double *)calloc(count, sizeof *shares);
    size_t found, expert, index;
    if (shares != NULL && gemmoe_trainer_get_shares(trainer, shares, count, &found, NULL) == GEMMOE_STATUS_OK && found == count) {
        for (expert = 0; expert < experts; expert++) {
            double sum = 0.0;
            for (index = expert; index < count; index += experts) {
                sum += shares[index];
            }
            printf("  expert %lu  %4.1f %%\n", (unsigned long)expert, 100.0 * sum / plan->num_hidden_layers);
        }
    }
    free(shares);
}

static int train(gemmoe_trainer *trainer, const char *patch)
{
    gemmoe_error *error = NULL;
    gemmoe_trainer_plan plan = GEMMOE_TRAINER_PLAN_INIT;
    gemmoe_trainer_metrics metrics = GEMMOE_TRAINER_METRICS_INIT;
    uint64_t taken;
    gemmoe_status status = gemmoe_trainer_wait(trainer, &plan, &error);
    if (status != GEMMOE_STATUS_OK) {
        return failed("preparing", status, error);
    }
    printf("%llu rows, %llu steps, %llu numbers to train\n", (unsigned long long)plan.rows, (unsigned long long)plan.steps,
           (unsigned long long)plan.parameters);
    do {
        status = gemmoe_trainer_step(trainer, 10, &taken, &error);
        if (status != GEMMOE_STATUS_OK) {
            return failed("training", status, error);
        }
        if (taken > 0 && gemmoe_trainer_poll(trainer, &metrics, NULL) == GEMMOE_STATUS_OK) {
            printf("step %llu of %llu: loss %.4f, balance %.3f\n", (unsigned long long)metrics.steps,
                   (unsigned long long)metrics.total_steps, metrics.text_loss, metrics.balance);
        }
    } while (taken > 0);
    print_shares(trainer, &plan);
    if (plan.held_out_rows > 0) {
        status = gemmoe_trainer_evaluate(trainer, &metrics, &error);
        if (status != GEMMOE_STATUS_OK) {
            return failed("evaluating", status, error);
        }
        printf("held out: loss %.4f\n", metrics.text_loss);
    }
    status = gemmoe_trainer_write_patch(trainer, patch, &error);
    if (status != GEMMOE_STATUS_OK) {
        return failed(patch, status, error);
    }
    printf("written to %s\n", patch);
    return 0;
}

int main(int argc, char **argv)
{
    gemmoe_error *error = NULL;
    gemmoe_trainer *trainer = NULL;
    gemmoe_status status;
    size_t bytes = 0;
    char *recipe;
    int result;

    if (argc != 3) {
        fprintf(stderr, "train: expected a recipe and the file to write: train RECIPE.toml PATCH\n");
        return 2;
    }
    recipe = read_text(argv[1], &bytes);
    if (recipe == NULL) {
        fprintf(stderr, "train: %s cannot be read\n", argv[1]);
        return 1;
    }
    /* No model of the host's: the recipe's is loaded. */
    status = gemmoe_trainer_start(NULL, recipe, bytes, directory_of(argv[1]), &trainer, &error);
    if (status != GEMMOE_STATUS_OK) {
        return failed(argv[1], status, error);
    }
    result = train(trainer, argv[2]);
    gemmoe_trainer_destroy(trainer);
    return result;
}
