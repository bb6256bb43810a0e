//! From router logits to experts: the top k of each token, and each expert's list of tokens.

use super::experts::Slots;
use super::kernels::math::softmax_f64;
use crate::backend::ops::{NO_EXPERT, Routes, count_touched, every_expert};
use crate::error::{Error, Result};
use crate::memory::Buffer;

/// The choices of every token of a batch in every layer, and the current layer's tokens grouped by expert.
///
/// Slots ([`Slots`]) are numbered expert by expert, so that an expert's activations are consecutive rows and its weights are
/// read once per batch.
pub struct Routing {
    experts: usize,
    top_k: usize,
    max_tokens: usize,
    /// `[layers, max_tokens, top_k]`, highest weight first.
    chosen: Buffer<u32>,
    /// As `chosen`.
    weights: Buffer<f32>,
    /// `[max_tokens, top_k]`, the current layer's weights before rounding to f32.
    exact_weights: Buffer<f64>,
    /// `[max_tokens]`, how many of the top_k choices have an expert in the current layer.
    chosen_counts: Buffer<u32>,
    /// `[max_tokens, top_k]`, the slot of each choice in the current layer.
    slots: Buffer<u32>,
    /// `[max_tokens * top_k]`, the token of each slot.
    slot_tokens: Buffer<u32>,
    /// `[experts + 1]`: expert e has the slots `starts[e]..starts[e + 1]`.
    starts: Buffer<u32>,
    /// Experts with at least one slot, `touched_count` of them.
    touched: Buffer<u32>,
    touched_count: usize,
    /// `[experts]` scratch.
    probabilities: Buffer<f64>,
}

impl Routing {
    pub fn new(layers: usize, experts: usize, top_k: usize, max_tokens: usize) -> Result<Self> {
        let what = "expert routes";
        Ok(Routing {
            experts,
            top_k,
            max_tokens,
            chosen: Buffer::zeroed(what, layers * max_tokens * top_k)?,
            weights: Buffer::zeroed(what, layers * max_tokens * top_k)?,
            exact_weights: Buffer::zeroed(what, max_tokens * top_k)?,
            chosen_counts: Buffer::zeroed(what, max_tokens)?,
            slots: Buffer::zeroed(what, max_tokens * top_k)?,
            slot_tokens: Buffer::zeroed(what, max_tokens * top_k)?,
            starts: Buffer::zeroed(what, experts + 1)?,
            touched: Buffer::zeroed(what, experts)?,
            touched_count: 0,
            probabilities: Buffer::zeroed(what, experts)?,
        })
    }

    /// Bytes `new` would take.
    pub fn planned_bytes(layers: usize, experts: usize, top_k: usize, max_tokens: usize) -> Result<usize> {
        let slots = max_tokens.checked_mul(top_k).and_then(|slots| Some((slots, slots.checked_mul(layers)?)));
        let (slots, all) = slots.ok_or_else(|| Error::out_of_memory("expert routes", usize::MAX))?;
        Ok(8 * all + 16 * slots + 4 * max_tokens + 4 * (experts + 1) + 4 * experts + 8 * experts)
    }

    /// Chooses the experts of `token` in `layer` from its router logits `[experts]`, among those whose bit is set in
    /// `allowed`, after `bias` is added.
    ///
    /// Softmax over all allowed experts, the k most probable (the lower index where two are equal), divided by their sum.
    /// In f64, so that the weights sum to 1 closely enough for identical experts to give the dense model's bits.
    pub fn choose(&mut self, layer: usize, token: usize, logits: &[f32], allowed: u64, bias: Option<&[f32]>) {
        let is_allowed = |expert: usize| allowed >> expert & 1 == 1;
        for (expert, (probability, logit)) in self.probabilities.iter_mut().zip(logits).enumerate() {
            let biased = *logit as f64 + bias.map_or(0.0, |bias| bias[expert] as f64);
            *probability = if is_allowed(expert) { biased } else { f64::NEG_INFINITY };
        }
        softmax_f64(&mut self.probabilities);
        let at = (layer * self.max_tokens + token) * self.top_k;
        let mut sum = 0.0;
        for choice in 0..self.top_k {
            let taken = &self.chosen[at..at + choice];
            let mut best: Option<usize> = None;
            for expert in (0..self.experts).filter(|e| is_allowed(*e) && !taken.contains(&(*e as u32))) {
                // Without probabilities (NaN) this takes the first experts left, so that a choice is always made.
                if best.is_none_or(|best| self.probabilities[expert] > self.probabilities[best]) {
                    best = Some(expert);
                }
            }
            let weight = best.map_or(0.0, |best| self.probabilities[best]);
            self.chosen[at + choice] = best.map_or(NO_EXPERT, |best| best as u32);
            self.exact_weights[token * self.top_k + choice] = weight;
            sum += weight;
        }
        self.chosen_counts[token] = self.top_k.min((allowed & every_expert(self.experts)).count_ones() as usize) as u32;
        for choice in 0..self.top_k {
            let weight = &mut self.exact_weights[token * self.top_k + choice];
            *weight /= sum;
            self.weights[at + choice] = *weight as f32;
        }
    }

