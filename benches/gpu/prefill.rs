//! Prompts: a session runs one, rewinds, and runs it again.

use std::sync::Arc;
use std::time::Instant;

use gemmoe::Model;

use super::geometry::Work;
use super::model::{prompt, session};
use super::options::Sizes;
use super::report::Prefill;
use super::roofs::median;

pub fn measure(model: &Arc<Model>, work: &Work, sizes: &Sizes, tokens: usize) -> gemmoe::Result<Prefill> {
    let mut session = session(model, tokens + 8, tokens.min(sizes.chunk))?;
    let prompt = prompt(model, 0, tokens);
    let mut seconds = Vec::new();
    for _ in 0..=sizes.rounds {
        session.rewind(0)?;
        let started = Instant::now();
        session.prefill(&prompt)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    let seconds = median(seconds.split_off(1));
    let tokens_per_s = tokens as f64 / seconds;
    let chunk = tokens.min(sizes.chunk);
    Ok(Prefill {
        tokens,
        chunk,
        tokens_per_s,
        ms: seconds * 1e3,
        tflops: 2.0 * work.multiply_adds() * tokens_per_s / 1e12,
    })
}
