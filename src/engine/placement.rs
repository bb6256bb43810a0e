//! Where a model goes: onto the device that was asked for, or the one that suits it.

use super::model::LoadOptions;
use super::options::SessionOptions;
use super::session::pass_limits;
use crate::backend::cpu::{self, CpuOptions};
#[cfg(feature = "cuda")]
use crate::backend::cuda;
use crate::backend::device::Device;
#[cfg(feature = "cuda")]
use crate::backend::device::devices;
use crate::backend::residency::WeightResidency;
use crate::error::Result;
#[cfg(not(feature = "cuda"))]
use crate::error::{Error, Status};
use crate::model::Description;

/// The device that a model goes onto.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda {
        /// By its index.
        device: usize,
        /// As [`LoadOptions`] has them.
        memory_limit: u64,
        exact: bool,
    },
}

impl Placement {
    /// Chooses where the choice is free. Fails as a lent context does.
    #[cfg(feature = "cuda")]
    pub(super) fn choose(options: &LoadOptions, description: &Description) -> Result<Placement> {
        let LoadOptions { exact, device_memory_limit: memory_limit, .. } = *options;
        match options.device {
            Device::Cpu => Ok(Placement::Cpu),
            Device::Cuda(index) => {
                let device = match &options.cuda_context {
                    Some(lent) => cuda::index_of(lent, index)?,
                    None => index,
                };
                Ok(Placement::Cuda { device, memory_limit, exact })
            }
            Device::Auto => {
                // A driver that fails is as good as none.
                let freest = devices().unwrap_or_default().into_iter().max_by_key(|device| device.free_bytes);
                match freest {
                    Some(device) if fits_with_a_session(options, description, device.free_bytes)? => {
                        Ok(Placement::Cuda { device: device.index, memory_limit, exact })
                    }
                    _ => Ok(Placement::Cpu),
                }
            }
        }
    }

    /// There is no choice.
    #[cfg(not(feature = "cuda"))]
    pub(super) fn choose(options: &LoadOptions, _description: &Description) -> Result<Placement> {
        match options.device {
            Device::Cpu | Device::Auto => Ok(Placement::Cpu),
            Device::Cuda(_) => {
                let text = "this library was built without the feature cuda: use the CPU";
                Err(Error::new(Status::NoDevice, text).at_key("device"))
            }
        }
    }

    /// What the backend will call its device. Fails where there is none such.
    pub(super) fn device_name(self, options: &CpuOptions) -> Result<String> {
        match self {
            Placement::Cpu => cpu::planned_device_name(options),
            #[cfg(feature = "cuda")]
            Placement::Cuda { device, .. } => cuda::device_name(device),
        }
    }

    /// Where weights would be there.
    pub(super) fn residency(self, description: &Description) -> Result<WeightResidency> {
        match self {
            Placement::Cpu => Ok(WeightResidency {
                host_bytes: description.loaded_bytes.0,
                host_experts: description.expert_shapes.iter().map(|layer| layer.len() as u64).sum(),
                ..Default::default()
            }),
            #[cfg(feature = "cuda")]
            Placement::Cuda { memory_limit, .. } => cuda::planned_residency(description, memory_limit),
        }
    }

    /// Bytes of the workspace of a session there, if it has one, and of its logits on a device.
    pub(super) fn workspace_bytes(self, description: &Description, session: &SessionOptions) -> Result<usize> {
        let (config, limits) = (&description.config, pass_limits(session));
        let pass = match self {
            _ if session.batch_only => 0,
            Placement::Cpu => cpu::planned_pass_bytes(config, limits)?,
            #[cfg(feature = "cuda")]
            Placement::Cuda { memory_limit, exact, .. } => {
                let offload = match cuda::planned_residency(description, memory_limit)?.host_experts {
                    0 => 0,
                    _ => cuda::planned_offload_bytes(config, limits, exact)?,
                };
                cuda::planned_pass_bytes(config, limits)?.saturating_add(offload)
            }
        };
        let logits = match self {
            Placement::Cpu => 0,
            #[cfg(feature = "cuda")]
            Placement::Cuda { .. } => cuda::planned_logit_bytes(config),
        };
        Ok(pass.saturating_add(logits))
    }
}

/// Whether a model fits into so many bytes of a GPU, with one session of default options. One whose least is above the limit
/// does not.
#[cfg(feature = "cuda")]
fn fits_with_a_session(options: &LoadOptions, description: &Description, free_bytes: u64) -> Result<bool> {
    use crate::backend::kv::{KvDtype, KvGeometry};
    let Ok(weights) = cuda::planned_residency(description, options.device_memory_limit) else { return Ok(false) };
    let config = &description.config;
    let dtype = KvDtype::of_weights(description.embedding_dtype);
    let session = SessionOptions::default().resolve(config, dtype)?;
    let page_bytes = KvGeometry::of(config, dtype).page_bytes();
    let keys_and_values = KvGeometry::pages_for(session.context_size).saturating_mul(page_bytes);
    let workspace = cuda::planned_pass_bytes(config, pass_limits(&session))? + cuda::planned_logit_bytes(config);
    let of_session = workspace.saturating_add(keys_and_values) as u64;
    Ok((weights.device_bytes + weights.staging_bytes).saturating_add(of_session) <= free_bytes)
}
