//! Router patches: which model they fit, and what sessions of a model that takes them show.

mod common;

use common::{Directory, load, load_options};
use gemmoe::quant::Format;
use gemmoe::{Formats, LoadOptions};
use safetensors::Dtype;
use serde_json::json;

/// The gates of a directory's layers.
fn gates_of(directory: &Directory) -> Vec<f32> {
    let layers = directory.config["num_hidden_layers"].as_u64().unwrap();
    let name = |layer| format!("model.layers.{layer}.block_sparse_moe.gate.weight");
    (0..layers).flat_map(|layer| directory.tensors[&name(layer)].1.clone()).collect()
}

#[test]
fn stored_gates_are_those_of_the_directory_whatever_the_other_weights_are_loaded_in() {
    for experts in [4, 23] {
        let changes = json!({"num_local_experts": experts, "num_hidden_layers": 3});
        let directory = Directory { dtype: Dtype::F32, ..Directory::random_with(3, changes) };
        let path = directory.to_temporary();
        let mut fingerprints = Vec::new();
        for format in [None, Some(Format::INT8), Some(Format::INT4)] {
            let formats = Formats { experts: format, attention: format, head: format, embedding: None };
            let model = load_options(path.path(), &LoadOptions { formats, ..Default::default() });
            assert_eq!(model.stored_gates().unwrap(), gates_of(&directory));
            fingerprints.push(model.gates_fingerprint().unwrap());
        }
        assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
        let other = load(Directory::random_with(4, json!({"num_local_experts": experts})).to_temporary().path());
        assert_ne!(other.gates_fingerprint().unwrap(), fingerprints[0]);
    }
}
