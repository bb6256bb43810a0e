//! Small JSON values as a tree: what serde_json reads, with duplicate keys refused, sizes capped, memory that may
//! run out, and the place of a failure kept.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result, Status};

/// The longest string, in bytes between its quotes. Gemma's longest is under 200.
const MAX_STRING_BYTES: usize = 2048;

/// The deepest nesting. A tokenizer file has 6 levels.
const MAX_DEPTH: usize = 32;

/// Values in one tree. Gemma 2 has 249 added tokens of 7 members, Gemma 3 has 6,415.
const MAX_VALUES: usize = 1 << 18;

/// One JSON value.
#[derive(Debug, PartialEq)]
pub enum Json {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number that is not negative.
    Integer(u64),
    /// Any other number.
    Real(f64),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Json>),
    /// An object; no key occurs twice.
    Object(Vec<(String, Json)>),
}

impl Json {
    /// The member named `key` of an object.
    pub fn member(&self, key: &str) -> Option<&Json> {
        match self {
            Json::Object(members) => members.iter().find(|(name, _)| name == key).map(|(_, value)| value),
            _ => None,
        }
    }
}

impl fmt::Display for Json {
    /// What an error says was found.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Json::Null => f.write_str("null"),
            Json::Bool(value) => write!(f, "{value}"),
            Json::Integer(value) => write!(f, "{value}"),
            Json::Real(value) => write!(f, "{value}"),
            Json::Text(text) => f.write_str(&quoted(text)),
            Json::List(values) => write!(f, "a list of {}", values.len()),
            Json::Object(_) => f.write_str("an object"),
        }
    }
}

/// `text` in quotes for an error, with nothing a terminal would obey, and cut when it is long.
pub fn quoted(text: &str) -> String {
    const SHOWN: usize = 60;
    let cut = text.char_indices().nth(SHOWN).map_or(text.len(), |(at, _)| at);
    let dots = if cut < text.len() { "..." } else { "" };
    format!("{:?}{dots}", &text[..cut])
}

/// An error about the member at `key`; `sentence` goes on after the key.
pub fn refusal(status: Status, key: &str, sentence: impl fmt::Display) -> Error {
    Error::new(status, format!("{key} {sentence}")).at_key(key)
}

