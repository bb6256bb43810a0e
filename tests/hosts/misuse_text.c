/* Text, conversations, chat templates, stop strings and grammars that cannot be: each gets its own status, and a session
 * beside them goes on. argv[1] is a model with a tokenizer, argv[2] one without, argv[3] one whose chat template never
 * ends, argv[4] one whose template is cut off, argv[5] one whose template refuses every conversation. */
#include "misuse.h"

static gemmoe_model *model;
static const char *other_directory;

/* Two messages, one struct_size apart. */
static gemmoe_message messages[2];
static void make_messages(void) {
    gemmoe_message message = GEMMOE_MESSAGE_INIT;
    message.role = "user";
    message.text = "hello";
    message.text_bytes = 5;
    messages[0] = message;
    messages[1] = message;
    messages[1].role = "assistant";
}

static gemmoe_status chat_tokenize(const gemmoe_model *of, gemmoe_error **error) {
    make_messages();
    return gemmoe_chat_tokenize(of, messages, 2, 0, &out[0].number, 128, &out[1].size, error);
}

static void text_values(const char *without_tokenizer) {
    gemmoe_error *error = NULL;
    gemmoe_model *silent = load_model(without_tokenizer);
    gemmoe_model_info info = GEMMOE_MODEL_INFO_INIT;
    const uint32_t token = 70, last_bad[3] = {3, 4, 320};
    uint32_t stop = 9;
    static const char *const not_utf8[] = {"\xff", "\xc3", "\xed\xa0\x80", "\xf5\x80\x80\x80", "\xc0\x80"};
    size_t index;
    mark_outputs();
    for (index = 0; index < sizeof not_utf8 / sizeof not_utf8[0]; index++) {
        FAILS(GEMMOE_STATUS_INVALID_UTF8, gemmoe_tokenize(model, not_utf8[index], strlen(not_utf8[index]), 0,
                                                          &out[0].number, 8, &out[1].size, &error));
    }
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_tokenize(model, "a", 1, 4, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_detokenize(model, NULL, 0, 2, (char *)&out[0], 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_NO_TOKENIZER,
          gemmoe_tokenize(silent, "hello", 5, 0, &out[0].number, 128, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_NO_TOKENIZER,
          gemmoe_detokenize(silent, &token, 1, 0, (char *)&out[0], 512, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_NO_TOKENIZER, gemmoe_text_stream_create(silent, (gemmoe_text_stream **)&out[0], &error));
    FAILS(GEMMOE_STATUS_NO_TOKENIZER,
          gemmoe_grammar_create(silent, GEMMOE_GRAMMAR_REGEX, "a", 1, (gemmoe_grammar **)&out[0], &error));
    FAILS(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE,
          gemmoe_detokenize(model, last_bad, 3, 0, (char *)&out[0], 512, &out[1].size, &error));
    CHECK(outputs_untouched());
    SUCCEEDS(gemmoe_model_is_stop_token(model, 0xFFFFFFFF, &stop, &error));
    CHECK(stop == 0);
    SUCCEEDS(gemmoe_model_get_info(silent, &info, &error));
    CHECK(info.has_tokenizer == 0 && info.vocab_size == 320);
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(silent));
    /* NUL is a character like others. */
    SUCCEEDS(gemmoe_tokenize(model, "h\0h", 3, 0, &out[0].number, 128, &out[1].size, &error));
    CHECK(out[1].size == 3);
}

/* ---- Conversations. ---- */

/* Templates that do not end, do not parse, and refuse. The model beside them and its own text go on working. */
static void templates(char **directories) {
    static const gemmoe_status expected[3] = {GEMMOE_STATUS_TEMPLATE_LIMIT, GEMMOE_STATUS_TEMPLATE_SYNTAX,
                                              GEMMOE_STATUS_TEMPLATE_FAILED};
    gemmoe_error *error = NULL;
    size_t index, round;
    for (index = 0; index < 3; index++) {
        gemmoe_model *bad = load_model(directories[index]);
        uint32_t tokens[8];
        size_t count = 0;
        for (round = 0; round < 2; round++) REFUSES(expected[index], chat_tokenize(bad, &error));
        SUCCEEDS(gemmoe_tokenize(bad, "hello", 5, 0, tokens, 8, &count, &error));
        CHECK(count > 0);
        RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(bad));
    }
}


static void conversations(const char *without_tokenizer) {
    static const char *const not_roles[] = {"", "User", "us er", "<bos>", "tool"};
    gemmoe_error *error = NULL;
    gemmoe_model *silent = load_model(without_tokenizer);
    const size_t most = ~(size_t)0;
    union {
        gemmoe_message message;
        unsigned char bytes[sizeof(gemmoe_message) + 16];
    } wide[2];
    uint32_t tokens[64];
    size_t count = 0, needed = 0, index;

    mark_outputs();
    FAILS(GEMMOE_STATUS_NO_TOKENIZER, chat_tokenize(silent, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(silent));
    make_messages();
    FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
          gemmoe_chat_tokenize(model, NULL, 0, 0, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
          gemmoe_chat_tokenize(model, messages, most, 0, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
          gemmoe_chat_tokenize(model, messages, 16385, 0, &out[0].number, 8, &out[1].size, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_chat_tokenize(model, messages, 1, 2, &out[0].number, 8, &out[1].size, &error));
    for (index = 0; index < sizeof not_roles / sizeof not_roles[0]; index++) {
        messages[0].role = not_roles[index];
        FAILS(GEMMOE_STATUS_MESSAGE_VALUE,
              gemmoe_chat_tokenize(model, messages, 1, 0, &out[0].number, 8, &out[1].size, &error));
    }
    messages[0].role = "\xff";
    FAILS(GEMMOE_STATUS_INVALID_UTF8,
          gemmoe_chat_tokenize(model, messages, 1, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].text = "h\xff";
    FAILS(GEMMOE_STATUS_INVALID_UTF8,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].text_bytes = ~(uint64_t)0;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    messages[1].reserved0 = 1;
    FAILS(GEMMOE_STATUS_STRUCT_SIZE,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    make_messages();
    for (index = 0; index < 4; index++) {
        static const uint32_t sizes[4] = {0, 1, sizeof(gemmoe_message) + 8, 0xFFFFFFFF};
        make_messages();
        messages[1].struct_size = sizes[index];
        FAILS(GEMMOE_STATUS_STRUCT_SIZE,
              gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    }
    make_messages();
    messages[1].role = NULL;
    FAILS(GEMMOE_STATUS_NULL_ARGUMENT,
          gemmoe_chat_tokenize(model, messages, 2, 0, &out[0].number, 8, &out[1].size, &error));
    CHECK(outputs_untouched());

    /* What comes out, whatever the distance of the messages. */
    make_messages();
    messages[1].text = "<bos>";
    SUCCEEDS(gemmoe_chat_tokenize(model, messages, 2, GEMMOE_CHAT_ADD_GENERATION_PROMPT, NULL, 0, &needed, &error));
    CHECK(needed > 10 && needed <= 64);
    memset(tokens, MARK, sizeof tokens);
    FAILS(GEMMOE_STATUS_BUFFER_TOO_SMALL,
          gemmoe_chat_tokenize(model, messages, 2, GEMMOE_CHAT_ADD_GENERATION_PROMPT, tokens, needed - 1, &count, &error));
    CHECK(count == needed && tokens[0] == 0xA5A5A5A5u);
    memset(wide, 0, sizeof wide);
    for (index = 0; index < 2; index++) {
        wide[index].message = messages[index];
        wide[index].message.struct_size = sizeof wide[0];
    }
    SUCCEEDS(gemmoe_chat_tokenize(model, &wide[0].message, 2, GEMMOE_CHAT_ADD_GENERATION_PROMPT, tokens, needed, &count,
                                  &error));
    CHECK(count == needed && tokens[0] == 2);
    for (index = 1; index < needed; index++) CHECK(tokens[index] != 2);
    wide[1].message.struct_size = sizeof(gemmoe_message);
    FAILS(GEMMOE_STATUS_STRUCT_SIZE, gemmoe_chat_tokenize(model, &wide[0].message, 2, 0, tokens, 64, &count, &error));
    wide[1].message.struct_size = sizeof wide[1];
    wide[1].bytes[sizeof wide[1] - 1] = 1;
    FAILS(GEMMOE_STATUS_STRUCT_SIZE, gemmoe_chat_tokenize(model, &wide[0].message, 2, 0, tokens, 64, &count, &error));
}

static void expect_text(gemmoe_text_stream *stream, uint32_t token, const char *expected) {
    gemmoe_error *error = NULL;
    const char *text = NULL;
    size_t bytes = 0;
    SUCCEEDS(gemmoe_text_stream_push(stream, token, &text, &bytes, &error));
    CHECK(bytes == strlen(expected) && memcmp(text, expected, bytes) == 0);
}

static void expect_stop(gemmoe_text_stream *stream, uint32_t reason, size_t index) {
    gemmoe_error *error = NULL;
    uint32_t found_reason = 99;
    size_t found_index = 99;
    SUCCEEDS(gemmoe_text_stream_stopped(stream, &found_reason, &found_index, &error));
    CHECK(found_reason == reason && found_index == index);
}

static void stops(void) {
    gemmoe_error *error = NULL;
    gemmoe_text_stream *stream = NULL;
    const char *strings[65];
    static char longest[4098];
    const char *text = NULL;
    size_t bytes = 0, index;

    SUCCEEDS(gemmoe_text_stream_create(model, &stream, &error));
    for (index = 0; index < 65; index++) strings[index] = "never";
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, 65, &error));
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, ~(size_t)0, &error));
    SUCCEEDS(gemmoe_text_stream_set_stop_strings(stream, strings, 64, &error));
    memset(longest, 'x', 4097);
    strings[1] = longest;
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));
    strings[1] = "";
    FAILS(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));
    strings[1] = "\xff";
    FAILS(GEMMOE_STATUS_INVALID_UTF8, gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));

    REFUSES(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE,
            gemmoe_text_stream_push(stream, 320, (const char **)&out[0], &out[1].size, &error));
    REFUSES(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE,
            gemmoe_text_stream_push(stream, 0xFFFFFFFF, (const char **)&out[0], &out[1].size, &error));

    /* Byte token b of the sample is 6 + b; 1 is EOS. */
    strings[1] = "bc";
    SUCCEEDS(gemmoe_text_stream_set_stop_strings(stream, strings, 2, &error));
    for (index = 0; index < 2; index++) {
        expect_stop(stream, GEMMOE_STOPPED_NO, 0);
        expect_text(stream, 6 + 'a', "a");
        expect_text(stream, 6 + 'b', "");
        expect_text(stream, 6 + 'c', "");
        expect_stop(stream, GEMMOE_STOPPED_STRING, 1);
        expect_text(stream, 6 + 'a', "");
        SUCCEEDS(gemmoe_text_stream_finish(stream, &text, &bytes, &error));
        CHECK(bytes == 0);
    }
    expect_text(stream, 6 + 'b', "");
    expect_text(stream, 1, "");
    expect_stop(stream, GEMMOE_STOPPED_TOKEN, 0);
    expect_text(stream, 6 + 'c', "");
    SUCCEEDS(gemmoe_text_stream_finish(stream, &text, &bytes, &error));
    CHECK(bytes == 1 && text[0] == 'b');
    SUCCEEDS(gemmoe_text_stream_set_stop_strings(stream, NULL, 0, &error));
    expect_text(stream, 6 + 'b', "b");
    RETURNS(GEMMOE_STATUS_OK, gemmoe_text_stream_destroy(stream));
}

