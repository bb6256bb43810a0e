//! The draw against a naive one: whole sorted lists in f64.

use super::candidates::Shortlist;
use super::*;
use crate::backend::cpu::kernels::math::exp;
use crate::backend::logits::Candidates;
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

/// A draw of any kind.
struct Case {
    logits: Vec<f32>,
    tokens: Vec<u32>,
    bias: LogitBias,
    mask: Vec<u32>,
    is_masked: bool,
    sampling: Sampling,
}

impl Case {
    fn random(random: &mut Random) -> Case {
        let vocab_size = pick(random, &[1, 2, 5, 31, 32, 33, 64, 65, 200, 700]);
        let spread = pick(random, &[0.5, 4.0, 30.0]);
        let coarse = random.below(2) == 0;
        let logits: Vec<f32> = (0..vocab_size)
            .map(|_| match random.below(40) {
                0 => pick(random, &[f32::NEG_INFINITY, f32::NAN, 0.0, -0.0]),
                _ if coarse => (number(random, -spread, spread)).round(),
                _ => number(random, -spread, spread),
            })
            .collect();
        let tokens: Vec<u32> = (0..random.below(30)).map(|_| random.below(vocab_size.min(12)) as u32).collect();
        let mut pairs: Vec<(u32, f32)> = Vec::new();
        for token in 0..vocab_size as u32 {
            if random.below(8) == 0 {
                let bias = number(random, -9.0, 9.0);
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
            temperature: pick(random, &[0.0, 0.3, 1.0, 1.7, 100.0]),
            top_k: if random.below(2) == 0 { random.below(vocab_size + 1) as u32 } else { 0 },
            top_p: if random.below(2) == 0 { number(random, 0.0, 1.0) } else { 1.0 },
            min_p: if random.below(3) == 0 { number(random, 0.0, 1.0) } else { 0.0 },
            repetition_penalty: if random.below(2) == 0 { number(random, 0.1, 3.0) } else { 1.0 },
            presence_penalty: if random.below(2) == 0 { number(random, -2.0, 2.0) } else { 0.0 },
            frequency_penalty: if random.below(2) == 0 { number(random, -2.0, 2.0) } else { 0.0 },
            penalty_window: pick(random, &[0, 1, 5, 1000]),
            seed: random.below(1 << 40) as u64,
        };
        sampling.check(vocab_size).unwrap();
        Case { logits, tokens, bias, mask, is_masked: random.below(2) == 0, sampling }
    }

    fn draw(&self, counter: u64) -> Draw<'_> {
        let Case { logits, tokens, bias, .. } = self;
        Draw { logits, tokens, counter, bias, allowed: self.is_masked.then_some(&self.mask[..]) }
    }

    /// Without bias, penalties and mask.
    fn unchanged(mut self) -> Case {
        let Sampling { temperature, top_k, top_p, min_p, seed, .. } = self.sampling;
        self.sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Default::default() };
        Case { bias: LogitBias::default(), is_masked: false, ..self }
    }
}

