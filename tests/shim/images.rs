//! Native code and the launches that need it: which devices take it, and what is refused.

use std::ffi::{c_int, c_uint, c_void};
use std::path::Path;

use crate::INVALID_VALUE;
use crate::driver::{Attribute, Gpu};
use crate::shim::Shim;

const INVALID_IMAGE: i32 = 200;
const NO_BINARY_FOR_GPU: i32 = 209;
const NOT_SUPPORTED: i32 = 801;

/// A file of `kernels/generated`.
fn generated(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/generated").join(name)).unwrap()
}

fn attribute(id: c_uint, value: c_int) -> Attribute {
    Attribute { id, padding: 0, value, rest: [0; 15] }
}

/// The next grid may begin while the one before it runs.
fn dependent() -> Attribute {
    attribute(6, 1)
}

/// A launch of `norm`, whose arguments nobody reads: in a capture.
fn launch(gpu: &Gpu, module: *mut c_void, attributes: &[Attribute]) -> Result<(), i32> {
    let function = gpu.function(module, "norm").unwrap();
    gpu.begin_capture().unwrap();
    let result = gpu.launch_with_attributes(function, 256, attributes, &[0u64; 64]);
    let graph = gpu.end_capture().unwrap();
    gpu.destroy_graph(graph).unwrap();
    result
}

#[test]
fn native_code_is_for_its_own_devices() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    for (file, takes) in [("sm_80/norm.cubin", [80, 86, 89].as_slice()), ("sm_90a/norm.cubin", &[90])] {
        let image = generated(file);
        for capability in [80, 86, 87, 89, 90, 91, 100, 120] {
            shim.compute_capability(capability);
            let loaded = gpu.load_image(&image);
            assert_eq!(loaded.is_ok(), takes.contains(&capability), "{file}, {capability}");
            match loaded {
                Ok(module) => {
                    assert!(gpu.function(module, "norm").is_ok());
                    assert_eq!(gpu.function(module, "embed"), Err(500));
                    gpu.unload_module(module).unwrap();
                }
                Err(status) => assert_eq!(status, NO_BINARY_FOR_GPU),
            }
        }
    }
    shim.compute_capability(80);
    let mut image = generated("sm_80/norm.cubin");
    image[18] = 62;
    assert_eq!(gpu.load_image(&image), Err(INVALID_IMAGE), "a program for processors");
}

#[test]
fn a_kernel_may_begin_early_only_where_its_code_waits() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    shim.compute_capability(90);
    shim.driver_version(12030);
    let (ptx, native) = ([generated("norm.ptx"), vec![0]].concat(), generated("sm_90a/norm.cubin"));
    // The same code, with another instruction in the place of griddepcontrol.wait.
    let mut waitless = native.clone();
    let waits = |at: &usize| native[*at..at + 8] == [0x2e, 0x78, 0, 0, 0, 0, 0, 0];
    let at = (0..native.len() - 8).step_by(16).find(waits).unwrap();
    waitless[at] = 0x18;
    for (image, expected) in [(&ptx, Err(INVALID_VALUE)), (&native, Ok(())), (&waitless, Err(INVALID_VALUE))] {
        let module = gpu.load_image(image).unwrap();
        assert_eq!(launch(&gpu, module, &[dependent()]), expected);
        if expected.is_err() {
            let text = shim.last_error_text();
            assert!(text.contains("norm: its code does not wait for the grid before it"), "{text}");
        }
        // Without the attribute, or with one that says no, all of them may be launched.
        assert_eq!(launch(&gpu, module, &[]), Ok(()));
        assert_eq!(launch(&gpu, module, &[attribute(6, 0)]), Ok(()));
        gpu.unload_module(module).unwrap();
    }
    assert_eq!(shim.dependent_launches(), 1);
}

#[test]
fn attributes_of_launches_are_checked() {
    let Some(shim) = Shim::take() else { return };
    let gpu = Gpu::new(&shim);
    shim.compute_capability(90);
    shim.driver_version(12030);
    let module = gpu.load_image(&generated("sm_90a/norm.cubin")).unwrap();
    assert_eq!(launch(&gpu, module, &[attribute(4, 1)]), Err(NOT_SUPPORTED));
    assert_eq!(launch(&gpu, module, &[attribute(6, 2)]), Err(INVALID_VALUE));
    assert_eq!(launch(&gpu, module, &[dependent(), dependent()]), Err(INVALID_VALUE));
    assert_eq!(launch(&gpu, module, &[Attribute { padding: 1, ..dependent() }]), Err(INVALID_VALUE));
    let function = gpu.function(module, "norm").unwrap();
    assert_eq!(gpu.launch_with_attributes(function, 128, &[], &[0u64; 64]), Err(INVALID_VALUE), "its block has 256");
    // Before CUDA 12.3 a graph does not know how its kernels follow each other.
    shim.driver_version(12020);
    assert_eq!(launch(&gpu, module, &[dependent()]), Err(NOT_SUPPORTED));
    assert_eq!(shim.dependent_launches(), 0);
    gpu.unload_module(module).unwrap();
    shim.compute_capability(80);
    let module = gpu.load_image(&generated("sm_80/norm.cubin")).unwrap();
    assert_eq!(launch(&gpu, module, &[dependent()]), Err(NOT_SUPPORTED));
}
