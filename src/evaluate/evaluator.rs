//! Texts, documents and pairs through a session.

use std::sync::Arc;

use super::figures::{PairScore, ResponseScore, Routing, TextFigures, push_score};
use crate::backend::Cancel;
use crate::engine::options::DEFAULT_PREFILL_CHUNK;
use crate::engine::score::windows;
use crate::engine::{Model, Session, SessionOptions};
use crate::error::Result;
use crate::memory::try_vec;
use crate::train::{Document, Pair};

/// A model as it routes now, and a session to run through it. One thread at a time.
///
/// Whoever changes the model's gates makes a new one: of this one's keys and values some may be the old gates'.
pub struct Evaluator {
    session: Session,
    /// Of the tokens that are scored in one go.
    scores: Vec<f32>,
}

impl Evaluator {
    /// All memory is taken here: `options` have room for the longest document, or the longer answer of a pair with its prompt.
    pub fn new(model: &Arc<Model>, options: &SessionOptions) -> Result<Evaluator> {
        let session = Session::new(Arc::clone(model), options)?;
        let scores = try_vec("log-probabilities", session.context_size(), 0f32)?;
        Ok(Evaluator { session, scores })
    }

    /// Ends the running or the next call with `Cancelled`, from any thread.
    pub fn cancel(&self) -> &Arc<Cancel> {
        self.session.cancel()
    }

    /// How well a text of any length is predicted: `tokens`, the first of which, BOS, is only given, in windows of the session's
    /// context, each after half a window that it follows. `progress` is told how many tokens more are done.
    ///
    /// Fails as `score_in_windows` does.
    pub fn text(&mut self, tokens: &[u32], progress: &mut dyn FnMut(usize)) -> Result<TextFigures> {
        let mut figures = self.nothing()?;
        figures.documents = 1;
        for window in windows(tokens.len(), self.session.context_size())? {
            self.session.rewind(0)?;
            self.session.clear_expert_statistics();
            self.session.prefill(&tokens[..1])?;
            if !window.context.is_empty() {
                self.session.prefill(&tokens[window.context.clone()])?;
                // Counted in the windows before.
                self.session.clear_expert_statistics();
            }
            for part in tokens[window.part].chunks(DEFAULT_PREFILL_CHUNK) {
                let scores = &mut self.scores[..part.len()];
                self.session.score(part, scores)?;
                figures.perplexity.add(scores);
                figures.bytes += bytes_of(self.session.model(), part.iter())?;
                progress(part.len());
            }
            self.take_routes(&mut figures.routing);
        }
        figures.routing.tokens = tokens.len() as u64;
        Ok(figures)
    }

