//! The runs that are timed.

use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use gemmoe::backend::KvDtype;
use gemmoe::{BatchOptions, Budget, Model, Result, Session, SessionBatch, SessionOptions};

/// Tokens that sessions hold before they decode, other ones in each.
const OPENING: usize = 8;

/// A session for prompts, and sessions that decode together.
pub struct Runs {
    prompt: Vec<u32>,
    /// Steps of a run.
    steps: usize,
    session: Session,
    members: Vec<Session>,
    batch: SessionBatch,
}

/// What is to be run.
pub struct RunOptions {
    pub prompt: usize,
    pub steps: usize,
    /// Most sessions at once.
    pub sessions: usize,
    /// Tokens of one forward pass; 0 is the default.
    pub chunk: usize,
    pub kv_dtype: Option<KvDtype>,
}

/// Seconds from a prompt being given to the end of its prefill, and to the first token.
pub struct PrefillTimes {
    pub prefill: f64,
    pub first_token: f64,
}

/// Seconds of a step, on average over a run; experts read per layer, likewise; tokens a session held in its middle.
pub struct DecodeTimes {
    pub step: f64,
    pub touched: f64,
    pub held: f64,
}

impl Runs {
    pub fn new(model: &Arc<Model>, options: &RunOptions) -> Result<Runs> {
        let kv_dtype = options.kv_dtype;
        let alone = SessionOptions {
            context_size: options.prompt.saturating_add(1),
            prefill_chunk: options.chunk,
            kv_dtype,
            ..Default::default()
        };
        // The token after the opening, one step that warms up, and those that are timed.
        let context_size = options.steps.saturating_add(OPENING + 2);
        let together = SessionOptions { context_size, kv_dtype, batch_only: true, ..Default::default() };
        let batch = BatchOptions {
            max_sessions: options.sessions,
            // All openings in one pass.
            max_tokens: options.sessions * OPENING,
            max_context: context_size,
            ..Default::default()
        };
        let mut runs = Runs {
            prompt: tokens(model, 0, options.prompt),
            steps: options.steps,
            session: Session::new(Arc::clone(model), &alone)?,
            members: Vec::new(),
            batch: SessionBatch::new(Arc::clone(model), &batch)?,
        };
        for number in 0..options.sessions {
            let mut session = Session::new(Arc::clone(model), &together)?;
            session.push(&tokens(model, number, OPENING))?;
            runs.members.push(session);
        }
        runs.step(options.sessions)?;
        Ok(runs)
    }

    /// How its sessions store keys and values.
    pub fn kv_dtype(&self) -> KvDtype {
        self.session.kv_dtype()
    }

    pub fn prefill(&mut self) -> Result<PrefillTimes> {
        self.session.rewind(0)?;
        let started = Instant::now();
        self.session.prefill(&self.prompt)?;
        let prefill = started.elapsed();
        self.session.step()?;
        Ok(PrefillTimes { prefill: prefill.as_secs_f64(), first_token: started.elapsed().as_secs_f64() })
    }

    /// Steps of the first `sessions` sessions, from the same tokens on in every run.
    pub fn decode(&mut self, sessions: usize) -> Result<DecodeTimes> {
        for session in &mut self.members[..sessions] {
            session.rewind(OPENING + 1)?;
        }
        self.step(sessions)?;
        let mut touched = 0.0;
        let started = Instant::now();
        for _ in 0..self.steps {
            self.step(sessions)?;
            touched += self.batch.touched_experts();
        }
        let steps = self.steps as f64;
        let held = (OPENING + 2) as f64 + steps / 2.0;
        Ok(DecodeTimes { step: started.elapsed().as_secs_f64() / steps, touched: touched / steps, held })
    }

    /// One token for each of the first `sessions` sessions.
    fn step(&mut self, sessions: usize) -> Result<()> {
        let mut members: Vec<&mut Session> = self.members[..sessions].iter_mut().collect();
        let mut results = Vec::new();
        self.batch.step(&mut members, &Budget::UNLIMITED, &mut results)?;
        let failed = results.into_iter().find_map(|result| match result {
            Poll::Ready(Err(error)) => Some(error),
            _ => None,
        });
        failed.map_or(Ok(()), Err)
    }
}

/// Tokens from all over the vocabulary; `number` tells texts of one length apart.
fn tokens(model: &Model, number: usize, length: usize) -> Vec<u32> {
    let vocabulary = model.config().vocab_size;
    (0..length).map(|at| ((at + 31 * number + 1) * 7919 % vocabulary) as u32).collect()
}
