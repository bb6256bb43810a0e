//! The stages of a forward pass on a device: kernels, one after the other on the pass's own stream. Only at the end of a layer
//! does the host wait, for the layer two before, or for this one where time is short; and at the end for the results. Batches of
//! few tokens that nobody wants to stop are launched as one graph (`graph`).
//!
//! Outside of calls nothing of a pass is in progress on the device: whatever leaves one early waits first. So pages and
//! buffers can be freed at any time in between.

mod attention;
mod experts;
mod graph;
mod head;
mod offload;
mod products;

use std::cell::OnceCell;
use std::sync::Arc;
use std::task::Poll;

use super::Shared;
use super::arguments::EmbedArguments;
use super::batch::{BatchShape, check_pages_are_own};
use super::context::Current;
use super::driver::Address;
use super::kernels::kind_of;
use super::logits::read_results;
use super::memory::Mark;
use super::offload::Offload;
use super::stream::Stream;
use super::workspace::{Workspace, at};
use crate::backend::gates::number_of;
use crate::backend::logits::PassLogits;
use crate::backend::ops::{Batch, Limit, Pass, PassLimits, Routes, count_touched};
use crate::error::Result;
use crate::memory::Buffer;
use graph::Graphs;

/// Blocks of a kernel that are enough for each multiprocessor.
const BLOCKS_PER_MULTIPROCESSOR: usize = 4;

/// Activations of one batch; see `Pass` for the stages.
pub struct CudaPass {
    shared: Arc<Shared>,
    limits: PassLimits,
    workspace: Workspace,
    /// The current batch.
    shape: BatchShape,
    /// The number of the gates it runs under.
    gates: u64,
    /// Ends of layers, in turn; how many were set in this batch.
    marks: [Mark; 3],
    marked: usize,
    /// Tokens with targets that are done.
    scored: usize,
    /// Whether the device may still be at work on something of this pass.
    in_progress: bool,
    /// `[tokens, stride]`: hidden states of the last batch, once they were asked for.
    hidden: OnceCell<Buffer<f32>>,
    /// Work of earlier batches, to be launched again.
    graphs: Graphs,
    /// All its work is enqueued here, so that passes do not wait for each other.
    stream: Arc<Stream>,
    /// For experts in host memory; none where there were none so far.
    offload: Option<Offload>,
}

impl CudaPass {
    pub fn new(shared: Arc<Shared>, limits: PassLimits) -> Result<Self> {
        let workspace = Workspace::new(&shared.device, &shared.config, &limits)?;
        let mark = || Mark::new(&shared.device);
        let stream = Arc::new(Stream::new(&shared.device)?);
        let needs_host = {
            let mut experts = shared.experts.lock();
            experts.attach(&stream)?;
            experts.needs_host()
        };
        let offload = needs_host.then(|| Offload::new(&shared.device, &shared.config, &limits, shared.exact));
        Ok(CudaPass {
            workspace,
            shape: BatchShape::new(&shared.config, &limits, shared.exact)?,
            gates: 0,
            marks: [mark()?, mark()?, mark()?],
            marked: 0,
            scored: 0,
            in_progress: false,
            hidden: OnceCell::new(),
            graphs: Graphs::new()?,
            stream,
            offload: offload.transpose()?,
            limits,
            shared,
        })
    }

    /// Does a stage's work, after which the device may go on alone; where it fails, what was begun is waited for.
    fn stage<T>(&mut self, work: impl FnOnce(&mut Self, &Current) -> Result<T>) -> Result<T> {
        let shared = Arc::clone(&self.shared);
        let current = match self.stream.is_recording() {
            true => shared.device.enter_to_record(&self.stream),
            false => shared.device.enter_on(&self.stream),
        }?;
        self.in_progress = true;
        let result = work(self, &current);
        drop(current);
        if result.is_err() {
            // The first error is the one to tell.
            let _ = self.settle();
        }
        result
    }

    /// Waits until the device has done all that this pass asked for.
    fn settle(&mut self) -> Result<()> {
        self.stop_recording();
        if !self.in_progress {
            return Ok(());
        }
        // Also after an error: a device that is lost does nothing more.
        self.in_progress = false;
        self.shared.device.enter_on(&self.stream)?.wait()
    }

    /// Answers for a stage that may not begin because its limit is reached.
    fn stopped(&mut self, limit: &Limit) -> Option<Poll<Result<()>>> {
        if !limit.is_reached() || self.stream.is_recording() {
            return None;
        }
        let result = self.settle().and_then(|()| limit.check_cancel());
        Some(result.map_or_else(|error| Poll::Ready(Err(error)), |()| Poll::Pending))
    }

    /// Keeps the host from running ahead: a cancel is to be heard, and time to be kept.
    fn pace(&mut self, current: &Current, limit: &Limit) -> Result<()> {
        if self.stream.is_recording() {
            return Ok(());
        }
        let this = self.marked % self.marks.len();
        self.marks[this].set(current)?;
        // The one after this in the round was set two layers before, or never.
        let awaited = if limit.has_deadline() { this } else { (this + 1) % self.marks.len() };
        self.marks[awaited].wait(current)?;
        self.marked += 1;
        limit.note_work();
        Ok(())
    }

    /// The address of a part of the batch on the device.
    fn batch_part(&self, part: &std::ops::Range<usize>) -> Address {
        self.workspace.parts.batch + part.start as Address
    }

    /// Blocks that keep the device busy.
    fn enough_blocks(&self) -> usize {
        BLOCKS_PER_MULTIPROCESSOR * self.shared.device.multiprocessors()
    }

