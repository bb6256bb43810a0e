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

#[test]
fn an_instruction_and_its_input_are_one_message() {
    let place = Place::new();
    let row =
        json!({"instruction": "add", "input": "1, 2", "output": "3", "text": "of another shape, as many have it"});
    assert_eq!(place.document(row), place.document(json!({"prompt": "add\n\n1, 2", "response": "3"})));
}

#[test]
fn every_turn_of_the_assistant_is_learned_and_all_else_is_masked() {
    let place = Place::new();
    let messages = json!([
        {"role": "system", "content": "be short"}, {"role": "user", "content": "a?"},
        {"role": "assistant", "content": " hello", "name": "ignored"}, {"role": "user", "content": "b?"},
        {"role": "model", "content": "c"}, {"role": "user", "content": "what nobody answers"}
    ]);
    let begun = [&[TURN][..], &place.encode("model\n")].concat();
    let first = [&[BOS][..], &place.turn("user", "be short\n\na?"), &begun].concat();
    let second = [&place.encode("\n")[..], &place.turn("user", "b?"), &begun].concat();
    let hello = [&place.encode("hello")[..], &[END]].concat();
    let c = [&place.encode("c")[..], &[END]].concat();
    let parts: [(&[u32], bool); 4] = [(&first, false), (&hello, true), (&second, false), (&c, true)];
    assert_eq!(place.document(json!({"messages": messages})), document(&parts));

    let learned = DataOptions { learn_prompts: true, ..Default::default() };
    let document = place.data(&[json!({"messages": messages})], Rows::Texts, &learned).document(0).unwrap();
    assert_eq!(document.tokens, place.document(json!({"messages": messages})).tokens);
    assert_eq!(document.is_response.iter().position(|is_response| *is_response), Some(1));
    assert_eq!(document.targets(), document.tokens.len() - 1);
}

#[test]
fn a_system_text_beside_a_row_is_a_system_message() {
    let place = Place::new();
    let user = json!({"role": "user", "content": "a"});
    let answer = json!({"role": "assistant", "content": "b"});
    let messages = json!({"messages": [{"role": "system", "content": "s"}, user, answer]});
    let expected = place.document(messages);
    assert_eq!(place.document(json!({"system": "s", "messages": [user, answer]})), expected);
    assert_eq!(place.document(json!({"system": "s", "prompt": "a", "response": "b"})), expected);
    assert_eq!(place.document(json!({"system": "s", "instruction": "a", "output": "b"})), expected);
    assert_ne!(place.document(json!({"system": " ", "prompt": "a", "response": "b"})), expected);
}

#[test]
fn both_answers_of_a_pair_follow_the_same_prompt() {
    let place = Place::new();
    let prompt = [&[BOS][..], &place.turn("user", "s\n\nq"), &[TURN], &place.encode("model\n")].concat();
    let answer = |text: &str| document(&[(&prompt, false), (&place.encode(text), true), (&[END], true)]);
    let expected = Pair::new(answer("yes"), answer("no, hello"));
    let user = json!({"role": "user", "content": "q"});
    let system = json!({"role": "system", "content": "s"});
    let [yes, no] = ["yes", "no, hello"].map(|text| json!({"role": "assistant", "content": text}));
    let shapes = [
        json!({"id": "1", "system": "s", "prompt": "q", "chosen": "yes", "rejected": "no, hello"}),
        json!({"prompt": [system, user], "chosen": "yes", "rejected": [no]}),
        json!({"prompt": [system, user], "chosen": [yes], "rejected": [no]}),
        json!({"chosen": [system, user, yes], "rejected": [system, user, no]}),
        json!({"system": "s", "prompt": "q", "chosen": [user, yes], "rejected": [user, no]}),
        json!({"prompt": [system, user], "chosen": [user, yes], "rejected": [user, no]}),
    ];
    for shape in shapes {
        assert_eq!(place.pair(shape.clone()), expected, "{shape}");
    }
    // A conversation of several turns: only the last is learned.
    let earlier = json!([user, yes, user]);
    let pair = place.pair(json!({"prompt": earlier, "chosen": "yes", "rejected": "no"}));
    assert_eq!(pair.chosen.targets(), place.encode("yes").len() + 1);
}

