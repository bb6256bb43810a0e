//! Attention of a prompt's tokens on tensor cores, through whole models.

use std::path::Path;

use gemmoe::backend::{KvDtype, Variants};
use gemmoe::{LoadOptions, Session, SessionOptions};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::common::{Directory, Random, batch, golden, load_options, session_with};
use crate::driver::Driver;
use crate::shim::{ORDERS, Order, Shim};
use crate::{difference, embedding_in, on_device, on_processor, on_tensor_cores};

/// What rounding queries and weights to the dtype of keys and values may cost.
const DTYPES: [(KvDtype, f64); 3] = [(KvDtype::Bf16, 1e-2), (KvDtype::F16, 2e-3), (KvDtype::Int8, 1e-2)];

/// Weights in f32, which no tensor core multiplies: attention alone differs.
fn directory(changes: Value) -> tempfile::TempDir {
    let mut directory = Directory::random_with(31, changes);
    directory.dtype = Dtype::F32;
    directory.to_temporary()
}

#[test]
fn slices_of_many_tokens_attend_on_tensor_cores_unless_results_are_to_be_exact() {
    let Some(shim) = Shim::take() else { return };
    let tokens = Random::new(31).tokens(90, 97);
    for (heads, head_dim) in [(1, 8), (4, 64)] {
        let directory = directory(json!({"num_key_value_heads": heads, "head_dim": head_dim}));
        for (kv_dtype, most) in DTYPES {
            let of = |options, count| embedding_in(directory.path(), &options, &tokens[..count], kv_dtype);
            let name = format!("{}, head_dim {head_dim}", kv_dtype.name());
            shim.order(Order::Forward);
            assert_eq!(of(on_tensor_cores(), 16), of(on_device(), 16), "{name}: 16 tokens are few");
            for count in [17, 90] {
                let (found, exact) = (of(on_tensor_cores(), count), of(on_device(), count));
                let (off, of_exact) = (difference(&found, &exact), difference(&found, &of(on_processor(), count)));
                println!("{name}, {count} tokens: {off:.1e}, {of_exact:.1e} from the processor");
                assert!(found != exact && off < most && of_exact < most, "{name}, {count} tokens: {off:.1e}");
            }
            let whole = of(on_tensor_cores(), 90);
            shim.order(Order::Random(5));
            assert_eq!(of(on_tensor_cores(), 90), whole, "{name}, in another order");
            shim.order(Order::Forward);
        }
        // There are none for f32.
        let of = |options| embedding_in(directory.path(), &options, &tokens, KvDtype::F32);
        assert_eq!(of(on_tensor_cores()), of(on_device()));
    }
    // Rows that are no whole units, and more columns than registers take.
    for head_dim in [12, 264] {
        let directory = directory(json!({"num_hidden_layers": 1, "head_dim": head_dim}));
        let of = |options| logits_of(directory.path(), &options, KvDtype::Bf16, &tokens[..20]);
        assert_eq!(of(on_tensor_cores()), of(on_device()), "head_dim {head_dim}");
    }
}

fn logits_of(path: &Path, options: &LoadOptions, kv_dtype: KvDtype, tokens: &[u32]) -> Vec<f32> {
    let mut session = session_with(&load_options(path, options), kv_dtype);
    session.prefill(tokens).unwrap();
    session.logits().unwrap().to_vec()
}

