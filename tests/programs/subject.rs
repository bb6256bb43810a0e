//! A session, and what it is to be.

use std::sync::Arc;

use gemmoe::backend::KvDtype;
use gemmoe::engine::experts::RouteArrays;
use gemmoe::{LogitBias, Model, Overflow, Sampling, Session, SessionOptions, Status};

use crate::common::Random;
use crate::oracle::{CONTROLS, Kind, Oracle, bits, set_control, shown};
use crate::{LONGEST, VOCAB_SIZE};

pub struct Subject {
    pub session: Session,
    pub context_size: usize,
    /// First tokens that a full window keeps, if it slides.
    pub keep: Option<usize>,
    pub kind: Kind,
    pub batch_only: bool,
    pub route_capacity: usize,
    pub tokens: Vec<u32>,
    /// Tokens dropped before the last ones.
    pub dropped: u64,
    /// How many tokens its logits come after, while it has some.
    pub shows: Option<usize>,
    pub sampling: Sampling,
    pub bias: LogitBias,
    /// A cancel was asked for while no call ran.
    pub cancelled: bool,
}

impl Subject {
    pub fn random(model: &Arc<Model>, random: &mut Random) -> Subject {
        let context_size = [1, 2, 15, 16, 17, 33, LONGEST][random.below(7)];
        let keep = (context_size > 1 && random.below(2) == 0).then(|| random.below(context_size - 1));
        let kind = Kind { kv_dtype: KvDtype::ALL[random.below(4)], control: 0 };
        let options = SessionOptions {
            context_size,
            prefill_chunk: 1 + random.below(9),
            kv_dtype: Some(kind.kv_dtype),
            overflow: keep.map_or(Overflow::Fail, |keep| Overflow::Slide { keep }),
            route_capacity: [0, 3, 64][random.below(3)],
            ..Default::default()
        };
        let mut subject = Subject {
            session: Session::new(Arc::clone(model), &options).unwrap(),
            context_size,
            keep,
            kind,
            batch_only: false,
            route_capacity: options.route_capacity,
            tokens: Vec::new(),
            dropped: 0,
            shows: None,
            sampling: Sampling::default(),
            bias: LogitBias::default(),
            cancelled: false,
        };
        if random.below(3) == 0 {
            subject.change_control(random.below(CONTROLS) as u8);
        }
        subject
    }

    pub fn change_control(&mut self, control: u8) {
        if self.kind.control != 0 {
            set_control(&mut self.session, 0);
        }
        set_control(&mut self.session, control);
        self.kind.control = control;
    }

    /// A subject in the same state, around another session.
    pub fn with(&self, session: Session) -> Subject {
        let (tokens, bias) = (self.tokens.clone(), self.bias.clone());
        Subject { session, tokens, bias, cancelled: false, ..*self }
    }

    /// What `push` says before anything changes.
    pub fn push_refusal(&self, tokens: &[u32]) -> Option<Status> {
        if self.keep.is_none() && tokens.len() > self.context_size - self.tokens.len() {
            return Some(Status::ContextFull);
        }
        let is_strange = |token: &u32| *token as usize >= VOCAB_SIZE;
        tokens.iter().any(is_strange).then_some(Status::TokenOutOfRange)
    }

    /// What a call says that needs a workspace.
    pub fn workspace_refusal(&self) -> Option<Status> {
        self.batch_only.then_some(Status::InvalidArgument)
    }

    pub fn step_refusal(&self) -> Option<Status> {
        match self.tokens.len() {
            0 => Some(Status::NoLogits),
            full if full == self.context_size && self.keep.is_none() => Some(Status::ContextFull),
            _ => None,
        }
    }

    /// Appends tokens; answers how many of those before are left.
    pub fn append(&mut self, tokens: &[u32]) -> usize {
        let held = self.tokens.len();
        let mut all = std::mem::take(&mut self.tokens);
        all.extend_from_slice(tokens);
        if !tokens.is_empty() {
            self.shows = None;
        }
        self.tokens = all;
        if self.tokens.len() > self.context_size { self.slide(held) } else { held }
    }

