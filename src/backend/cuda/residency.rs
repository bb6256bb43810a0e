//! Which weights a device holds under a limit in bytes. Told from sizes alone, so that a plan and a load say the same.
//!
//! What is not an expert is there first. Then come whole experts, expert 0 of each layer in turn, expert 1 of each, and so on,
//! each one that still fits: a token needs experts of every layer, so every layer keeps about as many. Where some do not fit,
//! two buffers with room for the largest expert come off the limit, through which the others are copied.

use super::memory::Arena;
use crate::backend::ops::every_expert;
use crate::backend::residency::WeightResidency;
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::model::Description;
use crate::model::weights::{ExpertPart, ExpertWeights};
use crate::quant::Shape;

/// Buffers that experts are copied through: while one is read by kernels the other is filled.
pub const STAGING_BUFFERS: usize = 2;

/// A matrix in an expert's block of device memory.
#[derive(Clone, Copy, Debug)]
pub struct MatrixLayout {
    pub shape: Shape,
    /// Where its lines begin, in bytes.
    pub lines: usize,
    /// Where its scales do; nothing is there in formats without.
    pub scales: usize,
}

/// An expert's block of device memory: lines and scales of its matrices, each at a multiple of an arena's alignment.
#[derive(Clone, Copy, Debug)]
pub struct ExpertLayout {
    matrices: [MatrixLayout; 3],
    /// Size of the block.
    pub bytes: usize,
    /// Bytes of the matrices alone.
    pub matrix_bytes: usize,
}

impl ExpertLayout {
    pub fn new(shapes: &ExpertWeights<Shape>) -> ExpertLayout {
        let mut bytes = 0;
        let matrices = [shapes.gate, shapes.up, shapes.down].map(|shape| {
            let lines = bytes;
            let scales = lines + Arena::padded(shape.line_bytes());
            bytes = scales + Arena::padded(shape.scale_bytes());
            MatrixLayout { shape, lines, scales }
        });
        ExpertLayout { matrices, bytes, matrix_bytes: matrices.iter().map(|matrix| matrix.shape.bytes()).sum() }
    }

    /// Where one of its matrices is.
    pub fn of(&self, part: ExpertPart) -> &MatrixLayout {
        &self.matrices[part as usize]
    }
}

/// What a model's weights take on a device.
#[derive(Debug)]
pub struct Sizes {
    /// Bytes of everything but the experts, their tables included.
    pub dense: usize,
    /// `[layers, experts]`
    pub experts: Vec<Vec<ExpertLayout>>,
}

impl Sizes {
    /// Of a model whose weights but the experts take `dense` bytes.
    pub fn new(description: &Description, dense: usize) -> Result<Sizes> {
        let mut experts = try_with_capacity("sizes of experts", description.expert_shapes.len())?;
        for shapes in &description.expert_shapes {
            let mut layer = try_with_capacity("sizes of experts", shapes.len())?;
            layer.extend(shapes.iter().map(ExpertLayout::new));
            experts.push(layer);
        }
        Ok(Sizes { dense, experts })
    }

    /// Bytes of a buffer that any expert fits into.
    pub fn largest(&self) -> usize {
        self.experts.iter().flatten().map(|expert| expert.bytes).max().unwrap_or(0)
    }
}

/// Which experts are on the device.
#[derive(Debug, PartialEq, Eq)]
pub struct Residency {
    /// `[layers]`: a bit for each expert that is.
    on_device: Vec<u64>,
    /// Whether all are.
    is_whole: bool,
}

impl Residency {
    /// What fits into `limit` bytes; 0 is no limit. Fails with `InvalidArgument` where not even the rest fits.
    pub fn choose(sizes: &Sizes, limit: u64) -> Result<Residency> {
        let experts: usize = sizes.experts.iter().flatten().map(|expert| expert.bytes).sum();
        let whole = sizes.dense + experts;
        if limit == 0 || whole as u64 <= limit {
            let mut on_device = try_with_capacity("places of experts", sizes.experts.len())?;
            on_device.extend(sizes.experts.iter().map(|layer| every_expert(layer.len())));
            return Ok(Residency { on_device, is_whole: true });
        }
        let staging = STAGING_BUFFERS * sizes.largest();
        let least = sizes.dense + staging;
        let mut left = usize::try_from(limit).unwrap_or(usize::MAX).checked_sub(least).ok_or_else(|| {
            let text = format!(
                "device_memory_limit is {limit} bytes, expected at least {}, or 0 for no limit: {} bytes of weights are no \
                 experts, and {staging} are for copying experts",
                least.min(whole),
                sizes.dense
            );
            Error::new(Status::InvalidArgument, text).at_key("device_memory_limit")
        })?;
        let mut on_device = try_vec("places of experts", sizes.experts.len(), 0u64)?;
        for expert in 0..sizes.experts.iter().map(Vec::len).max().unwrap_or(0) {
            for (layer, on_device) in sizes.experts.iter().zip(&mut on_device) {
                if let Some(rest) = layer.get(expert).and_then(|layout| left.checked_sub(layout.bytes)) {
                    left = rest;
                    *on_device |= 1 << expert;
                }
            }
        }
        Ok(Residency { on_device, is_whole: false })
    }

    /// Whether an expert is on the device.
    pub fn has(&self, layer: usize, expert: usize) -> bool {
        self.on_device[layer] >> expert & 1 == 1
    }

    /// Whether all experts are.
    pub fn is_whole(&self) -> bool {
        self.is_whole
    }

