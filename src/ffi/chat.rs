//! Conversations to tokens.

use std::ffi::c_char;

use super::arguments::{self, check_flags, copy_out};
use super::error::GemmoeError;
use super::guard::guard;
use super::handles;
use super::model::{GemmoeModel, ModelObject};
use super::structs::{self, Versioned};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::text::Message;
use crate::text::chat::MAX_MESSAGES;

/// gemmoe_chat_tokenize flags: end where the model's turn has begun, ready to generate.
pub const GEMMOE_CHAT_ADD_GENERATION_PROMPT: u32 = 1;

/// One message of a conversation. Initialise with GEMMOE_MESSAGE_INIT. All elements of an array have one struct_size.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeMessage {
    /// sizeof(gemmoe_message)
    pub struct_size: u32,
    /// Must be 0.
    pub reserved0: u32,
    /// Who speaks: "user", "assistant", "system" or what else the model's template knows. NUL-terminated.
    pub role: *const c_char,
    /// What is said, UTF-8. No markup in it counts.
    pub text: *const c_char,
    /// Bytes of text.
    pub text_bytes: u64,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, two u32 then two pointers then u64s leave no padding whatever a pointer's
// size, plain numbers and raw pointers.
unsafe impl Versioned for GemmoeMessage {
    const NAME: &'static str = "gemmoe_message";
    const FIRST_SIZE: usize = size_of::<GemmoeMessage>();
}

/// Copies the tokens of a conversation to `tokens`, written as the model's chat template has it: `message_count`
/// messages, 1 to 16384, with roles of 1 to 32 letters a to z and _, BOS in front. Special tokens come from the template only; a message that spells one out
/// gets ordinary characters. The template is chat_template.jinja of the model directory, else chat_template of
/// tokenizer_config.json, else ChatML or Gemma turns, whichever markers the tokenizer has. `count_out` receives how many
/// tokens there are, also with BUFFER_TOO_SMALL; with `capacity` 0 nothing else is written. Flags: GEMMOE_CHAT_.
/// Errors: handle errors, NULL_ARGUMENT, INVALID_ARGUMENT, STRUCT_SIZE, INVALID_UTF8, MESSAGE_VALUE, NO_TOKENIZER,
/// TEMPLATE_SYNTAX, TEMPLATE_FAILED, TEMPLATE_LIMIT, what reading the template's file gave (READ_FAILED,
/// FILE_NOT_ALLOWED, FILE_TOO_LARGE, FILE_LENGTH), THREAD_UNAVAILABLE, BUFFER_TOO_SMALL, OUT_OF_MEMORY.
/// Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_chat_tokenize(
    model: *const GemmoeModel,
    messages: *const GemmoeMessage,
    message_count: usize,
    flags: u32,
    tokens: *mut u32,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            check_flags(flags, GEMMOE_CHAT_ADD_GENERATION_PROMPT)?;
            let model = handles::find::<ModelObject>(model, "model")?;
            let messages = read_messages(messages, message_count)?;
            let prompt = flags & GEMMOE_CHAT_ADD_GENERATION_PROMPT != 0;
            let found = model.with(|model| model.encode_chat(&messages, prompt))?;
            copy_out(&found, tokens, capacity, count_out, "tokens")
        })
    }
}

/// # Safety
/// `pointer` is NULL or the first of `count` elements that are as far apart as its `struct_size` says; what they point
/// to stays unchanged for `'a`.
unsafe fn read_messages<'a>(pointer: *const GemmoeMessage, count: usize) -> Result<Vec<Message<'a>>> {
    // Before the array is read: a count that cannot be is no reason to read so much memory.
    if count > MAX_MESSAGES {
        let text = format!("message_count is {count}, expected 1 to {MAX_MESSAGES}");
        return Err(Error::new(Status::MessageValue, text).at_key("message_count"));
    }
    if count > 0 && pointer.is_null() {
        return Err(Error::new(Status::NullArgument, "messages is NULL").at_key("messages"));
    }
    let mut messages = try_with_capacity("messages", count)?;
    let mut stride = 0;
    for index in 0..count {
        // SAFETY: the caller's promises; unaligned because C may give any address.
        unsafe {
            let element = pointer.byte_add(index * stride);
            let size = element.cast::<u32>().read_unaligned() as usize;
            if index > 0 && size != stride {
                let text = format!("messages[{index}].struct_size is {size}, that of messages[0] is {stride}");
                return Err(Error::new(Status::StructSize, text).at_key("struct_size"));
            }
            stride = size;
            let message = structs::read(element, "messages")?;
            structs::check_reserved(&message.reserved, "messages")?;
            structs::check_reserved(&[message.reserved0.into()], "messages")?;
            // A length no memory has is refused by its name below.
            let bytes = usize::try_from(message.text_bytes).unwrap_or(usize::MAX);
            messages.push(Message {
                role: arguments::string(message.role, "role")?,
                text: arguments::text(message.text, bytes, "text")?,
            });
        }
    }
    Ok(messages)
}
