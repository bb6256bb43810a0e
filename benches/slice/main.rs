//! Tokens/s of a slice of the real geometry beside the machine's read bandwidth, measured in the same run.
//!
//! `cargo bench --bench slice` (or `make bench`) writes the slice (see `common/slice.rs`) below `target/bench` once, loads
//! it, and prints medians over interleaved rounds. `GEMMOE_BENCH_ROUNDS` changes their number, `GEMMOE_BENCH_JSON` names a
//! file for the figures. Decode reads each active weight once per token, so its roof is the bandwidth; prefill is bound by
//! arithmetic, so its roof is the rate of f32 multiply-adds. With `-- --write` the slice is only written.

#[path = "../common/mod.rs"]
mod common;

use std::time::Instant;

use common::report::Report;
use common::roof::PROBE_BYTES;
use common::slice::{ACTIVE, HEAD};
use common::{models, roof};

const PROMPT: usize = 128;
const DECODE: usize = 8;
const TOKEN_BYTES: usize = 2 * (ACTIVE + HEAD);

fn main() {
    if common::is_test() {
        return;
    }
    if common::is_write() {
        models::write_slice();
        return;
    }
    let model = models::slice();
    println!("{}", model.backend().device_name());
    println!(
        "a decoded token reads {:.2} GB of weights, a prompt token takes {:.2} G multiply-adds",
        TOKEN_BYTES as f64 / 1e9,
        ACTIVE as f64 / 1e9
    );

    let mut session = models::session(&model, 1024);
    let prompt = models::prompt(&model, 0, PROMPT);
    let (mut bandwidth, mut arithmetic, mut prefill, mut decode) = (vec![], vec![], vec![], vec![]);
    for round in 0..=common::rounds(5) {
        let threads = models::threads();
        let roofs = (roof::read_bandwidth(threads, PROBE_BYTES).unwrap(), roof::multiply_adds(threads));
        session.rewind(0).unwrap();
        let started = Instant::now();
        session.prefill(&prompt).unwrap();
        let prefill_rate = PROMPT as f64 / started.elapsed().as_secs_f64();
        session.step().unwrap();
        let started = Instant::now();
        for _ in 0..DECODE {
            session.step().unwrap();
        }
        let decode_rate = DECODE as f64 / started.elapsed().as_secs_f64();
        if round > 0 {
            bandwidth.push(roofs.0);
            arithmetic.push(roofs.1);
            prefill.push(prefill_rate);
            decode.push(decode_rate);
        }
    }
    let shares = |rates: &[f64], each: usize, roofs: &[f64]| -> Vec<f64> {
        rates.iter().zip(roofs).map(|(rate, roof)| rate * each as f64 / roof * 100.0).collect()
    };
    let mut report = Report::new();
    report.row("read_bandwidth", "read bandwidth", "GB/s", &bandwidth, 1e-9);
    report.row("f32_multiply_adds", "f32 multiply-adds", "G/s", &arithmetic, 1e-9);
    report.row("prefill", "prefill", "tokens/s", &prefill, 1.0);
    report.row("prefill_share", "  share of the multiply-adds", "%", &shares(&prefill, ACTIVE, &arithmetic), 1.0);
    report.row("decode", "decode", "tokens/s", &decode, 1.0);
    report.row("decode_share", "  share of the bandwidth", "%", &shares(&decode, TOKEN_BYTES, &bandwidth), 1.0);
    report.write();
}
