//! `tokenizer.json`, read in one pass and checked to be of the shape Gemma's has.
//!
//! Only the shape is judged here, and what can be said of a vocabulary entry or merge by itself; how they fit together
//! is `tokenizer.rs`. Nothing in the file is run: no pattern of it is compiled, and steps are accepted only if they
//! are exactly those this library does in code.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result, Status};

use super::json_tree::{Ignored, Json, Reader, StdResult, Tree, check_outline, quoted, refusal};
use super::vocabulary::Vocabulary;

/// The largest file accepted. Gemma's has 17.5 MB.
const MAX_FILE_BYTES: usize = 64 << 20;

/// The most merges accepted. Gemma has 580,604.
const MAX_MERGES: usize = 1 << 22;

/// The longest added token in bytes, which bounds how far a search looks ahead. Gemma's longest has 90.
const MAX_ADDED_TOKEN_BYTES: usize = 128;

/// What stands for a space inside a vocabulary.
pub const SPACE_MARK: char = '\u{2581}';

/// The parts of a tokenizer file that matter.
pub struct TokenizerFile {
    /// `model.vocab`.
    pub vocabulary: Vocabulary,
    /// `model.merges`.
    pub merges: MergeTexts,
    /// `added_tokens`, in the order of the file.
    pub added_tokens: Vec<AddedToken>,
    /// `model.unk_token`. With a token for every byte it is never produced.
    pub unknown_token: Option<String>,
}

/// One of `added_tokens`.
#[derive(Clone, Debug, PartialEq)]
pub struct AddedToken {
    /// Its id; below 2^32, and not yet compared with the vocabulary.
    pub id: u64,
    /// What text is matched with it.
    pub content: String,
    /// Whether only trusted text may produce it.
    pub special: bool,
}

/// The two sides of every merge, one text after the other.
#[derive(Default)]
pub struct MergeTexts {
    text: String,
    /// Where each side ends: left, right, left, right ...
    ends: Vec<u32>,
}

impl MergeTexts {
    /// How many merges there are.
    pub fn count(&self) -> usize {
        self.ends.len() / 2
    }

    /// The sides of merge `index`, which is below `count`.
    pub fn sides(&self, index: usize) -> (&str, &str) {
        let start = if index == 0 { 0 } else { self.ends[2 * index - 1] as usize };
        let (middle, end) = (self.ends[2 * index] as usize, self.ends[2 * index + 1] as usize);
        (&self.text[start..middle], &self.text[middle..end])
    }

    fn push(&mut self, left: &str, right: &str) -> Result<()> {
        let length = left.len() + right.len();
        let no_memory = || Error::out_of_memory("merges", length);
        self.text.try_reserve(length).map_err(|_| no_memory())?;
        self.ends.try_reserve(2).map_err(|_| no_memory())?;
        for side in [left, right] {
            self.text.push_str(side);
            self.ends.push(u32::try_from(self.text.len()).map_err(|_| no_memory())?);
        }
        Ok(())
    }
}

/// Reads and checks a tokenizer file for an embedding of `vocab_size` rows.
///
/// Fails with TokenizerSyntax, TokenizerUnsupported, TokenizerValue, FileTooLarge, InvalidArgument (a vocabulary
/// size out of range) or OutOfMemory; the error names the key.
pub fn parse(bytes: &[u8], vocab_size: usize) -> Result<TokenizerFile> {
    if bytes.len() > MAX_FILE_BYTES {
        let text = format!("tokenizer has {} bytes, expected at most {MAX_FILE_BYTES}", bytes.len());
        return Err(Error::new(Status::FileTooLarge, text));
    }
    check_outline(bytes)?;
    let mut vocabulary = Vocabulary::new(vocab_size)?;
    let mut merges = MergeTexts::default();
    let reader = Reader::default();
    let mut parser = serde_json::Deserializer::from_slice(bytes);
    let root = Root { reader: &reader, vocabulary: &mut vocabulary, merges: &mut merges };
    let tree = root.deserialize(&mut parser).and_then(|tree| parser.end().map(|()| tree));
    let tree = tree.map_err(|error| reader.into_error(error))?;

    let root = Place { key: String::new(), value: Some(&tree) };
    check_steps(&root)?;
    let unknown_token = check_model(&root.member("model"))?;
    let added_tokens = read_added_tokens(&root.member("added_tokens"))?;
    Ok(TokenizerFile { vocabulary, merges, added_tokens, unknown_token })
}

