//! Constrained output of the demo model: whatever it would rather write, under a JSON schema it writes JSON that the schema
//! describes.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{load, repository};
use gemmoe::text::{Grammar, GrammarKind};
use gemmoe::{Model, Sampling, Session, SessionOptions};
use serde_json::{Value, json};

/// Generations of each schema.
const EACH: u64 = 50;
const MOST_TOKENS: usize = 700;

fn text(most: usize) -> Value {
    json!({"type": "string", "maxLength": most})
}

fn object(properties: Value) -> Value {
    let required: Vec<&String> = properties.as_object().unwrap().keys().collect();
    json!({"type": "object", "required": required, "properties": properties, "additionalProperties": false})
}

/// Twenty schemas whose values all end: a model that has never seen JSON does not end a list or a text by itself.
fn schemas() -> Vec<Value> {
    let person = object(json!({"name": text(20), "age": {"type": "integer", "minimum": 0, "maximum": 150}}));
    vec![
        json!({"type": "boolean"}),
        json!({"type": "null"}),
        json!({"enum": ["red", "green", "blue", 7, null]}),
        json!({"const": {"kind": "fixed", "list": [1, 2, 3]}}),
        json!({"type": "integer", "minimum": -50, "maximum": 5000}),
        json!({"enum": [0.5, -1e3, 2]}),
        text(40),
        json!({"type": "string", "pattern": "^[A-Z][a-z]{2,8} [0-9]{1,3}$"}),
        json!({"type": "string", "enum": ["äöü", "日本語", "🦀 crab", "a\"b\\c\n"]}),
        json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 2, "maxItems": 6}),
        json!({"type": "array", "items": text(10), "maxItems": 4}),
        json!({"type": "array", "prefixItems": [{"type": "boolean"}, text(8)], "items": false, "minItems": 2}),
        person.clone(),
        object(json!({"people": {"type": "array", "items": person.clone(), "minItems": 1, "maxItems": 3}})),
        object(
            json!({"choice": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}, text(6)]}}),
        ),
        json!({"oneOf": [object(json!({"cat": {"type": "boolean"}})), object(json!({"dog": text(8)}))]}),
        json!({
            "$defs": {"leaf": {"enum": ["oak", "ash", "elm"]}}, "type": "array", "minItems": 1, "maxItems": 5,
            "items": {"$ref": "#/$defs/leaf"}
        }),
        json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": text(5)}, "additionalProperties": false}),
        object(json!({"date": {"type": "string", "format": "date"}, "at": {"type": "string", "format": "time"}})),
        object(json!({
            "matrix": {
                "type": "array", "minItems": 2, "maxItems": 2,
                "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": {"enum": [0, 1, -1]}}
            },
            "note": {"type": ["string", "null"], "maxLength": 12}
        })),
    ]
}

fn generate(model: &Arc<Model>, grammar: &Grammar, seed: u64) -> String {
    let options = SessionOptions { context_size: 1024, prefill_chunk: 32, ..Default::default() };
    let mut session = Session::new(Arc::clone(model), &options).unwrap();
    let prompts = ["The reason is", "Mit dieser Option", "def __init__(self", "|- ( ph ->"];
    session.push(&model.encode(prompts[seed as usize % prompts.len()], true, false).unwrap()).unwrap();
    let temperature = [0.0, 0.7, 1.0, 1.5][seed as usize / 4 % 4];
    // A time may have any number of digits: without the penalty a model this small repeats one of them for ever.
    let sampling = Sampling { temperature, seed, frequency_penalty: 0.3, ..Default::default() };
    session.set_sampling(sampling).unwrap();
    session.set_grammar(Some(grammar)).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < MOST_TOKENS {
        let token = session.step().unwrap();
        if model.stop_tokens().contains(&token) {
            assert_eq!(session.is_grammar_complete().unwrap(), Some(true));
            return String::from_utf8(model.tokenizer().unwrap().decode(&tokens, false).unwrap()).unwrap();
        }
        tokens.push(token);
    }
    let text = model.tokenizer().unwrap().decode(&tokens, false).unwrap();
    panic!("seed {seed}: no end after {MOST_TOKENS} tokens: {}", String::from_utf8_lossy(&text));
}

#[test]
fn a_thousand_generations_under_twenty_schemas_parse_and_validate() {
    let model = load(&repository().join("examples/demo-model"));
    let schemas = schemas();
    assert_eq!(schemas.len(), 20);
    let (next, longest) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(schema) = schemas.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let vocabulary = model.grammar_vocabulary().unwrap();
                    let grammar = Grammar::new(vocabulary, GrammarKind::JsonSchema, &schema.to_string()).unwrap();
                    let validator = jsonschema::validator_for(schema).unwrap();
                    for seed in 0..EACH {
                        let text = generate(&model, &grammar, seed);
                        let value: Value = serde_json::from_str(&text)
                            .unwrap_or_else(|error| panic!("{error} in {text:?}, seed {seed}, schema {schema}"));
                        let errors: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
                        assert!(errors.is_empty(), "{errors:?} in {text}, seed {seed}, schema {schema}");
                        longest.fetch_max(text.len(), Ordering::Relaxed);
                    }
                }
            });
        }
    });
    println!("{} generations, the longest of {} bytes", schemas.len() as u64 * EACH, longest.into_inner());
}

#[test]
fn a_grammar_goes_on_in_forks_and_snapshots_and_after_rewinds() {
    let model = load(&repository().join("examples/demo-model"));
    let schema =
        object(json!({"name": text(30), "tags": {"type": "array", "items": text(6), "minItems": 2, "maxItems": 3}}));
    let grammar =
        Grammar::new(model.grammar_vocabulary().unwrap(), GrammarKind::JsonSchema, &schema.to_string()).unwrap();
    let mut session =
        Session::new(Arc::clone(&model), &SessionOptions { context_size: 512, ..Default::default() }).unwrap();
    session.push(&model.encode("The reason", true, false).unwrap()).unwrap();
    session.set_sampling(Sampling { temperature: 1.0, seed: 5, ..Default::default() }).unwrap();
    session.set_grammar(Some(&grammar)).unwrap();
    for _ in 0..8 {
        session.step().unwrap();
    }
    let held = session.tokens().len();
    let mut fork = session.fork().unwrap();
    let mut bytes = vec![0; session.snapshot_bytes()];
    session.snapshot(&mut bytes).unwrap();
    let mut restored = Session::restore(Arc::clone(&model), &bytes, &SessionOptions::default()).unwrap();
    let expected: Vec<u32> = (0..12).map(|_| session.step().unwrap()).collect();
    assert_eq!((0..12).map(|_| fork.step().unwrap()).collect::<Vec<_>>(), expected);
    assert_eq!((0..12).map(|_| restored.step().unwrap()).collect::<Vec<_>>(), expected);
    session.rewind(held).unwrap();
    assert_eq!((0..12).map(|_| session.step().unwrap()).collect::<Vec<_>>(), expected);
    let refused = session.push(&[model.config().bos_token_id]).unwrap_err();
    assert_eq!(refused.status(), gemmoe::Status::GrammarViolation);
    session.rewind(held).unwrap();
    assert_eq!(session.step().unwrap(), expected[0]);
}
