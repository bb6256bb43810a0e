/* gemmoe: run GemMoE, the mixture of experts made from Gemma, inside any host.
 * Generated from src/ffi by cbindgen; `make header` writes it. Licence: MIT OR Apache-2.0.
 *
 * In the order a host meets them: check gemmoe_abi_version; load a model directory (gemmoe_model_load, or
 * gemmoe_load_start to poll and cancel); make a session; gemmoe_tokenize or gemmoe_chat_tokenize a prompt and
 * gemmoe_session_prefill it;
 * gemmoe_session_step tokens out, through a gemmoe_text_stream if they are to be read; destroy everything in any order.
 *
 * Status and errors. Every call that can fail returns a gemmoe_status and writes its outputs only on success. The last
 * parameter, `error_out`, may be NULL; else it receives NULL on success and a gemmoe_error owned by the host otherwise.
 * "Handle errors" below are NULL_ARGUMENT, STALE_HANDLE, WRONG_HANDLE_TYPE, FORKED and POISONED; any call may also
 * return INTERNAL, after a defect of the library was caught.
 *
 * Ownership. What a function hands out through `*_out` as a gemmoe_ object belongs to the host, which destroys it with the
 * function of its type. Objects keep what they need alive: destroy them in any order. "Borrowed" memory belongs to the
 * library. Pointers that are not said to be borrowed or owned are only used during the call.
 *
 * Threads. "Any thread" functions may be called by many threads at once. Others take one thread at a time per object; a
 * second one gets BUSY and nothing happens. A child forked while objects are alive gets FORKED, without an error object, for
 * every call that can fail: load after forking.
 *
 * Structs begin with struct_size: initialise them with their GEMMOE_..._INIT macro. It must be what the memory really has: a
 * larger one is accepted, bytes unknown to the library must be 0 on the way in and are set to 0 on the way out.
 */

#ifndef GEMMOE_H
#define GEMMOE_H

#include <stddef.h>
#include <stdint.h>

/**
 * The ABI this header describes. A library is compatible if `gemmoe_abi_version()` returns the same number.
 */
#define GEMMOE_ABI_VERSION 1

/**
 * gemmoe_load_options.flags: follow symbolic links inside the model directory, as a download cache's layout needs.
 * Without it links are refused.
 */
#define GEMMOE_LOAD_FOLLOW_LINKS 1

/**
 * gemmoe_load_options.flags: multiply the embedding by the unrounded square root of hidden_size.
 */
#define GEMMOE_LOAD_UNROUNDED_EMBEDDING_SCALE 2

/**
 * gemmoe_load_options.flags: GeLU by its definition instead of the tanh approximation GemMoE was trained with.
 */
#define GEMMOE_LOAD_EXACT_GELU 4

/**
 * gemmoe_load_options.instructions: the best instruction set the processor has.
 */
#define GEMMOE_INSTRUCTIONS_DETECT 0

/**
 * gemmoe_load_options.instructions: no special instructions.
 */
#define GEMMOE_INSTRUCTIONS_PORTABLE 1

/**
 * gemmoe_load_options.instructions: AVX2, FMA and F16C; INVALID_ARGUMENT where the processor lacks them.
 */
#define GEMMOE_INSTRUCTIONS_AVX2 2

/**
 * gemmoe_load_progress.state: still loading.
 */
#define GEMMOE_LOAD_RUNNING 0

/**
 * gemmoe_load_progress.state: over; gemmoe_load_wait returns at once.
 */
#define GEMMOE_LOAD_OVER 1

/**
 * gemmoe_tokenize flags: put the BOS token in front. The model degrades badly without it.
 */
#define GEMMOE_TOKENIZE_ADD_BOS 1

/**
 * gemmoe_tokenize flags: let markup such as <start_of_turn> become its special token. For trusted text only.
 */
#define GEMMOE_TOKENIZE_PARSE_SPECIAL 2

/**
 * gemmoe_detokenize flags: write special tokens as their markup instead of leaving them out.
 */
#define GEMMOE_DETOKENIZE_KEEP_SPECIAL 1

/**
 * gemmoe_text_stream_stopped reasons: the stream has not stopped.
 */
#define GEMMOE_STOPPED_NO 0

/**
 * gemmoe_text_stream_stopped reasons: a stop token of the model was pushed, see gemmoe_model_is_stop_token.
 */
