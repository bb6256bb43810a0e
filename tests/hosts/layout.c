/* Prints the size of every struct and where its fields are; the Rust side prints the same of its own. */
#include "check.h"

#define STRUCT(name) printf(#name " %u\n", (unsigned)sizeof(name))
#define FIELD(name, field) \
    printf(#name "." #field " %u %u\n", (unsigned)offsetof(name, field), (unsigned)sizeof(((name *)0)->field))

int main(void) {
    gemmoe_load_options load_options = GEMMOE_LOAD_OPTIONS_INIT;
    gemmoe_load_progress load_progress = GEMMOE_LOAD_PROGRESS_INIT;
    gemmoe_model_info model_info = GEMMOE_MODEL_INFO_INIT;
    gemmoe_message message = GEMMOE_MESSAGE_INIT;
    gemmoe_session_options session_options = GEMMOE_SESSION_OPTIONS_INIT;
    gemmoe_session_info session_info = GEMMOE_SESSION_INFO_INIT;
    gemmoe_sampling sampling = GEMMOE_SAMPLING_INIT;

    CHECK(load_options.struct_size == sizeof load_options && load_options.reserved[3] == 0);
    CHECK(load_progress.struct_size == sizeof load_progress && load_progress.bytes_read == 0);
    CHECK(model_info.struct_size == sizeof model_info && model_info.reserved[3] == 0);
    CHECK(message.struct_size == sizeof message && message.role == NULL && message.text == NULL);
    CHECK(message.text_bytes == 0 && message.reserved[3] == 0);
    CHECK(session_options.struct_size == sizeof session_options && session_options.reserved[3] == 0);
    CHECK(session_info.struct_size == sizeof session_info && session_info.reserved[3] == 0);
    CHECK(sampling.struct_size == sizeof sampling && sampling.top_p == 1.0f && sampling.reserved[3] == 0);
    CHECK(gemmoe_abi_version() == GEMMOE_ABI_VERSION);
    CHECK(sizeof(gemmoe_status) == 4);

    STRUCT(gemmoe_load_options);
    FIELD(gemmoe_load_options, struct_size);
    FIELD(gemmoe_load_options, flags);
    FIELD(gemmoe_load_options, threads);
    FIELD(gemmoe_load_options, instructions);
    FIELD(gemmoe_load_options, reserved);
    STRUCT(gemmoe_load_progress);
    FIELD(gemmoe_load_progress, struct_size);
    FIELD(gemmoe_load_progress, state);
    FIELD(gemmoe_load_progress, bytes_total);
    FIELD(gemmoe_load_progress, bytes_read);
    STRUCT(gemmoe_model_info);
    FIELD(gemmoe_model_info, struct_size);
    FIELD(gemmoe_model_info, vocab_size);
    FIELD(gemmoe_model_info, hidden_size);
    FIELD(gemmoe_model_info, intermediate_size);
    FIELD(gemmoe_model_info, num_hidden_layers);
    FIELD(gemmoe_model_info, num_attention_heads);
    FIELD(gemmoe_model_info, num_key_value_heads);
    FIELD(gemmoe_model_info, head_dim);
    FIELD(gemmoe_model_info, num_local_experts);
    FIELD(gemmoe_model_info, num_experts_per_tok);
    FIELD(gemmoe_model_info, max_position_embeddings);
    FIELD(gemmoe_model_info, bos_token);
    FIELD(gemmoe_model_info, has_tokenizer);
    FIELD(gemmoe_model_info, reserved0);
    FIELD(gemmoe_model_info, weight_bytes);
    FIELD(gemmoe_model_info, expert_bytes);
    FIELD(gemmoe_model_info, tokenizer_bytes);
    FIELD(gemmoe_model_info, kv_bytes_per_token);
    FIELD(gemmoe_model_info, reserved);
    STRUCT(gemmoe_message);
    FIELD(gemmoe_message, struct_size);
    FIELD(gemmoe_message, reserved0);
    FIELD(gemmoe_message, role);
    FIELD(gemmoe_message, text);
    FIELD(gemmoe_message, text_bytes);
    FIELD(gemmoe_message, reserved);
    STRUCT(gemmoe_session_options);
    FIELD(gemmoe_session_options, struct_size);
    FIELD(gemmoe_session_options, context_size);
    FIELD(gemmoe_session_options, prefill_chunk);
    FIELD(gemmoe_session_options, reserved0);
    FIELD(gemmoe_session_options, reserved);
    STRUCT(gemmoe_session_info);
    FIELD(gemmoe_session_info, struct_size);
    FIELD(gemmoe_session_info, context_size);
    FIELD(gemmoe_session_info, token_count);
    FIELD(gemmoe_session_info, pending_count);
    FIELD(gemmoe_session_info, kv_bytes);
    FIELD(gemmoe_session_info, workspace_bytes);
    FIELD(gemmoe_session_info, reserved);
    STRUCT(gemmoe_sampling);
    FIELD(gemmoe_sampling, struct_size);
    FIELD(gemmoe_sampling, temperature);
    FIELD(gemmoe_sampling, top_k);
    FIELD(gemmoe_sampling, top_p);
    FIELD(gemmoe_sampling, min_p);
    FIELD(gemmoe_sampling, reserved0);
    FIELD(gemmoe_sampling, seed);
    FIELD(gemmoe_sampling, reserved);
    return 0;
}
