//! Text to tokens and back, and `gemmoe_text_stream`, which gives text piece by piece without breaking a character.

use std::ffi::c_char;
use std::sync::Arc;

use parking_lot::Mutex;

use super::arguments::{self, Out, check_flags, copy_out, slice};
use super::error::GemmoeError;
use super::guard::{Poison, guard, guard_status};
use super::handles::{self, Held, Object};
use super::model::{GemmoeModel, ModelObject};
use crate::engine::Model;
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::text::{MAX_STOP_STRINGS, Stopped, TextStream};

/// gemmoe_tokenize flags: put the BOS token in front. The model degrades badly without it.
pub const GEMMOE_TOKENIZE_ADD_BOS: u32 = 1;
/// gemmoe_tokenize flags: let markup such as <start_of_turn> become its special token. For trusted text only.
pub const GEMMOE_TOKENIZE_PARSE_SPECIAL: u32 = 2;

/// gemmoe_detokenize flags: write special tokens as their markup instead of leaving them out.
pub const GEMMOE_DETOKENIZE_KEEP_SPECIAL: u32 = 1;

/// gemmoe_text_stream_stopped reasons: the stream has not stopped.
pub const GEMMOE_STOPPED_NO: u32 = 0;
/// gemmoe_text_stream_stopped reasons: a stop token of the model was pushed, see gemmoe_model_is_stop_token.
pub const GEMMOE_STOPPED_TOKEN: u32 = 1;
/// gemmoe_text_stream_stopped reasons: a stop string is complete.
pub const GEMMOE_STOPPED_STRING: u32 = 2;

/// Copies the tokens of `text`, `text_bytes` bytes of UTF-8, to `tokens`. `count_out` receives how many there are, also
/// with BUFFER_TOO_SMALL; with `capacity` 0 nothing else is written. Flags: GEMMOE_TOKENIZE_.
/// Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, INVALID_UTF8, NO_TOKENIZER, BUFFER_TOO_SMALL, OUT_OF_MEMORY.
/// Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_tokenize(
    model: *const GemmoeModel,
    text: *const c_char,
    text_bytes: usize,
    flags: u32,
    tokens: *mut u32,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            check_flags(flags, GEMMOE_TOKENIZE_ADD_BOS | GEMMOE_TOKENIZE_PARSE_SPECIAL)?;
            let model = handles::find::<ModelObject>(model, "model")?;
            let text = arguments::text(text, text_bytes, "text")?;
            let (bos, special) = (flags & GEMMOE_TOKENIZE_ADD_BOS != 0, flags & GEMMOE_TOKENIZE_PARSE_SPECIAL != 0);
            let found = model.with(|model| model.encode(text, bos, special))?;
            copy_out(&found, tokens, capacity, count_out, "tokens")
        })
    }
}

/// Copies the text of `token_count` tokens to `text`, valid UTF-8 without NUL. `count_out` receives its length in
/// bytes, also with BUFFER_TOO_SMALL; with `capacity` 0 nothing else is written. Flags: GEMMOE_DETOKENIZE_.
/// Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, TOKEN_OUT_OF_RANGE, NO_TOKENIZER, BUFFER_TOO_SMALL,
/// OUT_OF_MEMORY. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_detokenize(
    model: *const GemmoeModel,
    tokens: *const u32,
    token_count: usize,
    flags: u32,
    text: *mut c_char,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            check_flags(flags, GEMMOE_DETOKENIZE_KEEP_SPECIAL)?;
            let model = handles::find::<ModelObject>(model, "model")?;
            let tokens = slice(tokens, token_count, "tokens")?;
            let keep_special = flags & GEMMOE_DETOKENIZE_KEEP_SPECIAL != 0;
            let found = model.with(|model| model.tokenizer()?.decode(tokens, keep_special))?;
            copy_out(&found, text.cast::<u8>(), capacity, count_out, "text")
        })
    }
}

/// Tokens in, text out, in whole characters: a character whose bytes are spread over tokens comes with its last one.
/// The text ends at a stop token of the model and at the stop strings of the host. For one thread at a time.
pub struct GemmoeTextStream {
    _opaque: (),
}

struct Stream {
    decoder: TextStream,
    /// What the last call gave out.
    text: Vec<u8>,
}

pub struct TextStreamObject {
    model: Arc<Model>,
    stream: Mutex<Stream>,
    poison: Poison,
}

impl TextStreamObject {
    /// Runs `body` on the stream and hands out the text it left there.
    fn produce(
        &self,
        text_out: Out<*const c_char>,
        bytes_out: Out<usize>,
        body: impl FnOnce(&Model, &mut Stream) -> Result<()>,
    ) -> Result<()> {
        self.with(|model, stream| {
            stream.text.clear();
            body(model, stream)?;
            text_out.set(stream.text.as_ptr().cast::<c_char>());
            bytes_out.set(stream.text.len());
            Ok(())
        })
    }

    /// Runs `body` on the stream, or answers Busy.
    fn with<T>(&self, body: impl FnOnce(&Model, &mut Stream) -> Result<T>) -> Result<T> {
        let busy = || Error::new(Status::Busy, "another thread is inside a call on this text stream");
        // Held until the poison is set: nobody gets in between a panic and its mark.
        let mut stream = self.stream.try_lock().ok_or_else(busy)?;
        self.poison.watch(|| body(&self.model, &mut stream))
    }
}

