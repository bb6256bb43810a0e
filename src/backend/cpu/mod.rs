//! The CPU backend: weights in host memory as they were stored, f32 activations and sums, the library's own threads.

pub mod kernels;
pub mod pool;

mod attention_split;
mod jobs;
mod pass;
mod routing;

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3Default;

use crate::backend::kv::{KvDtype, KvGeometry, KvPage};
use crate::backend::ops::{Backend, Pass, PassLimits};
use crate::error::{Error, Result, Status};
use crate::memory::Buffer;
use crate::model::{Config, Weights};
use kernels::{Instructions, Kernels};
use pass::CpuPass;
use pool::Pool;

/// What a host may choose about the CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads, the calling one included; 0 means one per core the process may use.
    pub threads: usize,
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
        if self.threads > pool::MAX_THREADS {
            let text = format!("threads is {}, expected 0 to {}", self.threads, pool::MAX_THREADS);
            return Err(Error::new(Status::InvalidArgument, text).at_key("threads"));
        }
        Kernels::get(self.instructions).map(drop)
    }

    /// The number of threads these options lead to.
    fn resolved_threads(&self) -> usize {
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(pool::MAX_THREADS),
            threads => threads,
        }
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
}

impl CpuBackend {
    /// Takes the weights over and starts the threads.
    pub fn new(config: Config, weights: Weights, options: &CpuOptions) -> Result<Self> {
        let threads = options.resolved_threads();
        let root = (config.hidden_size as f64).sqrt();
        let embedding_scale =
            if options.unrounded_embedding_scale { root as f32 } else { weights.embedding.elements.round(root) };
        let mut rotary_frequencies = Buffer::zeroed("rotary frequencies", config.head_dim / 2)?;
        for (pair, frequency) in rotary_frequencies.iter_mut().enumerate() {
            *frequency = config.rope_theta.powf(-(2.0 * pair as f64) / config.head_dim as f64) as f32;
        }
        Ok(CpuBackend {
            shared: Arc::new(Shared {
                kernels: Kernels::get(options.instructions)?,
                pool: Pool::new(threads)?,
                exact_gelu: options.exact_gelu,
                embedding_scale,
                rotary_frequencies,
                config,
                weights,
            }),
        })
    }
}

/// Bytes of workspace that a pass of these limits takes, told before anything is loaded.
pub fn planned_pass_bytes(config: &Config, limits: PassLimits) -> Result<usize> {
    pass::planned_bytes(config, limits)
}

/// What a backend made with these options calls its device.
pub fn planned_device_name(options: &CpuOptions) -> Result<String> {
    Ok(device_name(options.resolved_threads(), &Kernels::get(options.instructions)?))
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
        KvDtype::of_weights(self.shared.weights.embedding.elements.dtype())
    }

    fn new_kv_page(&self, dtype: KvDtype) -> Result<KvPage> {
        KvPage::host(&KvGeometry::of(&self.shared.config, dtype))
    }

    fn new_pass(&self, limits: PassLimits) -> Result<Box<dyn Pass>> {
        Ok(Box::new(CpuPass::new(Arc::clone(&self.shared), limits)?))
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
