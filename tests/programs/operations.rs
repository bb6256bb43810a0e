//! The operations of a program.

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use gemmoe::{
    BatchOptions, Budget, LogitBias, Model, Pooling, Result, Sampling, Session, SessionBatch, SessionOptions, Status,
};

use crate::common::Random;
use crate::oracle::{CONTROLS, Oracle};
use crate::subject::Subject;
use crate::{LONGEST, MOST_SESSIONS, VOCAB_SIZE};

/// Operations of one program.
const LENGTH: usize = 40;

/// The sessions of a program, and the batch they may be stepped in.
struct Program {
    subjects: Vec<Subject>,
    batch: SessionBatch,
    results: Vec<Poll<Result<u32>>>,
}

pub fn run(model: &Arc<Model>, oracle: &mut Oracle, seed: u64) {
    let mut random = Random::new(seed);
    let subjects = (0..1 + random.below(3)).map(|_| Subject::random(model, &mut random)).collect();
    let options = BatchOptions {
        max_sessions: MOST_SESSIONS,
        max_tokens: MOST_SESSIONS + random.below(14),
        max_context: LONGEST,
        prefill_chunk: 1 + random.below(9),
    };
    let batch = SessionBatch::new(Arc::clone(model), &options).unwrap();
    let mut program = Program { subjects, batch, results: Vec::new() };
    for _ in 0..LENGTH {
        program.operate(oracle, &mut random);
        for subject in &mut program.subjects {
            subject.check(oracle, &mut random);
        }
    }
}

impl Program {
    fn operate(&mut self, oracle: &mut Oracle, random: &mut Random) {
        let at = random.below(self.subjects.len());
        let count = self.subjects.len();
        let subject = &mut self.subjects[at];
        match random.below(32) {
            0..=1 => subject.push(random),
            2..=6 => subject.prefill(random, oracle),
            7..=12 => subject.step(random, oracle),
            13..=20 => self.step_together(random, oracle),
            21..=22 => {
                let fork = subject.with(subject.session.fork().unwrap());
                if count < MOST_SESSIONS {
                    self.subjects.push(fork);
                } else {
                    // The fork goes on in place of the other.
                    self.subjects[at] = fork;
                }
            }
            23 if count > 1 => drop(self.subjects.swap_remove(at)),
            23..=25 => subject.rewind(random),
            26 => subject.restore(random),
            27 => subject.set_sampling(random),
            28 => subject.set_control(random),
            29 => subject.score(random, oracle),
            30 => subject.embed(random, oracle),
            _ => {
                assert_eq!(subject.session.cancel().take(), subject.cancelled);
                subject.cancelled = random.below(2) == 0;
                if subject.cancelled {
                    subject.session.cancel().request();
                }
            }
        }
    }

    /// Steps of some of the sessions together, in some order, under some budget; now and then something else comes in
    /// between, since the pass they left suspended stays.
    fn step_together(&mut self, random: &mut Random, oracle: &mut Oracle) {
        let mut members: Vec<&mut Subject> = self.subjects.iter_mut().filter(|_| random.below(3) > 0).collect();
        for at in (1..members.len()).rev() {
            if random.below(2) == 0 {
                members.swap(at, random.below(at + 1));
            }
        }
        for _ in 0..1 + random.below(4) {
            let budget = random_budget(random);
            let after = random_delay(random);
            let cancel = Arc::clone(self.batch.cancel());
            let result = oracle.canceller.around(&cancel, after, || {
                let mut sessions: Vec<&mut Session> = members.iter_mut().map(|subject| &mut subject.session).collect();
                self.batch.step(&mut sessions, &budget, &mut self.results)
            });
            if let Err(error) = result {
                assert!(error.status() == Status::Cancelled && after.is_some(), "{error}");
                for subject in &mut members {
                    // The cancel came before the sessions were looked at, or after.
                    if subject.session.tokens().len() != subject.tokens.len() {
                        subject.make_room();
                    }
                    subject.session.cancel().take();
                    subject.cancelled = false;
                    subject.ran();
                    subject.check(oracle, random);
                }
                continue;
            }
            assert_eq!(self.results.len(), members.len());
            for (subject, result) in members.iter_mut().zip(self.results.drain(..)) {
                let cancelled = std::mem::take(&mut subject.cancelled);
                let refusal = if cancelled { Some(Status::Cancelled) } else { subject.step_refusal() };
                if refusal.is_none() {
                    subject.make_room();
                }
                match result {
                    Poll::Ready(Ok(token)) => {
                        assert_eq!(refusal, None);
                        subject.drew(token, oracle);
                    }
                    Poll::Ready(Err(error)) => {
                        assert_eq!(Some(error.status()), refusal, "{error}");
                        subject.ran();
                    }
                    Poll::Pending => {
                        assert_eq!(refusal, None);
                        subject.ran();
                    }
                }
                subject.check(oracle, random);
            }
        }
    }
}

