//! Steps as graphs: all stages of a batch of few tokens, recorded once and launched as one piece from then on.
//!
//! A graph is the same for all batches of its shape. Its buffers are the pass's own; tokens, places, pages and masks are in the
//! batch's block, which is sent before. Attention has the grid that the pass's longest context needs, and blocks without a span
//! leave at once. Bits are those of the stages.
//!
//! The first batch of a shape is recorded, which takes memory of the driver's; later ones allocate nothing.

use std::sync::Arc;

use super::CudaPass;
use crate::backend::cuda::batch::{BatchShape, check_pages_are_own};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::driver::GraphExec;
use crate::backend::cuda::workspace::SPLIT_TOKENS;
use crate::backend::ops::{Batch, Limit};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;

/// Graphs that a pass keeps: one for each number of sessions that draw together.
const MAX_GRAPHS: usize = SPLIT_TOKENS;

/// What differs between graphs of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    tokens: usize,
    /// Rows of logits.
    wanted: usize,
    /// Of the experts.
    generation: u64,
    /// The number of the gates, whose address it has in it. None has another's number, so that a graph of gates that are gone
    /// is never launched.
    gates: u64,
}

impl Key {
    fn of(shape: &BatchShape, generation: u64, gates: u64) -> Key {
        Key { tokens: shape.tokens, wanted: shape.wanted, generation, gates }
    }
}

/// A graph on a device, destroyed when it is dropped.
struct Graph {
    device: Arc<Device>,
    executable: GraphExec,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Some(current) = self.device.enter_to_free() {
            // SAFETY: created for this alone, destroyed once; whoever launched it has waited.
            unsafe { current.destroy_executable(self.executable) };
        }
    }
}

/// The graphs of a pass.
pub(super) struct Graphs {
    kept: Vec<(Key, Graph)>,
    /// Where the next one goes, once there are MAX_GRAPHS.
    oldest: usize,
    /// Of the experts, when the recording began.
    generation: u64,
    /// Whether making one has failed: then it is not tried again.
    are_given_up: bool,
}

impl Graphs {
    pub(super) fn new() -> Result<Graphs> {
        let kept = try_with_capacity("the graphs of a pass", MAX_GRAPHS)?;
        Ok(Graphs { kept, oldest: 0, generation: 0, are_given_up: false })
    }

    fn find(&self, key: Key) -> Option<&Graph> {
        self.kept.iter().find(|(its, _)| *its == key).map(|(_, graph)| graph)
    }

    /// Keeps one, in place of the oldest if need be.
    fn keep(&mut self, key: Key, graph: Graph) {
        if self.kept.len() < MAX_GRAPHS {
            self.kept.push((key, graph));
        } else {
            self.kept[self.oldest] = (key, graph);
            self.oldest = (self.oldest + 1) % MAX_GRAPHS;
        }
    }
}

impl CudaPass {
    /// Whether the current batch can be done as a graph: its stages are the same each time, and nobody wants to stop between
    /// them. A cancel is heard before it or after it, which is milliseconds.
    fn can_be_captured(&self, limit: &Limit) -> bool {
        // Launches are timed one by one.
        #[cfg(feature = "bench")]
        if crate::backend::cuda::bench::is_on() {
            return false;
        }
        limit.is_cancel_alone() && self.shape.tokens <= SPLIT_TOKENS && self.shape.scored.is_empty()
    }

    /// See `Pass::begin_recording`.
    pub(super) fn start_recording(&mut self, limit: &Limit) -> Result<bool> {
        if self.graphs.are_given_up || limit.is_reached() || !self.can_be_captured(limit) {
            return Ok(false);
        }
        {
            let experts = self.shared.experts.lock();
            let generation = experts.generation();
            let is_known = self.graphs.find(Key::of(&self.shape, generation, self.gates)).is_some();
            if is_known || !experts.are_all_on_device() {
                return Ok(false);
            }
            self.graphs.generation = generation;
            self.stream.set_recording(true);
        }
        let begun = self.shared.device.enter_to_record(&self.stream).and_then(|current| current.begin_capture());
        self.stream.set_recording(begun.is_ok());
        Ok(self.unless_lost(begun)?.is_some())
    }

