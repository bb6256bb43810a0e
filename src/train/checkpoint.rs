//! Where a run stands, as a file: the trainer's state, with the rows that were taken, the fingerprint of the data, and the course
//! in its header, which is every value of the recipe that decides what the gates become. A run of another course would go on
//! without an error and end elsewhere, so it is refused, with the key that differs.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::adamw::Decay;
use super::data::DataSet;
use super::recipe::{Objective, TrainRecipe};
use super::run::CourseGates;
use super::state::{damaged, name_of, write_file};
use super::trainer::{RouterTrainer, TrainOptions};
use crate::error::{Error, Result, Status};

/// Of what a run adds.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct RunHeader {
    version: u32,
    /// Rows that were taken, through all epochs.
    rows: u64,
    course: Course,
}

/// What decides where a run goes: keys of the recipe and their values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Course {
    /// Rows of the data, and the fingerprint of all, in hexadecimal.
    data: (u64, String),
    /// Key and value.
    values: Vec<(String, String)>,
}

impl Course {
    /// The course of a recipe, with the options that its data's length has filled in.
    pub fn new(recipe: &TrainRecipe, options: &TrainOptions, set: &DataSet, gates: CourseGates) -> Course {
        let (optimiser, router, preference) = (&options.optimiser, &options.router, &options.preference);
        let schedule = match optimiser.decay {
            Decay::Constant => "constant".to_owned(),
            Decay::Cosine { total_steps, final_share } => format!("cosine to {final_share} at step {total_steps}"),
        };
        let mut values = vec![
            ("objective".to_owned(), recipe.objective.name().to_owned()),
            ("router".to_owned(), format!("{:016x}", gates.start)),
        ];
        let mut add = |key: &str, value: String| values.push((key.to_owned(), value));
        add("data.max_tokens", options.max_tokens.to_string());
        add("data.long_rows", recipe.data.long_rows.name().to_owned());
        add("data.bad_rows", recipe.data.bad_rows.name().to_owned());
        add("data.learn_prompts", recipe.data.learn_prompts.to_string());
        add("data.seed", options.seed.to_string());
        add("train.rows_per_step", recipe.rows_per_step.to_string());
        add("train.learning_rate", optimiser.learning_rate.to_string());
        add("train.warmup_steps", optimiser.warmup_steps.to_string());
        add("train.schedule", schedule);
        add("train.betas", format!("[{}, {}]", optimiser.betas.0, optimiser.betas.1));
        add("train.epsilon", optimiser.epsilon.to_string());
        add("train.weight_decay", optimiser.weight_decay.to_string());
        add("train.clip", optimiser.clip.to_string());
        add("train.noise", options.noise.to_string());
        add("train.soft", options.soft.to_string());
        add("train.balance", router.balance.to_string());
        add("train.balance_form", router.form.name().to_owned());
        add("train.z_loss", router.z.to_string());
        if recipe.objective == Objective::Dpo {
            add("dpo.reference", format!("{:016x}", gates.reference));
            add("dpo.loss", preference.loss.name().to_owned());
            add("dpo.beta", preference.beta.to_string());
            add("dpo.label_smoothing", preference.label_smoothing.to_string());
            add("dpo.mean", preference.mean_log_probability.to_string());
        }
        Course { data: (set.len() as u64, format!("{:016x}", set.fingerprint())), values }
    }

    /// Writes a trainer's state and the run's to a file.
    pub fn save(&self, trainer: &RouterTrainer, rows: u64, path: &Path) -> Result<()> {
        let header = RunHeader { version: VERSION, rows, course: self.clone() };
        let header = serde_json::to_value(&header)
            .map_err(|error| Error::new(Status::Internal, format!("a checkpoint has no header: {error}")))?;
        write_file(path, &trainer.state_with(Some(header))?)
    }

    /// Puts a file's state into a trainer, where it is of this course.
    pub fn resume(
        &self,
        trainer: &mut RouterTrainer,
        total_steps: u64,
        rows_until: impl Fn(u64) -> u64,
        path: &Path,
    ) -> Result<()> {
        let bytes = trainer.read_file(path)?;
        let mut resume = || {
            // The model first: all gates of another one differ.
            let (steps, run) = trainer.run_of_state(&bytes)?;
            let run = run.ok_or_else(|| damaged("this is a training state, but no checkpoint of a run".to_owned()))?;
            let version = run.get("version").and_then(serde_json::Value::as_u64);
            if version != Some(u64::from(VERSION)) {
                let text = format!("the checkpoint is of version {}, expected {VERSION}", version.unwrap_or(0));
                return Err(Error::new(Status::SnapshotVersion, text));
            }
            let run: RunHeader = serde_json::from_value(run)
                .map_err(|error| damaged(format!("the header of a checkpoint cannot be read: {error}")))?;
            self.check(&run.course)?;
            if steps > total_steps {
                let text = format!(
                    "the checkpoint is at step {steps}, and the recipe ends at step {total_steps} (\"train.steps\" or \
                     \"train.epochs\")"
                );
                return Err(Error::new(Status::RecipeValue, text).at_key("train.steps"));
            }
            if run.rows != rows_until(steps) {
                let (rows, expected) = (run.rows, rows_until(steps));
                // The last step of all epochs takes what is left.
                let text = format!(
                    "the checkpoint has taken {rows} rows in {steps} steps, where a run of this length takes {expected}: it \
                     cannot be made longer, begin anew"
                );
                return Err(Error::new(Status::RecipeValue, text).at_key("train.epochs"));
            }
            trainer.set_state(&bytes)
        };
        resume().map_err(|error| error.in_file(name_of(path)))
    }

    /// Fails where another course is not this one.
    fn check(&self, begun: &Course) -> Result<()> {
        // The objective first: the data of another one is never the same.
        let value = |course: &Course, key: &str| {
            let found = course.values.iter().find(|(known, _)| known == key);
            found.map(|(_, value)| value.clone())
        };
        let keys = self.values.iter().chain(&begun.values).map(|(key, _)| key);
        let differs = |key: &&String| value(self, key) != value(begun, key);
        let different: Vec<&String> = keys.filter(differs).collect();
        if let Some(key) = different.first().filter(|key| key.as_str() == "objective") {
            return Err(self.other_value(key, value(begun, key), value(self, key)));
        }
        if self.data != begun.data {
            let text = format!(
                "\"data.files\" have other rows ({}) than those that the checkpoint was begun with ({}): put them back, or \
                 begin anew",
                self.data.0, begun.data.0
            );
            return Err(Error::new(Status::DataChanged, text).at_key("data.files"));
        }
        match different.first() {
            Some(key) => Err(self.other_value(key, value(begun, key), value(self, key))),
            None => Ok(()),
        }
    }

    fn other_value(&self, key: &str, begun: Option<String>, now: Option<String>) -> Error {
        let shown = |value: Option<String>| value.unwrap_or_else(|| "not given".to_owned());
        let (begun, now) = (shown(begun), shown(now));
        let text = match key {
            "router" | "dpo.reference" => format!(
                "\"{key}\" gives other gates ({now}) than those that the checkpoint was begun with ({begun}): put them back, \
                 or begin anew"
            ),
            _ => format!(
                "\"{key}\" was {begun} when the checkpoint was begun and is {now} now: put it back, or begin anew"
            ),
        };
        Error::new(Status::RecipeValue, text).at_key(key)
    }
}
