//! `gemmoe eval`

mod data;
mod metrics;
mod pictures;
mod report;
mod routers;
mod table;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use gemmoe::engine::options::DEFAULT_CONTEXT;
use gemmoe::evaluate::{Evaluator, PairScore, TextFigures};
use gemmoe::model::router_patch::RouterPatch;
use gemmoe::train::PreferenceOptions;
use gemmoe::{Error, Model, Result, Status};

use crate::LoadArgs;
use crate::domains::DomainArgs;
use crate::load::{bar, load_directory, options};
use crate::session::SessionArgs;
use data::{Content, Item};
use report::{Measured, Report};
use routers::Router;

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("subject").required(true).multiple(true).args(["model", "curve"])))]
pub struct Eval {
    /// Model directory, or NAME=DIR; the first one is what the others are compared with. May be given several times.
    #[arg(long, value_name = "DIR")]
    model: Vec<String>,
    /// A router patch, or NAME=FILE, for the first model. May be given several times.
    #[arg(long, value_name = "FILE", requires = "model")]
    router: Vec<String>,
    #[command(flatten)]
    domains: DomainArgs,
    /// Pairs of answers as FILE.jsonl or NAME=FILE.jsonl: rows of "prompt", "chosen" and "rejected". May be given several times.
    #[arg(long, value_name = "NAME=FILE", requires = "model")]
    pairs: Vec<String>,
    /// The router whose log-probabilities rewards are measured from, by its name; by default the first.
    #[arg(long, value_name = "NAME", requires = "pairs")]
    reference: Option<String>,
    /// What rewards are multiplied by.
    #[arg(long, value_name = "NUMBER", default_value_t = 0.1, requires = "pairs", allow_negative_numbers = true)]
    beta: f64,
    /// Rewards are of an answer's mean over its tokens, not of their sum.
    #[arg(long, requires = "pairs")]
    mean_log_probability: bool,
    /// Leave out rows that cannot be used, and say which; otherwise the first is an error.
    #[arg(long)]
    skip_bad_rows: bool,
    #[command(flatten)]
    session: SessionArgs,
    /// Show where tokens are sent in every layer, not in the mean of all.
    #[arg(long)]
    layers: bool,
    /// Write a picture: experts by layer, domain and router; with --curve the training's curves.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// The metrics of a training, for the picture.
    #[arg(long, value_name = "METRICS.jsonl", requires = "svg")]
    curve: Option<PathBuf>,
    /// Print one JSON object; docs/evaluate.md has its keys.
    #[arg(long, requires = "model")]
    json: bool,
    #[command(flatten)]
    load: LoadArgs,
    #[command(flatten)]
    color: colorchoice_clap::Color,
}

impl Eval {
    pub fn run(&self) -> Result<()> {
        self.color.write_global();
        // Before anything that takes long.
        self.svg.as_deref().map_or(Ok(()), check_place)?;
        let curve = self.curve.as_deref().map(metrics::read).transpose()?;
        let report = if self.model.is_empty() { None } else { Some(self.evaluate()?) };
        match &report {
            Some(report) if self.json => println!("{}", report.to_json()),
            Some(report) => report.print(self.layers),
            None => {}
        }
        let Some(path) = &self.svg else { return Ok(()) };
        let curve = self.curve.as_deref().zip(curve.as_deref());
        let picture = pictures::draw(report.as_ref(), curve);
        std::fs::write(path, picture).map_err(|error| unwritable(path, &format!("cannot be written: {error}")))
    }

    fn preference(&self) -> PreferenceOptions {
        PreferenceOptions {
            beta: self.beta,
            mean_log_probability: self.mean_log_probability,
            ..PreferenceOptions::default()
        }
    }

