//! Tensors that are absent, too many, of another shape or of another kind.

use gemmoe::Status;
use serde_json::json;

use crate::case::{Case, WEIGHTS, case, config, weights};

const HEAD: &str = "lm_head.weight";
const GATE_UP: &str = "model.layers.0.mlp.experts.gate_up_proj";
const DOWN: &str = "model.layers.0.mlp.experts.down_proj";
const FUSED: (&[u64], &[u64]) = (&[4, 48, 40], &[4, 40, 24]);

/// One of each kind, with its shape.
const KINDS: [(&str, &[u64]); 13] = [
    ("model.embed_tokens.weight", &[320, 40]),
    ("model.norm.weight", &[40]),
    ("model.layers.1.input_layernorm.weight", &[40]),
    ("model.layers.1.post_attention_layernorm.weight", &[40]),
    ("model.layers.1.self_attn.q_proj.weight", &[32, 40]),
    ("model.layers.1.self_attn.k_proj.weight", &[16, 40]),
    ("model.layers.1.self_attn.v_proj.weight", &[16, 40]),
    ("model.layers.1.self_attn.o_proj.weight", &[40, 32]),
    ("model.layers.1.block_sparse_moe.gate.weight", &[4, 40]),
    ("model.layers.1.block_sparse_moe.experts.2.w1.weight", &[24, 40]),
    ("model.layers.1.block_sparse_moe.experts.2.w3.weight", &[24, 40]),
    ("model.layers.1.block_sparse_moe.experts.2.w2.weight", &[40, 24]),
    ("model.layers.0.block_sparse_moe.experts.0.w2.weight", &[40, 24]),
];

pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, shape) in KINDS {
        cases.extend(one_kind(name, shape));
    }
    cases.extend(dtypes());
    cases.extend(extras());
    cases.extend(layouts());
    cases.extend(heads());
    cases.into_iter().map(|case| case.file(WEIGHTS)).collect()
}

/// A tensor missing, and in other shapes of as many elements or fewer.
fn one_kind(name: &'static str, shape: &'static [u64]) -> Vec<Case> {
    let expected = format!("expected {shape:?}");
    let mut shapes = vec![
        ("turned around", shape.iter().rev().copied().collect::<Vec<u64>>()),
        ("flat", vec![shape.iter().product()]),
        ("inside one dimension more", [&[1], shape].concat()),
        ("short of its first row", [&[shape[0] - 1], &shape[1..]].concat()),
        ("one number", vec![]),
        ("empty", [&[0], &shape[1..]].concat()),
    ];
    shapes.retain(|(_, other)| other != shape);
    let mut cases = vec![
        case(format!("{name} is missing"), weights(move |file| drop(file.remove(name))), Status::TensorMissing)
            .key(name)
            .says(&[name, "missing", &expected]),
    ];
    for (what, other) in shapes {
        let found = format!("is {other:?}");
        let change = weights(move |file| {
            let stored = file.get(name);
            stored.data.resize(2 * other.iter().product::<u64>() as usize, 0);
            stored.shape.clone_from(&other);
        });
        let case = case(format!("{name} is {what}"), change, Status::TensorShape);
        cases.push(case.key(name).says(&[name, &found, &expected]));
    }
    cases
}

/// Element types the format knows and this library does not compute with.
fn dtypes() -> Vec<Case> {
    let mut cases = Vec::new();
    let dtypes = [("I64", 64), ("I32", 32), ("I16", 16), ("I8", 8), ("U8", 8), ("BOOL", 8), ("F64", 64)];
    for (dtype, bits) in dtypes.into_iter().chain([("U16", 16), ("F8_E4M3", 8), ("F8_E5M2", 8), ("U64", 64)]) {
        for name in [KINDS[0].0, KINDS[2].0, KINDS[9].0] {
            let change = weights(move |file| {
                let stored = file.get(name);
                stored.data.resize(stored.shape.iter().product::<u64>() as usize * bits / 8, 0);
                stored.dtype = dtype.to_owned();
            });
            let case = case(format!("{name} is {dtype}"), change, Status::TensorDtype);
            cases.push(case.key(name).says(&[name, &format!("is {dtype}"), "expected BF16, F16 or F32"]));
        }
    }
    cases
}

