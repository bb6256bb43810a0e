//! Products: with frozen weights, and of activations among each other.

use super::CudaTraining;
use super::kernels::TILE;
use crate::backend::cuda::arguments::{TrainingMultiplyArguments, TrainingProductArguments};
use crate::backend::cuda::context::Current;
use crate::backend::cuda::driver::Address;
use crate::backend::cuda::kernels::kind_of;
use crate::backend::cuda::weights::{DeviceMatrix, NO_MATRIX};
use crate::backend::cuda::workspace::at;
use crate::backend::training::{ExpertProjection, Projection, Slots};
use crate::error::Result;

/// Which way a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// `out += x W^T`
    Forward,
    /// `out += gradient W`
    Backward,
}

/// Rows of x, or of a gradient, and of what they are added to.
#[derive(Clone, Copy)]
pub struct Operands {
    pub tokens: usize,
    pub x: Address,
    pub out: Address,
}

/// A matrix whose rows lie in memory one after the other, or whose columns do.
#[derive(Clone, Copy)]
pub struct Side {
    pub start: Address,
    /// Numbers from a row to the next, from a column to the next, and from a matrix to the next.
    pub row: usize,
    pub column: usize,
    pub next: usize,
}

impl Side {
    /// One whose rows have `stride` numbers each.
    pub fn rows(start: Address, stride: usize, next: usize) -> Side {
        Side { start, row: stride, column: 1, next }
    }

    /// The transpose of such a one.
    pub fn transposed(start: Address, stride: usize, next: usize) -> Side {
        Side { start, row: 1, column: stride, next }
    }
}

/// `out[m] = a[m] b[m]` for `count` matrices, of `[rows, depth]` and `[depth, columns]`.
#[derive(Clone, Copy)]
pub struct Multiply {
    pub a: Side,
    pub b: Side,
    /// By rows.
    pub out: Side,
    pub size: [usize; 3],
    pub count: usize,
    /// How many matrices a share a b.
    pub shared_by: usize,
    pub accumulate: bool,
}

impl CudaTraining {
    /// A product with the rows of a matrix from `first` on, `outputs` of them.
    pub(super) fn multiply_weights(
        &self,
        current: &Current,
        matrix: &DeviceMatrix,
        way: Way,
        (first, outputs): (usize, usize),
        operands: Operands,
    ) -> Result<()> {
        let (shape, Operands { tokens, x, out }) = (matrix.shape(), operands);
        let arguments = TrainingProductArguments {
            weights: matrix.arguments(),
            experts: std::ptr::null(),
            selected: std::ptr::null(),
            starts: std::ptr::null(),
            x: at(x),
            out: at(out),
            tokens: tokens as u32,
            inputs: shape.columns as u32,
            first: first as u32,
            outputs: outputs as u32,
        };
        self.launch_product(current, kind_of(shape.format), way, [tokens, 1], &arguments)
    }

    /// The same with a whole matrix of a layer's attention.
    pub(super) fn multiply_projection(
        &self,
        current: &Current,
        (layer, projection): (usize, Projection),
        way: Way,
        operands: Operands,
    ) -> Result<()> {
        let weights = &self.shared.weights.layers[layer];
        let matrix = match projection {
            Projection::Query => &weights.query,
            Projection::Key => &weights.key,
            Projection::Value => &weights.value,
            Projection::Output => &weights.output,
        };
        self.multiply_weights(current, matrix, way, (0, matrix.shape().rows), operands)
    }

    /// Of each expert's matrix and slots.
    pub(super) fn multiply_experts(
        &mut self,
        current: &Current,
        (layer, projection): (usize, ExpertProjection),
        way: Way,
        slots: &Slots,
        operands: Operands,
    ) -> Result<()> {
        let starts = self.workspace.send_starts(current, &slots.starts)?;
        let largest = slots.starts.windows(2).map(|starts| (starts[1] - starts[0]) as usize).max().unwrap_or(0);
        let shared = std::sync::Arc::clone(&self.shared);
        // Until all of it is enqueued nobody moves an expert.
        let mut experts = shared.experts.lock();
        experts.check_all_on_device()?;
        let tables = experts.tables(current, layer)?;
        // All of a layer's experts have one size.
        let Some(sizes) = shared.weights.layers[layer].experts.first() else { return Ok(()) };
        let (table, groups, shape) = match projection {
            ExpertProjection::Gate => (tables.gate, &tables.gate_up_groups, &sizes.gate),
            ExpertProjection::Up => (tables.up, &tables.gate_up_groups, &sizes.up),
            ExpertProjection::Down => (tables.down, &tables.down_groups, &sizes.down),
        };
        for group in groups {
            let arguments = TrainingProductArguments {
                weights: NO_MATRIX,
                experts: at(table),
                selected: at(group.selected),
                starts: at(starts),
                x: at(operands.x),
                out: at(operands.out),
                tokens: 0,
                inputs: shape.columns as u32,
                first: 0,
                outputs: shape.rows as u32,
            };
            self.launch_product(current, group.kind, way, [largest, group.count], &arguments)?;
        }
        Ok(())
    }

    fn launch_product(
        &self,
        current: &Current,
        kind: usize,
        way: Way,
        [tokens, experts]: [usize; 2],
        arguments: &TrainingProductArguments,
    ) -> Result<()> {
        let (kernel, columns) = match way {
            Way::Forward => (&self.kernels.product[kind], arguments.outputs),
            Way::Backward => (&self.kernels.product_gradient[kind], arguments.inputs),
        };
        let grid = [tokens.div_ceil(TILE), (columns as usize).div_ceil(TILE), experts];
        // SAFETY: parts of the workspace with room for the matrix's rows and columns, and weights; all outlive the work.
        unsafe { self.launch(current, kernel, grid, arguments) }
    }

    pub(super) fn multiply(&self, current: &Current, multiply: &Multiply) -> Result<()> {
        let Multiply { a, b, out, size: [rows, depth, columns], count, shared_by, accumulate } = *multiply;
        let arguments = TrainingMultiplyArguments {
            a: at(a.start),
            b: at(b.start),
            out: at(out.start),
            a_next: a.next as u32,
            b_next: b.next as u32,
            out_next: out.next as u32,
            shared_by: shared_by as u32,
            a_row: a.row as u32,
            a_column: a.column as u32,
            b_row: b.row as u32,
            b_column: b.column as u32,
            out_row: out.row as u32,
            rows: rows as u32,
            columns: columns as u32,
            depth: depth as u32,
            accumulate: accumulate.into(),
        };
        let grid = [rows.div_ceil(TILE), columns.div_ceil(TILE), count];
        // SAFETY: parts of the workspace with room for as many matrices of these sizes; they outlive the work.
        unsafe { self.launch(current, &self.kernels.multiply, grid, &arguments) }
    }
}
