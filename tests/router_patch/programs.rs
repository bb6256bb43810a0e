//! Random programs: patches come and go between operations on sessions, alone and in batches. Whatever was done, what a session
//! shows and draws is what a fresh one shows and draws of a model that was loaded with the gates in force.

use std::sync::Arc;
use std::task::Poll;

use gemmoe::backend::KvDtype;
use gemmoe::{Budget, Formats, Overflow, Sampling, Session, SessionBatch, SessionOptions};
use safetensors::Dtype;
use serde_json::json;

use crate::common::{Directory, Random, batch};
use crate::fixture::{Gates, Patched, bits, shown};

const VOCAB_SIZE: usize = 11;
const CONTEXT: usize = 40;

struct Program<'a> {
    patched: &'a Patched,
    random: Random,
    gates: Gates,
    sessions: Vec<Session>,
    batch: SessionBatch,
    log: Vec<String>,
}

fn programs() -> u64 {
    std::env::var("GEMMOE_PROGRAMS").map_or(200, |count| count.parse().unwrap())
}

#[test]
fn any_program_with_patches_gives_what_fresh_sessions_of_those_gates_give() {
    let tiny = |seed, dtype| {
        let sizes = json!({
            "vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "hidden_size": 16, "intermediate_size": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 3
        });
        Patched::new(Directory { dtype, ..Directory::random_with(seed, sizes) }, Formats::default())
    };
    for patched in [tiny(61, Dtype::F32), tiny(62, Dtype::BF16)] {
        for seed in 1..=programs() / 2 {
            let random = Random::new(seed);
            let mut program = Program {
                patched: &patched,
                random,
                gates: Gates::Stored,
                sessions: Vec::new(),
                batch: batch(&patched.model, 4, 12, 64),
                log: Vec::new(),
            };
            patched.put(Gates::Stored);
            program.run(seed);
        }
        assert_eq!(patched.model.kv_account().used(), 0);
    }
}

