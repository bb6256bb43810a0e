//! What a model and its sessions will take, told before anything is loaded.

use std::path::Path;

use super::model::{LoadOptions, Model};
use super::options::SessionOptions;
use super::placement::Placement;
use crate::backend::kv::{KvDtype, KvGeometry};
use crate::backend::residency::WeightResidency;
use crate::error::Result;
use crate::model::Formats;

/// Memory of a model and of each of its sessions, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The device that would hold it all, as [`Backend::device_name`](crate::backend::Backend::device_name).
    pub device_name: String,
    /// All weights, as [`Backend::weight_bytes`](crate::backend::Backend::weight_bytes).
    pub weight_bytes: u64,
    /// The experts among them.
    pub expert_bytes: u64,
    /// Where they would be, as [`Model::residency`].
    pub residency: WeightResidency,
    /// What each part of the weights would be held in; none where its matrices are of several formats.
    pub formats: Formats,
    /// The tokenizer's tables, about; 0 where there is none.
    pub tokenizer_bytes: u64,
    /// Tokens a session can hold, the default filled in.
    pub context_size: usize,
    /// How keys and values are stored, the default filled in.
    pub kv_dtype: KvDtype,
    /// Keys and values of one token.
    pub kv_bytes_per_token: u64,
    /// Keys and values of one session, in whole pages, as `Session::kv_bytes`.
    pub kv_bytes: u64,
    /// The workspace of one session, and its logits where they are on a device: as `Session::bytes` less the keys and values.
    pub workspace_bytes: u64,
}

impl MemoryPlan {
    /// The model and `sessions` sessions. Tokens, logits in host memory and other small things of a session come on
    /// top, and what experts are copied through.
    pub fn total_bytes(&self, sessions: u64) -> u64 {
        let session = self.kv_bytes.saturating_add(self.workspace_bytes);
        self.weight_bytes.saturating_add(self.tokenizer_bytes).saturating_add(session.saturating_mul(sessions))
    }
}

impl Model {
    /// What `load` and a session with these options would take, told from the headers alone: no weights are read, and no
    /// memory for any of it is asked for. Fails as `load` and `Session::new` would, memory apart.
    pub fn plan(directory: &Path, load: &LoadOptions, session: &SessionOptions) -> Result<MemoryPlan> {
        load.check()?;
        let (description, tokenizer) = Model::inspect(directory, load)?;
        let placement = Placement::choose(load, &description)?;
        let residency = placement.residency(&description)?;
        let config = &description.config;
        let default_dtype = KvDtype::of_weights(description.embedding_dtype);
        let kv_dtype = session.kv_dtype.unwrap_or(default_dtype);
        let session = session.resolve(config, default_dtype)?;
        let geometry = KvGeometry::of(config, kv_dtype);
        let kv_bytes = KvGeometry::pages_for(session.context_size).saturating_mul(geometry.page_bytes());
        load.kv_account().take(kv_bytes)?;
        let workspace_bytes = placement.workspace_bytes(&description, &session)?;
        let (weight_bytes, expert_bytes) = description.loaded_bytes;
        Ok(MemoryPlan {
            device_name: placement.device_name(&load.cpu)?,
            weight_bytes,
            expert_bytes,
            residency,
            formats: description.formats,
            tokenizer_bytes: tokenizer.map_or(0, |tokenizer| tokenizer.bytes_in_use() as u64),
            context_size: session.context_size,
            kv_dtype,
            kv_bytes_per_token: geometry.bytes_per_token() as u64,
            kv_bytes: kv_bytes as u64,
            workspace_bytes: workspace_bytes as u64,
        })
    }
}
