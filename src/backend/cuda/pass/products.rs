//! Norms, rounding and products: what every stage is made of.

use super::CudaPass;
use crate::backend::cuda::arguments::*;
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::experts::ExpertGroup;
use crate::backend::cuda::kernels::{
    NARROW_PANELS, NARROW_TOKENS, Products, TENSOR_PANELS, TENSOR_TOKENS, WIDTHS, fewest_on_tensor_cores, kind_of,
    width_of,
};
use crate::backend::cuda::weights::{DeviceMatrix, DeviceVector, NO_MATRIX};
use crate::backend::cuda::workspace::{ActivationBuffer, at};
use crate::error::{Error, Result, Status};
use crate::quant::{Format, Shape};

/// Columns of a block of `round_activations`.
const ROUND_COLUMNS: usize = 256;

/// What the activations of a stage are wanted in beside f32, for the weights they meet there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    integers: bool,
    /// BF16 or F16, for tensor cores.
    halves: Option<Format>,
    /// Tokens, as tensor cores count them: none where results are to be exact.
    on_tensor_cores: usize,
}

impl Wanted {
    /// For weights of these formats. Halves have one format: where both are met, weights in either meet f32.
    pub(super) fn new(formats: impl Iterator<Item = Format> + Clone, on_tensor_cores: usize) -> Wanted {
        let integers = formats.clone().any(|format| format.groups().is_some());
        let mut halves = formats.filter(|format| matches!(format, Format::Bf16 | Format::F16));
        let is_enough = |format: &Format| on_tensor_cores >= fewest_on_tensor_cores(kind_of(*format));
        let first = halves.next().filter(|first| is_enough(first) && halves.all(|other| other == *first));
        Wanted { integers, halves: first, on_tensor_cores }
    }

    pub(super) fn is_something(&self) -> bool {
        self.integers || self.halves.is_some()
    }

    fn halves_are_f16(&self) -> u32 {
        (self.halves == Some(Format::F16)) as u32
    }

    /// How weights of a kind are met.
    fn way(&self, kind: usize) -> Way {
        let is_kind = |format: Format| kind_of(format) == kind;
        let has_scales = is_kind(Format::INT8) || is_kind(Format::INT4);
        let is_enough = self.on_tensor_cores >= fewest_on_tensor_cores(kind);
        match is_enough && (has_scales || self.halves.is_some_and(is_kind)) {
            false => Way::Tiled,
            true if self.on_tensor_cores <= NARROW_TOKENS => Way::Narrow,
            true => Way::Tensor,
        }
    }
}

/// How products are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// A panel by a tile of a few tokens.
    Tiled,
    /// On tensor cores, two panels by all tokens.
    Narrow,
    /// On tensor cores, eight panels by a tile of many tokens.
    Tensor,
}

impl Way {
    /// Panels of a block.
    fn panels(self) -> usize {
        match self {
            Way::Tiled => 1,
            Way::Narrow => NARROW_PANELS,
            Way::Tensor => TENSOR_PANELS,
        }
    }
}

/// A matrix, where its products go, and the columns of a row there.
pub(super) type Product<'a> = (&'a DeviceMatrix, Address, usize);

