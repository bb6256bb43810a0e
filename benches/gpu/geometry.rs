//! The model that is measured: its sizes, what of it a pass must read, and a directory that has its headers.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use gemmoe::Formats;
use gemmoe::model::Config;
use gemmoe::model::names::{self, Layout};
use gemmoe::quant::{Format, Shape};
use serde_json::{Value, json};

use super::Result;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Geometry {
    /// GemMoE as it was published: 28 layers of 3072, 4 experts of 24,576, top 2.
    Gemmoe,
    /// The same with 8 experts.
    Gemmoe8,
    /// Gemma 7B: one expert.
    Dense,
    /// Two layers of nothing much, to try the program out.
    Tiny,
}

impl Geometry {
    pub fn name(self) -> &'static str {
        ["gemmoe", "gemmoe8", "dense", "tiny"][self as usize]
    }

    /// config.json. Random weights do not mind where the longest context ends.
    fn json(self) -> Value {
        let mut config = json!({"model_type": "gemmoe", "max_position_embeddings": 1 << 17, "num_local_experts": 4});
        let changes = match self {
            Geometry::Gemmoe => json!({}),
            Geometry::Gemmoe8 => json!({"num_local_experts": 8}),
            Geometry::Dense => json!({"model_type": "gemma", "num_local_experts": 1}),
            Geometry::Tiny => json!({
                "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32
            }),
        };
        for (key, value) in changes.as_object().into_iter().flatten() {
            config[key] = value.clone();
        }
        config
    }
}

/// A model's directory with headers and no weights, removed when it is dropped.
pub struct Directory(PathBuf);

impl Directory {
    /// Makes one of a geometry in bf16. The weight file is as long as its header says, and takes no room on the disk.
    pub fn of(geometry: Geometry) -> Result<Directory> {
        let directory = Directory(std::env::temp_dir().join(format!("gemmoe-gpu-bench-{}", std::process::id())));
        std::fs::create_dir_all(directory.path())?;
        let json = geometry.json().to_string();
        let config = Config::from_json(json.as_bytes())?;
        std::fs::write(directory.path().join("config.json"), &json)?;
        let layout = if geometry == Geometry::Dense { Layout::Dense } else { Layout::BlockSparseMoe };
        let mut shapes = BTreeMap::new();
        for part in [names::embedding(&config), names::final_norm(&config)] {
            shapes.insert(part.tensor, part.shape);
        }
        for layer in 0..config.num_hidden_layers {
            let parts = names::layer(&config, layout, layer);
            shapes.extend(parts.all().map(|part| (part.tensor.clone(), part.shape.clone())));
        }
        let (mut header, mut end) = (serde_json::Map::new(), 0);
        for (name, shape) in shapes {
            let start = end;
            end += 2 * shape.iter().product::<usize>();
            header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
        }
        let header = Value::from(header).to_string();
        let mut file = File::create(directory.path().join("model.safetensors"))?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        file.set_len((8 + header.len() + end) as u64)?;
        Ok(directory)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A format that is measured: its name, and what all parts of a model are asked for in.
#[derive(Clone, Copy)]
pub struct Held {
    pub name: &'static str,
    pub format: Format,
}

impl Held {
    pub const ALL: [Held; 3] = [
        Held { name: "bf16", format: Format::Bf16 },
        Held { name: "int8", format: Format::INT8 },
        Held { name: "int4", format: Format::INT4 },
    ];

    pub fn formats(self) -> Formats {
        let format = self.format.groups().map(|_| self.format);
        Formats { experts: format, attention: format, head: format, embedding: format }
    }

    /// Whether products are sums of whole numbers.
    pub fn is_integer(self) -> bool {
        self.format.groups().is_some()
    }
}

/// The matrices of a model, and the least a pass must move and multiply.
pub struct Work<'a> {
    pub config: &'a Config,
    pub format: Format,
}

impl Work<'_> {
    fn bytes(&self, rows: usize, columns: usize) -> usize {
        Shape { rows, columns, format: self.format }.bytes()
    }

    /// Rows of queries, keys and values together.
    pub fn query_key_value_rows(&self) -> usize {
        self.config.query_size() + 2 * self.config.key_value_size()
    }

    /// Of queries, keys and values of one layer; so below.
    pub fn query_key_value_bytes(&self) -> usize {
        let (hidden, key_value) = (self.config.hidden_size, self.config.key_value_size());
        self.bytes(self.config.query_size(), hidden) + 2 * self.bytes(key_value, hidden)
    }

    pub fn output_bytes(&self) -> usize {
        self.bytes(self.config.hidden_size, self.config.query_size())
    }

    pub fn head_bytes(&self) -> usize {
        self.bytes(self.config.vocab_size, self.config.hidden_size)
    }

    /// Of one expert.
    pub fn gate_up_bytes(&self) -> usize {
        2 * self.bytes(self.config.intermediate_size, self.config.hidden_size)
    }

    /// Of one expert.
    pub fn down_bytes(&self) -> usize {
        self.bytes(self.config.hidden_size, self.config.intermediate_size)
    }

    /// A step's: what every token meets, and `touched` experts a layer.
    pub fn weight_bytes(&self, touched: f64) -> f64 {
        let Config { num_hidden_layers: layers, hidden_size: hidden, num_local_experts: experts, .. } = *self.config;
        let router = if experts > 1 { experts * hidden * 4 } else { 0 };
        let of_layer = self.query_key_value_bytes() + self.output_bytes() + router + 2 * hidden * 4;
        let of_experts = touched * (self.gate_up_bytes() + self.down_bytes()) as f64;
        layers as f64 * (of_layer as f64 + of_experts) + (self.head_bytes() + hidden * 4) as f64
    }

    /// Multiply-adds of one token in all layers, without those of attention itself and of the head.
    pub fn multiply_adds(&self) -> f64 {
        let Config { hidden_size: hidden, intermediate_size: inner, num_experts_per_tok: top_k, .. } = *self.config;
        let attention = hidden * (self.query_key_value_rows() + self.config.query_size());
        (self.config.num_hidden_layers * (attention + 3 * top_k * hidden * inner)) as f64
    }
}
