//! Experts in the open: what a host may change about the router, and what it may watch.

use crate::backend::Pass;
use crate::backend::ops::{NO_EXPERT, RouterControl, every_expert};
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, try_vec, try_with_capacity};
use crate::model::Config;

/// A session's masks and biases of experts.
#[derive(Debug, PartialEq)]
pub struct ExpertControl {
    experts: usize,
    /// `[layers]`: a bit for each expert that may be chosen.
    allowed: Vec<u64>,
    /// `[layers, experts]`: added to the router's logits.
    bias: Vec<f32>,
}

impl ExpertControl {
    /// Every expert allowed, no bias.
    pub fn new(config: &Config) -> Result<Self> {
        let (layers, experts) = (config.num_hidden_layers, config.num_local_experts);
        let what = "expert masks";
        let all = every_expert(experts);
        Ok(ExpertControl { experts, allowed: try_vec(what, layers, all)?, bias: try_vec(what, layers * experts, 0.0)? })
    }

    /// The same again. Fails with OutOfMemory.
    pub fn try_clone(&self) -> Result<Self> {
        let mut allowed = try_with_capacity("expert masks", self.allowed.len())?;
        allowed.extend_from_slice(&self.allowed);
        let mut bias = try_with_capacity("expert masks", self.bias.len())?;
        bias.extend_from_slice(&self.bias);
        Ok(ExpertControl { experts: self.experts, allowed, bias })
    }

    /// Lets only the experts whose bits are set be chosen in `layer`, or in all layers if `None`.
    ///
    /// At least one must be; with fewer than top_k they share the whole weight. Bits past the experts must be 0.
    pub fn set_allowed(&mut self, layer: Option<usize>, allowed: u64) -> Result<()> {
        let all = every_expert(self.experts);
        if allowed == 0 || allowed & !all != 0 {
            let text = format!("expert mask is {allowed:#x}, expected at least one of the bits {all:#x}");
            return Err(Error::new(Status::ExpertValue, text).at_key("allowed"));
        }
        let layers = self.layers(layer)?;
        self.allowed[layers].fill(allowed);
        Ok(())
    }

    /// Adds `bias: [num_local_experts]` to the router's logits in `layer`, or in all layers if `None`, in place of an
    /// earlier one.
    pub fn set_bias(&mut self, layer: Option<usize>, bias: &[f32]) -> Result<()> {
        if bias.len() != self.experts {
            let text = format!("bias has {} values, the model {} experts", bias.len(), self.experts);
            return Err(Error::new(Status::InvalidArgument, text).at_key("bias"));
        }
        if let Some(expert) = bias.iter().position(|value| !value.is_finite()) {
            let text = format!("bias of expert {expert} is {}, expected a finite number", bias[expert]);
            return Err(Error::new(Status::ExpertValue, text).at_key("bias"));
        }
        for layer in self.layers(layer)? {
            self.bias[layer * self.experts..(layer + 1) * self.experts].copy_from_slice(bias);
        }
        Ok(())
    }

    /// As the backend takes it.
    pub fn as_router_control(&self) -> RouterControl<'_> {
        RouterControl { allowed: &self.allowed, bias: &self.bias }
    }

    fn layers(&self, layer: Option<usize>) -> Result<std::ops::Range<usize>> {
        let layers = self.allowed.len();
        match layer {
            None => Ok(0..layers),
            Some(layer) if layer < layers => Ok(layer..layer + 1),
            Some(layer) => {
                let text = format!("layer is {layer}, the model has {layers}");
                Err(Error::new(Status::InvalidArgument, text).at_key("layer"))
            }
        }
    }
}

/// How often each expert was chosen, and with what weight.
pub struct ExpertStatistics {
    experts: usize,
    /// `[layers, experts]`: tokens sent there.
    counts: Buffer<u64>,
    /// `[layers, experts]`: the sum of their weights.
    weights: Buffer<f64>,
}

impl ExpertStatistics {
    /// Nothing counted yet.
    pub fn new(config: &Config) -> Result<Self> {
        let (layers, experts) = (config.num_hidden_layers, config.num_local_experts);
        let what = "expert statistics";
        Ok(ExpertStatistics {
            experts,
            counts: Buffer::zeroed(what, layers * experts)?,
            weights: Buffer::zeroed(what, layers * experts)?,
        })
    }

    /// Tokens sent to each expert, `[layers, num_local_experts]`.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// The sum of the weights they were sent with, `[layers, num_local_experts]`.
    pub fn weight_sums(&self) -> &[f64] {
        &self.weights
    }

