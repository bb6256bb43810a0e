//! `gemmoe generate`

use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use gemmoe::text::TextStream;
use gemmoe::{Model, Overflow, Result, Session, SessionOptions};
use serde_json::json;

use crate::grammar::GrammarArgs;
use crate::load::{bar, load};
use crate::sampling::SamplingArgs;
use crate::session::SessionArgs;
use crate::{ModelArgs, parse_tokens};

#[derive(clap::Args)]
#[command(allow_negative_numbers = true)]
pub struct Generate {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue; BOS is put in front.
    #[arg(long, value_name = "TEXT", required_unless_present = "tokens", conflicts_with = "tokens")]
    prompt: Option<String>,
    /// Token ids to continue, such as 2,17,5, taken as they are; needs no tokenizer.
    #[arg(long, value_name = "LIST", value_parser = parse_tokens)]
    tokens: Option<std::vec::Vec<u32>>,
    /// Most tokens to produce.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    grammar: GrammarArgs,
    #[command(flatten)]
    session: SessionArgs,
    /// When the context is full, keep the first KEEP tokens and drop the oldest after them, instead of stopping.
    #[arg(long, value_name = "KEEP")]
    slide: Option<usize>,
    /// Go on past the tokens that end a text.
    #[arg(long)]
    ignore_eos: bool,
    /// Print {"tokens": [new ids], "text": "new text"}; a stop token that ended it is the last id.
    #[arg(long)]
    json: bool,
}

/// How long things took, for the line at the end.
struct Times {
    prompt_tokens: usize,
    first: Duration,
    decode: Duration,
}

impl Generate {
    pub fn run(&self) -> Result<()> {
        let model = load(&self.model)?;
        let prompt = match (&self.prompt, &self.tokens) {
            (Some(text), _) => model.encode(text, true, false)?,
            (None, tokens) => tokens.clone().unwrap_or_default(),
        };
        let total = prompt.len().saturating_add(self.max_new);
        let overflow = self.slide.map_or(Overflow::Fail, |keep| Overflow::Slide { keep });
        let options = SessionOptions { overflow, ..self.session.options(total, &model) };
        let mut session = Session::new(Arc::clone(&model), &options)?;
        session.set_sampling(self.sampling.settings())?;
        // Compiled before the prompt is read, which takes longer than to see that a grammar is wrong.
        let grammar = self.grammar.compile(&model)?;
        let started = Instant::now();
        prefill(&mut session, &prompt)?;
        session.set_grammar(grammar.as_ref())?;
        let mut output = Output::new(&model, !self.json);
        let mut times = Times { prompt_tokens: prompt.len(), first: started.elapsed(), decode: Duration::ZERO };
        let has_room = |session: &Session| self.slide.is_some() || session.tokens().len() < session.context_size();
        while output.tokens.len() < self.max_new && has_room(&session) {
            let token = session.step()?;
            if output.tokens.is_empty() {
                times.first = started.elapsed();
            }
            output.push(token)?;
            if !self.ignore_eos && model.stop_tokens().contains(&token) {
                break;
            }
        }
        times.decode = started.elapsed() - times.first;
        output.finish()?;
        if self.json {
            println!("{}", json!({"tokens": output.tokens, "text": output.text}));
        } else {
            println!();
            print_times(&times, output.tokens.len());
        }
        if output.tokens.len() < self.max_new && !has_room(&session) {
            eprintln!("gemmoe: stopped because the context of {} tokens is full", session.context_size());
        }
        if session.is_grammar_complete()? == Some(false) {
            eprintln!("gemmoe: the output ends before the grammar does: --max-new is {}", self.max_new);
        }
        Ok(())
    }
}

/// Prefills in pieces, so that a long prompt can show how far it is.
fn prefill(session: &mut Session, prompt: &[u32]) -> Result<()> {
    let bar = bar(prompt.len() as u64, "reading the prompt {wide_bar} {pos} of {len} tokens, {eta} left");
    if prompt.len() > session.context_size() {
        // The whole at once gives the error with the sizes in it.
        return session.prefill(prompt);
    }
    for part in prompt.chunks(gemmoe::engine::options::DEFAULT_PREFILL_CHUNK) {
        session.prefill(part)?;
        bar.inc(part.len() as u64);
    }
    bar.finish_and_clear();
    Ok(())
}

/// New tokens and, where there is a tokenizer, their text.
struct Output<'a> {
    model: &'a Model,
    stream: TextStream,
    show: bool,
    tokens: Vec<u32>,
    text: String,
}

impl<'a> Output<'a> {
    fn new(model: &'a Model, show: bool) -> Self {
        Output { model, stream: TextStream::default(), show, tokens: Vec::new(), text: String::new() }
    }

    fn push(&mut self, token: u32) -> Result<()> {
        let first = self.tokens.is_empty();
        self.tokens.push(token);
        match self.model.tokenizer() {
            Ok(tokenizer) => {
                let mut piece = Vec::new();
                self.stream.push(tokenizer.token_bytes(token, false)?, &mut piece)?;
                self.show(&piece);
            }
            Err(_) if self.show => {
                print!("{}{token}", if first { "" } else { "," });
                let _ = std::io::stdout().flush();
            }
            Err(_) => {}
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let mut piece = Vec::new();
        self.stream.finish(&mut piece)?;
        self.show(&piece);
        Ok(())
    }

    fn show(&mut self, piece: &[u8]) {
        let piece = String::from_utf8_lossy(piece);
        self.text.push_str(&piece);
        if self.show {
            print!("{piece}");
            let _ = std::io::stdout().flush();
        }
    }
}

fn print_times(times: &Times, new_tokens: usize) {
    let rate = |tokens: usize, time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
    eprintln!(
        "{} prompt tokens, first new token after {:.0} ms; {new_tokens} new tokens, {:.1} tokens/s",
        times.prompt_tokens,
        times.first.as_secs_f64() * 1e3,
        rate(new_tokens.saturating_sub(1), times.decode),
    );
}
