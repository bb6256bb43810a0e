//! `gemmoe mix`: its plan, its JSON, what it says when something is wrong, and what is left when it is ended.
#![cfg(feature = "cli")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Directory, load, repository};
use serde_json::{Value, json};

fn gemmoe(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemmoe"));
    command.args(arguments).env("NO_COLOR", "1");
    command
}

fn demo_model() -> PathBuf {
    repository().join("examples/demo-model")
}

/// A recipe that takes the demo model apart and puts it together again, in another order.
fn write_recipe(directory: &Path, tail: &str) -> PathBuf {
    let demo = demo_model();
    let experts: String = [2, 0, 3]
        .iter()
        .map(|expert| {
            format!("[[experts]]\nmodel = {:?}\nexpert = {expert}\nname = \"e{expert}\"\n", demo.display().to_string())
        })
        .collect();
    let path = directory.join("recipe.toml");
    std::fs::write(&path, format!("{experts}{tail}")).unwrap();
    path
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_check_says_what_would_be_made_and_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let recipe = write_recipe(directory.path(), "[router]\nmethod = \"normal\"\nscale = 0.5");
    let target = directory.path().join("mixed");
    let arguments = ["mix", recipe.to_str().unwrap(), "--out", target.to_str().unwrap()];
    let output = gemmoe(&[&arguments[..], &["--check"]].concat());
    let plan = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in [
        "experts, of which each token is sent to 2:",
        "e3",
        ", expert 3",
        "everything else is their mean: 33.3 %, 33.3 %, 33.3 %",
        "routers: normal, scale 0.5",
        "BF16",
        "all checks passed; nothing was written",
    ] {
        assert!(plan.contains(part), "{plan}");
    }
    assert!(!target.exists());
    let json: Value =
        serde_json::from_slice(&gemmoe(&[&arguments[..], &["--check", "--json"]].concat()).stdout).unwrap();
    assert_eq!(json["written"], json!(false));
    assert!(!target.exists());

    let written = gemmoe(&[&arguments[..], &["--json"]].concat());
    let written: Value = serde_json::from_slice(&written.stdout).unwrap();
    assert_eq!(written["written"], json!(true));
    for key in ["parameters", "active_parameters", "bytes_read", "bytes_written", "experts", "base", "router", "dtypes"]
    {
        assert_eq!(written[key], json[key], "{key}");
    }
    assert_eq!(
        written["experts"][0],
        json!({"name": "e2", "model": demo_model().display().to_string(), "expert": 2, "text_tokens": null})
    );
    assert_eq!((&written["router"]["method"], &written["scratch_bytes"]), (&json!("normal"), &json!(0)));
    let file = std::fs::metadata(target.join("model.safetensors")).unwrap().len();
    let bytes = written["bytes_written"].as_u64().unwrap();
    assert!(bytes <= file && file < bytes + 20_000);
    assert_eq!(load(&target).config().num_local_experts, 3);
}