    /// How well documents are predicted: the tokens of them that are responses, each after all before it. `progress` is told how
    /// many more documents are done.
    ///
    /// Fails with `InvalidArgument` for a document without a token to predict, `ContextFull` for one that is too long, and as
    /// `Session::score` and `documents` do.
    pub fn documents(
        &mut self,
        documents: impl IntoIterator<Item = Result<Document>>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<TextFigures> {
        let mut figures = self.nothing()?;
        self.session.clear_expert_statistics();
        for document in documents {
            let document = document?;
            document.check(self.session.model().config(), usize::MAX)?;
            let first = first_response(&document);
            self.session.rewind(0)?;
            self.session.prefill(&document.tokens[..first])?;
            let part = &document.tokens[first..];
            let learned = &document.is_response[first..];
            self.score(part)?;
            let scored = self.scores.iter().zip(learned).filter(|(_, learned)| **learned);
            scored.for_each(|(score, _)| figures.perplexity.add(&[*score]));
            let learned = part.iter().zip(learned).filter(|(_, learned)| **learned).map(|(token, _)| token);
            figures.bytes += bytes_of(self.session.model(), learned)?;
            figures.routing.tokens += document.tokens.len() as u64;
            figures.documents += 1;
            progress(1);
        }
        self.take_routes(&mut figures.routing);
        Ok(figures)
    }

    /// How likely the answers of pairs are, after their prompts; what both begin with is run once. `progress` is told how many
    /// more pairs are done. Fails as `documents`.
    pub fn pairs(
        &mut self,
        pairs: impl IntoIterator<Item = Result<Pair>>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Vec<PairScore>> {
        let mut found = Vec::new();
        for pair in pairs {
            let Pair { chosen, rejected, .. } = pair?;
            for document in [&chosen, &rejected] {
                document.check(self.session.model().config(), usize::MAX)?;
            }
            let same = chosen.tokens.iter().zip(&rejected.tokens).take_while(|(own, other)| own == other).count();
            let shared = same.min(first_response(&chosen)).min(first_response(&rejected));
            self.session.rewind(0)?;
            self.session.prefill(&chosen.tokens[..shared])?;
            let chosen = self.response(&chosen, shared)?;
            self.session.rewind(shared)?;
            let rejected = self.response(&rejected, shared)?;
            push_score(&mut found, PairScore { chosen, rejected })?;
            progress(1);
        }
        Ok(found)
    }

    /// Where tokens are sent: the text in windows of the session's context, each after its first token, BOS, and without what
    /// was before it. `progress` is told how many tokens more are done.
    pub fn routing(&mut self, tokens: &[u32], progress: &mut dyn FnMut(usize)) -> Result<Routing> {
        let mut routing = Routing::new(self.session.model().config())?;
        self.session.clear_expert_statistics();
        let (bos, text) = tokens.split_at(1.min(tokens.len()));
        // A text of nothing but BOS is a window too.
        let windows = text.chunks((self.session.context_size() - 1).max(1));
        for window in windows.chain(text.is_empty().then_some(text)) {
            self.session.rewind(0)?;
            self.session.prefill(bos)?;
            for part in window.chunks(DEFAULT_PREFILL_CHUNK) {
                self.session.prefill(part)?;
                progress(part.len());
            }
            routing.tokens += (bos.len() + window.len()) as u64;
        }
        self.take_routes(&mut routing);
        Ok(routing)
    }

    fn nothing(&self) -> Result<TextFigures> {
        let model = self.session.model();
        Ok(TextFigures { routing: Routing::new(model.config())?, ..Default::default() })
    }

    /// Scores what follows the tokens that the session holds.
    fn score(&mut self, tokens: &[u32]) -> Result<()> {
        // Of one that is too long the session says so.
        let room = tokens.len().min(self.scores.len());
        let scores = &mut self.scores[..room];
        self.session.score(tokens, scores)
    }

    /// The score of a document's response, of which the session holds the first `held` tokens.
    fn response(&mut self, document: &Document, held: usize) -> Result<ResponseScore> {
        let (tokens, is_response) = (&document.tokens[held..], &document.is_response[held..]);
        self.score(tokens)?;
        let scores = self.scores.iter().zip(is_response).filter(|(_, is_response)| **is_response);
        let log_probability = scores.map(|(score, _)| *score as f64).sum();
        Ok(ResponseScore { log_probability, tokens: document.targets() })
    }

    /// Adds the experts chosen since statistics were cleared, and clears them.
    fn take_routes(&mut self, routing: &mut Routing) {
        let statistics = self.session.expert_statistics();
        routing.counts.iter_mut().zip(statistics.counts()).for_each(|(sum, count)| *sum += count);
        routing.weight_sums.iter_mut().zip(statistics.weight_sums()).for_each(|(sum, weight)| *sum += weight);
        self.session.clear_expert_statistics();
    }
}

/// The first token that is predicted; never the document's first.
fn first_response(document: &Document) -> usize {
    document.is_response.iter().skip(1).position(|is_response| *is_response).map_or(document.tokens.len(), |at| at + 1)
}

/// Bytes that tokens stand for; none without a tokenizer.
fn bytes_of<'a>(model: &Model, tokens: impl Iterator<Item = &'a u32>) -> Result<u64> {
    let Ok(tokenizer) = model.tokenizer() else { return Ok(0) };
    tokens.map(|token| Ok(tokenizer.token_bytes(*token, false)?.len() as u64)).sum()
}
