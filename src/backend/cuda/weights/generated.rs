//! Weights that nobody trained, made on the device: a bench needs a model of the real size, and no checkpoint. Of the
//! directory only headers are read; a weight file may be nothing else.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3Default;

use super::{DeviceMatrix, DeviceVector, DeviceWeights, Uploader};
use crate::backend::cuda::CudaOptions;
use crate::backend::cuda::device::Device;
use crate::backend::cuda::experts::Experts;
use crate::error::Result;
use crate::memory::Buffer;
use crate::model::weights::{Destination, ExpertPlace, Matrix, Weights};
use crate::model::{Checkpoint, Description, Progress};
use crate::quant::{Format, ScaleDtype, Shape};

/// What a part's words are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// The lines of int8 or int4: any bits are weights.
    Integers(Format),
    /// Numbers of a format without scales.
    Numbers(Format),
    /// The scales of groups.
    Scales(ScaleDtype, Format),
}

/// A part of a model's weights that is to be filled.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// The tensor it stands for.
    pub name: &'a str,
    /// Columns of its matrix, which products are sums of.
    pub columns: usize,
    pub content: Content,
    /// Where it is on the device.
    pub address: u64,
    /// A multiple of 4.
    pub bytes: usize,
}

/// Fills a part. The work may be in progress afterwards; whoever generates a model waits for it before it is used.
pub type Fill<'a> = &'a mut dyn FnMut(&Part) -> Result<()>;

impl DeviceWeights {
    /// As `load`, with parts that `fill` makes instead of the checkpoint's.
    pub fn generate(
        device: &Arc<Device>,
        description: &Description,
        checkpoint: &Checkpoint,
        options: &CudaOptions,
        fill: Fill,
        rotary_frequencies: &[f32],
        hasher: Xxh3Default,
    ) -> Result<(DeviceWeights, Experts)> {
        DeviceWeights::take(device, description, options, rotary_frequencies, hasher, |uploader| {
            let mut generator = Generator { uploader, fill };
            Weights::load_to(&mut generator, description, checkpoint, 1, false, &Progress::default())
        })
    }
}

/// What the lines of a format are, and its scales where it has any.
fn contents(format: Format) -> (Content, Option<Content>) {
    match format.groups() {
        None => (Content::Numbers(format), None),
        Some(groups) => (Content::Integers(format), Some(Content::Scales(groups.scales, format))),
    }
}

/// Takes no part from a file.
struct Generator<'a, 'b, 'c> {
    uploader: &'a mut Uploader<'b>,
    fill: Fill<'c>,
}

impl Generator<'_, '_, '_> {
    fn part(&mut self, name: &str, columns: usize, content: Content, bytes: usize) -> Result<u64> {
        let address = self.uploader.arena.take(bytes)?;
        (self.fill)(&Part { name, columns, content, address, bytes })?;
        Ok(address)
    }
}

impl Destination for Generator<'_, '_, '_> {
    type Matrix = DeviceMatrix;
    type Vector = DeviceVector;
    type Expert = Shape;

    fn matrix(&mut self, name: &str, matrix: Matrix) -> Result<DeviceMatrix> {
        self.uploader.matrix(name, matrix)
    }

    fn expert(&mut self, place: ExpertPlace, matrix: Matrix) -> Result<Shape> {
        self.uploader.expert(place, matrix)
    }

    fn vector(&mut self, name: &str, vector: Buffer<f32>) -> Result<DeviceVector> {
        self.uploader.vector(name, vector)
    }

    fn unread_matrix(&mut self, name: &str, shape: &Shape) -> Option<Result<DeviceMatrix>> {
        let columns = shape.columns;
        let (of_lines, of_scales) = contents(shape.format);
        let mut make = || {
            let lines = self.part(name, columns, of_lines, shape.line_bytes())?;
            let scales = of_scales.map(|content| self.part(name, columns, content, shape.scale_bytes()));
            Ok(DeviceMatrix { shape: *shape, lines, scales: scales.transpose()?.unwrap_or(0) })
        };
        Some(make())
    }

    /// On the device, whatever limit there is.
    fn unread_expert(&mut self, place: ExpertPlace, name: &str, shape: &Shape) -> Option<Result<Shape>> {
        let (of_lines, of_scales) = contents(shape.format);
        let (columns, fill) = (shape.columns, &mut *self.fill);
        let sent = self.uploader.send_part(place, |_, lines, scales| {
            fill(&Part { name, columns, content: of_lines, address: lines, bytes: shape.line_bytes() })?;
            let bytes = shape.scale_bytes();
            of_scales.map_or(Ok(()), |content| fill(&Part { name, columns, content, address: scales, bytes }))
        });
        Some(sent.map(|()| *shape))
    }

    fn unread_vector(&mut self, name: &str, columns: usize) -> Option<Result<DeviceVector>> {
        let content = Content::Numbers(Format::F32);
        Some(self.part(name, columns, content, columns * size_of::<f32>()).map(DeviceVector))
    }
}
