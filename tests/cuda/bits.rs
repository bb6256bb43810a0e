//! What must be equal to the last bit on a device too.

use std::sync::{Arc, Barrier};
use std::task::Poll;
use std::time::Duration;

use gemmoe::backend::KvDtype;
use gemmoe::quant::Format;
use gemmoe::{Budget, Formats, LoadOptions, Model, Sampling, Session, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;

use crate::common::{Directory, Random, batch, draw_each, load_options, session};
use crate::driver::Driver;
use crate::on_device;
use crate::shim::{ORDERS, Shim};

fn logits_of(session: &Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|value| value.to_bits()).collect()
}

fn logits_after(model: &Arc<Model>, tokens: &[u32]) -> Vec<u32> {
    let mut session = session(model);
    session.prefill(tokens).unwrap();
    logits_of(&session)
}

/// Models of every format, with what they are loaded with.
fn models() -> Vec<(&'static str, Arc<Model>)> {
    let mut f32_model = Directory::random_with(2, json!({"hidden_size": 36, "head_dim": 6, "intermediate_size": 21}));
    f32_model.dtype = Dtype::F32;
    let mut f16_model = Directory::random_with(3, json!({"num_local_experts": 8, "num_experts_per_tok": 3}));
    f16_model.dtype = Dtype::F16;
    let rounded = Formats {
        experts: Some(Format::INT4),
        attention: Some(Format::INT8),
        head: Some(Format::INT8),
        embedding: None,
    };
    let directories = [
        ("bf16", Directory::random(1), Formats::default()),
        ("f32, odd sizes", f32_model, Formats::default()),
        ("f16, top 3 of 8", f16_model, Formats::default()),
        ("int4 and int8", Directory::random_with(4, json!({"hidden_size": 72, "intermediate_size": 48})), rounded),
    ];
    let load = |(name, directory, formats): (&'static str, Directory, Formats)| {
        let directory = directory.to_temporary();
        (name, load_options(directory.path(), &LoadOptions { formats, ..on_device() }))
    };
    directories.map(load).into()
}

#[test]
fn any_cut_of_a_prompt_any_order_of_lanes_and_any_rewind_give_the_same_bits() {
    let Some(driver) = Driver::take() else { return };
    for (name, model) in models() {
        let tokens = Random::new(5).tokens(40, 97);
        let whole = logits_after(&model, &tokens);
        for (order, chunk) in ORDERS.into_iter().zip([1, 3, 16, 39]) {
            driver.order(order);
            let mut session = session(&model);
            tokens.chunks(chunk).for_each(|part| session.prefill(part).unwrap());
            assert_eq!(logits_of(&session), whole, "{name}, chunks of {chunk}, {order:?}");
            session.rewind(17).unwrap();
            session.prefill(&tokens[17..]).unwrap();
            assert_eq!(logits_of(&session), whole, "{name}, rewound");
        }
    }
}

#[test]
fn sessions_stepped_together_give_what_each_gives_alone() {
    let Some(_driver) = Driver::take() else { return };
    for (name, model) in models() {
        let mut random = Random::new(7);
        let prompts: Vec<Vec<u32>> = [1, 20, 3].map(|length| random.tokens(length, 97)).into();
        let dtypes = [KvDtype::Int8, KvDtype::F16, KvDtype::Bf16];
        let prepare = |index: usize| {
            let options = SessionOptions { context_size: 64, kv_dtype: Some(dtypes[index]), ..Default::default() };
            let mut session = Session::new(Arc::clone(&model), &options).unwrap();
            session.set_sampling(Sampling { temperature: 0.8, seed: index as u64, ..Default::default() }).unwrap();
            session.set_allowed_experts(Some(1), 0b1101 >> index | 2).unwrap();
            session.push(&prompts[index]).unwrap();
            session
        };
        let alone: Vec<(Vec<u32>, Vec<u32>)> = (0..prompts.len())
            .map(|index| {
                let mut session = prepare(index);
                ((0..5).map(|_| session.step().unwrap()).collect(), logits_of(&session))
            })
            .collect();
        let mut batch = batch(&model, prompts.len(), 11, 64);
        let mut sessions: Vec<Session> = (0..prompts.len()).map(prepare).collect();
        let mut tokens = vec![Vec::new(); prompts.len()];
        for _ in 0..5 {
            let mut all: Vec<&mut Session> = sessions.iter_mut().collect();
            for (token, tokens) in draw_each(&mut batch, &mut all).into_iter().zip(&mut tokens) {
                tokens.push(token.unwrap());
            }
        }
        for (index, (expected, logits)) in alone.iter().enumerate() {
            assert_eq!((&tokens[index], &logits_of(&sessions[index])), (expected, logits), "{name}, session {index}");
        }
    }
}

#[test]
fn attention_split_over_the_context_gives_the_bits_of_attention_in_one_go() {
    let Some(_driver) = Driver::take() else { return };
    let changes = json!({"num_hidden_layers": 1, "max_position_embeddings": 1024, "num_key_value_heads": 1});
    let directory = Directory::random_with(17, changes).to_temporary();
    let model = load_options(directory.path(), &on_device());
    let tokens = Random::new(17).tokens(600, 97);
    let of_chunk = |prefill_chunk| {
        let options = SessionOptions { context_size: 640, prefill_chunk, ..Default::default() };
        Session::new(Arc::clone(&model), &options).unwrap()
    };
    // More tokens at once than are split.
    let mut whole = of_chunk(600);
    whole.prefill(&tokens).unwrap();
    for last in [1, 7, 16] {
        let mut session = of_chunk(600);
        session.prefill(&tokens[..600 - last]).unwrap();
        session.prefill(&tokens[600 - last..]).unwrap();
        assert_eq!(logits_of(&session), logits_of(&whole), "the last {last} at once");
    }
}

