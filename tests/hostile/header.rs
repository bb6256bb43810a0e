//! The header of a safetensors file: lengths, JSON, offsets and sizes.

use gemmoe::Status;
use serde_json::{Value, json};

use crate::case::{Case, WEIGHTS, bare_header, bytes, case, good, header, header_text, sparse};
use crate::file::WeightFile;

/// The first tensor of the file, and the last.
const FIRST: &str = "model.embed_tokens.weight";
const LAST: &str = "model.norm.weight";

pub fn cases() -> Vec<Case> {
    let mut cases = lengths();
    cases.extend(texts());
    cases.extend(entries());
    cases.extend(spans());
    cases.extend(bombs());
    cases
}

/// Files shorter or longer than they say.
fn lengths() -> Vec<Case> {
    let good = WeightFile::of(good()).to_bytes();
    let header = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let after_header = good.len() - 8;
    let announcing = |length: u64| [&length.to_le_bytes()[..], &good[8..]].concat();
    let cut = |length: usize| good[..length].to_vec();
    let rows: Vec<(&str, Vec<u8>, Status, Vec<String>)> = vec![
        ("is empty", cut(0), Status::FileLength, vec!["0 bytes".into(), "8".into()]),
        ("is 1 byte", cut(1), Status::FileLength, vec!["1 bytes".into()]),
        ("is 7 bytes", cut(7), Status::FileLength, vec!["7 bytes".into()]),
        ("ends after the header's length", cut(8), Status::FileLength, vec![header.to_string(), "0 follow".into()]),
        ("ends after the header's first byte", cut(9), Status::FileLength, vec!["1 follow".into()]),
        ("ends inside the header", cut(8 + header / 2), Status::FileLength, vec![header.to_string()]),
        ("ends before the header's last byte", cut(8 + header - 1), Status::FileLength, vec![header.to_string()]),
        ("ends after the header", cut(8 + header), Status::FileLength, vec!["0 bytes of tensors".into()]),
        ("ends inside the data", cut(good.len() / 2 + header), Status::FileLength, vec!["describes".into()]),
        ("lacks its last byte", cut(good.len() - 1), Status::FileLength, vec!["describes".into()]),
        ("has a byte too many", [&good[..], b"x"].concat(), Status::FileLength, vec!["describes".into()]),
        ("announces no header", announcing(0), Status::HeaderSyntax, vec!["EOF".into()]),
        ("announces a header a byte shorter", announcing(header as u64 - 1), Status::HeaderSyntax, vec![]),
        ("announces a header a byte longer", announcing(header as u64 + 1), Status::HeaderSyntax, vec![]),
        ("announces a header of the whole file", announcing(after_header as u64), Status::HeaderSyntax, vec![]),
        (
            "announces a header a byte longer than the file",
            announcing(after_header as u64 + 1),
            Status::FileLength,
            vec![(after_header + 1).to_string(), after_header.to_string()],
        ),
        ("announces the longest header", announcing(u64::MAX), Status::FileLength, vec![u64::MAX.to_string()]),
        (
            "announces a header of 2^63 bytes",
            announcing(1 << 63),
            Status::FileLength,
            vec!["9223372036854775808".into()],
        ),
    ];
    let row = |(name, contents, status, says): (&str, Vec<u8>, Status, Vec<String>)| {
        let mut case = case(format!("the weight file {name}"), bytes(WEIGHTS, contents), status).file(WEIGHTS);
        case.says = says;
        case
    };
    rows.into_iter().map(row).collect()
}

/// Headers that are not what JSON or the format allows.
fn texts() -> Vec<Case> {
    let rows: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("is not JSON", b"tensors".to_vec(), &[]),
        ("is a list", b"[]".to_vec(), &["expected an object"]),
        ("is null", b"null".to_vec(), &["expected an object"]),
        ("is not UTF-8", b"{\"\xff\":{}}".to_vec(), &[]),
        ("goes on after its end", b"{}{}".to_vec(), &["trailing"]),
        ("is full of NUL", vec![0; 64], &[]),
        ("does not end", b"{\"a\":".to_vec(), &["EOF"]),
        ("holds an empty entry", b"{\"a\":{}}".to_vec(), &["missing field"]),
        ("holds a null entry", b"{\"a\":null}".to_vec(), &[]),
        ("holds a number as an entry", b"{\"a\":1}".to_vec(), &[]),
        ("opens metadata and never ends", [b"{\"__metadata__\":", "[".repeat(100_000).as_bytes()].concat(), &["EOF"]),
        ("has metadata twice", br#"{"__metadata__":{"a":"b"},"__metadata__":{}}"#.to_vec(), &["__metadata__", "twice"]),
    ];
    let row = |(name, text, says): (&str, Vec<u8>, &[&str])| {
        case(format!("the header {name}"), bare_header(text), Status::HeaderSyntax).file(WEIGHTS).says(says)
    };
    rows.into_iter().map(row).collect()
}