    fn embed_tokens(&self, current: &Current) -> Result<()> {
        let (parts, layout, shared) = (&self.workspace.parts, &self.workspace.layout, &self.shared);
        let embedding = &shared.weights.embedding;
        let arguments = EmbedArguments {
            embedding: embedding.arguments(),
            format: kind_of(embedding.shape().format) as u32,
            scale: shared.numerics.embedding_scale,
            tokens: at(self.batch_part(&layout.tokens)),
            x: at(parts.x),
            hidden_size: shared.config.hidden_size as u32,
        };
        // SAFETY: as in `norm`.
        unsafe { shared.kernels.embed.launch(current, [self.shape.tokens, 1, 1], &arguments) }
    }
}

impl Pass for CudaPass {
    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.settle()?;
        batch.check(&self.shared.config, &self.limits)?;
        self.gates = number_of(batch.gates);
        self.marked = 0;
        self.scored = 0;
        self.hidden.take();
        self.stage(|pass, current| {
            let CudaPass { shared, workspace: Workspace { layout, sent, parts, .. }, shape, .. } = pass;
            // In the context, since pinned memory ends with one that a host lends.
            shape.fill(batch, &shared.config, layout, sent.as_mut_slice())?;
            // SAFETY: the block is filled again in `begin` alone, after a wait; the part is as large.
            unsafe { sent.send(current, shape.bytes, parts.batch) }
        })
    }

    fn embed(&mut self, _batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        if let Some(stopped) = self.stopped(limit) {
            return stopped;
        }
        Poll::Ready(self.stage(|pass, current| pass.embed_tokens(current)))
    }

    fn norm_qkv_rope(&mut self, layer: usize, batch: &mut Batch, limit: &Limit) -> Poll<Result<()>> {
        if let Some(stopped) = self.stopped(limit) {
            return stopped;
        }
        Poll::Ready(self.stage(|pass, current| {
            if layer == 0 {
                check_pages_are_own(batch)?;
            }
            pass.project_and_store(current, layer)
        }))
    }

    fn attention(&mut self, layer: usize, _batch: &Batch, _limit: &Limit) -> Poll<Result<()>> {
        Poll::Ready(self.stage(|pass, current| pass.attend(current, layer)))
    }

    fn router(&mut self, layer: usize, batch: &Batch, _limit: &Limit) -> Poll<Result<()>> {
        Poll::Ready(self.stage(|pass, current| pass.choose_experts(current, layer, batch.gates)))
    }

    fn experts(&mut self, layer: usize, _batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        let left = self.stage(|pass, current| pass.run_experts(current, layer, limit));
        Poll::Ready(left.and_then(|left| if left { self.compute_on_host(layer, limit) } else { Ok(()) }))
    }

    fn head(&mut self, _batch: &Batch, limit: &Limit) -> Poll<Result<()>> {
        // As many scored tokens at a time as there are rows of logits.
        while self.scored < self.shape.scored.len() {
            if let Some(stopped) = self.stopped(limit) {
                return stopped;
            }
            self.stage(|pass, current| {
                pass.score(current)?;
                pass.pace(current, limit)
            })?;
        }
        if let Some(stopped) = self.stopped(limit) {
            return stopped;
        }
        self.stage(|pass, current| {
            pass.fetch_results(current)?;
            if pass.stream.is_recording() {
                return Ok(());
            }
            pass.wait_for_results(current)?;
            limit.note_work();
            Ok(())
        })?;
        Poll::Ready(Ok(()))
    }

    fn begin_recording(&mut self, limit: &Limit) -> Result<bool> {
        self.start_recording(limit)
    }

    fn end_recording(&mut self, recorded: Result<()>) -> Result<()> {
        self.finish_recording(recorded)
    }

    fn replay(&mut self, batch: &mut Batch, limit: &Limit) -> Result<bool> {
        self.launch_graph(batch, limit)
    }

    fn logits(&self, sequence: usize) -> Option<PassLogits<'_>> {
        let row = (*self.shape.logit_rows.get(sequence)?)? as usize;
        let results = self.workspace.results().candidates(row);
        Some(PassLogits::Candidates(read_results(results, self.shared.config.vocab_size)))
    }

    fn log_probability(&self, token: usize) -> f32 {
        let scored = self.shape.scored_index(token);
        scored.map_or(0.0, |index| self.workspace.results().log_probabilities()[index])
    }

    fn hidden_state(&self, token: usize, out: &mut [f32]) -> Result<()> {
        let hidden = match self.hidden.get() {
            Some(hidden) => hidden,
            None => {
                let fetched = self.fetch_hidden()?;
                self.hidden.get_or_init(|| fetched)
            }
        };
        let (stride, hidden_size) = (self.workspace.parts.normed.stride, self.shared.config.hidden_size);
        out.copy_from_slice(&hidden[token * stride..token * stride + hidden_size]);
        Ok(())
    }

    fn routes(&self, layer: usize, token: usize) -> Routes<'_> {
        let top_k = self.shared.config.num_experts_per_tok;
        let (experts, weights) = self.workspace.results().routes(self.choices());
        let at = (layer * self.shape.tokens + token) * top_k;
        Routes { experts: &experts[at..at + top_k], weights: &weights[at..at + top_k] }
    }

    fn touched_experts(&self, layer: usize) -> usize {
        let of_layer = self.shape.tokens * self.shared.config.num_experts_per_tok;
        count_touched(&self.workspace.results().routes(self.choices()).0[layer * of_layer..(layer + 1) * of_layer])
    }

    fn bytes(&self) -> usize {
        self.workspace.bytes() + self.offload.as_ref().map_or(0, Offload::bytes)
    }
}

impl Drop for CudaPass {
    fn drop(&mut self) {
        let _ = self.settle();
    }
}
