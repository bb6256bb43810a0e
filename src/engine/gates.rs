//! The gates of a model's routers: those that its directory has, and those that a patch puts in their place.

use super::model::Model;
use crate::error::Result;
use crate::memory::try_vec;
use crate::model::router_patch::{GateSizes, fingerprint};

impl Model {
    /// The gates as the directory has them, `[layers, experts, hidden_size]`, whatever patch is applied. Fails with `PatchModel`
    /// for a model without routers, `OutOfMemory`, and as devices do.
    pub fn stored_gates(&self) -> Result<Vec<f32>> {
        let sizes = GateSizes::of(self.config())?;
        let mut gates = try_vec("the gates of a model", sizes.count(), 0f32)?;
        self.backend().read_gates(&mut gates)?;
        Ok(gates)
    }

    /// What `stored_gates` are known by in patches, the same whatever formats the other weights are loaded in; computed when
    /// first asked for. Fails as `stored_gates` does.
    pub fn gates_fingerprint(&self) -> Result<u64> {
        if let Some(known) = self.gates_fingerprint.get() {
            return Ok(*known);
        }
        let computed = fingerprint(&self.stored_gates()?);
        Ok(*self.gates_fingerprint.get_or_init(|| computed))
    }
}
