//! JSON objects from untrusted files: a key named twice is an error, never a silent choice.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

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