#[test]
fn texts_of_the_experts_are_counted_and_the_mean_is_run() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("text.txt"), "The reason for this is that it is not.").unwrap();
    let recipe = write_recipe(directory.path(), "[router]\nmethod = \"ridge\"\n[quantize]\nexperts = \"int4\"");
    let tail = std::fs::read_to_string(&recipe)
        .unwrap()
        .replace("name = ", "texts = \"text.txt\"\nprompts = \"Hello\"\nname = ");
    std::fs::write(&recipe, tail).unwrap();
    let target = directory.path().join("mixed");
    let output = gemmoe(&["mix", recipe.to_str().unwrap(), "--out", target.to_str().unwrap()]);
    let plan = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for part in ["tokens of text", "for a while", "quantised", "The root mean square of the error", "written to "] {
        assert!(plan.contains(part), "{plan}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 3);
    load(&target);
}

#[test]
fn what_is_wrong_is_said_with_the_recipes_line() {
    let directory = tempfile::tempdir().unwrap();
    let recipe = write_recipe(directory.path(), "[router]\nmethd = \"normal\"");
    let target = directory.path().join("mixed");
    let output = gemmoe(&["mix", recipe.to_str().unwrap(), "--out", target.to_str().unwrap()]);
    let expected = format!(
        "gemmoe: {}: line 14: \"router.methd\" is no key of a recipe: is \"method\" meant?\n",
        recipe.display()
    );
    assert_eq!((output.status.code(), text(&output.stderr)), (Some(1), expected));
    assert!(output.stdout.is_empty());
    let help = text(&gemmoe(&["mix", "--help"]).stdout);
    for part in ["[[experts]]", "--out <DIR>", "--check", "--json"] {
        assert!(help.contains(part), "{help}");
    }
}

/// A recipe of models that take a while, with the directory they are in.
#[cfg(unix)]
fn long_recipe(directory: &Path, method: &str) -> (PathBuf, Vec<u8>) {
    let source = directory.join("moe");
    std::fs::create_dir(&source).unwrap();
    Directory::random_with(45, json!({"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 320}))
        .write(&source);
    std::fs::write(source.join("tokenizer.json"), tokenizer::sample().to_string()).unwrap();
    let expert = |number| {
        format!("[[experts]]\nmodel = \"moe\"\nexpert = {number}\nname = \"{number}\"\nprompts = \"h{number}\"\n")
    };
    let recipe = directory.join("recipe.toml");
    let experts: String = (0..4).map(expert).collect();
    std::fs::write(&recipe, format!("{experts}[router]\nmethod = \"{method}\"\n[quantize]\nexperts = \"int4\""))
        .unwrap();
    (recipe, std::fs::read(source.join("model.safetensors")).unwrap())
}

#[cfg(unix)]
#[path = "common/tokenizer.rs"]
#[allow(dead_code)]
mod tokenizer;

/// Waits for a path while a process runs.
#[cfg(unix)]
fn wait_for(path: &Path, running: &mut std::process::Child) {
    while !path.exists() {
        assert!(running.try_wait().unwrap().is_none(), "it was over before it could be ended");
        std::thread::yield_now();
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_mix_leaves_nothing_behind() {
    for (method, waits_for) in
        [("uniform", "mixed.partial"), ("hidden", "mixed.mean.partial"), ("hidden", "mixed.mean")]
    {
        let directory = tempfile::tempdir().unwrap();
        let (recipe, model) = long_recipe(directory.path(), method);
        let mut command = command(&["mix", recipe.to_str().unwrap(), "--threads", "1", "--out"]);
        let mut running =
            command.arg(directory.path().join("mixed")).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        wait_for(&directory.path().join(waits_for), &mut running);
        // SAFETY: the process is this one's child and has not been waited for.
        assert_eq!(unsafe { libc::kill(running.id() as i32, libc::SIGINT) }, 0);
        let output = running.wait_with_output().unwrap();
        let stderr = text(&output.stderr);
        assert!(output.status.code() == Some(1) && stderr.contains("cancelled"), "{:?}: {stderr}", output.status);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
        assert!(std::fs::read(directory.path().join("moe/model.safetensors")).unwrap() == model);
    }
}

#[cfg(unix)]
#[test]
fn a_killed_mix_leaves_the_target_absent_and_the_models_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (recipe, model) = long_recipe(directory.path(), "uniform");
    let (target, partial) = (directory.path().join("mixed"), directory.path().join("mixed.partial"));
    for round in 0..8 {
        let mut command = command(&["mix", recipe.to_str().unwrap(), "--threads", "1", "--out"]);
        let mut running = command.arg(&target).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        wait_for(&partial, &mut running);
        std::thread::sleep(std::time::Duration::from_millis(3 * round));
        running.kill().unwrap();
        running.wait().unwrap();
        assert!(!target.exists());
        assert!(std::fs::read(directory.path().join("moe/model.safetensors")).unwrap() == model);
        // What was cut off is in the way, and says so.
        let output = gemmoe(&["mix", recipe.to_str().unwrap(), "--out", target.to_str().unwrap()]);
        assert!(text(&output.stderr).contains("mixed.partial: is in the way"), "{}", text(&output.stderr));
        std::fs::remove_dir_all(&partial).unwrap();
    }
    let output = gemmoe(&["mix", recipe.to_str().unwrap(), "--out", target.to_str().unwrap()]);
    assert!(output.status.success());
    load(&target);
}
