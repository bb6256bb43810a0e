//! Products with the weights of experts, and what becomes of them.

use crate::Effort;
use crate::arguments::{CombineArguments, ExpertArguments, MatrixArguments};
use crate::device::{Array, Device};
use crate::products::{NARROW_PANELS, TENSOR_PANELS, TENSOR_TOKENS, TILES, UNTOUCHED, Variant};
use crate::random::Random;
use crate::tensors::{Activations, DeviceMatrix, Format, Kind, Matrix, PRODUCT_ERROR, kinds, product};

const NO_EXPERT: u32 = u32::MAX;

/// The experts of a layer, and tokens that go to some of them.
pub struct Layer {
    pub gate: Vec<Matrix>,
    pub up: Vec<Matrix>,
    /// Slots of expert e: `starts[e]..starts[e + 1]`.
    starts: Vec<u32>,
    pub slot_tokens: Vec<u32>,
}

impl Layer {
    pub fn random(random: &mut Random, rows: usize, columns: usize, kind: Kind, lists: &[Vec<u32>]) -> Layer {
        let mut matrices = || lists.iter().map(|_| Matrix::random(random, rows, columns, kind)).collect();
        let (gate, up) = (matrices(), matrices());
        let mut layer = Layer { gate, up, starts: vec![0], slot_tokens: Vec::new() };
        layer.send(lists);
        layer
    }

    /// Sends the tokens of a list to each expert.
    pub fn send(&mut self, lists: &[Vec<u32>]) {
        (self.starts, self.slot_tokens) = (vec![0], Vec::new());
        for list in lists {
            self.slot_tokens.extend(list);
            self.starts.push(self.slot_tokens.len() as u32);
        }
    }

    pub fn expert_of(&self, slot: usize) -> usize {
        (0..self.gate.len()).find(|expert| slot < self.starts[expert + 1] as usize).unwrap()
    }
}

fn arguments_of<'a>(device: &'a Device, matrices: &[DeviceMatrix]) -> Array<'a, MatrixArguments> {
    device.array(&matrices.iter().map(DeviceMatrix::arguments).collect::<Vec<_>>())
}

/// `[slots][rows]`: gated where there is a up. `selected` are the experts to take part.
pub struct Run<'a> {
    pub variant: Variant,
    pub selected: Option<&'a [u32]>,
    pub is_gated: bool,
    pub exact_gelu: bool,
}

pub fn multiply(device: &Device, layer: &Layer, x: &Activations, run: &Run) -> Vec<Vec<f32>> {
    let gate: Vec<_> = layer.gate.iter().map(|matrix| matrix.upload(device)).collect();
    let up: Vec<_> = layer.up.iter().map(|matrix| matrix.upload(device)).collect();
    let (gate_arguments, up_arguments) = (arguments_of(device, &gate), arguments_of(device, &up));
    let rows = layer.gate[0].rows;
    let (stride, slots) = (rows + 5, layer.slot_tokens.len());
    let out = device.array(&vec![UNTOUCHED; (slots + 1) * stride]);
    let (starts, slot_tokens) = (device.array(&layer.starts), device.array(&layer.slot_tokens));
    let selected = run.selected.map(|selected| device.array(selected));
    let arguments = ExpertArguments {
        weights: gate_arguments.pointer(),
        up: if run.is_gated { up_arguments.pointer() } else { std::ptr::null() },
        selected: selected.as_ref().map_or(std::ptr::null(), |selected| selected.pointer()),
        x: x.arguments(if run.is_gated { Some(&slot_tokens) } else { None }, layer.gate[0].kind.format),
        starts: starts.pointer(),
        out: out.pointer_mut(),
        out_stride: stride as u32,
        exact_gelu: run.exact_gelu.into(),
    };
    let experts = run.selected.map_or(gate.len(), <[u32]>::len);
    let grid = match run.variant {
        Variant::Tile(_) => [gate[0].panels(), experts, 1],
        Variant::Narrow => [gate[0].panels().div_ceil(NARROW_PANELS), experts, 1],
        // As many tiles as if all slots were one expert's.
        Variant::Tensor => [slots.div_ceil(TENSOR_TOKENS), gate[0].panels().div_ceil(TENSOR_PANELS), experts],
    };
    let family = if run.is_gated { "gate_up" } else { "down" };
    device.launch(&run.variant.kernel(family, layer.gate[0].kind.format), grid, &arguments);
    let out = out.read();
    let (written, rest) = out.split_at(slots * stride);
    assert!(rest.iter().all(|number| *number == UNTOUCHED), "a slot too many");
    let rows = written.chunks(stride).map(|row| {
        assert!(row[rows..].iter().all(|number| *number == UNTOUCHED), "a row too many");
        row[..rows].to_vec()
    });
    rows.collect()
}

pub fn gelu(x: f64, is_exact: bool) -> f64 {
    if is_exact {
        return 0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt()));
    }
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

/// Lists of tokens for four experts: some, none, one, and more than a tile.
fn lists(random: &mut Random, tokens: usize, tile: usize) -> Vec<Vec<u32>> {
    let counts = [1 + random.below(tile), 0, 1, tile + 1 + random.below(tile)];
    counts.map(|count| (0..count).map(|_| random.below(tokens) as u32).collect()).to_vec()
}