#[test]
fn a_token_attends_to_the_same_bits_in_slices_of_any_number_past_sixteen_and_in_any_batch() {
    let Some(_driver) = Driver::take() else { return };
    let directory = directory(json!({}));
    let model = load_options(directory.path(), &on_tensor_cores());
    let tokens = Random::new(32).tokens(100, 97);
    let of_chunk = |kv_dtype, prefill_chunk| {
        let options =
            SessionOptions { context_size: 128, prefill_chunk, kv_dtype: Some(kv_dtype), ..Default::default() };
        Session::new(std::sync::Arc::clone(&model), &options).unwrap()
    };
    let bits = |session: &Session| session.logits().unwrap().iter().map(|number| number.to_bits()).collect::<Vec<_>>();
    let mut alone = Vec::new();
    for (kv_dtype, _) in DTYPES {
        let results = [100, 50, 20].map(|chunk| {
            let mut session = of_chunk(kv_dtype, chunk);
            session.prefill(&tokens).unwrap();
            bits(&session)
        });
        assert!(results.iter().all(|result| *result == results[0]), "{}", kv_dtype.name());
        alone.push(results[0].clone());
    }
    // Together, beside a sequence in f32 and one of a token, whose attention is not on tensor cores.
    let mut sessions: Vec<_> = DTYPES.iter().map(|(kv_dtype, _)| of_chunk(*kv_dtype, 100)).collect();
    sessions.insert(1, of_chunk(KvDtype::F32, 100));
    sessions.push(of_chunk(KvDtype::Bf16, 100));
    for (at, session) in sessions.iter_mut().enumerate() {
        session.push(if at == 4 { &tokens[..1] } else { &tokens }).unwrap();
    }
    let mut exact = [of_chunk(KvDtype::F32, 100), of_chunk(KvDtype::Bf16, 100)];
    exact[0].prefill(&tokens).unwrap();
    exact[1].prefill(&tokens[..1]).unwrap();
    let mut together = batch(&model, 5, 500, 128);
    let mut all: Vec<&mut Session> = sessions.iter_mut().collect();
    for token in crate::common::draw_each(&mut together, &mut all) {
        token.unwrap();
    }
    let expected = [&alone[0], &bits(&exact[0]), &alone[1], &alone[2], &bits(&exact[1])];
    for (session, expected) in sessions.iter().zip(expected) {
        assert_eq!(bits(session), *expected);
    }
}

#[test]
fn beside_tiles_a_token_alone_is_split_over_its_context_and_keeps_its_bits() {
    let Some(_driver) = Driver::take() else { return };
    let directory = directory(json!({"num_hidden_layers": 1, "max_position_embeddings": 1024}));
    let model = load_options(directory.path(), &on_tensor_cores());
    let tokens = Random::new(33).tokens(560, 97);
    let bits = |session: &Session| session.logits().unwrap().iter().map(|number| number.to_bits()).collect::<Vec<_>>();
    let prepare = |count: usize| {
        let options = SessionOptions { context_size: 640, kv_dtype: Some(KvDtype::Bf16), ..Default::default() };
        let mut session = Session::new(std::sync::Arc::clone(&model), &options).unwrap();
        session.prefill(&tokens[..count]).unwrap();
        session
    };
    // A token after 550, which several blocks share, and 40 after 20, which are a tile.
    let alone = [(550, 551), (20, 60)].map(|(held, end)| {
        let mut session = prepare(held);
        session.prefill(&tokens[held..end]).unwrap();
        bits(&session)
    });
    let (mut first, mut second) = (prepare(550), prepare(20));
    first.push(&tokens[550..551]).unwrap();
    second.push(&tokens[20..60]).unwrap();
    let mut together = batch(&model, 2, 100, 640);
    for token in crate::common::draw_each(&mut together, &mut [&mut second, &mut first]) {
        token.unwrap();
    }
    assert_eq!([bits(&first), bits(&second)], alone);
}

#[test]
fn golden_prompts_agree_with_the_float64_reference_on_tensor_cores_too() {
    let Some(shim) = Shim::take() else { return };
    for path in golden() {
        let read = |name: &str| -> Value { serde_json::from_slice(&std::fs::read(path.join(name)).unwrap()).unwrap() };
        let head_dim = read("config.json")["head_dim"].as_f64().unwrap_or(256.0);
        if head_dim % 8.0 != 0.0 {
            continue;
        }
        let expected = read("expected.json");
        let case = expected["cases"].as_array().unwrap().last().unwrap();
        let numbers = |key: &str| case[key].as_array().unwrap().iter().map(|value| value.as_f64().unwrap());
        let (tokens, logits): (Vec<u32>, Vec<f32>) =
            (numbers("tokens").map(|id| id as u32).collect(), numbers("logits").map(|value| value as f32).collect());
        let option = |key: &str| expected["options"][key].as_bool().unwrap_or(false);
        let variants = Variants {
            unrounded_embedding_scale: option("unrounded_embedding_scale"),
            exact_gelu: option("exact_gelu"),
        };
        let options = LoadOptions { variants, ..on_tensor_cores() };
        for (at, (kv_dtype, _)) in DTYPES.into_iter().enumerate() {
            shim.order(ORDERS[at]);
            let error = difference(&logits_of(&path, &options, kv_dtype, &tokens), &logits);
            let name = path.file_name().unwrap().to_string_lossy();
            println!("{name}, {}: {error:.1e}", kv_dtype.name());
            // Of the largest logit: keys and values are rounded here, and activations to the weights' dtype.
            assert!(error < 5e-2, "{name}, {}: {error:.1e}", kv_dtype.name());
        }
    }
}
