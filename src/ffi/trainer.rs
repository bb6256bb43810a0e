//! `gemmoe_trainer`: the routers of a model being trained, as a training recipe says.

use std::ffi::c_char;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::arguments::{Out, copy_out, path, text};
use super::error::GemmoeError;
use super::guard::{Poison, guard, guard_status};
use super::handles::{self, Held, Object};
use super::job::Job;
use super::load::GEMMOE_LOAD_RUNNING;
use super::model::{GemmoeModel, ModelObject};
use super::structs::{self, Versioned};
use crate::backend::Cancel;
use crate::engine::Model;
use crate::error::{Error, Result, Status};
use crate::model::Progress;
use crate::train::recipe::Objective;
use crate::train::{Run, StepMetrics, TrainRecipe};

/// state: the model is loaded and the data read and checked.
pub const GEMMOE_TRAINER_PREPARING: u32 = 0;
/// state: preparing is over, and went well or not: gemmoe_trainer_wait tells.
pub const GEMMOE_TRAINER_READY: u32 = 1;

/// What a training run takes, and comes to. Initialise with GEMMOE_TRAINER_PLAN_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeTrainerPlan {
    /// sizeof(gemmoe_trainer_plan)
    pub struct_size: u32,
    /// 1 if pairs are learned (DPO), 0 if texts.
    pub is_preference: u32,
    /// Layers that have a router, and experts of each: gemmoe_trainer_get_shares has a number for each.
    pub num_hidden_layers: u32,
    /// Experts of each layer.
    pub num_local_experts: u32,
    /// Steps in all.
    pub steps: u64,
    /// Documents or pairs of the data that can be used.
    pub rows: u64,
    /// Rows that cannot, and that the recipe has skipped.
    pub skipped_rows: u64,
    /// Rows of the held-out files.
    pub held_out_rows: u64,
    /// Tokens of the data, and those among them that are learned.
    pub tokens: u64,
    /// Of the tokens, those that are learned.
    pub targets: u64,
    /// Numbers that are trained.
    pub parameters: u64,
    /// Bytes of the model's weights.
    pub weight_bytes: u64,
    /// Bytes of a batch's activations and gradients.
    pub workspace_bytes: u64,
    /// Bytes of gates, gradients, moments and reference.
    pub optimiser_bytes: u64,
    /// Bytes of what is kept of the data.
    pub data_bytes: u64,
    /// Bytes of a checkpoint, about.
    pub checkpoint_bytes: u64,
    /// 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, four u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeTrainerPlan {
    const NAME: &'static str = "gemmoe_trainer_plan";
    const FIRST_SIZE: usize = 144;
}

/// Where a trainer is, and what its last step, or evaluation, came to. Means are over learned tokens, pairs, or tokens and
/// layers. Initialise with GEMMOE_TRAINER_METRICS_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeTrainerMetrics {
    /// sizeof(gemmoe_trainer_metrics)
    pub struct_size: u32,
    /// One of GEMMOE_TRAINER_.
    pub state: u32,
    /// Bytes to be read or written in all, and so far, of what is prepared or written; data is counted after the weights, from 0.
    pub bytes_total: u64,
    /// Of them, so far.
    pub bytes_done: u64,
    /// Steps taken.
    pub steps: u64,
    /// Steps of the whole run; 0 while preparing.
    pub total_steps: u64,
    /// Tokens of the step.
    pub tokens: u64,
    /// Of them, those that were learned.
    pub targets: u64,
    /// Everything together, as its gradient was taken.
    pub loss: f64,
    /// The text's part: the mean negative log-likelihood of a token, or the mean loss of a pair.
    pub text_loss: f64,
    /// The balancing loss, without its coefficient.
    pub balance: f64,
    /// The z-loss, without its coefficient.
    pub z_loss: f64,
    /// Norm of all gradients before clipping; 0 of an evaluation.
    pub gradient_norm: f64,
    /// The learning rate of the step; 0 of an evaluation.
    pub learning_rate: f64,
    /// Of pairs: the mean rewards of chosen and rejected responses,
    pub chosen_reward: f64,
    /// which differ by the margin,
    pub rejected_reward: f64,
    /// and the share whose chosen response has the higher one.
    pub accuracy: f64,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, two u32 then eight-byte numbers leave no padding, plain numbers.
unsafe impl Versioned for GemmoeTrainerMetrics {
    const NAME: &'static str = "gemmoe_trainer_metrics";
    const FIRST_SIZE: usize = 160;
}

/// A trainer. One thread at a time: a second one gets BUSY. gemmoe_trainer_poll, gemmoe_trainer_get_shares and gemmoe_trainer_cancel
/// are the exceptions.
pub struct GemmoeTrainer {
    _opaque: (),
}

