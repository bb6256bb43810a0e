//! A sequence with a workspace of its own: what a host steps.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::{Duration, Instant};

use super::budget::Budget;
use super::forward::{Place, forward};
use super::model::Model;
use super::options::{SCORE_ROWS, SessionOptions};
use super::sequence::{Sequence, Wants};
use crate::backend::gates::AppliedGates;
use crate::backend::{Batch, Cancel, Limit, Pass, PassLimits};
use crate::error::{Error, Result, Status};

/// A sequence being generated. Everything but running it goes through to its [`Sequence`].
///
/// Not to be used by two threads at once; its `cancel` is the exception. A cancel that comes while no call is running
/// stops the next one.
pub struct Session {
    pub(super) sequence: Sequence,
    /// None for a session that runs only in batches.
    pub(super) pass: Option<Box<dyn Pass>>,
    pub(super) flight: Option<Flight>,
    cancel: Arc<Cancel>,
}

/// A forward pass over the next pending tokens that was begun and not finished.
pub struct Flight {
    place: Place,
    /// The sequence's, when it began.
    stamp: (u64, u64, usize),
    count: usize,
    /// Whether it ends at the last token held when it began.
    wants_logits: bool,
    /// Spent so far.
    time: Duration,
}

impl Deref for Session {
    type Target = Sequence;
    fn deref(&self) -> &Sequence {
        &self.sequence
    }
}

impl DerefMut for Session {
    fn deref_mut(&mut self) -> &mut Sequence {
        &mut self.sequence
    }
}

impl Session {
    /// A session without tokens. All memory it will ever need is reserved here.
    pub fn new(model: Arc<Model>, options: &SessionOptions) -> Result<Session> {
        let options = options.resolve(model.config(), model.backend().default_kv_dtype())?;
        let pass = new_pass(&model, &options)?;
        Ok(Session::from_parts(Sequence::new(model, options)?, pass))
    }

    pub(super) fn from_parts(sequence: Sequence, pass: Option<Box<dyn Pass>>) -> Session {
        Session { sequence, pass, flight: None, cancel: Arc::default() }
    }

    /// A second session that holds the same tokens and goes on from the same state, bit for bit.
    ///
    /// The keys and values of full pages are shared until one of the two rewinds into them. It draws the same tokens
    /// unless it is given another seed. Fails with `OutOfMemory` or `KvLimit`.
    pub fn fork(&self) -> Result<Session> {
        let pass = new_pass(self.model(), self.options())?;
        Ok(Session::from_parts(self.sequence.fork()?, pass))
    }

    /// Bytes of its own: keys and values, workspace, and logits that are on a device.
    pub fn bytes(&self) -> usize {
        self.sequence.kv_bytes()
            + self.sequence.logits.device_bytes()
            + self.pass.as_ref().map_or(0, |pass| pass.bytes())
    }

    /// Stops the call in progress, from any thread.
    pub fn cancel(&self) -> &Arc<Cancel> {
        &self.cancel
    }

