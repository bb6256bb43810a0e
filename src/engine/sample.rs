//! From logits to a token.

use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;

/// How a token is drawn. The filters work in this order on the untempered distribution: `top_k`, `top_p`, `min_p`;
/// then `temperature` shapes what is left, and one token is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most probable token; above, logits are divided by it. At most 100.
    pub temperature: f32,
    /// Keep this many most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest most probable tokens whose probabilities reach this sum; 0 or 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this share as probable as the most probable; 0 keeps all.
    pub min_p: f32,
    /// Starts the random numbers: equal seeds, logits and positions give equal tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Sampling { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl Sampling {
    /// Whether every setting is in its range; the error names the one that is not.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        let fail = |key: &str, found: String, range: &str| {
            Err(Error::new(Status::SamplingValue, format!("{key} is {found}, expected {range}")).at_key(key))
        };
        if !(0.0..=100.0).contains(&self.temperature) {
            return fail("temperature", self.temperature.to_string(), "0 to 100");
        }
        if self.top_k as usize > vocab_size {
            return fail("top_k", self.top_k.to_string(), &format!("0 to the vocabulary's {vocab_size}"));
        }
        if !(0.0..=1.0).contains(&self.top_p) {
            return fail("top_p", self.top_p.to_string(), "0 to 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return fail("min_p", self.min_p.to_string(), "0 to 1");
        }
        Ok(())
    }
}

/// A token that may be drawn.
#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    token: u32,
}

impl Candidate {
    /// Higher logits first, then lower ids.
    fn order(&self, other: &Candidate) -> std::cmp::Ordering {
        other.logit.total_cmp(&self.logit).then(self.token.cmp(&other.token))
    }
}

/// Scratch for drawing, sized for a vocabulary once.
pub struct Sampler {
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// Room for `vocab_size` candidates.
    pub fn new(vocab_size: usize) -> Result<Self> {
        Ok(Sampler { candidates: try_with_capacity("a sampler", vocab_size)? })
    }

    /// Draws the token for position `position` from `logits: [vocab_size]`.
    pub fn draw(&mut self, logits: &[f32], sampling: &Sampling, position: usize) -> Result<u32> {
        let best = best(logits)?;
        if sampling.temperature == 0.0 {
            return Ok(best.token);
        }
        self.candidates.clear();
        let usable = logits.iter().enumerate().filter(|(_, logit)| **logit > f32::NEG_INFINITY);
        self.candidates.extend(usable.map(|(token, logit)| Candidate { logit: *logit, token: token as u32 }));
        let mut sorted = self.candidates.len() == 1;
        if sampling.top_k > 0 && (sampling.top_k as usize) < self.candidates.len() {
            self.keep_best(sampling.top_k as usize);
            sorted = true;
        }
        if sampling.top_p > 0.0 && sampling.top_p < 1.0 {
            self.keep_mass(sampling.top_p as f64, best.logit, sorted);
        }
        if sampling.min_p > 0.0 {
            let lowest = best.logit + sampling.min_p.ln();
            self.candidates.retain(|candidate| candidate.logit >= lowest);
        }
        let weight =
            |candidate: &Candidate| ((candidate.logit - best.logit) as f64 / sampling.temperature as f64).exp();
        let total: f64 = self.candidates.iter().map(weight).sum();
        let mut left = uniform(sampling.seed, position as u64) * total;
        for candidate in &self.candidates {
            left -= weight(candidate);
            if left < 0.0 {
                return Ok(candidate.token);
            }
        }
        // Only rounding leads here: the last candidate's share was all that was left.
        Ok(self.candidates.last().map_or(best.token, |candidate| candidate.token))
    }

    /// Keeps the `count` best candidates, in order.
    fn keep_best(&mut self, count: usize) {
        self.candidates.select_nth_unstable_by(count - 1, Candidate::order);
        self.candidates.truncate(count);
        self.candidates.sort_unstable_by(Candidate::order);
    }

    /// Keeps the fewest best candidates whose probabilities reach `mass`. Sorts only as far as it must.
    fn keep_mass(&mut self, mass: f64, max: f32, mut sorted: bool) {
        let weight = |candidate: &Candidate| ((candidate.logit - max) as f64).exp();
        let total: f64 = self.candidates.iter().map(weight).sum();
        let mut prefix = if sorted { self.candidates.len() } else { 256.min(self.candidates.len()) };
        loop {
            if !sorted {
                if prefix < self.candidates.len() {
                    self.candidates.select_nth_unstable_by(prefix - 1, Candidate::order);
                }
                self.candidates[..prefix].sort_unstable_by(Candidate::order);
            }
            let mut sum = 0.0;
            let reached = self.candidates[..prefix].iter().position(|candidate| {
                sum += weight(candidate);
                sum >= mass * total
            });
            if let Some(last) = reached {
                return self.candidates.truncate(last + 1);
            }
            if prefix == self.candidates.len() {
                return;
            }
            prefix = (prefix * 8).min(self.candidates.len());
            sorted = false;
        }
    }
}

/// The most probable token, the lowest id among equals; an error if no logit is a finite number.
fn best(logits: &[f32]) -> Result<Candidate> {
    let mut best = Candidate { logit: f32::NEG_INFINITY, token: 0 };
    for (token, logit) in logits.iter().enumerate() {
        if *logit > best.logit {
            best = Candidate { logit: *logit, token: token as u32 };
        }
    }
    match best.logit.is_finite() {
        true => Ok(best),
        false => Err(Error::new(Status::NotANumber, "the model's logits hold no finite number to choose from")),
    }
}

