//! Where a sequence stands in a grammar.

use std::fmt::Display;
use std::panic::AssertUnwindSafe;

use llguidance::TokenParser;
use llguidance::api::StopReason;
use llguidance::panic_utils::catch_unwind;

use super::Grammar;
use super::compile::error_of;
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};

/// The tokens of one sequence since its grammar began, and what may follow.
pub struct GrammarState {
    grammar: Grammar,
    parser: TokenParser,
    /// Whether the parser cannot be used: it failed, and another has to take the tokens again.
    is_broken: bool,
    /// Whether the grammar is complete and no text can follow.
    is_closed: bool,
    accepted: Vec<u32>,
    /// How many of the last of them are stop tokens, which the parser never sees.
    stops: usize,
    /// Bits over the vocabulary.
    mask: Vec<u32>,
    pub(super) has_mask: bool,
}

impl GrammarState {
    /// The beginning of a grammar. Fails with OutOfMemory.
    pub fn start(grammar: &Grammar) -> Result<GrammarState> {
        let mask = try_vec("a grammar's mask", grammar.vocabulary().vocab_size.div_ceil(32), 0)?;
        let mut state = GrammarState {
            parser: grammar.parser()?,
            grammar: grammar.clone(),
            is_broken: false,
            is_closed: false,
            accepted: Vec::new(),
            stops: 0,
            mask,
            has_mask: false,
        };
        state.is_closed = state.with_parser(|parser| parser.check_stop())?;
        Ok(state)
    }

    /// The grammar.
    pub fn grammar(&self) -> &Grammar {
        &self.grammar
    }

    /// The tokens accepted since the beginning.
    pub fn accepted(&self) -> &[u32] {
        &self.accepted
    }

    /// The same place again, for a fork: nothing that changes is shared. Fails with OutOfMemory.
    pub fn try_clone(&self) -> Result<GrammarState> {
        let mut accepted = try_with_capacity("a grammar's tokens", self.accepted.len())?;
        accepted.extend_from_slice(&self.accepted);
        let mut mask = try_with_capacity("a grammar's mask", self.mask.len())?;
        mask.extend_from_slice(&self.mask);
        let (parser, is_broken) = match self.is_broken {
            true => (self.grammar.parser()?, true),
            false => (copy(&self.parser)?, false),
        };
        let (is_closed, stops, has_mask) = (self.is_closed, self.stops, self.has_mask);
        let grammar = self.grammar.clone();
        Ok(GrammarState { grammar, parser, is_broken, is_closed, accepted, stops, mask, has_mask })
    }

    /// The tokens that may follow, a bit for each of the vocabulary, 32 in a word, lowest first.
    ///
    /// Where the output is complete, all stop tokens are among them; where nothing else can follow, they are alone. No
    /// bit is set where the vocabulary has no token to go on with. Fails with GrammarLimit when finding them costs too
    /// much; the state is unchanged then.
    pub fn mask(&mut self) -> Result<&[u32]> {
        if !self.has_mask {
            self.find_mask()?;
            self.has_mask = true;
        }
        Ok(&self.mask)
    }

    /// Whether `mask` has its answer already.
    pub fn knows_mask(&self) -> bool {
        self.has_mask
    }

