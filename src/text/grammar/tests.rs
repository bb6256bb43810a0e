use std::sync::{Arc, OnceLock};
use std::time::Instant;

use serde_json::{Value, json};

use super::*;
use crate::text::Tokenizer;
use crate::text::samples::{Random, sample};

const VOCAB_SIZE: usize = 4100;
const EOS: u32 = 1;
const END_OF_TURN: u32 = 107;

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo-model/tokenizer.json");
        Tokenizer::from_json(&std::fs::read(path).unwrap(), VOCAB_SIZE).unwrap()
    })
}

fn vocabulary() -> &'static Arc<GrammarVocabulary> {
    static VOCABULARY: OnceLock<Arc<GrammarVocabulary>> = OnceLock::new();
    VOCABULARY.get_or_init(|| GrammarVocabulary::new(tokenizer(), VOCAB_SIZE, &[END_OF_TURN], EOS).unwrap())
}

fn compiled(kind: GrammarKind, source: &str) -> Grammar {
    Grammar::new(vocabulary(), kind, source).unwrap_or_else(|error| panic!("{source}: {error}"))
}

fn started(kind: GrammarKind, source: &str) -> GrammarState {
    GrammarState::start(&compiled(kind, source)).unwrap()
}

fn allowed(state: &mut GrammarState) -> Vec<u32> {
    let mask = state.mask().unwrap();
    assert_eq!(mask.len(), VOCAB_SIZE.div_ceil(32));
    let tokens: Vec<u32> =
        (0..32 * mask.len() as u32).filter(|t| mask[*t as usize / 32] >> (t % 32) & 1 == 1).collect();
    assert!(tokens.iter().all(|token| (*token as usize) < VOCAB_SIZE));
    tokens
}

fn text_of(tokens: &[u32]) -> String {
    let bytes: Vec<u8> =
        tokens.iter().flat_map(|token| tokenizer().token_bytes(*token, false).unwrap().to_vec()).collect();
    String::from_utf8(bytes).unwrap()
}

/// Takes random allowed tokens to the end; after a while, those that close what is open.
fn walk(state: &mut GrammarState, random: &mut Random) -> String {
    const CLOSING: [&str; 9] = ["\"", "}", "]", ")", ".", "0", "e", ":", ","];
    for step in 0..3000 {
        let tokens = allowed(state);
        let may_stop = tokens.contains(&EOS);
        assert_eq!(may_stop, tokens.contains(&END_OF_TURN), "all stop tokens or none");
        assert_eq!(may_stop, state.is_complete().unwrap());
        assert!(!tokens.is_empty(), "a dead end after {:?}", text_of(state.accepted()));
        if may_stop && (step > 25 || tokens.len() == 2 || random.below(6) == 0) {
            let text = text_of(state.accepted());
            state.accept(if random.below(2) == 0 { EOS } else { END_OF_TURN }).unwrap();
            assert_eq!(allowed(state), [EOS, END_OF_TURN]);
            return text;
        }
        let text = |token: u32| tokenizer().token_bytes(token, false).unwrap();
        let closing = (step > 25).then(|| {
            let closes = |close: &&str| tokens.iter().find(|token| text(**token) == close.as_bytes()).copied();
            CLOSING.iter().find_map(closes)
        });
        let token = match closing.flatten() {
            Some(token) if random.below(8) > 0 => token,
            _ => loop {
                let token = tokens[random.below(tokens.len())];
                if token != EOS && token != END_OF_TURN {
                    break token;
                }
            },
        };
        state.accept(token).unwrap();
    }
    panic!("no end: {:?}", text_of(state.accepted()));
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
               "required": ["name", "age"], "additionalProperties": false}),
        json!({"enum": ["red", "green", 3, null, {"a": [1]}]}),
        json!({"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 120}, "minItems": 2, "maxItems": 6}),
        json!({"type": "object", "properties": {"inner": {"type": "object", "properties": {"x": {"type": "boolean"}},
               "required": ["x"]}}, "required": ["inner"], "additionalProperties": false}),
        json!({"type": "string", "pattern": "^[A-F0-9]{4}-[a-z]+$"}),
        json!({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}}]}),
        json!({"type": "number", "exclusiveMinimum": -2.5, "maximum": 7.25}),
        json!({"const": {"say": "a \"quoted\" word", "n": [1, 2.5, false]}}),
        json!({"type": ["boolean", "null"]}),
        json!({"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {
               "value": {"type": "integer"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"},
               "maxItems": 2}}, "required": ["value"], "additionalProperties": false}}}),
        json!({"type": "string", "minLength": 3, "maxLength": 12}),
        json!({"type": "string", "format": "date"}),
        json!({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
               {"properties": {"b": {"type": "string"}}, "required": ["b"]}]}),
    ]
}

