//! The committed headers are what cbindgen generates: the hosts' from `src/ffi`, the kernels' from `src/backend/cuda`.
//! `GEMMOE_WRITE_HEADER=1` (`make header`) writes them.

mod common;

use common::repository;

#[test]
fn the_committed_header_is_the_generated_one() {
    let root = repository();
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    // Only what makes up the ABI, in the order a host meets it.
    builder = builder.with_src(root.join("src/error.rs"));
    const FILES: [&str; 19] = [
        "version",
        "error",
        "device",
        "load",
        "model",
        "residency",
        "router_patch",
        "text",
        "chat",
        "budget",
        "session",
        "plan",
        "generate",
        "grammar",
        "experts",
        "snapshot",
        "metrics",
        "batch",
        "mix",
    ];
    for file in FILES {
        builder = builder.with_src(root.join(format!("src/ffi/{file}.rs")));
    }
    check_or_write("include/gemmoe.h", builder);
}

#[test]
fn the_kernels_are_given_what_rust_hands_over() {
    let root = repository();
    let config = cbindgen::Config::from_file(root.join("kernels/cbindgen.toml")).unwrap();
    let builder = cbindgen::Builder::new().with_config(config).with_src(root.join("src/backend/cuda/arguments.rs"));
    let structs = [
        "EmbedArguments",
        "NormArguments",
        "RoundArguments",
        "MatmulArguments",
        "RotateArguments",
        "AttentionArguments",
        "RouteArguments",
        "GroupArguments",
        "ExpertArguments",
        "CombineArguments",
        "LogSoftmaxArguments",
        "CandidateArguments",
        "FillArguments",
        "ReadArguments",
        "MmaRateArguments",
    ];
    check_or_write(
        "kernels/arguments.h",
        structs.into_iter().fold(builder, |builder, name| builder.include_item(name)),
    );
}

fn check_or_write(file: &str, builder: cbindgen::Builder) {
    let mut generated = Vec::new();
    builder.generate().unwrap().write(&mut generated);
    let generated = without_safety_sections(&String::from_utf8(generated).unwrap());
    let path = repository().join(file);
    if std::env::var_os("GEMMOE_WRITE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "{file} is out of date: run `make header`");
}

/// Rust asks for a Safety section on every unsafe function; in C it would say nothing.
fn without_safety_sections(header: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut skipping = false;
    for line in header.lines() {
        if line.trim() == "* # Safety" {
            skipping = true;
            while kept.last().is_some_and(|line| line.trim() == "*") {
                kept.pop();
            }
        }
        skipping &= line.trim() != "*/";
        if !skipping {
            kept.push(line.trim_end());
        }
    }
    kept.join("\n") + "\n"
}
