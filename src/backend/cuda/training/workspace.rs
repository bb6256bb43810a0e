//! What training works in: the numbers of its pass, and what operations need beside them, in one block of device memory.

use std::sync::Arc;

use super::attention::QUERIES;
use super::head::HEAD_TOKENS;
use super::kernels::TILE;
use crate::backend::cuda::context::Current;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::memory::Arena;
use crate::backend::cuda::upload::Upload;
use crate::backend::numerics::Numerics;
use crate::backend::training::{Rows, TrainingLimits};
use crate::error::{Error, Result, Status};
use crate::memory::{Plain, as_bytes};
use crate::model::Config;

const WHAT: &str = "the workspace of training";

/// Most blocks in one but the first dimension of a grid.
const MAX_TILES: usize = 65_535;

/// Where everything is on the device.
#[derive(Clone, Copy)]
pub struct Parts {
    /// What the pass hands out as `Rows`.
    pub numbers: Address,
    /// `[experts + 1]` u32
    pub starts: Address,
    /// `[most_indices]` u32: tokens, positions, slots or targets of an operation.
    pub indices: Address,
    /// `[most_indices]` f32: weights of slots, or derivatives of targets.
    pub weights: Address,
    /// `[max_tokens, head_dim / 2]` f32 each
    pub cosines: Address,
    pub sines: Address,
    /// `[heads, QUERIES, max_tokens]` f32 each
    pub scores: Address,
    pub score_gradients: Address,
    /// `[max_targets, HEAD_TOKENS]` f32
    pub logits: Address,
    /// `[max_targets, 3]` f64
    pub sums: Address,
}

/// Indices of the operation that has most: the slots of all tokens, where every expert sees each.
fn most_indices(config: &Config, limits: &TrainingLimits) -> Result<usize> {
    product(&[limits.max_tokens.max(limits.max_targets), config.num_local_experts])
}

fn product(factors: &[usize]) -> Result<usize> {
    let product = factors.iter().try_fold(1usize, |product, factor| product.checked_mul(*factor));
    product.filter(|bytes| *bytes <= isize::MAX as usize).ok_or_else(|| Error::out_of_memory(WHAT, usize::MAX))
}

impl Parts {
    /// Asks `take` for each part in turn, by its size in bytes.
    fn lay_out(
        config: &Config,
        limits: &TrainingLimits,
        take: &mut dyn FnMut(usize) -> Result<Address>,
    ) -> Result<Parts> {
        let f32s = size_of::<f32>();
        let indices = product(&[most_indices(config, limits)?, f32s])?;
        let angles = product(&[limits.max_tokens, config.head_dim / 2, f32s])?;
        let scores = product(&[config.num_attention_heads, QUERIES, limits.max_tokens, f32s])?;
        Ok(Parts {
            numbers: take(product(&[limits.numbers, f32s])?)?,
            starts: take(product(&[config.num_local_experts + 1, f32s])?)?,
            indices: take(indices)?,
            weights: take(indices)?,
            cosines: take(angles)?,
            sines: take(angles)?,
            scores: take(scores)?,
            score_gradients: take(scores)?,
            logits: take(product(&[limits.max_targets, HEAD_TOKENS, f32s])?)?,
            sums: take(product(&[limits.max_targets, 3, size_of::<f64>()])?)?,
        })
    }
}

/// The buffers of one trainer.
pub struct TrainingWorkspace {
    pub parts: Parts,
    limits: TrainingLimits,
    most_indices: usize,
    experts: usize,
    /// Lists on their way to the device.
    upload: Upload,
    /// What all parts are in.
    _arena: Arena,
}

impl TrainingWorkspace {
    /// Fails with `InvalidArgument`, `OutOfMemory` and `DeviceOutOfMemory`.
    pub fn new(
        device: &Arc<Device>,
        config: &Config,
        numerics: &Numerics,
        limits: TrainingLimits,
    ) -> Result<TrainingWorkspace> {
        let most = MAX_TILES * TILE;
        if limits.max_tokens > most {
            let text =
                format!("a batch of up to {} tokens is wanted, the device's kernels take {most}", limits.max_tokens);
            return Err(Error::new(Status::InvalidArgument, text).at_key("max_tokens"));
        }
        let mut bytes = 0usize;
        Parts::lay_out(config, &limits, &mut |part| {
            let padded = part.checked_next_multiple_of(Arena::padded(1)).and_then(|part| bytes.checked_add(part));
            bytes = padded.ok_or_else(|| Error::out_of_memory(WHAT, usize::MAX))?;
            Ok(0)
        })?;
        let mut arena = Arena::zeroed(device, WHAT, bytes)?;
        let parts = Parts::lay_out(config, &limits, &mut |bytes| arena.take(bytes))?;
        let (cosines, sines) = numerics.angles(WHAT, limits.max_tokens)?;
        let most_indices = most_indices(config, &limits)?;
        let upload = Upload::new(device, product(&[most_indices, size_of::<u32>()])?)?;
        let mut workspace =
            TrainingWorkspace { parts, limits, most_indices, experts: config.num_local_experts, upload, _arena: arena };
        let current = device.enter()?;
        let sent = workspace.send(&current, as_bytes(&cosines), parts.cosines);
        let sent = sent.and_then(|()| workspace.send(&current, as_bytes(&sines), parts.sines));
        // Also after an error: what is on its way arrives before anything is freed.
        let arrived = current.wait();
        sent.and(arrived)?;
        Ok(workspace)
    }

    /// Addresses of parts that the pass handed out, none of which overlap.
    pub fn numbers<const N: usize>(&self, rows: [Rows; N]) -> Result<[Address; N]> {
        let ranges = rows.map(|rows| rows.range());
        let is_inside = ranges.iter().all(|range| range.end <= self.limits.numbers);
        let overlap = (1..N).any(|second| {
            let range = &ranges[second];
            ranges[..second].iter().any(|first| first.start.max(range.start) < first.end.min(range.end))
        });
        if !is_inside || overlap {
            return Err(Error::new(Status::Internal, "parts of a training workspace overlap or are not in it"));
        }
        Ok(ranges.map(|range| self.parts.numbers + (range.start * size_of::<f32>()) as Address))
    }

    /// Enqueues a copy, behind everything that reads what was there before.
    fn send(&mut self, current: &Current, bytes: &[u8], to: Address) -> Result<()> {
        // SAFETY: a part of the arena with room for them, which the stream alone uses.
        unsafe { self.upload.send(current, bytes, to, |bytes, out| out.copy_from_slice(bytes)) }
    }

    /// Has a list of an operation copied to `parts.indices`, and answers that.
    pub fn send_indices(&mut self, current: &Current, indices: &[u32]) -> Result<Address> {
        self.send_list(current, indices, self.most_indices, self.parts.indices)
    }

    /// The same of `parts.weights`.
    pub fn send_weights(&mut self, current: &Current, weights: &[f32]) -> Result<Address> {
        self.send_list(current, weights, self.most_indices, self.parts.weights)
    }

    /// The same of `parts.starts`.
    pub fn send_starts(&mut self, current: &Current, starts: &[u32]) -> Result<Address> {
        self.send_list(current, starts, self.experts + 1, self.parts.starts)
    }

    fn send_list<T: Plain>(&mut self, current: &Current, list: &[T], most: usize, to: Address) -> Result<Address> {
        if list.len() > most {
            let text = format!("a list of {} for training, which has room for {most}", list.len());
            return Err(Error::new(Status::Internal, text));
        }
        self.send(current, as_bytes(list), to)?;
        Ok(to)
    }
}
