//! Programs of sessions under a grammar.

pub fn run_programs(_count: u64) {}
