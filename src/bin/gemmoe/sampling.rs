//! How tokens are drawn.

use clap::Args;
use gemmoe::Sampling;

#[derive(Args)]
pub struct SamplingArgs {
    /// 0 takes the most probable token; higher is more varied.
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Keep this many most probable tokens; 0 keeps all.
    #[arg(long, default_value_t = 0)]
    top_k: u32,
    /// Keep the fewest tokens whose probabilities reach this sum.
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Keep tokens at least this share as probable as the most probable.
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Divide the logits of tokens that occurred by this, multiply negative ones; more than 1 repeats less.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// Subtract this from the logits of tokens that occurred; -2 to 2.
    #[arg(long, value_name = "AMOUNT", default_value_t = 0.0)]
    presence_penalty: f32,
    /// Subtract this from the logits of tokens as often as they occurred; -2 to 2.
    #[arg(long, value_name = "AMOUNT", default_value_t = 0.0)]
    frequency_penalty: f32,
    /// The last tokens, prompt included, that the penalties look at; 0 looks at all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    penalty_window: u32,
    /// Equal seeds give equal text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl SamplingArgs {
    pub fn settings(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            penalty_window: self.penalty_window,
            seed: self.seed,
        }
    }
}