#[test]
fn a_model_without_turns_gets_prompt_and_response_one_after_the_other() {
    let place = Place::plain();
    let prompt = [&[BOS][..], &place.encode("s\n\na")].concat();
    let answer = |text: &str| document(&[(&prompt, false), (&place.encode(text), true), (&[EOS], true)]);
    assert_eq!(place.document(json!({"system": "s", "prompt": "a", "response": " hello"})), answer(" hello"));
    let row = json!({"system": "s", "prompt": "a", "chosen": "b", "rejected": "c"});
    assert_eq!(place.pair(row), Pair::new(answer("b"), answer("c")));
    let turn = |role: &str| json!({"role": role, "content": "x"});
    let messages = json!({"messages": [turn("user"), turn("assistant"), turn("user"), turn("assistant")]});
    let path = place.write("bad.jsonl", messages.to_string());
    let error = place.open(&[path], Rows::Texts, &DataOptions::default()).err().unwrap();
    assert!(error.to_string().contains("line 1: has several turns, and the model has no chat template"), "{error}");
}

#[test]
fn a_models_own_template_writes_the_turns() {
    let place = Place::with_template(
        "{% for message in messages %}{{ message.role }}:{{ message.content }}<end_of_turn>;{% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}",
    );
    let asked = [&[BOS][..], &place.encode("user:a"), &[END], &place.encode(";assistant:")].concat();
    let expected = document(&[(&asked, false), (&place.encode("b"), true), (&[END], true)]);
    assert_eq!(place.document(json!({"prompt": "a", "response": "b"})), expected);

    // One that ends no turns: a response reaches as far as the template goes on with it.
    let place = Place::with_template(
        "{% for message in messages %}{{ message.role }}:{{ message.content }};{% endfor %}\
         {% if add_generation_prompt %}assistant:{% endif %}",
    );
    let row = json!({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}
    ]});
    let [first, second] = ["user:a;assistant:", "user:c;assistant:"].map(|text| place.encode(text));
    let [b, d] = ["b;", "d;"].map(|text| place.encode(text));
    let expected = document(&[(&[BOS], false), (&first, false), (&b, true), (&second, false), (&d, true)]);
    assert_eq!(place.document(row), expected);
}

#[test]
fn a_template_that_writes_what_is_before_otherwise_is_refused() {
    let place = Place::with_template(
        "{% for message in messages %}{{ message.role }}:{{ message.content }}<end_of_turn>;{% endfor %}\
         {% if add_generation_prompt %}assistant:(thinks){% endif %}",
    );
    let path = place.write("rows.jsonl", json!({"prompt": "a", "response": "b"}).to_string());
    let error = place.open(&[path], Rows::Texts, &DataOptions::default()).err().unwrap();
    assert_eq!(error.status(), Status::DataRow);
    assert!(error.to_string().contains("line 1: cannot be masked: the model's chat template writes"), "{error}");
    let pair = json!({"prompt": "a", "chosen": "b", "rejected": "c"}).to_string();
    let error = place.open(&[place.write("pairs.jsonl", pair)], Rows::Pairs, &DataOptions::default()).err().unwrap();
    assert!(error.to_string().contains("before messages[1] otherwise"), "{error}");
}

#[test]
fn markup_in_data_is_text() {
    let markup = "<end_of_turn>\n<start_of_turn>model\n<eos><bos>";
    let specials = |document: &Document| document.tokens.iter().filter(|token| **token < 6).count();
    for place in [Place::new(), Place::plain()] {
        let plain = place.document(json!({"prompt": "a", "response": "b"}));
        let marked = place.document(json!({"prompt": format!("a{markup}a"), "response": format!("b{markup}b")}));
        assert_eq!(specials(&marked), specials(&plain));
        assert_eq!(specials(&place.document(json!({"text": markup}))), 2);
        let pair = place.pair(json!({"prompt": markup, "chosen": markup, "rejected": "c"}));
        assert_eq!(specials(&pair.chosen), specials(&pair.rejected));
        assert_eq!(specials(&pair.chosen), specials(&plain));
    }
}

/// A text of `bytes` bytes and some lines.
fn long_text(seed: u64, bytes: usize) -> String {
    let mut random = Random::new(seed);
    let words = ["hello", "é", "you", "\n", "a\r\n", "\n\n", "<eos>", "漢", " ", "  "];
    let mut text = String::from("It ");
    while text.len() < bytes {
        text.push_str(words[random.below(words.len())]);
        text.push(' ');
    }
    text.truncate(text.floor_char_boundary(bytes));
    text
}

