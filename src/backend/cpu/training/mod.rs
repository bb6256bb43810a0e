//! Training on the CPU: the operations of [`Training`] over the weights that inference reads, on the same threads.

mod attention;
mod products;

use std::ops::Range;
use std::sync::Arc;

use super::Shared;
use super::kernels::math::{exp, rms_norm, rotate};
use super::kernels::matmul::{Output, TokenRows};
use super::kernels::rows::{LogSum, RowWork, rotate_back};
use crate::backend::ops::{Cancel, Limit};
use crate::backend::training::{ExpertProjection, NO_SLOT, Norm, Projection, Rows, Slots, Training, TrainingLimits};
use crate::error::{Error, Result, Status};
use crate::memory::{Buffer, try_vec};
use crate::model::Config;
use crate::model::weights::{ExpertWeights, LayerWeights, Matrix};
use crate::quant::PANEL_ROWS;
use attention::{Heads, Inputs};
use products::{Product, Way};

const WHAT: &str = "the workspace of training";

/// Panels of the head whose logits are held at once.
const HEAD_PANELS: usize = 32;

/// A workspace on the CPU.
pub struct CpuTraining {
    shared: Arc<Shared>,
    cancel: Arc<Cancel>,
    /// Everything the pass asks for.
    numbers: Buffer<f32>,
    /// `[max_targets, HEAD_PANELS * PANEL_ROWS]`: logits of a part of the vocabulary.
    logits: Buffer<f32>,
    /// `[max_tokens, head_dim / 2]` each: of every position a document can have.
    cosines: Buffer<f32>,
    sines: Buffer<f32>,
    /// `[threads, scratch_size]`
    scratch: Buffer<f32>,
    scratch_size: usize,
}

impl CpuTraining {
    pub(super) fn new(shared: Arc<Shared>, limits: TrainingLimits, cancel: Arc<Cancel>) -> Result<CpuTraining> {
        let scratch_size = scratch_size(&shared.config, &limits);
        let times = |a: usize, b: usize| a.checked_mul(b).ok_or_else(|| Error::out_of_memory(WHAT, usize::MAX));
        let (cosines, sines) = shared.numerics.angles(WHAT, limits.max_tokens)?;
        Ok(CpuTraining {
            cosines,
            sines,
            numbers: Buffer::zeroed(WHAT, limits.numbers)?,
            logits: Buffer::zeroed(WHAT, times(limits.max_targets, HEAD_PANELS * PANEL_ROWS)?)?,
            scratch: Buffer::zeroed(WHAT, times(shared.pool.threads(), scratch_size)?)?,
            scratch_size,
            cancel,
            shared,
        })
    }

    /// What operations work with, and parts of the workspace, none of which overlap.
    fn parts<const N: usize>(&mut self, rows: [Rows; N]) -> Result<(Work<'_>, [&mut [f32]; N])> {
        let parts = self
            .numbers
            .get_disjoint_mut(rows.map(|rows| rows.range()))
            .map_err(|_| Error::new(Status::Internal, "parts of a training workspace overlap or are not in it"))?;
        let scratch = Output::new(&mut self.scratch, self.scratch_size);
        let angles = (&*self.cosines, &*self.sines);
        Ok((Work { shared: &self.shared, cancel: &self.cancel, angles, scratch }, parts))
    }
}

/// Numbers that a thread works with.
fn scratch_size(config: &Config, limits: &TrainingLimits) -> usize {
    heads(config).scratch(limits.max_tokens).max(products::SCRATCH).max(config.hidden_size)
}

/// Bytes of a workspace within these limits on so many threads.
pub fn workspace_bytes(config: &Config, limits: &TrainingLimits, threads: usize) -> usize {
    let angles = limits.max_tokens.saturating_mul(config.head_dim / 2);
    let logits = limits.max_targets.saturating_mul(HEAD_PANELS * PANEL_ROWS);
    let scratch = threads.saturating_mul(scratch_size(config, limits));
    let numbers = [limits.numbers, angles, angles, logits, scratch].into_iter().fold(0usize, usize::saturating_add);
    numbers.saturating_mul(size_of::<f32>())
}

