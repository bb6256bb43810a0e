//! Mixing: bits of an independent mixer, dense models out of identical experts, every dtype and layout, routers.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{Directory, Random, load, repository, session_with};
use gemmoe::backend::KvDtype;
use gemmoe::mix::{self, MixOptions, Recipe};
use gemmoe::model::names::Layout;
use gemmoe::{Model, Progress, QuantizeOptions, quantize};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tokenizer::{VOCAB_SIZE, sample};

/// A dense model of the shape of `Directory::random`.
fn dense(seed: u64) -> Directory {
    let config = json!({"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "vocab_size": VOCAB_SIZE,
        "num_local_experts": 1, "num_experts_per_tok": 1});
    let mut directory = Directory::random_with(seed, config);
    let tensors = std::mem::take(&mut directory.tensors);
    for (name, tensor) in tensors {
        let Some((layer, rest)) = name.split_once("block_sparse_moe.") else {
            directory.tensors.insert(name, tensor);
            continue;
        };
        let weight = match rest {
            "experts.0.w1.weight" => "gate_proj",
            "experts.0.w3.weight" => "up_proj",
            "experts.0.w2.weight" => "down_proj",
            _ => continue,
        };
        directory.tensors.insert(format!("{layer}mlp.{weight}.weight"), tensor);
    }
    let config = directory.config.as_object_mut().unwrap();
    config.remove("num_local_experts");
    config.remove("num_experts_per_tok");
    directory
}

/// Directories of models beside each other.
struct Models(tempfile::TempDir);

impl Models {
    fn new() -> Models {
        Models(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn add(&self, name: &str, directory: &Directory) {
        std::fs::create_dir(self.path(name)).unwrap();
        directory.write(&self.path(name));
        std::fs::write(self.path(name).join("tokenizer.json"), sample().to_string()).unwrap();
    }

    /// Mixes what a recipe says to `target`.
    fn try_mix(&self, recipe: &str, target: &str) -> gemmoe::Result<mix::MixReport> {
        let recipe = Recipe::parse(recipe, "recipe.toml", self.0.path())?;
        mix::mix(&recipe, &self.path(target), &MixOptions { threads: 2, ..Default::default() }, &Progress::default())
    }

    fn mix(&self, recipe: &str, target: &str) -> mix::MixReport {
        let report = self.try_mix(recipe, target).unwrap_or_else(|error| panic!("{error}\n{recipe}"));
        let left = std::fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<String> = left.map(|name| name.to_string_lossy().into_owned()).collect();
        assert!(left.iter().all(|name| !name.contains(".mean") && !name.contains(".partial")), "{left:?}");
        report
    }
}

/// The tensors of a directory.
fn tensors(directory: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            all.extend(tensors_of(&path));
        }
    }
    all
}

fn tensors_of(file: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let bytes = std::fs::read(file).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |(name, view): (String, safetensors::tensor::TensorView)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    read.tensors().into_iter().map(tensor).collect()
}

fn floats(tensor: &(Dtype, Vec<usize>, Vec<u8>)) -> Vec<f32> {
    let (dtype, _, bytes) = tensor;
    let halves = || bytes.as_chunks().0.iter();
    match dtype {
        Dtype::BF16 => halves().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::F16 => halves().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
        _ => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
    }
}

/// All routers, `[layers][experts * hidden_size]`.
fn routers(directory: &Path) -> Vec<Vec<f32>> {
    let tensors = tensors(directory);
    let routers = tensors.iter().filter(|(name, _)| name.ends_with("block_sparse_moe.gate.weight"));
    routers.map(|(_, tensor)| floats(tensor)).collect()
}

fn config(directory: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(directory.join("config.json")).unwrap()).unwrap()
}

fn logits(model: &std::sync::Arc<Model>) -> Vec<f32> {
    let mut session = session_with(model, KvDtype::F32);
    session.prefill(&Random::new(3).tokens(9, 97)).unwrap();
    session.logits().unwrap().to_vec()
}

fn recipe_of(head: &str, experts: &[&str], tail: &str) -> String {
    let experts: String = experts.iter().map(|expert| format!("[[experts]]\n{expert}\n")).collect();
    format!("{head}\n{experts}\n{tail}\n")
}

