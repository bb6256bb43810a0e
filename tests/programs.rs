//! Random programs of operations on sessions, alone and in batches, with budgets, forks, snapshots, windows that slide and
//! cancels from another thread, against what a session promises: whatever was done before, its logits, routes and draws are
//! those of a fresh session, alone, on one thread, fed the same tokens with the same settings.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

#[path = "common/canceller.rs"]
mod canceller;
#[path = "programs/grammars.rs"]
mod grammars;
#[path = "programs/operations.rs"]
mod operations;
#[path = "programs/oracle.rs"]
mod oracle;
#[path = "programs/subject.rs"]
mod subject;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Instant;

use common::{Directory, load_with};
use gemmoe::backend::cpu::kernels::Instructions;
use safetensors::Dtype;
use serde_json::{Value, json};

/// Tokens of the models, few enough that sessions come back to what the oracle knows.
pub const VOCAB_SIZE: usize = 11;
/// The longest context.
pub const LONGEST: usize = 48;
/// Most sessions of one program.
pub const MOST_SESSIONS: usize = 5;

/// Programs of all models together.
fn programs() -> u64 {
    std::env::var("GEMMOE_PROGRAMS").map_or(10_000, |count| count.parse().unwrap())
}

/// Runs the programs of the seeds from 1 to `count` on two threads. A failure names its seed; GEMMOE_PROGRAM runs it alone.
fn run_all<S>(name: &str, count: u64, start: impl Fn() -> S + Sync, program: impl Fn(&mut S, u64) + Sync) {
    let only: Option<u64> = std::env::var("GEMMOE_PROGRAM").ok().map(|seed| seed.parse().unwrap());
    let started = Instant::now();
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (start, program) = (&start, &program);
            scope.spawn(move || {
                let mut state = start();
                let seeds = (1..=count).filter(|seed| seed % 2 == half);
                for seed in seeds.filter(|seed| only.is_none_or(|only| only == *seed)) {
                    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| program(&mut state, seed))) {
                        println!("{name}: program {seed} failed; run it alone with GEMMOE_PROGRAM={seed}");
                        resume_unwind(panic);
                    }
                }
            });
        }
    });
    println!("{name}: {count} programs in {:.1?}", started.elapsed());
}

/// A model of a few hundred parameters a layer.
fn tiny(seed: u64, dtype: Dtype, changes: Value) -> Directory {
    let mut all = json!({
        "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "hidden_size": 16, "intermediate_size": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4
    });
    for (key, value) in changes.as_object().unwrap() {
        all[key] = value.clone();
    }
    let mut directory = Directory::random_with(seed, all);
    directory.dtype = dtype;
    directory
}

fn run_programs(name: &str, directory: Directory, threads: usize, count: u64) {
    let directory = directory.to_temporary();
    let model = load_with(directory.path(), threads, Instructions::Detect);
    let alone = load_with(directory.path(), 1, Instructions::Detect);
    run_all(name, count, || oracle::Oracle::new(&alone), |oracle, seed| operations::run(&model, oracle, seed));
    assert_eq!(model.kv_account().used(), 0, "what sessions and forks took was given back");
}

#[test]
fn any_program_of_operations_gives_what_fresh_sessions_give() {
    let count = programs() / 3;
    run_programs("two of four experts, bf16", tiny(51, Dtype::BF16, json!({})), 1, count);
    let odd = json!({
        "hidden_size": 12, "head_dim": 2, "intermediate_size": 5, "num_local_experts": 5, "num_experts_per_tok": 5
    });
    run_programs("all of five experts, odd sizes, f32", tiny(52, Dtype::F32, odd), 2, count);
    let deep = json!({
        "num_hidden_layers": 3, "num_local_experts": 7, "num_experts_per_tok": 3, "num_key_value_heads": 2,
        "intermediate_size": 9
    });
    run_programs("three of seven experts, three layers, f16", tiny(53, Dtype::F16, deep), 1, programs() - 2 * count);
}

#[test]
fn any_program_under_a_grammar_draws_what_it_allows_and_what_a_session_that_was_never_moved_draws() {
    grammars::run_programs(programs() / 20);
}
