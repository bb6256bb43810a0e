//! Logits, greedy tokens and router choices against the float64 reference of `tools/reference`, over every layout,
//! dtype, expert count and odd size in `tests/golden`, on every instruction set this machine has.

mod common;

use common::{checkpoints, golden};
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cpu::kernels::{Instructions, Kernels, Precision};
use gemmoe::quant::Format;
use gemmoe::{LoadOptions, Model};

/// Of the largest logit, where activations are f32. Tighter than the 2e-4 that was promised: the two GeLUs can differ by as
/// little as 1e-4.
const TOLERANCE: f64 = 2e-5;
/// The same where activations are rounded to bf16 before they meet bf16 weights, as AVX-512 does. Routers may then choose
/// differently where two experts are close, so routes and greedy tokens are not compared.
const TOLERANCE_BF16: f64 = 5e-2;

/// Whether this instruction set rounds activations that meet this directory's weights, some of which may be bf16.
fn rounds_activations(path: &std::path::Path, instructions: Instructions) -> bool {
    let dtypes = Model::inspect(path, &LoadOptions::default()).unwrap().0.dtypes;
    let kernels = Kernels::get(instructions).unwrap();
    dtypes.iter().any(|dtype| dtype == "BF16") && kernels.precision(Format::Bf16) != Precision::F32
}

fn check_directory(path: &std::path::Path, instructions: Instructions) -> f64 {
    let cpu = CpuOptions { threads: 2.into(), instructions };
    let rounds = rounds_activations(path, instructions);
    let tolerance = if rounds { TOLERANCE_BF16 } else { TOLERANCE };
    checkpoints::check(path, &LoadOptions { cpu, ..Default::default() }, tolerance, !rounds)
}

#[test]
fn every_golden_checkpoint_agrees_with_the_float64_reference() {
    for instructions in Instructions::ALL {
        if Kernels::get(instructions).is_err() {
            continue;
        }
        let errors = golden().iter().map(|path| check_directory(path, instructions)).collect::<Vec<_>>();
        let worst = errors.iter().copied().fold(0f64, f64::max);
        println!("{instructions:?}: {} checkpoints, worst relative error {worst:.2e}", errors.len());
    }
}