pub struct TrainerObject {
    preparing: Job<Run>,
    /// The run, or why there is none; nothing until somebody has waited.
    run: Mutex<Option<Result<Run>>>,
    /// Of the run, from when there is one.
    cancel: Arc<OnceLock<Arc<Cancel>>>,
    /// Of what is written just now.
    writing: Mutex<Option<Arc<Progress>>>,
    latest: Mutex<Latest>,
    poison: Poison,
}

/// What can be told while the run is busy.
#[derive(Default)]
struct Latest {
    total_steps: u64,
    metrics: StepMetrics,
}

impl TrainerObject {
    fn start(model: Option<Arc<Model>>, recipe: TrainRecipe) -> Result<TrainerObject> {
        let cancel = Arc::new(OnceLock::new());
        let its_cancel = Arc::clone(&cancel);
        let preparing = Job::start("gemmoe-trainer", move |progress| {
            let model = match model {
                Some(model) => model,
                None => Model::load(&recipe.model, &recipe.load, progress)?,
            };
            let run = Run::new(model, &recipe, progress)?;
            // The job runs once, so nobody was before.
            let _ = its_cancel.set(Arc::clone(run.cancel()));
            Ok(run)
        })?;
        Ok(TrainerObject {
            preparing,
            run: Mutex::new(None),
            cancel,
            writing: Mutex::new(None),
            latest: Mutex::new(Latest::default()),
            poison: Poison::default(),
        })
    }

    /// Uses the run alone, once it is prepared; a panic in `body` poisons the trainer.
    fn with<T>(&self, body: impl FnOnce(&mut Run) -> Result<T>) -> Result<T> {
        let busy = || Error::new(Status::Busy, "another call is using this trainer");
        // Held until the poison is set: nobody gets in between a panic and its mark.
        let mut run = self.run.try_lock().ok_or_else(busy)?;
        match run.get_or_insert_with(|| self.preparing.wait("trainer")) {
            Ok(run) => self.poison.watch(|| {
                let result = body(run);
                let mut latest = self.latest.lock();
                (latest.total_steps, latest.metrics.step) = (run.total_steps(), run.steps());
                result
            }),
            Err(error) => Err(error.clone()),
        }
    }

    /// Does `write`, of which `poll` tells the progress and which `cancel` stops.
    fn write(&self, run: &Run, write: impl FnOnce(&Run, &Progress) -> Result<()>) -> Result<()> {
        let progress = Arc::new(Progress::default());
        *self.writing.lock() = Some(Arc::clone(&progress));
        let result = write(run, &progress);
        *self.writing.lock() = None;
        result
    }

    /// Keeps what a step or an evaluation came to, for `poll`, and answers it.
    fn note(&self, metrics: StepMetrics) {
        self.latest.lock().metrics = metrics;
    }

    fn stop(&self) {
        if let Some(writing) = &*self.writing.lock() {
            return writing.cancel();
        }
        // One of the two is too late, and does nothing.
        self.preparing.cancel();
        if let Some(cancel) = self.cancel.get() {
            cancel.request();
        }
    }

    fn metrics(&self) -> GemmoeTrainerMetrics {
        let prepared = self.preparing.progress();
        let bytes = match &*self.writing.lock() {
            Some(writing) => (writing.bytes_total(), writing.bytes_read()),
            None => (prepared.bytes_total, prepared.bytes_read),
        };
        let latest = self.latest.lock();
        let Latest { total_steps, metrics } = &*latest;
        GemmoeTrainerMetrics {
            struct_size: 0,
            state: match prepared.state {
                GEMMOE_LOAD_RUNNING => GEMMOE_TRAINER_PREPARING,
                _ => GEMMOE_TRAINER_READY,
            },
            bytes_total: bytes.0,
            bytes_done: bytes.1,
            steps: metrics.step,
            total_steps: *total_steps,
            tokens: metrics.tokens as u64,
            targets: metrics.targets as u64,
            loss: metrics.loss,
            text_loss: metrics.text_loss,
            balance: metrics.balance,
            z_loss: metrics.z,
            gradient_norm: metrics.gradient_norm,
            learning_rate: metrics.learning_rate,
            chosen_reward: metrics.rewards.chosen,
            rejected_reward: metrics.rewards.rejected,
            accuracy: metrics.accuracy,
            reserved: [0; 4],
        }
    }
}

impl Held for TrainerObject {
    type Opaque = GemmoeTrainer;
    const KIND: usize = 6;
    const NAME: &'static str = "gemmoe_trainer";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Trainer(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Trainer(object) = object { Some(object) } else { None }
    }
}

