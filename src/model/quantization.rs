//! `quantization_config` in config.json: what the parts of a quantised directory are stored in. `docs/format.md` says it
//! for readers in other languages.

use safetensors::Dtype;
use serde_json::{Map, Value, json};

use super::formats::Formats;
use crate::quant::{Format, GROUP_SIZES, Groups, ScaleDtype};

/// The key in config.json.
pub const KEY: &str = "quantization_config";

/// `quant_method` of this library's files.
const METHOD: &str = "gemmoe";

/// The version of the format that this library reads and writes.
const VERSION: u64 = 1;

/// What a directory's matrices were rounded to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quantization {
    /// What weights were before: BF16, F16 or F32.
    pub source_dtype: Dtype,
    /// The quantised parts; a part without a format is stored as it was.
    pub formats: Formats,
}

/// What is wrong with a `quantization_config`.
pub enum Fault {
    /// It is another library's, or of a version to come: (key, what this library runs).
    Unsupported(String, String),
    /// A key of ours with a value it cannot have: (key, expected).
    Value(String, String),
}

/// The parts a format can be given for, by their names in files and for people.
pub const PARTS: [&str; 4] = ["experts", "attention", "head", "embedding"];

impl Formats {
    /// The formats in the order of PARTS.
    pub fn parts(&self) -> [Option<Format>; 4] {
        [self.experts, self.attention, self.head, self.embedding]
    }

    /// The formats of parts in the order of PARTS.
    pub fn from_parts([experts, attention, head, embedding]: [Option<Format>; 4]) -> Formats {
        Formats { experts, attention, head, embedding }
    }
}

impl Quantization {
    /// Reads the value of `quantization_config`.
    pub fn from_json(value: &Value) -> Result<Quantization, Fault> {
        let inside = |key: &str| format!("{KEY}.{key}");
        let supported = format!("models without it (null) or with \"quant_method\" \"{METHOD}\"");
        let other = || Fault::Unsupported(KEY.to_owned(), supported.clone());
        let members = value.as_object().ok_or_else(other)?;
        if members.get("quant_method").and_then(Value::as_str) != Some(METHOD) {
            return Err(other());
        }
        if members.get("version").and_then(Value::as_u64) != Some(VERSION) {
            let runs = format!("version {VERSION} of \"{METHOD}\" files: a newer library may read this one");
            return Err(Fault::Unsupported(inside("version"), runs));
        }
        let known = |key: &str| ["quant_method", "version", "source_dtype"].contains(&key) || PARTS.contains(&key);
        if let Some(key) = members.keys().find(|key| !known(key)) {
            return Err(Fault::Value(inside(key), format!("source_dtype or one of {}", PARTS.join(", "))));
        }
        let source_dtype = match members.get("source_dtype").and_then(Value::as_str) {
            Some("bf16") => Dtype::BF16,
            Some("f16") => Dtype::F16,
            Some("f32") => Dtype::F32,
            _ => return Err(Fault::Value(inside("source_dtype"), "\"bf16\", \"f16\" or \"f32\"".to_owned())),
        };
        let mut parts = [None; 4];
        for (part, name) in parts.iter_mut().zip(PARTS) {
            *part = members.get(name).map(|value| format_from_json(&inside(name), value)).transpose()?;
        }
        if parts == [None; 4] {
            return Err(Fault::Value(KEY.to_owned(), format!("the format of at least one of {}", PARTS.join(", "))));
        }
        Ok(Quantization { source_dtype, formats: Formats::from_parts(parts) })
    }

    /// The value of `quantization_config`.
    pub fn to_json(&self) -> Value {
        let source_dtype = Format::of_dtype(self.source_dtype).map_or("f32", Format::name);
        let mut members = Map::new();
        members.insert("quant_method".to_owned(), json!(METHOD));
        members.insert("version".to_owned(), json!(VERSION));
        members.insert("source_dtype".to_owned(), json!(source_dtype));
        for (name, format) in PARTS.iter().zip(self.formats.parts()) {
            if let Some(Groups { size, scales }) = format.and_then(Format::groups) {
                let name = (*name).to_owned();
                let format = format.map(Format::name);
                members.insert(name, json!({"format": format, "group_size": size, "scales": scales.name()}));
            }
        }
        Value::Object(members)
    }
}

/// Reads `{"format": "int4", "group_size": 32, "scales": "bf16"}`, all of it and nothing else.
fn format_from_json(key: &str, value: &Value) -> Result<Format, Fault> {
    let expected = "{\"format\": \"int4\" or \"int8\", \"group_size\": 32, 64 or 128, \"scales\": \"bf16\" or \"f16\"}";
    let read = || {
        let members = value.as_object().filter(|members| members.len() == 3)?;
        let size = members.get("group_size")?.as_u64()?;
        let size = GROUP_SIZES.into_iter().find(|known| *known as u64 == size)?;
        let scales = members.get("scales")?.as_str()?;
        let scales = ScaleDtype::ALL.into_iter().find(|known| known.name() == scales)?;
        match members.get("format")?.as_str()? {
            "int8" => Some(Format::Int8(Groups { size, scales })),
            "int4" => Some(Format::Int4(Groups { size, scales })),
            _ => None,
        }
    };
    read().ok_or_else(|| Fault::Value(key.to_owned(), expected.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_comes_back_as_it_was_written() {
        let mut formats = vec![None];
        for size in GROUP_SIZES {
            for scales in ScaleDtype::ALL {
                formats
                    .extend([Some(Format::Int8(Groups { size, scales })), Some(Format::Int4(Groups { size, scales }))]);
            }
        }
        for (index, source_dtype) in [Dtype::BF16, Dtype::F16, Dtype::F32].into_iter().cycle().take(60).enumerate() {
            let parts = [1, 2, 3, 5].map(|step| formats[(1 + index * step) % formats.len()]);
            if parts == [None; 4] {
                continue;
            }
            let written = Quantization { source_dtype, formats: Formats::from_parts(parts) };
            let read = Quantization::from_json(&written.to_json());
            assert_eq!(read.ok(), Some(written));
        }
    }
}
