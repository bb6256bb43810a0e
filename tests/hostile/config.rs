//! config.json: text that is no JSON, values of every wrong kind, models it cannot describe.

use gemmoe::Status;
use serde_json::{Value, json};

use crate::case::{CONFIG, Case, WEIGHTS, bytes, case, config, good, tokenizer};

pub fn cases() -> Vec<Case> {
    let mut cases = texts();
    cases.extend(values());
    cases.extend(families());
    cases.extend(contradictions());
    cases.extend(bombs());
    cases
}

fn texts() -> Vec<Case> {
    let good = good().config.to_string();
    let inside = |text: &str| format!("{},{text}}}", good.trim_end_matches('}'));
    let rows: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("is empty", vec![], &["EOF"]),
        ("is cut in the middle", good.as_bytes()[..good.len() / 2].to_vec(), &[]),
        ("is not UTF-8", inside("\"a\":\"\u{1}\"").replace('\u{1}', "\\").into_bytes(), &[]),
        ("holds a byte that is not UTF-8", [b"{\"model_type\":\"gemm", &[0xff][..], b"oe\"}"].concat(), &["unicode"]),
        ("is a list", b"[]".to_vec(), &["expected an object"]),
        ("is a string", b"\"gemmoe\"".to_vec(), &["expected an object"]),
        ("is null", b"null".to_vec(), &["expected an object"]),
        ("goes on after its end", format!("{good}{good}").into_bytes(), &["trailing"]),
        ("starts with a byte order mark", format!("\u{feff}{good}").into_bytes(), &[]),
        ("names hidden_size twice", inside("\"hidden_size\":40").into_bytes(), &["hidden_size", "twice"]),
        ("names an unknown key twice", inside("\"x\":1,\"x\":1").into_bytes(), &["\"x\"", "twice"]),
        ("names a key twice, once escaped", inside(r#""hidden\u005fsize":40"#).into_bytes(), &["hidden_size", "twice"]),
        ("holds NaN", inside("\"rope_theta\":NaN").into_bytes(), &[]),
        ("holds Infinity", inside("\"rope_theta\":Infinity").into_bytes(), &[]),
        ("holds a number past every float", inside("\"rope_theta\":1e999").into_bytes(), &["out of range"]),
        ("holds half a surrogate", inside(r#""x":"\ud800""#).into_bytes(), &[]),
        ("nests 1000 lists", inside(&format!("\"x\":{}{}", "[".repeat(1000), "]".repeat(1000))).into(), &["recursion"]),
        ("opens a million lists", "[".repeat(1 << 20).into_bytes(), &[]),
        ("opens objects to its end", "{\"a\":".repeat((1 << 20) / 5).into_bytes(), &["recursion"]),
    ];
    let row = |(name, contents, says): (&str, Vec<u8>, &[&str])| {
        case(format!("config.json {name}"), bytes(CONFIG, contents), Status::ConfigSyntax).file(CONFIG).says(says)
    };
    rows.into_iter().map(row).collect()
}

/// Every key with values it cannot have.
fn values() -> Vec<Case> {
    let sizes = [
        ("vocab_size", 16_777_216u64),
        ("hidden_size", 65_536),
        ("intermediate_size", 1_048_576),
        ("num_hidden_layers", 1024),
        ("num_attention_heads", 1024),
        ("num_key_value_heads", 1024),
        ("head_dim", 4096),
        ("max_position_embeddings", 16_777_216),
        ("num_local_experts", 64),
        ("num_experts_per_tok", 64),
    ];
    let mut rows: Vec<(&str, Value, String)> = Vec::new();
    for (key, highest) in sizes {
        let expected = format!("to {highest}");
        for value in [json!(0), json!(highest + 1), json!(u64::MAX), json!(-1), json!(1.5), json!(1e300)] {
            rows.push((key, value, expected.clone()));
        }
        for value in [json!("8"), json!([8]), json!({"value": 8}), json!(true)] {
            rows.push((key, value, expected.clone()));
        }
    }
    for key in ["rope_theta", "rms_norm_eps"] {
        for value in [json!(0), json!(-1.0), json!(1e300), json!(1e-300), json!("1"), json!([]), json!(false)] {
            rows.push((key, value, "a finite number above 0".to_owned()));
        }
    }
    for value in [json!(1), json!("true"), json!([]), json!({})] {
        rows.push(("tie_word_embeddings", value, "true or false".to_owned()));
    }
    for value in [json!(-1), json!(0.5), json!(u64::MAX), json!("2"), json!([2]), json!({})] {
        rows.push(("bos_token_id", value, "a whole number".to_owned()));
    }
    for value in [json!([1, -1]), json!([[1]]), json!(["1"]), json!([u64::MAX]), json!(vec![1; 257])] {
        rows.push(("eos_token_id", value, "token id".to_owned()));
    }
    rows.push(("bos_token_id", json!(320), "vocab_size (320)".to_owned()));
    rows.push(("num_key_value_heads", json!(3), "num_attention_heads (4)".to_owned()));
    rows.push(("head_dim", json!(7), "even".to_owned()));
    rows.push(("num_experts_per_tok", json!(5), "num_local_experts (4)".to_owned()));
    rows.push(("model_type", Value::Null, "\"gemmoe\"".to_owned()));
    let row = |(key, value, expected): (&'static str, Value, String)| {
        // An absent key is null to the library; the message then says so in a word.
        let found = if value.is_null() { "absent".to_owned() } else { value.to_string() };
        let found = if found.len() > 80 { found[..80].to_owned() } else { found };
        case(format!("{key} is {found}"), config(json!({key: value})), Status::ConfigValue)
            .file(CONFIG)
            .key(key)
            .says(&[&format!("\"{key}\" is {found}"), &expected])
    };
    rows.into_iter().map(row).collect()
}

/// Models of another kind, which must not be run as if they were this one.
fn families() -> Vec<Case> {
    let rows = [
        ("model_type", json!("llama")),
        ("model_type", json!(["gemmoe"])),
        ("hidden_act", json!("silu")),
        ("hidden_activation", json!("relu")),
        ("hidden_act", json!(7)),
        ("attention_bias", json!(true)),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0})),
        ("sliding_window", json!(4096)),
        ("quantization_config", json!({"bits": 4})),
    ];
    let row = |(key, value): (&'static str, Value)| {
        let says = [format!("\"{key}\" is {value}"), "this library runs".to_owned()];
        case(format!("the config says {key} {value}"), config(json!({key: value})), Status::UnsupportedModel)
            .file(CONFIG)
            .key(key)
            .says(&says.each_ref().map(String::as_str))
    };
    rows.into_iter().map(row).collect()
}

