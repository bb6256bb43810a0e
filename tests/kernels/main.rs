//! Each CUDA kernel against a reference written here, in f64 where it can be: on the CPU, under the shim, or on a GPU
//! (`common/driver.rs`). Inputs differ from run to run; a failing test prints its seed, which GEMMOE_SEED takes.

#[path = "../../src/backend/cuda/arguments.rs"]
mod arguments;
mod attention;
mod attention_tensor;
mod bench;
mod candidates;
mod device;
#[path = "../common/driver.rs"]
mod driver;
mod experts;
#[allow(dead_code)] // The weights of a draw need the exponential.
#[path = "../../src/backend/cpu/kernels/math.rs"]
mod math;
mod products;
#[path = "../common/random.rs"]
mod random;
#[path = "../common/root.rs"]
mod root;
mod rotate;
mod routing;
mod rows;
#[allow(unused_imports)] // Another test file needs the rest.
#[path = "../common/shim.rs"]
mod shim;
mod tensor;
mod tensors;
mod training;

use device::Device;
use random::Random;
use shim::{Check, passes_checked};

/// How much a check does: everything, or a little of everything where it is slow.
#[derive(Clone, Copy, PartialEq)]
enum Effort {
    Whole,
    Sample,
}

type Kernel = fn(&Device, &mut Random, Effort);

const CHECKS: [(&str, Kernel); 30] = [
    ("embed", rows::check_embed),
    ("norm", rows::check_norm),
    ("round_activations", rows::check_round),
    ("log_softmax_at", rows::check_log_softmax),
    ("candidates", candidates::check_candidates),
    ("matmul", products::check_matmul),
    ("matmul, bits", products::check_bits),
    ("experts", experts::check_experts),
    ("experts, bits", experts::check_bits),
    ("matmul on tensor cores", tensor::check_matmul),
    ("experts on tensor cores", tensor::check_experts),
    ("tensor cores, bits", tensor::check_bits),
    ("combine", experts::check_combine),
    ("rotate_and_store", rotate::check_rotate),
    ("attention", attention::check_attention),
    ("attention, special numbers", attention::check_special_numbers),
    ("attention on tensor cores", attention_tensor::check_tiles),
    ("attention on tensor cores, large scores", attention_tensor::check_large_scores),
    ("attention on tensor cores, bits", attention_tensor::check_bits),
    ("attention on tensor cores, special numbers", attention_tensor::check_special_numbers),
    ("route", routing::check_route),
    ("group", routing::check_group),
    ("training, products", training::check_products),
    ("training, multiply", training::check_multiply),
    ("training, softmax", training::check_softmax),
    ("training, logits", training::check_logits),
    ("training, rows", training::check_rows),
    ("fill", bench::check_fill),
    ("read", bench::check_read),
    ("mma_rate", bench::check_mma_rate),
];

fn run(name: &str) {
    let Some(device) = Device::take() else { return };
    let mut random = fresh();
    let (_, check) = CHECKS.iter().find(|(known, _)| *known == name).unwrap();
    check(&device, &mut random, Effort::Whole);
}

