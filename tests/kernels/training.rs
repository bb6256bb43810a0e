//! What training has of its own: products both ways with weights of every format, products of activations, softmaxes of
//! scores and of logits, rows; and the gradients of all of it.

use std::f64::consts::PI;

use crate::Effort;
use crate::arguments::{
    MatrixArguments, TrainingGegluArguments, TrainingLogitArguments, TrainingMultiplyArguments, TrainingNormArguments,
    TrainingProductArguments, TrainingRotateArguments, TrainingRowProductArguments, TrainingSlotArguments,
    TrainingSoftmaxArguments,
};
use crate::device::Device;
use crate::products::UNTOUCHED;
use crate::random::Random;
use crate::tensors::{DeviceMatrix, Matrix, kinds};

/// Rows and columns of a block's tile.
const TILE: usize = 64;

/// Half a unit in the last place of f32.
const ROUNDING: f64 = 1.0 / (1u32 << 24) as f64;

/// What is in a result before it is added to.
const BEFORE: f32 = 0.25;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Forward,
    Backward,
}

impl Way {
    /// Numbers of a row that is given, and of one that is added to.
    fn sides(self, inputs: usize, outputs: usize) -> [usize; 2] {
        if self == Way::Forward { [inputs, outputs] } else { [outputs, inputs] }
    }
}

fn random_numbers(random: &mut Random, count: usize) -> Vec<f32> {
    (0..count).map(|_| random.unit()).collect()
}

/// One matrix or several experts, of which the rows from `first` on take part.
struct Weights<'a> {
    matrices: &'a [Matrix],
    inputs: usize,
    first: usize,
    outputs: usize,
    /// `[experts + 1]`: slots of each; empty where there is one matrix.
    starts: Vec<u32>,
    selected: Option<Vec<u32>>,
}

impl Weights<'_> {
    /// The matrix that a token meets, if it is one that takes part.
    fn of(&self, token: usize) -> Option<&Matrix> {
        if self.starts.is_empty() {
            return Some(&self.matrices[0]);
        }
        let expert = self.starts[1..].iter().position(|end| token < *end as usize).unwrap();
        let is_selected = self.selected.as_ref().is_none_or(|selected| selected.contains(&(expert as u32)));
        is_selected.then(|| &self.matrices[expert])
    }

    /// `[tokens, results]`
    fn multiply(&self, device: &Device, way: Way, x: &[f32]) -> Vec<f32> {
        let there: Vec<_> = self.matrices.iter().map(|matrix| matrix.upload(device)).collect();
        let table = device.array(&there.iter().map(DeviceMatrix::arguments).collect::<Vec<MatrixArguments>>());
        let [given, results] = way.sides(self.inputs, self.outputs);
        let tokens = x.len() / given;
        let mut before = vec![BEFORE; tokens * results];
        before.extend([UNTOUCHED; 70]);
        let (x, out) = (device.array(x), device.array(&before));
        let (starts, selected) = (device.array(&self.starts), device.array(self.selected.as_deref().unwrap_or(&[])));
        let has_experts = !self.starts.is_empty();
        let arguments = TrainingProductArguments {
            weights: there[0].arguments(),
            experts: if has_experts { table.pointer() } else { std::ptr::null() },
            selected: if self.selected.is_some() { selected.pointer() } else { std::ptr::null() },
            starts: starts.pointer(),
            x: x.pointer(),
            out: out.pointer_mut(),
            tokens: tokens as u32,
            inputs: self.inputs as u32,
            first: self.first as u32,
            outputs: self.outputs as u32,
        };
        let family = if way == Way::Forward { "training_product" } else { "training_product_gradient" };
        let name = format!("{family}_{}", self.matrices[0].kind.format.name());
        let experts = self.selected.as_ref().map_or(self.matrices.len(), Vec::len);
        // One tile too many leaves at once.
        let grid = [tokens.div_ceil(TILE) + 1, results.div_ceil(TILE), experts];
        device.launch(&name, grid, &arguments);
        let mut out = out.read();
        assert!(out[tokens * results..].iter().all(|number| *number == UNTOUCHED), "a row too many");
        out.truncate(tokens * results);
        out
    }

    fn check(&self, way: Way, x: &[f32], found: &[f32]) {
        let [given, results] = way.sides(self.inputs, self.outputs);
        for (token, (x, row)) in x.chunks(given).zip(found.chunks(results)).enumerate() {
            let matrix = self.of(token);
            for (index, number) in row.iter().enumerate() {
                let term = |at: usize| {
                    let (row, column) = if way == Way::Forward { (index, at) } else { (at, index) };
                    matrix.map_or(0.0, |matrix| matrix.value(self.first + row, column)) * f64::from(x[at])
                };
                let (sum, magnitude) = (0..given)
                    .map(term)
                    .fold((f64::from(BEFORE), 1.0), |(sum, all), term| (sum + term, all + term.abs()));
                let error = (f64::from(*number) - sum).abs();
                let most = (given + 4) as f64 * ROUNDING * magnitude;
                let kind = self.matrices[0].kind;
                assert!(error <= most, "{kind:?}, {way:?}, token {token}, {index}: {number} for {sum}, {error:e}");
            }
        }
    }
}

