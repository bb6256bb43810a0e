//! Router training's tokens/s, share of the f32 multiply-adds and peak memory.
//!
//! `cargo bench --bench training` takes steps of the demo model and of the slice of the real geometry (see
//! `common/slice.rs`) and prints medians; `GEMMOE_BENCH_MODEL`, `_ROUNDS` and `_THREADS` as for the other benches.
//! `-- --serve demo` or `slice` takes its orders from `tools/peers/bench_training.py` instead, a line each, and answers each
//! with a line of JSON: `start`, `roof`, `step`, `memory`, and `gradient FILE`, which writes the gates' gradients there.
//! Activations are kept; with `GEMMOE_BENCH_KEEP=0` they are computed again in the backward pass.

#[path = "../common/mod.rs"]
mod common;

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use common::report::Report;
use common::{models, process, roof};
use gemmoe::Model;
use gemmoe::memory::as_bytes;
use gemmoe::train::{Document, RouterTrainer, TrainOptions};
use serde_json::{Value, json};

/// Tokens of a document, and those of them that are a prompt.
const DOCUMENT: usize = 256;
const PROMPT: usize = 64;

fn main() {
    if common::is_test() {
        return;
    }
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--serve") {
        return Bench::new(&arguments[at + 1]).serve();
    }
    ["demo", "slice"].into_iter().filter(|name| common::wants(name)).for_each(|name| Bench::new(name).report(name));
}

/// A trainer and the documents of each of its steps.
struct Bench {
    trainer: RouterTrainer,
    documents: Vec<Document>,
}

impl Bench {
    fn new(name: &str) -> Bench {
        let (model, documents) = match name {
            "demo" => (models::demo(), 8),
            _ => (models::slice(), 2),
        };
        let documents = (0..documents).map(|number| {
            let tokens = models::prompt(&model, number, DOCUMENT);
            Document::new(&tokens[..PROMPT], &tokens[PROMPT..])
        });
        let documents: Vec<Document> = documents.collect();
        let options = TrainOptions {
            max_tokens: documents.len() * DOCUMENT,
            keep_activations: common::setting("GEMMOE_BENCH_KEEP", 1) == 1,
            ..TrainOptions::default()
        };
        Bench { trainer: RouterTrainer::new(&model, &options).unwrap(), documents }
    }

    fn tokens(&self) -> usize {
        self.documents.len() * DOCUMENT
    }

    /// Seconds, and those of processors.
    fn step(&mut self) -> (f64, f64) {
        let (started, processor_time) = (Instant::now(), process::processor_time());
        self.trainer.step(&self.documents).unwrap();
        (started.elapsed().as_secs_f64(), (process::processor_time() - processor_time).as_secs_f64())
    }

    /// Multiply-adds of a step that nothing can spare: each product forward, its transpose where a gradient goes on below, and
    /// the head's; attention's own are not counted.
    fn multiply_adds(&self) -> f64 {
        let (model, tokens): (&Arc<Model>, f64) = (self.trainer.model(), self.tokens() as f64);
        let config = model.config();
        let attention = 2 * config.hidden_size * (config.query_size() + config.key_value_size());
        let experts = config.num_experts_per_tok * 3 * config.hidden_size * config.intermediate_size;
        let layers = (2 * config.num_hidden_layers - 1) * (attention + experts);
        let targets = self.documents.iter().map(Document::targets).sum::<usize>() as f64;
        tokens * layers as f64 + targets * (2 * config.vocab_size * config.hidden_size) as f64
    }

    fn report(mut self, name: &str) {
        println!("{name}: {} tokens a step, {:.2} G multiply-adds", self.tokens(), self.multiply_adds() / 1e9);
        let (mut roofs, mut rates, mut shares) = (vec![], vec![], vec![]);
        self.step();
        for _ in 0..common::rounds(7) {
            let roof = roof::multiply_adds(models::threads());
            let (seconds, _) = self.step();
            roofs.push(roof);
            rates.push(self.tokens() as f64 / seconds);
            shares.push(100.0 * self.multiply_adds() / seconds / roof);
        }
        let mut report = Report::new();
        report.row("f32_multiply_adds", "f32 multiply-adds", "G/s", &roofs, 1e-9);
        report.row("training", "training", "tokens/s", &rates, 1.0);
        report.row("training_share", "  share of the multiply-adds", "%", &shares, 1.0);
        report.row("peak_memory", "peak memory", "MB", &[process::peak_memory() as f64], 1e-6);
        report.write();
    }

    fn serve(mut self) {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            println!("{}", self.answer(&line));
        }
    }

    fn answer(&mut self, line: &str) -> Value {
        match line.split_once(' ') {
            Some(("gradient", file)) => self.gradient(Path::new(file)),
            _ => match line {
                "roof" => json!({"multiply_adds": roof::multiply_adds(models::threads())}),
                "step" => {
                    let (seconds, processor_seconds) = self.step();
                    json!({"seconds": seconds, "processor_seconds": processor_seconds})
                }
                "memory" => json!({"bytes": process::peak_memory()}),
                "start" => json!({"tokens": self.tokens(), "multiply_adds": self.multiply_adds()}),
                _ => panic!("no such order: {line}"),
            },
        }
    }

    fn gradient(&mut self, file: &Path) -> Value {
        let metrics = self.trainer.gradient(&self.documents).unwrap();
        std::fs::write(file, as_bytes(self.trainer.gradients())).unwrap();
        json!({"loss": metrics.loss})
    }
}
