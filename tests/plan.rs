//! The memory plan of a directory is what the model and its sessions take once it is loaded, to the byte.

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use common::{Directory, golden, load_options};
use gemmoe::backend::KvDtype;
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::quant::{Format, Groups, ScaleDtype};
use gemmoe::{Formats, LoadOptions, Model, Overflow, Session, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;

/// Options that lead to different sizes.
fn session_options() -> Vec<SessionOptions> {
    let plain = SessionOptions::default();
    let mut rows = vec![
        plain,
        SessionOptions { context_size: 1, ..plain },
        SessionOptions { context_size: 17, prefill_chunk: 3, ..plain },
        SessionOptions { context_size: 33, prefill_chunk: 1000, overflow: Overflow::Slide { keep: 2 }, ..plain },
        SessionOptions { kv_limit_bytes: 40_000, ..plain },
        SessionOptions { batch_only: true, route_capacity: 5, ..plain },
    ];
    rows.extend(KvDtype::ALL.map(|dtype| SessionOptions { context_size: 31, kv_dtype: Some(dtype), ..plain }));
    rows
}

/// Compares the plans of a directory with what is used, and returns the bytes of its weights.
fn check(directory: &Path, threads: usize) -> (u64, u64) {
    check_in(directory, threads, Formats::default())
}

/// The same with weights rounded on load.
fn check_in(directory: &Path, threads: usize, formats: Formats) -> (u64, u64) {
    let name = directory.display();
    let cpu = CpuOptions { threads: threads.into(), ..Default::default() };
    let load = LoadOptions { cpu, formats, ..Default::default() };
    let model = load_options(directory, &load);
    for options in session_options() {
        let plan = match (Model::plan(directory, &load, &options), Session::new(Arc::clone(&model), &options)) {
            (Ok(plan), Ok(session)) => {
                assert_eq!(plan.context_size, session.context_size(), "{name}, {options:?}");
                assert_eq!(plan.kv_dtype, session.kv_dtype(), "{name}, {options:?}");
                assert_eq!(plan.kv_bytes, session.kv_bytes() as u64, "{name}, {options:?}");
                let workspace = (session.bytes() - session.kv_bytes()) as u64;
                assert_eq!(plan.workspace_bytes, workspace, "{name}, {options:?}");
                assert_eq!(workspace == 0, options.batch_only);
                plan
            }
            (plan, session) => {
                assert_eq!(plan.unwrap_err(), session.map(drop).unwrap_err(), "{name}, {options:?}");
                continue;
            }
        };
        let (weights, experts) = model.backend().weight_bytes();
        assert_eq!((plan.weight_bytes, plan.expert_bytes), (weights as u64, experts as u64), "{name}");
        assert_eq!(plan.device_name, model.backend().device_name(), "{name}");
        assert_eq!(plan.formats, *model.formats(), "{name}");
        assert_eq!(plan.kv_bytes, plan.kv_bytes_per_token * plan.context_size.next_multiple_of(16) as u64, "{name}");
        let tokenizer = model.tokenizer().map_or(0, |tokenizer| tokenizer.bytes_in_use());
        assert_eq!(plan.tokenizer_bytes, tokenizer as u64, "{name}");
        let session = plan.kv_bytes + plan.workspace_bytes;
        assert_eq!(plan.total_bytes(3), plan.weight_bytes + plan.tokenizer_bytes + 3 * session, "{name}");
    }
    let (weights, experts) = model.backend().weight_bytes();
    (weights as u64, experts as u64)
}

#[test]
fn the_plan_of_every_golden_directory_is_what_is_used() {
    for (index, directory) in golden().iter().enumerate() {
        check(directory, 1 + index % 3);
    }
}

#[test]
fn the_plan_of_the_demo_model_with_its_tokenizer_is_what_is_used() {
    check(&common::repository().join("examples/demo-model"), 2);
}

#[test]
fn random_models_of_every_dtype_take_what_the_plan_says() {
    let mut sizes = BTreeSet::new();
    let shapes = [json!({}), json!({"num_local_experts": 1, "num_experts_per_tok": 1}), json!({"vocab_size": 301})];
    for (seed, shape) in (1..).zip(shapes) {
        for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
            let mut directory = Directory::random_with(seed, shape.clone());
            directory.dtype = dtype;
            sizes.insert(check(directory.to_temporary().path(), 2));
        }
    }
    // Two sizes a shape: bf16 and f16 take the same.
    assert_eq!(sizes.len(), 6);
}

#[test]
fn weights_rounded_on_load_take_what_the_plan_says() {
    let none = Formats::default();
    let wide = Format::Int4(Groups { size: 128, scales: ScaleDtype::F16 });
    let rows = [
        Formats { experts: Some(Format::INT4), ..none },
        Formats { attention: Some(Format::INT8), head: Some(Format::INT8), ..none },
        Formats { head: Some(Format::INT8), embedding: Some(wide), ..none },
        Formats { experts: Some(wide), attention: Some(wide), embedding: Some(Format::INT4), ..none },
    ];
    let mut sizes = BTreeSet::new();
    for formats in rows {
        sizes.insert(check_in(Directory::random(17).to_temporary().path(), 2, formats));
        let untied = common::golden().into_iter().nth(1).unwrap();
        check_in(&untied, 1, formats);
    }
    assert_eq!(sizes.len(), rows.len());
}

