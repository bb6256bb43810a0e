//! What `tokenizer_config.json` says about chats. Everything else in it is read past.

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result, Status};

use super::super::tokenizer::Tokenizer;

/// The most keys the file may have, and the most templates.
const MAX_KEYS: usize = 1 << 12;

/// The template, and what templates call BOS and EOS.
#[derive(Default)]
pub struct Settings {
    /// `chat_template`: the only one, or the one named `default`.
    pub template: Option<String>,
    /// `bos_token`.
    pub bos_token: Option<String>,
    /// `eos_token`.
    pub eos_token: Option<String>,
}

impl Settings {
    /// Reads the file. Fails with TemplateSyntax: not JSON, a key named twice, or a value of another type.
    pub fn from_json(bytes: &[u8]) -> Result<Settings> {
        serde_json::from_slice(bytes).map_err(|error| {
            let text = format!("no chat template can be read from it: {error}");
            Error::new(Status::TemplateSyntax, text)
        })
    }

    /// Names BOS and EOS after the tokenizer's pieces where the file does not.
    pub fn name_tokens(&mut self, tokenizer: &Tokenizer, bos: u32, eos: Option<u32>) {
        let piece = |token: u32| {
            let bytes = tokenizer.token_bytes(token, true).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        self.bos_token.get_or_insert_with(|| piece(bos));
        self.eos_token.get_or_insert_with(|| eos.map(piece).unwrap_or_default());
    }
}

impl<'de> Deserialize<'de> for Settings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct File;

        impl<'de> Visitor<'de> for File {
            type Value = Settings;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Settings, A::Error> {
                let mut settings = Settings::default();
                let mut seen = HashSet::new();
                while let Some(key) = map.next_key::<String>()? {
                    if seen.len() == MAX_KEYS {
                        return Err(serde::de::Error::custom(format!("more than {MAX_KEYS} keys in one object")));
                    }
                    match key.as_str() {
                        "chat_template" => settings.template = map.next_value::<Templates>()?.0,
                        "bos_token" => settings.bos_token = map.next_value::<TokenName>()?.0,
                        "eos_token" => settings.eos_token = map.next_value::<TokenName>()?.0,
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                    if let Some(key) = seen.replace(key) {
                        return Err(serde::de::Error::custom(format!("key {key:?} is named twice")));
                    }
                }
                Ok(settings)
            }
        }

        deserializer.deserialize_map(File)
    }
}

/// A template, or a list of named ones of which `default` counts.
struct Templates(Option<String>);

impl<'de> Deserialize<'de> for Templates {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Named {
            name: String,
            template: String,
        }

        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = Templates;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a chat template, or a list of {name, template}")
            }

            fn visit_unit<E>(self) -> std::result::Result<Templates, E> {
                Ok(Templates(None))
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<Templates, E> {
                Ok(Templates(Some(text.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Templates, A::Error> {
                let mut default = None;
                let mut count = 0;
                while let Some(Named { name, template }) = list.next_element()? {
                    count += 1;
                    if count > MAX_KEYS {
                        return Err(serde::de::Error::custom(format!("more than {MAX_KEYS} chat templates")));
                    }
                    if name == "default" && default.replace(template).is_some() {
                        return Err(serde::de::Error::custom("two chat templates are named \"default\""));
                    }
                }
                match default {
                    Some(template) => Ok(Templates(Some(template))),
                    None => Err(serde::de::Error::custom("no chat template of the list is named \"default\"")),
                }
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// The text of a special token, or an object with it as `content`.
struct TokenName(Option<String>);

impl<'de> Deserialize<'de> for TokenName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = TokenName;

            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a token's text, or an object with its content")
            }

            fn visit_unit<E>(self) -> std::result::Result<TokenName, E> {
                Ok(TokenName(None))
            }

            fn visit_str<E>(self, text: &str) -> std::result::Result<TokenName, E> {
                Ok(TokenName(Some(text.to_owned())))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<TokenName, A::Error> {
                let mut content: Option<String> = None;
                while let Some(key) = map.next_key::<String>()? {
                    if key != "content" {
                        map.next_value::<IgnoredAny>()?;
                    } else if content.replace(map.next_value()?).is_some() {
                        return Err(serde::de::Error::duplicate_field("content"));
                    }
                }
                Ok(TokenName(content))
            }
        }

        deserializer.deserialize_any(Either)
    }
}
