//! A golden checkpoint beside what the float64 reference says of it.

use std::path::Path;

use gemmoe::backend::{KvDtype, Variants};
use gemmoe::{LoadOptions, Sampling};
use serde_json::Value;

use super::{load_options, session_with};

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Asserts that every logit is within `tolerance` of the reference, as a share of the largest logit, and answers the largest
/// error. With `compare_choices` routes and greedy tokens have to be the reference's too. The checkpoint's own variants replace
/// those of `options`.
pub fn check(path: &Path, options: &LoadOptions, tolerance: f64, compare_choices: bool) -> f64 {
    let name = path.file_name().unwrap().to_string_lossy();
    let expected: Value = serde_json::from_slice(&std::fs::read(path.join("expected.json")).unwrap()).unwrap();
    let option = |key: &str| expected["options"][key].as_bool().unwrap_or(false);
    let variants =
        Variants { unrounded_embedding_scale: option("unrounded_embedding_scale"), exact_gelu: option("exact_gelu") };
    let model = load_options(path, &LoadOptions { variants, ..*options });
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
        if !compare_choices {
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