/// The documents of a text again as its tokens: each begins with BOS, all of it is learned, and only the last ends with EOS.
fn joined(documents: &[Document], max_tokens: usize) -> Vec<u32> {
    let mut tokens = Vec::new();
    for (index, document) in documents.iter().enumerate() {
        assert!(document.tokens.len() >= 2 && document.tokens.len() <= max_tokens);
        assert_eq!((document.tokens[0], document.targets()), (BOS, document.tokens.len() - 1));
        tokens.extend_from_slice(&document.tokens[1..]);
        assert_eq!(tokens.last() == Some(&EOS), index + 1 == documents.len());
    }
    tokens.pop();
    tokens
}

fn all(data: &mut DataSet) -> Vec<Document> {
    (0..data.len()).map(|index| data.document(index).unwrap()).collect()
}

#[test]
fn a_long_text_is_several_documents_with_all_of_its_tokens() {
    let place = Place::new();
    let text = long_text(1, 1000);
    let whole = place.encode(&text);
    for max_tokens in [2, 3, 17, whole.len(), whole.len() + 1, whole.len() + 2, whole.len() + 3] {
        let options = DataOptions { max_tokens, ..Default::default() };
        let mut data = place.data(&[json!({"text": text})], Rows::Texts, &options);
        let documents = all(&mut data);
        assert_eq!(joined(&documents, max_tokens), whole);
        assert_eq!(documents.len(), (whole.len() + 1).div_ceil(max_tokens - 1), "no more than are needed");
        let lengths = documents.iter().map(|document| document.tokens.len());
        assert!(lengths.clone().max().unwrap() - lengths.clone().min().unwrap() <= 1, "all about as long");
        let report = data.report();
        assert_eq!((report.rows, report.good, report.skipped, report.cut), (1, 1, 0, 0));
        assert_eq!((report.split, report.documents), (u64::from(documents.len() > 1), documents.len() as u64));
        assert_eq!(report.tokens, lengths.clone().sum::<usize>() as u64);
        assert_eq!((report.targets, Some(report.longest)), (report.tokens - report.documents, lengths.max()));
    }
}

#[test]
fn a_text_longer_than_its_sections_loses_nothing_wherever_it_is() {
    let place = Place::new();
    let options = DataOptions { max_tokens: 1000, ..Default::default() };
    // With lines, with words alone, with neither; and what an editor may put in front.
    let texts = [long_text(2, 300_000), "hello ".repeat(40_000), "é".repeat(120_001)];
    for text in &texts {
        let row = place.write("long.jsonl", format!("{}\n{}\n", json!({"text": "before"}), json!({"text": text})));
        let files = [place.write("long.txt", text), place.write("mark.TXT", format!("\u{feff}{text}")), row];
        let mut data = place.open(&files, Rows::Texts, &options).unwrap();
        let documents = all(&mut data);
        let single = documents.iter().position(|document| document.tokens.len() == "before".len() + 2).unwrap();
        let (first, rest) = documents.split_at(single / 2);
        assert!(*first == rest[..single / 2] && *first == documents[single + 1..]);
        let tokens = joined(first, 1000);
        let bytes = place.model.tokenizer().unwrap().decode(&tokens, true).unwrap();
        assert!(String::from_utf8(bytes).unwrap() == *text);
        // In any order they are the same.
        for index in shuffled(data.len(), 5, 0).unwrap().into_iter().step_by(16) {
            assert!(data.document(index as usize).unwrap() == documents[index as usize], "{index}");
        }
        assert_eq!(data.report().split, 3);
    }
    // Sections end where no token reaches across, so that these are the tokens of the whole text.
    let file = place.write("long.txt", &texts[0]);
    let documents = all(&mut place.open(&[file], Rows::Texts, &options).unwrap());
    assert!(joined(&documents, 1000) == place.encode(&texts[0]));
}

