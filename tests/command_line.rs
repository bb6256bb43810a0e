//! The command line: its JSON shapes, which scripts depend on, and what it says when something is wrong.
#![cfg(feature = "cli")]

mod common;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use common::{Directory, Random, load, repository, session};
use gemmoe::backend::KvDtype;
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::engine::score::{perplexity, score_in_windows};
use gemmoe::text::Message;
use gemmoe::text::grammar::{Grammar, GrammarKind};
use gemmoe::train::pass::{PassSize, training_bytes};
use gemmoe::{LoadOptions, Model, Overflow, Pooling, RouterPatch, Sampling, Session, SessionOptions};
use serde_json::{Value, json};

fn gemmoe(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// Without what the surroundings say about colours.
fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemmoe"));
    command.args(arguments);
    for name in ["NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE"] {
        command.env_remove(name);
    }
    command
}

fn demo_model() -> PathBuf {
    repository().join("examples/demo-model")
}

fn text_of(arguments: &[&str]) -> String {
    let output = gemmoe(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The numbers of a JSON array.
fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect()
}

fn json_of(arguments: &[&str]) -> Value {
    let output = gemmoe(arguments);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn list(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn threads_of_every_kind_give_the_same() {
    let directory = Directory::random(20).to_temporary();
    let base = ["logits", "--model", directory.path().to_str().unwrap(), "--tokens", "2,17,5", "--json"];
    let expected = text_of(&[&base[..], &["--threads", "1"]].concat());
    let kinds: [&[&str]; 3] = [&["--threads", "1", "--pin"], &["--priority", "low"], &["--priority", "lowest"]];
    for kind in kinds {
        assert_eq!(text_of(&[&base[..], kind].concat()), expected, "{kind:?}");
    }
}

#[test]
fn logits_prints_the_last_positions_logits_and_experts() {
    let directory = Directory::random(21).to_temporary();
    let path = directory.path().to_str().unwrap();
    let tokens = Random::new(21).tokens(9, 97);
    let found = json_of(&["logits", "--model", path, "--tokens", &list(&tokens), "--json"]);
    let mut session = session(&load(directory.path()));
    session.prefill(&tokens).unwrap();
    assert_eq!(floats(&found["logits"]), session.logits().unwrap());
    let experts: Vec<&[u32]> = (0..2).map(|layer| session.routes(layer).unwrap().experts).collect();
    assert_eq!(found["experts"], json!(experts));
    assert_eq!(found.as_object().unwrap().len(), 2);
}

#[test]
fn generate_prints_new_tokens_and_stops_at_eos_unless_told_not_to() {
    // What it would say anyway, then the same model with one of those tokens as its EOS.
    let mut directory = Directory::random(22);
    let greedy = {
        let written = directory.to_temporary();
        let mut session = session(&load(written.path()));
        session.prefill(&[2, 17, 5]).unwrap();
        (0..6).map(|_| session.step().unwrap()).collect::<Vec<_>>()
    };
    directory.config["eos_token_id"] = json!(greedy[3]);
    let written = directory.to_temporary();
    let path = written.path().to_str().unwrap();
    let base = ["generate", "--model", path, "--tokens", "2,17,5", "--max-new", "6", "--json"];
    let end = greedy.iter().position(|token| *token == greedy[3]).unwrap();
    assert_eq!(json_of(&base), json!({"tokens": &greedy[..=end], "text": ""}));
    let all = [&base[..], &["--ignore-eos"]].concat();
    assert_eq!(json_of(&all), json!({"tokens": greedy, "text": ""}));
    assert_eq!(json_of(&[&base[..6], &["1", "--json"]].concat())["tokens"].as_array().unwrap().len(), 1);
}

#[test]
fn equal_seeds_give_equal_tokens_and_others_do_not() {
    let directory = Directory::random(23).to_temporary();
    let path = directory.path().to_str().unwrap();
    let run = |seed| {
        let base = ["generate", "--model", path, "--tokens", "2,3", "--max-new", "20", "--json", "--ignore-eos"];
        json_of(&[&base[..], &["--temperature", "1", "--top-k", "50", "--top-p", "0.95", "--seed", seed]].concat())
    };
    assert_eq!(run("5"), run("5"));
    assert_ne!(run("5"), run("6"));
}

#[test]
fn text_goes_in_and_comes_out() {
    let demo = repository().join("examples/demo-model");
    let demo = demo.to_str().unwrap();
    let found = json_of(&["generate", "--model", demo, "--prompt", "The reason", "--max-new", "12", "--json"]);
    let text = found["text"].as_str().unwrap();
    assert!(!text.is_empty());
    let plain = gemmoe(&["generate", "--model", demo, "--prompt", "The reason", "--max-new", "12"]);
    assert_eq!(String::from_utf8(plain.stdout).unwrap(), format!("{text}\n"));
    assert!(String::from_utf8(plain.stderr).unwrap().contains("tokens/s"));
}

#[test]
fn inspect_tells_what_is_in_a_directory() {
    let directory = Directory::random(24).to_temporary();
    let path = directory.path().to_str().unwrap();
    let found = json_of(&["inspect", path, "--json"]);
    assert_eq!(found["num_local_experts"], 4);
    assert_eq!(found["layout"], "block_sparse_moe");
    assert_eq!(found["dtypes"], json!(["BF16"]));
    let text = gemmoe(&["inspect", path]);
    assert!(String::from_utf8(text.stdout).unwrap().contains("4 a layer, each token goes to 2"));
}

/// What the library draws with these settings, as the command line's JSON has it.
fn drawn(model: &Arc<Model>, prompt: &[u32], max_new: usize, options: SessionOptions, sampling: Sampling) -> Value {
    let mut session = Session::new(Arc::clone(model), &options).unwrap();
    session.set_sampling(sampling).unwrap();
    session.prefill(prompt).unwrap();
    json!((0..max_new).map(|_| session.step().unwrap()).collect::<Vec<_>>())
}

#[test]
fn every_setting_of_generate_reaches_the_session() {
    let directory = Directory::random(31).to_temporary();
    let path = directory.path().to_str().unwrap();
    let model = load(directory.path());
    let plain = Sampling { temperature: 1.5, seed: 3, ..Sampling::default() };
    let room = SessionOptions { context_size: 108, ..Default::default() };
    let slide = SessionOptions { context_size: 12, overflow: Overflow::Slide { keep: 2 }, ..room };
    let rows: Vec<(&[&str], SessionOptions, Sampling)> = vec![
        (&[], room, plain),
        (&["--top-k", "7"], room, Sampling { top_k: 7, ..plain }),
        (&["--top-p", "0.5"], room, Sampling { top_p: 0.5, ..plain }),
        (&["--min-p", "0.3"], room, Sampling { min_p: 0.3, ..plain }),
        (&["--repetition-penalty", "3"], room, Sampling { repetition_penalty: 3.0, ..plain }),
        (&["--presence-penalty", "-1.5"], room, Sampling { presence_penalty: -1.5, ..plain }),
        (&["--frequency-penalty", "1.9"], room, Sampling { frequency_penalty: 1.9, ..plain }),
        (
            &["--frequency-penalty", "1.9", "--penalty-window", "4"],
            room,
            Sampling { frequency_penalty: 1.9, penalty_window: 4, ..plain },
        ),
        (&["--kv", "int8"], SessionOptions { kv_dtype: Some(KvDtype::Int8), ..room }, plain),
        (&["--context", "12", "--slide", "2"], slide, plain),
    ];
    let mut seen = Vec::new();
    for (arguments, options, sampling) in rows {
        let base = ["generate", "--model", path, "--tokens", "2,17,5,17,60,17,3,4", "--max-new", "100", "--json"];
        let base = [&base[..], &["--ignore-eos", "--temperature", "1.5", "--seed", "3"], arguments].concat();
        let found = json_of(&base)["tokens"].clone();
        assert_eq!(found, drawn(&model, &[2, 17, 5, 17, 60, 17, 3, 4], 100, options, sampling), "{arguments:?}");
        assert!(!seen.contains(&found), "{arguments:?} changes nothing");
        seen.push(found);
    }
}

#[test]
fn generate_stops_where_the_context_it_was_given_is_full() {
    let directory = Directory::random(32).to_temporary();
    let path = directory.path().to_str().unwrap();
    let base = ["generate", "--model", path, "--tokens", "2,17,5", "--ignore-eos", "--json", "--context", "8"];
    let output = gemmoe(&base);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["tokens"].as_array().unwrap().len(), 5);
    assert!(String::from_utf8(output.stderr).unwrap().contains("the context of 8 tokens is full"));
}

#[test]
fn generate_keeps_to_a_grammar_from_the_first_new_token_on() {
    let demo = demo_model();
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = files.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let schema = file("schema.json", r#"{"enum": ["left", "right"]}"#);
    let lark = file("grammar.lark", "start: \"yes\" | \"no, never\"");
    let model = load(&demo);
    let rows: [(&str, &str, GrammarKind, &str, &[&str]); 3] = [
        (
            "--json-schema",
            &schema,
            GrammarKind::JsonSchema,
            r#"{"enum": ["left", "right"]}"#,
            &["\"left\"", "\"right\""],
        ),
        ("--regex", "(red|green) [0-9]", GrammarKind::Regex, "(red|green) [0-9]", &["red ", "green "]),
        ("--grammar", &lark, GrammarKind::Lark, "start: \"yes\" | \"no, never\"", &["yes", "no, never"]),
    ];
    for (option, value, kind, source, outputs) in rows {
        let base = ["generate", "--model", demo.to_str().unwrap(), "--prompt", "The reason", "--json", option, value];
        let found = json_of(&base);
        let text = found["text"].as_str().unwrap();
        assert!(outputs.iter().any(|output| text.starts_with(output)), "{option}: {text:?}");
        let mut session = session(&model);
        session.prefill(&model.encode("The reason", true, false).unwrap()).unwrap();
        let grammar = Grammar::new(model.grammar_vocabulary().unwrap(), kind, source).unwrap();
        session.set_grammar(Some(&grammar)).unwrap();
        let expected: Vec<u32> =
            (0..found["tokens"].as_array().unwrap().len()).map(|_| session.step().unwrap()).collect();
        assert_eq!(found["tokens"], json!(expected), "{option}");
        assert_eq!(session.is_grammar_complete().unwrap(), Some(true), "{option}");
    }
    let cut =
        ["generate", "--model", demo.to_str().unwrap(), "--prompt", "x", "--regex", "[a-z]{90}", "--max-new", "2"];
    assert!(String::from_utf8(gemmoe(&cut).stderr).unwrap().contains("ends before the grammar does"));
}

#[test]
fn plan_prints_what_the_library_plans() {
    let directory = Directory::random(33).to_temporary();
    let path = directory.path().to_str().unwrap();
    let options = [
        "--context",
        "40",
        "--chunk",
        "9",
        "--kv",
        "f16",
        "--sessions",
        "3",
        "--threads",
        "2",
        "--device-memory-limit",
        "1.5MB",
    ];
    let arguments = [&["plan", path][..], &options].concat();
    let load = LoadOptions { cpu: CpuOptions { threads: 2.into(), ..Default::default() }, ..Default::default() };
    let session =
        SessionOptions { context_size: 40, prefill_chunk: 9, kv_dtype: Some(KvDtype::F16), ..Default::default() };
    let plan = Model::plan(directory.path(), &load, &session).unwrap();
    let mut found = json_of(&[&arguments[..], &["--json"]].concat());
    let free = found.as_object_mut().unwrap().remove("free_bytes").unwrap();
    let fits = found.as_object_mut().unwrap().remove("fits").unwrap();
    let expected = json!({
        "device": plan.device_name,
        "weight_bytes": plan.weight_bytes,
        "expert_bytes": plan.expert_bytes,
        "device_bytes": 0,
        "staging_bytes": 0,
        "host_bytes": plan.weight_bytes,
        "device_experts": 0,
        "host_experts": 8,
        "formats": {
            "experts": {"format": "bf16", "group_size": null, "scales": null},
            "attention": {"format": "bf16", "group_size": null, "scales": null},
            "head": {"format": "bf16", "group_size": null, "scales": null},
            "embedding": {"format": "bf16", "group_size": null, "scales": null},
        },
        "tokenizer_bytes": 0,
        "context_size": 40,
        "kv_dtype": "f16",
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "kv_bytes": plan.kv_bytes,
        "workspace_bytes": plan.workspace_bytes,
        "sessions": 3,
        "total_bytes": plan.total_bytes(3),
        "training": null,
    });
    assert_eq!(found, expected);
    let training = training_bytes(
        &Model::inspect(directory.path(), &load).unwrap().0.config,
        PassSize::new(100, false),
        false,
        Some(2),
    )
    .unwrap();
    let found = json_of(&[&arguments[..], &["--train", "100", "--json"]].concat());
    let expected = json!({
        "max_tokens": 100,
        "workspace_bytes": training.workspace,
        "optimiser_bytes": training.optimiser,
        "checkpoint_bytes": training.checkpoint,
    });
    assert_eq!(found["training"], expected);
    let text = text_of(&[&arguments[..], &["--train", "100"]].concat());
    assert!(text.contains("of training, in batches of 100 tokens") && text.contains("to train routers"), "{text}");
    let text = text_of(&arguments);
    assert!(text.contains("a session of 40 tokens") && text.contains("with 3 sessions"), "{text}");
    assert!(text.contains(&plan.device_name), "{text}");
    if cfg!(target_os = "linux") {
        assert!(free.as_u64().unwrap() > 1 << 20);
        assert_eq!(fits, true);
        assert!(text.contains("It fits: "), "{text}");
        let far_too_many = u64::MAX.to_string();
        let text = text_of(&["plan", path, "--sessions", &far_too_many]);
        assert!(text.contains("It does not fit: "), "{text}");
    }
    assert_eq!(json_of(&["plan", path, "--json"])["context_size"], 512);
}

#[test]
fn score_prints_the_librarys_perplexity() {
    let demo = demo_model();
    let (model, demo) = (load(&demo), demo.to_str().unwrap().to_owned());
    let text = "The reason for this is that the state is not a thing. Die Option wird gesetzt: ünd return None";
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("text.txt");
    std::fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let tokens = model.encode(text, true, false).unwrap();
    for (arguments, context_size, kv_dtype) in
        [(&[][..], 200, None), (&["--context", "9", "--kv", "f32"], 9, Some(KvDtype::F32))]
    {
        let options = SessionOptions { context_size, kv_dtype, ..Default::default() };
        let expected = perplexity(&model, &tokens, &options, &mut |_| ()).unwrap();
        let mut scores = Vec::new();
        score_in_windows(&model, &tokens, &options, &mut |part| scores.extend_from_slice(part)).unwrap();
        let base = [&["score", "--model", &demo, file, "--json"][..], arguments].concat();
        let found = json_of(&base);
        assert_eq!(found["perplexity"].as_f64().unwrap(), expected.value(), "{arguments:?}");
        assert_eq!(found["nats"].as_f64().unwrap(), expected.nats);
        assert_eq!(found["tokens"], tokens.len() - 1);
        assert_eq!(found["bytes"], text.len());
        assert_eq!(found["bits_per_byte"].as_f64().unwrap(), expected.nats / 2f64.ln() / text.len() as f64);
        assert!(found["seconds"].as_f64().unwrap() > 0.0);
        assert_eq!(found.as_object().unwrap().len(), 6);
        let found = json_of(&[&base[..], &["--per-token"]].concat());
        assert_eq!(found["token_ids"], json!(&tokens[1..]));
        assert_eq!(floats(&found["log_probabilities"]), scores);
    }
    let lines = text_of(&["score", "--model", &demo, file, "--per-token"]);
    assert_eq!(lines.lines().count(), tokens.len());
    assert!(!lines.contains('\x1b') && lines.lines().last().unwrap().ends_with('"'), "{lines}");
    let colored = text_of(&["score", "--model", &demo, file, "--per-token", "--color", "always"]);
    assert!(colored.contains("\x1b[3") && !colored.contains("NaN"), "{colored}");
    let plain = text_of(&["score", "--model", &demo, file]);
    for part in ["perplexity ", "bits per byte ", "tokens/s"] {
        assert!(plain.contains(part), "{plain}");
    }
}

#[test]
fn score_reads_what_is_piped_in() {
    let demo = demo_model();
    let arguments = ["score", "--model", demo.to_str().unwrap(), "-", "--json"];
    let mut child = command(&arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"The state").unwrap();
    let output = child.wait_with_output().unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["bytes"], 9);
}

#[test]
fn embed_prints_the_pooled_states_of_the_text_without_bos() {
    let demo = demo_model();
    let model = load(&demo);
    let demo = demo.to_str().unwrap();
    let tokens = model.encode("The reason", false, false).unwrap();
    for (arguments, pooling) in
        [(&[][..], Pooling::Mean), (&["--pooling", "mean"], Pooling::Mean), (&["--pooling", "last"], Pooling::Last)]
    {
        let mut expected = vec![0.0; model.config().hidden_size];
        let mut session = session(&model);
        session.prefill(&[model.config().bos_token_id]).unwrap();
        session.embed(&tokens, pooling, &mut expected).unwrap();
        let found = json_of(&[&["embed", "--model", demo, "--text", "The reason"][..], arguments].concat());
        assert_eq!(floats(&found["embedding"]), expected, "{arguments:?}");
        assert_eq!(found["tokens"], tokens.len());
    }
    let mut expected = vec![0.0; model.config().hidden_size];
    session(&model).embed(&[5, 6], Pooling::Mean, &mut expected).unwrap();
    assert_eq!(floats(&json_of(&["embed", "--model", demo, "--tokens", "5,6"])["embedding"]), expected);
}

/// Counts and weights of a text that is run in windows of `context` tokens, each begun by BOS.
fn routed(model: &Arc<Model>, text: &str, most: usize, context: usize) -> Value {
    let mut tokens = model.encode(text, true, false).unwrap();
    tokens.truncate(most);
    let options = SessionOptions { context_size: context, ..Default::default() };
    let mut session = Session::new(Arc::clone(model), &options).unwrap();
    let mut count = 0;
    for window in tokens[1..].chunks(context - 1) {
        session.rewind(0).unwrap();
        session.prefill(&[tokens[0]]).unwrap();
        session.prefill(window).unwrap();
        count += 1 + window.len();
    }
    let statistics = session.expert_statistics();
    let experts = model.config().num_local_experts;
    json!({
        "tokens": count,
        "counts": statistics.counts().chunks(experts).collect::<Vec<_>>(),
        "weight_sums": statistics.weight_sums().chunks(experts).collect::<Vec<_>>(),
    })
}

#[test]
fn routes_prints_counts_and_weights_of_each_domain() {
    let demo = demo_model();
    let model = load(&demo);
    let domains = demo.join("domains");
    let (demo, directory) = (demo.to_str().unwrap(), domains.to_str().unwrap());
    let python = format!("code={}", domains.join("python.txt").display());
    let base = ["routes", "--model", demo, "--json", "--text", directory, "--text", &python];
    let limits = ["--prompt", "said=The state = we", "--tokens", "150", "--context", "64"];
    let found = json_of(&[&base[..], &limits].concat());
    assert_eq!((&found["num_local_experts"], &found["num_experts_per_tok"]), (&json!(4), &json!(2)));
    let read = |name: &str| std::fs::read_to_string(domains.join(name)).unwrap();
    let expected = [
        ("english", read("english.txt")),
        ("german", read("german.txt")),
        ("mathematics", read("mathematics.txt")),
        ("python", read("python.txt")),
        ("code", read("python.txt")),
        ("said", "The state = we".to_owned()),
    ];
    let found = found["domains"].as_array().unwrap();
    assert_eq!(found.len(), expected.len());
    for (found, (name, text)) in found.iter().zip(&expected) {
        assert_eq!(found["name"], *name);
        let expected = routed(&model, text, 150, 64);
        for key in ["tokens", "counts", "weight_sums"] {
            assert_eq!(found[key], expected[key], "{name}: {key}");
        }
        let specialisation = found["specialisation"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&specialisation), "{specialisation}");
    }
    // Each domain has an expert of its own: the model was made so.
    let favourite = |domain: &Value| {
        let count = |expert: usize| domain["counts"][0][expert].as_u64().unwrap();
        (0..4).max_by_key(|expert| count(*expert)).unwrap()
    };
    assert_eq!(found[..4].iter().map(favourite).collect::<Vec<_>>(), [0, 1, 3, 2]);
}

#[test]
fn routes_draws_a_heat_map_in_colours_or_characters() {
    let demo = demo_model();
    let directory = demo.join("domains");
    let base = ["routes", "--model", demo.to_str().unwrap(), "--text", directory.to_str().unwrap()];
    let plain = text_of(&base);
    assert!(!plain.contains('\x1b'), "{plain}");
    for part in ["english ", "mathematics ", "layer 3  ", "mean  ", "█100", "share of tokens", "50 %", "german  "] {
        assert!(plain.contains(part), "{part:?} is not in\n{plain}");
    }
    assert!(plain.contains("german       expert 1 with 9"), "{plain}");
    assert_eq!(text_of(&[&base[..], &["--color", "never"]].concat()), plain);
    let always = [&base[..], &["--color", "always"]].concat();
    let colored = text_of(&always);
    assert!(colored.contains("\x1b[48;5;229m") && !colored.contains('█'), "{colored}");
    let surrounded = |surroundings: &[(&str, &str)]| {
        let output = command(&base).envs(surroundings.iter().copied()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(surrounded(&[("CLICOLOR_FORCE", "1")]), colored);
    assert_eq!(surrounded(&[("CLICOLOR_FORCE", "1"), ("NO_COLOR", "1")]), plain);
    let weights = text_of(&[&base[..], &["--weights"]].concat());
    assert!(weights.contains("mean weight") && weights.contains("25 %") && weights != plain, "{weights}");
}

#[test]
fn a_dense_model_has_routes_without_specialisation() {
    let shape = json!({"num_local_experts": 2, "num_experts_per_tok": 2, "vocab_size": 4096});
    let directory = Directory::random_with(34, shape).to_temporary();
    std::fs::copy(demo_model().join("tokenizer.json"), directory.path().join("tokenizer.json")).unwrap();
    let base = ["routes", "--model", directory.path().to_str().unwrap(), "--prompt", "all=x y", "--context", "2"];
    assert_eq!(json_of(&[&base[..], &["--json"]].concat())["domains"][0]["specialisation"], Value::Null);
    assert!(text_of(&base).contains("expert 0 with 100 % of the tokens; "));
}

#[test]
fn quantize_writes_a_directory_and_reports_what_it_cost() {
    let (source, directory) = (Directory::random(41).to_temporary(), tempfile::tempdir().unwrap());
    let (from, to) = (source.path().to_str().unwrap(), directory.path().join("out"));
    let arguments = ["quantize", from, to.to_str().unwrap(), "--group-size", "64", "--scales", "f16"];
    let found = json_of(&[&arguments[..], &["--attention", "stored", "--json"]].concat());
    // The embedding, which is the head, and the experts' matrices.
    let tensors = found["tensors"].as_array().unwrap();
    assert_eq!((tensors.len(), &found["perplexity"]), (1 + 2 * 12, &json!([])));
    assert_eq!(tensors[0]["kind"], "embedding");
    let (int4, int8) = (json!("int4"), json!("int8"));
    for tensor in tensors {
        assert_eq!(tensor["format"], if tensor["layer"].is_null() { int8.clone() } else { int4.clone() });
        assert_eq!((&tensor["group_size"], &tensor["scales"]), (&json!(64), &json!("f16")));
        assert!(tensor["relative_error"].as_f64().unwrap() > 0.0);
    }
    let inspected = json_of(&["inspect", to.to_str().unwrap(), "--json"]);
    assert_eq!(inspected["weight_bytes"], found["bytes_after"]);
    assert_eq!(inspected["formats"]["experts"], json!({"format": "int4", "group_size": 64, "scales": "f16"}));
    assert_eq!(inspected["formats"]["attention"]["format"], "bf16");
    let planned = json_of(&["plan", to.to_str().unwrap(), "--json"]);
    assert_eq!(planned["formats"], inspected["formats"]);

    // On load it is the same model.
    let quantize = "experts=int4,head=int8,group-size=64,scales=f16";
    let planned_on_load = json_of(&["plan", from, "--quantize", quantize, "--json"]);
    assert_eq!(planned_on_load["formats"], planned["formats"]);
    assert_eq!(planned_on_load["weight_bytes"], planned["weight_bytes"]);
    let logits = |model: &str, more: &[&str]| {
        json_of(&[&["logits", "--model", model, "--tokens", "2,17,5", "--json"], more].concat())["logits"].clone()
    };
    assert_eq!(logits(to.to_str().unwrap(), &[]), logits(from, &["--quantize", quantize]));

    let text = String::from_utf8(gemmoe(&["quantize", from, to.to_str().unwrap()]).stderr).unwrap();
    assert!(text.contains("nothing is overwritten"), "{text}");
    for wrong in ["experts", "experts=int3", "router=int8", "group-size=48", "experts=int4,scales=bf17"] {
        let output = gemmoe(&["plan", from, "--quantize", wrong]);
        assert!(!output.status.success(), "{wrong}");
    }
}

/// Runs `gemmoe quantize` in a shell after other commands.
fn quantize_after(commands: &str, source: &Path, target: &Path, more: &[&str]) -> Output {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!(r#"{commands} && exec "$0" quantize "$@""#)]).arg(env!("CARGO_BIN_EXE_gemmoe"));
    shell.arg(source).arg(target).args(more).output().unwrap()
}

#[test]
fn quantize_leaves_nothing_behind_where_files_may_not_be_large_or_many_and_takes_more_than_may_be_open() {
    let (source, directory) = (Directory::random(43).to_temporary(), tempfile::tempdir().unwrap());
    let target = directory.path().join("out");
    let is_empty = || std::fs::read_dir(directory.path()).unwrap().next().is_none();
    let output = quantize_after("ulimit -f 20", source.path(), &target, &[]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("model.safetensors: cannot be written") && stderr.contains("file size limit"), "{stderr}");
    assert!(is_empty());
    let mut done = 0;
    for limit in 3..20 {
        let output = quantize_after(&format!("ulimit -n {limit}"), source.path(), &target, &["--shard-bytes", "1"]);
        if output.status.success() {
            assert!(std::fs::read_dir(&target).unwrap().count() > 60);
            std::fs::remove_dir_all(&target).unwrap();
            done += 1;
        }
        assert!(is_empty(), "{limit} files may be open: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert!(done > 5, "{done} limits are enough");
}

#[cfg(target_os = "linux")]
#[test]
fn quantize_refuses_a_mount_point_before_it_writes_anything() {
    let (source, directory) = (Directory::random(44).to_temporary(), tempfile::tempdir().unwrap());
    let (target, other) = (directory.path().join("out"), directory.path().join("other"));
    std::fs::create_dir(&target).unwrap();
    std::fs::create_dir(&other).unwrap();
    let may_mount = Command::new("unshare").args(["-rm", "true"]).output();
    if !may_mount.is_ok_and(|output| output.status.success()) {
        println!("nothing may be mounted here");
        return;
    }
    // Mounts that only this command sees: of another disk, and of a directory of the same one.
    for mount in ["mount -t tmpfs none".to_owned(), format!("mount --bind {}", other.display())] {
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", &format!(r#"{mount} {} && exec "$@""#, target.display()), "sh"]);
        command.args([env!("CARGO_BIN_EXE_gemmoe"), "quantize"]).args([source.path(), &target]);
        let output = command.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains("out: is a mount point: name a directory inside it"), "{mount}: {stderr}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2, "{mount}");
        assert_eq!(std::fs::read_dir(&other).unwrap().count(), 0, "{mount}");
    }
}

#[test]
fn quantize_looks_at_its_target_before_it_runs_the_model() {
    let (directory, demo) = (tempfile::tempdir().unwrap(), demo_model());
    let (occupied, cut_off) = (directory.path().join("occupied"), directory.path().join("cut-off"));
    std::fs::create_dir_all(occupied.join("inside")).unwrap();
    std::fs::create_dir(directory.path().join("cut-off.partial")).unwrap();
    // A text that the perplexity of cannot be had would be the error otherwise.
    let text = directory.path().join("empty.txt");
    std::fs::write(&text, "").unwrap();
    let expected = [
        (occupied, "is not an empty directory"),
        (cut_off, "cut-off.partial: is in the way"),
        (directory.path().join("nowhere/at/all"), "nowhere/at: cannot be written"),
    ];
    for (target, expected) in expected {
        let arguments = [demo.as_path(), &target, Path::new("--perplexity"), &text].map(|path| path.to_str().unwrap());
        let output = gemmoe(&[&["quantize"], &arguments[..]].concat());
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(expected), "{stderr}");
    }
}

#[cfg(unix)]
#[test]
fn an_interrupted_quantize_leaves_nothing_behind() {
    let sizes = json!({"hidden_size": 512, "intermediate_size": 4096});
    let (source, directory) = (Directory::random_with(45, sizes).to_temporary(), tempfile::tempdir().unwrap());
    let (target, partial) = (directory.path().join("out"), directory.path().join("out.partial"));
    let mut command = command(&["quantize", "--threads", "1"]);
    let mut running = command.arg(source.path()).arg(&target).stderr(Stdio::piped()).spawn().unwrap();
    while !partial.exists() {
        assert!(running.try_wait().unwrap().is_none(), "it was over before it could be interrupted");
        std::thread::yield_now();
    }
    // SAFETY: the process is this one's child and has not been waited for.
    assert_eq!(unsafe { libc::kill(running.id() as i32, libc::SIGINT) }, 0);
    let output = running.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && stderr.contains("cancelled"), "{:?}: {stderr}", output.status);
    assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none());
}

#[test]
fn quantize_measures_the_perplexity_before_and_after_and_takes_calibration_texts() {
    let directory = tempfile::tempdir().unwrap();
    let (demo, text) = (demo_model(), directory.path().join("words.txt"));
    let sentences: Vec<&str> = vec!["The reason for this is that it is not."; 4];
    std::fs::write(&text, sentences.join(" ")).unwrap();
    let (demo, text) = (demo.to_str().unwrap(), text.to_str().unwrap());
    let quantize = |name: &str, more: &[&str]| {
        let target = directory.path().join(name);
        text_of(&[&["quantize", demo, target.to_str().unwrap(), "--perplexity", text], more].concat())
    };
    let found: Value = serde_json::from_str(&quantize("plain", &["--json"])).unwrap();
    let calibrated = quantize("calibrated", &["--calibration", text, "--verbose"]);
    let measured = &found["perplexity"][0];
    assert_eq!(measured["name"], "words");
    let (before, after) = (measured["before"].as_f64().unwrap(), measured["after"].as_f64().unwrap());
    assert!(before > 1.0 && (after / before - 1.0).abs() < 0.1, "{before} {after}");
    for part in ["perplexity", "words", "query", "down", "layer", "model.layers.3.block_sparse_moe.experts.3.w2.weight"]
    {
        assert!(calibrated.contains(part), "{part}: {calibrated}");
    }
    let score = json_of(&["score", "--model", directory.path().join("plain").to_str().unwrap(), text, "--json"]);
    assert_eq!(score["perplexity"].as_f64().unwrap(), after);
}

#[test]
fn help_lists_every_command_and_every_option() {
    let commands: [(&str, &[&str]); 9] = [
        ("inspect", &["DIR", "--follow-links", "--json"]),
        (
            "plan",
            &[
                "DIR",
                "--context",
                "--chunk",
                "--kv",
                "--sessions",
                "--threads",
                "--quantize",
                "--follow-links",
                "--json",
            ],
        ),
        (
            "quantize",
            &[
                "DIR",
                "OUT",
                "--experts",
                "--attention",
                "--head",
                "--embedding",
                "--group-size",
                "--scales",
                "--calibration",
                "--perplexity",
                "--threads",
                "--follow-links",
                "--shard-bytes",
                "--verbose",
                "--json",
            ],
        ),
        (
            "generate",
            &[
                "--prompt",
                "--tokens",
                "--threads",
                "--pin",
                "--priority",
                "--max-new",
                "--temperature",
                "--top-k",
                "--top-p",
                "--min-p",
                "--repetition-penalty",
                "--presence-penalty",
                "--frequency-penalty",
                "--penalty-window",
                "--seed",
                "--json-schema",
                "--regex",
                "--grammar",
                "--context",
                "--kv",
                "--slide",
                "--ignore-eos",
                "--json",
            ],
        ),
        ("logits", &["--model", "--tokens", "--json"]),
        ("score", &["FILE", "--context", "--kv", "--per-token", "--color", "--json"]),
        ("embed", &["--text", "--tokens", "--pooling", "mean", "last"]),
        (
            "eval",
            &[
                "--model",
                "--router",
                "--text",
                "--prompt",
                "--pairs",
                "--reference",
                "--beta",
                "--mean-log-probability",
                "--skip-bad-rows",
                "--context",
                "--layers",
                "--svg",
                "--curve",
                "--json",
                "--device",
                "--quantize",
                "--color",
            ],
        ),
        ("routes", &["--text", "--prompt", "--tokens", "--context", "--kv", "--weights", "--color", "--json"]),
    ];
    let all = text_of(&["--help"]);
    for (name, options) in commands {
        assert!(all.contains(&format!("\n  {name} ")), "{name} is not in\n{all}");
        let help = text_of(&[name, "--help"]);
        for option in options {
            assert!(help.contains(option), "{option} is not in\n{help}");
        }
        // Every option is explained.
        let lines: Vec<&str> = help.lines().collect();
        let bare = lines.iter().enumerate().find(|(at, line)| {
            line.trim_start().starts_with("--") && !line.trim_start().contains("  ") && {
                lines.get(at + 1).is_none_or(|next| next.trim().is_empty() || next.trim_start().starts_with('-'))
            }
        });
        assert_eq!(bare, None, "{name}");
    }
}

#[test]
fn what_is_wrong_goes_to_stderr_with_the_culprit_in_it() {
    let directory = Directory::random(25).to_temporary();
    let path = directory.path().to_str().unwrap();
    let demo = demo_model();
    let demo = demo.to_str().unwrap();
    let binary = directory.path().join("model.safetensors");
    let binary = binary.to_str().unwrap();
    let cases: [(&[&str], &str); 27] = [
        (&["inspect", "/nonexistent-model"], "/nonexistent-model"),
        (&["generate", "--model", path, "--prompt", "hello"], "tokenizer.json"),
        (&["generate", "--model", path, "--tokens", "2,97"], "token 1 of the input is 97, the vocabulary has 97"),
        (&["generate", "--model", path, "--tokens", "2,x"], "\"x\" is not a token id"),
        (&["generate", "--model", path, "--tokens", "2", "--temperature", "-1"], "temperature"),
        (&["generate", "--model", path], "--prompt"),
        (&["generate", "--model", path, "--tokens", "2", "--threads", "256", "--pin"], "each of 256 threads"),
        (&["generate", "--model", path, "--tokens", "2", "--priority", "0"], "possible values: normal, low, lowest"),
        (&["generate", "--model", path, "--tokens", "2", "--repetition-penalty", "0"], "repetition_penalty"),
        (&["generate", "--model", path, "--tokens", "2", "--kv", "f64"], "possible values: f32, bf16, f16, int8"),
        (&["generate", "--model", path, "--tokens", "2", "--context", "513"], "max_position_embeddings is 512"),
        (&["generate", "--model", path, "--tokens", "2", "--context", "8", "--slide", "7"], "keep_tokens is 7"),
        (&["generate", "--model", path, "--tokens", "2", "--regex", "a"], "tokenizer.json"),
        (&["generate", "--model", demo, "--tokens", "2", "--regex", "("], "invalid regex \"(\""),
        (&["generate", "--model", demo, "--tokens", "2", "--regex", "a", "--grammar", "b"], "cannot be used with"),
        (&["generate", "--model", demo, "--tokens", "2", "--json-schema", "/no/schema"], "/no/schema: cannot be read"),
        (&["plan", "/nonexistent-model"], "/nonexistent-model"),
        (&["plan", path, "--context", "513"], "max_position_embeddings is 512"),
        (&["score", "--model", demo, "/no/text"], "/no/text: cannot be read"),
        (&["score", "--model", demo, binary], "is not UTF-8 from byte"),
        (&["score", "--model", path, "Cargo.toml"], "tokenizer.json"),
        (&["score", "--model", demo, "/dev/null"], "expected at least two"),
        (&["embed", "--model", demo, "--text", ""], "expected at least one"),
        (&["routes", "--model", demo], "--text"),
        (&["routes", "--model", demo, "--prompt", "no name"], "expected a name, = and a text"),
        (&["routes", "--model", demo, "--text", "code=/no/text"], "/no/text: cannot be read"),
        (&["routes", "--model", demo, "--prompt", "silence="], "the text of domain \"silence\" is empty"),
    ];
    for (arguments, culprit) in cases {
        let output = gemmoe(arguments);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
        assert!(stderr.contains(culprit), "{arguments:?}: {stderr}");
    }
}

#[test]
fn chat_answers_each_line_as_the_library_does_for_the_whole_conversation() {
    let mut chat = command(&["chat", "--model", demo_model().to_str().unwrap(), "--max-new", "12", "--stop", "zzz"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    chat.stdin.take().unwrap().write_all("Hello <end_of_turn> you\nAnd then?\n\nnot read\n".as_bytes()).unwrap();
    let output = chat.wait_with_output().unwrap();
    assert!(output.status.success());

    let model = load(&demo_model());
    let mut turns: Vec<(&str, String)> = Vec::new();
    let mut expected = String::new();
    for line in ["Hello <end_of_turn> you", "And then?"] {
        turns.push(("user", line.to_owned()));
        let messages: Vec<Message> = turns.iter().map(|(role, text)| Message { role, text }).collect();
        let mut session = Session::new(Arc::clone(&model), &SessionOptions::default()).unwrap();
        session.push(&model.encode_chat(&messages, true).unwrap()).unwrap();
        let mut tokens = Vec::new();
        while tokens.len() < 12 {
            let token = session.step().unwrap();
            if model.stop_tokens().contains(&token) {
                break;
            }
            tokens.push(token);
        }
        let answer = String::from_utf8(model.tokenizer().unwrap().decode(&tokens, false).unwrap()).unwrap();
        expected += &format!("{answer}\n");
        turns.push(("model", answer));
    }
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
}

/// The numbers of a figure, which are in order; no unit where it is a share.
fn check_figure(figure: &Value, unit: &str) {
    let number = |key: &str| figure[key].as_f64().unwrap_or_else(|| panic!("{key} of {figure}"));
    assert!(number("lowest") > 0.0 && number("lowest") <= number("median"), "{figure}");
    assert!(number("median") <= number("highest") && number("highest").is_finite(), "{figure}");
    assert_eq!(figure["unit"].as_str(), (!unit.is_empty()).then_some(unit), "{figure}");
}

#[test]
fn bench_tells_every_figure_with_its_range_and_its_share_of_a_roof_it_measured() {
    let demo = demo_model();
    let base = ["bench", "--model", demo.to_str().unwrap(), "--prompt", "20", "--decode", "2", "--rounds", "3"];
    let all = [&base[..], &["--batch", "3,1", "--probe", "8", "--threads", "2", "--kv", "int8", "--json"]].concat();
    let found = json_of(&all);
    let settings = ["device", "weight_bytes", "expert_bits", "kv_dtype", "prompt_tokens", "decode_tokens", "rounds"];
    let keys = [&settings[..], &["roofs", "prefill", "first_token", "decode"]].concat();
    assert!(keys.iter().all(|key| !found[key].is_null()), "{found}");
    assert_eq!(found.as_object().unwrap().len(), keys.len());
    let echoed = ["prompt_tokens", "decode_tokens", "rounds", "kv_dtype"].map(|key| found[key].clone());
    assert_eq!(echoed, [json!(20), json!(2), json!(3), json!("int8")]);
    let model = Model::load(&demo, &LoadOptions::default(), &Default::default()).unwrap();
    assert_eq!(found["weight_bytes"], model.backend().weight_bytes().0);
    assert_eq!(found["expert_bits"], 16.0);

    let roofs = found["roofs"].as_object().unwrap();
    assert_eq!(roofs.len(), 4);
    check_figure(&roofs["read_bandwidth"], "GB/s");
    check_figure(&roofs["f32_multiply_adds"], "G/s");
    for name in ["bf16_dot_products", "int8_dot_products"] {
        // Null where the processor has no such instruction.
        assert!(roofs.contains_key(name));
        roofs.get(name).filter(|roof| !roof.is_null()).into_iter().for_each(|roof| check_figure(roof, "G/s"));
    }
    let check = |figure: &Value, unit: &str| {
        check_figure(figure, unit);
        check_figure(&figure["share"], "");
        assert!(!roofs[figure["roof"].as_str().unwrap()].is_null());
    };
    check(&found["prefill"], "tokens/s");
    check(&found["first_token"], "ms");
    let decode = found["decode"].as_array().unwrap();
    let sessions: Vec<&Value> = decode.iter().map(|figure| &figure["sessions"]).collect();
    assert_eq!(sessions, [&json!(3), &json!(1)]);
    for figure in decode {
        check(figure, "tokens/s");
        let experts = figure["experts_per_layer"].as_f64().unwrap();
        assert!((2.0..=4.0).contains(&experts), "{experts} experts a layer");
    }
    // One token goes to exactly as many experts as the model says.
    assert_eq!(decode[1]["experts_per_layer"], 2.0);
}

#[test]
fn bench_counts_the_bytes_and_multiply_adds_that_a_step_takes() {
    for own_head in [false, true] {
        let mut directory = Directory::random(41);
        if own_head {
            directory.config["tie_word_embeddings"] = json!(false);
            directory
                .tensors
                .insert("lm_head.weight".to_owned(), directory.tensors["model.embed_tokens.weight"].clone());
        }
        let written = directory.to_temporary();
        let path = written.path().to_str().unwrap();
        let found = json_of(&[
            "bench", "--model", path, "--prompt", "3", "--decode", "2", "--rounds", "1", "--batch", "1", "--probe",
            "4", "--kv", "f32", "--json",
        ]);
        let model = load(written.path());
        let config = model.config();
        let (all, experts) = model.backend().weight_bytes();
        let chosen = experts / config.num_local_experts * config.num_experts_per_tok;
        let embedding = config.vocab_size * config.hidden_size * 2;
        // As it lies in memory: rows in sixteens.
        let held = config.vocab_size.next_multiple_of(16) * config.hidden_size * 2;
        // Opening of 8, the token after it, one step that warms up; then two steps, with 11 tokens in their middle.
        let layers = config.num_hidden_layers;
        let kv = 11 * layers * 2 * config.key_value_size() * 4;
        let read = all - experts + chosen + kv - if own_head { held } else { 0 };
        assert_eq!(found["decode"][0]["bytes_per_step"], read as f64, "own head: {own_head}");
        let (description, _) = Model::inspect(written.path(), &Default::default()).unwrap();
        let computed = description.active_parameters() as usize - if own_head { embedding / 2 } else { 0 }
            + 11 * layers * 2 * config.query_size()
            - config.hidden_size;
        assert_eq!(found["decode"][0]["multiply_adds_per_step"], computed as f64, "own head: {own_head}");
    }
}

#[test]
fn bench_prints_a_table_and_refuses_what_it_cannot_measure() {
    let demo = demo_model();
    let base = ["bench", "--model", demo.to_str().unwrap(), "--prompt", "5", "--decode", "1", "--rounds", "1"];
    let text = text_of(&[&base[..], &["--batch", "1,2", "--probe", "4"]].concat());
    for row in ["read bandwidth, GB/s", "f32 multiply-adds, G/s", "prefill of 5, tokens/s", "first token, ms"] {
        assert!(text.lines().any(|line| line.starts_with(row)), "{row} in {text}");
    }
    assert!(
        text.contains("decode of 1 session, tokens/s") && text.contains("decode of 2 sessions, tokens/s"),
        "{text}"
    );
    for wrong in [["--rounds", "0"], ["--batch", "0"], ["--batch", "1,257"], ["--decode", "0"], ["--prompt", "100000"]]
    {
        let output = gemmoe(&[&base[..3], &wrong].concat());
        assert!(!output.status.success(), "{wrong:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("panicked") && !said.is_empty(), "{said}");
    }
}

#[test]
fn a_router_patch_is_described_applied_by_every_command_and_refused_for_another_model() {
    let directory = Directory::random(27).to_temporary();
    let (path, model) = (directory.path().to_str().unwrap(), load(directory.path()));
    let gates: Vec<f32> = model.stored_gates().unwrap().iter().map(|gate| 0.3 - gate).collect();
    let base = model.gates_fingerprint().unwrap();
    let file = directory.path().join("patch.safetensors");
    let name = file.to_str().unwrap();
    let patch = RouterPatch::new(model.config(), &gates, base).unwrap();
    patch.write(&file).unwrap();

    let found = json_of(&["inspect", name, "--json"]);
    let sizes =
        json!({"base": format!("{base:016x}"), "num_hidden_layers": 2, "num_local_experts": 4, "hidden_size": 40});
    assert_eq!(found, json!({"router_patch": sizes}));
    assert!(text_of(&["inspect", name]).contains("2 layers of 4 experts, hidden size 40"));

    let logits = ["logits", "--model", path, "--tokens", "2,17,5", "--json"];
    let found = json_of(&[&logits[..], &["--router", name]].concat());
    assert_ne!(found, json_of(&logits));
    model.apply_router_patch(&patch).unwrap();
    let mut session = session(&model);
    session.prefill(&[2, 17, 5]).unwrap();
    assert_eq!(floats(&found["logits"]), session.logits().unwrap());

    let refusal = |arguments: &[&str]| {
        let output = gemmoe(arguments);
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let other = Directory::random(28).to_temporary();
    let text = refusal(&["logits", "--model", other.path().to_str().unwrap(), "--tokens", "2", "--router", name]);
    assert!(text.contains(name) && text.contains(&format!("{base:016x}")), "{text}");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    for arguments in [&["inspect", name][..], &[&logits[..], &["--router", name]].concat()] {
        let text = refusal(arguments);
        assert!(text.contains(name) && text.contains("its header describes"), "{text}");
    }
}
