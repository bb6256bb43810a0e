//! Text in and out: the tokenizer of a model directory, and the decoder that keeps UTF-8 whole.

mod added_tokens;
mod bpe;
mod json_tree;
mod merges;
mod stream;
mod tokenizer;
mod tokenizer_file;
mod vocabulary;

#[cfg(test)]
pub(crate) mod samples;

pub use stream::TextStream;
pub use tokenizer::{EncodeOptions, Tokenizer};
