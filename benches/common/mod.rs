//! What the benches share: the models they run, the roofs they compare with, the rows they print.
#![allow(dead_code)] // Each bench uses its own part.

#[path = "../../src/bin/gemmoe/bench/figure.rs"]
pub mod figure;
pub mod figures;
pub mod models;
pub mod process;
pub mod report;
#[path = "../../src/bin/gemmoe/bench/roof/mod.rs"]
pub mod roof;
pub mod slice;

/// `cargo test --benches` runs the benches too, to see that they build and start.
pub fn is_test() -> bool {
    std::env::args().any(|argument| argument == "--test")
}

/// `cargo bench --bench NAME -- --write` writes the bench's model and measures nothing.
pub fn is_write() -> bool {
    std::env::args().any(|argument| argument == "--write")
}

/// A number the user may set.
pub fn setting(variable: &str, default: usize) -> usize {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Whether a model is to be measured: `GEMMOE_BENCH_MODEL` picks one, `demo` or `slice`.
pub fn wants(model: &str) -> bool {
    std::env::var("GEMMOE_BENCH_MODEL").map_or(true, |wanted| wanted == model)
}

/// Measured rounds; the first one, which warms up, comes on top.
pub fn rounds(default: usize) -> usize {
    setting("GEMMOE_BENCH_ROUNDS", default).max(1)
}

/// Numbers that look random and are the same in every run.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 16) % end
    }
}
