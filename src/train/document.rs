//! What is learned from: documents of token ids, and several of them packed into one batch.

use std::ops::Range;

use crate::backend::training::{NO_SLOT, Slots};
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::model::Config;

const WHAT: &str = "a batch of documents";

/// A text as token ids, and which of them are to be learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document {
    /// Token ids, BOS first.
    pub tokens: Vec<u32>,
    /// For each token whether it belongs to a response: only those have a loss. The first never has one, for nothing
    /// predicts it.
    pub is_response: Vec<bool>,
}

impl Document {
    /// A response to a prompt, which has no loss.
    pub fn new(prompt: &[u32], response: &[u32]) -> Document {
        let is_response = (0..prompt.len() + response.len()).map(|token| token >= prompt.len()).collect();
        Document { tokens: [prompt, response].concat(), is_response }
    }

    /// Tokens that have a loss.
    pub fn targets(&self) -> usize {
        self.is_response.iter().skip(1).filter(|is_response| **is_response).count()
    }

    /// Fails with `InvalidArgument` unless the document has a token to learn and at most `max_tokens` in all, and with
    /// `TokenOutOfRange` where a token is not in the vocabulary.
    pub fn check(&self, config: &Config, max_tokens: usize) -> Result<()> {
        let wrong = |text: String| Err(Error::new(Status::InvalidArgument, text).at_key("document"));
        let (tokens, flags) = (self.tokens.len(), self.is_response.len());
        if tokens != flags {
            return wrong(format!(
                "a document has {tokens} tokens, but says of {flags} whether they are to be learned"
            ));
        }
        if tokens > max_tokens {
            return wrong(format!(
                "a document has {tokens} tokens, more than the {max_tokens} of a batch (max_tokens)"
            ));
        }
        if self.targets() == 0 {
            return wrong(format!("a document of {tokens} tokens has none to be learned after its first"));
        }
        match self.tokens.iter().find(|token| **token as usize >= config.vocab_size) {
            Some(token) => {
                let text = format!("token {token} is not in the vocabulary of {}", config.vocab_size);
                Err(Error::new(Status::TokenOutOfRange, text))
            }
            None => Ok(()),
        }
    }
}

/// Documents one after the other, each attending to itself alone, and what fills the batch up.
#[derive(Clone, Debug, Default)]
pub struct Packed {
    /// `[T]`
    pub tokens: Vec<u32>,
    /// `[T]`: the place of each in its document.
    pub positions: Vec<u32>,
    /// Each document's tokens; what fills up is one more.
    pub documents: Vec<Range<usize>>,
    /// Tokens of documents: those from here on fill up. They are sent to no expert, and no loss counts them.
    pub counted: usize,
    /// `[R]`: tokens after which a response's token comes.
    pub sources: Vec<u32>,
    /// `[R]`: that token.
    pub targets: Vec<u32>,
    /// Each document's part of the R.
    pub target_ranges: Vec<Range<usize>>,
}

impl Packed {
    /// Packs documents, and fills up to `length` tokens with `padding` where they are fewer.
    pub fn new<'a>(
        documents: impl Iterator<Item = &'a Document> + Clone,
        length: usize,
        padding: u32,
    ) -> Result<Packed> {
        let tokens = documents.clone().map(|document| document.tokens.len()).sum::<usize>().max(length);
        let targets = documents.clone().map(Document::targets).sum();
        let count = documents.clone().count();
        let mut packed = Packed {
            tokens: try_with_capacity(WHAT, tokens)?,
            positions: try_with_capacity(WHAT, tokens)?,
            documents: try_with_capacity(WHAT, count + 1)?,
            counted: 0,
            sources: try_with_capacity(WHAT, targets)?,
            targets: try_with_capacity(WHAT, targets)?,
            target_ranges: try_with_capacity(WHAT, count)?,
        };
        for document in documents {
            let (first, first_target) = (packed.tokens.len(), packed.targets.len());
            packed.add(document.tokens.iter().copied());
            for token in (1..document.tokens.len()).filter(|token| document.is_response[*token]) {
                packed.sources.push((first + token - 1) as u32);
                packed.targets.push(document.tokens[token]);
            }
            packed.target_ranges.push(first_target..packed.targets.len());
        }
        packed.counted = packed.tokens.len();
        if packed.counted < length {
            packed.add(std::iter::repeat_n(padding, length - packed.counted));
        }
        Ok(packed)
    }

    /// The tokens that have a target as slots: of one kind, with one choice each.
    pub(super) fn head_slots(&self) -> Result<Slots> {
        let mut of_tokens = try_vec(WHAT, self.tokens.len(), NO_SLOT)?;
        let mut tokens = try_with_capacity(WHAT, self.sources.len())?;
        tokens.extend(&self.sources);
        self.sources.iter().enumerate().for_each(|(slot, token)| of_tokens[*token as usize] = slot as u32);
        let weights = try_vec(WHAT, self.sources.len(), 1f32)?;
        Ok(Slots { starts: vec![0, self.sources.len() as u32], tokens, weights, choices: 1, of_tokens })
    }

    fn add(&mut self, tokens: impl ExactSizeIterator<Item = u32>) {
        let first = self.tokens.len();
        self.positions.extend(0..tokens.len() as u32);
        self.tokens.extend(tokens);
        self.documents.push(first..self.tokens.len());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_keeps_documents_apart_and_marks_what_is_predicted() {
        let documents = [Document::new(&[2, 5], &[7, 1]), Document::new(&[], &[2, 9])];
        let packed = Packed::new(documents.iter(), 8, 0).unwrap();
        assert_eq!(packed.tokens, [2, 5, 7, 1, 2, 9, 0, 0]);
        assert_eq!(packed.positions, [0, 1, 2, 3, 0, 1, 0, 1]);
        assert_eq!(packed.documents, [0..4, 4..6, 6..8]);
        assert_eq!((packed.counted, packed.sources, packed.targets), (6, vec![1, 2, 4], vec![7, 1, 9]));
        assert_eq!(packed.target_ranges, [0..2, 2..3]);
        assert_eq!(documents.map(|document| document.targets()), [2, 1]);
    }
}