fn heads(config: &Config) -> Heads {
    Heads { query: config.num_attention_heads, key_value: config.num_key_value_heads, head_dim: config.head_dim }
}

/// Rows that are all tokens of a product.
fn all_rows(data: &[f32], rows: Rows) -> TokenRows<'_> {
    TokenRows { data, columns: rows.columns, index: None, count: rows.rows }
}

/// Numbers an item of row by row work goes through.
const ITEM_NUMBERS: usize = 1 << 14;

/// The threads and their scratch.
struct Work<'a> {
    shared: &'a Shared,
    cancel: &'a Cancel,
    /// Cosines and sines, as `CpuTraining` has them.
    angles: (&'a [f32], &'a [f32]),
    scratch: Output,
}

impl Work<'_> {
    /// Runs `items` items over the pool, `work(item, scratch of the thread)`.
    fn run(&self, items: usize, work: impl Fn(usize, &mut [f32]) + Sync) -> Result<()> {
        let limit = Limit::none(self.cancel);
        let done = self.shared.pool.run(0..items, &limit, &|item, thread| {
            // SAFETY: the workspace is borrowed for this call alone, and a thread has one index and one item at a time.
            work(item, unsafe { self.scratch.row_part(thread, 0..self.scratch_size()) });
        });
        if done == items { Ok(()) } else { Err(Cancel::error()) }
    }

    fn scratch_size(&self) -> usize {
        self.scratch.stride()
    }

    /// `work(row, the row of each output)` for all rows, over the pool.
    fn for_rows<const N: usize>(
        &self,
        rows: usize,
        outs: [(&mut [f32], usize); N],
        work: impl Fn(usize, [&mut [f32]; N]) + Sync,
    ) -> Result<()> {
        let columns: usize = outs.iter().map(|(_, columns)| *columns).sum();
        let outs = outs.map(|(out, columns)| (Output::new(out, columns), columns));
        let per_item = (ITEM_NUMBERS / columns.max(1)).max(1);
        self.run(rows.div_ceil(per_item), |item, _| {
            for row in item * per_item..((item + 1) * per_item).min(rows) {
                // SAFETY: items have rows of their own, and the outputs are borrowed until all are done.
                work(row, outs.each_ref().map(|(out, columns)| unsafe { out.row_part(row, 0..*columns) }));
            }
        })
    }

    /// Runs products whose rows of outputs differ.
    fn multiply(&self, products: &[Product]) -> Result<()> {
        self.run(products.iter().map(Product::items).sum(), |item, scratch| {
            let mut item = item;
            for product in products {
                if item < product.items() {
                    // SAFETY: products have rows, and their items columns, of their own, and the outputs are borrowed until
                    // all are done.
                    return unsafe { product.run(&self.shared.kernels, item, scratch) };
                }
                item -= product.items();
            }
        })
    }

    fn norm_weights(&self, norm: Norm) -> &[f32] {
        match norm {
            Norm::Input(layer) => &self.shared.weights.layers[layer].input_norm,
            Norm::PostAttention(layer) => &self.shared.weights.layers[layer].post_attention_norm,
            Norm::Final => &self.shared.weights.final_norm,
        }
    }

    fn head(&self) -> &Matrix {
        self.shared.weights.head.as_ref().unwrap_or(&self.shared.weights.embedding)
    }

    /// A product of each expert's matrix with its slots.
    fn multiply_experts(
        &self,
        layer: usize,
        projection: ExpertProjection,
        way: Way,
        slots: &Slots,
        (x, x_columns): (&[f32], usize),
        (out, out_columns): (&mut [f32], usize),
    ) -> Result<()> {
        let out = Output::new(out, out_columns);
        let experts = self.shared.weights.layers[layer].experts.iter().enumerate();
        let products: Vec<Product> = experts
            .map(|(expert, weights)| {
                let slots = slots.of_expert(expert);
                let x = TokenRows { data: x, columns: x_columns, index: None, count: slots.end }.part(slots.clone());
                Product::new(of_expert(weights, projection), way, x, out.skip_rows(slots.start))
            })
            .collect();
        self.multiply(&products)
    }
}

