//! Training on a device: the operations of [`Training`] over the weights that inference reads, as kernels one after the other on
//! a stream of the trainer's own. The host goes on while the device works, and waits where numbers come back.
//!
//! After a call that fails, and after one that reads, nothing of the trainer is in progress on the device.

mod attention;
mod head;
mod kernels;
mod products;
mod workspace;

use std::ops::Range;
use std::sync::Arc;

use super::Shared;
use super::arguments::*;
use super::context::Current;
use super::driver::Address;
use super::kernels::{Kernel, kind_of};
use super::stream::Stream;
use super::weights::DeviceVector;
use super::workspace::at;
use crate::backend::ops::Cancel;
use crate::backend::training::{ExpertProjection, Norm, Projection, Rows, Slots, Training, TrainingLimits};
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, as_bytes, as_bytes_mut};
use crate::quant::unpack_row;
use attention::{Attention, AttentionGradient};
use kernels::TrainingKernels;
use products::{Multiply, Operands, Side, Way};
use workspace::TrainingWorkspace;

/// A workspace on a device.
pub struct CudaTraining {
    shared: Arc<Shared>,
    cancel: Arc<Cancel>,
    workspace: TrainingWorkspace,
    kernels: TrainingKernels,
    /// Whoever moves experts waits for it.
    stream: Arc<Stream>,
    /// Whether the device may still be at work on something of this.
    in_progress: bool,
}

impl CudaTraining {
    /// Fails with `InvalidArgument` where experts are in host memory, `OutOfMemory` and `DeviceOutOfMemory`.
    pub(super) fn new(shared: Arc<Shared>, limits: TrainingLimits, cancel: Arc<Cancel>) -> Result<CudaTraining> {
        let stream = Arc::new(Stream::new(&shared.device)?);
        {
            let mut experts = shared.experts.lock();
            experts.check_all_on_device()?;
            experts.attach(&stream)?;
        }
        let kernels = TrainingKernels::load(&shared.device, shared.kernels.dependent_launch)?;
        let workspace = TrainingWorkspace::new(&shared.device, &shared.config, &shared.numerics, limits)?;
        Ok(CudaTraining { workspace, kernels, stream, in_progress: false, cancel, shared })
    }

    fn check_cancel(&self) -> Result<()> {
        if self.cancel.is_requested() { Err(Cancel::error()) } else { Ok(()) }
    }

    /// Has work enqueued, after which the device may go on alone; where it fails, what was begun is waited for.
    fn run<T>(&mut self, work: impl FnOnce(&mut Self, &Current) -> Result<T>) -> Result<T> {
        let (shared, stream) = (Arc::clone(&self.shared), Arc::clone(&self.stream));
        let result = shared.device.enter_on(&stream).and_then(|current| {
            self.in_progress = true;
            work(self, &current)
        });
        if result.is_err() {
            // The first error is the one to tell.
            let _ = self.settle();
        }
        result
    }

    /// Waits until the device has done all that was asked for.
    fn settle(&mut self) -> Result<()> {
        if !self.in_progress {
            return Ok(());
        }
        // Also after an error: a device that is lost does nothing more.
        self.in_progress = false;
        self.shared.device.enter_on(&self.stream)?.wait()
    }

    /// Enqueues a kernel, if its grid has blocks.
    ///
    /// # Safety
    /// As `Kernel::launch`.
    unsafe fn launch<A: Copy>(
        &self,
        current: &Current,
        kernel: &Kernel<A>,
        grid: [usize; 3],
        arguments: &A,
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { kernel.launch(current, grid, arguments) }
    }

    /// `work(training, current, addresses of the parts)`, unless a cancel was asked for.
    fn with_parts<const N: usize>(
        &mut self,
        rows: [Rows; N],
        work: impl FnOnce(&mut Self, &Current, [Address; N]) -> Result<()>,
    ) -> Result<()> {
        self.transfer(rows, |training, current, parts| {
            training.check_cancel()?;
            work(training, current, parts)
        })
    }

    /// The same whether or not one was: of what takes no time worth cancelling.
    fn transfer<const N: usize>(
        &mut self,
        rows: [Rows; N],
        work: impl FnOnce(&mut Self, &Current, [Address; N]) -> Result<()>,
    ) -> Result<()> {
        let parts = self.workspace.numbers(rows)?;
        self.run(|training, current| work(training, current, parts))
    }

    fn norm_weights(&self, norm: Norm) -> &DeviceVector {
        match norm {
            Norm::Input(layer) => &self.shared.weights.layers[layer].input_norm,
            Norm::PostAttention(layer) => &self.shared.weights.layers[layer].post_attention_norm,
            Norm::Final => &self.shared.weights.final_norm,
        }
    }