/// Reads the whole file: `vocab` and `merges` to where they belong, the rest as a small tree.
struct Root<'r> {
    reader: &'r Reader,
    vocabulary: &'r mut Vocabulary,
    merges: &'r mut MergeTexts,
}

impl<'de> DeserializeSeed<'de> for Root<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> StdResult<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Root<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> StdResult<Json, A::Error> {
        self.reader.members(map, |name, map| {
            self.reader.start_tree();
            match name {
                "model" => map.next_value_seed(Model(Root {
                    reader: self.reader,
                    vocabulary: self.vocabulary,
                    merges: self.merges,
                })),
                "post_processor" | "truncation" | "padding" => map.next_value_seed(Ignored),
                _ => map.next_value_seed(Tree(self.reader)),
            }
        })
    }
}

/// Reads `model`.
struct Model<'r>(Root<'r>);

impl<'de> DeserializeSeed<'de> for Model<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> StdResult<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Model<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> StdResult<Json, A::Error> {
        let Root { reader, vocabulary, merges } = self.0;
        reader.members(map, |name, map| match name {
            "vocab" => map.next_value_seed(VocabularyEntries { reader, vocabulary: &mut *vocabulary }),
            "merges" => map.next_value_seed(Merges { reader, merges: &mut *merges }),
            _ => map.next_value_seed(Tree(reader)),
        })
    }
}

/// Reads `model.vocab` into the vocabulary; the tree gets an empty object.
struct VocabularyEntries<'r> {
    reader: &'r Reader,
    vocabulary: &'r mut Vocabulary,
}

impl<'de> DeserializeSeed<'de> for VocabularyEntries<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> StdResult<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for VocabularyEntries<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of pieces and their ids")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> StdResult<Json, A::Error> {
        while let Some(piece) = map.next_key::<String>()? {
            let entry = self
                .read_id(&mut map)
                .and_then(|id| self.vocabulary.insert(&piece, id).map_err(|error| self.reader.refuse_with(error)));
            self.reader.within(entry, || format!("[{}]", quoted(&piece)))?;
        }
        Ok(Json::Object(Vec::new()))
    }
}

impl VocabularyEntries<'_> {
    fn read_id<'de, A: MapAccess<'de>>(&self, map: &mut A) -> StdResult<u64, A::Error> {
        self.reader.start_tree();
        match map.next_value_seed(Tree(self.reader))? {
            Json::Integer(id) => Ok(id),
            other => Err(self.reader.refuse(Status::TokenizerValue, format!("is {other}, expected a token id"))),
        }
    }
}

/// Reads `model.merges` into their list; the tree gets an empty list.
struct Merges<'r> {
    reader: &'r Reader,
    merges: &'r mut MergeTexts,
}

impl<'de> DeserializeSeed<'de> for Merges<'_> {
    type Value = Json;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> StdResult<Json, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Merges<'_> {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of merges")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> StdResult<Json, A::Error> {
        loop {
            self.reader.start_tree();
            let index = self.merges.count();
            let part = || format!("[{index}]");
            let Some(merge) = self.reader.within(list.next_element_seed(Tree(self.reader)), part)? else { break };
            if index == MAX_MERGES {
                let text = format!("has more than {MAX_MERGES} merges");
                return Err(self.reader.refuse(Status::TokenizerUnsupported, text));
            }
            let Some((left, right)) = sides_of(&merge) else {
                let text = format!("is {merge}, expected two pieces, as \"a b\" or [\"a\", \"b\"]");
                return self.reader.within(Err(self.reader.refuse(Status::TokenizerValue, text)), part);
            };
            self.merges.push(left, right).map_err(|error| self.reader.refuse_with(error))?;
        }
        Ok(Json::List(Vec::new()))
    }
}

/// The sides of a merge in either of its two forms, neither of them empty.
fn sides_of(merge: &Json) -> Option<(&str, &str)> {
    let (left, right) = match merge {
        Json::Text(text) => text.split_once(' ').filter(|(_, right)| !right.contains(' '))?,
        Json::List(sides) => match sides.as_slice() {
            [Json::Text(left), Json::Text(right)] => (left.as_str(), right.as_str()),
            _ => return None,
        },
        _ => return None,
    };
    (!left.is_empty() && !right.is_empty()).then_some((left, right))
}