pub fn check_products(device: &Device, random: &mut Random, effort: Effort) {
    for (at, kind) in kinds().into_iter().enumerate() {
        if effort == Effort::Sample && at % 3 != 0 {
            continue;
        }
        for way in [Way::Forward, Way::Backward] {
            let inputs = [1, 33, 70, 131][random.below(4)];
            let rows = [1, 17, 67, 130][random.below(4)];
            let matrices: Vec<_> = (0..4).map(|_| Matrix::random(random, rows, inputs, kind)).collect();
            // All rows of one matrix, and some.
            let first = random.below(rows);
            for (first, outputs) in [(0, rows), (first, rows - first)] {
                let weights =
                    Weights { matrices: &matrices[..1], inputs, first, outputs, starts: vec![], selected: None };
                let [given, results] = way.sides(inputs, outputs);
                let tokens = [1, 64, 67][random.below(3)];
                let x = random_numbers(random, tokens * given);
                let found = weights.multiply(device, way, &x);
                weights.check(way, &x, &found);
                // A token by itself has the same bits.
                let alone = random.below(tokens);
                let of_alone = weights.multiply(device, way, &x[alone * given..(alone + 1) * given]);
                let bits = |numbers: &[f32]| numbers.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&of_alone), bits(&found[alone * results..(alone + 1) * results]));
            }
            // Experts with many slots, one, and none.
            for selected in [None, Some(vec![3, 0])] {
                let starts = vec![0, 66, 66, 67, 70];
                let weights = Weights { matrices: &matrices, inputs, first: 0, outputs: rows, starts, selected };
                let x = random_numbers(random, 70 * way.sides(inputs, rows)[0]);
                weights.check(way, &x, &weights.multiply(device, way, &x));
            }
        }
    }
}