/// Entries with fields of the wrong kind.
fn entries() -> Vec<Case> {
    let mut cases = Vec::new();
    let fields: [(&str, Value); 22] = [
        ("dtype", json!(16)),
        ("dtype", json!(null)),
        ("dtype", json!(["BF16"])),
        ("shape", json!(40)),
        ("shape", json!("[40]")),
        ("shape", json!({"0": 40})),
        ("shape", json!(null)),
        ("shape", json!([-40])),
        ("shape", json!([40.5])),
        ("shape", json!([1e30])),
        ("shape", json!([[40]])),
        ("shape", json!(["40"])),
        ("shape", json!([1, 1, 1, 1, 1, 1, 1, 1, 40])),
        ("data_offsets", json!([0])),
        ("data_offsets", json!([0, 80, 160])),
        ("data_offsets", json!([0.5, 80])),
        ("data_offsets", json!([-80, 80])),
        ("data_offsets", json!(["0", "80"])),
        ("data_offsets", json!(80)),
        ("data_offsets", json!([1e30, 1e31])),
        ("data_offsets", json!(null)),
        ("bytes", json!(80)),
    ];
    for (field, value) in fields {
        let name = format!("a tensor's {field} is {value}");
        let change = move |header: &mut Value| header[LAST][field] = value.clone();
        cases.push(case(name, self::header(change), Status::HeaderSyntax).file(WEIGHTS));
    }
    for field in ["dtype", "shape", "data_offsets"] {
        let change = move |header: &mut Value| drop(header[LAST].as_object_mut().unwrap().remove(field));
        let name = format!("a tensor has no {field}");
        cases
            .push(case(name, self::header(change), Status::HeaderSyntax).file(WEIGHTS).says(&["missing field", field]));
        let twice = move |text: String| {
            let value = if field == "dtype" { "\"BF16\"" } else { "[0,0]" };
            text.replacen(&format!("\"{field}\":"), &format!("\"{field}\":{value},\"{field}\":"), 1)
        };
        let name = format!("a tensor has two fields {field}");
        cases
            .push(case(name, header_text(twice), Status::HeaderSyntax).file(WEIGHTS).says(&["duplicate field", field]));
    }
    let beyond = |text: String| text.replacen("\"data_offsets\":[0,", "\"data_offsets\":[18446744073709551616,", 1);
    cases.push(case("an offset needs 65 bits", header_text(beyond), Status::HeaderSyntax).file(WEIGHTS));
    let entry_twice = |text: String| {
        let entry = r#""model.norm.weight":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]},"#;
        text.replacen('{', &format!("{{{entry}"), 1)
    };
    cases.push(
        case("a tensor is described twice", header_text(entry_twice), Status::TensorDuplicate)
            .file(WEIGHTS)
            .key(LAST)
            .says(&[LAST, "twice"]),
    );
    for dtype in ["BF17", "bf16", "", "float32", "BF16 ", "\u{0}"] {
        let change = move |header: &mut Value| header[LAST]["dtype"] = json!(dtype);
        cases.push(
            case(format!("the dtype is {dtype:?}"), self::header(change), Status::TensorDtype)
                .file(WEIGHTS)
                .key(LAST)
                .says(&["unknown dtype", LAST]),
        );
    }
    cases
}

