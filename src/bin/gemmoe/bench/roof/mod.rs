//! What the machine can do at best: the roofs that figures are reported beside. The repository's benches share these
//! files.

mod arithmetic;
mod memory;

use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use gemmoe::Result;

pub use arithmetic::{bf16_dot_products, int8_dot_products, multiply_adds};
pub use memory::read_bandwidth;

/// Memory that the bandwidth is measured on: far past any cache.
pub const PROBE_BYTES: usize = 1 << 30;

/// Something the machine does so fast and no faster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Roof {
    ReadBandwidth,
    MultiplyAdds,
    Bf16DotProducts,
    Int8DotProducts,
}

impl Roof {
    pub const ALL: [Roof; 4] = [Roof::ReadBandwidth, Roof::MultiplyAdds, Roof::Bf16DotProducts, Roof::Int8DotProducts];

    /// Its key in JSON.
    pub fn key(self) -> &'static str {
        match self {
            Roof::ReadBandwidth => "read_bandwidth",
            Roof::MultiplyAdds => "f32_multiply_adds",
            Roof::Bf16DotProducts => "bf16_dot_products",
            Roof::Int8DotProducts => "int8_dot_products",
        }
    }

    /// Its name for people.
    pub fn name(self) -> &'static str {
        match self {
            Roof::ReadBandwidth => "read bandwidth",
            Roof::MultiplyAdds => "f32 multiply-adds",
            Roof::Bf16DotProducts => "bf16 dot products",
            Roof::Int8DotProducts => "int8 dot products",
        }
    }

    /// The unit it is reported in, 1e9 of what is measured: multiply-adds, but for the bandwidth.
    pub fn unit(self) -> &'static str {
        match self {
            Roof::ReadBandwidth => "GB/s",
            _ => "G/s",
        }
    }

    /// Bytes or multiply-adds per second of `threads` threads, the bandwidth on `bytes` of memory; none where the
    /// processor has no instruction for it.
    pub fn measure(self, threads: usize, bytes: usize) -> Result<Option<f64>> {
        match self {
            Roof::ReadBandwidth => read_bandwidth(threads, bytes).map(Some),
            Roof::MultiplyAdds => Ok(Some(multiply_adds(threads))),
            Roof::Bf16DotProducts => Ok(bf16_dot_products(threads)),
            Roof::Int8DotProducts => Ok(int8_dot_products(threads)),
        }
    }
}

/// How long `threads` threads take for `items` pieces of work, `work(round, item)` each, in each of `rounds` rounds.
///
/// A thread takes the next piece when it is done with one, so that one that the system interrupts does not hold up the
/// others. A round lasts from the first thread's start to the last one's end.
fn times(threads: usize, rounds: usize, items: usize, work: &(dyn Fn(usize, usize) + Sync)) -> Vec<Duration> {
    let barrier = Barrier::new(threads);
    let next: Vec<AtomicUsize> = (0..rounds).map(|_| AtomicUsize::new(0)).collect();
    let run = || {
        let mut spans = Vec::with_capacity(rounds);
        for (round, next) in next.iter().enumerate() {
            barrier.wait();
            let started = Instant::now();
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                work(round, item);
            }
            spans.push((started, Instant::now()));
        }
        spans
    };
    let spans: Vec<Vec<(Instant, Instant)>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).collect()
    });
    let round = |round: usize| {
        let started = spans.iter().map(|spans| spans[round].0).min();
        let ended = spans.iter().map(|spans| spans[round].1).max();
        started.zip(ended).map_or(Duration::MAX, |(started, ended)| ended.duration_since(started))
    };
    (0..rounds).map(round).collect()
}

/// The shortest of some times, in seconds.
fn shortest(times: &[Duration]) -> f64 {
    times.iter().min().map_or(f64::INFINITY, Duration::as_secs_f64)
}
