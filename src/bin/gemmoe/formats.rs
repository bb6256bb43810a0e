//! Formats of weights as the user names them.

use gemmoe::Formats;
use gemmoe::model::quantization::PARTS;
use gemmoe::quant::{Format, GROUP_SIZES, Groups, ScaleDtype};
use serde_json::{Value, json};

/// The formats that weights are rounded to.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum FormatName {
    /// 8 bits a weight.
    Int8,
    /// 4 bits a weight.
    Int4,
    /// As they are.
    Stored,
}

impl FormatName {
    /// The format with these groups; none for weights that stay as they are.
    pub fn format(self, groups: Groups) -> Option<Format> {
        match self {
            FormatName::Int8 => Some(Format::Int8(groups)),
            FormatName::Int4 => Some(Format::Int4(groups)),
            FormatName::Stored => None,
        }
    }
}

/// Reads `experts=int4,attention=int8,head=int8,embedding=int8,group-size=64,scales=f16`, each at most once, in any order, and
/// at least one part of a model among them.
pub fn parse_formats(text: &str) -> Result<Formats, String> {
    let mut groups = Groups { size: 32, scales: ScaleDtype::Bf16 };
    let (mut keys, mut parts) = (Vec::new(), Vec::new());
    for item in text.split(',') {
        let (key, value) = item.split_once('=').ok_or_else(|| format!("{item:?} is not KEY=VALUE"))?;
        if keys.contains(&key) {
            return Err(format!("{key} is there twice"));
        }
        keys.push(key);
        let expected = |expected: &str| format!("{key} is {value:?}, expected {expected}");
        match key {
            "group-size" => groups.size = parse_group_size(value).map_err(|_| expected("32, 64 or 128"))?,
            "scales" => groups.scales = parse_scales(value).map_err(|_| expected("bf16 or f16"))?,
            "experts" | "attention" | "head" | "embedding" => match value {
                "int8" => parts.push((key, FormatName::Int8)),
                "int4" => parts.push((key, FormatName::Int4)),
                _ => return Err(expected("int8 or int4")),
            },
            _ => return Err(format!("{key:?} is not experts, attention, head, embedding, group-size or scales")),
        }
    }
    if parts.is_empty() {
        return Err("nothing is to be quantised: give experts, attention, head or embedding a format".to_owned());
    }
    let format = |part: &str| parts.iter().find(|(key, _)| *key == part).and_then(|(_, name)| name.format(groups));
    Ok(Formats {
        experts: format("experts"),
        attention: format("attention"),
        head: format("head"),
        embedding: format("embedding"),
    })
}

/// Weights that share a scale.
pub fn parse_group_size(text: &str) -> Result<usize, String> {
    let size = GROUP_SIZES.into_iter().find(|size| size.to_string() == text);
    size.ok_or_else(|| "expected 32, 64 or 128".to_owned())
}

/// What scales are stored as.
pub fn parse_scales(text: &str) -> Result<ScaleDtype, String> {
    let scales = ScaleDtype::ALL.into_iter().find(|scales| scales.name() == text);
    scales.ok_or_else(|| "expected bf16 or f16".to_owned())
}

/// What the parts of a model are held in, for people: `int8 (groups of 32, bf16 scales): attention, head, embedding; ...`.
pub fn parts(formats: &Formats) -> String {
    let name = |format: Option<Format>| format.map_or("several formats".to_owned(), |format| format.to_string());
    let mut groups: Vec<(Option<Format>, Vec<&str>)> = Vec::new();
    for (part, format) in PARTS.into_iter().zip(formats.parts()) {
        match groups.iter_mut().find(|(known, _)| *known == format) {
            Some((_, parts)) => parts.push(part),
            None => groups.push((format, vec![part])),
        }
    }
    let group = |(format, parts): (Option<Format>, Vec<&str>)| format!("{}: {}", name(format), parts.join(", "));
    groups.into_iter().map(group).collect::<Vec<_>>().join("; ")
}

/// The same as JSON; null for a part of several formats.
pub fn parts_json(formats: &Formats) -> Value {
    let part = |(name, format): (&str, Option<Format>)| {
        let groups = format.and_then(Format::groups);
        let format = format.map(|format| {
            json!({
                "format": format.name(),
                "group_size": groups.map(|groups| groups.size),
                "scales": groups.map(|groups| groups.scales.name()),
            })
        });
        (name.to_owned(), json!(format))
    };
    PARTS.into_iter().zip(formats.parts()).map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_are_read_in_any_order_and_each_once() {
        let formats = parse_formats("scales=f16,head=int8,experts=int4,group-size=64").unwrap();
        let groups = Groups { size: 64, scales: ScaleDtype::F16 };
        let expected = [Some(Format::Int4(groups)), None, Some(Format::Int8(groups)), None];
        assert_eq!([formats.experts, formats.attention, formats.head, formats.embedding], expected);
        for (text, part) in [
            ("experts=int4,head=int8,experts=int8", "experts is there twice"),
            ("group-size=64,scales=f16", "nothing is to be quantised"),
            ("experts=int5", "experts is \"int5\", expected int8 or int4"),
            ("experts", "\"experts\" is not KEY=VALUE"),
            ("router=int8", "\"router\" is not experts"),
        ] {
            let error = parse_formats(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