fn of_layer(layer: &LayerWeights, projection: Projection) -> &Matrix {
    match projection {
        Projection::Query => &layer.query,
        Projection::Key => &layer.key,
        Projection::Value => &layer.value,
        Projection::Output => &layer.output,
    }
}

fn of_expert(expert: &ExpertWeights, projection: ExpertProjection) -> &Matrix {
    match projection {
        ExpertProjection::Gate => &expert.gate,
        ExpertProjection::Up => &expert.up,
        ExpertProjection::Down => &expert.down,
    }
}

/// `out += factor * x`
fn add_scaled(x: &[f32], factor: f32, out: &mut [f32]) {
    out.iter_mut().zip(x).for_each(|(out, x)| *out += factor * x);
}

/// Rows `[columns]` of a matrix.
fn row(data: &[f32], columns: usize, row: usize) -> &[f32] {
    &data[row * columns..(row + 1) * columns]
}

impl Training for CpuTraining {
    fn read_gates(&self, out: &mut [f32]) -> Result<()> {
        self.shared.read_gates(out);
        Ok(())
    }

    fn write(&mut self, numbers: &[f32], to: Rows) -> Result<()> {
        let (_, [to]) = self.parts([to])?;
        to.copy_from_slice(numbers);
        Ok(())
    }

    fn read(&mut self, from: Rows, numbers: &mut [f32]) -> Result<()> {
        let (_, [from]) = self.parts([from])?;
        numbers.copy_from_slice(from);
        Ok(())
    }

    fn clear(&mut self, out: Rows) -> Result<()> {
        let (_, [out]) = self.parts([out])?;
        out.fill(0.0);
        Ok(())
    }

    fn copy(&mut self, x: Rows, out: Rows) -> Result<()> {
        let (_, [x, out]) = self.parts([x, out])?;
        out.copy_from_slice(x);
        Ok(())
    }

    fn embed(&mut self, tokens: &[u32], out: Rows) -> Result<()> {
        let (work, [numbers]) = self.parts([out])?;
        let scale = work.shared.numerics.embedding_scale;
        work.for_rows(out.rows, [(numbers, out.columns)], |row, [out]| {
            work.shared.weights.embedding.read_row(tokens[row] as usize, out);
            out.iter_mut().for_each(|number| *number *= scale);
        })
    }

    fn norm(&mut self, norm: Norm, x: Rows, out: Rows) -> Result<()> {
        let (work, [x, numbers]) = self.parts([x, out])?;
        let (weights, eps) = (work.norm_weights(norm), work.shared.config.rms_norm_eps);
        work.for_rows(out.rows, [(numbers, out.columns)], |token, [numbers]| {
            rms_norm(row(x, out.columns, token), weights, eps, numbers);
        })
    }

    fn add_norm_gradient(&mut self, norm: Norm, x: Rows, gradient: Rows, out: Rows) -> Result<()> {
        let (work, [x, gradient, numbers]) = self.parts([x, gradient, out])?;
        let (weights, eps) = (work.norm_weights(norm), work.shared.config.rms_norm_eps);
        work.for_rows(out.rows, [(numbers, out.columns)], |token, [numbers]| {
            let (x, gradient) = (row(x, out.columns, token), row(gradient, out.columns, token));
            work.shared.kernels.run_row(RowWork::NormGradient { x, weight: weights, eps, gradient, out: numbers });
        })
    }

    fn add_product(&mut self, layer: usize, projection: Projection, x: Rows, out: Rows) -> Result<()> {
        let (work, [numbers, out_numbers]) = self.parts([x, out])?;
        let weights = of_layer(&work.shared.weights.layers[layer], projection);
        let out = Output::new(out_numbers, out.columns);
        work.multiply(&[Product::new(weights, Way::Forward, all_rows(numbers, x), out)])
    }

