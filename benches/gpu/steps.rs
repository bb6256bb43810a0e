//! Whole steps through the public interface: sessions in a batch, each drawing its own token, at contexts of one length.
//!
//! A long context is run once, in passes of many tokens; the other sessions of a batch are forks, which share its pages, and
//! go on from a token of their own each. So its keys and values are counted once, as the least that has to be read of
//! them; each session reads them for itself, and what the caches save there is not known. With `own_contexts` every session
//! runs its own.

use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use gemmoe::backend::KvGeometry;
use gemmoe::{BatchOptions, Budget, Model, Session, SessionBatch};

use super::Result;
use super::geometry::Work;
use super::model::{prompt, session};
use super::options::Sizes;
use super::report::Step;
use super::roofs::{median, percentile_95};

/// Sessions at one context, enough for the largest batch.
pub struct Sessions {
    pub context: usize,
    pub sessions: Vec<Session>,
    are_own: bool,
    batch: SessionBatch,
}

impl Sessions {
    pub fn new(model: &Arc<Model>, sizes: &Sizes, context: usize, are_own: bool) -> gemmoe::Result<Sessions> {
        let most = sizes.batches.iter().copied().max().unwrap_or(1);
        let longest = context + sizes.warm_up + sizes.steps + 8;
        let options = BatchOptions {
            max_sessions: most,
            max_tokens: sizes.chunk,
            max_context: longest,
            prefill_chunk: sizes.chunk,
        };
        let mut batch = SessionBatch::new(Arc::clone(model), &options)?;
        let mut sessions: Vec<Session> = Vec::with_capacity(most);
        for number in 0..most {
            match sessions.first().filter(|_| !are_own && context > 0) {
                Some(first) => sessions.push(first.fork()?),
                None => {
                    let mut own = session(model, longest, 0)?;
                    if context > 0 {
                        own.push(&prompt(model, number, context))?;
                        // Draws a token too, which is given up below.
                        while batch_step(&mut batch, &mut [&mut own])?.is_none() {}
                        own.rewind(context)?;
                    }
                    sessions.push(own);
                }
            }
        }
        Ok(Sessions { context, sessions, are_own, batch })
    }

    /// All sessions as they were in the beginning, each with a token of its own to go on from.
    fn begin(&mut self, model: &Model) -> gemmoe::Result<()> {
        for (number, session) in self.sessions.iter_mut().enumerate() {
            session.rewind(self.context)?;
            session.push(&prompt(model, 1000 + number, 1))?;
        }
        Ok(())
    }

    /// Brings the first `count` sessions past their prompts and through some steps.
    pub fn warm_up(&mut self, model: &Model, count: usize, steps: usize) -> gemmoe::Result<()> {
        self.begin(model)?;
        for _ in 0..steps.max(1) {
            self.step(count)?;
        }
        Ok(())
    }

    /// A token for each of the first `count`.
    pub fn step(&mut self, count: usize) -> gemmoe::Result<()> {
        let mut sessions: Vec<&mut Session> = self.sessions[..count].iter_mut().collect();
        while batch_step(&mut self.batch, &mut sessions)?.is_none() {}
        Ok(())
    }

    /// Experts a layer whose weights the last step read.
    pub fn touched(&self) -> f64 {
        self.batch.touched_experts()
    }

    /// Positions whose keys and values a step of the first `count` sessions has to read, those they share once.
    pub fn positions(&self, count: usize) -> usize {
        let all: usize = self.sessions[..count].iter().map(|session| session.tokens().len()).sum();
        if self.are_own { all } else { all - (count - 1) * self.context }
    }
}

/// Whether every session has its token; none where prompts are not done.
fn batch_step(batch: &mut SessionBatch, sessions: &mut [&mut Session]) -> gemmoe::Result<Option<()>> {
    let mut results = Vec::new();
    batch.step(sessions, &Budget::UNLIMITED, &mut results)?;
    let mut done = Some(());
    for result in results {
        match result {
            Poll::Ready(token) => drop(token?),
            Poll::Pending => done = None,
        }
    }
    Ok(done)
}

/// Every batch at the context of these sessions.
pub fn measure(model: &Arc<Model>, work: &Work, sizes: &Sizes, at: &mut Sessions) -> Result<Vec<Step>> {
    let kv_bytes = KvGeometry::of(model.config(), model.backend().default_kv_dtype()).bytes_per_token();
    let mut rows = Vec::new();
    for count in sizes.batches.iter().copied() {
        at.warm_up(model, count, sizes.warm_up)?;
        let (mut seconds, mut touched, mut bytes) = (Vec::new(), 0.0, 0.0);
        for _ in 0..sizes.steps {
            let started = Instant::now();
            at.step(count)?;
            seconds.push(started.elapsed().as_secs_f64());
            touched += at.touched() / sizes.steps as f64;
            let cache = at.positions(count) * kv_bytes;
            bytes += (work.weight_bytes(at.touched()) + cache as f64) / sizes.steps as f64;
        }
        let (middle, late) = (median(seconds.clone()), percentile_95(seconds));
        rows.push(Step {
            sessions: count,
            context: at.context,
            tokens_per_s: count as f64 / middle,
            median_ms: middle * 1e3,
            p95_ms: late * 1e3,
            touched_experts: touched,
            gb: bytes / 1e9,
            gb_per_s: bytes / middle / 1e9,
        });
    }
    Ok(rows)
}
