/* Opens and closes the shared library again and again, with a model and a step each time; leaves no thread behind.
 * argv[1] is a model, argv[2] the library. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <dirent.h>
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "gemmoe.h"

#define CHECK(condition)                                                            \
    do {                                                                            \
        if (!(condition)) {                                                         \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                \
        }                                                                           \
    } while (0)

/* Copies a function's address: C has no cast from an object pointer to a function pointer. */
#define FIND(library, type, name)                 \
    type name = NULL;                             \
    do {                                          \
        void *address = dlsym(library, #name);    \
        CHECK(address != NULL);                   \
        memcpy(&name, &address, sizeof address);  \
    } while (0)

typedef gemmoe_status (*load_function)(const char *, const gemmoe_load_options *, gemmoe_model **, gemmoe_error **);
typedef gemmoe_status (*create_function)(const gemmoe_model *, const gemmoe_session_options *, gemmoe_session **,
                                         gemmoe_error **);
typedef gemmoe_status (*prefill_function)(gemmoe_session *, const uint32_t *, size_t, const gemmoe_budget *,
                                          gemmoe_error **);
typedef gemmoe_status (*step_function)(gemmoe_session *, const gemmoe_budget *, uint32_t *, gemmoe_error **);
typedef gemmoe_status (*destroy_session_function)(gemmoe_session *);
typedef gemmoe_status (*destroy_model_function)(gemmoe_model *);

static int threads(void) {
    DIR *directory = opendir("/proc/self/task");
    int count = 0;
    CHECK(directory != NULL);
    while (readdir(directory) != NULL) count++;
    closedir(directory);
    return count - 2;
}

static uint32_t open_use_close(const char *model_directory, const char *library_path) {
    static const uint32_t prompt[3] = {3, 4, 5};
    gemmoe_load_options options = GEMMOE_LOAD_OPTIONS_INIT;
    void *library = dlopen(library_path, RTLD_NOW | RTLD_LOCAL);
    gemmoe_model *model = NULL;
    gemmoe_session *session = NULL;
    uint32_t token = 0xFFFFFFFF;
    if (library == NULL) fprintf(stderr, "%s\n", dlerror());
    CHECK(library != NULL);
    {
        FIND(library, load_function, gemmoe_model_load);
        FIND(library, create_function, gemmoe_session_create);
        FIND(library, prefill_function, gemmoe_session_prefill);
        FIND(library, step_function, gemmoe_session_step);
        FIND(library, destroy_session_function, gemmoe_session_destroy);
        FIND(library, destroy_model_function, gemmoe_model_destroy);
        options.threads = 4;
        CHECK(gemmoe_model_load(model_directory, &options, &model, NULL) == GEMMOE_STATUS_OK);
        CHECK(gemmoe_session_create(model, NULL, &session, NULL) == GEMMOE_STATUS_OK);
        CHECK(gemmoe_session_prefill(session, prompt, 3, NULL, NULL) == GEMMOE_STATUS_OK);
        CHECK(gemmoe_session_step(session, NULL, &token, NULL) == GEMMOE_STATUS_OK);
        CHECK(threads() == 4);
        CHECK(gemmoe_model_destroy(model) == GEMMOE_STATUS_OK);
        CHECK(gemmoe_session_destroy(session) == GEMMOE_STATUS_OK);
    }
    CHECK(dlclose(library) == 0);
    return token;
}

int main(int argc, char **argv) {
    uint32_t first = 0;
    int round, waits;
    CHECK(argc > 2);
    CHECK(threads() == 1);
    for (round = 0; round < 20; round++) {
        uint32_t token = open_use_close(argv[1], argv[2]);
        if (round == 0) first = token;
        CHECK(token == first);
        /* A thread that was joined is in the list for a moment still. */
        for (waits = 0; waits < 1000 && threads() != 1; waits++) {
            struct timespec pause = {0, 1000000};
            nanosleep(&pause, NULL);
        }
        CHECK(threads() == 1);
    }
    return 0;
}