    fn add_product_gradient(&mut self, layer: usize, projection: Projection, gradient: Rows, out: Rows) -> Result<()> {
        let (work, [numbers, out_numbers]) = self.parts([gradient, out])?;
        let weights = of_layer(&work.shared.weights.layers[layer], projection);
        let out = Output::new(out_numbers, out.columns);
        work.multiply(&[Product::new(weights, Way::Transposed, all_rows(numbers, gradient), out)])
    }

    fn rotate(&mut self, positions: &[u32], back: bool, heads: Rows) -> Result<()> {
        let (work, [numbers]) = self.parts([heads])?;
        let (head_dim, (cosines, sines)) = (work.shared.config.head_dim, work.angles);
        work.for_rows(heads.rows, [(numbers, heads.columns)], |token, [numbers]| {
            let angles = |table| row(table, head_dim / 2, positions[token] as usize);
            let rotate = if back { rotate_back } else { rotate };
            numbers.chunks_exact_mut(head_dim).for_each(|head| rotate(head, angles(cosines), angles(sines)));
        })
    }

    fn attention(&mut self, documents: &[Range<usize>], qkv: [Rows; 3], out: Rows, log_sums: Rows) -> Result<()> {
        let [query, key, value] = qkv;
        let (work, [query, key, value, numbers, sums]) = self.parts([query, key, value, out, log_sums])?;
        let inputs = Inputs { heads: heads(&work.shared.config), query, key, value };
        let outs = (&Output::new(numbers, out.columns), &Output::new(sums, log_sums.columns));
        work.run(documents.len() * inputs.heads.key_value, |item, scratch| {
            let (document, head) = (documents[item / inputs.heads.key_value].clone(), item % inputs.heads.key_value);
            // SAFETY: items have a document's rows or a head's columns of their own, borrowed until all are done.
            unsafe { inputs.forward(&work.shared.kernels, document, head, outs, scratch) };
        })
    }

    fn add_attention_gradient(
        &mut self,
        documents: &[Range<usize>],
        qkv: [Rows; 3],
        out: Rows,
        log_sums: Rows,
        gradient: Rows,
        qkv_gradients: [Rows; 3],
    ) -> Result<()> {
        let columns = qkv_gradients.map(|rows| rows.columns);
        let ([query, key, value], [dq, dk, dv]) = (qkv, qkv_gradients);
        let (work, [query, key, value, out, log_sums, gradient, dq, dk, dv]) =
            self.parts([query, key, value, out, log_sums, gradient, dq, dk, dv])?;
        let inputs = Inputs { heads: heads(&work.shared.config), query, key, value };
        let given = (&*out, &*log_sums, &*gradient);
        let gradients = [Output::new(dq, columns[0]), Output::new(dk, columns[1]), Output::new(dv, columns[2])];
        work.run(documents.len() * inputs.heads.key_value, |item, scratch| {
            let (document, head) = (documents[item / inputs.heads.key_value].clone(), item % inputs.heads.key_value);
            // SAFETY: as in `attention`.
            unsafe { inputs.backward(&work.shared.kernels, document, head, given, &gradients, scratch) };
        })
    }

    fn add_gate_product(&mut self, x: Rows, gate: Rows, out: Rows) -> Result<()> {
        let (work, [numbers, gate, out_numbers]) = self.parts([x, gate, out])?;
        work.for_rows(out.rows, [(out_numbers, out.columns)], |token, [out]| {
            let x = row(numbers, x.columns, token);
            for (out, gate) in out.iter_mut().zip(gate.chunks_exact(x.len())) {
                let mut product = 0.0;
                work.shared.kernels.run_row(RowWork::Product { a: x, b: gate, out: &mut product });
                *out += product;
            }
        })
    }

    fn add_gate_input_gradient(&mut self, gradient: Rows, gate: Rows, out: Rows) -> Result<()> {
        let (work, [numbers, gate, out_numbers]) = self.parts([gradient, gate, out])?;
        work.for_rows(out.rows, [(out_numbers, out.columns)], |token, [out]| {
            let gradient = row(numbers, gradient.columns, token);
            gradient.iter().zip(gate.chunks_exact(out.len())).for_each(|(factor, gate)| add_scaled(gate, *factor, out));
        })
    }

