//! Losses of text. Each is a function of the log-probabilities of response tokens; what the backward pass is given is its
//! derivative with respect to each of them.

use std::ops::Range;

use crate::error::{Error, Result, Status};

/// The mean negative log-likelihood of response tokens: `-1 / count * sum of log p`. The part of it that these tokens have,
/// and the derivative with respect to each, of `count` tokens in all batches of a step.
pub fn supervised(log_probabilities: impl Iterator<Item = f32>, count: usize) -> (f64, f32) {
    let sum: f64 = log_probabilities.map(f64::from).sum();
    (-sum / count as f64, (-1.0 / count as f64) as f32)
}

/// What is learned from pairs of answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PreferenceLoss {
    /// `-(1 - e) log sigmoid(b h) - e log sigmoid(-b h)` (DPO, arXiv 2305.18290, equation 7; with label smoothing e as in
    /// conservative DPO).
    #[default]
    Sigmoid,
    /// `(h - 1 / (2 b))^2` (IPO, arXiv 2310.12036, equation 17).
    Ipo,
}

impl PreferenceLoss {
    /// All of them, the default first.
    pub const ALL: [PreferenceLoss; 2] = [PreferenceLoss::Sigmoid, PreferenceLoss::Ipo];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            PreferenceLoss::Sigmoid => "sigmoid",
            PreferenceLoss::Ipo => "ipo",
        }
    }
}

/// Choices of learning from pairs. `h = (chosen - rejected) - (reference's chosen - reference's rejected)`, of
/// log-probabilities of whole responses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PreferenceOptions {
    /// Its formula.
    pub loss: PreferenceLoss,
    /// b: how closely the reference is kept to, above 0; 0.1 is usual.
    pub beta: f64,
    /// e: the share of pairs that are taken to be the wrong way round, from 0 to below 0.5; only of `Sigmoid`.
    pub label_smoothing: f64,
    /// A response's log-probability is the mean over its tokens, not their sum; usual with `Ipo`.
    pub mean_log_probability: bool,
}

impl Default for PreferenceOptions {
    fn default() -> Self {
        PreferenceOptions {
            loss: PreferenceLoss::Sigmoid,
            beta: 0.1,
            label_smoothing: 0.0,
            mean_log_probability: false,
        }
    }
}

/// The two responses' log-probabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairLogProbabilities {
    pub chosen: f64,
    pub rejected: f64,
}

/// What a pair's loss is, and what people watch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairLoss {
    pub loss: f64,
    /// The derivative with respect to the chosen response's log-probability; the rejected one's is its negative.
    pub derivative: f64,
    /// `b (chosen - reference's chosen)`, and the same of the rejected one.
    pub rewards: PairLogProbabilities,
}

impl PreferenceOptions {
    /// Fails with `InvalidArgument` where a number is out of range.
    pub fn check(&self) -> Result<()> {
        let wrong = |key: &str, text: String| Err(Error::new(Status::InvalidArgument, text).at_key(key));
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return wrong("beta", format!("beta is {}, expected a number above 0", self.beta));
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            let text = format!("label_smoothing is {}, expected 0 to below 0.5", self.label_smoothing);
            return wrong("label_smoothing", text);
        }
        if self.loss == PreferenceLoss::Ipo && self.label_smoothing > 0.0 {
            return wrong("label_smoothing", "label_smoothing has no meaning for IPO; leave it at 0".into());
        }
        Ok(())
    }

    /// A response's log-probability from those of its tokens.
    pub fn of_response(&self, log_probabilities: impl ExactSizeIterator<Item = f32>) -> f64 {
        let share = self.token_share(log_probabilities.len());
        share * log_probabilities.map(f64::from).sum::<f64>()
    }

    /// What one token's log-probability counts in its response's.
    fn token_share(&self, tokens: usize) -> f64 {
        if self.mean_log_probability { 1.0 / tokens.max(1) as f64 } else { 1.0 }
    }

    /// The loss of a pair beside its reference.
    pub fn of_pair(&self, policy: PairLogProbabilities, reference: PairLogProbabilities) -> PairLoss {
        let rewards = PairLogProbabilities {
            chosen: self.beta * (policy.chosen - reference.chosen),
            rejected: self.beta * (policy.rejected - reference.rejected),
        };
        let margin = (policy.chosen - policy.rejected) - (reference.chosen - reference.rejected);
        let (loss, derivative) = match self.loss {
            PreferenceLoss::Sigmoid => {
                let (x, e) = (self.beta * margin, self.label_smoothing);
                let loss = -(1.0 - e) * log_sigmoid(x) - e * log_sigmoid(-x);
                (loss, self.beta * (e * sigmoid(x) - (1.0 - e) * sigmoid(-x)))
            }
            PreferenceLoss::Ipo => {
                let off = margin - 1.0 / (2.0 * self.beta);
                (off * off, 2.0 * off)
            }
        };
        PairLoss { loss, derivative, rewards }
    }

    /// Writes the derivatives of a pair's tokens, its loss counted `share`; `responses` are the ranges of the chosen and the
    /// rejected one's tokens in `out`.
    pub fn write_derivatives(&self, pair: &PairLoss, share: f64, responses: [Range<usize>; 2], out: &mut [f32]) {
        for (response, sign) in responses.into_iter().zip([1.0, -1.0]) {
            let derivative = sign * pair.derivative * share * self.token_share(response.len());
            out[response].fill(derivative as f32);
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `log(1 / (1 + e^-x))` without overflow.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pairs_derivative_is_what_differences_say() {
        for (loss, label_smoothing) in
            [(PreferenceLoss::Sigmoid, 0.0), (PreferenceLoss::Sigmoid, 0.2), (PreferenceLoss::Ipo, 0.0)]
        {
            let options = PreferenceOptions { loss, label_smoothing, beta: 0.3, ..Default::default() };
            options.check().unwrap();
            let reference = PairLogProbabilities { chosen: -3.0, rejected: -2.5 };
            for chosen in [-40.0, -4.0, -2.0, 35.0] {
                let at = |step: f64| {
                    options.of_pair(PairLogProbabilities { chosen: chosen + step, rejected: -3.5 }, reference)
                };
                let expected = (at(1e-4).loss - at(-1e-4).loss) / 2e-4;
                assert!((at(0.0).derivative - expected).abs() < 1e-6 * (1.0 + expected.abs()), "{loss:?} {chosen}");
            }
        }
    }

    #[test]
    fn an_untrained_policy_has_the_loss_of_a_coin() {
        let same = PairLogProbabilities { chosen: -7.0, rejected: -9.0 };
        let pair = PreferenceOptions::default().of_pair(same, same);
        assert!((pair.loss - 2f64.ln()).abs() < 1e-12);
        assert_eq!((pair.derivative, pair.rewards), (-0.05, PairLogProbabilities::default()));
    }
}
