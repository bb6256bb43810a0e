//! What is right: the answers of fresh sessions, each fed its tokens in one piece and used once.

use std::collections::HashMap;
use std::sync::Arc;

use gemmoe::backend::KvDtype;
use gemmoe::engine::sample::{Draw, Sampler};
use gemmoe::{LogitBias, Model, Pooling, Sampling, Session, SessionOptions};

use crate::canceller::Canceller;

/// What a session shows after a token: the bits of its logits, and its routes.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    pub logits: Vec<u32>,
    /// For each layer.
    pub experts: Vec<Vec<u32>>,
    pub weights: Vec<Vec<u32>>,
}

pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub fn shown(session: &Session) -> Option<Shown> {
    let logits = bits(session.logits().ok()?);
    let layers = 0..session.model().config().num_hidden_layers;
    let routes = || layers.clone().map(|layer| session.routes(layer).unwrap());
    let experts = routes().map(|routes| routes.experts.to_vec()).collect();
    Some(Shown { logits, experts, weights: routes().map(|routes| bits(routes.weights)).collect() })
}

/// Which experts may be chosen: 0 is all, the others are masks and biases that a test chose once.
pub type Control = u8;
/// How many there are.
pub const CONTROLS: usize = 4;

pub fn set_control(session: &mut Session, control: Control) {
    let experts = session.model().config().num_local_experts;
    session.clear_expert_control();
    match control {
        0 => {}
        1 => session.set_allowed_experts(Some(1), 0b101).unwrap(),
        2 => {
            let bias: Vec<f32> = (0..experts).map(|expert| expert as f32 * 1.5 - 2.0).collect();
            session.set_expert_bias(None, &bias).unwrap();
        }
        _ => {
            // Fewer than are chosen: routes have places without an expert.
            session.set_allowed_experts(None, 0b10).unwrap();
            session.set_expert_bias(Some(0), &vec![0.25; experts]).unwrap();
        }
    }
}

/// What answers depend on, beside the tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Kind {
    pub kv_dtype: KvDtype,
    pub control: Control,
}

pub struct Oracle {
    pub model: Arc<Model>,
    pub canceller: Canceller,
    shown: HashMap<Vec<u16>, Shown>,
    states: HashMap<Vec<u16>, Vec<f32>>,
    sampler: Sampler,
}

/// Answers that are remembered.
const MOST_KNOWN: usize = 100_000;

impl Oracle {
    /// `model` has one thread.
    pub fn new(model: &Arc<Model>) -> Oracle {
        let sampler = Sampler::new(model.config().vocab_size).unwrap();
        let model = Arc::clone(model);
        Oracle { model, canceller: Canceller::start(), shown: HashMap::new(), states: HashMap::new(), sampler }
    }

    fn fresh(&self, kind: Kind, context_size: usize) -> Session {
        let options = SessionOptions {
            context_size,
            prefill_chunk: context_size,
            kv_dtype: Some(kind.kv_dtype),
            ..Default::default()
        };
        let mut session = Session::new(Arc::clone(&self.model), &options).unwrap();
        set_control(&mut session, kind.control);
        session
    }

    fn key(kind: Kind, tokens: &[u32]) -> Vec<u16> {
        let mut key = vec![kind.kv_dtype as u16, u16::from(kind.control)];
        key.extend(tokens.iter().map(|token| *token as u16));
        key
    }

    /// What is shown after `tokens`.
    pub fn after(&mut self, kind: Kind, tokens: &[u32]) -> &Shown {
        let key = Self::key(kind, tokens);
        if self.shown.len() > MOST_KNOWN {
            self.shown.clear();
        }
        if !self.shown.contains_key(&key) {
            let mut session = self.fresh(kind, tokens.len());
            session.prefill(tokens).unwrap();
            self.shown.insert(key.clone(), shown(&session).unwrap());
        }
        &self.shown[&key]
    }

    /// The hidden state of the last of `tokens`, run by itself.
    pub fn state(&mut self, kind: Kind, tokens: &[u32]) -> &[f32] {
        let key = Self::key(kind, tokens);
        if !self.states.contains_key(&key) {
            let (last, before) = tokens.split_last().unwrap();
            let mut session = self.fresh(kind, tokens.len());
            session.prefill(before).unwrap();
            let mut state = vec![0.0; self.model.config().hidden_size];
            session.embed(&[*last], Pooling::Last, &mut state).unwrap();
            self.states.insert(key.clone(), state);
        }
        &self.states[&key]
    }

    /// The log-probability of each token of `tokens` from the `held`th on.
    pub fn scores(&mut self, kind: Kind, tokens: &[u32], held: usize) -> Vec<f64> {
        let score = |at: usize| {
            let logits = &self.after(kind, &tokens[..at]).logits;
            let logits: Vec<f64> = logits.iter().map(|bits| f64::from(f32::from_bits(*bits))).collect();
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            logits[tokens[at] as usize] - sum.ln()
        };
        (held..tokens.len()).map(score).collect()
    }

    /// What is drawn after `tokens`, before which `dropped` others were dropped.
    pub fn drawn(&mut self, kind: Kind, tokens: &[u32], dropped: u64, sampling: &Sampling, bias: &LogitBias) -> u32 {
        let draw = Draw { logits: &[], tokens, counter: dropped + tokens.len() as u64, bias, allowed: None };
        self.draw(kind, sampling, draw)
    }

    /// What is drawn under a grammar that allows `allowed`.
    pub fn drawn_of(&mut self, kind: Kind, tokens: &[u32], sampling: &Sampling, allowed: &[u32]) -> u32 {
        let bias = LogitBias::default();
        let draw = Draw { logits: &[], tokens, counter: tokens.len() as u64, bias: &bias, allowed: Some(allowed) };
        self.draw(kind, sampling, draw)
    }

    /// The draw, after its tokens' logits.
    fn draw(&mut self, kind: Kind, sampling: &Sampling, draw: Draw) -> u32 {
        let logits: Vec<f32> = self.after(kind, draw.tokens).logits.iter().map(|bits| f32::from_bits(*bits)).collect();
        self.sampler.draw(sampling, Draw { logits: &logits, ..draw }).unwrap()
    }
}
