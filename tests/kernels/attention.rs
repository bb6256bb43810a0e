//! Attention over pages.

use crate::Effort;
use crate::arguments::AttentionArguments;
use crate::device::Device;
use crate::products::UNTOUCHED;
use crate::random::Random;
use crate::rotate::{Cache, Geometry, KV_DTYPES, loaded, stored};

pub struct Case<'a> {
    pub cache: Cache<'a>,
    pub layer: usize,
    pub heads: usize,
    /// `(sequence, position)` of each token.
    pub spots: Vec<(usize, usize)>,
    /// `[tokens, heads * head_dim]`
    pub query: Vec<f32>,
    /// `[sequences][position][key, value][heads]`: what the cache has, exactly.
    pub contents: Vec<Vec<[Vec<Vec<f64>>; 2]>>,
}

/// Sequences of `(dtype, positions)` with random keys and values; `change` may change a row before it is stored.
pub fn case<'a>(
    device: &'a Device,
    random: &mut Random,
    geometry: &Geometry,
    heads: usize,
    sequences: &[(u32, usize)],
    change: &dyn Fn([usize; 4], &mut [f32]),
) -> Case<'a> {
    let cache = Cache::new(device, geometry, sequences);
    let layer = random.below(geometry.layers);
    let mut contents = Vec::new();
    for (sequence, (kv_dtype, positions)) in sequences.iter().copied().enumerate() {
        let mut pages = cache.blank(sequence, positions);
        let mut of_sequence = Vec::new();
        for position in 0..positions {
            of_sequence.push([0, 1].map(|half| {
                let row = |head: usize| {
                    let mut row: Vec<f32> = (0..geometry.head_dim).map(|_| random.unit() * 2.0).collect();
                    change([sequence, position, half, head], &mut row);
                    cache.put(&mut pages, sequence, [layer, half, head, position], &row);
                    let (bytes, scale) = stored(&row, kv_dtype);
                    loaded(&bytes, scale, kv_dtype)
                };
                (0..geometry.heads).map(row).collect()
            }));
        }
        cache.write(sequence, &pages);
        contents.push(of_sequence);
    }
    // The last token of each sequence, and one before it.
    let last = sequences.iter().enumerate().map(|(sequence, (_, positions))| (sequence, positions - 1));
    let mut spots: Vec<_> = last.collect();
    spots.extend(sequences.iter().enumerate().map(|(sequence, (_, positions))| (sequence, random.below(*positions))));
    let query = (0..spots.len() * heads * geometry.head_dim).map(|_| random.unit()).collect();
    Case { cache, layer, heads, spots, query, contents }
}

/// `[tokens, heads * head_dim]`
fn attend(device: &Device, case: &Case, splits: usize) -> Vec<f32> {
    let (tokens, head_dim) = (case.spots.len(), case.cache.head_dim);
    let width = case.heads * head_dim;
    let stride = width.next_multiple_of(128) + 128;
    let longest = case.spots.iter().map(|(_, position)| position + 1).max().unwrap();
    let spans = if splits == 1 { 0 } else { longest.div_ceil(256) };
    let places: Vec<_> = case.spots.iter().map(|(sequence, position)| case.cache.place(*sequence, *position)).collect();
    let (places, query) = (device.array(&places), device.array(&case.query));
    let partial = device.room::<f32>(tokens * case.heads * spans * (head_dim + 2));
    let attended = device.array(&vec![UNTOUCHED; tokens * stride]);
    let arguments = AttentionArguments {
        query: query.pointer(),
        places: places.pointer(),
        index: std::ptr::null(),
        tiles: std::ptr::null(),
        cache: case.cache.arguments(),
        partial: if splits == 1 { std::ptr::null_mut() } else { partial.pointer_mut() },
        attended: attended.pointer_mut(),
        stride: stride as u32,
        spans: spans as u32,
        layer: case.layer as u32,
        heads: case.heads as u32,
    };
    device.launch("attention", [tokens, case.heads, splits], &arguments);
    if splits > 1 {
        device.launch("attention_merge", [tokens, case.heads, 1], &arguments);
    }
    let mut results = Vec::new();
    for row in attended.read().chunks(stride) {
        assert!(row[width..].iter().all(|number| *number == UNTOUCHED), "past the heads");
        results.extend(&row[..width]);
    }
    results
}

