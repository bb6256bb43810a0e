//! Tables of recipes, for mixing and for training: values of the type that is expected, or an error with their key and line.

use toml::de::{DeTable, DeValue};

use crate::error::{Error, Result, Status};

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

/// Parses a text and shows its root table to `read`.
pub fn parse<T>(text: &str, read: impl FnOnce(Table) -> Result<T>) -> Result<T> {
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
        let number = match value {
            DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix()).ok().map(|n| n as f64),
            DeValue::Float(float) => float.as_str().parse().ok(),
            _ => None,
        };
        match number.filter(|number: &f64| number.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, value, "a number")),
        }
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
