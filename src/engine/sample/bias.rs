//! What a host adds to the logits of single tokens.

use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;

/// Numbers added to the logits of some tokens, checked once. The default adds nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogitBias {
    /// Rising by token.
    pairs: Vec<(u32, f32)>,
}

impl LogitBias {
    /// A bias of (token, number) pairs; negative infinity forbids the token.
    ///
    /// Fails with SamplingValue, naming the token, when a token is not below `vocab_size` or is there twice, a number
    /// is NaN or positive infinity, or there are more pairs than tokens; and with OutOfMemory.
    pub fn new(pairs: &[(u32, f32)], vocab_size: usize) -> Result<LogitBias> {
        let refuse = |text: String| Err(Error::new(Status::SamplingValue, text).at_key("logit_bias"));
        LogitBias::check_count(pairs.len(), vocab_size)?;
        for (token, bias) in pairs {
            if *token as usize >= vocab_size {
                return refuse(format!("logit_bias names token {token}, the vocabulary has {vocab_size}"));
            }
            if bias.is_nan() || *bias == f32::INFINITY {
                return refuse(format!("logit_bias of token {token} is {bias}, expected a number or -inf"));
            }
        }
        let mut sorted = try_with_capacity("a logit bias", pairs.len())?;
        sorted.extend_from_slice(pairs);
        sorted.sort_unstable_by_key(|(token, _)| *token);
        if let Some(twice) = sorted.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return refuse(format!("logit_bias names token {} twice", twice[0].0));
        }
        Ok(LogitBias { pairs: sorted })
    }

    /// An error if so many tokens cannot each have one.
    pub fn check_count(count: usize, vocab_size: usize) -> Result<()> {
        if count > vocab_size {
            let text = format!("logit_bias has {count} entries, the vocabulary {vocab_size} tokens");
            return Err(Error::new(Status::SamplingValue, text).at_key("logit_bias"));
        }
        Ok(())
    }

    /// The same again. Fails with OutOfMemory.
    pub fn try_clone(&self) -> Result<LogitBias> {
        let mut pairs = try_with_capacity("a logit bias", self.pairs.len())?;
        pairs.extend_from_slice(&self.pairs);
        Ok(LogitBias { pairs })
    }

    /// The pairs, rising by token.
    pub fn pairs(&self) -> &[(u32, f32)] {
        &self.pairs
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.pairs.is_empty()
    }

    /// What is added to the logit of a token; none where nothing is.
    pub(super) fn of(&self, token: u32) -> Option<f32> {
        let at = self.pairs.binary_search_by_key(&token, |(token, _)| *token).ok()?;
        Some(self.pairs[at].1)
    }

    /// Adds the numbers to `logits: [vocab_size]`.
    pub(super) fn apply(&self, logits: &mut [f32]) {
        for (token, bias) in &self.pairs {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_that_cannot_be_meant_is_refused() {
        let cases: [(&[(u32, f32)], &str); 5] = [
            (&[(4, 0.0)], "token 4"),
            (&[(0, f32::NAN)], "token 0"),
            (&[(1, f32::INFINITY)], "token 1"),
            (&[(2, 1.0), (1, 0.0), (2, 1.0)], "token 2 twice"),
            (&[(0, 0.0); 5], "5 entries"),
        ];
        for (pairs, part) in cases {
            let error = LogitBias::new(pairs, 4).unwrap_err();
            assert_eq!((error.status(), error.key()), (Status::SamplingValue, Some("logit_bias")));
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn a_bias_keeps_its_pairs_in_the_order_of_tokens() {
        let bias = LogitBias::new(&[(3, f32::NEG_INFINITY), (0, -1.5)], 4).unwrap();
        assert_eq!(bias.pairs(), [(0, -1.5), (3, f32::NEG_INFINITY)]);
        assert!(!bias.is_empty() && LogitBias::default().is_empty());
    }
}
