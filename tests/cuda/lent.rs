//! Contexts and streams that the host lends: used, left as they were, and refused where they cannot be used.

use std::ffi::{c_int, c_void};
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Barrier};

use gemmoe::backend::{Cancel, Device, LentContext, Limit, devices};
use gemmoe::train::{Document, RouterTrainer, TrainOptions};
use gemmoe::{LoadOptions, Model, Pooling, Progress, Session, SessionOptions, Status};
use serde_json::json;

use crate::common::{Directory, Random, load_options, session};
use crate::shim::Shim;
use crate::{on_device, with_a_token};

/// Calls a function of the driver, whose arguments are given with their types.
macro_rules! call {
    ($shim:expr, $name:literal($($argument:expr => $type:ty),*)) => {{
        // SAFETY: the function of this name has this signature.
        let function = unsafe {
            std::mem::transmute::<*mut c_void, unsafe extern "C" fn($($type),*) -> u32>($shim.symbol($name))
        };
        // SAFETY: pointers are good for one handle each; others are handles that are alive, or meant not to be.
        unsafe { function($($argument),*) }
    }};
}

/// What a host has of its own: a context, which is not current, and a stream in it.
struct Host<'a> {
    shim: &'a Shim,
    context: *mut c_void,
    stream: *mut c_void,
}

