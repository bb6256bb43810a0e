//! Draws from the largest logits alone, where these decide: then a device need not send the others.
//!
//! The rule: a token drawn here is the one that is drawn from all logits. All steps of a draw keep a beginning of one order,
//! and the candidates are one, so what is kept is known as soon as it ends among them; or where tokens past them could have
//! no weight. Weights are the same f32 numbers here and there, but their sums are added in another order, and the total of
//! all is the device's. Where a decision is nearer than what that may come to, this is no answer, and all logits are looked
//! at. So which way a draw went shows nowhere, and forks, snapshots and batches draw alike.
//!
//! Bias, penalties and grammar change the logits of candidates as they change all. What they do to a logit rises with it: no
//! token past the candidates gets further than the last of them would in its place, and candidates that stay ahead of
//! that are a beginning of the new order.

use super::penalties::{Penalties, penalized};
use super::{Draw, Sampling};
use crate::backend::cpu::kernels::math::exp;
use crate::backend::logits::{Candidates, MAX_CANDIDATES};
use crate::error::Result;
use crate::memory::try_with_capacity;

/// What roundings may come to in any sum of a draw, as a share of all weights and for each token of the vocabulary: no way of
/// adding and taking away has more than sixteen of half of 2^-52 for each, and two sums are compared.
const ROUNDING: f64 = 1.0 / (1u64 << 48) as f64;

/// A token and its logit.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    logit: f32,
    token: u32,
}

/// Scratch for draws.
pub struct Shortlist {
    /// A beginning of the order of all tokens with finite logits.
    each: Vec<Candidate>,
    /// No other token has more; negative infinity where there is no other.
    rest: f32,
    /// The sum of the weights of all tokens, where it is known.
    total: Option<f64>,
}

impl Shortlist {
    /// For any vocabulary. Fails with OutOfMemory.
    pub fn new() -> Result<Shortlist> {
        let each = try_with_capacity("a sampler", MAX_CANDIDATES)?;
        Ok(Shortlist { each, rest: f32::NEG_INFINITY, total: None })
    }

    /// Takes candidates in.
    pub fn fill(&mut self, candidates: &Candidates) {
        let pairs = candidates.logits.iter().zip(candidates.tokens);
        self.each.clear();
        self.each.extend(pairs.map(|(logit, token)| Candidate { logit: *logit, token: *token }));
        self.total = Some(candidates.total);
        self.rest = match self.each.last() {
            Some(last) if !candidates.are_all => last.logit,
            _ => f32::NEG_INFINITY,
        };
    }

    /// Adds the bias, penalizes the tokens of `window`, which are counted, and takes away what the grammar does not allow.
    pub fn change(&mut self, sampling: &Sampling, draw: &Draw, window: &[u32], counts: &Penalties) {
        let weigh = |logit: f32, token: u32| {
            let biased = logit + draw.bias.of(token).unwrap_or(0.0);
            match counts.count_of(token) {
                0 => biased,
                count => penalized(biased, count, sampling),
            }
        };
        let is_allowed = |token: u32| match draw.allowed {
            Some(allowed) => allowed[token as usize / 32] >> (token % 32) & 1 == 1,
            None => true,
        };
        let last = self.rest;
        let changed = draw.bias.pairs().iter().map(|(token, _)| token).chain(window);
        self.rest = changed.map(|token| weigh(last, *token)).fold(last, f32::max);
        for candidate in &mut self.each {
            candidate.logit = weigh(candidate.logit, candidate.token);
        }
        let rest = self.rest;
        self.each.retain(|candidate| candidate.logit > rest && is_allowed(candidate.token));
        // Adding 0 makes the two zeros one.
        self.each.sort_unstable_by(|a, b| (b.logit + 0.0).total_cmp(&(a.logit + 0.0)).then(a.token.cmp(&b.token)));
        self.total = None;
    }

    /// The token; none where this does not decide. `random` gives the number of the draw.
    pub fn draw(&mut self, sampling: &Sampling, vocab_size: usize, random: impl FnOnce() -> f64) -> Option<u32> {
        let best = *self.each.first().filter(|best| best.logit.is_finite())?;
        if sampling.temperature == 0.0 {
            return Some(best.token);
        }
        let rounding = vocab_size as f64 * ROUNDING;
        // How many are kept, and whether no others are.
        let (mut kept, mut is_end) = (self.each.len(), self.rest == f32::NEG_INFINITY);
        if sampling.top_k > 0 && (sampling.top_k as usize) < vocab_size {
            self.total = None;
            if sampling.top_k as usize <= kept {
                (kept, is_end) = (sampling.top_k as usize, true);
            }
        }
        if sampling.top_p > 0.0 && sampling.top_p < 1.0 {
            let weight = |candidate: &Candidate| f64::from(exp(candidate.logit - best.logit));
            let total = if is_end { self.each[..kept].iter().map(weight).sum() } else { self.total? };
            let target = f64::from(sampling.top_p) * total;
            let mut sum = 0.0;
            for (index, candidate) in self.each[..kept].iter().enumerate() {
                sum += weight(candidate);
                if (sum - target).abs() <= rounding * total {
                    return None;
                }
                if sum > target {
                    (kept, is_end) = (index + 1, true);
                    break;
                }
            }
        }
        if sampling.min_p > 0.0 {
            let lowest = best.logit + libm::logf(sampling.min_p);
            kept = self.each[..kept].partition_point(|candidate| candidate.logit >= lowest);
            is_end |= self.rest < lowest;
        }
        let weight = |logit: f32| exp((logit - best.logit) / sampling.temperature);
        if !is_end && weight(self.rest) > 0.0 {
            return None;
        }
        if kept == 1 {
            return Some(best.token);
        }

        // Shares lie in the order of ids.
        let kept = &mut self.each[..kept];
        kept.sort_unstable_by_key(|candidate| candidate.token);
        let total: f64 = kept.iter().map(|candidate| f64::from(weight(candidate.logit))).sum();
        let point = random() * total;
        let mut sum = 0.0;
        for candidate in kept.iter().filter(|candidate| weight(candidate.logit) > 0.0) {
            sum += f64::from(weight(candidate.logit));
            if (sum - point).abs() <= rounding * total {
                return None;
            }
            if sum > point {
                return Some(candidate.token);
            }
        }
        None
    }
}
