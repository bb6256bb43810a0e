//! Gradients of gates against autograd (`tests/golden_gradients`), against differences, and among each other.

mod common;
#[path = "common/gradients.rs"]
mod golden_gradients;

use std::path::Path;
use std::sync::Arc;

use common::{Directory, Random, load_options, load_with, repository};
use gemmoe::backend::Variants;
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cpu::kernels::{Instructions, Kernels};
use gemmoe::quant::{Format, Groups, ScaleDtype, Shape, Source, pack, unpack_row};
use gemmoe::train::adamw::norm;
use gemmoe::train::{
    AdamW, BalanceForm, Decay, Document, OptimiserOptions, Pair, PreferenceLoss, PreferenceOptions, RouterLosses,
    RouterTrainer, TrainOptions,
};
use gemmoe::{Formats, LoadOptions, Model, Status};
use golden_gradients::{Golden, plain, relative_error};
use safetensors::Dtype;
use serde_json::{Value, json};

fn golden_model(directory: &Path, variants: Variants, instructions: Instructions) -> Arc<Model> {
    let cpu = CpuOptions { threads: 2.into(), instructions };
    load_options(directory, &LoadOptions { cpu, variants, ..Default::default() })
}

#[test]
fn every_layers_gradient_is_autograds() {
    for golden in Golden::all() {
        for instructions in Instructions::ALL.into_iter().filter(|set| Kernels::get(*set).is_ok()) {
            golden.check(&golden_model(golden.directory(), golden.variants(), instructions));
        }
    }
}

/// A small f32 model whose sizes are no multiples of anything.
fn odd_model(seed: u64, changes: Value) -> Directory {
    let mut all = json!({"hidden_size": 36, "head_dim": 6, "intermediate_size": 21, "num_hidden_layers": 3});
    changes.as_object().unwrap().iter().for_each(|(key, value)| all[key] = value.clone());
    let mut directory = Directory::random_with(seed, all);
    directory.dtype = Dtype::F32;
    directory
}

fn random_documents(seed: u64, lengths: &[(usize, usize)]) -> Vec<Document> {
    let mut random = Random::new(seed);
    lengths
        .iter()
        .map(|(prompt, response)| {
            let prompt = [&[2], &random.tokens(prompt - 1, 97)[..]].concat();
            Document::new(&prompt, &random.tokens(*response, 97))
        })
        .collect()
}