impl Held for TextStreamObject {
    type Opaque = GemmoeTextStream;
    const KIND: usize = 12;
    const NAME: &'static str = "gemmoe_text_stream";
    fn wrap(object: Arc<Self>) -> Object {
        Object::TextStream(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::TextStream(object) = object { Some(object) } else { None }
    }
}

/// Makes a text stream, owned by the host. The model may be destroyed before it.
/// Errors: handle errors, NULL_ARGUMENT, NO_TOKENIZER. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_text_stream_create(
    model: *const GemmoeModel,
    stream_out: *mut *mut GemmoeTextStream,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let stream_out = Out::new(stream_out, "stream_out")?;
            let model = handles::find::<ModelObject>(model, "model")?.with(|model| {
                model.tokenizer()?;
                Ok(Arc::clone(model))
            })?;
            let stream = Mutex::new(Stream { decoder: TextStream::default(), text: Vec::new() });
            stream_out.set(handles::insert(TextStreamObject { model, stream, poison: Poison::default() })?);
            Ok(())
        })
    }
}

/// Gives a text stream stop strings, `count` of them, NUL-terminated UTF-8, which are copied and replace the earlier
/// ones: the first that is completed ends the text before it. First is the one that ends first, and of those that end
/// together the longest. Text that may become a stop string waits, and comes out when it does not. They count for tokens
/// pushed from now on, and also after gemmoe_text_stream_finish. At most 64 strings of 1 to 4096 bytes.
/// Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, INVALID_UTF8, BUSY, OUT_OF_MEMORY; nothing is changed then.
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_text_stream_set_stop_strings(
    stream: *mut GemmoeTextStream,
    strings: *const *const c_char,
    count: usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let object = handles::find::<TextStreamObject>(stream, "stream")?;
            // Before the array is read: a count that cannot be is no reason to read so much memory.
            if count > MAX_STOP_STRINGS {
                let text = format!("count is {count}, expected at most {MAX_STOP_STRINGS}");
                return Err(Error::new(Status::InvalidArgument, text).at_key("count"));
            }
            let mut copies = try_with_capacity("stop strings", count)?;
            for pointer in slice(strings, count, "strings")? {
                copies.push(arguments::string(*pointer, "strings")?);
            }
            object.with(|_, stream| stream.decoder.set_stop_strings(&copies))
        })
    }
}

/// Whether a text stream has stopped since it was made or finished: `reason_out` receives a GEMMOE_STOPPED_, `index_out`
/// the index of the stop string, 0 where there is none. A stream that has stopped gives no more text from
/// gemmoe_text_stream_push; a stop string itself, and what follows it, is never given.
/// Errors: handle errors, NULL_ARGUMENT, BUSY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_text_stream_stopped(
    stream: *const GemmoeTextStream,
    reason_out: *mut u32,
    index_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let (reason_out, index_out) = (Out::new(reason_out, "reason_out")?, Out::new(index_out, "index_out")?);
            let object = handles::find::<TextStreamObject>(stream, "stream")?;
            let (reason, index) = match object.with(|_, stream| Ok(stream.decoder.stopped()))? {
                None => (GEMMOE_STOPPED_NO, 0),
                Some(Stopped::Token) => (GEMMOE_STOPPED_TOKEN, 0),
                Some(Stopped::String(index)) => (GEMMOE_STOPPED_STRING, index),
            };
            reason_out.set(reason);
            index_out.set(index);
            Ok(())
        })
    }
}

/// Adds a token and gives the text that is certain now: `bytes_out` bytes at `text_out`, possibly 0, without NUL,
/// borrowed until the next push or finish on this stream. Special tokens give no text; a stop token of the model stops
/// the stream.
/// Errors: handle errors, NULL_ARGUMENT, TOKEN_OUT_OF_RANGE, BUSY, OUT_OF_MEMORY. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_text_stream_push(
    stream: *mut GemmoeTextStream,
    token: u32,
    text_out: *mut *const c_char,
    bytes_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let (text_out, bytes_out) = (Out::new(text_out, "text_out")?, Out::new(bytes_out, "bytes_out")?);
            handles::find::<TextStreamObject>(stream, "stream")?.produce(text_out, bytes_out, |model, stream| {
                stream.decoder.push(model.tokenizer()?.token_bytes(token, false)?, &mut stream.text)?;
                if model.stop_tokens().contains(&token) {
                    stream.decoder.stop_at_token();
                }
                Ok(())
            })
        })
    }
}

/// Ends the text: gives what waited, and U+FFFD for an unfinished character; nothing after a stop string. The stream is
/// then as new, with the same stop strings.
/// Errors and borrowing: as gemmoe_text_stream_push. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_text_stream_finish(
    stream: *mut GemmoeTextStream,
    text_out: *mut *const c_char,
    bytes_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let (text_out, bytes_out) = (Out::new(text_out, "text_out")?, Out::new(bytes_out, "bytes_out")?);
            handles::find::<TextStreamObject>(stream, "stream")?
                .produce(text_out, bytes_out, |_, stream| stream.decoder.finish(&mut stream.text))
        })
    }
}

/// Destroys a text stream. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_text_stream_destroy(stream: *mut GemmoeTextStream) -> Status {
    guard_status(|| handles::remove::<TextStreamObject>(stream, "stream"))
}
