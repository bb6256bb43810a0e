//! Device memory as a budget: weights that do not fit are in host memory, and results are what they are.

use std::ffi::c_void;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;

use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::backend::cpu::threads::Task;
use gemmoe::backend::cpu::{CpuOptions, ParallelFor, ThreadOptions};
use gemmoe::backend::cuda::{planned_offload_bytes, planned_pass_bytes, planned_residency};
use gemmoe::backend::ops::{NO_EXPERT, PassLimits};
use gemmoe::backend::{Device, KvDtype, WeightResidency};
use gemmoe::engine::experts::RouteArrays;
use gemmoe::quant::Format;
use gemmoe::{Budget, Error, Formats, LoadOptions, Model, Progress, Sampling, Session, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;

use crate::common::{Directory, Random, batch, checkpoints, draw_each, golden, load_options, session_with};
use crate::counting::failing_after;
use crate::driver::Driver;
use crate::shim::Shim;
use crate::{TOLERANCE, difference, on_device, on_tensor_cores};

/// Not exact, so that few tokens are computed on the processor; there with activations in f32, as on the device.
fn on_both() -> LoadOptions {
    LoadOptions { cpu: CpuOptions { threads: 2.into(), instructions: Instructions::Portable }, ..on_tensor_cores() }
}

/// Limits of a model under which none, some, one less than all, and all of its experts are on the device.
fn limits(directory: &Path, options: &LoadOptions) -> [u64; 4] {
    let (description, _) = Model::inspect(directory, options).unwrap();
    let whole = planned_residency(&description, 0).unwrap();
    let error = planned_residency(&description, 1).unwrap_err();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("device_memory_limit")));
    let text = error.to_string();
    let least: u64 = text.split("at least ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!(planned_residency(&description, least - 1).is_err());
    let some = least + whole.device_bytes.saturating_sub(least) / 2;
    let limits = [least, some, whole.device_bytes - 1, whole.device_bytes];
    for limit in limits.into_iter().filter(|limit| *limit >= least) {
        let planned = planned_residency(&description, limit).unwrap();
        assert!(planned.device_bytes + planned.staging_bytes <= limit);
        assert_eq!(planned.device_experts + planned.host_experts, whole.device_experts);
    }
    limits.map(|limit| limit.max(least))
}

/// The rule of `cuda/residency.rs` where all experts have one size: expert 0 of each layer, then expert 1 of each.
fn is_on_device(residency: &WeightResidency, layers: usize, layer: usize, expert: usize) -> bool {
    ((expert * layers + layer) as u64) < residency.device_experts
}

/// Logits of a prompt that is prefilled in parts of `chunk` tokens, then those of each of four greedy tokens, and the tokens.
fn continuation(model: &Arc<Model>, prompt: &[u32], chunk: usize) -> (Vec<Vec<f32>>, Vec<u32>) {
    let mut session = session_with(model, KvDtype::F32);
    session.set_sampling(Sampling::default()).unwrap();
    prompt.chunks(chunk).for_each(|part| session.prefill(part).unwrap());
    let mut logits = vec![session.logits().unwrap().to_vec()];
    let mut tokens = Vec::new();
    for _ in 0..4 {
        tokens.push(session.step().unwrap());
        logits.push(session.logits().unwrap().to_vec());
    }
    (logits, tokens)
}

fn bits(logits: &[Vec<f32>]) -> Vec<u32> {
    logits.iter().flatten().map(|value| value.to_bits()).collect()
}

/// Models of every format, of experts of mixed ones, and of one expert.
fn models() -> Vec<(&'static str, Directory, Formats)> {
    let with = |seed, dtype, changes| {
        let mut directory = Directory::random_with(seed, changes);
        directory.dtype = dtype;
        directory
    };
    let formats = |experts, others| Formats {
        experts: Some(experts),
        attention: Some(others),
        head: Some(others),
        embedding: None,
    };
    let none = Formats::default();
    let wide = json!({"hidden_size": 72, "intermediate_size": 136});
    vec![
        ("bf16", Directory::random(1), none),
        (
            "f32, odd sizes",
            with(2, Dtype::F32, json!({"hidden_size": 36, "head_dim": 6, "intermediate_size": 21})),
            none,
        ),
        ("f16, top 3 of 8", with(3, Dtype::F16, json!({"num_local_experts": 8, "num_experts_per_tok": 3})), none),
        ("int4", with(4, Dtype::BF16, wide.clone()), formats(Format::INT4, Format::INT8)),
        ("int8", with(5, Dtype::BF16, wide), formats(Format::INT8, Format::INT4)),
        ("one expert", with(6, Dtype::BF16, json!({"num_local_experts": 1, "num_experts_per_tok": 1})), none),
    ]
}

