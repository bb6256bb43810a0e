//! Directories that say they are quantised: by another version, in part, or otherwise than their tensors are.

use std::path::Path;
use std::sync::OnceLock;

use gemmoe::quant::Format;
use gemmoe::{Formats, Progress, QuantizeOptions, Status, quantize};
use serde_json::{Value, json};

use crate::case::{CONFIG, Case, WEIGHTS, case, config, good, weights, write_good};
use crate::common::Random;
use crate::file::{Stored, WeightFile};

const MATRIX: &str = "model.layers.1.block_sparse_moe.experts.2.w1.weight";
const SCALES: &str = "model.layers.1.block_sparse_moe.experts.2.w1.weight_scale";
const QUERY: &str = "model.layers.1.self_attn.q_proj.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The good model with experts in int4 and attention and head in int8: config.json and tensors.
fn quantised() -> &'static (Value, Vec<u8>) {
    static FILES: OnceLock<(Value, Vec<u8>)> = OnceLock::new();
    FILES.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("source"), directory.path().join("target"));
        std::fs::create_dir(&source).unwrap();
        write_good(&source);
        let int8 = Some(Format::INT8);
        let formats = Formats { experts: Some(Format::INT4), attention: int8, head: int8, embedding: None };
        let options = QuantizeOptions { formats, ..Default::default() };
        quantize(&source, &target, &options, None, &Progress::default()).unwrap();
        let config = serde_json::from_slice(&std::fs::read(target.join(CONFIG)).unwrap()).unwrap();
        (config, std::fs::read(target.join(WEIGHTS)).unwrap())
    })
}

/// Writes the quantised model, changed.
fn changed(config: impl Fn(&mut Value) + Send, weights: impl Fn(&mut WeightFile) + Send) -> impl Fn(&Path) + Send {
    move |path| {
        let (good_config, file) = quantised();
        let mut new_config = good_config.clone();
        config(&mut new_config);
        let mut file = WeightFile::from_bytes(file);
        weights(&mut file);
        std::fs::write(path.join(CONFIG), new_config.to_string()).unwrap();
        std::fs::write(path.join(WEIGHTS), file.to_bytes()).unwrap();
    }
}

fn with_config(pointer: &'static str, value: Value) -> impl Fn(&Path) + Send {
    changed(
        move |config| match (config.pointer_mut(&format!("/quantization_config{pointer}")), &value) {
            (Some(found), value) => *found = value.clone(),
            (None, value) => config["quantization_config"][pointer.trim_start_matches('/')] = value.clone(),
        },
        |_| (),
    )
}

fn with_weights(change: impl Fn(&mut WeightFile) + Send) -> impl Fn(&Path) + Send {
    changed(|_| (), change)
}

pub fn cases() -> Vec<Case> {
    let mut cases = configs();
    cases.extend(tensors());
    cases.extend(contradictions());
    cases
}

fn configs() -> Vec<Case> {
    let mut cases = Vec::new();
    let key = |rest: &str| format!("quantization_config{}{rest}", if rest.is_empty() { "" } else { "." });
    for (what, value) in [
        ("is a list", json!([])),
        ("is a word", json!("gemmoe")),
        ("is another library's", json!({"quant_method": "gptq", "bits": 4})),
        ("has no method", json!({"version": 1})),
        ("has a number for its method", json!({"quant_method": 1, "version": 1})),
    ] {
        let break_it = with_config("", value);
        let case = case(format!("quantization_config {what}"), break_it, Status::UnsupportedModel);
        cases.push(case.key(&key("")).says(&["this library runs", "\"gemmoe\""]));
    }
    for version in [json!(0), json!(2), json!(1.5), json!("1"), json!(null), json!(u64::MAX)] {
        let case = case(
            format!("the format's version is {version}"),
            with_config("/version", version.clone()),
            Status::UnsupportedModel,
        );
        cases.push(case.key(&key("version")).says(&["version 1", &version.to_string()]));
    }
    let rows: Vec<(&'static str, &str, Vec<Value>)> = vec![
        ("/source_dtype", "source_dtype", vec![json!("int8"), json!("BF16"), json!(1), json!(null), json!(["bf16"])]),
        ("/router", "router", vec![json!({"format": "int8", "group_size": 32, "scales": "bf16"}), json!(1)]),
        (
            "/experts",
            "experts",
            vec![
                json!("int4"),
                json!(4),
                json!([]),
                json!({}),
                json!({"format": "int4", "group_size": 32}),
                json!(null),
            ],
        ),
        ("/experts/format", "experts", vec![json!("int3"), json!("bf16"), json!(4), json!(null)]),
        ("/experts/group_size", "experts", vec![json!(0), json!(16), json!(33), json!(256), json!(-32), json!("32")]),
        ("/attention/scales", "attention", vec![json!("f32"), json!(null), json!(16)]),
    ];
    for (pointer, rest, values) in rows {
        for value in values {
            let name = format!("quantization_config{pointer} is {value}");
            let case = case(name, with_config(pointer, value), Status::ConfigValue);
            cases.push(case.key(&key(rest)).says(&["expected"]));
        }
    }
    let more = with_config("/experts", json!({"format": "int4", "group_size": 32, "scales": "bf16", "zeros": 1}));
    cases.push(case("experts have a key too many", more, Status::ConfigValue).key(&key("experts")));
    let nothing = json!({"quant_method": "gemmoe", "version": 1, "source_dtype": "bf16"});
    cases.push(case("nothing is quantised", with_config("", nothing), Status::ConfigValue).key(&key("")));
    let twice = |path: &Path| {
        let text = quantised().0.to_string().replacen("\"version\":1", "\"version\":2,\"version\":1", 1);
        with_weights(|_| ())(path);
        std::fs::write(path.join(CONFIG), text).unwrap();
    };
    cases.push(case("the version is named twice", twice, Status::ConfigSyntax).says(&["\"version\"", "twice"]));
    cases.into_iter().map(|case| case.file(CONFIG)).collect()
}

