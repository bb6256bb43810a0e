//! How good a model and its routers are: how well it predicts texts, which of two answers it holds for likelier, and where it
//! sends which texts.
//!
//! [`evaluator`] runs texts, documents and pairs through a session, so on every device and in every format. [`figures`] is what
//! comes of it, with the formulas; [`comparable`] says whether two models' figures can stand side by side.

pub mod comparable;
pub mod evaluator;
pub mod figures;

pub use comparable::check_tokenizers;
pub use evaluator::Evaluator;
pub use figures::{PairScore, PreferenceFigures, ResponseScore, Routing, TextFigures};
