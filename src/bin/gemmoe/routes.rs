//! `gemmoe routes`

use clap::builder::RangedU64ValueParser;
use gemmoe::Result;
use gemmoe::engine::options::DEFAULT_CONTEXT;
use gemmoe::evaluate::{Evaluator, Routing};
use gemmoe::model::Config;
use serde_json::{Value, json};

use crate::ModelArgs;
use crate::domains::DomainArgs;
use crate::heat_map::{Block, HeatMap, Paint, layer_name, percent};
use crate::load::{bar, load};
use crate::session::SessionArgs;
use crate::units::grouped;

#[derive(clap::Args)]
#[command(group(clap::ArgGroup::new("domains").required(true).multiple(true).args(["text", "prompt"])))]
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
    routing: Routing,
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
        let mut evaluator = Evaluator::new(&model, &options)?;
        let total: usize = texts.iter().map(|(_, tokens)| tokens.len()).sum();
        let bar = bar(total as u64, "routing {wide_bar} {pos} of {len} tokens, {per_sec}, {eta} left");
        let mut found = Vec::new();
        for (name, tokens) in texts {
            let routing = evaluator.routing(&tokens, &mut |tokens| bar.inc(tokens as u64))?;
            found.push(Found { name, routing });
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
        let rows: Vec<String> = (0..config.num_hidden_layers).map(layer_name).collect();
        let map = HeatMap { blocks: &blocks, rows: &rows, measure, even };
        anstream::print!("{}", map.draw(terminal_width(), Paint::of_stdout()));
        anstream::println!();
        let width = found.iter().map(|domain| domain.name.chars().count()).max().unwrap_or(0);
        for (domain, block) in found.iter().zip(&blocks) {
            let (expert, value) = block.largest_mean();
            let (name, most) = (&domain.name, percent(value));
            let tokens = grouped(domain.routing.tokens);
            let what = if self.weights { "of the weight" } else { "of the tokens" };
            let specialisation = match domain.routing.specialisation(config) {
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

impl Found {
    /// Its block of the heat map.
    fn block(&self, experts: usize, weights: bool) -> Block {
        let values = if weights { self.routing.mean_weights() } else { self.routing.shares() };
        Block { title: self.name.clone(), rows: values.chunks(experts).map(<[f64]>::to_vec).collect() }
    }
}

fn print_json(config: &Config, found: &[Found]) {
    let experts = config.num_local_experts;
    let domains: Vec<Value> = found
        .iter()
        .map(|domain| {
            let mut object = routing_json(&domain.routing, config);
            object["name"] = json!(domain.name);
            object
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

/// The numbers of where tokens went.
pub fn routing_json(routing: &Routing, config: &Config) -> Value {
    let experts = config.num_local_experts;
    json!({
        "tokens": routing.tokens,
        "specialisation": routing.specialisation(config),
        "counts": routing.counts.chunks(experts).collect::<Vec<_>>(),
        "weight_sums": routing.weight_sums.chunks(experts).collect::<Vec<_>>(),
    })
}

/// Columns of the terminal; as many as help texts have where there is none.
pub fn terminal_width() -> usize {
    terminal_size::terminal_size().map_or(100, |(width, _)| width.0 as usize)
}