/// Patterns, which the output matches from its first character to its last.
const PATTERNS: [&str; 10] = [
    "(yes|no|maybe)",
    "[a-c]{2,5}",
    r"[0-9]{3}-[a-z0-9_]{4}",
    r"[A-Z][a-z]+( [a-z]+){0,3}\.",
    "(ab|c)*d?",
    r"[^\n]{1,9}",
    r"-?(0|[1-9][0-9]*)(\.[0-9]+)?",
    "é+(ü|😀){2}",
    r#""([^"\\]|\\["\\])*""#,
    r"(?i)hello/[x-z]",
];

type Holds = fn(&str) -> bool;

/// Lark grammars, and whether a text is in them.
fn larks() -> Vec<(&'static str, Holds)> {
    fn balanced(text: &str) -> bool {
        let depth = text.bytes().try_fold(0i32, |depth, byte| match byte {
            b'(' => Some(depth + 1),
            b')' if depth > 0 => Some(depth - 1),
            _ => None,
        });
        depth == Some(0) && !text.is_empty()
    }
    vec![
        ("start: \"(\" start* \")\"", balanced),
        ("start: WORD (\", \" WORD)* \".\"\nWORD: /[a-z]+/", |text| {
            let words = text.strip_suffix('.');
            words.is_some_and(|words| {
                words.split(", ").all(|w| !w.is_empty() && w.bytes().all(|b| b.is_ascii_lowercase()))
            })
        }),
        ("start: a | b\na: \"x\" a \"y\" | \"xy\"\nb: \"z\"+", |text| {
            let half = text.len() / 2;
            text.bytes().all(|byte| byte == b'z')
                || (text[..half] == "x".repeat(half) && text[half..] == "y".repeat(half))
        }),
        ("start: %json {\"type\": \"array\", \"items\": {\"type\": \"boolean\"}} \" end\"", |text| {
            text.strip_suffix(" end").is_some_and(|list| serde_json::from_str::<Vec<bool>>(list).is_ok())
        }),
        ("%ignore / /\nstart: NUMBER (\"+\" NUMBER)*\nNUMBER: /[0-9]{1,3}/", |text| {
            text.split('+').all(|number| (1..=3).contains(&number.trim().len()) && number.trim().parse::<u32>().is_ok())
        }),
        ("start: \"<\" NAME \">\" start? \"</\" NAME \">\"\nNAME: \"p\" | \"em\"", |text| {
            text.starts_with('<') && text.ends_with('>')
        }),
        ("start: KEY\nKEY: /[a-z]{3}/ & ~(\"abc\" | \"xyz\")", |text| {
            text.len() == 3 && text != "abc" && text != "xyz"
        }),
        ("start: \"A\"{3,5}", |text| (3..=5).contains(&text.len()) && text.bytes().all(|byte| byte == b'A')),
        ("start: (\"a\"..\"f\" \"1\"..\"9\")+", |text| {
            text.len() % 2 == 0
                && text.as_bytes().chunks(2).all(|p| (b'a'..=b'f').contains(&p[0]) && (b'1'..=b'9').contains(&p[1]))
        }),
        ("start: \"\\u00e9\" | \"☃\" \"x\"i", |text| ["é", "☃x", "☃X"].contains(&text)),
    ]
}

#[test]
fn what_a_schema_allows_is_valid_under_it() {
    let mut random = Random::new(11);
    for schema in schemas() {
        let grammar = compiled(GrammarKind::JsonSchema, &schema.to_string());
        for _ in 0..5 {
            let text = walk(&mut GrammarState::start(&grammar).unwrap(), &mut random);
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
            assert!(jsonschema::is_valid(&schema, &value), "{text:?} under {schema}");
        }
    }
}

