//! A model that takes patches, and beside it one that was loaded with the gates of each.
#![allow(dead_code)] // Each test file uses its own part.

use std::path::PathBuf;
use std::sync::Arc;

use gemmoe::backend::cpu::CpuOptions;
use gemmoe::{Formats, LoadOptions, Model, RouterPatch, Session, Status};
use half::{bf16, f16};
use safetensors::Dtype;
use tempfile::TempDir;

use crate::common::{Directory, Random, load_options, session};

/// Which gates are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gates {
    Stored,
    A,
    B,
}

impl Gates {
    pub const ALL: [Gates; 3] = [Gates::Stored, Gates::A, Gates::B];
}

pub struct Patched {
    pub model: Arc<Model>,
    /// Of `Gates::A` and `Gates::B`.
    pub patches: [RouterPatch; 2],
    /// `[layers, experts, hidden_size]` of each.
    pub gates: [Vec<f32>; 3],
    loaded: [Arc<Model>; 3],
    options: LoadOptions,
    directories: [TempDir; 3],
}

/// Names of the gates.
fn names(directory: &Directory) -> Vec<String> {
    let layers = directory.config["num_hidden_layers"].as_u64().unwrap();
    (0..layers).map(|layer| format!("model.layers.{layer}.block_sparse_moe.gate.weight")).collect()
}

/// The gates of a directory's layers.
pub fn gates_of(directory: &Directory) -> Vec<f32> {
    names(directory).iter().flat_map(|name| directory.tensors[name].1.clone()).collect()
}

/// As the directory's dtype has it.
fn rounded(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

impl Patched {
    pub fn new(directory: Directory, formats: Formats) -> Patched {
        Patched::made(directory, formats, None)
    }

    pub fn with_tokenizer(directory: Directory, tokenizer: String) -> Patched {
        Patched::made(directory, Formats::default(), Some(tokenizer))
    }

    fn made(directory: Directory, formats: Formats, tokenizer: Option<String>) -> Patched {
        let cpu = CpuOptions { threads: 1.into(), ..Default::default() };
        Patched::with_options(directory, LoadOptions { formats, cpu, ..Default::default() }, tokenizer)
    }

    pub fn with_options(directory: Directory, options: LoadOptions, tokenizer: Option<String>) -> Patched {
        let mut variants = [directory.clone(), directory.clone(), directory];
        for (seed, variant) in variants[1..].iter_mut().enumerate() {
            let mut random = Random::new(900 + seed as u64);
            for name in names(variant) {
                let dtype = variant.dtype;
                let (_, values) = variant.tensors.get_mut(&name).unwrap();
                values.iter_mut().for_each(|value| *value = rounded(dtype, 0.6 * random.unit()));
            }
        }
        for name in names(&variants[0]) {
            let dtype = variants[0].dtype;
            let (_, values) = variants[0].tensors.get_mut(&name).unwrap();
            values.iter_mut().for_each(|value| *value = rounded(dtype, *value));
        }
        let gates = [0, 1, 2].map(|index| gates_of(&variants[index]));
        let directories = variants.map(|variant| variant.to_temporary());
        if let Some(tokenizer) = tokenizer {
            directories.iter().for_each(|path| std::fs::write(path.path().join("tokenizer.json"), &tokenizer).unwrap());
        }
        let loaded = [0, 1, 2].map(|index: usize| load_options(directories[index].path(), &options));
        let model = load_options(directories[0].path(), &options);
        let base = model.gates_fingerprint().unwrap();
        // By way of a file, as an application's come.
        let path: PathBuf = directories[0].path().join("patch");
        let patches = [1, 2].map(|index: usize| {
            RouterPatch::new(model.config(), &gates[index], base).unwrap().write(&path).unwrap();
            RouterPatch::read(&path).unwrap()
        });
        Patched { model, patches, gates, loaded, options, directories }
    }

    /// Puts gates in force.
    pub fn put(&self, gates: Gates) {
        match gates {
            Gates::Stored => self.model.remove_router_patch(),
            Gates::A => self.model.apply_router_patch(&self.patches[0]),
            Gates::B => self.model.apply_router_patch(&self.patches[1]),
        }
        .unwrap();
    }

    /// The model that was loaded with them.
    pub fn loaded(&self, gates: Gates) -> &Arc<Model> {
        &self.loaded[gates as usize]
    }

    /// The model that takes patches, loaded once more.
    pub fn load_again(&self) -> Arc<Model> {
        load_options(self.directories[0].path(), &self.options)
    }
}

pub fn tokens(count: usize) -> Vec<u32> {
    Random::new(17).tokens(count, 97)
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The bits of the logits, and the routes of all layers.
pub type Shown = (Vec<u32>, Vec<(Vec<u32>, Vec<u32>)>);

pub fn shown(session: &Session) -> Option<Shown> {
    let logits = bits(session.logits().ok()?);
    let layers = 0..session.model().config().num_hidden_layers;
    let routes = layers.map(|layer| session.routes(layer).unwrap());
    Some((logits, routes.map(|routes| (routes.experts.to_vec(), bits(routes.weights))).collect()))
}

/// What a fresh session of the model that was loaded with these gates shows after these tokens.
pub fn expected(patched: &Patched, gates: Gates, tokens: &[u32]) -> Shown {
    let mut fresh = session(patched.loaded(gates));
    fresh.prefill(tokens).unwrap();
    shown(&fresh).unwrap()
}

pub fn status<T>(result: gemmoe::Result<T>) -> Status {
    result.err().map_or(Status::Ok, |error| error.status())
}
