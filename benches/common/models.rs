//! The two models of the benches: the small one of the examples and the slice of the real geometry.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use gemmoe::backend::cpu::{CpuOptions, Priority, ThreadOptions};
use gemmoe::{LoadOptions, Model, Progress, Session, SessionOptions};

use super::{setting, slice};

/// One per processor; `GEMMOE_BENCH_THREADS` says otherwise, to leave the host one of its own.
pub fn threads() -> usize {
    setting("GEMMOE_BENCH_THREADS", std::thread::available_parallelism().map_or(1, usize::from))
}

/// `GEMMOE_BENCH_SPIN_US`, `GEMMOE_BENCH_PIN=1` and `GEMMOE_BENCH_PRIORITY` (0 to 2) change the threads of every bench.
fn thread_options() -> ThreadOptions {
    ThreadOptions {
        count: threads(),
        pin: setting("GEMMOE_BENCH_PIN", 0) == 1,
        spin_us: setting("GEMMOE_BENCH_SPIN_US", 0) as u32,
        priority: [Priority::Normal, Priority::Low, Priority::Lowest][setting("GEMMOE_BENCH_PRIORITY", 0).min(2)],
        parallel_for: None,
    }
}

pub fn demo() -> Arc<Model> {
    load(&repository().join("examples/demo-model"))
}

/// Writes the slice, unless it is there, and tells where.
pub fn write_slice() -> PathBuf {
    let directory = repository().join("target/bench/slice-bf16");
    slice::write(&directory);
    directory
}

/// Writes the slice first, unless it is there; prints how long loading took.
pub fn slice() -> Arc<Model> {
    let directory = write_slice();
    let started = Instant::now();
    let model = load(&directory);
    let (bytes, _) = model.backend().weight_bytes();
    let (gigabytes, seconds) = (bytes as f64 / 1e9, started.elapsed().as_secs_f64());
    println!("slice: {gigabytes:.2} GB loaded in {seconds:.1} s, {:.2} GB/s", gigabytes / seconds);
    model
}

pub fn session(model: &Arc<Model>, context_size: usize) -> Session {
    let options = SessionOptions { context_size, ..Default::default() };
    Session::new(Arc::clone(model), &options).unwrap()
}

/// Tokens from all over the vocabulary; `number` tells prompts of one length apart.
pub fn prompt(model: &Model, number: usize, length: usize) -> Vec<u32> {
    let vocabulary = model.config().vocab_size;
    (0..length).map(|at| ((at + 31 * number + 1) * 7919 % vocabulary) as u32).collect()
}

fn load(directory: &Path) -> Arc<Model> {
    let options =
        LoadOptions { cpu: CpuOptions { threads: thread_options(), ..Default::default() }, ..Default::default() };
    Model::load(directory, &options, &Progress::default()).unwrap_or_else(|error| panic!("{error}"))
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}