/* ---- Grammars. ---- */

static void grammars(void) {
    static const struct {
        uint32_t kind;
        const char *source;
        gemmoe_status status;
    } rows[] = {
        {0, "a", GEMMOE_STATUS_INVALID_ARGUMENT},
        {4, "a", GEMMOE_STATUS_INVALID_ARGUMENT},
        {0xFFFFFFFF, "a", GEMMOE_STATUS_INVALID_ARGUMENT},
        {GEMMOE_GRAMMAR_REGEX, "(", GEMMOE_STATUS_GRAMMAR_SYNTAX},
        {GEMMOE_GRAMMAR_REGEX, "[z-a]", GEMMOE_STATUS_GRAMMAR_SYNTAX},
        {GEMMOE_GRAMMAR_REGEX, "\xff", GEMMOE_STATUS_INVALID_UTF8},
        {GEMMOE_GRAMMAR_JSON_SCHEMA, "", GEMMOE_STATUS_GRAMMAR_SYNTAX},
        {GEMMOE_GRAMMAR_JSON_SCHEMA, "{", GEMMOE_STATUS_GRAMMAR_SYNTAX},
        {GEMMOE_GRAMMAR_JSON_SCHEMA, "{\"type\": \"nonsense\"}", GEMMOE_STATUS_GRAMMAR_SYNTAX},
        {GEMMOE_GRAMMAR_JSON_SCHEMA, "{\"$ref\": \"http://example.com/x\"}", GEMMOE_STATUS_GRAMMAR_SYNTAX},
        {GEMMOE_GRAMMAR_LARK, "", GEMMOE_STATUS_GRAMMAR_SYNTAX},
        {GEMMOE_GRAMMAR_LARK, "start: nowhere", GEMMOE_STATUS_GRAMMAR_SYNTAX},
    };
    static const uint32_t fits[2] = {6 + 'a', 6 + 'b'}, strays[2] = {6 + 'a', 6 + 'c'}, one_too_many[1] = {320};
    gemmoe_error *error = NULL;
    gemmoe_grammar *grammar = NULL;
    gemmoe_session_info info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_session *session = make_session(model, 64, 0);
    static char longest[(1 << 20) + 1];
    float hidden[40], logs[2];
    /* The prompt, a token that follows and one that does not. */
    uint32_t strays_after[3] = {0, 6 + 'a', 6 + 'c'}, token = 0, held;
    size_t row;
    for (row = 0; row < sizeof rows / sizeof rows[0]; row++) {
        REFUSES(rows[row].status, gemmoe_grammar_create(model, rows[row].kind, rows[row].source, strlen(rows[row].source),
                                                        (gemmoe_grammar **)&out[0], &error));
    }
    memset(longest, 'a', sizeof longest);
    REFUSES(GEMMOE_STATUS_GRAMMAR_LIMIT, gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, longest, sizeof longest,
                                                               (gemmoe_grammar **)&out[0], &error));

    /* One of another model, even if it is the same directory; the one the session has stays. */
    SUCCEEDS(gemmoe_session_prefill(session, strays, 1, NULL, &error));
    SUCCEEDS(gemmoe_grammar_create(model, GEMMOE_GRAMMAR_REGEX, "ab", 2, &grammar, &error));
    SUCCEEDS(gemmoe_session_set_grammar(session, grammar, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_grammar_destroy(grammar));
    REFUSES(GEMMOE_STATUS_STALE_HANDLE, gemmoe_session_set_grammar(session, grammar, &error));
    {
        gemmoe_model *other = load_model(other_directory);
        SUCCEEDS(gemmoe_grammar_create(other, GEMMOE_GRAMMAR_REGEX, "x", 1, &grammar, &error));
        RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(other));
        REFUSES(GEMMOE_STATUS_INVALID_ARGUMENT, gemmoe_session_set_grammar(session, grammar, &error));
        RETURNS(GEMMOE_STATUS_OK, gemmoe_grammar_destroy(grammar));
    }
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.grammar_state == GEMMOE_GRAMMAR_OPEN && info.token_count == 1);

    /* Tokens that do not follow: nothing is appended, whatever would. */
    held = info.token_count;
    REFUSES(GEMMOE_STATUS_GRAMMAR_VIOLATION, gemmoe_session_push(session, strays, 2, &error));
    REFUSES(GEMMOE_STATUS_GRAMMAR_VIOLATION, gemmoe_session_prefill(session, strays, 2, NULL, &error));
    REFUSES(GEMMOE_STATUS_GRAMMAR_VIOLATION, gemmoe_session_score(session, strays, 2, &out[0].real, &error));
    REFUSES(GEMMOE_STATUS_GRAMMAR_VIOLATION,
            gemmoe_session_embed(session, strays, 2, GEMMOE_POOLING_LAST, &out[0].real, 40, &error));
    REFUSES(GEMMOE_STATUS_TOKEN_OUT_OF_RANGE, gemmoe_session_push(session, one_too_many, 1, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.grammar_state == GEMMOE_GRAMMAR_OPEN && info.token_count == held && info.pending_count == 0);
    SUCCEEDS(gemmoe_session_push(session, fits, 2, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.grammar_state == GEMMOE_GRAMMAR_COMPLETE && info.token_count == held + 2);
    /* The end is reached: only stop tokens are drawn, again and again. */
    for (row = 0; row < 3; row++) {
        uint32_t stop = 0;
        SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
        SUCCEEDS(gemmoe_model_is_stop_token(model, token, &stop, &error));
        CHECK(stop == 1);
    }
    /* What the grammar allows can be scored and embedded, and taken back. */
    SUCCEEDS(gemmoe_session_rewind(session, held, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.grammar_state == GEMMOE_GRAMMAR_OPEN);
    SUCCEEDS(gemmoe_session_score(session, fits, 2, logs, &error));
    CHECK(logs[0] < 0 && logs[1] < 0);
    SUCCEEDS(gemmoe_session_rewind(session, held, &error));
    SUCCEEDS(gemmoe_session_embed(session, fits, 2, GEMMOE_POOLING_LAST, hidden, 40, &error));
    /* Where the grammar refuses what is set, what was in common stays. */
    strays_after[0] = strays[0];
    REFUSES(GEMMOE_STATUS_GRAMMAR_VIOLATION,
            gemmoe_session_set_tokens(session, strays_after, 3, &out[0].size, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.token_count == held + 1 && info.grammar_state == GEMMOE_GRAMMAR_OPEN);
    /* A grammar and a bias that leave no token between them. */
    SUCCEEDS(gemmoe_session_rewind(session, held, &error));
    {
        gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;
        const float never = -infinity();
        sampling.logit_bias_tokens = fits;
        sampling.logit_bias_values = &never;
        sampling.logit_bias_count = 1;
        SUCCEEDS(gemmoe_session_set_sampling(session, &sampling, &error));
        REFUSES(GEMMOE_STATUS_NOT_A_NUMBER, gemmoe_session_step(session, NULL, &out[0].number, &error));
        settle(session);
        SUCCEEDS(gemmoe_session_step(session, NULL, &token, &error));
        CHECK(token == fits[0]);
    }
    SUCCEEDS(gemmoe_session_set_grammar(session, NULL, &error));
    SUCCEEDS(gemmoe_session_get_info(session, &info, &error));
    CHECK(info.grammar_state == GEMMOE_GRAMMAR_NONE);
    SUCCEEDS(gemmoe_session_push(session, strays, 2, &error));
    RETURNS(GEMMOE_STATUS_OK, gemmoe_session_destroy(session));
}

int main(int argc, char **argv) {
    CHECK(argc > 5);
    other_directory = argv[1];
    model = load_model(argv[1]);
    make_twins(model);
    text_values(argv[2]);
    TWINS_AGREE();
    conversations(argv[2]);
    templates(argv + 3);
    TWINS_AGREE();
    stops();
    TWINS_AGREE();
    grammars();
    TWINS_AGREE();
    destroy_twins();
    RETURNS(GEMMOE_STATUS_OK, gemmoe_model_destroy(model));
    return 0;
}
