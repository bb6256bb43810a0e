//! What every backend computes with and derives from a model's configuration alone, so that all of them mean the same.

use half::{bf16, f16};
use safetensors::Dtype;
use xxhash_rust::xxh3::Xxh3Default;

use crate::error::{Error, Result};
use crate::memory::Buffer;
use crate::model::Config;

/// Where published GemMoEs differ in their arithmetic.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Variants {
    /// Multiply the embedding by the unrounded square root of hidden_size.
    pub unrounded_embedding_scale: bool,
    /// Use GeLU by its definition instead of the tanh approximation.
    pub exact_gelu: bool,
}

/// The numbers of a model's arithmetic.
pub struct Numerics {
    /// GeLU by its definition instead of the tanh approximation.
    pub exact_gelu: bool,
    /// What the embedding is multiplied by: the square root of hidden_size, rounded to the checkpoint's dtype.
    pub embedding_scale: f32,
    /// `[head_dim / 2]`: radians per position of each rotary pair.
    pub rotary_frequencies: Buffer<f32>,
}

impl Numerics {
    /// Of a model whose embedding is stored in `embedding_dtype`.
    pub fn new(config: &Config, embedding_dtype: Dtype, variants: Variants) -> Result<Numerics> {
        let root = (config.hidden_size as f64).sqrt();
        let embedding_scale =
            if variants.unrounded_embedding_scale { root as f32 } else { rounded(root, embedding_dtype) };
        let mut rotary_frequencies = Buffer::zeroed("rotary frequencies", config.head_dim / 2)?;
        for (pair, frequency) in rotary_frequencies.iter_mut().enumerate() {
            *frequency = config.rope_theta.powf(-(2.0 * pair as f64) / config.head_dim as f64) as f32;
        }
        Ok(Numerics { exact_gelu: variants.exact_gelu, embedding_scale, rotary_frequencies })
    }

    /// Cosines and sines of all rotary pairs at the positions from 0 on, `[positions, head_dim / 2]` each: of angles in f32, as
    /// the pass of inference has them.
    pub fn angles(&self, what: &str, positions: usize) -> Result<(Buffer<f32>, Buffer<f32>)> {
        let frequencies = &self.rotary_frequencies;
        let too_large = || Error::out_of_memory(what, usize::MAX);
        let count = positions.checked_mul(frequencies.len()).ok_or_else(too_large)?;
        let (mut cosines, mut sines) = (Buffer::zeroed(what, count)?, Buffer::zeroed(what, count)?);
        for (at, (cosine, sine)) in cosines.iter_mut().zip(sines.iter_mut()).enumerate() {
            let (position, pair) = (at / frequencies.len(), at % frequencies.len());
            let (exact_sine, exact_cosine) = f64::from(position as f32 * frequencies[pair]).sin_cos();
            (*cosine, *sine) = (exact_cosine as f32, exact_sine as f32);
        }
        Ok((cosines, sines))
    }

    /// A hash of everything but the weights that decides a model's results, to which the weights are yet to be added.
    pub fn fingerprint(&self, config: &Config) -> Xxh3Default {
        let mut hasher = Xxh3Default::new();
        let numbers = [
            config.vocab_size as u64,
            config.hidden_size as u64,
            config.intermediate_size as u64,
            config.num_hidden_layers as u64,
            config.num_attention_heads as u64,
            config.num_key_value_heads as u64,
            config.head_dim as u64,
            config.num_local_experts as u64,
            config.num_experts_per_tok as u64,
            config.rope_theta.to_bits(),
            config.rms_norm_eps.to_bits(),
            self.exact_gelu as u64,
            self.embedding_scale.to_bits() as u64,
        ];
        numbers.iter().for_each(|number| hasher.update(&number.to_le_bytes()));
        hasher
    }
}

/// `value` rounded to a dtype that weights can have.
fn rounded(value: f64, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f64(value).to_f32(),
        Dtype::F16 => f16::from_f64(value).to_f32(),
        _ => value as f32,
    }
}
