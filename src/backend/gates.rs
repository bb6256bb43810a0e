//! Gates that a router patch puts in place of the stored ones: made once, never changed, replaced as a whole.

use safetensors::Dtype;

use super::device_bytes::DeviceBytes;
use crate::error::Result;
use crate::memory::{as_bytes, try_with_capacity};
use crate::model::weights::Matrix;
use crate::quant::{Format, Shape, Source};

/// The gates of all layers as a backend reads them, in f32 and in the layout of `quant/panels.rs`.
pub enum GateMatrices {
    /// `[layers]`
    Host(Vec<Matrix>),
    /// One after the other in a block of a device.
    Device {
        /// Of each.
        shape: Shape,
        /// From one to the next, in bytes.
        stride: usize,
        /// What they are in.
        block: Box<dyn DeviceBytes>,
    },
}

/// What is in force in place of the stored gates.
pub struct AppliedGates {
    /// Differs from that of all others in this process; never 0, by which the stored ones are known.
    pub number: u64,
    /// Of their numbers.
    pub fingerprint: u64,
    /// On the model's device.
    pub matrices: GateMatrices,
}

/// The number of the gates in force, of the stored ones where there are no others.
pub fn number_of(gates: Option<&AppliedGates>) -> u64 {
    gates.map_or(0, |gates| gates.number)
}

/// The gates `[layers, experts, hidden_size]` laid out one by one. Fails with `OutOfMemory`, and where they are not finite.
pub fn lay_out(gates: &[f32], experts: usize, hidden_size: usize) -> Result<Vec<Matrix>> {
    let shape = Shape { rows: experts, columns: hidden_size, format: Format::F32 };
    let of_layer = experts * hidden_size;
    let mut matrices = try_with_capacity("the gates of a router patch", gates.len() / of_layer)?;
    for gate in gates.chunks_exact(of_layer) {
        let source = Source { dtype: Dtype::F32, bytes: as_bytes(gate), columns: hidden_size, importance: None };
        matrices.push(Matrix::from_rows("a gate of a router patch", shape, &source)?);
    }
    Ok(matrices)
}
