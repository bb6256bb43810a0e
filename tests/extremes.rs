//! Models, inputs and machines at their limits: the smallest sizes, the longest contexts, the largest numbers.

mod common;

use std::sync::Arc;

use common::{Directory, Random, load, load_with};
use gemmoe::backend::KvDtype;
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::{BatchOptions, Model, Sampling, Session, SessionBatch, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;

fn bits(session: &Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|value| value.to_bits()).collect()
}

fn session(model: &Arc<Model>, context_size: usize, prefill_chunk: usize) -> Session {
    Session::new(Arc::clone(model), &SessionOptions { context_size, prefill_chunk, ..Default::default() }).unwrap()
}

#[test]
fn the_smallest_model_there_can_be_runs() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let mut directory = Directory::random_with(
            61,
            json!({
                "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "bos_token_id": 0,
                "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "num_local_experts": 1,
                "num_experts_per_tok": 1, "max_position_embeddings": 40
            }),
        );
        directory.dtype = dtype;
        let directory = directory.to_temporary();
        for threads in [1, 2, 5] {
            let mut session = session(&load_with(directory.path(), threads, Instructions::Detect), 40, 3);
            session.prefill(&[0; 20]).unwrap();
            session.set_sampling(Sampling { temperature: 1.0, top_p: 0.5, ..Default::default() }).unwrap();
            for _ in 0..20 {
                assert_eq!(session.step().unwrap(), 0);
            }
            assert_eq!(session.step().unwrap_err().status(), Status::ContextFull);
        }
    }
}

#[test]
fn a_context_of_one_token_takes_one_and_gives_its_logits() {
    let directory = Directory::random(62).to_temporary();
    let model = load(directory.path());
    let mut session = session(&model, 1, 256);
    session.prefill(&[7]).unwrap();
    assert_eq!(session.logits().unwrap().len(), 97);
    assert_eq!(session.step().unwrap_err().status(), Status::ContextFull);
    session.rewind(0).unwrap();
    session.prefill(&[7]).unwrap();
}

#[test]
fn all_of_sixty_four_experts_and_a_single_one_run() {
    for (experts, top_k) in [(64, 64), (64, 1), (1, 1)] {
        let changes = json!({"num_local_experts": experts, "num_experts_per_tok": top_k});
        let directory = Directory::random_with(63, changes).to_temporary();
        let model = load(directory.path());
        let mut session = session(&model, 64, 16);
        session.prefill(&Random::new(63).tokens(33, 97)).unwrap();
        let routes = session.routes(1).unwrap();
        let mut chosen = routes.experts.to_vec();
        chosen.sort_unstable();
        chosen.dedup();
        assert_eq!(chosen.len(), top_k);
        assert!((routes.weights.iter().sum::<f32>() - 1.0).abs() < 1e-5);
    }
}

#[test]
fn thousands_of_positions_give_the_same_bits_however_they_came() {
    let changes = json!({"max_position_embeddings": 8192, "num_hidden_layers": 1, "head_dim": 2});
    let directory = Directory::random_with(64, changes).to_temporary();
    let model = load(directory.path());
    let tokens = Random::new(64).tokens(4200, 97);
    let mut whole = session(&model, 4200, 4200);
    whole.prefill(&tokens).unwrap();
    for chunk in [256, 600, 4199] {
        let mut parts = session(&model, 4200, chunk);
        parts.prefill(&tokens).unwrap();
        assert_eq!(bits(&parts), bits(&whole), "{chunk}");
    }
    let mut stepwise = session(&model, 4200, 256);
    stepwise.prefill(&tokens[..4096]).unwrap();
    for token in &tokens[4096..] {
        stepwise.prefill(std::slice::from_ref(token)).unwrap();
    }
    assert_eq!(bits(&stepwise), bits(&whole));
}

/// Sets every element of the tensors whose names contain `part`.
fn fill(directory: &mut Directory, part: &str, value: f32) {
    for (name, (_, values)) in &mut directory.tensors {
        if name.contains(part) {
            values.fill(value);
        }
    }
}

