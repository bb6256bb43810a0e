//! What must be equal to the last bit: mixes of equal experts, any cut of a prompt, any batch, any number of threads.

mod common;

use common::{Directory, Random, batch, draw_each, load, load_with, session, session_with};
use gemmoe::backend::KvDtype;
use gemmoe::backend::cpu::kernels::{Instructions, Kernels};
use gemmoe::backend::cpu::threads::Task;
use gemmoe::backend::cpu::{CpuOptions, ParallelFor, ThreadOptions};
use gemmoe::backend::ops::{Batch, PassLimits, SequenceSlice};
use gemmoe::{Budget, LoadOptions, Model, Progress, Sampling, Session, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

fn logits_of(session: &Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|value| value.to_bits()).collect()
}

fn logits_after(model: &Arc<Model>, tokens: &[u32]) -> Vec<u32> {
    let mut session = session(model);
    session.prefill(tokens).unwrap();
    logits_of(&session)
}

fn shapes() -> Vec<(&'static str, Directory)> {
    let mut f32_model = Directory::random_with(2, json!({"hidden_size": 36, "head_dim": 6, "intermediate_size": 21}));
    f32_model.dtype = Dtype::F32;
    let mut f16_model = Directory::random_with(3, json!({"num_local_experts": 8, "num_experts_per_tok": 3}));
    f16_model.dtype = Dtype::F16;
    vec![("bf16", Directory::random(1)), ("f32, odd sizes", f32_model), ("f16, top 3 of 8", f16_model)]
}

#[test]
fn a_mix_of_identical_experts_is_the_dense_model_bit_for_bit_whatever_the_router() {
    for (experts, top_k, seed) in [(4, 2, 11), (4, 4, 12), (8, 3, 13), (64, 8, 14)] {
        let changes = json!({"num_local_experts": experts, "num_experts_per_tok": top_k});
        let mut mixed = Directory::random_with(seed, changes);
        let mut dense = mixed.clone();
        dense.config["model_type"] = json!("gemma");
        for layer in 0..2 {
            for (moe, gemma) in [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")] {
                let name = |expert| format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{moe}.weight");
                let first = mixed.tensors[&name(0)].clone();
                for expert in 0..experts {
                    mixed.tensors.insert(name(expert), first.clone());
                    dense.tensors.remove(&name(expert));
                }
                dense.tensors.insert(format!("model.layers.{layer}.mlp.{gemma}.weight"), first);
            }
            dense.tensors.remove(&format!("model.layers.{layer}.block_sparse_moe.gate.weight"));
        }
        let (mixed, dense) = (mixed.to_temporary(), dense.to_temporary());
        let tokens = Random::new(seed).tokens(50, 97);
        assert_eq!(logits_after(&load(mixed.path()), &tokens), logits_after(&load(dense.path()), &tokens), "{experts}");
    }
}

#[test]
fn any_cut_of_a_prompt_gives_the_same_bits() {
    for (name, directory) in shapes() {
        let directory = directory.to_temporary();
        let model = load(directory.path());
        let tokens = Random::new(5).tokens(120, 97);
        let whole = logits_after(&model, &tokens);
        for chunk in [1, 3, 7, 16, 119] {
            let mut session = session(&model);
            for part in tokens.chunks(chunk) {
                session.prefill(part).unwrap();
            }
            assert_eq!(logits_of(&session), whole, "{name}, chunks of {chunk}");
        }
        // The library's own cut must not show either.
        for prefill_chunk in [1, 5, 120] {
            let options = SessionOptions { context_size: 200, prefill_chunk, ..Default::default() };
            let mut session = Session::new(Arc::clone(&model), &options).unwrap();
            session.prefill(&tokens).unwrap();
            assert_eq!(logits_of(&session), whole, "{name}, prefill_chunk {prefill_chunk}");
        }
    }
}

