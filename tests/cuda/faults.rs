//! Every driver call failing in turn: the status that is documented, everything freed, and whoever else there is goes on.

use std::path::Path;
use std::sync::Arc;

use gemmoe::backend::cuda::planned_residency;
use gemmoe::{LoadOptions, Model, Pooling, Progress, Result, Session, Status};

use crate::common::{Directory, Random, load, load_options, session};
use crate::shim::Shim;
use crate::{on_device, on_tensor_cores};

/// What a host does: load, a session, a prompt, an embedding in a fork, four tokens. All of it is freed at the end.
fn life(directory: &Path, load: &LoadOptions, prompt: &[u32]) -> Result<Vec<u32>> {
    let model = Model::load(directory, load, &Progress::default())?;
    let mut session = Session::new(Arc::clone(&model), &options())?;
    session.prefill(prompt)?;
    let mut embedding = vec![0f32; model.config().hidden_size];
    session.fork()?.embed(&[1, 2, 3], Pooling::Mean, &mut embedding)?;
    (0..4).map(|_| session.step()).collect()
}

fn options() -> gemmoe::SessionOptions {
    gemmoe::SessionOptions { context_size: 32, prefill_chunk: 20, ..Default::default() }
}

/// A code and the statuses it may become, in a call before and after the device is open.
const CODES: [(i32, &[Status]); 5] = [
    (1, &[Status::DeviceFailed]),
    (2, &[Status::DeviceOutOfMemory, Status::OutOfMemory]),
    (700, &[Status::DeviceLost, Status::DeviceFailed]),
    (719, &[Status::DeviceLost, Status::DeviceFailed]),
    (999, &[Status::DeviceLost, Status::DeviceFailed]),
];

/// Of every so many calls one fails; an odd number, so that rounds of calls are met at each place. 1 is all of them.
fn stride() -> usize {
    std::env::var("GEMMOE_FAULT_STRIDE").ok().and_then(|text| text.parse().ok()).unwrap_or(17)
}

/// Codes after which a context is lost.
fn is_fatal(code: i32) -> bool {
    code >= 700
}

#[test]
fn whichever_driver_call_fails_it_is_an_error_and_everything_is_freed() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let processor = load(directory.path());
    fail_at_each_call(&shim, directory.path(), &on_device(), 5, stride());
    // The processor knows nothing of it.
    let mut session = session(&processor);
    session.prefill(&Random::new(1).tokens(5, 97)).unwrap();
    session.step().unwrap();
}

#[test]
fn whichever_driver_call_fails_while_experts_are_in_host_memory_it_is_an_error_and_everything_is_freed() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let error = planned_residency(&Model::inspect(directory.path(), &on_device()).unwrap().0, 1).unwrap_err();
    let least = error.to_string().split("at least ").nth(1).unwrap().split(',').next().unwrap().parse::<u64>().unwrap();
    // Two of eight experts are on the device. The others are computed on the processor, and copied.
    let device_memory_limit = least + 3 * 7000;
    let few = LoadOptions { device_memory_limit, ..on_tensor_cores() };
    fail_at_each_call(&shim, directory.path(), &few, 5, 2 * stride() + 1);
    let copied = LoadOptions { device_memory_limit, ..on_device() };
    fail_at_each_call(&shim, directory.path(), &copied, 18, 3 * stride());
}

/// Lives through a prompt of so many tokens and four more, with each `stride`th call failing in turn.
fn fail_at_each_call(shim: &Shim, directory: &Path, load: &LoadOptions, tokens: usize, stride: usize) {
    let prompt = Random::new(1).tokens(tokens, 97);
    let life = || life(directory, load, &prompt);
    let before = shim.calls();
    let expected = life().unwrap();
    let calls = shim.calls() - before;
    let live = || (shim.live_allocations(), shim.live_objects());
    assert_eq!(live(), (0, 0));
    // Nobody needs to know of a call that frees, or of one that makes a graph, which stages make up for.
    let (mut failed, mut unharmed) = (0, 0);
    for (index, (code, statuses)) in CODES.into_iter().enumerate() {
        // A context that somebody else holds frees nothing by itself.
        let other = (!is_fatal(code)).then(|| load_options(directory, &on_device()));
        let before = live();
        for nth in (1 + index as u64..=calls).step_by(stride) {
            shim.fail(nth, code);
            match life() {
                Ok(tokens) => {
                    assert_eq!(tokens, expected, "call {nth} of {calls} failed with {code}, unnoticed");
                    unharmed += 1;
                }
                Err(error) => {
                    let status = error.status();
                    assert!(
                        statuses.contains(&status),
                        "call {nth} of {calls} failed with {code}: {status:?}, {error}"
                    );
                    failed += 1;
                }
            }
            assert_eq!(live(), before, "left after call {nth} of {calls} failed with {code}");
            shim.fail(0, 0);
        }
        drop(other);
    }
    println!("{calls} calls: {failed} failures were errors, {unharmed} did no harm");
    assert!(failed > 2 * unharmed, "{failed} failures were errors, {unharmed} did no harm");
}