    /// Sends every token to the only expert, as a dense model does.
    pub fn choose_only_expert(&mut self, layer: usize, tokens: usize) {
        let at = layer * self.max_tokens;
        self.chosen[at..at + tokens].fill(0);
        self.weights[at..at + tokens].fill(1.0);
        self.exact_weights[..tokens].fill(1.0);
        self.chosen_counts[..tokens].fill(1);
    }

    /// Groups the choices of `layer` by expert: count, prefix sum, scatter; tokens of an expert in rising order.
    pub fn group(&mut self, layer: usize, tokens: usize) {
        let at = layer * self.max_tokens * self.top_k;
        let chosen = &self.chosen[at..at + tokens * self.top_k];
        self.starts.fill(0);
        for expert in chosen.iter().filter(|expert| **expert != NO_EXPERT) {
            self.starts[*expert as usize + 1] += 1;
        }
        self.touched_count = 0;
        for expert in 0..self.experts {
            if self.starts[expert + 1] > 0 {
                self.touched[self.touched_count] = expert as u32;
                self.touched_count += 1;
            }
            self.starts[expert + 1] += self.starts[expert];
        }
        // Scattering moves starts[e] to the end of e's slots, which is where e + 1 starts; it is shifted back after.
        for (choice, expert) in chosen.iter().enumerate().filter(|(_, expert)| **expert != NO_EXPERT) {
            let slot = &mut self.starts[*expert as usize];
            self.slots[choice] = *slot;
            self.slot_tokens[*slot as usize] = (choice / self.top_k) as u32;
            *slot += 1;
        }
        for expert in (1..=self.experts).rev() {
            self.starts[expert] = self.starts[expert - 1];
        }
        self.starts[0] = 0;
    }

    /// Experts that have tokens in the current layer.
    fn touched(&self) -> &[u32] {
        &self.touched[..self.touched_count]
    }

