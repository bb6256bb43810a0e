//! A small model with a tokenizer, data and recipes, in a directory of their own.
#![allow(dead_code)] // Each test file uses its own part.

use std::path::Path;

use serde_json::{Value, json};

use super::common::{Directory, Random};

#[path = "tokenizer.rs"]
pub mod tokenizer;

/// `model`, `texts.jsonl` and `pairs.jsonl` of 11 rows each.
pub fn work_directory(seed: u64, changes: Value) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let mut keys = json!({"vocab_size": tokenizer::VOCAB_SIZE});
    changes.as_object().unwrap().iter().for_each(|(key, value)| keys[key] = value.clone());
    add_model(&directory.path().join("model"), &Directory::random_with(seed, keys));
    let mut random = Random::new(seed);
    let mut word = |length: usize| -> String { (0..length).map(|_| char::from(97 + random.below(26) as u8)).collect() };
    let texts: String = (0..11).map(|row| format!("{}\n", json!({"text": word(5 + 2 * row)}))).collect();
    let mut pair = |row: usize| json!({"prompt": word(6), "chosen": word(4 + row), "rejected": word(9)});
    let pairs: String = (0..11).map(&mut pair).map(|row| format!("{row}\n")).collect();
    std::fs::write(directory.path().join("texts.jsonl"), texts).unwrap();
    std::fs::write(directory.path().join("pairs.jsonl"), pairs).unwrap();
    directory
}

/// Writes a model with the sample tokenizer.
pub fn add_model(path: &Path, model: &Directory) {
    std::fs::create_dir_all(path).unwrap();
    model.write(path);
    std::fs::write(path.join("tokenizer.json"), tokenizer::sample().to_string()).unwrap();
}

/// A recipe's text.
pub fn recipe(objective: &str, train: &str, output: &str) -> String {
    let file = if objective == "sft" { "texts" } else { "pairs" };
    format!(
        "model = \"model\"\nobjective = \"{objective}\"\nthreads = 2\n[data]\nfiles = \"{file}.jsonl\"\nmax_tokens = 96\n\
         seed = 7\nheld_out = [\"{file}.jsonl\"]\n[train]\nlearning_rate = 0.01\nrows_per_step = 3\n{train}\n\
         [output]\npath = \"out\"\n{output}\n"
    )
}