#[test]
fn a_rewind_and_replay_gives_the_same_bits() {
    for (name, directory) in shapes() {
        let directory = directory.to_temporary();
        let model = load(directory.path());
        let tokens = Random::new(6).tokens(60, 97);
        let whole = logits_after(&model, &tokens);
        let mut session = session(&model);
        session.set_sampling(Sampling { temperature: 1.0, seed: 3, ..Default::default() }).unwrap();
        session.prefill(&tokens[..40]).unwrap();
        let first: Vec<u32> = (0..10).map(|_| session.step().unwrap()).collect();
        for length in [40, 45, 33, 0] {
            session.rewind(length).unwrap();
            assert_eq!(session.tokens().len(), length);
            if length == 40 {
                let again: Vec<u32> = (0..10).map(|_| session.step().unwrap()).collect();
                assert_eq!(again, first, "{name}: the same draws after a rewind");
            }
            session.rewind(length.min(40)).unwrap();
            session.prefill(&tokens[length.min(40)..]).unwrap();
            assert_eq!(logits_of(&session), whole, "{name}, rewound to {length}");
        }
    }
}

#[test]
fn sessions_stepped_together_give_what_each_gives_alone_for_any_number_of_threads() {
    for (name, directory) in shapes() {
        let directory = directory.to_temporary();
        let mut random = Random::new(7);
        let prompts: Vec<Vec<u32>> = [1, 50, 3, 17, 2].map(|length| random.tokens(length, 97)).into();
        let prepare = |model: &Arc<Model>, index: usize| {
            let mut session = session(model);
            session.set_sampling(Sampling { temperature: 0.8, seed: index as u64, ..Default::default() }).unwrap();
            session.push(&prompts[index]).unwrap();
            session
        };
        let alone: Vec<(Vec<u32>, Vec<u32>)> = (0..prompts.len())
            .map(|index| {
                let mut session = prepare(&load_with(directory.path(), 1, Instructions::Detect), index);
                let tokens = (0..12).map(|_| session.step().unwrap()).collect();
                (tokens, logits_of(&session))
            })
            .collect();
        for threads in [1, 2, 3, 8] {
            let model = load_with(directory.path(), threads, Instructions::Detect);
            let mut batch = batch(&model, prompts.len(), 23, 256);
            let mut sessions: Vec<Session> = (0..prompts.len()).map(|index| prepare(&model, index)).collect();
            let mut tokens = vec![Vec::new(); prompts.len()];
            for _ in 0..12 {
                let mut all: Vec<&mut Session> = sessions.iter_mut().collect();
                for (token, tokens) in draw_each(&mut batch, &mut all).into_iter().zip(&mut tokens) {
                    tokens.push(token.unwrap());
                }
            }
            for (index, (expected, logits)) in alone.iter().enumerate() {
                assert_eq!(&tokens[index], expected, "{name}, {threads} threads, session {index}");
                assert_eq!(&logits_of(&sessions[index]), logits, "{name}, {threads} threads, session {index}");
            }
        }
    }
}

/// How the host of the next test runs tasks; it is the context.
type Run = fn(u32, &(dyn Fn(u32) + Sync));

unsafe extern "C" fn parallel_for(context: *mut c_void, count: u32, task: Task, task_context: *mut c_void) {
    // SAFETY: the context is a `Run` that outlives the model.
    let run = unsafe { *context.cast::<Run>() };
    let task_context = task_context.addr();
    // SAFETY: a task may be called with any index at any time.
    run(count, &|index| unsafe { task(std::ptr::without_provenance_mut(task_context), index) });
}

