//! From source to a parser, within limits.

use std::sync::Arc;
use std::thread;

use llguidance::TokenParser;
use llguidance::api::{ParserLimits, TopLevelGrammar};
use serde_json::Value;

use super::{GrammarKind, GrammarVocabulary};
use crate::error::{Error, Result, Status};
use crate::quiet::Quiet;

/// Stack of the compiling thread. The system commits what is touched.
const STACK_BYTES: usize = 256 << 20;

/// Most places in a source at which compiling may go one level deeper.
const MAX_LEVELS: usize = 20_000;

/// Compiling an object takes time in the square of its properties; this many pairs take about a second.
const MAX_PROPERTY_PAIRS: usize = 1 << 21;

/// All patternProperties of a schema: each is compared with each, which costs more than a property.
const MAX_PATTERNS: usize = 100;

/// What compiling and one step may cost.
///
/// Lexer states take 1 to 2 kB each: a state of a grammar stays below some 100 MB whatever is generated.
pub fn set_limits(limits: &mut ParserLimits) {
    limits.max_items_in_row = 2_000;
    limits.initial_lexer_fuel = 1_000_000;
    limits.step_lexer_fuel = 200_000;
    limits.step_max_items = 50_000;
    limits.max_lexer_states = 50_000;
    limits.max_grammar_size = 500_000;
    // Otherwise an error carries the whole grammar and every token so far.
    limits.verbose_errors = false;
}

/// Compiles `source` to a parser at its beginning.
pub fn compile(vocabulary: &Arc<GrammarVocabulary>, kind: GrammarKind, source: &str) -> Result<TokenParser> {
    if source.trim().is_empty() && kind != GrammarKind::Regex {
        return Err(Error::new(Status::GrammarSyntax, "the grammar is empty").at_key("grammar"));
    }
    on_deep_stack(|| {
        let grammar = match kind {
            GrammarKind::JsonSchema => TopLevelGrammar::from_json_schema(schema_of(source)?),
            GrammarKind::Regex => TopLevelGrammar::from_regex(source),
            GrammarKind::Lark => {
                check_lark(source)?;
                TopLevelGrammar::from_lark(source.to_owned())
            }
        };
        let mut parser = vocabulary.factory.create_parser(grammar).map_err(|error| error_of(&error.to_string()))?;
        parser.start_without_prompt();
        Ok(parser)
    })
}

/// Runs `work` on a thread whose stack holds the recursion that `MAX_LEVELS` allows.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let quiet_work = || {
            let _quiet = Quiet::enter();
            work()
        };
        let builder = thread::Builder::new().name("gemmoe-grammar".to_owned()).stack_size(STACK_BYTES);
        let running = builder.spawn_scoped(scope, quiet_work).map_err(|error| {
            Error::new(Status::ThreadUnavailable, format!("no thread to compile a grammar on: {error}"))
        })?;
        // A defect there concerns this grammar alone: an internal error would take the whole model with it.
        let panicked =
            |_| Err(Error::new(Status::GrammarLimit, "the grammar cannot be compiled: its compiler gave up"));
        running.join().unwrap_or_else(panicked)
    })
}

/// Where JSON allows white space, one space is: a model that has not learned JSON writes white space for ever if it may. A
/// schema may say otherwise, `"x-guidance": {"whitespace_flexible": true}`.
const WHITE_SPACE: &str = "[ ]";

/// The schema, if compiling it can end in reasonable time and depth.
fn schema_of(source: &str) -> Result<Value> {
    let mut schema: Value = serde_json::from_str(source).map_err(|error| {
        let status = match error.to_string().starts_with("recursion limit") {
            true => Status::GrammarLimit,
            false => Status::GrammarSyntax,
        };
        Error::new(status, format!("the schema is not JSON: {error}")).at_key("grammar")
    })?;
    let mut size = SchemaSize::default();
    size.add(&schema);
    check_size("objects", size.objects, MAX_LEVELS)?;
    check_size("pairs of properties", size.property_pairs, MAX_PROPERTY_PAIRS)?;
    check_size("patternProperties", size.patterns, MAX_PATTERNS)?;
    if let Value::Object(members) = &mut schema {
        members.entry("x-guidance").or_insert_with(|| serde_json::json!({"whitespace_pattern": WHITE_SPACE}));
    }
    Ok(schema)
}

/// What the work of compiling a schema grows with.
#[derive(Default)]
struct SchemaSize {
    /// A schema inside another, or behind a reference, is one level of recursion.
    objects: usize,
    property_pairs: usize,
    patterns: usize,
}

impl SchemaSize {
    /// serde_json has limited the recursion.
    fn add(&mut self, value: &Value) {
        match value {
            Value::Object(members) => {
                self.objects += 1;
                for (key, member) in members {
                    let count = member.as_object().map_or(0, |members| members.len());
                    match key.as_str() {
                        "properties" => self.property_pairs = self.property_pairs.saturating_add(count * count),
                        "patternProperties" => self.patterns += count,
                        _ => {}
                    }
                    self.add(member);
                }
            }
            Value::Array(values) => values.iter().for_each(|value| self.add(value)),
            _ => {}
        }
    }
}

/// Refuses a Lark source whose rules, groups and templates could nest deeper than the stack, or that has alternatives
/// without end.
fn check_lark(source: &str) -> Result<()> {
    let count = source.bytes().filter(|byte| b":([{|".contains(byte)).count();
    check_size("rules, groups or alternatives", count, MAX_LEVELS)
}

fn check_size(what: &str, found: usize, most: usize) -> Result<()> {
    if found > most {
        let text = format!("the grammar has {found} {what}, expected at most {most}");
        return Err(Error::new(Status::GrammarLimit, text).at_key("grammar"));
    }
    Ok(())
}

/// llguidance's error as ours.
pub fn error_of(message: &str) -> Error {
    // What follows is a dump of its state, or a backtrace.
    let end = ["<state>", "<backtrace>", "<non-verbose/>"].iter().filter_map(|mark| message.find(mark)).min();
    let sentence = message[..end.unwrap_or(message.len())].split_whitespace().collect::<Vec<_>>().join(" ");
    const LIMITS: [&str; 10] = [
        "too big",
        "too large",
        "too complex",
        "too many",
        "too deeply nested",
        "exceeded",
        "exhausted",
        "; max is ",
        "precomputation failed",
        "_too_complex",
    ];
    let lower = sentence.to_lowercase();
    let status = match LIMITS.iter().any(|words| lower.contains(words)) {
        true => Status::GrammarLimit,
        false => Status::GrammarSyntax,
    };
    Error::new(status, sentence).at_key("grammar")
}
