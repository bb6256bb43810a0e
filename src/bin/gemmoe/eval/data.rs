//! What routers are evaluated with: texts and rows of JSON Lines, read for one model after the other.

use std::path::PathBuf;
use std::sync::Arc;

use gemmoe::engine::options::DEFAULT_CONTEXT;
use gemmoe::train::data::{BadRows, DataOptions, DataReport, DataSet, Rows};
use gemmoe::{Error, Model, Result, Status};

use crate::domains::{DomainArgs, Source, name_of, named};
use crate::load::watch;
use crate::units::grouped;

/// A domain, or a file of pairs, by its name.
pub struct Item {
    pub name: String,
    kind: Kind,
    /// Documents and tokens, once they are known: they must be the same for every model.
    known: Option<[u64; 2]>,
}

enum Kind {
    Text(String),
    Rows(PathBuf, Rows),
}

/// The same for a model.
pub enum Content {
    Tokens(Vec<u32>),
    Rows(Box<DataSet>),
}

/// All domains.
pub fn domains(args: &DomainArgs) -> Result<Vec<Item>> {
    let item = |(name, source)| match source {
        Source::File(path) if path.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl")) => {
            Ok(Item { name, kind: Kind::Rows(path, Rows::Texts), known: None })
        }
        source => Item::text(source, name),
    };
    args.sources()?.into_iter().map(item).collect()
}

/// All files of pairs.
pub fn pairs(arguments: &[String]) -> Vec<Item> {
    let item = |argument: &String| {
        let (name, path) = named(argument);
        let name = name.map_or_else(|| name_of(path), str::to_owned);
        Item { name, kind: Kind::Rows(path.to_owned(), Rows::Pairs), known: None }
    };
    arguments.iter().map(item).collect()
}

impl Item {
    fn text(source: Source, name: String) -> Result<Item> {
        let domain = source.read(name)?;
        Ok(Item { name: domain.name, kind: Kind::Text(domain.text), known: None })
    }

    /// Its tokens, or rows, as `model` has them; `max_tokens` of a document or a pair. Fails with `ModelsDiffer` where another
    /// model had others, which chat templates can bring about.
    pub fn content(&mut self, model: &Arc<Model>, max_tokens: usize, skip_bad_rows: bool) -> Result<Content> {
        let (content, found) = match &self.kind {
            Kind::Text(text) => {
                let tokens = model.encode(text, true, false)?;
                let count = tokens.len() as u64;
                (Content::Tokens(tokens), [1, count])
            }
            Kind::Rows(path, rows) => {
                // BOS and a token that counts, for each answer.
                let least = if *rows == Rows::Pairs { 4 } else { 2 };
                if max_tokens < least {
                    let text = format!("context is {max_tokens}, and {} takes at least {least} tokens", self.name);
                    return Err(Error::new(Status::InvalidArgument, text).at_key("context"));
                }
                let bad_rows = if skip_bad_rows { BadRows::Skip } else { BadRows::Refuse };
                let options = DataOptions { max_tokens, bad_rows, ..Default::default() };
                let doing = format!("reading {}", self.name);
                let files = [path.clone()];
                let set = watch(&doing, |progress| DataSet::open(model, &files, *rows, &options, progress))?;
                let found = [set.report().documents, set.report().tokens];
                if self.known.is_none() {
                    tell(&self.name, set.report());
                }
                (Content::Rows(Box::new(set)), found)
            }
        };
        match self.known.replace(found) {
            Some(known) if known != found => {
                let [documents, tokens] = found;
                let text = format!(
                    "{:?} is {documents} documents of {tokens} tokens for this model, and {} of {} for the first: their chat \
                     templates differ, and figures could not be compared",
                    self.name, known[0], known[1]
                );
                Err(Error::new(Status::ModelsDiffer, text))
            }
            _ => Ok(content),
        }
    }
}

impl Content {
    /// Tokens that a session must have room for.
    pub fn longest(&self) -> usize {
        match self {
            Content::Tokens(tokens) => tokens.len().min(DEFAULT_CONTEXT),
            Content::Rows(set) => set.report().longest,
        }
    }
}

/// Says on standard error what of the rows is not used as it is.
fn tell(name: &str, report: &DataReport) {
    if report.skipped > 0 {
        eprintln!("{name}: {} of {} rows are left out", grouped(report.skipped), grouped(report.rows));
        report.left_out.iter().for_each(|row| eprintln!("  {row}"));
    }
    if report.cut > 0 {
        let cut = grouped(report.cut);
        eprintln!("{name}: {cut} of {} rows are cut at their end: too long for the context", grouped(report.rows));
    }
}
