//! Which format each part of a model is held in.

use super::names::Role;
use super::quantization::PARTS;
use crate::error::{Error, Result, Status};
use crate::quant::{Format, GROUP_SIZES};

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
    /// The rows tokens are looked up in. Where the embedding is the head a format given for one of the two alone is that of
    /// both; with two formats they are held apart.
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

    /// An error where a group has a size that there is not.
    pub fn check(&self) -> Result<()> {
        for (part, format) in PARTS.iter().zip(self.parts()) {
            if let Some(groups) = format.and_then(Format::groups)
                && !GROUP_SIZES.contains(&groups.size)
            {
                let text = format!("\"{part}\" was asked for in groups of {}, expected 32, 64 or 128", groups.size);
                return Err(Error::new(Status::InvalidArgument, text).at_key(*part));
            }
        }
        Ok(())
    }

    /// These formats where parts are stored as `stored` says: what was rounded once is not rounded again.
    pub fn over(self, stored: &Formats) -> Result<Formats> {
        let mut parts = self.parts();
        for ((part, format), stored) in PARTS.iter().zip(&mut parts).zip(stored.parts()) {
            match (*format, stored) {
                (Some(format), Some(stored)) if format != stored => {
                    let text = format!(
                        "\"{part}\" was asked for in {format} and is stored in {stored}: load it as it is, or \
                         quantise the model it was made from"
                    );
                    return Err(Error::new(Status::InvalidArgument, text).at_key(*part));
                }
                (_, stored) => *format = format.or(stored),
            }
        }
        Ok(Formats::from_parts(parts))
    }

    /// The format of the matrices of this role that have one by choice; none for norms and routers.
    pub fn of_matrix(&self, role: Role) -> Option<Format> {
        if matches!(role, Role::Norm | Role::Router) { None } else { self.of(role) }
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
