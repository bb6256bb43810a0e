//! The shapes a row may have, and what each is learned as.

use super::Rows;
use super::report::{Fault, RowResult};
use super::value::{Object, Value, read};
use crate::memory::try_with_capacity;

/// A row as it is learned.
#[derive(Debug, PartialEq)]
pub enum Row {
    /// All of it is learned.
    Text(String),
    /// What the assistant says is learned; it says something.
    Conversation(Vec<Turn>),
    /// Two answers to a conversation, of which the first is better. They differ.
    Pair { context: Vec<Turn>, chosen: String, rejected: String },
}

/// One message.
#[derive(Debug, PartialEq)]
pub struct Turn {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: &'static str,
    /// What is said; not empty. Nothing in it is markup.
    pub text: String,
}

impl Turn {
    fn new(role: &'static str, text: &str) -> RowResult<Turn> {
        Ok(Turn { role, text: copy(text)? })
    }

    /// Whether it is the model's own.
    pub fn is_assistant(&self) -> bool {
        self.role == ASSISTANT
    }
}

const SYSTEM: &str = "system";
const USER: &str = "user";
/// The role of the model.
pub const ASSISTANT: &str = "assistant";
/// Roles as they are written, and what they mean: Gemma's own name for itself is model.
const ROLES: [(&str, &str); 5] =
    [(SYSTEM, SYSTEM), (USER, USER), (ASSISTANT, ASSISTANT), ("model", ASSISTANT), ("tool", "tool")];

/// All keys that mean something, in rows and in messages.
const KEYS: [&str; 12] = [
    "messages",
    "prompt",
    "response",
    "instruction",
    "input",
    "output",
    "text",
    SYSTEM,
    "chosen",
    "rejected",
    "role",
    "content",
];

const TEXT_SHAPES: &str =
    "\"text\", \"prompt\" and \"response\", \"instruction\" and \"output\" (\"input\" may be there), or \"messages\"";
const PAIR_SHAPES: &str = "\"prompt\", \"chosen\" and \"rejected\" (\"system\" may be there)";

/// Reads the row of a line.
pub fn parse(line: &[u8], rows: Rows) -> RowResult<Row> {
    let text = match std::str::from_utf8(line) {
        Ok(text) => text,
        Err(_) if line.starts_with(&[0xff, 0xfe]) || line.starts_with(&[0xfe, 0xff]) => {
            return Fault::bad("is UTF-16, expected UTF-8");
        }
        Err(error) => return Fault::bad(format!("is not UTF-8 from byte {} of the line on", error.valid_up_to())),
    };
    let object = match read(text, &KEYS)? {
        Value::Object(object) => object,
        Value::List(_) => {
            return Fault::bad(
                "is a list, expected an object: JSON Lines have one object on each line, and no list around",
            );
        }
        other => return Fault::bad(format!("is {other}, expected an object")),
    };
    match rows {
        Rows::Texts => text_row(&object),
        Rows::Pairs => pair_row(&object),
    }
}

/// The first shape that is whole; of one that is not, what is missing.
fn text_row(object: &Object) -> RowResult<Row> {
    let has = |key: &str| object.get(key).is_some();
    if has("messages") {
        let mut turns = turns(object, "messages")?;
        if let Some(system) = optional(object, SYSTEM)? {
            if turns.first().is_some_and(|turn| turn.role == SYSTEM) {
                return Fault::bad("has \"system\" and a system message: one of them is too many");
            }
            turns.insert(0, Turn::new(SYSTEM, system)?);
        }
        if !turns.iter().any(Turn::is_assistant) {
            return Fault::bad("has \"messages\" of which none is the assistant's: there is nothing to learn");
        }
        return Ok(Row::Conversation(turns));
    }
    let asked = if has("prompt") && has("response") {
        Some((copy(required(object, "prompt")?)?, "response"))
    } else if has("instruction") && has("output") {
        let instruction = required(object, "instruction")?;
        // Many rows of this shape have an empty input.
        Some(match text_at(object, "input")?.filter(|input| !input.trim().is_empty()) {
            Some(input) => (join(instruction, input)?, "output"),
            None => (copy(instruction)?, "output"),
        })
    } else {
        None
    };
    if let Some((prompt, response)) = asked {
        let mut turns = try_with_capacity("a row of data", 3)?;
        if let Some(system) = optional(object, SYSTEM)? {
            turns.push(Turn::new(SYSTEM, system)?);
        }
        turns.push(Turn { role: USER, text: prompt });
        turns.push(Turn::new(ASSISTANT, required(object, response)?)?);
        return Ok(Row::Conversation(turns));
    }
    if has("text") {
        return Ok(Row::Text(copy(required(object, "text")?)?));
    }
    if has("chosen") && has("rejected") {
        return Fault::bad("is a pair of answers, which only the objective dpo learns from");
    }
    Fault::bad(format!("has {}, expected {TEXT_SHAPES}", keys(object)))
}