fn tensors() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, shape) in
        [(MATRIX, [2u64, 8, 64]), (SCALES, [2, 2, 16]), (EMBEDDING, [20, 16, 64]), (QUERY, [2, 16, 64])]
    {
        let expected = format!("expected {shape:?}");
        let missing = with_weights(move |file| drop(file.remove(name)));
        cases.push(
            case(format!("{name} is missing"), missing, Status::TensorMissing).key(name).says(&["missing", &expected]),
        );
        for (what, other) in [
            ("a panel short", vec![shape[0] - 1, shape[1], shape[2]]),
            ("a line too long", vec![shape[0], shape[1] + 1, shape[2]]),
            ("flat", vec![shape.iter().product()]),
            ("turned around", vec![shape[2], shape[1], shape[0]]),
            ("empty", vec![0, shape[1], shape[2]]),
        ] {
            let found = format!("is {other:?}");
            let change = with_weights(move |file| {
                let stored = file.get(name);
                let size = if stored.dtype == "U8" { 1 } else { 2 };
                stored.data.resize(size * other.iter().product::<u64>() as usize, 0);
                stored.shape.clone_from(&other);
            });
            let case = case(format!("quantised {name} is {what}"), change, Status::TensorShape);
            cases.push(case.key(name).says(&[name, &found, &expected]));
        }
    }
    for (name, dtype, bytes, expected) in [
        (MATRIX, "I8", 1, "expected U8"),
        (MATRIX, "BF16", 2, "expected U8"),
        (SCALES, "F16", 2, "expected BF16"),
        (SCALES, "F32", 4, "expected BF16"),
        (SCALES, "U8", 1, "expected BF16"),
    ] {
        let change = with_weights(move |file| {
            let stored = file.get(name);
            stored.data.resize(bytes * stored.shape.iter().product::<u64>() as usize, 0);
            stored.dtype = dtype.to_owned();
        });
        let case = case(format!("quantised {name} is {dtype}"), change, Status::TensorDtype);
        cases.push(case.key(name).says(&[&format!("is {dtype}"), expected, "int4"]));
    }
    for name in ["model.norm.weight_scale", "model.layers.0.block_sparse_moe.gate.weight_scale", "lm_head.weight_scale"]
    {
        let extra = with_weights(move |file| file.add(name, &[1, 1, 16]));
        cases.push(case(format!("{name} is there"), extra, Status::TensorUnexpected).key(name).says(&["has no place"]));
    }
    cases.into_iter().map(|case| case.file(WEIGHTS)).collect()
}

