//! A row's JSON: the members that mean something, every key of an object once, in bounded memory that may run out.

use std::cell::{Cell, RefCell};
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::report::{Fault, RowResult};
use crate::error::Error;

/// Values of one row: two for each of the 2^14 messages a conversation may have, and room to be wrong.
const MAX_VALUES: usize = 1 << 17;
/// Keys of one object, and bytes of one key.
const MAX_KEYS: usize = 256;
const MAX_KEY_BYTES: usize = 1024;

/// A value of a row.
#[derive(Debug, PartialEq)]
pub enum Value {
    /// `null`.
    Null,
    /// A string.
    Text(String),
    /// A list.
    List(Vec<Value>),
    /// An object.
    Object(Object),
    /// Anything else, as an error shows it.
    Other(String),
}

/// An object, with its members that mean something.
#[derive(Debug, Default, PartialEq)]
pub struct Object {
    /// Every key that was found.
    pub keys: Vec<String>,
    /// The members whose keys mean something.
    members: Vec<(&'static str, Value)>,
}

impl Object {
    /// The member of this key.
    pub fn find(&self, key: &str) -> Option<&Value> {
        self.members.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// The member of this key, unless it is null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.find(key).filter(|value| **value != Value::Null)
    }
}

impl fmt::Display for Value {
    /// As an error shows it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Null => f.write_str("null"),
            Value::Text(text) if text.is_empty() => f.write_str("empty"),
            Value::Text(text) => write!(f, "{:?}", text.chars().take(60).collect::<String>()),
            Value::List(values) => write!(f, "a list of {}", values.len()),
            Value::Object(_) => f.write_str("an object"),
            Value::Other(shown) => f.write_str(shown),
        }
    }
}

/// Reads one value. Of members only those whose keys are in `known` are kept.
///
/// Strings with escapes go through a buffer of serde_json's whose growth cannot fail: at most the row once more.
pub fn read(row: &str, known: &[&'static str]) -> RowResult<Value> {
    let reader = Reader { known, values: Cell::new(0), stopped: RefCell::new(None) };
    let mut parser = serde_json::Deserializer::from_str(row);
    let read = Seed(&reader).deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
    read.map_err(|error| match reader.stopped.into_inner() {
        Some(error) => Fault::Stop(error),
        None => Fault::Bad(explain(&error)),
    })
}

/// serde_json's sentence with the place in the row, whose one line it would count again.
fn explain(error: &serde_json::Error) -> String {
    let (sentence, column) = (error.to_string(), error.column());
    let sentence = sentence.strip_suffix(&format!(" at line 1 column {column}")).unwrap_or(&sentence);
    match error.classify() {
        serde_json::error::Category::Eof => {
            format!("ends within its JSON: {sentence}; a row is one object, whole on one line")
        }
        serde_json::error::Category::Data => sentence.to_owned(),
        _ => format!("is not JSON at column {column}: {sentence}"),
    }
}

struct Reader<'a> {
    known: &'a [&'static str],
    values: Cell<usize>,
    /// What serde's own error cannot carry.
    stopped: RefCell<Option<Error>>,
}

impl Reader<'_> {
    fn no_memory<E: serde::de::Error>(&self, bytes: usize) -> E {
        *self.stopped.borrow_mut() = Some(Error::out_of_memory("a row of data", bytes));
        E::custom("no memory")
    }

    fn push<T, E: serde::de::Error>(&self, values: &mut Vec<T>, value: T) -> Result<(), E> {
        self.values.set(self.values.get() + 1);
        if self.values.get() > MAX_VALUES {
            return Err(E::custom(format!("has more than {MAX_VALUES} values")));
        }
        values.try_reserve(1).map_err(|_| self.no_memory(size_of::<T>()))?;
        values.push(value);
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct Seed<'a>(&'a Reader<'a>);

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: serde::de::Error>(self, flag: bool) -> Result<Value, E> {
        Ok(Value::Other(flag.to_string()))
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<Value, E> {
        Ok(Value::Other(number.to_string()))
    }

    fn visit_i64<E: serde::de::Error>(self, number: i64) -> Result<Value, E> {
        Ok(Value::Other(number.to_string()))
    }

    fn visit_f64<E: serde::de::Error>(self, number: f64) -> Result<Value, E> {
        Ok(Value::Other(number.to_string()))
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Value, E> {
        let mut copy = String::new();
        copy.try_reserve_exact(text.len()).map_err(|_| self.0.no_memory(text.len()))?;
        copy.push_str(text);
        Ok(Value::Text(copy))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(self)? {
            self.0.push(&mut values, value)?;
        }
        Ok(Value::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut object = Object::default();
        while let Some(key) = map.next_key_seed(Key)? {
            if object.keys.contains(&key) {
                let key = key.chars().take(60).collect::<String>();
                return Err(serde::de::Error::custom(format!("has the key {key:?} twice")));
            }
            if object.keys.len() == MAX_KEYS {
                return Err(serde::de::Error::custom(format!("has more than {MAX_KEYS} keys")));
            }
            match self.0.known.iter().find(|known| **known == key) {
                Some(known) => {
                    let value = map.next_value_seed(self)?;
                    self.0.push(&mut object.members, (*known, value))?;
                }
                None => drop(map.next_value::<IgnoredAny>()?),
            }
            self.0.push(&mut object.keys, key)?;
        }
        Ok(Value::Object(object))
    }
}

/// Reads a key.
struct Key;

impl<'de> DeserializeSeed<'de> for Key {
    type Value = String;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<String, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for Key {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, key: &str) -> Result<String, E> {
        if key.len() > MAX_KEY_BYTES {
            return Err(E::custom(format!("has a key of {} bytes, at most {MAX_KEY_BYTES} are read", key.len())));
        }
        Ok(key.to_owned())
    }
}
