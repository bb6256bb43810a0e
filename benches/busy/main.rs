//! What is left of decode when each processor has another busy process: tokens/s beside busy loops, by tokens/s without.
//!
//! `cargo bench --bench busy` (or `make busy`). Its busy processes are this program, started again with an argument; they
//! end with it. Rounds measure without and with them in turn, and print medians of the ratio. An equal share of the
//! processors would be one half; the goal is 0.4. `GEMMOE_BENCH_ROUNDS` changes the number of rounds, `GEMMOE_BENCH_MODEL`
//! picks one model, `demo` or `slice`; `GEMMOE_BENCH_SPIN_US`, `GEMMOE_BENCH_PIN=1` and `GEMMOE_BENCH_PRIORITY` (0 to 2)
//! change the library's threads.

#[path = "../common/mod.rs"]
mod common;

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::figures::{median_heading, median_row};
use common::models;
use gemmoe::{Model, Session};

/// The argument that makes this program a busy process.
const BUSY: &str = "--busy-loop";
const OPENING: usize = 8;
const CONTEXT: usize = 128;
/// How long a rate is measured: many turns of all processes.
const MEASURE: Duration = Duration::from_millis(2500);
/// The system's scheduler spreads the processes meanwhile.
const SETTLE: Duration = Duration::from_millis(500);

fn main() {
    if std::env::args().any(|argument| argument == BUSY) {
        busy_loop();
    }
    if common::is_test() {
        return;
    }
    println!("{} threads, {} busy processes", models::threads(), processors());
    median_heading();
    if common::wants("demo") {
        measure("demo", &models::demo());
    }
    if common::wants("slice") {
        measure("slice, bf16", &models::slice());
    }
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Works until its standard input ends, which is when the bench lets go of it, or ends itself.
fn busy_loop() -> ! {
    std::thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = std::io::stdin().read_to_end(&mut rest);
        std::process::exit(0);
    });
    let mut number = 1u64;
    loop {
        number = std::hint::black_box(number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
}

/// One busy process for each processor, as long as it lives.
struct Busy(Vec<Child>);

impl Busy {
    fn start() -> Busy {
        let program = std::env::current_exe().unwrap();
        let start = |_| Command::new(&program).arg(BUSY).stdin(Stdio::piped()).spawn().unwrap();
        let busy = Busy((0..processors()).map(start).collect());
        std::thread::sleep(SETTLE);
        busy
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn measure(name: &str, model: &Arc<Model>) {
    let mut session = models::session(model, CONTEXT);
    session.push(&models::prompt(model, 0, OPENING)).unwrap();
    let (mut idle, mut beside, mut ratios) = (vec![], vec![], vec![]);
    for round in 0..=common::rounds(9) {
        let alone = rate(&mut session);
        let busy = Busy::start();
        let shared = rate(&mut session);
        drop(busy);
        if round > 0 {
            idle.push(alone);
            beside.push(shared);
            ratios.push(shared / alone);
        }
    }
    median_row(&format!("{name}: tokens/s, idle"), &idle, 1.0);
    median_row(&format!("{name}: tokens/s, busy"), &beside, 1.0);
    median_row(&format!("{name}: busy by idle"), &ratios, 1.0);
}

/// Tokens per second, over and over the same positions.
fn rate(session: &mut Session) -> f64 {
    let (started, mut tokens) = (Instant::now(), 0);
    while started.elapsed() < MEASURE {
        if session.tokens().len() == CONTEXT {
            session.rewind(OPENING + 1).unwrap();
        }
        session.step().unwrap();
        tokens += 1;
    }
    tokens as f64 / started.elapsed().as_secs_f64()
}