/// The router methods, with the texts an expert has for them.
const METHODS: [&str; 5] = ["uniform", "normal", "hidden", "embedding", "ridge"];

#[test]
fn means_and_experts_are_the_bits_of_an_independent_mixer() {
    for count in [3, 4] {
        let target = tempfile::tempdir().unwrap();
        let target = target.path().join("mixed");
        let golden = repository().join("tests/golden_mix");
        let experts: Vec<String> = (0..count).map(|index| format!("model = \"dense_{index}\"")).collect();
        let experts: Vec<&str> = experts.iter().map(String::as_str).collect();
        let recipe = Recipe::parse(&recipe_of("", &experts, ""), "recipe.toml", &golden).unwrap();
        mix::mix(&recipe, &target, &MixOptions::default(), &Progress::default()).unwrap();
        let (found, expected) = (tensors(&target), tensors_of(&golden.join(format!("expected_{count}.safetensors"))));
        assert_eq!(found.len(), expected.len() + 2);
        for (name, expected) in &expected {
            assert!(found[name] == *expected, "{name} differs");
        }
        assert_eq!(load(&target).config().num_local_experts, count);
    }
}

#[test]
fn identical_experts_are_the_dense_model_to_the_last_bit_whatever_the_router() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let models = Models::new();
        models.add("seed", &Directory { dtype, ..dense(1) });
        let expected = logits(&load(&models.path("seed")));
        for base in ["base = \"mean\"", "base = \"seed\""] {
            // Thirds and sevenths of a number do not add up to it in f32.
            for count in [2, 3, 7] {
                for method in METHODS {
                    let texts = if method == "ridge" || method == "hidden" || method == "embedding" {
                        |index: usize| {
                            format!("model = \"seed\"\nname = \"{index}\"\nprompts = [\"aab{}\"]", "ab".repeat(index))
                        }
                    } else {
                        |index: usize| format!("model = \"seed\"\nname = \"{index}\"")
                    };
                    let experts: Vec<String> = (0..count).map(texts).collect();
                    let experts: Vec<&str> = experts.iter().map(String::as_str).collect();
                    let recipe = recipe_of(base, &experts, &format!("[router]\nmethod = \"{method}\""));
                    let target = format!("{}_{count}_{method}", base.contains("mean"));
                    models.mix(&recipe, &target);
                    let model = load(&models.path(&target));
                    assert_eq!(model.config().num_experts_per_tok, 2);
                    assert_eq!(logits(&model), expected, "{dtype}, {recipe}");
                }
            }
        }
    }
}

#[test]
fn weights_are_shares_of_the_mean_and_experts_are_copied() {
    let models = Models::new();
    let sources: Vec<Directory> = (0..3).map(|seed| Directory { dtype: Dtype::F32, ..dense(seed) }).collect();
    for (index, source) in sources.iter().enumerate() {
        models.add(&index.to_string(), source);
    }
    let experts = ["model = \"0\"\nweight = 1", "model = \"1\"\nweight = 3.0", "model = \"2\"\nweight = 0"];
    models.mix(&recipe_of("", &experts, ""), "mixed");
    let found = tensors(&models.path("mixed"));
    for (name, tensor) in &found {
        let numbers = floats(tensor);
        if let Some((layer, rest)) = name.split_once("block_sparse_moe.experts.") {
            let (expert, weight) = rest.split_once('.').unwrap();
            let weight = match weight {
                "w1.weight" => "gate_proj",
                "w3.weight" => "up_proj",
                _ => "down_proj",
            };
            let source = &sources[expert.parse::<usize>().unwrap()];
            assert_eq!(numbers, source.tensors[&format!("{layer}mlp.{weight}.weight")].1, "{name}");
        } else if !name.contains("block_sparse_moe") {
            let sources = sources.iter().map(|source| &source.tensors[name].1);
            let [first, second, _]: [&Vec<f32>; 3] = sources.collect::<Vec<_>>().try_into().unwrap();
            let expected: Vec<f32> = first.iter().zip(second).map(|(x, y)| x / 4.0 + y / (4.0f32 / 3.0)).collect();
            assert_eq!(numbers, expected, "{name}");
        }
    }
    // With a single share the rest is that model's, to the bit.
    let experts = ["model = \"0\"\nweight = 0", "model = \"1\"\nweight = 0.1"];
    models.mix(&recipe_of("", &experts, ""), "alone");
    let alone = tensors(&models.path("alone"));
    assert_eq!(floats(&alone["model.embed_tokens.weight"]), sources[1].tensors["model.embed_tokens.weight"].1);
}

