//! The committed header is what cbindgen generates from `src/ffi`. `GEMMOE_WRITE_HEADER=1` (`make header`) writes it.

mod common;

use common::repository;

#[test]
fn the_committed_header_is_the_generated_one() {
    let root = repository();
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut builder = cbindgen::Builder::new().with_config(config);
    // Only what makes up the ABI, in the order a host meets it.
    builder = builder.with_src(root.join("src/error.rs"));
    const FILES: [&str; 15] = [
        "version", "error", "load", "model", "text", "chat", "budget", "session", "plan", "generate", "grammar",
        "experts", "snapshot", "metrics", "batch",
    ];
    for file in FILES {
        builder = builder.with_src(root.join(format!("src/ffi/{file}.rs")));
    }
    let bindings = builder.generate().unwrap();
    let mut generated = Vec::new();
    bindings.write(&mut generated);
    let generated = without_safety_sections(&String::from_utf8(generated).unwrap());
    let path = root.join("include/gemmoe.h");
    if std::env::var_os("GEMMOE_WRITE_HEADER").is_some() {
        std::fs::write(&path, &generated).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(committed == generated, "include/gemmoe.h is out of date: run `make header`");
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
