//! Trainers: what a step changes, what it leaves alone, and how training goes on from a file.

mod common;

use std::sync::Arc;

use common::held_out::demo_model;
use common::{Directory, Random, load};
use gemmoe::train::pass::{PassSize, training_bytes};
use gemmoe::train::{Document, OptimiserOptions, Pair, RouterTrainer, TrainOptions};
use gemmoe::{Model, Status};
use serde_json::json;

fn small_model(seed: u64) -> Arc<Model> {
    load(Directory::random_with(seed, json!({})).to_temporary().path())
}

fn options() -> TrainOptions {
    let optimiser = OptimiserOptions { learning_rate: 0.01, warmup_steps: 2, weight_decay: 0.01, ..Default::default() };
    TrainOptions { max_tokens: 100, optimiser, noise: 0.1, ..Default::default() }
}

fn documents(seed: u64) -> Vec<Document> {
    let mut random = Random::new(seed);
    (0..4).map(|_| Document::new(&random.tokens(5, 97), &random.tokens(30, 97))).collect()
}

fn pairs(seed: u64) -> Vec<Pair> {
    let documents = documents(seed);
    documents.chunks_exact(2).map(|pair| Pair::new(pair[0].clone(), pair[1].clone())).collect()
}

#[test]
fn training_that_goes_on_from_a_file_gives_the_bits_of_training_that_was_never_left() {
    let model = small_model(1);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("state.safetensors");
    let mut whole = RouterTrainer::new(&model, &options()).unwrap();
    for step in 0..3 {
        whole.step(&documents(step)).unwrap();
    }
    whole.set_reference();
    whole.step_pairs(&mut pairs(7)).unwrap();
    whole.save_state(&path).unwrap();
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    let mut resumed = RouterTrainer::new(&model, &options()).unwrap();
    resumed.load_state(&path).unwrap();
    assert_eq!((resumed.steps(), resumed.state().unwrap()), (4, whole.state().unwrap()));
    for step in 4..7 {
        let metrics = whole.step(&documents(step)).unwrap();
        assert_eq!(resumed.step(&documents(step)).unwrap(), metrics);
        assert_eq!(resumed.step_pairs(&mut pairs(step)).unwrap(), whole.step_pairs(&mut pairs(step)).unwrap());
    }
    assert_eq!(resumed.state().unwrap(), whole.state().unwrap());
}

#[test]
fn activations_that_are_kept_give_the_bits_of_those_computed_again() {
    let model = load(Directory::random_with(5, json!({"num_hidden_layers": 4})).to_temporary().path());
    let mut again = RouterTrainer::new(&model, &options()).unwrap();
    let mut kept = RouterTrainer::new(&model, &TrainOptions { keep_activations: true, ..options() }).unwrap();
    for step in 0..3 {
        assert_eq!(kept.step(&documents(step)).unwrap(), again.step(&documents(step)).unwrap());
        assert_eq!(kept.step_pairs(&mut pairs(step)).unwrap(), again.step_pairs(&mut pairs(step)).unwrap());
        assert_eq!(kept.gradients(), again.gradients());
    }
    // Of the four layers, two have no place of their own, and the first one only for its `m` and the outputs of its experts.
    let config = model.config();
    let (tokens, slots) = (100, 100 * config.num_experts_per_tok);
    let of_attention = 2 * (config.query_size() + config.key_value_size()) + config.num_attention_heads;
    let first = tokens * of_attention + slots * 2 * config.intermediate_size;
    let layer = first + (tokens + slots) * config.hidden_size;
    let bytes = |kept| training_bytes(config, PassSize::new(tokens, kept), false, Some(1)).unwrap().workspace as usize;
    let (more, parts) = (bytes(true) - bytes(false), 3 * 8);
    assert!(more.abs_diff(4 * (2 * layer + first)) < parts * 64, "{more} {layer} {first}");
}

