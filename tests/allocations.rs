//! What the steady decode loop allocates: nothing. And what a model leaves behind: nothing either.

mod common;
#[path = "common/counting.rs"]
mod counting;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

use std::ffi::c_void;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use common::{Directory, batch, load_with};
use counting::{allocations, failing_after, live_bytes, own_allocations};
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::backend::cpu::threads::Task;
use gemmoe::backend::cpu::{CpuOptions, ParallelFor, ThreadOptions};
use gemmoe::engine::experts::RouteArrays;
use gemmoe::text::grammar::{Grammar, GrammarKind};
use gemmoe::{
    Budget, LoadOptions, LogitBias, Model, Overflow, Pooling, Progress, Sampling, Session, SessionOptions, Status,
};
use serde_json::json;

/// Allocations are counted over the whole process: the tests of this file take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work` once to begin with, then again and counts what that allocates.
fn allocated(mut work: impl FnMut()) -> usize {
    work();
    // A thread's own beginning allocates; on a busy machine it may come late.
    std::thread::sleep(Duration::from_millis(20));
    let before = allocations();
    work();
    allocations() - before
}

fn session(model: &Arc<Model>, options: SessionOptions) -> Session {
    let options = SessionOptions { context_size: 256, prefill_chunk: 16, ..options };
    Session::new(Arc::clone(model), &options).unwrap()
}

/// Every setting there is, used.
fn every_setting() -> Sampling {
    Sampling {
        temperature: 0.9,
        top_k: 40,
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.2,
        presence_penalty: 0.1,
        frequency_penalty: 0.1,
        penalty_window: 30,
        seed: 1,
    }
}

/// A host that runs tasks one after the other.
unsafe extern "C" fn run_in_turn(_context: *mut c_void, count: u32, task: Task, task_context: *mut c_void) {
    // SAFETY: a task may be called with any index.
    (0..count).for_each(|index| unsafe { task(task_context, index) });
}

#[test]
fn a_step_allocates_nothing_and_a_dropped_model_leaves_nothing() {
    let _turn = turn();
    // SAFETY: the function needs no context.
    let host = unsafe { ParallelFor::new(run_in_turn, std::ptr::null_mut()) };
    for parallel_for in [None, Some(host)] {
        let threads = ThreadOptions { count: 3, parallel_for, ..Default::default() };
        check_that_steps_allocate_nothing(CpuOptions { threads, ..Default::default() });
    }
}

fn check_that_steps_allocate_nothing(cpu: CpuOptions) {
    let directory = Directory::random(71).to_temporary();
    let options = LoadOptions { cpu, ..Default::default() };
    let round = || {
        let model = Model::load(directory.path(), &options, &Progress::default()).unwrap();
        let mut session = session(&model, SessionOptions::default());
        for sampling in [Sampling::default(), every_setting()] {
            session.set_sampling(sampling).unwrap();
            let count = allocated(|| {
                session.rewind(0).unwrap();
                session.prefill(&[2; 40]).unwrap();
                for _ in 0..50 {
                    session.step().unwrap();
                }
                session.prefill(&[3; 20]).unwrap();
                session.rewind(60).unwrap();
                session.step().unwrap();
            });
            assert_eq!(count, 0, "{sampling:?}");
        }
    };
    round();
    let before = live_bytes();
    (0..8).for_each(|_| round());
    assert_eq!(live_bytes(), before);
}

#[test]
fn no_way_of_sampling_allocates() {
    let _turn = turn();
    let directory = Directory::random(72).to_temporary();
    let mut session = session(&load_with(directory.path(), 2, Instructions::Detect), SessionOptions::default());
    let plain = Sampling { temperature: 0.8, ..Default::default() };
    let every = every_setting();
    let ways = [
        Sampling { top_k: every.top_k, ..plain },
        Sampling { top_k: 1, ..plain },
        Sampling { top_p: every.top_p, ..plain },
        Sampling { min_p: every.min_p, ..plain },
        Sampling { repetition_penalty: every.repetition_penalty, ..plain },
        Sampling { presence_penalty: every.presence_penalty, temperature: 0.0, ..plain },
        Sampling { frequency_penalty: every.frequency_penalty, penalty_window: 3, ..plain },
        every,
    ];
    for biased in [false, true] {
        let pairs: &[(u32, f32)] = if biased { &[(3, f32::NEG_INFINITY), (50, 2.0)] } else { &[] };
        session.set_logit_bias(LogitBias::new(pairs, 97).unwrap());
        for sampling in ways {
            let count = allocated(|| {
                session.rewind(0).unwrap();
                session.prefill(&[2, 3, 4]).unwrap();
                session.set_sampling(sampling).unwrap();
                for _ in 0..30 {
                    session.step().unwrap();
                }
            });
            assert_eq!(count, 0, "{sampling:?}, biased: {biased}");
        }
    }
}

