//! The CUDA backend on the SIMT shim (`kernels/shim`), a driver that computes on the CPU, or on a GPU (`common/driver.rs`): the
//! golden checkpoints, and what else of a backend can be told without one.
#![cfg(feature = "cuda")]

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/bits.rs"]
mod bits;
#[path = "cuda/budget.rs"]
mod budget;
mod common;
#[path = "common/counting.rs"]
mod counting;
#[path = "cuda/devices.rs"]
mod devices;
#[path = "common/driver.rs"]
mod driver;
#[path = "cuda/faults.rs"]
mod faults;
#[path = "router_patch/fixture.rs"]
mod fixture;
#[path = "common/gradients.rs"]
mod golden_gradients;
#[path = "cuda/graphs.rs"]
mod graphs;
#[path = "cuda/lent.rs"]
mod lent;
#[path = "cuda/native.rs"]
mod native;
#[path = "cuda/perplexity.rs"]
mod perplexity;
#[path = "cuda/router_patch.rs"]
mod router_patch;
#[path = "cuda/sampling.rs"]
mod sampling;
#[path = "common/shim.rs"]
mod shim;
#[path = "cuda/training.rs"]
mod training;

use std::path::Path;
use std::sync::Arc;

use common::{Directory, Random, checkpoints, golden, load_options, session_with};
use driver::Driver;
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::backend::{Backend, Batch, Device, KvDtype, Pass, PassLimits, SequenceSlice};
use gemmoe::quant::{Format, GROUP_SIZES, Groups, ScaleDtype};
use gemmoe::{Formats, LoadOptions, Pooling};
use serde_json::json;
use shim::Order;

/// Of the largest logit; activations are f32 whatever the weights are.
const TOLERANCE: f64 = 1e-4;

/// Without tensor cores.
fn on_device() -> LoadOptions {
    LoadOptions { exact: true, ..on_tensor_cores() }
}

/// Batches of more than a few tokens.
fn on_tensor_cores() -> LoadOptions {
    LoadOptions { device: Device::Cuda(0), ..Default::default() }
}

#[test]
fn every_golden_checkpoint_agrees_with_the_float64_reference() {
    let Some(driver) = Driver::take() else { return };
    let errors: Vec<f64> =
        golden().iter().map(|path| checkpoints::check(path, &on_device(), TOLERANCE, true)).collect();
    let worst = errors.iter().copied().fold(0f64, f64::max);
    println!("{} checkpoints, worst relative error {worst:.2e}", errors.len());
    driver.assert_all_is_freed();
}

/// On the processor, with activations in f32 but where weights are quantised.
fn on_processor() -> LoadOptions {
    let cpu = CpuOptions { threads: 2.into(), instructions: Instructions::Portable };
    LoadOptions { cpu, ..Default::default() }
}

/// Has `work` done with a pass for one token, and a batch of one that wants logits.
fn with_a_token(backend: &dyn Backend, work: impl FnOnce(&mut dyn Pass, &mut Batch)) {
    let limits = PassLimits { max_tokens: 1, max_sequences: 1, max_context: 16, logit_rows: 1 };
    let mut pass = backend.new_pass(limits).unwrap();
    let mut pages = [Arc::new(backend.new_kv_page(backend.default_kv_dtype()).unwrap())];
    let kept = backend.new_logits().unwrap();
    let (tokens, targets, logits, router) = (&[5][..], &[][..], Some(kept.place()), None);
    let mut sequences = [SequenceSlice { tokens, start: 0, pages: &mut pages, logits, targets, router }];
    work(&mut *pass, &mut Batch { sequences: &mut sequences, gates: None });
}

/// The largest difference, as a share of the largest number.
fn difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f64, |max, value| max.max(value.abs() as f64));
    let errors = found.iter().zip(expected).map(|(found, expected)| (found - expected).abs() as f64);
    errors.fold(0.0, f64::max) / largest
}

/// Every number that sessions give of a model: logits, scores, an embedding.
fn numbers(path: &Path, options: &LoadOptions, kv_dtype: KvDtype) -> [Vec<f32>; 3] {
    let model = load_options(path, options);
    let tokens = Random::new(3).tokens(21, 97);
    let mut session = session_with(&model, kv_dtype);
    session.set_expert_bias(Some(1), &[0.5, -0.5, 0.0, 1.0]).unwrap();
    session.prefill(&tokens).unwrap();
    let logits = session.logits().unwrap().to_vec();
    let mut scores = vec![0f32; 20];
    session.rewind(1).unwrap();
    session.score(&tokens[1..], &mut scores).unwrap();
    let mut embedding = vec![0f32; model.config().hidden_size];
    session.rewind(0).unwrap();
    session.embed(&tokens, Pooling::Mean, &mut embedding).unwrap();
    [logits, scores, embedding]
}