#[test]
fn random_draws_are_those_of_the_naive_sampler() {
    let mut random = Random::new(5);
    let (mut compared, mut skipped) = (0, 0);
    for _ in 0..6000 {
        let case = Case::random(&mut random);
        let sampling = &case.sampling;
        let mut sampler = Sampler::new(case.logits.len()).unwrap();
        for counter in 0..10 {
            let draw = case.draw(counter);
            let naive = naive(sampling, &draw);
            if naive.close {
                skipped += 1;
                continue;
            }
            compared += 1;
            match sampler.draw(sampling, draw) {
                Ok(token) => {
                    let number = uniform(sampling.seed, counter);
                    assert!(may_be_drawn(&naive, token, number), "{token} {number} {:?} {sampling:?}", naive.kept);
                    assert_eq!(sampler.draw(sampling, draw).unwrap(), token);
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

/// What a device finds of logits.
struct Found {
    tokens: Vec<u32>,
    logits: Vec<f32>,
    total: f64,
    are_all: bool,
}

impl Found {
    /// The first `count` of them; the total added in an order of its own.
    fn of(logits: &[f32], count: usize) -> Found {
        let mut tokens: Vec<u32> = (0..logits.len() as u32).collect();
        tokens.retain(|token| logits[*token as usize] > f32::NEG_INFINITY);
        let logit = |token: &u32| logits[*token as usize] + 0.0;
        tokens.sort_by(|a, b| logit(b).total_cmp(&logit(a)).then(a.cmp(b)));
        let largest = tokens.first().map_or(0.0, logit);
        let weights = logits.iter().filter(|logit| !logit.is_nan()).map(|logit| f64::from(exp(*logit - largest)));
        let total = weights.rev().sum();
        let are_all = tokens.len() <= count;
        tokens.truncate(count);
        Found { logits: tokens.iter().map(logit).collect(), tokens, total, are_all }
    }

    fn candidates(&self) -> Candidates<'_> {
        let Found { tokens, logits, total, are_all } = self;
        Candidates { tokens, logits, total: *total, are_all: *are_all }
    }
}

/// Draws both ways, among candidates and among all; answers whether the candidates sufficed.
fn agree(case: &Case, found: &Found, sampler: &mut Sampler, counter: u64) -> bool {
    let draw = case.draw(counter);
    let among = sampler.draw_among(&case.sampling, &found.candidates(), &Draw { logits: &[], ..draw });
    let all = sampler.draw(&case.sampling, draw);
    if let Some(token) = among {
        assert_eq!(all, Ok(token), "of {} candidates, {:?}", found.tokens.len(), case.sampling);
    }
    among.is_some()
}

#[test]
fn a_draw_among_candidates_gives_the_token_of_a_draw_among_all() {
    let mut random = Random::new(6);
    let (mut decided, mut drawn) = (0, 0);
    for _ in 0..10_000 {
        let case = Case::random(&mut random);
        let found = Found::of(&case.logits, pick(&mut random, &[1, 2, 5, 30, 100, 256]));
        let mut sampler = Sampler::new(case.logits.len()).unwrap();
        let count = (0..10).filter(|counter| agree(&case, &found, &mut sampler, *counter)).count();
        decided += count;
        drawn += 10;
    }
    assert!(decided > drawn / 3, "{decided} of {drawn} draws took candidates alone");
}

#[test]
fn candidates_suffice_exactly_where_what_is_kept_ends_among_them() {
    let mut random = Random::new(7);
    let mut counts = [0; 2];
    for _ in 0..10_000 {
        let case = Case::random(&mut random).unchanged();
        let found = Found::of(&case.logits, pick(&mut random, &[1, 2, 5, 30, 100, 256]));
        let Sampling { temperature, top_k, top_p, .. } = case.sampling;
        let naive = naive(&case.sampling, &case.draw(0));
        let largest = found.logits.first().copied().unwrap_or(f32::NAN);
        if naive.close || naive.kept.is_empty() {
            continue;
        }
        let has_weight = |token: u32| exp((case.logits[token as usize] - largest) / temperature) > 0.0;
        // Whether more than these are kept nobody knows who sees the candidates alone.
        let weighty = naive.kept.iter().filter(|(token, _)| has_weight(*token)).count();
        if weighty == found.tokens.len() && !found.are_all {
            continue;
        }
        let ends = temperature == 0.0
            || naive.kept.iter().all(|(token, _)| found.tokens.contains(token) || !has_weight(*token));
        // Of more than the candidates the sum is not known.
        let is_summed = top_p == 0.0
            || top_p == 1.0
            || temperature == 0.0
            || found.are_all
            || top_k as usize <= found.tokens.len()
            || top_k as usize == case.logits.len();
        let mut sampler = Sampler::new(case.logits.len()).unwrap();
        assert_eq!(agree(&case, &found, &mut sampler, 0), ends && is_summed, "{:?}", case.sampling);
        counts[usize::from(ends && is_summed)] += 1;
    }
    assert!(counts.iter().all(|count| *count > 1000), "{counts:?}");
}

#[test]
fn the_usual_settings_need_no_more_than_candidates() {
    const VOCAB: usize = 30_000;
    let mut random = Random::new(8);
    // A few tokens stand out, as after most words of a text.
    let logits: Vec<f32> = (0..VOCAB)
        .map(|_| (0..12).map(|_| number(&mut random, 0.0, 1.0)).sum::<f32>() * 3.0 - 24.0)
        .enumerate()
        .map(|(token, logit)| if token % 997 == 3 { logit + 11.0 } else { logit })
        .collect();
    let found = Found::of(&logits, 256);
    let warm = Sampling { temperature: 0.8, seed: 3, ..Default::default() };
    let penalized = Sampling { repetition_penalty: 1.1, frequency_penalty: 0.2, ..warm };
    let usual = [
        Sampling::default(),
        Sampling { top_k: 40, ..warm },
        Sampling { top_p: 0.9, ..warm },
        Sampling { min_p: 0.05, ..warm },
        Sampling { top_k: 64, top_p: 0.95, min_p: 0.01, ..warm },
        Sampling { temperature: 0.05, ..warm },
        Sampling { top_k: 40, top_p: 0.95, ..penalized },
        Sampling { temperature: 0.0, ..penalized },
    ];
    let mut sampler = Sampler::new(VOCAB).unwrap();
    for sampling in usual {
        let tokens = found.tokens[..50].to_vec();
        let case = Case {
            logits: logits.clone(),
            tokens,
            bias: LogitBias::new(&[(5, 1.0), (3, -2.0)], VOCAB).unwrap(),
            mask: Vec::new(),
            is_masked: false,
            sampling,
        };
        let case = if sampling.penalizes() { case } else { case.unchanged() };
        assert!((0..200).all(|counter| agree(&case, &found, &mut sampler, counter)), "{sampling:?}");
    }
    // The temperature alone keeps all tokens.
    let case = Case { sampling: warm, ..Case::random(&mut random).unchanged() };
    assert!(!agree(&Case { logits, ..case }, &found, &mut sampler, 0));
}

#[test]
fn a_decision_that_rounding_may_change_is_left_to_all_logits() {
    // Half of four equal weights is two of them, to the last bit; the first share of two ends at a half.
    let logits = vec![0.0; 4];
    let found = Found::of(&logits, 3);
    let mut sampler = Sampler::new(4).unwrap();
    let bias = LogitBias::default();
    let draw = Draw { logits: &[], tokens: &[], counter: 0, bias: &bias, allowed: None };
    let sampling = |top_p| Sampling { temperature: 1.0, top_p, ..Default::default() };
    assert_eq!(sampler.draw_among(&sampling(0.5), &found.candidates(), &draw), None);
    assert!(sampler.draw_among(&sampling(0.6), &found.candidates(), &draw).is_some());
    // The fourth is as good as the last of three.
    let equals = Sampling { min_p: 1.0, ..sampling(1.0) };
    assert_eq!(sampler.draw_among(&equals, &found.candidates(), &draw), None);
    let mut shortlist = Shortlist::new().unwrap();
    let mut drawn = |number| {
        shortlist.fill(&found.candidates());
        shortlist.draw(&Sampling { temperature: 1.0, top_k: 2, ..Default::default() }, 4, || number)
    };
    let drawn = [0.0, 0.5 - 1e-12, 0.5, 0.5 + 1e-12, 1.0 - f64::EPSILON].map(&mut drawn);
    assert_eq!(drawn, [Some(0), Some(0), None, Some(1), None]);
}