impl Subject {
    fn push(&mut self, random: &mut Random) {
        let tokens = self.random_tokens(random);
        let refusal = self.push_refusal(&tokens);
        assert_eq!(status(&self.session.push(&tokens)), refusal);
        if refusal.is_none() {
            self.append(&tokens);
        }
    }

    /// A prefill, to its end or left suspended on the way.
    fn prefill(&mut self, random: &mut Random, oracle: &mut Oracle) {
        let mut tokens = self.random_tokens(random);
        loop {
            let refusal = self.workspace_refusal().or(self.push_refusal(&tokens));
            let (budget, after) = (random_budget(random), random_delay(random));
            let cancel = Arc::clone(self.session.cancel());
            let call = || self.session.prefill_within(&tokens, &budget);
            let result = oracle.canceller.around(&cancel, after, call);
            match result {
                Poll::Ready(Err(error)) if refusal.is_none() => {
                    assert!(error.status() == Status::Cancelled && (after.is_some() || self.cancelled), "{error}");
                    let before = self.append(&tokens);
                    let kept = self.session.tokens().len();
                    assert!(kept == before || after.is_some() && kept > before && kept < self.tokens.len());
                    self.truncate(kept);
                    self.cancelled = false;
                    return;
                }
                Poll::Ready(Err(error)) => {
                    assert_eq!(Some(error.status()), refusal);
                    self.cancelled &= after.is_none();
                    return;
                }
                Poll::Ready(Ok(())) => {
                    assert!(refusal.is_none() && !self.cancelled, "a cancel that came before the call stops it");
                    self.append(&tokens);
                    assert_eq!(self.session.pending(), 0);
                    self.ran();
                    return;
                }
                Poll::Pending => {
                    assert!(refusal.is_none() && !self.cancelled && budget != Budget::UNLIMITED);
                    self.append(&tokens);
                    assert!(self.session.pending() > 0);
                }
            }
            if random.below(4) == 0 {
                return;
            }
            tokens.clear();
        }
    }

    /// A step, until it has drawn a token or left suspended on the way.
    fn step(&mut self, random: &mut Random, oracle: &mut Oracle) {
        loop {
            let refusal = self.workspace_refusal().or(self.step_refusal());
            let (budget, after) = (random_budget(random), random_delay(random));
            let cancel = Arc::clone(self.session.cancel());
            let result = oracle.canceller.around(&cancel, after, || self.session.step_within(&budget));
            if refusal.is_none() {
                self.make_room();
            }
            match result {
                Poll::Ready(Ok(token)) => {
                    assert!(refusal.is_none() && !self.cancelled, "a cancel that came before the call stops it");
                    return self.drew(token, oracle);
                }
                Poll::Ready(Err(error)) if refusal.is_none() => {
                    assert!(error.status() == Status::Cancelled && (after.is_some() || self.cancelled), "{error}");
                    self.cancelled = false;
                    return self.ran();
                }
                Poll::Ready(Err(error)) => {
                    assert_eq!(Some(error.status()), refusal);
                    self.cancelled &= after.is_none();
                    return;
                }
                Poll::Pending => {
                    assert!(refusal.is_none() && !self.cancelled && budget != Budget::UNLIMITED);
                    self.ran();
                }
            }
            if random.below(4) == 0 {
                return;
            }
        }
    }

