//! `gemmoe eval`: its numbers are the library's, its table fits, its pictures are whole, and what is wrong is named.
#![cfg(feature = "cli")]

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Directory, Random, load};
use gemmoe::engine::score::perplexity;
use gemmoe::evaluate::{Evaluator, PreferenceFigures};
use gemmoe::train::PreferenceOptions;
use gemmoe::train::data::{DataOptions, DataSet, Rows};
use gemmoe::{Progress, RouterPatch, SessionOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

const TEXT: &str = "hello ello hell oh hello, lo he hello\nhello hell ole hello\n";

/// Two models of one tokenizer, a patch of the first, texts and pairs.
struct Files {
    directory: TempDir,
}

impl Files {
    fn new() -> Files {
        let files = Files { directory: tempfile::tempdir().unwrap() };
        for (name, seed) in [("first", 1), ("second", 2)] {
            files.model(name, seed, &tokenizer_sample::sample());
        }
        let model = load(&files.path("first"));
        let mut random = Random::new(3);
        let gates: Vec<f32> = model.stored_gates().unwrap().iter().map(|gate| gate + 0.2 * random.unit()).collect();
        let patch = RouterPatch::new(model.config(), &gates, model.gates_fingerprint().unwrap()).unwrap();
        patch.write(&files.path("trained.safetensors")).unwrap();
        files.write("plain.txt", TEXT);
        let answer = |response: &str| json!({"prompt": "hello?", "response": response}).to_string();
        files.write("chat.jsonl", &[answer("hell o"), answer("lo he hello")].join("\n"));
        let pair = |chosen: &str, rejected: &str| {
            json!({"prompt": "hello", "chosen": chosen, "rejected": rejected}).to_string()
        };
        files.write("pairs.jsonl", &[pair("hello", "oh"), pair("lo", "ole he"), pair("e", "hell")].join("\n"));
        files
    }

    fn model(&self, name: &str, seed: u64, tokenizer: &Value) {
        let shape = json!({"vocab_size": tokenizer_sample::VOCAB_SIZE, "num_hidden_layers": 3});
        std::fs::create_dir(self.path(name)).unwrap();
        Directory::random_with(seed, shape).write(&self.path(name));
        std::fs::write(self.path(name).join("tokenizer.json"), tokenizer.to_string()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.path(name), text).unwrap();
    }

    /// In their directory, with what the surroundings say about colours left out.
    fn eval(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemmoe"));
        command.arg("eval").args(arguments).current_dir(self.directory.path());
        for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
            command.env_remove(name);
        }
        command.output().unwrap()
    }

    fn text(&self, arguments: &[&str]) -> String {
        let output = self.eval(arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fault(&self, arguments: &[&str]) -> String {
        let output = self.eval(arguments);
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

const ROUTERS: [&str; 6] = ["--model", "first", "--router", "trained.safetensors", "--model", "other=second"];
const DATA: [&str; 6] = ["--text", "plain.txt", "--text", "talk=chat.jsonl", "--pairs", "pairs.jsonl"];

#[test]
fn the_json_has_the_librarys_numbers_for_every_router() {
    let files = Files::new();
    let arguments = [&ROUTERS[..], &DATA, &["--beta", "0.5", "--json"]].concat();
    let found: Value = serde_json::from_str(&files.text(&arguments)).unwrap();
    assert_eq!((&found["reference"], &found["beta"]), (&json!("first"), &json!(0.5)));
    let routers = found["routers"].as_array().unwrap();
    let names: Vec<&Value> = routers.iter().map(|router| &router["name"]).collect();
    assert_eq!(names, ["first", "trained", "other"]);
    assert_eq!((&routers[1]["patch"], &routers[0]["patch"]), (&json!("trained.safetensors"), &Value::Null));
    let mut reference = Vec::new();
    for (router, directory) in routers.iter().zip(["first", "first", "second"]) {
        let model = load(&files.path(directory));
        if router["name"] == "trained" {
            model.apply_router_patch(&RouterPatch::read(&files.path("trained.safetensors")).unwrap()).unwrap();
        }
        let options = SessionOptions { context_size: 200, ..Default::default() };
        let tokens = model.encode(TEXT, true, false).unwrap();
        let expected = perplexity(&model, &tokens, &options, &mut |_| {}).unwrap();
        let [plain, talk] = [&router["domains"][0], &router["domains"][1]];
        assert_eq!((&plain["name"], &talk["name"]), (&json!("plain"), &json!("talk")));
        assert_eq!(plain["perplexity"], json!(expected.value()));
        assert_eq!((&plain["tokens"], &plain["bytes"]), (&json!(expected.tokens), &json!(TEXT.len())));
        let per_byte = plain["nats_per_byte"].as_f64().unwrap();
        assert!((per_byte - expected.nats / TEXT.len() as f64).abs() < 1e-12);
        let open = |name: &str, rows| {
            let files = [files.path(name)];
            let options = DataOptions { max_tokens: 200, ..Default::default() };
            DataSet::open(&model, &files, rows, &options, &Progress::default()).unwrap()
        };
        let mut evaluator = Evaluator::new(&model, &options).unwrap();
        let mut set = open("chat.jsonl", Rows::Texts);
        let texts = evaluator.documents((0..set.len()).map(|index| set.document(index)), &mut |_| {}).unwrap();
        assert_eq!((&talk["nats"], &talk["documents"]), (&json!(texts.perplexity.nats), &json!(2)));
        assert_eq!(talk["tokens"], json!(texts.perplexity.tokens));
        assert_eq!(talk["routing"]["counts"], json!(texts.routing.counts.chunks(4).collect::<Vec<_>>()));
        let mut set = open("pairs.jsonl", Rows::Pairs);
        let scores = evaluator.pairs((0..set.len()).map(|index| set.pair(index)), &mut |_| {}).unwrap();
        if reference.is_empty() {
            reference = scores.clone();
        }
        let preference = PreferenceOptions { beta: 0.5, ..Default::default() };
        let expected = PreferenceFigures::new(&scores, &reference, &preference).unwrap();
        let pairs = &router["pairs"][0];
        for (key, value) in [
            ("pairs", json!(3)),
            ("wins", json!(expected.wins)),
            ("accuracy", json!(expected.accuracy())),
            ("margin", json!(expected.margin())),
            ("loss", json!(expected.loss)),
            ("plain_accuracy", json!(expected.plain_accuracy())),
            ("plain_accuracy_per_token", json!(expected.plain_accuracy_per_token())),
        ] {
            assert_eq!(pairs[key], value, "{}: {key}", router["name"]);
        }
        assert_eq!(pairs["log_probabilities"]["chosen"], json!(expected.log_probabilities.chosen));
    }
    assert_eq!((&routers[0]["pairs"][0]["accuracy"], &routers[0]["pairs"][0]["ties"]), (&Value::Null, &json!(3)));
    assert_ne!(routers[1]["domains"], routers[0]["domains"]);
    let other = [&ROUTERS[..], &DATA, &["--reference", "other", "--json"]].concat();
    let found: Value = serde_json::from_str(&files.text(&other)).unwrap();
    assert_eq!(found["routers"][2]["pairs"][0]["ties"], json!(3));
    assert_eq!(found["routers"][0]["pairs"][0]["ties"], json!(0));
}

#[test]
fn the_table_stands_side_by_side_in_a_hundred_columns() {
    let files = Files::new();
    let arguments = [&ROUTERS[..], &DATA].concat();
    let table = files.text(&arguments);
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    assert!(!table.contains('\x1b'), "{table}");
    for part in [
        "first",
        "trained",
        "other",
        "perplexity\n  plain ",
        "talk   2 documents, ",
        "nats per byte",
        " ties",
        "pairs: 3 pairs, beside first",
    ] {
        assert!(table.contains(part), "{part:?} is not in\n{table}");
    }
    assert!(table.contains('*') && table.contains("the best of its line; differences are to first"), "{table}");
    // A row a domain, a block a router; with --layers a row a layer.
    assert!(table.contains("\nplain   ") && !table.contains("layer 0"), "{table}");
    let layers = files.text(&[&arguments[..], &["--layers"]].concat());
    assert!(layers.contains("layer 2") && layers.contains("talk, trained"), "{layers}");
    let colored = files.text(&[&arguments[..], &["--color", "always"]].concat());
    assert!(colored.contains("\x1b["), "{colored}");
    let alone = files.text(&["--model", "first", "--text", "plain.txt"]);
    assert!(!alone.contains("differences") && !alone.contains("log p"), "{alone}");
    assert_eq!(files.text(&["--model", "first", "--pairs", "pairs.jsonl"]).matches("share of tokens").count(), 0);
}

/// The picture, checked to be XML, and the titles of its cells.
fn picture(path: &Path) -> (String, Vec<String>) {
    let text = std::fs::read_to_string(path).unwrap();
    let document = roxmltree::Document::parse(&text).unwrap();
    assert_eq!(document.root_element().tag_name().name(), "svg");
    let titles = document.descendants().filter(|node| node.has_tag_name("title"));
    let titles = titles.map(|node| node.text().unwrap().trim().to_owned()).collect();
    assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    (text, titles)
}

#[test]
fn the_picture_has_every_cell_and_the_same_bytes_each_time() {
    let files = Files::new();
    let named = ["--text", "a<b&c=plain.txt"];
    let arguments = [&ROUTERS[..], &DATA, &named, &["--svg", "one.svg", "--json"]].concat();
    let found: Value = serde_json::from_str(&files.text(&arguments)).unwrap();
    let (text, titles) = picture(&files.path("one.svg"));
    // Three routers, three domains, three layers and their mean, four experts.
    assert_eq!(titles.len(), 3 * 3 * 4 * 4);
    let routing = &found["routers"][0]["domains"][0]["routing"];
    let share = routing["counts"][1][2].as_f64().unwrap() / routing["tokens"].as_f64().unwrap();
    assert!(titles.contains(&format!("plain, layer 1, expert 2: {:.1} %", 100.0 * share)), "{titles:?}");
    assert!(titles.iter().any(|title| title.starts_with("a<b&c, ")), "{titles:?}");
    files.text(&[&ROUTERS[..], &DATA, &named, &["--svg", "two.svg"]].concat());
    assert_eq!(picture(&files.path("two.svg")).0, text);
}

fn metrics(steps: u64) -> String {
    let mut lines = String::new();
    for step in 0..=steps {
        let number = step as f64;
        if step > 0 {
            let line = json!({
                "step": step, "loss": 3.0 - 0.1 * number, "text_loss": 2.9 - 0.1 * number, "balance": 2.1, "z": 0.5,
                "tokens": 100, "targets": 60, "gradient_norm": 0.3, "learning_rate": 1e-4 * number,
                "shares": [[0.5, 0.5], [0.25, 0.75]],
            });
            lines += &format!("{line}\n");
        }
        if step % 2 == 0 {
            lines +=
                &format!("{}\n", json!({"step": step, "held_out": {"loss": 3.0, "text_loss": 2.8, "balance": 2.0}}));
        }
    }
    lines
}

#[test]
fn the_curves_of_a_training_need_no_model_and_bear_a_line_that_was_cut_off() {
    let files = Files::new();
    files.write("metrics.jsonl", &metrics(10));
    assert_eq!(files.text(&["--curve", "metrics.jsonl", "--svg", "curve.svg"]), "");
    let (text, _) = picture(&files.path("curve.svg"));
    for part in ["Loss", "held out", "training", "Balancing loss", "Learning rate", "expert 1", "Norm of the gradient"]
    {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    // Six evaluations of two figures.
    assert_eq!(text.matches("<circle").count(), 12);
    assert!(!text.contains("Accuracy"), "{text}");
    files.write("metrics.jsonl", &(metrics(10) + "{\"step\": 11, \"lo"));
    files.text(&["--curve", "metrics.jsonl", "--svg", "again.svg"]);
    assert_eq!(picture(&files.path("again.svg")).0, text);
    // Steps that were taken twice, because training went on from a checkpoint, count once.
    files.write("metrics.jsonl", &(metrics(14).replace("\"balance\":2.1", "\"balance\":9.9") + &metrics(10)));
    files.text(&["--curve", "metrics.jsonl", "--svg", "again.svg"]);
    assert_eq!(picture(&files.path("again.svg")).0, text);
    // Too many experts for lines of their own.
    let shares = vec![vec![1.0 / 64.0; 64]; 2];
    files.write("metrics.jsonl", &json!({"step": 1, "loss": 1.0, "shares": shares}).to_string());
    files.text(&["--curve", "metrics.jsonl", "--svg", "many.svg"]);
    let (text, _) = picture(&files.path("many.svg"));
    assert!(text.contains("64 experts") && text.contains("least used") && !text.contains("expert 1<"), "{text}");
    files.write("metrics.jsonl", &metrics(1));
    files.text(&["--curve", "metrics.jsonl", "--svg", "short.svg", "--model", "first", "--text", "plain.txt"]);
    let (text, titles) = picture(&files.path("short.svg"));
    assert!(text.contains("Loss") && titles.len() == 16, "{text}");
}

#[test]
fn what_is_wrong_is_named_with_its_file() {
    let files = Files::new();
    let mut tokenizer = tokenizer_sample::sample();
    tokenizer["model"]["merges"].as_array_mut().unwrap().pop();
    files.model("other-tokenizer", 4, &tokenizer);
    files.write("empty.txt", "");
    files.write("empty.jsonl", "\n");
    files.write("bad.jsonl", "{\"text\": \"hello\"}\n{\"txt\": \"hello\"}\n");
    files.write("metrics.jsonl", "{\"step\": 1, \"loss\": 2.0}\nnonsense\n");
    files.write("no-steps.jsonl", "\n");
    files.write("no-patch.safetensors", "nonsense");
    let first = ["--model", "first"];
    let cases: [(&[&str], &[&str]); 18] = [
        (&["--text", "plain.txt"], &["--model"]),
        (&first, &["nothing to evaluate with", "--text"]),
        (&[&first[..], &["--text", "nowhere.txt"]].concat(), &["nowhere.txt", "cannot be read"]),
        (&[&first[..], &["--text", "empty.txt"]].concat(), &["the text of domain \"empty\" is empty"]),
        (&[&first[..], &["--text", "empty.jsonl"]].concat(), &["empty.jsonl"]),
        (&[&first[..], &["--text", "bad.jsonl"]].concat(), &["bad.jsonl", "line 2"]),
        (&[&first[..], &["--pairs", "chat.jsonl"]].concat(), &["chat.jsonl", "line 1", "chosen"]),
        (&[&first[..], &["--text", "pairs.jsonl"]].concat(), &["pairs.jsonl", "line 1"]),
        (&[&first[..], &["--model", "nowhere", "--text", "plain.txt"]].concat(), &["nowhere"]),
        (
            &[&first[..], &["--model", "other-tokenizer", "--text", "plain.txt"]].concat(),
            &["other-tokenizer/tokenizer.json", "has 4 merges, not 5 as first has"],
        ),
        (
            &["--model", "second", "--router", "trained.safetensors", "--text", "plain.txt"],
            &["trained.safetensors", "fingerprint"],
        ),
        (
            &[&first[..], &["--router", "no-patch.safetensors", "--text", "plain.txt"]].concat(),
            &["no-patch.safetensors"],
        ),
        (
            &[&first[..], &["--pairs", "pairs.jsonl", "--reference", "frist"]].concat(),
            &["the reference is \"frist\", expected one of first"],
        ),
        (&[&first[..], &["--pairs", "pairs.jsonl", "--beta", "0"]].concat(), &["beta is 0"]),
        (&[&first[..], &["--pairs", "pairs.jsonl", "--beta", "-1"]].concat(), &["beta is -1"]),
        (
            &[&first[..], &["--pairs", "pairs.jsonl", "--context", "2"]].concat(),
            &["context is 2, and pairs takes at least 4 tokens"],
        ),
        (&["--curve", "metrics.jsonl", "--svg", "x.svg"], &["metrics.jsonl", "line 2 is not the metrics of a step"]),
        (&["--curve", "no-steps.jsonl", "--svg", "x.svg"], &["no-steps.jsonl", "no steps"]),
    ];
    for (arguments, culprits) in cases {
        let stderr = files.fault(arguments);
        for culprit in culprits {
            assert!(stderr.contains(culprit), "{arguments:?}: {culprit:?} is not in {stderr}");
        }
    }
    // Before the models are run.
    for place in ["nowhere/x.svg", "first"] {
        let stderr = files.fault(&[&first[..], &["--text", "plain.txt", "--svg", place]].concat());
        assert!(stderr.contains(&format!("{place}: cannot be written")), "{stderr}");
    }
    // Left out when asked, and said.
    let output = files.eval(&[&first[..], &["--text", "bad.jsonl", "--skip-bad-rows"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("1 of 2 rows are left out"), "{stderr}");
}