pub fn check_multiply(device: &Device, random: &mut Random, effort: Effort) {
    for turn in 0..if effort == Effort::Sample { 4 } else { 12 } {
        let [rows, depth, columns] = [(); 3].map(|()| [1, 5, 64, 67, 97][random.below(5)]);
        let (count, shared_by) = [(1, 1), (6, 3), (4, 1)][random.below(3)];
        let accumulate = random.below(2) == 0;
        // Each side along its rows or its columns, with something between rows, and between matrices.
        let strides = |is_transposed: bool, rows: usize, columns: usize| {
            let (long, short) = if is_transposed { (columns, rows) } else { (rows, columns) };
            let stride = short + 3;
            let steps = if is_transposed { (1, stride) } else { (stride, 1) };
            (steps, long * stride + 5)
        };
        let (a_steps, a_next) = strides(turn % 2 == 1, rows, depth);
        let (b_steps, b_next) = strides(turn / 2 % 2 == 1, depth, columns);
        let (out_row, out_next) = (columns + 2, rows * (columns + 2) + 7);
        let a = random_numbers(random, a_next * count);
        let b = random_numbers(random, b_next * count / shared_by);
        let before = random_numbers(random, out_next * count);
        let (a_there, b_there, out) = (device.array(&a), device.array(&b), device.array(&before));
        let arguments = TrainingMultiplyArguments {
            a: a_there.pointer(),
            b: b_there.pointer(),
            out: out.pointer_mut(),
            a_next: a_next as u32,
            b_next: b_next as u32,
            out_next: out_next as u32,
            shared_by: shared_by as u32,
            a_row: a_steps.0 as u32,
            a_column: a_steps.1 as u32,
            b_row: b_steps.0 as u32,
            b_column: b_steps.1 as u32,
            out_row: out_row as u32,
            rows: rows as u32,
            columns: columns as u32,
            depth: depth as u32,
            accumulate: accumulate.into(),
        };
        device.launch("training_multiply", [rows.div_ceil(TILE), columns.div_ceil(TILE), count], &arguments);
        for (at, (number, before)) in out.read().into_iter().zip(before).enumerate() {
            let (matrix, rest) = (at / out_next, at % out_next);
            let (row, column) = (rest / out_row, rest % out_row);
            if row >= rows || column >= columns {
                assert_eq!(number, before, "what lies between was written");
                continue;
            }
            let first = if accumulate { f64::from(before) } else { 0.0 };
            let (sum, magnitude) = (0..depth).fold((first, 1.0), |(sum, magnitude), place| {
                let a = a[matrix * a_next + row * a_steps.0 + place * a_steps.1];
                let b = b[matrix / shared_by * b_next + place * b_steps.0 + column * b_steps.1];
                let term = f64::from(a) * f64::from(b);
                (sum + term, magnitude + term.abs())
            });
            let error = (f64::from(number) - sum).abs();
            assert!(error <= (depth + 4) as f64 * ROUNDING * magnitude, "{row}, {column}: {number} for {sum}");
        }
    }
}

/// Nearly the same, as a part of `size`; exponentials end at e^-87.
fn assert_near(found: f32, expected: f64, size: f64, what: &str) {
    let error = (f64::from(found) - expected).abs();
    assert!(error <= 2e-6 * size.max(expected.abs()) + 1e-36, "{what}: {found} for {expected}, off {error:e}");
}

