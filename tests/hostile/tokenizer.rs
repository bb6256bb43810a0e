//! tokenizer.json: text that is no JSON, tokenizers of another kind, vocabularies that cannot be.

use gemmoe::Status;
use serde_json::{Value, json};

use crate::case::{Case, TOKENIZER, bytes, case, sparse, tokenizer};
use crate::tokenizer_sample::{VOCAB_SIZE, sample};

pub fn cases() -> Vec<Case> {
    let mut cases = texts();
    cases.extend(values());
    cases.extend(bombs());
    cases.into_iter().map(|case| case.file(TOKENIZER)).collect()
}

fn texts() -> Vec<Case> {
    let good = sample().to_string();
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("is empty", vec![]),
        ("is cut", good.as_bytes()[..good.len() / 2].to_vec()),
        ("is not UTF-8", [&b"{\"version\":\""[..], &[0xff], b"\"}"].concat()),
        ("goes on after its end", format!("{good}x").into_bytes()),
        ("holds NaN", good.replacen("\"<eos>\":1", "\"<eos>\":NaN", 1).into_bytes()),
        ("names model twice", good.replacen("\"model\":", "\"model\":{},\"model\":", 1).into_bytes()),
        ("names vocab twice", good.replacen("\"vocab\":", "\"vocab\":{},\"vocab\":", 1).into_bytes()),
        ("names a piece twice", good.replacen("\"<eos>\":1", "\"<eos>\":1,\"<eos>\":319", 1).into_bytes()),
        (
            "names an option twice",
            good.replacen("\"type\":\"BPE\"", "\"type\":\"BPE\",\"type\":\"BPE\"", 1).into_bytes(),
        ),
    ];
    let row = |(name, text): (&str, Vec<u8>)| {
        case(format!("tokenizer.json {name}"), bytes(TOKENIZER, text), Status::TokenizerSyntax)
    };
    let mut cases: Vec<Case> = rows.into_iter().map(row).collect();
    for (name, text) in [("is a list", "[]"), ("is null", "null"), ("is an empty object", "{}")] {
        let name = format!("tokenizer.json {name}");
        cases.push(case(name, bytes(TOKENIZER, text), Status::TokenizerUnsupported));
    }
    cases
}