#[test]
fn every_golden_checkpoint_agrees_with_the_reference_under_every_limit() {
    let Some(shim) = Shim::take() else { return };
    for path in golden() {
        let prompt: Vec<u32> = (0..23).map(|index| 3 + index % 7).collect();
        let whole = continuation(&load_options(&path, &on_device()), &prompt, 16);
        let [none, some, ..] = limits(&path, &on_both());
        for limit in [none, some] {
            // Copied.
            let options = LoadOptions { device_memory_limit: limit, ..on_device() };
            checkpoints::check(&path, &options, TOLERANCE, true);
            // Computed on the processor, and for eight tokens without tensor cores.
            let options = LoadOptions { device_memory_limit: limit, ..on_both() };
            let (logits, tokens) = continuation(&load_options(&path, &options), &prompt, 8);
            assert_eq!(tokens, whole.1, "{}, {limit} bytes", path.display());
            for (found, expected) in logits.iter().zip(&whole.0) {
                let error = difference(found, expected);
                assert!(error < TOLERANCE, "{}, {limit} bytes: {error:.1e}", path.display());
            }
        }
    }
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn every_format_gives_the_same_under_every_limit_and_the_same_bits_where_experts_are_copied() {
    let Some(_driver) = Driver::take() else { return };
    for (name, directory, formats) in models() {
        let directory = directory.to_temporary();
        let prompt = Random::new(11).tokens(24, 97);
        let load = |options, limit| {
            let options = LoadOptions { formats, device_memory_limit: limit, ..options };
            load_options(directory.path(), &options)
        };
        let (exact, both) = (load(on_device(), 0), load(on_both(), 0));
        // All tokens at once, sixteen, one.
        let exactly = [64, 16, 1].map(|chunk| bits(&continuation(&exact, &prompt, chunk).0));
        let (once, few) = (continuation(&both, &prompt, 64), continuation(&both, &prompt, 8));
        for limit in limits(directory.path(), &LoadOptions { formats, ..on_both() }) {
            let model = load(on_device(), limit);
            for (chunk, expected) in [64, 16, 1].into_iter().zip(&exactly) {
                let found = bits(&continuation(&model, &prompt, chunk).0);
                assert_eq!(&found, expected, "{name}, {limit} bytes, exact, chunks of {chunk}");
            }
            assert_eq!(model.fingerprint(), exact.fingerprint());
            let model = load(on_both(), limit);
            let (logits, tokens) = continuation(&model, &prompt, 64);
            assert_eq!(
                bits(&logits[..1]),
                bits(&once.0[..1]),
                "{name}, {limit} bytes: experts are copied for 24 tokens"
            );
            assert_eq!(tokens, once.1, "{name}, {limit} bytes");
            let (logits, tokens) = continuation(&model, &prompt, 8);
            assert_eq!(tokens, few.1, "{name}, {limit} bytes, chunks of 8");
            for (found, expected) in logits.iter().zip(&few.0) {
                let error = difference(found, expected);
                // A number near a tie may be rounded to the other side of it.
                let most = if formats.experts.is_some() { 2e-3 } else { TOLERANCE };
                assert!(error < most, "{name}, {limit} bytes: {error:.1e}");
            }
        }
    }
}

#[test]
fn batches_of_one_to_seventeen_sessions_draw_what_they_draw_without_a_limit() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random(31).to_temporary();
    let draw = |options: &LoadOptions, count: usize| {
        let model = load_options(directory.path(), options);
        let mut sessions: Vec<Session> = (0..count)
            .map(|index| {
                let mut session = session_with(&model, KvDtype::F32);
                session.set_sampling(Sampling::default()).unwrap();
                // Masks and biases differ, and one lets a single expert be chosen.
                session.set_allowed_experts(Some(0), [0b1111, 0b0110, 0b1000][index % 3]).unwrap();
                session.set_expert_bias(Some(1), &[0.0, index as f32 * 0.1, -0.2, 0.3]).unwrap();
                session.push(&Random::new(index as u64).tokens(1 + index % 2, 97)).unwrap();
                session
            })
            .collect();
        let mut batch = batch(&model, count, count.max(2), 256);
        let mut drawn = Vec::new();
        for _ in 0..3 {
            let mut all: Vec<&mut Session> = sessions.iter_mut().collect();
            drawn.extend(draw_each(&mut batch, &mut all).into_iter().map(Result::unwrap));
        }
        drawn
    };
    let [none, some, ..] = limits(directory.path(), &on_both());
    for count in [1, 2, 5, 8, 15, 16, 17] {
        let expected = draw(&on_both(), count);
        for limit in [none, some] {
            let options = LoadOptions { device_memory_limit: limit, ..on_both() };
            assert_eq!(draw(&options, count), expected, "{count} sessions, {limit} bytes");
        }
    }
}

