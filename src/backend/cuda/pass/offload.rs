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

    /// `projected` of all experts of a layer some of which are in host memory.
    pub(super) fn run_split_experts(
        &mut self,
        current: &Current,
        layer: usize,
        limit: &Limit,
        experts: MutexGuard<Experts>,
    ) -> Result<()> {
        let tokens = self.shape.tokens;
        match self.offload()?.computes(tokens) {
            true => self.run_on_host(current, layer, limit, experts),
            false => self.run_with_copies(current, layer, limit, experts),
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

    fn run_on_host(
        &mut self,
        current: &Current,
        layer: usize,
        limit: &Limit,
        mut experts: MutexGuard<Experts>,
    ) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let (config, tokens, hidden_size) = (&shared.config, self.shape.tokens, shared.config.hidden_size);
        let (slots, stride) = (tokens * config.num_experts_per_tok, self.workspace.parts.normed.stride);
        let [starts, slot_tokens, rows] = self.offload()?.offsets();
        let parts = &self.workspace.parts;
        let fetched = [
            (starts, parts.starts, (config.num_local_experts + 1) * size_of::<u32>()),
            (slot_tokens, parts.slot_tokens, slots * size_of::<u32>()),
            (rows, parts.normed.numbers, tokens * stride * size_of::<f32>()),
        ];
        let projected = parts.projected;
        self.fetch(current, &fetched)?;
        self.run_resident_experts(current, layer, experts.tables(current, layer)?)?;
        let threads = experts.threads()?;
        let offload = self.offload()?;
        offload.weights.clear();
        for expert in 0..config.num_local_experts {
            let weights = experts.host_expert(layer, expert);
            offload.weights.extend(weights.map(|weights| (expert as u32, Arc::clone(weights))));
        }
        // What is computed here is held, wherever experts move meanwhile: nobody waits for the processor, which may be the host's.
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
            return Ok(());
        }
        let started = Instant::now();
        let Parts { starts, tokens: slot_tokens, normed, projected: results, workspace, touched, weights } =
            offload.parts();
        let slot_count = starts[config.num_local_experts] as usize;
        let place = |expert: usize| weights.iter().position(|(held, _)| *held as usize == expert).unwrap_or(0);
        let result = threads.run(
            limit,
            Slots { touched, starts, tokens: &slot_tokens[..slot_count] },
            &|expert| &*weights[place(expert)].1,
            TokenRows { data: normed, columns: stride, index: None, count: tokens },
            workspace,
            results,
        );
        shared.counters.note_runs(touched.len(), started);
        offload.weights.clear();
        result?;
        for expert in &offload.touched {
            let (first, count) = offload.slots_of(*expert as usize);
            let [offset, bytes] = [first, count].map(|rows| rows * hidden_size * size_of::<f32>());
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
            self.run_copied_expert(current, layer, experts.tables(current, layer)?, groups, (first, count))?;
        }
        Ok(())
    }
}
