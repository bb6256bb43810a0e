//! Which format each part of a model is held in.

use super::names::Role;
use crate::quant::Format;

/// Formats of a model's parts; where none is given a part is held as its checkpoint has it. Norms and routers are f32
/// always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Formats {
    /// Gate, up and down of every expert.
    pub experts: Option<Format>,
    /// Queries, keys, values and the output projection.
    pub attention: Option<Format>,
    /// The rows logits are computed from.
    pub head: Option<Format>,
    /// The rows tokens are looked up in. Where the embedding is the head and has no format of its own it follows `head`;
    /// with another format than the head's the two are held apart.
    pub embedding: Option<Format>,
}

impl Formats {
    /// The formats of a model whose embedding is its head, or is not.
    pub fn resolved(self, tied: bool) -> Formats {
        match tied {
            true => Formats { head: self.head.or(self.embedding), embedding: self.embedding.or(self.head), ..self },
            false => self,
        }
    }

    /// What a part of this role is held in.
    pub fn of(&self, role: Role) -> Option<Format> {
        match role {
            Role::Norm | Role::Router => Some(Format::F32),
            Role::Attention => self.attention,
            Role::Expert => self.experts,
            Role::Embedding => self.embedding,
            Role::Head => self.head,
        }
    }
}