/// Experts in host memory that the tokens a session ran were sent to, in batches of these sizes: how many had to be there.
fn missing(session: &mut Session, sizes: &[usize], residency: &WeightResidency) -> u64 {
    let config = session.model().config().clone();
    let (layers, top_k) = (config.num_hidden_layers, config.num_experts_per_tok);
    let count = sizes.iter().sum::<usize>();
    let (mut positions, mut tokens) = (vec![0; count], vec![0; count]);
    let (mut experts, mut weights) = (vec![0; count * layers * top_k], vec![0.0; count * layers * top_k]);
    let mut arrays =
        RouteArrays { positions: &mut positions, tokens: &mut tokens, experts: &mut experts, weights: &mut weights };
    assert_eq!(session.fetch_routes(&mut arrays), (count, 0));
    let (mut first, mut missing) = (0, 0);
    for size in sizes {
        for layer in 0..layers {
            let of = |token: usize| (token * layers + layer) * top_k..(token * layers + layer + 1) * top_k;
            let chosen: std::collections::BTreeSet<u32> =
                (first..first + size).flat_map(|token| experts[of(token)].iter().copied()).collect();
            let is_missing =
                |expert: &&u32| **expert != NO_EXPERT && !is_on_device(residency, layers, layer, **expert as usize);
            missing += chosen.iter().filter(is_missing).count() as u64;
        }
        first += size;
    }
    missing
}

#[test]
fn counters_count_the_experts_that_were_missing() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random_with(8, json!({"num_local_experts": 8, "num_hidden_layers": 3})).to_temporary();
    for limit in limits(directory.path(), &on_both()) {
        for options in [on_both(), on_device()] {
            let options = LoadOptions { device_memory_limit: limit, ..options };
            let model = load_options(directory.path(), &options);
            let residency = model.residency();
            let session_options =
                SessionOptions { context_size: 64, prefill_chunk: 32, route_capacity: 64, ..Default::default() };
            let mut session = Session::new(Arc::clone(&model), &session_options).unwrap();
            session.set_allowed_experts(Some(1), 0b1001_0110).unwrap();
            let prompt = Random::new(9).tokens(16, 97);
            session.prefill(&prompt).unwrap();
            session.prefill(&prompt[..1]).unwrap();
            let runs = missing(&mut session, &[16, 1], &residency);
            session.prefill(&[&prompt[..], &prompt[..1]].concat()).unwrap();
            let copies = missing(&mut session, &[17], &residency);
            let (runs, copies) = if options.exact { (0, runs + copies) } else { (runs, copies) };
            let counts = model.offload_counts();
            assert_eq!((counts.host_runs, counts.copies), (runs, copies), "{limit} bytes, exact: {}", options.exact);
            let (description, _) = Model::inspect(directory.path(), &options).unwrap();
            let bytes_of_one = description.loaded_bytes.1 / 24;
            assert_eq!(counts.copied_bytes, copies * bytes_of_one);
            assert_eq!(counts.host_time.is_zero(), runs == 0);
            assert_eq!(counts.copy_time.is_zero(), copies == 0);
            assert!(residency.host_experts == 0 || runs + copies > 0, "the test tries nothing");
        }
    }
}

