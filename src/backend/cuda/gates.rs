//! The gates of routers on a device: the stored ones, which are among the weights, and those that a patch brings, in a block of
//! their own.

use super::Shared;
use super::arguments::MatrixArguments;
use super::driver::Address;
use super::experts::write;
use super::memory::{Arena, DeviceBlock};
use super::weights::{DeviceMatrix, NO_MATRIX};
use crate::backend::device_bytes::DeviceBytes;
use crate::backend::gates::{AppliedGates, GateMatrices, lay_out};
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

/// Brings the gates of a patch, `[layers, experts, hidden_size]`, to the device. Where that fails nothing has changed there.
pub fn upload(shared: &Shared, gates: &[f32]) -> Result<GateMatrices> {
    let matrices = lay_out(gates, shared.config.num_local_experts, shared.config.hidden_size)?;
    let shape = *matrices[0].shape();
    let stride = Arena::padded(shape.line_bytes());
    let mut bytes = Buffer::zeroed("the gates of a router patch", matrices.len() * stride)?;
    for (matrix, bytes) in matrices.iter().zip(bytes.chunks_exact_mut(stride)) {
        bytes[..shape.line_bytes()].copy_from_slice(matrix.lines());
    }
    let block = DeviceBlock::new(&shared.device, "the gates of a router patch", bytes.bytes())?;
    write(&shared.device.enter()?, &bytes, block.address())?;
    Ok(GateMatrices::Device { shape, stride, block: Box::new(block) })
}

/// A layer's gate, for kernels: the applied one, or the stored one where none is; none for a dense model. Whoever enqueues work
/// on an applied one keeps it until that is done.
pub fn arguments(shared: &Shared, applied: Option<&AppliedGates>, layer: usize) -> MatrixArguments {
    match applied.map(|gates| &gates.matrices) {
        Some(GateMatrices::Device { shape, stride, block }) => {
            let lines = block.address() + (layer * stride) as Address;
            DeviceMatrix { shape: *shape, lines, scales: 0 }.arguments()
        }
        _ => shared.weights.layers[layer].router.as_ref().map_or(NO_MATRIX, DeviceMatrix::arguments),
    }
}
