//! Text in and out: the tokenizer of a model directory, chat templates, grammars that constrain what is generated, and
//! the decoder that keeps UTF-8 whole and stops where it is told.

mod added_tokens;
mod bpe;
pub mod chat;
mod difference;
pub mod grammar;
mod json_tree;
mod merges;
mod stops;
mod stream;
mod tokenizer;
mod tokenizer_file;
mod vocabulary;

#[cfg(test)]
pub(crate) mod samples;

pub use chat::{ChatTemplate, Message};
pub use difference::difference;
pub use grammar::{Grammar, GrammarKind, GrammarState, GrammarVocabulary};
pub use stops::{MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS};
pub use stream::{Stopped, TextStream};
pub use tokenizer::{EncodeOptions, Tokenizer};