/// A value of the file, or its absence, with its key.
struct Place<'a> {
    key: String,
    value: Option<&'a Json>,
}

impl<'a> Place<'a> {
    fn member(&self, name: &str) -> Place<'a> {
        let key = if self.key.is_empty() { name.to_owned() } else { format!("{}.{name}", self.key) };
        Place { key, value: self.value.and_then(|value| value.member(name)) }
    }

    fn refuse(&self, expected: &str) -> Error {
        let found = self.value.map_or_else(|| "absent".to_owned(), Json::to_string);
        refusal(Status::TokenizerUnsupported, &self.key, format_args!("is {found}, expected {expected}"))
    }

    fn is_text(&self, expected: &str) -> bool {
        matches!(self.value, Some(Json::Text(text)) if text == expected)
    }

    fn is_nothing(&self) -> bool {
        matches!(self.value, None | Some(Json::Null))
    }

    fn is_false_or_absent(&self) -> bool {
        matches!(self.value, None | Some(Json::Bool(false)))
    }

    fn must_be_text(&self, expected: &str) -> Result<()> {
        if self.is_text(expected) { Ok(()) } else { Err(self.refuse(&quoted(expected))) }
    }

    fn must_be_true(&self) -> Result<()> {
        if matches!(self.value, Some(Json::Bool(true))) { Ok(()) } else { Err(self.refuse("true")) }
    }

    fn must_be_false_or_absent(&self) -> Result<()> {
        if self.is_false_or_absent() { Ok(()) } else { Err(self.refuse("false")) }
    }

    /// An object without members other than `names`: an option this library does not know might change ids.
    fn must_have_only(&self, names: &[&str]) -> Result<()> {
        let Some(Json::Object(members)) = self.value else { return Err(self.refuse("an object")) };
        match members.iter().find(|(name, _)| !names.contains(&name.as_str())) {
            None => Ok(()),
            Some((name, _)) => Err(self.member(&name.escape_debug().to_string()).refuse_unknown(names)),
        }
    }

    fn refuse_unknown(&self, names: &[&str]) -> Error {
        let sentence = format!("is not a known option, expected only {}", names.join(", "));
        refusal(Status::TokenizerUnsupported, &self.key, sentence)
    }

    /// The elements of a list of `length`, or of any length.
    fn elements(&self, length: Option<usize>) -> Result<impl Iterator<Item = Place<'a>>> {
        let expected = || length.map_or("a list".to_owned(), |length| format!("a list of {length}"));
        let values = match self.value {
            Some(Json::List(values)) if length.is_none_or(|length| length == values.len()) => values,
            _ => return Err(self.refuse(&expected())),
        };
        let key = self.key.clone();
        Ok(values
            .iter()
            .enumerate()
            .map(move |(index, value)| Place { key: format!("{key}[{index}]"), value: Some(value) }))
    }
}

/// Everything but the model and the added tokens.
fn check_steps(root: &Place) -> Result<()> {
    root.must_have_only(&[
        "version",
        "truncation",
        "padding",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
    ])?;
    let version = root.member("version");
    if version.value.is_some() {
        version.must_be_text("1.0")?;
    }

    let mut normalizer = root.member("normalizer");
    if normalizer.member("type").is_text("Sequence") {
        normalizer.must_have_only(&["type", "normalizers"])?;
        for only in normalizer.member("normalizers").elements(Some(1))? {
            normalizer = only;
        }
    }
    let mark = SPACE_MARK.to_string();
    check_replace(&normalizer, " ", &mark)?;
    check_pre_tokenizer(&root.member("pre_tokenizer"))?;

    let decoder = root.member("decoder");
    decoder.must_have_only(&["type", "decoders"])?;
    decoder.member("type").must_be_text("Sequence")?;
    for (index, step) in decoder.member("decoders").elements(Some(3))?.enumerate() {
        match index {
            0 => check_replace(&step, &mark, " ")?,
            1 => check_bare(&step, "ByteFallback")?,
            _ => check_bare(&step, "Fuse")?,
        }
    }
    Ok(())
}

fn check_replace(step: &Place, pattern: &str, content: &str) -> Result<()> {
    step.must_have_only(&["type", "pattern", "content"])?;
    step.member("type").must_be_text("Replace")?;
    step.member("pattern").must_have_only(&["String"])?;
    step.member("pattern").member("String").must_be_text(pattern)?;
    step.member("content").must_be_text(content)
}