impl<'a> Host<'a> {
    fn new(shim: &'a Shim, device: c_int) -> Host<'a> {
        devices().unwrap();
        let (mut context, mut stream) = (null_mut(), null_mut());
        let created = call!(shim, "cuCtxCreate_v2"(&mut context => *mut *mut c_void, 0 => u32, device => c_int));
        let with_stream = call!(shim, "cuStreamCreate"(&mut stream => *mut *mut c_void, 1 => u32));
        let popped = call!(shim, "cuCtxPopCurrent_v2"(null_mut() => *mut *mut c_void));
        assert_eq!((created, with_stream, popped), (0, 0, 0));
        Host { shim, context, stream }
    }

    fn lend(&self, with_stream: bool) -> Option<LentContext> {
        let stream = NonNull::new(self.stream).filter(|_| with_stream);
        // SAFETY: as alive as this, which outlives what it is lent to; or the shim knows that it is not.
        Some(unsafe { LentContext::new(NonNull::new(self.context)?, stream) })
    }

    fn options(&self, with_stream: bool) -> LoadOptions {
        LoadOptions { cuda_context: self.lend(with_stream), ..on_device() }
    }

    fn synchronize(&self) -> u32 {
        call!(self.shim, "cuCtxPushCurrent_v2"(self.context => *mut c_void));
        let status = call!(self.shim, "cuStreamSynchronize"(self.stream => *mut c_void));
        call!(self.shim, "cuCtxPopCurrent_v2"(null_mut() => *mut *mut c_void));
        status
    }

    /// Whether the stream has done all it was given.
    fn is_idle(&self) -> bool {
        call!(self.shim, "cuCtxPushCurrent_v2"(self.context => *mut c_void));
        let status = call!(self.shim, "cuStreamQuery"(self.stream => *mut c_void));
        call!(self.shim, "cuCtxPopCurrent_v2"(null_mut() => *mut *mut c_void));
        status == 0
    }

    fn destroy(&mut self) -> u32 {
        call!(self.shim, "cuCtxDestroy_v2"(std::mem::replace(&mut self.context, null_mut()) => *mut c_void))
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        if !self.context.is_null() {
            self.destroy();
        }
    }
}

fn current(shim: &Shim) -> *mut c_void {
    let mut context = null_mut();
    assert_eq!(call!(shim, "cuCtxGetCurrent"(&mut context => *mut *mut c_void)), 0);
    context
}

/// All that a host does with a model, `check` being called after each.
fn life(model: &Arc<Model>, check: &dyn Fn(&str)) -> Vec<u32> {
    let mut session = session(model);
    check("a session");
    session.prefill(&Random::new(1).tokens(20, 97)).unwrap();
    check("prefill");
    let mut drawn: Vec<u32> = (0..3).map(|_| session.step().unwrap()).collect();
    check("steps");
    let mut fork = session.fork().unwrap();
    check("fork");
    let mut embedding = vec![0f32; model.config().hidden_size];
    fork.embed(&[1, 2, 3], Pooling::Mean, &mut embedding).unwrap();
    check("embed");
    let mut bytes = vec![0; session.snapshot_bytes()];
    session.snapshot(&mut bytes).unwrap();
    check("snapshot");
    let mut restored = Session::restore(Arc::clone(model), &bytes, session.options()).unwrap();
    check("restore");
    drawn.push(restored.step().unwrap());
    drop((session, fork, restored));
    check("free");
    drawn.extend(embedding.iter().map(|value| value.to_bits()));
    drawn
}

#[test]
fn a_lent_context_is_used_and_left_as_it_was() {
    let Some(shim) = Shim::take() else { return };
    shim.device_count(2);
    let directory = Directory::random(1).to_temporary();
    let expected = life(&load_options(directory.path(), &on_device()), &|_| {});
    let (host, other) = (Host::new(&shim, 1), Host::new(&shim, 0));
    // Somebody who holds the primary context of the device.
    let held = load_options(directory.path(), &LoadOptions { device: Device::Cuda(1), ..Default::default() });
    for with_stream in [false, true] {
        for index in [0, 1] {
            // Whatever is current, nothing among it.
            for hosts in [null_mut(), other.context, host.context] {
                call!(shim, "cuCtxSetCurrent"(hosts => *mut c_void));
                let check = |what: &str| assert_eq!(current(&shim), hosts, "{what}");
                let before = (shim.live_allocations(), shim.live_objects());
                let options = LoadOptions { device: Device::Cuda(index), ..host.options(with_stream) };
                let model = load_options(directory.path(), &options);
                check("load");
                assert_eq!(model.backend().device_name(), devices().unwrap()[1].name);
                let plan = Model::plan(directory.path(), &options, &SessionOptions::default()).unwrap();
                assert_eq!(plan.device_name, devices().unwrap()[1].name);
                assert_eq!(life(&model, &check), expected);
                drop(model);
                check("the end");
                assert_eq!((shim.live_allocations(), shim.live_objects()), before, "left, or taken away");
                assert_eq!(host.synchronize(), 0);
                call!(shim, "cuCtxSetCurrent"(null_mut() => *mut c_void));
            }
        }
    }
    drop((host, other, held));
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn all_work_goes_onto_a_lent_stream_and_graphs_do_too() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(2).to_temporary();
    let host = Host::new(&shim, 0);
    for (with_stream, streams) in [(false, 3), (true, 1)] {
        let model = load_options(directory.path(), &host.options(with_stream));
        let generate = |seed: u64, end: &Barrier| {
            let mut session = session(&model);
            session.prefill(&Random::new(seed).tokens(10, 97)).unwrap();
            let drawn: Vec<u32> = (0..5).map(|_| session.step().unwrap()).collect();
            end.wait();
            let (streams, calls) = (shim.computing_streams(), shim.calls());
            end.wait();
            let last = session.step().unwrap();
            (drawn, last, streams, shim.calls() - calls)
        };
        let alone = [0, 1, 2].map(|seed| generate(seed, &Barrier::new(1)));
        // As with a stream of our own: see graphs.rs.
        assert!(alone.iter().all(|(.., calls)| *calls == 7));
        let end = Barrier::new(3);
        std::thread::scope(|scope| {
            let (generate, end) = (&generate, &end);
            let threads = [0, 1, 2].map(|seed| scope.spawn(move || generate(seed, end)));
            for (thread, (drawn, last, ..)) in threads.into_iter().zip(&alone) {
                let together = thread.join().unwrap();
                assert_eq!((&together.0, &together.1, together.2), (drawn, last, streams));
            }
        });
        drop(model);
        // The host's is there for more.
        assert_eq!((shim.computing_streams(), host.synchronize()), (with_stream as u64, 0));
    }
}

#[test]
fn training_leaves_nothing_on_a_lent_stream_whichever_call_fails() {
    let Some(shim) = Shim::take() else { return };
    let changes = json!({"hidden_size": 8, "head_dim": 2, "intermediate_size": 5, "num_local_experts": 2});
    let directory = Directory::random_with(9, changes).to_temporary();
    let documents = [Document::new(&[2, 5], &[7, 9, 11])];
    let host = Host::new(&shim, 0);
    let model = load_options(directory.path(), &host.options(true));
    let mut trainer = RouterTrainer::new(&model, &TrainOptions { max_tokens: 8, ..Default::default() }).unwrap();
    let before = shim.calls();
    let expected = trainer.gradient(&documents).unwrap();
    let calls = shim.calls() - before;
    assert!(host.is_idle() && shim.computing_streams() == 1);
    for nth in (1..=calls).step_by(3) {
        shim.fail(nth, 1);
        let failed = trainer.gradient(&documents).is_err();
        shim.fail(0, 0);
        assert!(host.is_idle(), "call {nth} of {calls}, {failed}");
        assert_eq!(current(&shim), null_mut());
    }
    assert_eq!(trainer.gradient(&documents).unwrap(), expected);
    drop((trainer, model));
    assert_eq!(host.synchronize(), 0);
}

#[test]
fn nothing_is_recorded_on_a_lent_stream() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(3).to_temporary();
    let host = Host::new(&shim, 0);
    let model = load_options(directory.path(), &host.options(true));
    with_a_token(model.backend(), |pass, batch| {
        let cancel = Cancel::default();
        let limit = Limit::none(&cancel);
        pass.begin(batch).unwrap();
        assert!(pass.begin_recording(&limit).unwrap());
        assert!(pass.embed(batch, &limit).map(Result::unwrap).is_ready());
        // While a stream captures this would be refused.
        assert_eq!(host.synchronize(), 0);
        pass.end_recording(Ok(())).unwrap();
        assert!(pass.replay(batch, &limit).unwrap());
    });
}

