//! What a token is drawn from: the first logits, and the sum of all weights.

use crate::Effort;
use crate::arguments::{CANDIDATE_PART, CANDIDATES, CandidateArguments};
use crate::device::{Array, Device};
use crate::math;
use crate::random::Random;

const KEPT: usize = CANDIDATES as usize;
const PART: usize = CANDIDATE_PART as usize;
const NO_TOKEN: u32 = u32::MAX;

/// What the kernels make of one row.
struct Found {
    sums: Vec<f64>,
    tokens: Vec<u32>,
    logits: Vec<f32>,
}

fn find(device: &Device, logits: &[f32], vocab_size: usize) -> Vec<Found> {
    let (rows, parts) = (logits.len() / vocab_size, vocab_size.div_ceil(PART));
    let there = device.array(logits);
    // Each row goes to a place of its own, in another order than they have.
    let copies: Vec<Array<f32>> = (0..rows).map(|_| device.room(vocab_size)).collect();
    let addresses = device.array(&copies.iter().rev().map(Array::address).collect::<Vec<u64>>());
    let of_parts = device.room::<u64>(rows * parts * KEPT);
    let results = device.array(&vec![7u64; rows * (parts + KEPT) + 1]);
    let arguments = CandidateArguments {
        logits: there.pointer(),
        copies: addresses.pointer().cast(),
        of_parts: of_parts.pointer_mut(),
        results: results.pointer_mut(),
        vocab_size: vocab_size as u32,
    };
    device.launch("select_candidates", [parts, rows, 1], &arguments);
    device.launch("merge_candidates", [1 + parts, rows, 1], &arguments);
    for (row, copy) in logits.chunks(vocab_size).zip(copies.iter().rev()) {
        assert!(row.iter().zip(copy.read()).all(|(logit, copy)| logit.to_bits() == copy.to_bits()), "{vocab_size}");
    }
    let (words, past) = (results.read(), rows * (parts + KEPT));
    assert_eq!(words[past..], [7], "past the results");
    let found = words[..past].chunks(parts + KEPT).map(|words| {
        let (sums, words) = words.split_at(parts);
        let halves: Vec<u32> = words.iter().flat_map(|word| [*word as u32, (*word >> 32) as u32]).collect();
        let (tokens, logits) = halves.split_at(KEPT);
        Found {
            sums: sums.iter().map(|sum| f64::from_bits(*sum)).collect(),
            tokens: tokens.to_vec(),
            logits: logits.iter().map(|logit| f32::from_bits(*logit)).collect(),
        }
    });
    found.collect()
}

fn check_row(logits: &[f32], found: &Found) {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.retain(|token| logits[*token as usize] > f32::NEG_INFINITY);
    let logit = |token: u32| logits[token as usize];
    order.sort_by(|a, b| logit(*b).partial_cmp(&logit(*a)).unwrap().then(a.cmp(b)));
    order.truncate(KEPT);
    let largest = order.first().map_or(f32::NEG_INFINITY, |token| logit(*token));
    let (tokens, past) = found.tokens.split_at(order.len());
    assert_eq!(tokens, order, "{} logits", logits.len());
    assert!(past.iter().all(|token| *token == NO_TOKEN));
    let (kept, past) = found.logits.split_at(order.len());
    assert!(order.iter().zip(kept).all(|(token, kept)| logit(*token) == *kept));
    assert!(past.iter().all(|logit| *logit == f32::NEG_INFINITY));
    for (part, sum) in logits.chunks(PART).zip(&found.sums) {
        let known = || part.iter().filter(|logit| !logit.is_nan());
        let (expected, exact): (f64, f64) = match largest.is_finite() {
            // The weights of the processor's sampler, to the bit.
            true => (
                known().map(|logit| f64::from(math::exp(logit - largest))).sum(),
                known().map(|logit| (f64::from(*logit) - f64::from(largest)).exp()).sum(),
            ),
            false => (0.0, 0.0),
        };
        assert!((sum - expected).abs() <= 1e-13 * expected, "{} logits: {sum} for {expected}", logits.len());
        // Differences are rounded to f32 before the exponential, which vanishes below -87.3.
        assert!((sum - exact).abs() <= 1e-5 * exact + 1e-33, "{} logits: {sum} for {exact}", logits.len());
    }
}

/// Rows that are hard in one way each.
fn row(random: &mut Random, vocab_size: usize, kind: usize) -> Vec<f32> {
    let specials = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MAX, f32::MIN, 1e-45, -1e-45];
    let special = |random: &mut Random| specials[random.below(specials.len())];
    let steps = random.below(40) as f32 + 1.0;
    let best = random.below(vocab_size);
    (0..vocab_size)
        .map(|token| match kind {
            0 => random.unit() * 20.0,
            // Ties, of negative numbers and both zeros too.
            1 => (random.unit() * steps).round() / 4.0,
            2 => {
                if random.below(9) == 0 {
                    special(random)
                } else {
                    random.unit()
                }
            }
            3 => special(random),
            4 => 1.5,
            5 => f32::NEG_INFINITY,
            6 => f32::NAN,
            // All candidates in one part, and in one warp's; falling and rising.
            7 => -(token as f32),
            8 => token as f32,
            // A few candidates alone, or one.
            9 => {
                if random.below(vocab_size) < 5 {
                    random.unit()
                } else {
                    f32::NEG_INFINITY
                }
            }
            _ => {
                if token == best {
                    3.0
                } else {
                    f32::NAN
                }
            }
        })
        .collect()
}

const KINDS: usize = 11;

pub fn check_candidates(device: &Device, random: &mut Random, effort: Effort) {
    let more = random.below(3 * PART) + 1;
    let sizes: &[usize] = match effort {
        Effort::Sample => &[97, PART + 1],
        // More parts than the warps that join them, twice.
        Effort::Whole => &[1, 2, 31, 255, 256, 257, PART - 1, PART, PART + 1, 5000, more, 66 * PART + 3],
    };
    for vocab_size in sizes.iter().copied() {
        let kinds: Vec<usize> = match vocab_size > 4 * PART || effort == Effort::Sample {
            true => vec![0, 1 + random.below(KINDS - 1)],
            false => (0..KINDS).collect(),
        };
        let logits: Vec<f32> = kinds.iter().flat_map(|kind| row(random, vocab_size, *kind)).collect();
        for (row, found) in logits.chunks(vocab_size).zip(find(device, &logits, vocab_size)) {
            check_row(row, &found);
        }
    }
    if effort == Effort::Whole {
        // Gemma's.
        let logits = row(random, 256_000, 0);
        check_row(&logits, &find(device, &logits, 256_000)[0]);
    }
}
