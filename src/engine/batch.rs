//! Several sessions in one forward pass: each touched expert is read once for all of them.

use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use super::budget::Budget;
use super::forward::{Place, forward};
use super::model::Model;
use super::sequence::Wants;
use super::session::Session;
use crate::backend::gates::{AppliedGates, number_of};
use crate::backend::{Batch, Cancel, Limit, Pass, PassLimits, SequenceSlice};
use crate::error::{Error, Result, Status};
use crate::memory::{recycle, try_with_capacity};

/// What a batch is made for. Zeros take the defaults.
#[derive(Clone, Copy, Debug, Default)]
pub struct BatchOptions {
    /// Most sessions of one step; by default 16.
    pub max_sessions: usize,
    /// Most tokens of one forward pass, at least one for each session; by default 256.
    pub max_tokens: usize,
    /// Most tokens of one session in one pass: the longer, the sooner prompts are done, the longer the others wait for
    /// their next token meanwhile. By default 64.
    pub prefill_chunk: usize,
    /// Longest context of any of them; by default the model's max_position_embeddings, at most 8192.
    pub max_context: usize,
}

/// A workspace that steps sessions of one model together.
pub struct SessionBatch {
    model: Arc<Model>,
    limits: PassLimits,
    prefill_chunk: usize,
    pass: Box<dyn Pass>,
    flight: Option<Place>,
    /// The sessions of the pass in flight, in the order they were given.
    members: Vec<Member>,
    /// Spent on it so far.
    time: Duration,
    /// Tokens each session of a pass that is being planned gets.
    counts: Vec<usize>,
    /// An empty vector, kept for its memory.
    slices: Vec<SequenceSlice<'static>>,
    /// Passes planned: who is first where prompts share what is left.
    turn: usize,
    cancel: Arc<Cancel>,
}

/// Draws for the sessions whose tokens are all run, as far as the budget goes.
fn draw_ready(sessions: &mut [&mut Session], results: &mut [Poll<Result<u32>>], limit: &Limit) {
    for (session, result) in sessions.iter_mut().zip(results) {
        if result.is_pending() && session.unrun() == 0 && !limit.is_spent() {
            let drawn = session.draw();
            // A draw that fails does so again in the next step: the smallest budget must not be spent on it alone.
            if drawn.is_ok() {
                limit.note_work();
            }
            *result = Poll::Ready(drawn);
        }
    }
}

/// A session's part in a pass.
struct Member {
    stamp: (u64, u64, usize),
    count: usize,
    wants_logits: bool,
}

impl SessionBatch {
    /// Everything a step needs is reserved here.
    pub fn new(model: Arc<Model>, options: &BatchOptions) -> Result<Self> {
        let or = |value: usize, default: usize| if value == 0 { default } else { value };
        let max_sequences = or(options.max_sessions, 16);
        let longest = model.config().max_position_embeddings.min(super::options::DEFAULT_CONTEXT);
        let limits = PassLimits {
            max_tokens: or(options.max_tokens, max_sequences.max(256)),
            max_sequences,
            max_context: or(options.max_context, longest).min(model.config().max_position_embeddings),
            logit_rows: max_sequences,
        };
        if limits.max_tokens < max_sequences {
            let text = format!(
                "max_tokens is {}, expected at least one for each of {max_sequences} sessions",
                limits.max_tokens
            );
            return Err(Error::new(Status::InvalidArgument, text).at_key("max_tokens"));
        }
        Ok(SessionBatch {
            pass: model.backend().new_pass(limits)?,
            prefill_chunk: or(options.prefill_chunk, 64),
            model,
            limits,
            flight: None,
            members: try_with_capacity("a batch", max_sequences)?,
            time: Duration::ZERO,
            counts: try_with_capacity("a batch", max_sequences)?,
            slices: try_with_capacity("a batch", max_sequences)?,
            turn: 0,
            cancel: Arc::default(),
        })
    }

    /// The model whose sessions it steps.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Stops the step in progress, or the next one, from any thread.
    pub fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// Bytes of its workspace.
    pub fn bytes(&self) -> usize {
        self.pass.bytes()
    }

    /// Experts whose weights the last pass read, on average over the layers.
    pub fn touched_experts(&self) -> f64 {
        let layers = self.model.config().num_hidden_layers;
        (0..layers).map(|layer| self.pass.touched_experts(layer)).sum::<usize>() as f64 / layers as f64
    }