#[test]
fn no_weights_make_a_step_panic_or_hang() {
    let extremes =
        [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, -0.0, 6e4];
    let parts =
        ["embed", "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "gate", "w1", "w2", "w3", "model.norm"];
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        for value in extremes {
            for part in parts {
                let mut directory = Directory::random(65);
                directory.dtype = dtype;
                fill(&mut directory, part, value);
                let directory = directory.to_temporary();
                let model = load(directory.path());
                for kv_dtype in KvDtype::ALL {
                    let options = SessionOptions {
                        context_size: 32,
                        prefill_chunk: 5,
                        kv_dtype: Some(kv_dtype),
                        ..Default::default()
                    };
                    let mut session = Session::new(Arc::clone(&model), &options).unwrap();
                    session.prefill(&[2, 3, 4, 5, 6, 7, 8]).unwrap();
                    for temperature in [0.0, 0.8] {
                        session.set_sampling(Sampling { temperature, ..Default::default() }).unwrap();
                        match session.step() {
                            Ok(token) => assert!(token < 97),
                            Err(error) => assert_eq!(error.status(), Status::NotANumber, "{part} {value}"),
                        }
                    }
                    let mut experts = session.routes(0).unwrap().experts.to_vec();
                    experts.sort_unstable();
                    experts.dedup();
                    assert_eq!(experts.len(), 2, "{part} {value}");
                }
            }
        }
    }
}

#[test]
fn one_router_logit_that_is_not_a_number_spoils_only_its_own_token() {
    let mut directory = Directory::random(66);
    let (_, values) = directory.tensors.get_mut("model.embed_tokens.weight").unwrap();
    values[5 * 40..6 * 40].fill(f32::NAN);
    directory.config["tie_word_embeddings"] = json!(false);
    let head = Directory::random(67).tensors["model.embed_tokens.weight"].clone();
    directory.tensors.insert("lm_head.weight".into(), head);
    let directory = directory.to_temporary();
    let model = load(directory.path());
    let mut session = session(&model, 32, 8);
    session.prefill(&[5]).unwrap();
    assert_eq!(session.step().unwrap_err().status(), Status::NotANumber);
    session.rewind(0).unwrap();
    session.prefill(&[2, 3, 4]).unwrap();
    let clean = bits(&session);
    session.rewind(0).unwrap();
    session.prefill(&[2, 3, 4, 5]).unwrap();
    session.rewind(3).unwrap();
    let token = session.step().unwrap();
    assert!(token < 97);
    assert_eq!(bits(&session), clean);
}

#[test]
fn as_many_threads_as_there_may_be_work_and_end() {
    let directory = Directory::random(68).to_temporary();
    let tokens = Random::new(68).tokens(40, 97);
    let mut expected = session(&load_with(directory.path(), 1, Instructions::Detect), 64, 16);
    expected.prefill(&tokens).unwrap();
    for _ in 0..3 {
        let mut session = session(&load_with(directory.path(), 256, Instructions::Detect), 64, 16);
        session.prefill(&tokens).unwrap();
        assert_eq!(bits(&session), bits(&expected));
    }
}

#[test]
fn a_batch_made_for_more_than_any_memory_is_an_error() {
    let directory = Directory::random(69).to_temporary();
    let model = load_with(directory.path(), 4, Instructions::Detect);
    let most = usize::MAX;
    for (sessions, tokens, context) in [(1, most, 1), (most, most, 1), (1 << 62, 1 << 62, 1)] {
        let options =
            BatchOptions { max_sessions: sessions, max_tokens: tokens, max_context: context, ..Default::default() };
        let error = SessionBatch::new(Arc::clone(&model), &options).err().unwrap();
        assert_eq!(error.status(), Status::OutOfMemory);
    }
    // No session of the model has a longer context than the model: more is not reserved.
    for max_context in [1 << 62, most] {
        let options = BatchOptions { max_context, ..Default::default() };
        assert!(SessionBatch::new(Arc::clone(&model), &options).unwrap().bytes() < 100 << 20);
    }
}
