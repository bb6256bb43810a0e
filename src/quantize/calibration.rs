//! How much each column of each matrix matters, told from a text.

use std::sync::Arc;

use crate::backend::observer::{Input, Observer};
use crate::engine::score::score_in_windows;
use crate::engine::{Model, SessionOptions};
use crate::error::{Error, Result, Status};
use crate::model::Config;

/// Longest window of a calibration text, in tokens.
const WINDOW: usize = 2048;

/// What a text says of a column is weighed against this many rows in which all columns are alike: an expert that saw a few
/// tokens, or a column that was 0 in all of them, says little of other texts.
const PRIOR_ROWS: f32 = 64.0;

/// For every matrix the mean square of what each of its columns is multiplied with: an error of a weight adds as much to the
/// squared error of the output.
pub struct Importance {
    observer: Observer,
}

impl Importance {
    /// Runs texts through a model, each as tokens that begin with BOS, and collects. `see` is told after each part how many
    /// tokens it had. Fails as `Session::score` does, and with `InvalidArgument` without texts.
    pub fn collect(model: &Arc<Model>, texts: &[Vec<u32>], see: &mut dyn FnMut(usize)) -> Result<Importance> {
        if texts.is_empty() {
            return Err(Error::new(Status::InvalidArgument, "no calibration texts").at_key("texts"));
        }
        let observer = model.backend().observe()?;
        for tokens in texts {
            let context_size = tokens.len().clamp(2, WINDOW).min(model.config().max_position_embeddings);
            let options = SessionOptions { context_size, ..Default::default() };
            score_in_windows(model, tokens, &options, &mut |scores| see(scores.len()))?;
        }
        Ok(Importance { observer: observer.copied()? })
    }

    /// Fails with `InvalidArgument` unless a model of `config` has the matrices of the one it was collected from.
    pub(super) fn check(&self, config: &Config) -> Result<()> {
        self.observer.check(config)
    }

    /// `[columns]`, all above 0; none where the text did not come by.
    pub(super) fn of(&self, input: Input) -> Option<Vec<f32>> {
        let (rows, mut columns) = self.observer.mean_squares(input)?;
        let seen = rows as f32 / (rows as f32 + PRIOR_ROWS);
        columns.iter_mut().for_each(|column| *column = seen * *column + (1.0 - seen));
        Some(columns)
    }
}
