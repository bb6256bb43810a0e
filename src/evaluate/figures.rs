//! What an evaluation comes to. Sums are kept, and every mean is made of them when it is asked for.

use crate::engine::Perplexity;
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::model::Config;
use crate::train::{PairLogProbabilities, PreferenceOptions};

/// Where tokens were sent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Routing {
    /// Tokens that were run.
    pub tokens: u64,
    /// `[layers, experts]`: tokens sent there.
    pub counts: Vec<u64>,
    /// `[layers, experts]`: the sum of their weights.
    pub weight_sums: Vec<f64>,
}

impl Routing {
    /// Nothing yet.
    pub fn new(config: &Config) -> Result<Routing> {
        let count = config.num_hidden_layers * config.num_local_experts;
        let what = "expert statistics";
        Ok(Routing { tokens: 0, counts: try_vec(what, count, 0)?, weight_sums: try_vec(what, count, 0.0)? })
    }

    /// `[layers, experts]`: the share of tokens sent to each expert; a layer's sum is num_experts_per_tok.
    pub fn shares(&self) -> Vec<f64> {
        self.counts.iter().map(|count| *count as f64 / self.tokens.max(1) as f64).collect()
    }

    /// `[layers, experts]`: the weight an expert has for a token, in the mean over all tokens; a layer's sum is 1.
    pub fn mean_weights(&self) -> Vec<f64> {
        self.weight_sums.iter().map(|sum| sum / self.tokens.max(1) as f64).collect()
    }

    /// How far the layers are from using all experts alike, on their mean: 0 for that, 1 where the same ones are always
    /// chosen. One minus the entropy of the choices, on the scale of what is possible; none where there is no choice.
    pub fn specialisation(&self, config: &Config) -> Option<f64> {
        let (most, least) = ((config.num_local_experts as f64).ln(), (config.num_experts_per_tok as f64).ln());
        if most <= least {
            return None;
        }
        let choices = (self.tokens * config.num_experts_per_tok as u64) as f64;
        let shares = self.counts.iter().filter(|count| **count > 0).map(|count| *count as f64 / choices);
        let entropy = -shares.map(|share| share * share.ln()).sum::<f64>() / config.num_hidden_layers as f64;
        Some((most - entropy) / (most - least))
    }
}

/// How well a text, or several, was predicted.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TextFigures {
    /// Of the tokens that were predicted.
    pub perplexity: Perplexity,
    /// Bytes that those tokens stand for; markup has none.
    pub bytes: u64,
    /// Texts, or documents.
    pub documents: u64,
    /// Of all tokens that were run, each counted once.
    pub routing: Routing,
}

impl TextFigures {
    /// `-1 / tokens * sum of log p`
    pub fn nats_per_token(&self) -> f64 {
        self.perplexity.nats / self.perplexity.tokens.max(1) as f64
    }

    /// `-1 / bytes * sum of log p`; none where the tokens stand for no text, or there is no tokenizer that would know.
    pub fn nats_per_byte(&self) -> Option<f64> {
        (self.bytes > 0).then(|| self.perplexity.nats / self.bytes as f64)
    }
}

/// How likely an answer was.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ResponseScore {
    /// The sum over its tokens, in nats.
    pub log_probability: f64,
    /// Tokens of it.
    pub tokens: usize,
}

impl ResponseScore {
    /// The mean over its tokens.
    pub fn per_token(&self) -> f64 {
        self.log_probability / self.tokens.max(1) as f64
    }
}

/// How likely the two answers of a pair were.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairScore {
    pub chosen: ResponseScore,
    pub rejected: ResponseScore,
}

impl PairScore {
    /// As the loss of pairs takes it.
    fn log_probabilities(&self, options: &PreferenceOptions) -> PairLogProbabilities {
        let of = |response: &ResponseScore| match options.mean_log_probability {
            true => response.per_token(),
            false => response.log_probability,
        };
        PairLogProbabilities { chosen: of(&self.chosen), rejected: of(&self.rejected) }
    }
}

/// Which answers of pairs were preferred, beside a reference and by themselves. Means are over pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PreferenceFigures {
    pub pairs: usize,
    /// Pairs whose chosen answer has the higher reward, and those whose two rewards are equal, as all of the reference itself are.
    pub wins: usize,
    pub ties: usize,
    /// The mean loss that training on them would have.
    pub loss: f64,
    /// Mean rewards: `beta (log p - reference's log p)`.
    pub rewards: PairLogProbabilities,
    /// Mean log-probabilities of whole answers, without the reference.
    pub log_probabilities: PairLogProbabilities,
    /// The same by the token: each answer's mean over its tokens.
    pub per_token: PairLogProbabilities,
    /// Pairs whose chosen answer is the likelier, by whole answers and by the token.
    pub likelier: usize,
    pub likelier_per_token: usize,
}