    /// `out += a b` of one matrix each.
    fn add_multiplied(&self, current: &Current, [a, b, out]: [Side; 3], size: [usize; 3]) -> Result<()> {
        self.multiply(current, &Multiply { a, b, out, size, count: 1, shared_by: 1, accumulate: true })
    }
}

/// Bytes of a part.
fn bytes(rows: &Rows) -> usize {
    rows.count() * size_of::<f32>()
}

fn operands(tokens: Rows, [x, out]: [Address; 2]) -> Operands {
    Operands { tokens: tokens.rows, x, out }
}

impl Training for CudaTraining {
    fn read_gates(&self, out: &mut [f32]) -> Result<()> {
        let routers = self.shared.weights.layers.iter().filter_map(|layer| layer.router.as_ref());
        let mut rows = out.chunks_exact_mut(self.shared.config.hidden_size);
        for router in routers {
            let mut lines = Buffer::<u8>::zeroed("gates", router.shape().line_bytes())?;
            let current = self.shared.device.enter()?;
            // SAFETY: both are as long; `lines` is kept until the wait is over.
            let sent = unsafe { current.copy_to_host(lines.as_mut_slice().as_mut_ptr(), router.lines, lines.len()) };
            let arrived = current.wait();
            sent.and(arrived)?;
            // Routers are f32, which has no scales.
            let of_router = rows.by_ref().take(router.shape().rows).enumerate();
            of_router.for_each(|(row, out)| unpack_row(router.shape(), &lines, &[], row, out));
        }
        Ok(())
    }

    fn write(&mut self, numbers: &[f32], to: Rows) -> Result<()> {
        if numbers.len() != to.count() {
            return Err(Error::new(Status::Internal, "numbers are as many as their part of a training workspace"));
        }
        self.transfer([to], |training, current, [to]| {
            let bytes = as_bytes(numbers);
            // SAFETY: both are as long; the numbers are borrowed until the wait is over.
            let sent = unsafe { current.copy_to_device(to, bytes.as_ptr(), bytes.len()) };
            let arrived = current.wait();
            training.in_progress = arrived.is_err();
            sent.and(arrived)
        })
    }

    fn read(&mut self, from: Rows, numbers: &mut [f32]) -> Result<()> {
        if numbers.len() != from.count() {
            return Err(Error::new(Status::Internal, "numbers are as many as their part of a training workspace"));
        }
        self.transfer([from], |training, current, [from]| {
            let bytes = as_bytes_mut(numbers);
            // SAFETY: as in `write`.
            let sent = unsafe { current.copy_to_host(bytes.as_mut_ptr(), from, bytes.len()) };
            let arrived = current.wait();
            training.in_progress = arrived.is_err();
            sent.and(arrived)
        })
    }

    fn clear(&mut self, out: Rows) -> Result<()> {
        self.transfer([out], |_, current, [address]| match bytes(&out) {
            0 => Ok(()),
            // SAFETY: a part of the workspace, which outlives the work.
            bytes => unsafe { current.clear(address, bytes) },
        })
    }

    fn copy(&mut self, x: Rows, out: Rows) -> Result<()> {
        self.transfer([x, out], |_, current, [from, to]| match bytes(&out) {
            0 => Ok(()),
            // SAFETY: parts of the workspace, which outlives the work.
            bytes => unsafe { current.copy(to, from, bytes) },
        })
    }

    fn embed(&mut self, tokens: &[u32], out: Rows) -> Result<()> {
        self.with_parts([out], |training, current, [x]| {
            let indices = training.workspace.send_indices(current, tokens)?;
            let shared = &training.shared;
            let embedding = &shared.weights.embedding;
            let arguments = EmbedArguments {
                embedding: embedding.arguments(),
                format: kind_of(embedding.shape().format) as u32,
                scale: shared.numerics.embedding_scale,
                tokens: at(indices),
                x: at(x),
                hidden_size: out.columns as u32,
            };
            // SAFETY: a part of the workspace with room for the tokens, and weights; they outlive the work.
            unsafe { training.launch(current, &shared.kernels.embed, [out.rows, 1, 1], &arguments) }
        })
    }

    fn norm(&mut self, norm: Norm, x: Rows, out: Rows) -> Result<()> {
        self.with_parts([x, out], |training, current, [x, numbers]| {
            let arguments = NormArguments {
                x: at(x),
                index: std::ptr::null(),
                weight: at(training.norm_weights(norm).0),
                numbers: at(numbers),
                integers: std::ptr::null_mut(),
                blocks: std::ptr::null_mut(),
                halves: std::ptr::null_mut(),
                eps: training.shared.config.rms_norm_eps,
                columns: out.columns as u32,
                stride: out.columns as u32,
                halves_are_f16: 0,
            };
            // SAFETY: as in `embed`.
            unsafe { training.launch(current, &training.shared.kernels.norm, [out.rows, 1, 1], &arguments) }
        })
    }

