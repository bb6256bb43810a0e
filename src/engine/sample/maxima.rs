//! The largest logit of every block of tokens: it says which blocks a draw need not look into.

use crate::error::Result;
use crate::memory::Buffer;

/// Tokens that are looked at, or left out, together.
pub const BLOCK: usize = 64;

/// The largest logits.
pub struct Maxima {
    /// `[vocab_size / BLOCK]`, rounded up.
    each: Buffer<f32>,
    sorted: Buffer<f32>,
}

/// A token and its logit.
#[derive(Clone, Copy)]
pub struct Best {
    /// Its logit.
    pub logit: f32,
    /// Its id.
    pub token: u32,
}

impl Maxima {
    /// For a vocabulary. Fails with OutOfMemory.
    pub fn new(vocab_size: usize) -> Result<Maxima> {
        let blocks = vocab_size.div_ceil(BLOCK);
        Ok(Maxima { each: Buffer::zeroed("a sampler", blocks)?, sorted: Buffer::zeroed("a sampler", blocks)? })
    }

    /// Looks at `logits: [vocab_size]`; returns the best token, the lowest id among equals, unless the largest logit is
    /// not a finite number.
    pub fn fill(&mut self, logits: &[f32]) -> Option<Best> {
        for (block, maximum) in logits.chunks(BLOCK).zip(self.each.iter_mut()) {
            *maximum = largest(block);
        }
        let logit = largest(&self.each);
        let block = self.each.iter().position(|maximum| *maximum == logit)?;
        let within = logits.chunks(BLOCK).nth(block)?.iter().position(|other| *other == logit)?;
        logit.is_finite().then_some(Best { logit, token: (block * BLOCK + within) as u32 })
    }

    /// The largest logit of each block.
    pub fn each(&self) -> &[f32] {
        &self.each
    }

    /// A number that at least `count` logits reach: the `count`-th largest of the maxima, if there are so many.
    pub fn reached_by(&mut self, count: usize) -> Option<f32> {
        let index = count.checked_sub(1).filter(|index| *index < self.each.len())?;
        self.sorted.copy_from_slice(&self.each);
        let (_, reached, _) = self.sorted.select_nth_unstable_by(index, |a, b| b.total_cmp(a));
        Some(*reached)
    }
}

/// The largest number, or negative infinity; NaN counts as nothing.
pub fn largest(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (lanes, rest) = logits.as_chunks::<16>();
    let mut maxima = [f32::NEG_INFINITY; 16];
    for lane in lanes {
        for (maximum, logit) in maxima.iter_mut().zip(lane) {
            *maximum = larger(*maximum, *logit);
        }
    }
    maxima.iter().chain(rest).fold(f32::NEG_INFINITY, |maximum, logit| larger(maximum, *logit))
}
