//! What a directory made from another takes over from it beside the weights: small files, and config.json with some keys
//! changed.

use serde_json::{Value, json};

use super::checkpoint::Checkpoint;
use super::config;
use super::json::UniqueMembers;
use super::writer::ModelWriter;
use crate::error::{Error, Result, Status};

/// Files that are copied where they are there, and the largest that are.
pub const FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
];
/// The largest of them that are copied, in bytes.
pub const MAX_BYTES: u64 = 64 << 20;

/// Copies those of `names` that are there.
pub fn copy(names: &[&str], checkpoint: &Checkpoint, writer: &ModelWriter) -> Result<()> {
    for name in names {
        if let Some(bytes) = checkpoint.read_small_file(name, MAX_BYTES)? {
            writer.write_file(name, &bytes)?;
        }
    }
    Ok(())
}

/// The bytes of a directory's config.json, which must be there.
pub fn read_config(checkpoint: &Checkpoint, directory: &std::path::Path) -> Result<Vec<u8>> {
    checkpoint.read_small_file(config::FILE, config::MAX_BYTES)?.ok_or_else(|| {
        Error::new(Status::FileNotFound, format!("not found in {}", directory.display())).in_file(config::FILE)
    })
}

/// Whether a config.json has a key.
pub fn has_key(bytes: &[u8], key: &str) -> Result<bool> {
    Ok(members(bytes)?.iter().any(|(name, _)| name == key))
}

fn members(bytes: &[u8]) -> Result<Vec<(String, Value)>> {
    let unread =
        |error| Error::new(Status::ConfigSyntax, format!("not a valid JSON object: {error}")).in_file(config::FILE);
    Ok(serde_json::from_slice::<UniqueMembers<Value>>(bytes).map_err(unread)?.0)
}

/// A config.json with all keys of another in their order, and some changed, added where there is a value, or taken out.
pub fn changed_config(bytes: &[u8], changes: Vec<(&str, Option<Value>)>) -> Result<Vec<u8>> {
    let mut members = members(bytes)?;
    for (key, value) in changes {
        let place = members.iter().position(|(name, _)| name == key);
        match (place, value) {
            (Some(place), Some(value)) => members[place].1 = value,
            (Some(place), None) => drop(members.remove(place)),
            (None, Some(value)) => members.push((key.to_owned(), value)),
            (None, None) => {}
        }
    }
    let lines =
        members.iter().map(|(key, value)| format!("  {}: {}", json!(key), format!("{value:#}").replace('\n', "\n  ")));
    Ok(format!("{{\n{}\n}}\n", lines.collect::<Vec<_>>().join(",\n")).into_bytes())
}
