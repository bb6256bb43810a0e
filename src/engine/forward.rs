//! THE forward pass: every backend's stages, in the order of the mathematics.

use std::task::{Poll, ready};

use super::session::finished;
use crate::backend::gates::number_of;
use crate::backend::{Batch, Limit, Pass};
use crate::error::{Error, Result, Status};

/// Where a forward pass over one batch stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    has_begun: bool,
    stage: Stage,
    layer: usize,
    /// The number of the gates that the batch runs under, once it has begun.
    gates: u64,
}

impl Place {
    /// Whether a batch that stands here can go on under the gates of this number.
    pub fn is_under(&self, gates: u64) -> bool {
        !self.has_begun || self.gates == gates
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stage {
    #[default]
    Embed,
    NormQkvRope,
    Attention,
    Router,
    Experts,
    Head,
}

/// Runs one batch from `place` on, through all `layers` layers, or until `limit` is reached: `Pending` then, and the next
/// call with the same batch goes on there. Once done the pass holds the batch's logits and routes, and the pages its keys
/// and values, the same bits whatever the stops.
///
/// Before that, and after an error, the pages may hold part of the batch's keys and values: positions from each slice's
/// `start` on are to be taken as unwritten. After `Cancelled` the batch can still go on from `place`.
pub fn forward(
    pass: &mut dyn Pass,
    place: &mut Place,
    layers: usize,
    batch: &mut Batch,
    limit: &Limit,
) -> Poll<Result<()>> {
    let gates = number_of(batch.gates);
    if !place.is_under(gates) {
        return Poll::Ready(Err(Error::new(Status::Internal, "a batch was to go on under other gates than it began")));
    }
    if !place.has_begun {
        pass.begin(batch)?;
        (place.has_begun, place.gates) = (true, gates);
        if at_once(pass, layers, batch, limit)? {
            return Poll::Ready(Ok(()));
        }
    }
    stages(pass, place, layers, batch, limit)
}

/// Has all stages done as one, where the device can and the limit allows it; whether it did. Before the first batch of its
/// shape the device is told the stages.
fn at_once(pass: &mut dyn Pass, layers: usize, batch: &mut Batch, limit: &Limit) -> Result<bool> {
    if pass.begin_recording(limit)? {
        let recorded = stages(pass, &mut Place::default(), layers, batch, limit);
        pass.end_recording(finished(recorded))?;
    }
    pass.replay(batch, limit)
}

/// The stages from `place` on.
fn stages(pass: &mut dyn Pass, place: &mut Place, layers: usize, batch: &mut Batch, limit: &Limit) -> Poll<Result<()>> {
    loop {
        let layer = place.layer;
        place.stage = match place.stage {
            Stage::Embed => {
                ready!(pass.embed(batch, limit))?;
                Stage::NormQkvRope
            }
            // x += attention(norm(x))
            Stage::NormQkvRope => {
                ready!(pass.norm_qkv_rope(layer, batch, limit))?;
                Stage::Attention
            }
            Stage::Attention => {
                ready!(pass.attention(layer, batch, limit))?;
                Stage::Router
            }
            // x += experts(norm(x))
            Stage::Router => {
                ready!(pass.router(layer, batch, limit))?;
                Stage::Experts
            }
            Stage::Experts => {
                ready!(pass.experts(layer, batch, limit))?;
                limit.note_layer();
                place.layer += 1;
                if place.layer < layers { Stage::NormQkvRope } else { Stage::Head }
            }
            // logits = head(norm(x)), where asked for
            Stage::Head => {
                ready!(pass.head(batch, limit))?;
                limit.note_layer();
                return Poll::Ready(Ok(()));
            }
        };
    }
}
