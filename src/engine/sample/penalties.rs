//! Penalties for tokens that were there before.

use super::Sampling;
use crate::error::Result;
use crate::memory::Buffer;

/// Scratch for counting tokens.
pub struct Penalties {
    /// `[vocab_size]`, all 0 between calls.
    counts: Buffer<u32>,
}

impl Penalties {
    /// For a vocabulary. Fails with OutOfMemory.
    pub fn new(vocab_size: usize) -> Result<Penalties> {
        Ok(Penalties { counts: Buffer::zeroed("a sampler", vocab_size)? })
    }

    /// Changes `logits: [vocab_size]` for the tokens of the window, the last of `tokens`. Takes time in proportion to
    /// the window.
    pub fn apply(&mut self, logits: &mut [f32], tokens: &[u32], sampling: &Sampling) {
        let window = window(tokens, sampling);
        self.count(window);
        for token in window {
            let Some(count) = self.counts.get_mut(*token as usize) else { continue };
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            match std::mem::take(count) {
                0 => {}
                count => *logit = penalized(*logit, count, sampling),
            }
        }
    }

    /// Counts the tokens of a window. `forget` it before another call.
    pub fn count(&mut self, window: &[u32]) {
        for token in window {
            if let Some(count) = self.counts.get_mut(*token as usize) {
                *count += 1;
            }
        }
    }

    /// How often a token is in the window that was counted.
    pub fn count_of(&self, token: u32) -> u32 {
        self.counts.get(token as usize).copied().unwrap_or(0)
    }

    /// Takes back what `count` did.
    pub fn forget(&mut self, window: &[u32]) {
        for token in window {
            if let Some(count) = self.counts.get_mut(*token as usize) {
                *count = 0;
            }
        }
    }
}

/// The last of the tokens held, at which penalties look.
pub fn window<'a>(tokens: &'a [u32], sampling: &Sampling) -> &'a [u32] {
    match sampling.penalty_window as usize {
        0 => tokens,
        window => &tokens[tokens.len().saturating_sub(window)..],
    }
}

/// The logit of a token that is `count` times in the window.
pub fn penalized(logit: f32, count: u32, sampling: &Sampling) -> f32 {
    let repetition = sampling.repetition_penalty;
    let logit = if logit > 0.0 { logit / repetition } else { logit * repetition };
    logit - count as f32 * sampling.frequency_penalty - sampling.presence_penalty
}