pub fn check_experts(device: &Device, random: &mut Random, effort: Effort) {
    for (at, kind) in kinds().into_iter().enumerate() {
        for (turn, tile) in TILES.into_iter().enumerate() {
            if effort == Effort::Sample && turn != at % TILES.len() {
                continue;
            }
            let (rows, columns) = ([1, 15, 17, 40][random.below(4)], [1, 33, 129, 260, 1060][random.below(5)]);
            let lists = lists(random, 6, tile);
            let layer = Layer::random(random, rows, columns, kind, &lists);
            let exact_gelu = random.below(2) == 0;
            let selected: Option<&[u32]> = [None, Some(&[3u32, 0][..])][random.below(2)];
            let x = Activations::random(device, random, 6, columns);
            let slot_x = Activations::random(device, random, layer.slot_tokens.len(), columns);
            let variant = Variant::Tile(tile);
            let gated = multiply(device, &layer, &x, &Run { variant, selected, is_gated: true, exact_gelu });
            let down = multiply(device, &layer, &slot_x, &Run { variant, selected, is_gated: false, exact_gelu });
            for slot in 0..layer.slot_tokens.len() {
                let expert = layer.expert_of(slot);
                for row in 0..rows {
                    if selected.is_some_and(|selected| !selected.contains(&(expert as u32))) {
                        assert!(gated[slot][row] == UNTOUCHED && down[slot][row] == UNTOUCHED);
                        continue;
                    }
                    let token = layer.slot_tokens[slot] as usize;
                    let (gate, gate_magnitude) = product(&layer.gate[expert], row, &x, token);
                    let (up, up_magnitude) = product(&layer.up[expert], row, &x, token);
                    // The slope of GeLU is below 1.2.
                    let error =
                        PRODUCT_ERROR * (1.2 * gate_magnitude * up.abs() + gelu(gate, exact_gelu).abs() * up_magnitude);
                    let expected = gelu(gate, exact_gelu) * up;
                    let off = (f64::from(gated[slot][row]) - expected).abs();
                    let room = error + 1e-6 * (expected.abs() + up.abs() * gate.abs().min(1.0));
                    assert!(off <= room, "{kind:?}, tile of {tile}: {} for {expected}, off {off:e}", gated[slot][row]);

                    let (expected, magnitude) = product(&layer.gate[expert], row, &slot_x, slot);
                    let off = (f64::from(down[slot][row]) - expected).abs();
                    assert!(off <= PRODUCT_ERROR * magnitude, "{kind:?}, down, tile of {tile}: off {off:e}");
                }
            }
        }
    }
}

pub fn check_bits(device: &Device, random: &mut Random, effort: Effort) {
    for format in Format::ALL {
        let kind = Kind { format, group: 32, half_scales: true };
        let columns = if effort == Effort::Sample { 70 } else { 1100 };
        let mut layer = Layer::random(random, 19, columns, kind, &[vec![0, 1, 2, 3, 4, 5, 6, 7, 8], vec![4]]);
        // Identical experts, as in a mix of identical models.
        for row in 0..19 {
            copy(&mut layer.gate, row);
            copy(&mut layer.up, row);
        }
        let x = Activations::random(device, random, 9, columns);
        let run = |layer: &Layer, tile| {
            let variant = Variant::Tile(tile);
            multiply(device, layer, &x, &Run { variant, selected: None, is_gated: true, exact_gelu: false })
        };
        let together = run(&layer, 1);
        for tile in TILES {
            for lists in [[vec![0, 1, 2, 3, 4, 5, 6, 7, 8], vec![4]], [vec![5], vec![1, 8, 0]]] {
                layer.send(&lists);
                for (token, row) in layer.slot_tokens.iter().zip(run(&layer, tile)) {
                    let expected = &together[*token as usize];
                    let is_same = row.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(is_same, "{kind:?}, tile of {tile}, token {token}");
                }
            }
        }
    }
}

/// Expert 1 becomes expert 0.
fn copy(experts: &mut [Matrix], row: usize) {
    let (first, others) = experts.split_at_mut(1);
    others[0].copy_row_of(&first[0], row);
}

pub fn check_combine(device: &Device, random: &mut Random, _effort: Effort) {
    for (tokens, top_k, hidden_size) in [(1, 1, 7), (3, 2, 260), (4, 3, 700), (2, 5, 33)] {
        let slots = tokens * top_k;
        let mut numbers = |count: usize| -> Vec<f32> { (0..count).map(|_| random.unit()).collect() };
        let (projected, x) = (numbers(slots * hidden_size), numbers(tokens * hidden_size));
        let weights: Vec<f64> = numbers(slots).into_iter().map(|weight| f64::from(weight) / 3.0).collect();
        // Each token has fewer choices than the one before; the slots are in no order.
        let is_chosen = |at: usize| at.is_multiple_of(top_k) || at % top_k + at / top_k < top_k;
        let chosen: Vec<u32> = (0..slots).map(|at| if is_chosen(at) { 3 } else { NO_EXPERT }).collect();
        let slot_of: Vec<u32> =
            (0..slots).map(|at| if is_chosen(at) { ((at * 7 + 3) % slots) as u32 } else { NO_EXPERT }).collect();
        let there = device.array(&x);
        let arrays = (device.array(&projected), device.array(&slot_of), device.array(&chosen), device.array(&weights));
        let arguments = CombineArguments {
            projected: arrays.0.pointer(),
            slots: arrays.1.pointer(),
            chosen: arrays.2.pointer(),
            exact_weights: arrays.3.pointer(),
            x: there.pointer_mut(),
            hidden_size: hidden_size as u32,
            top_k: top_k as u32,
        };
        device.launch("combine", [tokens, 1, 1], &arguments);
        for (at, result) in there.read().into_iter().enumerate() {
            let (token, column) = (at / hidden_size, at % hidden_size);
            let mut sum = 0f64;
            for choice in (token * top_k..(token + 1) * top_k).filter(|choice| is_chosen(*choice)) {
                sum += weights[choice] * f64::from(projected[slot_of[choice] as usize * hidden_size + column]);
            }
            assert_eq!(result.to_bits(), (x[at] + sum as f32).to_bits());
        }
    }
}