pub fn check_softmax(device: &Device, random: &mut Random, effort: Effort) {
    let sizes = [(0, 1), (0, 5), (7, 3), (250, 9), (600, 2)];
    for (first, queries) in sizes.into_iter().take(if effort == Effort::Sample { 4 } else { 5 }) {
        let (heads, head_dim, keys) = (3, [2, 6, 300][random.below(3)], first + queries);
        // Those that are not seen must count for nothing, whatever they are.
        let mut scores: Vec<f32> = (0..heads * queries * keys).map(|_| random.unit() * 30.0).collect();
        for (row, scores) in scores.chunks_mut(keys).enumerate() {
            scores[first + row % queries + 1..].fill([f32::NAN, 1e30][row % 2]);
        }
        let scale = 0.3f32;
        let (there, log_sums) = (device.array(&scores), device.array(&vec![UNTOUCHED; queries * heads + 1]));
        let out = random_numbers(random, queries * heads * head_dim);
        let out_gradient = random_numbers(random, out.len());
        let (out_there, out_gradient_there) = (device.array(&out), device.array(&out_gradient));
        let of_weights = random_numbers(random, scores.len());
        let gradients = device.array(&of_weights);
        let arguments = TrainingSoftmaxArguments {
            scores: there.pointer_mut(),
            gradients: gradients.pointer_mut(),
            log_sums: log_sums.pointer_mut(),
            out: out_there.pointer(),
            out_gradient: out_gradient_there.pointer(),
            scale,
            first: first as u32,
            queries: queries as u32,
            keys: keys as u32,
            heads: heads as u32,
            head_dim: head_dim as u32,
        };
        device.launch("training_softmax", [queries, heads, 1], &arguments);
        let (found, found_sums) = (there.read(), log_sums.read());
        // The gradient computes weights once more.
        there.write(&scores);
        device.launch("training_softmax_gradient", [queries, heads, 1], &arguments);
        let (again, found_gradients) = (there.read(), gradients.read());
        assert_eq!(found_sums[queries * heads], UNTOUCHED);
        for (row, scores) in scores.chunks(keys).enumerate() {
            let (head, query) = (row / queries, row % queries);
            let seen = first + query + 1;
            let scaled = |key: usize| f64::from(scores[key]) * f64::from(scale);
            let largest = (0..seen).map(scaled).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = (0..seen).map(|key| (scaled(key) - largest).exp()).sum();
            let log_sum = largest + sum.ln();
            assert_near(found_sums[query * heads + head], log_sum, 1.0, "a log-sum");
            let at = (query * heads + head) * head_dim;
            let columns = at..at + head_dim;
            let pairs = out[columns.clone()].iter().zip(&out_gradient[columns]);
            let mean: f64 = pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            for key in 0..keys {
                let at = row * keys + key;
                let weight = if key < seen { (scaled(key) - log_sum).exp() } else { 0.0 };
                assert_near(found[at], weight, weight * 5.0, "a weight");
                assert_near(again[at], weight, weight * 5.0, "a weight, again");
                if key >= seen {
                    assert_eq!((found[at], again[at], found_gradients[at]), (0.0, 0.0, 0.0));
                    continue;
                }
                let gradient = weight * (f64::from(of_weights[at]) - mean) * f64::from(scale);
                assert_near(found_gradients[at], gradient, weight * (1.0 + mean.abs()) * 5.0, "a score's gradient");
            }
        }
    }
}

pub fn check_logits(device: &Device, random: &mut Random, effort: Effort) {
    for vocabulary in if effort == Effort::Sample { vec![5usize, 300] } else { vec![1, 97, 300, 1111] } {
        let (rows, width) = (5, [vocabulary, vocabulary.div_ceil(2), vocabulary.div_ceil(3)][random.below(3)]);
        // Parts whose logits are higher than those before, and lower.
        let mut logits: Vec<f32> = (0..rows * vocabulary).map(|_| random.unit() * 20.0).collect();
        let raised = random.below(vocabulary);
        (0..rows).for_each(|row| logits[row * vocabulary + raised] += [0.0, 80.0][row % 2]);
        let mut targets: Vec<u32> = (0..rows).map(|_| random.below(vocabulary) as u32).collect();
        (targets[0], targets[1]) = (0, vocabulary as u32 - 1);
        let derivatives = random_numbers(random, rows);
        let (targets_there, derivatives_there) = (device.array(&targets), device.array(&derivatives));
        let (sums, results) = (device.room::<f64>(rows * 3), device.array(&vec![UNTOUCHED; rows * 2 + 1]));
        // Of the part that begins at `first`: what it has of each row, as the kernel leaves it.
        let run = |name: &str, first: usize| {
            let width = width.min(vocabulary - first);
            let rows_of_part = logits.chunks(vocabulary).flat_map(|row| row[first..first + width].to_vec());
            let part = device.array(&rows_of_part.collect::<Vec<f32>>());
            let arguments = TrainingLogitArguments {
                logits: part.pointer_mut(),
                targets: targets_there.pointer(),
                gradients: derivatives_there.pointer(),
                sums: sums.pointer_mut(),
                results: results.pointer_mut(),
                first: first as u32,
                width: width as u32,
            };
            device.launch(name, [rows, 1, 1], &arguments);
            part.read()
        };
        (0..vocabulary).step_by(width).for_each(|first| drop(run("training_log_sum", first)));
        let found = results.read();
        assert_eq!(found[rows * 2], UNTOUCHED);
        let expected: Vec<f64> = logits
            .chunks(vocabulary)
            .map(|row| {
                let largest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let sum: f64 = row.iter().map(|logit| (f64::from(*logit) - f64::from(largest)).exp()).sum();
                f64::from(largest) + sum.ln()
            })
            .collect();
        for row in 0..rows {
            let logit = f64::from(logits[row * vocabulary + targets[row] as usize]);
            assert_near(found[2 * row], expected[row], 1.0, "a log-sum");
            assert_near(found[2 * row + 1], logit - expected[row], 1.0, "a log-probability");
        }
        for first in (0..vocabulary).step_by(width) {
            let part = run("training_logit_gradient", first);
            let width = width.min(vocabulary - first);
            for (row, numbers) in part.chunks(width).enumerate() {
                for (index, number) in numbers.iter().enumerate() {
                    let token = first + index;
                    let probability = (f64::from(logits[row * vocabulary + token]) - expected[row]).exp();
                    let is_target = f64::from(u8::from(token == targets[row] as usize));
                    let gradient = f64::from(derivatives[row]) * (is_target - probability);
                    assert_near(*number, gradient, 5.0 * probability + is_target, "a logit's gradient");
                }
            }
        }
    }
}

