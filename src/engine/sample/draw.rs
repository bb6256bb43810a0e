//! One draw.

use super::boundary::{Boundary, BoundarySearch};
use super::candidates::Shortlist;
use super::maxima::{Maxima, largest};
use super::penalties::{Penalties, window};
use super::weights::Weights;
use super::{LogitBias, Sampling};
use crate::backend::logits::Candidates;
use crate::error::{Error, Result, Status};
use crate::memory::Buffer;
use crate::random::uniform;

/// What a token is drawn from.
#[derive(Clone, Copy)]
pub struct Draw<'a> {
    /// `[vocab_size]`; `draw_among` looks at none of them.
    pub logits: &'a [f32],
    /// The tokens held so far, the last of which the penalties look at.
    pub tokens: &'a [u32],
    /// Picks the random number: the position since the beginning, so that it does not depend on how a session came
    /// there.
    pub counter: u64,
    /// Added to the logits.
    pub bias: &'a LogitBias,
    /// The tokens a grammar allows, a bit for each, 32 in a word, lowest bit first; none allows all.
    pub allowed: Option<&'a [u32]>,
}

/// Scratch for drawing, sized for a vocabulary once.
pub struct Sampler {
    /// `[vocab_size]`: logits after bias, penalties and mask.
    changed: Buffer<f32>,
    maxima: Maxima,
    weights: Weights,
    penalties: Penalties,
    search: BoundarySearch,
    shortlist: Shortlist,
}

impl Sampler {
    /// Scratch for `vocab_size` tokens; `draw` allocates nothing. Fails with OutOfMemory.
    pub fn new(vocab_size: usize) -> Result<Self> {
        Ok(Sampler {
            changed: Buffer::zeroed("a sampler", vocab_size)?,
            maxima: Maxima::new(vocab_size)?,
            weights: Weights::new(vocab_size)?,
            penalties: Penalties::new(vocab_size)?,
            search: BoundarySearch::new(vocab_size)?,
            shortlist: Shortlist::new()?,
        })
    }

    /// Draws a token with settings that were checked, in the module's order.
    ///
    /// Equal arguments give equal tokens on every system. Fails with NotANumber, whose key says whether the model
    /// (`logits`), the `logit_bias` or the `grammar` left no finite number to choose from, and with InvalidArgument
    /// when `logits` or `allowed` are not of the vocabulary's size.
    pub fn draw(&mut self, sampling: &Sampling, draw: Draw) -> Result<u32> {
        self.check(&draw)?;
        let penalizes = sampling.penalizes() && !draw.tokens.is_empty();
        let logits = if penalizes || !draw.bias.is_empty() || draw.allowed.is_some() {
            self.changed.copy_from_slice(draw.logits);
            draw.bias.apply(&mut self.changed);
            if penalizes {
                self.penalties.apply(&mut self.changed, draw.tokens, sampling);
            }
            if let Some(allowed) = draw.allowed {
                mask(&mut self.changed, allowed);
            }
            &self.changed[..]
        } else {
            draw.logits
        };
        let best = self.maxima.fill(logits).ok_or_else(|| nothing_to_choose(&draw))?;
        if sampling.temperature == 0.0 {
            return Ok(best.token);
        }

        let mut kept = Boundary::ALL;
        if sampling.top_k > 0 && (sampling.top_k as usize) < logits.len() {
            let floor = self.maxima.reached_by(sampling.top_k as usize).unwrap_or(f32::MIN);
            let count = f64::from(sampling.top_k);
            kept = self.search.find(logits, self.maxima.each(), kept, floor, count, |_| 1.0);
        }
        if sampling.top_p > 0.0 && sampling.top_p < 1.0 {
            let total = self.weights.fill(logits, self.maxima.each(), kept, best.logit, 1.0);
            // All tokens below a weight of `rest / vocab_size` together weigh less than the rest that may be left out;
            // half of it leaves room for rounding.
            let top_p = f64::from(sampling.top_p);
            let least = (1.0 - top_p) * total / logits.len() as f64 / 2.0;
            let floor = best.logit + libm::logf(least as f32);
            let weight = |token| self.weights.of(token);
            kept = self.search.find(logits, self.maxima.each(), kept, floor, top_p * total, weight);
        }
        if sampling.min_p > 0.0 {
            let lowest = best.logit + libm::logf(sampling.min_p);
            if lowest > kept.logit {
                kept = Boundary { logit: lowest, token: u32::MAX };
            }
        }
        let total = self.weights.fill(logits, self.maxima.each(), kept, best.logit, sampling.temperature);
        let drawn = self.weights.find(uniform(sampling.seed, draw.counter) * total);
        Ok(drawn.map_or(best.token, |token| token as u32))
    }