#[test]
fn the_base_gives_everything_but_experts_and_routers() {
    let models = Models::new();
    for seed in 0..3 {
        models.add(&seed.to_string(), &dense(seed));
    }
    models.mix(&recipe_of("base = \"2\"", &["model = \"0\"", "model = \"1\""], ""), "mixed");
    let (found, base) = (tensors(&models.path("mixed")), tensors(&models.path("2")));
    for (name, tensor) in found.iter().filter(|(name, _)| !name.contains("block_sparse_moe")) {
        assert!(*tensor == base[name], "{name}");
    }
    assert_eq!(found.len(), 2 + 2 * (6 + 1 + 2 * 3));
    let config = config(&models.path("mixed"));
    assert_eq!(config["architectures"], json!(["GemmoeForCausalLM"]));
    assert_eq!((&config["model_type"], &config["num_local_experts"]), (&json!("gemmoe"), &json!(2)));
    assert_eq!((&config["torch_dtype"], &config["router_aux_loss_coef"]), (&json!("bfloat16"), &json!(0.02)));
    assert_eq!(config["hidden_size"], json!(40));
}

#[test]
fn an_expert_may_be_one_of_a_gemmoe_in_any_layout() {
    for layout in [Layout::BlockSparseMoe, Layout::Fused] {
        let models = Models::new();
        let mixture = Directory::random_with(5, json!({"vocab_size": VOCAB_SIZE}));
        let stored = if layout == Layout::Fused { fused(&mixture) } else { mixture.clone() };
        models.add("mixture", &stored);
        models.add("dense", &dense(1));
        let experts =
            ["model = \"mixture\"\nexpert = 3", "model = \"dense\"", "model = \"mixture\"\nexpert = 0\nname = \"x\""];
        models.mix(&recipe_of("base = \"mixture\"", &experts, ""), "mixed");
        let found = tensors(&models.path("mixed"));
        for (own, source) in [(0, 3), (2, 0)] {
            for weight in ["w1", "w2", "w3"] {
                let name = |expert| format!("model.layers.1.block_sparse_moe.experts.{expert}.{weight}.weight");
                assert_eq!(found[&name(own)].2, mixture.tensor_bytes(&mixture.tensors[&name(source)].1));
            }
        }
        assert_eq!(load(&models.path("mixed")).config().num_local_experts, 3);
    }
}

/// The same model with fused experts.
fn fused(directory: &Directory) -> Directory {
    let mut fused = directory.clone();
    for layer in 0..2 {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let router = fused.tensors.remove(&name("block_sparse_moe.gate.weight")).unwrap();
        fused.tensors.insert(name("mlp.gate.weight"), router);
        let (mut gate_up, mut down) = (Vec::new(), Vec::new());
        for expert in 0..4 {
            let mut take = |weight: &str| {
                fused.tensors.remove(&name(&format!("block_sparse_moe.experts.{expert}.{weight}.weight"))).unwrap().1
            };
            gate_up.extend(take("w1"));
            gate_up.extend(take("w3"));
            down.extend(take("w2"));
        }
        fused.tensors.insert(name("mlp.experts.gate_up_proj"), (vec![4, 48, 40], gate_up));
        fused.tensors.insert(name("mlp.experts.down_proj"), (vec![4, 40, 24], down));
    }
    fused
}

