//! The CUDA backend: weights on an NVIDIA device, kernels of our own, and nothing but the driver to run them.
//!
//! `driver` finds it, `context` calls it, `device` is one device in use, `memory` what is allocated there; `kernels` loads the
//! code, whose arguments are in `arguments`. On top of these stand `weights`, `page`, and `pass` with its `workspace` and
//! `batch`.

pub mod arguments;
mod batch;
#[cfg(feature = "bench")]
pub mod bench;
mod context;
mod device;
mod driver;
mod kernels;
mod memory;
mod page;
mod pass;
mod weights;
mod workspace;

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3Default;

use crate::backend::kv::{KvDtype, KvGeometry, KvPage};
use crate::backend::numerics::{Numerics, Variants};
use crate::backend::observer::Observer;
use crate::backend::ops::{Backend, Pass, PassLimits};
use crate::error::{Error, Result, Status};
use crate::model::{Checkpoint, Config, Description, Progress};
use device::Device;
pub use device::devices;
use kernels::Kernels;
use pass::CudaPass;
use weights::DeviceWeights;
pub use weights::planned_bytes as planned_weight_bytes;
pub use workspace::planned_bytes as planned_pass_bytes;

/// What a backend on the device of this index calls it. Fails with `NoDevice`, and as drivers do.
pub fn device_name(index: usize) -> Result<String> {
    Ok(Device::open(index)?.name().to_owned())
}

/// How a model runs on a device, and how it gets there.
#[derive(Clone, Copy, Debug)]
pub struct CudaOptions {
    /// Index of the device.
    pub device: usize,
    pub variants: Variants,
    /// A sequence's bits do not depend on what else is in the batch or how a prompt was cut; batches of more than 16 tokens,
    /// prefill above all, then use the f32 and dp4a kernels instead of tensor cores.
    pub exact: bool,
    /// Threads of the processor that lay weights out.
    pub threads: usize,
    /// Map quantised matrices instead of reading them.
    pub map: bool,
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
            let (reading, frequencies) = ((options.threads, options.map), &numerics.rotary_frequencies);
            DeviceWeights::load(device, description, checkpoint, reading, progress, frequencies, hasher)
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
            DeviceWeights::generate(device, description, checkpoint, fill, &numerics.rotary_frequencies, hasher)
        })
    }

    /// On a device that `take` brings weights to.
    fn new(
        options: &CudaOptions,
        description: &Description,
        take: impl FnOnce(&Arc<Device>, &Numerics, Xxh3Default) -> Result<DeviceWeights>,
    ) -> Result<CudaBackend> {
        let CudaOptions { device, variants, exact, .. } = *options;
        let device = Device::open(device)?;
        let config = description.config.clone();
        let numerics = Numerics::new(&config, description.embedding_dtype, variants)?;
        let kernels = Kernels::load(&device)?;
        let mut hasher = numerics.fingerprint(&config);
        hasher.update(b"cuda");
        hasher.update(&[exact as u8]);
        let weights = take(&device, &numerics, hasher)?;
        Ok(CudaBackend { shared: Arc::new(Shared { config, numerics, kernels, weights, exact, device }) })
    }

    /// Bytes of its weights on the device, with what lies between them.
    pub fn device_bytes(&self) -> usize {
        self.shared.weights.device_bytes()
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

    fn new_pass(&self, limits: PassLimits) -> Result<Box<dyn Pass>> {
        Ok(Box::new(CudaPass::new(Arc::clone(&self.shared), limits)?))
    }

    fn observe(&self) -> Result<Arc<Observer>> {
        let text = "activations can be observed on the CPU alone: load the model there";
        Err(Error::new(Status::InvalidArgument, text).at_key("device"))
    }

    fn fingerprint(&self) -> u64 {
        self.shared.weights.hash
    }
}