/// One head of one token, and the sum of magnitudes of each column.
fn expected(case: &Case, token: usize, head: usize) -> (Vec<f64>, Vec<f64>) {
    let head_dim = case.cache.head_dim;
    let (sequence, position) = case.spots[token];
    let query = &case.query[(token * case.heads + head) * head_dim..][..head_dim];
    let group = head / (case.heads / case.cache.heads);
    let seen = &case.contents[sequence][..=position];
    let scores: Vec<f64> = seen
        .iter()
        .map(|[keys, _]| {
            let terms = keys[group].iter().zip(query).map(|(key, query)| key * f64::from(*query));
            terms.sum::<f64>() / (head_dim as f64).sqrt()
        })
        .collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let (mut values, mut magnitudes) = (vec![0.0; head_dim], vec![0.0; head_dim]);
    for ([_, rows], weight) in seen.iter().zip(&weights) {
        for (column, value) in rows[group].iter().enumerate() {
            values[column] += weight / sum * value;
            magnitudes[column] += weight / sum * value.abs();
        }
    }
    (values, magnitudes)
}

pub fn check_attention(device: &Device, random: &mut Random, effort: Effort) {
    // Heads, key-value heads, head_dim, positions of a page, positions.
    let shapes = [
        (2, 2, 8, 16, 300),
        (4, 2, 40, 16, 257),
        (2, 1, 64, 16, 256),
        (3, 3, 7, 4, 70),
        (2, 2, 128, 32, 530),
        (2, 1, 256, 16, 515),
        (1, 1, 512, 16, 260),
        (2, 2, 260, 5, 17),
    ];
    for (at, (heads, key_value_heads, head_dim, page_tokens, positions)) in shapes.into_iter().enumerate() {
        if effort == Effort::Sample && (at > 4 || positions > 300) {
            continue;
        }
        let geometry = Geometry { layers: 2, heads: key_value_heads, head_dim, page_tokens };
        // A sequence of each dtype, shorter and shorter, the last of one position.
        let sequences =
            [0, 1, 2, 3].map(|at| (KV_DTYPES[(at + random.below(4)) % 4], [positions, positions / 2, 33, 1][at]));
        let case = case(device, random, &geometry, heads, &sequences, &|_, _| {});
        let alone = attend(device, &case, 1);
        for token in 0..case.spots.len() {
            for head in 0..heads {
                let (values, magnitudes) = expected(&case, token, head);
                let results = &alone[(token * heads + head) * head_dim..][..head_dim];
                for ((result, value), magnitude) in results.iter().zip(values).zip(magnitudes) {
                    let off = (f64::from(*result) - value).abs();
                    assert!(
                        off <= 1e-5 * magnitude,
                        "head_dim {head_dim}, token {token}: {result} for {value}, off {off:e}"
                    );
                }
            }
        }
        for splits in [2, 3, 8] {
            let bits = |numbers: &[f32]| numbers.iter().map(|number| number.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&attend(device, &case, splits)), bits(&alone), "{splits} splits, head_dim {head_dim}");
        }
    }
}

/// A number that is none in a key or a value reaches the tokens that see it, and nobody else.
pub fn check_special_numbers(device: &Device, random: &mut Random, _effort: Effort) {
    let geometry = Geometry { layers: 1, heads: 1, head_dim: 16, page_tokens: 16 };
    for kv_dtype in KV_DTYPES {
        for half in [0, 1] {
            for special in [f32::NAN, f32::INFINITY] {
                let position = random.below(280);
                let change = |[sequence, at, its_half, _]: [usize; 4], row: &mut [f32]| {
                    if sequence == 1 && at == position && its_half == half {
                        row[3] = special;
                    }
                };
                let mut case = case(device, random, &geometry, 1, &[(kv_dtype, 20), (kv_dtype, 300)], &change);
                case.spots = vec![(0, 19), (1, 299), (1, position), (1, position.saturating_sub(1))];
                for splits in [1, 2] {
                    let results = attend(device, &case, splits);
                    let rows: Vec<_> = results.chunks(16).collect();
                    assert!(rows[0].iter().all(|number| number.is_finite()), "another sequence");
                    assert!(position == 0 || rows[3].iter().all(|number| number.is_finite()), "an earlier token");
                    for (token, row) in rows.iter().enumerate().take(3).skip(1) {
                        // An infinite score below zero has no weight, unless there is no other.
                        let is_below = case.query[token * 16 + 3] < 0.0 && case.spots[token].1 > 0;
                        let is_weightless = half == 0 && special.is_infinite() && kv_dtype != 3 && is_below;
                        if is_weightless {
                            assert!(row.iter().all(|number| number.is_finite()), "a key at minus infinity");
                        } else if half == 0 || kv_dtype == 3 {
                            // Of an int8 row the scale is what is not a number.
                            assert!(row.iter().all(|number| number.is_nan()), "a score that is not a number");
                        } else {
                            assert!(!row[3].is_finite() && row[4].is_finite(), "one column of a value");
                        }
                    }
                }
            }
        }
    }
}
