//! Norms, rounding and products: what every stage is made of.

use super::CudaPass;
use crate::backend::cuda::arguments::*;
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::experts::ExpertGroup;
use crate::backend::cuda::kernels::{
    MAX_TILED_TOKENS, Products, TENSOR_PANELS, TENSOR_TOKENS, WIDTHS, kind_of, width_of,
};
use crate::backend::cuda::weights::{DeviceMatrix, DeviceVector, NO_MATRIX};
use crate::backend::cuda::workspace::{ActivationBuffer, at};
use crate::error::Result;
use crate::quant::{Format, Shape};

/// Columns of a block of `round_activations`.
const ROUND_COLUMNS: usize = 256;

/// What the activations of a stage are wanted in beside f32, for the weights they meet there.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Wanted {
    integers: bool,
    /// BF16 or F16, for tensor cores.
    halves: Option<Format>,
    /// Whether there are tokens enough for tensor cores.
    tensor: bool,
}

impl Wanted {
    /// For weights of these formats. Halves have one format: where both are met, weights in either meet f32.
    pub(super) fn new(formats: impl Iterator<Item = Format> + Clone, tensor: bool) -> Wanted {
        let integers = formats.clone().any(|format| format.groups().is_some());
        let mut halves = formats.filter(|format| matches!(format, Format::Bf16 | Format::F16));
        let first = halves.next().filter(|first| tensor && halves.all(|other| other == *first));
        Wanted { integers, halves: first, tensor }
    }

    pub(super) fn is_something(&self) -> bool {
        self.integers || self.halves.is_some()
    }

    fn halves_are_f16(&self) -> u32 {
        (self.halves == Some(Format::F16)) as u32
    }

    /// Whether weights of a kind are met on tensor cores.
    pub(super) fn uses_tensor(&self, kind: usize) -> bool {
        let is_kind = |format: Format| kind_of(format) == kind;
        let has_scales = is_kind(Format::INT8) || is_kind(Format::INT4);
        self.tensor && (has_scales || self.halves.is_some_and(is_kind))
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
        let tensor = tokens > MAX_TILED_TOKENS && !self.shared.exact;
        Wanted::new(weights.map(|shape| shape.format), tensor)
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
        for (kind, tensor) in kernels.tensor.iter().enumerate() {
            let mut arguments = MatmulArguments {
                weights: [NO_MATRIX; 3],
                out: [std::ptr::null_mut(); 3],
                out_stride: [0; 3],
                count: 0,
                x,
                tokens: tokens as u32,
                accumulate: accumulate as u32,
            };
            let (mut count, mut panels, mut groups) = (0, 0, 0);
            for (matrix, out, stride) in products.iter().filter(|(matrix, ..)| kind_of(matrix.shape().format) == kind) {
                arguments.weights[count] = matrix.arguments();
                arguments.out[count] = at(*out);
                arguments.out_stride[count] = *stride as u32;
                panels += matrix.shape().panels();
                groups += matrix.shape().panels().div_ceil(TENSOR_PANELS);
                count += 1;
            }
            if count > 0 {
                arguments.count = count as u32;
                let width = width_of(tokens);
                let (kernel, grid) = match tensor.as_ref().filter(|_| wanted.uses_tensor(kind)) {
                    Some(tensor) => (tensor, [tokens.div_ceil(TENSOR_TOKENS), groups, 1]),
                    None => (&kernels.tiled[kind][width], [panels, tokens.div_ceil(WIDTHS[width]), 1]),
                };
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
            let tensor = kernels.tensor[group.kind].as_ref().filter(|_| wanted.uses_tensor(group.kind));
            let (kernel, grid) = match tensor {
                Some(tensor) => (tensor, [tokens.div_ceil(TENSOR_TOKENS), panels.div_ceil(TENSOR_PANELS), group.count]),
                None => (&kernels.tiled[group.kind][width_of(tokens)], [panels, group.count, 1]),
            };
            // SAFETY: as in `norm`; slots are numbered on the device, below tokens times top_k.
            unsafe { kernel.launch(current, grid, &arguments) }?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_wanted_as_the_weights_meet_them() {
        let wanted = |formats: &[Format], tensor| Wanted::new(formats.iter().copied(), tensor);
        let found = wanted(&[Format::Bf16, Format::INT4, Format::F32], true);
        assert_eq!(found, Wanted { integers: true, halves: Some(Format::Bf16), tensor: true });
        let uses = |wanted: Wanted| [0, 1, 2, 3, 4].map(|kind| wanted.uses_tensor(kind));
        assert_eq!(uses(found), [false, true, false, true, true]);
        // Halves of one format alone.
        assert_eq!(uses(wanted(&[Format::F16, Format::Bf16], true)), [false, false, false, true, true]);
        assert_eq!(wanted(&[Format::F16, Format::F16], true).halves_are_f16(), 1);
        let few = wanted(&[Format::F16, Format::INT8], false);
        assert_eq!((few.integers, few.halves, uses(few)), (true, None, [false; 5]));
        assert!(!wanted(&[Format::F32, Format::Bf16], false).is_something());
    }
}