#[test]
fn what_a_regular_expression_allows_matches_it() {
    let mut random = Random::new(12);
    for pattern in PATTERNS {
        let grammar = compiled(GrammarKind::Regex, pattern);
        let oracle = jsonschema::validator_for(&json!({"pattern": format!("^(?:{pattern})$")})).unwrap();
        for _ in 0..8 {
            let text = walk(&mut GrammarState::start(&grammar).unwrap(), &mut random);
            assert!(oracle.is_valid(&json!(text)), "{text:?} under {pattern}");
        }
    }
}

#[test]
fn what_a_lark_grammar_allows_is_in_its_language() {
    let mut random = Random::new(13);
    for (source, holds) in larks() {
        let grammar = compiled(GrammarKind::Lark, source);
        for _ in 0..8 {
            let text = walk(&mut GrammarState::start(&grammar).unwrap(), &mut random);
            assert!(holds(&text), "{text:?} under {source}");
        }
    }
}

/// A grammar of each kind.
fn some() -> [Grammar; 4] {
    [
        compiled(GrammarKind::JsonSchema, &schemas()[0].to_string()),
        compiled(GrammarKind::JsonSchema, &schemas()[9].to_string()),
        compiled(GrammarKind::Regex, PATTERNS[3]),
        compiled(GrammarKind::Lark, larks()[0].0),
    ]
}

#[test]
fn a_token_outside_the_mask_is_refused_and_changes_nothing() {
    let mut random = Random::new(14);
    for grammar in some() {
        let mut state = GrammarState::start(&grammar).unwrap();
        for _ in 0..25 {
            let tokens = allowed(&mut state);
            let length = state.accepted().len();
            for _ in 0..20 {
                let token = random.below(VOCAB_SIZE) as u32;
                if tokens.contains(&token) {
                    continue;
                }
                // Also where no mask has been found yet.
                let mut fresh = state.try_clone().unwrap();
                fresh.has_mask = false;
                for state in [&mut state, &mut fresh] {
                    let error = state.accept(token).unwrap_err();
                    assert_eq!(error.status(), Status::GrammarViolation, "{token}: {error}");
                    assert_eq!(state.accepted().len(), length);
                }
                assert_eq!(allowed(&mut fresh), tokens);
            }
            assert_eq!(state.accept(VOCAB_SIZE as u32).unwrap_err().status(), Status::TokenOutOfRange);
            assert_eq!(allowed(&mut state), tokens);
            state.accept(tokens[random.below(tokens.len())]).unwrap();
        }
    }
}

#[test]
fn every_token_in_the_mask_is_accepted() {
    let mut random = Random::new(15);
    for grammar in some() {
        let mut state = GrammarState::start(&grammar).unwrap();
        for _ in 0..12 {
            let tokens = allowed(&mut state);
            for _ in 0..30 {
                let mut fork = state.try_clone().unwrap();
                fork.has_mask = false;
                fork.accept(tokens[random.below(tokens.len())]).unwrap();
            }
            state.accept(tokens[random.below(tokens.len())]).unwrap();
        }
    }
}

#[test]
fn a_rewound_state_allows_what_it_did() {
    let mut random = Random::new(16);
    // A rule with max_tokens cannot be rolled back: the tokens are taken again.
    let limited = compiled(GrammarKind::Lark, "start: \"a\" body \"b\"\nbody[max_tokens=4]: /[a-z ]*/");
    for grammar in some().into_iter().chain([limited]) {
        let mut state = GrammarState::start(&grammar).unwrap();
        let mut seen = vec![(allowed(&mut state), state.is_complete().unwrap())];
        for _ in 0..200 {
            let tokens = seen.last().unwrap().0.clone();
            if tokens.is_empty() || random.below(3) == 0 {
                let count = random.below(seen.len());
                state.rewind(count).unwrap();
                seen.truncate(seen.len() - count);
            } else {
                state.accept(tokens[random.below(tokens.len())]).unwrap();
                seen.push((allowed(&mut state), state.is_complete().unwrap()));
            }
            assert_eq!(state.accepted().len(), seen.len() - 1);
            if random.below(2) == 0 {
                assert_eq!(allowed(&mut state), seen.last().unwrap().0);
            }
            assert_eq!(state.is_complete().unwrap(), seen.last().unwrap().1);
        }
        let held = state.accepted().len();
        assert_eq!(state.rewind(held + 1).unwrap_err().status(), Status::InvalidArgument);
        state.rewind(held).unwrap();
        assert_eq!(allowed(&mut state), seen[0].0);
    }
}