#[test]
fn the_hosts_own_threads_give_the_same_bits_whatever_they_do_wrong() {
    let runs: [(&str, Run); 4] = [
        ("on threads", |count, task| {
            std::thread::scope(|scope| (0..count).for_each(|index| drop(scope.spawn(move || task(index)))));
        }),
        ("in turn", |count, task| (0..count).for_each(task)),
        ("all but one, twice", |count, task| (1..count).chain(1..count).for_each(task)),
        ("none", |_, _| {}),
    ];
    for (name, directory) in shapes() {
        let directory = directory.to_temporary();
        let tokens = Random::new(16).tokens(60, 97);
        let expected = logits_after(&load_with(directory.path(), 1, Instructions::Detect), &tokens);
        for (manner, run) in &runs {
            // SAFETY: `parallel_for` reads a `Run` at the context, which outlives the model, and may run anywhere.
            let parallel_for = unsafe { ParallelFor::new(parallel_for, (&raw const *run).cast_mut().cast()) };
            let threads = ThreadOptions { count: 3, parallel_for: Some(parallel_for), ..Default::default() };
            let cpu = CpuOptions { threads, ..Default::default() };
            let options = LoadOptions { cpu, ..Default::default() };
            let model = Model::load(directory.path(), &options, &Progress::default()).unwrap();
            for chunk in [1, 7, 60] {
                let mut session = session(&model);
                tokens.chunks(chunk).for_each(|part| session.prefill(part).unwrap());
                assert_eq!(logits_of(&session), expected, "{name}, tasks {manner}, chunks of {chunk}");
            }
        }
    }
}

