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
        let skipped = match sampling.penalty_window as usize {
            0 => 0,
            window => tokens.len().saturating_sub(window),
        };
        let window = &tokens[skipped..];
        for token in window {
            if let Some(count) = self.counts.get_mut(*token as usize) {
                *count += 1;
            }
        }
        for token in window {
            let Some(count) = self.counts.get_mut(*token as usize) else { continue };
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            match std::mem::take(count) {
                0 => {}
                count => *logit = penalized(*logit, count, sampling),
            }
        }
    }
}

/// The logit of a token that is `count` times in the window.
fn penalized(logit: f32, count: u32, sampling: &Sampling) -> f32 {
    let repetition = sampling.repetition_penalty;
    let logit = if logit > 0.0 { logit / repetition } else { logit * repetition };
    logit - count as f32 * sampling.frequency_penalty - sampling.presence_penalty
}
