//! What the output must look like.

use std::path::PathBuf;

use clap::Args;
use gemmoe::text::grammar::{Grammar, GrammarKind};
use gemmoe::{Model, Result};

use crate::files;

#[derive(Args)]
#[group(multiple = false)]
pub struct GrammarArgs {
    /// Produce one JSON value that this JSON schema allows.
    #[arg(long, value_name = "FILE")]
    json_schema: Option<PathBuf>,
    /// Produce text that this regular expression matches as a whole.
    #[arg(long, value_name = "TEXT")]
    regex: Option<String>,
    /// Produce text of this Lark grammar, whose rule `start` is the whole.
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
}

impl GrammarArgs {
    /// The grammar that was asked for, compiled for a model.
    pub fn compile(&self, model: &Model) -> Result<Option<Grammar>> {
        let (kind, path, source) = match (&self.json_schema, &self.regex, &self.grammar) {
            (Some(path), _, _) => (GrammarKind::JsonSchema, Some(path), files::read(path)?),
            (_, Some(text), _) => (GrammarKind::Regex, None, text.clone()),
            (_, _, Some(path)) => (GrammarKind::Lark, Some(path), files::read(path)?),
            (None, None, None) => return Ok(None),
        };
        let grammar = Grammar::new(model.grammar_vocabulary()?, kind, &source);
        grammar.map(Some).map_err(|error| match path {
            Some(path) => error.in_file(path.display().to_string()),
            None => error,
        })
    }
}