#[test]
fn sessions_on_several_threads_give_what_each_gives_alone() {
    let directory = Directory::random(8).to_temporary();
    let model = load(directory.path());
    let generate = |seed: u64| {
        let mut session = session(&model);
        session.set_sampling(Sampling { temperature: 1.0, seed, ..Default::default() }).unwrap();
        session.prefill(&Random::new(seed).tokens(30, 97)).unwrap();
        (0..30).map(|_| session.step().unwrap()).collect::<Vec<_>>()
    };
    let alone: Vec<_> = (0..4).map(generate).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || generate(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}

#[test]
fn instruction_sets_agree_within_rounding() {
    for (name, directory) in shapes() {
        let is_bf16 = name.contains("bf16");
        let directory = directory.to_temporary();
        let tokens = Random::new(9).tokens(40, 97);
        let logits = |instructions| {
            let mut session = session_with(&load_with(directory.path(), 2, instructions), KvDtype::F32);
            session.prefill(&tokens).unwrap();
            session.logits().unwrap().to_vec()
        };
        let portable = logits(Instructions::Portable);
        let largest = portable.iter().fold(0f32, |max, value| max.max(value.abs()));
        for instructions in Instructions::ALL.into_iter().filter(|wanted| Kernels::get(*wanted).is_ok()) {
            // AVX-512 may round activations to bf16 before they meet bf16 weights.
            let tolerance = if is_bf16 && instructions == Instructions::Avx512 { 3e-2 } else { 2e-5 };
            for (a, b) in portable.iter().zip(&logits(instructions)) {
                assert!((a - b).abs() < tolerance * largest, "{name}, {}", instructions.name());
            }
        }
    }
}

/// Long enough that the attention of a chunk is done range by range, of one token in one go.
#[test]
fn more_positions_than_an_item_attends_to_give_the_same_bits_however_they_are_cut() {
    for (seed, key_value_heads) in [(17, 1), (18, 2), (19, 4)] {
        let changes = json!({"head_dim": 64, "num_key_value_heads": key_value_heads, "max_position_embeddings": 1024});
        let directory = Directory::random_with(seed, changes).to_temporary();
        let tokens = Random::new(seed).tokens(700, 97);
        let of_chunk = |threads, prefill_chunk| {
            let options = SessionOptions { context_size: 700, prefill_chunk, ..Default::default() };
            Session::new(load_with(directory.path(), threads, Instructions::Detect), &options).unwrap()
        };
        let mut alone = of_chunk(1, 1);
        alone.prefill(&tokens).unwrap();
        for (threads, chunk) in [(1, 700), (2, 700), (5, 100), (3, 13)] {
            let mut session = of_chunk(threads, chunk);
            session.prefill(&tokens).unwrap();
            assert_eq!(
                logits_of(&session),
                logits_of(&alone),
                "{key_value_heads}, {threads} threads, chunks of {chunk}"
            );
        }
        // Left after every item.
        let (mut session, budget) = (of_chunk(2, 700), Budget::of_time(Duration::ZERO));
        let mut calls = 1;
        let mut given = &tokens[..];
        while session.prefill_within(given, &budget).map(Result::unwrap).is_pending() {
            (given, calls) = (&[], calls + 1);
        }
        assert!(calls > 100, "{calls}");
        assert_eq!(logits_of(&session), logits_of(&alone), "{key_value_heads}, {calls} calls");
    }
}

#[test]
fn every_dtype_of_keys_and_values_gives_the_same_bits_however_tokens_are_cut_batched_or_shared_among_threads() {
    for (name, directory) in shapes() {
        let directory = directory.to_temporary();
        let tokens = Random::new(15).tokens(70, 97);
        let of_dtype = |model: &Arc<Model>, kv_dtype, prefill_chunk| {
            let options =
                SessionOptions { context_size: 200, prefill_chunk, kv_dtype: Some(kv_dtype), ..Default::default() };
            Session::new(Arc::clone(model), &options).unwrap()
        };
        let alone: Vec<Vec<u32>> = KvDtype::ALL
            .map(|dtype| {
                let mut session = of_dtype(&load_with(directory.path(), 1, Instructions::Detect), dtype, 200);
                session.prefill(&tokens).unwrap();
                logits_of(&session)
            })
            .into();
        assert!((1..4).all(|other| alone[0] != alone[other]), "{name}: dtypes differ");
        for threads in [1, 2, 3] {
            let model = load_with(directory.path(), threads, Instructions::Detect);
            for (dtype, expected) in KvDtype::ALL.into_iter().zip(&alone) {
                for chunk in [1, 3, 16, 69] {
                    let mut session = of_dtype(&model, dtype, 64);
                    tokens.chunks(chunk).for_each(|part| session.prefill(part).unwrap());
                    assert_eq!(&logits_of(&session), expected, "{name}, {}, chunks of {chunk}", dtype.name());
                    session.rewind(37).unwrap();
                    session.prefill(&tokens[37..]).unwrap();
                    assert_eq!(&logits_of(&session), expected, "{name}, {}, rewound", dtype.name());
                }
            }
            // One batch of all dtypes. A step draws; what came before the draw is compared.
            let mut sessions: Vec<Session> = KvDtype::ALL.map(|dtype| of_dtype(&model, dtype, 8)).into();
            let mut batch = batch(&model, sessions.len(), 21, 200);
            sessions.iter_mut().for_each(|session| session.push(&tokens).unwrap());
            draw_each(&mut batch, &mut sessions.iter_mut().collect::<Vec<_>>());
            for ((session, expected), dtype) in sessions.iter().zip(&alone).zip(KvDtype::ALL) {
                assert_eq!(&logits_of(session), expected, "{name}, {}, {threads} threads", dtype.name());
            }
        }
    }
}

#[test]
fn narrower_keys_and_values_keep_logits_near_those_of_f32() {
    // Of the norm of the logits, after 100 positions of a model whose random weights attend sharply and choose routers
    // closely; over a dozen others bf16 erred by 1e-3 to 1e-2, f16 by 3e-4 to 2e-3, int8 by 4e-3 to 2e-2.
    let tolerances = [(KvDtype::Bf16, 4e-2), (KvDtype::F16, 5e-3), (KvDtype::Int8, 6e-2)];
    for (name, directory) in shapes() {
        let directory = directory.to_temporary();
        // Where activations are rounded too, that is most of the error.
        let model = load_with(directory.path(), 2, Instructions::Portable);
        let tokens = Random::new(16).tokens(100, 97);
        let logits = |dtype| {
            let mut session = session_with(&model, dtype);
            session.prefill(&tokens).unwrap();
            session.logits().unwrap().to_vec()
        };
        let exact = logits(KvDtype::F32);
        let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|value| value * value).sum::<f32>().sqrt();
        for (dtype, tolerance) in tolerances {
            let found = logits(dtype);
            let error = norm(&mut found.iter().zip(&exact).map(|(found, exact)| found - exact));
            let relative = error / norm(&mut exact.iter().copied());
            println!("{name}, {}: {relative:.1e}", dtype.name());
            assert!(relative < tolerance, "{name}, {}: {relative:.1e}", dtype.name());
        }
    }
}

