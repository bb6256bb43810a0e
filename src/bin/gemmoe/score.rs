//! `gemmoe score`

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anstyle::{AnsiColor, Style};
use gemmoe::engine::Perplexity;
use gemmoe::engine::options::DEFAULT_CONTEXT;
use gemmoe::engine::score::score_in_windows;
use gemmoe::{Model, Result};
use serde_json::json;

use crate::ModelArgs;
use crate::files::read_or_piped;
use crate::load::{bar, load};
use crate::session::SessionArgs;
use crate::units::grouped;

#[derive(clap::Args)]
pub struct Score {
    #[command(flatten)]
    model: ModelArgs,
    /// Text, or - for what is piped in; BOS goes before it and is not counted.
    #[arg(value_name = "FILE")]
    text: PathBuf,
    #[command(flatten)]
    session: SessionArgs,
    /// Print each token with its log-probability; in the JSON as "token_ids" and "log_probabilities".
    #[arg(long)]
    per_token: bool,
    /// Print {"perplexity": ..., "bits_per_byte": ..., "nats": ..., "tokens": ..., "bytes": ..., "seconds": ...}.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    color: colorchoice_clap::Color,
}

/// What was found about a text.
struct Found {
    perplexity: Perplexity,
    bytes: usize,
    time: Duration,
}

impl Score {
    pub fn run(&self) -> Result<()> {
        self.color.write_global();
        let text = read_or_piped(&self.text)?;
        let model = load(&self.model)?;
        let tokens = model.encode(&text, true, false)?;
        let options = self.session.options(tokens.len().min(DEFAULT_CONTEXT), &model);
        let bar = bar(tokens.len() as u64, "scoring {wide_bar} {pos} of {len} tokens, {per_sec}, {eta} left");
        let mut perplexity = Perplexity::default();
        let mut scores = Vec::new();
        let started = Instant::now();
        score_in_windows(&model, &tokens, &options, &mut |part| {
            perplexity.add(part);
            scores.extend_from_slice(part);
            bar.inc(part.len() as u64);
        })?;
        bar.finish_and_clear();
        let found = Found { perplexity, bytes: text.len(), time: started.elapsed() };
        match (self.json, self.per_token) {
            (true, per_token) => found.print_json(per_token.then_some((&tokens[1..], &scores))),
            (false, true) => print_tokens(&model, &tokens[1..], &scores)?,
            (false, false) => found.print(),
        }
        Ok(())
    }
}

impl Found {
    fn bits_per_byte(&self) -> f64 {
        self.perplexity.nats / std::f64::consts::LN_2 / self.bytes as f64
    }

    fn print(&self) {
        let Found { perplexity, bytes, time } = self;
        let seconds = time.as_secs_f64();
        let per_second = perplexity.tokens as f64 / seconds.max(1e-9);
        println!("{:<14} {:.4}", "perplexity", perplexity.value());
        println!("{:<14} {:.4}", "bits per byte", self.bits_per_byte());
        println!("{:<14} {} in {} bytes", "tokens", grouped(perplexity.tokens as u64), grouped(*bytes as u64));
        println!("{:<14} {seconds:.2} s, {per_second:.0} tokens/s", "time");
    }

    fn print_json(&self, per_token: Option<(&[u32], &Vec<f32>)>) {
        let mut object = json!({
            "perplexity": self.perplexity.value(),
            "bits_per_byte": self.bits_per_byte(),
            "nats": self.perplexity.nats,
            "tokens": self.perplexity.tokens,
            "bytes": self.bytes,
            "seconds": self.time.as_secs_f64(),
        });
        if let Some((ids, scores)) = per_token {
            object["token_ids"] = json!(ids);
            object["log_probabilities"] = json!(scores);
        }
        println!("{object}");
    }
}

/// The longest bar, in bits of surprise.
const LONGEST_BAR: usize = 20;

fn print_tokens(model: &Model, tokens: &[u32], scores: &[f32]) -> Result<()> {
    let tokenizer = model.tokenizer()?;
    anstream::println!("{:>8} {:>15}  {:<LONGEST_BAR$}  text", "token", "log-probability", "bits of surprise");
    for (token, score) in tokens.iter().zip(scores) {
        let bits = -score / std::f32::consts::LN_2;
        let style = surprise_style(bits);
        let bar = "█".repeat((bits.round() as usize).min(LONGEST_BAR));
        let text = String::from_utf8_lossy(tokenizer.token_bytes(*token, true)?);
        anstream::println!("{token:>8} {score:>15.4}  {style}{bar:<LONGEST_BAR$}  {text:?}{style:#}");
    }
    Ok(())
}

fn surprise_style(bits: f32) -> Style {
    let color = match bits {
        ..2.0 => AnsiColor::Green,
        ..5.0 => AnsiColor::Cyan,
        ..10.0 => AnsiColor::Yellow,
        _ => AnsiColor::Red,
    };
    color.on_default()
}