impl CudaPass {
    /// What a stage of so many tokens with these weights wants of their activations.
    pub(super) fn wanted<'a>(&self, weights: impl Iterator<Item = &'a DeviceMatrix> + Clone, tokens: usize) -> Wanted {
        self.wanted_for(weights.map(DeviceMatrix::shape), tokens)
    }

    /// The same of shapes alone.
    pub(super) fn wanted_for<'a>(&self, weights: impl Iterator<Item = &'a Shape> + Clone, tokens: usize) -> Wanted {
        let on_tensor_cores = if self.shared.exact { 0 } else { tokens };
        Wanted::new(weights.map(|shape| shape.format), on_tensor_cores)
    }

    /// `normed[row] = rms_norm(x[index[row]])`, in f32 and what else is wanted.
    pub(super) fn norm(
        &self,
        current: &Current,
        weight: &DeviceVector,
        index: Address,
        rows: usize,
        wanted: Wanted,
    ) -> Result<()> {
        let (parts, config) = (&self.workspace.parts, &self.shared.config);
        let arguments = NormArguments {
            x: at(parts.x),
            index: at(index),
            weight: at(weight.0),
            numbers: at(parts.normed.numbers),
            integers: at(if wanted.integers { parts.normed.integers } else { 0 }),
            blocks: at(if wanted.integers { parts.normed.blocks } else { 0 }),
            halves: at(if wanted.halves.is_some() { parts.normed.halves } else { 0 }),
            eps: config.rms_norm_eps,
            columns: config.hidden_size as u32,
            stride: parts.normed.stride as u32,
            halves_are_f16: wanted.halves_are_f16(),
        };
        // SAFETY: buffers of this pass with room for `rows` rows, and weights; all outlive the work, see above.
        unsafe { self.shared.kernels.norm.launch(current, [rows, 1, 1], &arguments) }
    }

    /// Rows in what is wanted beside f32: `rows` of them, or as many of those as the device says at `counted`.
    pub(super) fn round(
        &self,
        current: &Current,
        buffer: &ActivationBuffer,
        rows: usize,
        counted: Address,
        wanted: Wanted,
    ) -> Result<()> {
        if !wanted.is_something() {
            return Ok(());
        }
        let arguments = RoundArguments {
            numbers: at(buffer.numbers),
            integers: at(if wanted.integers { buffer.integers } else { 0 }),
            blocks: at(if wanted.integers { buffer.blocks } else { 0 }),
            halves: at(if wanted.halves.is_some() { buffer.halves } else { 0 }),
            stride: buffer.stride as u32,
            halves_are_f16: wanted.halves_are_f16(),
            rows: at(counted),
        };
        let most = buffer.stride.div_ceil(ROUND_COLUMNS);
        let parts = self.enough_blocks().div_ceil(rows.max(1)).clamp(1, most);
        // SAFETY: as in `norm`.
        unsafe { self.shared.kernels.round_activations.launch(current, [rows, parts, 1], &arguments) }
    }

    /// `out[token] = weights x[token]` for each product, of as many columns all of them, or `out[token] +=`.
    pub(super) fn multiply(
        &self,
        current: &Current,
        products: &[Product],
        x: ActivationArguments,
        (tokens, wanted): (usize, Wanted),
        accumulate: bool,
    ) -> Result<()> {
        let kernels = &self.shared.kernels.matmul;
        // One kind, but for checkpoints of mixed dtypes.
        for (kind, tiled) in kernels.tiled.iter().enumerate() {
            let mut arguments = MatmulArguments {
                weights: [NO_MATRIX; 3],
                out: [std::ptr::null_mut(); 3],
                out_stride: [0; 3],
                count: 0,
                x,
                tokens: tokens as u32,
                accumulate: accumulate as u32,
            };
            let way = wanted.way(kind);
            let (mut count, mut blocks) = (0, 0);
            for (matrix, out, stride) in products.iter().filter(|(matrix, ..)| kind_of(matrix.shape().format) == kind) {
                arguments.weights[count] = matrix.arguments();
                arguments.out[count] = at(*out);
                arguments.out_stride[count] = *stride as u32;
                blocks += matrix.shape().panels().div_ceil(way.panels());
                count += 1;
            }
            if count > 0 {
                arguments.count = count as u32;
                let width = width_of(tokens);
                let (kernel, grid) = match way {
                    Way::Tiled => (Some(&tiled[width]), [blocks, tokens.div_ceil(WIDTHS[width]), 1]),
                    Way::Narrow => (kernels.narrow[kind].as_ref(), [blocks, 1, 1]),
                    Way::Tensor => (kernels.tensor[kind].as_ref(), [tokens.div_ceil(TENSOR_TOKENS), blocks, 1]),
                };
                let kernel = kernel.ok_or_else(no_kernel)?;
                // SAFETY: as in `norm`; the outputs have room for `tokens` rows of the matrices.
                unsafe { kernel.launch(current, grid, &arguments) }?;
            }
        }
        Ok(())
    }

    /// Products of slots with the experts' weights, whichever experts have any.
    pub(super) fn multiply_slots(
        &self,
        current: &Current,
        kernels: &Products<ExpertArguments>,
        groups: &[ExpertGroup],
        (panels, wanted): (usize, Wanted),
        arguments: ExpertArguments,
    ) -> Result<()> {
        // An expert has at most one slot of each token.
        let tokens = self.shape.tokens;
        for group in groups {
            let arguments = ExpertArguments { selected: at(group.selected), ..arguments };
            let way = wanted.way(group.kind);
            let blocks = panels.div_ceil(way.panels());
            let (kernel, grid) = match way {
                Way::Tiled => (Some(&kernels.tiled[group.kind][width_of(tokens)]), [blocks, group.count, 1]),
                Way::Narrow => (kernels.narrow[group.kind].as_ref(), [blocks, group.count, 1]),
                Way::Tensor => {
                    (kernels.tensor[group.kind].as_ref(), [tokens.div_ceil(TENSOR_TOKENS), blocks, group.count])
                }
            };
            let kernel = kernel.ok_or_else(no_kernel)?;
            // SAFETY: as in `norm`; slots are numbered on the device, below tokens times top_k.
            unsafe { kernel.launch(current, grid, &arguments) }?;
        }
        Ok(())
    }
}

fn no_kernel() -> Error {
    Error::new(Status::Internal, "there is no kernel for these weights on tensor cores")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_wanted_as_the_weights_meet_them() {
        let wanted = |formats: &[Format], tokens| Wanted::new(formats.iter().copied(), tokens);
        let found = wanted(&[Format::Bf16, Format::INT4, Format::F32], 17);
        assert_eq!(found, Wanted { integers: true, halves: Some(Format::Bf16), on_tensor_cores: 17 });
        use Way::{Narrow, Tensor, Tiled};
        let ways = |wanted: Wanted| [0, 1, 2, 3, 4].map(|kind| wanted.way(kind));
        assert_eq!(ways(found), [Tiled, Tensor, Tiled, Tensor, Tensor]);
        let both = [Format::Bf16, Format::INT8];
        assert_eq!(ways(wanted(&both, 16)), [Tiled, Narrow, Tiled, Narrow, Narrow]);
        assert_eq!(ways(wanted(&both, 8)), [Tiled, Tiled, Tiled, Narrow, Narrow]);
        assert_eq!(ways(wanted(&both, 3)), [Tiled; 5]);
        // Halves of one format alone.
        assert_eq!(ways(wanted(&[Format::F16, Format::Bf16], 17)), [Tiled, Tiled, Tiled, Tensor, Tensor]);
        assert_eq!(wanted(&[Format::F16, Format::F16], 17).halves_are_f16(), 1);
        let exact = wanted(&[Format::F16, Format::INT8], 0);
        assert_eq!((exact.integers, exact.halves, ways(exact)), (true, None, [Tiled; 5]));
        assert!(!wanted(&[Format::F32, Format::Bf16], 8).is_something());
    }
}
