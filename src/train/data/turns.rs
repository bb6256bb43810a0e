//! Conversations as a model's own turns, and which of their tokens are its answers.
//!
//! An answer begins where the template, asked to begin the model's turn behind the messages before it, ends; that has to be a
//! beginning of the whole conversation. It ends behind the first token that ends a turn, which no text of a message can give.

use super::report::{Fault, RowResult};
use super::row::{ASSISTANT, Turn};
use crate::engine::Model;
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::text::{EncodeOptions, Message};
use crate::train::document::Document;

const WHAT: &str = "the tokens of a row";

/// Writes conversations with a model's chat template.
pub struct Writer<'a> {
    pub model: &'a Model,
}

/// Where an answer begins among the tokens of a conversation.
struct Beginning {
    /// As many of them are the prompt's.
    shared: usize,
    /// The first behind those that are not.
    next: usize,
    /// What is the answer's instead of these.
    between: Vec<u32>,
}

impl Writer<'_> {
    /// A conversation up to the last token that is learned, or to one beyond the first `most`.
    pub fn conversation(&self, turns: &[Turn], most: usize) -> RowResult<Document> {
        let messages = messages(turns)?;
        let written = self.chat(&messages, false)?;
        let mut document = Document { tokens: Vec::new(), is_response: Vec::new() };
        let mut taken = 0;
        for index in (0..turns.len()).filter(|index| turns[*index].is_assistant()) {
            if index == 0 {
                return Fault::bad("has messages that begin with the assistant's, expected a user's first");
            }
            let prompt = self.chat(&messages[..index], true)?;
            let beginning = self.beginning(&written, &prompt, index)?;
            let end = match self.end(&written, &beginning, index)? {
                Some(end) => end,
                None if index + 1 == turns.len() => written.len(),
                None => {
                    let so_far = self.chat(&messages[..=index], false)?;
                    if so_far.len() < beginning.next || !written.starts_with(&so_far) {
                        return Fault::bad(not_a_beginning(index));
                    }
                    so_far.len()
                }
            };
            if beginning.shared < taken {
                return Fault::bad(not_a_beginning(index));
            }
            append(&mut document, &written[taken..beginning.shared], false)?;
            append(&mut document, &prompt[beginning.shared..], false)?;
            append(&mut document, &beginning.between, true)?;
            append(&mut document, &written[beginning.next..end], true)?;
            taken = end;
            // What will be cut off need not be looked at.
            if document.tokens.len() > most {
                break;
            }
        }
        Ok(document)
    }

    /// A prompt, BOS first, and answers to it.
    pub fn answers(&self, context: &[Turn], answers: [&str; 2]) -> RowResult<(Vec<u32>, [Vec<u32>; 2])> {
        let mut messages = messages(context)?;
        let prompt = self.chat(&messages, true)?;
        let mut answer = |text| {
            messages.push(Message { role: ASSISTANT, text });
            let written = self.chat(&messages, false)?;
            messages.pop();
            let beginning = self.beginning(&written, &prompt, context.len())?;
            let end = self.end(&written, &beginning, context.len())?.unwrap_or(written.len());
            let rest = &written[beginning.next..end];
            let mut answer = try_with_capacity(WHAT, beginning.between.len() + rest.len())?;
            answer.extend_from_slice(&beginning.between);
            answer.extend_from_slice(rest);
            Ok::<_, Fault>(answer)
        };
        let answers = [answer(answers[0])?, answer(answers[1])?];
        Ok((prompt, answers))
    }

    /// Where the answer to a prompt, which is message `index`, begins.
    ///
    /// The last tokens of the prompt and the first of the answer may be others where both are written together, as two line ends
    /// are one token. They are taken apart, for that is how the model will meet them.
    fn beginning(&self, written: &[u32], prompt: &[u32], index: usize) -> RowResult<Beginning> {
        let tokenizer = self.model.tokenizer()?;
        let shared = written.iter().zip(prompt).take_while(|(one, other)| one == other).count();
        let bytes_of = |token: u32| match tokenizer.is_special(token) {
            true => Fault::bad(not_a_beginning(index)),
            false => Ok(tokenizer.token_bytes(token, true)?),
        };
        let mut asked = Vec::new();
        for token in &prompt[shared..] {
            extend(&mut asked, bytes_of(*token)?)?;
        }
        // Where they are not the prompt's, all tokens up to the next special one may be others.
        let (mut found, mut next) = (Vec::new(), shared);
        while !asked.is_empty() && next < written.len() && !tokenizer.is_special(written[next]) {
            extend(&mut found, bytes_of(written[next])?)?;
            next += 1;
        }
        match found.strip_prefix(&asked[..]).map(std::str::from_utf8) {
            Some(Ok(text)) if next < written.len() || !text.is_empty() => {
                Ok(Beginning { shared, next, between: tokenizer.encode(text, EncodeOptions::default())? })
            }
            _ => Fault::bad(not_a_beginning(index)),
        }
    }

    /// Where an answer ends among the tokens of a conversation. None where the template does not end its turn with a token.
    fn end(&self, written: &[u32], beginning: &Beginning, index: usize) -> RowResult<Option<usize>> {
        let rest = &written[beginning.next..];
        let stop = rest.iter().position(|token| self.model.stop_tokens().contains(token));
        if stop == Some(0) && beginning.between.is_empty() {
            return Fault::bad(format!("has a message, messages[{index}], of which the chat template writes nothing"));
        }
        Ok(stop.map(|stop| beginning.next + stop + 1))
    }

    fn chat(&self, messages: &[Message], add_generation_prompt: bool) -> RowResult<Vec<u32>> {
        self.model.encode_chat(messages, add_generation_prompt).map_err(|error| match error.status() {
            Status::MessageValue => Fault::Bad(format!("has messages that cannot be used: {error}")),
            Status::TemplateFailed | Status::TemplateLimit => {
                Fault::Bad(format!("has messages that the model's chat template refuses: {error}"))
            }
            _ => Fault::Stop(error),
        })
    }
}

fn append(document: &mut Document, tokens: &[u32], is_response: bool) -> Result<()> {
    let no_memory = |_| Error::out_of_memory(WHAT, tokens.len());
    document.tokens.try_reserve(tokens.len()).map_err(no_memory)?;
    document.tokens.extend_from_slice(tokens);
    document.is_response.try_reserve(tokens.len()).map_err(no_memory)?;
    document.is_response.resize(document.tokens.len(), is_response);
    Ok(())
}

fn extend(bytes: &mut Vec<u8>, more: &[u8]) -> Result<()> {
    bytes.try_reserve(more.len()).map_err(|_| Error::out_of_memory(WHAT, more.len()))?;
    bytes.extend_from_slice(more);
    Ok(())
}

fn not_a_beginning(index: usize) -> String {
    format!(
        "cannot be masked: the model's chat template writes what comes before messages[{index}] otherwise when it \
         follows, so that a response has no beginning"
    )
}

fn messages(turns: &[Turn]) -> Result<Vec<Message<'_>>> {
    let mut messages = try_with_capacity("the messages of a row", turns.len() + 1)?;
    messages.extend(turns.iter().map(|turn| Message { role: turn.role, text: &turn.text }));
    Ok(messages)
}