/// Values that are fine by themselves and not those of the tensors.
fn contradictions() -> Vec<Case> {
    use Status::{TensorMissing, TensorShape, TensorUnexpected};
    const EMBEDDING: &str = "model.embed_tokens.weight";
    const LAYER: &str = "model.layers.0.";
    let rows: [(&str, Value, Status, String, [&str; 2]); 12] = [
        ("vocab_size", json!(321), TensorShape, EMBEDDING.into(), ["[320, 40]", "[321, 40]"]),
        ("vocab_size", json!(319), TensorShape, EMBEDDING.into(), ["[320, 40]", "[319, 40]"]),
        ("hidden_size", json!(41), TensorShape, EMBEDDING.into(), ["[320, 40]", "[320, 41]"]),
        ("intermediate_size", json!(23), TensorShape, block(0, 0, "w1"), ["[24, 40]", "[23, 40]"]),
        ("head_dim", json!(10), TensorShape, format!("{LAYER}self_attn.q_proj.weight"), ["[32, 40]", "[40, 40]"]),
        ("num_attention_heads", json!(6), TensorShape, format!("{LAYER}self_attn.q_proj.weight"), ["[32", "[48"]),
        ("num_key_value_heads", json!(4), TensorShape, format!("{LAYER}self_attn.k_proj.weight"), ["[16", "[32"]),
        ("num_local_experts", json!(5), TensorShape, format!("{LAYER}block_sparse_moe.gate.weight"), ["[4", "[5"]),
        (
            "num_hidden_layers",
            json!(3),
            TensorMissing,
            "model.layers.2.input_layernorm.weight".into(),
            ["missing", "[40]"],
        ),
        ("num_hidden_layers", json!(1024), TensorMissing, "model.layers.2.input_layernorm.weight".into(), ["", ""]),
        ("num_hidden_layers", json!(1), TensorUnexpected, String::new(), ["model.layers.1.", "num_hidden_layers is 1"]),
        ("num_local_experts", json!(3), TensorUnexpected, String::new(), ["experts.3.", "num_local_experts is 3"]),
    ];
    let row = |(key, value, status, tensor, says): (&'static str, Value, Status, String, [&str; 2])| {
        let name = format!("the config says {key} {value}, the tensors say otherwise");
        let case = case(name, config(json!({key: value})), status).file(WEIGHTS).says(&says);
        if tensor.is_empty() { case } else { case.key(&tensor).says(&[&tensor]) }
    };
    let mut cases: Vec<Case> = rows.into_iter().map(row).collect();
    let largest = json!({
        "vocab_size": 1 << 24, "hidden_size": 1 << 16, "intermediate_size": 1 << 20, "num_hidden_layers": 1024,
        "num_attention_heads": 1024, "num_key_value_heads": 1024, "head_dim": 4096, "num_local_experts": 64,
        "num_experts_per_tok": 64, "max_position_embeddings": 1 << 24
    });
    cases.push(
        case("the config says the largest of everything", config(largest), TensorShape)
            .file(WEIGHTS)
            .key(EMBEDDING)
            .says(&["[320, 40]", "[16777216, 65536]"]),
    );
    cases
}