#[test]
fn a_long_response_is_cut_at_its_end_and_counted() {
    let place = Place::new();
    let rows = [json!({"prompt": "a", "response": "b".repeat(50)}), json!({"prompt": "a", "response": "b"})];
    let whole = place.document(rows[0].clone());
    let options = DataOptions { max_tokens: 30, ..Default::default() };
    let mut data = place.data(&rows, Rows::Texts, &options);
    let cut = data.document(0).unwrap();
    assert_eq!((&cut.tokens[..], &cut.is_response[..]), (&whole.tokens[..30], &whole.is_response[..30]));
    assert_eq!(data.document(1).unwrap(), place.document(rows[1].clone()));
    assert_eq!((data.report().cut, data.report().longest), (1, 30));

    // Exactly as long as may be is not cut.
    let options = DataOptions { max_tokens: whole.tokens.len(), long_rows: LongRows::Refuse, ..Default::default() };
    assert_eq!(place.data(&rows[..1], Rows::Texts, &options).document(0).unwrap(), whole);

    // What is cut off in the middle of a prompt is not there at all.
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let long = "x".repeat(100);
    let row = json!({"messages": [
        turn("user", "a"), turn("assistant", "b"), turn("user", &long), turn("assistant", "c")
    ]});
    let options = DataOptions { max_tokens: 40, ..Default::default() };
    let mut data = place.data(&[row], Rows::Texts, &options);
    assert_eq!(data.document(0).unwrap(), place.document(rows[1].clone()));
    assert_eq!(data.report().cut, 1);
}

#[test]
fn long_pairs_share_what_room_there_is() {
    let place = Place::new();
    let prompt = 1 + place.turn("user", "q").len() + 1 + place.encode("model\n").len();
    let cases = [
        // (lengths of the answers, with the end of their turns, the room for both, what is left of them)
        ([11, 31], 30, [11, 19]),
        ([31, 11], 30, [19, 11]),
        ([31, 41], 30, [15, 15]),
        ([31, 41], 31, [15, 15]),
        ([16, 41], 30, [15, 15]),
        ([11, 19], 30, [11, 19]),
        ([9, 50], 3, [1, 1]),
    ];
    for (lengths, room, expected) in cases {
        let options = DataOptions { max_tokens: 2 * prompt + room, ..Default::default() };
        let row = json!({"prompt": "q", "chosen": "b".repeat(lengths[0] - 1), "rejected": "c".repeat(lengths[1] - 1)});
        let mut data = place.data(&[row], Rows::Pairs, &options);
        let pair = data.pair(0).unwrap();
        assert_eq!([&pair.chosen, &pair.rejected].map(Document::targets), expected, "{lengths:?} in {room}");
        assert_eq!(pair.chosen.tokens[..prompt], pair.rejected.tokens[..prompt]);
        assert_eq!(data.report().cut, u64::from(lengths != expected), "{lengths:?} in {room}");
        assert_eq!(data.report().longest, 2 * prompt + expected[0] + expected[1]);
    }
}

#[test]
fn long_rows_are_left_out_or_refused_where_that_is_asked_for() {
    let place = Place::new();
    let long = "x".repeat(100);
    let short = json!({"text": "short"});
    let rows = [json!({"text": long}), short.clone(), json!({"prompt": "a", "response": long})];
    let options = DataOptions { max_tokens: 60, long_rows: LongRows::Skip, ..Default::default() };
    let mut data = place.data(&rows, Rows::Texts, &options);
    assert_eq!(all(&mut data), [place.document(short.clone())]);
    let report = data.report();
    assert_eq!((report.rows, report.good, report.skipped, report.too_long), (3, 1, 2, 2));
    assert_eq!((report.tokens, report.targets, report.longest), (7, 6, 7), "nothing of what is left out is counted");
    assert_eq!(report.left_out.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 3]);

    let options = DataOptions { long_rows: LongRows::Refuse, ..options };
    for (row, text) in
        [(&rows[0], "has more than the 60 tokens"), (&rows[2], "tokens, at most 60 are taken (max_tokens)")]
    {
        let path = place.write("long.jsonl", format!("{short}\n{row}"));
        let error = place.open(&[path], Rows::Texts, &options).err().unwrap();
        assert_eq!(error.status(), Status::DataRow);
        assert!(error.to_string().contains("long.jsonl: line 2: ") && error.to_string().contains(text), "{error}");
    }
}