    /// As `draw`, from the largest of the logits alone: the token that `draw` would give, or none where that takes all logits,
    /// an error of `draw` included.
    pub fn draw_among(&mut self, sampling: &Sampling, candidates: &Candidates, draw: &Draw) -> Option<u32> {
        self.shortlist.fill(candidates);
        let penalizes = sampling.penalizes() && !draw.tokens.is_empty();
        if penalizes || !draw.bias.is_empty() || draw.allowed.is_some() {
            if draw.allowed.is_some_and(|allowed| allowed.len() != self.changed.len().div_ceil(32)) {
                return None;
            }
            let window = if penalizes { window(draw.tokens, sampling) } else { &[] };
            self.penalties.count(window);
            self.shortlist.change(sampling, draw, window, &self.penalties);
            self.penalties.forget(window);
        }
        self.shortlist.draw(sampling, self.changed.len(), || uniform(sampling.seed, draw.counter))
    }

    fn check(&self, draw: &Draw) -> Result<()> {
        let vocab_size = self.changed.len();
        if draw.logits.len() != vocab_size {
            let text = format!("{} logits, the vocabulary has {vocab_size} tokens", draw.logits.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("logits"));
        }
        let words = vocab_size.div_ceil(32);
        match draw.allowed {
            Some(allowed) if allowed.len() != words => {
                let text = format!("a mask of {} words, expected {words} for {vocab_size} tokens", allowed.len());
                Err(Error::new(Status::InvalidArgument, text).at_key("grammar"))
            }
            _ => Ok(()),
        }
    }
}

