//! Random programs of operations on sessions, alone and in batches, with cancels from other threads, against a model of
//! what a session promises: its logits, routes and draws are those of a fresh session that was fed the same tokens.

mod common;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Directory, Random, load_with};
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::backend::ops::Cancel;
use gemmoe::{Model, Result, Sampling, Session, SessionBatch, SessionOptions, Status};
use serde_json::json;

const VOCAB_SIZE: usize = 11;
const LONGEST: usize = 48;
const LAYERS: usize = 2;

/// What a session shows after a token: the bits of its logits, and its routes.
#[derive(Clone, Debug, PartialEq)]
struct Shown {
    logits: Vec<u32>,
    routes: Vec<(Vec<u32>, Vec<u32>)>,
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn shown(session: &Session) -> Option<Shown> {
    let logits = bits(session.logits().ok()?);
    let route = |layer| session.routes(layer).map(|routes| (routes.experts.to_vec(), bits(routes.weights))).unwrap();
    Some(Shown { logits, routes: (0..LAYERS).map(route).collect() })
}

/// Fresh sessions on one thread, each fed one list of tokens in one piece; their answers are remembered.
struct Oracle {
    model: Arc<Model>,
    known: HashMap<Vec<u32>, Shown>,
}

impl Oracle {
    fn fed(&self, tokens: &[u32]) -> Session {
        let options = SessionOptions { context_size: tokens.len() + 1, prefill_chunk: LONGEST };
        let mut session = Session::new(Arc::clone(&self.model), &options).unwrap();
        session.prefill(tokens).unwrap();
        session
    }

    fn after(&mut self, tokens: &[u32]) -> &Shown {
        if !self.known.contains_key(tokens) {
            let shown = shown(&self.fed(tokens)).unwrap();
            self.known.insert(tokens.to_vec(), shown);
        }
        &self.known[tokens]
    }

    fn drawn(&self, tokens: &[u32], sampling: Sampling) -> u32 {
        let mut session = self.fed(tokens);
        session.set_sampling(sampling).unwrap();
        session.step().unwrap()
    }
}

/// A session, and what it is to be.
struct Subject {
    session: Session,
    context_size: usize,
    tokens: Vec<u32>,
    /// How many tokens its logits come after, while it has some.
    shows: Option<usize>,
    sampling: Sampling,
    /// A cancel asked for while no call ran.
    cancelled: bool,
}

impl Subject {
    fn random(model: &Arc<Model>, random: &mut Random) -> Subject {
        let context_size = [1, 2, 15, 16, 17, 33, LONGEST][random.below(7)];
        let options = SessionOptions { context_size, prefill_chunk: 1 + random.below(9) };
        Subject {
            session: Session::new(Arc::clone(model), &options).unwrap(),
            context_size,
            tokens: Vec::new(),
            shows: None,
            sampling: Sampling::default(),
            cancelled: false,
        }
    }

    /// What `push` and `prefill` say before anything runs.
    fn refusal(&self, tokens: &[u32]) -> Option<Status> {
        if tokens.iter().any(|token| *token as usize >= VOCAB_SIZE) {
            return Some(Status::TokenOutOfRange);
        }
        (tokens.len() > self.context_size - self.tokens.len()).then_some(Status::ContextFull)
    }

    fn step_refusal(&self) -> Option<Status> {
        match self.tokens.len() {
            0 => Some(Status::NoLogits),
            full if full == self.context_size => Some(Status::ContextFull),
            _ => None,
        }
    }

    fn append(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
        if !tokens.is_empty() {
            self.shows = None;
        }
    }

    fn drew(&mut self, token: u32, oracle: &Oracle) {
        assert_eq!(token, oracle.drawn(&self.tokens, self.sampling), "a draw after {:?}", self.tokens);
        self.shows = Some(self.tokens.len());
        self.tokens.push(token);
    }

    fn check(&self, oracle: &mut Oracle) {
        assert_eq!(self.session.tokens(), self.tokens);
        assert!(self.session.pending() <= self.tokens.len());
        assert_eq!(shown(&self.session).as_ref(), self.shows.map(|count| oracle.after(&self.tokens[..count])));
        if self.session.pending() == 0 && !self.tokens.is_empty() {
            assert_eq!(self.shows, Some(self.tokens.len()), "nothing is pending, so there are logits");
        }
    }
}

fn status<T>(result: Result<T>) -> Option<Status> {
    result.err().map(|error| error.status())
}

/// A thread that asks for a cancel a moment after it is told to.
struct Canceller<'a> {
    armed: &'a AtomicBool,
    cancel: &'a parking::Slot,
}

mod parking {
    use std::sync::Mutex;
    use std::time::Duration;

