//! Constrained output: which tokens may follow so that the text stays inside a JSON schema, a regular expression or a
//! Lark grammar. The work is the `llguidance` crate's; here are its limits, and what the rest of the library sees.
//!
//! A vocabulary is prepared once for a model, a grammar is compiled once from its source, and a state follows one
//! sequence. States of one grammar share nothing that changes: each may be used on its own thread.

mod compile;
mod state;
#[cfg(test)]
mod tests;
mod vocabulary;

use std::sync::Arc;

use llguidance::TokenParser;

use crate::error::{Error, Result, Status};

pub use state::GrammarState;
pub use vocabulary::GrammarVocabulary;

/// The longest source, in bytes.
pub const MAX_SOURCE_BYTES: usize = 1 << 20;

/// An error if a source is longer than that.
pub fn check_source_bytes(bytes: usize) -> Result<()> {
    if bytes > MAX_SOURCE_BYTES {
        let text = format!("a grammar of {bytes} bytes, expected at most {MAX_SOURCE_BYTES}");
        return Err(Error::new(Status::GrammarLimit, text).at_key("grammar"));
    }
    Ok(())
}

/// The language a grammar is written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GrammarKind {
    /// A JSON schema, draft 4 to 2020-12; the output is one JSON value. A `$ref` stays inside the schema.
    JsonSchema,
    /// A regular expression in the syntax of the `regex` crate; the whole output matches it.
    Regex,
    /// llguidance's variant of Lark, whose rule `start` is the whole output.
    Lark,
}

/// A compiled grammar of one model. Clones share it, and threads can.
#[derive(Clone)]
pub struct Grammar(Arc<Compiled>);

struct Compiled {
    vocabulary: Arc<GrammarVocabulary>,
    kind: GrammarKind,
    source: String,
    /// Never advanced: states begin as its copies.
    parser: TokenParser,
}

impl Grammar {
    /// Compiles `source`.
    ///
    /// Fails with GrammarSyntax when it is not a grammar of its kind, GrammarLimit when it is
    /// longer than `MAX_SOURCE_BYTES` or needs more than compiling may cost, ThreadUnavailable (compiling needs a deep
    /// stack, so it has a thread of its own) and OutOfMemory.
    pub fn new(vocabulary: &Arc<GrammarVocabulary>, kind: GrammarKind, source: &str) -> Result<Grammar> {
        check_source_bytes(source.len())?;
        let mut kept = String::new();
        kept.try_reserve_exact(source.len()).map_err(|_| Error::out_of_memory("a grammar", source.len()))?;
        kept.push_str(source);
        let parser = compile::compile(vocabulary, kind, source)?;
        Ok(Grammar(Arc::new(Compiled { vocabulary: Arc::clone(vocabulary), kind, source: kept, parser })))
    }

    /// The language of its source.
    pub fn kind(&self) -> GrammarKind {
        self.0.kind
    }

    /// What it was compiled from.
    pub fn source(&self) -> &str {
        &self.0.source
    }

    /// The vocabulary it was compiled for.
    pub fn vocabulary(&self) -> &Arc<GrammarVocabulary> {
        &self.0.vocabulary
    }

    /// A parser at the beginning.
    fn parser(&self) -> Result<TokenParser> {
        state::caught(|| Ok::<_, Error>(self.0.parser.deep_clone()))
    }
}