impl PreferenceFigures {
    /// Of the scores of pairs, beside the reference's of the same ones. Fails with `InvalidArgument` where they are not as many,
    /// or none.
    pub fn new(scores: &[PairScore], reference: &[PairScore], options: &PreferenceOptions) -> Result<Self> {
        options.check()?;
        if scores.is_empty() || scores.len() != reference.len() {
            let text = format!(
                "{} pairs beside {} of the reference, expected as many, and at least one",
                scores.len(),
                reference.len()
            );
            return Err(Error::new(Status::InvalidArgument, text).at_key("pairs"));
        }
        let mut found = PreferenceFigures { pairs: scores.len(), ..Default::default() };
        let share = 1.0 / scores.len() as f64;
        let add = |sum: &mut PairLogProbabilities, chosen: f64, rejected: f64| {
            sum.chosen += share * chosen;
            sum.rejected += share * rejected;
        };
        for (score, reference) in scores.iter().zip(reference) {
            let pair = options.of_pair(score.log_probabilities(options), reference.log_probabilities(options));
            found.loss += share * pair.loss;
            add(&mut found.rewards, pair.rewards.chosen, pair.rewards.rejected);
            found.wins += usize::from(pair.rewards.chosen > pair.rewards.rejected);
            found.ties += usize::from(pair.rewards.chosen == pair.rewards.rejected);
            let (chosen, rejected) = (&score.chosen, &score.rejected);
            add(&mut found.log_probabilities, chosen.log_probability, rejected.log_probability);
            add(&mut found.per_token, chosen.per_token(), rejected.per_token());
            found.likelier += usize::from(chosen.log_probability > rejected.log_probability);
            found.likelier_per_token += usize::from(chosen.per_token() > rejected.per_token());
        }
        Ok(found)
    }

    /// The share of pairs whose chosen answer has the higher reward; none where all are ties, as the reference's own are.
    pub fn accuracy(&self) -> Option<f64> {
        (self.ties < self.pairs).then(|| self.share(self.wins))
    }

    /// By how much the chosen answers' reward is higher, in the mean.
    pub fn margin(&self) -> f64 {
        self.rewards.chosen - self.rewards.rejected
    }

    /// The share of pairs whose chosen answer is the likelier one: its whole log-probability.
    pub fn plain_accuracy(&self) -> f64 {
        self.share(self.likelier)
    }

    /// The same of log-probabilities by the token, which long answers do not lose by.
    pub fn plain_accuracy_per_token(&self) -> f64 {
        self.share(self.likelier_per_token)
    }

    fn share(&self, count: usize) -> f64 {
        count as f64 / self.pairs.max(1) as f64
    }
}

/// Collects scores without knowing how many will come. Fails with `OutOfMemory`.
pub(super) fn push_score(scores: &mut Vec<PairScore>, score: PairScore) -> Result<()> {
    if scores.len() == scores.capacity() {
        let mut longer = try_with_capacity("scores of pairs", (2 * scores.len()).max(64))?;
        longer.append(scores);
        *scores = longer;
    }
    scores.push(score);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(chosen: f64, chosen_tokens: usize, rejected: f64, rejected_tokens: usize) -> PairScore {
        let response = |log_probability, tokens| ResponseScore { log_probability, tokens };
        PairScore { chosen: response(chosen, chosen_tokens), rejected: response(rejected, rejected_tokens) }
    }

    #[test]
    fn a_reference_beside_itself_has_no_rewards_and_no_accuracy_but_ties() {
        let scores = [pair(-3.0, 2, -9.0, 3), pair(-8.0, 4, -7.5, 3)];
        let found = PreferenceFigures::new(&scores, &scores, &Default::default()).unwrap();
        assert_eq!((found.wins, found.ties, found.accuracy(), found.margin()), (0, 2, None, 0.0));
        assert!((found.loss - 2f64.ln()).abs() < 1e-12);
        assert_eq!((found.plain_accuracy(), found.plain_accuracy_per_token()), (0.5, 1.0));
        assert_eq!(found.log_probabilities, PairLogProbabilities { chosen: -5.5, rejected: -8.25 });
        assert_eq!(found.per_token, PairLogProbabilities { chosen: -1.75, rejected: -2.75 });
    }

    #[test]
    fn rewards_are_what_a_router_adds_to_the_reference() {
        let reference = [pair(-3.0, 2, -9.0, 3), pair(-8.0, 4, -7.5, 3), pair(-1.0, 1, -1.0, 1)];
        let scores = [pair(-2.0, 2, -9.5, 3), pair(-9.0, 4, -7.0, 3), pair(-1.0, 1, -1.0, 1)];
        let options = PreferenceOptions { beta: 0.5, ..Default::default() };
        let found = PreferenceFigures::new(&scores, &reference, &options).unwrap();
        assert_eq!((found.pairs, found.wins, found.ties), (3, 1, 1));
        assert_eq!(found.accuracy(), Some(1.0 / 3.0));
        // Rewards of chosen answers: 0.5, -0.5, 0; of rejected ones: -0.25, 0.25, 0.
        assert!(found.margin().abs() < 1e-12);
        let mean = PreferenceOptions { mean_log_probability: true, ..options };
        let found = PreferenceFigures::new(&scores, &reference, &mean).unwrap();
        // 0.25, -0.125, 0 and -1/12, 1/12, 0.
        assert!((found.rewards.chosen - 0.125 / 3.0).abs() < 1e-12 && found.rewards.rejected.abs() < 1e-12);
    }

    #[test]
    fn scores_of_other_pairs_and_of_none_are_refused() {
        let scores = [PairScore::default(); 2];
        for (scores, reference) in [(&scores[..], &scores[..1]), (&[], &[])] {
            let error = PreferenceFigures::new(scores, reference, &Default::default()).unwrap_err();
            assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("pairs")));
        }
    }
}
