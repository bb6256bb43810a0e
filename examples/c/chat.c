/* Continues a prompt with a GemMoE model and shows how it went.
 *
 *   chat MODEL_DIR [PROMPT [MAX_NEW [TEMPERATURE [SEED]]]]
 *
 * Everything a host needs: load with progress, tokenize, prefill, step, stream text, read the router, handle errors.
 */
#define _POSIX_C_SOURCE 199309L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gemmoe.h"

static double seconds_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* Prints why a call failed; the error is the host's to destroy. */
static int failed(const char *what, gemmoe_status status, gemmoe_error *error)
{
    const char *text = gemmoe_error_text(error);
    fprintf(stderr, "chat: %s: %s: %s\n", what, gemmoe_status_name(status), text != NULL ? text : "");
    gemmoe_error_destroy(error);
    return 1;
}

/* Loads on the library's thread and polls, as a host with a window to draw would. */
static gemmoe_status load(const char *directory, gemmoe_model **model, gemmoe_error **error)
{
    gemmoe_load *job = NULL;
    gemmoe_load_progress progress = GEMMOE_LOAD_PROGRESS_INIT;
    const struct timespec pause = { 0, 20 * 1000 * 1000 };
    gemmoe_status status = gemmoe_load_start(directory, NULL, &job, error);
    if (status != GEMMOE_STATUS_OK) {
        return status;
    }
    do {
        nanosleep(&pause, NULL);
        if (gemmoe_load_poll(job, &progress, NULL) != GEMMOE_STATUS_OK) {
            break;
        }
        if (progress.bytes_total > 1000000000) {
            fprintf(stderr, "\rloading %3.0f %%", 100.0 * (double)progress.bytes_read / (double)progress.bytes_total);
        }
    } while (progress.state == GEMMOE_LOAD_RUNNING);
    if (progress.bytes_total > 1000000000) {
        fprintf(stderr, "\n");
    }
    status = gemmoe_load_wait(job, model, error);
    gemmoe_load_destroy(job);
    return status;
}

/* Counts the experts the last token was sent to, over all layers. */
static void count_routes(const gemmoe_session *session, const gemmoe_model_info *info, unsigned long *counts)
{
    uint32_t layer;
    for (layer = 0; layer < info->num_hidden_layers; layer++) {
        const uint32_t *experts = NULL;
        const float *weights = NULL;
        size_t count = 0, choice;
        if (gemmoe_session_routes(session, layer, &experts, &weights, &count, NULL) == GEMMOE_STATUS_OK) {
            for (choice = 0; choice < count; choice++) {
                counts[experts[choice]]++;
            }
        }
    }
}

static void print_shares(const gemmoe_model_info *info, const unsigned long *counts)
{
    unsigned long total = 0;
    uint32_t expert;
    for (expert = 0; expert < info->num_local_experts; expert++) {
        total += counts[expert];
    }
    for (expert = 0; expert < info->num_local_experts && total > 0; expert++) {
        double share = (double)counts[expert] / (double)total;
        int length = (int)(share * 40.0 + 0.5);
        printf("  expert %u %5.1f %% %.*s\n", (unsigned)expert, 100.0 * share, length,
               "########################################");
    }
}

