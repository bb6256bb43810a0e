//! Layers some of whose experts are in host memory. Those on the device are enqueued first. A few tokens have the others
//! computed on the processor meanwhile; for more, each that is needed is copied to the device, where what is computed of it
//! has the bits it always has. In exact mode experts are always copied: so bits depend on no limit of memory.

use std::sync::Arc;
use std::time::Instant;

use parking_lot::MutexGuard;

use super::CudaPass;
use crate::backend::cpu::{Slots, TokenRows};
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::experts::Experts;
use crate::backend::cuda::offload::{Offload, Parts};
use crate::backend::ops::Limit;
use crate::error::{Error, Result, Status};

impl CudaPass {
    /// What is needed for experts in host memory: of a pass that was made while there were none, from now on.
    fn offload(&mut self) -> Result<&mut Offload> {
        if self.offload.is_none() {
            let shared = &self.shared;
            self.offload = Some(Offload::new(&shared.device, &shared.config, &self.limits, shared.exact)?);
        }
        self.offload.as_mut().ok_or_else(|| Error::new(Status::Internal, "a workspace went away"))
    }

    /// Begins `projected` of a layer some of whose experts are in host memory; whether some of it is left to be computed on the
    /// processor, by `compute_on_host`.
    pub(super) fn run_split_experts(
        &mut self,
        current: &Current,
        layer: usize,
        limit: &Limit,
        experts: MutexGuard<Experts>,
    ) -> Result<bool> {
        let tokens = self.shape.tokens;
        match self.offload()?.computes(tokens) {
            true => self.prepare_on_host(current, layer, experts),
            false => self.run_with_copies(current, layer, limit, experts).map(|()| false),
        }
    }

    /// Enqueues copies of some of the layer's parts to the host, and a mark behind them.
    fn fetch(&mut self, current: &Current, parts: &[(usize, Address, usize)]) -> Result<()> {
        let offload = self.offload()?;
        for (offset, from, bytes) in parts {
            // SAFETY: the host reads it after the mark, or a wait of `settle`; the parts are this pass's.
            unsafe { offload.fetched.fetch(current, *offset, *from, *bytes) }?;
        }
        offload.arrived.set(current)
    }

    /// Enqueues the experts on the device, and finds out which of the others have tokens.
    fn prepare_on_host(&mut self, current: &Current, layer: usize, mut experts: MutexGuard<Experts>) -> Result<bool> {
        let (all, top_k) = (self.shared.config.num_local_experts, self.shared.config.num_experts_per_tok);
        let (tokens, stride) = (self.shape.tokens, self.workspace.parts.normed.stride);
        let [starts, slot_tokens, rows] = self.offload()?.offsets();
        let parts = &self.workspace.parts;
        let fetched = [
            (starts, parts.starts, (all + 1) * size_of::<u32>()),
            (slot_tokens, parts.slot_tokens, tokens * top_k * size_of::<u32>()),
            (rows, parts.normed.numbers, tokens * stride * size_of::<f32>()),
        ];
        self.fetch(current, &fetched)?;
        self.run_resident_experts(current, layer, experts.tables(current, layer)?)?;
        let threads = experts.threads()?;
        let offload = self.offload()?;
        offload.threads = Some(threads);
        offload.weights.clear();
        for expert in 0..all {
            let weights = experts.host_expert(layer, expert);
            offload.weights.extend(weights.map(|weights| (expert as u32, Arc::clone(weights))));
        }
        // What is computed on the processor is held, wherever experts move meanwhile.
        drop(experts);

        offload.arrived.wait(current)?;
        offload.touched.clear();
        for index in 0..offload.weights.len() {
            let expert = offload.weights[index].0;
            if offload.slots_of(expert as usize).1 > 0 {
                offload.touched.push(expert);
            }
        }
        if offload.touched.is_empty() {
            offload.weights.clear();
        }
        Ok(!offload.touched.is_empty())
    }

    /// Computes what `run_split_experts` has left, and ends the layer. Nothing is borrowed and no context is current while the
    /// processor computes: its threads may be the host's, which may do anything else on them.
    pub(super) fn compute_on_host(&mut self, layer: usize, limit: &Limit) -> Result<()> {
        if let Err(error) = self.multiply_on_host(limit) {
            // The first error is the one to tell.
            let _ = self.settle();
            return Err(error);
        }
        self.stage(|pass, current| {
            pass.send_projected(current)?;
            pass.combine(current, layer)?;
            pass.pace(current, limit)
        })
    }

    fn multiply_on_host(&mut self, limit: &Limit) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (tokens, stride) = (self.shape.tokens, self.workspace.parts.normed.stride);
        let started = Instant::now();
        let offload = self.offload()?;
        let threads = offload.threads.take().ok_or_else(|| Error::new(Status::Internal, "threads went away"))?;
        let Parts { starts, tokens: slot_tokens, normed, projected, workspace, touched, weights } = offload.parts();
        let slot_count = starts[shared.config.num_local_experts] as usize;
        let place = |expert: usize| weights.iter().position(|(held, _)| *held as usize == expert).unwrap_or(0);
        let result = threads.run(
            limit,
            Slots { touched, starts, tokens: &slot_tokens[..slot_count] },
            &|expert| &*weights[place(expert)].1,
            TokenRows { data: normed, columns: stride, index: None, count: tokens },
            workspace,
            projected,
        );
        shared.counters.note_runs(touched.len(), started);
        offload.weights.clear();
        result
    }

    /// Enqueues copies of what was computed on the processor to its slots.
    fn send_projected(&mut self, current: &Current) -> Result<()> {
        let (projected, row_bytes) =
            (self.workspace.parts.projected, self.shared.config.hidden_size * size_of::<f32>());
        let offload = self.offload()?;
        for expert in &offload.touched {
            let (first, count) = offload.slots_of(*expert as usize);
            let [offset, bytes] = [first, count].map(|rows| rows * row_bytes);
            // SAFETY: the rows are written again after a wait for the next layer's mark, or in the next batch; the expert's
            // slots are nobody else's.
            unsafe { offload.projected.send_part(current, offset..offset + bytes, projected + offset as Address) }?;
        }
        Ok(())
    }

    fn run_with_copies(
        &mut self,
        current: &Current,
        layer: usize,
        limit: &Limit,
        mut experts: MutexGuard<Experts>,
    ) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let starts = self.workspace.parts.starts;
        let all = shared.config.num_local_experts;
        self.fetch(current, &[(0, starts, (all + 1) * size_of::<u32>())])?;
        self.run_resident_experts(current, layer, experts.tables(current, layer)?)?;
        self.offload()?.arrived.wait(current)?;
        for expert in 0..all {
            let (first, count) = self.offload()?.slots_of(expert);
            if count == 0 || experts.host_expert(layer, expert).is_none() {
                continue;
            }
            limit.check_cancel()?;
            let started = Instant::now();
            let groups = experts.copy_expert(current, layer, expert)?;
            shared.counters.note_copy(experts.matrix_bytes(layer, expert), started);
            let tables = experts.tables(current, layer)?;
            let ran = self.run_copied_expert(current, layer, tables, groups, (first, count));
            if let Err(error) = ran.and_then(|()| experts.note_read(current, layer, expert)) {
                // Before another pass copies over what this one may still read.
                let _ = current.wait();
                return Err(error);
            }
        }
        Ok(())
    }
}