fn find(trainer: *const GemmoeTrainer) -> Result<Arc<TrainerObject>> {
    handles::find::<TrainerObject>(trainer, "trainer")
}

/// Starts preparing a training run and returns at once. `recipe` is the text of a training recipe, TOML of `recipe_bytes` bytes,
/// as docs/training.md describes it; relative paths in it begin at `directory`, a NUL-terminated path. Its [output] may be left
/// out: a host says itself what is written, and when. `model` is the model whose routers are trained, which stays as it is and
/// may be destroyed before the trainer; if it is NULL, the recipe's is loaded. The trainer is owned by the host and is prepared on a thread
/// of its own: the model is loaded, the data read and checked, all memory reserved.
/// Errors: handle errors, NULL_ARGUMENT, INVALID_UTF8, RECIPE_SYNTAX, RECIPE_VALUE, FILE_TOO_LARGE (a recipe of more than 1 MiB),
/// THREAD_UNAVAILABLE; what is wrong with model and data comes from gemmoe_trainer_wait. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_start(
    model: *const GemmoeModel,
    recipe: *const c_char,
    recipe_bytes: usize,
    directory: *const c_char,
    trainer_out: *mut *mut GemmoeTrainer,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let trainer_out = Out::new(trainer_out, "trainer_out")?;
            let model = match model.is_null() {
                true => None,
                false => Some(handles::find::<ModelObject>(model, "model")?.with(|model| Ok(Arc::clone(model)))?),
            };
            let recipe = text(recipe, recipe_bytes, "recipe")?;
            let recipe = TrainRecipe::parse(recipe, "recipe", &path(directory, "directory")?)?;
            trainer_out.set(handles::insert(TrainerObject::start(model, recipe)?)?);
            Ok(())
        })
    }
}

/// Waits until the trainer is prepared and tells what the run takes and comes to; `plan_out` may be NULL. The other functions that
/// need the run wait likewise. Where preparing has failed, or was cancelled, all of them return what this one does, and the trainer
/// is good for nothing but gemmoe_trainer_destroy.
/// Errors: handle errors, STRUCT_SIZE, BUSY, CANCELLED, RECIPE_VALUE (the model or the data do not fit the recipe), DATA_ROW,
/// FILE_NOT_FOUND, READ_FAILED, PATCH_DAMAGED, PATCH_MODEL, INVALID_ARGUMENT (the model has no router that could learn, one expert per token
/// among the reasons, or its device does not train), NO_TOKENIZER, OUT_OF_MEMORY, and of a model that is loaded those of
/// gemmoe_load_wait. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_wait(
    trainer: *mut GemmoeTrainer,
    plan_out: *mut GemmoeTrainerPlan,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let plan = find(trainer)?.with(|run| {
                let (plan, config) = (run.plan()?, run.trainer().model().config());
                Ok(GemmoeTrainerPlan {
                    struct_size: 0,
                    is_preference: (plan.objective == Objective::Dpo) as u32,
                    num_hidden_layers: config.num_hidden_layers as u32,
                    num_local_experts: config.num_local_experts as u32,
                    steps: plan.steps,
                    rows: plan.rows,
                    skipped_rows: run.data_report().skipped,
                    held_out_rows: plan.held_out_rows,
                    tokens: plan.tokens,
                    targets: plan.targets,
                    parameters: plan.parameters,
                    weight_bytes: plan.weight_bytes,
                    workspace_bytes: plan.workspace_bytes,
                    optimiser_bytes: plan.optimiser_bytes,
                    data_bytes: plan.data_bytes,
                    checkpoint_bytes: plan.checkpoint_bytes,
                    reserved: [0; 4],
                })
            })?;
            if plan_out.is_null() { Ok(()) } else { structs::write(plan_out, &plan, "plan_out") }
        })
    }
}

/// Takes up to `steps` steps, as many as are left of the run, and sets *taken_out, which may be NULL, to their number: 0 is the end of the
/// run. After an error the trainer is as after the last step that succeeded, which *taken_out does not tell, but
/// gemmoe_trainer_poll does, and can go on.
/// Errors: those of gemmoe_trainer_wait, DATA_CHANGED (a data file was altered meanwhile), NOT_A_NUMBER (a gradient, or what a gate would
/// become, is not finite: lower the learning rate), DEVICE_FAILED. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_step(
    trainer: *mut GemmoeTrainer,
    steps: u64,
    taken_out: *mut u64,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let trainer = find(trainer)?;
            let mut taken = 0;
            trainer.with(|run| {
                while taken < steps
                    && let Some(metrics) = run.step()?
                {
                    taken += 1;
                    trainer.note(metrics);
                }
                Ok(())
            })?;
            if !taken_out.is_null() {
                Out::new(taken_out, "taken_out")?.set(taken);
            }
            Ok(())
        })
    }
}

