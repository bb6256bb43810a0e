//! Tables of recipes, for mixing and for training: values of the type that is expected, or an error with their key and line.

use std::io::Read;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::error::{Error, Result, Status};
use crate::model::Formats;
use crate::model::quantization::PARTS;
use crate::quant::{Format, GROUP_SIZES, Groups, ScaleDtype};

/// The largest recipe that is parsed, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Where a key stands.
#[derive(Clone, Debug, Default)]
pub struct Place {
    key: String,
    /// Counted from 1; 0 where there is no text.
    line: usize,
}

impl Place {
    /// The key with the tables it is in, such as `experts[2].model`.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Another key's place on the same line.
    pub fn at(&self, key: String) -> Place {
        Place { key, line: self.line }
    }

    /// The error of the key: `line 7: "experts[2].model" ...`.
    pub fn fault(&self, text: &str) -> Error {
        self.fault_of(Status::RecipeValue, text)
    }

    /// The same with another status.
    pub fn fault_of(&self, status: Status, text: &str) -> Error {
        let line = if self.line > 0 { format!("line {}: ", self.line) } else { String::new() };
        let key = if self.key.is_empty() { String::new() } else { format!("\"{}\" ", self.key) };
        let error = Error::new(status, format!("{line}{key}{text}"));
        if self.key.is_empty() { error } else { error.at_key(&*self.key) }
    }
}

/// A table of a recipe.
pub struct Table<'a> {
    text: &'a str,
    /// Its own key with those of the tables it is in.
    path: String,
    /// Where it begins, in bytes.
    start: usize,
    members: &'a DeTable<'a>,
}

/// The text of a recipe's file, which errors call `name`.
pub fn read_text(path: &Path, name: &str) -> Result<String> {
    let unreadable = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::new(Status::FileNotFound, "there is no such recipe").in_file(name),
        _ => Error::new(Status::ReadFailed, format!("cannot be read: {error}")).in_file(name),
    };
    let mut bytes = Vec::new();
    std::fs::File::open(path).map_err(unreadable)?.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        Error::new(Status::InvalidUtf8, format!("is not UTF-8 from byte {at} on")).in_file(name)
    })
}

/// Parses a text and shows its root table to `read`.
pub fn parse<T>(text: &str, read: impl FnOnce(Table) -> Result<T>) -> Result<T> {
    if text.len() as u64 > MAX_BYTES {
        let text = format!("is {} bytes, at most {MAX_BYTES} are parsed", text.len());
        return Err(Error::new(Status::FileTooLarge, text));
    }
    let root = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_of(text, span.start));
        Error::new(Status::RecipeSyntax, format!("line {line}: {}", error.message()))
    })?;
    read(Table { text, path: String::new(), start: 0, members: root.get_ref() })
}

fn line_of(text: &str, byte: usize) -> usize {
    text.bytes().take(byte).filter(|byte| *byte == b'\n').count() + 1
}

impl<'a> Table<'a> {
    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn get(&self, key: &str) -> Option<&'a DeValue<'a>> {
        self.members.iter().find(|(name, _)| name.get_ref().as_ref() == key).map(|(_, value)| value.get_ref())
    }

    /// Whether a key is there.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Where a key stands, or the table where it is missing.
    pub fn place(&self, key: &str) -> Place {
        let found = self.members.iter().find(|(name, _)| name.get_ref().as_ref() == key);
        let start = found.map_or(self.start, |(name, _)| name.span().start);
        Place { key: self.path_of(key), line: line_of(self.text, start) }
    }

    /// Where the table stands.
    pub fn own_place(&self) -> Place {
        Place { key: self.path.clone(), line: line_of(self.text, self.start) }
    }

    /// Refuses keys that are not among `known`, and names the nearest.
    pub fn check_keys(&self, known: &[&str]) -> Result<()> {
        let unknown = self.members.keys().filter(|key| !known.contains(&key.get_ref().as_ref()));
        let Some(key) = unknown.min_by_key(|key| key.span().start) else { return Ok(()) };
        let name = key.get_ref().as_ref();
        let distance = |other: &str| strsim::damerau_levenshtein(name, other);
        let near = known.iter().min_by_key(|other| distance(other)).filter(|other| distance(other) <= other.len() / 2);
        let text = match near {
            Some(near) => format!("is no key of a recipe: is {near:?} meant?"),
            None => format!("is no key of a recipe, expected one of {}", known.join(", ")),
        };
        Err(self.place(name).fault(&text))
    }

    fn wrong(&self, key: &str, found: &DeValue, expected: &str) -> Error {
        self.place(key).fault(&format!("is {}, expected {expected}", shown(found)))
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value {
            DeValue::String(text) if !text.is_empty() => Ok(Some(text)),
            other => Err(self.wrong(key, other, "a text")),
        }
    }

