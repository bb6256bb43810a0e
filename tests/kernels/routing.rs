//! Which experts tokens go to, and lists of tokens by expert.

use crate::Effort;
use crate::arguments::{GroupArguments, MatrixArguments, PlaceArguments, RouteArguments};
use crate::device::Device;
use crate::random::Random;
use crate::tensors::{Activations, Format, Kind, Matrix, product};

const NO_EXPERT: u32 = u32::MAX;

/// The router of a batch.
struct Case {
    router: Option<Matrix>,
    experts: usize,
    top_k: usize,
    layers: usize,
    layer: usize,
    places: Vec<PlaceArguments>,
    /// `[sequences, layers]`
    allowed: Vec<u64>,
    /// `[sequences, layers, experts]`
    bias: Vec<f32>,
}

struct Routes {
    chosen: Vec<u32>,
    weights: Vec<f32>,
    exact_weights: Vec<f64>,
}

fn route(device: &Device, case: &Case, x: &Activations) -> Routes {
    let choices = x.rows * case.top_k;
    let router = case.router.as_ref().map(|router| router.upload(device));
    let nothing = MatrixArguments {
        lines: std::ptr::null(),
        scales: std::ptr::null(),
        rows: 0,
        columns: 0,
        group_shift: 0,
        half_scales: 0,
    };
    let places = device.array(&case.places);
    let (allowed, bias) = (device.array(&case.allowed), device.array(&case.bias));
    let (chosen, weights, exact_weights) = (device.room(choices), device.room(choices), device.room(choices));
    let arguments = RouteArguments {
        router: router.as_ref().map_or(nothing, |router| router.arguments()),
        normed: x.arguments(None, Format::F32).numbers,
        places: places.pointer(),
        allowed: allowed.pointer(),
        bias: bias.pointer(),
        chosen: chosen.pointer_mut(),
        weights: weights.pointer_mut(),
        exact_weights: exact_weights.pointer_mut(),
        stride: x.stride as u32,
        layer: case.layer as u32,
        layers: case.layers as u32,
        experts: case.experts as u32,
        top_k: case.top_k as u32,
    };
    device.launch("route", [x.rows, 1, 1], &arguments);
    Routes { chosen: chosen.read(), weights: weights.read(), exact_weights: exact_weights.read() }
}

/// The rules of the CPU, with the logits of f64; none where logits are so close that f32 may order them otherwise.
fn expected(case: &Case, x: &Activations, token: usize) -> Option<(Vec<u32>, Vec<f64>)> {
    let at = case.places[token].sequence as usize * case.layers + case.layer;
    let is_allowed = |expert: usize| case.allowed[at] >> expert & 1 == 1;
    let router = case.router.as_ref().unwrap();
    let logits: Vec<f64> = (0..case.experts)
        .map(|expert| product(router, expert, x, token).0 + f64::from(case.bias[at * case.experts + expert]))
        .collect();
    let largest = (0..case.experts).filter(|e| is_allowed(*e)).map(|e| logits[e]).fold(f64::NEG_INFINITY, f64::max);
    let mut left: Vec<usize> = (0..case.experts).filter(|e| is_allowed(*e)).collect();
    let is_close = |a: usize, b: usize| a != b && logits[a] != logits[b] && (logits[a] - logits[b]).abs() < 1e-4;
    if left.iter().any(|a| left.iter().any(|b| is_close(*a, *b))) {
        return None;
    }
    let (mut chosen, mut weights) = (Vec::new(), Vec::new());
    for _ in 0..case.top_k {
        // The first of the largest; where none is a number, the first.
        let mut best: Option<usize> = None;
        for index in 0..left.len() {
            if best.is_none_or(|best| logits[left[index]] > logits[left[best]]) {
                best = Some(index);
            }
        }
        let expert = best.map(|best| left.remove(best));
        chosen.push(expert.map_or(NO_EXPERT, |expert| expert as u32));
        weights.push(expert.map_or(0.0, |expert| (logits[expert] - largest).exp()));
    }
    let sum: f64 = weights.iter().sum();
    Some((chosen, weights.into_iter().map(|weight| weight / sum).collect()))
}

fn check(device: &Device, case: &Case, x: &Activations) {
    let routes = route(device, case, x);
    for token in 0..x.rows {
        let Some((chosen, weights)) = expected(case, x, token) else { continue };
        let here = token * case.top_k..(token + 1) * case.top_k;
        assert_eq!(routes.chosen[here.clone()], chosen, "{} experts, top {}", case.experts, case.top_k);
        let exact = &routes.exact_weights[here.clone()];
        for ((weight, exact), expected) in routes.weights[here].iter().zip(exact).zip(&weights) {
            let is_right = expected.is_nan() && exact.is_nan() || (exact - expected).abs() < 1e-5;
            assert!(is_right, "{exact} for {expected}");
            assert!(weight.to_bits() == (*exact as f32).to_bits() || exact.is_nan() && weight.is_nan());
        }
        let sum: f64 = exact.iter().sum();
        assert!((sum - 1.0).abs() < 1e-14 || sum.is_nan(), "{sum}");
    }
}