#[test]
fn a_clone_goes_its_own_way() {
    let mut random = Random::new(17);
    for grammar in some() {
        let mut state = GrammarState::start(&grammar).unwrap();
        for _ in 0..15 {
            let tokens = allowed(&mut state);
            let mut fork = state.try_clone().unwrap();
            assert_eq!(allowed(&mut fork), tokens);
            walk(&mut fork, &mut random);
            assert_eq!(allowed(&mut state), tokens);
            let mut again = GrammarState::start(&grammar).unwrap();
            state.accepted().iter().for_each(|token| again.accept(*token).unwrap());
            assert_eq!(allowed(&mut again), tokens);
            let token = tokens[random.below(tokens.len())];
            state.accept(token).unwrap();
        }
    }
}

#[test]
fn a_complete_grammar_allows_the_stop_tokens_alone() {
    let mut state = started(GrammarKind::Regex, "abc");
    let tokens = tokenizer().encode("abc", Default::default()).unwrap();
    for token in tokens {
        assert!(!state.is_complete().unwrap());
        assert!(!allowed(&mut state).contains(&EOS));
        assert_eq!(state.accept(EOS).unwrap_err().status(), Status::GrammarViolation);
        state.accept(token).unwrap();
    }
    assert!(state.is_complete().unwrap());
    assert_eq!(allowed(&mut state), [EOS, END_OF_TURN]);
    state.accept(END_OF_TURN).unwrap();
    let letter = tokenizer().token_id("a").unwrap();
    assert_eq!(state.accept(letter).unwrap_err().status(), Status::GrammarViolation);
    state.rewind(2).unwrap();
    assert!(!state.is_complete().unwrap());
    // Nothing is a whole output already.
    let mut empty = started(GrammarKind::Regex, "");
    assert_eq!(allowed(&mut empty), [EOS, END_OF_TURN]);
}

#[test]
fn markup_in_a_grammar_is_text_and_never_the_special_token() {
    let specials: Vec<u32> = (0..VOCAB_SIZE as u32).filter(|token| tokenizer().is_special(*token)).collect();
    assert!(specials.len() >= 6);
    let mut random = Random::new(18);
    for special in &specials {
        let markup = String::from_utf8(tokenizer().token_bytes(*special, true).unwrap().to_vec()).unwrap();
        let cases = [
            (GrammarKind::Regex, markup.clone()),
            (GrammarKind::Lark, format!("start: {}", json!(markup))),
            (GrammarKind::JsonSchema, json!({"const": markup}).to_string()),
            (GrammarKind::Regex, "[^ab]{1,30}".to_owned()),
        ];
        for (kind, source) in cases {
            let mut state = started(kind, &source);
            let text = walk(&mut state, &mut random);
            let (_, tokens) = state.accepted().split_last().unwrap();
            assert!(tokens.iter().all(|token| !tokenizer().is_special(*token)), "{source}");
            assert!(text.contains(&markup) || source.starts_with("[^ab]"), "{text:?}");
        }
        let mut state = started(GrammarKind::Regex, "(.|\n)*");
        let expected = [EOS, END_OF_TURN].contains(special);
        assert_eq!(allowed(&mut state).contains(special), expected, "{markup}");
        assert_eq!(state.accept(*special).is_ok(), expected, "{markup}");
    }
}