fn random_pairs(seed: u64, lengths: &[(usize, usize)]) -> Vec<Pair> {
    let documents = random_documents(seed, lengths);
    documents.chunks_exact(2).map(|pair| Pair::new(pair[0].clone(), pair[1].clone())).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// The gates somewhere along a direction.
fn moved(gates: &[f32], direction: &[f32], by: f32) -> Vec<f32> {
    gates.iter().zip(direction).map(|(gate, along)| gate + by * along).collect()
}

#[test]
fn every_losss_gradient_is_what_differences_say() {
    let directory = odd_model(5, json!({"num_hidden_layers": 2, "num_local_experts": 5, "num_experts_per_tok": 3}));
    let directory = directory.to_temporary();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let router = |balance, form, z| RouterLosses { balance, form, z };
    let preference = |loss, label_smoothing| PreferenceOptions { loss, label_smoothing, ..Default::default() };
    let cases = [
        ("text", false, plain()),
        ("balance, global", false, TrainOptions { router: router(4.0, BalanceForm::Global, 0.0), ..plain() }),
        ("balance, per layer", false, TrainOptions { router: router(4.0, BalanceForm::PerLayer, 0.0), ..plain() }),
        ("z", false, TrainOptions { router: router(0.0, BalanceForm::Global, 1.0), ..plain() }),
        ("soft", false, TrainOptions { soft: true, ..plain() }),
        ("sigmoid", true, TrainOptions { preference: preference(PreferenceLoss::Sigmoid, 0.0), ..plain() }),
        ("smoothed", true, TrainOptions { preference: preference(PreferenceLoss::Sigmoid, 0.2), ..plain() }),
        ("ipo", true, TrainOptions { preference: preference(PreferenceLoss::Ipo, 0.0), ..plain() }),
    ];
    let documents = random_documents(9, &[(3, 11), (5, 14)]);
    let mut pairs = random_pairs(10, &[(4, 8), (4, 10), (6, 7), (6, 5)]);
    for (name, of_pairs, options) in cases {
        let mut trainer = RouterTrainer::new(&model, &options).unwrap();
        let gates = trainer.gates().to_vec();
        let mut run = |trainer: &mut RouterTrainer| match of_pairs {
            true => trainer.gradient_of_pairs(&mut pairs).unwrap(),
            false => trainer.gradient(&documents).unwrap(),
        };
        // The direction of the gradient itself, in which most happens, and two that are as good as any.
        let norm = run(&mut trainer).gradient_norm;
        let gradient = trainer.gradients().to_vec();
        let mut random = Random::new(3);
        let mut directions = vec![gradient.iter().map(|number| number / norm as f32).collect::<Vec<f32>>()];
        for _ in 0..2 {
            let near = gradient.iter().map(|number| number / norm as f32 + 0.15 * random.unit()).collect();
            directions.push(near);
        }
        for (index, direction) in directions.iter().enumerate() {
            let expected: f64 = gradient.iter().zip(direction).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            // The loss jumps where a token changes its experts: a step so small that none does.
            let mut at = |by: f32| {
                trainer.set_gates(&moved(&gates, direction, by)).unwrap();
                let metrics = run(&mut trainer);
                (metrics.loss, metrics.shares)
            };
            let mut step = 0.01f32;
            let found = loop {
                let (before, here, after) = (at(-step), at(0.0), at(step));
                if before.1 == here.1 && after.1 == here.1 {
                    break (after.0 - before.0) / (2.0 * f64::from(step));
                }
                step *= 0.7;
                assert!(step > 3e-4, "{name}: every step changes a choice");
            };
            let error = (found - expected).abs() / expected.abs();
            assert!(error < 2e-3, "{name}, direction {index}, step {step}: {found} and {expected}");
        }
    }
}

/// Everything of a model as f32 numbers, rounded as `format` holds matrices.
fn rounded(directory: &Directory, format: Format) -> Directory {
    let mut wide = directory.clone();
    wide.dtype = Dtype::F32;
    for (name, (shape, values)) in wide.tensors.iter_mut() {
        let bytes = directory.tensor_bytes(values);
        let columns = *shape.last().unwrap();
        let rows = values.len() / columns;
        let is_plain = name.contains("norm") || name.contains("gate.weight") || format.groups().is_none();
        let held = if is_plain { Format::of_dtype(directory.dtype).unwrap() } else { format };
        let shape = Shape { rows, columns, format: held };
        let (mut lines, mut scales) = (vec![0; shape.line_bytes()], vec![0; shape.scale_bytes()]);
        let source = Source { dtype: directory.dtype, bytes: &bytes, columns, importance: None };
        pack(&source, &shape, &mut lines, &mut scales).unwrap();
        for (row, out) in values.chunks_exact_mut(columns).enumerate() {
            unpack_row(&shape, &lines, &scales, row, out);
        }
    }
    wide
}

#[test]
fn weights_of_every_format_give_the_bits_of_the_f32_model_they_stand_for() {
    // 64 has a root that no dtype rounds.
    let changes = json!({"hidden_size": 64, "intermediate_size": 75, "num_experts_per_tok": 3});
    for (format, dtype) in [
        (Format::Bf16, Dtype::BF16),
        (Format::F16, Dtype::F16),
        (Format::INT8, Dtype::BF16),
        (Format::INT4, Dtype::BF16),
        (Format::Int4(Groups { size: 128, scales: ScaleDtype::F16 }), Dtype::BF16),
    ] {
        let mut directory = Directory::random_with(21, changes.clone());
        directory.dtype = dtype;
        let wide = rounded(&directory, format).to_temporary();
        let narrow = directory.to_temporary();
        let formats = match format.groups() {
            Some(_) => Formats { experts: Some(format), attention: Some(format), head: Some(format), embedding: None },
            None => Formats::default(),
        };
        let narrow = load_options(narrow.path(), &LoadOptions { formats, ..Default::default() });
        let wide = load_with(wide.path(), 2, Instructions::Detect);
        let documents = random_documents(4, &[(3, 70), (20, 55)]);
        let [narrow, wide] = [narrow, wide].map(|model| {
            let mut trainer = RouterTrainer::new(&model, &plain()).unwrap();
            let metrics = trainer.gradient(&documents).unwrap();
            assert!(metrics.gradient_norm > 0.0);
            (metrics.loss.to_bits(), bits(trainer.gradients()))
        });
        assert_eq!(narrow, wide, "{format}");
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let directory = odd_model(6, json!({"num_local_experts": 6})).to_temporary();
    let documents = random_documents(12, &[(3, 60), (2, 30), (20, 40)]);
    let router = RouterLosses { balance: 0.1, form: BalanceForm::Global, z: 0.01 };
    let of = |threads: usize| {
        let model = load_with(directory.path(), threads, Instructions::Detect);
        let mut trainer = RouterTrainer::new(&model, &TrainOptions { router, ..plain() }).unwrap();
        let metrics = trainer.gradient(&documents).unwrap();
        (metrics.loss.to_bits(), bits(trainer.gradients()))
    };
    let expected = of(1);
    for threads in [2, 3, 7] {
        assert_eq!(of(threads), expected, "{threads} threads");
    }
}

#[test]
fn what_fills_a_batch_up_changes_no_bit_and_batches_add_up() {
    let directory = odd_model(7, json!({})).to_temporary();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let documents = random_documents(13, &[(3, 40), (2, 30), (20, 25), (1, 9)]);
    let of = |options: TrainOptions| {
        let mut trainer = RouterTrainer::new(&model, &options).unwrap();
        let metrics = trainer.gradient(&documents).unwrap();
        (metrics, trainer.gradients().to_vec())
    };
    let (whole, expected) = of(plain());
    let (filled, found) = of(TrainOptions { fill: true, ..plain() });
    assert_eq!((whole.loss.to_bits(), bits(&expected)), (filled.loss.to_bits(), bits(&found)));
    let (parts, found) = of(TrainOptions { max_tokens: 50, ..plain() });
    assert!((parts.loss - whole.loss).abs() < 1e-6 && relative_error(&found, &expected) < 1e-5);
    assert_eq!((parts.tokens, parts.targets), (whole.tokens, whole.targets));
}

#[test]
fn a_document_is_scored_as_a_session_does() {
    let directory = odd_model(8, json!({})).to_temporary();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let documents = random_documents(14, &[(1, 70)]);
    let found = RouterTrainer::new(&model, &plain()).unwrap().evaluate(&documents).unwrap();
    let mut session = common::session_with(&model, gemmoe::backend::KvDtype::F32);
    session.prefill(&documents[0].tokens[..1]).unwrap();
    let mut scores = vec![0f32; 70];
    session.score(&documents[0].tokens[1..], &mut scores).unwrap();
    let expected = -scores.iter().map(|score| f64::from(*score)).sum::<f64>() / 70.0;
    assert!((found.loss - expected).abs() < 1e-5, "{} {expected}", found.loss);
}

#[test]
fn routers_that_cannot_learn_are_refused_with_the_reason() {
    let top_1 = odd_model(9, json!({"num_experts_per_tok": 1})).to_temporary();
    let top_1 = load_with(top_1.path(), 2, Instructions::Detect);
    let error = RouterTrainer::new(&top_1, &plain()).err().unwrap();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("num_experts_per_tok")));
    assert!(error.to_string().contains("always 1"), "{error}");
    let soft = TrainOptions { soft: true, ..plain() };
    let mut trainer = RouterTrainer::new(&top_1, &soft).unwrap();
    assert!(trainer.gradient(&random_documents(1, &[(3, 30)])).unwrap().gradient_norm > 0.0);

    let dense = odd_model(9, json!({"num_local_experts": 1, "num_experts_per_tok": 1})).to_temporary();
    let error = RouterTrainer::new(&load_with(dense.path(), 2, Instructions::Detect), &plain()).err().unwrap();
    assert_eq!(error.key(), Some("num_local_experts"));
}