/// One value changed or removed, and the key that must be named.
fn values() -> Vec<Case> {
    let (other, value) = (Status::TokenizerUnsupported, Status::TokenizerValue);
    let special = json!({
        "id": 300, "content": "h", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
        "special": true
    });
    let rows: Vec<(&str, Option<Value>, Status, &str)> = vec![
        ("/model/type", Some(json!("Unigram")), other, "model.type"),
        ("/model/type", Some(json!("WordPiece")), other, "model.type"),
        ("/model/type", None, other, "model.type"),
        ("/model", Some(json!({"type": "Unigram", "vocab": [["a", 0.5]]})), other, "model.vocab"),
        ("/model/byte_fallback", Some(json!(false)), other, "model.byte_fallback"),
        ("/model/ignore_merges", Some(json!(true)), other, "model.ignore_merges"),
        ("/model/dropout", Some(json!(0.5)), other, "model.dropout"),
        ("/model/surprise", Some(json!(1)), other, "model.surprise"),
        ("/model/vocab", Some(json!([])), other, "model.vocab"),
        ("/model/vocab", None, other, "model.vocab"),
        ("/model/vocab/l", Some(json!(VOCAB_SIZE)), value, "model.vocab[\"l\"]"),
        ("/model/vocab/l", Some(json!(u64::MAX)), value, "model.vocab[\"l\"]"),
        ("/model/vocab/l", Some(json!(-1)), value, "model.vocab[\"l\"]"),
        ("/model/vocab/l", Some(json!(1.5)), value, "model.vocab[\"l\"]"),
        ("/model/vocab/l", Some(json!("1")), value, "model.vocab[\"l\"]"),
        ("/model/vocab/l", Some(json!(null)), value, "model.vocab[\"l\"]"),
        ("/model/vocab/", Some(json!(319)), value, "model.vocab[\"\"]"),
        ("/model/vocab/<0x41>", None, value, "model.vocab"),
        ("/model/vocab/<0xFF>", None, value, "model.vocab"),
        ("/model/merges", Some(json!({})), other, "model.merges"),
        ("/model/merges", None, other, "model.merges"),
        ("/model/merges/1", Some(json!("lonely")), value, "model.merges[1]"),
        ("/model/merges/1", Some(json!("a b c")), value, "model.merges[1]"),
        ("/model/merges/1", Some(json!(["a", "b", "c"])), value, "model.merges[1]"),
        ("/model/merges/1", Some(json!(7)), value, "model.merges[1]"),
        ("/model/merges/1", Some(json!("h absent")), value, "model.merges[1]"),
        ("/model/merges/1", Some(json!("h e")), value, "model.merges[1]"),
        ("/model/merges/1", Some(json!("▁ h")), value, "model.merges[1]"),
        ("/model/unk_token", Some(json!("absent")), value, "model.unk_token"),
        ("/normalizer", Some(json!({"type": "NFC"})), other, "normalizer.type"),
        ("/normalizer/pattern", Some(json!({"Regex": "(a+)+$"})), other, "normalizer.pattern.Regex"),
        ("/pre_tokenizer", Some(json!({"type": "ByteLevel"})), other, "pre_tokenizer.type"),
        ("/decoder", Some(json!(null)), other, "decoder"),
        ("/added_tokens", Some(json!({})), other, "added_tokens"),
        ("/added_tokens/1/id", Some(json!(VOCAB_SIZE)), value, "added_tokens[1]"),
        ("/added_tokens/1/id", Some(json!(u64::MAX)), value, "added_tokens[1]"),
        ("/added_tokens/1/id", Some(json!(2)), value, "added_tokens[1]"),
        ("/added_tokens/1/id", Some(json!(-1)), value, "added_tokens[1].id"),
        ("/added_tokens/1/content", Some(json!("")), value, "added_tokens[1].content"),
        ("/added_tokens/1/special", Some(json!(1)), other, "added_tokens[1].special"),
        ("/added_tokens/1/normalized", Some(json!(true)), other, "added_tokens[1].normalized"),
        ("/added_tokens/1", Some(special), value, "added_tokens[1]"),
    ];
    let row = |(pointer, value, status, key): (&'static str, Option<Value>, Status, &str)| {
        let name = match &value {
            Some(value) => format!("the tokenizer's {pointer} is {value}"),
            None => format!("the tokenizer has no {pointer}"),
        };
        case(name, tokenizer(pointer, value), status).key(key).says(&[key])
    };
    rows.into_iter().map(row).collect()
}

/// Files that are too large, or would grow.
fn bombs() -> Vec<Case> {
    const MOST: usize = 64 << 20;
    let inside = |start: &str, item: &str, end: &str, bytes_of_items: usize| {
        let (start, item, end) = (start.to_owned(), item.to_owned(), end.to_owned());
        move |path: &std::path::Path| {
            let text = format!("{start}{}{end}", item.repeat(bytes_of_items / item.len()));
            std::fs::write(path.join(TOKENIZER), text).unwrap();
        }
    };
    let other = Status::TokenizerUnsupported;
    let most = MOST - 100;
    vec![
        case("the tokenizer is a byte over the cap", sparse(TOKENIZER, b"{", MOST as u64 + 1), Status::FileTooLarge)
            .says(&["67108865", "67108864"]),
        case("the tokenizer is 64 MiB of NUL", sparse(TOKENIZER, b"", MOST as u64), Status::TokenizerSyntax),
        case("the tokenizer opens lists to its end", inside("", "[", "", most), other),
        case(
            "the tokenizer has 10 million merges",
            inside("{\"model\":{\"merges\":[", "\"a b\",", "\"a b\"]}}", most),
            other,
        )
        .key("model.merges"),
        case("the tokenizer has 20 million added tokens", inside("{\"added_tokens\":[", "{},", "{}]}", most), other)
            .key("added_tokens"),
        case("the tokenizer has one string", inside("{\"version\":\"", "x", "\"}", most), other),
        case("the tokenizer's unknown part is a list of zeros", inside("{\"x\":[", "0,", "0]}", most), other),
        case(
            "the vocabulary has 10 million pieces",
            inside("{\"model\":{\"vocab\":{", "\"\u{e9}\":0,", "\"b\":0}}}", most),
            Status::TokenizerSyntax,
        ),
    ]
}