    /// Appends tokens and runs them, so that the logits after the last are ready.
    ///
    /// On `Cancelled` the session keeps the tokens that were run; the others are as if never given.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        finished(self.prefill_within(tokens, &Budget::UNLIMITED))
    }

    /// As `prefill`, as far as the budget goes. After `Pending` the session holds the tokens, those not run yet pending:
    /// call again without tokens to go on, or `step_within`.
    ///
    /// A cancel takes back only tokens of the call it stops.
    pub fn prefill_within(&mut self, tokens: &[u32], budget: &Budget) -> Poll<Result<()>> {
        let cancel = Arc::clone(&self.cancel);
        let limit = budget.begin(&cancel);
        self.check_workspace()?;
        let gates = self.sequence.meet_model_gates()?;
        let held = self.sequence.push_after(tokens)?;
        let result = self.run_pending(gates.as_deref(), &limit);
        if let Poll::Ready(Err(_)) = result {
            self.sequence.drop_pending(held)?;
        }
        result
    }

    /// Runs what is pending and draws the next token, which is appended and returned.
    pub fn step(&mut self) -> Result<u32> {
        finished(self.step_within(&Budget::UNLIMITED))
    }

    /// As `step`, as far as the budget goes. After `Pending` nothing was drawn; the next call goes on where this one
    /// stopped, inside a matrix if need be, and gives the same token.
    pub fn step_within(&mut self, budget: &Budget) -> Poll<Result<u32>> {
        let cancel = Arc::clone(&self.cancel);
        let limit = budget.begin(&cancel);
        self.check_workspace()?;
        let gates = self.sequence.meet_model_gates()?;
        self.sequence.prepare_step()?;
        ready!(self.run_pending(gates.as_deref(), &limit))?;
        if limit.is_spent() {
            return Poll::Pending;
        }
        if self.sequence.prepare_draw()? {
            limit.note_work();
            if limit.is_spent() {
                return Poll::Pending;
            }
        }
        Poll::Ready(self.sequence.draw())
    }

    pub(super) fn check_workspace(&self) -> Result<()> {
        match self.pass {
            Some(_) => Ok(()),
            None => {
                let text = "this session was made for batches only: step it in one";
                Err(Error::new(Status::InvalidArgument, text).at_key("batch_only"))
            }
        }
    }

    fn run_pending(&mut self, gates: Option<&AppliedGates>, limit: &Limit) -> Poll<Result<()>> {
        if self.cancel.take() {
            return Poll::Ready(Err(Cancel::error()));
        }
        let most = self.options().prefill_chunk;
        while self.sequence.unrun() > 0 {
            let resumed = self.flight.take_if(|flight| flight.can_go_on(&self.sequence));
            let mut flight = resumed.unwrap_or_else(|| Flight::new(&self.sequence, most));
            let result = self.fly(&mut flight, &[], gates, limit);
            match &result {
                Poll::Ready(Ok(())) => {}
                Poll::Pending => {
                    self.flight = Some(flight);
                    return result;
                }
                Poll::Ready(Err(error)) => {
                    if error.status() == Status::Cancelled {
                        self.cancel.take();
                        self.flight = Some(flight);
                    }
                    return result;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Runs a pass on, and takes its results over when it is done.
    pub(super) fn fly(
        &mut self,
        flight: &mut Flight,
        targets: &[u32],
        gates: Option<&AppliedGates>,
        limit: &Limit,
    ) -> Poll<Result<()>> {
        let Some(pass) = &mut self.pass else { return Poll::Ready(self.check_workspace()) };
        let layers = self.sequence.model().config().num_hidden_layers;
        let started = Instant::now();
        let wants = Wants { logits: flight.wants_logits, targets };
        let mut slices = [self.sequence.slice(flight.count, wants)];
        let result =
            forward(&mut **pass, &mut flight.place, layers, &mut Batch { sequences: &mut slices, gates }, limit);
        flight.time += started.elapsed();
        ready!(result)?;
        self.sequence.finish(&**pass, 0, flight.count, 0, flight.time);
        Poll::Ready(Ok(()))
    }
}

impl Flight {
    /// A pass over the next pending tokens, at most `most`.
    pub(super) fn new(sequence: &Sequence, most: usize) -> Flight {
        let count = sequence.unrun().min(most);
        let wants_logits = count == sequence.unrun();
        Flight { place: Place::default(), stamp: sequence.stamp(), count, wants_logits, time: Duration::ZERO }
    }

    /// Tokens of the pass.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    fn can_go_on(&self, sequence: &Sequence) -> bool {
        self.stamp == sequence.stamp() && self.count <= sequence.unrun()
    }
}

/// The workspace these options ask for.
pub(super) fn new_pass(model: &Model, options: &SessionOptions) -> Result<Option<Box<dyn Pass>>> {
    (!options.batch_only).then(|| model.backend().new_pass(pass_limits(options))).transpose()
}

/// What a session's workspace is sized for.
pub(super) fn pass_limits(options: &SessionOptions) -> PassLimits {
    PassLimits {
        max_tokens: options.prefill_chunk,
        max_sequences: 1,
        max_context: options.context_size,
        logit_rows: SCORE_ROWS.min(options.prefill_chunk),
    }
}

/// The result of work without a budget.
pub(super) fn finished<T>(result: Poll<Result<T>>) -> Result<T> {
    match result {
        Poll::Ready(result) => result,
        Poll::Pending => Err(Error::new(Status::Internal, "work without a budget was left unfinished")),
    }
}