    /// What to cancel next, and how long to wait before.
    #[derive(Default)]
    pub struct Slot(pub Mutex<Option<(std::sync::Arc<gemmoe::backend::ops::Cancel>, Duration)>>);
}

impl Canceller<'_> {
    /// Runs `call`, in one of three times with a cancel on its way; says whether one was.
    fn around<T>(&self, cancel: &Arc<Cancel>, random: &mut Random, call: impl FnOnce() -> T) -> (T, bool) {
        if random.below(3) > 0 {
            return (call(), false);
        }
        let after = Duration::from_nanos(random.below(400_000) as u64);
        *self.cancel.0.lock().unwrap() = Some((Arc::clone(cancel), after));
        self.armed.store(true, Ordering::Release);
        let result = call();
        // Once it is disarmed no cancel is on its way any more.
        while self.armed.load(Ordering::Acquire) {
            std::thread::yield_now();
        }
        cancel.take();
        (result, true)
    }

    fn serve(armed: &AtomicBool, slot: &parking::Slot, over: &AtomicBool) {
        while !over.load(Ordering::Acquire) {
            if !armed.load(Ordering::Acquire) {
                std::thread::yield_now();
                continue;
            }
            if let Some((cancel, after)) = slot.0.lock().unwrap().take() {
                let start = Instant::now();
                while start.elapsed() < after {
                    std::hint::spin_loop();
                }
                cancel.request();
            }
            armed.store(false, Ordering::Release);
        }
    }
}

fn random_tokens(random: &mut Random) -> Vec<u32> {
    let count = [0, 1, 2, 3, 8, 16, 17, 31][random.below(8)];
    let mut tokens = random.tokens(count, VOCAB_SIZE);
    if count > 0 && random.below(16) == 0 {
        let at = random.below(count);
        tokens[at] = VOCAB_SIZE as u32;
    }
    tokens
}

fn random_sampling(random: &mut Random) -> Sampling {
    Sampling {
        temperature: [0.0, 0.0, 0.7, 1.0, 100.0][random.below(5)],
        top_k: [0, 1, 3, VOCAB_SIZE as u32][random.below(4)],
        top_p: [0.0, 0.5, 1.0][random.below(3)],
        min_p: [0.0, 0.1, 1.0][random.below(3)],
        seed: random.bits(),
        ..Sampling::default()
    }
}

/// One operation on one session.
fn operate(subject: &mut Subject, random: &mut Random, canceller: &Canceller, oracle: &Oracle) {
    let cancel = Arc::clone(subject.session.cancel());
    match random.below(16) {
        0 | 1 => {
            let tokens = random_tokens(random);
            let refusal = subject.refusal(&tokens);
            assert_eq!(status(subject.session.push(&tokens)), refusal);
            if refusal.is_none() {
                subject.append(&tokens);
            }
        }
        2..=5 => {
            let tokens = random_tokens(random);
            let refusal = subject.refusal(&tokens);
            let (result, racing) = canceller.around(&cancel, random, || subject.session.prefill(&tokens));
            match status(result) {
                None => {
                    assert_eq!(refusal, None);
                    assert!(!subject.cancelled, "a cancel that came before the call stops it");
                    subject.append(&tokens);
                    subject.shows = (!subject.tokens.is_empty()).then_some(subject.tokens.len());
                }
                Some(Status::Cancelled) if refusal.is_none() => {
                    assert!(racing || subject.cancelled);
                    let before = subject.tokens.len();
                    let kept = subject.session.tokens().len();
                    assert!(kept == before || racing && kept > before);
                    subject.append(&tokens);
                    subject.tokens.truncate(kept);
                    subject.cancelled = false;
                }
                other => assert_eq!(other, refusal),
            }
            if racing {
                subject.cancelled = false;
            }
        }
        6..=10 => {
            let refusal = subject.step_refusal();
            let (result, racing) = canceller.around(&cancel, random, || subject.session.step());
            match result {
                Ok(token) => {
                    assert_eq!(refusal, None);
                    assert!(!subject.cancelled, "a cancel that came before the call stops it");
                    subject.drew(token, oracle);
                }
                Err(error) if error.status() == Status::Cancelled && refusal.is_none() => {
                    assert!(racing || subject.cancelled);
                    subject.cancelled = false;
                }
                Err(error) => assert_eq!(Some(error.status()), refusal),
            }
            if racing {
                subject.cancelled = false;
            }
        }
        11 | 12 => {
            let held = subject.tokens.len();
            let count = random.below(held + 2);
            let refusal = (count > held).then_some(Status::InvalidArgument);
            assert_eq!(status(subject.session.rewind(count)), refusal);
            if count < held {
                subject.tokens.truncate(count);
                subject.shows = None;
            }
        }
        13 => {
            let sampling = random_sampling(random);
            subject.session.set_sampling(sampling).unwrap();
            subject.sampling = sampling;
            let wrong = Sampling { top_k: VOCAB_SIZE as u32 + 1, ..sampling };
            assert_eq!(status(subject.session.set_sampling(wrong)), Some(Status::SamplingValue));
        }
        14 => {
            cancel.request();
            subject.cancelled = true;
        }
        _ => {
            assert_eq!(cancel.take(), subject.cancelled);
            subject.cancelled = false;
        }
    }
}