#[test]
fn blank_lines_marks_line_ends_and_a_missing_last_one_make_no_difference() {
    let place = Place::new();
    let rows = ["one", "two", "three"].map(|text| json!({"text": text}).to_string());
    let expected = rows.clone().map(|row| place.document(serde_json::from_str(&row).unwrap()));
    let [one, two, three] = &rows;
    let files = [
        (format!("{one}\n{two}\n{three}\n"), 0),
        (format!("{one}\n{two}\n{three}"), 0),
        (format!("{one}\r\n{two}\r\n{three}\r\n"), 0),
        (format!("\u{feff}{one}\n{two}\n{three}"), 0),
        (format!("\u{feff}\r\n{one}\n\n  \t\n{two}\n\r\n{three}\n\n"), 5),
    ];
    let mut fingerprints = Vec::new();
    for (text, blank) in files {
        let path = place.write("rows.jsonl", &text);
        let mut data = place.open(&[path], Rows::Texts, &DataOptions::default()).unwrap();
        // From the last to the first: each is found by itself.
        for index in (0..3).rev() {
            assert_eq!(data.document(index).unwrap(), expected[index], "{text:?}");
        }
        assert_eq!((data.report().rows, data.report().blank), (3, blank), "{text:?}");
        fingerprints.push(data.fingerprint());
    }
    fingerprints.dedup();
    assert_eq!(fingerprints.len(), 1);
}

#[test]
fn rows_of_many_files_come_in_order_and_are_told_apart() {
    let place = Place::new();
    let row =
        |file: usize, row: usize| json!({"text": format!("file {file}, row {row}, {}", "x".repeat(file * row % 7))});
    let mut files = Vec::new();
    let mut expected = Vec::new();
    for file in 0..9 {
        let rows: Vec<Value> = (0..file * 5 % 11 + 1).map(|index| row(file, index)).collect();
        files
            .push(place.write(&format!("{file}.jsonl"), rows.iter().map(|row| format!("{row}\n")).collect::<String>()));
        expected.extend(rows);
    }
    let mut data = place.open(&files, Rows::Texts, &DataOptions::default()).unwrap();
    assert_eq!(data.len(), expected.len());
    for index in shuffled(data.len(), 3, 0).unwrap() {
        let document = data.document(index as usize).unwrap();
        let text = place.model.tokenizer().unwrap().decode(&document.tokens, false).unwrap();
        assert_eq!(String::from_utf8(text).unwrap(), expected[index as usize]["text"], "{index}");
    }
    let fingerprint = data.fingerprint();
    files.swap(2, 3);
    let fingerprint_of =
        |files: &[PathBuf]| place.open(files, Rows::Texts, &DataOptions::default()).unwrap().fingerprint();
    assert_ne!(fingerprint_of(&files), fingerprint);
    files.swap(2, 3);
    std::fs::rename(&files[2], place.path("other.jsonl")).unwrap();
    files[2] = place.path("other.jsonl");
    assert_eq!(fingerprint_of(&files), fingerprint);
    assert_ne!(fingerprint_of(&files[..8]), fingerprint);
    let error = data.document(expected.len()).unwrap_err();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("index")));
    assert_eq!(data.pair(0).unwrap_err().status(), Status::InvalidArgument);
}

#[test]
fn a_file_that_changes_meanwhile_is_noticed() {
    let place = Place::new();
    let rows = ["one", "two", "three"].map(|text| format!("{}\n", json!({"text": text})));
    let text = rows.concat();
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Vec<u8>), usize);
    let changes: [Change; 4] = [
        ("another letter", &|bytes| bytes[25] ^= 1, 1),
        ("a row before it is longer", &|bytes| drop(bytes.splice(10..10, *b"xy")), 2),
        ("cut off within it", &|bytes| bytes.truncate(rows[0].len() + 5), 1),
        ("cut off before it", &|bytes| bytes.truncate(rows[0].len()), 1),
    ];
    for (name, change, index) in changes {
        let path = place.write("rows.jsonl", &text);
        let mut data = place.open(&[path], Rows::Texts, &DataOptions::default()).unwrap();
        let mut bytes = text.clone().into_bytes();
        change(&mut bytes);
        let path = place.write("rows.jsonl", bytes);
        let error = data.document(index).expect_err(name);
        assert_eq!(error.status(), Status::DataChanged, "{name}: {error}");
        assert_eq!(error.file(), Some(&*path.display().to_string()), "{name}");
    }
    for (name, changed) in [("longer", "hello, yes"), ("other", "hellO")] {
        let path = place.write("text.txt", "hello");
        let mut data = place.open(&[path], Rows::Texts, &DataOptions::default()).unwrap();
        place.write("text.txt", changed);
        assert_eq!(data.document(0).expect_err(name).status(), Status::DataChanged, "{name}");
    }
    let path = place.write("rows.jsonl", &text);
    let mut data = place.open(std::slice::from_ref(&path), Rows::Texts, &DataOptions::default()).unwrap();
    std::fs::remove_file(path).unwrap();
    assert_eq!(data.document(0).unwrap_err().status(), Status::FileNotFound);
}