    fn add_gate_gradient(&mut self, gradient: Rows, x: Rows, out: Rows) -> Result<()> {
        let (work, [numbers, x, out_numbers]) = self.parts([gradient, x, out])?;
        // Columns of the gate are shared out, so that each has its tokens in one order.
        let (experts, hidden_size) = (out.rows, out.columns);
        let out = Output::new(out_numbers, hidden_size);
        work.run(experts * hidden_size.div_ceil(GATE_COLUMNS), |item, _| {
            let (expert, part) = (item % experts, item / experts);
            let columns = part * GATE_COLUMNS..((part + 1) * GATE_COLUMNS).min(hidden_size);
            let mut sums = [0f64; GATE_COLUMNS];
            for (gradient, x) in numbers.chunks_exact(experts).zip(x.chunks_exact(hidden_size)) {
                let factor = f64::from(gradient[expert]);
                sums.iter_mut().zip(&x[columns.clone()]).for_each(|(sum, x)| *sum += factor * f64::from(*x));
            }
            // SAFETY: items have an expert's row or columns of their own, borrowed until all are done.
            let out = unsafe { out.row_part(expert, columns) };
            out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum as f32);
        })
    }

    fn gather(&mut self, slots: &Slots, weighted: bool, x: Rows, out: Rows) -> Result<()> {
        let (work, [x, numbers]) = self.parts([x, out])?;
        work.for_rows(out.rows, [(numbers, out.columns)], |slot, [numbers]| {
            let x = row(x, out.columns, slots.tokens[slot] as usize);
            let factor = if weighted { slots.weights[slot] } else { 1.0 };
            numbers.iter_mut().zip(x).for_each(|(number, x)| *number = factor * x);
        })
    }

    fn add_combined(&mut self, slots: &Slots, weighted: bool, y: Rows, out: Rows) -> Result<()> {
        let (work, [y, numbers]) = self.parts([y, out])?;
        work.for_rows(out.rows, [(numbers, out.columns)], |token, [numbers]| {
            let of_token = &slots.of_tokens[token * slots.choices..(token + 1) * slots.choices];
            for slot in of_token.iter().filter(|slot| **slot != NO_SLOT).map(|slot| *slot as usize) {
                add_scaled(row(y, out.columns, slot), if weighted { slots.weights[slot] } else { 1.0 }, numbers);
            }
        })
    }

    fn row_products(&mut self, a: Rows, b: Rows, out: Rows) -> Result<()> {
        let columns = a.columns;
        let (work, [a, b, numbers]) = self.parts([a, b, out])?;
        work.for_rows(out.rows, [(numbers, 1)], |slot, [out]| {
            let (a, b) = (row(a, columns, slot), row(b, columns, slot));
            work.shared.kernels.run_row(RowWork::Product { a, b, out: &mut out[0] });
        })
    }

    fn add_expert_product(
        &mut self,
        layer: usize,
        projection: ExpertProjection,
        slots: &Slots,
        x: Rows,
        out: Rows,
    ) -> Result<()> {
        let (work, [numbers, out_numbers]) = self.parts([x, out])?;
        let (x, out) = ((&*numbers, x.columns), (out_numbers, out.columns));
        work.multiply_experts(layer, projection, Way::Forward, slots, x, out)
    }

    fn add_expert_product_gradient(
        &mut self,
        layer: usize,
        projection: ExpertProjection,
        slots: &Slots,
        gradient: Rows,
        out: Rows,
    ) -> Result<()> {
        let (work, [numbers, out_numbers]) = self.parts([gradient, out])?;
        let (gradient, out) = ((&*numbers, gradient.columns), (out_numbers, out.columns));
        work.multiply_experts(layer, projection, Way::Transposed, slots, gradient, out)
    }

    fn geglu(&mut self, gate: Rows, up: Rows, out: Rows) -> Result<()> {
        let (work, [gate, up, numbers]) = self.parts([gate, up, out])?;
        let exact = work.shared.numerics.exact_gelu;
        work.for_rows(out.rows, [(numbers, out.columns)], |slot, [numbers]| {
            let (gate, up) = (row(gate, out.columns, slot), row(up, out.columns, slot));
            work.shared.kernels.run_row(RowWork::Geglu { gate, up, exact, out: numbers });
        })
    }

    fn geglu_gradient(&mut self, gradient: Rows, gate: Rows, up: Rows) -> Result<()> {
        let (work, [gradient, gates, ups]) = self.parts([gradient, gate, up])?;
        let exact = work.shared.numerics.exact_gelu;
        work.for_rows(gate.rows, [(gates, gate.columns), (ups, up.columns)], |slot, [gates, ups]| {
            let gradient = row(gradient, gate.columns, slot);
            work.shared.kernels.run_row(RowWork::GegluGradient { gradient, exact, gate: gates, up: ups });
        })
    }

    fn log_probabilities(&mut self, targets: &[u32], x: Rows, out: Rows) -> Result<()> {
        let mut logits = std::mem::replace(&mut self.logits, Buffer::zeroed(WHAT, 0)?);
        let result = self.log_probabilities_with(targets, x, out, None, &mut logits);
        self.logits = logits;
        result
    }

    fn log_probabilities_and_gradients(&mut self, targets: &[u32], x: Rows, out: Rows, gradient: Rows) -> Result<()> {
        self.clear(gradient)?;
        let mut logits = std::mem::replace(&mut self.logits, Buffer::zeroed(WHAT, 0)?);
        let result = self.log_probabilities_with(targets, x, out, Some(gradient), &mut logits);
        self.logits = logits;
        result
    }

    fn add_log_probability_gradient(
        &mut self,
        targets: &[u32],
        x: Rows,
        log_sums: Rows,
        gradients: &[f32],
        out: Rows,
    ) -> Result<()> {
        let mut logits = std::mem::replace(&mut self.logits, Buffer::zeroed(WHAT, 0)?);
        let result = self.add_gradient_with((targets, gradients), x, log_sums, out, &mut logits);
        self.logits = logits;
        result
    }
}

