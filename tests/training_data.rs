//! Data for training: the shapes of rows, what of them is learned, and rows and files that cannot be used.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer;

use std::path::PathBuf;
use std::sync::Arc;

use common::{Directory, Random};
use gemmoe::train::{BadRow, BadRows, DataOptions, DataSet, Document, LongRows, Pair, Rows, shuffled};
use gemmoe::{Error, Model, Progress, Status};
use serde_json::{Value, json};
use tokenizer::VOCAB_SIZE;

const BOS: u32 = 2;
const EOS: u32 = 1;
const TURN: u32 = 4;
const END: u32 = 5;

/// A model directory and files of data beside it.
struct Place {
    directory: tempfile::TempDir,
    model: Arc<Model>,
}

impl Place {
    /// Of a model whose tokenizer has turn markers.
    fn new() -> Place {
        Place::with(&[("tokenizer.json", tokenizer::sample().to_string())])
    }

    /// Of one that has none.
    fn plain() -> Place {
        let file = tokenizer::sample().to_string().replace("start_of_turn", "start").replace("end_of_turn", "end");
        Place::with(&[("tokenizer.json", file)])
    }

    /// With a chat template of its own.
    fn with_template(template: &str) -> Place {
        let files = [("tokenizer.json", tokenizer::sample().to_string()), ("chat_template.jinja", template.to_owned())];
        Place::with(&files)
    }

    fn with(files: &[(&str, String)]) -> Place {
        let directory = tempfile::tempdir().unwrap();
        let model = directory.path().join("model");
        std::fs::create_dir(&model).unwrap();
        let small = json!({
            "vocab_size": VOCAB_SIZE, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1,
            "num_key_value_heads": 1, "intermediate_size": 8
        });
        Directory::random_with(1, small).write(&model);
        for (name, text) in files {
            std::fs::write(model.join(name), text).unwrap();
        }
        Place { model: common::load(&model), directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    fn open(&self, files: &[PathBuf], rows: Rows, options: &DataOptions) -> gemmoe::Result<DataSet> {
        DataSet::open(&self.model, files, rows, options, &Progress::default())
    }

    /// The data of one file of these rows.
    fn data(&self, rows: &[Value], kind: Rows, options: &DataOptions) -> DataSet {
        let text: String = rows.iter().map(|row| format!("{row}\n")).collect();
        let path = self.write("rows.jsonl", text);
        self.open(&[path], kind, options).unwrap_or_else(|error| panic!("{error}"))
    }

    fn document(&self, row: Value) -> Document {
        self.data(&[row], Rows::Texts, &DataOptions::default()).document(0).unwrap()
    }

    fn pair(&self, row: Value) -> Pair {
        self.data(&[row], Rows::Pairs, &DataOptions::default()).pair(0).unwrap()
    }

    fn encode(&self, text: &str) -> Vec<u32> {
        self.model.encode(text, false, false).unwrap()
    }

    /// A turn as it should be written: the marker, the role and the text, the marker and the end of the line.
    fn turn(&self, role: &str, text: &str) -> Vec<u32> {
        [&[TURN][..], &self.encode(&format!("{role}\n{text}")), &[END], &self.encode("\n")].concat()
    }
}

/// Documents of `prompt`, which is masked, and `response`.
fn document(parts: &[(&[u32], bool)]) -> Document {
    let tokens = parts.iter().flat_map(|(tokens, _)| tokens.iter().copied()).collect();
    let flags = parts.iter().flat_map(|(tokens, flag)| std::iter::repeat_n(*flag, tokens.len())).collect();
    Document { tokens, is_response: flags }
}

#[test]
fn a_text_is_learned_whole_from_bos_to_eos() {
    let place = Place::new();
    let expected = document(&[(&[BOS], false), (&place.encode(" hello, you"), true), (&[EOS], true)]);
    assert_eq!(place.document(json!({"text": " hello, you"})), expected);
}

#[test]
fn a_response_and_the_end_of_its_turn_are_learned_and_nothing_else() {
    let place = Place::new();
    let asked = [&[BOS][..], &place.turn("user", "hello?"), &[TURN], &place.encode("model\n")].concat();
    let expected = document(&[(&asked, false), (&place.encode("yes"), true), (&[END], true)]);
    assert_eq!(place.document(json!({"prompt": "hello?", "response": "yes"})), expected);
    assert_eq!(place.document(json!({"instruction": "hello?", "output": "yes", "input": ""})), expected);
    let messages = json!([{"role": "user", "content": "hello?"}, {"role": "model", "content": "yes"}]);
    assert_eq!(place.document(json!({"id": 7, "messages": messages})), expected);
}
