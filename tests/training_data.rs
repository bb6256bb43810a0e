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
fn an_answer_whose_beginning_would_be_one_token_with_the_prompts_end_is_taken_apart() {
    // As the model will meet it: "l" is there before it answers.
    let place = Place::with_template(
        "{% for message in messages %}{{ message.role }}l{{ message.content }}<end_of_turn>{% endfor %}\
         {% if add_generation_prompt %}assistantl{% endif %}",
    );
    let merged = place.encode("assistantlle");
    let begun = place.encode("assistantl");
    assert!(!merged.starts_with(&begun), "the sample has a merge of two l");
    let prompt = |text: &str| [&place.encode(&format!("userl{text}"))[..], &[END], &begun].concat();
    let (first, second) = ([&[BOS][..], &prompt("a")].concat(), prompt("b"));
    let answer = |text: &str| [&place.encode(text)[..], &[END]].concat();
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let row = json!({"messages": [
        turn("user", "a"), turn("assistant", "le"), turn("user", "b"), turn("assistant", "l")
    ]});
    let expected = document(&[(&first, false), (&answer("le"), true), (&second, false), (&answer("l"), true)]);
    assert_eq!(place.document(row), expected);
    let pair = place.pair(json!({"prompt": "a", "chosen": "ll", "rejected": "o"}));
    assert_eq!(pair.chosen, document(&[(&first, false), (&answer("ll"), true)]));
    assert_eq!(pair.rejected, document(&[(&first, false), (&answer("o"), true)]));
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
    for (row, text) in [
        (&rows[0], "has more than the 60 tokens"),
        (&rows[2], "has more than the 60 tokens that are taken (max_tokens)"),
    ] {
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

/// Rows that cannot be used, and how the message goes on behind file and line. Each is alone on line 2.
fn bad_rows() -> Vec<(Rows, Vec<u8>, &'static str)> {
    use Rows::{Pairs, Texts};
    let turn = |role: &str, text: &str| json!({"role": role, "content": text});
    let (user, yes) = (turn("user", "q"), turn("assistant", "yes"));
    let messages = |messages: Value| json!({ "messages": messages }).to_string();
    let pair = |changes: Value| {
        let mut row = json!({"prompt": "q", "chosen": "yes", "rejected": "no"});
        row.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        row.to_string()
    };
    let many_keys: String = (0..257).map(|key| format!("\"{key}\":0,")).collect();
    let mut no_utf8 = b"{\"text\":\"caf".to_vec();
    no_utf8.extend_from_slice(b"\xe9\"}");
    let utf16: Vec<u8> = "\u{feff}{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let texts: Vec<(Vec<u8>, &str)> = vec![
        // Not JSON, or not one object.
        (b"hello".to_vec(), "is not JSON at column 1: expected value"),
        (
            br#"{"text":"x""#.to_vec(),
            "ends within its JSON: EOF while parsing an object; a row is one object, whole on",
        ),
        (b"{".to_vec(), "ends within its JSON: EOF while parsing an object"),
        (br#"{"text": 'x'}"#.to_vec(), "is not JSON at column 10: expected value"),
        (br#"{"text":"x"} {"text":"y"}"#.to_vec(), "is not JSON at column 14: trailing characters"),
        (br#"{"text":"x"},"#.to_vec(), "is not JSON at column 13: trailing characters"),
        (b"{\"text\":\"a\tb\"}".to_vec(), "is not JSON at column 11: control character"),
        (br#"{"text":"\ud800"}"#.to_vec(), "is not JSON at column 16: unexpected end of hex escape"),
        ("[".repeat(500).into_bytes(), "is not JSON at column 128: recursion limit exceeded"),
        (no_utf8, "is not UTF-8 from byte 12 of the line on"),
        (utf16, "is UTF-16, expected UTF-8"),
        (br#"[{"text":"x"}]"#.to_vec(), "is a list, expected an object: JSON Lines have one object on each line"),
        (b"\"text\"".to_vec(), "is \"text\", expected an object"),
        (b"17".to_vec(), "is 17, expected an object"),
        (b"null".to_vec(), "is null, expected an object"),
        // No shape.
        (b"{}".to_vec(), "has no keys, expected \"text\", \"prompt\" and \"response\", "),
        (br#"{"Text":"x"}"#.to_vec(), "has the key \"Text\", expected \"text\""),
        (
            br#"{"prompt":"x","completion":"y"}"#.to_vec(),
            "has the keys \"prompt\", \"completion\", expected \"text\", \"prompt\" and \"response\", \"instruction\" and",
        ),
        (br#"{"text":null,"id":3}"#.to_vec(), "has the keys \"text\", \"id\", expected"),
        (br#"{"text":"x","text":"y"}"#.to_vec(), "has the key \"text\" twice"),
        (br#"{"text":"x","id":1,"id":2}"#.to_vec(), "has the key \"id\" twice"),
        (format!("{{{many_keys}\"text\":\"x\"}}").into_bytes(), "has more than 256 keys"),
        (format!("{{\"{}\":0}}", "k".repeat(1025)).into_bytes(), "has a key of 1025 bytes, at most 1024 are read"),
        (format!("{{\"text\":[{}0]}}", "0,".repeat(1 << 17)).into_bytes(), "has more than 131072 values"),
        (pair(json!({})).into_bytes(), "is a pair of answers, which only the objective dpo learns from"),
        // Wrong values.
        (br#"{"text":7}"#.to_vec(), "\"text\" is 7, expected a text"),
        (br#"{"text":["x"]}"#.to_vec(), "\"text\" is a list of 1, expected a text"),
        (br#"{"text":" \n"}"#.to_vec(), "\"text\" is empty, expected a text"),
        (br#"{"prompt":"x","response":""}"#.to_vec(), "\"response\" is empty, expected a text"),
        (br#"{"prompt":"","response":"y"}"#.to_vec(), "\"prompt\" is empty, expected a text"),
        (br#"{"prompt":{"a":1},"response":"y"}"#.to_vec(), "\"prompt\" is an object, expected a text"),
        (br#"{"instruction":"x","input":3,"output":"y"}"#.to_vec(), "\"input\" is 3, expected a text"),
        (br#"{"instruction":"x","output":true}"#.to_vec(), "\"output\" is true, expected a text"),
        (br#"{"system":0.5,"prompt":"x","response":"y"}"#.to_vec(), "\"system\" is 0.5, expected a text"),
        // Messages.
        (br#"{"messages":"hello"}"#.to_vec(), "\"messages\" is \"hello\", expected a list of messages"),
        (messages(json!([])).into_bytes(), "\"messages\" is an empty list, expected messages"),
        (messages(json!(["hi"])).into_bytes(), "\"messages[0]\" is \"hi\", expected an object with \"role\" and"),
        (
            messages(json!([{"from": "human", "value": "x"}])).into_bytes(),
            "\"messages[0]\" has the keys \"from\", \"value\", expected \"role\" and \"content\"",
        ),
        (
            messages(json!([user, {"role": "assistant", "content": null}])).into_bytes(),
            "\"messages[1].content\" is null, expected a text",
        ),
        (
            messages(json!([user, turn("assistant", "")])).into_bytes(),
            "\"messages[1].content\" is empty, expected a text",
        ),
        (
            messages(json!([turn("human", "x"), yes])).into_bytes(),
            "\"messages[0].role\" is \"human\", expected system, user, assistant (or model) or tool",
        ),
        (br#"{"messages":[{"role":"user","role":"user","content":"x"}]}"#.to_vec(), "has the key \"role\" twice"),
        (messages(json!([user])).into_bytes(), "has \"messages\" of which none is the assistant's"),
        (messages(json!([yes])).into_bytes(), "has messages that cannot be used: messages[0].role is \"assistant\""),
        (
            messages(json!([user, user, yes])).into_bytes(),
            "has messages that cannot be used: messages[1].role is \"user\", expected assistant",
        ),
        (
            messages(json!([user, yes, turn("tool", "x")])).into_bytes(),
            "has messages that cannot be used: messages[2].role is \"tool\", expected user",
        ),
        (
            json!({"system": "s", "messages": [turn("system", "s"), user, yes]}).to_string().into_bytes(),
            "has \"system\" and a system message",
        ),
        (
            json!({"prompt": "x".repeat(200), "response": "y"}).to_string().into_bytes(),
            "has a prompt that leaves no room for a response in 100 tokens (max_tokens)",
        ),
        (
            json!({"prompt": "x".repeat(3 << 20), "response": "y"}).to_string().into_bytes(),
            "has messages that cannot be used: the messages have 3145729 bytes of text",
        ),
    ];
    let pairs: Vec<(String, &str)> = vec![
        (json!({"text": "x"}).to_string(), "has the key \"text\", expected \"prompt\", \"chosen\" and \"rejected\""),
        (
            json!({"prompt": "x", "chosen": "y"}).to_string(),
            "has the keys \"prompt\", \"chosen\", expected \"prompt\", \"chosen\" and \"rejected\"",
        ),
        (
            json!({"chosen": "y", "rejected": "z"}).to_string(),
            "has the keys \"chosen\", \"rejected\", expected \"prompt\", \"chosen\" and \"rejected\"",
        ),
        (
            pair(json!({"rejected": "yes"})),
            "has \"chosen\" and \"rejected\" that are the same: neither can be preferred",
        ),
        (pair(json!({"rejected": " yes\n"})), "has \"chosen\" and \"rejected\" that are the same: neither"),
        (pair(json!({"chosen": ""})), "\"chosen\" is empty, expected a text"),
        (pair(json!({"rejected": 5})), "\"rejected\" is 5, expected a text"),
        (pair(json!({"prompt": []})), "\"prompt\" is an empty list, expected messages"),
        (pair(json!({"prompt": true})), "\"prompt\" is true, expected a text"),
        (pair(json!({"prompt": [user, yes]})), "has answers that follow a message of the assistant"),
        (pair(json!({"chosen": [yes, user]})), "has \"chosen\" whose last message is not the assistant's"),
        (
            pair(json!({"rejected": [turn("user", "other"), yes]})),
            "has \"rejected\" after other messages than its prompt, expected the same ones",
        ),
        (
            json!({"chosen": [user, yes], "rejected": [turn("user", "other"), yes]}).to_string(),
            "has \"rejected\" after other messages than its prompt, expected the same ones",
        ),
        (
            pair(json!({"system": "s", "prompt": [turn("system", "s"), user]})),
            "has \"system\" and a system message: one of them is too many",
        ),
        (
            pair(json!({"prompt": "q".repeat(60)})),
            "has a prompt that leaves no room for two answers in 100 tokens (max_tokens)",
        ),
        (
            pair(json!({"chosen": "x".repeat(50) + "a", "rejected": "x".repeat(50) + "b"})),
            "has \"chosen\" and \"rejected\" that are the same once they are cut (max_tokens)",
        ),
    ];
    let texts = texts.into_iter().map(|(row, text)| (Texts, row, text));
    texts.chain(pairs.into_iter().map(|(row, text)| (Pairs, row.into_bytes(), text))).collect()
}

#[test]
fn every_bad_row_has_its_own_message_with_file_and_line() {
    let place = Place::new();
    let cases = bad_rows();
    let mut messages = std::collections::BTreeSet::new();
    for (rows, row, text) in &cases {
        let good = match rows {
            Rows::Texts => json!({"text": "good"}),
            Rows::Pairs => json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
        };
        let good = format!("{good}\n").into_bytes();
        let path = place.write("rows.jsonl", [&good[..], row, b"\n", &good].concat());
        let shown = String::from_utf8_lossy(&row[..row.len().min(100)]);
        let options = DataOptions { max_tokens: 100, ..Default::default() };
        let Err(error) = place.open(std::slice::from_ref(&path), *rows, &options) else { panic!("taken: {shown}") };
        let start = format!("{}: line 2: {text}", path.display());
        assert!(error.to_string().starts_with(&start), "{error}\nexpected {start}\nof {shown}");
        assert_eq!((error.status(), error.file()), (Status::DataRow, Some(&*path.display().to_string())));
        messages.insert(error.to_string());

        // Left out, it is told all the same, and the rows around it are used.
        let options = DataOptions { bad_rows: BadRows::Skip, ..options };
        let data = place.open(&[path], *rows, &options).unwrap();
        let report = data.report();
        assert_eq!((report.rows, report.good, report.skipped, report.too_long, data.len()), (3, 2, 1, 0, 2), "{shown}");
        assert_eq!(report.left_out.len(), 1, "{shown}");
        assert_eq!(report.left_out[0].to_string(), error.to_string());
    }
    assert!(cases.len() >= 60 && messages.len() >= cases.len() - 4, "{} of {}", messages.len(), cases.len());
}

#[test]
fn files_that_cannot_be_used_are_told_by_their_path() {
    let place = Place::new();
    std::fs::create_dir(place.path("folder.jsonl")).unwrap();
    let row = json!({"text": "x"}).to_string();
    let pair = json!({"prompt": "a", "chosen": "b", "rejected": "c"}).to_string();
    let cases: [(&str, Option<&[u8]>, Rows, Status, &str); 9] = [
        ("absent.jsonl", None, Rows::Texts, Status::FileNotFound, "there is no such file"),
        ("folder.jsonl", None, Rows::Texts, Status::FileNotAllowed, "is a folder, expected a file of rows"),
        ("empty.jsonl", Some(b""), Rows::Texts, Status::DataRow, "has no rows, expected JSON Lines: an object on each"),
        ("blank.jsonl", Some(b"\n \r\n\t"), Rows::Pairs, Status::DataRow, "has no rows, expected JSON Lines"),
        ("empty.txt", Some(b""), Rows::Texts, Status::DataRow, "line 1: is empty, expected a text"),
        ("mark.txt", Some(b"\xef\xbb\xbf \n"), Rows::Texts, Status::DataRow, "line 1: is empty, expected a text"),
        (
            "latin.txt",
            Some(b"one\ntwo\ncaf\xe9"),
            Rows::Texts,
            Status::DataRow,
            "line 3: is not UTF-8 from byte 11 of the",
        ),
        (
            "half.txt",
            Some(b"one\xe6\xbc"),
            Rows::Texts,
            Status::DataRow,
            "line 1: is not UTF-8 from byte 3 of the file",
        ),
        ("text.txt", Some(b"hello"), Rows::Pairs, Status::DataRow, "line 1: is a text, expected JSON Lines of pairs"),
    ];
    for (name, bytes, rows, status, text) in cases {
        if let Some(bytes) = bytes {
            place.write(name, bytes);
        }
        let before = place.write("good.jsonl", if rows == Rows::Texts { &row } else { &pair });
        let files = [before, place.path(name)];
        let error = place.open(&files, rows, &DataOptions::default()).err().expect(name);
        assert_eq!((error.status(), error.file()), (status, Some(&*files[1].display().to_string())), "{error}");
        assert!(error.to_string().starts_with(&format!("{}: {text}", files[1].display())), "{error}");
        // What bad rows are left out for.
        let skip = DataOptions { bad_rows: BadRows::Skip, ..Default::default() };
        let skipped = place.open(&files, rows, &skip).map(|data| (data.len(), data.report().skipped)).ok();
        assert_eq!(skipped, text.starts_with("line ").then_some((1, 1)), "{name}");
    }
    // Far behind the first section, which is taken out again.
    let mut text = long_text(4, 200_000).into_bytes();
    let line = text[..180_000].iter().filter(|byte| **byte == b'\n').count() + 1;
    text.splice(180_000.., *b"\xff");
    let at = std::str::from_utf8(&text).unwrap_err().valid_up_to();
    let files = [place.write("late.txt", text), place.path("good.jsonl")];
    place.write("good.jsonl", &row);
    let skip = DataOptions { bad_rows: BadRows::Skip, ..Default::default() };
    let mut data = place.open(&files, Rows::Texts, &skip).unwrap();
    let reason = format!("late.txt: line {line}: is not UTF-8 from byte {at} of the file on");
    assert!(data.report().left_out[0].to_string().ends_with(&reason), "{:?}", data.report());
    assert_eq!((data.len(), data.report().tokens, data.report().split), (1, 3, 0));
    assert_eq!(data.document(0).unwrap(), place.document(json!({"text": "x"})));
}

#[test]
fn options_out_of_range_no_files_and_a_model_without_a_tokenizer_are_refused() {
    let place = Place::new();
    let path = place.write("rows.jsonl", json!({"text": "x"}).to_string());
    for (max_tokens, rows) in [(0, Rows::Texts), (1, Rows::Texts), ((1 << 20) + 1, Rows::Texts), (3, Rows::Pairs)] {
        let options = DataOptions { max_tokens, ..Default::default() };
        let error = place.open(std::slice::from_ref(&path), rows, &options).err().unwrap();
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("max_tokens")), "{error}");
    }
    let error = place.open(&[], Rows::Texts, &DataOptions::default()).err().unwrap();
    assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("files")));
    let error = Place::with(&[]).open(&[path], Rows::Texts, &DataOptions::default()).err().unwrap();
    assert_eq!(error.status(), Status::NoTokenizer);
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let place = Place::new();
    let path = place.path("pipe.jsonl");
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    let error = place.open(&[path], Rows::Texts, &DataOptions::default()).err().unwrap();
    assert_eq!(error.status(), Status::FileNotAllowed);
    assert!(
        error.to_string().ends_with("is a device or a pipe, expected a file: rows are read more than once"),
        "{error}"
    );
}

#[test]
fn twenty_bad_rows_are_told_and_all_are_counted() {
    let place = Place::new();
    let rows: String = (0..60).map(|row| if row % 2 == 0 { "{}\n" } else { "{\"text\":\"x\"}\n" }).collect();
    let path = place.write("rows.jsonl", rows);
    let options = DataOptions { bad_rows: BadRows::Skip, ..Default::default() };
    let data = place.open(std::slice::from_ref(&path), Rows::Texts, &options).unwrap();
    let report = data.report();
    assert_eq!((report.rows, report.good, report.skipped, report.documents), (60, 30, 30, 30));
    let lines: Vec<u64> = report.left_out.iter().map(|row: &BadRow| row.line).collect();
    assert_eq!(lines, (0..20).map(|row| 2 * row + 1).collect::<Vec<_>>());
    assert_eq!(report.left_out[0].file, path.display().to_string());

    let path = place.write("bad.jsonl", "{}\n{}\n");
    let error: Error = place.open(&[path], Rows::Texts, &options).err().unwrap();
    assert_eq!(error.status(), Status::DataRow);
    assert!(error.to_string().starts_with("none of 2 rows can be used; the first: "), "{error}");
    assert!(error.to_string().contains("bad.jsonl: line 1: has no keys"), "{error}");
}

#[test]
fn a_line_longer_than_any_row_is_a_bad_row_and_those_behind_it_are_found() {
    let place = Place::new();
    let row = json!({"text": "behind"});
    let path = place.write("rows.jsonl", format!("{{\"text\":\"{}\"}}\n{row}\n", "x".repeat(16 << 20)));
    let options = DataOptions { bad_rows: BadRows::Skip, ..Default::default() };
    let mut data = place.open(&[path], Rows::Texts, &options).unwrap();
    assert_eq!(data.report().left_out[0].line, 1);
    assert_eq!(data.report().left_out[0].reason, "is longer than 16777216 bytes, the most a row may have");
    assert_eq!(data.document(0).unwrap(), place.document(row));
}

#[test]
fn reading_is_watched_and_cancelled() {
    let place = Place::new();
    let text = format!("\u{feff}\n{}\r\n{{}}", json!({"text": "x"}));
    let late = [long_text(6, 100_000).as_bytes(), b"\xff", &[b'x'; 1000]].concat();
    let files =
        [place.write("rows.jsonl", text), place.write("mark.txt", "\u{feff}hello"), place.write("late.txt", late)];
    let bytes: u64 = files.iter().map(|file| std::fs::metadata(file).unwrap().len()).sum();
    let options = DataOptions { bad_rows: BadRows::Skip, ..Default::default() };
    let progress = Progress::default();
    DataSet::open(&place.model, &files, Rows::Texts, &options, &progress).unwrap();
    assert_eq!((progress.bytes_total(), progress.bytes_read()), (bytes, bytes));
    progress.cancel();
    for file in files {
        let error = DataSet::open(&place.model, &[file], Rows::Texts, &options, &progress).err().unwrap();
        assert_eq!(error.status(), Status::Cancelled);
        assert!(error.to_string().ends_with("reading the data was cancelled"), "{error}");
    }
}

#[test]
fn random_and_damaged_bytes_are_rows_or_not_and_nothing_breaks() {
    let place = Place::new();
    let mut random = Random::new(9);
    let seeds: Vec<Vec<u8>> = bad_rows().into_iter().map(|(_, row, _)| row).filter(|row| row.len() < 1000).collect();
    let good = [
        json!({"text": "héllo \u{1f600}\n"}),
        json!({"system": "s", "prompt": "a", "response": "b", "chosen": "c", "rejected": "d"}),
        json!({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<eos>"}], "id": [1, {}]}),
        json!({"chosen": [{"role": "user", "content": "q"}, {"role": "model", "content": "a"}], "rejected": "b", "prompt": "q"}),
    ];
    let pieces = ["\"", "{", "}", "[", "]", "\\u", "null", "\r", "\n", "\u{feff}", "role", "content", "e9", "-"];
    for round in 0..300 {
        let mut bytes = Vec::new();
        for _ in 0..random.below(12) {
            match random.below(5) {
                0 => bytes.extend((0..random.below(40)).map(|_| random.below(256) as u8)),
                1 => bytes.extend_from_slice(&seeds[random.below(seeds.len())]),
                _ => bytes.extend_from_slice(good[random.below(good.len())].to_string().as_bytes()),
            }
            bytes.push(b'\n');
        }
        for _ in 0..random.below(6) {
            let at = random.below(bytes.len() + 1);
            let piece = pieces[random.below(pieces.len())].as_bytes();
            let end = (at + random.below(4)).min(bytes.len());
            bytes.splice(at..end, piece.iter().copied());
        }
        for name in ["random.jsonl", "random.txt"] {
            let path = place.write(name, &bytes);
            for rows in [Rows::Texts, Rows::Pairs] {
                let max_tokens = 4 + random.below(60);
                let long_rows = [LongRows::Cut, LongRows::Skip][random.below(2)];
                let options = DataOptions { max_tokens, long_rows, bad_rows: BadRows::Skip, ..Default::default() };
                let data = place.open(std::slice::from_ref(&path), rows, &options);
                let Ok(mut data) = data.inspect_err(|error| assert_eq!(error.status(), Status::DataRow, "{error}"))
                else {
                    continue;
                };
                let report = data.report().clone();
                assert_eq!(report.good + report.skipped, report.rows, "round {round}");
                assert_eq!(report.documents, data.len() as u64);
                let documents: Vec<Document> = match rows {
                    Rows::Texts => all(&mut data),
                    Rows::Pairs => (0..data.len())
                        .map(|index| data.pair(index).unwrap())
                        .inspect(|pair| assert!(pair.chosen.tokens.len() + pair.rejected.tokens.len() <= max_tokens))
                        .flat_map(|pair| [pair.chosen, pair.rejected])
                        .collect(),
                };
                for document in &documents {
                    document.check(place.model.config(), max_tokens).unwrap();
                    assert_eq!((document.tokens[0], document.is_response[0]), (BOS, false));
                }
                let sum = |count: fn(&Document) -> usize| documents.iter().map(count).sum::<usize>() as u64;
                assert_eq!(report.tokens, sum(|document| document.tokens.len()), "round {round}");
                assert_eq!(report.targets, sum(Document::targets), "round {round}");
            }
        }
    }
}
