//! `gemmoe quantize`

use std::path::PathBuf;
use std::sync::Arc;

use gemmoe::engine::options::DEFAULT_CONTEXT;
use gemmoe::engine::score::perplexity;
use gemmoe::quant::{Groups, ScaleDtype};
use gemmoe::quantize::{Kind, TensorReport, check};
use gemmoe::{Formats, Importance, Model, QuantizeOptions, QuantizeReport, Result, SessionOptions, quantize};
use serde_json::{Value, json};

use crate::LoadArgs;
use crate::domains::texts_of;
use crate::formats::{FormatName, parse_group_size, parse_scales};
use crate::load::{bar, load_directory, watch};
use crate::units::{grouped, size};

#[derive(clap::Args)]
pub struct Quantize {
    /// Model directory.
    #[arg(value_name = "DIR")]
    source: PathBuf,
    /// Directory to write; it must not be there, or be empty.
    #[arg(value_name = "OUT")]
    target: PathBuf,
    /// What experts are rounded to.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "int4")]
    experts: FormatName,
    /// What queries, keys, values and output projections are rounded to.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "int8")]
    attention: FormatName,
    /// What the head is rounded to; and the embedding, where that is the head.
    #[arg(long, value_name = "FORMAT", value_enum, default_value = "int8")]
    head: FormatName,
    /// What the embedding is rounded to; by default it stays as it is, or is the head. With another format than the head's
    /// the two are stored apart.
    #[arg(long, value_name = "FORMAT", value_enum)]
    embedding: Option<FormatName>,
    /// Weights that share a scale: 32, 64 or 128. Larger groups take less memory and round worse.
    #[arg(long, value_name = "N", default_value = "32", value_parser = parse_group_size)]
    group_size: usize,
    /// What scales are stored as: bf16, or f16, which is finer in int8 and reaches less far.
    #[arg(long, value_name = "DTYPE", default_value = "bf16", value_parser = parse_scales)]
    scales: ScaleDtype,
    /// A text like those the model will see, to weigh errors by. The model is loaded as it is and run over it. May be given
    /// several times.
    #[arg(long, value_name = "FILE")]
    calibration: Vec<PathBuf>,
    /// A text, or a directory of texts, to measure the perplexity of before and after. May be given several times.
    #[arg(long, value_name = "FILE")]
    perplexity: Vec<PathBuf>,
    /// Threads; by default one per core.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Follow symbolic links inside the directory, as in a download cache.
    #[arg(long)]
    follow_links: bool,
    /// Bytes of one weight file, about.
    #[arg(long, value_name = "BYTES", default_value_t = 5_000_000_000)]
    shard_bytes: u64,
    /// Print the error of every tensor.
    #[arg(long)]
    verbose: bool,
    /// Print one JSON object, with the error of every tensor in it.
    #[arg(long)]
    json: bool,
}

/// The perplexity of a text.
struct Measured {
    name: String,
    before: f64,
    after: f64,
}

impl Measured {
    fn change_percent(&self) -> f64 {
        100.0 * (self.after / self.before - 1.0)
    }
}

impl Quantize {
    pub fn run(&self) -> Result<()> {
        let calibration = texts_of(&self.calibration)?;
        let texts = texts_of(&self.perplexity)?;
        let options = QuantizeOptions {
            formats: self.formats(),
            threads: self.threads,
            follow_links: self.follow_links,
            shard_bytes: self.shard_bytes,
        };
        let (mut importance, mut before) = (None, Vec::new());
        if !calibration.is_empty() || !texts.is_empty() {
            check(&self.source, &self.target, &options)?;
            let model = load_directory(&self.source, &self.load_args())?;
            if !calibration.is_empty() {
                importance = Some(collect(&model, &calibration)?);
            }
            before = perplexities(&model, &texts)?;
        }
        let report = watch("quantising", |progress| {
            quantize(&self.source, &self.target, &options, importance.as_ref(), progress)
        })?;
        let mut measured = Vec::new();
        if !texts.is_empty() {
            let after = perplexities(&load_directory(&self.target, &self.load_args())?, &texts)?;
            let pairs = texts.iter().zip(before.iter().zip(after));
            measured.extend(pairs.map(|((name, _), (before, after))| Measured {
                name: name.clone(),
                before: *before,
                after,
            }));
        }
        if self.json {
            print_json(&report, &measured);
        } else {
            self.print_text(&report, &measured);
        }
        Ok(())
    }

    fn formats(&self) -> Formats {
        let groups = Groups { size: self.group_size, scales: self.scales };
        Formats {
            experts: self.experts.format(groups),
            attention: self.attention.format(groups),
            head: self.head.format(groups),
            embedding: self.embedding.and_then(|name| name.format(groups)),
        }
    }

    fn load_args(&self) -> LoadArgs {
        LoadArgs { threads: self.threads, follow_links: self.follow_links, ..Default::default() }
    }

