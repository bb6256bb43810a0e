//! `gemmoe chat`

use std::io::{BufRead, IsTerminal, Write};
use std::sync::Arc;

use gemmoe::text::{Message, TextStream};
use gemmoe::{Error, Model, Overflow, Result, Session, SessionOptions, Status};

use crate::ModelArgs;
use crate::load::load;
use crate::sampling::SamplingArgs;
use crate::session::SessionArgs;

/// Tokens of context where neither the host nor the model says less.
const CONTEXT: usize = 8192;

#[derive(clap::Args)]
#[command(allow_negative_numbers = true)]
pub struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    /// What the model is told before the first message.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// End an answer at this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Most tokens of one answer.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_new: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    session: SessionArgs,
}

impl Chat {
    pub fn run(&self) -> Result<()> {
        let model = load(&self.model)?;
        model.chat_template()?;
        let options = SessionOptions { overflow: Overflow::Slide { keep: 1 }, ..self.session.options(CONTEXT, &model) };
        let mut session = Session::new(Arc::clone(&model), &options)?;
        session.set_sampling(self.sampling.settings())?;
        let mut turns: Vec<(&str, String)> = Vec::new();
        turns.extend(self.system.iter().map(|text| ("system", text.clone())));
        let is_terminal = std::io::stdin().is_terminal();
        if is_terminal {
            eprintln!("One message a line; an empty line or the end of input ends the conversation.");
        }
        for line in lines(is_terminal) {
            let line = line?;
            if line.trim().is_empty() {
                break;
            }
            turns.push(("user", line));
            let answer = self.answer(&model, &mut session, &turns)?;
            turns.push(("model", answer));
        }
        Ok(())
    }

    /// Runs what is new in the conversation, and streams the model's next turn.
    fn answer(&self, model: &Model, session: &mut Session, turns: &[(&str, String)]) -> Result<String> {
        let messages: Vec<Message> = turns.iter().map(|(role, text)| Message { role, text }).collect();
        let tokens = model.encode_chat(&messages, true)?;
        if tokens.len() > session.context_size() {
            let (count, room) = (tokens.len(), session.context_size());
            eprintln!(
                "gemmoe: the conversation has {count} tokens, the context {room}: what was said first is left out"
            );
        }
        session.set_tokens(&tokens)?;
        let mut stream = TextStream::new();
        stream.set_stop_strings(&self.stop.iter().map(String::as_str).collect::<Vec<_>>())?;
        let mut answer = Vec::new();
        for _ in 0..self.max_new {
            let token = session.step()?;
            if model.stop_tokens().contains(&token) {
                break;
            }
            let shown = answer.len();
            stream.push(model.tokenizer()?.token_bytes(token, false)?, &mut answer)?;
            show(&answer[shown..]);
            if stream.stopped().is_some() {
                break;
            }
        }
        let shown = answer.len();
        if stream.stopped().is_none() {
            stream.finish(&mut answer)?;
        }
        show(&answer[shown..]);
        println!();
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

fn show(text: &[u8]) {
    let mut out = std::io::stdout();
    // A closed pipe ends the program by its signal.
    let _ = out.write_all(text).and_then(|()| out.flush());
}

/// Lines of standard input, asked for by a mark where somebody types.
fn lines(is_terminal: bool) -> impl Iterator<Item = Result<String>> {
    let mut input = std::io::stdin().lock();
    std::iter::from_fn(move || {
        if is_terminal {
            show(b"> ");
        }
        let mut line = String::new();
        match input.read_line(&mut line) {
            Ok(0) => None,
            Ok(_) => Some(Ok(line.trim_end_matches(['\r', '\n']).to_owned())),
            Err(error) => Some(Err(Error::new(Status::InvalidUtf8, format!("standard input cannot be read: {error}")))),
        }
    })
}