#define GEMMOE_STOPPED_TOKEN 1

/**
 * gemmoe_text_stream_stopped reasons: a stop string is complete.
 */
#define GEMMOE_STOPPED_STRING 2

/**
 * gemmoe_chat_tokenize flags: end where the model's turn has begun, ready to generate.
 */
#define GEMMOE_CHAT_ADD_GENERATION_PROMPT 1

/**
 * What a call answers. Every C function that can fail returns one of these; 0 is success.
 *
 * Values never change meaning and are never reused within one ABI version.
 */
enum gemmoe_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    /**
     * The call did what it says.
     */
    GEMMOE_STATUS_OK = 0,
    /**
     * An argument has a value the function does not accept.
     */
    GEMMOE_STATUS_INVALID_ARGUMENT = 1,
    /**
     * A required pointer or handle is NULL.
     */
    GEMMOE_STATUS_NULL_ARGUMENT = 2,
    /**
     * The handle's object has been destroyed, or the handle was never made by this library.
     */
    GEMMOE_STATUS_STALE_HANDLE = 3,
    /**
     * The handle belongs to an object of another type.
     */
    GEMMOE_STATUS_WRONG_HANDLE_TYPE = 4,
    /**
     * Another thread is inside a call on the same object; nothing was changed.
     */
    GEMMOE_STATUS_BUSY = 5,
    /**
     * The work was cancelled; the object is usable and says how far it came.
     */
    GEMMOE_STATUS_CANCELLED = 6,
    /**
     * Memory could not be had; nothing was changed.
     */
    GEMMOE_STATUS_OUT_OF_MEMORY = 7,
    /**
     * A defect of this library was caught; the object it happened in is poisoned.
     */
    GEMMOE_STATUS_INTERNAL = 8,
    /**
     * An earlier Internal error left this object unusable; destroy it.
     */
    GEMMOE_STATUS_POISONED = 9,
    /**
     * The process forked after the object was made; objects do not survive a fork.
     */
    GEMMOE_STATUS_FORKED = 10,
    /**
     * A struct's struct_size is too small or impossible, or a field this library does not know is not 0.
     */
    GEMMOE_STATUS_STRUCT_SIZE = 11,
    /**
     * The caller's buffer is too small; the needed length has been written.
     */
    GEMMOE_STATUS_BUFFER_TOO_SMALL = 12,
    /**
     * The operating system refused a thread.
     */
    GEMMOE_STATUS_THREAD_UNAVAILABLE = 13,
    /**
     * Not an error: the time or layer budget is spent. Call again to go on where the work stopped.
     */
    GEMMOE_STATUS_NEED_MORE = 14,
    /**
     * The model directory cannot be opened.
     */
    GEMMOE_STATUS_DIRECTORY_NOT_FOUND = 20,
    /**
     * A file the model needs is not in the directory.
     */
    GEMMOE_STATUS_FILE_NOT_FOUND = 21,
    /**
     * A file name leaves the directory, or the file is a link, a folder, a device or a pipe.
     */
    GEMMOE_STATUS_FILE_NOT_ALLOWED = 22,
    /**
     * A metadata file is larger than the library is willing to parse.
     */
    GEMMOE_STATUS_FILE_TOO_LARGE = 23,
    /**
     * The operating system failed to read a file.
     */
    GEMMOE_STATUS_READ_FAILED = 24,
    /**
     * config.json is not valid JSON, or names a key twice.
     */
    GEMMOE_STATUS_CONFIG_SYNTAX = 30,
    /**
     * A value in config.json is missing, of the wrong type or out of range.
     */
    GEMMOE_STATUS_CONFIG_VALUE = 31,
    /**
     * config.json describes a model this library does not run.
     */
    GEMMOE_STATUS_UNSUPPORTED_MODEL = 32,
    /**
     * model.safetensors.index.json is not valid JSON, or names a key twice.
     */
    GEMMOE_STATUS_INDEX_SYNTAX = 40,
    /**
     * The index and the shards disagree, or a shard's name is not a plain file name.
     */
    GEMMOE_STATUS_INDEX_VALUE = 41,
    /**
     * A safetensors header is malformed.
     */
    GEMMOE_STATUS_HEADER_SYNTAX = 50,
    /**
     * A safetensors header describes bytes that overlap, leave gaps or contradict a shape.
     */
    GEMMOE_STATUS_HEADER_VALUE = 51,
    /**
     * A safetensors file is shorter or longer than its header says.
     */
    GEMMOE_STATUS_FILE_LENGTH = 52,
    /**
     * A tensor the model needs is absent.
     */
    GEMMOE_STATUS_TENSOR_MISSING = 53,
    /**
     * A tensor's shape contradicts config.json.
     */
    GEMMOE_STATUS_TENSOR_SHAPE = 54,
    /**
     * A tensor's element type is not BF16, F16 or F32.
     */
    GEMMOE_STATUS_TENSOR_DTYPE = 55,
    /**
     * A tensor is stored more than once, under one name or in two layouts.
     */
    GEMMOE_STATUS_TENSOR_DUPLICATE = 56,
    /**
     * A tensor of an expert or a layer that config.json does not have.
     */
    GEMMOE_STATUS_TENSOR_UNEXPECTED = 57,
    /**
     * tokenizer.json is not valid JSON, or names a key twice.
     */
    GEMMOE_STATUS_TOKENIZER_SYNTAX = 60,
    /**
     * tokenizer.json is not of the shape Gemma's tokenizer has.
     */
    GEMMOE_STATUS_TOKENIZER_UNSUPPORTED = 61,
    /**
     * A vocabulary entry, merge or token id in tokenizer.json is not usable.
     */
    GEMMOE_STATUS_TOKENIZER_VALUE = 62,
    /**
     * The model directory has no tokenizer.json, so text cannot be used; token ids can.
     */
    GEMMOE_STATUS_NO_TOKENIZER = 63,
    /**
     * Text handed in is not valid UTF-8.
     */
    GEMMOE_STATUS_INVALID_UTF8 = 64,
    /**
     * The tokens would not fit in the session's context.
     */
    GEMMOE_STATUS_CONTEXT_FULL = 70,
    /**
     * A token id is not in the model's vocabulary.
     */
    GEMMOE_STATUS_TOKEN_OUT_OF_RANGE = 71,
    /**
     * The session holds no tokens, or its logits are not available yet.
     */
    GEMMOE_STATUS_NO_LOGITS = 72,
    /**
     * The model produced logits that are all NaN or infinite.
     */
    GEMMOE_STATUS_NOT_A_NUMBER = 73,
    /**
     * A sampling setting is out of range.
     */
    GEMMOE_STATUS_SAMPLING_VALUE = 74,
    /**
     * The memory limit for keys and values, of the session or of the model, would be passed.
     */
    GEMMOE_STATUS_KV_LIMIT = 75,
    /**
     * An expert mask allows no expert, or an expert bias is not a finite number.
     */
    GEMMOE_STATUS_EXPERT_VALUE = 76,
    /**
     * The bytes are not a snapshot, or were damaged.
     */
    GEMMOE_STATUS_SNAPSHOT_DAMAGED = 80,
    /**
     * The snapshot is of a format version this library does not read.
     */
    GEMMOE_STATUS_SNAPSHOT_VERSION = 81,
    /**
     * The snapshot is of another model, or of the same one loaded with other numerical options.
     */
    GEMMOE_STATUS_SNAPSHOT_MODEL = 82,
    /**
     * The grammar, schema or regular expression cannot be compiled.
     */
    GEMMOE_STATUS_GRAMMAR_SYNTAX = 90,
    /**
     * The grammar is too complex: a limit on its size or on the work for one token was reached.
     */
    GEMMOE_STATUS_GRAMMAR_LIMIT = 91,
    /**
     * The token cannot follow under the session's grammar.
     */
    GEMMOE_STATUS_GRAMMAR_VIOLATION = 92,
    /**
     * The chat template cannot be parsed.
     */
    GEMMOE_STATUS_TEMPLATE_SYNTAX = 100,
    /**
     * The chat template failed or refused the messages.
     */
    GEMMOE_STATUS_TEMPLATE_FAILED = 101,
    /**
     * The chat template took too many steps, recursed too deep or wrote too much.
     */
    GEMMOE_STATUS_TEMPLATE_LIMIT = 102,
    /**
     * A message has a role or a text that cannot be used.
     */
    GEMMOE_STATUS_MESSAGE_VALUE = 103,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum gemmoe_status gemmoe_status;
