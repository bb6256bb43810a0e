//! How long a cancel takes: from the request on another thread to the return of the call it stops.
//!
//! `cargo bench --bench cancel` (or `make cancel`): 2,000 cancels at random moments of decode and of prefill, on the demo
//! model and on the slice. `GEMMOE_BENCH_CANCELS` changes their number, `GEMMOE_BENCH_MODEL` picks one model,
//! `GEMMOE_BENCH_THREADS` leaves a processor to the thread that cancels. The bound: each thread ends the item it is at, 100 to
//! 200 us of one core where weights are read, half a millisecond where many tokens share them.

#[path = "../common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use common::figures::{microseconds, percentile_heading, percentile_row};
use common::process::{NOTABLE_WAIT, waited};
use common::{Random, models, setting};
use gemmoe::{Budget, Model, Result, Session, Status};

const PROMPT: usize = 512;
const OPENING: usize = 8;
/// Cancels come up to this long after the work began. A cancelled pass goes on where it stopped, so that all its
/// stages are met.
const LONGEST_WAIT_US: u64 = 20_000;

fn main() {
    if common::is_test() {
        return;
    }
    let cancels = setting("GEMMOE_BENCH_CANCELS", 2000);
    println!("{} threads", models::threads());
    percentile_heading("request to return, us");
    if common::wants("demo") {
        measure("demo", &models::demo(), cancels);
    }
    if common::wants("slice") {
        measure("slice", &models::slice(), cancels);
    }
}

fn measure(name: &str, model: &Arc<Model>, cancels: usize) {
    let mut session = models::session(model, PROMPT + 1);
    let prompt = models::prompt(model, 0, PROMPT);
    let decode = latencies(
        &mut session,
        cancels,
        |session| {
            if session.tokens().is_empty() || session.tokens().len() == session.context_size() {
                session.rewind(0).unwrap();
                session.push(&prompt[..OPENING]).unwrap();
            }
        },
        |session| session.step().map(drop),
    );
    print(&format!("{name}, decode"), &decode);
    session.rewind(0).unwrap();
    // The prompt is pending before the call that is cancelled, which so takes none of it back.
    let prefill = latencies(
        &mut session,
        cancels,
        |session| {
            if session.pending() == 0 {
                session.rewind(0).unwrap();
                session.push(&prompt).unwrap();
            }
        },
        |session| match session.prefill_within(&[], &Budget::UNLIMITED) {
            std::task::Poll::Ready(result) => result,
            std::task::Poll::Pending => unreachable!("there is no budget"),
        },
    );
    print(&format!("{name}, prefill"), &prefill);
}

/// From one request to the return of the call it stopped.
struct Latency {
    microseconds: f64,
    /// Whether a thread of the process waited for a processor that others had.
    disturbed: bool,
}

fn print(name: &str, latencies: &[Latency]) {
    let all: Vec<f64> = latencies.iter().map(|latency| latency.microseconds).collect();
    let left_alone = latencies.iter().filter(|latency| !latency.disturbed);
    let left_alone: Vec<f64> = left_alone.map(|latency| latency.microseconds).collect();
    percentile_row(name, &all);
    percentile_row("  never waiting for a processor", &left_alone);
}

/// Calls `work` until it is cancelled, `cancels` times.
fn latencies(
    session: &mut Session,
    cancels: usize,
    prepare: impl Fn(&mut Session),
    work: impl Fn(&mut Session) -> Result<()>,
) -> Vec<Latency> {
    let cancel = Arc::clone(session.cancel());
    let (start, starts) = channel::<Duration>();
    let (requested, requests) = channel::<(Instant, Duration)>();
    let canceller = std::thread::spawn(move || {
        for wait in starts {
            std::thread::sleep(wait);
            let before = waited();
            let now = Instant::now();
            cancel.request();
            requested.send((now, before)).unwrap();
        }
    });
    let mut random = Random::new(2);
    let times = (0..cancels).map(|_| {
        start.send(Duration::from_micros(random.below(LONGEST_WAIT_US))).unwrap();
        loop {
            prepare(session);
            let called = Instant::now();
            let Err(error) = work(session) else { continue };
            let returned = Instant::now();
            assert_eq!(error.status(), Status::Cancelled);
            let after = waited();
            let (requested, before) = requests.recv().unwrap();
            // A request between two calls stops the next at its beginning.
            let microseconds = microseconds(returned - requested.max(called));
            break Latency { microseconds, disturbed: after.saturating_sub(before) > NOTABLE_WAIT };
        }
    });
    let times = times.collect();
    drop(start);
    canceller.join().unwrap();
    times
}
