//! The index of a sharded model: names that lead elsewhere, maps that are not true.

use gemmoe::Status;
use serde_json::{Value, json};

use crate::case::{Case, INDEX, case, index, index_bytes, pipe, sharded, sparse, true_index};

const TENSOR: &str = "model.norm.weight";

pub fn cases() -> Vec<Case> {
    let mut cases = names();
    cases.extend(texts());
    cases.extend(untruths());
    cases.extend(bombs());
    cases
}

/// File names that are none, or of files that are none.
fn names() -> Vec<Case> {
    let bad = [
        "../model.safetensors",
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "",
        ".",
        "..",
        "./second.safetensors",
        "folder/second.safetensors",
        "second.safetensors/",
        "a\\b.safetensors",
        "..\\second.safetensors",
        "\\\\server\\share",
        "C:second.safetensors",
        "file:///etc/passwd",
        "second.safetensors\0",
        "\0",
    ];
    let row = |name: &'static str| {
        let break_it = index(move |index| index["weight_map"][TENSOR] = json!(name));
        case(format!("the index names {name:?}"), break_it, Status::FileNotAllowed)
            .file(INDEX)
            .key(TENSOR)
            .says(&[TENSOR, "not a plain file name"])
    };
    let mut cases: Vec<Case> = bad.into_iter().map(row).collect();
    let naming = |name: &'static str| index(move |index| index["weight_map"][TENSOR] = json!(name));
    let with = |name: &'static str, make: Box<dyn Fn(&std::path::Path) + Send>| {
        let naming = naming(name);
        move |path: &std::path::Path| {
            naming(path);
            make(path);
        }
    };
    let folder = Box::new(|path: &std::path::Path| std::fs::create_dir(path.join("folder")).unwrap());
    let link = |target: &'static str| Box::new(crate::case::link("link", target));
    let long: &'static str = Box::leak("x".repeat(5000).into_boxed_str());
    cases.extend([
        case("a shard is missing", naming("third.safetensors"), Status::FileNotFound).file("third.safetensors"),
        case("a shard is a folder", with("folder", folder), Status::FileNotAllowed).file("folder"),
        case("a shard is a pipe", with("pipe", Box::new(pipe("pipe"))), Status::FileNotAllowed).file("pipe"),
        case("a shard is a link to outside", with("link", link("/etc/passwd")), Status::FileNotAllowed).file("link"),
        case("a shard is a link to inside", with("link", link("first.safetensors")), Status::FileNotAllowed)
            .file("link")
            .says(&["symbolic link"]),
        case("a shard is a followed link to a device", with("link", link("/dev/zero")), Status::FileNotAllowed)
            .file("link")
            .following_links(),
        case("a shard is a followed link to a folder", with("link", link("/etc")), Status::FileNotAllowed)
            .file("link")
            .following_links(),
        case("a shard is a followed link to itself", with("link", link("link")), Status::FileNotAllowed)
            .file("link")
            .following_links(),
        case("a shard is a followed link to nothing", with("link", link("nothing")), Status::FileNotFound)
            .file("link")
            .following_links(),
        case("a shard's path leaves the directory, links followed", naming("../x"), Status::FileNotAllowed)
            .file(INDEX)
            .following_links(),
        case("a shard's name is longer than names can be", naming(long), Status::ReadFailed),
        case("a shard is config.json", naming("config.json"), Status::FileLength).file("config.json"),
        case("a shard is the index", naming(INDEX), Status::FileLength).file(INDEX),
    ]);
    cases
}