#[test]
fn documents_that_cannot_be_learned_are_refused_with_the_reason() {
    let directory = odd_model(9, json!({})).to_temporary();
    let mut trainer = RouterTrainer::new(&load_with(directory.path(), 2, Instructions::Detect), &plain()).unwrap();
    let mut refused = |document: Document| trainer.gradient(&[document]).unwrap_err();
    assert!(refused(Document::new(&[2, 3], &[])).to_string().contains("none to be learned"));
    assert!(refused(Document::new(&[], &[2])).to_string().contains("none to be learned"));
    assert_eq!(refused(Document::new(&[2], &[97])).status(), Status::TokenOutOfRange);
    assert!(refused(Document::new(&[2], &[3; 160])).to_string().contains("max_tokens"));
    assert!(refused(Document { tokens: vec![2, 3], is_response: vec![true] }).to_string().contains("says of 1"));
    assert_eq!(trainer.gradient(&[]).unwrap_err().status(), Status::InvalidArgument);
    let mut pair = random_pairs(1, &[(4, 90), (4, 90)]);
    assert_eq!(trainer.gradient_of_pairs(&mut pair).unwrap_err().key(), Some("pair"));
}

#[test]
fn noise_belongs_to_the_seed_and_is_not_in_evaluations() {
    let directory = odd_model(11, json!({})).to_temporary();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let documents = random_documents(15, &[(3, 40), (3, 30)]);
    let of = |noise, seed| {
        let mut trainer = RouterTrainer::new(&model, &TrainOptions { noise, seed, ..plain() }).unwrap();
        let evaluated = trainer.evaluate(&documents).unwrap().loss;
        (trainer.gradient(&documents).unwrap().loss.to_bits(), bits(trainer.gradients()), evaluated)
    };
    let (plain_loss, _, evaluated) = of(0.0, 1);
    assert_eq!(plain_loss, evaluated.to_bits());
    assert_eq!(of(0.5, 1), of(0.5, 1));
    assert_ne!(of(0.5, 1).0, of(0.5, 2).0);
    assert_ne!(of(0.5, 1).0, plain_loss);
    assert_eq!(of(0.5, 1).2, evaluated);
}

