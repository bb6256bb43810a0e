//! What quantising did: how far off the numbers of each tensor are, and what it saved.

use crate::quant::{Format, Rounded};

/// Which matrix of a model a tensor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The rows tokens are looked up in.
    Embedding,
    /// The rows logits are computed from.
    Head,
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// The output projection.
    Output,
    /// An expert's gate.
    Gate,
    /// An expert's up.
    Up,
    /// An expert's down.
    Down,
    /// A norm or a router, which is never rounded.
    Other,
}

impl Kind {
    /// Those that can be rounded.
    pub const MATRICES: [Kind; 9] = [
        Kind::Embedding,
        Kind::Head,
        Kind::Query,
        Kind::Key,
        Kind::Value,
        Kind::Output,
        Kind::Gate,
        Kind::Up,
        Kind::Down,
    ];

    /// Its name for people and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Embedding => "embedding",
            Kind::Head => "head",
            Kind::Query => "query",
            Kind::Key => "key",
            Kind::Value => "value",
            Kind::Output => "output",
            Kind::Gate => "gate",
            Kind::Up => "up",
            Kind::Down => "down",
            Kind::Other => "other",
        }
    }
}

/// A tensor that was rounded.
#[derive(Clone, Debug)]
pub struct TensorReport {
    /// Its name in the new directory.
    pub name: String,
    /// Which matrix it is.
    pub kind: Kind,
    /// Its layer; none for embedding and head.
    pub layer: Option<usize>,
    /// Its expert, where it is one's.
    pub expert: Option<usize>,
    /// What it was rounded to.
    pub format: Format,
    /// How far off it is.
    pub rounded: Rounded,
    /// Its size in the source.
    pub bytes_before: u64,
    /// Its size in the new directory, scales included.
    pub bytes_after: u64,
}

/// What quantising did.
#[derive(Clone, Debug, Default)]
pub struct QuantizeReport {
    /// The tensors that were rounded, in the order of the model.
    pub tensors: Vec<TensorReport>,
    /// Bytes of all tensors in the source.
    pub bytes_before: u64,
    /// Bytes of all tensors in the new directory.
    pub bytes_after: u64,
}

impl QuantizeReport {
    /// How far off the tensors are that `which` accepts, together; none if it accepts none.
    pub fn rounded(&self, which: impl Fn(&TensorReport) -> bool) -> Option<Rounded> {
        let mut sum: Option<Rounded> = None;
        for tensor in self.tensors.iter().filter(|tensor| which(tensor)) {
            sum.get_or_insert_default().add(&tensor.rounded);
        }
        sum
    }
}
