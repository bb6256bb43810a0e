//! Chat messages to token ids: the model's own template, or the turns its tokenizer has markers for.
//!
//! Whoever wrote the template is trusted with the markup of special tokens; whoever wrote a message is not. No text of
//! a message ever gives a special token, alone or together with what stands beside it.

mod disguise;
mod jinja;
mod settings;
mod source;
mod turns;
mod values;

use crate::error::{Error, Result, Status};

use super::tokenizer::Tokenizer;
use jinja::Jinja;
use settings::Settings;

/// The file that holds nothing but a template. It wins over the one in `SETTINGS_FILE`.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The largest `TEMPLATE_FILE` that is read, in bytes.
pub const MAX_TEMPLATE_FILE_BYTES: u64 = 1 << 20;
/// The file that may hold a template beside the names of BOS and EOS.
pub const SETTINGS_FILE: &str = "tokenizer_config.json";
/// The largest `SETTINGS_FILE` that is read, in bytes.
pub const MAX_SETTINGS_FILE_BYTES: u64 = 8 << 20;

/// The most messages of one conversation.
pub const MAX_MESSAGES: usize = 1 << 14;
/// The most text of one conversation, in bytes.
const MAX_TEXT_BYTES: usize = 2 << 20;
/// The longest role.
const MAX_ROLE_BYTES: usize = 32;

/// One message of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// Who speaks: `user`, `assistant`, `system` or what else the template knows; 1 to 32 of `a` to `z` and `_`.
    pub role: &'a str,
    /// What is said. Nothing in it is markup.
    pub text: &'a str,
}

/// How a conversation becomes the text a model was trained on. Never changes, so threads can share it.
pub struct ChatTemplate(Kind);

enum Kind {
    /// `<start_of_turn>user\n...<end_of_turn>\n`
    Gemma,
    /// `<|im_start|>user\n...<|im_end|>\n`
    ChatMl,
    Jinja(Box<Jinja>),
}

/// The text of the template of a model directory, as `ChatTemplate::choose` takes it from its files; none where they have
/// none. Fails with TemplateSyntax.
pub fn stored_template(template: Option<&[u8]>, settings: Option<&[u8]>) -> Result<Option<String>> {
    if let Some(bytes) = template {
        return template_text(bytes).map(Some);
    }
    Ok(settings.map(Settings::from_json).transpose()?.and_then(|settings| settings.template))
}

impl ChatTemplate {
    /// The template of a model directory: `template` are the bytes of its `TEMPLATE_FILE`, `settings` those of its
    /// `SETTINGS_FILE`. Without a template in either, the turns the tokenizer has special tokens for.
    ///
    /// Fails with TemplateSyntax (either file), TemplateLimit (a template too large or too deep), TemplateFailed (no
    /// template and no turn markers), ThreadUnavailable or OutOfMemory; the error names the file.
    pub fn choose(
        template: Option<&[u8]>,
        settings: Option<&[u8]>,
        tokenizer: &Tokenizer,
        bos: u32,
        eos: Option<u32>,
    ) -> Result<ChatTemplate> {
        let settings = settings.map(Settings::from_json).transpose().map_err(|error| error.in_file(SETTINGS_FILE))?;
        let mut settings = settings.unwrap_or_default();
        settings.name_tokens(tokenizer, bos, eos);
        let (source, file) = match (template, settings.template.take()) {
            (Some(bytes), _) => (Some(template_text(bytes)?), TEMPLATE_FILE),
            (None, source) => (source, SETTINGS_FILE),
        };
        if let Some(source) = source {
            let jinja = Jinja::new(&source, settings).map_err(|error| error.in_file(file))?;
            return Ok(ChatTemplate(Kind::Jinja(Box::new(jinja))));
        }
        let has = |marker: &str| tokenizer.token_id(marker).is_some_and(|token| tokenizer.is_special(token));
        if turns::CHAT_ML.iter().all(|marker| has(marker)) {
            return Ok(ChatTemplate(Kind::ChatMl));
        }
        if turns::GEMMA.iter().all(|marker| has(marker)) {
            return Ok(ChatTemplate(Kind::Gemma));
        }
        let text = format!(
            "the model has no chat template: {TEMPLATE_FILE} and {SETTINGS_FILE} hold none, and the tokenizer has no \
             special tokens for turns"
        );
        Err(Error::new(Status::TemplateFailed, text))
    }

    /// What the template is: `gemma`, `chatml` or `jinja`.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Kind::Gemma => "gemma",
            Kind::ChatMl => "chatml",
            Kind::Jinja(_) => "jinja",
        }
    }

    /// The ids of a conversation, `bos` in front; with `add_generation_prompt` up to where the model's turn begins.
    ///
    /// Fails with MessageValue (the messages), TemplateFailed (the template's own refusal included), TemplateLimit,
    /// ThreadUnavailable or OutOfMemory. A Jinja template is rendered with copies of the texts whose allocation
    /// cannot fail: at most 16 times the texts and a few MiB.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        bos: u32,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        check(messages)?;
        match &self.0 {
            Kind::Gemma => turns::gemma(tokenizer, bos, messages, add_generation_prompt),
            Kind::ChatMl => turns::chat_ml(tokenizer, bos, messages, add_generation_prompt),
            Kind::Jinja(jinja) => jinja.encode(tokenizer, bos, messages, add_generation_prompt),
        }
    }
}

fn template_text(bytes: &[u8]) -> Result<String> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let text = format!("is not valid UTF-8 at byte {}", error.valid_up_to());
        Error::new(Status::TemplateSyntax, text).in_file(TEMPLATE_FILE)
    })?;
    let mut copy = String::new();
    copy.try_reserve_exact(text.len()).map_err(|_| Error::out_of_memory("chat template", text.len()))?;
    copy.push_str(text);
    Ok(copy)
}

/// What holds for messages whatever the template.
fn check(messages: &[Message]) -> Result<()> {
    if messages.is_empty() || messages.len() > MAX_MESSAGES {
        let text = format!("the conversation has {} messages, expected 1 to {MAX_MESSAGES}", messages.len());
        return Err(Error::new(Status::MessageValue, text).at_key("messages"));
    }
    for (index, message) in messages.iter().enumerate() {
        let known = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        if !(1..=MAX_ROLE_BYTES).contains(&message.role.len()) || !message.role.bytes().all(known) {
            let sentence = format!("expected 1 to {MAX_ROLE_BYTES} letters a to z and _");
            return Err(refuse_role(index, message.role, &sentence));
        }
    }
    let bytes: usize = messages.iter().map(|message| message.text.len()).fold(0, usize::saturating_add);
    if bytes > MAX_TEXT_BYTES {
        let text = format!("the messages have {bytes} bytes of text, expected at most {MAX_TEXT_BYTES}");
        return Err(Error::new(Status::MessageValue, text).at_key("messages"));
    }
    Ok(())
}

/// An error about the role of a message.
fn refuse_role(index: usize, role: &str, sentence: &str) -> Error {
    let key = format!("messages[{index}].role");
    let text = format!("{key} is {}, {sentence}", super::json_tree::quoted(role));
    Error::new(Status::MessageValue, text).at_key(key)
}

#[cfg(test)]
mod tests;