    fn evaluate(&self) -> Result<Report> {
        let preference = self.preference();
        preference.check()?;
        let mut domains = data::domains(&self.domains)?;
        let mut pairs = data::pairs(&self.pairs);
        if domains.is_empty() && pairs.is_empty() {
            let text = "there is nothing to evaluate with: give texts (--text, --prompt) or pairs of answers (--pairs)";
            return Err(Error::new(Status::InvalidArgument, text).at_key("text"));
        }
        let routers = routers::routers(&self.model, &self.router);
        let reference = routers::index_of(&routers, self.reference.as_deref())?;
        routers::check(&routers, &options(&self.load))?;
        let patches = routers.iter().map(|router| router.patch.as_deref().map(RouterPatch::read).transpose());
        let patches: Vec<Option<RouterPatch>> = patches.collect::<Result<_>>()?;
        let mut measured: Vec<Measured> = Vec::new();
        let mut model: Option<Arc<Model>> = None;
        for (router, patch) in routers.iter().zip(&patches) {
            let model = match (patch, &model) {
                (Some(patch), Some(model)) => {
                    model.apply_router_patch(patch).map_err(|error| in_patch(error, router))?;
                    model
                }
                _ => {
                    // The one before is given back first: there may not be room for two.
                    drop(model.take());
                    model.insert(load_directory(&router.directory, &self.load)?)
                }
            };
            measured.push(self.measure(model, router, &mut domains, &mut pairs)?);
        }
        let names = |items: Vec<Item>| items.into_iter().map(|item| item.name).collect();
        Report::new(names(domains), names(pairs), measured, reference, preference)
    }

    fn measure(
        &self,
        model: &Arc<Model>,
        router: &Router,
        domains: &mut [Item],
        pairs: &mut [Item],
    ) -> Result<Measured> {
        let max_tokens = self.session.context.unwrap_or(DEFAULT_CONTEXT).min(model.config().max_position_embeddings);
        let mut contents = Vec::new();
        for item in domains.iter_mut().chain(&mut *pairs) {
            contents.push(item.content(model, max_tokens, self.skip_bad_rows)?);
        }
        let longest = contents.iter().map(Content::longest).max().unwrap_or(0);
        let mut evaluator = Evaluator::new(model, &self.session.options(longest, model))?;
        let mut texts: Vec<TextFigures> = Vec::new();
        let mut scores: Vec<Vec<PairScore>> = Vec::new();
        for (item, content) in domains.iter().chain(&*pairs).zip(contents) {
            let is_pairs = texts.len() == domains.len();
            let (length, what) = match &content {
                Content::Tokens(tokens) => (tokens.len() - 1, "tokens"),
                Content::Rows(set) => (set.len(), if is_pairs { "pairs" } else { "documents" }),
            };
            let template = format!("{{prefix}} {{wide_bar}} {{pos}} of {{len}} {what}, {{per_sec}}, {{eta}} left");
            let bar = bar(length as u64, &template).with_prefix(format!("{}: {}", router.name, item.name));
            let mut progress = |count: usize| bar.inc(count as u64);
            match content {
                Content::Tokens(tokens) => texts.push(evaluator.text(&tokens, &mut progress)?),
                Content::Rows(mut set) if is_pairs => {
                    scores.push(evaluator.pairs((0..set.len()).map(|index| set.pair(index)), &mut progress)?);
                }
                Content::Rows(mut set) => {
                    texts.push(evaluator.documents((0..set.len()).map(|index| set.document(index)), &mut progress)?);
                }
            }
            bar.finish_and_clear();
        }
        Ok(Measured {
            name: router.name.clone(),
            directory: router.directory.clone(),
            patch: router.patch.clone(),
            config: model.config().clone(),
            texts,
            pairs: scores,
        })
    }
}

/// Fails where no file can be.
fn check_place(path: &Path) -> Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if path.is_dir() || parent.is_some_and(|parent| !parent.is_dir()) {
        let text = "cannot be written: it is a directory, or the one it would be in is not there";
        return Err(unwritable(path, text));
    }
    Ok(())
}

fn unwritable(path: &Path, text: &str) -> Error {
    Error::new(Status::WriteFailed, text).in_file(path.display().to_string())
}

fn in_patch(error: Error, router: &Router) -> Error {
    match &router.patch {
        Some(patch) => error.in_file(patch.display().to_string()),
        None => error,
    }
}
