//! What the demo model makes of the texts of its domains that it has not seen.

use std::path::PathBuf;
use std::sync::Arc;

use gemmoe::engine::score::perplexity;
use gemmoe::quant::Format;
use gemmoe::{Formats, Model, SessionOptions};

use super::repository;

pub fn demo_model() -> PathBuf {
    repository().join("examples/demo-model")
}

/// The perplexity of the held-out text of each domain.
pub fn perplexities(model: &Arc<Model>) -> Vec<(String, f64)> {
    let mut files: Vec<_> =
        std::fs::read_dir(demo_model().join("domains")).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let measure = |file: &PathBuf| {
        let text = std::fs::read_to_string(file).unwrap();
        let tokens = model.encode(&text, true, false).unwrap();
        let context_size = tokens.len().min(model.config().max_position_embeddings);
        let found = perplexity(model, &tokens, &SessionOptions { context_size, ..Default::default() }, &mut |_| ());
        (file.file_stem().unwrap().to_string_lossy().into_owned(), found.unwrap().value())
    };
    files.iter().map(measure).collect()
}

/// What is promised of rounding: its name, the formats, and by how much perplexity may rise in the mean, in percent.
pub fn promises() -> [(&'static str, Formats, f64); 2] {
    let formats =
        |experts, head| Formats { experts: Some(experts), attention: Some(experts), head: Some(head), embedding: None };
    [
        ("int8", formats(Format::INT8, Format::INT8), 0.5),
        // int4 of experts and attention; the head in int8.
        ("int4", formats(Format::INT4, Format::INT8), 2.5),
    ]
}

/// By how much it rose in each domain, in percent, printed, and held against what may be.
pub fn check_rise(name: &str, before: &[(String, f64)], after: &[(String, f64)], most: f64) -> Vec<f64> {
    assert_eq!(before.len(), 4);
    let changes = before.iter().zip(after).map(|((_, before), (_, after))| 100.0 * (after / before - 1.0));
    let changes: Vec<f64> = changes.collect();
    let mean = changes.iter().sum::<f64>() / changes.len() as f64;
    for ((domain, before), change) in before.iter().zip(&changes) {
        println!("{name} {domain:<12} {before:>8.4} {change:>+7.3} %");
    }
    println!("{name} mean {mean:>+7.3} %");
    assert!(mean < most, "{name}: perplexity rose by {mean:.3} %");
    assert!(changes.iter().all(|change| change.abs() < 2.0 * most), "{name}: {changes:?}");
    changes
}
