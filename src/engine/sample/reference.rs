//! The draw against a naive one: whole sorted lists in f64.

use super::*;
use crate::error::Status;
use crate::random::uniform;
use crate::text::samples::Random;

/// What the draws must agree with.
struct Naive {
    /// Kept tokens and their weights, in the order of ids.
    kept: Vec<(u32, f64)>,
    /// Whether rounding may decide what is kept.
    close: bool,
}

/// A difference that f32 may not see.
const CLOSE: f64 = 1e-4;

fn effective(sampling: &Sampling, draw: &Draw) -> Vec<f64> {
    let mut logits: Vec<f64> = draw.logits.iter().map(|logit| f64::from(*logit)).collect();
    for (token, bias) in draw.bias.pairs() {
        logits[*token as usize] += f64::from(*bias);
    }
    let window = match sampling.penalty_window as usize {
        0 => draw.tokens,
        window => &draw.tokens[draw.tokens.len() - window.min(draw.tokens.len())..],
    };
    for (token, logit) in logits.iter_mut().enumerate() {
        let count = window.iter().filter(|held| **held as usize == token).count();
        if count > 0 {
            let repetition = f64::from(sampling.repetition_penalty);
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            *logit -= count as f64 * f64::from(sampling.frequency_penalty);
            *logit -= f64::from(sampling.presence_penalty);
        }
        let allowed = draw.allowed.is_none_or(|mask| mask[token / 32] >> (token % 32) & 1 == 1);
        if !allowed || logit.is_nan() {
            *logit = f64::NEG_INFINITY;
        }
    }
    // One zero, not two.
    logits.iter().map(|logit| logit + 0.0).collect()
}

fn naive(sampling: &Sampling, draw: &Draw) -> Naive {
    let logits = effective(sampling, draw);
    let mut order: Vec<u32> = (0..logits.len() as u32).filter(|token| logits[*token as usize].is_finite()).collect();
    let logit = |token: u32| logits[token as usize];
    order.sort_by(|a, b| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b)));
    let mut close = false;
    if order.is_empty() {
        return Naive { kept: Vec::new(), close };
    }
    let best = logit(order[0]);
    let keep = |order: &mut Vec<u32>, count: usize, close: &mut bool| {
        if count < order.len() {
            let gap = logit(order[count - 1]) - logit(order[count]);
            *close |= gap > 0.0 && gap < CLOSE;
            order.truncate(count);
        }
    };
    if sampling.temperature == 0.0 {
        keep(&mut order, 1, &mut close);
        return Naive { kept: vec![(order[0], 1.0)], close };
    }
    if sampling.top_k > 0 {
        keep(&mut order, sampling.top_k as usize, &mut close);
    }
    if sampling.top_p > 0.0 && sampling.top_p < 1.0 {
        let total: f64 = order.iter().map(|token| (logit(*token) - best).exp()).sum();
        let mut sum = 0.0;
        let reached = order.iter().position(|token| {
            sum += (logit(*token) - best).exp() / total;
            close |= (sum - f64::from(sampling.top_p)).abs() < CLOSE;
            sum >= f64::from(sampling.top_p)
        });
        let count = reached.map_or(order.len(), |last| last + 1);
        keep(&mut order, count, &mut close);
    }
    if sampling.min_p > 0.0 {
        let lowest = best + f64::from(sampling.min_p).ln();
        close |= order.iter().any(|token| logit(*token) != best && (logit(*token) - lowest).abs() < CLOSE);
        order.retain(|token| logit(*token) >= lowest || logit(*token) == best);
    }
    order.sort_unstable();
    let weight = |token: &u32| (*token, ((logit(*token) - best) / f64::from(sampling.temperature)).exp());
    Naive { kept: order.iter().map(weight).collect(), close }
}

/// Whether a random number falls into the token's share, or so near that rounding may decide.
fn may_be_drawn(naive: &Naive, token: u32, number: f64) -> bool {
    let total: f64 = naive.kept.iter().map(|(_, weight)| weight).sum();
    let mut before = 0.0;
    for (kept, weight) in &naive.kept {
        let share = weight / total;
        if *kept == token {
            return (before - 1e-5..=before + share + 1e-5).contains(&number);
        }
        before += share;
    }
    false
}