#[test]
fn a_state_that_is_damaged_or_of_another_model_changes_nothing() {
    let model = small_model(1);
    let mut trainer = RouterTrainer::new(&model, &options()).unwrap();
    trainer.step(&documents(1)).unwrap();
    let state = trainer.state().unwrap();
    let refused = |trainer: &mut RouterTrainer, bytes: &[u8]| {
        let status = trainer.set_state(bytes).unwrap_err().status();
        assert_eq!(trainer.state().unwrap(), state);
        status
    };
    for length in [0, 7, 8, 100, state.len() - 1] {
        assert_eq!(refused(&mut trainer, &state[..length]), Status::SnapshotDamaged, "{length} bytes");
    }
    let replaced = |from: &str, to: &str| {
        let at = state.windows(from.len()).position(|bytes| bytes == from.as_bytes()).unwrap();
        let mut changed = state.clone();
        changed[at..at + to.len()].copy_from_slice(to.as_bytes());
        changed
    };
    assert_eq!(refused(&mut trainer, &replaced("gemmoe_router", "gemmoe_rooter")), Status::SnapshotDamaged);
    assert_eq!(refused(&mut trainer, &replaced("first_moment", "worst_moment")), Status::SnapshotDamaged);
    assert_eq!(refused(&mut trainer, &replaced("version\\\":1", "version\\\":7")), Status::SnapshotVersion);
    let mut not_finite = state.clone();
    let end = not_finite.len();
    not_finite[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    assert_eq!(refused(&mut trainer, &not_finite), Status::SnapshotDamaged);
    let numbers = 4 * size_of_val(trainer.gates());
    for place in (state.len() - numbers..state.len()).step_by(101) {
        let mut flipped = state.clone();
        flipped[place] ^= 1 << (place % 8);
        assert_eq!(refused(&mut trainer, &flipped), Status::SnapshotDamaged, "byte {place}");
    }
    let taken = replaced("steps\\\":1", "steps\\\":2");
    assert_eq!(refused(&mut trainer, &taken), Status::SnapshotDamaged);
    let other = RouterTrainer::new(&small_model(2), &options()).unwrap().state().unwrap();
    assert_eq!(refused(&mut trainer, &other), Status::SnapshotModel);
    let missing = trainer.load_state(std::path::Path::new("/nowhere/state.safetensors")).unwrap_err();
    assert_eq!((missing.status(), missing.file()), (Status::ReadFailed, Some("state.safetensors")));
    let unwritable = trainer.save_state(std::path::Path::new("/nowhere/state.safetensors")).unwrap_err();
    assert_eq!(unwritable.status(), Status::WriteFailed);
}

#[test]
fn a_cancelled_step_changes_nothing_and_the_next_one_works() {
    let model = small_model(3);
    let mut trainer = RouterTrainer::new(&model, &options()).unwrap();
    let mut other = RouterTrainer::new(&model, &options()).unwrap();
    let before = trainer.state().unwrap();
    trainer.cancel().request();
    assert_eq!(trainer.step(&documents(1)).unwrap_err().status(), Status::Cancelled);
    assert_eq!(trainer.state().unwrap(), before);
    assert_eq!(trainer.step(&documents(1)).unwrap(), other.step(&documents(1)).unwrap());
    assert_eq!(trainer.state().unwrap(), other.state().unwrap());
}

#[test]
fn references_are_computed_once_and_an_untrained_router_has_the_loss_of_a_coin() {
    let model = small_model(4);
    let mut trainer = RouterTrainer::new(&model, &options()).unwrap();
    let mut pairs = pairs(5);
    let before = trainer.evaluate_pairs(&mut pairs).unwrap();
    assert!((before.text_loss - 2f64.ln()).abs() < 1e-12);
    assert_eq!((before.margin(), before.accuracy), (0.0, 0.0));
    let references: Vec<_> = pairs.iter().map(|pair| pair.reference.unwrap()).collect();
    for _ in 0..10 {
        trainer.step_pairs(&mut pairs).unwrap();
    }
    let after = trainer.evaluate_pairs(&mut pairs).unwrap();
    assert!(after.text_loss < before.text_loss && after.margin() > 0.0 && after.accuracy > 0.9, "{after:?}");
    assert!(pairs.iter().map(|pair| pair.reference.unwrap()).eq(references));
}

/// Gates drawn anew, as a mix has them, learn what a few hundred tokens of the demo model's domains teach.
#[test]
fn an_untrained_router_of_the_demo_model_learns() {
    let model = load(&demo_model());
    let options = TrainOptions {
        max_tokens: 256,
        optimiser: OptimiserOptions { learning_rate: 0.02, ..Default::default() },
        ..Default::default()
    };
    let texts = ["english", "german", "mathematics", "python"].map(|name| {
        let text = std::fs::read_to_string(demo_model().join(format!("domains/{name}.txt"))).unwrap();
        let tokens = model.encode(&text, true, false).unwrap();
        Document::new(&tokens[..1], &tokens[1..48])
    });
    let mut trainer = RouterTrainer::new(&model, &options).unwrap();
    let mut random = Random::new(6);
    let gates: Vec<f32> = trainer.gates().iter().map(|_| random.unit() / 14.0).collect();
    trainer.set_gates(&gates).unwrap();
    let before = trainer.evaluate(&texts).unwrap();
    for _ in 0..8 {
        let metrics = trainer.step(&texts).unwrap();
        for shares in metrics.shares.chunks(model.config().num_local_experts) {
            assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
        }
    }
    let after = trainer.evaluate(&texts).unwrap();
    assert!(after.text_loss < before.text_loss - 0.1, "{} {}", before.text_loss, after.text_loss);
}