#[test]
fn quantised_weights_give_what_they_give_on_the_processor() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random_with(5, json!({"hidden_size": 136, "intermediate_size": 72})).to_temporary();
    let mut worst = 0f64;
    for size in GROUP_SIZES {
        for scales in ScaleDtype::ALL {
            let groups = Groups { size, scales };
            for (experts, others) in
                [(Format::Int4(groups), Format::Int8(groups)), (Format::Int8(groups), Format::Int4(groups))]
            {
                let formats =
                    Formats { experts: Some(experts), attention: Some(others), head: Some(others), embedding: None };
                let of = |options| numbers(directory.path(), &LoadOptions { formats, ..options }, KvDtype::F32);
                for (found, expected) in of(on_device()).iter().zip(&of(on_processor())) {
                    let error = difference(found, expected);
                    assert!(error < 2e-3, "{experts}: {error:.1e}");
                    worst = worst.max(error);
                }
            }
        }
    }
    println!("worst difference {worst:.1e}");
}

/// The mean of the hidden states of a prompt's tokens, whose experts are given: a choice that is near a tie may fall to
/// another expert where arithmetic differs.
fn embedding_of(directory: &Path, options: &LoadOptions, tokens: &[u32]) -> Vec<f32> {
    embedding_in(directory, options, tokens, KvDtype::F32)
}

fn embedding_in(directory: &Path, options: &LoadOptions, tokens: &[u32], kv_dtype: KvDtype) -> Vec<f32> {
    let model = load_options(directory, options);
    let mut embedding = vec![0f32; model.config().hidden_size];
    let mut session = session_with(&model, kv_dtype);
    session.set_allowed_experts(Some(0), 0b1010).unwrap();
    session.set_allowed_experts(Some(1), 0b0101).unwrap();
    session.embed(tokens, Pooling::Mean, &mut embedding).unwrap();
    embedding
}

#[test]
fn many_tokens_are_multiplied_on_tensor_cores_unless_results_are_to_be_exact() {
    let Some(driver) = Driver::take() else { return };
    let of_dtype = |dtype| {
        let mut directory = Directory::random_with(21, json!({"hidden_size": 72, "intermediate_size": 200}));
        directory.dtype = dtype;
        directory.to_temporary()
    };
    let quantised = |experts, others| Formats {
        experts: Some(experts),
        attention: Some(others),
        head: Some(others),
        embedding: None,
    };
    // What rounding activations to halves may cost. Integers are the same and only added in another order, but a number near
    // a tie may be rounded to the other side of it afterwards.
    let models = [
        ("bf16", safetensors::Dtype::BF16, Formats::default(), 8, 2e-2),
        ("f16", safetensors::Dtype::F16, Formats::default(), 8, 3e-3),
        ("int4 and int8", safetensors::Dtype::BF16, quantised(Format::INT4, Format::INT8), 3, 1e-2),
        ("int8 and int4", safetensors::Dtype::BF16, quantised(Format::INT8, Format::INT4), 3, 1e-2),
    ];
    let tokens = Random::new(21).tokens(70, 97);
    for (name, dtype, formats, few, most) in models {
        let directory = of_dtype(dtype);
        let of = |options, count| embedding_of(directory.path(), &LoadOptions { formats, ..options }, &tokens[..count]);
        assert_eq!(of(on_tensor_cores(), few), of(on_device(), few), "{name}: {few} tokens are few");
        for count in [few + 1, 16, 17, 70] {
            driver.order(Order::Forward);
            let (found, expected) = (of(on_tensor_cores(), count), of(on_device(), count));
            let error = difference(&found, &expected);
            println!("{name}, {count} tokens: {error:.1e}");
            assert!(found != expected && error < most, "{name}, {count} tokens: {error:.1e}");
            driver.order(Order::Random(3));
            assert_eq!(of(on_tensor_cores(), count), found, "{name}, {count} tokens, in another order");
        }
    }
    // There are none for f32.
    let directory = of_dtype(safetensors::Dtype::F32);
    let of = |options| embedding_of(directory.path(), &options, &tokens);
    assert_eq!(of(on_tensor_cores()), of(on_device()));
}

#[test]
fn every_dtype_of_keys_and_values_gives_what_it_gives_on_the_processor() {
    let Some(_driver) = Driver::take() else { return };
    let mut directory = Directory::random_with(6, json!({"num_key_value_heads": 1}));
    directory.dtype = safetensors::Dtype::F16;
    let directory = directory.to_temporary();
    for kv_dtype in KvDtype::ALL {
        let of = |options| numbers(directory.path(), &options, kv_dtype);
        for (found, expected) in of(on_device()).iter().zip(&of(on_processor())) {
            let error = difference(found, expected);
            // A number that lies between two of the dtype's may be rounded to the other one.
            let most = if kv_dtype == KvDtype::F32 { TOLERANCE } else { 2e-3 };
            assert!(error < most, "{}: {error:.1e}", kv_dtype.name());
            println!("{}: {error:.1e}", kv_dtype.name());
        }
    }
}
