//! What a newcomer sees: the demo model writes text of the prompt's kind, and the README's program does what it says.

mod common;

use std::process::Command;

use common::{load, repository};
use gemmoe::{Sampling, Session, SessionOptions};

/// The greedy or sampled continuation of a prompt.
fn continuation(prompt: &str, sampling: Sampling) -> String {
    let model = load(&repository().join("examples/demo-model"));
    let mut session = Session::new(model.clone(), &SessionOptions::default()).unwrap();
    session.set_sampling(sampling).unwrap();
    session.prefill(&model.encode(prompt, true, false).unwrap()).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < 80 && !tokens.last().is_some_and(|token| model.stop_tokens().contains(token)) {
        tokens.push(session.step().unwrap());
    }
    String::from_utf8(model.tokenizer().unwrap().decode(&tokens, false).unwrap()).unwrap()
}

/// How many of `marks` a text has, as whole words.
fn marks(text: &str, marks: &[&str]) -> usize {
    text.split(|c: char| c.is_whitespace() || ",.;:".contains(c)).filter(|word| marks.contains(word)).count()
}

const ENGLISH: [&str; 12] = ["the", "of", "and", "to", "is", "that", "a", "in", "not", "are", "for", "as"];
const GERMAN: [&str; 12] = ["der", "die", "das", "und", "Sie", "nicht", "von", "ist", "den", "mit", "ein", "zu"];
const PYTHON: [&str; 10] = ["def", "self", "return", "if", "=", "None", "in", "else", "import", "=="];
const MATHEMATICS: [&str; 10] = ["|-", "(", ")", "->", "/\\", "e.", "=", "$p", "$.", "ph"];

#[test]
fn each_prompt_is_continued_in_its_own_kind_of_text() {
    let cases = [
        ("The reason for this is that", &ENGLISH[..]),
        ("Mit dieser Option können Sie", &GERMAN[..]),
        ("def __init__(self, name", &PYTHON[..]),
        ("|- ( ( ph /\\ ps ) ->", &MATHEMATICS[..]),
    ];
    for (prompt, own) in cases {
        let texts: Vec<String> = (0..4)
            .map(|seed| continuation(prompt, Sampling { temperature: 0.7, top_k: 40, seed, ..Default::default() }))
            .collect();
        let text = texts.join("\n");
        let found = marks(&text, own);
        for others in [&ENGLISH[..], &GERMAN[..], &PYTHON[..], &MATHEMATICS[..]] {
            assert!(others == own || marks(&text, others) * 2 < found, "{prompt} -> {text}");
        }
        assert!(found >= 15, "{prompt} -> {text}");
    }
}

#[test]
fn the_readmes_c_program_compiles_and_writes_text() {
    let readme = std::fs::read_to_string(repository().join("README.md")).unwrap();
    let program = readme.split("```c\n").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    assert!(program.lines().count() <= 25, "the README promises 25 lines");
    let directory = tempfile::tempdir().unwrap();
    let (source, binary) = (directory.path().join("complete.c"), directory.path().join("complete"));
    std::fs::write(&source, program).unwrap();
    let libraries = common::library_directory();
    let compiled = Command::new("cc")
        .args(["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-I"])
        .arg(repository().join("include"))
        .arg(&source)
        .arg(libraries.join("libgemmoe.a"))
        .args(["-lpthread", "-ldl", "-lm", "-o"])
        .arg(&binary)
        .output()
        .unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let run = |arguments: &[&str]| Command::new(&binary).args(arguments).output().unwrap();
    let demo = repository().join("examples/demo-model");
    let output = run(&[demo.to_str().unwrap(), "The reason"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8(output.stdout).unwrap().len() > 40);
    let failed = run(&["/nonexistent"]);
    assert!(!failed.status.success());
    assert!(String::from_utf8(failed.stderr).unwrap().contains("/nonexistent"));
}