    fn rewind(&mut self, random: &mut Random) {
        let held = self.tokens.len();
        let count = if random.below(3) == 0 { held.saturating_sub(random.below(3)) } else { random.below(held + 2) };
        let run = held - self.session.pending();
        let refusal = (count > held).then_some(Status::InvalidArgument);
        assert_eq!(status(&self.session.rewind(count)), refusal);
        if count < held {
            self.truncate(count);
            assert_eq!(
                count - self.session.pending(),
                run.min(count.saturating_sub(1)),
                "only what was dropped is lost"
            );
        }
    }

    /// To bytes and back, with other options.
    fn restore(&mut self, random: &mut Random) {
        let mut bytes = vec![0; self.session.snapshot_bytes()];
        self.session.snapshot(&mut bytes).unwrap();
        let options = SessionOptions {
            prefill_chunk: 1 + random.below(9),
            route_capacity: [0, 3, 64][random.below(3)],
            batch_only: random.below(3) == 0,
            ..Default::default()
        };
        let pending = self.session.pending();
        let session = Session::restore(Arc::clone(self.session.model()), &bytes, &options).unwrap();
        assert_eq!(session.pending(), pending);
        *self = self.with(session);
        (self.batch_only, self.route_capacity) = (options.batch_only, options.route_capacity);
    }

    fn set_sampling(&mut self, random: &mut Random) {
        let sampling = Sampling {
            temperature: [0.0, 0.7, 1.0, 100.0][random.below(4)],
            top_k: [0, 1, 3, VOCAB_SIZE as u32][random.below(4)],
            top_p: [0.0, 0.5, 1.0][random.below(3)],
            min_p: [0.0, 0.1, 1.0][random.below(3)],
            repetition_penalty: [1.0, 0.5, 1.7][random.below(3)],
            presence_penalty: [0.0, -1.0, 0.5][random.below(3)],
            frequency_penalty: [0.0, 0.3, 2.0][random.below(3)],
            penalty_window: [0, 1, 5, 100][random.below(4)],
            seed: random.bits(),
        };
        self.session.set_sampling(sampling).unwrap();
        self.sampling = sampling;
        let wrong = Sampling { top_k: VOCAB_SIZE as u32 + 1, ..sampling };
        assert_eq!(status(&self.session.set_sampling(wrong)), Some(Status::SamplingValue));
        let bias = [f32::NEG_INFINITY, 2.0, -1.5];
        let pairs: Vec<(u32, f32)> =
            (0..random.below(4)).map(|token| (3 * token as u32, bias[random.below(3)])).collect();
        self.bias = LogitBias::new(&pairs, VOCAB_SIZE).unwrap();
        self.session.set_logit_bias(self.bias.clone());
    }

    /// Other experts. Keys and values stay what they were computed as, so those that were go.
    fn set_control(&mut self, random: &mut Random) {
        let control = random.below(CONTROLS) as u8;
        let run = self.tokens.len() - self.session.pending();
        if run == 0 || random.below(2) == 0 {
            if run > 0 {
                self.session.rewind(0).unwrap();
                self.truncate(0);
            }
            self.change_control(control);
        } else {
            // Before the tokens are given again; a pass may be suspended.
            self.change_control(control);
            self.session.rewind(0).unwrap();
            let tokens = std::mem::take(&mut self.tokens);
            self.shows = None;
            self.dropped = 0;
            self.session.push(&tokens).unwrap();
            self.append(&tokens);
        }
    }

    fn score(&mut self, random: &mut Random, oracle: &mut Oracle) {
        let tokens = self.appended_tokens(random);
        let held = self.tokens.len();
        let mut scores = vec![f32::NAN; tokens.len()];
        let refusal = self.workspace_refusal().or((held == 0).then_some(Status::NoLogits));
        let after = random_delay(random);
        let cancel = Arc::clone(self.session.cancel());
        let result = oracle.canceller.around(&cancel, after, || self.session.score(&tokens, &mut scores));
        if self.finish_appending(&tokens, result, refusal, after.is_some()) {
            for (score, expected) in scores.iter().zip(oracle.scores(self.kind, &self.tokens, held)) {
                assert!((f64::from(*score) - expected).abs() < 1e-4, "{score} {expected}");
            }
        }
    }

