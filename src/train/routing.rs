//! The router of one layer of a batch: from logits to slots, and from what slots contributed back to the logits' gradient. On the
//! host and in f64, whatever the device: a token has a few dozen logits.
//!
//! With the kept experts S, weights `w = softmax(logits) / sum over S` and g_i the product of the layer's gradient and expert
//! i's output, `dL/dlogit_i = w_i (g_i - sum over S of w_j g_j)` for i in S, 0 otherwise: the derivative of a softmax over the
//! kept logits, which is what the division by their sum makes of it (Mixtral, arXiv 2401.04088, section 2.1).

use crate::backend::cpu::kernels::math::softmax_f64;
use crate::backend::training::{NO_SLOT, Slots};
use crate::error::Result;
use crate::memory::{try_vec, try_with_capacity};
use crate::random::mixed;

const WHAT: &str = "routes of a batch";

/// How a batch is routed.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// Experts in the layer.
    pub experts: usize,
    /// Experts each token keeps.
    pub top_k: usize,
    /// Every token is sent to all experts, with their probabilities as weights.
    pub soft: bool,
}

impl Choice {
    /// Slots of a token.
    pub fn slots(&self) -> usize {
        if self.soft { self.experts } else { self.top_k }
    }
}

/// Normal numbers added to the logits (Shazeer et al., arXiv 1701.06538, equation 4, of constant size). They belong to the
/// seed, layer, token and expert alone, so that every way through a batch meets the same.
#[derive(Clone, Copy, Debug)]
pub struct Noise {
    /// Standard deviation.
    pub deviation: f64,
    /// Of this batch.
    pub seed: u64,
}

impl Noise {
    /// The number for one logit, by Box and Muller.
    fn at(&self, layer: usize, token: usize, expert: usize) -> f64 {
        let place = [layer, token, expert].into_iter().fold(self.seed, |state, part| mixed(state ^ mixed(part as u64)));
        let unit = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let (radius, angle) = (unit(mixed(place)), unit(mixed(place ^ 1)));
        self.deviation * (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
    }
}

/// The routes of one layer.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    /// `[counted, experts]`
    pub probabilities: Vec<f64>,
    /// `[counted]`: the logarithm of the sum of all e^logit.
    pub log_sums: Vec<f64>,
    /// `[counted, top_k]`: the most probable experts, the most probable first.
    pub chosen: Vec<u32>,
    /// `[slots]`: weights before they are rounded.
    weights: Vec<f64>,
    /// Where tokens are sent.
    pub slots: Slots,
}

impl Routes {
    /// Routes the first `counted` of `tokens` tokens by their logits, `[tokens, experts]`; the others go nowhere.
    pub fn new(
        choice: &Choice,
        layer: usize,
        (tokens, counted): (usize, usize),
        logits: &[f32],
        noise: Option<&Noise>,
    ) -> Result<Routes> {
        let kept = choice.slots();
        let mut routes = Routes {
            probabilities: try_with_capacity(WHAT, counted * choice.experts)?,
            log_sums: try_with_capacity(WHAT, counted)?,
            chosen: try_with_capacity(WHAT, counted * choice.top_k)?,
            weights: try_with_capacity(WHAT, counted * kept)?,
            slots: Slots::default(),
        };
        let mut kept_experts = try_with_capacity(WHAT, counted * kept)?;
        let mut kept_weights = try_with_capacity(WHAT, counted * kept)?;
        let mut order: Vec<u32> = try_with_capacity(WHAT, choice.experts)?;
        for (token, logits) in logits.chunks_exact(choice.experts).take(counted).enumerate() {
            let noise = |expert| noise.map_or(0.0, |noise| noise.at(layer, token, expert));
            let logits = logits.iter().enumerate().map(|(expert, logit)| f64::from(*logit) + noise(expert));
            let first = routes.probabilities.len();
            routes.probabilities.extend(logits);
            let probabilities = &mut routes.probabilities[first..];
            let (largest, sum) = softmax_f64(probabilities);
            routes.log_sums.push(largest + sum.ln());
            // Stable, so that of equal ones the lower index comes first.
            order.clear();
            order.extend(0..choice.experts as u32);
            order.sort_by(|a, b| probabilities[*b as usize].total_cmp(&probabilities[*a as usize]));
            routes.chosen.extend(&order[..choice.top_k]);
            let kept = &order[..kept];
            let sum: f64 = kept.iter().map(|expert| probabilities[*expert as usize]).sum();
            kept_weights.extend(kept.iter().map(|expert| probabilities[*expert as usize] / sum));
            kept_experts.extend(kept);
        }
        routes.group(choice, tokens, &kept_experts, &kept_weights)?;
        Ok(routes)
    }

    /// Numbers the slots expert by expert.
    fn group(&mut self, choice: &Choice, tokens: usize, experts: &[u32], weights: &[f64]) -> Result<()> {
        let slots = &mut self.slots;
        slots.choices = choice.slots();
        slots.of_tokens = try_vec(WHAT, tokens * slots.choices, NO_SLOT)?;
        slots.tokens = try_with_capacity(WHAT, experts.len())?;
        slots.weights = try_with_capacity(WHAT, experts.len())?;
        slots.starts = try_with_capacity(WHAT, choice.experts + 1)?;
        slots.starts.push(0);
        for expert in 0..choice.experts as u32 {
            for (at, _) in experts.iter().enumerate().filter(|(_, chosen)| **chosen == expert) {
                slots.of_tokens[at] = slots.tokens.len() as u32;
                slots.tokens.push((at / slots.choices) as u32);
                slots.weights.push(weights[at] as f32);
                self.weights.push(weights[at]);
            }
            slots.starts.push(slots.tokens.len() as u32);
        }
        Ok(())
    }

    /// Adds the gradient of the weights to `out: [tokens, experts]`, the gradient of the logits; `products: [slots]` are the
    /// g_i of the slots.
    pub fn add_logit_gradient(&self, products: &[f32], out: &mut [f32]) -> Result<()> {
        let experts = self.slots.starts.len() - 1;
        let mut means = try_vec(WHAT, out.len() / experts, 0f64)?;
        let slots = || self.slots.tokens.iter().map(|token| *token as usize).zip(&self.weights).zip(products);
        for ((token, weight), product) in slots() {
            means[token] += weight * f64::from(*product);
        }
        for expert in 0..experts {
            for ((token, weight), product) in
                slots().skip(self.slots.starts[expert] as usize).take(self.slots.of_expert(expert).len())
            {
                out[token * experts + expert] += (weight * (f64::from(*product) - means[token])) as f32;
            }
        }
        Ok(())
    }
}
