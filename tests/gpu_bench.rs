//! The bench on a GPU, run where there is none: the shim is its driver. Its figures then say nothing, but all are there.

mod common;
#[path = "common/shim.rs"]
mod shim;

use std::path::Path;
use std::process::{Command, Output};

use common::repository;
use serde_json::Value;

/// The program with the shim as its driver; none without a C++ compiler.
fn bench(arguments: &[&str]) -> Option<Output> {
    let library = shim::library()?;
    let mut program = Command::new(env!("CARGO_BIN_EXE_gpu-bench"));
    program.env("LD_LIBRARY_PATH", library.parent().unwrap()).args(arguments);
    Some(program.output().unwrap())
}

fn printed(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}

/// Builds the library that stands for cuBLAS, whose products answer a status.
fn make_cublas(folder: &Path, answer: u32) {
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", &format!("-DANSWER={answer}"), "-o"]).arg(folder.join("libcublas.so.12"));
    assert!(compiler.arg(repository().join("tests/gpu_bench/cublas.c")).status().unwrap().success());
}

/// Every number in a value is positive, but for those of these names.
fn check_positive(value: &Value, name: &str) {
    match value {
        Value::Object(members) => members.iter().for_each(|(name, value)| check_positive(value, name)),
        Value::Array(items) => items.iter().for_each(|item| check_positive(item, name)),
        Value::Number(number) => assert!(number.as_f64().unwrap() > 0.0 || name == "context", "{name}: {number}"),
        _ => {}
    }
}

#[test]
fn every_figure_is_there_and_positive_and_the_report_says_that_it_is_not_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    make_cublas(folder.path(), 0);
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (json, svg, cublas) = (path("figures.json"), path("figures.svg"), path(""));
    let mut arguments = vec!["--geometry", "tiny", "--format", "int4", "--batch", "1,2,8", "--cublas", &cublas];
    arguments.extend(["--steps", "2", "--json", &json, "--svg", &svg]);
    let Some(output) = bench(&arguments) else { return };
    let (text, progress) = printed(&output);
    assert!(output.status.success(), "{text}{progress}");
    for words in [
        "NOT A GPU",
        "Roofs",
        "copies of",
        "reads of",
        "mma.sync on registers, int8",
        "libcublas.so.12",
        "int4, 0.00 GB of weights",
        "Steps:",
        "80 % of copy: ",
        "4 times one session: ",
        "Kernels of a step of 1 at 40",
        "Kernels of a step of 8 at 40",
        "Kernels of a prompt of 32",
        "Prompts:",
    ] {
        assert!(text.contains(words), "no {words:?} in\n{text}");
    }
    assert!(!text.contains("Not measured"), "{text}");

    let report: Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    check_positive(&report, "");
    assert_eq!(report["machine"]["is_gpu"], false);
    assert_eq!(report["roofs"]["cublas"].as_array().unwrap().len(), 2);
    let format = &report["formats"][0];
    let rows = |name: &str| format[name].as_array().unwrap().clone();
    // Three batches at two contexts; steps of 1 and 8, and a prompt.
    assert_eq!((rows("steps").len(), rows("kernels").len(), rows("prefill").len()), (6, 3, 2));
    for step in rows("steps") {
        let touched = step["touched_experts"].as_f64().unwrap();
        assert!((2.0..=4.0).contains(&touched), "{touched} experts");
        assert!(step["p95_ms"].as_f64() >= step["median_ms"].as_f64());
    }
    // What every kernel that reads weights must move is known, by its name and grid.
    for stage in rows("kernels") {
        let kernels = stage["kernels"].as_array().unwrap();
        let reads_weights = |kernel: &&Value| {
            let name = kernel["kernel"].as_str().unwrap();
            ["matmul", "gate_up", "down"].iter().any(|family| name.starts_with(family))
        };
        let of_weights: Vec<&Value> = kernels.iter().filter(reads_weights).collect();
        assert!(of_weights.len() >= 5, "{stage}");
        assert!(of_weights.iter().all(|kernel| kernel["gb_per_s"].is_number()), "{stage}");
    }
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n") && svg.matches("<rect").count() > 10, "{svg}");
}

#[test]
fn formats_that_do_not_fit_are_skipped_with_a_sentence() {
    // The real sizes, of which only headers are made; the shim has four gigabytes.
    for (geometry, sentences) in [
        ("gemmoe", ["bf16: 55.1 GB of weights", "int8: 29.3 GB of weights", "int4: 15.5 GB of weights"]),
        ("gemmoe8", ["bf16: 105.9 GB of weights", "int8: 56.2 GB of weights", "int4: 29.8 GB of weights"]),
        ("dense", ["bf16: 17.1 GB of weights", "int8: 9.1 GB of weights", "int4: 4.8 GB of weights"]),
    ] {
        let Some(output) = bench(&["--geometry", geometry, "--only", "steps"]) else { return };
        let (text, progress) = printed(&output);
        assert!(output.status.success(), "{text}{progress}");
        for sentence in sentences {
            assert!(text.contains(sentence) && text.contains("do not fit into the 4.3 GB that are free"), "{text}");
        }
    }
}

#[test]
fn what_fails_is_said_at_the_end_beside_what_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    make_cublas(folder.path(), 15);
    let arguments = ["--geometry", "tiny", "--only", "roofs", "--cublas", folder.path().to_str().unwrap()];
    let Some(output) = bench(&arguments) else { return };
    let (text, error) = printed(&output);
    assert!(!output.status.success() && error.contains("some measurements failed"), "{text}{error}");
    assert!(text.contains("reads of") && text.contains("cublasGemmEx failed with status 15"), "{text}");
}

#[test]
fn what_cannot_be_measured_is_refused_with_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    for (arguments, words) in [
        (["--batch", "0"], "--batch takes numbers from 1 to 65536"),
        (["--device", "3"], "device is 3, expected 0 to 0"),
        (["--cublas", folder.path().to_str().unwrap()], "there is no cuBLAS that can be loaded in"),
        (["--chunk", "1"], "--chunk at least the largest batch"),
    ] {
        let Some(output) = bench(&[&["--geometry", "tiny"][..], &arguments].concat()) else { return };
        let (text, error) = printed(&output);
        assert!(!output.status.success() && error.contains(words), "{arguments:?}: {text}{error}");
    }
}
