//! Programs of sessions under a grammar: what is drawn is what the grammar allows after the tokens since it was set, taken
//! by a state that begins anew, and what a session that was never forked, rewound or restored draws.

use std::sync::Arc;
use std::task::Poll;

use gemmoe::backend::KvDtype;
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::text::grammar::{Grammar, GrammarKind, GrammarState};
use gemmoe::{BatchOptions, Budget, Model, Sampling, Session, SessionBatch, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;

use crate::common::{Random, load_with};
use crate::oracle::{Kind, Oracle, shown};
use crate::{run_all, tiny, tokenizer_sample};

const KIND: Kind = Kind { kv_dtype: KvDtype::F32, control: 0 };
const CONTEXT: usize = 40;
const MOST_SESSIONS: usize = 3;

fn grammars(model: &Model) -> Vec<Grammar> {
    let schema = r#"{"type": "object", "properties": {"h": {"type": "integer"}}, "required": ["h"]}"#;
    let sources = [
        (GrammarKind::Regex, "(hello|hell|ho){1,3} ?[a-e]*l"),
        (GrammarKind::Regex, "[a-z]{3,9}( [0-9]+)?"),
        (GrammarKind::JsonSchema, schema),
        (GrammarKind::Lark, r#"start: "he" ("l" | "o" | " hello")+"#),
    ];
    let vocabulary = model.grammar_vocabulary().unwrap();
    sources.iter().map(|(kind, source)| Grammar::new(vocabulary, *kind, source).unwrap()).collect()
}

/// A session, and what it is to be.
struct Subject {
    session: Session,
    tokens: Vec<u32>,
    grammar: Grammar,
    /// Tokens since the grammar was set.
    accepted: Vec<u32>,
    sampling: Sampling,
}

pub fn run_programs(count: u64) {
    let directory = tiny(54, Dtype::F32, json!({"vocab_size": tokenizer_sample::VOCAB_SIZE})).to_temporary();
    let tokenizer = tokenizer_sample::sample().to_string();
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer).unwrap();
    let model = load_with(directory.path(), 1, Instructions::Detect);
    let grammars = grammars(&model);
    let start = || (Oracle::new(&model), grammars.clone());
    run_all("under grammars", count, start, |(oracle, grammars), seed| run(&model, oracle, grammars, seed));
}

fn run(model: &Arc<Model>, oracle: &mut Oracle, grammars: &[Grammar], seed: u64) {
    let mut random = Random::new(seed);
    let mut subjects = vec![Subject::new(model, &grammars[random.below(grammars.len())], &mut random)];
    let options = BatchOptions { max_sessions: MOST_SESSIONS, max_tokens: 8, max_context: CONTEXT, prefill_chunk: 4 };
    let mut batch = SessionBatch::new(Arc::clone(model), &options).unwrap();
    for _ in 0..24 {
        let (at, count) = (random.below(subjects.len()), subjects.len());
        let subject = &mut subjects[at];
        match random.below(16) {
            0..=4 => subject.step(oracle, &mut random),
            5..=7 => step_together(&mut batch, &mut subjects, oracle, &mut random),
            8..=9 => {
                let fork = subject.with(subject.session.fork().unwrap());
                if count < MOST_SESSIONS { subjects.push(fork) } else { subjects[at] = fork }
            }
            10 if count > 1 => drop(subjects.swap_remove(at)),
            10..=11 => subject.rewind(&mut random),
            12 => subject.restore(&mut random),
            13..=14 => subject.push(&mut random),
            _ => {
                subject.grammar = grammars[random.below(grammars.len())].clone();
                subject.session.set_grammar(Some(&subject.grammar)).unwrap();
                subject.accepted.clear();
            }
        }
        subjects.iter_mut().for_each(|subject| subject.check(oracle));
    }
}

/// One step of all sessions together.
fn step_together(batch: &mut SessionBatch, subjects: &mut [Subject], oracle: &mut Oracle, random: &mut Random) {
    let mut results = Vec::new();
    let mut sessions: Vec<&mut Session> = subjects.iter_mut().map(|subject| &mut subject.session).collect();
    batch.step(&mut sessions, &random_budget(random), &mut results).unwrap();
    for (subject, result) in subjects.iter_mut().zip(results) {
        match result {
            Poll::Pending => {}
            Poll::Ready(Ok(token)) => subject.drew(token, oracle),
            Poll::Ready(Err(error)) => {
                assert!(error.status() == Status::ContextFull && subject.tokens.len() == CONTEXT, "{error}");
            }
        }
    }
}

fn random_budget(random: &mut Random) -> Budget {
    if random.below(2) == 0 { Budget::UNLIMITED } else { Budget::of_layers(random.below(4)) }
}

impl Subject {
    fn new(model: &Arc<Model>, grammar: &Grammar, random: &mut Random) -> Subject {
        let options = SessionOptions {
            context_size: CONTEXT,
            prefill_chunk: 1 + random.below(9),
            kv_dtype: Some(KIND.kv_dtype),
            ..Default::default()
        };
        let mut session = Session::new(Arc::clone(model), &options).unwrap();
        let sampling = Sampling { temperature: 1.0, top_k: 30, seed: random.bits(), ..Default::default() };
        session.set_sampling(sampling).unwrap();
        let tokens: Vec<u32> = (0..1 + random.below(12)).map(|at| 2 + 7 * at as u32).collect();
        session.push(&tokens).unwrap();
        session.set_grammar(Some(grammar)).unwrap();
        Subject { session, tokens, grammar: grammar.clone(), accepted: Vec::new(), sampling }
    }

    fn with(&self, session: Session) -> Subject {
        let (tokens, accepted, grammar) = (self.tokens.clone(), self.accepted.clone(), self.grammar.clone());
        Subject { session, tokens, grammar, accepted, sampling: self.sampling }
    }

    /// A state that begins anew and takes the tokens.
    fn state(&self) -> GrammarState {
        let mut state = GrammarState::start(&self.grammar).unwrap();
        self.accepted.iter().for_each(|token| state.accept(*token).unwrap());
        state
    }

    fn drew(&mut self, token: u32, oracle: &mut Oracle) {
        let mut state = self.state();
        let allowed = state.mask().unwrap();
        assert!(allowed[token as usize / 32] >> (token % 32) & 1 == 1, "{token} after {:?}", self.accepted);
        assert_eq!(token, oracle.drawn_of(KIND, &self.tokens, &self.sampling, allowed), "after {:?}", self.accepted);
        self.took(token);
    }

    fn took(&mut self, token: u32) {
        self.tokens.push(token);
        self.accepted.push(token);
    }

    fn step(&mut self, oracle: &mut Oracle, random: &mut Random) {
        for _ in 0..6 {
            match self.session.step_within(&random_budget(random)) {
                Poll::Pending => {}
                Poll::Ready(Ok(token)) => self.drew(token, oracle),
                Poll::Ready(Err(error)) => {
                    assert!(error.status() == Status::ContextFull && self.tokens.len() == CONTEXT, "{error}");
                }
            }
        }
    }

    /// Back by some tokens, or to some before the grammar, which begins anew then.
    fn rewind(&mut self, random: &mut Random) {
        let back = if random.below(2) == 0 { random.below(4) } else { random.below(self.tokens.len()) };
        let count = self.tokens.len().saturating_sub(back).max(1);
        self.session.rewind(count).unwrap();
        let taken = self.tokens.len() - count;
        self.tokens.truncate(count);
        self.accepted.truncate(self.accepted.len().saturating_sub(taken));
    }

    fn restore(&mut self, random: &mut Random) {
        let mut bytes = vec![0; self.session.snapshot_bytes()];
        self.session.snapshot(&mut bytes).unwrap();
        let options = SessionOptions { prefill_chunk: 1 + random.below(9), ..Default::default() };
        self.session = Session::restore(Arc::clone(self.session.model()), &bytes, &options).unwrap();
        // It compiled its grammar anew; the two say the same.
        self.grammar = self.session.grammar().unwrap().grammar().clone();
    }

    /// A few tokens of the host's, of which the grammar allows all, or not the last: then none is taken.
    fn push(&mut self, random: &mut Random) {
        let mut state = self.state();
        let room = CONTEXT - self.tokens.len();
        let vocab_size = tokenizer_sample::VOCAB_SIZE as u32;
        let (mut given, mut is_allowed) = (Vec::new(), true);
        for _ in 0..random.below(4).min(room) {
            let mask = state.mask().unwrap();
            let of =
                |wanted: bool| (0..vocab_size).filter(move |t| (mask[*t as usize / 32] >> (t % 32) & 1 == 1) == wanted);
            is_allowed = random.below(4) > 0;
            let choices: Vec<u32> = of(is_allowed).collect();
            given.push(choices[random.below(choices.len())]);
            if !is_allowed {
                break;
            }
            state.accept(given[given.len() - 1]).unwrap();
        }
        let result = self.session.push(&given);
        if is_allowed {
            result.unwrap();
            given.into_iter().for_each(|token| self.took(token));
        } else {
            assert_eq!(result.unwrap_err().status(), Status::GrammarViolation);
        }
    }

    fn check(&mut self, oracle: &mut Oracle) {
        assert_eq!(self.session.tokens(), self.tokens);
        assert_eq!(self.session.grammar().unwrap().accepted(), self.accepted);
        let is_complete = self.state().is_complete().unwrap();
        assert_eq!(self.session.is_grammar_complete().unwrap(), Some(is_complete), "after {:?}", self.accepted);
        if self.session.pending() == 0 {
            assert_eq!(shown(&self.session).as_ref(), Some(oracle.after(KIND, &self.tokens)));
        }
    }
}