fn block(layer: usize, expert: usize, weight: &str) -> String {
    format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{weight}.weight")
}

/// Files that are small on disk and must stay so in memory, and in the message.
fn bombs() -> Vec<Case> {
    const ROOM: usize = (1 << 20) - 64;
    let list = |item: &str| format!("[{}{item}]", format!("{item},").repeat(ROOM / (item.len() + 1)));
    let model_type = |value: String| format!("{{\"model_type\":{value}}}");
    let objects = format!("{{{}\"x\":0}}", "\"\":{},".repeat(ROOM / 6).replacen("\"\"", "\"y\"", 1));
    vec![
        case("config.json is a byte too large", bytes(CONFIG, vec![b' '; (1 << 20) + 1]), Status::FileTooLarge)
            .file(CONFIG)
            .says(&["1048577", "1048576"]),
        case("a megabyte of zeros is the model type", bytes(CONFIG, model_type(list("0"))), Status::UnsupportedModel)
            .file(CONFIG)
            .key("model_type"),
        case(
            "a megabyte of empty lists is the model type",
            bytes(CONFIG, model_type(list("[]"))),
            Status::UnsupportedModel,
        )
        .file(CONFIG)
        .key("model_type"),
        case(
            "a megabyte of letters is the model type",
            bytes(CONFIG, model_type(format!("\"{}\"", "x".repeat(ROOM)))),
            Status::UnsupportedModel,
        )
        .file(CONFIG)
        .key("model_type"),
        case(
            "a megabyte of end tokens",
            {
                bytes(
                    CONFIG,
                    format!("{{\"model_type\":\"gemmoe\",\"eos_token_id\":{}}}", list("1")).replacen(",1]", "]", 40),
                )
            },
            Status::ConfigValue,
        )
        .file(CONFIG)
        .key("eos_token_id"),
        case("a megabyte of one key", bytes(CONFIG, objects), Status::ConfigSyntax).file(CONFIG).says(&["twice"]),
        case(
            "a key of a megabyte comes twice",
            {
                let key = "k".repeat(ROOM / 2 - 16);
                bytes(CONFIG, format!("{{\"{key}\":0,\"{key}\":0}}"))
            },
            Status::ConfigSyntax,
        )
        .file(CONFIG)
        .says(&["twice"]),
        // The tokenizer's tables have room for every id: they must not be made before the tensors are checked.
        case(
            "the vocabulary is said to be 16 million pieces",
            |path: &std::path::Path| {
                config(json!({"vocab_size": 1 << 24}))(path);
                tokenizer("/version", Some(json!("1.0")))(path);
            },
            Status::TensorShape,
        )
        .file(WEIGHTS)
        .key("model.embed_tokens.weight"),
    ]
}
