//! `gemmoe train-router`: its plan, its JSON, its metrics, and what is left when it is ended.
#![cfg(feature = "cli")]

mod common;
#[path = "common/training.rs"]
mod training;

#[cfg(unix)]
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Directory, Random, load};
use gemmoe::model::RouterPatch;
use serde_json::{Value, json};
use training::{add_model, recipe, tokenizer, work_directory};

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemmoe"));
    command.args(arguments).env("NO_COLOR", "1");
    command
}

fn train(recipe: &Path, more: &[&str]) -> Output {
    command(&[&["train-router", recipe.to_str().unwrap()], more].concat()).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn write_recipe(directory: &Path, text: &str) -> PathBuf {
    let path = directory.join("recipe.toml");
    std::fs::write(&path, text).unwrap();
    path
}

/// Lines of a metrics file.
fn metrics(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Names in a directory.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_check_says_what_would_be_done_and_writes_nothing() {
    let directory = work_directory(1, json!({}));
    let recipe = write_recipe(directory.path(), &recipe("sft", "epochs = 2", ""));
    let before = names(directory.path());
    let output = train(&recipe, &["--check"]);
    let plan = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in [
        "trained      320, of ",
        "11 documents, ",
        "held out     11 documents",
        "steps        8 of 3 rows, 2 epochs",
        "rate         0.01, cosine to 10 %",
        "workspace",
        "optimiser                 6,400 bytes",
        "checkpoint                5,120 bytes",
        "all checks passed; nothing was written",
    ] {
        assert!(plan.contains(part), "{part}: {plan}");
    }
    let json: Value = serde_json::from_slice(&train(&recipe, &["--check", "--json"]).stdout).unwrap();
    assert_eq!(
        (&json["steps"], &json["parameters"], &json["written"], &json["data"]["rows"]),
        (&json!(8), &json!(320), &json!(false), &json!(11))
    );
    assert_eq!(names(directory.path()), before);
}

#[test]
fn a_run_writes_its_metrics_its_checkpoint_and_a_patch_that_the_model_takes() {
    for objective in ["sft", "dpo"] {
        let directory = work_directory(2, json!({}));
        let train_keys = "steps = 5\nevaluate_every = 2\nschedule = \"constant\"";
        let recipe = write_recipe(directory.path(), &recipe(objective, train_keys, ""));
        let output = train(&recipe, &["--json"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&json["written"], &json["begun_after_step"]), (&json!(true), &json!(0)));
        let lines = metrics(&directory.path().join("out.metrics.jsonl"));
        let order: Vec<(u64, bool)> =
            lines.iter().map(|line| (line["step"].as_u64().unwrap(), line.get("held_out").is_some())).collect();
        let expected =
            [(0, true), (1, false), (2, false), (2, true), (3, false), (4, false), (4, true), (5, false), (5, true)];
        assert_eq!(order, expected);
        for line in &lines {
            let losses = line.get("held_out").unwrap_or(line);
            assert!(losses["loss"].is_f64() && losses["shares"][1][3].is_f64(), "{line}");
            assert_eq!(losses.get("margin").is_some(), objective == "dpo");
            assert_eq!(losses.get("gradient_norm").is_some(), line.get("held_out").is_none());
        }
        assert_eq!(json["held_out_last"], lines[8]["held_out"]);
        assert_eq!(json["held_out_first"], lines[0]["held_out"]);
        let model = load(&directory.path().join("model"));
        let patch = RouterPatch::read(&directory.path().join("out")).unwrap();
        patch.check_model(model.config(), || model.gates_fingerprint()).unwrap();
        assert_ne!(patch.gates(), model.stored_gates().unwrap());

        // Once more needs to be said; and what is finished is gone on with for longer.
        let again = train(&recipe, &[]);
        let said = text(&again.stderr);
        assert!(!again.status.success() && said.contains("(--resume)") && said.contains("(--restart)"), "{said}");
        let longer = std::fs::read_to_string(&recipe).unwrap().replace("steps = 5", "steps = 6");
        std::fs::write(&recipe, longer).unwrap();
        let output = train(&recipe, &["--resume"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(text(&output.stdout).contains("going on after step 5 of 6"));
        let longer = metrics(&directory.path().join("out.metrics.jsonl"));
        assert_eq!(longer[..8], lines[..8]);
        assert_eq!((&longer[8]["step"], longer.len()), (&json!(6), 10));
        let resumed = std::fs::read(directory.path().join("out")).unwrap();
        let output = train(&recipe, &["--restart"]);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(std::fs::read(directory.path().join("out")).unwrap() == resumed);
        assert_eq!(metrics(&directory.path().join("out.metrics.jsonl")), longer);
        // A shorter run leaves nothing of the longer one behind.
        let shorter = std::fs::read_to_string(&recipe).unwrap().replace("steps = 6", "steps = 5");
        std::fs::write(&recipe, shorter).unwrap();
        assert!(train(&recipe, &["--restart"]).status.success());
        assert_eq!(metrics(&directory.path().join("out.metrics.jsonl")), lines);
    }
}

#[test]
fn rows_that_are_left_out_are_told_with_their_lines() {
    let directory = work_directory(3, json!({}));
    let path = directory.path().join("texts.jsonl");
    let rows = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{rows}{{\"text\": 7}}\n{{\"nothing\": \"of use\"}}\n")).unwrap();
    let kept = recipe("sft", "steps = 1", "");
    let refused = train(&write_recipe(directory.path(), &kept), &["--check"]);
    let said = text(&refused.stderr);
    assert!(!refused.status.success() && said.contains("texts.jsonl: line 12: "), "{said}");
    let skipping = kept.replace("[data]\n", "[data]\nbad_rows = \"skip\"\n");
    let output = train(&write_recipe(directory.path(), &skipping), &["--check"]);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    for part in ["left out: ", "texts.jsonl: line 12: ", "texts.jsonl: line 13: ", "2 of 13 rows in all"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(text(&output.stdout).contains("2 of 13 rows left out"));
}

#[test]
fn what_cannot_be_trained_is_said_before_anything_is_done() {
    let directory = work_directory(4, json!({"num_experts_per_tok": 1}));
    let path = write_recipe(directory.path(), &recipe("sft", "steps = 1", ""));
    let output = train(&path, &[]);
    let said = text(&output.stderr);
    assert!(!output.status.success() && said.contains("num_experts_per_tok is 1"), "{said}");
    assert_eq!(names(directory.path()), ["model", "pairs.jsonl", "recipe.toml", "texts.jsonl"]);
    let help = text(&command(&["train-router", "--help"]).output().unwrap().stdout);
    for part in ["[data]", "[output]", "--check", "--resume", "--restart", "--json"] {
        assert!(help.contains(part), "{help}");
    }
}

/// Waits until something is so while a process runs; answers whether it came to be.
#[cfg(unix)]
fn wait_for(running: &mut Child, is_so: impl Fn() -> bool) -> bool {
    loop {
        if is_so() {
            return true;
        }
        if running.try_wait().unwrap().is_some() {
            return false;
        }
        std::thread::yield_now();
    }
}

/// Starts a run whose first stage is new, and later ones go on.
#[cfg(unix)]
fn start(recipe: &Path, resume: bool) -> Child {
    let more: &[&str] = if resume { &["--resume"] } else { &["--restart"] };
    let mut command = command(&[&["train-router", recipe.to_str().unwrap()], more].concat());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_leaves_a_checkpoint_and_says_how_to_go_on() {
    let directory = work_directory(5, json!({}));
    let keys = "steps = 40\nevaluate_every = 3";
    let whole = write_recipe(directory.path(), &recipe("dpo", keys, "checkpoint_every = 0"));
    assert!(train(&whole, &[]).status.success());
    let file = |name: &str| std::fs::read(directory.path().join(name)).unwrap();
    let expected = (file("out"), file("out.metrics.jsonl"));
    std::fs::remove_file(directory.path().join("out")).unwrap();
    let mut running = start(&whole, false);
    let lines = directory.path().join("out.metrics.jsonl");
    let has_begun = || std::fs::read_to_string(&lines).is_ok_and(|text| (4..30).contains(&text.lines().count()));
    assert!(wait_for(&mut running, has_begun));
    // SAFETY: the process is this one's child and has not been waited for.
    assert_eq!(unsafe { libc::kill(running.id() as i32, libc::SIGINT) }, 0);
    let output = running.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("training was stopped after step ") && said.contains("recipe.toml --resume` goes on"),
        "{said}"
    );
    assert!(!directory.path().join("out").exists());
    let resumed = train(&whole, &["--resume"]);
    assert!(resumed.status.success(), "{}", text(&resumed.stderr));
    assert!(text(&resumed.stdout).contains("going on after step "));
    assert!((file("out"), file("out.metrics.jsonl")) == expected);
}

#[cfg(unix)]
#[test]
fn a_run_that_is_killed_again_and_again_ends_with_the_bytes_of_one_that_never_was() {
    let mut random = Random::new(11);
    let (mut kills, mut begun_kills) = (0, 0);
    for objective in ["sft", "dpo"] {
        let directory = work_directory(6, json!({}));
        let text_of = recipe(objective, "steps = 60\nevaluate_every = 7\nnoise = 0.1", "checkpoint_every = 1");
        let path = write_recipe(directory.path(), &text_of);
        let file = |name: &str| std::fs::read(directory.path().join(name)).ok();
        let before = Instant::now();
        assert!(train(&path, &[]).status.success());
        let whole_run = before.elapsed();
        let expected = ["out", "out.metrics.jsonl", "out.checkpoint"].map(file);
        // An older result is there until a new one is whole.
        let old = {
            let model = load(&directory.path().join("model"));
            let gates = vec![0.5; model.stored_gates().unwrap().len()];
            RouterPatch::new(model.config(), &gates, model.gates_fingerprint().unwrap()).unwrap().to_bytes().unwrap()
        };
        std::fs::write(directory.path().join("out"), &old).unwrap();
        let model = std::fs::read(directory.path().join("model/model.safetensors")).unwrap();
        std::fs::remove_file(directory.path().join("out.checkpoint")).unwrap();
        let part = directory.path().join(".out.checkpoint.part");
        let result_part = directory.path().join("out.partial");
        for round in 0.. {
            assert!(round < 200, "it never ends");
            let resume = directory.path().join("out.checkpoint").exists();
            let checkpoint = || {
                let found = std::fs::metadata(directory.path().join("out.checkpoint")).ok();
                found.map(|found| (found.ino(), found.mtime_nsec()))
            };
            let before = checkpoint();
            let mut running = start(&path, resume);
            let fraction = 0.5 * f64::from(random.unit() + 1.0);
            let wait = |running: &mut Child, time: Duration| {
                let until = Instant::now() + time.max(Duration::from_millis(1));
                wait_for(running, || Instant::now() >= until)
            };
            // At any time, while a file is being written, and after a step or a few: then there is something to go on with,
            // however fast the machine is.
            let is_running = match round % 4 {
                0 => wait_for(&mut running, || part.exists() || checkpoint() != before),
                1 if round > 16 => wait_for(&mut running, || result_part.exists()),
                2 => wait(&mut running, whole_run.mul_f64(fraction * 0.35)),
                _ => {
                    wait_for(&mut running, || checkpoint() != before)
                        && wait(&mut running, Duration::from_millis(3).mul_f64(fraction))
                }
            };
            running.kill().unwrap();
            let status = running.wait().unwrap();
            if !is_running || status.success() {
                assert!(status.success());
                break;
            }
            kills += 1;
            begun_kills += usize::from(resume);
            let out = file("out").unwrap();
            assert!(
                Some(&out) == expected[0].as_ref() || out == old,
                "round {round}: the result is neither old nor new"
            );
            assert!(std::fs::read(directory.path().join("model/model.safetensors")).unwrap() == model);
            if let Some(bytes) = file("out.checkpoint") {
                safetensors::SafeTensors::deserialize(&bytes).unwrap();
            }
        }
        let found = ["out", "out.metrics.jsonl", "out.checkpoint"].map(file);
        for (index, name) in ["result", "metrics", "checkpoint"].iter().enumerate() {
            assert!(found[index] == expected[index], "{objective}: the {name} differs");
        }
    }
    assert!(kills >= 20 && begun_kills >= 10, "only {kills} kills, {begun_kills} of them after a checkpoint");
}

#[cfg(unix)]
#[test]
fn a_run_that_is_killed_while_it_writes_a_model_leaves_the_old_one_whole() {
    let directory = tempfile::tempdir().unwrap();
    let keys = json!({"vocab_size": tokenizer::VOCAB_SIZE, "hidden_size": 256, "intermediate_size": 2048});
    add_model(&directory.path().join("model"), &Directory::random_with(7, keys));
    std::fs::write(directory.path().join("texts.jsonl"), "{\"text\": \"ab\"}\n{\"text\": \"cd\"}\n").unwrap();
    let text_of = recipe("sft", "steps = 1", "kind = \"model\"").replace("held_out", "#");
    let path = write_recipe(directory.path(), &text_of);
    let (out, partial) = (directory.path().join("out"), directory.path().join("out.partial"));
    assert!(train(&path, &[]).status.success());
    let weights = |directory: &Path| std::fs::read(directory.join("model.safetensors")).unwrap();
    let (expected, model) = (weights(&out), weights(&directory.path().join("model")));
    assert_eq!(names(&out), names(&directory.path().join("model")));
    std::fs::remove_dir_all(&out).unwrap();
    for round in 0..8 {
        let mut running = start(&path, true);
        assert!(wait_for(&mut running, || partial.exists()));
        std::thread::sleep(Duration::from_millis(3 * round));
        running.kill().unwrap();
        running.wait().unwrap();
        assert!(weights(&directory.path().join("model")) == model);
        if out.exists() {
            // It was over before it was killed.
            assert!(weights(&out) == expected);
            std::fs::remove_dir_all(&out).unwrap();
            continue;
        }
        // What was cut off is in the way, and says so before anything is trained.
        let said = text(&train(&path, &["--resume"]).stderr);
        assert!(said.contains("out.partial: is in the way"), "{said}");
        std::fs::remove_dir_all(&partial).unwrap();
    }
    assert!(train(&path, &["--resume"]).status.success());
    assert!(weights(&out) == expected);
    load(&out);
    let said = text(&train(&path, &["--resume"]).stderr);
    assert!(said.contains("out: is there already"), "{said}");
}
