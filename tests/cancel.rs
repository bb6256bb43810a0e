//! Ten thousand cancels, each at a random moment of a call, and some of loads: nothing is lost, nothing is wrong, nothing is
//! left behind.

#[path = "common/canceller.rs"]
mod canceller;
mod common;
#[path = "common/counting.rs"]
mod counting;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::thread;
use std::time::{Duration, Instant};

use canceller::Canceller;
use common::{Directory, Random, load, load_with};
use counting::live_bytes;
use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::quant::Format;
use gemmoe::{
    BatchOptions, Budget, Error, Formats, LoadOptions, Model, Progress, Session, SessionBatch, SessionOptions, Status,
};
use serde_json::json;

/// Live bytes are counted over the whole process: the tests of this file take turns.
static TURN: Mutex<()> = Mutex::new(());

const CANCELS: usize = 10_000;
/// Tokens of the text that is prefilled, scored, and continued.
const LENGTH: usize = 60;
/// Tokens held before a call that is scored.
const HELD: usize = 20;
const CONTEXT: usize = 80;

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn session(model: &Arc<Model>) -> Session {
    let options = SessionOptions { context_size: CONTEXT, prefill_chunk: 16, ..Default::default() };
    Session::new(Arc::clone(model), &options).unwrap()
}

/// What uncancelled calls give.
struct Expected {
    text: Vec<u32>,
    /// After all of the text.
    logits: Vec<u32>,
    next: u32,
    /// Of the tokens after the first `HELD`.
    scores: Vec<u32>,
    /// What three sessions draw that were pushed parts of the text.
    together: Vec<u32>,
}

/// Where the text is cut for the sessions of a batch.
const PARTS: [usize; 3] = [LENGTH, 1, 25];

impl Expected {
    fn new(model: &Arc<Model>) -> Expected {
        let text = Random::new(81).tokens(LENGTH, 97);
        let mut whole = session(model);
        whole.prefill(&text).unwrap();
        let mut scored = session(model);
        let mut scores = vec![0.0; LENGTH - HELD];
        scored.prefill(&text[..HELD]).unwrap();
        scored.score(&text[HELD..], &mut scores).unwrap();
        let draw = |length: usize| {
            let mut session = session(model);
            session.prefill(&text[..length]).unwrap();
            session.step().unwrap()
        };
        Expected {
            logits: bits(whole.logits().unwrap()),
            next: whole.step().unwrap(),
            scores: bits(&scores),
            together: PARTS.map(draw).into(),
            text,
        }
    }
}

/// Sessions and their batch, used again and again.
struct Subject {
    session: Session,
    members: [Session; 3],
    batch: SessionBatch,
    results: Vec<Poll<gemmoe::Result<u32>>>,
    scores: Vec<f32>,
}

/// Whether a call was stopped; any other error is one.
fn stopped<T>(result: Result<T, Error>) -> bool {
    match result {
        Ok(_) => false,
        Err(error) => {
            assert_eq!(error.status(), Status::Cancelled);
            true
        }
    }
}

impl Subject {
    /// Prepares a call, which `run` makes and says whether it was stopped, and then sees that all is as it should be.
    fn cancelled(
        &mut self,
        call: usize,
        expected: &Expected,
        canceller: &Canceller,
        after: Duration,
    ) -> Option<Duration> {
        let (session, text) = (&mut self.session, &expected.text);
        let cancel = Arc::clone(session.cancel());
        session.rewind(0).unwrap();
        match call {
            0 => {
                let (result, late) = canceller.timed(&cancel, after, || session.prefill(text));
                let was_stopped = stopped(result);
                let held = session.tokens().len();
                assert_eq!(was_stopped, held < LENGTH);
                assert_eq!(session.tokens(), &text[..held]);
                session.prefill(&text[held..]).unwrap();
                assert_eq!(bits(session.logits().unwrap()), expected.logits);
                was_stopped.then_some(late)
            }
            1 => {
                session.push(text).unwrap();
                let (result, late) = canceller.timed(&cancel, after, || session.step());
                let token = match result {
                    Ok(token) => token,
                    Err(error) => {
                        assert!(stopped::<()>(Err(error)));
                        assert_eq!(session.tokens(), text);
                        let token = session.step().unwrap();
                        assert_eq!(token, expected.next);
                        assert_eq!(bits(session.logits().unwrap()), expected.logits);
                        return Some(late);
                    }
                };
                assert_eq!(token, expected.next);
                None
            }
            2 => {
                session.prefill(&text[..HELD]).unwrap();
                let scores = &mut self.scores;
                let (result, late) = canceller.timed(&cancel, after, || session.score(&text[HELD..], scores));
                let was_stopped = stopped(result);
                let held = session.tokens().len();
                assert_eq!(was_stopped, held < LENGTH);
                assert!(held >= HELD && session.tokens() == &text[..held]);
                session.score(&text[held..], &mut scores[held - HELD..]).unwrap();
                assert_eq!(bits(scores), expected.scores);
                was_stopped.then_some(late)
            }
            _ => self.cancelled_together(expected, canceller, after),
        }
    }