/// The rest of what is done to rows.
pub fn check_rows(device: &Device, random: &mut Random, effort: Effort) {
    for columns in if effort == Effort::Sample { vec![6, 300] } else { vec![1, 6, 255, 300, 1030] } {
        check_norm_gradient(device, random, columns);
        check_slots(device, random, columns);
        check_row_products(device, random, columns);
        check_geglu(device, random, columns);
    }
    for head_dim in [2, 6, 64] {
        check_rotate(device, random, head_dim);
    }
}

/// Numbers, and one more after them that nobody may write.
fn guarded<'a>(device: &'a Device, numbers: &[f32]) -> Guarded<'a> {
    let mut all = numbers.to_vec();
    all.push(UNTOUCHED);
    Guarded(device.array(&all))
}

struct Guarded<'a>(crate::device::Array<'a, f32>);

impl Guarded<'_> {
    fn read(&self) -> Vec<f32> {
        let mut numbers = self.0.read();
        assert_eq!(numbers.pop(), Some(UNTOUCHED), "a row too many");
        numbers
    }
}

fn check_norm_gradient(device: &Device, random: &mut Random, columns: usize) {
    let (rows, eps) = (3, 1e-6);
    let [x, gradient, before] = [(); 3].map(|()| random_numbers(random, rows * columns));
    let weight = random_numbers(random, columns);
    let (x_there, gradient_there, weight_there) = (device.array(&x), device.array(&gradient), device.array(&weight));
    let out = guarded(device, &before);
    let arguments = TrainingNormArguments {
        x: x_there.pointer(),
        weight: weight_there.pointer(),
        gradient: gradient_there.pointer(),
        out: out.0.pointer_mut(),
        eps,
        columns: columns as u32,
    };
    device.launch("training_norm_gradient", [rows, 1, 1], &arguments);
    for (at, found) in out.read().into_iter().enumerate() {
        let row = at / columns * columns..(at / columns + 1) * columns;
        // By the product rule: of x r (1 + w), r = (mean + eps)^(-1/2), dr/dx = -r^3 x / n.
        let wide = |numbers: &[f32], at: usize| f64::from(numbers[at]);
        let mean = row.clone().map(|at| wide(&x, at).powi(2)).sum::<f64>() / columns as f64;
        let r = (mean + eps).powf(-0.5);
        let upstream = |at: usize| wide(&gradient, at) * (1.0 + wide(&weight, at % columns));
        let of_r: f64 = row.clone().map(|at| upstream(at) * wide(&x, at)).sum();
        let expected = upstream(at) * r - of_r * r.powi(3) * wide(&x, at) / columns as f64;
        let size = upstream(at).abs() * r + (of_r * r.powi(3) * wide(&x, at) / columns as f64).abs();
        assert_near(found, wide(&before, at) + expected, 0.1 * size + 1.0, "a norm's gradient");
    }
}

