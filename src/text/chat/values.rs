//! What the engine's own values and functions would leave unbounded.

use std::collections::BTreeMap;
use std::fmt::Write;

use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

/// The function that flattens what a variable keeps. No template may name it.
pub const FLAT: &str = "gemmoe_flat";
/// The function that flattens what a member of a namespace keeps.
pub const FLAT_MEMBER: &str = "gemmoe_flat_member";

/// How deep lists and objects may be nested in a variable.
const MAX_DEPTH: usize = 32;

/// Filters no chat template needs, whose work the engine does not count before it is done.
const REMOVED_FILTERS: [&str; 15] = [
    "attr",
    "batch",
    "chain",
    "format",
    "groupby",
    "lines",
    "max",
    "min",
    "pprint",
    "slice",
    "sort",
    "sum",
    "unique",
    "urlencode",
    "zip",
];

/// Gives the environment what Hugging Face's templates expect, within bounds.
pub fn add_to(environment: &mut Environment) {
    REMOVED_FILTERS.iter().for_each(|name| environment.remove_filter(name));
    environment.set_formatter(|output, state, value| {
        pay(state, value, 0)?;
        minijinja::escape_formatter(output, state, value)
    });
    environment.set_unknown_method_callback(method);
    environment.add_function(FLAT, |state: &State, value: Value| flat(state, value, true));
    environment.add_function(FLAT_MEMBER, |state: &State, value: Value| flat(state, value, false));
    environment.add_filter("join", |state: &State, items: Value, separator: Option<String>| {
        join(state, separator.as_deref().unwrap_or_default(), &items)
    });
    environment.add_filter("map", map);
    environment.add_filter("tojson", |state: &State, value: Value, _options: Kwargs| {
        pay(state, &value, 0)?;
        let text = serde_json::to_string(&value);
        text.map_err(|error| Error::new(ErrorKind::BadSerialization, error.to_string()))
    });
    environment.add_function("raise_exception", |text: &str| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, text.to_owned()))
    });
    // In place of the engine's, whose members could be anything.
    let namespace = Value::from_function(minijinja::functions::namespace);
    environment.add_function("namespace", move |state: &mut State, members: Kwargs| {
        let mut flattened = Vec::new();
        for name in members.args() {
            flattened.push((name.to_owned(), flat(state, members.get::<Value>(name)?, false)?));
        }
        let members: Kwargs = flattened.into_iter().collect();
        namespace.call(state, &[Value::from(members)])
    });
}

/// Pays for looking at all of a list or an object: a step for each part, and for 64 bytes.
fn pay(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if value.as_object().is_none() {
        return Ok(());
    }
    copy(state, value, depth).map(drop)
}

/// A copy of a value that is no deeper than `MAX_DEPTH` and holds nothing that can change or is made when it is read;
/// a step pays for each part, and for 64 bytes, as often as they would be printed. With `is_variable`, what is neither
/// list nor object, such as a namespace or a macro, is kept as it is.
fn flat(state: &State, value: Value, is_variable: bool) -> Result<Value, Error> {
    if value.as_object().is_none() {
        return Ok(value);
    }
    let is_other = value.kind() == ValueKind::Plain
        || value.kind() == ValueKind::Map && value.downcast_object_ref::<BTreeMap<Value, Value>>().is_none();
    if is_variable && is_other {
        return Ok(value);
    }
    copy(state, &value, 0)
}

fn copy(state: &State, value: &Value, depth: usize) -> Result<Value, Error> {
    state.consume_fuel(1 + value.as_str().map_or(0, str::len) as u64 / 64)?;
    if depth > MAX_DEPTH {
        let text = format!("a variable is nested more than {MAX_DEPTH} levels deep");
        return Err(Error::new(ErrorKind::OutOfFuel, text));
    }
    match value.kind() {
        ValueKind::Seq | ValueKind::Iterable => {
            let mut items = Vec::new();
            for item in value.try_iter()?.checked() {
                items.push(copy(state, &item?, depth + 1)?);
            }
            Ok(if value.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) })
        }
        ValueKind::Map => {
            let Some(members) = value.downcast_object_ref::<BTreeMap<Value, Value>>() else {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "a namespace or loop cannot be kept inside another value",
                ));
            };
            let mut copies = BTreeMap::new();
            for (key, member) in members {
                copies.insert(copy(state, key, depth + 1)?, copy(state, member, depth + 1)?);
            }
            Ok(Value::from_object(copies))
        }
        ValueKind::Plain => {
            let text = "a macro or function cannot be kept inside another value";
            Err(Error::new(ErrorKind::InvalidOperation, text))
        }
        _ => Ok(value.clone()),
    }
}

/// Python's methods; those whose work is more than their result says are paid for first.
fn method(state: &mut State, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), name) {
        (Some(separator), "join") => match arguments {
            [items] => join(state, separator, items),
            _ => Err(Error::new(ErrorKind::InvalidOperation, "join takes one argument")),
        },
        // Its widths can ask for any amount of memory.
        (Some(_), "format") => Err(Error::from(ErrorKind::UnknownMethod)),
        (Some(text), "split" | "splitlines") => {
            // At most a part for each character, each a value of its own.
            let parts = match arguments.first().and_then(Value::as_str) {
                Some(separator) if name == "split" && !separator.is_empty() => text.matches(separator).count(),
                _ => text.matches(char::is_whitespace).count(),
            };
            state.consume_fuel(parts as u64 + 1)?;
            pycompat::unknown_method_callback(state, value, name, arguments)
        }
        (None, "count") => {
            state.consume_fuel(value.len().unwrap_or_default() as u64)?;
            pycompat::unknown_method_callback(state, value, name, arguments)
        }
        _ => {
            let bytes: usize = arguments.iter().filter_map(Value::as_str).map(str::len).sum();
            state.consume_fuel(bytes as u64 / 64)?;
            pycompat::unknown_method_callback(state, value, name, arguments)
        }
    }
}

/// `map(attribute='name')`: the only form that is supported.
fn map(state: &State, items: Value, options: Kwargs) -> Result<Value, Error> {
    let name: String = options.get("attribute")?;
    options.assert_all_used()?;
    let mut attributes = Vec::new();
    for item in items.try_iter()?.checked() {
        state.consume_fuel(1)?;
        attributes.push(item?.get_attr(&name)?);
    }
    Ok(Value::from(attributes))
}

fn join(state: &State, separator: &str, items: &Value) -> Result<Value, Error> {
    let mut joined = String::new();
    for (index, item) in items.try_iter()?.checked().enumerate() {
        let item = item?;
        let length = item.as_str().map_or(0, str::len) + separator.len();
        state.consume_fuel(1 + length as u64 / 64)?;
        if index > 0 {
            joined.push_str(separator);
        }
        match item.as_str() {
            Some(text) => joined.push_str(text),
            None => {
                pay(state, &item, 0)?;
                // Writing to a String cannot fail.
                let _ = write!(joined, "{item}");
            }
        }
    }
    Ok(Value::from(joined))
}
