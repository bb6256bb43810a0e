//! What a model thinks of given tokens: log-probabilities, perplexity, hidden states.

use std::ops::Range;
use std::sync::Arc;

use super::budget::Budget;
use super::model::Model;
use super::options::SessionOptions;
use super::sample::log_probability;
use super::session::{Flight, Session, finished};
use crate::backend::Cancel;
use crate::backend::gates::AppliedGates;
use crate::backend::ops::NO_TARGET;
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};

/// How the hidden states of tokens become one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// The last token's.
    Last,
}

impl Session {
    /// Appends `tokens`, runs them, and writes the log-probability of each, given all before it, to `out`, in nats.
    ///
    /// The session must hold at least one token, such as BOS, to begin from. Fails with `NoLogits` without one, with
    /// `ContextFull` (no window slides here), `NotANumber`, `Cancelled` (the tokens not run are taken back), and as
    /// `prefill`.
    pub fn score(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        let held = self.check_appended(tokens, out.len())?;
        let gates = self.meet_model_gates()?;
        if held == 0 {
            return Err(Error::new(Status::NoLogits, "the session holds no token to begin from: prefill BOS first"));
        }
        if let (Some(first), true) = (tokens.first(), self.unrun() == 0) {
            out[0] = log_probability(self.logits.numbers()?, *first)?;
        }
        let mut targets = try_with_capacity("targets", self.options().prefill_chunk)?;
        self.push(tokens)?;
        self.run_watched(held, gates.as_deref(), Some(&mut targets), |session, first, targets| {
            let Some(pass) = &session.pass else { return Ok(()) };
            for (index, _) in targets.iter().enumerate().filter(|(_, target)| **target != NO_TARGET) {
                out[first + index + 1 - held] = pass.log_probability(index);
            }
            Ok(())
        })?;
        match out.iter().position(|value| value.is_nan()) {
            None => Ok(()),
            Some(at) => Err(Error::new(Status::NotANumber, format!("the logits before token {at} are not numbers"))),
        }
    }

    /// Appends `tokens`, runs them, and writes their hidden states after the final norm, pooled, to `out: [hidden_size]`.
    ///
    /// Fails as `score` does, but needs no token to begin from; at least one to pool.
    pub fn embed(&mut self, tokens: &[u32], pooling: Pooling, out: &mut [f32]) -> Result<()> {
        let hidden_size = self.model().config().hidden_size;
        let held = self.check_appended(tokens, tokens.len())?;
        if tokens.is_empty() || out.len() != hidden_size {
            let text =
                format!("{} tokens into {} values, expected at least one into {hidden_size}", tokens.len(), out.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("tokens"));
        }
        let mut sums = try_vec("an embedding", hidden_size, 0f64)?;
        let mut state = try_vec("an embedding", hidden_size, 0f32)?;
        let gates = self.meet_model_gates()?;
        self.push(tokens)?;
        let total = held + tokens.len();
        self.run_watched(held, gates.as_deref(), None, |session, first, _| {
            let Some(pass) = &session.pass else { return Ok(()) };
            let end = session.tokens().len() - session.unrun();
            let from = if pooling == Pooling::Mean { held } else { total - 1 };
            for position in first.max(from)..end {
                pass.hidden_state(position - first, &mut state)?;
                sums.iter_mut().zip(&state).for_each(|(sum, value)| *sum += *value as f64);
            }
            Ok(())
        })?;
        let count = if pooling == Pooling::Mean { tokens.len() } else { 1 };
        out.iter_mut().zip(&sums).for_each(|(out, sum)| *out = (sum / count as f64) as f32);
        Ok(())
    }

    /// Checks what `score` and `embed` have in common; returns how many tokens are held.
    fn check_appended(&self, tokens: &[u32], expected: usize) -> Result<usize> {
        self.check_workspace()?;
        let held = self.tokens().len();
        self.check_fits(tokens.len())?;
        if tokens.len() != expected {
            let text = format!("{} tokens, room for {expected} results", tokens.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("tokens"));
        }
        Ok(held)
    }

    /// Runs what is pending; `see` is shown each pass's first position and targets, while its results can be read. With
    /// `targets`, all tokens after the first `held` are; on an error those are given up.
    fn run_watched(
        &mut self,
        held: usize,
        gates: Option<&AppliedGates>,
        mut targets: Option<&mut Vec<u32>>,
        mut see: impl FnMut(&Session, usize, &[u32]) -> Result<()>,
    ) -> Result<()> {
        let cancel = Arc::clone(self.cancel());
        let limit = Budget::UNLIMITED.begin(&cancel);
        // The workspace is taken for other passes: one that was left in it cannot go on.
        self.flight = None;
        if cancel.take() {
            self.drop_pending(held)?;
            return Err(Cancel::error());
        }
        while self.unrun() > 0 {
            let first = self.tokens().len() - self.unrun();
            let mut flight = Flight::new(self, self.options().prefill_chunk);
            let wanted: &[u32] = match &mut targets {
                None => &[],
                Some(targets) => {
                    let target = |at: usize| self.tokens().get(at).filter(|_| at >= held).copied();
                    targets.clear();
                    targets.extend((1..=flight.count()).map(|next| target(first + next).unwrap_or(NO_TARGET)));
                    targets
                }
            };
            if let Err(error) = finished(self.fly(&mut flight, wanted, gates, &limit)) {
                if error.status() == Status::Cancelled {
                    cancel.take();
                }
                self.drop_pending(held)?;
                return Err(error);
            }
            see(self, first, wanted)?;
        }
        Ok(())
    }
}