#[test]
fn ids_without_an_entry_are_never_allowed() {
    let reachable = |token: &u32| !tokenizer().token_bytes(*token, true).unwrap().is_empty();
    for (kind, source) in [(GrammarKind::Regex, "(.|\n)*"), (GrammarKind::Lark, "start: <[*]>")] {
        let mut state = started(kind, source);
        let tokens = allowed(&mut state);
        assert!(tokens.len() > 3000 && tokens.iter().all(reachable), "{source}");
        assert_eq!(state.accept(VOCAB_SIZE as u32 - 1).unwrap_err().status(), Status::GrammarViolation);
    }
}

#[test]
fn sources_that_are_no_grammar_are_refused() {
    use GrammarKind::*;
    let cases = [
        (JsonSchema, ""),
        (JsonSchema, "{"),
        (JsonSchema, "[]"),
        (JsonSchema, r#"{"type": "nonsense"}"#),
        (JsonSchema, r#"{"type": "object", "unevaluatedItems": 3}"#),
        (JsonSchema, "false"),
        (JsonSchema, r##"{"$ref": "#/$defs/none"}"##),
        (JsonSchema, r#"{"$ref": "https://example.com/schema.json"}"#),
        (JsonSchema, r#"{"$ref": "file:///etc/passwd"}"#),
        (Regex, "("),
        (Regex, "[z-a]"),
        (Regex, "a{3,1}"),
        (Regex, r"(a)\1"),
        (Lark, ""),
        (Lark, "  \n"),
        (Lark, "start: missing"),
        (Lark, "start: \"unclosed"),
        (Lark, "other: \"a\""),
        (Lark, "start: START\nSTART: START \"a\""),
        (Lark, "start: @other"),
        (Lark, "start: <no_such_token>"),
        (Lark, "%import common.NOTHING\nstart: NOTHING"),
        (Lark, "\u{0}\u{7}"),
    ];
    for (kind, source) in cases {
        let error = Grammar::new(vocabulary(), kind, source).err().unwrap_or_else(|| panic!("{source:?} compiled"));
        assert_eq!(error.status(), Status::GrammarSyntax, "{source:?}: {error}");
        let text = error.to_string();
        assert!(!text.is_empty() && !text.contains("</") && !text.contains('\n'), "{source:?}: {text}");
        assert_eq!(error.key(), Some("grammar"));
    }
}

/// Sources made to cost more than they should; compiling or using one may be refused, never crash.
fn hostile_sources() -> Vec<(&'static str, GrammarKind, String)> {
    use GrammarKind::*;
    let chain = |count: usize| {
        let definitions: Vec<String> =
            (0..count).map(|i| format!("\"d{i}\": {{\"$ref\": \"#/$defs/d{}\"}}", i + 1)).collect();
        format!(
            "{{\"$ref\": \"#/$defs/d0\", \"$defs\": {{{}, \"d{count}\": {{\"type\": \"null\"}}}}}}",
            definitions.join(",")
        )
    };
    let arrays = |count: usize| {
        let definitions: Vec<String> = (0..count)
            .map(|i| format!("\"d{i}\": {{\"type\": \"array\", \"items\": {{\"$ref\": \"#/$defs/d{}\"}}}}", i + 1))
            .collect();
        format!(
            "{{\"$ref\": \"#/$defs/d0\", \"$defs\": {{{}, \"d{count}\": {{\"type\": \"null\"}}}}}}",
            definitions.join(",")
        )
    };
    let rules = |count: usize| {
        let mut rules: String = (0..count).map(|i| format!("r{i}: \"a\" r{}\n", i + 1)).collect();
        rules.push_str(&format!("r{count}: \"b\"\nstart: r0\n"));
        rules
    };
    let groups = |count: usize| {
        let mut rules: String = (0..count).map(|i| format!("T{i}: (\"a\" (T{})?)\n", i + 1)).collect();
        rules.push_str(&format!("T{count}: \"b\"\nstart: T0\n"));
        rules
    };
    let terminals = |count: usize| {
        let mut rules: String = (0..count).map(|i| format!("T{i}: \"a\" T{}\n", i + 1)).collect();
        rules.push_str(&format!("T{count}: \"b\"\nstart: T0\n"));
        rules
    };
    vec![
        ("a repetition of a billion", Regex, "a{1000000000}".into()),
        ("repetitions inside each other", Regex, "((((a{1,1000}){1,1000}){1,1000}){1,1000}){1,1000}".into()),
        ("an exponential automaton", Regex, "(a|b)*a(a|b){60}".into()),
        ("an exponential automaton among words", Regex, "(.*a.{40}|.*b.{41}|.*c.{42})*".into()),
        ("nested stars", Regex, "((a*)*)*b".into()),
        ("deep groups", Regex, format!("{}a{}", "(".repeat(100_000), ")".repeat(100_000))),
        ("deep groups within the parser's limit", Regex, format!("{}a{}", "(?:b|".repeat(200), ")*".repeat(200))),
        ("a long alternation", Regex, (0..60_000).map(|i| format!("w{i}")).collect::<Vec<_>>().join("|")),
        ("a long literal", Regex, "x".repeat(1_000_000)),
        ("too long a source", Regex, "x".repeat(MAX_SOURCE_BYTES + 1)),
        ("every letter", Regex, r"(\p{L}{1,500}\p{N}){1,500}".into()),
        ("conjunctions of negations", Lark, "start: T\nT: /.*a.{30}/ & ~/.*b.{30}/ & ~/.*c.{31}/ & /.*d.{32}/".into()),
        ("lark repetition", Lark, "start: \"a\"{1000000000}".into()),
        ("lark repetitions inside each other", Lark, "start: (((\"a\" x?){1,9999}){1,9999}){1,9999}\nx: \"b\"".into()),
        ("an ambiguous grammar", Lark, "start: start start | \"a\" | \"\"".into()),
        ("left and right recursion", Lark, "start: start \"+\" start | \"-\" start | start \"!\" | /[0-9]/".into()),
        ("many rules in a row", Lark, rules(4_000)),
        ("too many rules in a row", Lark, rules(60_000)),
        ("many terminals in a row", Lark, terminals(4_000)),
        ("as many terminals as may be", Lark, terminals(19_000)),
        ("deep lark groups", Lark, format!("start: {}\"a\"{}", "(".repeat(10_000), ")".repeat(10_000))),
        ("deep lark templates", Lark, format!("start: {}\"a\"{}", "a{".repeat(15_000), "}".repeat(15_000))),
        (
            "deep lark parameters",
            Lark,
            format!("start: x::{}0{}\nx::_: \"a\"", "incr(".repeat(15_000), ")".repeat(15_000)),
        ),
        (
            "deep lark nesting",
            Lark,
            format!("start: {}start: \"a\"{}", "%lark { start: ".repeat(5_000), "}".repeat(5_000)),
        ),
        ("many tildes", Lark, format!("start: T\nT: {}\"a\"", "~".repeat(100_000))),
        ("a schema in itself", JsonSchema, r##"{"$ref": "#"}"##.into()),
        (
            "schemas of each other",
            JsonSchema,
            r##"{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}"##.into(),
        ),
        (
            "a schema of both itself",
            JsonSchema,
            r##"{"allOf": [{"$ref": "#"}, {"$ref": "#"}], "type": "object"}"##.into(),
        ),
        ("a deep schema", JsonSchema, format!("{}true{}", "{\"items\":".repeat(100_000), "}".repeat(100_000))),
        ("a schema of the parser's depth", JsonSchema, format!("{}true{}", "{\"items\":".repeat(120), "}".repeat(120))),
        ("many references in a row", JsonSchema, chain(4_000)),
        ("as many references as may be", JsonSchema, chain(19_000)),
        ("too many references", JsonSchema, chain(25_000)),
        ("many arrays in a row", JsonSchema, arrays(9_000)),
        ("as many arrays as may be", JsonSchema, arrays(19_000)),
        ("as many groups in a row as may be", Lark, groups(6_600)),
        ("a billion items", JsonSchema, r#"{"type": "array", "minItems": 1000000000}"#.into()),
        ("a long string", JsonSchema, r#"{"type": "string", "minLength": 4000000000}"#.into()),
        ("a very long string", JsonSchema, r#"{"type": "string", "maxLength": 100000}"#.into()),
        ("numbers without end", JsonSchema, r#"{"type": "number", "minimum": 1e308, "multipleOf": 1e-300}"#.into()),
        ("powers of choices", JsonSchema, {
            let choices: Vec<Value> = (0..12)
                .map(|i| json!({"anyOf": [{"required": [format!("a{i}")]}, {"required": [format!("b{i}")]}]}))
                .collect();
            json!({"type": "object", "allOf": choices}).to_string()
        }),
        ("many properties", JsonSchema, {
            let properties: serde_json::Map<String, Value> = (0..9_000).map(|i| (format!("p{i}"), json!({}))).collect();
            json!({"type": "object", "properties": properties}).to_string()
        }),
        ("many alternatives", Lark, {
            let words: Vec<String> = (0..40_000).map(|i| format!("\"w{i}\"")).collect();
            format!("start: {}", words.join("|"))
        }),
        ("many patterns", JsonSchema, {
            let patterns: serde_json::Map<String, Value> =
                (0..400).map(|i| (format!("^p{i}[a-z]*$"), json!({}))).collect();
            json!({"type": "object", "patternProperties": patterns}).to_string()
        }),
        ("a pattern in a schema", JsonSchema, r#"{"type": "string", "pattern": "^(a|b)*a(a|b){50}$"}"#.into()),
        (
            "patterns that overlap",
            JsonSchema,
            r#"{"patternProperties": {"^(a|b)*a(a|b){30}$": {}, "^(b|a)*b(a|b){30}$": {}}}"#.into(),
        ),
        ("multi-byte text where errors are cut", JsonSchema, format!("{{\"$ref\": [\"{}\"]}}", "é".repeat(200))),
    ]
}

#[test]
fn hostile_grammars_are_refused_or_bounded() {
    let mut random = Random::new(19);
    for (name, kind, source) in hostile_sources() {
        let started = Instant::now();
        let outcome = match Grammar::new(vocabulary(), kind, &source) {
            Err(error) => format!("{:?} {error}", error.status()),
            Ok(grammar) => {
                let compiled = started.elapsed();
                let mut state = GrammarState::start(&grammar).unwrap();
                let mut outcome = String::new();
                for _ in 0..40 {
                    match state.mask() {
                        Err(error) => {
                            assert_eq!(error.status(), Status::GrammarLimit, "{name}: {error}");
                            outcome = format!("{error}");
                            break;
                        }
                        Ok(_) => {
                            let tokens = allowed(&mut state);
                            let Some(token) = tokens.get(random.below(tokens.len())) else { break };
                            if let Err(error) = state.accept(*token) {
                                assert_eq!(error.status(), Status::GrammarLimit, "{name}: {error}");
                                outcome = format!("{error}");
                                break;
                            }
                        }
                    }
                }
                format!("compiled in {compiled:?}, {} tokens {outcome}", state.accepted().len())
            }
        };
        println!("{name}: {:?}: {}", started.elapsed(), &outcome[..outcome.floor_char_boundary(150)]);
    }
}

#[test]
fn a_state_that_met_a_limit_can_be_rewound() {
    let mut state = started(GrammarKind::Regex, "[ab]{1,40}");
    let letter = tokenizer().token_id("a").unwrap();
    (0..5).for_each(|_| state.accept(letter).unwrap());
    let tokens = allowed(&mut state);
    // A token that cannot follow stops the parser for good, as a limit does.
    let wrong = tokenizer().token_id("z").unwrap();
    let fail = |state: &mut GrammarState| state.with_parser(|parser| parser.consume_token(wrong)).unwrap_err();
    fail(&mut state);
    let panicked: Result<()> = state.with_parser(|_| -> std::result::Result<(), String> { panic!("a test") });
    assert!(panicked.is_err());
    state.has_mask = false;
    assert_eq!(allowed(&mut state), tokens);
    fail(&mut state);
    state.rewind(2).unwrap();
    assert_eq!(state.accepted().len(), 3);
    state.accept(letter).unwrap();
    fail(&mut state);
    assert_eq!(state.try_clone().unwrap().accepted(), state.accepted());
}

#[test]
fn an_error_is_one_sentence_without_the_dumps_that_follow_it() {
    let error = compile::error_of("panic: it went\n  wrong\n<backtrace>\n 0: /home/build/x.rs\n</backtrace>");
    assert_eq!((error.status(), error.to_string().as_str()), (Status::GrammarSyntax, "panic: it went wrong"));
    let error = compile::error_of("schema too large\n<state>\nTokens: 1\n</state><grammar>\nx\n</grammar>");
    assert_eq!((error.status(), error.to_string().as_str()), (Status::GrammarLimit, "schema too large"));
}

#[test]
fn a_grammar_says_what_it_was_made_from_and_is_shared_by_threads() {
    let grammar = compiled(GrammarKind::Regex, PATTERNS[0]);
    assert_eq!((grammar.kind(), grammar.source()), (GrammarKind::Regex, PATTERNS[0]));
    fn shared<T: Send + Sync>(_: &T) {}
    fn sent<T: Send>(_: &T) {}
    shared(&grammar);
    shared(vocabulary());
    sent(&GrammarState::start(&grammar).unwrap());
    let texts = std::thread::scope(|scope| {
        let running: Vec<_> = (0..4)
            .map(|_| scope.spawn(|| walk(&mut GrammarState::start(&grammar).unwrap(), &mut Random::new(4))))
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(texts.iter().all(|text| *text == texts[0]));
}

#[test]
fn a_vocabulary_that_does_not_fit_is_refused() {
    let error =
        |size, stops: &[u32], eos| GrammarVocabulary::new(tokenizer(), size, stops, eos).err().unwrap().status();
    assert_eq!(error(VOCAB_SIZE, &[VOCAB_SIZE as u32], EOS), Status::TokenOutOfRange);
    assert_eq!(error(VOCAB_SIZE, &[], u32::MAX), Status::TokenOutOfRange);
    assert_eq!(error(1 << 24, &[], EOS), Status::GrammarLimit);
}

/// Not a check: prints what a grammar takes. `cargo test --release --lib timings_of_gr -- --ignored --nocapture`.
#[test]
#[ignore = "prints timings"]
fn timings_of_grammars() {
    const LARGE: usize = 256_000;
    let mut random = Random::new(3);
    let mut file = sample();
    let words = file["model"]["vocab"].as_object_mut().unwrap();
    let mut id = words.len();
    while id < LARGE {
        let length = 1 + random.below(9);
        let mut word: String = (0..length).map(|_| char::from(b'a' + random.below(26) as u8)).collect();
        if random.below(2) == 0 {
            word.insert(0, '▁');
        }
        if !words.contains_key(&word) {
            words.insert(word, json!(id));
            id += 1;
        }
    }
    let large = Tokenizer::from_json(file.to_string().as_bytes(), LARGE).unwrap();
    let milliseconds = |started: Instant| started.elapsed().as_secs_f64() * 1e3;
    for (tokenizer, size) in [(tokenizer(), VOCAB_SIZE), (&large, LARGE)] {
        let started = Instant::now();
        let vocabulary = GrammarVocabulary::new(tokenizer, size, &[], EOS).unwrap();
        println!("vocabulary of {size}: {:.1} ms", milliseconds(started));
        let (mut compiling, mut masks, mut copies) = (Vec::new(), Vec::new(), Vec::new());
        for schema in schemas() {
            let started = Instant::now();
            let grammar = Grammar::new(&vocabulary, GrammarKind::JsonSchema, &schema.to_string()).unwrap();
            compiling.push(milliseconds(started));
            let mut state = GrammarState::start(&grammar).unwrap();
            for _ in 0..40 {
                let started = Instant::now();
                let mask = state.mask().unwrap();
                masks.push(milliseconds(started));
                let tokens: Vec<u32> =
                    (0..size as u32).filter(|t| *t != EOS && mask[*t as usize / 32] >> (t % 32) & 1 == 1).collect();
                if tokens.is_empty() {
                    break;
                }
                let started = Instant::now();
                state.try_clone().unwrap();
                copies.push(milliseconds(started));
                state.accept(tokens[random.below(tokens.len())]).unwrap();
            }
        }
        for (name, mut times) in [("compile", compiling), ("mask", masks), ("clone", copies)] {
            times.sort_by(f64::total_cmp);
            let median = times[times.len() / 2];
            println!("{name}: {median:.3} ms median, {:.3} ms most", times[times.len() - 1]);
        }
    }
}
