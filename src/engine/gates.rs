//! The gates of a model's routers: those that its directory has, and those that a patch puts in their place.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use xxhash_rust::xxh3::Xxh3Default;

use super::model::Model;
use crate::backend::gates::{AppliedGates, number_of};
use crate::error::Result;
use crate::memory::try_vec;
use crate::model::RouterPatch;
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

    /// Puts a patch's gates in place of those in force, whether stored or another patch's, from any thread, while sessions go on.
    ///
    /// A call that is running ends under the gates it began under. From then on what sessions show is what sessions made under
    /// the new gates would, bit for bit: their tokens are pending, and are run again when they are next run. A pass that a
    /// budget had suspended is begun anew. A session that shares pages with a fork needs pages of its own for that.
    ///
    /// Takes as many bytes as the gates have, in f32, beside the stored ones; on a GPU that is the device's memory, which
    /// `device_memory_limit` does not count. Fails with `PatchModel` for a patch of another geometry or of other stored gates,
    /// `OutOfMemory`, and as devices do; the gates in force are then what they were.
    pub fn apply_router_patch(&self, patch: &RouterPatch) -> Result<()> {
        /// Of gates made so far; the stored ones have 0.
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        patch.check_model(self.config(), || self.gates_fingerprint())?;
        let matrices = self.backend().new_gates(patch.gates())?;
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed) + 1;
        self.replace_gates(Some(Arc::new(AppliedGates { number, fingerprint: fingerprint(patch.gates()), matrices })));
        Ok(())
    }

    /// Puts the stored gates back in force, bit for bit; without a patch nothing changes. What sessions show is then as in
    /// `apply_router_patch`, but those that were not run meanwhile go on where they stood.
    pub fn remove_router_patch(&self) -> Result<()> {
        self.replace_gates(None);
        Ok(())
    }

    /// Whether a patch is applied.
    pub fn has_router_patch(&self) -> bool {
        self.gates.read().is_some()
    }

    fn replace_gates(&self, gates: Option<Arc<AppliedGates>>) {
        let old = std::mem::replace(&mut *self.gates.write(), gates);
        // Not under the lock: it may take a call to the device. Calls that run under them keep them as long.
        drop(old);
    }

    /// The gates in force; none where they are the stored ones. A call takes them once and runs under them to its end.
    pub(super) fn gates(&self) -> Option<Arc<AppliedGates>> {
        self.gates.read().clone()
    }

    /// By which the gates in force are known in this process.
    pub(super) fn gates_number(&self) -> u64 {
        number_of(self.gates.read().as_deref())
    }

    /// The model's fingerprint where these gates are in force.
    pub(super) fn fingerprint_under(&self, gates: Option<&AppliedGates>) -> u64 {
        let loaded = self.loaded_fingerprint();
        gates.map_or(loaded, |gates| {
            let mut hasher = Xxh3Default::new();
            hasher.update(&loaded.to_le_bytes());
            hasher.update(&gates.fingerprint.to_le_bytes());
            hasher.digest()
        })
    }
}
