//! The settings of a draw and their ranges.

use std::ops::RangeInclusive;

use crate::error::{Error, Result, Status};

/// How a token is drawn; the order in which the settings work is that of the module's list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most probable token after bias, penalties and mask, the lowest id among equals; above, logits are
    /// divided by it. At most 100.
    pub temperature: f32,
    /// Keep this many most probable tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the fewest most probable tokens whose probabilities, among those that `top_k` kept, reach this sum; 0 or 1
    /// keeps all.
    pub top_p: f32,
    /// Keep tokens at least this share as probable as the most probable; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens in the window are divided by it where positive and multiplied where negative (Keskar et al.
    /// 2019, CTRL, section 4.1). 1 changes nothing, less than 1 encourages; 0.1 to 10.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the window, once. -2 to 2; 0 changes nothing.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the window, as often as they occur there. -2 to 2; 0 changes nothing.
    pub frequency_penalty: f32,
    /// How many of the last tokens the penalties look at, the prompt included; 0 looks at all that are held.
    pub penalty_window: u32,
    /// Starts the random numbers: equal seeds, logits and positions give equal tokens.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy, without penalties.
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 0,
            seed: 0,
        }
    }
}

impl Sampling {
    /// Whether every setting is in its range; a SamplingValue error names the one that is not. NaN is in no range.
    pub fn check(&self, vocab_size: usize) -> Result<()> {
        let ranges: [(&str, f32, RangeInclusive<f32>); 6] = [
            ("temperature", self.temperature, 0.0..=100.0),
            ("top_p", self.top_p, 0.0..=1.0),
            ("min_p", self.min_p, 0.0..=1.0),
            ("repetition_penalty", self.repetition_penalty, 0.1..=10.0),
            ("presence_penalty", self.presence_penalty, -2.0..=2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0..=2.0),
        ];
        for (key, value, range) in ranges {
            if !range.contains(&value) {
                let text = format!("{key} is {value}, expected {} to {}", range.start(), range.end());
                return Err(Error::new(Status::SamplingValue, text).at_key(key));
            }
        }
        if self.top_k as usize > vocab_size {
            let text = format!("top_k is {}, expected 0 to the vocabulary's {vocab_size}", self.top_k);
            return Err(Error::new(Status::SamplingValue, text).at_key("top_k"));
        }
        Ok(())
    }

    /// Whether any penalty changes a logit.
    pub(super) fn penalizes(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_out_of_range_are_named() {
        let plain = Sampling::default();
        let mut bad = vec![(Sampling { top_k: 11, ..plain }, "top_k")];
        for value in [f32::NAN, -0.01, 100.1, f32::INFINITY] {
            bad.push((Sampling { temperature: value, ..plain }, "temperature"));
        }
        for value in [f32::NAN, -0.01, 1.01, f32::NEG_INFINITY] {
            bad.push((Sampling { top_p: value, ..plain }, "top_p"));
            bad.push((Sampling { min_p: value, ..plain }, "min_p"));
        }
        for value in [f32::NAN, 0.0, 0.09, 10.1, -1.0] {
            bad.push((Sampling { repetition_penalty: value, ..plain }, "repetition_penalty"));
        }
        for value in [f32::NAN, -2.01, 2.01, f32::INFINITY] {
            bad.push((Sampling { presence_penalty: value, ..plain }, "presence_penalty"));
            bad.push((Sampling { frequency_penalty: value, ..plain }, "frequency_penalty"));
        }
        for (sampling, key) in bad {
            let error = sampling.check(10).unwrap_err();
            assert_eq!((error.status(), error.key()), (Status::SamplingValue, Some(key)), "{sampling:?}");
        }
    }

    #[test]
    fn the_ends_of_every_range_are_settings() {
        let low = Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 0.0,
            min_p: 0.0,
            repetition_penalty: 0.1,
            presence_penalty: -2.0,
            frequency_penalty: -2.0,
            penalty_window: 0,
            seed: 0,
        };
        let high = Sampling {
            temperature: 100.0,
            top_k: 10,
            top_p: 1.0,
            min_p: 1.0,
            repetition_penalty: 10.0,
            presence_penalty: 2.0,
            frequency_penalty: 2.0,
            penalty_window: u32::MAX,
            seed: u64::MAX,
        };
        for sampling in [low, high, Sampling::default()] {
            sampling.check(10).unwrap();
        }
    }
}
