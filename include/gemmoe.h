/* gemmoe: run GemMoE, the mixture of experts made from Gemma, inside any host.
 * Generated from src/ffi by cbindgen; `make header` writes it. Licence: MIT OR Apache-2.0.
 *
 * In the order a host meets them: check gemmoe_abi_version; load a model directory (gemmoe_model_load, or
 * gemmoe_load_start to poll and cancel); make a session; gemmoe_tokenize or gemmoe_chat_tokenize a prompt and
 * gemmoe_session_prefill it;
 * gemmoe_session_step tokens out, through a gemmoe_text_stream if they are to be read; destroy everything in any order.
 *
 * Status and errors. Every call that can fail returns a gemmoe_status and writes its outputs only on success. The last
 * parameter, `error_out`, may be NULL; else it receives NULL with OK and NEED_MORE, which is no error, and a gemmoe_error
 * owned by the host otherwise.
 * "Handle errors" below are NULL_ARGUMENT, STALE_HANDLE, WRONG_HANDLE_TYPE, FORKED and POISONED; any call may also
 * return INTERNAL, after a defect of the library was caught. An array that is misaligned or longer than memory can be is
 * INVALID_ARGUMENT.
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
/* Initialisers: all defaults. */
#define GEMMOE_LOAD_OPTIONS_INIT \
    { sizeof(gemmoe_load_options), 0, 0, 0, 0, 0, 0, NULL, NULL, 0, 0, 0, 0, 0, 0, 0, NULL, NULL, { 0, 0, 0, 0 } }
