//! Logits, greedy tokens and router choices against the float64 reference of `tools/reference`, over every layout,
//! dtype, expert count and odd size in `tests/golden`, on every instruction set this machine has.

mod common;

use common::{golden, load_options, session_with};
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cpu::kernels::{Instructions, Kernels, Precision};
use gemmoe::backend::{KvDtype, Variants};
use gemmoe::quant::Format;
use gemmoe::{LoadOptions, Model, Sampling};
use serde_json::Value;

/// Of the largest logit, where activations are f32. Tighter than the 2e-4 that was promised: the two GeLUs can differ by as
/// little as 1e-4.
const TOLERANCE: f64 = 2e-5;
/// The same where activations are rounded to bf16 before they meet bf16 weights, as AVX-512 does. Routers may then choose
/// differently where two experts are close, so routes and greedy tokens are not compared.
const TOLERANCE_BF16: f64 = 5e-2;

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Whether this instruction set rounds activations that meet this directory's weights, some of which may be bf16.
fn rounds_activations(path: &std::path::Path, instructions: Instructions) -> bool {
    let dtypes = Model::inspect(path, &LoadOptions::default()).unwrap().0.dtypes;
    let kernels = Kernels::get(instructions).unwrap();
    dtypes.iter().any(|dtype| dtype == "BF16") && kernels.precision(Format::Bf16) != Precision::F32
}

fn check_directory(path: &std::path::Path, instructions: Instructions) -> f64 {
    let name = path.file_name().unwrap().to_string_lossy();
    let expected: Value = serde_json::from_slice(&std::fs::read(path.join("expected.json")).unwrap()).unwrap();
    let option = |key: &str| expected["options"][key].as_bool().unwrap_or(false);
    let cpu = CpuOptions { threads: 2.into(), instructions };
    let variants =
        Variants { unrounded_embedding_scale: option("unrounded_embedding_scale"), exact_gelu: option("exact_gelu") };
    let model = load_options(path, &LoadOptions { cpu, variants, ..Default::default() });
    let rounds = rounds_activations(path, instructions);
    let tolerance = if rounds { TOLERANCE_BF16 } else { TOLERANCE };
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
            assert!(error < tolerance, "{name}, {} tokens: relative error {error:.2e}", tokens.len());
            worst = worst.max(error);
        }
        if rounds {
            continue;
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
    for instructions in Instructions::ALL {
        if Kernels::get(instructions).is_err() {
            continue;
        }
        let errors = golden().iter().map(|path| check_directory(path, instructions)).collect::<Vec<_>>();
        let worst = errors.iter().copied().fold(0f64, f64::max);
        println!("{instructions:?}: {} checkpoints, worst relative error {worst:.2e}", errors.len());
    }
}
