//! What the behaviour tests share: golden directories, and small random models written on the spot.
#![allow(dead_code)] // Each test file uses its own part.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Poll;

use gemmoe::backend::KvDtype;
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::{BatchOptions, Budget, LoadOptions, Model, Progress, Session, SessionBatch, SessionOptions};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

pub mod checkpoints;
pub mod held_out;
mod random;
mod root;

pub use random::Random;
pub use root::repository;

/// Where cargo put the library this test was built with: beside the test. The copy a folder above is that of the last
/// `cargo build`, which may be older.
pub fn library_directory() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let directory = test.parent().unwrap().to_path_buf();
    assert!(directory.join("libgemmoe.so").exists(), "no libgemmoe.so in {}", directory.display());
    directory
}

/// The golden directories, by name.
pub fn golden() -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(repository().join("tests/golden"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_dir())
        .collect();
    paths.sort();
    assert!(paths.len() >= 12, "golden checkpoints are missing");
    paths
}

pub fn load(directory: &Path) -> Arc<Model> {
    load_with(directory, 2, Instructions::Detect)
}

pub fn load_with(directory: &Path, threads: usize, instructions: Instructions) -> Arc<Model> {
    let cpu = CpuOptions { threads: threads.into(), instructions };
    load_options(directory, &LoadOptions { cpu, ..Default::default() })
}

pub fn load_options(directory: &Path, options: &LoadOptions) -> Arc<Model> {
    Model::load(directory, options, &Progress::default()).unwrap_or_else(|error| panic!("{error}"))
}

pub fn session(model: &Arc<Model>) -> Session {
    session_with(model, None)
}

/// With keys and values in a dtype: f32 for what is compared with a reference.
pub fn session_with(model: &Arc<Model>, kv_dtype: impl Into<Option<KvDtype>>) -> Session {
    let context_size = model.config().max_position_embeddings.min(256);
    let options = SessionOptions { context_size, prefill_chunk: 64, kv_dtype: kv_dtype.into(), ..Default::default() };
    Session::new(Arc::clone(model), &options).unwrap()
}

pub fn batch(model: &Arc<Model>, max_sessions: usize, max_tokens: usize, max_context: usize) -> SessionBatch {
    let options = BatchOptions { max_sessions, max_tokens, max_context, prefill_chunk: max_tokens };
    SessionBatch::new(Arc::clone(model), &options).unwrap()
}

/// Steps every session until it has drawn one token, or failed.
pub fn draw_each(batch: &mut SessionBatch, sessions: &mut [&mut Session]) -> Vec<gemmoe::Result<u32>> {
    let mut drawn: Vec<Option<gemmoe::Result<u32>>> = sessions.iter().map(|_| None).collect();
    let mut results = Vec::new();
    while drawn.iter().any(Option::is_none) {
        let waiting: Vec<usize> = (0..drawn.len()).filter(|index| drawn[*index].is_none()).collect();
        let members = sessions.iter_mut().enumerate().filter(|(index, _)| waiting.contains(index));
        let mut members: Vec<&mut Session> = members.map(|(_, session)| &mut **session).collect();
        batch.step(&mut members, &Budget::UNLIMITED, &mut results).unwrap();
        for (index, result) in waiting.into_iter().zip(results.drain(..)) {
            if let Poll::Ready(result) = result {
                drawn[index] = Some(result);
            }
        }
    }
    drawn.into_iter().map(Option::unwrap).collect()
}

/// A model directory in the making: config.json's keys and the tensors, as f32 until they are written.
#[derive(Clone)]
pub struct Directory {
    pub config: Value,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub dtype: Dtype,
}

impl Directory {
    /// A random GemMoE: 2 layers, hidden 40, 4 experts of 24, top 2, vocabulary 97.
    pub fn random(seed: u64) -> Directory {
        Self::random_with(seed, json!({}))
    }

    /// The same with some keys of config.json changed before the tensors are made.
    pub fn random_with(seed: u64, changes: Value) -> Directory {
        let mut config = json!({
            "architectures": ["GemmoeForCausalLM"], "model_type": "gemmoe", "vocab_size": 97, "hidden_size": 40,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 8, "max_position_embeddings": 512, "num_local_experts": 4, "num_experts_per_tok": 2
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        let size = |key: &str| config[key].as_u64().unwrap() as usize;
        let (hidden, inner, head_dim) = (size("hidden_size"), size("intermediate_size"), size("head_dim"));
        let (query, key_value) = (size("num_attention_heads") * head_dim, size("num_key_value_heads") * head_dim);
        let mut random = Random::new(seed);
        let mut tensors = BTreeMap::new();
        let mut add = |name: String, shape: &[usize], scale: f32| {
            let count = shape.iter().product();
            let values = (0..count).map(|_| random.unit() * scale).collect();
            tensors.insert(name, (shape.to_vec(), values));
        };
        let spread = |inputs: usize| 1.7 / (inputs as f32).sqrt();
        add("model.embed_tokens.weight".into(), &[size("vocab_size"), hidden], spread(hidden));
        add("model.norm.weight".into(), &[hidden], 0.5);
        for layer in 0..size("num_hidden_layers") {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}");
            add(name("input_layernorm.weight"), &[hidden], 0.5);
            add(name("post_attention_layernorm.weight"), &[hidden], 0.5);
            add(name("self_attn.q_proj.weight"), &[query, hidden], 2.0 * spread(hidden));
            add(name("self_attn.k_proj.weight"), &[key_value, hidden], 2.0 * spread(hidden));
            add(name("self_attn.v_proj.weight"), &[key_value, hidden], spread(hidden));
            add(name("self_attn.o_proj.weight"), &[hidden, query], spread(query));
            add(name("block_sparse_moe.gate.weight"), &[size("num_local_experts"), hidden], 2.0 * spread(hidden));
            for expert in 0..size("num_local_experts") {
                let name = |weight: &str| name(&format!("block_sparse_moe.experts.{expert}.{weight}.weight"));
                add(name("w1"), &[inner, hidden], 2.0 * spread(hidden));
                add(name("w3"), &[inner, hidden], 2.0 * spread(hidden));
                add(name("w2"), &[hidden, inner], 2.0 * spread(inner));
            }
        }
        Directory { config, tensors, dtype: Dtype::BF16 }
    }

    /// The bytes of a tensor as they are stored.
    pub fn tensor_bytes(&self, values: &[f32]) -> Vec<u8> {
        match self.dtype {
            Dtype::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            Dtype::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// A safetensors file of the tensors whose names `keep` accepts.
    pub fn safetensors(&self, keep: impl Fn(&str) -> bool) -> Vec<u8> {
        let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .filter(|(name, _)| keep(name))
            .map(|(name, (shape, values))| (name.clone(), shape.clone(), self.tensor_bytes(values)))
            .collect();
        let views = bytes.iter().map(|(name, shape, bytes)| {
            let dtype = if matches!(self.dtype, Dtype::BF16 | Dtype::F16) { self.dtype } else { Dtype::F32 };
            (name.as_str(), TensorView::new(dtype, shape.clone(), bytes).unwrap())
        });
        safetensors::serialize(views, None).unwrap()
    }

    /// Writes config.json and model.safetensors.
    pub fn write(&self, path: &Path) {
        std::fs::write(path.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(path.join("model.safetensors"), self.safetensors(|_| true)).unwrap();
    }

    /// Writes the model to a fresh temporary directory.
    pub fn to_temporary(&self) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        self.write(directory.path());
        directory
    }
}