    fn embed(&mut self, random: &mut Random, oracle: &mut Oracle) {
        let tokens = self.appended_tokens(random);
        let held = self.tokens.len();
        let pooling = [Pooling::Mean, Pooling::Last][random.below(2)];
        let hidden_size = oracle.model.config().hidden_size;
        let mut out = vec![0.0; hidden_size];
        let refusal = self.workspace_refusal().or(tokens.is_empty().then_some(Status::InvalidArgument));
        let after = random_delay(random);
        let cancel = Arc::clone(self.session.cancel());
        let result = oracle.canceller.around(&cancel, after, || self.session.embed(&tokens, pooling, &mut out));
        if self.finish_appending(&tokens, result, refusal, after.is_some()) {
            let from = if pooling == Pooling::Mean { held } else { self.tokens.len() - 1 };
            let mut sums = vec![0f64; hidden_size];
            for at in from..self.tokens.len() {
                let state = oracle.state(self.kind, &self.tokens[..at + 1]);
                sums.iter_mut().zip(state).for_each(|(sum, value)| *sum += f64::from(*value));
            }
            let count = (self.tokens.len() - from) as f64;
            let expected: Vec<f32> = sums.iter().map(|sum| (sum / count) as f32).collect();
            assert_eq!(out, expected);
        }
    }

    /// What `score` and `embed` have changed; whether they came to their end.
    fn finish_appending(&mut self, tokens: &[u32], result: Result<()>, refusal: Option<Status>, racing: bool) -> bool {
        let Err(error) = result else {
            assert!(refusal.is_none() && !self.cancelled, "a cancel that came before the call stops it");
            self.append(tokens);
            assert_eq!(self.session.pending(), 0);
            self.ran();
            return true;
        };
        if refusal.is_some() {
            assert_eq!(Some(error.status()), refusal, "{error}");
            self.cancelled &= !racing;
            return false;
        }
        assert!(error.status() == Status::Cancelled && (racing || self.cancelled), "{error}");
        self.cancelled = false;
        let (before, kept) = (self.append(tokens), self.session.tokens().len());
        assert!(kept == before || racing && kept > before && kept < self.tokens.len());
        self.truncate(kept);
        false
    }

    /// Tokens that fit.
    fn appended_tokens(&self, random: &mut Random) -> Vec<u32> {
        let room = self.context_size - self.tokens.len();
        let count = random.below(8).min(room);
        random.tokens(count, VOCAB_SIZE)
    }

    /// Tokens to give; seldom, one past the vocabulary. They come from one text, so that the oracle often knows them.
    fn random_tokens(&self, random: &mut Random) -> Vec<u32> {
        let count = [0, 1, 2, 3, 8, 16, 17, 31, 60][random.below(9)];
        let held = self.tokens.len();
        let mut tokens: Vec<u32> = (held..held + count).map(|at| (at * at % 13 % VOCAB_SIZE) as u32).collect();
        if count > 0 && random.below(4) == 0 {
            tokens = random.tokens(count, VOCAB_SIZE);
        }
        if count > 0 && random.below(16) == 0 {
            tokens[random.below(count)] = VOCAB_SIZE as u32;
        }
        tokens
    }
}

fn random_budget(random: &mut Random) -> Budget {
    match random.below(6) {
        0 | 1 => Budget::of_layers(random.below(5)),
        2 => Budget::of_time(Duration::from_micros(random.below(300) as u64)),
        3 => Budget { time: Some(Duration::ZERO), layers: Some(1 + random.below(2)) },
        _ => Budget::UNLIMITED,
    }
}

/// When to cancel a call, if at all.
fn random_delay(random: &mut Random) -> Option<Duration> {
    (random.below(8) == 0).then(|| Duration::from_nanos(random.below(200_000) as u64))
}

fn status<T>(result: &Result<T>) -> Option<Status> {
    result.as_ref().err().map(|error| error.status())
}
