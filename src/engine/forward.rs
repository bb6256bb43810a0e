//! THE forward pass: every backend's stages, in the order of the mathematics.

use crate::backend::{Batch, Cancel, Pass};
use crate::error::Result;

/// Runs one batch through all layers. Afterwards the pass holds its logits and routes, and the pages its keys and
/// values.
///
/// On an error, `Cancelled` included, the pages may hold part of the batch's keys and values: positions from each
/// slice's `start` on are to be taken as unwritten.
pub fn forward(pass: &mut dyn Pass, layers: usize, batch: &mut Batch) -> Result<()> {
    pass.begin(batch)?;
    pass.embed(batch)?;
    for layer in 0..layers {
        if batch.cancel.is_requested() {
            return Err(Cancel::error());
        }
        // x += attention(norm(x))
        pass.norm_qkv_rope(layer, batch)?;
        pass.attention(layer, batch)?;
        // x += experts(norm(x))
        pass.router(layer, batch)?;
        pass.experts(layer, batch)?;
    }
    // logits = head(norm(x)), where asked for
    pass.head(batch)
}