/// Tensors that would change the model and have no place in it.
fn extras() -> Vec<Case> {
    let rows = [
        ("model.layers.0.block_sparse_moe.experts.4.w1.weight", "num_local_experts is 4"),
        ("model.layers.1.block_sparse_moe.experts.18446744073709551616.w1.weight", "num_local_experts is 4"),
        ("model.layers.1.block_sparse_moe.experts.-1.w1.weight", "num_local_experts is 4"),
        ("model.layers.1.block_sparse_moe.experts.x.w1.weight", "num_local_experts is 4"),
        ("model.layers.2.input_layernorm.weight", "num_hidden_layers is 2"),
        ("model.layers.18446744073709551616.input_layernorm.weight", "num_hidden_layers is 2"),
        ("model.layers.-1.input_layernorm.weight", "num_hidden_layers is 2"),
        ("model.layers..input_layernorm.weight", "num_hidden_layers is 2"),
        ("model.layers.0.self_attn.q_proj.bias", "bias"),
        ("model.layers.1.self_attn.o_proj.bias", "bias"),
        ("model.layers.0.block_sparse_moe.gate.bias", "bias"),
        ("model.layers.1.block_sparse_moe.experts.3.w1.bias", "bias"),
        ("model.layers.1.input_layernorm.bias", "bias"),
    ];
    let row = |(name, reason): (&'static str, &str)| {
        case(format!("{name} is there"), weights(move |file| file.add(name, &[40])), Status::TensorUnexpected)
            .key(name)
            .says(&[name, "has no place", reason])
    };
    rows.into_iter().map(row).collect()
}

/// Layouts that are mixed, or broken in their own ways.
fn layouts() -> Vec<Case> {
    let fused = |gate_up: &'static [u64], down: &'static [u64]| weights(move |file| file.fuse(gate_up, down));
    let shape = Status::TensorShape;
    let missing = Status::TensorMissing;
    let mut cases = vec![
        case("both layouts are in layer 0", weights(|file| file.add(GATE_UP, FUSED.0)), Status::TensorDuplicate)
            .says(&["block_sparse_moe", "mlp.experts"]),
        case(
            "the second layout is in layer 1 only",
            weights(|file| file.add("model.layers.1.mlp.experts.down_proj", FUSED.1)),
            Status::TensorDuplicate,
        )
        .says(&["block_sparse_moe", "mlp.experts"]),
        case(
            "no layer has experts",
            weights(|file| file.tensors.retain(|tensor| !tensor.name.contains("block_sparse_moe"))),
            missing,
        )
        .key("model.layers.0.block_sparse_moe.gate.weight")
        .says(&["missing"]),
        case("no tensors at all", weights(|file| file.tensors.clear()), missing).says(&["missing"]),
        case(
            "layer 1 has no experts",
            weights(|file| file.tensors.retain(|tensor| !tensor.name.contains("1.block_sparse_moe"))),
            missing,
        )
        .key("model.layers.1.block_sparse_moe.gate.weight"),
        case("fused experts have one dimension less", fused(&[192, 40], FUSED.1), shape).key(GATE_UP),
        case("fused experts have one dimension more", fused(&[4, 2, 24, 40], FUSED.1), shape).key(GATE_UP),
        case("fused gate_up is turned around", fused(&[4, 40, 48], FUSED.1), shape)
            .key(GATE_UP)
            .says(&["is [4, 40, 48]", "expected [4, 48, 40]"]),
        case("fused gate_up has half its rows", fused(&[4, 24, 40], FUSED.1), shape).key(GATE_UP),
        case("fused gate_up has an expert less", fused(&[3, 48, 40], FUSED.1), shape).key(GATE_UP),
        case("fused down is turned around", fused(FUSED.0, &[4, 24, 40]), shape)
            .key(DOWN)
            .says(&["is [4, 24, 40]", "expected [4, 40, 24]"]),
        case("fused down is flat", fused(FUSED.0, &[3840]), shape).key(DOWN),
    ];
    for name in [GATE_UP, DOWN, "model.layers.0.mlp.gate.weight"] {
        let change = weights(move |file| {
            file.fuse(FUSED.0, FUSED.1);
            file.remove(name);
        });
        cases.push(case(format!("of the fused layout {name} is missing"), change, missing).key(name).says(&[name]));
    }
    for name in ["mlp.up_proj.weight", "mlp.down_proj.weight"] {
        let name = format!("model.layers.1.{name}");
        let key = name.clone();
        let change = weights(move |file| {
            file.make_dense();
            file.remove(&name);
        });
        cases.push(case(format!("of the dense layout {key} is missing"), change, missing).key(&key).says(&[&key]));
    }
    cases
}

/// A head of its own.
fn heads() -> Vec<Case> {
    let untied = |change: fn(&mut crate::file::WeightFile)| {
        let (config, weights) = (config(json!({"tie_word_embeddings": false})), weights(change));
        move |path: &std::path::Path| {
            config(path);
            weights(path);
        }
    };
    vec![
        case("the head is untied and missing", untied(|_| ()), Status::TensorMissing)
            .key(HEAD)
            .says(&[HEAD, "[320, 40]"]),
        case("the head is turned around", untied(|file| file.add(HEAD, &[40, 320])), Status::TensorShape)
            .key(HEAD)
            .says(&["is [40, 320]", "expected [320, 40]"]),
        case(
            "a tied model has a head of another size",
            weights(|file| file.add(HEAD, &[319, 40])),
            Status::TensorShape,
        )
        .key(HEAD)
        .says(&["is [319, 40]"]),
    ]
}
