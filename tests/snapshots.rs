//! Sessions as bytes: they go on in another process bit for bit, and bytes that are not a snapshot are an error and nothing
//! worse.

mod common;
#[path = "common/counting.rs"]
mod counting;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

#[path = "snapshots/forged.rs"]
mod forged;
#[path = "snapshots/process.rs"]
mod process;

use std::sync::Arc;

use common::{Directory, Random, load, load_options};
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::{KvDtype, Variants};
use gemmoe::text::grammar::{Grammar, GrammarKind};
use gemmoe::{LoadOptions, LogitBias, Model, Overflow, Result, Sampling, Session, SessionOptions, Status};
use serde_json::json;

/// A model with a tokenizer, and few enough parameters that a snapshot is small.
fn directory() -> Directory {
    let changes = json!({
        "vocab_size": tokenizer_sample::VOCAB_SIZE, "max_position_embeddings": 64, "hidden_size": 16,
        "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4
    });
    Directory::random_with(91, changes)
}

fn written(directory: &Directory) -> tempfile::TempDir {
    let written = directory.to_temporary();
    std::fs::write(written.path().join("tokenizer.json"), tokenizer_sample::sample().to_string()).unwrap();
    written
}

fn new_session(model: &Arc<Model>, context_size: usize, kv_dtype: KvDtype) -> Session {
    let options = SessionOptions { context_size, prefill_chunk: 5, kv_dtype: Some(kv_dtype), ..Default::default() };
    Session::new(Arc::clone(model), &options).unwrap()
}

fn bytes_of(session: &Session) -> Vec<u8> {
    let mut bytes = vec![0; session.snapshot_bytes()];
    session.snapshot(&mut bytes).unwrap();
    bytes
}

fn restored(model: &Arc<Model>, bytes: &[u8]) -> Result<Session> {
    Session::restore(Arc::clone(model), bytes, &SessionOptions::default())
}

fn status_of(model: &Arc<Model>, bytes: &[u8]) -> Status {
    restored(model, bytes).err().map_or(Status::Ok, |error| error.status())
}

/// Sessions of every kind of state there is.
fn sessions(model: &Arc<Model>) -> Vec<(&'static str, Session)> {
    let mut random = Random::new(92);
    let mut all = vec![("new", new_session(model, 30, KvDtype::F32))];
    for (name, dtype) in ["f32", "bf16", "f16", "int8"].into_iter().zip(KvDtype::ALL) {
        let mut session = new_session(model, 40, dtype);
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 5, ..Default::default() };
        session.set_sampling(sampling).unwrap();
        session.prefill(&random.tokens(21, 300)).unwrap();
        session.step().unwrap();
        all.push((name, session));
    }
    let mut pending = new_session(model, 40, KvDtype::F16);
    pending.prefill(&[2, 3, 4]).unwrap();
    pending.push(&random.tokens(20, 300)).unwrap();
    all.push(("pending", pending));

    let slide = Overflow::Slide { keep: 3 };
    let options = SessionOptions { context_size: 18, overflow: slide, ..Default::default() };
    let mut sliding = Session::new(Arc::clone(model), &options).unwrap();
    let sampling = Sampling {
        temperature: 0.8,
        top_k: 50,
        min_p: 0.01,
        repetition_penalty: 1.2,
        presence_penalty: 0.1,
        frequency_penalty: 0.2,
        penalty_window: 9,
        seed: 6,
        ..Default::default()
    };
    sliding.set_sampling(sampling).unwrap();
    sliding.set_logit_bias(LogitBias::new(&[(9, f32::NEG_INFINITY), (70, 1.5)], 320).unwrap());
    sliding.set_allowed_experts(Some(0), 0b1011).unwrap();
    sliding.set_expert_bias(None, &[0.5, -0.5, 0.0, 1.0]).unwrap();
    sliding.prefill(&random.tokens(40, 300)).unwrap();
    for _ in 0..20 {
        sliding.step().unwrap();
    }
    all.push(("sliding, with every setting", sliding));

    let schema = r#"{"type": "object", "properties": {"hello": {"type": "integer"}}, "required": ["hello"]}"#;
    let grammar = Grammar::new(model.grammar_vocabulary().unwrap(), GrammarKind::JsonSchema, schema).unwrap();
    let mut constrained = new_session(model, 40, KvDtype::F32);
    constrained.prefill(&[2, 3, 4]).unwrap();
    constrained.set_grammar(Some(&grammar)).unwrap();
    constrained.set_sampling(Sampling { temperature: 1.0, seed: 7, ..Default::default() }).unwrap();
    for _ in 0..5 {
        constrained.step().unwrap();
    }
    all.push(("constrained", constrained));
    all
}

#[test]
fn a_snapshot_needs_as_many_bytes_as_it_says() {
    let directory = written(&directory());
    for (name, session) in sessions(&load(directory.path())) {
        let needed = session.snapshot_bytes();
        for wrong in [0, needed - 1, needed + 1] {
            let error = session.snapshot(&mut vec![0; wrong]).unwrap_err();
            assert_eq!((error.status(), error.key()), (Status::BufferTooSmall, Some("bytes")), "{name}");
        }
    }
}

#[test]
fn a_restored_session_writes_the_same_snapshot() {
    let directory = written(&directory());
    let model = load(directory.path());
    for (name, session) in sessions(&model) {
        let bytes = bytes_of(&session);
        assert_eq!(bytes_of(&restored(&model, &bytes).unwrap()), bytes, "{name}");
    }
}

