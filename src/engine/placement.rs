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
use crate::error::Result;
#[cfg(not(feature = "cuda"))]
use crate::error::{Error, Status};
use crate::model::{Config, Description};

/// The device that a model goes onto.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placement {
    Cpu,
    /// By its index.
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

impl Placement {
    /// Chooses where the choice is free. Fails as a lent context does.
    #[cfg(feature = "cuda")]
    pub(super) fn choose(options: &LoadOptions, description: &Description) -> Result<Placement> {
        match options.device {
            Device::Cpu => Ok(Placement::Cpu),
            Device::Cuda(index) => match &options.cuda_context {
                Some(lent) => Ok(Placement::Cuda(cuda::index_of(lent, index)?)),
                None => Ok(Placement::Cuda(index)),
            },
            Device::Auto => {
                // A driver that fails is as good as none.
                let freest = devices().unwrap_or_default().into_iter().max_by_key(|device| device.free_bytes);
                match freest {
                    Some(device) if bytes_with_a_session(description)? <= device.free_bytes => {
                        Ok(Placement::Cuda(device.index))
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
            Placement::Cuda(index) => cuda::device_name(index),
        }
    }

    /// Bytes of the workspace of a session there, if it has one, and of its logits on a device.
    pub(super) fn workspace_bytes(self, config: &Config, session: &SessionOptions) -> Result<usize> {
        let pass = match self {
            _ if session.batch_only => 0,
            Placement::Cpu => cpu::planned_pass_bytes(config, pass_limits(session))?,
            #[cfg(feature = "cuda")]
            Placement::Cuda(_) => cuda::planned_pass_bytes(config, pass_limits(session))?,
        };
        let logits = match self {
            Placement::Cpu => 0,
            #[cfg(feature = "cuda")]
            Placement::Cuda(_) => cuda::planned_logit_bytes(config),
        };
        Ok(pass.saturating_add(logits))
    }
}

/// Bytes of a model on a GPU, with one session of default options.
#[cfg(feature = "cuda")]
fn bytes_with_a_session(description: &Description) -> Result<u64> {
    use crate::backend::kv::{KvDtype, KvGeometry};
    let config = &description.config;
    let dtype = KvDtype::of_weights(description.embedding_dtype);
    let session = SessionOptions::default().resolve(config, dtype)?;
    let page_bytes = KvGeometry::of(config, dtype).page_bytes();
    let keys_and_values = KvGeometry::pages_for(session.context_size).saturating_mul(page_bytes);
    let workspace = Placement::Cuda(0).workspace_bytes(config, &session)?;
    Ok(cuda::planned_weight_bytes(description).saturating_add(workspace).saturating_add(keys_and_values) as u64)
}