    /// The current layer's slots.
    pub fn by_expert(&self) -> Slots<'_> {
        Slots { touched: self.touched(), starts: &self.starts, tokens: self.slot_tokens() }
    }

    /// The token of each slot.
    fn slot_tokens(&self) -> &[u32] {
        &self.slot_tokens[..self.starts[self.experts] as usize]
    }

    /// The (slot, weight) pairs of a token in the current layer, highest weight first.
    pub fn combination(&self, token: usize) -> impl Iterator<Item = (usize, f64)> + Clone {
        let at = token * self.top_k..(token + 1) * self.top_k;
        let slots = self.slots[at.clone()].iter().map(|slot| *slot as usize);
        // Choices without an expert come last, and have no slot.
        slots.zip(self.exact_weights[at].iter().copied()).take(self.chosen_counts[token] as usize)
    }

    /// How many experts have tokens in `layer`.
    pub fn count_touched(&self, layer: usize, tokens: usize) -> usize {
        let at = layer * self.max_tokens * self.top_k;
        count_touched(&self.chosen[at..at + tokens * self.top_k])
    }

    /// What `choose` decided.
    pub fn routes(&self, layer: usize, token: usize) -> Routes<'_> {
        let at = (layer * self.max_tokens + token) * self.top_k;
        Routes { experts: &self.chosen[at..at + self.top_k], weights: &self.weights[at..at + self.top_k] }
    }

    pub fn bytes(&self) -> usize {
        self.chosen.bytes()
            + self.weights.bytes()
            + self.exact_weights.bytes()
            + self.chosen_counts.bytes()
            + self.slots.bytes()
            + self.slot_tokens.bytes()
            + self.starts.bytes()
            + self.touched.bytes()
            + self.probabilities.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_index_and_weights_sum_to_one() {
        let mut routing = Routing::new(1, 4, 3, 1).unwrap();
        routing.choose(0, 0, &[1.0, 2.0, 2.0, 1.0], u64::MAX, None);
        assert_eq!(routing.routes(0, 0).experts, [1, 2, 0]);
        let sum: f64 = routing.exact_weights.iter().sum();
        assert!((sum - 1.0).abs() < 1e-15);
    }

    #[test]
    fn grouping_gives_every_slot_to_its_expert_once() {
        let (experts, top_k, tokens) = (5, 2, 7);
        let mut routing = Routing::new(2, experts, top_k, tokens).unwrap();
        for token in 0..tokens {
            let logits: Vec<f32> = (0..experts).map(|expert| ((expert * 7 + token * 3) % 5) as f32).collect();
            routing.choose(1, token, &logits, u64::MAX, None);
        }
        routing.group(1, tokens);
        let mut seen = vec![0; tokens * top_k];
        for expert in routing.touched().to_vec() {
            for slot in routing.by_expert().of(expert as usize) {
                let token = routing.slot_tokens()[slot] as usize;
                assert!(routing.routes(1, token).experts.contains(&expert));
                seen[slot] += 1;
            }
        }
        assert!(seen.iter().all(|count| *count == 1));
        for token in 0..tokens {
            for ((slot, _), expert) in routing.combination(token).zip(routing.routes(1, token).experts) {
                assert!(routing.by_expert().of(*expert as usize).contains(&slot));
            }
        }
    }

    #[test]
    fn logits_that_are_not_numbers_still_choose_distinct_experts() {
        let mut routing = Routing::new(1, 3, 2, 1).unwrap();
        routing.choose(0, 0, &[f32::NAN; 3], u64::MAX, None);
        assert_eq!(routing.routes(0, 0).experts, [0, 1]);
    }

    #[test]
    fn only_allowed_experts_are_chosen_and_a_bias_counts_before_the_softmax() {
        let mut routing = Routing::new(1, 4, 2, 2).unwrap();
        routing.choose(0, 0, &[3.0, 1.0, 2.0, 0.0], 0b1010, None);
        assert_eq!(routing.routes(0, 0).experts, [1, 3]);
        let expected = 1.0 / (1.0 + (-1f64).exp());
        assert!((routing.routes(0, 0).weights[0] as f64 - expected).abs() < 1e-7);
        routing.choose(0, 1, &[3.0, 1.0, 2.0, 0.0], u64::MAX, Some(&[-9.0, 0.0, 0.0, 4.0]));
        assert_eq!(routing.routes(0, 1).experts, [3, 2]);
        routing.group(0, 2);
        assert_eq!(routing.count_touched(0, 2), 3);
    }

    #[test]
    fn fewer_allowed_experts_than_top_k_share_the_whole_weight() {
        let mut routing = Routing::new(1, 4, 3, 1).unwrap();
        routing.choose(0, 0, &[3.0, 1.0, f32::NAN, 0.0], 0b0010, None);
        assert_eq!(routing.routes(0, 0).experts, [1, NO_EXPERT, NO_EXPERT]);
        assert_eq!(routing.routes(0, 0).weights, [1.0, 0.0, 0.0]);
        routing.group(0, 1);
        assert_eq!(routing.touched(), [1]);
        assert_eq!(routing.combination(0).collect::<Vec<_>>(), [(0, 1.0)]);
    }

    #[test]
    fn the_planned_size_is_the_real_one() {
        for (layers, experts, top_k, tokens) in [(1, 1, 1, 1), (28, 8, 2, 256), (3, 64, 64, 7)] {
            let planned = Routing::planned_bytes(layers, experts, top_k, tokens).unwrap();
            assert_eq!(Routing::new(layers, experts, top_k, tokens).unwrap().bytes(), planned);
        }
    }
}