fn pair_row(object: &Object) -> RowResult<Row> {
    if object.get("chosen").is_none() || object.get("rejected").is_none() {
        return Fault::bad(format!("has {}, expected {PAIR_SHAPES}", keys(object)));
    }
    let (chosen_context, chosen) = answer(object, "chosen")?;
    let (rejected_context, rejected) = answer(object, "rejected")?;
    let mut context = match object.get("prompt") {
        None => try_with_capacity("a row of data", 0)?,
        Some(Value::List(_)) => turns(object, "prompt")?,
        Some(_) => vec![Turn::new(USER, required(object, "prompt")?)?],
    };
    let system = optional(object, SYSTEM)?;
    for (key, own) in [("chosen", chosen_context), ("rejected", rejected_context)] {
        if own.is_empty() {
            continue;
        }
        // What comes before the answers is there more than once: beside them, and in front of each.
        let system_turns = |turns: &[Turn]| turns.iter().take_while(|turn| turn.role == SYSTEM).count();
        if context.is_empty() {
            context = own;
        } else if context != own && context[system_turns(&context)..] != own[system_turns(&own)..] {
            return Fault::bad(format!("has {key:?} after other messages than its prompt, expected the same ones"));
        }
    }
    if context.is_empty() {
        return Fault::bad(format!("has {}, expected {PAIR_SHAPES}", keys(object)));
    }
    if context.last().is_some_and(Turn::is_assistant) {
        return Fault::bad("has answers that follow a message of the assistant, expected them to follow another's");
    }
    match system {
        Some(_) if context[0].role == SYSTEM => {
            return Fault::bad("has \"system\" and a system message: one of them is too many");
        }
        Some(system) => context.insert(0, Turn::new(SYSTEM, system)?),
        None => {}
    }
    if chosen.trim() == rejected.trim() {
        return Fault::bad("has \"chosen\" and \"rejected\" that are the same: neither can be preferred");
    }
    Ok(Row::Pair { context, chosen, rejected })
}

/// An answer of a pair, and the messages before it where it comes as a list of them.
fn answer(object: &Object, key: &str) -> RowResult<(Vec<Turn>, String)> {
    if !matches!(object.get(key), Some(Value::List(_))) {
        return Ok((Vec::new(), copy(required(object, key)?)?));
    }
    let mut turns = turns(object, key)?;
    match turns.pop() {
        Some(last) if last.is_assistant() => Ok((turns, last.text)),
        _ => Fault::bad(format!("has {key:?} whose last message is not the assistant's")),
    }
}

/// A list of messages, of which there is at least one.
fn turns(object: &Object, key: &str) -> RowResult<Vec<Turn>> {
    let messages = match object.get(key) {
        Some(Value::List(messages)) if !messages.is_empty() => messages,
        Some(Value::List(_)) => return Fault::bad(format!("{key:?} is an empty list, expected messages")),
        Some(other) => return Fault::bad(format!("{key:?} is {other}, expected a list of messages")),
        None => return Fault::bad(format!("{key:?} is missing")),
    };
    let mut turns = try_with_capacity("a row of data", messages.len() + 1)?;
    for (index, message) in messages.iter().enumerate() {
        let place = format!("{key}[{index}]");
        let Value::Object(message) = message else {
            return Fault::bad(format!("{place:?} is {message}, expected an object with \"role\" and \"content\""));
        };
        let member = |member: &str| match message.find(member) {
            Some(Value::Text(text)) if !text.trim().is_empty() => Ok(text.as_str()),
            Some(Value::Text(_)) => Fault::bad(format!("\"{place}.{member}\" is empty, expected a text")),
            Some(other) => Fault::bad(format!("\"{place}.{member}\" is {other}, expected a text")),
            None => Fault::bad(format!("{place:?} has {}, expected \"role\" and \"content\"", keys(message))),
        };
        let (role, text) = (member("role")?, member("content")?);
        let Some((_, role)) = ROLES.iter().find(|(name, _)| *name == role) else {
            let shown = role.chars().take(60).collect::<String>();
            let known = "system, user, assistant (or model) or tool";
            return Fault::bad(format!("\"{place}.role\" is {shown:?}, expected {known}"));
        };
        turns.push(Turn::new(role, text)?);
    }
    Ok(turns)
}

/// A text that is not empty.
fn required<'a>(object: &'a Object, key: &str) -> RowResult<&'a str> {
    match text_at(object, key)? {
        Some(text) if !text.trim().is_empty() => Ok(text),
        Some(_) => Fault::bad(format!("{key:?} is empty, expected a text")),
        None => Fault::bad(format!("{key:?} is missing, expected a text")),
    }
}

/// A text that may be empty, or missing: then it is not there.
fn optional<'a>(object: &'a Object, key: &str) -> RowResult<Option<&'a str>> {
    Ok(text_at(object, key)?.filter(|text| !text.trim().is_empty()))
}

fn text_at<'a>(object: &'a Object, key: &str) -> RowResult<Option<&'a str>> {
    match object.get(key) {
        None => Ok(None),
        Some(Value::Text(text)) => Ok(Some(text)),
        Some(other) => Fault::bad(format!("{key:?} is {other}, expected a text")),
    }
}

/// The keys of an object, for an error.
fn keys(object: &Object) -> String {
    const SHOWN: usize = 8;
    if object.keys.is_empty() {
        return "no keys".to_owned();
    }
    let short = |key: &String| format!("{:?}", key.chars().take(24).collect::<String>());
    let mut shown = object.keys.iter().take(SHOWN).map(short).collect::<Vec<_>>().join(", ");
    if object.keys.len() > SHOWN {
        shown.push_str(", ...");
    }
    format!("the {} {shown}", if object.keys.len() == 1 { "key" } else { "keys" })
}

fn copy(text: &str) -> RowResult<String> {
    join_all(&[text])
}

/// An instruction and what it is about.
fn join(instruction: &str, input: &str) -> RowResult<String> {
    join_all(&[instruction, BETWEEN, input])
}

/// What stands between an instruction and what it is about, and between texts that no turns keep apart.
pub const BETWEEN: &str = "\n\n";

/// Texts one after the other.
pub fn join_all(parts: &[&str]) -> RowResult<String> {
    let bytes = parts.iter().map(|part| part.len()).sum();
    let mut text = String::new();
    text.try_reserve_exact(bytes).map_err(|_| crate::error::Error::out_of_memory("a row of data", bytes))?;
    parts.iter().for_each(|part| text.push_str(part));
    Ok(text)
}
