//! Which devices there are, what is said of those that cannot be used, and that the host's own is left alone.

use std::ffi::{c_int, c_void};
use std::sync::Arc;

use gemmoe::backend::cuda::{planned_pass_bytes, planned_residency};
use gemmoe::backend::ops::PassLimits;
use gemmoe::backend::{Backend, Device, devices};
use gemmoe::{LoadOptions, Model, Progress, SessionOptions, Status};

use crate::common::{Directory, Random, golden, load_options, session};
use crate::driver::Driver;
use crate::on_device;
use crate::shim::Shim;

#[test]
fn devices_are_listed_with_their_memory() {
    let Some(shim) = Shim::take() else { return };
    shim.device_count(2);
    let found = devices().unwrap();
    assert_eq!(found.len(), 2);
    for (index, device) in found.iter().enumerate() {
        assert_eq!((device.index, device.capability), (index, (8, 0)));
        assert!(!device.name.is_empty());
        assert!(0 < device.free_bytes && device.free_bytes <= device.memory_bytes, "{device:?}");
    }
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
    shim.compute_capability(75);
    assert_eq!(devices().unwrap(), []);
    shim.device_count(0);
    assert_eq!(devices().unwrap(), []);
    shim.driver_version(11080);
    assert_eq!(devices().unwrap_err().status(), Status::DriverTooOld);
}

#[test]
fn a_device_that_cannot_be_used_is_an_error_that_says_why() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let refused = |device| {
        let options = LoadOptions { device, ..Default::default() };
        let error = Model::load(directory.path(), &options, &Progress::default()).err().unwrap();
        (error.status(), error.to_string())
    };
    let (status, text) = refused(Device::Cuda(1));
    assert_eq!(
        (status, &text[..]),
        (Status::NoDevice, "device is 1, expected 0 to 0: there are 1 that the kernels run on")
    );
    shim.compute_capability(75);
    let (status, text) = refused(Device::Cuda(0));
    assert_eq!(status, Status::NoDevice);
    assert!(text.contains("8.0"), "{text}");
    shim.driver_version(11080);
    let (status, text) = refused(Device::Cuda(0));
    assert_eq!(status, Status::DriverTooOld);
    assert!(text.contains("CUDA 11.8") && text.contains("530"), "{text}");
    shim.driver_version(12010);
    shim.device_count(0);
    assert_eq!(refused(Device::Cuda(0)).0, Status::NoDevice);
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}

#[test]
fn the_hosts_current_context_stays_what_it_was() {
    let Some(driver) = Driver::take() else { return };
    type Create = unsafe extern "C" fn(*mut *mut c_void, u32, c_int) -> u32;
    type Current = unsafe extern "C" fn(*mut *mut c_void) -> u32;
    type Destroy = unsafe extern "C" fn(*mut c_void) -> u32;
    // SAFETY: the driver's functions of these names have these signatures.
    let (create, current, destroy): (Create, Current, Destroy) = unsafe {
        (
            std::mem::transmute::<*mut c_void, Create>(driver.symbol("cuCtxCreate_v2")),
            std::mem::transmute::<*mut c_void, Current>(driver.symbol("cuCtxGetCurrent")),
            std::mem::transmute::<*mut c_void, Destroy>(driver.symbol("cuCtxDestroy_v2")),
        )
    };
    assert!(!devices().unwrap().is_empty());
    let (mut hosts, mut found) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: each writes one handle.
    assert_eq!(unsafe { (create(&mut hosts, 0, 0), current(&mut found)) }, (0, 0));
    assert!(!hosts.is_null() && hosts == found);
    let directory = Directory::random(1).to_temporary();
    let mut check = |what: &str| {
        // SAFETY: writes one handle.
        assert_eq!((unsafe { current(&mut found) }, found), (0, hosts), "{what}");
    };
    let model = load_options(directory.path(), &on_device());
    check("load");
    let mut session = session(&model);
    session.prefill(&Random::new(1).tokens(5, 97)).unwrap();
    check("prefill");
    if let Some(shim) = driver.shim() {
        shim.fail(5, 719);
        session.step().and_then(|_| session.step()).unwrap_err();
        check("a lost device");
    }
    drop((session, model));
    check("free");
    // SAFETY: made above.
    assert_eq!(unsafe { destroy(hosts) }, 0);
}

#[test]
fn what_is_planned_is_what_is_taken() {
    let Some(_driver) = Driver::take() else { return };
    for path in golden() {
        let model = load_options(&path, &on_device());
        let (description, _) = Model::inspect(&path, &LoadOptions::default()).unwrap();
        let (all, experts) = description.loaded_bytes;
        assert_eq!(model.backend().weight_bytes(), (all as usize, experts as usize));
        assert!(planned_residency(&description, 0).unwrap().device_bytes >= all);
        for (max_tokens, max_sequences, max_context) in [(1, 1, 16), (40, 3, 700), (7, 9, 33)] {
            let limits = PassLimits { max_tokens, max_sequences, max_context, logit_rows: max_sequences + 2 };
            let pass = model.backend().new_pass(limits).unwrap();
            assert_eq!(pass.bytes(), planned_pass_bytes(model.config(), limits).unwrap());
        }
    }
}

#[test]
fn models_that_differ_have_other_fingerprints_and_devices_their_own() {
    let Some(_driver) = Driver::take() else { return };
    let fingerprint = |seed, options: &LoadOptions| {
        let directory = Directory::random(seed).to_temporary();
        load_options(directory.path(), options).fingerprint()
    };
    let first = fingerprint(1, &on_device());
    assert_eq!(first, fingerprint(1, &on_device()));
    assert_ne!(first, fingerprint(2, &on_device()));
    assert_ne!(first, fingerprint(1, &LoadOptions::default()));
}

#[test]
fn the_device_has_a_name_and_no_observer() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let model: Arc<Model> = load_options(directory.path(), &on_device());
    let backend: &dyn Backend = model.backend();
    let first = devices().unwrap().swap_remove(0);
    println!("device 0: {}, compute capability {:?}, {} bytes", first.name, first.capability, first.memory_bytes);
    assert_eq!(backend.device_name(), first.name);
    assert_eq!(backend.observe().err().unwrap().status(), Status::InvalidArgument);
}

#[test]
fn a_free_choice_takes_the_device_with_most_room_and_the_processor_where_none_has_enough() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let free_choice = LoadOptions { device: Device::Auto, ..Default::default() };
    let on = |options: &LoadOptions| {
        let plan = Model::plan(directory.path(), options, &SessionOptions::default()).unwrap();
        let name = load_options(directory.path(), options).backend().device_name();
        assert_eq!(plan.device_name, name);
        name
    };
    let gpu = devices().unwrap()[0].name.clone();
    let processor = on(&LoadOptions::default());
    assert_ne!(gpu, processor);
    assert_eq!(on(&free_choice), gpu);
    assert_eq!(on(&on_device()), gpu);
    // Room for the weights, not for a session.
    let (description, _) = Model::inspect(directory.path(), &free_choice).unwrap();
    shim.total_memory(planned_residency(&description, 0).unwrap().device_bytes as usize + 4096);
    assert_eq!(on(&free_choice), processor);
    shim.total_memory(1 << 40);
    shim.driver_version(11080);
    assert_eq!(on(&free_choice), processor);
    shim.device_count(0);
    assert_eq!(on(&free_choice), processor);
    assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0));
}