fn check_slots(device: &Device, random: &mut Random, columns: usize) {
    const NO_SLOT: u32 = u32::MAX;
    let (tokens, choices, slots) = (7usize, 3usize, 12usize);
    // Some tokens have fewer slots than choices, one has none.
    let mut of_tokens = vec![NO_SLOT; tokens * choices];
    let mut slot_tokens = Vec::new();
    for slot in 0..slots {
        let token = 1 + random.below(tokens - 1);
        let of_token = &mut of_tokens[token * choices..(token + 1) * choices];
        match of_token.iter_mut().find(|slot| **slot == NO_SLOT) {
            Some(free) => *free = slot as u32,
            None => {
                let all = of_tokens.iter_mut().skip(choices).find(|slot| **slot == NO_SLOT).unwrap();
                *all = slot as u32;
            }
        }
        let at = of_tokens.iter().position(|found| *found == slot as u32).unwrap();
        slot_tokens.push((at / choices) as u32);
    }
    let weights = random_numbers(random, slots);
    let (of_tokens_there, slot_tokens_there) = (device.array(&of_tokens), device.array(&slot_tokens));
    let weights_there = device.array(&weights);
    for weighted in [true, false] {
        let weight = |slot: usize| if weighted { f64::from(weights[slot]) } else { 1.0 };
        let x = random_numbers(random, tokens * columns);
        let (x_there, gathered) = (device.array(&x), guarded(device, &vec![UNTOUCHED; slots * columns]));
        let arguments = TrainingSlotArguments {
            from: x_there.pointer(),
            index: slot_tokens_there.pointer(),
            weights: if weighted { weights_there.pointer() } else { std::ptr::null() },
            out: gathered.0.pointer_mut(),
            columns: columns as u32,
            choices: 0,
        };
        device.launch("training_gather", [slots, 1, 1], &arguments);
        let y = gathered.read();
        for (at, found) in y.iter().enumerate() {
            let (slot, column) = (at / columns, at % columns);
            let expected = weight(slot) * f64::from(x[slot_tokens[slot] as usize * columns + column]);
            assert_eq!(*found, expected as f32);
        }
        let before = random_numbers(random, tokens * columns);
        let (y_there, sums) = (device.array(&y), guarded(device, &before));
        let arguments = TrainingSlotArguments {
            from: y_there.pointer(),
            index: of_tokens_there.pointer(),
            out: sums.0.pointer_mut(),
            choices: choices as u32,
            ..arguments
        };
        device.launch("training_combine", [tokens, 1, 1], &arguments);
        for (at, found) in sums.read().into_iter().enumerate() {
            let (token, column) = (at / columns, at % columns);
            let of_token = of_tokens[token * choices..(token + 1) * choices].iter().filter(|slot| **slot != NO_SLOT);
            let terms = of_token.map(|slot| weight(*slot as usize) * f64::from(y[*slot as usize * columns + column]));
            assert_near(found, f64::from(before[at]) + terms.sum::<f64>(), 1.0, "a sum of slots");
        }
    }
}

fn check_row_products(device: &Device, random: &mut Random, columns: usize) {
    let rows = 4;
    let [a, b] = [(); 2].map(|()| random_numbers(random, rows * columns));
    let (a_there, b_there, out) = (device.array(&a), device.array(&b), guarded(device, &vec![UNTOUCHED; rows]));
    let arguments = TrainingRowProductArguments {
        a: a_there.pointer(),
        b: b_there.pointer(),
        out: out.0.pointer_mut(),
        columns: columns as u32,
    };
    device.launch("training_row_products", [rows, 1, 1], &arguments);
    for (row, found) in out.read().into_iter().enumerate() {
        let terms = (row * columns..(row + 1) * columns).map(|at| f64::from(a[at]) * f64::from(b[at]));
        let expected: f64 = terms.sum();
        assert!((f64::from(found) - expected).abs() <= 1e-7 * expected.abs() + 1e-12, "{found} for {expected}");
    }
}

