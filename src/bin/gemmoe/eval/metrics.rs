//! The metrics that training writes, one JSON object for each step.

use std::collections::BTreeMap;
use std::path::Path;

use gemmoe::{Error, Result, Status};
use serde::Deserialize;

use crate::files;

/// What a step came to, and what the held-out data did after it. What a training does not have is not there.
#[derive(Clone, Debug, Default)]
pub struct Step {
    pub step: u64,
    pub own: Numbers,
    pub held_out: Option<Numbers>,
}

/// A line of the file.
#[derive(Deserialize)]
struct Line {
    step: u64,
    #[serde(flatten)]
    own: Numbers,
    held_out: Option<Numbers>,
}

/// Of a step, or of held-out data.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Numbers {
    pub loss: Option<f64>,
    pub text_loss: Option<f64>,
    pub balance: Option<f64>,
    pub gradient_norm: Option<f64>,
    pub learning_rate: Option<f64>,
    /// Of pairs.
    pub accuracy: Option<f64>,
    /// `[layers, experts]`: shares of all choices.
    #[serde(default)]
    pub shares: Vec<Vec<f64>>,
}

impl Numbers {
    /// The text's loss, or where it is not told apart all of it.
    pub fn text_loss(&self) -> Option<f64> {
        self.text_loss.or(self.loss)
    }

    /// The mean over the layers, by expert.
    pub fn mean_shares(&self) -> Vec<f64> {
        let experts = self.shares.first().map_or(0, Vec::len);
        let mean = |expert: usize| {
            let sum: f64 = self.shares.iter().filter_map(|layer| layer.get(expert)).sum();
            sum / self.shares.len() as f64
        };
        (0..experts).map(mean).collect()
    }
}

/// Reads a file of metrics, by step: where training went on from a checkpoint, what it did last counts.
///
/// A last line that was cut off, as a killed training leaves it, is left out.
pub fn read(path: &Path) -> Result<Vec<Step>> {
    let text = files::read(path)?;
    let mut steps: BTreeMap<u64, Step> = BTreeMap::new();
    for (index, line) in text.split_inclusive('\n').enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let Line { step, own, held_out } = match serde_json::from_str(line) {
            Ok(line) => line,
            Err(error) if error.is_eof() && !line.ends_with('\n') => continue,
            Err(error) => {
                let text = format!("line {} is not the metrics of a step: {error}", index + 1);
                return Err(fault(path, text));
            }
        };
        // An evaluation is a line of its own, after that of its step.
        let is_step = own.loss.is_some();
        let _undone = steps.split_off(&(step + u64::from(!is_step)));
        let found = steps.entry(step).or_insert(Step { step, ..Step::default() });
        if is_step {
            found.own = own;
        }
        found.held_out = held_out.or(found.held_out.take());
    }
    match steps.is_empty() {
        false => Ok(steps.into_values().collect()),
        true => Err(fault(path, "there are no steps in it: give the metrics file that train-router wrote".to_owned())),
    }
}

fn fault(path: &Path, text: String) -> Error {
    Error::new(Status::DataRow, text).in_file(path.display().to_string())
}