    /// Advances every session by at most one token, in at most one forward pass, each bit for bit as it would alone.
    ///
    /// `results[i]` is what came of session i: the token that was drawn; `Pending` if it needs another step first, its
    /// prompt not being done or the budget spent; or its own error (no tokens, a full context, cancelled), which does
    /// not touch the others. Sessions with one token to run come first, prompts share what room is left, so a long one
    /// starves nobody. Sessions may join and leave between steps. A pass that the budget stopped goes on with the next step
    /// if its sessions are all given again, in the same order; otherwise its work is begun anew.
    ///
    /// An error of the batch as a whole leaves every session as it was, with its tokens pending. So a cancel of the batch
    /// that comes when a session already has its token, or its error, stops this step, which answers, and fails the next.
    pub fn step(
        &mut self,
        sessions: &mut [&mut Session],
        budget: &Budget,
        results: &mut Vec<Poll<Result<u32>>>,
    ) -> Result<()> {
        let cancel = Arc::clone(&self.cancel);
        let limit = budget.begin(&cancel);
        self.check(sessions)?;
        if cancel.take() {
            return Err(Cancel::error());
        }
        let gates = self.model.gates();
        let number = number_of(gates.as_deref());
        results.clear();
        results.try_reserve(sessions.len()).map_err(|_| Error::out_of_memory("results", sessions.len()))?;
        for session in sessions.iter_mut() {
            let cancelled = session.cancel().take();
            let ready = match cancelled {
                true => Err(Cancel::error()),
                false => session.meet(number).and_then(|()| session.prepare_step()),
            };
            results.push(ready.map_or_else(|error| Poll::Ready(Err(error)), |()| Poll::Pending));
        }
        // Whoever waits only for a draw, since the last step's budget was spent, does not wait for others' prompts.
        draw_ready(sessions, results, &limit);
        if limit.is_spent() {
            return Ok(());
        }
        let place = match self.flight.take() {
            // A session that was not let in above may still be as it was under other gates.
            Some(place) if place.is_under(number) && self.can_go_on(sessions) => place,
            _ => {
                self.plan(sessions, results);
                Place::default()
            }
        };
        if !self.members.is_empty() {
            match self.run(place, sessions, gates.as_deref(), &limit) {
                Ok(Poll::Ready(())) => {}
                Ok(Poll::Pending) => return Ok(()),
                // What sessions have been told, a token among it, must not be lost: the next step answers the cancel.
                Err(error) if error.status() == Status::Cancelled && results.iter().any(Poll::is_ready) => {
                    return Ok(());
                }
                Err(error) => {
                    if error.status() == Status::Cancelled {
                        cancel.take();
                    }
                    return Err(error);
                }
            }
        }
        draw_ready(sessions, results, &limit);
        Ok(())
    }

    /// Whether the members of the pass in flight are all here, in order and unchanged.
    fn can_go_on(&self, sessions: &[&mut Session]) -> bool {
        let mut members = self.members.iter();
        let mut next = members.next();
        for session in sessions {
            if let Some(member) = next
                && member.stamp == session.stamp()
                && member.count <= session.unrun()
            {
                next = members.next();
            }
        }
        next.is_none()
    }

    /// Chooses the tokens of the next pass.
    fn plan(&mut self, sessions: &[&mut Session], results: &[Poll<Result<u32>>]) {
        let wanted = |index: usize| if results[index].is_pending() { sessions[index].unrun() } else { 0 };
        self.counts.clear();
        self.counts.extend((0..sessions.len()).map(|index| wanted(index).min(1)));
        let mut prompts = (0..sessions.len()).filter(|index| wanted(*index) > 1).count();
        let mut left = self.limits.max_tokens - self.counts.iter().sum::<usize>();
        for offset in 0..sessions.len() {
            let index = (self.turn + offset) % sessions.len();
            if wanted(index) > 1 {
                let more = (wanted(index) - 1).min(self.prefill_chunk.saturating_sub(1)).min(left / prompts);
                self.counts[index] += more;
                left -= more;
                prompts -= 1;
            }
        }
        self.turn = self.turn.wrapping_add(1);
        self.time = Duration::ZERO;
        self.members.clear();
        let running = sessions.iter().zip(&self.counts).filter(|(_, count)| **count > 0);
        self.members.extend(running.map(|(session, count)| Member {
            stamp: session.stamp(),
            count: *count,
            wants_logits: *count == session.unrun(),
        }));
    }

    /// Runs the pass of the members on from `place`, and hands its results to them when it is done.
    fn run(
        &mut self,
        mut place: Place,
        sessions: &mut [&mut Session],
        gates: Option<&AppliedGates>,
        limit: &Limit,
    ) -> Result<Poll<()>> {
        let started = Instant::now();
        let mut slices = recycle(std::mem::take(&mut self.slices));
        let mut members = self.members.iter().peekable();
        for session in sessions.iter_mut() {
            if let Some(member) = members.next_if(|member| member.stamp == session.stamp()) {
                slices.push(session.slice(member.count, Wants { logits: member.wants_logits, targets: &[] }));
            }
        }
        let layers = self.model.config().num_hidden_layers;
        let result = forward(&mut *self.pass, &mut place, layers, &mut Batch { sequences: &mut slices, gates }, limit);
        self.slices = recycle(slices);
        self.time += started.elapsed();
        match result {
            Poll::Pending => {
                self.flight = Some(place);
                return Ok(Poll::Pending);
            }
            Poll::Ready(Err(error)) => {
                // It can go on; the wish is the caller's to take.
                if error.status() == Status::Cancelled {
                    self.flight = Some(place);
                }
                return Err(error);
            }
            Poll::Ready(Ok(())) => {}
        }
        let mut members = self.members.iter().enumerate().peekable();
        let mut first = 0;
        for session in sessions.iter_mut() {
            if let Some((index, member)) = members.next_if(|(_, member)| member.stamp == session.stamp()) {
                session.finish(&*self.pass, index, member.count, first, self.time);
                first += member.count;
            }
        }
        Ok(Poll::Ready(()))
    }

    /// An error if it was made for fewer sessions.
    pub fn check_count(&self, sessions: usize) -> Result<()> {
        if sessions > self.limits.max_sequences {
            let text = format!("{sessions} sessions in a batch made for {}", self.limits.max_sequences);
            return Err(Error::new(Status::InvalidArgument, text).at_key("sessions"));
        }
        Ok(())
    }

    fn check(&self, sessions: &[&mut Session]) -> Result<()> {
        self.check_count(sessions.len())?;
        for (index, session) in sessions.iter().enumerate() {
            if !Arc::ptr_eq(session.model(), &self.model) {
                let text = format!("session {index} is of another model than the batch");
                return Err(Error::new(Status::InvalidArgument, text).at_key("sessions"));
            }
            if session.context_size() > self.limits.max_context {
                let longest = self.limits.max_context;
                let text =
                    format!("session {index} holds up to {} tokens, the batch {longest}", session.context_size());
                return Err(Error::new(Status::InvalidArgument, text).at_key("context_size"));
            }
        }
        Ok(())
    }
}
