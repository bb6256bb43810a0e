//! How much of the host's time one call may take.

use std::time::{Duration, Instant};

use crate::backend::{Cancel, Limit};

/// What one call may use up before it answers that there is more to do. The default is no limit.
///
/// Every call does at least one piece of work, so that the smallest budget gets on. Results do not depend on budgets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Budget {
    /// Time from the beginning of the call.
    pub time: Option<Duration>,
    /// Layers, the head counted as one.
    pub layers: Option<usize>,
}

impl Budget {
    /// No limit.
    pub const UNLIMITED: Budget = Budget { time: None, layers: None };

    /// A budget of time alone.
    pub fn of_time(time: Duration) -> Self {
        Budget { time: Some(time), layers: None }
    }

    /// A budget of layers alone.
    pub fn of_layers(layers: usize) -> Self {
        Budget { time: None, layers: Some(layers) }
    }

    /// The limit of a call that begins now.
    pub fn begin<'a>(&self, cancel: &'a Cancel) -> Limit<'a> {
        // A time past the end of the clock is no limit.
        let deadline = self.time.and_then(|time| Instant::now().checked_add(time));
        Limit::new(cancel, deadline, self.layers)
    }
}