/// The `ids.len()` most probable tokens and the natural logarithms of their probabilities, most probable first.
pub fn top_log_probabilities(logits: &[f32], ids: &mut [u32], log_probabilities: &mut [f32]) -> Result<()> {
    let max = best(logits)?.logit;
    let sum: f64 = logits.iter().filter(|logit| !logit.is_nan()).map(|logit| ((logit - max) as f64).exp()).sum();
    let mut candidates = try_with_capacity("candidates", logits.len())?;
    candidates.extend(logits.iter().enumerate().map(|(token, logit)| Candidate {
        logit: if logit.is_nan() { f32::NEG_INFINITY } else { *logit },
        token: token as u32,
    }));
    let count = ids.len().min(candidates.len());
    if count > 0 {
        candidates.select_nth_unstable_by(count - 1, Candidate::order);
        candidates[..count].sort_unstable_by(Candidate::order);
    }
    for (candidate, (id, log_probability)) in candidates.iter().zip(ids.iter_mut().zip(log_probabilities)) {
        *id = candidate.token;
        *log_probability = ((candidate.logit - max) as f64 - sum.ln()) as f32;
    }
    Ok(())
}

/// The natural logarithm of the probability of `token`. Fails with `NotANumber` where no logit is a finite number.
pub fn log_probability(logits: &[f32], token: u32) -> Result<f32> {
    let max = best(logits)?.logit;
    let sum: f64 = logits.iter().filter(|logit| !logit.is_nan()).map(|logit| ((logit - max) as f64).exp()).sum();
    Ok(((logits[token as usize] - max) as f64 - sum.ln()) as f32)
}

/// The random number in [0, 1) of a seed and a counter: SplitMix64's finaliser (Steele, Lea, Flood 2014) over both,
/// so that a position's number does not depend on how the session came there.
fn uniform(seed: u64, counter: u64) -> f64 {
    let mix = |mut z: u64| {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let bits = mix(mix(seed.wrapping_add(GOLDEN)).wrapping_add(counter.wrapping_mul(GOLDEN)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shares of tokens drawn at many positions.
    fn shares(logits: &[f32], sampling: Sampling) -> Vec<f64> {
        let mut sampler = Sampler::new(logits.len()).unwrap();
        let mut counts = vec![0.0; logits.len()];
        const DRAWS: usize = 20_000;
        for position in 0..DRAWS {
            counts[sampler.draw(logits, &sampling, position).unwrap() as usize] += 1.0 / DRAWS as f64;
        }
        counts
    }

    #[test]
    fn shares_follow_the_tempered_probabilities() {
        let logits = [1.0, 2.0, 0.0, -1.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|l| (*l as f64 / temperature as f64).exp()).collect();
            let total: f64 = weights.iter().sum();
            let found = shares(&logits, Sampling { temperature, seed: 7, ..Default::default() });
            for (weight, share) in weights.iter().zip(found) {
                assert!((weight / total - share).abs() < 0.015);
            }
        }
    }

    #[test]
    fn filters_keep_exactly_what_they_say() {
        // Probabilities 0.4, 0.3, 0.2, 0.1.
        let logits = [0.1f32.ln(), 0.4f32.ln(), 0.2f32.ln(), 0.3f32.ln()];
        let kept = |sampling: Sampling| -> Vec<usize> {
            let sampling = Sampling { temperature: 1.0, ..sampling };
            shares(&logits, sampling).iter().enumerate().filter(|(_, s)| **s > 0.0).map(|(i, _)| i).collect()
        };
        assert_eq!(kept(Sampling { top_k: 2, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling { top_p: 0.65, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling { top_p: 0.75, ..Default::default() }), [1, 2, 3]);
        assert_eq!(kept(Sampling { min_p: 0.6, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling { top_k: 3, top_p: 0.5, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling::default()), [0, 1, 2, 3]);
    }

    #[test]
    fn nucleus_sampling_of_a_flat_vocabulary_keeps_its_share() {
        let logits = vec![0.0; 10_000];
        let mut sampler = Sampler::new(logits.len()).unwrap();
        let sampling = Sampling { temperature: 1.0, top_p: 0.5, ..Default::default() };
        for position in 0..200 {
            assert!(sampler.draw(&logits, &sampling, position).unwrap() <= 5_000);
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals_and_survives_nan() {
        let mut sampler = Sampler::new(4).unwrap();
        let greedy = Sampling::default();
        assert_eq!(sampler.draw(&[1.0, 3.0, 3.0, f32::NAN], &greedy, 0).unwrap(), 1);
        for broken in [[f32::NAN; 4], [f32::NEG_INFINITY; 4], [f32::INFINITY; 4]] {
            let status = sampler.draw(&broken, &greedy, 0).unwrap_err().status();
            assert_eq!(status, Status::NotANumber);
        }
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let bad = [
            (Sampling { temperature: f32::NAN, ..Default::default() }, "temperature"),
            (Sampling { temperature: -1.0, ..Default::default() }, "temperature"),
            (Sampling { top_k: 11, ..Default::default() }, "top_k"),
            (Sampling { top_p: 1.5, ..Default::default() }, "top_p"),
            (Sampling { min_p: f32::NAN, ..Default::default() }, "min_p"),
        ];
        for (sampling, key) in bad {
            let error = sampling.check(10).unwrap_err();
            assert_eq!((error.status(), error.key()), (Status::SamplingValue, Some(key)));
        }
    }

    #[test]
    fn log_probabilities_sum_to_one_and_come_sorted() {
        let logits = [0.5, -1.0, 2.0, 0.0];
        let (mut ids, mut logs) = ([0; 4], [0.0; 4]);
        top_log_probabilities(&logits, &mut ids, &mut logs).unwrap();
        assert_eq!(ids, [2, 0, 3, 1]);
        let sum: f32 = logs.iter().map(|log| log.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }
}