impl Program<'_> {
    fn run(&mut self, seed: u64) {
        for _ in 0..40 {
            self.operate(seed);
        }
        for at in 0..self.sessions.len() {
            self.sessions[at].prefill(&[]).unwrap();
            self.check(seed, at);
        }
    }

    fn note(&mut self, what: String) {
        self.log.push(what);
    }

    fn operate(&mut self, seed: u64) {
        if self.sessions.is_empty() || self.sessions.len() < 4 && self.random.below(8) == 0 {
            let overflow =
                if self.random.below(2) == 0 { Overflow::Fail } else { Overflow::Slide { keep: self.random.below(6) } };
            let kv_dtype = Some(KvDtype::ALL[self.random.below(4)]);
            let chunk = 1 + self.random.below(9);
            let options = SessionOptions {
                context_size: CONTEXT,
                prefill_chunk: chunk,
                overflow,
                kv_dtype,
                ..Default::default()
            };
            self.note(format!("make {options:?}"));
            self.sessions.push(Session::new(Arc::clone(&self.patched.model), &options).unwrap());
        }
        let at = self.random.below(self.sessions.len());
        match self.random.below(12) {
            0..3 => {
                self.gates = Gates::ALL[self.random.below(3)];
                self.note(format!("put {:?}", self.gates));
                self.patched.put(self.gates);
            }
            3 | 4 => {
                let count = self.random.below(14);
                let tokens = self.random.tokens(count, VOCAB_SIZE);
                let budget = self.budget();
                self.note(format!("{at}: prefill {tokens:?} {budget:?}"));
                // A context may be full.
                let _ = self.sessions[at].prefill_within(&tokens, &budget);
            }
            5 | 6 => self.step(seed, at),
            7 => {
                let count = self.random.below(self.sessions[at].tokens().len() + 1);
                self.note(format!("{at}: rewind {count}"));
                self.sessions[at].rewind(count).unwrap();
            }
            8 if self.sessions.len() < 4 => {
                self.note(format!("{at}: fork"));
                let fork = self.sessions[at].fork().unwrap();
                self.sessions.push(fork);
            }
            8 => {
                self.note(format!("{at}: drop"));
                self.sessions.swap_remove(at);
                return;
            }
            9 => {
                self.note(format!("{at}: snapshot"));
                let mut bytes = vec![0; self.sessions[at].snapshot_bytes()];
                self.sessions[at].snapshot(&mut bytes).unwrap();
                let options = SessionOptions { prefill_chunk: 1 + self.random.below(9), ..Default::default() };
                self.sessions[at] = Session::restore(Arc::clone(&self.patched.model), &bytes, &options).unwrap();
            }
            10 => {
                let sampling = Sampling {
                    temperature: [0.0, 1.0, 30.0][self.random.below(3)],
                    seed: self.random.bits(),
                    ..Default::default()
                };
                self.sessions[at].set_sampling(sampling).unwrap();
            }
            _ => self.step_together(seed),
        }
        let at = self.random.below(self.sessions.len());
        self.check(seed, at);
    }

    fn budget(&mut self) -> Budget {
        match self.random.below(3) {
            0 => Budget::UNLIMITED,
            _ => Budget::of_layers(1 + self.random.below(6)),
        }
    }

    fn step(&mut self, seed: u64, at: usize) {
        let budget = self.budget();
        let session = &mut self.sessions[at];
        self.log.push(format!("{at}: step {budget:?}"));
        if let Poll::Ready(Ok(token)) = session.step_within(&budget) {
            self.check_drawn(seed, at, token);
        }
    }

    fn step_together(&mut self, seed: u64) {
        let budget = self.budget();
        self.log.push(format!("together {budget:?}"));
        if self.random.below(6) == 0 {
            let at = self.random.below(self.sessions.len());
            self.log.push(format!("{at}: cancel"));
            self.sessions[at].cancel().request();
        }
        let mut results = Vec::new();
        let mut members: Vec<&mut Session> = self.sessions.iter_mut().collect();
        self.batch.step(&mut members, &budget, &mut results).unwrap();
        for (at, result) in results.into_iter().enumerate() {
            if let Poll::Ready(Ok(token)) = result {
                self.check_drawn(seed, at, token);
            }
        }
    }

    fn fresh(&self, at: usize, tokens: &[u32]) -> Session {
        let session = &self.sessions[at];
        let options =
            SessionOptions { context_size: CONTEXT, kv_dtype: Some(session.kv_dtype()), ..Default::default() };
        let mut fresh = Session::new(Arc::clone(self.patched.loaded(self.gates)), &options).unwrap();
        fresh.prefill(tokens).unwrap();
        fresh
    }

    /// A session that has drawn `token`.
    fn check_drawn(&mut self, seed: u64, at: usize, token: u32) {
        let session = &self.sessions[at];
        let held = session.tokens();
        let fresh = self.fresh(at, &held[..held.len() - 1]);
        assert_eq!(bits(session.logits().unwrap()), bits(fresh.logits().unwrap()), "program {seed}: {:#?}", self.log);
        // Random numbers belong to positions, and a window that has slid has others.
        if session.dropped() == 0 {
            let mut fresh = fresh;
            fresh.set_sampling(*session.sampling()).unwrap();
            assert_eq!(token, fresh.step().unwrap(), "program {seed}: {:#?}", self.log);
        }
    }

    fn check(&self, seed: u64, at: usize) {
        let session = &self.sessions[at];
        let Some(found) = shown(session) else {
            assert!(session.pending() > 0 || session.tokens().is_empty(), "program {seed}: {:#?}", self.log);
            return;
        };
        // A token that was drawn is pending, and the logits are those before it.
        let held = &session.tokens()[..session.tokens().len() - session.pending()];
        assert!(session.pending() < 2, "program {seed}: {:#?}", self.log);
        assert_eq!(found, shown(&self.fresh(at, held)).unwrap(), "program {seed}, session {at}: {:#?}", self.log);
    }
}
