//! JSON objects from untrusted files: a key named twice is an error, never a silent choice.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

/// The most members of one object, which bounds the memory a file of many short ones takes.
pub const MAX_MEMBERS: usize = 1 << 18;

/// The members of an object in file order, each key once; at most `MAX_MEMBERS`.
pub struct UniqueMembers<V>(pub Vec<(String, V)>);

impl<'de, V: Deserialize<'de>> Deserialize<'de> for UniqueMembers<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members<V>(PhantomData<V>);

        impl<'de, V: Deserialize<'de>> Visitor<'de> for Members<V> {
            type Value = UniqueMembers<V>;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut seen = std::collections::HashSet::new();
                let mut members = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    if !seen.insert(key.clone()) {
                        return Err(serde::de::Error::custom(format!("key {key:?} is named twice")));
                    }
                    if members.len() == MAX_MEMBERS {
                        return Err(serde::de::Error::custom(format!("more than {MAX_MEMBERS} keys in one object")));
                    }
                    members.push((key, map.next_value()?));
                }
                Ok(UniqueMembers(members))
            }
        }

        deserializer.deserialize_map(Members(PhantomData))
    }
}

/// Elements of a list, or members of an object, that are kept; of a larger one, the others are passed over.
const KEPT: usize = 257;

/// A JSON value in memory that a hostile file cannot make large: only the first elements of each list and object.
pub struct Bounded(pub Value);

impl<'de> Deserialize<'de> for Bounded {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, flag: bool) -> Result<Value, E> {
                Ok(flag.into())
            }

            fn visit_u64<E>(self, number: u64) -> Result<Value, E> {
                Ok(number.into())
            }

            fn visit_i64<E>(self, number: i64) -> Result<Value, E> {
                Ok(number.into())
            }

            fn visit_f64<E>(self, number: f64) -> Result<Value, E> {
                Ok(number.into())
            }

            fn visit_str<E>(self, text: &str) -> Result<Value, E> {
                Ok(text.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Value, A::Error> {
                let mut items = Vec::new();
                while items.len() < KEPT {
                    match sequence.next_element::<Bounded>()? {
                        Some(Bounded(item)) => items.push(item),
                        None => return Ok(Value::Array(items)),
                    }
                }
                while sequence.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Value::Array(items))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut members = serde_json::Map::new();
                while members.len() < KEPT {
                    match map.next_entry::<String, Bounded>()? {
                        Some((key, _)) if members.contains_key(&key) => {
                            return Err(serde::de::Error::custom(format!("key {key:?} is named twice")));
                        }
                        Some((key, Bounded(value))) => drop(members.insert(key, value)),
                        None => return Ok(Value::Object(members)),
                    }
                }
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Value::Object(members))
            }
        }

        deserializer.deserialize_any(Any).map(Bounded)
    }
}