/// Computes the losses of the recipe's held-out files under the gates as they are; nothing is learned.
/// Errors: those of gemmoe_trainer_step, NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT (the recipe has no held-out files).
/// One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_evaluate(
    trainer: *mut GemmoeTrainer,
    metrics_out: *mut GemmoeTrainerMetrics,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let trainer = find(trainer)?;
            trainer.with(|run| {
                let none = || Error::new(Status::InvalidArgument, "the recipe has no data.held_out files");
                trainer.note(run.evaluate()?.ok_or_else(none)?);
                Ok(())
            })?;
            structs::write(metrics_out, &trainer.metrics(), "metrics_out")
        })
    }
}

/// Tells where the trainer is and what the last step or evaluation came to. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE.
/// Any thread, never blocks for longer than a copy of these numbers takes. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_poll(
    trainer: *const GemmoeTrainer,
    metrics_out: *mut GemmoeTrainerMetrics,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let metrics = find(trainer)?.metrics();
            structs::write(metrics_out, &metrics, "metrics_out")
        })
    }
}

/// Copies the share of choices that each expert got in the last step or evaluation, layer by layer: [num_hidden_layers,
/// num_local_experts], each layer's sum 1; none before the first. *count_out is the number of shares, also where `capacity` is 0.
/// Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL. Any thread, never blocks for longer than a copy of these numbers
/// takes. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_get_shares(
    trainer: *const GemmoeTrainer,
    shares: *mut f64,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let trainer = find(trainer)?;
            let latest = trainer.latest.lock();
            copy_out(&latest.metrics.shares, shares, capacity, count_out, "shares")
        })
    }
}

/// Stops the call in progress on this trainer, which returns CANCELLED, and what it was to change is as before: in a step within an
/// operation of a layer, while preparing within a chunk of a file, while writing a model within a piece of a tensor, of which
/// nothing is then left. While no call is in progress, stops the next step or evaluation. Errors: handle errors. Any thread, never
/// blocks. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_trainer_cancel(trainer: *const GemmoeTrainer) -> Status {
    guard_status(|| {
        find(trainer)?.stop();
        Ok(())
    })
}

/// Writes where training stands to a file, from which gemmoe_trainer_resume goes on with the same bits as if it had never stopped: gates,
/// moments, and the place in the data. What was at `file` is there until the new one is whole.
/// Errors: those of gemmoe_trainer_wait, NULL_ARGUMENT, WRITE_FAILED, DISK_FULL. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_checkpoint(
    trainer: *const GemmoeTrainer,
    file: *const c_char,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let file = path(file, "file")?;
            find(trainer)?.with(|run| run.save(&file))
        })
    }
}

/// Goes on from a file that gemmoe_trainer_checkpoint, or the command line, wrote; after an error the trainer is as before.
/// Errors: those of gemmoe_trainer_wait, NULL_ARGUMENT, SNAPSHOT_DAMAGED, SNAPSHOT_VERSION, SNAPSHOT_MODEL, DATA_CHANGED, RECIPE_VALUE (it was begun
/// with other data, or with a recipe that leads elsewhere). One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_resume(
    trainer: *mut GemmoeTrainer,
    file: *const c_char,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let file = path(file, "file")?;
            find(trainer)?.with(|run| run.resume(&file))
        })
    }
}

/// Writes the gates as they are to a router patch, which gemmoe_model_apply_router_patch puts into a loaded model. What was at `file` is
/// there until the new one is whole. Errors: those of gemmoe_trainer_checkpoint. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_write_patch(
    trainer: *const GemmoeTrainer,
    file: *const c_char,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let file = path(file, "file")?;
            find(trainer)?.with(|run| run.patch()?.write(&file))
        })
    }
}

/// Writes the recipe's model directory with these gates to another one, which must not be there or be empty: all else is the same,
/// byte for byte. It has its name only once it is whole.
/// Errors: those of gemmoe_trainer_checkpoint, ALREADY_EXISTS, and everything that can be wrong with a model directory: codes 20 to
/// 64. One thread at a time. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_trainer_write_model(
    trainer: *const GemmoeTrainer,
    directory: *const c_char,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let directory = path(directory, "directory")?;
            let trainer = find(trainer)?;
            trainer.with(|run| trainer.write(run, |run, progress| run.write_model(&directory, progress)))
        })
    }
}

/// Destroys a trainer, stopping it if it still prepares; a call in progress on another thread is finished first by that thread. What
/// it has written stays. NULL is nothing. Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_trainer_destroy(trainer: *mut GemmoeTrainer) -> Status {
    guard_status(|| handles::remove::<TrainerObject>(trainer, "trainer"))
}
