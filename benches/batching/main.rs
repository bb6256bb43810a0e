//! What sessions gain by running together: tokens/s of 1 to 16 sessions in one batch, beside the roofs.
//!
//! `cargo bench --bench batching` (or `make batching`). A pass reads each expert that any of its tokens goes to once,
//! so together they need fewer bytes per token until all experts are read anyway; then arithmetic is the limit.
//! Rounds go through all numbers of sessions in turn; `GEMMOE_BENCH_ROUNDS` changes how many there are,
//! `GEMMOE_BENCH_MODEL` picks one model, `demo` or `slice`.

#[path = "../common/mod.rs"]
mod common;

use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use common::figures::{median, median_heading, median_row};
use common::process::processor_time;
use common::slice::{ATTENTION, EXPERT, HEAD, LAYERS, TOP_K};
use common::{models, roof};
use gemmoe::{BatchOptions, Budget, Model, Session, SessionBatch, SessionOptions};

const SIZES: [usize; 5] = [1, 2, 4, 8, 16];
const OPENING: usize = 8;
const CONTEXT: usize = 128;

/// What one number of sessions gave, round by round.
#[derive(Default)]
struct Figures {
    rates: Vec<f64>,
    /// Tokens per second against those of one session in the same round.
    ratios: Vec<f64>,
    /// The same of tokens per second of processor time, which a busy machine disturbs less.
    processor_ratios: Vec<f64>,
    touched: Vec<f64>,
    /// Of the time that the slower of the two roofs allows, in percent.
    shares: Vec<f64>,
}

fn main() {
    if common::is_test() {
        return;
    }
    println!("{} threads", models::threads());
    if common::wants("demo") {
        // Its weights fit the caches: no roof of memory says anything about it.
        let figures = measure(&models::demo(), 64, 9, &mut |_, _, _| f64::NAN);
        print("demo", &figures);
    }
    if common::wants("slice") {
        slice();
    }
}

fn slice() {
    let (mut bandwidth, mut arithmetic) = (vec![], vec![]);
    let figures = measure(&models::slice(), 4, 7, &mut |sessions, touched, seconds| {
        if sessions == SIZES[0] {
            bandwidth.push(roof::read_bandwidth(models::threads(), roof::PROBE_BYTES).unwrap());
            arithmetic.push(roof::multiply_adds(models::threads()));
        }
        let bytes = 2.0 * (LAYERS as f64 * (touched * EXPERT as f64 + ATTENTION as f64) + HEAD as f64);
        let multiply_adds = (sessions * (LAYERS * (TOP_K * EXPERT + ATTENTION) + HEAD)) as f64;
        let least = (bytes / bandwidth[bandwidth.len() - 1]).max(multiply_adds / arithmetic[arithmetic.len() - 1]);
        100.0 * least / seconds
    });
    print("slice, bf16", &figures);
    median_heading();
    median_row("read bandwidth, GB/s", &bandwidth[1..], 1e-9);
    median_row("f32 multiply-adds, G/s", &arithmetic[1..], 1e-9);
}

fn print(name: &str, figures: &[Figures]) {
    println!(
        "{name:<14} {:>9} {:>24} {:>20} {:>20} {:>8} {:>8}",
        "sessions", "tokens/s", "ratio to one", "by processor time", "experts", "of roof"
    );
    let range = |values: &[f64]| {
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), v| (v.min(low), v.max(high)));
        format!("{:.2} ({low:.2} to {high:.2})", median(values))
    };
    for (sessions, figures) in SIZES.iter().zip(figures) {
        println!(
            "{:<14} {sessions:>9} {:>24} {:>20} {:>20} {:>8.2} {:>8}",
            "",
            range(&figures.rates),
            range(&figures.ratios),
            range(&figures.processor_ratios),
            median(&figures.touched),
            if figures.shares[0].is_nan() { "-".into() } else { format!("{:.0} %", median(&figures.shares)) }
        );
    }
}

/// `share` is asked, after each measurement, what share of the roofs it is: sessions, experts touched per layer, seconds
/// of a step.
fn measure(
    model: &Arc<Model>,
    steps: usize,
    rounds: usize,
    share: &mut dyn FnMut(usize, f64, f64) -> f64,
) -> Vec<Figures> {
    let most = SIZES[SIZES.len() - 1];
    let options = SessionOptions { context_size: CONTEXT, batch_only: true, ..Default::default() };
    let mut sessions: Vec<Session> = (0..most).map(|_| Session::new(Arc::clone(model), &options).unwrap()).collect();
    let batch = BatchOptions { max_sessions: most, max_context: CONTEXT, ..Default::default() };
    let mut batch = SessionBatch::new(Arc::clone(model), &batch).unwrap();
    for (number, session) in sessions.iter_mut().enumerate() {
        let prompt = models::prompt(model, number, OPENING);
        assert!(session.rewind(0).is_ok() && session.push(&prompt).is_ok());
    }
    run(&mut batch, &mut sessions);

    let mut figures: Vec<Figures> = SIZES.iter().map(|_| Figures::default()).collect();
    for round in 0..=common::rounds(rounds) {
        let (mut one, mut one_processor) = (0.0, 0.0);
        for (count, figures) in SIZES.iter().zip(&mut figures) {
            let sessions = &mut sessions[..*count];
            // The token after the opening, of every session the same in every round.
            sessions.iter_mut().for_each(|session| session.rewind(OPENING + 1).unwrap());
            run(&mut batch, sessions);
            let mut touched = 0.0;
            let (started, processor_before) = (Instant::now(), processor_time());
            for _ in 0..steps {
                run(&mut batch, sessions);
                touched += batch.touched_experts();
            }
            let seconds = started.elapsed().as_secs_f64() / steps as f64;
            let processor_seconds = (processor_time() - processor_before).as_secs_f64() / steps as f64;
            let (rate, processor_rate) = (*count as f64 / seconds, *count as f64 / processor_seconds);
            let touched = touched / steps as f64;
            if *count == SIZES[0] {
                (one, one_processor) = (rate, processor_rate);
            }
            let share = share(*count, touched, seconds);
            if round > 0 {
                figures.rates.push(rate);
                figures.ratios.push(rate / one);
                figures.processor_ratios.push(processor_rate / one_processor);
                figures.touched.push(touched);
                figures.shares.push(share);
            }
        }
    }
    figures
}

/// One token for each.
fn run(batch: &mut SessionBatch, sessions: &mut [Session]) {
    let mut sessions: Vec<&mut Session> = sessions.iter_mut().collect();
    let mut results = Vec::new();
    batch.step(&mut sessions, &Budget::UNLIMITED, &mut results).unwrap();
    assert!(results.iter().all(|result| matches!(result, Poll::Ready(Ok(_)))));
}