    fn print_text(&self, report: &QuantizeReport, measured: &[Measured]) {
        let saved = 100.0 * report.bytes_after as f64 / report.bytes_before.max(1) as f64;
        println!("{:<8} {:>18} bytes {:>9}", "before", grouped(report.bytes_before), size(report.bytes_before));
        let after = grouped(report.bytes_after);
        println!("{:<8} {after:>18} bytes {:>9}, {saved:.1} %", "after", size(report.bytes_after));
        println!("\nThe root mean square of the error, by that of the weights:\n");
        println!("{:<10} {:>8}  {:>8}  {:>9}  format", "", "error", "worst", "largest");
        for kind in Kind::MATRICES {
            let is_kind = |tensor: &TensorReport| tensor.kind == kind;
            let Some(rounded) = report.rounded(is_kind) else { continue };
            let tensors = || report.tensors.iter().filter(|tensor| is_kind(tensor));
            let worst = tensors().map(|tensor| tensor.rounded.relative()).fold(0.0, f64::max);
            let format = tensors().next().map(|tensor| tensor.format.to_string()).unwrap_or_default();
            println!(
                "{:<10} {:>8}  {:>8}  {:>9.3e}  {format}",
                kind.name(),
                percent(rounded.relative()),
                percent(worst),
                rounded.largest
            );
        }
        print_layers(report);
        if self.verbose {
            println!("\n{:>8}  {:>9}  tensor", "error", "largest");
            for tensor in &report.tensors {
                let error = percent(tensor.rounded.relative());
                println!("{error:>8}  {:>9.3e}  {}", tensor.rounded.largest, tensor.name);
            }
        }
        if !measured.is_empty() {
            println!("\n{:<24} {:>10} {:>10} {:>9}", "perplexity", "before", "after", "change");
            for text in measured {
                let change = text.change_percent();
                println!("{:<24} {:>10.4} {:>10.4} {change:>+8.2} %", text.name, text.before, text.after);
            }
        }
    }
}

/// A row for each layer, a column for each kind.
fn print_layers(report: &QuantizeReport) {
    let in_layers = |kind: &Kind| report.rounded(|tensor| tensor.kind == *kind && tensor.layer.is_some()).is_some();
    let kinds: Vec<Kind> = Kind::MATRICES.into_iter().filter(in_layers).collect();
    let Some(last) = report.tensors.iter().filter_map(|tensor| tensor.layer).max() else { return };
    let names: String = kinds.iter().map(|kind| format!(" {:>8}", kind.name())).collect();
    println!("\n{:<10}{names}", "layer");
    for layer in 0..=last {
        let of_kind = |kind: &Kind| report.rounded(|tensor| tensor.kind == *kind && tensor.layer == Some(layer));
        let error = |kind| of_kind(kind).map_or("-".to_owned(), |rounded| percent(rounded.relative()));
        println!("{layer:<10}{}", kinds.iter().map(|kind| format!(" {:>8}", error(kind))).collect::<String>());
    }
}

fn percent(share: f64) -> String {
    format!("{:.3} %", 100.0 * share)
}

fn print_json(report: &QuantizeReport, measured: &[Measured]) {
    let tensor = |tensor: &TensorReport| {
        json!({
            "name": tensor.name,
            "kind": tensor.kind.name(),
            "layer": tensor.layer,
            "expert": tensor.expert,
            "format": tensor.format.name(),
            "group_size": tensor.format.groups().map(|groups| groups.size),
            "scales": tensor.format.groups().map(|groups| groups.scales.name()),
            "relative_error": tensor.rounded.relative(),
            "largest_error": tensor.rounded.largest,
            "bytes_before": tensor.bytes_before,
            "bytes_after": tensor.bytes_after,
        })
    };
    let text = |text: &Measured| {
        json!({
            "name": text.name,
            "before": text.before,
            "after": text.after,
            "change_percent": text.change_percent(),
        })
    };
    let object = json!({
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "tensors": report.tensors.iter().map(tensor).collect::<Vec<Value>>(),
        "perplexity": measured.iter().map(text).collect::<Vec<Value>>(),
    });
    println!("{object}");
}

/// Runs the calibration texts through the model.
fn collect(model: &Arc<Model>, texts: &[(String, String)]) -> Result<Importance> {
    let encode = |(_, text): &(String, String)| model.encode(text, true, false);
    let tokens: Vec<Vec<u32>> = texts.iter().map(encode).collect::<Result<_>>()?;
    let total = tokens.iter().map(Vec::len).sum::<usize>() as u64;
    let bar = bar(total, "calibrating {wide_bar} {pos} of {len} tokens, {per_sec}, {eta} left");
    let importance = Importance::collect(model, &tokens, &mut |count| bar.inc(count as u64))?;
    bar.finish_and_clear();
    Ok(importance)
}

/// The perplexity of each text.
fn perplexities(model: &Arc<Model>, texts: &[(String, String)]) -> Result<Vec<f64>> {
    let measure = |(name, text): &(String, String)| {
        let tokens = model.encode(text, true, false)?;
        let context_size = tokens.len().min(DEFAULT_CONTEXT).min(model.config().max_position_embeddings);
        let options = SessionOptions { context_size, ..Default::default() };
        let bar = bar(tokens.len() as u64, "{prefix} {wide_bar} {pos} of {len} tokens, {per_sec}, {eta} left")
            .with_prefix(format!("scoring {name}"));
        let found = perplexity(model, &tokens, &options, &mut |done| bar.set_position(done as u64))?;
        bar.finish_and_clear();
        Ok(found.value())
    };
    texts.iter().map(measure).collect()
}
