//! What was found about all routers: as a table, as JSON.

use std::path::PathBuf;

use gemmoe::Result;
use gemmoe::evaluate::{PairScore, PreferenceFigures, TextFigures};
use gemmoe::model::Config;
use gemmoe::train::{PairLogProbabilities, PreferenceOptions};
use serde_json::{Value, json};

use super::table::{Better, Format, Row, Section, Table};
use crate::heat_map::{Block, HeatMap, Paint, layer_name};
use crate::routes::{routing_json, terminal_width};
use crate::units::grouped;

/// What was found about a router.
pub struct Measured {
    pub name: String,
    pub directory: PathBuf,
    pub patch: Option<PathBuf>,
    pub config: Config,
    /// By domain.
    pub texts: Vec<TextFigures>,
    /// By file of pairs.
    pub pairs: Vec<Vec<PairScore>>,
}

/// About all routers.
pub struct Report {
    pub domains: Vec<String>,
    pub pairs: Vec<String>,
    pub routers: Vec<Measured>,
    /// By router, and file of pairs.
    preferences: Vec<Vec<PreferenceFigures>>,
    reference: usize,
    preference: PreferenceOptions,
}

impl Measured {
    /// By layer and expert, the share of a domain's tokens.
    pub fn block(&self, domain: &str, figures: &TextFigures) -> Block {
        let shares = figures.routing.shares();
        let rows = shares.chunks(self.config.num_local_experts).map(<[f64]>::to_vec).collect();
        Block { title: domain.to_owned(), rows }
    }

    /// What every share would be if all experts were used alike.
    pub fn even(&self) -> f64 {
        self.config.num_experts_per_tok as f64 / self.config.num_local_experts as f64
    }

    fn shape(&self) -> [usize; 3] {
        [self.config.num_hidden_layers, self.config.num_local_experts, self.config.num_experts_per_tok]
    }
}

impl Report {
    /// Compares scores of pairs with those of the router at `reference`.
    pub fn new(
        domains: Vec<String>,
        pairs: Vec<String>,
        routers: Vec<Measured>,
        reference: usize,
        preference: PreferenceOptions,
    ) -> Result<Report> {
        let known = &routers[reference].pairs;
        let of_router = |router: &Measured| {
            let files = router.pairs.iter().zip(known);
            files.map(|(scores, known)| PreferenceFigures::new(scores, known, &preference)).collect::<Result<_>>()
        };
        let preferences = routers.iter().map(of_router).collect::<Result<_>>()?;
        Ok(Report { domains, pairs, preferences, routers, reference, preference })
    }

    /// Prints it for people.
    pub fn print(&self, layers: bool) {
        let columns: Vec<String> = self.routers.iter().map(|router| router.name.clone()).collect();
        let sections = self.sections();
        anstream::print!("{}", Table { columns: &columns, sections: &sections }.draw(terminal_width()));
        if columns.len() > 1 {
            anstream::println!("\n* the best of its line; differences are to {}", columns[0]);
        }
        if !self.domains.is_empty() {
            self.print_maps(layers);
        }
    }

    fn sections(&self) -> Vec<Section> {
        let mut sections = Vec::new();
        if !self.domains.is_empty() {
            let row = |label: String, format, value: &dyn Fn(&Measured) -> Option<f64>| Row {
                label,
                format,
                better: Better::Lower,
                values: self.routers.iter().map(value).collect(),
                missing: "-",
            };
            let of_domains = |format, value: &dyn Fn(&TextFigures) -> Option<f64>| {
                let rows = self.domains.iter().enumerate();
                rows.map(|(at, name)| row(name.clone(), format, &|router| value(&router.texts[at]))).collect()
            };
            let title = |what: &str| Section { title: what.to_owned(), rows: Vec::new() };
            let perplexity = of_domains(Format::Ratio, &|figures| Some(figures.perplexity.value()));
            sections.push(Section { rows: perplexity, ..title("perplexity") });
            let per_token = of_domains(Format::Number, &|figures| Some(figures.nats_per_token()));
            sections.push(Section { rows: self.with_mean(per_token), ..title("nats per token") });
            let per_byte = of_domains(Format::Number, &TextFigures::nats_per_byte);
            sections.push(Section { rows: self.with_mean(per_byte), ..title("nats per byte") });
        }
        sections.extend((0..self.pairs.len()).map(|file| self.preference_section(file)));
        sections
    }

    /// With the mean of all rows, where there are several.
    fn with_mean(&self, mut rows: Vec<Row>) -> Vec<Row> {
        if rows.len() < 2 {
            return rows;
        }
        let mean = |router: usize| {
            let sum: Option<f64> = rows.iter().map(|row| row.values[router]).sum();
            Some(sum? / rows.len() as f64)
        };
        let values = (0..self.routers.len()).map(mean).collect();
        let (format, better) = (rows[0].format, rows[0].better);
        rows.push(Row { label: "mean".to_owned(), format, better, values, missing: "-" });
        rows
    }