    fn cancelled_together(&mut self, expected: &Expected, canceller: &Canceller, after: Duration) -> Option<Duration> {
        let text = &expected.text;
        for (session, part) in self.members.iter_mut().zip(PARTS) {
            session.rewind(0).unwrap();
            session.push(&text[..part]).unwrap();
        }
        let (batch, results) = (&mut self.batch, &mut self.results);
        let cancel = Arc::clone(batch.cancel());
        let mut drawn = [None; 3];
        let mut late = None;
        // The cancel falls into the first step, or into none.
        for round in 0.. {
            let mut waiting: [usize; 3] = [0; 3];
            let mut count = 0;
            for (index, _) in drawn.iter().enumerate().filter(|(_, drawn)| drawn.is_none()) {
                waiting[count] = index;
                count += 1;
            }
            if count == 0 {
                break;
            }
            let [a, b, c] = &mut self.members;
            let mut all = [Some(a), Some(b), Some(c)];
            let mut members: Vec<&mut Session> = waiting[..count].iter().map(|at| all[*at].take().unwrap()).collect();
            let mut step = || batch.step(&mut members, &Budget::UNLIMITED, results);
            let result = if round > 0 {
                step()
            } else {
                let (result, time) = canceller.timed(&cancel, after, step);
                late = result.is_err().then_some(time);
                result
            };
            if stopped(result) {
                for (session, part) in self.members.iter().zip(PARTS) {
                    assert_eq!(session.tokens(), &text[..part]);
                }
                continue;
            }
            for (index, result) in waiting[..count].iter().zip(results.drain(..)) {
                if let Poll::Ready(token) = result {
                    drawn[*index] = Some(token.unwrap());
                }
            }
        }
        assert!(drawn.iter().zip(&expected.together).all(|(drawn, expected)| *drawn == Some(*expected)), "{drawn:?}");
        late
    }
}

#[test]
fn whenever_a_call_is_cancelled_the_session_says_what_it_holds_and_goes_on_right() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = Directory::random(81).to_temporary();
    let model = load_with(directory.path(), 2, Instructions::Detect);
    let expected = Expected::new(&load_with(directory.path(), 1, Instructions::Detect));
    let options = BatchOptions { max_sessions: 3, max_tokens: 40, max_context: CONTEXT, prefill_chunk: 20 };
    let mut subject = Subject {
        session: session(&model),
        members: [0; 3].map(|_| session(&model)),
        batch: SessionBatch::new(Arc::clone(&model), &options).unwrap(),
        results: Vec::with_capacity(3),
        scores: vec![0.0; LENGTH - HELD],
    };
    let canceller = Canceller::start();
    let mut random = Random::new(82);
    let mut late: [Vec<Duration>; 4] = [0; 4].map(|_| Vec::with_capacity(CANCELS));
    // What a call takes when it is left alone, about; cancels fall anywhere in it.
    let mut usual = [Duration::from_micros(300); 4];
    let mut live = 0;
    for round in 0..CANCELS {
        if round == 100 {
            live = live_bytes();
        }
        let call = random.below(4);
        let after = usual[call].mul_f64(random.below(1 << 20) as f64 / f64::from(1 << 20));
        let started = Instant::now();
        match subject.cancelled(call, &expected, &canceller, after) {
            Some(time) => late[call].push(time),
            None => usual[call] = (usual[call] * 7 + started.elapsed() / 2) / 8,
        }
    }
    assert_eq!(live_bytes(), live, "cancels leave nothing behind");
    for (name, mut late) in ["prefill", "step", "score", "batch"].into_iter().zip(late) {
        late.sort_unstable();
        assert!(late.len() > CANCELS / 100, "{} cancels fell into a {name}", late.len());
        let at = |share: f64| late[((late.len() as f64 * share) as usize).min(late.len() - 1)];
        let (p50, p99, p999, max) = (at(0.5), at(0.99), at(0.999), at(1.0));
        println!("{name}: {} stopped, after {p50:.1?} p50, {p99:.1?} p99, {p999:.1?} p99.9, {max:.1?} max", late.len());
    }
}

