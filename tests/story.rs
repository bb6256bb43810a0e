//! The README's story of making a GemMoE: its recipes, and the texts and pairs beside them, are what they say.

mod common;

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use common::{load, repository};
use gemmoe::mix::{self, MixOptions, Recipe};
use gemmoe::train::{Run, TrainRecipe};
use gemmoe::{Model, Progress};
use safetensors::SafeTensors;

fn example(name: &str) -> PathBuf {
    repository().join("examples/router-training").join(name)
}

/// The demo model's experts with a router that has learned nothing.
fn mixed() -> (tempfile::TempDir, Arc<Model>) {
    let directory = tempfile::tempdir().unwrap();
    let recipe = Recipe::read(&example("mix.toml")).unwrap();
    let target = directory.path().join("mixed");
    mix::mix(&recipe, &target, &MixOptions::default(), &Progress::default()).unwrap();
    let model = load(&target);
    (directory, model)
}

fn rows(name: &str) -> Vec<HashMap<String, String>> {
    let text = std::fs::read_to_string(example(name)).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{name}: {error}"))).collect()
}

#[test]
fn the_mixture_is_the_demo_model_but_for_its_gates() {
    let (directory, _model) = mixed();
    let [demo, mixed] = [repository().join("examples/demo-model"), directory.path().join("mixed")]
        .map(|path| std::fs::read(path.join("model.safetensors")).unwrap());
    let [demo, mixed] = [&demo, &mixed].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    assert_eq!(demo.len(), mixed.len());
    for name in demo.names() {
        let is_same = demo.tensor(name).unwrap().data() == mixed.tensor(name).unwrap().data();
        assert_eq!(is_same, !name.ends_with("gate.weight"), "{name}");
    }
}

#[test]
fn the_recipes_take_all_rows_beside_them_and_move_the_gates() {
    let (_directory, model) = mixed();
    for (name, rows) in [("sft.toml", 438), ("dpo.toml", 240)] {
        let mut recipe = TrainRecipe::read(&example(name)).unwrap();
        // The story goes on from the patch before; here the stages stand alone.
        (recipe.router, recipe.data.held_out, recipe.rows_per_step) = (None, Vec::new(), 2);
        let mut run = Run::new(Arc::clone(&model), &recipe, &Progress::default()).unwrap();
        let report = run.data_report();
        assert_eq!((report.documents, report.cut, report.skipped), (rows, 0, 0), "{name}");
        let gates = run.trainer().gates().to_vec();
        let first = run.step().unwrap().unwrap();
        assert!(first.text_loss.is_finite() && first.gradient_norm > 0.0, "{name}: {first:?}");
        assert_ne!(run.trainer().gates(), gates);
    }
}

#[test]
fn no_row_is_trained_on_and_held_out_too() {
    let texts = |folder: &str| -> Vec<String> {
        let files = ["english", "german", "python", "mathematics"];
        files
            .iter()
            .flat_map(|file| rows(&format!("{folder}/{file}.jsonl")))
            .map(|mut row| row.remove("text").unwrap())
            .collect()
    };
    let trained: HashSet<String> = texts("sft").into_iter().collect();
    assert!(texts("heldout").iter().all(|text| !trained.contains(text)));
    let pairs = rows("pairs.jsonl");
    let chosen: HashSet<&str> = pairs.iter().map(|pair| pair["chosen"].as_str()).collect();
    for pair in rows("heldout-pairs.jsonl") {
        assert!(!chosen.contains(pair["chosen"].as_str()) && pair["chosen"] != pair["rejected"], "{pair:?}");
    }
}
