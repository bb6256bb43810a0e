//! Log-probabilities and their gradient, a part of the vocabulary at a time.

use std::sync::Arc;

use super::CudaTraining;
use super::products::{Operands, Way};
use crate::backend::cuda::arguments::TrainingLogitArguments;
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::workspace::at;
use crate::error::Result;

/// Tokens of the vocabulary whose logits are held at once.
pub const HEAD_TOKENS: usize = 2048;

impl CudaTraining {
    /// `see(training, arguments)` with the logits of all rows of `x` for one part of the vocabulary after the other.
    fn for_each_part(
        &self,
        current: &Current,
        (rows, x): (usize, Address),
        (targets, results): (Address, Address),
        mut see: impl FnMut(TrainingLogitArguments) -> Result<()>,
    ) -> Result<()> {
        let (shared, parts) = (Arc::clone(&self.shared), &self.workspace.parts);
        let head = shared.weights.head();
        for first in (0..head.shape().rows).step_by(HEAD_TOKENS) {
            self.check_cancel()?;
            let width = HEAD_TOKENS.min(head.shape().rows - first);
            // SAFETY: a part of the workspace with room for them, which outlives the work.
            unsafe { current.clear(parts.logits, rows * width * size_of::<f32>()) }?;
            let operands = Operands { tokens: rows, x, out: parts.logits };
            self.multiply_weights(current, head, Way::Forward, (first, width), operands)?;
            see(TrainingLogitArguments {
                logits: at(parts.logits),
                targets: at(targets),
                gradients: std::ptr::null(),
                sums: at(parts.sums),
                results: at(results),
                first: first as u32,
                width: width as u32,
            })?;
        }
        Ok(())
    }

    /// `Training::log_probabilities`
    pub(super) fn add_up_logits(
        &mut self,
        current: &Current,
        targets: &[u32],
        (rows, x): (usize, Address),
        results: Address,
    ) -> Result<()> {
        let targets = self.workspace.send_indices(current, targets)?;
        self.for_each_part(current, (rows, x), (targets, results), |arguments| {
            // SAFETY: parts of the workspace with room for these rows; they outlive the work.
            unsafe { self.launch(current, &self.kernels.log_sum, [rows, 1, 1], &arguments) }
        })
    }

    /// `Training::add_log_probability_gradient`
    pub(super) fn add_gradient_of_logits(
        &mut self,
        current: &Current,
        (targets, gradients): (&[u32], &[f32]),
        (rows, x): (usize, Address),
        results: Address,
        out: Address,
    ) -> Result<()> {
        let targets = self.workspace.send_indices(current, targets)?;
        let gradients = at(self.workspace.send_weights(current, gradients)?);
        let head = self.shared.weights.head();
        self.for_each_part(current, (rows, x), (targets, results), |arguments| {
            let arguments = TrainingLogitArguments { gradients, ..arguments };
            // SAFETY: as above.
            unsafe { self.launch(current, &self.kernels.logit_gradient, [rows, 1, 1], &arguments) }?;
            let part = (arguments.first as usize, arguments.width as usize);
            let operands = Operands { tokens: rows, x: self.workspace.parts.logits, out };
            self.multiply_weights(current, head, Way::Backward, part, operands)
        })
    }
}
