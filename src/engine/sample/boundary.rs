//! Where a filter cuts: tokens stand in one order, higher logits first and lower ids among equals, and every filter
//! keeps a beginning of it.

use super::maxima::{BLOCK, largest};
use crate::error::Result;
use crate::memory::{Buffer, try_vec};

/// The last token that is kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Boundary {
    /// Tokens with more are kept.
    pub logit: f32,
    /// Of tokens with as much, those up to this id are kept.
    pub token: u32,
}

impl Boundary {
    /// Keeps every token whose logit is a number; negative infinity is none.
    pub const ALL: Boundary = Boundary { logit: f32::MIN, token: u32::MAX };

    /// Whether a token is kept.
    #[inline(always)]
    pub fn keeps(&self, logit: f32, token: u32) -> bool {
        (logit > self.logit) | ((logit == self.logit) & (token <= self.token))
    }
}

/// The first round groups logits by their distance from the largest, the others by bits, all of which are then used up.
const ROUNDS: usize = 4;

/// Digits of a round.
const DIGITS: usize = 1 << 11;

/// Parts of a sum.
const LANES: usize = 4;

/// Finds boundaries without sorting: a radix selection.
///
/// Each round adds up the weights of tokens with equal digits and goes on inside the group in which the wanted sum is
/// reached. Weights are added in the order of ids and groups in the order of logits, so the result does not
/// depend on an algorithm of the standard library.
pub struct BoundarySearch {
    /// `[vocab_size]`: tokens of the group, rising.
    group: Buffer<u32>,
    /// `[DIGITS]`: a sum for each digit, in parts: tokens in a row often have one digit, and would wait for each other.
    sums: Vec<[f64; LANES]>,
}

impl BoundarySearch {
    /// For a vocabulary. Fails with OutOfMemory.
    pub fn new(vocab_size: usize) -> Result<BoundarySearch> {
        Ok(BoundarySearch {
            group: Buffer::zeroed("a sampler", vocab_size)?,
            sums: try_vec("a sampler", DIGITS, [0.0; LANES])?,
        })
    }

    /// The first token at which the sum of `weight(token)` over the kept tokens, in order, reaches `target`, a number
    /// above 0; `kept` itself when none does.
    ///
    /// `maxima` are those of the logits. Tokens with logits below `floor` must not be needed to reach the target.
    pub fn find(
        &mut self,
        logits: &[f32],
        maxima: &[f32],
        kept: Boundary,
        floor: f32,
        target: f64,
        weight: impl Fn(u32) -> f64,
    ) -> Boundary {
        let mut length = self.gather(logits, maxima, kept, floor);
        let logit = |token: u32| logits[token as usize];
        let max = largest(maxima);
        let mut left = target;
        let mut narrowed = false;
        for round in 0..ROUNDS {
            let group = &mut self.group[..length];
            if group.iter().all(|token| logit(*token) == logit(group[0])) {
                break;
            }
            self.sums.fill([0.0; LANES]);
            let (quads, rest) = group.as_chunks::<LANES>();
            for tokens in quads {
                for (lane, token) in tokens.iter().enumerate() {
                    self.sums[digit(round, logit(*token), max)][lane] += weight(*token);
                }
            }
            for token in rest {
                self.sums[digit(round, logit(*token), max)][0] += weight(*token);
            }
            let reached = match reach(&self.sums, &mut left) {
                Some(reached) => reached,
                None if !narrowed => return kept,
                None => {
                    // The parts of a group can round below its sum in the round before: its last token is meant.
                    left = f64::INFINITY;
                    self.sums.iter().rposition(|lanes| *lanes != [0.0; LANES]).unwrap_or(0)
                }
            };
            narrowed = true;
            length = 0;
            for index in 0..group.len() {
                let token = group[index];
                group[length] = token;
                length += usize::from(digit(round, logit(token), max) == reached);
            }
        }
        // What is left has one logit.
        let group = &self.group[..length];
        let reached = group.iter().find(|token| {
            left -= weight(**token);
            left <= 0.0
        });
        match reached.or(group.last().filter(|_| narrowed)) {
            Some(last) => Boundary { logit: logit(*last), token: *last },
            None => kept,
        }
    }

    /// Makes the group of all tokens that are kept and reach the floor; returns how many there are.
    fn gather(&mut self, logits: &[f32], maxima: &[f32], kept: Boundary, floor: f32) -> usize {
        let mut length = 0;
        let lowest = kept.logit.max(floor);
        for (block, (logits, maximum)) in logits.chunks(BLOCK).zip(maxima).enumerate() {
            if *maximum < lowest {
                continue;
            }
            for (token, logit) in ((block * BLOCK) as u32..).zip(logits) {
                // There is room: fewer tokens are in the group than were looked at.
                self.group[length] = token;
                length += usize::from((*logit >= floor) & kept.keeps(*logit, token));
            }
        }
        length
    }
}

/// The first group at which the sums reach `left`, from which those before it are taken away.
fn reach(sums: &[[f64; LANES]], left: &mut f64) -> Option<usize> {
    for (index, [a, b, c, d]) in sums.iter().enumerate() {
        let sum = (a + b) + (c + d);
        if sum >= *left {
            return Some(index);
        }
        *left -= sum;
    }
    None
}

/// A number below DIGITS that does not fall as the logit falls.
#[inline(always)]
fn digit(round: usize, logit: f32, max: f32) -> usize {
    // Adding 0 makes the two zeros one.
    let pattern = (logit + 0.0).to_bits();
    let sign = (pattern as i32 >> 31) as u32;
    // Falling in the logit: all bits of a positive number flipped but the sign, the sign alone of a negative one.
    let falling = !(pattern ^ (sign | 0x8000_0000));
    match round {
        // Near the largest, where decisions fall, logits spread over many digits.
        0 => (((max - logit) * 32.0) as usize).min(DIGITS - 1),
        1 => (falling >> 21) as usize,
        2 => (falling >> 10) as usize % DIGITS,
        _ => falling as usize % (DIGITS / 2),
    }
}