#[test]
fn a_pass_of_many_pieces_goes_on_after_any_cancel_and_gives_the_same_bits() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // Wide and otherwise small: much of the time goes into adding to the residual stream, in many pieces of which none may
    // run twice.
    let changes = json!({
        "hidden_size": 4096, "intermediate_size": 1, "num_hidden_layers": 3, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "vocab_size": 50
    });
    let directory = Directory::random_with(83, changes).to_temporary();
    let model = load(directory.path());
    let tokens = Random::new(83).tokens(200, 50);
    let options = SessionOptions { context_size: 201, prefill_chunk: 200, ..Default::default() };
    let mut session = Session::new(Arc::clone(&model), &options).unwrap();
    let started = Instant::now();
    session.prefill(&tokens).unwrap();
    let usual = started.elapsed();
    let expected = bits(session.logits().unwrap());
    let canceller = Canceller::start();
    let (mut random, mut stops) = (Random::new(84), 0);
    for _ in 0..60 {
        session.rewind(0).unwrap();
        session.push(&tokens).unwrap();
        let cancel = Arc::clone(session.cancel());
        loop {
            let after = usual.mul_f64(random.below(1 << 20) as f64 / f64::from(1 << 22));
            if canceller.timed(&cancel, after, || stopped(session.prefill(&[]))).0 {
                stops += 1;
            } else {
                break;
            }
        }
        assert_eq!(bits(session.logits().unwrap()), expected);
    }
    assert!(stops > 100, "{stops}");
}

#[test]
fn a_suspended_pass_whose_workspace_a_cancelled_score_took_is_not_gone_on_with() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let directory = Directory::random_with(85, json!({"num_hidden_layers": 4})).to_temporary();
    let model = load(directory.path());
    let text = Random::new(85).tokens(16, 97);
    let mut session = session(&model);
    let started = Instant::now();
    session.prefill(&text).unwrap();
    let (usual, expected) = (started.elapsed(), bits(session.logits().unwrap()));
    let canceller = Canceller::start();
    let mut random = Random::new(86);
    let mut stops = 0;
    for round in 0..300 {
        session.rewind(0).unwrap();
        assert!(session.prefill_within(&text, &Budget::of_layers(1 + round % 4)).is_pending());
        let cancel = Arc::clone(session.cancel());
        let after = usual.mul_f64(random.below(1 << 20) as f64 / f64::from(1 << 20));
        stops += stopped(canceller.timed(&cancel, after, || session.score(&[], &mut [])).0) as usize;
        session.prefill(&[]).unwrap();
        assert_eq!(bits(session.logits().unwrap()), expected);
    }
    assert!(stops > 30, "{stops}");
}

/// Threads that this test has started: they have its name, or one that the library gives.
fn threads() -> usize {
    let name = |thread: &Path| std::fs::read_to_string(thread.join("comm")).unwrap_or_default();
    let own = name(Path::new("/proc/thread-self"));
    let all = std::fs::read_dir("/proc/self/task").unwrap().map(|thread| name(&thread.unwrap().path()));
    all.filter(|name| *name == own || name.starts_with("gemmoe-")).count()
}

#[test]
fn a_load_cancelled_at_any_byte_stops_all_its_threads_and_leaves_nothing_to_the_next() {
    const THREADS: usize = 3;
    /// What each thread may be reading when the cancel comes.
    const IN_FLIGHT: u64 = (THREADS as u64) << 20;
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    // The embedding is read in six chunks.
    let directory = Directory::random_with(87, json!({"vocab_size": 6011, "hidden_size": 512})).to_temporary();
    let int8 = Formats { head: Some(Format::INT8), ..Default::default() };
    for formats in [Formats::default(), int8] {
        let load = |progress: &Progress| {
            let cpu = CpuOptions { threads: THREADS.into(), ..Default::default() };
            Model::load(directory.path(), &LoadOptions { cpu, formats, ..Default::default() }, progress)
        };
        let logits = || {
            let progress = Progress::default();
            let mut session = session(&load(&progress).unwrap());
            session.prefill(&Random::new(88).tokens(9, 6011)).unwrap();
            (bits(session.logits().unwrap()), progress.bytes_total())
        };
        let (expected, total) = logits();
        let (mut random, mut stops) = (Random::new(89), 0);
        let (live, alone) = (live_bytes(), threads());
        for _ in 0..30 {
            let (progress, is_over) = (Progress::default(), AtomicBool::new(false));
            let at = random.below(total as usize) as u64;
            let (result, read) = thread::scope(|scope| {
                let canceller = scope.spawn(|| {
                    while progress.bytes_read() < at && !is_over.load(Ordering::Relaxed) {
                        thread::yield_now();
                    }
                    progress.cancel();
                    progress.bytes_read()
                });
                let result = load(&progress);
                is_over.store(true, Ordering::Relaxed);
                (result, canceller.join().unwrap())
            });
            if stopped(result) {
                stops += 1;
                assert!(progress.bytes_read() <= read + IN_FLIGHT, "{} after {read}", progress.bytes_read());
            } else {
                assert!(total <= read + IN_FLIGHT, "not stopped after {read}");
            }
            assert!(logits().0 == expected, "a load after one that was cancelled at {read}");
        }
        assert!(stops > 10, "{stops}");
        // The system may still be clearing away threads that have ended.
        let waiting = Instant::now();
        while threads() > alone && waiting.elapsed() < Duration::from_secs(10) {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(threads() <= alone, "cancelled loads leave no threads behind");
        assert_eq!(live_bytes(), live, "cancelled loads leave no memory behind");
    }
}
