//! Products on tensor cores, for many tokens and for few. Whole numbers are exact and everything after has one order: bits
//! are known, for many tokens here too. In bf16 and f16 the order of the sixteen products of a step is the hardware's.

use crate::Effort;
use crate::device::Device;
use crate::experts::{self, Layer, Run, gelu};
use crate::products::{Launch, UNTOUCHED, Variant, matmul};
use crate::random::Random;
use crate::tensors::{Activations, Format, Kind, Matrix, kinds, tensor_row};

const ROWS: [usize; 5] = [130, 1, 15, 17, 40];
const COLUMNS: [usize; 4] = [1, 33, 129, 260];
const TOKENS: [(Variant, usize); 12] = [
    (Variant::Tensor, 65),
    (Variant::Narrow, 16),
    (Variant::Tensor, 1),
    (Variant::Narrow, 3),
    (Variant::Tensor, 130),
    (Variant::Narrow, 9),
    (Variant::Tensor, 7),
    (Variant::Narrow, 1),
    (Variant::Tensor, 17),
    (Variant::Narrow, 8),
    (Variant::Tensor, 64),
    (Variant::Tensor, 63),
];

/// Half a unit in the last place of f32.
const ROUNDING: f64 = 1.0 / (1u32 << 24) as f64;

/// What a product may be off, as a part of the sum of magnitudes: a rounding for each column, or each block of 32 where
/// there are scales, one for each warp that has a part of them, then that of the result itself and of what it is added to.
///
/// A GPU's tensor cores cut halves instead of rounding them: CUDA leaves the order and the places open, and the least that was
/// seen of any is that the products of an instruction, and what they are added to, are cut at the last place of the largest
/// of these, and their sum once more. That is two roundings for each of 17 terms in 16 columns, or of 9 in 8: below three a
/// column. Whole numbers are exact there too, and scales meet them outside of the tensor cores.
fn error(device: &Device, weights: &Matrix) -> f64 {
    let sums = match (weights.kind.format.is_scaled(), device.is_hardware()) {
        (true, _) => weights.columns / 32,
        (false, false) => weights.columns,
        (false, true) => 3 * weights.columns,
    };
    (sums + 8 + 2) as f64 * ROUNDING
}

fn tensor_kinds() -> Vec<Kind> {
    kinds().into_iter().filter(|kind| kind.format != Format::F32).collect()
}

/// A matrix and activations as plain numbers, and what comes of them.
struct Reference<'a> {
    device: &'a Device,
    weights: &'a Matrix,
    x: &'a Activations<'a>,
    /// `[rows][columns]`
    rows: Vec<Vec<f64>>,
    /// `[rows of x][columns]`
    tokens: Vec<Vec<f64>>,
}

impl<'a> Reference<'a> {
    fn new(device: &'a Device, weights: &'a Matrix, x: &'a Activations<'a>) -> Self {
        let row = |row| (0..weights.columns).map(|column| weights.value(row, column)).collect();
        let rows = (0..weights.rows).map(row).collect();
        let tokens = (0..x.rows).map(|row| tensor_row(x, row, weights.kind.format)).collect();
        Reference { device, weights, x, rows, tokens }
    }

    /// The product, and the sum of magnitudes.
    fn product(&self, row: usize, token: usize) -> (f64, f64) {
        let (mut sum, mut magnitude) = (0.0, 0.0);
        for (weight, x) in self.rows[row].iter().zip(&self.tokens[token]) {
            sum += weight * x;
            magnitude += (weight * x).abs();
        }
        (sum, magnitude)
    }

    /// Block after block in f32, where there are scales.
    fn exact(&self, row: usize, token: usize) -> f32 {
        let mut sum = 0f32;
        for column in (0..self.weights.columns).step_by(32) {
            let at = token * self.x.stride + column;
            let integers = &self.x.integers[at..at + 32];
            let product =
                |(place, integer): (usize, &i8)| self.weights.number(row, column + place) as i32 * i32::from(*integer);
            let whole: i32 = integers.iter().enumerate().map(product).sum();
            sum = (whole as f32).mul_add(self.weights.scale(row, column) * self.x.blocks[at / 32].0, sum);
        }
        sum
    }

    fn check(&self, variant: Variant, row: usize, token: usize, added_to: Option<f32>, result: f32) {
        let kind = self.weights.kind;
        let (expected, magnitude) = self.product(row, token);
        let before = f64::from(added_to.unwrap_or(0.0));
        let off = (f64::from(result) - expected - before).abs();
        assert!(
            off <= error(self.device, self.weights) * (magnitude + before),
            "{variant:?}, {kind:?}, {} columns, row {row}, token {token}: off {off:e} of {magnitude}",
            self.weights.columns
        );
        if kind.format.is_scaled() && variant == Variant::Tensor {
            let exact = self.exact(row, token);
            let exact = added_to.map_or(exact, |before| before + exact);
            assert_eq!(result.to_bits(), exact.to_bits(), "{kind:?}, row {row}, token {token}: {result} for {exact}");
        }
    }
}

