//! The CUDA backend: weights on an NVIDIA device, kernels of our own, and nothing but the driver to run them.
//!
//! `driver` finds it, `context` calls it, `device` is one device in use, perhaps by what the host lends (`lent`), `stream` its
//! queues, `memory` what is allocated there; `kernels` loads the code of `images`, whose arguments are in `arguments`. On top of
//! these stand `weights`, `page`, `logits`, and `pass` with its `workspace` and `batch`. Under a limit of memory `residency` says
//! which experts are on the device, `experts` has and moves them, `upload` copies, and `offload` is what a pass has for those in
//! host memory.

pub mod arguments;
mod batch;
#[cfg(feature = "bench")]
pub mod bench;
mod context;
mod device;
mod driver;
mod experts;
mod gates;
mod images;
mod kernels;
mod lent;
mod logits;
mod memory;
mod offload;
mod page;
mod pass;
mod residency;
mod stream;
mod upload;
mod weights;
mod workspace;

use std::sync::Arc;

use parking_lot::Mutex;
use xxhash_rust::xxh3::Xxh3Default;

use crate::backend::cpu::CpuOptions;
use crate::backend::device::LentContext;
use crate::backend::gates::GateMatrices;
use crate::backend::kv::{KvDtype, KvGeometry, KvPage};
use crate::backend::logits::Logits;
use crate::backend::numerics::{Numerics, Variants};
use crate::backend::observer::Observer;
use crate::backend::ops::{Backend, Pass, PassLimits};
use crate::backend::residency::{OffloadCounts, WeightResidency};
use crate::error::{Error, Result, Status};
use crate::model::{Checkpoint, Config, Description, Progress};
use device::Device;
pub use device::{devices, index_of};
use experts::Experts;
use kernels::Kernels;
pub use logits::planned_bytes as planned_logit_bytes;
use offload::{Counters, Offload};
use pass::CudaPass;
use residency::Residency;
use weights::DeviceWeights;
pub use workspace::planned_bytes as planned_pass_bytes;

/// Where the weights of a model would be under a limit in bytes; 0 is none. Fails with `InvalidArgument` where the limit is too
/// small.
pub fn planned_residency(description: &Description, memory_limit: u64) -> Result<WeightResidency> {
    let sizes = weights::planned_sizes(description)?;
    Ok(Residency::choose(&sizes, memory_limit)?.total(&sizes))
}

/// Bytes that a pass of these limits takes beside `planned_pass_bytes` where there are experts in host memory, all of the
/// host's.
pub fn planned_offload_bytes(config: &Config, limits: PassLimits, exact: bool) -> Result<usize> {
    Offload::planned_bytes(config, &limits, exact)
}

/// What a backend on the device of this index calls it. Fails with `NoDevice`, and as drivers do.
pub fn device_name(index: usize) -> Result<String> {
    Ok(Device::open(index, None)?.name().to_owned())
}

/// How a model runs on a device, and how it gets there.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Index of the device.
    pub device: usize,
    /// What the host lends to use there, its device being the one of the index, or any where that is 0.
    pub lent: Option<LentContext>,
    pub variants: Variants,
    /// A sequence's bits do not depend on what else is in the batch or how a prompt was cut; batches of more than a few
    /// tokens (`kernels::fewest_on_tensor_cores`), prefill above all, then use the f32 and dp4a kernels instead of tensor cores.
    pub exact: bool,
    /// On compute capability 9.0 kernels may be launched while the one before them runs, where the driver is for CUDA 12.3
    /// or newer. Results are the same; this is how to measure what it brings.
    pub dependent_launch: bool,
    /// Threads of the processor that lay weights out, and compute experts in host memory.
    pub cpu: CpuOptions,
    /// Map quantised matrices instead of reading them.
    pub map: bool,
    /// Most bytes of weights on the device; 0 is no limit.
    pub memory_limit: u64,
}

/// A model's weights on a device.
pub struct CudaBackend {
    shared: Arc<Shared>,
}

