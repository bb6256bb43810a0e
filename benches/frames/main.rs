//! A game loop: every frame gives the library 2 ms and does something else in between. How late do calls come back?
//!
//! `cargo bench --bench frames` (or `make frames`) plays 10,000 frames of decode and of prefill on the demo model and on
//! the slice, compares what comes out with a run in one piece, and fails if it differs. `GEMMOE_BENCH_FRAMES` changes the
//! number of frames, `GEMMOE_BENCH_BUDGET_US` the budget, `GEMMOE_BENCH_MODEL` picks one model, `demo` or `slice`.

#[path = "../common/mod.rs"]
mod common;
mod game;
mod overhead;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use common::figures::{histogram, percent_above, percentile_heading, percentile_row};
use common::{models, setting};
use game::{Frames, Game};
use gemmoe::Model;

fn main() -> ExitCode {
    if common::is_test() {
        return ExitCode::SUCCESS;
    }
    let budget = Duration::from_micros(setting("GEMMOE_BENCH_BUDGET_US", 2000) as u64);
    println!("{} threads, budgets of {} us but where told", models::threads(), budget.as_micros());
    let mut same = true;
    if common::wants("demo") {
        let demo = models::demo();
        same &= play("demo", &demo, budget, 512, 16);
        // A token of the demo model takes less than the usual budget.
        same &= play("demo, budget 100 us", &demo, Duration::from_micros(100), 512, 16);
    }
    if common::wants("slice") {
        same &= play("slice", &models::slice(), budget, 512, 2);
    }
    if same { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plays decode and prefill, prints what came of it, and answers whether the results were those of a run in one piece.
fn play(name: &str, model: &Arc<Model>, budget: Duration, prompt_length: usize, overhead_tokens: usize) -> bool {
    let game = Game::new(model, budget, prompt_length, setting("GEMMOE_BENCH_FRAMES", 10_000));
    println!();
    let decode = game.decode();
    print(&format!("{name}, decode"), &decode, budget);
    let prefill = game.prefill();
    print(&format!("{name}, prefill of {prompt_length}"), &prefill, budget);
    overhead::print(name, model, budget, overhead_tokens);
    decode.same && prefill.same
}

fn print(name: &str, frames: &Frames, budget: Duration) {
    let in_budgets = |time: &Duration| time.as_secs_f64() / budget.as_secs_f64();
    let all: Vec<f64> = frames.calls.iter().map(|call| in_budgets(&call.time)).collect();
    let left_alone = frames.calls.iter().filter(|call| !call.disturbed);
    let left_alone: Vec<f64> = left_alone.map(|call| in_budgets(&call.time)).collect();
    percentile_heading("time of a call, in budgets");
    percentile_row(name, &all);
    percentile_row("  never waiting for a processor", &left_alone);
    println!(
        "  {:.2} frames per token; over 1 budget {:.2} %, over 2 {:.2} %; results {}",
        frames.calls.len() as f64 / frames.tokens.max(1) as f64,
        percent_above(&all, 1.0),
        percent_above(&all, 2.0),
        if frames.same { "as in one piece" } else { "DIFFER from those in one piece" }
    );
    histogram(&all, &[0.25, 0.5, 0.9, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0, 8.0]);
}
