//! `gemmoe routes`

use std::sync::Arc;

use clap::builder::RangedU64ValueParser;
use gemmoe::engine::options::{DEFAULT_CONTEXT, DEFAULT_PREFILL_CHUNK};
use gemmoe::model::Config;
use gemmoe::{Result, Session};
use serde_json::{Value, json};

use crate::ModelArgs;
use crate::domains::DomainArgs;
use crate::heat_map::{Block, HeatMap, Paint, percent};
use crate::load::{bar, load};
use crate::session::SessionArgs;
use crate::units::grouped;

#[derive(clap::Args)]
pub struct Routes {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    domains: DomainArgs,
    /// Most tokens of each domain.
    #[arg(long, value_name = "N", default_value_t = 1024,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    tokens: usize,
    #[command(flatten)]
    session: SessionArgs,
    /// Show the mean weight an expert has for a token, instead of the share of tokens that are sent to it.
    #[arg(long)]
    weights: bool,
    /// Print the numbers: for each domain "name", "tokens", "specialisation", and by layer and expert "counts" (tokens sent
    /// there) and "weight_sums" (the sum of their weights).
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    color: colorchoice_clap::Color,
}

/// Where a domain's tokens went.
struct Found {
    name: String,
    tokens: u64,
    /// `[layers, experts]`
    counts: Vec<u64>,
    /// `[layers, experts]`
    weight_sums: Vec<f64>,
}

impl Routes {
    pub fn run(&self) -> Result<()> {
        self.color.write_global();
        let domains = self.domains.read()?;
        let model = load(&self.model)?;
        let mut texts = Vec::new();
        for domain in domains {
            let mut tokens = model.encode(&domain.text, true, false)?;
            tokens.truncate(self.tokens);
            texts.push((domain.name, tokens));
        }
        let longest = texts.iter().map(|(_, tokens)| tokens.len()).max().unwrap_or(0);
        let options = self.session.options(longest.min(DEFAULT_CONTEXT), &model);
        let mut session = Session::new(Arc::clone(&model), &options)?;
        let total: usize = texts.iter().map(|(_, tokens)| tokens.len()).sum();
        let bar = bar(total as u64, "routing {wide_bar} {pos} of {len} tokens, {per_sec}, {eta} left");
        let mut found = Vec::new();
        for (name, tokens) in texts {
            found.push(route(&mut session, name, &tokens, &mut |tokens| bar.inc(tokens))?);
        }
        bar.finish_and_clear();
        if self.json {
            print_json(model.config(), &found)
        } else {
            self.print(model.config(), &found)
        }
        Ok(())
    }

    fn print(&self, config: &Config, found: &[Found]) {
        let experts = config.num_local_experts;
        let blocks: Vec<Block> = found.iter().map(|domain| domain.block(experts, self.weights)).collect();
        let (measure, even) = match self.weights {
            true => ("mean weight", 1.0 / experts as f64),
            false => ("share of tokens", config.num_experts_per_tok as f64 / experts as f64),
        };
        let map = HeatMap { blocks: &blocks, measure, even };
        anstream::print!("{}", map.draw(terminal_width(), Paint::of_stdout()));
        anstream::println!();
        let width = found.iter().map(|domain| domain.name.chars().count()).max().unwrap_or(0);
        for (domain, block) in found.iter().zip(&blocks) {
            let (expert, value) = block.largest_mean();
            let (name, most) = (&domain.name, percent(value));
            let tokens = grouped(domain.tokens);
            let what = if self.weights { "of the weight" } else { "of the tokens" };
            let specialisation = match domain.specialisation(config) {
                Some(value) => format!(", specialisation {value:.2}"),
                None => String::new(),
            };
            anstream::println!("{name:<width$}  expert {expert} with {most} % {what}{specialisation}; {tokens} tokens");
        }
        if config.num_experts_per_tok < experts {
            anstream::println!(
                "specialisation: 0 where all experts are used alike, 1 where a layer always takes the same {}",
                config.num_experts_per_tok
            );
        }
    }
}

/// Runs a text in windows of the session's context, each begun by the text's first token, BOS.
fn route(session: &mut Session, name: String, tokens: &[u32], progress: &mut dyn FnMut(u64)) -> Result<Found> {
    session.clear_expert_statistics();
    let (bos, text) = tokens.split_at(1);
    let mut count = 0;
    // A text of nothing but BOS is a window too.
    let windows = text.chunks((session.context_size() - 1).max(1));
    for window in windows.chain((text.is_empty()).then_some(text)) {
        session.rewind(0)?;
        session.prefill(bos)?;
        for part in window.chunks(DEFAULT_PREFILL_CHUNK) {
            session.prefill(part)?;
            progress(part.len() as u64);
        }
        count += 1 + window.len() as u64;
    }
    let statistics = session.expert_statistics();
    let (counts, weight_sums) = (statistics.counts().to_vec(), statistics.weight_sums().to_vec());
    Ok(Found { name, tokens: count, counts, weight_sums })
}

impl Found {
    /// Its block of the heat map.
    fn block(&self, experts: usize, weights: bool) -> Block {
        let values: Vec<f64> = match weights {
            true => self.weight_sums.clone(),
            false => self.counts.iter().map(|count| *count as f64).collect(),
        };
        let share = |value: &f64| value / self.tokens as f64;
        Block {
            title: self.name.clone(),
            layers: values.chunks(experts).map(|layer| layer.iter().map(share).collect()).collect(),
        }
    }

    /// How far the layers are from using all experts alike, on their mean: 0 for that, 1 where the same ones are always
    /// chosen. One minus the entropy of the choices, on the scale of what is possible; none where there is no choice.
    fn specialisation(&self, config: &Config) -> Option<f64> {
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

fn print_json(config: &Config, found: &[Found]) {
    let experts = config.num_local_experts;
    let domains: Vec<Value> = found
        .iter()
        .map(|domain| {
            json!({
                "name": domain.name,
                "tokens": domain.tokens,
                "specialisation": domain.specialisation(config),
                "counts": domain.counts.chunks(experts).collect::<Vec<_>>(),
                "weight_sums": domain.weight_sums.chunks(experts).collect::<Vec<_>>(),
            })
        })
        .collect();
    println!(
        "{}",
        json!({
            "num_local_experts": experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "domains": domains,
        })
    );
}

/// Columns of the terminal; as many as help texts have where there is none.
fn terminal_width() -> usize {
    terminal_size::terminal_size().map_or(100, |(width, _)| width.0 as usize)
}