pub fn check_matmul(device: &Device, random: &mut Random, effort: Effort) {
    for (at, kind) in tensor_kinds().into_iter().enumerate() {
        for (turn, (variant, tokens)) in TOKENS.into_iter().enumerate() {
            // One of each variant.
            if effort == Effort::Sample && turn / 2 != at % 2 {
                continue;
            }
            // Every number of rows with every number of columns, over all kinds and numbers of tokens.
            let (mut columns, count) = (COLUMNS[(at + turn) % 4], 1 + (at + turn) % 3);
            if variant == Variant::Narrow && turn % 4 == 1 {
                // More than a stage for some of its warps, and two for some of those.
                columns += 1030;
            }
            let rows = |matrix: usize| ROWS[(at * 2 + turn + matrix) % 5];
            let weights: Vec<_> = (0..count).map(|m| Matrix::random(random, rows(m), columns, kind)).collect();
            let x = Activations::random(device, random, tokens + 2, columns);
            let picked: Vec<usize> = match random.below(2) {
                0 => (0..tokens).collect(),
                _ => (0..tokens).map(|_| random.below(x.rows)).collect(),
            };
            let added_to = (random.below(2) == 0).then_some(0.25f32);
            let launch = Launch { weights: &weights, x: &x, tokens: &picked, variant, added_to };
            for (weights, results) in weights.iter().zip(matmul(device, &launch)) {
                let reference = Reference::new(device, weights, &x);
                for (token, results) in picked.iter().zip(results) {
                    for (row, result) in results.into_iter().enumerate() {
                        reference.check(variant, row, *token, added_to, result);
                    }
                }
            }
        }
    }
}

/// Lists of tokens for four experts: more than a tile, none, one, and half a tile or a little more.
fn lists(random: &mut Random, tokens: usize, variant: Variant) -> Vec<Vec<u32>> {
    let tile = if variant == Variant::Tensor { 64 } else { 16 };
    let counts = [tile + 1, 0, 1, tile / 2 + random.below(3)];
    counts.map(|count| (0..count).map(|_| random.below(tokens) as u32).collect()).to_vec()
}

pub fn check_experts(device: &Device, random: &mut Random, effort: Effort) {
    let variants = [Variant::Tensor, Variant::Narrow];
    for (at, (kind, variant)) in tensor_kinds().into_iter().flat_map(|kind| variants.map(|v| (kind, v))).enumerate() {
        // Three of four formats, and both variants.
        if effort == Effort::Sample && at % 5 != 0 {
            continue;
        }
        let (rows, columns) = (ROWS[at % 5], COLUMNS[(at + random.below(2)) % 4]);
        let lists = lists(random, 6, variant);
        let layer = Layer::random(random, rows, columns, kind, &lists);
        let exact_gelu = random.below(2) == 0;
        let selected: Option<&[u32]> = [None, Some(&[3u32, 0][..])][random.below(2)];
        let x = Activations::random(device, random, 6, columns);
        let slot_x = Activations::random(device, random, layer.slot_tokens.len(), columns);
        let run = |is_gated| Run { variant, selected, is_gated, exact_gelu };
        let gated = experts::multiply(device, &layer, &x, &run(true));
        let down = experts::multiply(device, &layer, &slot_x, &run(false));
        for expert in 0..layer.gate.len() {
            let gate_reference = Reference::new(device, &layer.gate[expert], &x);
            let up_reference = Reference::new(device, &layer.up[expert], &x);
            let down_reference = Reference::new(device, &layer.gate[expert], &slot_x);
            let error = error(device, &layer.gate[expert]);
            for slot in (0..layer.slot_tokens.len()).filter(|slot| layer.expert_of(*slot) == expert) {
                for row in 0..rows {
                    if selected.is_some_and(|selected| !selected.contains(&(expert as u32))) {
                        assert!(gated[slot][row] == UNTOUCHED && down[slot][row] == UNTOUCHED);
                        continue;
                    }
                    let token = layer.slot_tokens[slot] as usize;
                    let (gate, gate_magnitude) = gate_reference.product(row, token);
                    let (up, up_magnitude) = up_reference.product(row, token);
                    let expected = gelu(gate, exact_gelu) * up;
                    // The slope of GeLU is below 1.2.
                    let error = error * (1.2 * gate_magnitude * up.abs() + gelu(gate, exact_gelu).abs() * up_magnitude);
                    let room = error + 1e-6 * (expected.abs() + up.abs() * gate.abs().min(1.0));
                    let off = (f64::from(gated[slot][row]) - expected).abs();
                    assert!(
                        off <= room,
                        "{variant:?}, {kind:?}, slot {slot}, row {row}: {} for {expected}",
                        gated[slot][row]
                    );
                    down_reference.check(variant, row, slot, None, down[slot][row]);
                }
            }
        }
    }
}

pub fn check_bits(device: &Device, random: &mut Random, effort: Effort) {
    for format in [Format::Bf16, Format::F16, Format::Int8, Format::Int4] {
        for (variant, most) in [(Variant::Tensor, 67), (Variant::Narrow, 16)] {
            let kind = Kind { format, group: 32, half_scales: false };
            let columns = if effort == Effort::Sample { 70 } else { 517 };
            let weights = [Matrix::random(random, 21, columns, kind)];
            let x = Activations::random(device, random, most, columns);
            let run = |tokens: &[usize]| {
                matmul(device, &Launch { weights: &weights, x: &x, tokens, variant, added_to: None }).remove(0)
            };
            let all: Vec<usize> = (0..x.rows).collect();
            let together = run(&all);
            for count in [1, most / 8 + 1, most / 2, most - 1] {
                let tokens: Vec<usize> = (0..count).map(|_| random.below(x.rows)).collect();
                for (token, row) in tokens.iter().zip(run(&tokens)) {
                    let bits = |row: &[f32]| row.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&row), bits(&together[*token]), "{variant:?}, {kind:?}, token {token} of {count}");
                }
            }
        }
    }
}