#[test]
fn steps_within_budgets_allocate_nothing() {
    let _turn = turn();
    let directory = Directory::random(73).to_temporary();
    let mut session = session(&load_with(directory.path(), 2, Instructions::Detect), SessionOptions::default());
    for budget in [Budget::of_layers(1), Budget::of_time(Duration::ZERO), Budget::of_time(Duration::from_micros(50))] {
        let count = allocated(|| {
            session.rewind(0).unwrap();
            session.push(&[2; 40]).unwrap();
            let mut drawn = 0;
            while drawn < 20 {
                if let Poll::Ready(token) = session.step_within(&budget) {
                    token.unwrap();
                    drawn += 1;
                }
            }
        });
        assert_eq!(count, 0, "{budget:?}");
    }
}

#[test]
fn steps_of_a_batch_and_of_forks_allocate_nothing() {
    let _turn = turn();
    let directory = Directory::random(74).to_temporary();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let mut first = session(&model, SessionOptions::default());
    first.set_sampling(every_setting()).unwrap();
    first.prefill(&[2; 40]).unwrap();
    let mut fork = first.fork().unwrap();
    let mut second = fork.fork().unwrap();
    second.set_sampling(Sampling { seed: 2, ..every_setting() }).unwrap();
    let mut batch = batch(&model, 3, 16, 256);
    let mut results = Vec::with_capacity(3);
    for budget in [Budget::UNLIMITED, Budget::of_layers(1)] {
        let count = allocated(|| {
            // As far as the last page that is shared, and not into it.
            for session in [&mut first, &mut fork, &mut second] {
                session.rewind(40).unwrap();
            }
            second.push(&[5; 30]).unwrap();
            for _ in 0..60 {
                batch.step(&mut [&mut first, &mut fork, &mut second], &budget, &mut results).unwrap();
                results.drain(..).for_each(|result| assert!(!matches!(result, Poll::Ready(Err(_)))));
            }
            for _ in 0..20 {
                fork.step().unwrap();
                second.step().unwrap();
            }
        });
        assert_eq!(count, 0, "{budget:?}");
    }
}

#[test]
fn windows_that_slide_and_routes_that_are_fetched_allocate_nothing() {
    let _turn = turn();
    let directory = Directory::random(75).to_temporary();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let options = SessionOptions { overflow: Overflow::Slide { keep: 5 }, route_capacity: 20, ..Default::default() };
    let options = SessionOptions { context_size: 40, prefill_chunk: 16, ..options };
    let mut session = Session::new(Arc::clone(&model), &options).unwrap();
    session.set_sampling(every_setting()).unwrap();
    session.prefill(&[2; 90]).unwrap();
    let (mut positions, mut tokens, mut experts, mut weights) = ([0; 8], [0; 8], [0; 8 * 4], [0.0; 8 * 4]);
    let mut fetched = 0;
    let count = allocated(|| {
        for _ in 0..150 {
            session.step().unwrap();
            let mut arrays = RouteArrays {
                positions: &mut positions,
                tokens: &mut tokens,
                experts: &mut experts,
                weights: &mut weights,
            };
            fetched += session.fetch_routes(&mut arrays).0;
        }
    });
    assert!(session.dropped() > 200 && fetched >= 300, "{} dropped, {fetched} fetched", session.dropped());
    assert_eq!(count, 0);
}

#[test]
fn a_step_under_a_grammar_allocates_and_only_until_it_is_lifted() {
    let _turn = turn();
    let directory = Directory::random_with(76, json!({"vocab_size": tokenizer_sample::VOCAB_SIZE})).to_temporary();
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer_sample::sample().to_string()).unwrap();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let mut session = session(&model, SessionOptions::default());
    session.set_sampling(every_setting()).unwrap();
    let grammar = Grammar::new(model.grammar_vocabulary().unwrap(), GrammarKind::Regex, "(hello )*").unwrap();
    let mut steps = |is_constrained: bool| {
        session.rewind(0).unwrap();
        session.set_grammar(None).unwrap();
        session.prefill(&[2]).unwrap();
        session.set_grammar(is_constrained.then_some(&grammar)).unwrap();
        for _ in 0..30 {
            session.step().unwrap();
        }
    };
    // The parser's states are found as it goes and kept by it: a host that may not allocate does without a grammar.
    assert!(allocated(|| steps(true)) > 0);
    assert_eq!(allocated(|| steps(false)), 0);
}

