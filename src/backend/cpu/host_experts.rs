//! Experts in host memory that a model on another device has computed here.

use std::task::Poll;

use super::CpuOptions;
use super::experts::{ExpertBuffers, ExpertJobs, Slots};
use super::jobs::Jobs;
use super::kernels::Kernels;
use super::kernels::activations::Activations;
use super::kernels::matmul::TokenRows;
use super::pool::Pool;
use crate::backend::ops::Limit;
use crate::error::{Error, Result, Status};
use crate::memory::Buffer;
use crate::model::Config;
use crate::model::weights::ExpertWeights;

/// The processor's threads, for a model on another device some of whose experts are in host memory.
pub struct HostExperts {
    kernels: Kernels,
    pool: Pool,
    exact_gelu: bool,
}

impl HostExperts {
    /// Starts the threads.
    pub fn new(options: &CpuOptions, exact_gelu: bool) -> Result<HostExperts> {
        let kernels = Kernels::get(options.instructions)?;
        Ok(HostExperts { kernels, pool: Pool::with(&options.threads)?, exact_gelu })
    }

    /// `projected[slot] = down( gelu(gate x) * (up x) )` for the slots of the touched experts, x being the row of `rows` of the
    /// slot's token; `projected: [slots, hidden_size]`, other rows stay as they are. Fails with `Cancelled` where `limit` is
    /// cancelled; its time and layers do not count.
    pub fn run<'a>(
        &'a self,
        limit: &Limit,
        slots: Slots<'a>,
        weights: &'a (dyn Fn(usize) -> &'a ExpertWeights + Sync),
        rows: TokenRows,
        workspace: &mut HostWorkspace,
        projected: &mut [f32],
    ) -> Result<()> {
        let HostExperts { kernels, pool, exact_gelu } = self;
        let jobs = ExpertJobs { kernels, pool, exact_gelu: *exact_gelu, weights, slots, layer: 0, observer: &None };
        let HostWorkspace { packed, activated } = workspace;
        let buffers = ExpertBuffers { packed, activated, projected };
        match jobs.run(&mut Jobs::default(), &limit.without_budget(), rows, buffers) {
            Poll::Ready(result) => result,
            Poll::Pending => Err(Error::new(Status::Internal, "work without a budget was left unfinished")),
        }
    }
}

/// What experts are computed in on the processor.
pub struct HostWorkspace {
    packed: Activations,
    /// `[slots, intermediate_size]`
    activated: Buffer<f32>,
}

const WHAT: &str = "the workspace of experts in host memory";

impl HostWorkspace {
    /// For so many slots.
    pub fn new(config: &Config, slots: usize) -> Result<HostWorkspace> {
        Ok(HostWorkspace {
            packed: Activations::new(WHAT, slots, widest(config))?,
            activated: Buffer::zeroed(WHAT, slots * config.intermediate_size)?,
        })
    }

    /// Bytes `new` would take.
    pub fn planned_bytes(config: &Config, slots: usize) -> Result<usize> {
        let activated = slots * config.intermediate_size * size_of::<f32>();
        Ok(Activations::planned_bytes(WHAT, slots, widest(config))? + activated)
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.packed.bytes() + self.activated.bytes()
    }
}

fn widest(config: &Config) -> usize {
    config.hidden_size.max(config.intermediate_size)
}