fn pick<T: Copy>(random: &mut Random, values: &[T]) -> T {
    values[random.below(values.len())]
}

fn number(random: &mut Random, low: f64, high: f64) -> f32 {
    (low + (high - low) * random.below(1 << 20) as f64 / f64::from(1 << 20)) as f32
}

#[test]
fn random_draws_are_those_of_the_naive_sampler() {
    let mut random = Random::new(5);
    let (mut compared, mut skipped) = (0, 0);
    for _ in 0..6000 {
        let vocab_size = pick(&mut random, &[1, 2, 5, 31, 32, 33, 64, 65, 200, 700]);
        let spread = pick(&mut random, &[0.5, 4.0, 30.0]);
        let coarse = random.below(2) == 0;
        let logits: Vec<f32> = (0..vocab_size)
            .map(|_| match random.below(40) {
                0 => pick(&mut random, &[f32::NEG_INFINITY, f32::NAN, 0.0, -0.0]),
                _ if coarse => (number(&mut random, -spread, spread)).round(),
                _ => number(&mut random, -spread, spread),
            })
            .collect();
        let tokens: Vec<u32> = (0..random.below(30)).map(|_| random.below(vocab_size.min(12)) as u32).collect();
        let mut pairs: Vec<(u32, f32)> = Vec::new();
        for token in 0..vocab_size as u32 {
            if random.below(8) == 0 {
                let bias = number(&mut random, -9.0, 9.0);
                pairs.push((token, if random.below(3) == 0 { f32::NEG_INFINITY } else { bias }));
            }
        }
        let bias =
            if random.below(2) == 0 { LogitBias::new(&pairs, vocab_size).unwrap() } else { LogitBias::default() };
        let mask: Vec<u32> = (0..vocab_size.div_ceil(32))
            .map(|_| match random.below(3) {
                0 => 0,
                1 => u32::MAX,
                _ => random.below(1 << 32) as u32,
            })
            .collect();
        let sampling = Sampling {
            temperature: pick(&mut random, &[0.0, 0.3, 1.0, 1.7, 100.0]),
            top_k: if random.below(2) == 0 { random.below(vocab_size + 1) as u32 } else { 0 },
            top_p: if random.below(2) == 0 { number(&mut random, 0.0, 1.0) } else { 1.0 },
            min_p: if random.below(3) == 0 { number(&mut random, 0.0, 1.0) } else { 0.0 },
            repetition_penalty: if random.below(2) == 0 { number(&mut random, 0.1, 3.0) } else { 1.0 },
            presence_penalty: if random.below(2) == 0 { number(&mut random, -2.0, 2.0) } else { 0.0 },
            frequency_penalty: if random.below(2) == 0 { number(&mut random, -2.0, 2.0) } else { 0.0 },
            penalty_window: pick(&mut random, &[0, 1, 5, 1000]),
            seed: random.below(1 << 40) as u64,
        };
        sampling.check(vocab_size).unwrap();
        let allowed = (random.below(2) == 0).then_some(&mask[..]);
        let mut sampler = Sampler::new(vocab_size).unwrap();
        for counter in 0..10 {
            let draw = Draw { logits: &logits, tokens: &tokens, counter, bias: &bias, allowed };
            let naive = naive(&sampling, &draw);
            if naive.close {
                skipped += 1;
                continue;
            }
            compared += 1;
            match sampler.draw(&sampling, draw) {
                Ok(token) => {
                    let number = uniform(sampling.seed, counter);
                    assert!(may_be_drawn(&naive, token, number), "{token} {number} {:?} {sampling:?}", naive.kept);
                    assert_eq!(sampler.draw(&sampling, draw).unwrap(), token);
                }
                Err(error) => {
                    assert_eq!(error.status(), Status::NotANumber);
                    assert!(naive.kept.is_empty(), "{error} {:?}", naive.kept);
                }
            }
        }
    }
    assert!(compared > 4 * skipped, "{compared} {skipped}");
}
