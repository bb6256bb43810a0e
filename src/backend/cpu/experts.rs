//! Gate, up, GeGLU and down of the experts that tokens were sent to: of passes on the processor, and (`host_experts`) of
//! those of other devices.

use std::sync::Arc;
use std::task::{Poll, ready};

use super::jobs::Jobs;
use super::kernels::Kernels;
use super::kernels::activations::{Activations, Packed, Place, Precision, TILE, tiles};
use super::kernels::matmul::{Output, TokenRows};
use super::pass::{Split, observe};
use super::pool::Pool;
use crate::backend::observer::{Input, Observer};
use crate::backend::ops::Limit;
use crate::error::Result;
use crate::model::weights::{ExpertWeights, Matrix};

/// Which tokens the experts of a layer have. A *slot* is one token's choice of one expert; slots are numbered expert by
/// expert.
#[derive(Clone, Copy)]
pub struct Slots<'a> {
    /// Experts that are computed; each has slots.
    pub touched: &'a [u32],
    /// `[experts + 1]`: expert e has the slots `starts[e]..starts[e + 1]`.
    pub starts: &'a [u32],
    /// The token of each slot.
    pub tokens: &'a [u32],
}

impl Slots<'_> {
    /// The slots of an expert.
    pub fn of(&self, expert: usize) -> std::ops::Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }

    /// Slots of the touched expert that has most.
    fn most(&self) -> usize {
        self.touched.iter().map(|expert| self.of(*expert as usize).len()).max().unwrap_or(0)
    }
}

/// Some experts of a layer, on slots.
pub struct ExpertJobs<'a> {
    pub kernels: &'a Kernels,
    pub pool: &'a Pool,
    pub exact_gelu: bool,
    /// The weights of a touched expert.
    pub weights: &'a (dyn Fn(usize) -> &'a ExpertWeights + Sync),
    pub slots: Slots<'a>,
    /// The layer, and who is shown what its matrices are multiplied with.
    pub layer: usize,
    pub observer: &'a Option<Arc<Observer>>,
}

/// Where experts are computed.
pub struct ExpertBuffers<'a> {
    /// Room for all slots and the widest matrix.
    pub packed: &'a mut Activations,
    /// `[slots, intermediate_size]`
    pub activated: &'a mut [f32],
    /// `[slots, hidden_size]`: the results. Slots of experts that are not touched stay as they are.
    pub projected: &'a mut [f32],
}

/// Multiplies panels of an expert's weights with some of its slots, the first of which is given last.
type SlotKernel<'a> = dyn Fn(usize, std::ops::Range<usize>, &Packed, usize) + Sync + 'a;

impl<'a> ExpertJobs<'a> {
    /// The jobs `projected[slot] = down( gelu(gate x) * (up x) )`, x being the row of `rows` of the slot's token.
    pub fn run(&self, jobs: &mut Jobs, limit: &Limit, rows: TokenRows, buffers: ExpertBuffers) -> Poll<Result<()>> {
        let Some(first) = self.slots.touched.first().map(|expert| (self.weights)(*expert as usize)) else {
            return Poll::Ready(Ok(()));
        };
        let ExpertBuffers { packed, activated, projected } = buffers;
        let (intermediate_size, hidden_size) = (first.gate.rows(), first.down.rows());
        let most = self.slots.most();

        // activated[slot] = gelu(gate x) * (up x), x being the normed input of the slot's token.
        let precision = |expert: usize| self.precision(&(self.weights)(expert).gate);
        let x = TokenRows { index: Some(self.slots.tokens), count: self.slots.tokens.len(), ..rows };
        ready!(self.observe(jobs, limit, x, &|expert| Input::Expert(self.layer, expert)))?;
        ready!(self.pack(jobs, limit, packed, x, &precision))?;
        let split = Split::new(first.gate.shape(), 2, most);
        let out = Output::new(activated, intermediate_size);
        ready!(self.multiply(jobs, limit, (packed, x.columns), &precision, &split, &|expert, panels, x, first| {
            let out = out.skip_rows(first);
            // SAFETY: items have different slots or different rows, and the buffer outlives the job.
            unsafe { self.kernels.geglu((self.weights)(expert), panels, x, self.exact_gelu, &out) }
        }))?;

        // projected[slot] = down activated[slot]
        let precision = |expert: usize| self.precision(&(self.weights)(expert).down);
        let x = TokenRows { data: activated, columns: intermediate_size, index: None, count: self.slots.tokens.len() };
        ready!(self.observe(jobs, limit, x, &|expert| Input::Down(self.layer, expert)))?;
        ready!(self.pack(jobs, limit, packed, x, &precision))?;
        let split = Split::new(first.down.shape(), 1, most);
        let out = Output::new(projected, hidden_size);
        self.multiply(jobs, limit, (packed, x.columns), &precision, &split, &|expert, panels, x, first| {
            let out = out.skip_rows(first);
            // SAFETY: items have different slots or different rows, and the buffer outlives the job.
            unsafe { self.kernels.matmul(&(self.weights)(expert).down, panels, x, &out) }
        })
    }

