//! What training takes in memory is what its plan says.

mod common;
#[path = "common/counting.rs"]
mod counting;

use common::{Directory, load_options};
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::train::pass::{PassSize, training_bytes};
use gemmoe::train::{RouterTrainer, TrainOptions};
use gemmoe::{LoadOptions, Status};
use serde_json::json;

/// Alignment of buffers, and what is small whatever the sizes are.
const SMALL: u64 = 8192;

#[test]
fn the_plan_is_what_a_trainer_allocates() {
    for (changes, max_tokens, soft, keep_activations, threads) in [
        (json!({}), 100, false, false, 2),
        (json!({}), 1000, true, true, 1),
        (
            json!({"num_hidden_layers": 3, "num_local_experts": 7, "hidden_size": 768, "head_dim": 16}),
            333,
            false,
            true,
            3,
        ),
    ] {
        let directory = Directory::random_with(1, changes).to_temporary();
        let cpu = CpuOptions { threads: threads.into(), ..Default::default() };
        let model = load_options(directory.path(), &LoadOptions { cpu, ..Default::default() });
        let plan =
            training_bytes(model.config(), PassSize::new(max_tokens, keep_activations), soft, Some(threads)).unwrap();
        let before = counting::live_bytes();
        let options = TrainOptions { max_tokens, soft, keep_activations, ..Default::default() };
        let trainer = RouterTrainer::new(&model, &options).unwrap();
        let taken = (counting::live_bytes() - before) as u64;
        let planned = plan.workspace + plan.optimiser;
        assert!((planned..planned + SMALL).contains(&taken), "{planned} planned, {taken} taken");
        let state = trainer.state().unwrap().len() as u64;
        assert!((plan.checkpoint..plan.checkpoint + SMALL).contains(&state), "{}, {state}", plan.checkpoint);
    }
}

#[test]
fn the_published_models_checkpoints_are_below_6_mb() {
    let directory = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "gemmoe", "num_local_experts": 4}).to_string();
    std::fs::write(directory.path().join("config.json"), &config).unwrap();
    let config = gemmoe::model::Config::from_json(config.as_bytes()).unwrap();
    let plan = training_bytes(&config, PassSize::new(2048, false), false, Some(8)).unwrap();
    assert_eq!(plan.checkpoint, 28 * 4 * 3072 * 4 * 4);
    assert!(plan.checkpoint < 6_000_000);
    let top_1 = gemmoe::model::Config { num_experts_per_tok: 1, ..config };
    assert_eq!(
        training_bytes(&top_1, PassSize::new(2048, false), false, None).unwrap_err().status(),
        Status::InvalidArgument
    );
    assert!(training_bytes(&top_1, PassSize::new(2048, false), true, None).is_ok());
}
