//! From logits to a token.
//!
//! A draw goes through its settings in one order, each on what the one before left:
//!
//! 1. the logit bias is added;
//! 2. repetition, frequency and presence penalties, in this order, for the tokens of the window;
//! 3. the grammar's mask;
//! 4. `top_k`, `top_p`, `min_p`, in this order, on the untempered distribution;
//! 5. the temperature;
//! 6. one random number, which belongs to the seed and the position.
//!
//! Where logits are on a device, a draw is made among the largest of them if these decide (`candidates.rs`): the same token.

mod bias;
mod boundary;
mod candidates;
mod draw;
mod log_probability;
mod maxima;
mod penalties;
#[cfg(test)]
mod reference;
mod settings;
mod weights;

pub use bias::LogitBias;
pub use draw::{Draw, Sampler};
pub use log_probability::{log_probability, top_log_probabilities};
pub use settings::Sampling;
