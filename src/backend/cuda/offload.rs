//! What a pass needs for experts in host memory, and what they cost.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::device::Device;
use super::kernels::NARROW_TOKENS;
use super::memory::{Mark, PinnedBlock};
use super::workspace::stride_of;
use crate::backend::cpu::{HostExperts, HostWorkspace};
use crate::backend::ops::PassLimits;
use crate::backend::residency::OffloadCounts;
use crate::error::Result;
use crate::memory::{try_with_capacity, view, view_mut};
use crate::model::Config;
use crate::model::weights::ExpertWeights;

const WHAT: &str = "the workspace of experts in host memory";

/// Batches of more tokens copy experts to the device, others have them computed on the processor.
const MAX_HOST_TOKENS: usize = NARROW_TOKENS;

/// Where what comes from the device is in the host's end of it, in bytes.
struct Layout {
    /// Tokens whose experts may be computed on the processor; none where experts are always copied.
    tokens: usize,
    slot_tokens: usize,
    rows: usize,
    fetched: usize,
    projected: usize,
}

impl Layout {
    fn new(config: &Config, limits: &PassLimits, exact: bool) -> Layout {
        let tokens = if exact { 0 } else { limits.max_tokens.min(MAX_HOST_TOKENS) };
        let slots = tokens * config.num_experts_per_tok;
        let slot_tokens = (config.num_local_experts + 1) * size_of::<u32>();
        let rows = slot_tokens + slots * size_of::<u32>();
        Layout {
            tokens,
            slot_tokens,
            rows,
            fetched: rows + tokens * stride_of(config.hidden_size) * size_of::<f32>(),
            projected: slots * config.hidden_size * size_of::<f32>(),
        }
    }
}

/// The host's end of a layer's experts.
pub struct Offload {
    layout: Layout,
    /// `[experts + 1]` u32, `[slots]` u32 and `[tokens, stride]` f32: starts, tokens of slots and normed rows of a layer.
    pub fetched: PinnedBlock,
    /// Behind what was fetched.
    pub arrived: Mark,
    /// `[slots, hidden_size]` f32, on its way to the device.
    pub projected: PinnedBlock,
    pub workspace: HostWorkspace,
    /// The layer's experts in host memory, and who computes them, held while they may be.
    pub threads: Option<Arc<HostExperts>>,
    pub weights: Vec<(u32, Arc<ExpertWeights>)>,
    /// Those that tokens were sent to.
    pub touched: Vec<u32>,
}

impl Offload {
    /// For batches of these limits. Fails with `OutOfMemory`.
    pub fn new(device: &Arc<Device>, config: &Config, limits: &PassLimits, exact: bool) -> Result<Offload> {
        let layout = Layout::new(config, limits, exact);
        Ok(Offload {
            fetched: PinnedBlock::new(device, WHAT, layout.fetched)?,
            arrived: Mark::new(device)?,
            projected: PinnedBlock::new(device, WHAT, layout.projected)?,
            workspace: HostWorkspace::new(config, layout.tokens * config.num_experts_per_tok)?,
            threads: None,
            touched: try_with_capacity(WHAT, config.num_local_experts)?,
            weights: try_with_capacity(WHAT, config.num_local_experts)?,
            layout,
        })
    }

    /// Bytes `new` would take of host memory.
    pub fn planned_bytes(config: &Config, limits: &PassLimits, exact: bool) -> Result<usize> {
        let layout = Layout::new(config, limits, exact);
        let slots = layout.tokens * config.num_experts_per_tok;
        Ok(layout.fetched + layout.projected + HostWorkspace::planned_bytes(config, slots)?)
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.fetched.bytes() + self.projected.bytes() + self.workspace.bytes()
    }

    /// Whether a batch of so many tokens has its experts in host memory computed there, and not copied.
    pub fn computes(&self, tokens: usize) -> bool {
        tokens <= self.layout.tokens
    }

    /// Where starts, tokens of slots and rows are in what was fetched.
    pub fn offsets(&self) -> [usize; 3] {
        [0, self.layout.slot_tokens, self.layout.rows]
    }

    /// `[experts + 1]`, once they have arrived.
    pub fn starts(&self) -> &[u32] {
        view(&self.fetched.as_slice()[..self.layout.slot_tokens])
    }

    /// The first slot of an expert, and how many it has.
    pub fn slots_of(&self, expert: usize) -> (usize, usize) {
        let (first, end) = (self.starts()[expert] as usize, self.starts()[expert + 1] as usize);
        (first, end - first)
    }

    /// What the processor computes with: starts, tokens of slots, rows; and the results it writes.
    pub fn parts(&mut self) -> Parts<'_> {
        let Layout { slot_tokens, rows, .. } = self.layout;
        let (starts, rest) = self.fetched.as_slice().split_at(slot_tokens);
        let (tokens, normed) = rest.split_at(rows - slot_tokens);
        Parts {
            starts: view(starts),
            tokens: view(tokens),
            normed: view(normed),
            projected: view_mut(self.projected.as_mut_slice()),
            workspace: &mut self.workspace,
            touched: &self.touched,
            weights: &self.weights,
        }
    }
}

/// See `Offload`.
pub struct Parts<'a> {
    pub starts: &'a [u32],
    pub tokens: &'a [u32],
    pub normed: &'a [f32],
    pub projected: &'a mut [f32],
    pub workspace: &'a mut HostWorkspace,
    pub touched: &'a [u32],
    pub weights: &'a [(u32, Arc<ExpertWeights>)],
}

/// Counts of all passes of a model.
#[derive(Debug, Default)]
pub struct Counters {
    host_runs: AtomicU64,
    host_nanoseconds: AtomicU64,
    copies: AtomicU64,
    copied_bytes: AtomicU64,
    copy_nanoseconds: AtomicU64,
}

impl Counters {
    /// Experts were computed on the processor, beginning at `started`.
    pub fn note_runs(&self, runs: usize, started: Instant) {
        self.host_runs.fetch_add(runs as u64, Ordering::Relaxed);
        self.host_nanoseconds.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// An expert of so many bytes was copied, beginning at `started`.
    pub fn note_copy(&self, bytes: usize, started: Instant) {
        self.copies.fetch_add(1, Ordering::Relaxed);
        self.copied_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.copy_nanoseconds.fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// What they came to.
    pub fn read(&self) -> OffloadCounts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        OffloadCounts {
            host_runs: count(&self.host_runs),
            host_time: Duration::from_nanos(count(&self.host_nanoseconds)),
            copies: count(&self.copies),
            copied_bytes: count(&self.copied_bytes),
            copy_time: Duration::from_nanos(count(&self.copy_nanoseconds)),
        }
    }
}