#[test]
fn a_lost_device_ends_its_own_sessions_alone_and_can_be_loaded_anew() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let (processor, device) = (load(directory.path()), load_options(directory.path(), &on_device()));
    let tokens = Random::new(2).tokens(6, 97);
    let (mut here, mut first, mut second) = (session(&processor), session(&device), session(&device));
    for session in [&mut here, &mut first, &mut second] {
        session.prefill(&tokens).unwrap();
    }
    shim.fail(12, 719);
    let error = first.step().and_then(|_| first.step()).unwrap_err();
    assert_eq!(error.status(), Status::DeviceLost, "{error}");
    assert!(error.to_string().contains("CUDA_ERROR_LAUNCH_FAILED (719)"), "{error}");
    // Also those that did nothing, and again.
    for _ in 0..2 {
        let error = second.step().and_then(|_| second.step()).unwrap_err();
        assert_eq!(error.status(), Status::DeviceLost, "{error}");
        assert!(error.to_string().contains("was lost by an earlier error, CUDA_ERROR_LAUNCH_FAILED (719)"), "{error}");
    }
    assert!(Session::new(Arc::clone(&device), &options()).is_err_and(|error| error.status() == Status::DeviceLost));
    here.step().unwrap();
    drop((first, second, device));
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
    let device = load_options(directory.path(), &on_device());
    session(&device).prefill(&tokens).unwrap();
}

#[test]
fn after_a_failure_that_is_not_the_end_the_session_goes_on() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let model = load_options(directory.path(), &on_device());
    let tokens = Random::new(3).tokens(6, 97);
    let mut session = session(&model);
    session.prefill(&tokens).unwrap();
    let expected: Vec<u32> = (0..3).map(|_| session.step().unwrap()).collect();
    for nth in (1..60).step_by(7) {
        session.rewind(6).unwrap();
        shim.fail(nth, 1);
        let mut drawn = Vec::new();
        let mut errors = 0;
        while drawn.len() < 3 {
            match session.step() {
                Ok(token) => drawn.push(token),
                Err(error) => {
                    assert_eq!(error.status(), Status::DeviceFailed, "call {nth}: {error}");
                    errors += 1;
                }
            }
        }
        assert_eq!((&drawn, errors <= 1), (&expected, true), "call {nth}");
    }
}

#[test]
fn a_model_that_does_not_fit_says_how_much_is_free() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    shim.total_memory(20_000);
    let error = Model::load(directory.path(), &on_device(), &Progress::default()).err().unwrap();
    assert_eq!(error.status(), Status::DeviceOutOfMemory, "{error}");
    assert!(
        error.to_string().contains("for the weights") && error.to_string().contains("of 20000 are free"),
        "{error}"
    );
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
    // A session that does not fit leaves the others as they are.
    shim.total_memory(4 << 20);
    let model = load_options(directory.path(), &LoadOptions { ..on_device() });
    let mut first = session(&model);
    let mut kept = Vec::new();
    let error = (0..1000)
        .find_map(|_| Session::new(Arc::clone(&model), &large()).map(|session| kept.push(session)).err())
        .unwrap();
    assert_eq!(error.status(), Status::DeviceOutOfMemory, "{error}");
    first.prefill(&Random::new(4).tokens(6, 97)).unwrap();
}

fn large() -> gemmoe::SessionOptions {
    gemmoe::SessionOptions { context_size: 512, prefill_chunk: 128, ..Default::default() }
}