/// config.json and tensors that are fine by themselves.
fn contradictions() -> Vec<Case> {
    let part = |format: &str| json!({"format": format, "group_size": 32, "scales": "bf16"});
    let whole = json!({"quant_method": "gemmoe", "version": 1, "source_dtype": "bf16", "attention": part("int8")});
    let key = "quantization_config.experts";
    vec![
        case(
            "the tensors are bf16, the config says int8",
            config(json!({"quantization_config": whole})),
            Status::TensorDtype,
        )
        .file(WEIGHTS)
        .key("model.layers.0.self_attn.q_proj.weight")
        .says(&["is BF16", "expected U8", "int8 (groups of 32, bf16 scales)"]),
        case("the experts are int4, the config says int8", with_config("/experts", part("int8")), Status::TensorShape)
            .file(WEIGHTS)
            .key("model.layers.0.block_sparse_moe.experts.0.w1.weight")
            .says(&["is [2, 8, 64]", "expected [2, 16, 64]"]),
        case(
            "the experts are quantised, the config does not say so",
            changed(|config| drop(config["quantization_config"].as_object_mut().unwrap().remove("experts")), |_| ()),
            Status::TensorShape,
        )
        .file(WEIGHTS)
        .says(&["is [2, 8, 64]", "expected [24, 40]"]),
        case(
            "nothing is said of quantisation",
            changed(|config| drop(config.as_object_mut().unwrap().remove("quantization_config")), |_| ()),
            Status::TensorShape,
        )
        .file(WEIGHTS)
        .key(EMBEDDING),
        case(
            "scales beside tensors that are not quantised",
            weights(|file| file.add(SCALES, &[2, 2, 16])),
            Status::TensorUnexpected,
        )
        .file(WEIGHTS)
        .key(SCALES)
        .says(&["has no place"]),
        case(
            "the head is the embedding and has another format",
            with_config("/head", part("int4")),
            Status::ConfigValue,
        )
        .file(CONFIG)
        .key("quantization_config.head")
        .says(&["embedding"]),
        case(
            "fused experts are said to be quantised",
            |path: &Path| {
                config(json!({"quantization_config": {"quant_method": "gemmoe", "version": 1, "source_dtype": "bf16",
                    "experts": {"format": "int4", "group_size": 32, "scales": "bf16"}}}))(path);
                weights(|file| file.fuse(&[4, 48, 40], &[4, 40, 24]))(path);
            },
            Status::ConfigValue,
        )
        .file(CONFIG)
        .key(key)
        .says(&["fused"]),
    ]
}

/// Any bytes are numbers: whole ones, and scales that are NaN, infinite or negative.
#[test]
fn any_bytes_in_quantised_tensors_are_a_model_that_runs() {
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::new(31);
    for round in 0..40 {
        let fill = move |stored: &mut Stored, random: &mut Random| match round % 4 {
            0 => stored.data.fill(0xff),
            1 => stored.data.iter_mut().for_each(|byte| *byte = random.bits() as u8),
            2 if stored.name.ends_with("_scale") => stored.data.chunks_exact_mut(2).for_each(|scale| {
                let special = [0x7f80u16, 0xff80, 0x7fc0, 0xffff, 0x0001, 0x8000, 0x7f7f][random.below(7)];
                scale.copy_from_slice(&special.to_le_bytes());
            }),
            _ => {
                let at = random.below(stored.data.len());
                stored.data[at] ^= 1 << random.below(8);
            }
        };
        let (config, file) = quantised();
        let mut file = WeightFile::from_bytes(file);
        let quantised = |stored: &&mut Stored| stored.dtype == "U8" || stored.name.ends_with("_scale");
        file.tensors.iter_mut().filter(quantised).for_each(|stored| fill(stored, &mut random));
        std::fs::write(directory.path().join(CONFIG), config.to_string()).unwrap();
        std::fs::write(directory.path().join(WEIGHTS), file.to_bytes()).unwrap();
        let model = crate::load(directory.path(), false).unwrap();
        if let Err(error) = crate::generate(&model, 2) {
            assert_eq!(error.status(), Status::NotANumber, "{error}");
        }
    }
}

#[test]
fn a_quantised_weight_file_cut_or_with_a_bit_turned_over_is_refused_or_runs() {
    let directory = tempfile::tempdir().unwrap();
    let (config, whole) = quantised();
    std::fs::write(directory.path().join(CONFIG), config.to_string()).unwrap();
    let path = directory.path().join(WEIGHTS);
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut random = Random::new(32);
    for _ in 0..100 {
        std::fs::write(&path, &whole[..random.below(whole.len())]).unwrap();
        let error = crate::load(directory.path(), false).err().unwrap();
        assert_eq!((error.status(), error.file()), (Status::FileLength, Some(WEIGHTS)), "{error}");
        let mut damaged = whole.clone();
        let at = random.below(8 * header);
        damaged[at / 8] ^= 1 << (at % 8);
        std::fs::write(&path, damaged).unwrap();
        match crate::load(directory.path(), false) {
            Err(error) => assert_ne!(error.status(), Status::Internal, "{error}"),
            Ok(model) => drop(crate::generate(&model, 1)),
        }
    }
    assert!(good().tensors.contains_key(MATRIX));
}