#[test]
fn what_is_planned_under_a_limit_is_what_is_taken() {
    let Some(shim) = Shim::take() else { return };
    for path in golden() {
        let limits = limits(&path, &on_both());
        for limit in limits {
            let options = LoadOptions { device_memory_limit: limit, ..on_both() };
            let session = SessionOptions { context_size: 32, prefill_chunk: 24, ..Default::default() };
            let plan = Model::plan(&path, &options, &session).unwrap();
            let model = load_options(&path, &options);
            assert_eq!(model.residency(), plan.residency, "{}, {limit} bytes", path.display());
            let session = Session::new(Arc::clone(&model), &session).unwrap();
            assert_eq!((session.bytes() - session.kv_bytes()) as u64, plan.workspace_bytes);
            let limits = PassLimits { max_tokens: 5, max_sequences: 2, max_context: 33, logit_rows: 2 };
            let pass = model.backend().new_pass(limits).unwrap();
            let offload = if plan.residency.host_experts == 0 {
                0
            } else {
                planned_offload_bytes(model.config(), limits, false).unwrap()
            };
            assert_eq!(pass.bytes(), planned_pass_bytes(model.config(), limits).unwrap() + offload);
        }
    }
    // On the processor any limit holds.
    let path = &golden()[0];
    let options = LoadOptions { device_memory_limit: 1, ..Default::default() };
    let plan = Model::plan(path, &options, &SessionOptions::default()).unwrap();
    let model = load_options(path, &options);
    assert_eq!(model.residency(), plan.residency);
    assert_eq!((plan.residency.device_bytes, plan.residency.host_bytes), (0, plan.weight_bytes));
    model.set_device_memory_limit(1).unwrap();
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn a_limit_below_the_least_is_an_error_and_a_free_choice_takes_the_processor() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let [least, some, ..] = limits(directory.path(), &on_device());
    let load = |options: LoadOptions| Model::load(directory.path(), &options, &Progress::default());
    let error = load(LoadOptions { device_memory_limit: least - 1, ..on_device() }).err().unwrap();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("device_memory_limit")));
    assert!(error.to_string().contains(&format!("at least {least}")), "{error}");
    let model = load_options(directory.path(), &on_device());
    assert_eq!(model.set_device_memory_limit(least - 1).unwrap_err(), error);
    let gpu = model.backend().device_name();
    drop(model);
    let free_choice = |limit| LoadOptions { device: Device::Auto, device_memory_limit: limit, ..Default::default() };
    let device = |options: LoadOptions| {
        let plan = Model::plan(directory.path(), &options, &SessionOptions::default()).unwrap();
        assert_eq!(load(options).unwrap().backend().device_name(), plan.device_name);
        plan.device_name
    };
    assert_ne!(device(free_choice(least - 1)), gpu);
    assert_eq!(device(free_choice(least)), gpu);
    // A model that does not fit whole goes there only where a limit leaves room for a session.
    shim.total_memory(some as usize + 3_200_000);
    assert_eq!(device(free_choice(some)), gpu);
    shim.total_memory(some as usize + 100_000);
    assert_ne!(device(free_choice(some)), gpu);
    assert_ne!(device(free_choice(0)), gpu);
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

/// Each of these steps of a session with its logits' bits, `between` being called before each.
fn stepped(session: &mut Session, steps: usize, mut between: impl FnMut(usize)) -> (Vec<u32>, Vec<Vec<f32>>) {
    let (mut tokens, mut logits) = (Vec::new(), Vec::new());
    for step in 0..steps {
        between(step);
        tokens.push(session.step().unwrap());
        logits.push(session.logits().unwrap().to_vec());
    }
    (tokens, logits)
}

