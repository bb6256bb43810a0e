//! The turns of models without a template of their own, in the two markups Gemma's tokenizers have.

use crate::error::{Error, Result, Status};

use super::super::tokenizer::{EncodeOptions, Tokenizer, push_token};
use super::{Message, refuse_role};

/// The markers of Gemma's turns: start and end.
pub const GEMMA: [&str; 2] = ["<start_of_turn>", "<end_of_turn>"];
/// The markers of ChatML's turns: start and end.
pub const CHAT_ML: [&str; 2] = ["<|im_start|>", "<|im_end|>"];

/// `<bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n{text}<end_of_turn>\n ...`, texts trimmed.
///
/// There are two roles, which take turns; a system message becomes the beginning of the first user's.
pub fn gemma(tokenizer: &Tokenizer, bos: u32, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
    let (system, rest) = match messages {
        [first, rest @ ..] if first.role == "system" => (Some(first.text.trim()), rest),
        _ => (None, messages),
    };
    if rest.is_empty() {
        let text = "the conversation has only a system message, expected a user's after it";
        return Err(Error::new(Status::MessageValue, text).at_key("messages"));
    }
    let mut turns = Turns::new(tokenizer, GEMMA, bos)?;
    for (index, message) in rest.iter().enumerate() {
        let (expected, written) = if index % 2 == 0 { ("user", "user") } else { ("assistant", "model") };
        if message.role != expected && message.role != written {
            let sentence =
                format!("expected {expected}: user and assistant take turns, a system message may come first");
            return Err(refuse_role(messages.len() - rest.len() + index, message.role, &sentence));
        }
        let parts = ["\n", system.unwrap_or_default(), "\n\n", message.text.trim()];
        match system.filter(|_| index == 0) {
            Some(_) => turns.add(written, &parts)?,
            None => turns.add(written, &[parts[0], parts[3]])?,
        }
    }
    turns.finish(add_generation_prompt.then_some("model\n"))
}

/// `<bos><|im_start|>{role}\n{text}<|im_end|>\n ...`, with any roles and texts as they are.
pub fn chat_ml(tokenizer: &Tokenizer, bos: u32, messages: &[Message], add_generation_prompt: bool) -> Result<Vec<u32>> {
    let mut turns = Turns::new(tokenizer, CHAT_ML, bos)?;
    for message in messages {
        turns.add(message.role, &["\n", message.text])?;
    }
    turns.finish(add_generation_prompt.then_some("assistant\n"))
}

/// Turns in the making. Markers come as ids, so nothing between them is ever read as markup.
struct Turns<'a> {
    tokenizer: &'a Tokenizer,
    markers: [u32; 2],
    tokens: Vec<u32>,
    stretch: String,
}

impl<'a> Turns<'a> {
    fn new(tokenizer: &'a Tokenizer, markers: [&str; 2], bos: u32) -> Result<Self> {
        let id = |marker: &str| {
            let missing = || Error::new(Status::TemplateFailed, format!("the tokenizer has no token {marker}"));
            tokenizer.token_id(marker).ok_or_else(missing)
        };
        let mut tokens = Vec::new();
        push_token(&mut tokens, bos)?;
        Ok(Turns { tokenizer, markers: [id(markers[0])?, id(markers[1])?], tokens, stretch: String::new() })
    }

    fn add(&mut self, role: &str, parts: &[&str]) -> Result<()> {
        push_token(&mut self.tokens, self.markers[0])?;
        self.write(role)?;
        parts.iter().try_for_each(|part| self.write(part))?;
        self.end_stretch()?;
        push_token(&mut self.tokens, self.markers[1])?;
        self.write("\n")?;
        self.end_stretch()
    }

    fn finish(mut self, prompt: Option<&str>) -> Result<Vec<u32>> {
        if let Some(prompt) = prompt {
            push_token(&mut self.tokens, self.markers[0])?;
            self.write(prompt)?;
            self.end_stretch()?;
        }
        Ok(self.tokens)
    }

    fn write(&mut self, part: &str) -> Result<()> {
        let no_memory = |_| Error::out_of_memory("chat text", part.len());
        self.stretch.try_reserve(part.len()).map_err(no_memory)?;
        self.stretch.push_str(part);
        Ok(())
    }

    fn end_stretch(&mut self) -> Result<()> {
        self.tokenizer.encode_to(&self.stretch, EncodeOptions::default(), &mut self.tokens)?;
        self.stretch.clear();
        Ok(())
    }
}
