//! Unnormalised probabilities, and the token in whose share a random number lies.

use super::boundary::Boundary;
use super::maxima::BLOCK;
use crate::backend::cpu::kernels::math::exp;
use crate::error::Result;
use crate::memory::Buffer;

/// The weights of a draw.
pub struct Weights {
    /// `[vocab_size]`; old numbers in blocks whose sum is 0.
    each: Buffer<f32>,
    /// `[vocab_size / BLOCK]`, rounded up: sums over blocks.
    sums: Buffer<f64>,
}

impl Weights {
    /// For a vocabulary. Fails with OutOfMemory.
    pub fn new(vocab_size: usize) -> Result<Weights> {
        Ok(Weights {
            each: Buffer::zeroed("a sampler", vocab_size)?,
            sums: Buffer::zeroed("a sampler", vocab_size.div_ceil(BLOCK))?,
        })
    }

    /// Makes the weights of the kept tokens `e^((logit - max) / temperature)` and of the others 0; returns their sum.
    /// `maxima` are those of the logits.
    pub fn fill(&mut self, logits: &[f32], maxima: &[f32], kept: Boundary, max: f32, temperature: f32) -> f64 {
        let mut total = 0.0;
        let blocks = logits.chunks(BLOCK).zip(self.each.chunks_mut(BLOCK)).zip(self.sums.iter_mut().zip(maxima));
        for (block, ((logits, weights), (sum, maximum))) in blocks.enumerate() {
            if *maximum < kept.logit || exp((*maximum - max) / temperature) == 0.0 {
                *sum = 0.0;
                continue;
            }
            // Whole blocks have a length the compiler knows, and become vector code.
            match (logits.as_array::<BLOCK>(), weights.as_mut_array::<BLOCK>()) {
                (Some(logits), Some(weights)) => shape(logits, weights, block, kept, max, temperature),
                _ => shape(logits, weights, block, kept, max, temperature),
            }
            *sum = sum_of(weights);
            total += *sum;
        }
        total
    }

    /// The weight of a token of a block whose sum is not 0.
    pub fn of(&self, token: u32) -> f64 {
        f64::from(self.each[token as usize])
    }

    /// The token in whose share `point` lies, counted along the weights; none when all weights are 0.
    pub fn find(&self, point: f64) -> Option<usize> {
        let mut left = point;
        for (block, sum) in self.sums.iter().enumerate() {
            if left < *sum {
                return self.find_within(block, left);
            }
            left -= sum;
        }
        // Only rounding leads past the last weight, here and within a block: its share was all that was left.
        self.find_within(self.sums.iter().rposition(|sum| *sum > 0.0)?, f64::INFINITY)
    }

    fn find_within(&self, block: usize, mut left: f64) -> Option<usize> {
        let weights = self.each.chunks(BLOCK).nth(block)?;
        let reached = weights.iter().position(|weight| {
            left -= f64::from(*weight);
            left < 0.0
        });
        let within = reached.or_else(|| weights.iter().rposition(|weight| *weight > 0.0))?;
        Some(block * BLOCK + within)
    }
}

/// Makes the weights of one block.
#[inline(always)]
fn shape(logits: &[f32], weights: &mut [f32], block: usize, kept: Boundary, max: f32, temperature: f32) {
    for (logit, weight) in logits.iter().zip(weights.iter_mut()) {
        *weight = exp((logit - max) / temperature);
    }
    let tokens = (block * BLOCK) as u32..;
    for ((logit, weight), token) in logits.iter().zip(weights.iter_mut()).zip(tokens) {
        *weight = if kept.keeps(*logit, token) { *weight } else { 0.0 };
    }
}

/// The sum of a block's weights, as four sums in a fixed order.
#[inline(always)]
fn sum_of(weights: &[f32]) -> f64 {
    let mut partial = [0f64; 4];
    for quad in weights.chunks(4) {
        for (sum, weight) in partial.iter_mut().zip(quad) {
            *sum += f64::from(*weight);
        }
    }
    (partial[0] + partial[1]) + (partial[2] + partial[3])
}
