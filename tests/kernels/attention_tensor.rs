//! Attention on tensor cores: tiles of up to 64 tokens.

use half::{bf16, f16};

use crate::Effort;
use crate::arguments::{AttentionArguments, TileArguments};
use crate::attention::{Case, case};
use crate::device::Device;
use crate::products::UNTOUCHED;
use crate::random::Random;
use crate::rotate::Geometry;

/// By the number of the dtype of keys and values.
const KERNELS: [&str; 4] = ["attention", "attention_tensor_bf16", "attention_tensor_f16", "attention_tensor_int8"];

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy)]
struct Slice {
    kv_dtype: u32,
    start: usize,
    count: usize,
}

/// A sequence of each slice, and a query for each of its tokens, of numbers up to `size`.
fn case_of<'a>(
    device: &'a Device,
    random: &mut Random,
    (geometry, heads): (&Geometry, usize),
    slices: &[Slice],
    size: f32,
    change: &dyn Fn([usize; 4], &mut [f32]),
) -> Case<'a> {
    let sequences: Vec<_> = slices.iter().map(|slice| (slice.kv_dtype, slice.start + slice.count)).collect();
    let mut case = case(device, random, geometry, heads, &sequences, change);
    let positions = |(sequence, slice): (usize, &Slice)| {
        (slice.start..slice.start + slice.count).map(move |position| (sequence, position))
    };
    case.spots = slices.iter().enumerate().flat_map(positions).collect();
    case.query = (0..case.spots.len() * heads * geometry.head_dim).map(|_| random.unit() * size).collect();
    case
}

/// Tiles of slices as the host cuts them, of at most `most` tokens; the longest last, as their order is only for speed.
fn tiles(slices: &[Slice], kv_dtype: u32, most: usize) -> Vec<TileArguments> {
    let (mut tiles, mut first) = (Vec::new(), 0);
    for slice in slices {
        for begin in (0..slice.count).step_by(most).filter(|_| slice.kv_dtype == kv_dtype) {
            let count = most.min(slice.count - begin) as u32;
            tiles.push(TileArguments { first: (first + begin) as u32, count });
        }
        first += slice.count;
    }
    tiles
}

/// `[tokens, heads * head_dim]`: f32 by the kernel of single tokens, given by an index, the rest on tensor cores.
fn attend(device: &Device, case: &Case, slices: &[Slice], most: usize) -> Vec<f32> {
    let (tokens, head_dim) = (case.spots.len(), case.cache.head_dim);
    let width = case.heads * head_dim;
    let stride = width.next_multiple_of(128) + 128;
    let places: Vec<_> = case.spots.iter().map(|(sequence, position)| case.cache.place(*sequence, *position)).collect();
    let (places, query) = (device.array(&places), device.array(&case.query));
    let attended = device.array(&vec![UNTOUCHED; tokens * stride]);
    for (kv_dtype, kernel) in KERNELS.into_iter().enumerate() {
        let tiles = tiles(slices, kv_dtype as u32, if kv_dtype == 0 { 1 } else { most });
        let index: Vec<u32> = tiles.iter().map(|tile| tile.first).collect();
        let (tiles_there, index_there) = (device.array(&tiles), device.array(&index));
        let arguments = AttentionArguments {
            query: query.pointer(),
            places: places.pointer(),
            index: index_there.pointer(),
            tiles: tiles_there.pointer(),
            cache: case.cache.arguments(),
            partial: std::ptr::null_mut(),
            attended: attended.pointer_mut(),
            stride: stride as u32,
            spans: 0,
            layer: case.layer as u32,
            heads: case.heads as u32,
        };
        let grid = if kv_dtype == 0 { [tiles.len(), case.heads, 1] } else { [case.heads, tiles.len(), 1] };
        if !tiles.is_empty() {
            device.launch(kernel, grid, &arguments);
        }
    }
    let mut results = Vec::new();
    for row in attended.read().chunks(stride) {
        assert!(row[width..].iter().all(|number| *number == UNTOUCHED), "past the heads");
        results.extend(&row[..width]);
    }
    results
}