#[test]
fn what_cannot_be_used_is_refused_with_its_reason() {
    let Some(shim) = Shim::take() else { return };
    shim.device_count(2);
    let directory = Directory::random(1).to_temporary();
    let (host, other, mut gone) = (Host::new(&shim, 0), Host::new(&shim, 1), Host::new(&shim, 0));
    let before = (shim.live_allocations(), shim.live_objects());
    let refused = |options: &LoadOptions| {
        let error = Model::load(directory.path(), options, &Progress::default()).err().unwrap();
        let planned = Model::plan(directory.path(), options, &SessionOptions::default()).err().unwrap();
        assert_eq!(error, planned);
        assert_eq!((shim.live_allocations(), shim.live_objects()), before, "{error}");
        (error.status(), error.key().unwrap_or_default().to_owned(), error.to_string())
    };
    let check = |options: &LoadOptions, status: Status, key: &str, words: &str| {
        let found = refused(options);
        assert!(found.0 == status && found.1 == key && found.2.contains(words), "{found:?}");
    };
    let invalid = Status::InvalidArgument;
    for device in [Device::Cpu, Device::Auto] {
        check(&LoadOptions { device, ..host.options(false) }, invalid, "cuda_context", "not an NVIDIA GPU");
    }
    for index in [1, 7] {
        let options = LoadOptions { device: Device::Cuda(index), ..host.options(false) };
        let words = format!("device_index is {index}, the device of cuda_context is 0");
        check(&options, invalid, "device_index", &words);
    }
    let lend = |context, stream| {
        // SAFETY: the shim knows what is alive and whose it is.
        let lent = unsafe { LentContext::new(NonNull::new(context).unwrap(), NonNull::new(stream)) };
        LoadOptions { cuda_context: Some(lent), ..on_device() }
    };
    check(&lend(host.context, other.stream), invalid, "cuda_stream", "of another context");
    check(&lend(host.context, host.context), invalid, "cuda_stream", "CUDA_ERROR_INVALID_HANDLE (400)");
    check(&lend(host.stream, null_mut()), invalid, "cuda_context", "CUDA_ERROR_INVALID_CONTEXT (201)");
    shim.compute_capability(75);
    check(&host.options(false), Status::NoDevice, "cuda_context", "8.0");
    shim.compute_capability(80);
    let context = gone.context;
    assert_eq!(gone.destroy(), 0);
    let error = Model::load(directory.path(), &lend(context, null_mut()), &Progress::default()).err().unwrap();
    assert_eq!((error.status(), error.key()), (invalid, Some("cuda_context")));
}

#[test]
fn a_context_that_goes_too_early_is_an_error_and_freeing_is_safe() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    for with_stream in [false, true] {
        let mut host = Host::new(&shim, 0);
        let model = load_options(directory.path(), &host.options(with_stream));
        let mut session = session(&model);
        session.prefill(&[1, 2, 3]).unwrap();
        session.step().unwrap();
        assert_eq!(host.destroy(), 0);
        let error = session.step().unwrap_err();
        assert!(error.to_string().contains("cuCtxPushCurrent_v2 failed"), "{error}");
        assert!(Session::new(Arc::clone(&model), &SessionOptions::default()).is_err());
        drop((session, model));
        assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
    }
}

#[test]
fn whichever_driver_call_fails_nothing_of_the_hosts_is_taken_away() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let life = |host: &Host, with_stream| {
        let model = Model::load(directory.path(), &host.options(with_stream), &Progress::default())?;
        let options = SessionOptions { context_size: 32, prefill_chunk: 8, ..Default::default() };
        let mut session = Session::new(model, &options)?;
        session.prefill(&[1, 2, 3])?;
        session.step()
    };
    for with_stream in [false, true] {
        let before = shim.calls();
        let expected = life(&Host::new(&shim, 0), with_stream).unwrap();
        let calls = shim.calls() - before;
        for code in [1, 719] {
            // The first ones are those that look at what is lent.
            for nth in (1..60).chain((60..=calls).step_by(23)) {
                let host = Host::new(&shim, 0);
                let before = (shim.live_allocations(), shim.live_objects());
                shim.fail(nth, code);
                match life(&host, with_stream) {
                    Ok(token) => assert_eq!(token, expected, "call {nth} failed with {code}, unnoticed"),
                    Err(error) => {
                        let expected = [Status::DeviceFailed, Status::DeviceLost, Status::InvalidArgument];
                        assert!(expected.contains(&error.status()), "call {nth}: {error}");
                    }
                }
                shim.fail(0, 0);
                assert_eq!((shim.live_allocations(), shim.live_objects()), before, "call {nth} failed with {code}");
                assert!(current(&shim).is_null(), "call {nth} failed with {code}");
            }
        }
    }
}