    /// Goes on by `token`.
    ///
    /// Fails with GrammarViolation when it cannot follow, TokenOutOfRange, GrammarLimit or OutOfMemory; the state is
    /// unchanged then.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        let vocab_size = self.grammar.vocabulary().vocab_size;
        if token as usize >= vocab_size {
            let text = format!("token {token}, expected an id below {vocab_size}");
            return Err(Error::new(Status::TokenOutOfRange, text).at_key("token"));
        }
        self.accepted.try_reserve(1).map_err(|_| Error::out_of_memory("a grammar's tokens", size_of::<u32>()))?;
        if !self.can_follow(token)? {
            let text = format!("token {token} cannot follow: the grammar does not allow it at {}", self.accepted.len());
            return Err(Error::new(Status::GrammarViolation, text).at_key("token"));
        }
        if self.grammar.vocabulary().is_stop(token) {
            self.stops += 1;
        } else {
            self.is_closed = self.with_parser(|parser| {
                parser.consume_token(token)?;
                parser.check_stop()
            })?;
        }
        self.accepted.push(token);
        self.has_mask = false;
        Ok(())
    }

    /// Takes the last `count` tokens back. Fails with InvalidArgument when there are fewer, and GrammarLimit.
    pub fn rewind(&mut self, count: usize) -> Result<()> {
        let held = self.accepted.len();
        let Some(length) = held.checked_sub(count) else {
            let text = format!("cannot take back {count} tokens, the grammar has accepted {held}");
            return Err(Error::new(Status::InvalidArgument, text).at_key("count"));
        };
        if count == 0 {
            return Ok(());
        }
        let stops_dropped = count.min(self.stops);
        let dropped = count - stops_dropped;
        if dropped > 0 {
            // Some grammars cannot be rolled back, and lexemes that end before their last bytes change the count: then
            // the tokens are taken again from the beginning.
            let rolled_back = !self.is_broken
                && self.parser.num_tokens() == held - self.stops
                && self.with_parser(|parser| parser.rollback(dropped)).is_ok();
            if !rolled_back {
                let (parser, is_closed) = replay(&self.grammar, &self.accepted[..length])?;
                (self.parser, self.is_closed, self.is_broken) = (parser, is_closed, false);
            } else {
                self.is_closed = false;
            }
        }
        self.stops -= stops_dropped;
        self.accepted.truncate(length);
        self.has_mask = false;
        Ok(())
    }

    /// Whether the text so far is a whole output: it may end here, if it has not ended. Fails with GrammarLimit.
    pub fn is_complete(&mut self) -> Result<bool> {
        if self.stops > 0 || self.is_closed {
            return Ok(true);
        }
        self.with_parser(|parser| Ok::<_, Error>(parser.is_accepting()))
    }

    fn can_follow(&mut self, token: u32) -> Result<bool> {
        let vocabulary = self.grammar.vocabulary();
        if vocabulary.is_stop(token) {
            return Ok(self.mask()?[token as usize / 32] >> (token % 32) & 1 == 1);
        }
        if self.stops > 0 || self.is_closed || !vocabulary.is_reachable(token) {
            return Ok(false);
        }
        self.with_parser(|parser| parser.validate_token(token))
    }

    fn find_mask(&mut self) -> Result<()> {
        let mut may_stop = self.stops > 0 || self.is_closed;
        if may_stop {
            self.mask.fill(0);
        } else {
            match self.with_parser(|parser| match parser.compute_mask() {
                Ok(mask) => Ok(Some(mask)),
                // No token of the vocabulary can follow.
                Err(_) if parser.stop_reason() == StopReason::NoExtensionBias => Ok(None),
                Err(error) => Err(error),
            })? {
                Some(mask) => {
                    for ((word, allowed), reachable) in
                        self.mask.iter_mut().zip(mask.as_slice()).zip(&self.grammar.0.vocabulary.reachable)
                    {
                        *word = allowed & reachable;
                    }
                    let stops = &self.grammar.0.vocabulary.stop_tokens;
                    may_stop = stops.iter().any(|token| mask.is_allowed(*token));
                }
                None => {
                    self.mask.fill(0);
                    // The parser has stopped for good.
                    self.is_broken = true;
                }
            }
        }
        if may_stop {
            for token in &self.grammar.0.vocabulary.stop_tokens {
                self.mask[*token as usize / 32] |= 1 << (token % 32);
            }
        }
        Ok(())
    }

    /// Lets a parser that has taken all tokens work; one that fails is not used again.
    pub(super) fn with_parser<T, E: Display>(
        &mut self,
        work: impl FnOnce(&mut TokenParser) -> std::result::Result<T, E>,
    ) -> Result<T> {
        if self.is_broken {
            let (parser, _) = replay(&self.grammar, &self.accepted[..self.accepted.len() - self.stops])?;
            self.parser = parser;
            self.is_broken = false;
        }
        let parser = &mut self.parser;
        caught(|| work(parser)).inspect_err(|_| self.is_broken = true)
    }
}

/// A parser that has taken `tokens`, and whether no text can follow.
fn replay(grammar: &Grammar, tokens: &[u32]) -> Result<(TokenParser, bool)> {
    let mut parser = grammar.parser()?;
    let mut is_closed = caught(|| parser.check_stop())?;
    for token in tokens.iter().filter(|token| !grammar.vocabulary().is_stop(**token)) {
        is_closed = caught(|| {
            parser.consume_token(*token)?;
            parser.check_stop()
        })?;
    }
    Ok((parser, is_closed))
}

fn copy(parser: &TokenParser) -> Result<TokenParser> {
    caught(|| Ok::<_, Error>(parser.deep_clone()))
}

/// What llguidance answers, its panics as errors.
pub(super) fn caught<T, E: Display>(work: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    let answer = catch_unwind(AssertUnwindSafe(|| Ok(work().map_err(|error| error_of(&error.to_string())))));
    answer.unwrap_or_else(|panic| Err(error_of(&panic.to_string())))
}
