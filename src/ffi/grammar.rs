//! `gemmoe_grammar`: what a session's output must follow.

use std::ffi::c_char;
use std::sync::Arc;

use super::arguments::{Out, text};
use super::error::GemmoeError;
use super::guard::{guard, guard_status};
use super::handles::{self, Held, Object};
use super::model::{GemmoeModel, ModelObject};
use super::session::{GemmoeSession, find};
use crate::engine::Session;
use crate::error::{Error, Result, Status};
use crate::text::grammar::{Grammar, GrammarKind, check_source_bytes};

/// gemmoe_grammar_create kind: a JSON schema; the output is one JSON value that it describes, with one space at most where
/// JSON allows white space: a member "x-guidance": {"whitespace_flexible": true} of the schema allows any.
pub const GEMMOE_GRAMMAR_JSON_SCHEMA: u32 = 1;
/// gemmoe_grammar_create kind: a regular expression, which the whole output matches.
pub const GEMMOE_GRAMMAR_REGEX: u32 = 2;
/// gemmoe_grammar_create kind: a grammar in llguidance's variant of Lark, whose rule `start` is the whole output.
pub const GEMMOE_GRAMMAR_LARK: u32 = 3;

/// gemmoe_session_info.grammar_state: the session has no grammar.
pub const GEMMOE_GRAMMAR_NONE: u32 = 0;
/// gemmoe_session_info.grammar_state: the output so far is not a whole one.
pub const GEMMOE_GRAMMAR_OPEN: u32 = 1;
/// gemmoe_session_info.grammar_state: the output so far is a whole one; more may be possible.
pub const GEMMOE_GRAMMAR_COMPLETE: u32 = 2;

/// A compiled grammar of one model, immutable: any number of sessions and threads may use it at once.
pub struct GemmoeGrammar {
    _opaque: (),
}

pub struct GrammarObject {
    grammar: Grammar,
}

impl Held for GrammarObject {
    type Opaque = GemmoeGrammar;
    const KIND: usize = 14;
    const NAME: &'static str = "gemmoe_grammar";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Grammar(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Grammar(object) = object { Some(object) } else { None }
    }
}

/// The constant of a session's state.
pub fn grammar_state(session: &mut Session) -> Result<u32> {
    Ok(match session.is_grammar_complete()? {
        None => GEMMOE_GRAMMAR_NONE,
        Some(false) => GEMMOE_GRAMMAR_OPEN,
        Some(true) => GEMMOE_GRAMMAR_COMPLETE,
    })
}

/// Compiles a grammar of `kind` (GEMMOE_GRAMMAR_) from `source`, `source_bytes` bytes of UTF-8, owned by the host. The first
/// of a model takes up to a second more (with a vocabulary of 256,000). The model may be destroyed before it.
/// Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT (no such kind), INVALID_UTF8, GRAMMAR_SYNTAX, GRAMMAR_LIMIT,
/// NO_TOKENIZER, THREAD_UNAVAILABLE, OUT_OF_MEMORY. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_grammar_create(
    model: *const GemmoeModel,
    kind: u32,
    source: *const c_char,
    source_bytes: usize,
    grammar_out: *mut *mut GemmoeGrammar,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let model = handles::find::<ModelObject>(model, "model")?;
            let grammar_out = Out::new(grammar_out, "grammar_out")?;
            let kind = match kind {
                GEMMOE_GRAMMAR_JSON_SCHEMA => GrammarKind::JsonSchema,
                GEMMOE_GRAMMAR_REGEX => GrammarKind::Regex,
                GEMMOE_GRAMMAR_LARK => GrammarKind::Lark,
                other => {
                    let text = format!("kind is {other}, expected one of GEMMOE_GRAMMAR_");
                    return Err(Error::new(Status::InvalidArgument, text).at_key("kind"));
                }
            };
            // Before the source is read: a length that cannot be is no reason to read so much memory.
            check_source_bytes(source_bytes)?;
            let source = text(source, source_bytes, "source")?;
            let grammar = model.with(|model| Grammar::new(model.grammar_vocabulary()?, kind, source))?;
            grammar_out.set(handles::insert(GrammarObject { grammar })?);
            Ok(())
        })
    }
}

/// Lets only tokens that follow `grammar` be drawn or appended from now on; NULL lifts an earlier one. Set it after the
/// prompt, before the first step. When the output is complete and nothing can follow, only stop tokens are drawn. A rewind
/// takes tokens back, past the place where the grammar was set it begins anew.
/// Errors: handle errors, INVALID_ARGUMENT (a grammar of another model), OUT_OF_MEMORY, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_session_set_grammar(
    session: *mut GemmoeSession,
    grammar: *const GemmoeGrammar,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let session = find(session)?;
            let grammar = match grammar.is_null() {
                true => None,
                false => Some(handles::find::<GrammarObject>(grammar, "grammar")?),
            };
            session.with(|session| session.set_grammar(grammar.as_ref().map(|object| &object.grammar)))
        })
    }
}

/// Destroys a grammar; sessions that follow it go on. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE.
/// Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_grammar_destroy(grammar: *mut GemmoeGrammar) -> Status {
    guard_status(|| handles::remove::<GrammarObject>(grammar, "grammar"))
}
