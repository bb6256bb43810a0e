//! Which code of the kernels a device is given, and how their launches follow each other.

use std::path::Path;
use std::task::Poll;

use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cuda::{CudaBackend, CudaOptions};
use gemmoe::backend::numerics::Variants;
use gemmoe::backend::{Cancel, Limit};
use gemmoe::model::{Checkpoint, Config, Description};
use gemmoe::{Formats, Model, Progress, Status};

use crate::common::{Directory, Random, load_options, session};
use crate::shim::Shim;
use crate::{on_device, with_a_token};

/// A token, and bits that decide it, from a model of its own on the device as the shim shows it.
fn results(directory: &Path) -> (u32, Vec<f32>) {
    let model = load_options(directory, &on_device());
    let mut session = session(&model);
    session.prefill(&Random::new(1).tokens(9, 97)).unwrap();
    (session.step().unwrap(), session.logits().unwrap().to_vec())
}

/// Files of kernels, each a module, but for those of training.
fn files() -> u64 {
    let generated = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/generated/sm_80");
    let names = std::fs::read_dir(generated).unwrap().map(|file| file.unwrap().file_name());
    names.filter(|name| !name.to_str().unwrap().starts_with("training")).count() as u64
}

#[test]
fn a_device_gets_native_code_of_its_own_kind_and_ptx_where_there_is_none() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let expected = results(directory.path());
    for (capability, is_native) in
        [(80, true), (86, true), (87, false), (89, true), (90, true), (91, false), (100, false), (120, false)]
    {
        shim.compute_capability(capability);
        let before = shim.native_modules();
        assert_eq!(results(directory.path()), expected, "{capability}");
        let native = shim.native_modules() - before;
        assert_eq!(native, if is_native { files() } else { 0 }, "{capability}");
    }
}

#[test]
fn where_the_driver_refuses_native_code_it_is_given_ptx() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let expected = results(directory.path());
    for capability in [80, 90] {
        shim.compute_capability(capability);
        // An invalid image, none for this device, one of an unknown kind, and what a driver may yet think of.
        for status in [200, 209, 222, 1] {
            let before = (shim.native_modules(), shim.dependent_launches());
            shim.refuse_native(status);
            assert_eq!(results(directory.path()), expected, "{status} on {capability}");
            assert_eq!((shim.native_modules(), shim.dependent_launches()), before, "{status} on {capability}");
            assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
        }
    }
    // PTX would need no less memory.
    shim.refuse_native(2);
    let error = Model::load(directory.path(), &on_device(), &Progress::default()).err().unwrap();
    assert_eq!(error.status(), Status::DeviceOutOfMemory, "{error}");
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn kernels_may_begin_while_others_run_where_their_code_waits_and_the_driver_can() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let expected = results(directory.path());
    for (capability, version, is_dependent) in
        [(90, 12030, true), (90, 13000, true), (90, 12020, false), (89, 12030, false), (120, 13000, false)]
    {
        shim.compute_capability(capability);
        shim.driver_version(version);
        let before = (shim.launches(), shim.dependent_launches());
        assert_eq!(results(directory.path()), expected, "{capability}, {version}");
        let (launches, dependent) = (shim.launches() - before.0, shim.dependent_launches() - before.1);
        assert!(launches > 0);
        assert_eq!(dependent, if is_dependent { launches } else { 0 }, "{capability}, {version}");
    }
    // Not with code that does not wait.
    shim.compute_capability(90);
    shim.driver_version(12030);
    shim.refuse_native(209);
    let before = shim.dependent_launches();
    assert_eq!(results(directory.path()), expected);
    assert_eq!(shim.dependent_launches(), before);
}

/// Of embedding one token.
fn launches_with(shim: &Shim, directory: &Path, dependent_launch: bool) -> (u64, u64) {
    let mut checkpoint = Checkpoint::open(directory, false).unwrap();
    let config = Config::from_json(&std::fs::read(directory.join("config.json")).unwrap()).unwrap();
    checkpoint.read_headers().unwrap();
    let description = Description::new(&config, &checkpoint, Formats::default()).unwrap();
    let options = CudaOptions {
        device: 0,
        lent: None,
        variants: Variants::default(),
        exact: false,
        dependent_launch,
        cpu: CpuOptions::default(),
        map: false,
        memory_limit: 0,
    };
    let backend = CudaBackend::load(&options, &description, &checkpoint, &Progress::default()).unwrap();
    let mut launches = (0, 0);
    with_a_token(&backend, |pass, batch| {
        let before = (shim.launches(), shim.dependent_launches());
        pass.begin(batch).unwrap();
        let embedded = pass.embed(batch, &Limit::none(&Cancel::default()));
        assert!(matches!(embedded, Poll::Ready(Ok(()))));
        launches = (shim.launches() - before.0, shim.dependent_launches() - before.1);
    });
    launches
}

#[test]
fn a_bench_can_have_each_kernel_begin_after_the_one_before_it() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    shim.compute_capability(90);
    shim.driver_version(12030);
    assert_eq!(launches_with(&shim, directory.path(), true), (1, 1));
    assert_eq!(launches_with(&shim, directory.path(), false), (1, 0));
}