fn check_rotate(device: &Device, random: &mut Random, head_dim: usize) {
    let (tokens, heads, pairs, positions) = (5, 3, head_dim / 2, 9);
    let angles: Vec<f64> = (0..positions * pairs).map(|_| f64::from(random.unit()) * PI).collect();
    let narrow = |of: fn(f64) -> f64| angles.iter().map(|angle| of(*angle) as f32).collect::<Vec<f32>>();
    let (cosines, sines) = (device.array(&narrow(f64::cos)), device.array(&narrow(f64::sin)));
    let places: Vec<u32> = (0..tokens).map(|_| random.below(positions) as u32).collect();
    let numbers = random_numbers(random, tokens * heads * head_dim);
    let (places_there, there) = (device.array(&places), guarded(device, &numbers));
    let mut arguments = TrainingRotateArguments {
        heads: there.0.pointer_mut(),
        positions: places_there.pointer(),
        cosines: cosines.pointer(),
        sines: sines.pointer(),
        columns: (heads * head_dim) as u32,
        head_dim: head_dim as u32,
        back: 0,
    };
    device.launch("training_rotate", [tokens, 1, 1], &arguments);
    let turned = there.read();
    for (at, found) in turned.iter().enumerate() {
        let (token, place) = (at / (heads * head_dim), at % head_dim);
        let angle = angles[places[token] as usize * pairs + place % pairs];
        let (mine, other) = match place < pairs {
            true => (f64::from(numbers[at]), -f64::from(numbers[at + pairs])),
            false => (f64::from(numbers[at]), f64::from(numbers[at - pairs])),
        };
        assert_near(*found, mine * angle.cos() + other * angle.sin(), 1.0, "a rotated number");
    }
    arguments.back = 1;
    device.launch("training_rotate", [tokens, 1, 1], &arguments);
    for (found, expected) in there.read().into_iter().zip(&numbers) {
        assert_near(found, f64::from(*expected), 1.0, "a number turned back");
    }
}

/// GeLU in f64, by its definition or by the tanh approximation.
fn gelu(x: f64, exact: bool) -> f64 {
    match exact {
        true => 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt())),
        false => 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh()),
    }
}

fn check_geglu(device: &Device, random: &mut Random, columns: usize) {
    let rows = 3;
    for exact in [false, true] {
        let gate: Vec<f32> = (0..rows * columns).map(|_| random.unit() * 6.0).collect();
        let [up, gradient] = [(); 2].map(|()| random_numbers(random, rows * columns));
        let (gate_there, up_there) = (guarded(device, &gate), guarded(device, &up));
        let (gradient_there, out) = (device.array(&gradient), guarded(device, &vec![UNTOUCHED; rows * columns]));
        let arguments = TrainingGegluArguments {
            gate: gate_there.0.pointer_mut(),
            up: up_there.0.pointer_mut(),
            gradient: gradient_there.pointer(),
            out: out.0.pointer_mut(),
            columns: columns as u32,
            exact_gelu: exact.into(),
        };
        device.launch("training_geglu", [rows, 1, 1], &arguments);
        device.launch("training_geglu_gradient", [rows, 1, 1], &arguments);
        let (found, of_gate, of_up) = (out.read(), gate_there.read(), up_there.read());
        for at in 0..rows * columns {
            let [gate, up, gradient] = [gate[at], up[at], gradient[at]].map(f64::from);
            let step = 1e-5;
            let derivative = (gelu(gate + step, exact) - gelu(gate - step, exact)) / (2.0 * step);
            assert_near(found[at], gelu(gate, exact) * up, 1.0, "gelu(gate) * up");
            assert_near(of_gate[at], gradient * up * derivative, 1.0, "the gate's gradient");
            assert_near(of_up[at], gradient * gelu(gate, exact), 1.0, "the gradient of up");
        }
    }
}
