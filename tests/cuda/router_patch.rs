//! Router patches on a device: the bits of a model that was loaded with those gates, by stages and in graphs; memory that comes
//! back; driver calls that fail.

use gemmoe::{LoadOptions, Pooling, Status};
use safetensors::Dtype;
use serde_json::json;

use crate::common::{Directory, Random, batch, draw_each, session};
use crate::driver::Driver;
use crate::fixture::{Gates, Patched, bits, expected, shown, status, tokens};
use crate::shim::Shim;
use crate::{on_device, on_tensor_cores};

#[test]
fn a_patched_model_gives_the_bits_of_one_loaded_with_those_gates() {
    let Some(driver) = Driver::take() else { return };
    let mut directory = Directory::random_with(71, json!({"num_local_experts": 5}));
    for (dtype, options) in [(Dtype::BF16, on_device()), (Dtype::F16, on_tensor_cores()), (Dtype::F32, on_device())] {
        directory.dtype = dtype;
        let patched = Patched::with_options(directory.clone(), options, None);
        for gates in [Gates::A, Gates::B, Gates::Stored, Gates::A] {
            patched.put(gates);
            let numbers = |model| {
                let mut session = session(model);
                session.prefill(&tokens(20)).unwrap();
                let shown = shown(&session).unwrap();
                // As graphs, and then one of a few tokens.
                let drawn: Vec<u32> = (0..4).map(|_| session.step().unwrap()).collect();
                session.prefill(&[1, 2, 3]).unwrap();
                let mut embedding = [0f32; 40];
                let last = bits(session.logits().unwrap());
                session.embed(&tokens(5), Pooling::Mean, &mut embedding).unwrap();
                (shown, drawn, last, bits(&embedding))
            };
            assert_eq!(numbers(&patched.model), numbers(patched.loaded(gates)), "{gates:?}, {dtype}");
            assert_eq!(patched.model.stored_gates().unwrap(), patched.gates[0]);
        }
        drop(patched);
        driver.assert_all_is_freed();
    }
}

#[test]
fn sessions_run_again_under_new_gates_and_their_graphs_are_recorded_anew() {
    let Some(shim) = Shim::take() else { return };
    let patched = Patched::with_options(Directory::random(72), on_device(), None);
    let mut session = session(&patched.model);
    session.prefill(&tokens(20)).unwrap();
    let step = |session: &mut gemmoe::Session| {
        let launches = shim.launches();
        session.step().unwrap();
        shim.launches() - launches
    };
    step(&mut session);
    assert!(step(&mut session) > 0, "the graph is recorded");
    assert_eq!(step(&mut session), 0);
    let allocations = shim.live_allocations();
    for gates in [Gates::A, Gates::B, Gates::Stored] {
        patched.put(gates);
        // All its tokens, by stages; then the first alone.
        assert!(step(&mut session) > 0);
        let launches = step(&mut session);
        assert_eq!(launches > 0, gates != Gates::Stored, "{gates:?}: the stored gates' graph is still good");
        assert_eq!(step(&mut session), 0);
        let held = session.tokens().to_vec();
        assert_eq!(shown(&session).unwrap(), expected(&patched, gates, &held[..held.len() - 1]), "{gates:?}");
    }
    assert_eq!(shim.live_allocations(), allocations, "gates of patches that are off are freed");
    // Members of a batch, of which one had been run.
    let mut other = crate::common::session(&patched.model);
    other.push(&tokens(7)).unwrap();
    patched.put(Gates::A);
    let mut batch = batch(&patched.model, 2, 64, 256);
    let held = [session.tokens().to_vec(), other.tokens().to_vec()];
    assert!(draw_each(&mut batch, &mut [&mut session, &mut other]).iter().all(Result::is_ok));
    for (session, held) in [&session, &other].into_iter().zip(held) {
        assert_eq!(shown(session).unwrap(), expected(&patched, Gates::A, &held));
    }
}

#[test]
fn experts_in_host_memory_are_chosen_by_the_patch_too() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random(73);
    let least = {
        let path = directory.to_temporary();
        let options = LoadOptions { device_memory_limit: 1, ..on_device() };
        let error = gemmoe::Model::load(path.path(), &options, &gemmoe::Progress::default()).err().unwrap().to_string();
        error.split("at least ").nth(1).unwrap().split(',').next().unwrap().parse::<u64>().unwrap()
    };
    let options = LoadOptions { device_memory_limit: least + 3 * 7000, ..on_device() };
    let patched = Patched::with_options(directory, options, None);
    for gates in [Gates::A, Gates::Stored] {
        patched.put(gates);
        let mut session = session(&patched.model);
        session.prefill(&tokens(25)).unwrap();
        assert_eq!(shown(&session).unwrap(), expected(&patched, gates, &tokens(25)));
    }
}

#[test]
fn whichever_driver_call_fails_the_gates_in_force_are_what_they_were() {
    let Some(shim) = Shim::take() else { return };
    let patched = Patched::with_options(Directory::random(74), on_device(), None);
    patched.put(Gates::A);
    let mut running = session(&patched.model);
    running.prefill(&tokens(6)).unwrap();
    let before = shown(&running).unwrap();
    let live = shim.live_allocations();
    let calls = {
        let count = shim.calls();
        patched.put(Gates::A);
        shim.calls() - count
    };
    assert!(calls > 3, "{calls}");
    let mut running = session(&patched.model);
    running.prefill(&tokens(6)).unwrap();
    for call in 1..=calls {
        for (code, statuses) in
            [(1, &[Status::DeviceFailed][..]), (2, &[Status::DeviceOutOfMemory, Status::OutOfMemory])]
        {
            shim.fail(call, code);
            let result = patched.model.apply_router_patch(&patched.patches[1]);
            shim.fail(0, 0);
            let status = status(result);
            if status == Status::Ok {
                // A call whose failure is nobody's business, such as leaving a context.
                patched.put(Gates::A);
                running.prefill(&[]).unwrap();
            } else {
                assert!(statuses.contains(&status), "call {call} fails with {code}: {status:?}");
            }
            assert_eq!((running.pending(), shown(&running).unwrap()), (0, before.clone()), "call {call}");
            let mut fresh = session(&patched.model);
            fresh.prefill(&tokens(6)).unwrap();
            assert_eq!(shown(&fresh).unwrap(), before, "call {call}");
        }
    }
    drop(running);
    let mut random = Random::new(1);
    for _ in 0..20 {
        patched.put(Gates::ALL[random.below(3)]);
    }
    patched.put(Gates::A);
    assert!(shim.live_allocations() <= live);
}