    fn add_norm_gradient(&mut self, norm: Norm, x: Rows, gradient: Rows, out: Rows) -> Result<()> {
        self.with_parts([x, gradient, out], |training, current, [x, gradient, numbers]| {
            let arguments = TrainingNormArguments {
                x: at(x),
                weight: at(training.norm_weights(norm).0),
                gradient: at(gradient),
                out: at(numbers),
                eps: training.shared.config.rms_norm_eps,
                columns: out.columns as u32,
            };
            // SAFETY: as in `embed`.
            unsafe { training.launch(current, &training.kernels.norm_gradient, [out.rows, 1, 1], &arguments) }
        })
    }

    fn add_product(&mut self, layer: usize, projection: Projection, x: Rows, out: Rows) -> Result<()> {
        self.with_parts([x, out], |training, current, parts| {
            training.multiply_projection(current, (layer, projection), Way::Forward, operands(x, parts))
        })
    }

    fn add_product_gradient(&mut self, layer: usize, projection: Projection, gradient: Rows, out: Rows) -> Result<()> {
        self.with_parts([gradient, out], |training, current, parts| {
            training.multiply_projection(current, (layer, projection), Way::Backward, operands(gradient, parts))
        })
    }

    fn rotate(&mut self, positions: &[u32], back: bool, heads: Rows) -> Result<()> {
        self.with_parts([heads], |training, current, [address]| {
            let positions = training.workspace.send_indices(current, positions)?;
            let arguments = TrainingRotateArguments {
                heads: at(address),
                positions: at(positions),
                cosines: at(training.workspace.parts.cosines),
                sines: at(training.workspace.parts.sines),
                columns: heads.columns as u32,
                head_dim: training.shared.config.head_dim as u32,
                back: back.into(),
            };
            // SAFETY: as in `embed`.
            unsafe { training.launch(current, &training.kernels.rotate, [heads.rows, 1, 1], &arguments) }
        })
    }

    fn attention(&mut self, documents: &[Range<usize>], qkv: [Rows; 3], out: Rows, log_sums: Rows) -> Result<()> {
        let [query, key, value] = qkv;
        self.with_parts([query, key, value, out, log_sums], |training, current, parts| {
            let [query, key, value, out, log_sums] = parts;
            training.attend(current, documents, &Attention { query, key, value, out, log_sums })
        })
    }

    fn add_attention_gradient(
        &mut self,
        documents: &[Range<usize>],
        qkv: [Rows; 3],
        out: Rows,
        log_sums: Rows,
        gradient: Rows,
        qkv_gradients: [Rows; 3],
    ) -> Result<()> {
        let ([query, key, value], [dq, dk, dv]) = (qkv, qkv_gradients);
        let rows = [query, key, value, out, log_sums, gradient, dq, dk, dv];
        self.with_parts(rows, |training, current, parts| {
            let [query, key, value, out, log_sums, of_out, dq, dk, dv] = parts;
            let gradient = AttentionGradient { out: of_out, query: dq, key: dk, value: dv };
            training.attend_backward(current, documents, &Attention { query, key, value, out, log_sums }, &gradient)
        })
    }

    fn add_gate_product(&mut self, x: Rows, gate: Rows, out: Rows) -> Result<()> {
        self.with_parts([x, gate, out], |training, current, [of_x, of_gate, numbers]| {
            let sides = [
                Side::rows(of_x, x.columns, 0),
                Side::transposed(of_gate, gate.columns, 0),
                Side::rows(numbers, out.columns, 0),
            ];
            training.add_multiplied(current, sides, [out.rows, x.columns, out.columns])
        })
    }

    fn add_gate_input_gradient(&mut self, gradient: Rows, gate: Rows, out: Rows) -> Result<()> {
        self.with_parts([gradient, gate, out], |training, current, [of_gradient, of_gate, numbers]| {
            let sides = [
                Side::rows(of_gradient, gradient.columns, 0),
                Side::rows(of_gate, gate.columns, 0),
                Side::rows(numbers, out.columns, 0),
            ];
            training.add_multiplied(current, sides, [out.rows, gradient.columns, out.columns])
        })
    }

    fn add_gate_gradient(&mut self, gradient: Rows, x: Rows, out: Rows) -> Result<()> {
        self.with_parts([gradient, x, out], |training, current, [of_gradient, of_x, numbers]| {
            let sides = [
                Side::transposed(of_gradient, gradient.columns, 0),
                Side::rows(of_x, x.columns, 0),
                Side::rows(numbers, out.columns, 0),
            ];
            training.add_multiplied(current, sides, [out.rows, gradient.rows, out.columns])
        })
    }

