//! A chat template in Jinja: code from a file somebody else wrote, run with bounded steps, memory and stack.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;
use std::thread;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};

use crate::error::{Error, Result, Status};
use crate::quiet::{Quiet, panic_text};

use super::super::tokenizer::Tokenizer;
use super::Message;
use super::disguise::Disguise;
use super::settings::Settings;
use super::{source, values};

const NAME: &str = "chat template";

/// Stack of the thread the engine runs on. A hundred calls and loops, and a tag of `MAX_TAG_TOKENS` in the parser,
/// take a few MiB of it; what is not used is never touched.
const STACK_BYTES: usize = 32 << 20;
/// Loops count one, calls of macros four.
const RECURSION_LIMIT: usize = 100;

/// Steps every template gets; one pays for an instruction, or for 64 bytes made or looked at.
const FUEL: u64 = 100_000;
/// Steps for each message, and for every fourth byte of text: sixteen copies of all texts.
const FUEL_FOR_A_MESSAGE: u64 = 256;
const BYTES_FOR_A_STEP: u64 = 4;

/// Bytes every template may write, and how many for each byte of text.
const OUTPUT_BYTES: usize = 1 << 20;
const OUTPUT_FOR_A_BYTE: usize = 4;

/// A compiled template.
pub struct Jinja {
    environment: Environment<'static>,
    /// What was compiled: stand-ins must not occur in it.
    source: String,
    settings: Settings,
}

impl Jinja {
    /// Compiles `source`. Fails with TemplateSyntax, TemplateLimit, ThreadUnavailable or OutOfMemory.
    pub fn new(source: &str, settings: Settings) -> Result<Jinja> {
        let source = source::prepare(source)?;
        let environment = on_deep_stack(|| {
            let mut environment = Environment::new();
            let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
            environment.set_syntax(syntax.map_err(|error| error_of(&error, Status::TemplateSyntax))?);
            environment.set_recursion_limit(RECURSION_LIMIT);
            values::add_to(&mut environment);
            match environment.add_template_owned(NAME, source.as_str().to_owned()) {
                Ok(()) => Ok(environment),
                Err(error) => Err(error_of(&error, Status::TemplateSyntax)),
            }
        })??;
        Ok(Jinja { environment, source, settings })
    }

    /// The ids of a conversation. Errors as `ChatTemplate::encode`.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        bos: u32,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        let disguise = Disguise::new(tokenizer, &self.source, messages)?;
        let rendered = on_deep_stack(|| self.render(&disguise, messages, add_generation_prompt))??;
        let mut tokens = disguise.encode(&rendered, tokenizer)?;
        if !tokens.contains(&bos) {
            tokens.try_reserve(1).map_err(|_| Error::out_of_memory("tokens", size_of::<u32>()))?;
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    fn render(&self, disguise: &Disguise, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let bytes: usize = messages.iter().map(|message| message.text.len()).sum();
        let mut environment = self.environment.clone();
        let fuel = FUEL + messages.len() as u64 * FUEL_FOR_A_MESSAGE + bytes as u64 / BYTES_FOR_A_STEP;
        environment.set_fuel(Some(fuel));

        let mut conversation = Vec::new();
        conversation.try_reserve_exact(messages.len()).map_err(|_| Error::out_of_memory("messages", bytes))?;
        for message in messages {
            let members = [("role", message.role.to_owned()), ("content", disguise.put_on(message.text)?)];
            let members = members.map(|(name, text)| (Value::from(name), Value::from(text)));
            conversation.push(Value::from_object(BTreeMap::from(members)));
        }
        let variables = context! {
            messages => conversation,
            add_generation_prompt => add_generation_prompt,
            bos_token => self.settings.bos_token.as_deref(),
            eos_token => self.settings.eos_token.as_deref(),
        };
        let template = environment.get_template(NAME).map_err(|error| error_of(&error, Status::TemplateFailed))?;
        let mut output = Capped { bytes: Vec::new(), most: OUTPUT_BYTES + bytes * OUTPUT_FOR_A_BYTE, failure: None };
        let outcome = template.render_captured_to(variables, &mut output).map(drop);
        if let Some(failure) = output.failure {
            return Err(failure);
        }
        outcome.map_err(|error| error_of(&error, Status::TemplateFailed))?;
        String::from_utf8(output.bytes).map_err(|_| Error::new(Status::Internal, "a template wrote half a character"))
    }
}

/// Runs `work` where the engine's recursion has room, whatever stack the caller has left. The engine's panics are
/// failures of the template: nothing outlives them.
fn on_deep_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        let quiet_work = || {
            let _quiet = Quiet::enter();
            work()
        };
        let builder = thread::Builder::new().name("gemmoe chat".to_owned()).stack_size(STACK_BYTES);
        let thread = builder.spawn_scoped(scope, quiet_work).map_err(|error| {
            Error::new(Status::ThreadUnavailable, format!("no thread for the chat template: {error}"))
        })?;
        thread.join().map_err(|payload| {
            let text = format!("the chat template broke the template engine: {}", panic_text(&*payload));
            Error::new(Status::TemplateFailed, text)
        })
    })
}

/// The library's error for the engine's.
fn error_of(error: &minijinja::Error, otherwise: Status) -> Error {
    let mut reasons = vec![error];
    while let Some(source) = reasons[reasons.len() - 1].source().and_then(|source| source.downcast_ref()) {
        reasons.push(source);
    }
    let is_limit = |error: &&minijinja::Error| {
        let too_deep = |detail: &str| detail.contains("recursion limit");
        error.kind() == ErrorKind::OutOfFuel || error.detail().is_some_and(too_deep)
    };
    let status = if reasons.iter().any(is_limit) { Status::TemplateLimit } else { otherwise };
    let line = error.line().map_or(String::new(), |line| format!("line {line}: "));
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    Error::new(status, format!("{line}{what}"))
}

/// Output up to a limit.
struct Capped {
    bytes: Vec<u8>,
    most: usize,
    failure: Option<Error>,
}

impl io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let failure = if self.bytes.len() + bytes.len() > self.most {
            let text = format!("the chat template writes more than {} bytes", self.most);
            Error::new(Status::TemplateLimit, text)
        } else if self.bytes.try_reserve(bytes.len()).is_err() {
            Error::out_of_memory("chat text", bytes.len())
        } else {
            self.bytes.extend_from_slice(bytes);
            return Ok(bytes.len());
        };
        self.failure = Some(failure);
        Err(io::ErrorKind::Other.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