/// Columns of a gate's gradient that a thread sums at once.
const GATE_COLUMNS: usize = 256;

impl CpuTraining {
    /// Calls `see` with the logits of all rows of `x` for one part of the vocabulary after the other: `see(work, panels, logits
    /// [rows, tokens of the panels], out)`.
    fn for_each_part(
        &mut self,
        parts: [Rows; 3],
        logits: &mut [f32],
        mut see: impl FnMut(&Work, Range<usize>, &mut [f32], &mut [f32], &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let x_rows = parts[0];
        let (work, [x, second, third]) = self.parts(parts)?;
        let head = work.head();
        let panels = head.shape().panels();
        for first in (0..panels).step_by(HEAD_PANELS) {
            let panels = first..(first + HEAD_PANELS).min(panels);
            let width = (panels.end * PANEL_ROWS).min(head.rows()) - panels.start * PANEL_ROWS;
            let logits = &mut logits[..x_rows.rows * width];
            logits.fill(0.0);
            let product = Product {
                panels: panels.clone(),
                ..Product::new(head, Way::Forward, all_rows(x, x_rows), Output::new(logits, width))
            };
            work.multiply(&[product])?;
            see(&work, panels, logits, second, third)?;
        }
        Ok(())
    }

    /// With `gradient`, which holds zeros, the gradients of the log-probabilities too: `W[target] - sum of softmax W`. The sum is
    /// of e^(logit - largest so far), and a part whose largest is larger scales what came before it, as it does in `LogSum`.
    fn log_probabilities_with(
        &mut self,
        targets: &[u32],
        x: Rows,
        out: Rows,
        gradient: Option<Rows>,
        logits: &mut [f32],
    ) -> Result<()> {
        let mut sums = try_vec(WHAT, x.rows, LogSum::EMPTY)?;
        let mut of_targets = try_vec(WHAT, x.rows, 0f32)?;
        let nothing = Rows { start: out.range().end, rows: 0, columns: 0 };
        // Of each row and part: its largest logit, the sum of the others beside it, and the target's logit.
        let mut of_part = try_vec(WHAT, 3 * x.rows, 0f32)?;
        let parts = [x, nothing, gradient.unwrap_or(nothing)];
        self.for_each_part(parts, logits, |work, panels, logits, _, gradients| {
            let (width, first) = (logits.len() / x.rows.max(1), panels.start * PANEL_ROWS);
            work.for_rows(x.rows, [(&mut of_part, 3), (&mut *logits, width)], |index, [of_part, logits]| {
                let target = (targets[index] as usize).checked_sub(first).and_then(|target| logits.get(target));
                of_part[2] = target.copied().unwrap_or(0.0);
                let out = &mut of_part[..2];
                work.shared.kernels.run_row(match gradient {
                    Some(_) => RowWork::LogSumGradient { logits, floor: sums[index].largest(), out },
                    None => RowWork::LogSum { logits, out },
                });
            })?;
            if let Some(gradient) = gradient {
                let (of_part, sums) = (of_part.as_chunks::<3>().0, &sums);
                work.for_rows(x.rows, [(&mut *gradients, gradient.columns)], |index, [gradient]| {
                    let before = sums[index].largest();
                    if of_part[index][0] > before {
                        let scale = exp(before - of_part[index][0]);
                        gradient.iter_mut().for_each(|number| *number *= scale);
                    }
                })?;
                let rows = TokenRows { data: logits, columns: width, index: None, count: x.rows };
                let out = Output::new(gradients, gradient.columns);
                work.multiply(&[Product { panels, ..Product::new(work.head(), Way::Transposed, rows, out) }])?;
            }
            for ((sum, of_target), of_part) in sums.iter_mut().zip(&mut of_targets).zip(of_part.as_chunks::<3>().0) {
                sum.add((of_part[0], of_part[1]));
                *of_target += of_part[2];
            }
            Ok(())
        })?;
        if let Some(gradient) = gradient {
            let (work, [numbers]) = self.parts([gradient])?;
            let out = Output::new(numbers, gradient.columns);
            work.run(x.rows, |index, scratch| {
                let (target, scale) = (&mut scratch[..gradient.columns], sums[index].inverse_sum());
                work.head().read_row(targets[index] as usize, target);
                // SAFETY: items have rows of their own, borrowed until all are done.
                let numbers = unsafe { out.row_part(index, 0..gradient.columns) };
                numbers.iter_mut().zip(target).for_each(|(number, target)| *number = *number * scale + *target);
            })?;
        }
        let (_, [out]) = self.parts([out])?;
        for ((out, sum), logit) in out.as_chunks_mut::<2>().0.iter_mut().zip(sums).zip(of_targets) {
            *out = [sum.value() as f32, (f64::from(logit) - sum.value()) as f32];
        }
        Ok(())
    }

    /// The gradient of a row's logits is its log-probability's times `onehot(target) - softmax`.
    fn add_gradient_with(
        &mut self,
        (targets, gradients): (&[u32], &[f32]),
        x: Rows,
        log_sums: Rows,
        out: Rows,
        logits: &mut [f32],
    ) -> Result<()> {
        self.for_each_part([x, log_sums, out], logits, |work, panels, logits, log_sums, numbers| {
            let width = logits.len() / x.rows.max(1);
            let first = panels.start * PANEL_ROWS;
            work.for_rows(x.rows, [(&mut *logits, width)], |row, [logits]| {
                let (log_sum, gradient) = (log_sums[2 * row], gradients[row]);
                let kernels = &work.shared.kernels;
                kernels.run_row(RowWork::Exponentials { logits: &mut *logits, shift: log_sum, factor: -gradient });
                if let Some(index) = (targets[row] as usize).checked_sub(first).filter(|index| *index < width) {
                    logits[index] += gradient;
                }
            })?;
            let rows = TokenRows { data: logits, columns: width, index: None, count: x.rows };
            let out = Output::new(numbers, out.columns);
            work.multiply(&[Product { panels, ..Product::new(work.head(), Way::Transposed, rows, out) }])
        })
    }
}
