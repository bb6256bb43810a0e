//! The gates of routers on a device: the stored ones, which are among the weights, and those that a patch brings, in a block of
//! their own.

use super::Shared;
use crate::error::Result;
use crate::memory::{Buffer, Bytes};
use crate::model::weights::Matrix;

/// Reads the stored gates to `out: [layers, experts, hidden_size]`.
pub fn read_stored(shared: &Shared, out: &mut [f32]) -> Result<()> {
    let routers = shared.weights.layers.iter().filter_map(|layer| layer.router.as_ref());
    let sizes = shared.config.num_local_experts * shared.config.hidden_size;
    for (router, out) in routers.zip(out.chunks_exact_mut(sizes)) {
        let shape = *router.shape();
        let mut lines = Buffer::zeroed("a gate", shape.line_bytes())?;
        let current = shared.device.enter()?;
        // SAFETY: both are as long; the buffer is kept until the wait is over, again where that fails and the device goes on.
        unsafe { current.copy_to_host(lines.as_mut_slice().as_mut_ptr(), router.lines, shape.line_bytes()) }?;
        current.wait().inspect_err(|_| drop(current.wait()))?;
        let router = Matrix::new(shape, Bytes::Owned(lines), Bytes::Owned(Buffer::zeroed("a gate", 0)?));
        for (row, out) in out.chunks_exact_mut(shape.columns).enumerate() {
            router.read_row(row, out);
        }
    }
    Ok(())
}
