//! A slice of the real geometry: 2 layers, 4 experts, top 2, real widths, a vocabulary of 32,000; 4.0 GB of random bf16.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::json;

use super::Random;

pub const HIDDEN: usize = 3072;
pub const INTERMEDIATE: usize = 24_576;
pub const LAYERS: usize = 2;
pub const EXPERTS: usize = 4;
pub const TOP_K: usize = 2;
pub const VOCABULARY: usize = 32_000;
const QUERY: usize = 4096;

/// Weights of one layer's attention, and so multiply-adds of a token there.
pub const ATTENTION: usize = 4 * HIDDEN * QUERY;
/// Weights of one expert.
pub const EXPERT: usize = 3 * HIDDEN * INTERMEDIATE;
/// Weights of the head.
pub const HEAD: usize = VOCABULARY * HIDDEN;
/// Weights a token meets in the layers.
pub const ACTIVE: usize = LAYERS * (TOP_K * EXPERT + ATTENTION);

/// Writes config.json and model.safetensors with random weights, unless they are there.
pub fn write(directory: &Path) {
    let done = directory.join("done");
    if done.exists() {
        return;
    }
    println!("writing the slice to {} ...", directory.display());
    std::fs::create_dir_all(directory).unwrap();
    let config = json!({
        "model_type": "gemmoe", "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut add =
            |name: &str, shape: &[usize]| tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[HIDDEN]);
        add("post_attention_layernorm.weight", &[HIDDEN]);
        for name in ["q_proj", "k_proj", "v_proj"] {
            add(&format!("self_attn.{name}.weight"), &[QUERY, HIDDEN]);
        }
        add("self_attn.o_proj.weight", &[HIDDEN, QUERY]);
        add("block_sparse_moe.gate.weight", &[EXPERTS, HIDDEN]);
        for expert in 0..EXPERTS {
            add(&format!("block_sparse_moe.experts.{expert}.w1.weight"), &[INTERMEDIATE, HIDDEN]);
            add(&format!("block_sparse_moe.experts.{expert}.w3.weight"), &[INTERMEDIATE, HIDDEN]);
            add(&format!("block_sparse_moe.experts.{expert}.w2.weight"), &[HIDDEN, INTERMEDIATE]);
        }
    }
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for (name, shape) in &tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let header = serde_json::Value::from(header).to_string();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(directory.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // Random signs and mantissas with exponents around 2^-6: sums over a row stay of order one.
    let mut random = Random::new(1);
    let mut words = vec![0u16; 1 << 19];
    let mut left = offset / 2;
    while left > 0 {
        let count = left.min(words.len());
        for word in &mut words[..count] {
            let bits = (random.next() >> 32) as u16;
            *word = (bits & 0x807f) | ((120 + (bits >> 7 & 1)) << 7);
        }
        let bytes: Vec<u8> = words[..count].iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&bytes).unwrap();
        left -= count;
    }
    file.flush().unwrap();
    std::fs::write(done, "").unwrap();
}