/// One head of one token in f64, of the query as the kernel rounds it, and what each column may be off.
fn expected(case: &Case, slices: &[Slice], token: usize, head: usize) -> (Vec<f64>, Vec<f64>) {
    let head_dim = case.cache.head_dim;
    let (sequence, position) = case.spots[token];
    let kv_dtype = slices[sequence].kv_dtype;
    let rounded = |number: &f32| match kv_dtype {
        0 => f64::from(*number),
        2 => f16::from_f32(*number).to_f64(),
        _ => bf16::from_f32(*number).to_f64(),
    };
    let from = (token * case.heads + head) * head_dim;
    let query: Vec<f64> = case.query[from..from + head_dim].iter().map(rounded).collect();
    let group = head / (case.heads / case.cache.heads);
    let seen = &case.contents[sequence][..=position];
    let root = (head_dim as f64).sqrt();
    let (mut scores, mut magnitude) = (Vec::new(), 0f64);
    for [keys, _] in seen {
        let terms = || keys[group].iter().zip(&query).map(|(key, query)| key * query / root);
        scores.push(terms().sum::<f64>());
        magnitude = magnitude.max(terms().map(f64::abs).sum());
    }
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let (mut values, mut errors) = (vec![0.0; head_dim], vec![0.0; head_dim]);
    // Half a unit in the last place: of a weight as the values' dtype has it, and of f32, where a GPU may cut off
    // instead: then it is twice that. Below the smallest normal number a weight is off by half of the smallest of f16, or it
    // is 0.
    let f32_rounding = 1.0 / f64::from(1 << 23);
    let (rounding, smallest) = match kv_dtype {
        0 => (0.0, f64::from(f32::MIN_POSITIVE)),
        2 => (1.0 / f64::from(1 << 11), 1.0 / f64::from(1 << 25)),
        _ => (1.0 / f64::from(1 << 8), f64::from(f32::MIN_POSITIVE)),
    };
    // A rounding for each column of a score and a few after that; all weights may be off by as much, and their sum.
    let of_scores = 2.0 * (head_dim + 8) as f64 * magnitude.max(1.0) * f32_rounding;
    let of_sums = 2.0 * (position + 8) as f64 * f32_rounding;
    for ([_, rows], weight) in seen.iter().zip(&weights) {
        for (column, value) in rows[group].iter().enumerate() {
            values[column] += weight / sum * value;
            errors[column] += (weight * (rounding + of_scores + of_sums) + smallest) / sum * value.abs();
        }
    }
    (values, errors)
}

/// Fails where a result is off by more than roundings explain; what the worst was, as a part of what it may be.
fn check(case: &Case, slices: &[Slice], results: &[f32]) -> f64 {
    let head_dim = case.cache.head_dim;
    let mut worst = 0f64;
    for token in 0..case.spots.len() {
        for head in 0..case.heads {
            let (values, errors) = expected(case, slices, token, head);
            let row = &results[(token * case.heads + head) * head_dim..][..head_dim];
            for ((result, value), error) in row.iter().zip(values).zip(errors) {
                let off = (f64::from(*result) - value).abs();
                let (sequence, position) = case.spots[token];
                let kv_dtype = slices[sequence].kv_dtype;
                let place = format!("{}, head_dim {head_dim}, position {position}", KERNELS[kv_dtype as usize]);
                assert!(off <= error, "{place}, head {head}: {result} for {value}, off {off:e} of {error:e}");
                worst = worst.max(off / error);
            }
        }
    }
    worst
}