#[test]
fn a_session_counts_the_bytes_of_its_dtype_and_takes_the_checkpoints_where_none_is_asked_for() {
    let expected = [KvDtype::Bf16, KvDtype::F32, KvDtype::F16];
    for ((name, directory), dtype) in shapes().into_iter().zip(expected) {
        let head_dim = directory.config["head_dim"].as_u64().unwrap() as usize;
        let directory = directory.to_temporary();
        let model = load(directory.path());
        assert_eq!(model.backend().default_kv_dtype(), dtype, "{name}");
        // 256 positions of 2 layers of keys and values of 2 heads.
        let bytes = |row: usize| 256 * 2 * 2 * 2 * row;
        assert_eq!(session(&model).kv_bytes(), bytes(head_dim * dtype.bytes_per_element()), "{name}");
        assert_eq!(session_with(&model, KvDtype::Int8).kv_bytes(), bytes(head_dim + 4), "{name}");
    }
}

#[test]
fn a_pass_refuses_pages_of_mixed_dtypes_and_of_another_model() {
    let directory = Directory::random(17).to_temporary();
    let other = Directory::random_with(17, json!({"head_dim": 4})).to_temporary();
    let (model, other) = (load(directory.path()), load(other.path()));
    let limits = PassLimits { max_tokens: 4, max_sequences: 1, max_context: 32, logit_rows: 1 };
    let mut pass = model.backend().new_pass(limits).unwrap();
    let mut begin = |first: (&Model, KvDtype), second: (&Model, KvDtype)| {
        let mut pages = [first, second].map(|(model, dtype)| Arc::new(model.backend().new_kv_page(dtype).unwrap()));
        let slice =
            SequenceSlice { tokens: &[2], start: 0, pages: &mut pages, logits: None, targets: &[], router: None };
        let batch = Batch { sequences: &mut [slice], gates: None };
        pass.begin(&batch).map_err(|error| error.status())
    };
    let (own, own_int8, strange) = ((&*model, KvDtype::Bf16), (&*model, KvDtype::Int8), (&*other, KvDtype::Bf16));
    assert_eq!(begin(own, own), Ok(()));
    assert_eq!(begin(own_int8, own_int8), Ok(()));
    assert_eq!(begin(own, own_int8), Err(Status::Internal));
    assert_eq!(begin(own, strange), Err(Status::Internal));
    assert_eq!(begin(strange, strange), Err(Status::Internal));
}

#[test]
fn a_score_has_the_same_bits_however_its_tokens_came() {
    for (name, directory) in shapes() {
        let model = load(directory.to_temporary().path());
        let tokens = Random::new(61).tokens(60, 97);
        let of = |cuts: &[usize], ready: bool| {
            let mut session = session(&model);
            session.push(&tokens[..1]).unwrap();
            let mut scores = vec![0f32; tokens.len() - 1];
            let mut from = 1;
            for to in cuts.iter().copied().chain([tokens.len()]) {
                if ready {
                    session.prefill(&[]).unwrap();
                    let (mut ids, mut logs) = ([0; 97], [0.0; 97]);
                    session.top_log_probabilities(&mut ids, &mut logs).unwrap();
                    let at = ids.iter().position(|id| *id == tokens[from]).unwrap();
                    session.score(&tokens[from..to], &mut scores[from - 1..to - 1]).unwrap();
                    assert_eq!(scores[from - 1].to_bits(), logs[at].to_bits(), "{name}: as it is listed");
                } else {
                    session.rewind(from - 1).unwrap();
                    session.push(&tokens[from - 1..from]).unwrap();
                    session.score(&tokens[from..to], &mut scores[from - 1..to - 1]).unwrap();
                }
                from = to;
            }
            scores.iter().map(|score| score.to_bits()).collect::<Vec<_>>()
        };
        let whole = of(&[], false);
        let every: Vec<usize> = (2..tokens.len()).collect();
        for cuts in [&[][..], &[2], &[17, 33], &every] {
            assert_eq!(of(cuts, true), whole, "{name}, cut at {cuts:?}");
            assert_eq!(of(cuts, false), whole, "{name}, cut at {cuts:?}, pending");
        }
    }
}
