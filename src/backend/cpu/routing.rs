//! From router logits to experts: the top k of each token, and each expert's list of tokens.

use super::kernels::math::softmax_f64;
use crate::backend::ops::Routes;
use crate::error::Result;
use crate::memory::Buffer;

/// The choices of every token of a batch in every layer, and the current layer's tokens grouped by expert.
///
/// A *slot* is one (token, choice) pair. Slots are numbered expert by expert, so that an expert's activations are
/// consecutive rows and its weights are read once per batch.
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
            slots: Buffer::zeroed(what, max_tokens * top_k)?,
            slot_tokens: Buffer::zeroed(what, max_tokens * top_k)?,
            starts: Buffer::zeroed(what, experts + 1)?,
            touched: Buffer::zeroed(what, experts)?,
            touched_count: 0,
            probabilities: Buffer::zeroed(what, experts)?,
        })
    }

    /// Chooses the experts of `token` in `layer` from its router logits `[experts]`.
    ///
    /// Softmax over all experts, the k most probable (the lower index where two are equal), divided by their sum. In
    /// f64, so that the weights sum to 1 closely enough for identical experts to give the dense model's bits.
    pub fn choose(&mut self, layer: usize, token: usize, logits: impl Iterator<Item = f32>) {
        for (probability, logit) in self.probabilities.iter_mut().zip(logits) {
            *probability = logit as f64;
        }
        softmax_f64(&mut self.probabilities);
        let at = (layer * self.max_tokens + token) * self.top_k;
        let mut sum = 0.0;
        for choice in 0..self.top_k {
            let taken = &self.chosen[at..at + choice];
            let mut best: Option<usize> = None;
            for expert in (0..self.experts).filter(|expert| !taken.contains(&(*expert as u32))) {
                // Without probabilities (NaN) this takes the first experts left, so that a choice is always made.
                if best.is_none_or(|best| self.probabilities[expert] > self.probabilities[best]) {
                    best = Some(expert);
                }
            }
            let best = best.unwrap_or(0);
            self.chosen[at + choice] = best as u32;
            self.exact_weights[token * self.top_k + choice] = self.probabilities[best];
            sum += self.probabilities[best];
        }
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
    }

    /// Groups the choices of `layer` by expert: count, prefix sum, scatter; tokens of an expert in rising order.
    pub fn group(&mut self, layer: usize, tokens: usize) {
        let at = layer * self.max_tokens * self.top_k;
        let chosen = &self.chosen[at..at + tokens * self.top_k];
        self.starts.fill(0);
        for expert in chosen {
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
        for (choice, expert) in chosen.iter().enumerate() {
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
    pub fn touched(&self) -> &[u32] {
        &self.touched[..self.touched_count]
    }

    /// The slots of an expert.
    pub fn slots_of(&self, expert: usize) -> std::ops::Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }

    /// The token of each slot.
    pub fn slot_tokens(&self) -> &[u32] {
        &self.slot_tokens
    }

    /// The (slot, weight) pairs of a token in the current layer, highest weight first.
    pub fn combination(&self, token: usize) -> impl Iterator<Item = (usize, f64)> + Clone {
        let at = token * self.top_k..(token + 1) * self.top_k;
        self.slots[at.clone()].iter().map(|slot| *slot as usize).zip(self.exact_weights[at].iter().copied())
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
        routing.choose(0, 0, [1.0, 2.0, 2.0, 1.0].into_iter());
        assert_eq!(routing.routes(0, 0).experts, [1, 2, 0]);
        let sum: f64 = routing.exact_weights.iter().sum();
        assert!((sum - 1.0).abs() < 1e-15);
    }

    #[test]
    fn grouping_gives_every_slot_to_its_expert_once() {
        let (experts, top_k, tokens) = (5, 2, 7);
        let mut routing = Routing::new(2, experts, top_k, tokens).unwrap();
        for token in 0..tokens {
            let logits = (0..experts).map(|expert| ((expert * 7 + token * 3) % 5) as f32);
            routing.choose(1, token, logits);
        }
        routing.group(1, tokens);
        let mut seen = vec![0; tokens * top_k];
        for expert in routing.touched().to_vec() {
            for slot in routing.slots_of(expert as usize) {
                let token = routing.slot_tokens()[slot] as usize;
                assert!(routing.routes(1, token).experts.contains(&expert));
                seen[slot] += 1;
            }
        }
        assert!(seen.iter().all(|count| *count == 1));
        for token in 0..tokens {
            for ((slot, _), expert) in routing.combination(token).zip(routing.routes(1, token).experts) {
                assert!(routing.slots_of(*expert as usize).contains(&slot));
            }
        }
    }

    #[test]
    fn logits_that_are_not_numbers_still_choose_distinct_experts() {
        let mut routing = Routing::new(1, 3, 2, 1).unwrap();
        routing.choose(0, 0, [f32::NAN; 3].into_iter());
        assert_eq!(routing.routes(0, 0).experts, [0, 1]);
    }
}