    fn preference_section(&self, file: usize) -> Section {
        let row = |label: &str, format, better, missing, value: &dyn Fn(&PreferenceFigures) -> Option<f64>| Row {
            label: label.to_owned(),
            format,
            better,
            values: self.preferences.iter().map(|files| value(&files[file])).collect(),
            missing,
        };
        let (higher, neither) = (Better::Higher, Better::Neither);
        let rows = vec![
            row("accuracy", Format::Percent, higher, "ties", &|found| found.accuracy()),
            row("margin", Format::Number, higher, "-", &|found| Some(found.margin())),
            row("loss", Format::Number, Better::Lower, "-", &|found| Some(found.loss)),
            row("chosen is likelier", Format::Percent, higher, "-", &|found| Some(found.plain_accuracy())),
            row("likelier per token", Format::Percent, higher, "-", &|found| Some(found.plain_accuracy_per_token())),
            row("log p of chosen", Format::Number, neither, "-", &|found| Some(found.log_probabilities.chosen)),
            row("log p of rejected", Format::Number, neither, "-", &|found| Some(found.log_probabilities.rejected)),
        ];
        let count = self.preferences[0][file].pairs as u64;
        let reference = &self.routers[self.reference].name;
        Section { title: format!("{}: {} pairs, beside {reference}", self.pairs[file], grouped(count)), rows }
    }

    /// Where tokens are sent: routers of one shape share a scale.
    fn print_maps(&self, layers: bool) {
        let with_choice: Vec<&Measured> =
            self.routers.iter().filter(|router| router.config.num_local_experts > 1).collect();
        for routers in with_choice.chunk_by(|a, b| a.shape() == b.shape()) {
            let rows: Vec<String> = match layers {
                true => (0..routers[0].config.num_hidden_layers).map(layer_name).collect(),
                false => self.domains.clone(),
            };
            let blocks: Vec<Block> = routers.iter().flat_map(|router| self.blocks(router, layers)).collect();
            let map = HeatMap { blocks: &blocks, rows: &rows, measure: "share of tokens", even: routers[0].even() };
            anstream::println!();
            anstream::print!("{}", map.draw(terminal_width(), Paint::of_stdout()));
        }
    }

    /// A router's blocks: one of domains, or one of layers for each domain.
    fn blocks(&self, router: &Measured, layers: bool) -> Vec<Block> {
        let of_domains = self.domains.iter().zip(&router.texts);
        if !layers {
            let rows = of_domains.map(|(domain, figures)| router.block(domain, figures).mean()).collect();
            return vec![Block { title: router.name.clone(), rows }];
        }
        let titled = |(domain, figures): (&String, &TextFigures)| {
            let title = match self.routers.len() {
                1 => domain.clone(),
                _ => format!("{domain}, {}", router.name),
            };
            Block { title, ..router.block(domain, figures) }
        };
        of_domains.map(titled).collect()
    }

    /// One object with all numbers.
    pub fn to_json(&self) -> Value {
        let routers = self.routers.iter().zip(&self.preferences).map(|(router, preferences)| {
            let domains = self.domains.iter().zip(&router.texts).map(|(name, figures)| {
                json!({
                    "name": name,
                    "perplexity": figures.perplexity.value(),
                    "nats_per_token": figures.nats_per_token(),
                    "nats_per_byte": figures.nats_per_byte(),
                    "nats": figures.perplexity.nats,
                    "tokens": figures.perplexity.tokens,
                    "bytes": figures.bytes,
                    "documents": figures.documents,
                    "routing": routing_json(&figures.routing, &router.config),
                })
            });
            let pairs = self.pairs.iter().zip(preferences).map(|(name, found)| preference_json(name, found));
            json!({
                "name": router.name,
                "model": router.directory.display().to_string(),
                "patch": router.patch.as_ref().map(|path| path.display().to_string()),
                "num_hidden_layers": router.config.num_hidden_layers,
                "num_local_experts": router.config.num_local_experts,
                "num_experts_per_tok": router.config.num_experts_per_tok,
                "domains": domains.collect::<Vec<_>>(),
                "pairs": pairs.collect::<Vec<_>>(),
            })
        });
        let mut object = json!({"routers": routers.collect::<Vec<_>>()});
        if !self.pairs.is_empty() {
            object["reference"] = json!(self.routers[self.reference].name);
            object["beta"] = json!(self.preference.beta);
            object["mean_log_probability"] = json!(self.preference.mean_log_probability);
        }
        object
    }
}

fn preference_json(name: &str, found: &PreferenceFigures) -> Value {
    let both = |pair: &PairLogProbabilities| json!({"chosen": pair.chosen, "rejected": pair.rejected});
    json!({
        "name": name,
        "pairs": found.pairs,
        "wins": found.wins,
        "ties": found.ties,
        "accuracy": found.accuracy(),
        "margin": found.margin(),
        "loss": found.loss,
        "rewards": both(&found.rewards),
        "log_probabilities": both(&found.log_probabilities),
        "log_probabilities_per_token": both(&found.per_token),
        "plain_accuracy": found.plain_accuracy(),
        "plain_accuracy_per_token": found.plain_accuracy_per_token(),
    })
}