/// Runs `work` with its first large allocation failing, then with its second, until it succeeds; each time on a session in
/// the same state, which a failure leaves as it was.
fn fail_each_allocation<T>(
    name: &str,
    model: &Model,
    state: &Session,
    work: impl Fn(&mut Session) -> gemmoe::Result<T>,
) {
    let snapshot = |session: &Session| {
        let mut bytes = vec![0; session.snapshot_bytes()];
        session.snapshot(&mut bytes).unwrap();
        bytes
    };
    let expected = snapshot(state);
    for count in 0.. {
        assert!(count < 10_000, "{name} ends");
        let mut session = state.fork().unwrap();
        let (pages, memory) = (model.kv_account().used(), live_bytes());
        let (result, failed) = failing_after(count, || work(&mut session).map(drop));
        match result {
            Ok(()) => {
                assert!(!failed, "{name}: allocation {count} failed and nobody said so");
                assert!(count > 0, "{name} allocates");
                return;
            }
            Err(error) => {
                assert_eq!((error.status(), failed), (Status::OutOfMemory, true), "{name}, {count}: {error}");
                drop(error);
                assert_eq!(model.kv_account().used(), pages, "{name}, {count}: pages were given back");
                assert_eq!(live_bytes(), memory, "{name}, {count}: memory was given back");
                assert!(snapshot(&session) == expected, "{name}, {count}: nothing was changed");
            }
        }
    }
}

#[test]
fn whichever_allocation_fails_nothing_has_changed_and_nothing_is_left() {
    let _turn = turn();
    let sizes = json!({
        "vocab_size": 1000, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 10, "num_local_experts": 64
    });
    let directory = Directory::random_with(77, sizes).to_temporary();
    let model = load_with(directory.path(), 1, Instructions::Detect);
    let mut state = session(&model, SessionOptions { route_capacity: 64, ..Default::default() });
    let pairs: Vec<(u32, f32)> = (0..900).map(|token| (token, 0.5)).collect();
    state.set_logit_bias(LogitBias::new(&pairs, 1000).unwrap());
    state.set_sampling(every_setting()).unwrap();
    state.set_allowed_experts(None, u64::MAX - 1).unwrap();
    let tokens: Vec<u32> = (2..90).collect();
    state.prefill(&tokens[..40]).unwrap();
    let mut bytes = vec![0; state.snapshot_bytes()];
    state.snapshot(&mut bytes).unwrap();
    let options = SessionOptions { prefill_chunk: 16, ..Default::default() };
    let check = |name: &str, work: &dyn Fn(&mut Session) -> gemmoe::Result<()>| {
        fail_each_allocation(name, &model, &state, work);
    };
    check("a session", &|_| Session::new(Arc::clone(&model), &options).map(drop));
    check("a fork", &|session| session.fork().map(drop));
    check("a restored session", &|_| Session::restore(Arc::clone(&model), &bytes, &options).map(drop));
    check("a rewind into shared pages", &|session| session.rewind(3));
    check("an embedding", &|session| session.embed(&tokens[..5], Pooling::Mean, &mut [0.0; 512]));
    check("a batch", &|_| {
        let options = gemmoe::BatchOptions { max_sessions: 300, max_tokens: 300, max_context: 256, prefill_chunk: 64 };
        gemmoe::SessionBatch::new(Arc::clone(&model), &options).map(drop)
    });
    check("a bias", &|_| LogitBias::new(&pairs, 1000).map(drop));
}

/// A thread that finds no memory when it begins can only end the process. What the standard library takes for it, names
/// for its own table where the host is in Rust, cannot be left out.
#[test]
fn a_thread_of_the_pool_begins_without_an_allocation_of_ours() {
    let _turn = turn();
    let elsewhere = |work: &dyn Fn()| {
        let others = || allocations() - own_allocations();
        let count = |_| {
            let before = others();
            work();
            others() - before
        };
        // The next test's thread may begin in the midst of one, but not of all.
        (0..10).map(count).min()
    };
    let of_nothing = elsewhere(&|| {
        let begin = |index| std::thread::Builder::new().name(format!("gemmoe-{index}")).spawn(|| ()).unwrap();
        let threads: Vec<_> = (1..8).map(begin).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
    let directory = Directory::random(78).to_temporary();
    let of_pool = elsewhere(&|| drop(load_with(directory.path(), 8, Instructions::Detect)));
    assert_eq!(of_pool, of_nothing);
}