    fn precision(&self, weights: &Matrix) -> Precision {
        self.kernels.precision(weights.shape().format)
    }

    /// The jobs of showing the observer, where there is one, each touched expert's slots.
    fn observe(
        &self,
        jobs: &mut Jobs,
        limit: &Limit,
        x: TokenRows,
        input: &dyn Fn(usize) -> Input,
    ) -> Poll<Result<()>> {
        for expert in self.slots.touched {
            let expert = *expert as usize;
            ready!(observe(jobs, limit, self.observer, input(expert), x.part(self.slots.of(expert))))?;
        }
        Poll::Ready(Ok(()))
    }

    /// The job that packs the slots' rows of `x` for each touched expert, as `precision` says for it.
    fn pack(
        &self,
        jobs: &mut Jobs,
        limit: &Limit,
        packed: &mut Activations,
        x: TokenRows,
        precision: &(dyn Fn(usize) -> Precision + Sync),
    ) -> Poll<Result<()>> {
        let experts = self.slots.touched;
        let most_tiles = tiles(self.slots.most());
        let packing = packed.packing();
        jobs.run(self.pool, limit, experts.len() * most_tiles, &|item, _| {
            let (expert, tile) = (experts[item / most_tiles] as usize, item % most_tiles);
            let slots = self.slots.of(expert);
            let tokens = slots.start + tile * TILE..slots.end.min(slots.start + (tile + 1) * TILE);
            if tokens.start < tokens.end {
                let place = Place { precision: precision(expert), tokens: slots, columns: x.columns };
                // SAFETY: items have tiles of their own, and the buffer outlives the job.
                unsafe { self.kernels.pack(&packing, &place, tile, &x.part(tokens)) }
            }
        })
    }

    /// The job that multiplies each touched expert's slots, which were packed, with panels of its weights, item by item.
    fn multiply(
        &self,
        jobs: &mut Jobs,
        limit: &Limit,
        (packed, columns): (&Activations, usize),
        precision: &(dyn Fn(usize) -> Precision + Sync),
        split: &Split,
        multiply: &SlotKernel,
    ) -> Poll<Result<()>> {
        let experts = self.slots.touched;
        jobs.run(self.pool, limit, experts.len() * split.items(), &|item, _| {
            let expert = experts[item / split.items()] as usize;
            let of_expert = self.slots.of(expert);
            let (panels, tokens) = split.parts_of(item % split.items(), of_expert.len());
            if tokens.start < tokens.end {
                let first = of_expert.start + tokens.start;
                let place = Place { precision: precision(expert), tokens: of_expert, columns };
                multiply(expert, panels, &packed.packed(&place).part(tokens), first);
            }
        })
    }
}
