//! Training of routers, everything else frozen.
//!
//! [`document`] says what is learned from, and [`data`] reads it from files. [`pass`] is the workspace of a batch, which goes
//! [`forward`] and then [`backward`] through it, over a backend's operations (`backend/training.rs`): a device that has those trains, and no formula of the pass is
//! written twice. [`routing`] and [`balance`] are the router and its own losses, [`loss`] those of text. [`trainer`]
//! puts them together, with the optimiser of [`adamw`], and [`state`] is what it can go on from.
//!
//! Above them stands a whole run: [`recipe`] says what it is, [`data`] are its rows, [`run`] takes them step by step, [`checkpoint`]
//! is where it stands as a file, and [`result`] the model that comes out of it; [`records`] puts them together with the files that a
//! run leaves behind, and [`output`] says where those may be.

pub mod adamw;
pub mod backward;
pub mod balance;
pub mod checkpoint;
pub mod data;
pub mod document;
pub mod forward;
pub mod loss;
pub mod output;
pub mod pass;
pub mod recipe;
pub mod records;
pub mod result;
pub mod routing;
pub mod run;
pub mod state;
pub mod trainer;

pub use adamw::{AdamW, Decay, OptimiserOptions};
pub use balance::{BalanceForm, RouterLoad, RouterLosses};
pub use data::{BadRow, BadRows, DataOptions, DataReport, DataSet, LongRows, Rows, shuffled};
pub use document::{Document, Packed};
pub use loss::{PairLogProbabilities, PreferenceLoss, PreferenceOptions};
pub use recipe::{Objective, OutputKind, TrainRecipe};
pub use records::{Advance, Begin, RecordedRun};
pub use run::{Run, RunPlan};
pub use trainer::{Pair, RouterTrainer, StepMetrics, TrainOptions};
