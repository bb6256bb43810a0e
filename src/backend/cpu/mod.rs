//! The CPU backend: weights in host memory as they were stored, f32 activations and sums, the library's own threads.

pub mod kernels;
pub mod pool;
pub mod threads;

mod attention_split;
mod experts;
#[cfg(feature = "cuda")]
mod host_experts;
mod jobs;
mod pass;
mod routing;
mod training;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::backend::gates::{AppliedGates, GateMatrices, lay_out};
use crate::backend::kv::{KvDtype, KvGeometry, KvPage};
use crate::backend::logits::Logits;
use crate::backend::numerics::{Numerics, Variants};
use crate::backend::observer::Observer;
use crate::backend::ops::{Backend, Cancel, Pass, PassLimits};
use crate::backend::residency::WeightResidency;
use crate::backend::training::{Training, TrainingLimits};
use crate::error::Result;
use crate::model::weights::Matrix;
use crate::model::{Config, Weights};
use kernels::{Instructions, Kernels};
use pass::CpuPass;
use pool::Pool;
pub use threads::{ParallelFor, Priority, ThreadOptions};
use training::CpuTraining;
#[cfg(feature = "cuda")]
pub(super) use {
    experts::Slots,
    host_experts::{HostExperts, HostWorkspace},
    kernels::matmul::TokenRows,
};

/// What a host may choose about the CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// The threads that compute; `4.into()` is four of them.
    pub threads: ThreadOptions,
    /// Instruction set.
    pub instructions: Instructions,
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
    numerics: Numerics,
    /// Shown what matrices are multiplied with, while somebody wants that.
    observer: Mutex<Weak<Observer>>,
}

impl Shared {
    /// A layer's gate: the applied one, or the stored one where none is; none in a dense model.
    fn gate<'a>(&'a self, applied: Option<&'a AppliedGates>, layer: usize) -> Option<&'a Matrix> {
        match applied.map(|gates| &gates.matrices) {
            Some(GateMatrices::Host(matrices)) => Some(&matrices[layer]),
            _ => self.weights.layers[layer].router.as_ref(),
        }
    }

    /// See `Backend::read_gates`.
    fn read_gates(&self, out: &mut [f32]) {
        let routers = self.weights.layers.iter().filter_map(|layer| layer.router.as_ref());
        let rows = routers.flat_map(|router| (0..router.rows()).map(move |row| (router, row)));
        for (out, (router, row)) in out.chunks_exact_mut(self.config.hidden_size).zip(rows) {
            router.read_row(row, out);
        }
    }
}

impl CpuBackend {
    /// Takes the weights over and starts the threads.
    pub fn new(config: Config, weights: Weights, options: &CpuOptions, variants: Variants) -> Result<Self> {
        Ok(CpuBackend {
            shared: Arc::new(Shared {
                kernels: Kernels::get(options.instructions)?,
                pool: Pool::with(&options.threads)?,
                numerics: Numerics::new(&config, weights.embedding_dtype, variants)?,
                observer: Mutex::default(),
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

    fn residency(&self) -> WeightResidency {
        WeightResidency {
            host_bytes: self.shared.weights.bytes().0 as u64,
            host_experts: self.shared.weights.layers.iter().map(|layer| layer.experts.len() as u64).sum(),
            ..Default::default()
        }
    }

    fn default_kv_dtype(&self) -> KvDtype {
        KvDtype::of_weights(self.shared.weights.embedding_dtype)
    }

    fn new_kv_page(&self, dtype: KvDtype) -> Result<KvPage> {
        KvPage::host(&KvGeometry::of(&self.shared.config, dtype))
    }

    fn new_logits(&self) -> Result<Logits> {
        Logits::host(self.shared.config.vocab_size)
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

    fn new_training(&self, limits: TrainingLimits, cancel: &Arc<Cancel>) -> Result<Box<dyn Training>> {
        Ok(Box::new(CpuTraining::new(Arc::clone(&self.shared), limits, Arc::clone(cancel))?))
    }

    fn read_gates(&self, out: &mut [f32]) -> Result<()> {
        self.shared.read_gates(out);
        Ok(())
    }

    fn new_gates(&self, gates: &[f32]) -> Result<GateMatrices> {
        let Config { num_local_experts, hidden_size, .. } = self.shared.config;
        lay_out(gates, num_local_experts, hidden_size).map(GateMatrices::Host)
    }

    fn fingerprint(&self) -> u64 {
        let Shared { config, weights, numerics, .. } = &*self.shared;
        let mut hasher = numerics.fingerprint(config);
        weights.sample(&mut |bytes| hasher.update(bytes));
        hasher.digest()
    }
}