#else
typedef int32_t gemmoe_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * Why a call failed. Made by the failing call, destroyed by the host; never shared with another call.
 */
typedef struct gemmoe_error gemmoe_error;

/**
 * A model being loaded.
 */
typedef struct gemmoe_load gemmoe_load;

/**
 * A loaded model. Any number of threads may use it at once. Sessions keep what they need of it alive.
 */
typedef struct gemmoe_model gemmoe_model;

/**
 * A session. One thread at a time: a second one gets BUSY. gemmoe_session_cancel is the exception.
 */
typedef struct gemmoe_session gemmoe_session;

/**
 * Tokens in, text out, in whole characters: a character whose bytes are spread over tokens comes with its last one.
 * The text ends at a stop token of the model and at the stop strings of the host. For one thread at a time.
 */
typedef struct gemmoe_text_stream gemmoe_text_stream;

/**
 * How to load a model. Initialise with GEMMOE_LOAD_OPTIONS_INIT; zeros are the defaults.
 */
typedef struct gemmoe_load_options {
    /**
     * sizeof(gemmoe_load_options)
     */
    uint32_t struct_size;
    /**
     * GEMMOE_LOAD_ flags.
     */
    uint32_t flags;
    /**
     * Threads that compute, the calling one included; 0 is one per core the process may use, at most 256.
     */
    uint32_t threads;
    /**
     * One of GEMMOE_INSTRUCTIONS_.
     */
    uint32_t instructions;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_load_options;

/**
 * How far a load has come. Initialise with GEMMOE_LOAD_PROGRESS_INIT.
 */
typedef struct gemmoe_load_progress {
    /**
     * sizeof(gemmoe_load_progress)
     */
    uint32_t struct_size;
    /**
     * GEMMOE_LOAD_RUNNING or GEMMOE_LOAD_OVER.
     */
    uint32_t state;
    /**
     * Bytes of weights to read; 0 until the files have been checked.
     */
    uint64_t bytes_total;
    /**
     * Bytes of weights read.
     */
    uint64_t bytes_read;
} gemmoe_load_progress;

/**
 * What a model is and what it takes. Initialise with GEMMOE_MODEL_INFO_INIT.
 */
typedef struct gemmoe_model_info {
    /**
     * sizeof(gemmoe_model_info)
     */
    uint32_t struct_size;
    /**
     * Tokens there are, and logits per position.
     */
    uint32_t vocab_size;
    /**
     * Width of the residual stream.
     */
    uint32_t hidden_size;
    /**
     * Width inside one expert.
     */
    uint32_t intermediate_size;
    /**
     * Layers.
     */
    uint32_t num_hidden_layers;
    /**
     * Query heads.
     */
    uint32_t num_attention_heads;
    /**
     * Key and value heads.
     */
    uint32_t num_key_value_heads;
    /**
     * Width of one head.
     */
    uint32_t head_dim;
    /**
     * Experts per layer; 1 for a dense model.
     */
    uint32_t num_local_experts;
    /**
     * Experts each token is sent to.
     */
    uint32_t num_experts_per_tok;
    /**
     * Longest context the model was made for, in tokens.
     */
    uint32_t max_position_embeddings;
    /**
     * The token in front of every text.
     */
    uint32_t bos_token;
    /**
     * 1 if the directory had a tokenizer, else 0: text functions then return NO_TOKENIZER.
     */
    uint32_t has_tokenizer;
    /**
     * Must not be relied on.
     */
    uint32_t reserved0;
    /**
     * Bytes of weights in memory.
     */
    uint64_t weight_bytes;
    /**
     * Bytes of experts among them.
     */
    uint64_t expert_bytes;
    /**
     * Bytes of the tokenizer, about.
     */
    uint64_t tokenizer_bytes;
    /**
     * Bytes of keys and values a session takes for each token of its context.
     */
    uint64_t kv_bytes_per_token;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_model_info;

/**
 * One message of a conversation. Initialise with GEMMOE_MESSAGE_INIT. All elements of an array have one struct_size.
 */
typedef struct gemmoe_message {
    /**
     * sizeof(gemmoe_message)
     */
    uint32_t struct_size;
    /**
     * Must be 0.
     */
    uint32_t reserved0;
    /**
     * Who speaks: "user", "assistant", "system" or what else the model's template knows. NUL-terminated.
     */
    const char *role;
    /**
     * What is said, UTF-8. No markup in it counts.
     */
    const char *text;
    /**
     * Bytes of text.
     */
    uint64_t text_bytes;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_message;

/**
 * How to make a session. Initialise with GEMMOE_SESSION_OPTIONS_INIT; zeros are the defaults.
 */
typedef struct gemmoe_session_options {
    /**
     * sizeof(gemmoe_session_options)
     */
    uint32_t struct_size;
    /**
     * Tokens the session can hold; memory for all of them is reserved at once. 0 is the model's
     * max_position_embeddings, at most 8192.
     */
    uint32_t context_size;
    /**
     * Most prompt tokens run in one pass; the workspace is sized for it. 0 is 256.
     */
    uint32_t prefill_chunk;
    /**
     * Must be 0.
     */
    uint32_t reserved0;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_session_options;

/**
 * How gemmoe_session_step draws. Initialise with GEMMOE_SAMPLING_INIT, which is greedy. The filters work in the order
 * top_k, top_p, min_p on the untempered distribution; then temperature shapes what is left and one token is drawn.
 */
typedef struct gemmoe_sampling {
    /**
     * sizeof(gemmoe_sampling)
     */
    uint32_t struct_size;
    /**
     * 0 takes the most probable token; above, up to 100, logits are divided by it.
     */
    float temperature;
    /**
     * Keep this many most probable tokens, up to vocab_size; 0 keeps all.
     */
    uint32_t top_k;
    /**
     * Keep the fewest most probable tokens whose probabilities reach this sum, 0 to 1; 0 or 1 keeps all.
     */
    float top_p;
    /**
     * Keep tokens at least this share as probable as the most probable, 0 to 1; 0 keeps all.
     */
    float min_p;
    /**
     * Must be 0.
     */
    uint32_t reserved0;
    /**
     * Equal seeds, logits and positions give equal tokens.
     */
    uint64_t seed;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_sampling;

/**
 * What a session holds and what it takes. Initialise with GEMMOE_SESSION_INFO_INIT.
 */
typedef struct gemmoe_session_info {
    /**
     * sizeof(gemmoe_session_info)
     */
    uint32_t struct_size;
    /**
     * Tokens it can hold.
     */
    uint32_t context_size;
    /**
     * Tokens it holds.
     */
    uint32_t token_count;
    /**
     * Tokens among them that were drawn or given but not yet run through the model.
     */
    uint32_t pending_count;
    /**
     * Bytes of keys and values reserved.
     */
    uint64_t kv_bytes;
    /**
     * Bytes of workspace.
     */
    uint64_t workspace_bytes;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_session_info;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The ABI of the library that is loaded: compare it with GEMMOE_ABI_VERSION. Any thread. Since 0.1.
 */
uint32_t gemmoe_abi_version(void);

/**
 * The library's version, "major.minor.patch". The string is static. Any thread. Since 0.1.
 */
const char *gemmoe_version(void);

/**
 * The name of a status, such as "TENSOR_SHAPE"; "UNKNOWN" for a number that is none. The string is static.
 * Any thread. Since 0.1.
 */
const char *gemmoe_status_name(int32_t status);

/**
 * The status the failed call returned; the status of the misuse if `error` is not a live error. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_error_status(const struct gemmoe_error *error);

/**
 * A sentence for a person, UTF-8: what was found and what was expected, with file and key. Borrowed from `error`.
 * NULL if `error` is not a live error. Any thread. Since 0.1.
 */
const char *gemmoe_error_text(const struct gemmoe_error *error);

/**
 * The file the error is about, relative to the model directory; NULL if there is none. Borrowed from `error`.
 * Any thread. Since 0.1.
 */
const char *gemmoe_error_file(const struct gemmoe_error *error);

/**
 * The tensor, JSON key, option or parameter the error is about; NULL if there is none. Borrowed from `error`.
 * Any thread. Since 0.1.
 */
const char *gemmoe_error_key(const struct gemmoe_error *error);

/**
 * Destroys an error. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_error_destroy(struct gemmoe_error *error);

/**
 * Starts loading a model directory and returns at once. `directory` is a NUL-terminated path, `options` may be NULL.
 * The load is owned by the host and runs on a thread of its own.
 * Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, THREAD_UNAVAILABLE; what is wrong with the directory comes from
 * gemmoe_load_wait. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_load_start(const char *directory,
                                const struct gemmoe_load_options *options,
                                struct gemmoe_load **load_out,
                                struct gemmoe_error **error_out);

/**
 * How far the load has come. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_load_poll(const struct gemmoe_load *load,
                               struct gemmoe_load_progress *progress_out,
                               struct gemmoe_error **error_out);

/**
 * Asks the load to stop: gemmoe_load_wait then returns CANCELLED within the time of one 16 MiB read.
 * Errors: handle errors. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_load_cancel(const struct gemmoe_load *load);

/**
 * Waits for the load and hands the model over, once; the host owns it. The load stays to be destroyed.
 * Errors: handle errors, BUSY (another thread waits), INVALID_ARGUMENT (the model was handed over before), CANCELLED,
 * and everything that can be wrong with a model directory: codes 20 to 62, OUT_OF_MEMORY. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_load_wait(struct gemmoe_load *load,
                               struct gemmoe_model **model_out,
                               struct gemmoe_error **error_out);

/**
 * Destroys a load, stopping it if it still runs. A model it handed over lives on. NULL is nothing.
 * Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_load_destroy(struct gemmoe_load *load);

/**
 * Loads a model directory and returns when it is loaded: gemmoe_load_start and gemmoe_load_wait in one.
 * Errors: as those two. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_load(const char *directory,
                                const struct gemmoe_load_options *options,
                                struct gemmoe_model **model_out,
                                struct gemmoe_error **error_out);

/**
 * Fills in what the model is. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_get_info(const struct gemmoe_model *model,
                                    struct gemmoe_model_info *info_out,
                                    struct gemmoe_error **error_out);

/**
 * Copies the device's description, UTF-8 without NUL, such as "CPU, 8 threads, avx2". `count_out` receives its length;
 * with `capacity` 0 nothing else is written.
 * Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_device(const struct gemmoe_model *model,
                                  char *text,
                                  size_t capacity,
                                  size_t *count_out,
                                  struct gemmoe_error **error_out);

/**
 * Whether `token` ends a generation: EOS, or the end of a chat turn. `stop_out` receives 1 or 0.
 * Errors: handle errors, NULL_ARGUMENT. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_is_stop_token(const struct gemmoe_model *model,
                                         uint32_t token,
                                         uint32_t *stop_out,
                                         struct gemmoe_error **error_out);

/**
 * Destroys a model. Sessions made from it go on working. NULL is nothing.
 * Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_destroy(struct gemmoe_model *model);

/**
 * Copies the tokens of `text`, `text_bytes` bytes of UTF-8, to `tokens`. `count_out` receives how many there are, also
 * with BUFFER_TOO_SMALL; with `capacity` 0 nothing else is written. Flags: GEMMOE_TOKENIZE_.
 * Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, INVALID_UTF8, NO_TOKENIZER, BUFFER_TOO_SMALL, OUT_OF_MEMORY.
 * Any thread. Since 0.1.
 */
gemmoe_status gemmoe_tokenize(const struct gemmoe_model *model,
                              const char *text,
                              size_t text_bytes,
                              uint32_t flags,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *count_out,
                              struct gemmoe_error **error_out);

/**
 * Copies the text of `token_count` tokens to `text`, valid UTF-8 without NUL. `count_out` receives its length in
 * bytes, also with BUFFER_TOO_SMALL; with `capacity` 0 nothing else is written. Flags: GEMMOE_DETOKENIZE_.
 * Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, TOKEN_OUT_OF_RANGE, NO_TOKENIZER, BUFFER_TOO_SMALL,
 * OUT_OF_MEMORY. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_detokenize(const struct gemmoe_model *model,
                                const uint32_t *tokens,
                                size_t token_count,
                                uint32_t flags,
                                char *text,
                                size_t capacity,
                                size_t *count_out,
                                struct gemmoe_error **error_out);

/**
 * Makes a text stream, owned by the host. The model may be destroyed before it.
 * Errors: handle errors, NULL_ARGUMENT, NO_TOKENIZER. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_text_stream_create(const struct gemmoe_model *model,
                                        struct gemmoe_text_stream **stream_out,
                                        struct gemmoe_error **error_out);

/**
 * Gives a text stream stop strings, `count` of them, NUL-terminated UTF-8, which are copied and replace the earlier
 * ones: the first that is completed ends the text before it. First is the one that ends first, and of those that end
 * together the longest. Text that may become a stop string waits, and comes out when it does not. They count for tokens
 * pushed from now on, and also after gemmoe_text_stream_finish. At most 64 strings of 1 to 4096 bytes.
 * Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, INVALID_UTF8, BUSY, OUT_OF_MEMORY; nothing is changed then.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_text_stream_set_stop_strings(struct gemmoe_text_stream *stream,
                                                  const char *const *strings,
                                                  size_t count,
                                                  struct gemmoe_error **error_out);

/**
 * Whether a text stream has stopped since it was made or finished: `reason_out` receives a GEMMOE_STOPPED_, `index_out`
 * the index of the stop string, 0 where there is none. A stream that has stopped gives no more text from
 * gemmoe_text_stream_push; a stop string itself, and what follows it, is never given.
 * Errors: handle errors, NULL_ARGUMENT, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_text_stream_stopped(const struct gemmoe_text_stream *stream,
                                         uint32_t *reason_out,
                                         size_t *index_out,
                                         struct gemmoe_error **error_out);

/**
 * Adds a token and gives the text that is certain now: `bytes_out` bytes at `text_out`, possibly 0, without NUL,
 * borrowed until the next push or finish on this stream. Special tokens give no text; a stop token of the model stops
 * the stream.
 * Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE, BUSY, OUT_OF_MEMORY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_text_stream_push(struct gemmoe_text_stream *stream,
                                      uint32_t token,
                                      const char **text_out,
                                      size_t *bytes_out,
                                      struct gemmoe_error **error_out);

/**
 * Ends the text: gives what waited, and U+FFFD for an unfinished character; nothing after a stop string. The stream is
 * then as new, with the same stop strings.
 * Errors and borrowing: as gemmoe_text_stream_push. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_text_stream_finish(struct gemmoe_text_stream *stream,
                                        const char **text_out,
                                        size_t *bytes_out,
                                        struct gemmoe_error **error_out);

/**
 * Destroys a text stream. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_text_stream_destroy(struct gemmoe_text_stream *stream);

/**
 * Copies the tokens of a conversation to `tokens`, written as the model's chat template has it: `message_count`
 * messages, at least 1, with BOS in front. Special tokens come from the template only; a message that spells one out
 * gets ordinary characters. The template is chat_template.jinja of the model directory, else chat_template of
 * tokenizer_config.json, else ChatML or Gemma turns, whichever markers the tokenizer has. `count_out` receives how many
 * tokens there are, also with BUFFER_TOO_SMALL; with `capacity` 0 nothing else is written. Flags: GEMMOE_CHAT_.
 * Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, STRUCT_SIZE, INVALID_UTF8, MESSAGE_VALUE, NO_TOKENIZER,
 * TEMPLATE_SYNTAX, TEMPLATE_FAILED, TEMPLATE_LIMIT, what reading the template's file gave (READ_FAILED,
 * FILE_NOT_ALLOWED, FILE_TOO_LARGE, FILE_LENGTH), THREAD_UNAVAILABLE, BUFFER_TOO_SMALL, OUT_OF_MEMORY.
 * Any thread. Since 0.1.
 */
gemmoe_status gemmoe_chat_tokenize(const struct gemmoe_model *model,
                                   const struct gemmoe_message *messages,
                                   size_t message_count,
                                   uint32_t flags,
                                   uint32_t *tokens,
                                   size_t capacity,
                                   size_t *count_out,
                                   struct gemmoe_error **error_out);

/**
 * Makes a session, owned by the host; `options` may be NULL. All memory it will ever need is reserved here. The model
 * may be destroyed before it.
 * Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (context_size past the model's),
 * OUT_OF_MEMORY. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_session_create(const struct gemmoe_model *model,
                                    const struct gemmoe_session_options *options,
                                    struct gemmoe_session **session_out,
                                    struct gemmoe_error **error_out);

/**
 * Sets how tokens are drawn from now on. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, SAMPLING_VALUE, BUSY;
 * the settings are then as before. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_set_sampling(struct gemmoe_session *session,
                                          const struct gemmoe_sampling *sampling,
                                          struct gemmoe_error **error_out);

/**
 * Appends tokens and runs them through the model, so that the logits after the last are ready. With `token_count` 0 it
 * runs what is pending: so logits are had after a rewind, or after a token that was drawn.
 * Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE and CONTEXT_FULL (nothing was appended), CANCELLED (the
 * chunks run so far are kept, the others as if never given; gemmoe_session_get_info tells), BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_prefill(struct gemmoe_session *session,
                                     const uint32_t *tokens,
                                     size_t token_count,
                                     struct gemmoe_error **error_out);

/**
 * Produces one token: runs what is pending, draws the next token, appends it and gives it out. Stop tokens are drawn
 * like others: ask gemmoe_model_is_stop_token.
 * Errors: handle errors, NULL_ARGUMENT, NO_LOGITS (no tokens yet), CONTEXT_FULL, NOT_A_NUMBER, CANCELLED (the next
 * step goes on where this one stopped), BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_step(struct gemmoe_session *session, uint32_t *token_out, struct gemmoe_error **error_out);

/**
 * Gives the logits after the last token that was run: after a step, those its token was drawn from. `count_out`
 * receives vocab_size. Borrowed until the next call that changes the session.
 * Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_logits(const struct gemmoe_session *session,
                                    const float **logits_out,
                                    size_t *count_out,
                                    struct gemmoe_error **error_out);

/**
 * Writes the `capacity` most probable next tokens and the natural logarithms of their probabilities, most probable
 * first. `count_out` receives how many were written: `capacity` or vocab_size, whichever is less.
 * Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, NOT_A_NUMBER, OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_top_log_probabilities(const struct gemmoe_session *session,
                                                   uint32_t *tokens,
                                                   float *log_probabilities,
                                                   size_t capacity,
                                                   size_t *count_out,
                                                   struct gemmoe_error **error_out);

/**
 * Gives the experts the last token that was run was sent to in `layer`, and their weights, which sum to 1, highest
 * first. `count_out` receives num_experts_per_tok. Borrowed until the next call that changes the session.
 * Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, INVALID_ARGUMENT (no such layer), BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_routes(const struct gemmoe_session *session,
                                    uint32_t layer,
                                    const uint32_t **experts_out,
                                    const float **weights_out,
                                    size_t *count_out,
                                    struct gemmoe_error **error_out);

/**
 * Gives the tokens the session holds, prompt and drawn ones. Borrowed until the next call that changes the session.
 * Errors: handle errors, NULL_ARGUMENT, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_tokens(const struct gemmoe_session *session,
                                    const uint32_t **tokens_out,
                                    size_t *count_out,
                                    struct gemmoe_error **error_out);

/**
 * Keeps the first `token_count` tokens. What follows is bit for bit what a session given only those would produce. If
 * tokens were given up, the last one kept is pending and its logits are not ready before the next prefill or step.
 * Errors: handle errors, INVALID_ARGUMENT (more than it holds), BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_rewind(struct gemmoe_session *session,
                                    size_t token_count,
                                    struct gemmoe_error **error_out);

/**
 * Fills in what the session holds. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_get_info(const struct gemmoe_session *session,
                                      struct gemmoe_session_info *info_out,
                                      struct gemmoe_error **error_out);

/**
 * Stops the call in progress on this session, which returns CANCELLED when the pieces of work in flight are done: about
 * 100 microseconds each in a step, a few milliseconds in a prefill with the default prefill_chunk, longer with a larger
 * one. While no call is in progress, stops the next prefill or step.
 * Errors: handle errors. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_session_cancel(const struct gemmoe_session *session);

/**
 * Takes back a cancel that has not stopped anything yet. Errors: handle errors. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_session_clear_cancel(const struct gemmoe_session *session);

/**
 * Destroys a session; a call in progress on another thread is finished first by that thread. NULL is nothing.
 * Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_session_destroy(struct gemmoe_session *session);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GEMMOE_H */

/* Initialisers: all defaults. */
#define GEMMOE_LOAD_OPTIONS_INIT { sizeof(gemmoe_load_options), 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_LOAD_PROGRESS_INIT { sizeof(gemmoe_load_progress), 0, 0, 0 }
#define GEMMOE_MODEL_INFO_INIT \
    { sizeof(gemmoe_model_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_MESSAGE_INIT { sizeof(gemmoe_message), 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_SESSION_OPTIONS_INIT { sizeof(gemmoe_session_options), 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_SESSION_INFO_INIT { sizeof(gemmoe_session_info), 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_SAMPLING_INIT { sizeof(gemmoe_sampling), 0.0f, 0, 1.0f, 0.0f, 0, 0, { 0, 0, 0, 0 } }