/// Offsets and shapes that contradict each other or the file.
fn spans() -> Vec<Case> {
    let offsets = |tensor: &'static str, change: fn(u64, u64) -> [u64; 2]| {
        header(move |header| {
            let found: Vec<u64> = serde_json::from_value(header[tensor]["data_offsets"].clone()).unwrap();
            header[tensor]["data_offsets"] = json!(change(found[0], found[1]));
        })
    };
    let shape = |tensor: &'static str, shape: Value| header(move |header| header[tensor]["shape"] = shape.clone());
    let value = Status::HeaderValue;
    let mut cases = vec![
        case("a tensor ends before it begins", offsets(FIRST, |first, end| [end, first]), value)
            .says(&["expected to begin at"]),
        case("the last tensor begins where it should and ends before", offsets(LAST, |first, _| [first, 0]), value)
            .key(LAST),
        case("the last tensor ends before it begins", offsets(LAST, |first, end| [end, first]), value).key(LAST),
        case("a tensor begins a byte late", offsets(LAST, |first, end| [first + 1, end]), value).key(LAST),
        case("a tensor begins a byte early", offsets(LAST, |first, end| [first - 1, end]), value).key(LAST),
        case("a tensor lies on another", offsets(LAST, |_, _| [0, 80]), value).says(&["expected to begin at"]),
        case("the first tensor begins at 2", offsets(FIRST, |_, end| [2, end]), value)
            .says(&["expected to begin at 0"]),
        case("a tensor ends a byte early", offsets(LAST, |first, end| [first, end - 1]), Status::FileLength),
        case("a tensor ends a byte late", offsets(LAST, |first, end| [first, end + 1]), Status::FileLength),
        case("a tensor ends at 2^64 - 1", offsets(LAST, |first, _| [first, u64::MAX]), Status::FileLength)
            .says(&["18446744073709551615"]),
        case("a tensor begins at 2^64 - 1", offsets(LAST, |_, _| [u64::MAX, u64::MAX]), value)
            .key(LAST)
            .says(&["18446744073709551615"]),
        case("a tensor begins at 2^63", offsets(LAST, |_, _| [1 << 63, (1 << 63) + 80]), value).key(LAST),
        case("a tensor has no bytes", offsets(LAST, |_, end| [end, end]), value).key(LAST),
    ];
    let inside = header(|header| header["extra"] = json!({"dtype": "BF16", "shape": [0], "data_offsets": [8, 8]}));
    cases.push(case("an empty tensor lies inside another", inside, value).says(&["[8, 8]"]));
    for (name, sizes) in [
        ("is one too short", json!([39])),
        ("is one too long", json!([41])),
        ("is empty", json!([0])),
        ("has 2^64 elements", json!([1u64 << 32, 1u64 << 32])),
        ("has 2^64 + 40 elements", json!([1u64 << 63, 2, 1])),
        ("has 2^64 bits", json!([1u64 << 60])),
        ("has 40 elements past 2^64 bits", json!([(1u64 << 60) + 40])),
        ("has the largest size", json!([u64::MAX])),
        ("has eight of the largest sizes", json!(vec![u64::MAX; 8])),
        ("overflows before its zero", json!([u64::MAX, u64::MAX, 0])),
    ] {
        let says = format!("{:?}", serde_json::from_value::<Vec<u64>>(sizes.clone()).unwrap());
        let name = format!("a shape {name}");
        cases.push(case(name, shape(LAST, sizes), value).key(LAST).says(&[LAST, &says, "data_offsets"]));
    }
    cases.into_iter().map(|case| case.file(WEIGHTS)).collect()
}

/// Headers that would grow in memory, or in the message.
fn bombs() -> Vec<Case> {
    const MOST: usize = 16 << 20;
    let entry = |name: &str, shape: &str| {
        format!("{{\"{name}\":{{\"dtype\":\"U8\",\"shape\":{shape},\"data_offsets\":[0,0]}}}}")
    };
    let zeros = format!("[{}0]", "0,".repeat(8_000_000));
    let many = || {
        let entry = |index: usize| format!("\"{index:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
        let count = MOST / (entry(0xfffff).len() + 1) - 1;
        format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(","))
    };
    let cap: &[u8] = &[1, 0, 0, 1, 0, 0, 0, 0];
    vec![
        case("the header is a byte over the cap", sparse(WEIGHTS, cap, 32 << 20), Status::FileTooLarge)
            .says(&["16777217", "16777216"]),
        case("the header is 16 MiB of NUL", sparse(WEIGHTS, &[0, 0, 0, 1, 0, 0, 0, 0], 32 << 20), Status::HeaderSyntax),
        case("the header opens 16 million lists", bare_header("[".repeat(MOST)), Status::HeaderSyntax),
        case(
            "a shape opens 16 million lists",
            bare_header(format!("{{\"a\":{{\"shape\":{}", "[".repeat(MOST - 32))),
            Status::HeaderSyntax,
        ),
        case("a shape has 8 million zeros", bare_header(entry("a", &zeros)), Status::HeaderSyntax).says(&["at most 8"]),
        case(
            "the header has as many tensors as fit",
            move |path: &std::path::Path| bare_header(many())(path),
            Status::HeaderSyntax,
        )
        .says(&["262144"]),
        case(
            "a dtype is 15 MB long",
            bare_header(entry("a", "[0]").replace("U8", &"x".repeat(15_000_000))),
            Status::TensorDtype,
        )
        .key("a"),
        case("a tensor's name is 15 MB long", bare_header(entry(&"n".repeat(15_000_000), "[1]")), Status::HeaderValue),
        case(
            "a field's name is 15 MB long",
            bare_header(entry("a", "[0]").replace("shape", &"s".repeat(15_000_000))),
            Status::HeaderSyntax,
        ),
        case(
            "a tensor's name clears the terminal",
            bare_header(entry("\\u001b[2J\\n\\r\\u0007", "[1]")),
            Status::HeaderValue,
        ),
    ]
    .into_iter()
    .map(|case| case.file(WEIGHTS))
    .collect()
}
