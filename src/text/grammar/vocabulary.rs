//! A model's tokens as the grammar sees them.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::earley::SlicedBiasComputer;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};

use super::compile::set_limits;
use super::state::caught;
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::text::Tokenizer;

/// The trie's ids have 24 bits, of which the last number stands for none.
const MAX_VOCAB_SIZE: usize = (1 << 24) - 1;

/// The trie counts its nodes, at most one for each byte, in 22 bits.
const MAX_TEXT_BYTES: usize = (1 << 22) - 1;

/// The trie counts a token's bytes in 10 bits; longer tokens cannot be drawn. Gemma's longest has 93.
const MAX_TOKEN_BYTES: usize = 1000;

/// Makes a token special: no text has this byte.
const SPECIAL_MARK: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// The tokens of a model, prepared for grammars. Threads can share it.
pub struct GrammarVocabulary {
    pub(super) factory: ParserFactory,
    pub(super) vocab_size: usize,
    /// Rising, the end of text among them.
    pub(super) stop_tokens: Vec<u32>,
    /// Bits of the tokens that have an entry.
    pub(super) reachable: Vec<u32>,
}

impl GrammarVocabulary {
    /// Prepares the vocabulary of `vocab_size` tokens: takes about a second and some 100 MB for 256,000 tokens.
    ///
    /// Special tokens are never reached by their text. Not reached at all are ids without an entry, the token of byte
    /// 0xFF, which no text has, and tokens of more than 1000 bytes. `stop_tokens` and `eos` are allowed where a grammar
    /// is complete. Fails with TokenOutOfRange (`eos` or a stop token), GrammarLimit (2^24 tokens or 4 MiB of their
    /// text) or OutOfMemory.
    pub fn new(
        tokenizer: &Tokenizer,
        vocab_size: usize,
        stop_tokens: &[u32],
        eos: u32,
    ) -> Result<Arc<GrammarVocabulary>> {
        if vocab_size > MAX_VOCAB_SIZE {
            let text = format!("a vocabulary of {vocab_size} tokens, grammars work with at most {MAX_VOCAB_SIZE}");
            return Err(Error::new(Status::GrammarLimit, text));
        }
        let mut stops = try_with_capacity("stop tokens", stop_tokens.len() + 1)?;
        stops.push(eos);
        stops.extend_from_slice(stop_tokens);
        stops.sort_unstable();
        stops.dedup();
        if let Some(token) = stops.iter().find(|token| **token as usize >= vocab_size) {
            let text = format!("stop token {token}, expected an id below {vocab_size}");
            return Err(Error::new(Status::TokenOutOfRange, text));
        }

        let mut words = try_with_capacity("a grammar's vocabulary", vocab_size)?;
        let mut reachable = try_vec("a grammar's vocabulary", vocab_size.div_ceil(32), 0u32)?;
        let mut text_bytes = 0;
        for token in 0..vocab_size as u32 {
            let word = word_of(tokenizer, token, stops.binary_search(&token).is_ok())?;
            text_bytes += word.len();
            if !word.is_empty() {
                reachable[token as usize / 32] |= 1 << (token % 32);
            }
            words.push(word);
        }
        if text_bytes > MAX_TEXT_BYTES {
            let text = format!("tokens of {text_bytes} bytes in all, grammars work with at most {MAX_TEXT_BYTES}");
            return Err(Error::new(Status::GrammarLimit, text));
        }

        let mut factory = caught(|| {
            let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, eos), &words).with_eos_tokens(&stops);
            let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            let slices = SlicedBiasComputer::general_slices();
            ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
        })?;
        factory.quiet();
        set_limits(factory.limits_mut());
        Ok(Arc::new(GrammarVocabulary { factory, vocab_size, stop_tokens: stops, reachable }))
    }

    /// How many tokens it has; masks have a bit for each.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The tokens that may end a complete output, rising.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    pub(super) fn is_stop(&self, token: u32) -> bool {
        self.stop_tokens.binary_search(&token).is_ok()
    }

    pub(super) fn is_reachable(&self, token: u32) -> bool {
        self.reachable.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }
}

/// What the trie holds for a token: its bytes, after the mark if it is special; nothing if it cannot be reached.
fn word_of(tokenizer: &Tokenizer, token: u32, is_stop: bool) -> Result<Vec<u8>> {
    // An id past the tokenizer's has no entry either.
    let bytes = tokenizer.token_bytes(token, true).unwrap_or(&[]);
    let is_special = is_stop || tokenizer.is_special(token);
    let unreachable = bytes.is_empty() || bytes[0] == SPECIAL_MARK || bytes.len() > MAX_TOKEN_BYTES;
    let mut word = Vec::new();
    if unreachable {
        return Ok(word);
    }
    let length = bytes.len() + usize::from(is_special);
    word.try_reserve_exact(length).map_err(|_| Error::out_of_memory("a grammar's vocabulary", length))?;
    if is_special {
        word.push(SPECIAL_MARK);
    }
    word.extend_from_slice(bytes);
    Ok(word)
}