#[test]
fn a_limit_that_shrinks_and_grows_between_steps_changes_no_token() {
    let Some(shim) = Shim::take() else { return };
    for (name, directory, formats) in models() {
        let directory = directory.to_temporary();
        let [none, some, one_less, whole] = limits(directory.path(), &LoadOptions { formats, ..on_both() });
        let changes = [0, some, none, one_less, some, whole, none, 0, whole, one_less];
        let prompt = Random::new(12).tokens(20, 97);
        for options in [on_device(), on_both()] {
            let options = LoadOptions { formats, ..options };
            let (description, _) = Model::inspect(directory.path(), &options).unwrap();
            let model = load_options(directory.path(), &options);
            let whole_allocations = shim.live_allocations();
            let begin = || {
                let mut session = session_with(&model, KvDtype::F32);
                session.prefill(&prompt).unwrap();
                session
            };
            let expected = stepped(&mut begin(), changes.len(), |_| {});
            let mut session = begin();
            let found = stepped(&mut session, changes.len(), |step| {
                let before = (model.residency(), shim.live_allocations());
                model.set_device_memory_limit(changes[step]).unwrap();
                let residency = model.residency();
                assert_eq!(residency, planned_residency(&description, changes[step]).unwrap(), "{name}");
                // A block an expert, and two buffers with two pinned ones.
                let blocks = |residency: &WeightResidency| {
                    residency.device_experts + if residency.staging_bytes > 0 { 4 } else { 0 }
                };
                let expected = before.1 + blocks(&residency) - blocks(&before.0);
                assert_eq!(shim.live_allocations(), expected, "{name}, step {step}");
            });
            assert_eq!(found.0, expected.0, "{name}, exact: {}", options.exact);
            if options.exact {
                assert_eq!(bits(&found.1), bits(&expected.1), "{name}");
            }
            // A prompt that is copied for, in a session that was made while everything was on the device.
            model.set_device_memory_limit(none).unwrap();
            session.rewind(0).unwrap();
            session.prefill(&prompt).unwrap();
            assert_eq!(bits(&[session.logits().unwrap().to_vec()]), bits(&[begin().logits().unwrap().to_vec()]));
            drop(session);
            model.set_device_memory_limit(0).unwrap();
            assert_eq!(shim.live_allocations(), whole_allocations, "{name}");
        }
    }
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn work_left_after_any_layer_goes_on_under_another_limit() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random_with(13, json!({"num_hidden_layers": 3})).to_temporary();
    let [none, some, _, whole] = limits(directory.path(), &on_both());
    for (options, count) in [(on_device(), 20), (on_device(), 5), (on_both(), 20)] {
        let model = load_options(directory.path(), &LoadOptions { device_memory_limit: some, ..options });
        let tokens = Random::new(13).tokens(count, 97);
        let mut session = session_with(&model, None);
        session.prefill(&tokens).unwrap();
        let expected = bits(&[session.logits().unwrap().to_vec()]);
        let mut session = session_with(&model, None);
        let (mut given, mut calls) = (&tokens[..], 0);
        while session.prefill_within(given, &Budget::of_layers(1)).map(Result::unwrap).is_pending() {
            given = &[];
            model.set_device_memory_limit([none, whole, some][calls % 3]).unwrap();
            calls += 1;
        }
        assert_eq!(calls, 3);
        assert_eq!(bits(&[session.logits().unwrap().to_vec()]), expected, "{count} tokens, exact: {}", options.exact);
    }
    // A cancel is heard, and the session goes on.
    let model = load_options(directory.path(), &LoadOptions { device_memory_limit: none, ..on_both() });
    for count in [5, 20] {
        let tokens = Random::new(14).tokens(count, 97);
        let mut session = session_with(&model, None);
        session.prefill(&tokens).unwrap();
        let expected = bits(&[session.logits().unwrap().to_vec()]);
        let mut session = session_with(&model, None);
        assert!(matches!(session.prefill_within(&tokens, &Budget::of_layers(1)), Poll::Pending));
        session.cancel().request();
        assert_eq!(session.prefill(&[]).unwrap_err().status(), Status::Cancelled);
        session.rewind(0).unwrap();
        session.prefill(&tokens).unwrap();
        assert_eq!(bits(&[session.logits().unwrap().to_vec()]), expected, "{count} tokens");
    }
}

