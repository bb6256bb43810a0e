//! The command line: its JSON shapes, which scripts depend on, and what it says when something is wrong.
#![cfg(feature = "cli")]

mod common;

use std::process::{Command, Output};

use common::{Directory, Random, load, repository, session};
use serde_json::{Value, json};

fn gemmoe(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_gemmoe")).args(arguments).output().unwrap()
}

fn json_of(arguments: &[&str]) -> Value {
    let output = gemmoe(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn list(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn logits_prints_the_last_positions_logits_and_experts() {
    let directory = Directory::random(21).to_temporary();
    let path = directory.path().to_str().unwrap();
    let tokens = Random::new(21).tokens(9, 97);
    let found = json_of(&["logits", "--model", path, "--tokens", &list(&tokens), "--json"]);
    let mut session = session(&load(directory.path()));
    session.prefill(&tokens).unwrap();
    let logits: Vec<f32> =
        found["logits"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
    assert_eq!(logits, session.logits().unwrap());
    let experts: Vec<&[u32]> = (0..2).map(|layer| session.routes(layer).unwrap().experts).collect();
    assert_eq!(found["experts"], json!(experts));
    assert_eq!(found.as_object().unwrap().len(), 2);
}

#[test]
fn generate_prints_new_tokens_and_stops_at_eos_unless_told_not_to() {
    // What it would say anyway, then the same model with one of those tokens as its EOS.
    let mut directory = Directory::random(22);
    let greedy = {
        let written = directory.to_temporary();
        let mut session = session(&load(written.path()));
        session.prefill(&[2, 17, 5]).unwrap();
        (0..6).map(|_| session.step().unwrap()).collect::<Vec<_>>()
    };
    directory.config["eos_token_id"] = json!(greedy[3]);
    let written = directory.to_temporary();
    let path = written.path().to_str().unwrap();
    let base = ["generate", "--model", path, "--tokens", "2,17,5", "--max-new", "6", "--json"];
    let end = greedy.iter().position(|token| *token == greedy[3]).unwrap();
    assert_eq!(json_of(&base), json!({"tokens": &greedy[..=end], "text": ""}));
    let all = [&base[..], &["--ignore-eos"]].concat();
    assert_eq!(json_of(&all), json!({"tokens": greedy, "text": ""}));
    assert_eq!(json_of(&[&base[..6], &["1", "--json"]].concat())["tokens"].as_array().unwrap().len(), 1);
}

#[test]
fn equal_seeds_give_equal_tokens_and_others_do_not() {
    let directory = Directory::random(23).to_temporary();
    let path = directory.path().to_str().unwrap();
    let run = |seed| {
        let base = ["generate", "--model", path, "--tokens", "2,3", "--max-new", "20", "--json", "--ignore-eos"];
        json_of(&[&base[..], &["--temperature", "1", "--top-k", "50", "--top-p", "0.95", "--seed", seed]].concat())
    };
    assert_eq!(run("5"), run("5"));
    assert_ne!(run("5"), run("6"));
}

#[test]
fn text_goes_in_and_comes_out() {
    let demo = repository().join("examples/demo-model");
    let demo = demo.to_str().unwrap();
    let found = json_of(&["generate", "--model", demo, "--prompt", "The reason", "--max-new", "12", "--json"]);
    let text = found["text"].as_str().unwrap();
    assert!(!text.is_empty());
    let plain = gemmoe(&["generate", "--model", demo, "--prompt", "The reason", "--max-new", "12"]);
    assert_eq!(String::from_utf8(plain.stdout).unwrap(), format!("{text}\n"));
    assert!(String::from_utf8(plain.stderr).unwrap().contains("tokens/s"));
}

#[test]
fn inspect_tells_what_is_in_a_directory() {
    let directory = Directory::random(24).to_temporary();
    let path = directory.path().to_str().unwrap();
    let found = json_of(&["inspect", path, "--json"]);
    assert_eq!(found["num_local_experts"], 4);
    assert_eq!(found["layout"], "block_sparse_moe");
    assert_eq!(found["dtypes"], json!(["BF16"]));
    let text = gemmoe(&["inspect", path]);
    assert!(String::from_utf8(text.stdout).unwrap().contains("4 a layer, each token goes to 2"));
}

#[test]
fn what_is_wrong_goes_to_stderr_with_the_culprit_in_it() {
    let directory = Directory::random(25).to_temporary();
    let path = directory.path().to_str().unwrap();
    let cases: [(&[&str], &str); 6] = [
        (&["inspect", "/nonexistent-model"], "/nonexistent-model"),
        (&["generate", "--model", path, "--prompt", "hello"], "tokenizer.json"),
        (&["generate", "--model", path, "--tokens", "2,97"], "token 1 of the input is 97, the vocabulary has 97"),
        (&["generate", "--model", path, "--tokens", "2,x"], "\"x\" is not a token id"),
        (&["generate", "--model", path, "--tokens", "2", "--temperature", "-1"], "temperature"),
        (&["generate", "--model", path], "--prompt"),
    ];
    for (arguments, culprit) in cases {
        let output = gemmoe(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        assert!(stderr.contains(culprit), "{arguments:?}: {stderr}");
    }
}
