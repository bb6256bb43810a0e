//! What a pass has to do at least: the bytes it reads and the multiply-adds it does. A share of a roof is the time that
//! the roof allows for this, by the time taken.

use std::path::Path;

use gemmoe::backend::KvDtype;
use gemmoe::backend::kv::KvGeometry;
use gemmoe::model::Description;
use gemmoe::{LoadOptions, Model, Result};

use super::roof::Roof;

/// A model's sizes, as its own accounts have them.
pub struct Work {
    experts_per_layer: f64,
    /// Of all experts of all layers, as they lie in memory.
    expert_bytes: f64,
    /// Of what every pass reads: attention, routers, norms, head.
    other_bytes: f64,
    /// That a token's way through the layers takes, attention over earlier tokens not counted.
    layer_multiply_adds: f64,
    head_multiply_adds: f64,
    /// That a token's attention to one earlier token takes.
    attention_multiply_adds: f64,
    /// Keys and values of one token.
    kv_bytes: f64,
    pub kv_dtype: KvDtype,
    /// Bits that a weight of the experts takes, scales included.
    pub expert_bits: f64,
    /// Whether its weights are in bf16, as far as they are not quantised.
    is_bf16: bool,
}

/// Bytes and multiply-adds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Amount {
    pub bytes: f64,
    pub multiply_adds: f64,
}

impl Work {
    /// Of a model that was loaded from `directory`, with keys and values as its sessions have them.
    pub fn new(model: &Model, directory: &Path, options: &LoadOptions, kv_dtype: KvDtype) -> Result<Work> {
        let (description, _) = Model::inspect(directory, options)?;
        let Description { config, expert_parameters, dtypes, lookup_bytes, .. } = &description;
        let (bytes, expert_bytes) = model.backend().weight_bytes();
        let head = config.vocab_size * config.hidden_size;
        let attention = 2 * config.hidden_size * (config.query_size() + config.key_value_size());
        let router = if config.num_local_experts > 1 { config.num_local_experts * config.hidden_size } else { 0 };
        let layer_parameters = config.num_hidden_layers * (attention + router + 2 * config.hidden_size);
        let choices = config.num_experts_per_tok as f64 / config.num_local_experts as f64;
        Ok(Work {
            experts_per_layer: config.num_local_experts as f64,
            expert_bytes: expert_bytes as f64,
            other_bytes: (bytes - expert_bytes) as f64 - *lookup_bytes as f64,
            layer_multiply_adds: layer_parameters as f64 + *expert_parameters as f64 * choices,
            head_multiply_adds: head as f64,
            attention_multiply_adds: (2 * config.num_hidden_layers * config.query_size()) as f64,
            kv_bytes: KvGeometry::of(config, kv_dtype).bytes_per_token() as f64,
            kv_dtype,
            expert_bits: 8.0 * expert_bytes as f64 / *expert_parameters as f64,
            is_bf16: dtypes.iter().any(|dtype| dtype == "BF16"),
        })
    }

    /// The kind of multiply-adds that suits the weights of its experts best, whether or not the library uses it.
    pub fn arithmetic(&self) -> Roof {
        match self.expert_bits {
            ..12.0 => Roof::Int8DotProducts,
            ..24.0 if self.is_bf16 => Roof::Bf16DotProducts,
            _ => Roof::MultiplyAdds,
        }
    }

    /// One step of `sessions` sessions, each of which holds `held` tokens, that touches `touched` experts per layer.
    pub fn step(&self, sessions: usize, held: f64, touched: f64) -> Amount {
        let sessions = sessions as f64;
        let experts = self.expert_bytes * touched / self.experts_per_layer;
        Amount {
            bytes: self.other_bytes + experts + sessions * held * self.kv_bytes,
            multiply_adds: sessions
                * (self.layer_multiply_adds + self.head_multiply_adds + held * self.attention_multiply_adds),
        }
    }

    /// Multiply-adds of a prompt of `tokens`, with the logits after the last.
    pub fn prefill(&self, tokens: usize) -> f64 {
        let tokens = tokens as f64;
        let pairs = tokens * (tokens + 1.0) / 2.0;
        tokens * self.layer_multiply_adds + pairs * self.attention_multiply_adds + self.head_multiply_adds
    }
}
