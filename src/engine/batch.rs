//! Several sessions in one forward pass: each touched expert is read once for all of them.

use std::sync::Arc;

use super::forward::forward;
use super::model::Model;
use super::session::Session;
use crate::backend::{Batch, Cancel, Pass, PassLimits};
use crate::error::{Error, Result, Status};

/// A workspace that steps sessions of one model together.
pub struct SessionBatch {
    model: Arc<Model>,
    limits: PassLimits,
    pass: Box<dyn Pass>,
}

impl SessionBatch {
    /// For at most `max_sessions` sessions of at most `max_context` tokens, `max_tokens` of them in one pass.
    pub fn new(model: Arc<Model>, max_sessions: usize, max_tokens: usize, max_context: usize) -> Result<Self> {
        if max_sessions == 0 || max_tokens < max_sessions {
            let text = format!("max_tokens is {max_tokens}, expected at least one for each of {max_sessions} sessions");
            return Err(Error::new(Status::InvalidArgument, text).at_key("max_tokens"));
        }
        let limits = PassLimits { max_tokens, max_sequences: max_sessions, max_context };
        Ok(SessionBatch { pass: model.backend().new_pass(limits)?, model, limits })
    }

    /// Runs what is pending in every session, then draws one token in each, bit for bit as each alone would.
    ///
    /// An error of the batch as a whole leaves every session as it was, with its tokens pending. Sessions' own errors
    /// (no tokens, a full context) come in their places and do not touch the others.
    pub fn step(&mut self, sessions: &mut [&mut Session], cancel: &Cancel) -> Result<Vec<Result<u32>>> {
        self.check(sessions)?;
        let ready: Vec<Result<()>> = sessions.iter().map(|session| session.check_step()).collect();
        loop {
            let waiting = sessions.iter().zip(&ready).filter(|(s, ready)| ready.is_ok() && s.pending() > 0).count();
            if waiting == 0 {
                break;
            }
            self.run(sessions, &ready, self.limits.max_tokens / waiting, cancel)?;
        }
        let draw =
            |(session, ready): (&mut &mut Session, Result<()>)| ready.and_then(|()| session.sequence_mut().draw());
        Ok(sessions.iter_mut().zip(ready).map(draw).collect())
    }

    /// One pass over up to `share` pending tokens of each session.
    fn run(
        &mut self,
        sessions: &mut [&mut Session],
        ready: &[Result<()>],
        share: usize,
        cancel: &Cancel,
    ) -> Result<()> {
        let counts: Vec<usize> =
            sessions.iter().zip(ready).map(|(s, r)| if r.is_ok() { s.pending().min(share) } else { 0 }).collect();
        let running = |(_, count): &(&mut &mut Session, &usize)| **count > 0;
        let mut slices: Vec<_> = sessions
            .iter_mut()
            .zip(&counts)
            .filter(running)
            .map(|(session, count)| session.sequence_mut().slice(*count))
            .collect();
        let layers = self.model.config().num_hidden_layers;
        forward(&mut *self.pass, layers, &mut Batch { sequences: &mut slices, cancel })?;
        let mut tokens = 0;
        for (index, (session, count)) in sessions.iter_mut().zip(&counts).filter(running).enumerate() {
            tokens += count;
            session.sequence_mut().finish(&*self.pass, index, *count, tokens - 1);
        }
        Ok(())
    }

    fn check(&self, sessions: &[&mut Session]) -> Result<()> {
        if sessions.len() > self.limits.max_sequences {
            let text = format!("{} sessions in a batch made for {}", sessions.len(), self.limits.max_sequences);
            return Err(Error::new(Status::InvalidArgument, text).at_key("sessions"));
        }
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