/// The smallest with all parts but a grammar.
fn small(model: &Arc<Model>) -> Vec<u8> {
    let mut session = new_session(model, 20, KvDtype::F32);
    session.set_logit_bias(LogitBias::new(&[(9, -1.0)], 11).unwrap());
    session.set_allowed_experts(Some(0), 0b1011).unwrap();
    session.prefill(&[2, 3]).unwrap();
    bytes_of(&session)
}

fn small_directory() -> Directory {
    let mut directory = directory();
    let (shape, values) = directory.tensors.get_mut("model.embed_tokens.weight").unwrap();
    shape[0] = 11;
    values.truncate(11 * 16);
    directory.config["vocab_size"] = json!(11);
    directory
}

#[test]
fn a_snapshot_with_any_bit_changed_is_damaged() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let mut bytes = small(&model);
    assert_eq!(status_of(&model, &bytes), Status::Ok);
    for at in 0..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            assert_eq!(status_of(&model, &bytes), Status::SnapshotDamaged, "byte {at}, bit {bit}");
            bytes[at] ^= 1 << bit;
        }
    }
}

#[test]
fn a_snapshot_cut_anywhere_or_with_bytes_after_it_is_damaged() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let bytes = small(&model);
    for length in 0..bytes.len() {
        assert_eq!(status_of(&model, &bytes[..length]), Status::SnapshotDamaged, "{length}");
    }
    for more in [1, 8, 100, bytes.len()] {
        for value in [0, 0xff] {
            let longer = [&bytes[..], &vec![value; more]].concat();
            assert_eq!(status_of(&model, &longer), Status::SnapshotDamaged, "{more} more");
        }
    }
    assert_eq!(status_of(&model, &[&bytes[..], &bytes[..]].concat()), Status::SnapshotDamaged);
}

#[test]
fn a_snapshot_of_another_model_is_told_apart() {
    let model_of = |directory: &Directory| load(directory.to_temporary().path());
    let original = small_directory();
    let bytes = small(&model_of(&original));
    assert_eq!(status_of(&model_of(&original), &bytes), Status::Ok, "the same directory loaded again");
    for name in original.tensors.keys() {
        let mut other = original.clone();
        let values = &mut other.tensors.get_mut(name).unwrap().1;
        let middle = values.len() / 2;
        values[middle] += 1.0;
        assert_eq!(status_of(&model_of(&other), &bytes), Status::SnapshotModel, "{name}");
    }
    let directory = original.to_temporary();
    let three_threads =
        LoadOptions { cpu: CpuOptions { threads: 3.into(), ..Default::default() }, ..Default::default() };
    assert_eq!(status_of(&load_options(directory.path(), &three_threads), &bytes), Status::Ok);
    let variants = Variants { exact_gelu: true, ..Default::default() };
    let exact_gelu = LoadOptions { variants, ..Default::default() };
    assert_eq!(status_of(&load_options(directory.path(), &exact_gelu), &bytes), Status::SnapshotModel);
}

#[test]
fn options_that_contradict_a_snapshot_are_refused_and_others_taken() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let mut session = new_session(&model, 20, KvDtype::Int8);
    session.prefill(&[2; 17]).unwrap();
    let bytes = bytes_of(&session);
    let plain = SessionOptions::default();
    let restore = |options| Session::restore(Arc::clone(&model), &bytes, &options);
    let refused = [
        (SessionOptions { context_size: 16, ..plain }, Status::InvalidArgument, "context_size"),
        (SessionOptions { context_size: 65, ..plain }, Status::InvalidArgument, "context_size"),
        (SessionOptions { kv_dtype: Some(KvDtype::F32), ..plain }, Status::InvalidArgument, "kv_dtype"),
        (SessionOptions { overflow: Overflow::Slide { keep: 19 }, ..plain }, Status::InvalidArgument, "keep_tokens"),
        (SessionOptions { kv_limit_bytes: 100, ..plain }, Status::KvLimit, "kv_limit_bytes"),
    ];
    for (options, status, key) in refused {
        let error = restore(options).err().unwrap();
        assert_eq!((error.status(), error.key()), (status, Some(key)), "{options:?}");
    }
    let longer = SessionOptions { context_size: 60, overflow: Overflow::Slide { keep: 2 }, ..plain };
    let mut longer = restore(longer).unwrap();
    assert_eq!((longer.context_size(), longer.tokens().len()), (60, 17));
    for _ in 0..100 {
        longer.step().unwrap();
    }
    assert!(longer.dropped() > 0);
    assert!(restore(SessionOptions { context_size: 17, ..plain }).unwrap().step().is_err(), "it is full");
}

#[test]
fn a_window_that_has_dropped_tokens_keeps_as_many_when_it_is_restored() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let keeping = |keep| SessionOptions { context_size: 20, overflow: Overflow::Slide { keep }, ..Default::default() };
    let mut session = Session::new(Arc::clone(&model), &keeping(3)).unwrap();
    session.prefill(&[2; 18]).unwrap();
    let whole = bytes_of(&session);
    session.prefill(&[2; 18]).unwrap();
    assert!(session.dropped() > 0);
    let slid = bytes_of(&session);
    let restore = |bytes: &[u8], keep| Session::restore(Arc::clone(&model), bytes, &keeping(keep)).map(drop);
    restore(&whole, 8).unwrap();
    restore(&slid, 3).unwrap();
    for keep in [0, 2, 8] {
        // Positions of routes, and what a rewind forgets, would be wrong.
        let error = restore(&slid, keep).unwrap_err();
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("keep_tokens")));
    }
}