/// Makes the logits of tokens that are not allowed negative infinity.
fn mask(logits: &mut [f32], allowed: &[u32]) {
    for (logits, word) in logits.chunks_mut(32).zip(allowed) {
        match *word {
            0 => logits.fill(f32::NEG_INFINITY),
            u32::MAX => {}
            word => {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    if word >> bit & 1 == 0 {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// Why no token could be chosen: who took the last one away.
fn nothing_to_choose(draw: &Draw) -> Error {
    let (key, text) = if !largest(draw.logits).is_finite() {
        ("logits", "the model's logits have no finite maximum to choose from")
    } else if draw.allowed.is_some_and(|allowed| allowed.iter().all(|word| *word == 0)) {
        ("grammar", "the grammar allows no token")
    } else if draw.allowed.is_some() {
        ("grammar", "none of the tokens the grammar allows has a finite logit after logit bias and penalties")
    } else {
        ("logit_bias", "logit bias and penalties leave no finite logit to choose from")
    };
    Error::new(Status::NotANumber, text).at_key(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GREEDY: f32 = 0.0;

    /// A draw from logits alone.
    fn plain(logits: &[f32], counter: u64) -> Draw<'_> {
        static NONE: std::sync::OnceLock<LogitBias> = std::sync::OnceLock::new();
        Draw { logits, tokens: &[], counter, bias: NONE.get_or_init(LogitBias::default), allowed: None }
    }

    /// Shares of tokens drawn at many positions.
    fn shares(sampling: Sampling, draw: Draw) -> Vec<f64> {
        let mut sampler = Sampler::new(draw.logits.len()).unwrap();
        let mut counts = vec![0.0; draw.logits.len()];
        const DRAWS: u64 = 20_000;
        for counter in 0..DRAWS {
            counts[sampler.draw(&sampling, Draw { counter, ..draw }).unwrap() as usize] += 1.0 / DRAWS as f64;
        }
        counts
    }

    /// The tokens that are ever drawn at temperature 1.
    fn drawn(sampling: Sampling, draw: Draw) -> Vec<usize> {
        let sampling = Sampling { temperature: 1.0, ..sampling };
        shares(sampling, draw).iter().enumerate().filter(|(_, share)| **share > 0.0).map(|(token, _)| token).collect()
    }

    /// The token a greedy draw takes.
    fn greedy(sampling: Sampling, draw: Draw) -> u32 {
        let sampling = Sampling { temperature: GREEDY, ..sampling };
        Sampler::new(draw.logits.len()).unwrap().draw(&sampling, draw).unwrap()
    }

    #[test]
    fn shares_follow_the_tempered_probabilities() {
        let logits = [1.0, 2.0, 0.0, -1.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            let weights: Vec<f64> = logits.iter().map(|l| (*l as f64 / temperature as f64).exp()).collect();
            let total: f64 = weights.iter().sum();
            let found = shares(Sampling { temperature, seed: 7, ..Default::default() }, plain(&logits, 0));
            for (weight, share) in weights.iter().zip(found) {
                assert!((weight / total - share).abs() < 0.015);
            }
        }
    }

    /// Probabilities 0.1, 0.4, 0.2, 0.3.
    fn four() -> [f32; 4] {
        [0.1, 0.4, 0.2, 0.3].map(f32::ln)
    }

    #[test]
    fn filters_keep_exactly_what_they_say() {
        let logits = four();
        let kept = |sampling: Sampling| drawn(sampling, plain(&logits, 0));
        assert_eq!(kept(Sampling { top_k: 2, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling { top_p: 0.65, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling { top_p: 0.75, ..Default::default() }), [1, 2, 3]);
        assert_eq!(kept(Sampling { min_p: 0.6, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling { top_k: 3, top_p: 0.5, ..Default::default() }), [1, 3]);
        assert_eq!(kept(Sampling::default()), [0, 1, 2, 3]);
    }

    #[test]
    fn the_bias_comes_before_the_repetition_penalty() {
        // -1 + 2 = 1, halved 0.5; the other way round -1 * 2 + 2 = 0.
        let bias = LogitBias::new(&[(0, 2.0)], 2).unwrap();
        let draw = Draw { tokens: &[0], bias: &bias, ..plain(&[-1.0, 0.25], 0) };
        assert_eq!(greedy(Sampling { repetition_penalty: 2.0, ..Default::default() }, draw), 0);
    }

    #[test]
    fn the_repetition_penalty_comes_before_what_is_subtracted() {
        // 1 / 2 - 0.8 = -0.3; the other way round (1 - 0.8) / 2 = 0.1. The two that subtract have no order to see.
        let draw = Draw { tokens: &[0], ..plain(&[1.0, 0.0], 0) };
        let repetition = Sampling { repetition_penalty: 2.0, ..Default::default() };
        assert_eq!(greedy(Sampling { frequency_penalty: 0.8, ..repetition }, draw), 1);
        assert_eq!(greedy(Sampling { presence_penalty: 0.8, ..repetition }, draw), 1);
    }

    #[test]
    fn penalties_count_what_they_say_in_the_window_they_are_given() {
        let logits = [2.0, 0.9, 0.0];
        let tokens = [0, 0, 0, 1];
        let at = |sampling: Sampling| greedy(sampling, Draw { tokens: &tokens, ..plain(&logits, 0) });
        // Token 0 loses 3 * 0.5, token 1 0.5: 0.5 against 0.4.
        assert_eq!(at(Sampling { frequency_penalty: 0.5, ..Default::default() }), 0);
        // 0.2 against 0.3.
        assert_eq!(at(Sampling { frequency_penalty: 0.6, ..Default::default() }), 1);
        // Each loses 2, however often it is there.
        assert_eq!(at(Sampling { presence_penalty: 2.0, ..Default::default() }), 0);
        // Only token 1 is in the window.
        assert_eq!(at(Sampling { frequency_penalty: 0.6, penalty_window: 1, ..Default::default() }), 0);
        assert_eq!(at(Sampling { frequency_penalty: 0.6, penalty_window: 3, ..Default::default() }), 0);
        // Token 0 at 2 / 4; token 1 at 0.9 / 4; token 2 untouched at 0.
        assert_eq!(at(Sampling { repetition_penalty: 4.0, ..Default::default() }), 0);
    }

    #[test]
    fn the_mask_comes_before_top_k() {
        let logits = four();
        let draw = Draw { allowed: Some(&[0b1001]), ..plain(&logits, 0) };
        assert_eq!(drawn(Sampling { top_k: 1, ..Default::default() }, draw), [3]);
        assert_eq!(greedy(Sampling::default(), draw), 3);
    }

    #[test]
    fn top_k_comes_before_top_p() {
        // Of two, the first has 0.4 / 0.7 = 0.57; of all it has 0.4, and a second is needed.
        let sampling = Sampling { top_k: 2, top_p: 0.55, ..Default::default() };
        assert_eq!(drawn(sampling, plain(&four(), 0)), [1]);
    }

    #[test]
    fn top_p_comes_before_min_p() {
        // Of all, two are needed for 0.55; of those min_p keeps, one would do.
        let sampling = Sampling { top_p: 0.55, min_p: 0.6, ..Default::default() };
        assert_eq!(drawn(sampling, plain(&four(), 0)), [1, 3]);
    }

    #[test]
    fn the_filters_come_before_the_temperature() {
        let logits = four();
        for sampling in [Sampling { min_p: 0.9, ..Default::default() }, Sampling { top_p: 0.39, ..Default::default() }]
        {
            let hot = Sampling { temperature: 10.0, ..sampling };
            assert!(shares(hot, plain(&logits, 0))[1] > 0.99, "{sampling:?}");
        }
    }

    #[test]
    fn a_token_that_is_forbidden_is_never_drawn() {
        let logits = [9.0, 1.0, 2.0, 8.0];
        let bias = LogitBias::new(&[(0, f32::NEG_INFINITY)], 4).unwrap();
        let draw = Draw { bias: &bias, ..plain(&logits, 0) };
        assert_eq!(greedy(Sampling::default(), draw), 3);
        assert_eq!(drawn(Sampling { temperature: 50.0, ..Default::default() }, draw), [1, 2, 3]);
        let draw = Draw { allowed: Some(&[0b0110]), ..plain(&logits, 0) };
        assert_eq!(greedy(Sampling::default(), draw), 2);
        assert_eq!(drawn(Sampling::default(), draw), [1, 2]);
    }

    #[test]
    fn an_error_says_who_left_nothing_to_choose() {
        let forbid_all: Vec<(u32, f32)> = (0..4).map(|token| (token, f32::NEG_INFINITY)).collect();
        let forbid_all = LogitBias::new(&forbid_all, 4).unwrap();
        let forbid_first = LogitBias::new(&[(0, f32::NEG_INFINITY)], 4).unwrap();
        let logits = [1.0, 3.0, 3.0, f32::NAN];
        let cases = [
            (plain(&[f32::NAN; 4], 0), "logits", "model"),
            (plain(&[f32::NEG_INFINITY; 4], 0), "logits", "model"),
            (plain(&[f32::INFINITY; 4], 0), "logits", "model"),
            (Draw { allowed: Some(&[0]), ..plain(&logits, 0) }, "grammar", "allows no token"),
            (Draw { allowed: Some(&[0b1000]), ..plain(&logits, 0) }, "grammar", "none of the tokens"),
            (Draw { allowed: Some(&[1]), bias: &forbid_first, ..plain(&logits, 0) }, "grammar", "none of the tokens"),
            (Draw { bias: &forbid_all, ..plain(&logits, 0) }, "logit_bias", "logit bias"),
        ];
        for (draw, key, part) in cases {
            for temperature in [GREEDY, 1.0] {
                let sampling = Sampling { temperature, ..Default::default() };
                let error = Sampler::new(4).unwrap().draw(&sampling, draw).unwrap_err();
                assert_eq!((error.status(), error.key()), (Status::NotANumber, Some(key)));
                assert!(error.to_string().contains(part), "{error}");
            }
        }
    }

    #[test]
    fn a_mask_or_logits_of_another_vocabulary_are_refused() {
        let mut sampler = Sampler::new(33).unwrap();
        let logits = [0.0; 33];
        for draw in [
            Draw { allowed: Some(&[1]), ..plain(&logits, 0) },
            Draw { allowed: Some(&[1; 3]), ..plain(&logits, 0) },
            plain(&logits[1..], 0),
        ] {
            let error = sampler.draw(&Sampling::default(), draw).unwrap_err();
            assert_eq!(error.status(), Status::InvalidArgument);
        }
    }

    #[test]
    fn greedy_takes_the_lowest_id_among_equals_and_survives_nan() {
        assert_eq!(greedy(Sampling::default(), plain(&[1.0, 3.0, 3.0, f32::NAN], 0)), 1);
        assert_eq!(greedy(Sampling::default(), plain(&[-0.0, 0.0], 0)), 0);
    }

    #[test]
    fn nucleus_sampling_of_a_flat_vocabulary_keeps_its_share() {
        let logits = vec![0.0; 10_000];
        let mut sampler = Sampler::new(logits.len()).unwrap();
        let sampling = Sampling { temperature: 1.0, top_p: 0.5, ..Default::default() };
        let largest = (0..2000).map(|at| sampler.draw(&sampling, plain(&logits, at)).unwrap()).max().unwrap();
        assert!((4_900..5_000).contains(&largest), "{largest}");
    }

    #[test]
    fn one_counter_gives_one_token_whatever_was_drawn_before() {
        let logits: Vec<f32> = (0..500).map(|i| (i * 31 % 97) as f32 / 20.0).collect();
        let sampling = Sampling { temperature: 1.0, frequency_penalty: 0.3, top_p: 0.9, seed: 9, ..Default::default() };
        let tokens = [3, 3, 77];
        let draw = |counter| Draw { tokens: &tokens, ..plain(&logits, counter) };
        let fresh = |counter| Sampler::new(500).unwrap().draw(&sampling, draw(counter)).unwrap();
        let mut used = Sampler::new(500).unwrap();
        let there: Vec<u32> = (0..50).map(|counter| used.draw(&sampling, draw(counter)).unwrap()).collect();
        let mut back: Vec<u32> = (0..50).rev().map(|counter| used.draw(&sampling, draw(counter)).unwrap()).collect();
        back.reverse();
        assert_eq!(there, back);
        assert!((0..50).all(|counter| fresh(counter) == there[counter as usize]));
        assert!(there.iter().collect::<std::collections::HashSet<_>>().len() > 10);
    }

    /// Not a check: prints what a draw takes. `cargo test --release --lib timings -- --ignored --nocapture`.
    #[test]
    #[ignore = "prints timings"]
    fn timings_of_a_draw_at_a_large_vocabulary() {
        const VOCAB: usize = 256_000;
        let mut random = crate::text::samples::Random::new(1);
        let normal: Vec<f32> = (0..VOCAB)
            .map(|_| (0..12).map(|_| random.below(1 << 16) as f32 / 65536.0).sum::<f32>() * 3.0 - 24.0)
            .collect();
        let flat = vec![1.0; VOCAB];
        let tokens: Vec<u32> = (0..8192).map(|i| i * 31 % VOCAB as u32).collect();
        let bias = LogitBias::new(&[(5, 1.0), (90_000, -3.0)], VOCAB).unwrap();
        let mask: Vec<u32> = (0..VOCAB / 32).map(|i| if i % 3 == 0 { 0x0f0f_1234 } else { u32::MAX }).collect();
        let warm = Sampling { temperature: 0.8, ..Default::default() };
        let cases = [
            ("greedy", Sampling::default()),
            ("temperature", warm),
            ("top_k 40", Sampling { top_k: 40, ..warm }),
            ("top_k 128,000", Sampling { top_k: 128_000, ..warm }),
            ("top_p 0.95", Sampling { top_p: 0.95, ..warm }),
            ("min_p 0.05", Sampling { min_p: 0.05, ..warm }),
            ("all filters", Sampling { top_k: 1000, top_p: 0.95, min_p: 0.05, ..warm }),
            (
                "all settings",
                Sampling {
                    top_k: 1000,
                    top_p: 0.95,
                    min_p: 0.05,
                    repetition_penalty: 1.1,
                    frequency_penalty: 0.1,
                    ..warm
                },
            ),
        ];
        let mut sampler = Sampler::new(VOCAB).unwrap();
        for (shape, logits) in [("normal", &normal), ("flat", &flat)] {
            for (name, sampling) in &cases {
                for (with, bias, allowed) in
                    [("", &LogitBias::default(), None), (" bias, mask", &bias, Some(&mask[..]))]
                {
                    let mut times: Vec<f64> = (0..41)
                        .map(|counter| {
                            let draw = Draw { logits, tokens: &tokens, counter, bias, allowed };
                            let started = std::time::Instant::now();
                            sampler.draw(sampling, draw).unwrap();
                            started.elapsed().as_secs_f64() * 1e3
                        })
                        .collect();
                    times.sort_by(f64::total_cmp);
                    println!("{shape:7} {name:14}{with:11} {:.3} ms median, {:.3} ms most", times[20], times[40]);
                }
            }
        }
    }
}