    /// Starts counting anew.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        self.weights.fill(0.0);
    }

    fn add(&mut self, layer: usize, experts: &[u32], weights: &[f32]) {
        for (expert, weight) in experts.iter().zip(weights).filter(|(expert, _)| **expert != NO_EXPERT) {
            let at = layer * self.experts + *expert as usize;
            self.counts[at] += 1;
            self.weights[at] += *weight as f64;
        }
    }
}

/// The routes of the last tokens that were run, until a host fetches them.
pub struct RouteRing {
    /// Layers times top_k.
    row: usize,
    /// Entries there is room for.
    capacity: usize,
    /// Entries that wait, and the first of them.
    count: usize,
    first: usize,
    /// Entries that were overwritten before they were fetched, since the last fetch.
    lost: u64,
    /// `[capacity]`
    positions: Buffer<u64>,
    /// `[capacity]`
    tokens: Buffer<u32>,
    /// `[capacity, layers, top_k]`
    experts: Buffer<u32>,
    /// `[capacity, layers, top_k]`
    weights: Buffer<f32>,
}

/// Arrays that fetched routes are written to, for the same number of tokens each.
pub struct RouteArrays<'a> {
    /// `[n]`: tokens before this one since the session began, those dropped by a sliding window included.
    pub positions: &'a mut [u64],
    /// `[n]`
    pub tokens: &'a mut [u32],
    /// `[n, num_hidden_layers, num_experts_per_tok]`
    pub experts: &'a mut [u32],
    /// `[n, num_hidden_layers, num_experts_per_tok]`
    pub weights: &'a mut [f32],
}

impl RouteRing {
    /// Room for the routes of `capacity` tokens.
    pub fn new(config: &Config, capacity: usize) -> Result<Self> {
        let what = "the ring of routes";
        let row = config.num_hidden_layers * config.num_experts_per_tok;
        let elements = capacity.checked_mul(row).ok_or_else(|| Error::out_of_memory(what, usize::MAX))?;
        Ok(RouteRing {
            row,
            capacity,
            count: 0,
            first: 0,
            lost: 0,
            positions: Buffer::zeroed(what, capacity)?,
            tokens: Buffer::zeroed(what, capacity)?,
            experts: Buffer::zeroed(what, elements)?,
            weights: Buffer::zeroed(what, elements)?,
        })
    }

    /// Moves the oldest entries out, as many as wait and fit. Returns how many, and how many were overwritten since the
    /// last fetch because nobody fetched them.
    pub fn fetch(&mut self, arrays: &mut RouteArrays) -> (usize, u64) {
        let fetched = self.count.min(arrays.tokens.len());
        for to in 0..fetched {
            let from = (self.first + to) % self.capacity;
            arrays.positions[to] = self.positions[from];
            arrays.tokens[to] = self.tokens[from];
            let (to, from) = (to * self.row..(to + 1) * self.row, from * self.row..(from + 1) * self.row);
            arrays.experts[to.clone()].copy_from_slice(&self.experts[from.clone()]);
            arrays.weights[to].copy_from_slice(&self.weights[from]);
        }
        self.first = (self.first + fetched) % self.capacity.max(1);
        self.count -= fetched;
        (fetched, std::mem::take(&mut self.lost))
    }

    /// Entries that wait to be fetched.
    pub fn waiting(&self) -> usize {
        self.count
    }

    /// Adds an entry, in place of the oldest if there is no room, and returns its place.
    fn add(&mut self, position: u64, token: u32) -> usize {
        if self.count == self.capacity {
            self.first = (self.first + 1) % self.capacity;
            self.count -= 1;
            self.lost += 1;
        }
        let at = (self.first + self.count) % self.capacity;
        self.count += 1;
        self.positions[at] = position;
        self.tokens[at] = token;
        at
    }
}

/// Takes the routes of `tokens`, tokens `first..` of the pass's last batch, into the statistics and the ring.
/// `position` tells the position of each of `tokens`.
pub fn record(
    pass: &dyn Pass,
    first: usize,
    tokens: &[u32],
    position: impl Fn(usize) -> u64,
    statistics: &mut ExpertStatistics,
    ring: &mut RouteRing,
) {
    let layers = statistics.counts.len() / statistics.experts;
    for layer in 0..layers {
        for index in first..first + tokens.len() {
            let routes = pass.routes(layer, index);
            statistics.add(layer, routes.experts, routes.weights);
        }
    }
    if ring.capacity == 0 {
        return;
    }
    for (index, token) in tokens.iter().enumerate() {
        let at = ring.add(position(index), *token);
        for layer in 0..layers {
            let routes = pass.routes(layer, first + index);
            let top_k = routes.experts.len();
            let to = at * ring.row + layer * top_k..at * ring.row + (layer + 1) * top_k;
            ring.experts[to.clone()].copy_from_slice(routes.experts);
            ring.weights[to].copy_from_slice(routes.weights);
        }
    }
}