static int generate(gemmoe_model *model, const char *prompt, unsigned long max_new, const gemmoe_sampling *sampling)
{
    gemmoe_error *error = NULL;
    gemmoe_session *session = NULL;
    gemmoe_text_stream *stream = NULL;
    gemmoe_model_info info = GEMMOE_MODEL_INFO_INIT;
    gemmoe_status status;
    uint32_t *tokens = NULL, token = 0, stop = 0;
    unsigned long *counts = NULL, produced = 0;
    size_t token_count = 0, bytes = 0;
    const char *text = NULL;
    double started, first = 0.0, finished;
    int result = 1;

    gemmoe_model_get_info(model, &info, NULL);
    status = gemmoe_tokenize(model, prompt, strlen(prompt), GEMMOE_TOKENIZE_ADD_BOS, NULL, 0, &token_count, &error);
    if (status != GEMMOE_STATUS_OK) {
        return failed("tokenize", status, error);
    }
    tokens = (uint32_t *)malloc(token_count * sizeof *tokens);
    counts = (unsigned long *)calloc(info.num_local_experts, sizeof *counts);
    if (tokens == NULL || counts == NULL) {
        fprintf(stderr, "chat: out of memory\n");
        goto done;
    }
    gemmoe_tokenize(model, prompt, strlen(prompt), GEMMOE_TOKENIZE_ADD_BOS, tokens, token_count, &token_count, NULL);

    status = gemmoe_session_create(model, NULL, &session, &error);
    if (status == GEMMOE_STATUS_OK) {
        status = gemmoe_session_set_sampling(session, sampling, &error);
    }
    if (status == GEMMOE_STATUS_OK) {
        status = gemmoe_text_stream_create(model, &stream, &error);
    }
    if (status != GEMMOE_STATUS_OK) {
        failed("session", status, error);
        goto done;
    }

    printf("%s", prompt);
    fflush(stdout);
    started = seconds_now();
    status = gemmoe_session_prefill(session, tokens, token_count, NULL, &error);
    if (status != GEMMOE_STATUS_OK) {
        failed("prefill", status, error);
        goto done;
    }
    while (produced < max_new && !stop) {
        status = gemmoe_session_step(session, NULL, &token, &error);
        if (status == GEMMOE_STATUS_CONTEXT_FULL) {
            gemmoe_error_destroy(error);
            break;
        }
        if (status != GEMMOE_STATUS_OK) {
            failed("step", status, error);
            goto done;
        }
        if (++produced == 1) {
            first = seconds_now();
        }
        gemmoe_text_stream_push(stream, token, &text, &bytes, NULL);
        fwrite(text, 1, bytes, stdout);
        fflush(stdout);
        count_routes(session, &info, counts);
        gemmoe_model_is_stop_token(model, token, &stop, NULL);
    }
    gemmoe_text_stream_finish(stream, &text, &bytes, NULL);
    fwrite(text, 1, bytes, stdout);
    finished = seconds_now();

    printf("\n\n  %lu prompt tokens, first new token after %.1f ms\n", (unsigned long)token_count,
           produced > 0 ? (first - started) * 1e3 : 0.0);
    if (produced > 1) {
        printf("  %lu new tokens, %.0f tokens/s\n", produced, (double)(produced - 1) / (finished - first));
    }
    print_shares(&info, counts);
    result = 0;

done:
    free(counts);
    free(tokens);
    gemmoe_text_stream_destroy(stream);
    gemmoe_session_destroy(session);
    return result;
}

int main(int argc, char **argv)
{
    gemmoe_error *error = NULL;
    gemmoe_model *model = NULL;
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
    gemmoe_status status;
    int result;

    if (argc < 2) {
        fprintf(stderr, "usage: chat MODEL_DIR [PROMPT [MAX_NEW [TEMPERATURE [SEED]]]]\n");
        return 2;
    }
    if (gemmoe_abi_version() != GEMMOE_ABI_VERSION) {
        fprintf(stderr, "chat: the library has ABI %u, this program was built for %u\n",
                (unsigned)gemmoe_abi_version(), (unsigned)GEMMOE_ABI_VERSION);
        return 1;
    }
    status = load(argv[1], &model, &error);
    if (status != GEMMOE_STATUS_OK) {
        return failed(argv[1], status, error);
    }
    sampling.temperature = argc > 4 ? (float)atof(argv[4]) : 0.0f;
    sampling.top_k = sampling.temperature > 0.0f ? 40 : 0;
    sampling.seed = argc > 5 ? strtoul(argv[5], NULL, 10) : 0;
    result = generate(model, argc > 2 ? argv[2] : "Once upon a time", argc > 3 ? strtoul(argv[3], NULL, 10) : 100,
                      &sampling);
    gemmoe_model_destroy(model);
    return result;
}