fn check_bare(step: &Place, name: &str) -> Result<()> {
    step.must_have_only(&["type"])?;
    step.member("type").must_be_text(name)
}

/// None, or the split at spaces Gemma 2 has: it comes after the spaces were replaced, so it never splits.
fn check_pre_tokenizer(step: &Place) -> Result<()> {
    if step.is_nothing() {
        return Ok(());
    }
    step.must_have_only(&["type", "pattern", "behavior", "invert"])?;
    step.member("type").must_be_text("Split")?;
    step.member("pattern").must_have_only(&["String"])?;
    step.member("pattern").member("String").must_be_text(" ")?;
    step.member("behavior").must_be_text("MergedWithPrevious")?;
    step.member("invert").must_be_false_or_absent()
}

/// The model's options; returns the unknown token.
fn check_model(model: &Place) -> Result<Option<String>> {
    model.must_have_only(&[
        "type",
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "fuse_unk",
        "byte_fallback",
        "ignore_merges",
        "vocab",
        "merges",
    ])?;
    model.member("type").must_be_text("BPE")?;
    model.member("byte_fallback").must_be_true()?;
    model.member("ignore_merges").must_be_false_or_absent()?;
    // Without unknown characters there is nothing to fuse: both values mean the same.
    let fuse = model.member("fuse_unk");
    if !matches!(fuse.value, None | Some(Json::Bool(_))) {
        return Err(fuse.refuse("true or false"));
    }
    for name in ["dropout", "continuing_subword_prefix", "end_of_word_suffix"] {
        let option = model.member(name);
        if !option.is_nothing() {
            return Err(option.refuse("null"));
        }
    }
    for (name, expected) in [("vocab", "an object of pieces and their ids"), ("merges", "a list of merges")] {
        let part = model.member(name);
        if part.value.is_none() {
            return Err(part.refuse(expected));
        }
    }
    let unknown = model.member("unk_token");
    match unknown.value {
        None | Some(Json::Null) => Ok(None),
        Some(Json::Text(text)) => Ok(Some(text.clone())),
        Some(_) => Err(unknown.refuse("a piece or null")),
    }
}

fn read_added_tokens(list: &Place) -> Result<Vec<AddedToken>> {
    let mut tokens = Vec::new();
    if list.value.is_none() {
        return Ok(tokens);
    }
    for place in list.elements(None)? {
        let token = read_added_token(&place)?;
        tokens.try_reserve(1).map_err(|_| Error::out_of_memory("added tokens", size_of::<AddedToken>()))?;
        tokens.push(token);
    }
    Ok(tokens)
}

