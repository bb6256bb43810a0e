//! Golden gradients of gates (`tests/golden_gradients`, written by `tools/reference/make_gradient_golden.py`): their cases, and
//! a model's gradients beside them.
#![allow(dead_code)] // Each test file uses its own part.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gemmoe::Model;
use gemmoe::backend::Variants;
use gemmoe::train::{
    BalanceForm, Document, Pair, PreferenceLoss, PreferenceOptions, RouterLosses, RouterTrainer, StepMetrics,
    TrainOptions,
};
use safetensors::SafeTensors;
use serde_json::Value;

use super::common::repository;

/// A checkpoint's cases and what autograd made of them.
pub struct Golden {
    directory: PathBuf,
    cases: Value,
    gradients: Vec<u8>,
}

impl Golden {
    /// Of every checkpoint.
    pub fn all() -> Vec<Golden> {
        let read = |directory: PathBuf| Golden {
            cases: serde_json::from_slice(&std::fs::read(directory.join("cases.json")).unwrap()).unwrap(),
            gradients: std::fs::read(directory.join("gradients.safetensors")).unwrap(),
            directory,
        };
        let golden = repository().join("tests/golden_gradients");
        ["grouped_heads", "top3_own_head_exact_gelu"].map(|name| read(golden.join(name))).into()
    }

    /// The checkpoint.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// How it is to be loaded.
    pub fn variants(&self) -> Variants {
        Variants { exact_gelu: self.cases["exact_gelu"].as_bool().unwrap(), ..Default::default() }
    }

    /// Each layer's gradient is within 1e-4 of autograd's, and the loss is that of the case; the largest error is returned.
    pub fn check(&self, model: &Arc<Model>) -> f64 {
        let file = SafeTensors::deserialize(&self.gradients).unwrap();
        let mut worst = 0f64;
        for case in self.cases["cases"].as_array().unwrap() {
            let name = case["name"].as_str().unwrap();
            let mut trainer = RouterTrainer::new(model, &options(case)).unwrap();
            trainer.set_gates(&numbers(&file, "gates")).unwrap();
            let metrics = gradient(&mut trainer, case);
            let expected = numbers(&file, name);
            let size = expected.len() / model.config().num_hidden_layers;
            let parts = trainer.gradients().chunks_exact(size).zip(expected.chunks_exact(size));
            for (layer, (found, expected)) in parts.enumerate() {
                let error = relative_error(found, expected);
                assert!(error < 1e-4, "{}, {name}, layer {layer}: off by {error}", self.directory.display());
                worst = worst.max(error);
            }
            let value = case["value"].as_f64().unwrap();
            assert!((metrics.loss - value).abs() < 5e-5 * value.abs().max(1.0), "{name}: {} {value}", metrics.loss);
        }
        worst
    }
}

/// Nothing but the text's loss.
pub fn plain() -> TrainOptions {
    let router = RouterLosses { balance: 0.0, form: BalanceForm::Global, z: 0.0 };
    TrainOptions { max_tokens: 160, router, ..Default::default() }
}

fn numbers(file: &SafeTensors, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn documents(case: &Value) -> Vec<Document> {
    let document = |value: &Value| Document {
        tokens: value[0].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect(),
        is_response: value[1].as_array().unwrap().iter().map(|flag| flag.as_bool().unwrap()).collect(),
    };
    case["documents"].as_array().unwrap().iter().map(document).collect()
}

fn options(case: &Value) -> TrainOptions {
    let number = |key: &str| case.get(key).map_or(0.0, |value| value.as_f64().unwrap());
    let flag = |key: &str| case.get(key).is_some_and(|value| value.as_bool().unwrap());
    let form = if case["form"] == "per_layer" { BalanceForm::PerLayer } else { BalanceForm::Global };
    TrainOptions {
        fill: case.get("padding").is_some(),
        soft: flag("soft"),
        router: RouterLosses { balance: number("balance"), form, z: number("z") },
        preference: PreferenceOptions {
            loss: if case["loss"] == "ipo" { PreferenceLoss::Ipo } else { PreferenceLoss::Sigmoid },
            beta: case.get("beta").map_or(0.1, |beta| beta.as_f64().unwrap()),
            label_smoothing: number("label_smoothing"),
            mean_log_probability: flag("mean_log_probability"),
        },
        ..plain()
    }
}

fn gradient(trainer: &mut RouterTrainer, case: &Value) -> StepMetrics {
    let documents = documents(case);
    if case["loss"] == "sft" {
        return trainer.gradient(&documents).unwrap();
    }
    let pairs = documents.chunks_exact(2).map(|pair| Pair::new(pair[0].clone(), pair[1].clone()));
    trainer.gradient_of_pairs(&mut pairs.collect::<Vec<_>>()).unwrap()
}

/// The norm of the difference, relative to the norm of what is expected.
pub fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |numbers: &mut dyn Iterator<Item = f64>| numbers.map(|number| number * number).sum::<f64>().sqrt();
    let difference = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / norm(&mut expected.iter().map(|number| f64::from(*number)))
}