/// Refuses strings and nesting beyond what a tokenizer file needs, before the parser meets them.
///
/// serde_json keeps one string and one byte per level in buffers whose growth aborts when memory is out; after this
/// scan neither grows to 4 KiB. Bytes that are not JSON pass: the parser stops at the first of them.
pub fn check_outline(bytes: &[u8]) -> Result<()> {
    let mut depth = 0usize;
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'"' => {
                let start = at + 1;
                at = start;
                while at < bytes.len() && bytes[at] != b'"' {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                let length = at - start;
                if length > MAX_STRING_BYTES {
                    let text = format!("string of {length} bytes at byte {start}, expected at most {MAX_STRING_BYTES}");
                    return Err(Error::new(Status::TokenizerUnsupported, text));
                }
            }
            b'[' | b'{' => {
                depth += 1;
                if depth > MAX_DEPTH {
                    let text = format!("nesting of {depth} levels at byte {at}, expected at most {MAX_DEPTH}");
                    return Err(Error::new(Status::TokenizerUnsupported, text));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    Ok(())
}

/// What serde's own error cannot carry while a file is read: why it was refused, and at which key.
#[derive(Default)]
pub struct Reader {
    refusal: RefCell<Option<(Status, String)>>,
    /// The key of the failure, from the inside out: each level puts its part in front.
    key: RefCell<String>,
    values: Cell<usize>,
}

impl Reader {
    /// Ends the reading with `status`; `sentence` goes on after the key. Returns what serde wants to see.
    pub fn refuse<E: serde::de::Error>(&self, status: Status, sentence: impl Into<String>) -> E {
        self.refusal.borrow_mut().get_or_insert((status, sentence.into()));
        E::custom("refused")
    }

    /// As `refuse`, for an error made elsewhere.
    pub fn refuse_with<E: serde::de::Error>(&self, error: Error) -> E {
        self.refuse(error.status(), error.to_string())
    }

    /// If `result` is a failure, notes that it lies inside `part` (`.name` or `[index]`).
    pub fn within<T, E>(&self, result: StdResult<T, E>, part: impl FnOnce() -> String) -> StdResult<T, E> {
        if result.is_err() {
            self.key.borrow_mut().insert_str(0, &part());
        }
        result
    }

    /// Starts counting the values of a new tree.
    pub fn start_tree(&self) {
        self.values.set(0);
    }

    /// The library's error for serde_json's.
    pub fn into_error(self, error: serde_json::Error) -> Error {
        let key = self.key.into_inner();
        let key = key.trim_start_matches('.');
        let (status, sentence) = match self.refusal.into_inner() {
            Some(refusal) => refusal,
            None if error.is_data() => (Status::TokenizerUnsupported, format!("is not usable: {error}")),
            None => (Status::TokenizerSyntax, format!("is not valid JSON: {error}")),
        };
        if key.is_empty() {
            return Error::new(status, format!("the file {sentence}"));
        }
        refusal(status, key, sentence)
    }

    /// Reads an object of few members, each by `read_value`, which gets the member's name.
    pub fn members<'de, A: MapAccess<'de>>(
        &self,
        mut map: A,
        mut read_value: impl FnMut(&str, &mut A) -> StdResult<Json, A::Error>,
    ) -> StdResult<Json, A::Error> {
        let mut members: Vec<(String, Json)> = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            let part = || format!(".{}", name.escape_debug());
            if members.iter().any(|(earlier, _)| *earlier == name) {
                return self.within(Err(self.refuse(Status::TokenizerSyntax, "is there twice")), part);
            }
            // Finding a duplicate takes a walk over the earlier names; objects this library reads have at most 9.
            if members.len() == 64 {
                return Err(self.refuse(Status::TokenizerUnsupported, "has more than 64 members"));
            }
            let value = self.within(read_value(&name, &mut map), part)?;
            members.try_reserve(1).map_err(|_| self.no_memory())?;
            members.push((name, value));
        }
        Ok(Json::Object(members))
    }

    fn no_memory<E: serde::de::Error>(&self) -> E {
        self.refuse(Status::OutOfMemory, "does not fit in memory")
    }

    fn count_value<E: serde::de::Error>(&self) -> StdResult<(), E> {
        let count = self.values.get() + 1;
        self.values.set(count);
        if count <= MAX_VALUES {
            return Ok(());
        }
        Err(self.refuse(Status::TokenizerUnsupported, format!("holds more than {MAX_VALUES} values")))
    }
}

/// The standard result; the short name is the library's own.
pub type StdResult<T, E> = std::result::Result<T, E>;

/// Reads one value into a tree.
#[derive(Clone, Copy)]
pub struct Tree<'r>(pub &'r Reader);

impl<'de> DeserializeSeed<'de> for Tree<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> StdResult<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Tree<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> StdResult<Json, E> {
        Ok(Json::Null)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> StdResult<Json, E> {
        Ok(Json::Bool(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> StdResult<Json, E> {
        Ok(Json::Integer(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> StdResult<Json, E> {
        Ok(u64::try_from(value).map_or(Json::Real(value as f64), Json::Integer))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> StdResult<Json, E> {
        Ok(Json::Real(value))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> StdResult<Json, E> {
        Ok(Json::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> StdResult<Json, A::Error> {
        let mut values = Vec::new();
        loop {
            let part = || format!("[{}]", values.len());
            let Some(value) = self.0.within(list.next_element_seed(self), part)? else { break };
            self.0.count_value()?;
            values.try_reserve(1).map_err(|_| self.0.no_memory::<A::Error>())?;
            values.push(value);
        }
        Ok(Json::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> StdResult<Json, A::Error> {
        self.0.members(map, |_, map| {
            self.0.count_value()?;
            map.next_value_seed(self)
        })
    }
}

/// Reads past a value that has no effect here, an object or null.
pub struct Ignored;

impl<'de> DeserializeSeed<'de> for Ignored {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> StdResult<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Ignored {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object or null")
    }

    fn visit_unit<E: serde::de::Error>(self) -> StdResult<Json, E> {
        Ok(Json::Null)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> StdResult<Json, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Json::Null)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Json> {
        check_outline(text.as_bytes())?;
        let reader = Reader::default();
        let mut parser = serde_json::Deserializer::from_str(text);
        let result = Tree(&reader).deserialize(&mut parser).and_then(|tree| parser.end().map(|()| tree));
        result.map_err(|error| reader.into_error(error))
    }

    #[test]
    fn every_kind_of_value_is_read() {
        let tree = read(r#"{"a": [null, true, 3, -3, 0.5, "x"], "b": {}}"#).unwrap();
        let list = vec![
            Json::Null,
            Json::Bool(true),
            Json::Integer(3),
            Json::Real(-3.0),
            Json::Real(0.5),
            Json::Text("x".into()),
        ];
        assert_eq!(tree.member("a"), Some(&Json::List(list)));
        assert_eq!(tree.member("b"), Some(&Json::Object(Vec::new())));
        assert_eq!(tree.member("c"), None);
    }

    #[test]
    fn a_failure_names_its_place() {
        let cases = [
            (r#"{"a": {"b": [1, {"c": 1, "c": 2}]}}"#, Status::TokenizerSyntax, Some("a.b[1].c")),
            (r#"{"a": {"b": [1, }"#, Status::TokenizerSyntax, Some("a.b[1]")),
            (r#"{"a": 1"#, Status::TokenizerSyntax, None),
            ("{} {}", Status::TokenizerSyntax, None),
            ("", Status::TokenizerSyntax, None),
        ];
        for (text, status, key) in cases {
            let error = read(text).unwrap_err();
            assert_eq!((error.status(), error.key()), (status, key), "{text}: {error}");
        }
    }

    #[test]
    fn a_tree_beyond_its_limits_is_refused() {
        let too_many_members = (0..65).map(|n| format!("\"{n}\":0")).collect::<Vec<_>>().join(",");
        let cases = [
            ("string", format!("\"{}\"", "x".repeat(MAX_STRING_BYTES + 1))),
            ("unfinished string", format!("\"{}", "x".repeat(MAX_STRING_BYTES + 1))),
            ("depth", "[".repeat(MAX_DEPTH + 1)),
            ("values", format!("[{}0]", "0,".repeat(MAX_VALUES))),
            ("members", format!("{{{too_many_members}}}")),
        ];
        for (name, text) in cases {
            assert_eq!(read(&text).unwrap_err().status(), Status::TokenizerUnsupported, "{name}");
        }
        assert!(read(&format!("\"{}\"", "x".repeat(MAX_STRING_BYTES))).is_ok());
        assert!(read(&format!("{}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH))).is_ok());
        assert!(read(&format!("[\"{}\"]", r#"\\\"["#.repeat(40))).is_ok(), "brackets in strings do not nest");
    }

    #[test]
    fn quoted_text_is_short_and_harmless() {
        assert_eq!(quoted("a\u{1b}[2J"), r#""a\u{1b}[2J""#);
        assert_eq!(quoted(&"é".repeat(100)).chars().count(), 60 + 2 + 3);
    }
}