    /// What it comes to.
    pub fn total(&self, sizes: &Sizes) -> WeightResidency {
        let staging = if self.is_whole { 0 } else { STAGING_BUFFERS * sizes.largest() };
        let mut total =
            WeightResidency { device_bytes: sizes.dense as u64, staging_bytes: staging as u64, ..Default::default() };
        for (layer, experts) in sizes.experts.iter().enumerate() {
            for (expert, layout) in experts.iter().enumerate() {
                add(&mut total, layout, self.has(layer, expert));
            }
        }
        total
    }
}

/// Counts an expert in.
pub fn add(total: &mut WeightResidency, layout: &ExpertLayout, on_device: bool) {
    if on_device {
        total.device_bytes += layout.bytes as u64;
        total.device_experts += 1;
    } else {
        total.host_bytes += layout.matrix_bytes as u64;
        total.host_experts += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::Format;

    fn layout(columns: usize, format: Format) -> ExpertLayout {
        let inner = Shape { rows: 32, columns, format };
        ExpertLayout::new(&ExpertWeights { gate: inner, up: inner, down: Shape { rows: columns, columns: 32, format } })
    }

    /// Three layers of four experts of one size.
    fn sizes() -> (Sizes, usize) {
        let expert = layout(64, Format::Bf16);
        (Sizes { dense: 1000, experts: vec![vec![expert; 4]; 3] }, expert.bytes)
    }

    fn counts(residency: &Residency, layers: usize) -> Vec<u32> {
        (0..layers).map(|layer| residency.on_device[layer].count_ones()).collect()
    }

    #[test]
    fn parts_of_an_expert_follow_each_other_and_none_overlaps() {
        let layout = layout(100, Format::INT8);
        let mut end = 0;
        for part in [ExpertPart::Gate, ExpertPart::Up, ExpertPart::Down] {
            let matrix = layout.of(part);
            assert_eq!((matrix.lines, matrix.lines % 256, matrix.scales % 256), (end, 0, 0));
            assert!(matrix.scales >= matrix.lines + matrix.shape.line_bytes());
            end = matrix.scales + Arena::padded(matrix.shape.scale_bytes());
        }
        assert_eq!((layout.bytes, layout.of(ExpertPart::Down).shape.rows), (end, 100));
        assert!(layout.matrix_bytes < layout.bytes && layout.bytes < layout.matrix_bytes + 6 * 256);
    }

    #[test]
    fn experts_are_spread_evenly_over_the_layers_and_never_more_than_fit() {
        let (sizes, bytes) = sizes();
        for fitting in 0..12 {
            for spare in [0, 1, bytes - 1] {
                let limit = 1000 + (2 + fitting) * bytes + spare;
                let residency = Residency::choose(&sizes, limit as u64).unwrap();
                let total = residency.total(&sizes);
                // Two buffers less, twelve experts fit as they are.
                if fitting >= 10 {
                    assert!(residency.is_whole());
                    assert_eq!((total.device_experts, total.staging_bytes), (12, 0));
                    continue;
                }
                assert_eq!((total.device_experts, total.host_experts), (fitting as u64, 12 - fitting as u64));
                assert_eq!(total.device_bytes, (1000 + fitting * bytes) as u64);
                assert_eq!(total.staging_bytes, 2 * bytes as u64);
                assert!(total.device_bytes + total.staging_bytes <= limit as u64);
                let counts = counts(&residency, 3);
                assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1, "{counts:?}");
                // Those of low numbers, first layers first.
                assert_eq!(residency.has(0, 0), fitting > 0);
                assert!(!residency.has(2, 3));
            }
        }
    }

    #[test]
    fn a_limit_that_is_too_small_names_the_least() {
        let (sizes, bytes) = sizes();
        let least = 1000 + 2 * bytes as u64;
        assert!(Residency::choose(&sizes, least).is_ok());
        let error = Residency::choose(&sizes, least - 1).unwrap_err();
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("device_memory_limit")));
        assert!(error.to_string().contains(&format!("is {} bytes, expected at least {least}", least - 1)), "{error}");
        // A single expert fits whole where it and two buffers would not.
        let single = Sizes { dense: 1000, experts: vec![vec![layout(64, Format::Bf16)]] };
        assert!(Residency::choose(&single, 1000 + bytes as u64).unwrap().is_whole());
        let error = Residency::choose(&single, 1000).unwrap_err();
        assert!(error.to_string().contains(&format!("at least {}", 1000 + bytes)), "{error}");
    }

    #[test]
    fn without_a_limit_everything_is_on_the_device() {
        let (sizes, bytes) = sizes();
        let residency = Residency::choose(&sizes, 0).unwrap();
        assert_eq!(residency, Residency::choose(&sizes, u64::MAX).unwrap());
        let expected =
            WeightResidency { device_bytes: (1000 + 12 * bytes) as u64, device_experts: 12, ..Default::default() };
        assert_eq!(residency.total(&sizes), expected);
    }

    #[test]
    fn experts_of_other_sizes_fill_what_is_left() {
        let (large, small) = (layout(640, Format::F32), layout(64, Format::INT4));
        let sizes = Sizes { dense: 0, experts: vec![vec![large, small], vec![small, large]] };
        let residency = Residency::choose(&sizes, (2 * large.bytes + 2 * small.bytes) as u64).unwrap();
        assert!(residency.is_whole());
        let residency = Residency::choose(&sizes, (2 * large.bytes + 2 * small.bytes - 1) as u64).unwrap();
        let has: Vec<bool> = [(0, 0), (1, 0), (0, 1), (1, 1)].map(|(l, e)| residency.has(l, e)).into();
        // Buffers take as much as both large ones.
        assert_eq!(has, [false, true, false, false]);
    }
}
