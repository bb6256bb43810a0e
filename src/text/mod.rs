//! Text in and out: the tokenizer of a model directory, the decoder that keeps UTF-8 whole, and grammars that constrain
//! what is generated.

mod added_tokens;
mod bpe;
pub mod grammar;
mod json_tree;
mod merges;
mod stream;
mod tokenizer;
mod tokenizer_file;
mod vocabulary;

#[cfg(test)]
pub(crate) mod samples;

pub use grammar::{Grammar, GrammarKind, GrammarState, GrammarVocabulary};
pub use stream::TextStream;
pub use tokenizer::{EncodeOptions, Tokenizer};
