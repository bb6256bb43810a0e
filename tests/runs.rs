//! Whole training runs through the library: going on from a checkpoint, and a result that differs in its gates alone.

mod common;
#[path = "common/training.rs"]
mod training;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{Directory, load};
use gemmoe::quant::Format;
use gemmoe::train::{Advance, Begin, RecordedRun, Run, TrainRecipe};
use gemmoe::{Formats, Model, Progress, QuantizeOptions, Status, quantize};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use training::{add_model, recipe, tokenizer, work_directory};

fn parsed(directory: &Path, objective: &str, train: &str, output: &str) -> TrainRecipe {
    TrainRecipe::parse(&recipe(objective, train, output), "recipe.toml", directory).unwrap()
}

fn run(model: &Arc<Model>, recipe: &TrainRecipe) -> Run {
    Run::new(Arc::clone(model), recipe, &Progress::default()).unwrap()
}

#[test]
fn a_run_that_goes_on_from_a_checkpoint_gives_the_bits_of_one_that_never_stopped() {
    let directory = work_directory(1, json!({}));
    let model = load(&directory.path().join("model"));
    for objective in ["sft", "dpo"] {
        let recipe = parsed(directory.path(), objective, "epochs = 2\nnoise = 0.1", "");
        let mut whole = run(&model, &recipe);
        // 22 rows in steps of 3.
        assert_eq!(whole.total_steps(), 8);
        let path = directory.path().join("checkpoint");
        for step in 0..8 {
            let mut resumed = run(&model, &recipe);
            if step > 0 {
                resumed.resume(&path).unwrap();
            }
            assert_eq!(resumed.steps(), step);
            if step % 4 == 0 {
                assert_eq!(resumed.evaluate().unwrap(), whole.evaluate().unwrap());
            }
            let metrics = whole.step().unwrap();
            assert!(metrics.is_some());
            assert_eq!(resumed.step().unwrap(), metrics, "{objective}: step {step}");
            resumed.save(&path).unwrap();
            assert_eq!(resumed.trainer().state().unwrap(), whole.trainer().state().unwrap());
        }
        assert_eq!(whole.step().unwrap(), None);
        let gates = 4 * 2 * 4 * 40 * 4;
        let bytes = std::fs::metadata(&path).unwrap().len();
        assert!((gates..gates + 4096).contains(&bytes), "{bytes}");
        assert!(bytes <= whole.plan().unwrap().checkpoint_bytes + 4096);
    }
}

#[test]
fn a_second_stage_begins_with_the_gates_of_the_first_and_is_compared_with_them() {
    let directory = work_directory(2, json!({}));
    let model = load(&directory.path().join("model"));
    let first = parsed(directory.path(), "sft", "epochs = 1", "");
    let mut sft = run(&model, &first);
    while sft.step().unwrap().is_some() {}
    let patch = directory.path().join("sft.safetensors");
    sft.patch().unwrap().write(&patch).unwrap();
    let stage = |keys: &str| {
        let text = format!("router = \"sft.safetensors\"\n{}{keys}", recipe("dpo", "steps = 2", ""));
        run(&model, &TrainRecipe::parse(&text, "recipe.toml", directory.path()).unwrap())
    };
    let mut dpo = stage("");
    assert_eq!(dpo.trainer().gates(), sft.trainer().gates());
    // Its own reference: nothing is preferred yet.
    let before = dpo.evaluate().unwrap().unwrap();
    assert!((before.text_loss - 2f64.ln()).abs() < 1e-12 && before.margin() == 0.0);
    dpo.step().unwrap();
    assert_ne!(dpo.trainer().gates(), sft.trainer().gates());
    let mut against_model = stage("[dpo]\nreference = \"model\"\n");
    assert_eq!(against_model.trainer().gates(), sft.trainer().gates());
    assert_ne!(against_model.evaluate().unwrap().unwrap().margin(), 0.0);
    // The model is as it was.
    assert_eq!(model.stored_gates().unwrap(), load(&directory.path().join("model")).stored_gates().unwrap());
}