/// `cuCtxGetCurrent`, and what it found while the host's threads were asked for.
static CURRENT: OnceLock<unsafe extern "C" fn(*mut *mut c_void) -> u32> = OnceLock::new();
static ASKED: AtomicUsize = AtomicUsize::new(0);
static FOREIGN: AtomicUsize = AtomicUsize::new(0);

unsafe extern "C" fn in_turn(_context: *mut c_void, count: u32, task: Task, task_context: *mut c_void) {
    let mut found = std::ptr::null_mut();
    // SAFETY: writes one handle.
    assert_eq!(unsafe { CURRENT.get().unwrap()(&mut found) }, 0);
    ASKED.fetch_add(1, Ordering::Relaxed);
    FOREIGN.fetch_add(!found.is_null() as usize, Ordering::Relaxed);
    for index in 0..count {
        // SAFETY: as this function was promised to call it.
        unsafe { task(task_context, index) };
    }
}

#[test]
fn the_hosts_threads_compute_experts_and_find_no_context_of_ours() {
    let Some(shim) = Shim::take() else { return };
    // SAFETY: the driver's function of that name has this signature.
    let current = unsafe {
        std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*mut *mut c_void) -> u32>(
            shim.symbol("cuCtxGetCurrent"),
        )
    };
    CURRENT.get_or_init(|| current);
    // Wide enough for several items.
    let changes = json!({"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 1});
    let directory = Directory::random_with(19, changes).to_temporary();
    let [none, ..] = limits(directory.path(), &on_both());
    // SAFETY: the function calls each task once, and unwinds only where the test fails.
    let parallel_for = unsafe { ParallelFor::new(in_turn, std::ptr::null_mut()) };
    let of = |parallel_for, device_memory_limit| {
        let threads = ThreadOptions { count: 3, parallel_for, ..Default::default() };
        let cpu = CpuOptions { threads, instructions: Instructions::Portable };
        let model = load_options(directory.path(), &LoadOptions { cpu, device_memory_limit, ..on_both() });
        continuation(&model, &[5, 6, 7], 16).1
    };
    let expected = of(None, 0);
    assert_eq!(of(None, none), expected);
    assert_eq!(ASKED.load(Ordering::Relaxed), 0);
    assert_eq!(of(Some(parallel_for), none), expected);
    assert!(ASKED.load(Ordering::Relaxed) > 0);
    assert_eq!(FOREIGN.load(Ordering::Relaxed), 0);
}

#[test]
fn sessions_go_on_in_other_threads_while_experts_move() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random_with(15, json!({"num_hidden_layers": 4})).to_temporary();
    let [none, some, one_less, whole] = limits(directory.path(), &on_both());
    // Buffers come and go with each change; then experts alone.
    for (options, limits) in [(on_device(), [none, whole, none, 0]), (on_both(), [none, some, one_less, whole])] {
        let model = load_options(directory.path(), &options);
        let generate = |seed: u64| {
            let mut session = session_with(&model, KvDtype::F32);
            session.set_sampling(Sampling::default()).unwrap();
            session.prefill(&Random::new(seed).tokens(if seed == 0 { 40 } else { 9 }, 97)).unwrap();
            (0..8).map(|_| session.step().unwrap()).collect::<Vec<_>>()
        };
        let alone: Vec<_> = (0..3).map(generate).collect();
        let is_over = AtomicBool::new(false);
        let together: Vec<_> = std::thread::scope(|scope| {
            let (model, is_over, generate) = (&model, &is_over, &generate);
            scope.spawn(move || {
                for limit in limits.into_iter().cycle().take_while(|_| !is_over.load(Ordering::Relaxed)) {
                    model.set_device_memory_limit(limit).unwrap();
                }
            });
            let threads: Vec<_> = (0..3).map(|seed| scope.spawn(move || generate(seed))).collect();
            let together: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            is_over.store(true, Ordering::Relaxed);
            together.into_iter().map(Result::unwrap).collect()
        });
        assert_eq!(alone, together, "exact: {}", options.exact);
    }
}