pub fn check_tiles(device: &Device, random: &mut Random, effort: Effort) {
    // Heads, key-value heads, head_dim, positions of a page.
    let shapes = [
        (2, 2, 8, 16),
        (4, 2, 24, 16),
        (2, 1, 64, 16),
        (2, 1, 256, 16),
        (3, 1, 16, 16),
        (1, 1, 128, 16),
        (2, 2, 72, 5),
        (1, 1, 200, 32),
    ];
    let counts = [17, 63, 64, 65, 130];
    for (turn, (heads, key_value_heads, head_dim, page_tokens)) in shapes.into_iter().enumerate() {
        if effort == Effort::Sample && turn > 3 {
            continue;
        }
        let geometry = Geometry { layers: 2, heads: key_value_heads, head_dim, page_tokens };
        // From the first position, from the middle of a page, and from its begin; the dtypes by turns.
        let long = if head_dim <= 24 { 2000 + random.below(1000) } else { 200 + random.below(100) };
        let starts = [0, 1 + random.below(15), 16 * (1 + random.below(4)), long];
        let mut slices: Vec<_> = [1, 2, 3, 0, 3, 1, 2]
            .into_iter()
            .enumerate()
            .map(|(at, kv_dtype)| Slice { kv_dtype, start: starts[(at + turn) % 4], count: counts[(at + turn) % 5] })
            .collect();
        if effort == Effort::Sample {
            slices.truncate(4);
            for (at, slice) in slices.iter_mut().enumerate() {
                (slice.start, slice.count) = (slice.start.min(40), [17, 66, 20, 3][(at + turn) % 4]);
            }
        }
        let case = case_of(device, random, (&geometry, heads), &slices, 3.0, &|_, _| {});
        let worst = check(&case, &slices, &attend(device, &case, &slices, 64));
        println!("head_dim {head_dim}: {worst:.2} of what roundings explain");
    }
}

/// Scores whose exponential would overflow, rising and falling over the positions: the largest changes again and again.
pub fn check_large_scores(device: &Device, random: &mut Random, effort: Effort) {
    let geometry = Geometry { layers: 1, heads: 1, head_dim: 16, page_tokens: 16 };
    let count = if effort == Effort::Sample { 20 } else { 70 };
    for rises in [true, false] {
        let slices = [1, 2, 3].map(|kv_dtype| Slice { kv_dtype, start: 100, count });
        let change = |[_, position, half, _]: [usize; 4], row: &mut [f32]| {
            let size = if rises { position as f32 } else { 200.0 - position as f32 };
            row.iter_mut().filter(|_| half == 0).for_each(|number| *number *= size / 100.0);
        };
        let case = case_of(device, random, (&geometry, 2), &slices, 300.0, &change);
        check(&case, &slices, &attend(device, &case, &slices, 64));
    }
}

pub fn check_bits(device: &Device, random: &mut Random, effort: Effort) {
    let (head_dim, count) = if effort == Effort::Sample { (40, 36) } else { (136, 100) };
    let geometry = Geometry { layers: 1, heads: 1, head_dim, page_tokens: 16 };
    let slices = [1, 2, 3].map(|kv_dtype| Slice { kv_dtype, start: 5 + random.below(40), count });
    let case = case_of(device, random, (&geometry, 1), &slices, 3.0, &|_, _| {});
    let bits = |most| attend(device, &case, &slices, most).iter().map(|number| number.to_bits()).collect::<Vec<_>>();
    let whole = bits(64);
    for most in [1, 7, 33] {
        assert_eq!(bits(most), whole, "tiles of {most} tokens");
    }
}

/// A number that is none reaches the tokens that see it, and where it is a value up to thirty before it.
pub fn check_special_numbers(device: &Device, random: &mut Random, _effort: Effort) {
    let geometry = Geometry { layers: 1, heads: 1, head_dim: 16, page_tokens: 16 };
    for half in [0, 1] {
        let at = 20 + random.below(30);
        let slices: Vec<_> =
            [1, 2, 3, 1, 2, 3].into_iter().map(|kv_dtype| Slice { kv_dtype, start: 10, count: 50 }).collect();
        let change = |[sequence, position, its_half, _]: [usize; 4], row: &mut [f32]| {
            if sequence >= 3 && position == at && its_half == half {
                row[3] = f32::NAN;
            }
        };
        let case = case_of(device, random, (&geometry, 1), &slices, 1.0, &change);
        let results = attend(device, &case, &slices, 64);
        for ((sequence, position), row) in case.spots.iter().zip(results.chunks(16)) {
            let unharmed = if half == 0 { at } else { at.saturating_sub(30) };
            if *sequence < 3 || *position < unharmed {
                assert!(row.iter().all(|number| number.is_finite()), "sequence {sequence}, position {position}");
            } else if *position >= at {
                // Of an int8 row the scale is what is not a number.
                let is_whole = half == 0 || slices[*sequence].kv_dtype == 3;
                assert!(row[3].is_nan() && row[4].is_nan() == is_whole, "sequence {sequence}, position {position}");
            }
        }
    }
}