    /// A list of strings, or one alone, with their places.
    pub fn texts(&self, key: &str) -> Result<Vec<(&'a str, Place)>> {
        let items = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(DeValue::String(text)) if !text.is_empty() => return Ok(vec![(text, self.place(key))]),
            Some(DeValue::Array(items)) => items,
            Some(other) => return Err(self.wrong(key, other, "a list of texts")),
        };
        let item = |(index, item): (usize, &'a toml::Spanned<DeValue<'a>>)| {
            let place =
                Place { key: self.path_of(&format!("{key}[{index}]")), line: line_of(self.text, item.span().start) };
            match item.get_ref() {
                DeValue::String(text) if !text.is_empty() => Ok((&**text, place)),
                other => Err(place.fault(&format!("is {}, expected a text", shown(other)))),
            }
        };
        items.iter().enumerate().map(item).collect()
    }

    /// A whole number in `lowest..=highest`.
    pub fn count(&self, key: &str, lowest: u64, highest: u64) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = match value {
            DeValue::Integer(integer) => u64::from_str_radix(integer.as_str(), integer.radix()).ok(),
            _ => None,
        };
        match number.filter(|number| (lowest..=highest).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, value, &format!("a whole number from {lowest} to {highest}"))),
        }
    }

    /// A finite number.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        number_of(value).map(Some).ok_or_else(|| self.wrong(key, value, "a number"))
    }

    /// A number in a range, which `expected` describes.
    pub fn number_in(&self, key: &str, expected: &str, is_right: impl Fn(f64) -> bool) -> Result<Option<f64>> {
        let Some(number) = self.number(key)? else { return Ok(None) };
        match is_right(number) {
            true => Ok(Some(number)),
            false => Err(self.place(key).fault(&format!("is {number}, expected {expected}"))),
        }
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers = value.as_array().and_then(|items| items.iter().map(|item| number_of(item.get_ref())).collect());
        numbers.map(Some).ok_or_else(|| self.wrong(key, value, "a list of numbers"))
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// Which of `choices` a string is.
    pub fn choice(&self, key: &str, choices: &[&str]) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let found = value.as_str().and_then(|text| choices.iter().position(|choice| *choice == text));
        match found {
            Some(found) => Ok(Some(found)),
            None => Err(self.wrong(key, value, &format!("one of {}", choices.join(", ")))),
        }
    }

    /// A table inside this one.
    pub fn table(&self, key: &str) -> Result<Option<Table<'a>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let DeValue::Table(members) = value else { return Err(self.wrong(key, value, "a table")) };
        let start =
            self.members.iter().find(|(name, _)| name.get_ref().as_ref() == key).map_or(0, |(k, _)| k.span().start);
        Ok(Some(Table { text: self.text, path: self.path_of(key), start, members }))
    }

    /// A list of tables; empty where there is none.
    pub fn tables(&self, key: &str) -> Result<Vec<Table<'a>>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let DeValue::Array(items) = value else { return Err(self.wrong(key, value, "a list of tables")) };
        let table = |(index, item): (usize, &'a toml::Spanned<DeValue<'a>>)| {
            let (path, start) = (self.path_of(&format!("{key}[{index}]")), item.span().start);
            match item.get_ref() {
                DeValue::Table(members) => Ok(Table { text: self.text, path, start, members }),
                other => {
                    let place = Place { key: path, line: line_of(self.text, start) };
                    Err(place.fault(&format!("is {}, expected a table", shown(other))))
                }
            }
        };
        items.iter().enumerate().map(table).collect()
    }
}

/// A finite number.
fn number_of(value: &DeValue) -> Option<f64> {
    let number: f64 = match value {
        DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix()).ok()? as f64,
        DeValue::Float(float) => float.as_str().parse().ok()?,
        _ => return None,
    };
    number.is_finite().then_some(number)
}

/// What the parts of a model are rounded to: the table `[quantize]`.
pub fn read_formats(table: &Table) -> Result<Formats> {
    table.check_keys(&["experts", "attention", "head", "embedding", "group_size", "scales"])?;
    let size = table.count("group_size", 32, 128)?.unwrap_or(32) as usize;
    if !GROUP_SIZES.contains(&size) {
        return Err(table.place("group_size").fault(&format!("is {size}, expected 32, 64 or 128")));
    }
    let scales = ScaleDtype::ALL[table.choice("scales", &ScaleDtype::ALL.map(ScaleDtype::name))?.unwrap_or(0)];
    let groups = Groups { size, scales };
    let mut formats = [None; 4];
    for (part, format) in PARTS.into_iter().zip(&mut formats) {
        *format = match table.choice(part, &["int8", "int4", "stored"])? {
            Some(0) => Some(Format::Int8(groups)),
            Some(1) => Some(Format::Int4(groups)),
            _ => None,
        };
    }
    if formats == [None; 4] {
        let text = "asks for nothing: give experts, attention, head or embedding a format";
        return Err(table.own_place().fault(text));
    }
    Ok(Formats::from_parts(formats))
}

/// A value as it may stand in a message.
fn shown(value: &DeValue) -> String {
    match value {
        DeValue::String(text) if text.is_empty() => "empty".to_owned(),
        DeValue::String(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
        DeValue::Integer(integer) => integer.to_string(),
        DeValue::Float(float) => float.to_string(),
        DeValue::Boolean(flag) => flag.to_string(),
        DeValue::Datetime(_) => "a date".to_owned(),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}
