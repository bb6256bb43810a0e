//! Whole training runs through the library: the order of rows, going on from a checkpoint, and what comes out.

mod common;
#[path = "common/tokenizer.rs"]
#[allow(dead_code)]
mod tokenizer;

use std::path::Path;
use std::sync::Arc;

use common::{Directory, Random, load};
use gemmoe::train::{Run, TrainRecipe};
use gemmoe::{Model, Progress, Status};
use serde_json::json;

/// A model with a tokenizer, and data, in a directory of their own.
pub fn work_directory(seed: u64) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("model");
    std::fs::create_dir(&path).unwrap();
    Directory::random_with(seed, json!({"vocab_size": tokenizer::VOCAB_SIZE})).write(&path);
    std::fs::write(path.join("tokenizer.json"), tokenizer::sample().to_string()).unwrap();
    let mut random = Random::new(seed);
    let mut word = |length: usize| -> String { (0..length).map(|_| char::from(97 + random.below(26) as u8)).collect() };
    let texts: String = (0..11).map(|row| format!("{}\n", json!({"text": word(5 + 3 * row)}))).collect();
    let pairs: String = (0..11)
        .map(|row| format!("{}\n", json!({"prompt": word(6), "chosen": word(4 + row), "rejected": word(9)})))
        .collect();
    std::fs::write(directory.path().join("texts.jsonl"), texts).unwrap();
    std::fs::write(directory.path().join("pairs.jsonl"), pairs).unwrap();
    directory
}

fn recipe(directory: &Path, objective: &str, train: &str) -> TrainRecipe {
    let file = if objective == "sft" { "texts" } else { "pairs" };
    let text = format!(
        "model = \"model\"\nobjective = \"{objective}\"\nthreads = 2\n[data]\nfiles = \"{file}.jsonl\"\n\
         held_out = [\"{file}.jsonl\"]\nmax_tokens = 96\nseed = 7\n[train]\nlearning_rate = 0.01\nrows_per_step = 3\n{train}\n\
         [output]\npath = \"out\"\n"
    );
    TrainRecipe::parse(&text, "recipe.toml", directory).unwrap()
}

fn run(model: &Arc<Model>, recipe: &TrainRecipe) -> Run {
    Run::new(Arc::clone(model), recipe, &Progress::default()).unwrap()
}

#[test]
fn a_run_that_goes_on_from_a_checkpoint_gives_the_bits_of_one_that_never_stopped() {
    let directory = work_directory(1);
    let model = load(&directory.path().join("model"));
    for objective in ["sft", "dpo"] {
        let recipe = recipe(directory.path(), objective, "epochs = 3\nnoise = 0.1");
        let mut whole = run(&model, &recipe);
        // 33 rows in steps of 3.
        assert_eq!(whole.total_steps(), 11);
        let path = directory.path().join("checkpoint");
        for step in 0..11 {
            let mut resumed = run(&model, &recipe);
            if step > 0 {
                resumed.resume(&path).unwrap();
            }
            assert_eq!(resumed.steps(), step);
            assert_eq!(resumed.evaluate().unwrap(), whole.evaluate().unwrap());
            let metrics = whole.step().unwrap();
            assert!(metrics.is_some());
            assert_eq!(resumed.step().unwrap(), metrics, "{objective}: step {step}");
            resumed.save(&path).unwrap();
            assert_eq!(resumed.trainer().state().unwrap(), whole.trainer().state().unwrap());
        }
        assert_eq!(whole.step().unwrap(), None);
        let gates = 4 * 2 * 4 * 40 * 4;
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert!((gates..gates + 4096).contains(&bytes), "{bytes}");
    }
}