#define GEMMOE_DEVICE_INFO_INIT { sizeof(gemmoe_device_info), 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_LOAD_PROGRESS_INIT { sizeof(gemmoe_load_progress), 0, 0, 0 }
#define GEMMOE_MIX_OPTIONS_INIT { sizeof(gemmoe_mix_options), 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_MIX_PLAN_INIT { sizeof(gemmoe_mix_plan), 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_TRAINER_PLAN_INIT \
    { sizeof(gemmoe_trainer_plan), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_TRAINER_METRICS_INIT \
    { sizeof(gemmoe_trainer_metrics), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_MODEL_INFO_INIT \
    { sizeof(gemmoe_model_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_RESIDENCY_INIT { sizeof(gemmoe_residency), 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_MESSAGE_INIT { sizeof(gemmoe_message), 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_SESSION_OPTIONS_INIT { sizeof(gemmoe_session_options), 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_SESSION_INFO_INIT { sizeof(gemmoe_session_info), 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_MEMORY_PLAN_INIT \
    { sizeof(gemmoe_memory_plan), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_BUDGET_INIT { sizeof(gemmoe_budget), 0, 0, { 0, 0 } }
#define GEMMOE_SAMPLING_INIT \
    { sizeof(gemmoe_sampling), 0.0f, 0, 1.0f, 0.0f, 1.0f, 0.0f, 0.0f, 0, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_ROUTE_ARRAYS_INIT { sizeof(gemmoe_route_arrays), 0, 0, 0, 0, 0 }
#define GEMMOE_SESSION_METRICS_INIT \
    { sizeof(gemmoe_session_metrics), 0, 0, 0, 0, 0, 0, 0, 0, 0, { 0 }, 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_BATCH_OPTIONS_INIT { sizeof(gemmoe_batch_options), 0, 0, 0, 0, 0, { 0, 0, 0, 0 } }
#define GEMMOE_BATCH_INFO_INIT { sizeof(gemmoe_batch_info), 0, 0, 0.0, { 0, 0, 0, 0 } }


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
 * gemmoe_load_options.flags: keep each of the library's own threads on a processor of its own, among those the loading
 * thread may use; one of them is left to the calling thread, which is never pinned. INVALID_ARGUMENT where there are fewer
 * processors than threads, and on systems that cannot (all but Linux).
 */
#define GEMMOE_LOAD_PIN_THREADS 8

/**
 * gemmoe_load_options.flags: map the matrices of a directory that `gemmoe quantize` wrote instead of reading them. Loading
 * leaves out the copy and processes share the memory, but weights are read from the disk when they are first needed. The files must not change as long as the model, or a session of it, lives: whoever changes them changes
 * results, and whoever cuts them off kills this process. What is stored row by row is read as ever.
 */
#define GEMMOE_LOAD_MAP 16

/**
 * gemmoe_load_options.flags: on a GPU, give a sequence the same bits whatever else is in its batch and however its prompt is cut.
 * Batches of more than 8 tokens, 3 with int8 or int4 weights, prompts above all, then do without tensor cores, which round
 * activations to the dtype of the weights, and in attention to that of keys and values. On the CPU it is always so.
 */
#define GEMMOE_LOAD_EXACT 32

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
 * gemmoe_load_options.instructions: AVX2 and AVX-VNNI; INVALID_ARGUMENT as above.
 */
#define GEMMOE_INSTRUCTIONS_AVX_VNNI 3

/**
 * gemmoe_load_options.instructions: AVX-512 with F, BW, DQ, VL and VNNI; INVALID_ARGUMENT as above. Where the processor has
 * AVX-512 BF16 too, activations are rounded to bf16 before they meet bf16 weights, which is twice as fast in prefill; the others
 * keep them in f32.
 */
#define GEMMOE_INSTRUCTIONS_AVX512 4

/**
 * gemmoe_load_options.device: the CPU. Later versions may choose a GPU where there is one.
 */
#define GEMMOE_DEVICE_DEFAULT 0

/**
 * gemmoe_load_options.device: the CPU.
 */
#define GEMMOE_DEVICE_CPU 1

/**
 * gemmoe_load_options.device: the NVIDIA GPU number device_index; NO_DEVICE where there is no such.
 */
#define GEMMOE_DEVICE_CUDA 2

/**
 * gemmoe_load_options.device: the GPU with most free memory if the weights and a session of default options fit there, else
 * the CPU.
 */
#define GEMMOE_DEVICE_AUTO 3

/**
 * gemmoe_load_options.priority: the library's own threads have that of the loading thread.
 */
#define GEMMOE_PRIORITY_NORMAL 0

/**
 * gemmoe_load_options.priority: a nice value higher by 5; a quarter of the processor time where they compete with others of the
 * host. INVALID_ARGUMENT on systems without priorities of single threads (all but Linux).
 */
#define GEMMOE_PRIORITY_LOW 1

/**
 * gemmoe_load_options.priority: the nice value 19; what others leave. INVALID_ARGUMENT as above.
 */
#define GEMMOE_PRIORITY_LOWEST 2

/**
 * Formats of weights: as they are stored; in gemmoe_model_info, of several formats.
 */
#define GEMMOE_FORMAT_AS_STORED 0

/**
 * Formats of weights, in gemmoe_model_info: bfloat16.
 */
#define GEMMOE_FORMAT_BF16 1

/**
 * Formats of weights, in gemmoe_model_info: half precision.
 */
#define GEMMOE_FORMAT_F16 2

/**
 * Formats of weights, in gemmoe_model_info: single precision.
 */
#define GEMMOE_FORMAT_F32 3

/**
 * Formats of weights: whole numbers of 4 bits with a bf16 scale for each 32 of a row, unless one of the flags below is
 * added. 4.5 bits a weight.
 */
#define GEMMOE_FORMAT_INT4 4

/**
 * Formats of weights: the same with 8 bits. 8.5 bits a weight.
 */
#define GEMMOE_FORMAT_INT8 8

/**
 * Added to GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8: a scale for each 64.
 */
#define GEMMOE_FORMAT_GROUP_64 256

/**
 * Added to GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8: a scale for each 128.
 */
#define GEMMOE_FORMAT_GROUP_128 512

/**
 * Added to GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8: scales in half precision.
 */
#define GEMMOE_FORMAT_SCALES_F16 4096

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
 * gemmoe_session_options.flags: the session runs only in batches, and has no workspace of its own.
 */
#define GEMMOE_SESSION_BATCH_ONLY 1

/**
 * kv_dtype: keys and values in the dtype of the model's weights.
 */
#define GEMMOE_KV_DEFAULT 0

/**
 * kv_dtype: 32-bit floats, for checks.
 */
#define GEMMOE_KV_F32 1

/**
 * kv_dtype: bfloat16.
 */
#define GEMMOE_KV_BF16 2

/**
 * kv_dtype: IEEE half precision.
 */
#define GEMMOE_KV_F16 3

/**
 * kv_dtype: 8-bit integers with a scale for each head and position.
 */
#define GEMMOE_KV_INT8 4

/**
 * overflow: a full context is CONTEXT_FULL.
 */
#define GEMMOE_OVERFLOW_FAIL 0

/**
 * overflow: a full context keeps its first keep_tokens tokens and drops the oldest after them, so that half of the rest
 * is free again. Those that stay are run again at their new positions; of more tokens given at once than fit, those in the
 * middle are never run.
 */
#define GEMMOE_OVERFLOW_SLIDE 1

/**
 * gemmoe_session_embed: the mean of the tokens' hidden states.
 */
#define GEMMOE_POOLING_MEAN 0

/**
 * gemmoe_session_embed: the last token's hidden state.
 */
#define GEMMOE_POOLING_LAST 1

/**
 * gemmoe_grammar_create kind: a JSON schema; the output is one JSON value that it describes, with one space at most where
 * JSON allows white space: a member "x-guidance": {"whitespace_flexible": true} of the schema allows any.
 */
#define GEMMOE_GRAMMAR_JSON_SCHEMA 1

/**
 * gemmoe_grammar_create kind: a regular expression, which the whole output matches.
 */
#define GEMMOE_GRAMMAR_REGEX 2

/**
 * gemmoe_grammar_create kind: a grammar in llguidance's variant of Lark, whose rule `start` is the whole output.
 */
#define GEMMOE_GRAMMAR_LARK 3

/**
 * gemmoe_session_info.grammar_state: the session has no grammar.
 */
#define GEMMOE_GRAMMAR_NONE 0

/**
 * gemmoe_session_info.grammar_state: the output so far is not a whole one.
 */
#define GEMMOE_GRAMMAR_OPEN 1

/**
 * gemmoe_session_info.grammar_state: the output so far is a whole one; more may be possible.
 */
#define GEMMOE_GRAMMAR_COMPLETE 2

/**
 * A layer argument: every layer.
 */
#define GEMMOE_ALL_LAYERS UINT32_MAX

/**
 * In routes: no expert, where a mask allows fewer than num_experts_per_tok. Its weight is 0.
 */
#define GEMMOE_NO_EXPERT UINT32_MAX

/**
 * gemmoe_mix_options.flags: follow symbolic links inside the models' directories, as a download cache's layout needs. Without
 * it links are refused.
 */
#define GEMMOE_MIX_FOLLOW_LINKS 1

/**
 * state: the model is loaded and the data read and checked.
 */
#define GEMMOE_TRAINER_PREPARING 0

/**
 * state: preparing is over, and went well or not: gemmoe_trainer_wait tells.
 */
#define GEMMOE_TRAINER_READY 1

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
     * The operating system failed to write a file.
     */
    GEMMOE_STATUS_WRITE_FAILED = 25,
    /**
     * The disk has too little room for what is to be written.
     */
    GEMMOE_STATUS_DISK_FULL = 26,
    /**
     * What is to be written is there already.
     */
    GEMMOE_STATUS_ALREADY_EXISTS = 27,
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
     * A tensor's element type is not BF16, F16 or F32, or not that of the format config.json says it is quantised to.
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
     * A tensor that is to be quantised has a number that is infinite or NaN.
     */
    GEMMOE_STATUS_TENSOR_VALUE = 58,
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
    /**
     * The machine has no NVIDIA driver, or not the device that was asked for, or one that is too old for the kernels.
     */
    GEMMOE_STATUS_NO_DEVICE = 110,
    /**
     * The NVIDIA driver is older than the library's kernels.
     */
    GEMMOE_STATUS_DRIVER_TOO_OLD = 111,
    /**
     * Memory on the device could not be had; nothing was changed.
     */
    GEMMOE_STATUS_DEVICE_OUT_OF_MEMORY = 112,
    /**
     * The device's driver refused or failed a call; what was in progress is lost, the objects are usable.
     */
    GEMMOE_STATUS_DEVICE_FAILED = 113,
    /**
     * The device failed in a way that ends everything on it: destroy its sessions and models, and load anew.
     */
    GEMMOE_STATUS_DEVICE_LOST = 114,
    /**
     * A recipe is not valid TOML, or names a key twice.
     */
    GEMMOE_STATUS_RECIPE_SYNTAX = 120,
    /**
     * A value in a recipe is missing, of the wrong type or out of range, or a key is not known.
     */
    GEMMOE_STATUS_RECIPE_VALUE = 121,
    /**
     * The models of a recipe cannot be mixed: geometry, tokenizer, chat template or dtype differ.
     */
    GEMMOE_STATUS_MODELS_DIFFER = 122,
    /**
     * A row of training or evaluation data cannot be used; the error names its file and line.
     */
    GEMMOE_STATUS_DATA_ROW = 123,
    /**
     * The data is not what the checkpoint was begun with.
     */
    GEMMOE_STATUS_DATA_CHANGED = 124,
    /**
     * A router patch is cut off, altered, or not a router patch.
     */
    GEMMOE_STATUS_PATCH_DAMAGED = 125,
    /**
     * A router patch is of another model's routers.
     */
    GEMMOE_STATUS_PATCH_MODEL = 126,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum gemmoe_status gemmoe_status;
#else
typedef int32_t gemmoe_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

/**
 * A workspace that steps sessions of one model together: each expert is read once for all of them. One thread at a time.
 */
typedef struct gemmoe_batch gemmoe_batch;

/**
 * Why a call failed. Made by the failing call, destroyed by the host; never shared with another call.
 */
typedef struct gemmoe_error gemmoe_error;

/**
 * A compiled grammar of one model, immutable: any number of sessions and threads may use it at once.
 */
typedef struct gemmoe_grammar gemmoe_grammar;

/**
 * A model being loaded.
 */
typedef struct gemmoe_load gemmoe_load;

/**
 * A GemMoE being mixed.
 */
typedef struct gemmoe_mix gemmoe_mix;

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
 * A trainer. One thread at a time: a second one gets BUSY. gemmoe_trainer_poll, gemmoe_trainer_get_shares and gemmoe_trainer_cancel
 * are the exceptions.
 */
typedef struct gemmoe_trainer gemmoe_trainer;

/**
 * A GPU that models can run on. Initialise with GEMMOE_DEVICE_INFO_INIT.
 */
typedef struct gemmoe_device_info {
    /**
     * sizeof(gemmoe_device_info)
     */
    uint32_t struct_size;
    /**
     * What it is chosen by: gemmoe_load_options.device_index.
     */
    uint32_t index;
    /**
     * Compute capability: 9 of 9.0.
     */
    uint32_t capability_major;
    /**
     * Compute capability: 0 of 9.0.
     */
    uint32_t capability_minor;
    /**
     * All its memory.
     */
    uint64_t memory_bytes;
    /**
     * What nobody uses at the moment.
     */
    uint64_t free_bytes;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_device_info;

/**
 * What a gemmoe_parallel_for calls, with the task_context it was given and an index below its count. It returns soon when
 * there is nothing left to do, and never unwinds.
 */
typedef void (*gemmoe_task)(void *task_context, uint32_t index);

/**
 * A host's way to spread work over threads of its own: calls `task` once with `task_context` and each index below `count`, from
 * any threads, at the same time or one after the other, and returns when all calls have returned. One after the other
 * works, and is as slow as one thread.
 *
 * It is called from whatever thread computes with the model, many times per token, with a count of 2 to
 * gemmoe_load_options.threads; it must not unwind, longjmp or block on another call of this library. Results are those of
 * the library's own threads, to the last bit. While one call of the library is in it, others with the same model compute on
 * their own threads alone: calls of the library may run on the threads that run tasks.
 *
 * A task takes part in whatever is left to do, so mistakes are harmless: what was not called the calling thread does itself;
 * a wrong or repeated index does nothing; a call that still runs when this function returns is waited for; one that begins
 * later does nothing, or helps with the work then at hand, also when the model is gone, as long as the library is there.
 */
typedef void (*gemmoe_parallel_for)(void *context, uint32_t count, gemmoe_task task, void *task_context);

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
     * Threads that compute, the calling one included; 0 is one per core the process may use, at most 256. With a
     * parallel_for, the most tasks of one call of it; with 1 it is never called.
     */
    uint32_t threads;
    /**
     * One of GEMMOE_INSTRUCTIONS_.
     */
    uint32_t instructions;
    /**
     * Most bytes of keys and values that all sessions of the model hold together; 0 is no limit.
     */
    uint64_t kv_limit_bytes;
    /**
     * One of GEMMOE_PRIORITY_.
     */
    uint32_t priority;
    /**
     * Microseconds that an idle thread of the library spins before it sleeps; 0 is 50. One that sleeps takes tens of
     * microseconds to wake.
     */
    uint32_t spin_us;
    /**
     * The host's own threads instead of the library's, which then starts none; NULL is the library's. With it,
     * GEMMOE_LOAD_PIN_THREADS, priority and spin_us must be 0. Called as long as the model, or a session of it, lives.
     */
    gemmoe_parallel_for parallel_for;
    /**
     * What parallel_for is called with. Must be usable from any thread.
     */
    void *parallel_for_context;
    /**
     * What the experts are rounded to while they are loaded: GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8 with flags, or 0: as
     * they are stored. Weights that `gemmoe quantize` rounded stay in their format: another is INVALID_ARGUMENT.
     */
    uint32_t experts_format;
    /**
     * The same for queries, keys, values and output projections.
     */
    uint32_t attention_format;
    /**
     * The same for the head, and for the embedding where that is the head.
     */
    uint32_t head_format;
    /**
     * The same for the embedding. An embedding that is the head is held twice where the two have formats that differ; where one
     * of them is 0 both have the other's.
     */
    uint32_t embedding_format;
    /**
     * One of GEMMOE_DEVICE_.
     */
    uint32_t device;
    /**
     * Which GPU, below what gemmoe_device_count says; 0 unless device is GEMMOE_DEVICE_CUDA.
     */
    uint32_t device_index;
    /**
     * On a GPU, most bytes of its memory that weights take; 0 is no limit. Experts that do not fit stay in host memory: for up
     * to 16 tokens at a time they are computed by `threads` on the CPU, for more, and with GEMMOE_LOAD_EXACT always, they are
     * copied to the GPU each time they are needed, through buffers that the limit counts. Keys, values and workspaces of
     * sessions are not counted: gemmoe_plan_memory tells them, and what goes where. Below the least that the model
     * takes, which the error names, INVALID_ARGUMENT, or with GEMMOE_DEVICE_AUTO the CPU. gemmoe_model_set_device_memory_limit
     * changes it later.
     */
    uint64_t device_memory_limit;
    /**
     * A CUcontext of the host's for the model to use on a GPU instead of the device's primary context; NULL is that one.
     * device must be GEMMOE_DEVICE_CUDA, and device_index that of the context's device, or 0. The host keeps the context,
     * which is neither retained nor destroyed here, until the model and its sessions and batches are destroyed. Where it
     * does not, calls with them fail, and destroying them is safe, as far as the driver tells contexts that are gone.
     * Kernels take at most 48 KiB of shared memory, all of it static, so they run beside any renderer without a setting.
     */
    void *cuda_context;
    /**
     * A CUstream of cuda_context, kept as that is, onto which all work of the model goes in order; NULL gives each session
     * and batch a stream of its own in the context. Calls still wait for their own work before they return. Sessions on
     * several threads are as correct with it as without, but wait for each other, and for whatever else the host puts
     * there. It must not be capturing during a call. A stream without a context is INVALID_ARGUMENT.
     */
    void *cuda_stream;
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
     * What the experts are held in: one of GEMMOE_FORMAT_ with its flags; 0 where they are of several formats.
     */
    uint32_t experts_format;
    /**
     * The same of queries, keys, values and output projections.
     */
    uint32_t attention_format;
    /**
     * The same of the head.
     */
    uint32_t head_format;
    /**
     * The same of the embedding.
     */
    uint32_t embedding_format;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_model_info;

/**
 * How a model's weights are shared out between a GPU and host memory; on the CPU all of it is in host memory. Initialise with
 * GEMMOE_RESIDENCY_INIT.
 */
typedef struct gemmoe_residency {
    /**
     * sizeof(gemmoe_residency)
     */
    uint32_t struct_size;
    /**
     * Must not be relied on.
     */
    uint32_t reserved0;
    /**
     * Bytes of weights on the GPU, with what lies between them.
     */
    uint64_t device_bytes;
    /**
     * Bytes on the GPU beside them that experts are copied through; 0 where all are there. With device_bytes it is what
     * gemmoe_load_options.device_memory_limit counts.
     */
    uint64_t staging_bytes;
    /**
     * Bytes of weights in host memory.
     */
    uint64_t host_bytes;
    /**
     * Experts on the GPU, those of all layers together.
     */
    uint64_t device_experts;
    /**
     * Experts in host memory.
     */
    uint64_t host_experts;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_residency;

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
     * max_position_embeddings, at most 8192, and at most what kv_limit_bytes has room for.
     */
    uint32_t context_size;
    /**
     * Most prompt tokens run in one pass; the workspace is sized for it. 0 is 256.
     */
    uint32_t prefill_chunk;
    /**
     * GEMMOE_SESSION_ flags.
     */
    uint32_t flags;
    /**
     * One of GEMMOE_KV_.
     */
    uint32_t kv_dtype;
    /**
     * One of GEMMOE_OVERFLOW_.
     */
    uint32_t overflow;
    /**
     * With GEMMOE_OVERFLOW_SLIDE: first tokens that are never dropped, at most context_size less two.
     */
    uint32_t keep_tokens;
    /**
     * Tokens whose routes wait for gemmoe_session_fetch_routes; 0 keeps none.
     */
    uint32_t route_capacity;
    /**
     * Most bytes of keys and values; 0 is no limit.
     */
    uint64_t kv_limit_bytes;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_session_options;

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
     * What its keys and values are stored in, one of GEMMOE_KV_F32 to GEMMOE_KV_INT8.
     */
    uint32_t kv_dtype;
    /**
     * One of GEMMOE_GRAMMAR_NONE, GEMMOE_GRAMMAR_OPEN, GEMMOE_GRAMMAR_COMPLETE.
     */
    uint32_t grammar_state;
    /**
     * Tokens that a sliding window has dropped.
     */
    uint64_t dropped_count;
    /**
     * Bytes of keys and values reserved, those shared with forks included.
     */
    uint64_t kv_bytes;
    /**
     * Bytes of workspace; on a GPU of its logits too, which a session for batches only has as well.
     */
    uint64_t workspace_bytes;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_session_info;

/**
 * Memory of a model and of each of its sessions, on the device the load options choose. Initialise with
 * GEMMOE_MEMORY_PLAN_INIT.
 */
typedef struct gemmoe_memory_plan {
    /**
     * sizeof(gemmoe_memory_plan)
     */
    uint32_t struct_size;
    /**
     * Tokens a session can hold, the default filled in.
     */
    uint32_t context_size;
    /**
     * One of GEMMOE_KV_F32 to GEMMOE_KV_INT8, the default filled in.
     */
    uint32_t kv_dtype;
    /**
     * Must not be relied on.
     */
    uint32_t reserved0;
    /**
     * Bytes of weights: what gemmoe_model_get_info says after loading.
     */
    uint64_t weight_bytes;
    /**
     * Bytes of experts among them.
     */
    uint64_t expert_bytes;
    /**
     * Bytes of the tokenizer in host memory, about; 0 if there is none.
     */
    uint64_t tokenizer_bytes;
    /**
     * Bytes of keys and values of one token.
     */
    uint64_t kv_bytes_per_token;
    /**
     * Bytes of keys and values of one session: what gemmoe_session_get_info will say.
     */
    uint64_t kv_bytes;
    /**
     * Bytes of workspace of one session: what gemmoe_session_get_info will say.
     */
    uint64_t workspace_bytes;
    /**
     * Bytes of weights on the GPU, as gemmoe_residency has them; 0 on the CPU.
     */
    uint64_t device_bytes;
    /**
     * Bytes there that experts are copied through.
     */
    uint64_t staging_bytes;
    /**
     * Bytes of weights in host memory.
     */
    uint64_t host_bytes;
    /**
     * Experts on the GPU, those of all layers together.
     */
    uint64_t device_experts;
    /**
     * Experts in host memory.
     */
    uint64_t host_experts;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_memory_plan;

/**
 * How gemmoe_session_step draws. Initialise with GEMMOE_SAMPLING_INIT, which is greedy. The order: logit_bias; then
 * repetition_penalty, frequency_penalty and presence_penalty, over the last penalty_window tokens; then the session's
 * grammar; then the filters top_k, top_p, min_p on the untempered distribution; then temperature shapes what is left and one
 * token is drawn.
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
     * Positive logits of tokens in the window are divided by it, negative ones multiplied, 0.1 to 10; 0 or 1 changes none.
     */
    float repetition_penalty;
    /**
     * Taken from the logits of tokens in the window for each time they occur, -2 to 2.
     */
    float frequency_penalty;
    /**
     * Taken from the logits of tokens in the window once, -2 to 2.
     */
    float presence_penalty;
    /**
     * Last tokens the penalties look at; 0 is all the session holds.
     */
    uint32_t penalty_window;
    /**
     * Must be 0.
     */
    uint32_t reserved0;
    /**
     * Equal seeds, logits and positions give equal tokens.
     */
    uint64_t seed;
    /**
     * logit_bias_count tokens, each once, and what is added to their logits; -infinity forbids a token. Only read during
     * the call; both may be NULL if there are none.
     */
    const uint32_t *logit_bias_tokens;
    /**
     * See logit_bias_tokens.
     */
    const float *logit_bias_values;
    /**
     * See logit_bias_tokens.
     */
    uint64_t logit_bias_count;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_sampling;

/**
 * What one call may use up before it returns NEED_MORE. Initialise with GEMMOE_BUDGET_INIT, which is no limit. Every call
 * does at least one piece of work (about 100 microseconds of one core), so the smallest budget gets on. Results do not
 * depend on budgets.
 */
typedef struct gemmoe_budget {
    /**
     * sizeof(gemmoe_budget)
     */
    uint32_t struct_size;
    /**
     * Layers, the head counted as one; 0 is no limit.
     */
    uint32_t max_layers;
    /**
     * Microseconds from the beginning of the call; 0 is no limit.
     */
    uint64_t max_us;
    /**
     * Must be 0.
     */
    uint64_t reserved[2];
} gemmoe_budget;

/**
 * Where gemmoe_session_fetch_routes writes. Initialise with GEMMOE_ROUTE_ARRAYS_INIT and set the pointers and capacity.
 */
typedef struct gemmoe_route_arrays {
    /**
     * sizeof(gemmoe_route_arrays)
     */
    uint32_t struct_size;
    /**
     * Tokens there is room for in each array.
     */
    uint32_t capacity;
    /**
     * `[capacity]`: how many tokens came before each since the session began, those a sliding window dropped included.
     */
    uint64_t *positions;
    /**
     * `[capacity]`: the tokens.
     */
    uint32_t *tokens;
    /**
     * `[capacity, num_hidden_layers, num_experts_per_tok]`: their experts, highest weight first, or GEMMOE_NO_EXPERT.
     */
    uint32_t *experts;
    /**
     * `[capacity, num_hidden_layers, num_experts_per_tok]`: the weights.
     */
    float *weights;
} gemmoe_route_arrays;

/**
 * Times and counts since the session was made; waiting between calls is not counted. Initialise with
 * GEMMOE_SESSION_METRICS_INIT. Rates are counts by times: decode_tokens / decode_us is tokens per microsecond.
 */
typedef struct gemmoe_session_metrics {
    /**
     * sizeof(gemmoe_session_metrics)
     */
    uint32_t struct_size;
    /**
     * 1 once a token has been drawn after a prompt, else 0: time_to_first_token_us is then not known.
     */
    uint32_t has_first_token;
    /**
     * Microseconds from the first token of the latest prompt being given to the first token drawn after it.
     */
    uint64_t time_to_first_token_us;
    /**
     * Prompt tokens run.
     */
    uint64_t prefill_tokens;
    /**
     * Microseconds that took.
     */
    uint64_t prefill_us;
    /**
     * Tokens drawn.
     */
    uint64_t decode_tokens;
    /**
     * Microseconds spent running drawn tokens and drawing.
     */
    uint64_t decode_us;
    /**
     * Bytes of keys and values, on the model's device.
     */
    uint64_t kv_bytes;
    /**
     * Bytes of workspace, on the model's device.
     */
    uint64_t workspace_bytes;
    /**
     * Bytes of keys and values that all sessions of the model hold, each shared page counted once.
     */
    uint64_t model_kv_bytes;
    /**
     * Steps by how long they took: entry i counts those of 2^i to 2^(i+1) microseconds, entry 0 also the shorter and entry
     * 31 also the longer ones.
     */
    uint64_t step_times[32];
    /**
     * What experts in host memory cost all sessions of a model on a GPU since it was loaded: experts that were computed on
     * the CPU, one for each expert of a layer that tokens of a batch were sent to;
     */
    uint64_t model_host_expert_runs;
    /**
     * microseconds that took;
     */
    uint64_t model_host_expert_us;
    /**
     * experts that were copied to the GPU, counted alike;
     */
    uint64_t model_expert_copies;
    /**
     * bytes that were;
     */
    uint64_t model_expert_copy_bytes;
    /**
     * microseconds that calls spent on laying copies out and waiting for room.
     */
    uint64_t model_expert_copy_us;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_session_metrics;

/**
 * What a batch is made for. Initialise with GEMMOE_BATCH_OPTIONS_INIT; zeros are the defaults.
 */
typedef struct gemmoe_batch_options {
    /**
     * sizeof(gemmoe_batch_options)
     */
    uint32_t struct_size;
    /**
     * Most sessions of one step. 0 is 16.
     */
    uint32_t max_sessions;
    /**
     * Most tokens of one pass, at least one for each session. 0 is 256, or max_sessions if that is more.
     */
    uint32_t max_tokens;
    /**
     * Most tokens of one session in one pass. The longer, the sooner a prompt is done and the longer the others wait for
     * their next token meanwhile. 0 is 64.
     */
    uint32_t prefill_chunk;
    /**
     * Longest context_size of the sessions. 0 is the model's max_position_embeddings, at most 8192.
     */
    uint32_t max_context;
    /**
     * Must be 0.
     */
    uint32_t reserved0;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_batch_options;

/**
 * What a batch takes, and what its last pass did. Initialise with GEMMOE_BATCH_INFO_INIT.
 */
typedef struct gemmoe_batch_info {
    /**
     * sizeof(gemmoe_batch_info)
     */
    uint32_t struct_size;
    /**
     * Must not be relied on.
     */
    uint32_t reserved0;
    /**
     * Bytes of workspace.
     */
    uint64_t workspace_bytes;
    /**
     * Experts whose weights the last pass read, on average over the layers.
     */
    double touched_experts;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_batch_info;

/**
 * How to mix, beside the recipe; the result does not depend on it. Initialise with GEMMOE_MIX_OPTIONS_INIT; zeros are the
 * defaults.
 */
typedef struct gemmoe_mix_options {
    /**
     * sizeof(gemmoe_mix_options)
     */
    uint32_t struct_size;
    /**
     * GEMMOE_MIX_ flags.
     */
    uint32_t flags;
    /**
     * Threads that quantise and run the base for routers; 0 is one per core the process may use, at most 256.
     */
    uint32_t threads;
    /**
     * Must be 0.
     */
    uint32_t reserved0;
    /**
     * Must be 0.
     */
    uint64_t reserved[4];
} gemmoe_mix_options;

/**
 * What a recipe makes. Initialise with GEMMOE_MIX_PLAN_INIT.
 */
typedef struct gemmoe_mix_plan {
    /**
     * sizeof(gemmoe_mix_plan)
     */
    uint32_t struct_size;
    /**
     * Experts of each layer.
     */
    uint32_t num_local_experts;
    /**
     * Experts each token is sent to.
     */
    uint32_t num_experts_per_tok;
    /**
     * 0.
     */
    uint32_t reserved0;
    /**
     * Parameters of the mixture.
     */
    uint64_t parameters;
    /**
     * Parameters one token meets.
     */
    uint64_t active_parameters;
    /**
     * Bytes of tensors that are read.
     */
    uint64_t bytes_read;
    /**
     * Bytes of tensors that are written.
     */
    uint64_t bytes_written;
    /**
     * Bytes of the dense mean that is written beside the target for a while, where routers need it run; 0 without.
     */
    uint64_t scratch_bytes;
    /**
     * 0.
     */
    uint64_t reserved[4];
} gemmoe_mix_plan;

/**
 * What a training run takes, and comes to. Initialise with GEMMOE_TRAINER_PLAN_INIT.
 */
typedef struct gemmoe_trainer_plan {
    /**
     * sizeof(gemmoe_trainer_plan)
     */
    uint32_t struct_size;
    /**
     * 1 if pairs are learned (DPO), 0 if texts.
     */
    uint32_t is_preference;
    /**
     * Layers that have a router, and experts of each: gemmoe_trainer_get_shares has a number for each.
     */
    uint32_t num_hidden_layers;
    /**
     * Experts of each layer.
     */
    uint32_t num_local_experts;
    /**
     * Steps in all.
     */
    uint64_t steps;
    /**
     * Documents or pairs of the data that can be used.
     */
    uint64_t rows;
    /**
     * Rows that cannot, and that the recipe has skipped.
     */
    uint64_t skipped_rows;
    /**
     * Rows of the held-out files.
     */
    uint64_t held_out_rows;
    /**
     * Tokens of the data, and those among them that are learned.
     */
    uint64_t tokens;
    /**
     * Of the tokens, those that are learned.
     */
    uint64_t targets;
    /**
     * Numbers that are trained.
     */
    uint64_t parameters;
    /**
     * Bytes of the model's weights.
     */
    uint64_t weight_bytes;
    /**
     * Bytes of a batch's activations and gradients.
     */
    uint64_t workspace_bytes;
    /**
     * Bytes of gates, gradients, moments and reference.
     */
    uint64_t optimiser_bytes;
    /**
     * Bytes of what is kept of the data.
     */
    uint64_t data_bytes;
    /**
     * Bytes of a checkpoint, about.
     */
    uint64_t checkpoint_bytes;
    /**
     * 0.
     */
    uint64_t reserved[4];
} gemmoe_trainer_plan;

/**
 * Where a trainer is, and what its last step, or evaluation, came to. Means are over learned tokens, pairs, or tokens and
 * layers. Initialise with GEMMOE_TRAINER_METRICS_INIT.
 */
typedef struct gemmoe_trainer_metrics {
    /**
     * sizeof(gemmoe_trainer_metrics)
     */
    uint32_t struct_size;
    /**
     * One of GEMMOE_TRAINER_.
     */
    uint32_t state;
    /**
     * Bytes to be read or written in all, and so far, of what is prepared or written; data is counted after the weights, from 0.
     */
    uint64_t bytes_total;
    /**
     * Of them, so far.
     */
    uint64_t bytes_done;
    /**
     * Steps taken.
     */
    uint64_t steps;
    /**
     * Steps of the whole run; 0 while preparing.
     */
    uint64_t total_steps;
    /**
     * Tokens of the step.
     */
    uint64_t tokens;
    /**
     * Of them, those that were learned.
     */
    uint64_t targets;
    /**
     * Everything together, as its gradient was taken.
     */
    double loss;
    /**
     * The text's part: the mean negative log-likelihood of a token, or the mean loss of a pair.
     */
    double text_loss;
    /**
     * The balancing loss, without its coefficient.
     */
    double balance;
    /**
     * The z-loss, without its coefficient.
     */
    double z_loss;
    /**
     * Norm of all gradients before clipping; 0 of an evaluation.
     */
    double gradient_norm;
    /**
     * The learning rate of the step; 0 of an evaluation.
     */
    double learning_rate;
    /**
     * Of pairs: the mean rewards of chosen and rejected responses,
     */
    double chosen_reward;
    /**
     * which differ by the margin,
     */
    double rejected_reward;
    /**
     * and the share whose chosen response has the higher one.
     */
    double accuracy;
    /**
     * Must not be relied on.
     */
    uint64_t reserved[4];
} gemmoe_trainer_metrics;

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
 * How many GPUs there are that models can run on; 0, and no error, on a machine without an NVIDIA driver.
 * Errors: NULL_ARGUMENT, DRIVER_TOO_OLD, DEVICE_FAILED. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_device_count(uint32_t *count_out, struct gemmoe_error **error_out);

/**
 * What a GPU is.
 * Errors: NULL_ARGUMENT, STRUCT_SIZE, NO_DEVICE, DRIVER_TOO_OLD, DEVICE_FAILED. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_device_get_info(uint32_t index,
                                     struct gemmoe_device_info *info_out,
                                     struct gemmoe_error **error_out);

/**
 * Copies a GPU's name, UTF-8 without NUL, such as "NVIDIA H100 80GB HBM3". `count_out` receives its length; with `capacity` 0
 * nothing else is written.
 * Errors: NULL_ARGUMENT, BUFFER_TOO_SMALL, NO_DEVICE, DRIVER_TOO_OLD, DEVICE_FAILED. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_device_name(uint32_t index,
                                 char *text,
                                 size_t capacity,
                                 size_t *count_out,
                                 struct gemmoe_error **error_out);

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
 * Asks the load to stop: gemmoe_load_wait then returns CANCELLED when each thread has done its chunk of 1 MiB, or of 16 rows
 * where those are more.
 * Errors: handle errors. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_load_cancel(const struct gemmoe_load *load);

/**
 * Waits for the load and hands the model over, once; the host owns it. The load stays to be destroyed.
 * Errors: handle errors, BUSY (another thread waits), INVALID_ARGUMENT (the model was handed over before, or a format was
 * asked for that its weights are not stored in), CANCELLED, THREAD_UNAVAILABLE (a thread that computes could not be started),
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
 * Fills in where the model's weights are now. Waits while gemmoe_model_set_device_memory_limit moves experts.
 * Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_get_residency(const struct gemmoe_model *model,
                                         struct gemmoe_residency *residency_out,
                                         struct gemmoe_error **error_out);

/**
 * Changes gemmoe_load_options.device_memory_limit of a loaded model to `bytes`, 0 being no limit. Returns when experts have moved:
 * to host memory, and their memory on the GPU is freed, or back. Sessions go on; calls that run tokens wait meanwhile, and
 * this waits for what they have begun. On the CPU any limit holds, and nothing is done.
 * Errors: handle errors, INVALID_ARGUMENT (below the least that the model takes, which the error names), OUT_OF_MEMORY,
 * DEVICE_OUT_OF_MEMORY, DEVICE_FAILED, DEVICE_LOST, THREAD_UNAVAILABLE. Unless the GPU is lost, the model works after an error,
 * with some of the experts moved. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_set_device_memory_limit(const struct gemmoe_model *model,
                                                   uint64_t bytes,
                                                   struct gemmoe_error **error_out);

/**
 * Applies the router patch in the file `path`, a path of the host's choosing: the patch's gates are in force in place of the
 * stored ones, or of an earlier patch's. The file is not needed afterwards.
 *
 * Sessions and batches go on. A call that runs tokens meanwhile ends under the gates it began under, and this waits for none.
 * From then on a session shows, bit for bit, what one made under the new gates and given the same tokens would: all its tokens
 * are pending (gemmoe_session_info.pending_count), its logits are gone until they were run again, which the next step,
 * prefill (of no tokens too), score or embed does, in budgets if it is given any. That takes no memory, but where pages are
 * shared with a fork (KV_LIMIT, OUT_OF_MEMORY). Snapshots belong to the gates they were taken under: others refuse them with
 * SNAPSHOT_MODEL. Routes and statistics of tokens that are run again are counted again.
 *
 * The gates take layers x experts x hidden_size x 4 bytes beside the stored ones, on a GPU in its memory, where
 * device_memory_limit does not count them.
 * Errors, after which the gates in force are what they were: handle errors, NULL_ARGUMENT, INVALID_UTF8, FILE_NOT_FOUND,
 * READ_FAILED, PATCH_DAMAGED (cut off, altered, of another version, or no patch), PATCH_MODEL (for other sizes, or made from
 * other gates than the model's stored ones: the text has both sides' numbers), OUT_OF_MEMORY, DEVICE_OUT_OF_MEMORY,
 * DEVICE_FAILED, DEVICE_LOST. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_apply_router_patch(const struct gemmoe_model *model,
                                              const char *path,
                                              struct gemmoe_error **error_out);

/**
 * The same of a patch's bytes, `byte_count` of them, as its file has them. They are not needed afterwards.
 * Errors: as gemmoe_model_apply_router_patch, but for those of paths and files. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_apply_router_patch_bytes(const struct gemmoe_model *model,
                                                    const uint8_t *bytes,
                                                    size_t byte_count,
                                                    struct gemmoe_error **error_out);

/**
 * Takes the applied patch off: the stored gates are in force again, bit for bit. Without a patch nothing changes. What sessions
 * show then is as said of gemmoe_model_apply_router_patch; one that was not run under the patch goes on where it stood.
 * Errors: handle errors. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_model_remove_router_patch(const struct gemmoe_model *model,
                                               struct gemmoe_error **error_out);

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
 * messages, 1 to 16384, with roles of 1 to 32 letters a to z and _, BOS in front. Special tokens come from the template only; a message that spells one out
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
 * Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (context_size past the model's, an unknown flag or
 * constant, keep_tokens too large), KV_LIMIT, OUT_OF_MEMORY. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_session_create(const struct gemmoe_model *model,
                                    const struct gemmoe_session_options *options,
                                    struct gemmoe_session **session_out,
                                    struct gemmoe_error **error_out);

/**
 * Makes a second session that holds the same tokens and goes on from the same state, bit for bit: sampling, random
 * numbers, grammar, expert masks and biases. Keys and values of full pages are shared until one of the two rewinds into
 * them. Both draw the same tokens unless one is given another seed. It has the same options and a workspace of its own. Statistics,
 * metrics and waiting routes begin anew, a pending cancel stays behind.
 * Errors: handle errors, NULL_ARGUMENT, KV_LIMIT, OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_fork(const struct gemmoe_session *session,
                                  struct gemmoe_session **fork_out,
                                  struct gemmoe_error **error_out);

/**
 * Fills in what the session holds. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, GRAMMAR_LIMIT, BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_get_info(const struct gemmoe_session *session,
                                      struct gemmoe_session_info *info_out,
                                      struct gemmoe_error **error_out);

/**
 * Stops the call in progress on this session, which returns CANCELLED when the pieces of work in flight are done: one for
 * each thread, 100 to 200 microseconds long in a step, and in a prefill half a millisecond at the most. On a GPU a piece is a
 * layer, or two; a step without a budget is one piece, some milliseconds long, which ends as it would have. While no call is in
 * progress, stops the next prefill, step, score or embed; in a batch, the session's part of the next step.
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

/**
 * Tells what gemmoe_model_load and gemmoe_session_create with these options would take, from the headers of the weight files
 * alone. Both options may be NULL. The workspace of a batch comes on top: gemmoe_batch_get_info tells it.
 * Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, KV_LIMIT, and everything that can be wrong with a model directory,
 * as gemmoe_load_wait. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_plan_memory(const char *directory,
                                 const struct gemmoe_load_options *load_options,
                                 const struct gemmoe_session_options *session_options,
                                 struct gemmoe_memory_plan *plan_out,
                                 struct gemmoe_error **error_out);

/**
 * Sets how tokens are drawn from now on. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, SAMPLING_VALUE, OUT_OF_MEMORY,
 * BUSY; the settings are then as before. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_set_sampling(struct gemmoe_session *session,
                                          const struct gemmoe_sampling *sampling,
                                          struct gemmoe_error **error_out);

/**
 * Appends tokens without running them: the next prefill, step or batch step will. This is how a host with a sampler of its
 * own continues: it reads the logits and pushes the token it chose. Under a grammar the tokens must follow it.
 * Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE, CONTEXT_FULL, GRAMMAR_VIOLATION, GRAMMAR_LIMIT, OUT_OF_MEMORY,
 * KV_LIMIT (a window that slides into pages shared with a fork), BUSY; nothing was appended then.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_push(struct gemmoe_session *session,
                                  const uint32_t *tokens,
                                  size_t token_count,
                                  struct gemmoe_error **error_out);

/**
 * Makes the session hold exactly `tokens`: what they have in common with those it holds keeps its keys and values, the rest
 * is pushed. So a conversation goes on: gemmoe_chat_tokenize all its messages, set the tokens, and only the new ones are
 * run. `reused_out` may be NULL, else it receives how many tokens were in common.
 * Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE and CONTEXT_FULL (nothing has changed), GRAMMAR_VIOLATION and
 * GRAMMAR_LIMIT (the session holds what was in common), KV_LIMIT and OUT_OF_MEMORY (only where pages are shared with a fork), BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_set_tokens(struct gemmoe_session *session,
                                        const uint32_t *tokens,
                                        size_t token_count,
                                        size_t *reused_out,
                                        struct gemmoe_error **error_out);

/**
 * Appends tokens and runs them through the model, so that the logits after the last are ready. With `token_count` 0 it
 * runs what is pending: so logits are had after a rewind, after a token that was drawn, or after NEED_MORE, with which
 * the session holds all the tokens, those not run yet pending. `budget` may be NULL.
 * Errors: handle errors, STRUCT_SIZE, INVALID_ARGUMENT (a session for batches only), what gemmoe_session_push returns
 * (nothing was appended), CANCELLED (of this call's tokens those run so far are kept, the others as if never given;
 * gemmoe_session_get_info tells). One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_prefill(struct gemmoe_session *session,
                                     const uint32_t *tokens,
                                     size_t token_count,
                                     const struct gemmoe_budget *budget,
                                     struct gemmoe_error **error_out);

/**
 * Produces one token: runs what is pending, draws the next token, appends it and gives it out. Stop tokens are drawn
 * like others: ask gemmoe_model_is_stop_token. `budget` may be NULL; with NEED_MORE nothing was drawn, and the next step
 * goes on where this one stopped, inside a matrix if need be, and gives the same token as without a budget.
 * Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, NO_LOGITS (no tokens yet), CONTEXT_FULL, GRAMMAR_LIMIT, NOT_A_NUMBER
 * (no logit is finite: the model's, or because logit_bias and the grammar leave no token), OUT_OF_MEMORY and KV_LIMIT (with
 * a grammar, or a window that slides into pages shared with a fork),
 * CANCELLED (the next step goes on where this one stopped), INVALID_ARGUMENT (a session for batches only), BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_step(struct gemmoe_session *session,
                                  const struct gemmoe_budget *budget,
                                  uint32_t *token_out,
                                  struct gemmoe_error **error_out);

/**
 * Appends tokens, runs them, and writes the natural logarithm of the probability of each, given all before it, to
 * `log_probabilities`, `token_count` of them. Their mean, negated and raised to e, is the perplexity. The session must hold
 * at least one token, such as BOS, to begin from; no window slides here.
 * Errors: handle errors, what gemmoe_session_push returns, NO_LOGITS (no token to begin from), NOT_A_NUMBER, CANCELLED
 * (the tokens not run are taken back), INVALID_ARGUMENT (a session for batches only). One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_score(struct gemmoe_session *session,
                                   const uint32_t *tokens,
                                   size_t token_count,
                                   float *log_probabilities,
                                   struct gemmoe_error **error_out);

/**
 * Appends tokens, runs them, and writes their hidden states after the final norm, pooled as `pooling` (GEMMOE_POOLING_)
 * says, to `values`; `value_count` must be hidden_size.
 * Errors: handle errors, what gemmoe_session_push returns, CANCELLED (the tokens not run are taken back), INVALID_ARGUMENT
 * (no tokens, another `value_count`, no such pooling, a session for batches only). One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_embed(struct gemmoe_session *session,
                                   const uint32_t *tokens,
                                   size_t token_count,
                                   uint32_t pooling,
                                   float *values,
                                   size_t value_count,
                                   struct gemmoe_error **error_out);

/**
 * Gives the logits after the last token that was run: after a step, those its token was drawn from. `count_out`
 * receives vocab_size. Borrowed until the next call that changes the session. Logits stay on a GPU until they are asked for: the
 * first call after each token copies them from there.
 * Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, DEVICE_FAILED, DEVICE_LOST, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_logits(const struct gemmoe_session *session,
                                    const float **logits_out,
                                    size_t *count_out,
                                    struct gemmoe_error **error_out);

/**
 * Writes the `capacity` most probable next tokens and the natural logarithms of their probabilities, most probable
 * first. `count_out` receives how many were written: `capacity` or vocab_size, whichever is less.
 * Errors: handle errors, NULL_ARGUMENT, NO_LOGITS, NOT_A_NUMBER, OUT_OF_MEMORY, DEVICE_FAILED, DEVICE_LOST, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_top_log_probabilities(const struct gemmoe_session *session,
                                                   uint32_t *tokens,
                                                   float *log_probabilities,
                                                   size_t capacity,
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
 * Errors: handle errors, INVALID_ARGUMENT (more than it holds), KV_LIMIT and OUT_OF_MEMORY (only where pages are shared
 * with a fork), GRAMMAR_LIMIT, BUSY; nothing has changed then. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_rewind(struct gemmoe_session *session,
                                    size_t token_count,
                                    struct gemmoe_error **error_out);

/**
 * Compiles a grammar of `kind` (GEMMOE_GRAMMAR_) from `source`, `source_bytes` bytes of UTF-8, owned by the host. The first
 * of a model takes up to a second more (with a vocabulary of 256,000). The model may be destroyed before it.
 * Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT (no such kind), INVALID_UTF8, GRAMMAR_SYNTAX, GRAMMAR_LIMIT,
 * NO_TOKENIZER, THREAD_UNAVAILABLE, OUT_OF_MEMORY. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_grammar_create(const struct gemmoe_model *model,
                                    uint32_t kind,
                                    const char *source,
                                    size_t source_bytes,
                                    struct gemmoe_grammar **grammar_out,
                                    struct gemmoe_error **error_out);

/**
 * Lets only tokens that follow `grammar` be drawn or appended from now on; NULL lifts an earlier one. Set it after the
 * prompt, before the first step. When the output is complete and nothing can follow, only stop tokens are drawn. A rewind
 * takes tokens back, past the place where the grammar was set it begins anew.
 * Errors: handle errors, INVALID_ARGUMENT (a grammar of another model), OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_set_grammar(struct gemmoe_session *session,
                                         const struct gemmoe_grammar *grammar,
                                         struct gemmoe_error **error_out);

/**
 * Destroys a grammar; sessions that follow it go on. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE.
 * Any thread. Since 0.1.
 */
gemmoe_status gemmoe_grammar_destroy(struct gemmoe_grammar *grammar);

/**
 * Lets the router choose only experts whose bits are set in `allowed` (bit e is expert e) from now on, in `layer` or in
 * GEMMOE_ALL_LAYERS. At least one must be; if fewer than num_experts_per_tok are, they share the whole weight.
 * Errors: handle errors, EXPERT_VALUE (no bit, or one past the experts), INVALID_ARGUMENT (no such layer), OUT_OF_MEMORY,
 * BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_set_expert_mask(struct gemmoe_session *session,
                                             uint32_t layer,
                                             uint64_t allowed,
                                             struct gemmoe_error **error_out);

/**
 * Adds `bias`, num_local_experts values, to the router's logits from now on, in `layer` or in GEMMOE_ALL_LAYERS, in place
 * of an earlier one.
 * Errors: handle errors, NULL_ARGUMENT, EXPERT_VALUE (not a finite number), INVALID_ARGUMENT (another count, no such
 * layer), OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_set_expert_bias(struct gemmoe_session *session,
                                             uint32_t layer,
                                             const float *bias,
                                             size_t bias_count,
                                             struct gemmoe_error **error_out);

/**
 * Takes all masks and biases off again. Errors: handle errors, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_clear_expert_control(struct gemmoe_session *session, struct gemmoe_error **error_out);

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
 * Copies how many tokens were sent to each expert, and the sum of the weights they were sent with, since the session was
 * made or the statistics were cleared: `[num_hidden_layers, num_local_experts]` each. `capacity` is the room in each array
 * (either may be NULL if it is 0); `count_out` receives how many values there are, also with BUFFER_TOO_SMALL; with
 * `capacity` 0 nothing else is written.
 * Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_expert_statistics(const struct gemmoe_session *session,
                                               uint64_t *counts,
                                               double *weight_sums,
                                               size_t capacity,
                                               size_t *count_out,
                                               struct gemmoe_error **error_out);

/**
 * Starts the expert statistics anew. Errors: handle errors, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_clear_expert_statistics(struct gemmoe_session *session, struct gemmoe_error **error_out);

/**
 * Moves the routes of tokens that were run since the last fetch out, oldest first. The session keeps those of its last
 * route_capacity tokens (gemmoe_session_options). `count_out` receives how many tokens were written, `lost_out` (may be
 * NULL) how many were overwritten since the last fetch because nobody fetched them.
 * Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (impossible arrays), BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_fetch_routes(struct gemmoe_session *session,
                                          const struct gemmoe_route_arrays *arrays,
                                          size_t *count_out,
                                          uint64_t *lost_out,
                                          struct gemmoe_error **error_out);

/**
 * Writes all that decides what comes next (tokens, keys and values, sampling and its random numbers, masks, biases, grammar)
 * to `bytes`. `count_out` receives how many bytes that takes, also with BUFFER_TOO_SMALL; with `capacity` 0 nothing else
 * is written. Statistics, metrics and routes that wait are not part of it.
 * Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL, BUSY. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_snapshot(const struct gemmoe_session *session,
                                      uint8_t *bytes,
                                      size_t capacity,
                                      size_t *count_out,
                                      struct gemmoe_error **error_out);

/**
 * Makes a session, owned by the host, that goes on where the one that wrote the snapshot stood, with the same model in this
 * process or another: bit for bit, if both use the same instruction set. Zeros in `options`, which may be NULL, take what that session had; prefill_chunk,
 * route_capacity, kv_limit_bytes and flags are always those of `options`. The bytes are checked as a file from outside is.
 * Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, SNAPSHOT_DAMAGED, SNAPSHOT_VERSION, SNAPSHOT_MODEL, INVALID_ARGUMENT
 * (another kv_dtype, a context too small, other keep_tokens once the window has dropped tokens), KV_LIMIT, OUT_OF_MEMORY;
 * with a grammar what gemmoe_grammar_create returns.
 * Any thread. Since 0.1.
 */
gemmoe_status gemmoe_session_restore(const struct gemmoe_model *model,
                                     const uint8_t *bytes,
                                     size_t byte_count,
                                     const struct gemmoe_session_options *options,
                                     struct gemmoe_session **session_out,
                                     struct gemmoe_error **error_out);

/**
 * Fills in what the session measured. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_session_get_metrics(const struct gemmoe_session *session,
                                         struct gemmoe_session_metrics *metrics_out,
                                         struct gemmoe_error **error_out);

/**
 * Makes a batch, owned by the host; `options` may be NULL. All memory it will ever need is reserved here. The model may
 * be destroyed before it.
 * Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (max_tokens below max_sessions), OUT_OF_MEMORY.
 * Any thread. Since 0.1.
 */
gemmoe_status gemmoe_batch_create(const struct gemmoe_model *model,
                                  const struct gemmoe_batch_options *options,
                                  struct gemmoe_batch **batch_out,
                                  struct gemmoe_error **error_out);

/**
 * Advances each of `session_count` sessions by at most one token, in at most one pass over the weights, bit for bit as each
 * would alone. For session i, `statuses[i]` receives OK, with its token in `tokens[i]`; NEED_MORE if it needs another step
 * first, its prompt not being run yet or the budget spent; or its own error, which does not touch the others: what
 * gemmoe_session_step may return, BUSY also for a session given twice, CANCELLED after a gemmoe_session_cancel of it.
 * `errors` may be NULL, else `errors[i]` receives NULL or an error the host owns. `budget` may be NULL.
 *
 * Sessions with one token to run come first; prompts (gemmoe_session_push) share the rest of the pass, so a long one starves
 * nobody. Sessions may join and leave between steps. After NEED_MORE by the budget give the same sessions in the same order
 * to go on where the step stopped; otherwise its work is begun anew. The results are the same.
 * Errors: handle errors of `batch`, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (too many sessions, one of another model or
 * with a longer context), CANCELLED, BUSY; every session is as before then. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_batch_step(struct gemmoe_batch *batch,
                                struct gemmoe_session *const *sessions,
                                size_t session_count,
                                const struct gemmoe_budget *budget,
                                int32_t *statuses,
                                uint32_t *tokens,
                                struct gemmoe_error **errors,
                                struct gemmoe_error **error_out);

/**
 * Stops the step in progress on this batch, which returns CANCELLED when the pieces of work in flight are done, as with
 * gemmoe_session_cancel; its sessions keep their tokens, and the next step goes on. If a session has its token or its
 * error by then, the step hands that out, the others get NEED_MORE, and the next step returns CANCELLED. While no step is
 * in progress, stops the next. Errors: handle errors. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_batch_cancel(const struct gemmoe_batch *batch);

/**
 * Takes back a cancel that has not stopped anything yet. Errors: handle errors. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_batch_clear_cancel(const struct gemmoe_batch *batch);

/**
 * Fills in what the batch takes and did. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE, BUSY.
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_batch_get_info(const struct gemmoe_batch *batch,
                                    struct gemmoe_batch_info *info_out,
                                    struct gemmoe_error **error_out);

/**
 * Destroys a batch; its sessions live on. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_batch_destroy(struct gemmoe_batch *batch);

/**
 * Checks everything but the weights' numbers and tells what a recipe makes; writes nothing. The arguments are those of
 * gemmoe_mix_start; it takes as long as reading the models' headers and tokenizers does.
 * Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, INVALID_UTF8, and those of gemmoe_mix_wait. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_mix_check(const char *recipe,
                               size_t recipe_bytes,
                               const char *directory,
                               const char *target,
                               const struct gemmoe_mix_options *options,
                               struct gemmoe_mix_plan *plan_out,
                               struct gemmoe_error **error_out);

/**
 * Starts mixing and returns at once. `recipe` is the text of a recipe, TOML of `recipe_bytes` bytes, as docs/mix.md describes it;
 * relative paths in it begin at `directory`. `target` is the directory to write, which must not be there or be empty. Both are
 * NUL-terminated paths; `options` may be NULL. The mix is owned by the host and runs on a thread of its own.
 * Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, INVALID_UTF8, RECIPE_SYNTAX, RECIPE_VALUE, FILE_TOO_LARGE (a recipe of more
 * than 1 MiB), THREAD_UNAVAILABLE; what is wrong with the models comes from gemmoe_mix_wait. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_mix_start(const char *recipe,
                               size_t recipe_bytes,
                               const char *directory,
                               const char *target,
                               const struct gemmoe_mix_options *options,
                               struct gemmoe_mix **mix_out,
                               struct gemmoe_error **error_out);

/**
 * How far the mix has come, as that of a load: bytes of the models' weights, which are counted from 0 again where a model is
 * written, loaded or run for the routers before. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread, never blocks.
 * Since 0.1.
 */
gemmoe_status gemmoe_mix_poll(const struct gemmoe_mix *mix,
                              struct gemmoe_load_progress *progress_out,
                              struct gemmoe_error **error_out);

/**
 * Asks the mix to stop: gemmoe_mix_wait then returns CANCELLED, within the time that a tensor's 16 MiB, or 50 milliseconds of
 * running a model, take, and nothing of the target is left.
 * Errors: handle errors. Any thread, never blocks. Since 0.1.
 */
gemmoe_status gemmoe_mix_cancel(const struct gemmoe_mix *mix);

/**
 * Waits for the mix; with OK the target is a model directory. Its outcome is told once. The mix stays to be destroyed.
 * Errors: handle errors, BUSY (another thread waits), INVALID_ARGUMENT (its outcome was told before, or the target is a mount
 * point), CANCELLED, RECIPE_VALUE, MODELS_DIFFER, WRITE_FAILED, DISK_FULL, ALREADY_EXISTS, TENSOR_VALUE, NOT_A_NUMBER, and everything
 * that can be wrong with a model directory: codes 20 to 64, OUT_OF_MEMORY. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_mix_wait(struct gemmoe_mix *mix,
                              struct gemmoe_error **error_out);

/**
 * Destroys a mix, stopping it if it still runs; what it has finished stays. NULL is nothing.
 * Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_mix_destroy(struct gemmoe_mix *mix);

/**
 * Starts preparing a training run and returns at once. `recipe` is the text of a training recipe, TOML of `recipe_bytes` bytes,
 * as docs/training.md describes it; relative paths in it begin at `directory`, a NUL-terminated path. Its [output] may be left
 * out: a host says itself what is written, and when. `model` is the model whose routers are trained, which stays as it is and
 * may be destroyed before the trainer; if it is NULL, the recipe's is loaded. The trainer is owned by the host and is prepared on a thread
 * of its own: the model is loaded, the data read and checked, all memory reserved.
 * Errors: handle errors, NULL_ARGUMENT, INVALID_UTF8, RECIPE_SYNTAX, RECIPE_VALUE, FILE_TOO_LARGE (a recipe of more than 1 MiB),
 * THREAD_UNAVAILABLE; what is wrong with model and data comes from gemmoe_trainer_wait. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_trainer_start(const struct gemmoe_model *model,
                                   const char *recipe,
                                   size_t recipe_bytes,
                                   const char *directory,
                                   struct gemmoe_trainer **trainer_out,
                                   struct gemmoe_error **error_out);

/**
 * Waits until the trainer is prepared and tells what the run takes and comes to; `plan_out` may be NULL. The other functions that
 * need the run wait likewise. Where preparing has failed, or was cancelled, all of them return what this one does, and the trainer
 * is good for nothing but gemmoe_trainer_destroy.
 * Errors: handle errors, STRUCT_SIZE, BUSY, CANCELLED, RECIPE_VALUE (the model or the data do not fit the recipe), DATA_ROW,
 * FILE_NOT_FOUND, READ_FAILED, PATCH_DAMAGED, PATCH_MODEL, INVALID_ARGUMENT (the model has no router that could learn, one expert per token
 * among the reasons, or its device does not train), NO_TOKENIZER, OUT_OF_MEMORY, and of a model that is loaded those of
 * gemmoe_load_wait. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_trainer_wait(struct gemmoe_trainer *trainer,
                                  struct gemmoe_trainer_plan *plan_out,
                                  struct gemmoe_error **error_out);

/**
 * Takes up to `steps` steps, as many as are left of the run, and sets *taken_out, which may be NULL, to their number: 0 is the end of the
 * run. After an error the trainer is as after the last step that succeeded, which *taken_out does not tell, but
 * gemmoe_trainer_poll does, and can go on.
 * Errors: those of gemmoe_trainer_wait, DATA_CHANGED (a data file was altered meanwhile), NOT_A_NUMBER (a gradient, or what a gate would
 * become, is not finite: lower the learning rate), DEVICE_FAILED. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_trainer_step(struct gemmoe_trainer *trainer,
                                  uint64_t steps,
                                  uint64_t *taken_out,
                                  struct gemmoe_error **error_out);

/**
 * Computes the losses of the recipe's held-out files under the gates as they are; nothing is learned.
 * Errors: those of gemmoe_trainer_step, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (the recipe has no held-out files).
 * One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_trainer_evaluate(struct gemmoe_trainer *trainer,
                                      struct gemmoe_trainer_metrics *metrics_out,
                                      struct gemmoe_error **error_out);

/**
 * Tells where the trainer is and what the last step or evaluation came to. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE.
 * Any thread, never blocks for longer than a copy of these numbers takes. Since 0.1.
 */
gemmoe_status gemmoe_trainer_poll(const struct gemmoe_trainer *trainer,
                                  struct gemmoe_trainer_metrics *metrics_out,
                                  struct gemmoe_error **error_out);

/**
 * Copies the share of choices that each expert got in the last step or evaluation, layer by layer: [num_hidden_layers,
 * num_local_experts], each layer's sum 1; none before the first. *count_out is the number of shares, also where `capacity` is 0.
 * Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL. Any thread, never blocks for longer than a copy of these numbers
 * takes. Since 0.1.
 */
gemmoe_status gemmoe_trainer_get_shares(const struct gemmoe_trainer *trainer,
                                        double *shares,
                                        size_t capacity,
                                        size_t *count_out,
                                        struct gemmoe_error **error_out);

/**
 * Stops the call in progress on this trainer, which returns CANCELLED, and what it was to change is as before: in a step within an
 * operation of a layer, while preparing within a chunk of a file, while writing a model within a piece of a tensor, of which
 * nothing is then left. While no call is in progress, stops the next step or evaluation. Errors: handle errors. Any thread, never
 * blocks. Since 0.1.
 */
gemmoe_status gemmoe_trainer_cancel(const struct gemmoe_trainer *trainer);

/**
 * Writes where training stands to a file, from which gemmoe_trainer_resume goes on with the same bits as if it had never stopped: gates,
 * moments, and the place in the data. What was at `file` is there until the new one is whole.
 * Errors: those of gemmoe_trainer_wait, NULL_ARGUMENT, WRITE_FAILED, DISK_FULL. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_trainer_checkpoint(const struct gemmoe_trainer *trainer,
                                        const char *file,
                                        struct gemmoe_error **error_out);

/**
 * Goes on from a file that gemmoe_trainer_checkpoint, or the command line, wrote; after an error the trainer is as before.
 * Errors: those of gemmoe_trainer_wait, NULL_ARGUMENT, SNAPSHOT_DAMAGED, SNAPSHOT_VERSION, SNAPSHOT_MODEL, DATA_CHANGED, RECIPE_VALUE (it was begun
 * with other data, or with a recipe that leads elsewhere). One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_trainer_resume(struct gemmoe_trainer *trainer,
                                    const char *file,
                                    struct gemmoe_error **error_out);

/**
 * Writes the gates as they are to a router patch, which gemmoe_model_apply_router_patch puts into a loaded model. What was at `file` is
 * there until the new one is whole. Errors: those of gemmoe_trainer_checkpoint. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_trainer_write_patch(const struct gemmoe_trainer *trainer,
                                         const char *file,
                                         struct gemmoe_error **error_out);

/**
 * Writes the recipe's model directory with these gates to another one, which must not be there or be empty: all else is the same,
 * byte for byte. It has its name only once it is whole.
 * Errors: those of gemmoe_trainer_checkpoint, ALREADY_EXISTS, and everything that can be wrong with a model directory: codes 20 to
 * 64. One thread at a time. Since 0.1.
 */
gemmoe_status gemmoe_trainer_write_model(const struct gemmoe_trainer *trainer,
                                         const char *directory,
                                         struct gemmoe_error **error_out);

/**
 * Destroys a trainer, stopping it if it still prepares; a call in progress on another thread is finished first by that thread. What
 * it has written stays. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
 */
gemmoe_status gemmoe_trainer_destroy(struct gemmoe_trainer *trainer);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* GEMMOE_H */
