//! Training of routers, everything else frozen.
//!
//! [`document`] says what is learned from, and [`data`] reads it from files. [`pass`] is the workspace of a batch, which goes
//! [`forward`] and then [`backward`] through it, over a backend's operations (`backend/training.rs`): a device that has those trains, and no formula of the pass is
//! written twice. [`routing`] and [`balance`] are the router and its own losses, [`loss`] those of text. [`trainer`]
//! puts them together, with the optimiser of [`adamw`], and [`state`] is what it can go on from.

pub mod adamw;
pub mod backward;
pub mod balance;
pub mod data;
pub mod document;
pub mod forward;
pub mod loss;
pub mod pass;
pub mod routing;
pub mod state;
pub mod trainer;

pub use adamw::{AdamW, Decay, OptimiserOptions};
pub use balance::{BalanceForm, RouterLoad, RouterLosses};
pub use data::{BadRow, BadRows, DataOptions, DataReport, DataSet, LongRows, Rows, shuffled};
pub use document::{Document, Packed};
pub use loss::{PairLogProbabilities, PreferenceLoss, PreferenceOptions};
pub use trainer::{Pair, RouterTrainer, StepMetrics, TrainOptions};