#[test]
fn a_change_of_the_limit_that_fails_at_any_call_leaves_a_model_that_works() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random_with(16, json!({"num_hidden_layers": 3})).to_temporary();
    let [none, some, _, whole] = limits(directory.path(), &on_device());
    let model = load_options(directory.path(), &on_device());
    let tokens = Random::new(16).tokens(6, 97);
    let mut session = session_with(&model, None);
    session.prefill(&tokens).unwrap();
    let expected = bits(&[session.logits().unwrap().to_vec()]);
    let (mut failed, mut unharmed) = (0, 0);
    for (code, from, to) in [(2, whole, none), (1, whole, some), (2, none, whole), (1, some, whole), (1, some, none)] {
        model.set_device_memory_limit(from).unwrap();
        let before = shim.calls();
        model.set_device_memory_limit(to).unwrap();
        let calls = shim.calls() - before;
        for nth in (1..=calls).step_by(3) {
            model.set_device_memory_limit(from).unwrap();
            shim.fail(nth, code);
            match model.set_device_memory_limit(to) {
                Ok(()) => unharmed += 1,
                Err(error) => {
                    let known = [Status::DeviceFailed, Status::DeviceOutOfMemory, Status::OutOfMemory];
                    assert!(known.contains(&error.status()), "call {nth} of {calls} failed with {code}: {error}");
                    failed += 1;
                }
            }
            shim.fail(0, 0);
            let residency = model.residency();
            assert_eq!(residency.device_experts + residency.host_experts, 12);
            session.rewind(0).unwrap();
            session.prefill(&tokens).unwrap();
            let found = bits(&[session.logits().unwrap().to_vec()]);
            assert_eq!(found, expected, "call {nth} of {calls} failed with {code}, {residency:?}");
        }
    }
    // The others free something, and leave what was the current context.
    assert!(failed > unharmed, "{failed} failures were errors, {unharmed} did no harm");
    drop((session, model));
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn a_change_of_the_limit_that_finds_no_host_memory_leaves_a_model_that_works() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random_with(18, json!({"num_hidden_layers": 3})).to_temporary();
    let [none, .., whole] = limits(directory.path(), &on_device());
    let model = load_options(directory.path(), &on_device());
    let tokens = Random::new(18).tokens(6, 97);
    let mut session = session_with(&model, None);
    session.prefill(&tokens).unwrap();
    let expected = bits(&[session.logits().unwrap().to_vec()]);
    for (from, to) in [(whole, none), (none, whole)] {
        let mut refused = 0;
        loop {
            model.set_device_memory_limit(from).unwrap();
            let (result, failed) = failing_after(refused, || model.set_device_memory_limit(to));
            assert_eq!(result.as_ref().err().map(Error::status), failed.then_some(Status::OutOfMemory));
            session.rewind(0).unwrap();
            session.prefill(&tokens).unwrap();
            assert_eq!(bits(&[session.logits().unwrap().to_vec()]), expected, "after {refused} allocations");
            if !failed {
                break;
            }
            refused += 1;
        }
        // Lines of three matrices for each of twelve experts, in memory of their own.
        assert_eq!(refused, if to == none { 36 } else { 0 });
    }
    drop((session, model));
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn experts_of_mixed_dtypes_are_where_they_fit() {
    let Some(_driver) = Driver::take() else { return };
    let path = golden().into_iter().find(|path| path.ends_with("block_mixed_dtypes_shards")).unwrap();
    let prompt: Vec<u32> = (0..19).map(|index| 2 + index % 11).collect();
    let expected = bits(&continuation(&load_options(&path, &on_device()), &prompt, 64).0);
    let [least, .., whole] = limits(&path, &on_device());
    let mut seen = std::collections::BTreeSet::new();
    for limit in (least..whole).step_by(((whole - least) / 9).max(1) as usize) {
        let model = load_options(&path, &LoadOptions { device_memory_limit: limit, ..on_device() });
        seen.insert(model.residency().device_experts);
        assert_eq!(bits(&continuation(&model, &prompt, 64).0), expected, "{limit} bytes");
    }
    assert!(seen.len() > 2, "{seen:?}");
}
