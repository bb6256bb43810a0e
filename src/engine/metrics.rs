//! What a session measures about itself.

use std::time::{Duration, Instant};

/// Times and counts since the session was made. Waiting between calls is not counted as work.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// From the first token of a prompt being given to the first token drawn after it; the latest prompt's.
    pub time_to_first_token: Option<Duration>,
    /// Prompt tokens run.
    pub prefill_tokens: u64,
    /// Time that took.
    pub prefill_time: Duration,
    /// Tokens drawn.
    pub decode_tokens: u64,
    /// Time spent running drawn tokens and drawing.
    pub decode_time: Duration,
    /// Steps by how long they took: entry i counts those of `2^i..2^(i + 1)` microseconds, the last all longer ones, the
    /// first also the shorter ones.
    pub step_times: [u64; STEP_TIME_CLASSES],
    /// When the prompt that waits for its first drawn token was given.
    prompt_given: Option<Instant>,
    /// Work on the step in progress so far.
    step: Duration,
}

/// Classes of the histogram of step times.
pub const STEP_TIME_CLASSES: usize = 32;

impl Metrics {
    /// Prompt tokens were given.
    pub fn note_prompt(&mut self) {
        self.prompt_given.get_or_insert_with(Instant::now);
    }

    /// A pass ran `tokens` tokens in `time`; `drawn` if it was one that had been drawn.
    pub fn note_pass(&mut self, tokens: usize, time: Duration, drawn: bool) {
        if drawn {
            self.decode_time += time;
            self.step += time;
        } else {
            self.prefill_tokens += tokens as u64;
            self.prefill_time += time;
        }
    }

    /// A token was drawn, in `time`.
    pub fn note_draw(&mut self, time: Duration) {
        self.decode_tokens += 1;
        self.decode_time += time;
        let microseconds = (self.step + time).as_micros() as u64;
        let class = (microseconds.max(1).ilog2() as usize).min(STEP_TIME_CLASSES - 1);
        self.step_times[class] += 1;
        self.step = Duration::ZERO;
        if let Some(given) = self.prompt_given.take() {
            self.time_to_first_token = Some(given.elapsed());
        }
    }
}