    /// Fails where work is recorded and experts, now of this generation, have moved since it began to be.
    pub(super) fn check_generation(&self, generation: u64) -> Result<()> {
        match self.stream.is_recording() && generation != self.graphs.generation {
            true => Err(Error::new(Status::Internal, "experts moved while a graph of them was recorded")),
            false => Ok(()),
        }
    }

    /// See `Pass::end_recording`.
    pub(super) fn finish_recording(&mut self, recorded: Result<()>) -> Result<()> {
        let made = recorded.and_then(|()| self.recorded_graph());
        self.stop_recording();
        let generation = self.graphs.generation;
        let have_moved = self.shared.experts.lock().generation() != generation;
        match self.unless_lost(made)? {
            // The next step records anew.
            _ if have_moved => self.graphs.are_given_up = false,
            Some(graph) => self.graphs.keep(Key::of(&self.shape, generation, self.gates), graph),
            None => {}
        }
        Ok(())
    }

    fn recorded_graph(&mut self) -> Result<Graph> {
        let device = &self.shared.device;
        let current = device.enter_to_record(&self.stream)?;
        let recorded = current.end_capture();
        self.stream.set_recording(false);
        let recorded = recorded?;
        // SAFETY: the graph is this context's.
        let executable = unsafe { current.instantiate(recorded) };
        // SAFETY: as above; nobody else has it.
        unsafe { current.destroy_graph(recorded) };
        Ok(Graph { device: Arc::clone(device), executable: executable? })
    }

    /// Ends a recording that nobody wants, so that the stream works again.
    pub(super) fn stop_recording(&mut self) {
        if self.stream.is_recording()
            && let Some(current) = self.shared.device.enter_to_stop(&self.stream)
            && let Ok(recorded) = current.end_capture()
        {
            // SAFETY: a graph of this context's, which nobody else has.
            unsafe { current.destroy_graph(recorded) };
        }
        self.stream.set_recording(false);
    }

    /// A failure to make or launch a graph is none of the batch's, which goes on by stages, as all later ones of new shapes do;
    /// but a device that is lost is lost.
    fn unless_lost<T>(&mut self, result: Result<T>) -> Result<Option<T>> {
        match result {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.status() == Status::DeviceLost => {
                // The first error is the one to tell.
                let _ = self.settle();
                Err(error)
            }
            Err(_) => {
                self.graphs.are_given_up = true;
                Ok(None)
            }
        }
    }

    /// See `Pass::replay`.
    pub(super) fn launch_graph(&mut self, batch: &mut Batch, limit: &Limit) -> Result<bool> {
        if limit.is_reached() || !self.can_be_captured(limit) {
            return Ok(false);
        }
        let shared = Arc::clone(&self.shared);
        // Nobody moves them before the launch.
        let experts = shared.experts.lock();
        let key = Key::of(&self.shape, experts.generation(), self.gates);
        let Some(executable) = self.graphs.find(key).map(|graph| graph.executable) else { return Ok(false) };
        self.stage(|pass, current| {
            check_pages_are_own(batch)?;
            // SAFETY: recorded on this pass's buffers, of the model's weights, where they still are, of the batch's gates, and of
            // pages that it has; the wait below, or that of `stage`, is for all of it.
            let launched = unsafe { current.launch_graph(executable) };
            drop(experts);
            if pass.unless_lost(launched)?.is_none() {
                pass.graphs.kept.retain(|(its, _)| *its != key);
                return Ok(false);
            }
            pass.wait_for_results(current)?;
            limit.note_work();
            Ok(true)
        })
    }
}