#[test]
fn dtypes_are_kept_or_rounded_once_to_the_one_that_is_asked_for() {
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        let models = Models::new();
        for seed in 0..3 {
            models.add(&seed.to_string(), &Directory { dtype, ..dense(seed) });
        }
        let experts = ["model = \"0\"", "model = \"1\"", "model = \"2\""];
        models.mix(&recipe_of("", &experts, ""), "kept");
        let kept = tensors(&models.path("kept"));
        assert!(kept.values().all(|tensor| tensor.0 == dtype));
        for (key, asked) in [("bf16", Dtype::BF16), ("f16", Dtype::F16), ("f32", Dtype::F32)] {
            models.mix(&recipe_of(&format!("dtype = \"{key}\""), &experts, ""), key);
            let sources: Vec<_> = (0..3).map(|seed| tensors(&models.path(&seed.to_string()))).collect();
            for (name, tensor) in tensors(&models.path(key)) {
                assert_eq!(tensor.0, asked, "{name}");
                if name.contains("block_sparse_moe") {
                    continue;
                }
                let sources: Vec<Vec<f32>> = sources.iter().map(|source| floats(&source[&name])).collect();
                let mean = |at: usize| sources[0][at] / 3.0 + sources[1][at] / 3.0 + sources[2][at] / 3.0;
                let rounded = |x: f32| match asked {
                    Dtype::BF16 => bf16::from_f32(x).to_f32(),
                    Dtype::F16 => f16::from_f32(x).to_f32(),
                    _ => x,
                };
                let expected: Vec<f32> = (0..sources[0].len()).map(|at| rounded(mean(at))).collect();
                assert_eq!(floats(&tensor), expected, "{name}, {dtype} to {asked}");
            }
        }
    }
}

#[test]
fn models_of_several_dtypes_are_mixed_where_the_recipe_says_to_which() {
    let models = Models::new();
    models.add("half", &dense(1));
    models.add("single", &Directory { dtype: Dtype::F32, ..dense(2) });
    let experts = ["model = \"half\"", "model = \"single\""];
    models.mix(&recipe_of("dtype = \"bf16\"", &experts, ""), "mixed");
    assert!(tensors(&models.path("mixed")).values().all(|tensor| tensor.0 == Dtype::BF16));
    let error = models.try_mix(&recipe_of("", &experts, ""), "other").unwrap_err();
    assert_eq!((error.status(), error.key()), (gemmoe::Status::ModelsDiffer, Some("dtype")));
}

#[test]
fn shards_hold_the_same_tensors() {
    let models = Models::new();
    models.add("0", &dense(0));
    models.add("1", &dense(1));
    let experts = ["model = \"0\"", "model = \"1\""];
    models.mix(&recipe_of("", &experts, ""), "whole");
    models.mix(&recipe_of("shard_bytes = 9000", &experts, ""), "sharded");
    let index: Value =
        serde_json::from_slice(&std::fs::read(models.path("sharded").join("model.safetensors.index.json")).unwrap())
            .unwrap();
    let (whole, sharded) = (tensors(&models.path("whole")), tensors(&models.path("sharded")));
    assert_eq!(index["weight_map"].as_object().unwrap().len(), whole.len());
    assert!(whole == sharded);
    assert_eq!(load(&models.path("whole")).fingerprint(), load(&models.path("sharded")).fingerprint());
}

#[test]
fn quantised_output_is_the_mixture_quantised() {
    let models = Models::new();
    models.add("0", &dense(0));
    models.add("1", &dense(1));
    let experts = ["model = \"0\"", "model = \"1\""];
    models.mix(&recipe_of("", &experts, ""), "mixed");
    let options = QuantizeOptions::default();
    let expected =
        quantize(&models.path("mixed"), &models.path("expected"), &options, None, &Progress::default()).unwrap();
    let tail = "[quantize]\nexperts = \"int4\"\nattention = \"int8\"\nhead = \"int8\"";
    let report = models.mix(&recipe_of("", &experts, tail), "quantised");
    assert_eq!(report.rounded.unwrap().relative(), expected.rounded(|_| true).unwrap().relative());
    assert_eq!(report.plan.bytes_written, expected.bytes_after);
    for (name, bytes) in files(&models.path("expected")) {
        assert!(files(&models.path("quantised"))[&name] == bytes, "{name}");
    }
    // Where embedding and head are to differ, both are stored.
    let tail = "[quantize]\nembedding = \"int8\"\nhead = \"int4\"\ngroup_size = 64\nscales = \"f16\"";
    models.mix(&recipe_of("", &experts, tail), "apart");
    let model = load(&models.path("apart"));
    assert_ne!(model.formats().head, model.formats().embedding);
    assert_eq!(config(&models.path("apart"))["tie_word_embeddings"], json!(false));
}

fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).unwrap()))
        .collect()
}