/// One tensor after the other in another dtype than the rest.
#[test]
fn a_gate_or_up_of_its_own_dtype_is_planned_as_both_are_held() {
    let directory = Directory::random(7);
    let base = check(directory.to_temporary().path(), 1);
    let expert = "model.layers.1.block_sparse_moe.experts.2";
    // (tensors in f32, bytes more of everything, and of the experts): gate and up have 24 rows of 40, which are held as 32,
    // down 40 rows of 24, held as 48.
    let (inner, outer) = (32 * 40, 48 * 24);
    let rows = [
        (vec![format!("{expert}.w1.weight")], 2 * 2 * inner, 2 * 2 * inner),
        (vec![format!("{expert}.w3.weight")], 2 * 2 * inner, 2 * 2 * inner),
        (vec![format!("{expert}.w1.weight"), format!("{expert}.w3.weight")], 2 * 2 * inner, 2 * 2 * inner),
        (vec![format!("{expert}.w2.weight")], 2 * outer, 2 * outer),
        (vec!["model.embed_tokens.weight".to_owned()], 2 * 112 * 40, 0),
        (vec!["model.norm.weight".to_owned()], 0, 0),
        (vec!["model.layers.0.block_sparse_moe.gate.weight".to_owned()], 0, 0),
    ];
    for (names, more, more_experts) in rows {
        let written = directory.to_temporary();
        let wide = Directory { dtype: Dtype::F32, ..directory.clone() };
        let is_wide = |name: &str| names.iter().any(|wide| wide == name);
        std::fs::remove_file(written.path().join("model.safetensors")).unwrap();
        std::fs::write(written.path().join("a.safetensors"), directory.safetensors(|name| !is_wide(name))).unwrap();
        std::fs::write(written.path().join("b.safetensors"), wide.safetensors(is_wide)).unwrap();
        let shard = |name: &String| if is_wide(name) { "b.safetensors" } else { "a.safetensors" };
        let map: serde_json::Map<_, _> =
            directory.tensors.keys().map(|name| (name.clone(), json!(shard(name)))).collect();
        let index = json!({"metadata": {}, "weight_map": map});
        std::fs::write(written.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
        assert_eq!(check(written.path(), 1), (base.0 + more, base.1 + more_experts), "{names:?}");
    }
}

#[test]
fn what_a_session_or_a_load_would_refuse_the_plan_refuses() {
    let written = Directory::random(8).to_temporary();
    let plan = |load: LoadOptions, session: SessionOptions| {
        let error = Model::plan(written.path(), &load, &session).unwrap_err();
        (error.status(), error.key().unwrap_or_default().to_owned())
    };
    let (load, session) = (LoadOptions::default(), SessionOptions::default());
    let too_long = SessionOptions { context_size: 513, ..session };
    assert_eq!(plan(load, too_long), (Status::InvalidArgument, "context_size".into()));
    let keeps_all = SessionOptions { context_size: 8, overflow: Overflow::Slide { keep: 7 }, ..session };
    assert_eq!(plan(load, keeps_all), (Status::InvalidArgument, "keep_tokens".into()));
    let threads = LoadOptions { cpu: CpuOptions { threads: (1 << 20).into(), ..Default::default() }, ..load };
    assert_eq!(plan(threads, session), (Status::InvalidArgument, "threads".into()));
    let limited = LoadOptions { kv_limit_bytes: 1000, ..load };
    assert_eq!(plan(limited, session), (Status::KvLimit, "kv_limit_bytes".into()));
    let missing = Model::plan(Path::new("/nonexistent-model"), &load, &session).unwrap_err();
    assert_eq!(missing.status(), Status::DirectoryNotFound);
}

/// The weights of this one are not in its file at all: only its length is.
#[test]
fn no_weights_are_read_and_no_memory_is_asked_for() {
    let shape = json!({"vocab_size": 1000, "hidden_size": 64, "max_position_embeddings": 1 << 20});
    let directory = Directory::random_with(9, shape);
    let file = directory.safetensors(|_| true);
    let header = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let written = tempfile::tempdir().unwrap();
    std::fs::write(written.path().join("config.json"), directory.config.to_string()).unwrap();
    let path = written.path().join("model.safetensors");
    std::fs::write(&path, &file[..header]).unwrap();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(file.len() as u64).unwrap();
    let options = SessionOptions { context_size: 1 << 20, kv_dtype: Some(KvDtype::F32), ..Default::default() };
    let plan = Model::plan(written.path(), &LoadOptions::default(), &options).unwrap();
    // Keys and values, 2 layers, 2 heads of 8, f32.
    assert_eq!(plan.kv_bytes, (1 << 20) * 2 * 2 * 2 * 8 * 4);
}