#[test]
fn work_left_after_any_layer_goes_on_to_the_same_bits() {
    let Some(_driver) = Driver::take() else { return };
    for (name, model) in models() {
        let tokens = Random::new(6).tokens(30, 97);
        let whole = logits_after(&model, &tokens);
        // Two layers and the head.
        for (budget, most) in
            [(Budget::of_layers(1), 3), (Budget::of_layers(2), 2), (Budget::of_time(Duration::ZERO), 3)]
        {
            let mut session = session(&model);
            let (mut given, mut calls) = (&tokens[..], 1);
            while session.prefill_within(given, &budget).map(Result::unwrap).is_pending() {
                (given, calls) = (&[], calls + 1);
            }
            assert_eq!(calls, most, "{name}, {budget:?}");
            assert_eq!(logits_of(&session), whole, "{name}, {budget:?}");
        }
        // Left for good, and the pages with it.
        let mut session = session(&model);
        assert!(matches!(session.prefill_within(&tokens, &Budget::of_layers(1)), Poll::Pending));
        session.rewind(0).unwrap();
        session.prefill(&tokens).unwrap();
        assert_eq!(logits_of(&session), whole, "{name}, begun anew");
    }
}

#[test]
fn a_cancel_ends_the_work_and_the_session_goes_on() {
    let Some(_driver) = Driver::take() else { return };
    let (_, model) = models().swap_remove(0);
    let tokens = Random::new(8).tokens(20, 97);
    let whole = logits_after(&model, &tokens);
    let mut session = session(&model);
    session.cancel().request();
    assert_eq!(session.prefill(&tokens).unwrap_err().status(), Status::Cancelled);
    session.rewind(0).unwrap();
    session.prefill(&tokens).unwrap();
    assert_eq!(logits_of(&session), whole);
}

#[test]
fn a_mix_of_identical_experts_is_the_dense_model_bit_for_bit() {
    let Some(_driver) = Driver::take() else { return };
    let mut mixed = Directory::random_with(11, json!({"num_local_experts": 4, "num_experts_per_tok": 3}));
    let mut dense = mixed.clone();
    dense.config["model_type"] = json!("gemma");
    for layer in 0..2 {
        for (moe, gemma) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")] {
            let name = |expert| format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{moe}.weight");
            let first = mixed.tensors[&name(0)].clone();
            for expert in 0..4 {
                mixed.tensors.insert(name(expert), first.clone());
                dense.tensors.remove(&name(expert));
            }
            dense.tensors.insert(format!("model.layers.{layer}.mlp.{gemma}.weight"), first);
        }
        dense.tensors.remove(&format!("model.layers.{layer}.block_sparse_moe.gate.weight"));
    }
    let load = |directory: Directory| load_options(directory.to_temporary().path(), &on_device());
    let tokens = Random::new(11).tokens(20, 97);
    assert_eq!(logits_after(&load(mixed), &tokens), logits_after(&load(dense), &tokens));
}

#[test]
fn forks_and_snapshots_go_on_with_the_same_bits() {
    let Some(_driver) = Driver::take() else { return };
    for (name, model) in models() {
        let tokens = Random::new(9).tokens(40, 97);
        let whole = logits_after(&model, &tokens);
        let mut first = session(&model);
        first.prefill(&tokens[..25]).unwrap();
        let mut fork = first.fork().unwrap();
        let mut bytes = vec![0; first.snapshot_bytes()];
        first.snapshot(&mut bytes).unwrap();
        let mut restored = Session::restore(Arc::clone(&model), &bytes, first.options()).unwrap();
        first.prefill(&Random::new(10).tokens(15, 97)).unwrap();
        for (what, session) in [("fork", &mut fork), ("snapshot", &mut restored)] {
            session.prefill(&tokens[25..]).unwrap();
            assert_eq!(logits_of(session), whole, "{name}, {what}");
        }
        // Back into the pages that the two share.
        fork.rewind(10).unwrap();
        fork.prefill(&tokens[10..]).unwrap();
        assert_eq!(logits_of(&fork), whole, "{name}, rewound");
    }
}

#[test]
fn sessions_on_several_threads_use_a_stream_each_and_give_what_each_gives_alone() {
    let Some(shim) = Shim::take() else { return };
    let (_, model) = models().swap_remove(0);
    let generate = |seed: u64, end: &Barrier| {
        let mut session = session(&model);
        session.set_sampling(Sampling { temperature: 1.0, seed, ..Default::default() }).unwrap();
        session.prefill(&Random::new(seed).tokens(10, 97)).unwrap();
        let tokens: Vec<u32> = (0..5).map(|_| session.step().unwrap()).collect();
        end.wait();
        let streams = shim.computing_streams();
        end.wait();
        (tokens, streams)
    };
    let alone: Vec<_> = (0..3).map(|seed| generate(seed, &Barrier::new(1)).0).collect();
    let end = Barrier::new(3);
    let together: Vec<_> = std::thread::scope(|scope| {
        let (generate, end) = (&generate, &end);
        let threads: Vec<_> = (0..3).map(|seed| scope.spawn(move || generate(seed, end))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (alone, (together, streams)) in alone.into_iter().zip(together) {
        assert_eq!((alone, 3), (together, streams));
    }
}