fn read_added_token(place: &Place) -> Result<AddedToken> {
    place.must_have_only(&["id", "content", "single_word", "lstrip", "rstrip", "normalized", "special"])?;
    let content = place.member("content");
    let Some(Json::Text(text)) = content.value else { return Err(content.refuse("text")) };
    if text.is_empty() || text.len() > MAX_ADDED_TOKEN_BYTES {
        let sentence = format!("has {} bytes, expected 1 to {MAX_ADDED_TOKEN_BYTES}", text.len());
        return Err(refusal(Status::TokenizerValue, &content.key, sentence));
    }
    for name in ["single_word", "lstrip", "rstrip", "normalized"] {
        let option = place.member(name);
        if !option.is_false_or_absent() {
            return Err(option.refuse(&format!("false for the token {}", quoted(text))));
        }
    }
    let id = place.member("id");
    let Some(Json::Integer(number)) = id.value else {
        let found = id.value.map_or_else(|| "absent".to_owned(), Json::to_string);
        return Err(refusal(Status::TokenizerValue, &id.key, format!("is {found}, expected a token id")));
    };
    let special = place.member("special");
    let Some(Json::Bool(is_special)) = special.value else { return Err(special.refuse("true or false")) };
    Ok(AddedToken { id: *number, content: text.clone(), special: *is_special })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::samples::{VOCAB_SIZE, sample};
    use serde_json::{Value, json};

    fn refusal_of(text: &str) -> Error {
        parse(text.as_bytes(), VOCAB_SIZE).err().unwrap_or_else(|| panic!("accepted: {text}"))
    }

    /// The value at a path such as `/model/merges/3`; absent ones are made.
    fn set(file: &mut Value, path: &str, value: Value) {
        let (parent, name) = path.rsplit_once('/').unwrap();
        match file.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[name.parse::<usize>().unwrap()] = value,
            object => object[name] = value,
        }
    }

    #[test]
    fn the_sample_is_read() {
        let file = parse(sample().to_string().as_bytes(), VOCAB_SIZE).unwrap();
        assert_eq!(file.merges.count(), 12);
        assert_eq!(file.merges.sides(0), ("▁", "h"));
        assert_eq!(file.merges.sides(11), ("o", "s"));
        assert_eq!(file.vocabulary.id_of("<bos>"), Some(2));
        assert_eq!(file.added_tokens[6], AddedToken { id: 6, content: "<b>".into(), special: false });
        assert_eq!(file.unknown_token.as_deref(), Some("<unk>"));
    }

    #[test]
    fn every_shape_gemma_files_have_is_accepted() {
        let replace = sample()["normalizer"].clone();
        let cases = [
            ("/normalizer", json!({"type": "Sequence", "normalizers": [replace]})),
            ("/pre_tokenizer", Value::Null),
            ("/post_processor", Value::Null),
            ("/truncation", json!({"max_length": 5})),
            ("/padding", json!({})),
            ("/model/merges/0", json!(["▁", "h"])),
            ("/model/unk_token", Value::Null),
            ("/model/fuse_unk", json!(false)),
        ];
        for (path, value) in cases {
            let mut file = sample();
            set(&mut file, path, value);
            assert!(parse(file.to_string().as_bytes(), VOCAB_SIZE).is_ok(), "{path}");
        }
        for absent in ["version", "truncation", "padding", "pre_tokenizer", "post_processor", "added_tokens"] {
            let mut file = sample();
            file.as_object_mut().unwrap().remove(absent);
            assert!(parse(file.to_string().as_bytes(), VOCAB_SIZE).is_ok(), "without {absent}");
        }
        let mut file = sample();
        file["model"].as_object_mut().unwrap().remove("ignore_merges");
        assert!(parse(file.to_string().as_bytes(), VOCAB_SIZE).is_ok(), "the first Gemma files lack ignore_merges");
    }

    #[test]
    fn a_value_of_another_shape_is_refused_by_its_key() {
        let other = Status::TokenizerUnsupported;
        let value = Status::TokenizerValue;
        let replace = sample()["normalizer"].clone();
        let cases = [
            ("/version", json!("2.0"), other, "version"),
            ("/surprise", json!(1), other, "surprise"),
            ("/truncation", json!(1), other, "truncation"),
            ("/padding", json!([]), other, "padding"),
            ("/post_processor", json!("x"), other, "post_processor"),
            ("/normalizer", Value::Null, other, "normalizer"),
            ("/normalizer/type", json!("NFC"), other, "normalizer.type"),
            ("/normalizer/pattern", json!({"Regex": "(a*)*"}), other, "normalizer.pattern.Regex"),
            ("/normalizer/pattern/String", json!("  "), other, "normalizer.pattern.String"),
            ("/normalizer/content", json!("_"), other, "normalizer.content"),
            ("/normalizer/extra", json!(1), other, "normalizer.extra"),
            (
                "/normalizer",
                json!({"type": "Sequence", "normalizers": [replace, replace]}),
                other,
                "normalizer.normalizers",
            ),
            (
                "/normalizer",
                json!({"type": "Sequence", "normalizers": [{"type": "Prepend"}]}),
                other,
                "normalizer.normalizers[0].type",
            ),
            ("/pre_tokenizer", json!({"type": "ByteLevel"}), other, "pre_tokenizer.type"),
            ("/pre_tokenizer", json!([]), other, "pre_tokenizer"),
            ("/pre_tokenizer/pattern", json!({"Regex": " "}), other, "pre_tokenizer.pattern.Regex"),
            ("/pre_tokenizer/pattern/String", json!("a"), other, "pre_tokenizer.pattern.String"),
            ("/pre_tokenizer/behavior", json!("Removed"), other, "pre_tokenizer.behavior"),
            ("/pre_tokenizer/invert", json!(true), other, "pre_tokenizer.invert"),
            ("/decoder", Value::Null, other, "decoder"),
            ("/decoder/type", json!("ByteLevel"), other, "decoder.type"),
            ("/decoder/decoders", json!([]), other, "decoder.decoders"),
            ("/decoder/decoders", json!({}), other, "decoder.decoders"),
            ("/decoder/decoders/0", json!({"type": "Fuse"}), other, "decoder.decoders[0].type"),
            ("/decoder/decoders/0/content", json!(""), other, "decoder.decoders[0].content"),
            ("/decoder/decoders/1", json!({"type": "Fuse"}), other, "decoder.decoders[1].type"),
            ("/decoder/decoders/2", json!({"type": "Strip"}), other, "decoder.decoders[2].type"),
            ("/model", json!([]), other, "model"),
            ("/model/type", json!("Unigram"), other, "model.type"),
            ("/model/dropout", json!(0.1), other, "model.dropout"),
            ("/model/unk_token", json!(3), other, "model.unk_token"),
            ("/model/continuing_subword_prefix", json!("##"), other, "model.continuing_subword_prefix"),
            ("/model/end_of_word_suffix", json!("</w>"), other, "model.end_of_word_suffix"),
            ("/model/fuse_unk", json!("yes"), other, "model.fuse_unk"),
            ("/model/byte_fallback", json!(false), other, "model.byte_fallback"),
            ("/model/ignore_merges", json!(true), other, "model.ignore_merges"),
            ("/model/surprise", json!(1), other, "model.surprise"),
            ("/model/vocab", json!([["a", 0.5]]), other, "model.vocab"),
            ("/model/vocab/l", json!(-1), value, "model.vocab[\"l\"]"),
            ("/model/vocab/l", json!(0.5), value, "model.vocab[\"l\"]"),
            ("/model/vocab/l", json!("5"), value, "model.vocab[\"l\"]"),
            ("/model/vocab/l", json!(VOCAB_SIZE), value, "model.vocab[\"l\"]"),
            ("/model/vocab/", json!(399), value, "model.vocab[\"\"]"),
            ("/model/merges", json!({}), other, "model.merges"),
            ("/model/merges/3", json!("ab"), value, "model.merges[3]"),
            ("/model/merges/3", json!("a b c"), value, "model.merges[3]"),
            ("/model/merges/3", json!(" b"), value, "model.merges[3]"),
            ("/model/merges/3", json!("a "), value, "model.merges[3]"),
            ("/model/merges/3", json!(["a"]), value, "model.merges[3]"),
            ("/model/merges/3", json!(["a", "b", "c"]), value, "model.merges[3]"),
            ("/model/merges/3", json!(["a", ""]), value, "model.merges[3]"),
            ("/model/merges/3", json!(["a", 1]), value, "model.merges[3]"),
            ("/model/merges/3", json!(7), value, "model.merges[3]"),
            ("/added_tokens", Value::Null, other, "added_tokens"),
            ("/added_tokens/1", json!("<eos>"), other, "added_tokens[1]"),
            ("/added_tokens/1/id", json!("1"), value, "added_tokens[1].id"),
            ("/added_tokens/1/id", json!(-1), value, "added_tokens[1].id"),
            ("/added_tokens/1/content", json!(1), other, "added_tokens[1].content"),
            ("/added_tokens/1/content", json!(""), value, "added_tokens[1].content"),
            ("/added_tokens/1/content", json!("x".repeat(129)), value, "added_tokens[1].content"),
            ("/added_tokens/1/special", Value::Null, other, "added_tokens[1].special"),
            ("/added_tokens/1/lstrip", json!(true), other, "added_tokens[1].lstrip"),
            ("/added_tokens/1/rstrip", json!(true), other, "added_tokens[1].rstrip"),
            ("/added_tokens/1/single_word", json!(true), other, "added_tokens[1].single_word"),
            ("/added_tokens/1/normalized", json!(true), other, "added_tokens[1].normalized"),
            ("/added_tokens/1/surprise", json!(true), other, "added_tokens[1].surprise"),
        ];
        for (path, replacement, status, key) in cases {
            let mut file = sample();
            set(&mut file, path, replacement.clone());
            let error = refusal_of(&file.to_string());
            assert_eq!((error.status(), error.key()), (status, Some(key)), "{path} {replacement}: {error}");
            assert!(error.to_string().starts_with(key), "{path}: the sentence names the key: {error}");
        }
    }

    #[test]
    fn a_missing_part_is_refused_by_its_key() {
        let cases = [
            ("", "normalizer"),
            ("", "decoder"),
            ("", "model"),
            ("/model", "type"),
            ("/model", "vocab"),
            ("/model", "merges"),
            ("/model", "byte_fallback"),
            ("/normalizer", "content"),
            ("/decoder", "decoders"),
            ("/added_tokens/0", "content"),
            ("/added_tokens/0", "special"),
        ];
        for (parent, name) in cases {
            let mut file = sample();
            file.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(name).unwrap();
            let error = refusal_of(&file.to_string());
            assert_eq!(error.status(), Status::TokenizerUnsupported, "{parent}/{name}: {error}");
            assert!(error.key().unwrap().ends_with(name) && error.to_string().contains("absent"), "{error}");
        }
    }

    #[test]
    fn a_key_that_is_there_twice_is_refused_wherever_it_is() {
        let cases = [
            ("\"version\":", "\"version\":\"1.0\",", "version"),
            ("\"model\":", "\"model\":{},", "model"),
            ("\"truncation\":", "\"truncation\":null,", "truncation"),
            ("\"post_processor\":", "\"post_processor\":null,", "post_processor"),
            ("\"merges\":", "\"merges\":[],", "model.merges"),
            ("\"vocab\":", "\"vocab\":{},", "model.vocab"),
            ("\"byte_fallback\":", "\"byte_fallback\":true,", "model.byte_fallback"),
            ("\"<eos>\":", "\"<eos>\":399,", "model.vocab[\"<eos>\"]"),
            ("\"<eos>\":", "\"\\u003ceos>\":399,", "model.vocab[\"<eos>\"]"),
            ("\"decoders\":", "\"decoders\":[],", "decoder.decoders"),
            ("\"behavior\":", "\"behavior\":\"\",", "pre_tokenizer.behavior"),
            ("\"lstrip\":", "\"lstrip\":false,", "added_tokens[0].lstrip"),
        ];
        for (before, inserted, key) in cases {
            let text = sample().to_string();
            let text = text.replacen(before, &format!("{inserted}{before}"), 1);
            let error = refusal_of(&text);
            assert_eq!((error.status(), error.key()), (Status::TokenizerSyntax, Some(key)), "{inserted}: {error}");
        }
    }

    #[test]
    fn two_pieces_with_one_id_are_refused() {
        let mut file = sample();
        file["model"]["vocab"]["zz"] = json!(2);
        let error = refusal_of(&file.to_string());
        assert_eq!(error.status(), Status::TokenizerValue);
        assert!(error.to_string().contains("has id 2"), "{error}");
    }

    #[test]
    fn bytes_that_are_not_json_are_a_syntax_error() {
        let sample = sample().to_string();
        let cases: [(&str, Vec<u8>); 7] = [
            ("empty", Vec::new()),
            ("trailing", format!("{sample}x").into_bytes()),
            ("byte order mark", format!("\u{FEFF}{sample}").into_bytes()),
            ("not UTF-8", sample.replace("<eos>", "QQ").into_bytes().iter().map(|b| b | (b & 0x10) << 3).collect()),
            ("half a surrogate", sample.replacen("\"<eos>\"", "\"\\ud800\"", 1).into_bytes()),
            ("control character", sample.replacen("\"<eos>\"", "\"\n\"", 1).into_bytes()),
            ("number too large", sample.replacen("399", "1e999", 1).replacen(":1,", ":1e999,", 1).into_bytes()),
        ];
        for (name, bytes) in cases {
            let error = parse(&bytes, VOCAB_SIZE).err().unwrap();
            assert_eq!(error.status(), Status::TokenizerSyntax, "{name}: {error}");
        }
        assert_eq!(refusal_of("[]").status(), Status::TokenizerUnsupported);
    }

    #[test]
    fn files_beyond_the_limits_are_refused() {
        let large = vec![b' '; MAX_FILE_BYTES + 1];
        assert_eq!(parse(&large, VOCAB_SIZE).err().unwrap().status(), Status::FileTooLarge);
        let deep = format!("{{\"post_processor\":{}", "[".repeat(1 << 20));
        assert_eq!(refusal_of(&deep).status(), Status::TokenizerUnsupported);
        let merges = format!("{{\"model\":{{\"merges\":[{}\"a b\"]}}}}", "\"a b\",".repeat(MAX_MERGES));
        let error = refusal_of(&merges);
        assert_eq!((error.status(), error.key()), (Status::TokenizerUnsupported, Some("model.merges")));
        assert_eq!(parse(b"{}", 0).err().unwrap().status(), Status::InvalidArgument);
    }
}