#[test]
fn twenty_steps_of_the_optimiser_are_torchs() {
    let bytes = std::fs::read(repository().join("tests/golden_gradients/adamw.json")).unwrap();
    let golden: Value = serde_json::from_slice(&bytes).unwrap();
    let list = |value: &Value| -> Vec<f32> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
    };
    let settings = &golden["settings"];
    let number = |key: &str| settings[key].as_f64().unwrap();
    let options = OptimiserOptions {
        learning_rate: number("learning_rate"),
        betas: (settings["betas"][0].as_f64().unwrap(), settings["betas"][1].as_f64().unwrap()),
        epsilon: number("epsilon"),
        weight_decay: number("weight_decay"),
        clip: number("clip"),
        warmup_steps: number("warmup_steps") as u64,
        decay: Decay::Cosine { total_steps: number("total_steps") as u64, final_share: number("final_share") },
    };
    let mut parameters = list(&golden["parameters"]);
    let mut optimiser = AdamW::new(parameters.len()).unwrap();
    for (step, expected) in golden["steps"].as_array().unwrap().iter().enumerate() {
        let gradient = list(&expected["gradient"]);
        let norm = norm(&gradient);
        assert!((norm - expected["norm"].as_f64().unwrap()).abs() < 1e-5);
        optimiser.update(&options, norm, &gradient, &mut parameters).unwrap();
        for (found, expected) in parameters.iter().zip(list(&expected["parameters"])) {
            assert!((found - expected).abs() < 2e-6 * expected.abs().max(0.1), "step {step}: {found} {expected}");
        }
    }
    assert_eq!(optimiser.steps(), 20);
}
