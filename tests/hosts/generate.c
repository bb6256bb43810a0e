/* The smallest whole host: load, generate, and text through a stream; prints the tokens. */
#include "check.h"

int main(int argc, char **argv) {
    gemmoe_error *error = NULL;
    gemmoe_model *model;
    gemmoe_text_stream *stream = NULL;
    uint32_t tokens[8], stop = 2;
    size_t index, bytes = 0;
    const char *text = NULL;

    CHECK(argc > 1);
    model = load_model(argv[1]);
    generate_once(model, tokens);
    SUCCEEDS(gemmoe_text_stream_create(model, &stream, &error));
    for (index = 0; index < 8; index++) {
        printf("%u ", (unsigned)tokens[index]);
        SUCCEEDS(gemmoe_text_stream_push(stream, tokens[index], &text, &bytes, &error));
        SUCCEEDS(gemmoe_model_is_stop_token(model, tokens[index], &stop, &error));
        CHECK(stop < 2);
    }
    SUCCEEDS(gemmoe_text_stream_finish(stream, &text, &bytes, &error));
    printf("\n");
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy(stream));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    return 0;
}