#[test]
fn heads_of_their_own_are_averaged_too() {
    let models = Models::new();
    for seed in 0..2u64 {
        let mut directory = Directory { dtype: Dtype::F32, ..dense(seed) };
        directory.config["tie_word_embeddings"] = json!(false);
        let head = dense(seed + 50).tensors["model.embed_tokens.weight"].clone();
        directory.tensors.insert("lm_head.weight".into(), head);
        models.add(&seed.to_string(), &directory);
    }
    models.mix(&recipe_of("", &["model = \"0\"", "model = \"1\""], ""), "mixed");
    let head = |name: &str| floats(&tensors(&models.path(name))["lm_head.weight"]);
    let expected: Vec<f32> = head("0").iter().zip(head("1")).map(|(x, y)| x / 2.0 + y / 2.0).collect();
    assert_eq!(head("mixed"), expected);
}

#[test]
fn random_routers_are_those_of_the_seed() {
    let models = Models::new();
    models.add("0", &Directory { dtype: Dtype::F32, ..dense(0) });
    models.add("1", &Directory { dtype: Dtype::F32, ..dense(1) });
    let experts = ["model = \"0\"", "model = \"1\""];
    let router = |tail: &str, target: &str| {
        models.mix(&recipe_of("", &experts, tail), target);
        routers(&models.path(target))
    };
    let default = router("", "default");
    assert_eq!(default, router("[router]\nmethod = \"uniform\"\nseed = 0", "named"));
    assert_ne!(default, router("[router]\nseed = 1", "seeded"));
    assert_ne!(default[0], default[1]);
    let bound = 1.0 / 40f32.sqrt();
    assert!(default.iter().flatten().all(|x| x.abs() <= bound));
    assert!(default.iter().flatten().any(|x| x.abs() > 0.9 * bound));
    // SplitMix64's numbers, worked out apart from the library.
    let first = default[0][0] / bound;
    assert!((first - SPLITMIX_FIRST).abs() < 1e-6, "{first}");
    let normal = router("[router]\nmethod = \"normal\"\nseed = 3\nscale = 0.5", "normal");
    let numbers: Vec<f32> = normal.concat();
    let square = numbers.iter().map(|x| x * x).sum::<f32>() / numbers.len() as f32;
    assert!((square - 0.25).abs() < 0.08, "{square}");
    let doubled = router("[router]\nmethod = \"normal\"\nseed = 3\nscale = 1", "doubled").concat();
    assert!(numbers.iter().zip(&doubled).all(|(x, y)| (2.0 * x - y).abs() < 1e-6));
}

/// `2 u - 1` for the first number u of seed 0.
const SPLITMIX_FIRST: f32 = -0.436_477_4;

/// The golden models with a tokenizer beside them.
fn golden_models() -> Models {
    let models = Models::new();
    for index in 0..4 {
        let (name, target) = (format!("dense_{index}"), models.path(&format!("dense_{index}")));
        std::fs::create_dir(&target).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(repository().join("tests/golden_mix").join(&name).join(file), target.join(file)).unwrap();
        }
        std::fs::write(target.join("tokenizer.json"), sample().to_string()).unwrap();
    }
    models
}