/// One step of some of the sessions together.
fn operate_together(
    batch: &mut SessionBatch,
    subjects: &mut [Subject],
    random: &mut Random,
    canceller: &Canceller,
    oracle: &mut Oracle,
) {
    let chosen = 1 + random.below((1 << subjects.len()) - 1);
    let mut members: Vec<&mut Subject> =
        subjects.iter_mut().enumerate().filter(|(at, _)| chosen >> at & 1 == 1).map(|(_, subject)| subject).collect();
    let cancel = Arc::new(Cancel::default());
    let (result, racing) = canceller.around(&cancel, random, || {
        let mut sessions: Vec<&mut Session> = members.iter_mut().map(|subject| &mut subject.session).collect();
        batch.step(&mut sessions, &cancel)
    });
    match result {
        Ok(results) => {
            assert_eq!(results.len(), members.len());
            for (subject, result) in members.into_iter().zip(results) {
                match (result, subject.step_refusal()) {
                    (Ok(token), None) => subject.drew(token, oracle),
                    (Err(error), refusal) => assert_eq!(Some(error.status()), refusal),
                    (Ok(_), refusal) => panic!("expected {refusal:?}"),
                }
            }
        }
        Err(error) => {
            assert!(error.status() == Status::Cancelled && racing, "{error}");
            for subject in members {
                // It holds the same tokens; its own part of the work may have been done.
                if subject.session.pending() == 0 && !subject.tokens.is_empty() {
                    subject.shows = Some(subject.tokens.len());
                }
            }
        }
    }
}

fn run(model: &Arc<Model>, oracle: &mut Oracle, seed: u64, canceller: &Canceller) {
    let mut random = Random::new(seed);
    let mut subjects: Vec<Subject> = (0..3).map(|_| Subject::random(model, &mut random)).collect();
    let max_tokens = 3 + random.below(14);
    let mut batch = SessionBatch::new(Arc::clone(model), 3, max_tokens, LONGEST).unwrap();
    for _ in 0..24 {
        if random.below(4) == 0 {
            operate_together(&mut batch, &mut subjects, &mut random, canceller, oracle);
        } else {
            let at = random.below(3);
            operate(&mut subjects[at], &mut random, canceller, oracle);
        }
        subjects.iter().for_each(|subject| subject.check(oracle));
    }
}

/// Runs programs from two threads on one model, so that their sessions share its threads too.
fn run_programs(name: &str, directory: Directory, threads: usize, programs: u64) {
    let directory = directory.to_temporary();
    let model = load_with(directory.path(), threads, Instructions::Detect);
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (model, directory) = (&model, directory.path());
            scope.spawn(move || {
                let mut oracle = Oracle { model: load_with(directory, 1, Instructions::Detect), known: HashMap::new() };
                let (armed, slot, over) = (AtomicBool::new(false), parking::Slot::default(), AtomicBool::new(false));
                std::thread::scope(|scope| {
                    scope.spawn(|| Canceller::serve(&armed, &slot, &over));
                    let canceller = Canceller { armed: &armed, cancel: &slot };
                    for seed in (half * programs..(half + 1) * programs).map(|seed| seed + 1) {
                        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                            run(model, &mut oracle, seed, &canceller)
                        }));
                        if let Err(panic) = result {
                            over.store(true, Ordering::Release);
                            println!("{name}, {threads} threads: program {seed} failed");
                            std::panic::resume_unwind(panic);
                        }
                    }
                    over.store(true, Ordering::Release);
                });
            });
        }
    });
}

fn small(seed: u64, changes: serde_json::Value) -> Directory {
    let mut all = json!({"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64});
    for (key, value) in changes.as_object().unwrap() {
        all[key] = value.clone();
    }
    Directory::random_with(seed, all)
}

#[test]
fn any_program_of_operations_gives_what_fresh_sessions_give() {
    let programs: u64 = std::env::var("GEMMOE_PROGRAMS").map_or(500, |count| count.parse().unwrap());
    run_programs("four experts", small(51, json!({})), 3, programs);
    let odd = json!({"hidden_size": 12, "head_dim": 2, "intermediate_size": 5, "num_local_experts": 5, "num_experts_per_tok": 5});
    run_programs("all of five experts", small(52, odd), 2, programs);
}