/// Random numbers of their own for each run.
fn fresh() -> Random {
    use std::hash::{BuildHasher, Hasher};
    let given = std::env::var("GEMMOE_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed = given.unwrap_or_else(|| std::hash::RandomState::new().build_hasher().finish() >> 32);
    println!("GEMMOE_SEED={seed}");
    Random::new(seed)
}

#[test]
fn an_embedded_token_is_its_row_in_every_format() {
    run("embed");
}

#[test]
fn a_norm_agrees_with_f64_and_its_integers_are_what_rounding_gives() {
    run("norm");
}

#[test]
fn activations_are_rounded_by_the_rules_of_the_cpu_bit_for_bit() {
    run("round_activations");
}

#[test]
fn log_probabilities_agree_with_f64_and_know_what_is_not_a_number() {
    run("log_softmax_at");
}

#[test]
fn candidates_are_the_first_of_all_logits_and_sums_agree_with_f64() {
    run("candidates");
}

#[test]
fn products_of_every_format_agree_with_f64() {
    run("matmul");
}

#[test]
fn a_tokens_products_have_the_same_bits_in_any_tile_and_company() {
    run("matmul, bits");
}

#[test]
fn experts_of_every_format_agree_with_f64() {
    run("experts");
}

#[test]
fn a_slots_products_have_the_same_bits_in_any_tile_and_company() {
    run("experts, bits");
}

#[test]
fn products_on_tensor_cores_agree_with_f64_and_those_of_integers_bit_for_bit() {
    run("matmul on tensor cores");
}

#[test]
fn experts_on_tensor_cores_agree_with_f64() {
    run("experts on tensor cores");
}

#[test]
fn on_tensor_cores_too_a_token_has_the_same_bits_in_any_place_and_company() {
    run("tensor cores, bits");
}

#[test]
fn slots_are_combined_in_f64_and_rounded_once() {
    run("combine");
}

#[test]
fn heads_are_rotated_and_stored_where_the_cache_has_them() {
    run("rotate_and_store");
}

#[test]
fn attention_agrees_with_f64_and_splits_change_no_bit() {
    run("attention");
}

#[test]
fn attention_to_what_is_not_a_number_is_none_either() {
    run("attention, special numbers");
}

#[test]
fn attention_on_tensor_cores_agrees_with_f64_within_the_roundings_of_its_weights() {
    run("attention on tensor cores");
}

#[test]
fn no_score_is_too_large_for_tensor_cores() {
    run("attention on tensor cores, large scores");
}

#[test]
fn attention_on_tensor_cores_has_the_same_bits_in_any_tile() {
    run("attention on tensor cores, bits");
}

#[test]
fn attention_on_tensor_cores_to_what_is_not_a_number_is_none_either() {
    run("attention on tensor cores, special numbers");
}

#[test]
fn routes_are_those_of_the_cpu() {
    run("route");
}

#[test]
fn slots_are_grouped_by_expert_in_rising_order() {
    run("group");
}

#[test]
fn products_of_training_agree_with_f64_both_ways_in_every_format() {
    run("training, products");
}

#[test]
fn products_of_activations_agree_with_f64_however_their_sides_lie() {
    run("training, multiply");
}

#[test]
fn softmaxes_of_training_and_their_gradients_agree_with_f64_and_see_nothing_ahead() {
    run("training, softmax");
}

#[test]
fn log_probabilities_of_a_vocabulary_in_parts_and_their_gradients_agree_with_f64() {
    run("training, logits");
}

#[test]
fn rows_of_training_and_their_gradients_agree_with_f64() {
    run("training, rows");
}

#[test]
fn weights_out_of_nothing_have_the_mean_and_the_spread_they_should() {
    run("fill");
}

#[test]
fn every_byte_is_read_once_where_bandwidth_is_measured() {
    run("read");
}

#[test]
fn as_many_products_are_made_as_rates_are_counted_by() {
    run("mma_rate");
}

#[test]
fn nothing_depends_on_the_order_of_lanes_warps_and_blocks() {
    let Some(device) = Device::take() else { return };
    let seed = fresh().bits();
    let mut digests = Vec::new();
    for order in shim::ORDERS {
        device.order(order);
        device.forget_results();
        let mut random = Random::new(seed);
        for (name, check) in CHECKS {
            check(&device, &mut random, Effort::Sample);
            digests.push((name, device.digest_of_results()));
        }
    }
    let (first, others) = digests.split_at(CHECKS.len());
    assert!(others.chunks(CHECKS.len()).all(|digests| digests == first), "{digests:?}");
}

#[test]
#[ignore = "the next tests run it where kernels are watched"]
fn every_kernel_once() {
    let Some(device) = Device::take() else { return };
    let mut random = fresh();
    for (_, check) in CHECKS {
        check(&device, &mut random, Effort::Sample);
    }
}

#[test]
fn every_byte_that_kernels_touch_is_theirs() {
    passes_checked(Check::Memory, "every_kernel_once");
}

#[test]
fn between_threads_that_share_bytes_there_is_a_barrier() {
    passes_checked(Check::Races, "every_kernel_once");
}

#[test]
fn the_committed_ptx_has_every_kernel_of_the_sources() {
    let Some(device) = Device::take() else { return };
    for name in ["embed", "norm", "round_activations", "rotate_and_store", "attention", "attention_merge", "route"] {
        assert!(device.has(name), "{name}");
    }
    for name in ["group", "combine", "log_softmax_at", "select_candidates", "merge_candidates"] {
        assert!(device.has(name), "{name}");
    }
    for name in ["fill", "read", "mma_rate_bf16", "mma_rate_int8"] {
        assert!(device.has(name), "{name}");
    }
    for name in ["multiply", "softmax", "softmax_gradient", "log_sum", "logit_gradient", "norm_gradient", "rotate"] {
        assert!(device.has(&format!("training_{name}")), "{name}");
    }
    for name in ["gather", "combine", "row_products", "geglu", "geglu_gradient"] {
        assert!(device.has(&format!("training_{name}")), "{name}");
    }
    for dtype in ["bf16", "f16", "int8"] {
        assert!(device.has(&format!("attention_tensor_{dtype}")), "{dtype}");
    }
    for format in tensors::Format::ALL {
        for family in ["training_product", "training_product_gradient"] {
            assert!(device.has(&format!("{family}_{}", format.name())), "{family}, {format:?}");
        }
        let tiles = products::TILES.map(products::Variant::Tile);
        let on_tensor_cores = [products::Variant::Narrow, products::Variant::Tensor];
        let tensor = if format == tensors::Format::F32 { &[][..] } else { &on_tensor_cores };
        for variant in tiles.iter().chain(tensor) {
            for family in ["matmul", "gate_up", "down"] {
                let name = variant.kernel(family, format);
                assert!(device.has(&name), "{name}");
            }
        }
    }
}