/// How well a model predicts a text.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Perplexity {
    /// Tokens that were predicted.
    pub tokens: usize,
    /// The sum of their negative log-probabilities.
    pub nats: f64,
}

impl Perplexity {
    /// Counts the log-probabilities of more tokens.
    pub fn add(&mut self, scores: &[f32]) {
        self.nats -= scores.iter().map(|score| *score as f64).sum::<f64>();
        self.tokens += scores.len();
    }

    /// `e^(nats / tokens)`
    pub fn value(&self) -> f64 {
        (self.nats / self.tokens.max(1) as f64).exp()
    }
}

/// The perplexity of `tokens`, which begin with BOS, in the windows of [`score_in_windows`]. `progress` is told how many
/// tokens are done.
pub fn perplexity(
    model: &Arc<Model>,
    tokens: &[u32],
    options: &SessionOptions,
    progress: &mut dyn FnMut(usize),
) -> Result<Perplexity> {
    let mut found = Perplexity::default();
    score_in_windows(model, tokens, options, &mut |scores| {
        found.add(scores);
        progress(found.tokens);
    })?;
    Ok(found)
}

/// The log-probability of each of `tokens` after the first, BOS, in windows of `options.context_size`: each begins with
/// the text's first token and then half of the window before it, which is not scored again. `see` is shown the scores
/// part by part.
pub fn score_in_windows(
    model: &Arc<Model>,
    tokens: &[u32],
    options: &SessionOptions,
    see: &mut dyn FnMut(&[f32]),
) -> Result<()> {
    let mut session = Session::new(Arc::clone(model), options)?;
    let mut scores = Vec::new();
    for window in windows(tokens.len(), session.context_size())? {
        if scores.is_empty() {
            scores = try_vec("log-probabilities", window.part.len(), 0f32)?;
        }
        session.rewind(0)?;
        session.push(&tokens[..1])?;
        session.push(&tokens[window.context])?;
        let scores = &mut scores[..window.part.len()];
        session.score(&tokens[window.part], scores)?;
        see(scores);
    }
    Ok(())
}

/// A part of a text that is scored in one go, after the text's first token and `context`. Ranges of the text's tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// What the part follows; scored before.
    pub context: Range<usize>,
    /// What is scored. No later window's is longer than the first's.
    pub part: Range<usize>,
}

/// The windows of [`score_in_windows`] over a text of `tokens` tokens, the first of which, BOS, is only given. Fails with
/// `InvalidArgument` where there is nothing else, and where a context has no room for it and one more.
pub fn windows(tokens: usize, context_size: usize) -> Result<impl Iterator<Item = Window>> {
    if tokens < 2 {
        let text = format!("{tokens} tokens, expected at least two, of which the first is only given");
        return Err(Error::new(Status::InvalidArgument, text).at_key("tokens"));
    }
    let window = context_size.saturating_sub(1);
    if window == 0 {
        let text = "context_size is 1, expected room for a token to begin from and one to predict";
        return Err(Error::new(Status::InvalidArgument, text).at_key("context_size"));
    }
    let mut done = 1;
    Ok(std::iter::from_fn(move || {
        if done == tokens {
            return None;
        }
        let context = if done == 1 { 0 } else { window / 2 };
        let part = done..(done + window - context).min(tokens);
        let context = done - context..done;
        done = part.end;
        Some(Window { context, part })
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_score_every_token_but_the_first_once_after_half_a_window() {
        let of = |tokens, context_size| windows(tokens, context_size).unwrap().collect::<Vec<_>>();
        let window = |context, part| Window { context, part };
        assert_eq!(of(5, 100), [window(1..1, 1..5)]);
        assert_eq!(of(12, 6), [window(1..1, 1..6), window(4..6, 6..9), window(7..9, 9..12)]);
        assert_eq!(of(3, 2), [window(1..1, 1..2), window(2..2, 2..3)]);
        for (tokens, context_size) in [(1, 6), (0, 6), (12, 1)] {
            assert_eq!(windows(tokens, context_size).err().map(|error| error.status()), Some(Status::InvalidArgument));
        }
    }
}
