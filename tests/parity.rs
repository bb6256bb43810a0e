//! Logits, greedy tokens and router choices against the float64 reference of `tools/reference`, over every layout,
//! dtype, expert count and odd size in `tests/golden`, on every instruction set this machine has.

mod common;

use common::{golden, load_options, session_with};
use gemmoe::backend::KvDtype;
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cpu::kernels::{Instructions, Kernels};
use gemmoe::{LoadOptions, Sampling};
use serde_json::Value;

/// Of the largest logit. Tighter than the 2e-4 that was promised: the two GeLUs can differ by as little as 1e-4.
const TOLERANCE: f64 = 2e-5;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn check_directory(path: &std::path::Path, instructions: Instructions) -> f64 {
    let name = path.file_name().unwrap().to_string_lossy();
    let expected: Value = serde_json::from_slice(&std::fs::read(path.join("expected.json")).unwrap()).unwrap();
    let option = |key: &str| expected["options"][key].as_bool().unwrap_or(false);
    let cpu = CpuOptions {
        threads: 2,
        instructions,
        unrounded_embedding_scale: option("unrounded_embedding_scale"),
        exact_gelu: option("exact_gelu"),
    };
    let model = load_options(path, &LoadOptions { cpu, ..Default::default() });
    let mut worst = 0f64;
    for case in expected["cases"].as_array().unwrap() {
        let tokens = ids(&case["tokens"]);
        let mut session = session_with(&model, KvDtype::F32);
        session.set_sampling(Sampling::default()).unwrap();
        session.prefill(&tokens).unwrap();
        let logits: Vec<f64> = case["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
        let largest = logits.iter().fold(0f64, |max, value| max.max(value.abs()));
        let found = session.logits().unwrap();
        assert_eq!(found.len(), logits.len());
        for (found, expected) in found.iter().zip(&logits) {
            let error = (*found as f64 - expected).abs() / largest;
            assert!(error < TOLERANCE, "{name}, {} tokens: relative error {error:.2e}", tokens.len());
            worst = worst.max(error);
        }
        for (layer, experts) in case["experts"].as_array().unwrap().iter().enumerate() {
            assert_eq!(session.routes(layer).unwrap().experts, ids(experts), "{name}, layer {layer}");
        }
        let greedy = ids(&case["greedy"]);
        let generated: Vec<u32> = greedy.iter().map(|_| session.step().unwrap()).collect();
        assert_eq!(generated, greedy, "{name}, {} tokens", tokens.len());
    }
    worst
}

#[test]
fn every_golden_checkpoint_agrees_with_the_float64_reference() {
    for instructions in [Instructions::Portable, Instructions::Avx2, Instructions::Avx512] {
        if Kernels::get(instructions).is_err() {
            continue;
        }
        let errors = golden().iter().map(|path| check_directory(path, instructions)).collect::<Vec<_>>();
        let worst = errors.iter().copied().fold(0f64, f64::max);
        println!("{instructions:?}: {} checkpoints, worst relative error {worst:.2e}", errors.len());
    }
}