    fn gather(&mut self, slots: &Slots, weighted: bool, x: Rows, out: Rows) -> Result<()> {
        self.with_parts([x, out], |training, current, [from, numbers]| {
            let workspace = &mut training.workspace;
            let weights = if weighted { workspace.send_weights(current, &slots.weights)? } else { 0 };
            let arguments = TrainingSlotArguments {
                from: at(from),
                index: at(workspace.send_indices(current, &slots.tokens)?),
                weights: at(weights),
                out: at(numbers),
                columns: out.columns as u32,
                choices: 0,
            };
            // SAFETY: as in `embed`; slots are of the batch's tokens.
            unsafe { training.launch(current, &training.kernels.gather, [out.rows, 1, 1], &arguments) }
        })
    }

    fn add_combined(&mut self, slots: &Slots, weighted: bool, y: Rows, out: Rows) -> Result<()> {
        self.with_parts([y, out], |training, current, [from, numbers]| {
            let workspace = &mut training.workspace;
            let weights = if weighted { workspace.send_weights(current, &slots.weights)? } else { 0 };
            let arguments = TrainingSlotArguments {
                from: at(from),
                index: at(workspace.send_indices(current, &slots.of_tokens)?),
                weights: at(weights),
                out: at(numbers),
                columns: out.columns as u32,
                choices: slots.choices as u32,
            };
            // SAFETY: as in `gather`.
            unsafe { training.launch(current, &training.kernels.combine, [out.rows, 1, 1], &arguments) }
        })
    }

    fn row_products(&mut self, a: Rows, b: Rows, out: Rows) -> Result<()> {
        self.with_parts([a, b, out], |training, current, [of_a, of_b, numbers]| {
            let arguments =
                TrainingRowProductArguments { a: at(of_a), b: at(of_b), out: at(numbers), columns: a.columns as u32 };
            // SAFETY: as in `embed`.
            unsafe { training.launch(current, &training.kernels.row_products, [out.rows, 1, 1], &arguments) }
        })
    }

    fn add_expert_product(
        &mut self,
        layer: usize,
        projection: ExpertProjection,
        slots: &Slots,
        x: Rows,
        out: Rows,
    ) -> Result<()> {
        self.with_parts([x, out], |training, current, parts| {
            training.multiply_experts(current, (layer, projection), Way::Forward, slots, operands(x, parts))
        })
    }

    fn add_expert_product_gradient(
        &mut self,
        layer: usize,
        projection: ExpertProjection,
        slots: &Slots,
        gradient: Rows,
        out: Rows,
    ) -> Result<()> {
        self.with_parts([gradient, out], |training, current, parts| {
            training.multiply_experts(current, (layer, projection), Way::Backward, slots, operands(gradient, parts))
        })
    }

    fn geglu(&mut self, gate: Rows, up: Rows, out: Rows) -> Result<()> {
        self.with_parts([gate, up, out], |training, current, [of_gate, of_up, numbers]| {
            let arguments = TrainingGegluArguments {
                gate: at(of_gate),
                up: at(of_up),
                gradient: std::ptr::null(),
                out: at(numbers),
                columns: out.columns as u32,
                exact_gelu: training.shared.numerics.exact_gelu.into(),
            };
            // SAFETY: as in `embed`.
            unsafe { training.launch(current, &training.kernels.geglu, [out.rows, 1, 1], &arguments) }
        })
    }

    fn geglu_gradient(&mut self, gradient: Rows, gate: Rows, up: Rows) -> Result<()> {
        self.with_parts([gradient, gate, up], |training, current, [gradient, of_gate, of_up]| {
            let arguments = TrainingGegluArguments {
                gate: at(of_gate),
                up: at(of_up),
                gradient: at(gradient),
                out: std::ptr::null_mut(),
                columns: gate.columns as u32,
                exact_gelu: training.shared.numerics.exact_gelu.into(),
            };
            // SAFETY: as in `embed`.
            unsafe { training.launch(current, &training.kernels.geglu_gradient, [gate.rows, 1, 1], &arguments) }
        })
    }

    fn log_probabilities(&mut self, targets: &[u32], x: Rows, out: Rows) -> Result<()> {
        self.with_parts([x, out], |training, current, [of_x, results]| {
            training.add_up_logits(current, targets, (x.rows, of_x), results)
        })
    }

    fn add_log_probability_gradient(
        &mut self,
        targets: &[u32],
        x: Rows,
        log_sums: Rows,
        gradients: &[f32],
        out: Rows,
    ) -> Result<()> {
        self.with_parts([x, log_sums, out], |training, current, [of_x, results, numbers]| {
            training.add_gradient_of_logits(current, (targets, gradients), (x.rows, of_x), results, numbers)
        })
    }
}

impl Drop for CudaTraining {
    fn drop(&mut self) {
        let _ = self.settle();
    }
}