pub fn check_route(device: &Device, random: &mut Random, effort: Effort) {
    let kind = Kind { format: Format::F32, group: 32, half_scales: false };
    for (experts, top_k, hidden_size) in [(1, 1, 5), (2, 2, 40), (4, 2, 1100), (8, 3, 260), (20, 4, 33), (64, 8, 129)] {
        if effort == Effort::Sample && hidden_size > 300 {
            continue;
        }
        let (tokens, sequences, layers, layer) = (5, 3, 2, 1);
        let mut router = Matrix::random(random, experts, hidden_size, kind);
        // Ties: experts that are the same, in another panel where there is one.
        if experts >= 4 {
            router.repeat_row(0, experts - 1);
        }
        let places =
            (0..tokens).map(|token| PlaceArguments { sequence: token as u32 % 3, ..Default::default() }).collect();
        let bit = |expert: usize| 1u64 << expert;
        let all = if experts == 64 { u64::MAX } else { bit(experts) - 1 };
        // All of them, bits past them too; a few; a single one.
        let few = random.bits() & all | bit(random.below(experts));
        let masks = [u64::MAX, few, bit(random.below(experts))];
        // The other layer's must not count.
        let allowed = masks.iter().flat_map(|mask| [1, *mask]).collect();
        let mut bias = vec![0f32; sequences * layers * experts];
        bias[layers * experts..].fill_with(|| (random.unit() * 4.0).round());
        let mut case = Case { router: Some(router), experts, top_k, layers, layer, places, allowed, bias };
        let mut x = Activations::random(device, random, tokens, hidden_size);
        check(device, &case, &x);

        // What is not a number still goes to as many experts.
        let mut numbers = x.numbers.clone();
        numbers[random.below(hidden_size)] = f32::NAN;
        x = Activations::of(device, numbers, x.stride);
        check(device, &case, &x);

        case.router = None;
        let routes = route(device, &case, &x);
        for (at, (chosen, weight)) in routes.chosen.iter().zip(routes.weights).enumerate() {
            let expected = if at % top_k == 0 { (0, 1.0) } else { (NO_EXPERT, 0.0) };
            assert_eq!((*chosen, weight), expected);
        }
    }
}

pub fn check_group(device: &Device, random: &mut Random, effort: Effort) {
    let largest = if effort == Effort::Sample { (33, 8, 64) } else { (8192, 8, 64) };
    for (tokens, top_k, experts) in [(1, 1, 1), (1, 2, 4), (7, 2, 4), (16, 2, 8), (200, 3, 33), (300, 2, 5), largest] {
        // Some experts get nothing, and some choices have no expert.
        let chosen: Vec<u32> = (0..tokens * top_k)
            .map(|_| if random.below(9) == 0 { NO_EXPERT } else { (random.below(experts) * random.below(2)) as u32 })
            .collect();
        let (mut starts, mut slots, mut slot_tokens) = (vec![0u32], vec![u32::MAX; chosen.len()], Vec::new());
        for expert in 0..experts as u32 {
            for (choice, _) in chosen.iter().enumerate().filter(|(_, chosen)| **chosen == expert) {
                slots[choice] = slot_tokens.len() as u32;
                slot_tokens.push((choice / top_k) as u32);
            }
            starts.push(slot_tokens.len() as u32);
        }
        slot_tokens.resize(chosen.len(), u32::MAX);
        let chosen = device.array(&chosen);
        let (slots_there, tokens_there) = (device.room::<u32>(slots.len()), device.room::<u32>(slots.len()));
        let starts_there = device.array(&vec![77u32; experts + 2]);
        let arguments = GroupArguments {
            chosen: chosen.pointer(),
            slots: slots_there.pointer_mut(),
            slot_tokens: tokens_there.pointer_mut(),
            starts: starts_there.pointer_mut(),
            tokens: tokens as u32,
            top_k: top_k as u32,
            experts: experts as u32,
        };
        device.launch("group", [1, 1, 1], &arguments);
        starts.push(77);
        assert_eq!(starts_there.read(), starts);
        // Memory that nobody writes is all ones.
        assert!(
            slots_there.read() == slots && tokens_there.read() == slot_tokens,
            "{tokens} tokens, {experts} experts"
        );
    }
}