/// What every pass of a model reads.
struct Shared {
    config: Config,
    numerics: Numerics,
    kernels: Kernels,
    weights: DeviceWeights,
    /// Borrowed while work on them is enqueued, and while they are moved.
    experts: Mutex<Experts>,
    counters: Counters,
    /// See `CudaOptions`.
    exact: bool,
    device: Arc<Device>,
}

impl CudaBackend {
    /// Reads the weights of a checkpoint onto a device.
    pub fn load(
        options: &CudaOptions,
        description: &Description,
        checkpoint: &Checkpoint,
        progress: &Progress,
    ) -> Result<CudaBackend> {
        CudaBackend::new(options, description, |device, numerics, hasher| {
            let frequencies = &numerics.rotary_frequencies;
            DeviceWeights::load(device, description, checkpoint, options, progress, frequencies, hasher)
        })
    }

    /// As `load`, with weights that `fill` makes on the device; the checkpoint may be nothing but headers.
    #[cfg(feature = "bench")]
    pub fn generate(
        options: &CudaOptions,
        description: &Description,
        checkpoint: &Checkpoint,
        fill: bench::Fill,
    ) -> Result<CudaBackend> {
        CudaBackend::new(options, description, |device, numerics, hasher| {
            let frequencies = &numerics.rotary_frequencies;
            DeviceWeights::generate(device, description, checkpoint, options, fill, frequencies, hasher)
        })
    }

    /// On a device that `take` brings weights to.
    fn new(
        options: &CudaOptions,
        description: &Description,
        take: impl FnOnce(&Arc<Device>, &Numerics, Xxh3Default) -> Result<(DeviceWeights, Experts)>,
    ) -> Result<CudaBackend> {
        let CudaOptions { device, lent, variants, exact, dependent_launch, .. } = *options;
        let device = Device::open(device, lent)?;
        let config = description.config.clone();
        let numerics = Numerics::new(&config, description.embedding_dtype, variants)?;
        let kernels = Kernels::load(&device, dependent_launch)?;
        let mut hasher = numerics.fingerprint(&config);
        hasher.update(b"cuda");
        hasher.update(&[exact as u8]);
        let (weights, experts) = take(&device, &numerics, hasher)?;
        let (experts, counters) = (Mutex::new(experts), Counters::default());
        let shared = Shared { config, numerics, kernels, weights, experts, counters, exact, device };
        Ok(CudaBackend { shared: Arc::new(shared) })
    }
}

impl Backend for CudaBackend {
    fn device_name(&self) -> String {
        self.shared.device.name().to_owned()
    }

    fn weight_bytes(&self) -> (usize, usize) {
        self.shared.weights.bytes
    }

    fn default_kv_dtype(&self) -> KvDtype {
        KvDtype::of_weights(self.shared.weights.embedding_dtype)
    }

    fn new_kv_page(&self, dtype: KvDtype) -> Result<KvPage> {
        page::new_page(&self.shared.device, &KvGeometry::of(&self.shared.config, dtype))
    }

    fn new_logits(&self) -> Result<Logits> {
        logits::new_logits(&self.shared.device, &self.shared.config)
    }

    fn new_pass(&self, limits: PassLimits) -> Result<Box<dyn Pass>> {
        Ok(Box::new(CudaPass::new(Arc::clone(&self.shared), limits)?))
    }

    fn observe(&self) -> Result<Arc<Observer>> {
        let text = "activations can be observed on the CPU alone: load the model there";
        Err(Error::new(Status::InvalidArgument, text).at_key("device"))
    }

    fn residency(&self) -> WeightResidency {
        self.shared.experts.lock().residency()
    }

    fn set_device_memory_limit(&self, bytes: u64) -> Result<()> {
        self.shared.experts.lock().set_limit(bytes)
    }

    fn offload_counts(&self) -> OffloadCounts {
        self.shared.counters.read()
    }

    fn read_gates(&self, out: &mut [f32]) -> Result<()> {
        gates::read_stored(&self.shared, out)
    }

    fn new_gates(&self, gates: &[f32]) -> Result<GateMatrices> {
        gates::upload(&self.shared, gates)
    }

    /// Where experts are does not count: in exact mode it changes no bit, and without, bits depend on the batch as well.
    fn fingerprint(&self) -> u64 {
        self.shared.weights.hash
    }
}
