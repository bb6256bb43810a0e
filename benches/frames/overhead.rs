//! What slicing costs: the time in calls for the same tokens, sliced and in one piece, in turn.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use gemmoe::{Budget, Model, Session};

use crate::common::figures::{median_heading, median_row};
use crate::common::{self, models};
use crate::game::Host;

const PAIRS: usize = 9;
const OPENING: usize = 8;
/// The prompt whose prefill is timed.
const PROMPT: usize = 64;

pub fn print(name: &str, model: &Arc<Model>, budget: Duration, tokens: usize) {
    let mut session = models::session(model, 256);
    let (mut decode, mut prefill) = (vec![], vec![]);
    for round in 0..=common::rounds(PAIRS) {
        let [sliced, whole] =
            [Budget::of_time(budget), Budget::UNLIMITED].map(|budget| run(&mut session, &budget, tokens));
        if round > 0 {
            prefill.push(sliced.0 / whole.0);
            decode.push(sliced.1 / whole.1);
        }
    }
    median_heading();
    median_row(&format!("{name}, decode sliced / whole"), &decode, 1.0);
    median_row(&format!("{name}, prefill sliced / whole"), &prefill, 1.0);
}

/// Seconds spent in calls, by a prefill and by decoding some tokens.
fn run(session: &mut Session, budget: &Budget, tokens: usize) -> (f64, f64) {
    let mut host = Host::new();
    session.rewind(0).unwrap();
    let prompt = models::prompt(session.model(), 1, PROMPT);
    let mut given = &prompt[..];
    let prefill = until_done(&mut host, || {
        let tokens = std::mem::take(&mut given);
        session.prefill_within(tokens, budget).map(|result| result.unwrap())
    });
    session.rewind(OPENING).unwrap();
    session.step().unwrap();
    let decode = (0..tokens).map(|_| {
        until_done(&mut host, || {
            session.step_within(budget).map(|result| {
                result.unwrap();
            })
        })
    });
    (prefill, decode.sum())
}

fn until_done(host: &mut Host, mut call: impl FnMut() -> Poll<()>) -> f64 {
    let mut time = Duration::ZERO;
    loop {
        host.work();
        let started = Instant::now();
        let result = call();
        time += started.elapsed();
        if result.is_ready() {
            return time.as_secs_f64();
        }
    }
}