/// A recorded run to its end, with its result.
fn train(model: &Path, recipe: &TrainRecipe) -> Vec<f32> {
    let model = load(model);
    let mut run = RecordedRun::open(run(&model, recipe), Begin::Restart).unwrap();
    while run.advance().unwrap() != Advance::Finished {}
    run.write_result(&Progress::default()).unwrap();
    run.run().trainer().gates().to_vec()
}

/// Dtype, shape and bytes of all tensors of a directory.
fn tensors(directory: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = std::fs::read(path).unwrap();
            for (name, tensor) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
                all.insert(name, (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec()));
            }
        }
    }
    all
}

/// The other files.
fn files(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap());
    entries
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| (entry.file_name().into_string().unwrap(), entry.path()))
        .filter(|(name, _)| !name.contains(".safetensors"))
        .map(|(name, path)| (name, std::fs::read(path).unwrap()))
        .collect()
}

fn narrowed(numbers: &[f32], dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::BF16 => numbers.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        Dtype::F16 => numbers.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

/// The same model with fused experts.
fn fused(directory: &Directory) -> Directory {
    let mut fused = directory.clone();
    for layer in 0..2 {
        let name = |rest: &str| format!("model.layers.{layer}.{rest}");
        let router = fused.tensors.remove(&name("block_sparse_moe.gate.weight")).unwrap();
        fused.tensors.insert(name("mlp.gate.weight"), router);
        let mut take = |expert: usize, weight: &str| {
            let name = name(&format!("block_sparse_moe.experts.{expert}.{weight}.weight"));
            fused.tensors.remove(&name).unwrap().1
        };
        let gate_up: Vec<f32> = (0..4).flat_map(|expert| [take(expert, "w1"), take(expert, "w3")].concat()).collect();
        let down: Vec<f32> = (0..4).flat_map(|expert| take(expert, "w2")).collect();
        fused.tensors.insert(name("mlp.experts.gate_up_proj"), (vec![4, 48, 40], gate_up));
        fused.tensors.insert(name("mlp.experts.down_proj"), (vec![4, 40, 24], down));
    }
    fused
}

/// Writes the weights in two files with an index.
fn shard(path: &Path, model: &Directory) {
    let in_first = |name: &str| name.contains("layers.0");
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    std::fs::write(path.join(shards[0]), model.safetensors(in_first)).unwrap();
    std::fs::write(path.join(shards[1]), model.safetensors(|name| !in_first(name))).unwrap();
    let map: serde_json::Map<String, Value> =
        model.tensors.keys().map(|name| (name.clone(), json!(shards[usize::from(!in_first(name))]))).collect();
    std::fs::write(path.join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
}

#[test]
fn only_gates_change_in_every_layout_dtype_and_format() {
    let directory = work_directory(3, json!({}));
    let path = |name: &str| directory.path().join(name);
    let plain = Directory::random_with(4, json!({"vocab_size": tokenizer::VOCAB_SIZE}));
    let mut cases: Vec<String> = Vec::new();
    let mut add = |name: &str, model: &Directory| {
        add_model(&path(name), model);
        cases.push(name.to_owned());
    };
    for (name, dtype) in [("bf16", Dtype::BF16), ("f16", Dtype::F16), ("f32", Dtype::F32)] {
        add(name, &Directory { dtype, ..plain.clone() });
        add(&format!("fused {name}"), &Directory { dtype, ..fused(&plain) });
    }
    let mut dead = plain.clone();
    // Of more than one piece of those that are copied at once.
    let numbers = (0..600_000).map(|index| (index % 251) as f32).collect();
    dead.tensors.insert("model.layers.0.mlp.gate_proj.weight".into(), (vec![3000, 200], numbers));
    dead.tensors.insert("lm_head.weight".into(), dead.tensors["model.embed_tokens.weight"].clone());
    add("own head and dead weights", &dead);
    for (name, model) in [("sharded", plain.clone()), ("sharded and fused", fused(&plain))] {
        add(name, &model);
        shard(&path(name), &model);
    }
    for (name, formats) in [
        ("int4 and int8", QuantizeOptions::default().formats),
        ("int8 experts", Formats { experts: Some(Format::INT8), ..Formats::default() }),
    ] {
        let options = QuantizeOptions { formats, ..Default::default() };
        quantize(&path("bf16"), &path(name), &options, None, &Progress::default()).unwrap();
        cases.push(name.to_owned());
    }
    for name in &cases {
        let source = path(name);
        std::fs::write(source.join("README.md"), format!("# {name}\n")).unwrap();
        std::fs::write(source.join("anything else.dat"), [0, 1, 2, 255]).unwrap();
        std::fs::write(source.join("pytorch_model.bin"), "of the old routers").unwrap();
        std::fs::create_dir(source.join("folder")).unwrap();
        let text = recipe("sft", "steps = 2\nlearning_rate = 0.3", "kind = \"model\"\nevaluate_every = 0")
            .replace("learning_rate = 0.01\n", "")
            .replace("model = \"model\"", &format!("model = {name:?}"))
            .replace("evaluate_every = 0", "")
            .replace("\"out\"", &format!("\"out {name}\""));
        let recipe = TrainRecipe::parse(&text, "recipe.toml", directory.path()).unwrap();
        let gates = train(&source, &recipe);
        let target = path(&format!("out {name}"));
        let (old, new) = (tensors(&source), tensors(&target));
        assert!(old.keys().eq(new.keys()), "{name}");
        let mut changed = 0;
        for (tensor, old) in &old {
            let is_gate = tensor.ends_with("block_sparse_moe.gate.weight") || tensor.ends_with("mlp.gate.weight");
            let new = &new[tensor];
            if !is_gate {
                assert!(old == new, "{name}: {tensor} has changed");
                continue;
            }
            let layer = usize::from(tensor.contains("layers.1"));
            let expected = narrowed(&gates[layer * 160..(layer + 1) * 160], old.0);
            assert!((old.0, &old.1, &expected) == (new.0, &new.1, &new.2), "{name}: {tensor}");
            assert!(old.2 != new.2);
            changed += 1;
        }
        assert_eq!(changed, 2);
        let mut expected = files(&source);
        expected.remove("pytorch_model.bin");
        assert!(files(&target) == expected, "{name}");
        assert!(!target.join("folder").exists());
        let weight_files = |directory: &Path| {
            let names = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name());
            names.filter(|name| name.to_string_lossy().ends_with(".safetensors")).count()
        };
        assert_eq!(weight_files(&source), weight_files(&target), "{name}");
        load(&target);
    }
}

#[test]
fn a_model_that_has_changed_since_it_was_loaded_is_not_written() {
    let directory = work_directory(5, json!({}));
    let path = directory.path().join("model");
    let recipe = parsed(directory.path(), "sft", "steps = 1", "kind = \"model\"");
    let model = load(&path);
    let mut run = RecordedRun::open(run(&model, &recipe), Begin::New).unwrap();
    while run.advance().unwrap() != Advance::Finished {}
    add_model(&path, &Directory::random_with(6, json!({"vocab_size": tokenizer::VOCAB_SIZE})));
    let error = run.write_result(&Progress::default()).unwrap_err();
    assert_eq!(error.status(), Status::PatchModel);
    assert!(error.to_string().contains("is not the model any more"), "{error}");
    assert!(!directory.path().join("out").exists());
}

/// A file that is written over in place would be neither the old nor the new one for a while.
#[cfg(unix)]
#[test]
fn an_old_checkpoint_is_whole_while_a_new_one_takes_its_place() {
    use std::io::Read;

    let directory = work_directory(7, json!({}));
    let model = load(&directory.path().join("model"));
    let mut run = run(&model, &parsed(directory.path(), "sft", "steps = 2", ""));
    let path = directory.path().join("checkpoint");
    run.save(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    let mut old = std::fs::File::open(&path).unwrap();
    run.step().unwrap();
    run.save(&path).unwrap();
    let mut read = Vec::new();
    old.read_to_end(&mut read).unwrap();
    assert!(read == before && std::fs::read(&path).unwrap() != before);
}