#[test]
fn routers_made_from_texts_are_those_of_the_reference() {
    let models = golden_models();
    let expected: Value =
        serde_json::from_slice(&std::fs::read(repository().join("tests/golden_mix/routers.json")).unwrap()).unwrap();
    let experts: Vec<String> = (0..4)
        .map(|index| {
            let list = |key: &str| expected[key][index].to_string();
            format!(
                "model = \"dense_{index}\"\nprompts = {}\nnegative_prompts = {}",
                list("prompts"),
                list("negative_prompts")
            )
        })
        .collect();
    let experts: Vec<&str> = experts.iter().map(String::as_str).collect();
    for (name, layers) in expected["routers"].as_object().unwrap() {
        let (base, method) = name.split_once(' ').unwrap();
        let lambda = if method == "ridge" { format!("\nlambda = {}", expected["lambda"]) } else { String::new() };
        let tail = format!("[router]\nmethod = \"{method}\"\n{lambda}");
        models.mix(&recipe_of(&format!("base = \"{base}\""), &experts, &tail), name);
        for (layer, (found, expected)) in routers(&models.path(name)).iter().zip(layers.as_array().unwrap()).enumerate()
        {
            let expected: Vec<f64> = expected.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
            let largest = expected.iter().fold(0f64, |largest, x| largest.max(x.abs()));
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                let error = (*found as f64 - expected).abs() / largest;
                assert!(error < 3e-5, "{name}, layer {layer}: {found}, expected {expected}");
            }
        }
        // A scale is a factor.
        models.mix(
            &recipe_of(&format!("base = \"{base}\""), &experts, &format!("{tail}\nscale = 4")),
            &format!("{name} 4"),
        );
        let (plain, scaled) =
            (routers(&models.path(name)).concat(), routers(&models.path(&format!("{name} 4"))).concat());
        assert!(plain.iter().zip(&scaled).all(|(x, y)| (4.0 * x - y).abs() <= 1e-6 * y.abs()));
    }
    // And the mixture computes what the reference says.
    let model = load(&models.path("mean hidden"));
    let mut session = session_with(&model, KvDtype::F32);
    let tokens: Vec<u32> = serde_json::from_value(expected["tokens"].clone()).unwrap();
    session.prefill(&tokens).unwrap();
    let logits: Vec<f64> = serde_json::from_value(expected["logits"].clone()).unwrap();
    let largest = logits.iter().fold(0f64, |largest, x| largest.max(x.abs()));
    for (found, expected) in session.logits().unwrap().iter().zip(&logits) {
        assert!((*found as f64 - expected).abs() / largest < 2e-5, "{found}, expected {expected}");
    }
}

#[test]
fn texts_of_files_are_cut_into_windows_and_count_like_prompts() {
    let models = golden_models();
    let text: String =
        Random::new(9).tokens(1300, 26).iter().map(|letter| (b'a' + *letter as u8 % 4) as char).collect();
    std::fs::write(models.path("text.txt"), &text).unwrap();
    // 64 positions, of which BOS is one.
    let windows: Vec<String> =
        text.as_bytes().chunks(63).map(|window| format!("{:?}", String::from_utf8_lossy(window))).collect();
    for method in ["hidden", "ridge", "embedding"] {
        let other = "model = \"dense_1\"\nprompts = \"123\"";
        let tail = format!("[router]\nmethod = \"{method}\"");
        models.mix(
            &recipe_of("", &["model = \"dense_0\"\ntexts = [\"text.txt\"]", other], &tail),
            &format!("{method} file"),
        );
        let prompts = format!("model = \"dense_0\"\nprompts = [{}]", windows.join(", "));
        models.mix(&recipe_of("", &[&prompts, other], &tail), &format!("{method} prompts"));
        let [file, prompts] = ["file", "prompts"].map(|kind| routers(&models.path(&format!("{method} {kind}"))));
        assert_eq!(file, prompts);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let models = golden_models();
    let recipe = recipe_of(
        "",
        &["model = \"dense_0\"\nprompts = \"abc\"", "model = \"dense_1\"\nprompts = \"123\""],
        "[router]\nmethod = \"ridge\"\n[quantize]\nexperts = \"int4\"",
    );
    let recipe = Recipe::parse(&recipe, "recipe.toml", models.0.path()).unwrap();
    let made = [1, 3].map(|threads| {
        let target = models.path(&threads.to_string());
        mix::mix(&recipe, &target, &MixOptions { threads, ..Default::default() }, &Progress::default()).unwrap();
        files(&target)
    });
    assert!(made[0] == made[1]);
}

#[test]
fn files_beside_the_weights_are_those_of_the_models_that_have_them() {
    let models = Models::new();
    models.add("0", &dense(0));
    models.add("1", &dense(1));
    std::fs::remove_file(models.path("0").join("tokenizer.json")).unwrap();
    std::fs::write(models.path("0").join("README.md"), "a card").unwrap();
    std::fs::write(models.path("0").join("LICENSE"), "terms").unwrap();
    std::fs::write(models.path("1").join("chat_template.jinja"), "{{ bos_token }}").unwrap();
    models.mix(&recipe_of("", &["model = \"0\"", "model = \"1\""], ""), "mixed");
    let files = files(&models.path("mixed"));
    let names: Vec<&str> = files.keys().map(String::as_str).collect();
    assert_eq!(names, ["LICENSE", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(files["chat_template.jinja"], b"{{ bos_token }}");
}
