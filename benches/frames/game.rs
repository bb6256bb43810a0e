//! The frames of a game, and the same work in one piece.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use gemmoe::{Budget, Model};

use crate::common::models;
use crate::common::process::{NOTABLE_WAIT, waited};

/// Bytes of its own that the host goes through in a frame.
const HOST_BYTES: usize = 1 << 20;
const CACHE_LINE: usize = 64;
/// The prompt that decoding starts from.
const OPENING: usize = 8;

pub struct Game<'a> {
    model: &'a Arc<Model>,
    budget: Duration,
    prompt: Vec<u32>,
    frames: usize,
}

/// One call, timed from outside.
pub struct Call {
    pub time: Duration,
    /// Whether a thread of the library waited for a processor that others had.
    pub disturbed: bool,
}

#[derive(Default)]
pub struct Frames {
    pub calls: Vec<Call>,
    /// Tokens that were drawn, or prompt tokens that were run.
    pub tokens: usize,
    /// Whether the results are those of a run in one piece.
    pub same: bool,
}

/// The rest of a host's frame.
pub struct Host(Vec<u8>);

impl Host {
    pub fn new() -> Host {
        Host(vec![0; HOST_BYTES])
    }

    pub fn work(&mut self) {
        self.0.iter_mut().step_by(CACHE_LINE).for_each(|byte| *byte = byte.wrapping_add(1));
        std::hint::black_box(&self.0);
    }
}

impl<'a> Game<'a> {
    pub fn new(model: &'a Arc<Model>, budget: Duration, prompt_length: usize, frames: usize) -> Game<'a> {
        Game { model, budget, prompt: models::prompt(model, 0, prompt_length), frames }
    }

    fn timed<T>(&self, frames: &mut Frames, call: impl FnOnce(&Budget) -> T) -> T {
        let before = waited();
        let started = Instant::now();
        let result = call(&Budget::of_time(self.budget));
        let time = started.elapsed();
        frames.calls.push(Call { time, disturbed: waited().saturating_sub(before) > NOTABLE_WAIT });
        result
    }

    /// Draws tokens, starting over where the context ends.
    pub fn decode(&self) -> Frames {
        let mut frames = Frames { same: true, ..Default::default() };
        let mut session = models::session(self.model, self.prompt.len());
        let (mut host, mut longest) = (Host::new(), Vec::new());
        let opening = &self.prompt[..OPENING];
        while frames.calls.len() < self.frames {
            session.rewind(0).unwrap();
            session.prefill(opening).unwrap();
            while frames.calls.len() < self.frames && session.tokens().len() < session.context_size() {
                if let Poll::Ready(token) = self.timed(&mut frames, |budget| session.step_within(budget)) {
                    token.unwrap();
                    frames.tokens += 1;
                }
                host.work();
            }
            let tokens = session.tokens();
            frames.same &= longest.starts_with(tokens) || tokens.starts_with(&longest);
            if tokens.len() > longest.len() {
                longest = tokens.to_vec();
            }
        }
        session.rewind(0).unwrap();
        session.prefill(opening).unwrap();
        while session.tokens().len() < longest.len() {
            session.step().unwrap();
        }
        frames.same &= session.tokens() == longest;
        frames
    }

    /// Runs the prompt again and again.
    pub fn prefill(&self) -> Frames {
        let mut session = models::session(self.model, self.prompt.len() + 1);
        session.prefill(&self.prompt).unwrap();
        let whole = session.logits().unwrap().to_vec();
        let mut frames = Frames { same: true, ..Default::default() };
        let mut host = Host::new();
        loop {
            session.rewind(0).unwrap();
            let mut tokens = &self.prompt[..];
            while self.timed(&mut frames, |budget| session.prefill_within(tokens, budget)).is_pending() {
                tokens = &[];
                host.work();
                if frames.calls.len() >= self.frames {
                    frames.tokens += self.prompt.len() - session.pending();
                    return frames;
                }
            }
            frames.tokens += self.prompt.len();
            frames.same &= session.logits().unwrap() == whole;
        }
    }
}