    /// Slides if a step has to.
    pub fn make_room(&mut self) {
        if self.tokens.len() == self.context_size && self.keep.is_some() {
            self.slide(self.tokens.len());
        }
    }

    /// Of all tokens, keeps the first and half a window of the last; answers how many of the first `held` are left.
    fn slide(&mut self, held: usize) -> usize {
        let keep = self.keep.unwrap();
        let end = self.tokens.len() - ((self.context_size - keep) / 2).max(1);
        self.tokens.drain(keep..end);
        self.dropped += (end - keep) as u64;
        self.shows = None;
        held.min(keep) + held.saturating_sub(end)
    }

    /// Keeps the first `count` tokens, of more.
    pub fn truncate(&mut self, count: usize) {
        if count < self.tokens.len() {
            self.tokens.truncate(count);
            self.shows = None;
            if self.keep.is_some_and(|keep| count <= keep) {
                self.dropped = 0;
            }
        }
    }

    /// What a call that ran as far as it came has changed.
    pub fn ran(&mut self) {
        if self.session.pending() == 0 && !self.tokens.is_empty() {
            self.shows = Some(self.tokens.len());
        }
    }

    pub fn drew(&mut self, token: u32, oracle: &mut Oracle) {
        let expected = oracle.drawn(self.kind, &self.tokens, self.dropped, &self.sampling, &self.bias);
        assert_eq!(token, expected, "a draw after {:?}", self.tokens);
        self.shows = Some(self.tokens.len());
        self.tokens.push(token);
    }

    pub fn check(&mut self, oracle: &mut Oracle, random: &mut Random) {
        assert_eq!(self.session.tokens(), self.tokens);
        assert_eq!(self.session.dropped(), self.dropped);
        assert!(self.session.pending() <= self.tokens.len());
        let expected = self.shows.map(|count| oracle.after(self.kind, &self.tokens[..count]));
        assert_eq!(shown(&self.session).as_ref(), expected, "{:?} of {:?}", self.shows, self.tokens);
        if self.session.pending() == 0 && !self.tokens.is_empty() {
            assert_eq!(self.shows, Some(self.tokens.len()), "nothing is pending, so there are logits");
        }
        self.check_routes(oracle, random);
    }

    /// Fetches the routes of tokens run since the last check, which are held still, and looks at some of them.
    fn check_routes(&mut self, oracle: &mut Oracle, random: &mut Random) {
        let config = self.session.model().config();
        let (layers, top_k) = (config.num_hidden_layers, config.num_experts_per_tok);
        let row = layers * top_k;
        let (mut positions, mut tokens) = ([0; 64], [0; 64]);
        let (mut experts, mut weights) = (vec![0; 64 * row], vec![0.0; 64 * row]);
        let mut arrays = RouteArrays {
            positions: &mut positions,
            tokens: &mut tokens,
            experts: &mut experts,
            weights: &mut weights,
        };
        let (count, lost) = self.session.fetch_routes(&mut arrays);
        assert!(count <= self.route_capacity && (lost == 0 || count == self.route_capacity));
        let Some(last) = count.checked_sub(1) else { return };
        let run = self.tokens.len() - self.session.pending();
        let indices: Vec<usize> = positions[..count].iter().map(|position| self.index_of(*position)).collect();
        // Of a token that others were to follow, and did not, the logits are wanted: it is pending again.
        assert!(indices[last] + 1 == run || indices[last] == run, "{indices:?}, {run} run");
        assert!(indices.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{indices:?}");
        let at = random.below(count);
        let index = indices[at];
        assert_eq!(tokens[at], self.tokens[index]);
        let expected = oracle.after(self.kind, &self.tokens[..index + 1]);
        assert_eq!(experts[at * row..(at + 1) * row], expected.experts.concat(), "token {index} of {:?}", self.tokens);
        assert_eq!(bits(&weights[at * row..(at + 1) * row]), expected.weights.concat());
    }

    /// Where the token at a position since the beginning is held. What was dropped came after those the window keeps.
    fn index_of(&self, position: u64) -> usize {
        match self.keep {
            Some(keep) if position >= keep as u64 => (position - self.dropped) as usize,
            _ => position as usize,
        }
    }
}