/// Indexes that are no JSON, or JSON of another shape.
fn texts() -> Vec<Case> {
    let good = true_index().to_string();
    let twice = good.replacen("\"weight_map\":{", &format!("\"weight_map\":{{\"{TENSOR}\":\"first.safetensors\","), 1);
    let rows: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("is empty", vec![], &["EOF"]),
        ("is cut", good.as_bytes()[..good.len() - 2].to_vec(), &["EOF"]),
        ("is not UTF-8", b"{\"weight_map\":{\"a\":\"\xff\"}}".to_vec(), &[]),
        ("is null", b"null".to_vec(), &[]),
        ("has no weight_map", b"{\"metadata\":{}}".to_vec(), &["weight_map"]),
        ("has a list for a map", b"{\"weight_map\":[]}".to_vec(), &["expected an object"]),
        ("has null for a map", b"{\"weight_map\":null}".to_vec(), &["expected an object"]),
        ("has text for a map", b"{\"weight_map\":\"a\"}".to_vec(), &["expected an object"]),
        ("maps to a number", b"{\"weight_map\":{\"a\":1}}".to_vec(), &["expected a string"]),
        ("maps to a list", b"{\"weight_map\":{\"a\":[\"b\"]}}".to_vec(), &["expected a string"]),
        ("maps to null", b"{\"weight_map\":{\"a\":null}}".to_vec(), &["expected a string"]),
        ("names a tensor twice", twice.into_bytes(), &[TENSOR, "twice"]),
        ("has two maps", b"{\"weight_map\":{},\"weight_map\":{}}".to_vec(), &["duplicate field", "weight_map"]),
        ("goes on after its end", format!("{good}]").into_bytes(), &["trailing"]),
        ("opens lists in its metadata", format!("{{\"metadata\":{}", "[".repeat(1 << 20)).into_bytes(), &["EOF"]),
        ("opens objects in its map", format!("{{\"weight_map\":{}", "{\"a\":".repeat(1 << 18)).into_bytes(), &[]),
    ];
    let row = |(name, text, says): (&str, Vec<u8>, &[&str])| {
        case(format!("the index {name}"), index_bytes(text), Status::IndexSyntax).file(INDEX).says(says)
    };
    rows.into_iter().map(row).collect()
}

/// Maps that say what is not so.
fn untruths() -> Vec<Case> {
    let map = |change: fn(&mut serde_json::Map<String, Value>)| {
        index(move |index| change(index["weight_map"].as_object_mut().unwrap()))
    };
    vec![
        case(
            "there are shards and no index",
            |path: &std::path::Path| {
                sharded(path, None);
                std::fs::remove_file(path.join(INDEX)).unwrap();
            },
            Status::FileNotFound,
        )
        .file("model.safetensors")
        .says(&["model.safetensors", INDEX]),
        case("the map is empty", map(serde_json::Map::clear), Status::IndexValue).file(INDEX).key("weight_map"),
        case(
            "a tensor is said to be in the other shard",
            map(|map| drop(map.insert(TENSOR.into(), json!("first.safetensors")))),
            Status::IndexValue,
        )
        .file(INDEX)
        .key(TENSOR)
        .says(&[TENSOR, "first.safetensors"]),
        case(
            "a tensor is in no shard",
            map(|map| drop(map.insert("model.extra".into(), json!("first.safetensors")))),
            Status::IndexValue,
        )
        .file(INDEX)
        .key("model.extra"),
        case("a tensor of the shards is not in the map", map(|map| drop(map.remove(TENSOR))), Status::TensorMissing)
            .file(INDEX)
            .key(TENSOR)
            .says(&[TENSOR, "missing"]),
        case(
            "the map names 2000 shards",
            {
                map(|map| {
                    map.extend((0..2000).map(|shard| (format!("t{shard}"), json!(format!("{shard}.safetensors")))))
                })
            },
            Status::IndexValue,
        )
        .file(INDEX)
        .key("weight_map")
        .says(&["1024"]),
        case(
            "a shard is cut",
            |path: &std::path::Path| {
                sharded(path, None);
                let file = std::fs::File::options().write(true).open(path.join("second.safetensors")).unwrap();
                file.set_len(file.metadata().unwrap().len() - 1).unwrap();
            },
            Status::FileLength,
        )
        .file("second.safetensors"),
    ]
}

/// Indexes that would grow in memory.
fn bombs() -> Vec<Case> {
    const MOST: usize = 16 << 20;
    let many = |path: &std::path::Path| {
        let entry = |index: usize| format!("\"{index:x}\":\"\"");
        let text = (0..MOST / 12).map(entry).collect::<Vec<_>>().join(",");
        sharded(path, Some(format!("{{\"weight_map\":{{{text}}}}}").as_bytes()));
    };
    let long = |path: &std::path::Path| {
        let name = "n".repeat(MOST - 100);
        sharded(path, Some(json!({"weight_map": {name: "../x"}}).to_string().as_bytes()));
    };
    let too_large = |path: &std::path::Path| {
        std::fs::remove_file(path.join("model.safetensors")).unwrap();
        sparse(INDEX, b"{", MOST as u64 + 1)(path);
    };
    vec![
        case("the index is a byte over the cap", too_large, Status::FileTooLarge).says(&["16777217", "16777216"]),
        case("the index has as many tensors as fit", many, Status::IndexSyntax).says(&["262144"]),
        case("a tensor's name fills the index", long, Status::FileNotAllowed),
    ]
    .into_iter()
    .map(|case| case.file(INDEX))
    .collect()
}
