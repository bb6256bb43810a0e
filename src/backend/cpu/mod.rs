//! The CPU backend: weights in host memory as they were stored, f32 activations and sums, the library's own threads.

pub mod kernels;
pub mod pool;
pub mod threads;

mod attention_split;
mod jobs;
mod pass;
mod routing;

use std::sync::{Arc, Weak};

use half::{bf16, f16};
use parking_lot::Mutex;
use safetensors::Dtype;
use xxhash_rust::xxh3::Xxh3Default;

use crate::backend::kv::{KvDtype, KvGeometry, KvPage};
use crate::backend::observer::Observer;
use crate::backend::ops::{Backend, Pass, PassLimits};
use crate::error::Result;
use crate::memory::Buffer;
use crate::model::{Config, Weights};
use kernels::{Instructions, Kernels};
use pass::CpuPass;
use pool::Pool;
pub use threads::{ParallelFor, Priority, ThreadOptions};

/// What a host may choose about the CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// The threads that compute; `4.into()` is four of them.
    pub threads: ThreadOptions,
    /// Instruction set.
    pub instructions: Instructions,
    /// Multiply the embedding by the unrounded square root of hidden_size.
    pub unrounded_embedding_scale: bool,
    /// Use GeLU by its definition instead of the tanh approximation.
    pub exact_gelu: bool,
}

impl CpuOptions {
    /// Whether this machine can do as asked; to be found out before the weights are read.
    pub fn check(&self) -> Result<()> {
        self.threads.check()?;
        Kernels::get(self.instructions).map(drop)
    }
}

/// A model's weights on the CPU.
pub struct CpuBackend {
    shared: Arc<Shared>,
}

/// What every pass of a model reads.
struct Shared {
    config: Config,
    weights: Weights,
    kernels: Kernels,
    pool: Pool,
    exact_gelu: bool,
    embedding_scale: f32,
    /// `[head_dim / 2]`: radians per position of each rotary pair.
    rotary_frequencies: Buffer<f32>,
    /// Shown what matrices are multiplied with, while somebody wants that.
    observer: Mutex<Weak<Observer>>,
}

impl CpuBackend {
    /// Takes the weights over and starts the threads.
    pub fn new(config: Config, weights: Weights, options: &CpuOptions) -> Result<Self> {
        let root = (config.hidden_size as f64).sqrt();
        let embedding_scale =
            if options.unrounded_embedding_scale { root as f32 } else { rounded(root, weights.embedding_dtype) };
        let mut rotary_frequencies = Buffer::zeroed("rotary frequencies", config.head_dim / 2)?;
        for (pair, frequency) in rotary_frequencies.iter_mut().enumerate() {
            *frequency = config.rope_theta.powf(-(2.0 * pair as f64) / config.head_dim as f64) as f32;
        }
        Ok(CpuBackend {
            shared: Arc::new(Shared {
                kernels: Kernels::get(options.instructions)?,
                pool: Pool::with(&options.threads)?,
                exact_gelu: options.exact_gelu,
                embedding_scale,
                rotary_frequencies,
                observer: Mutex::default(),
                config,
                weights,
            }),
        })
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

/// Bytes of workspace that a pass of these limits takes, told before anything is loaded.
pub fn planned_pass_bytes(config: &Config, limits: PassLimits) -> Result<usize> {
    pass::planned_bytes(config, limits)
}

/// What a backend made with these options calls its device.
pub fn planned_device_name(options: &CpuOptions) -> Result<String> {
    Ok(device_name(options.threads.resolved_count(), &Kernels::get(options.instructions)?))
}

fn device_name(threads: usize, kernels: &Kernels) -> String {
    format!("CPU, {threads} threads, {}", kernels.name)
}

impl Backend for CpuBackend {
    fn device_name(&self) -> String {
        device_name(self.shared.pool.threads(), &self.shared.kernels)
    }

    fn weight_bytes(&self) -> (usize, usize) {
        self.shared.weights.bytes()
    }

    fn default_kv_dtype(&self) -> KvDtype {
        KvDtype::of_weights(self.shared.weights.embedding_dtype)
    }

    fn new_kv_page(&self, dtype: KvDtype) -> Result<KvPage> {
        KvPage::host(&KvGeometry::of(&self.shared.config, dtype))
    }

    fn new_pass(&self, limits: PassLimits) -> Result<Box<dyn Pass>> {
        Ok(Box::new(CpuPass::new(Arc::clone(&self.shared), limits)?))
    }

    fn observe(&self) -> Result<Arc<Observer>> {
        let mut weak = self.shared.observer.lock();
        if let Some(observer) = weak.upgrade() {
            return Ok(observer);
        }
        let observer = Arc::new(Observer::new(&self.shared.config)?);
        *weak = Arc::downgrade(&observer);
        Ok(observer)
    }

    fn fingerprint(&self) -> u64 {
        let Shared { config, weights, exact_gelu, embedding_scale, .. } = &*self.shared;
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
            *exact_gelu as u64,
            embedding_scale.to_bits() as u64,
        ];
        numbers.iter().for_each(|number| hasher.update(&number.to_le_bytes()));
        weights.sample(&mut |bytes| hasher.update(bytes));
        hasher.digest()
    }
}
