//! What is done to rows: embedding, norms, rounding, the log-probability of a target.

use half::{bf16, f16};

use crate::Effort;
use crate::arguments::{BlockArguments, EmbedArguments, LogSoftmaxArguments, NormArguments, RoundArguments};
use crate::device::Device;
use crate::products::UNTOUCHED;
use crate::random::Random;
use crate::tensors::{Kind, Matrix, kinds, rounded};

impl Default for BlockArguments {
    fn default() -> Self {
        BlockArguments { scale: 0.0, sum: 0 }
    }
}

pub fn check_embed(device: &Device, random: &mut Random, _effort: Effort) {
    for kind in kinds() {
        let Kind { format, .. } = kind;
        let hidden_size = [5, 40, 260, 513][random.below(4)];
        let embedding = Matrix::random(random, 37, hidden_size, kind);
        let there = embedding.upload(device);
        let ids: Vec<u32> = [0, 36, 15, 16].into_iter().chain((0..3).map(|_| random.below(37) as u32)).collect();
        let (tokens, x) = (device.array(&ids), device.array(&vec![UNTOUCHED; (ids.len() + 1) * hidden_size]));
        let arguments = EmbedArguments {
            embedding: there.arguments(),
            format: format as u32,
            scale: 55.5,
            tokens: tokens.pointer(),
            x: x.pointer_mut(),
            hidden_size: hidden_size as u32,
        };
        device.launch("embed", [ids.len(), 1, 1], &arguments);
        let x = x.read();
        let (rows, rest) = x.split_at(ids.len() * hidden_size);
        assert!(rest.iter().all(|number| *number == UNTOUCHED));
        for (id, row) in ids.iter().zip(rows.chunks(hidden_size)) {
            for (column, number) in row.iter().enumerate() {
                // A weight of any format is exact in f32 before it is scaled.
                let expected = embedding.value(*id as usize, column) as f32 * 55.5;
                assert_eq!(number.to_bits(), expected.to_bits(), "{kind:?}");
            }
        }
    }
}

pub fn check_norm(device: &Device, random: &mut Random, effort: Effort) {
    let widths: &[usize] = if effort == Effort::Sample { &[33, 257] } else { &[1, 31, 33, 129, 260, 700, 3072] };
    for columns in widths.iter().copied() {
        for (is_picked, with_integers) in [(false, false), (true, true), (false, true), (true, false)] {
            let (with_halves, are_f16) = (random.below(3) > 0, random.below(2) == 0);
            let (rows, stride) = (3, columns.next_multiple_of(128));
            let amount = [1e-3f32, 1.0, 1e20][random.below(3)];
            let x: Vec<f32> = (0..5 * columns).map(|_| random.unit() * amount).collect();
            let weight: Vec<f32> = (0..columns).map(|_| random.unit()).collect();
            let picked: Vec<u32> = if is_picked { vec![4, 0, 3] } else { vec![0, 1, 2] };
            let (x_there, weight_there, index) = (device.array(&x), device.array(&weight), device.array(&picked));
            let numbers = device.array(&vec![UNTOUCHED; rows * stride]);
            let (integers, blocks) = (device.room::<i8>(rows * stride), device.room(rows * stride / 32));
            let halves = device.room::<u16>(rows * stride);
            let arguments = NormArguments {
                x: x_there.pointer(),
                index: if is_picked { index.pointer() } else { std::ptr::null() },
                weight: weight_there.pointer(),
                numbers: numbers.pointer_mut(),
                integers: if with_integers { integers.pointer_mut().cast() } else { std::ptr::null_mut() },
                blocks: blocks.pointer_mut(),
                halves: if with_halves { halves.pointer_mut() } else { std::ptr::null_mut() },
                eps: 1e-6,
                columns: columns as u32,
                stride: stride as u32,
                halves_are_f16: are_f16.into(),
            };
            device.launch("norm", [rows, 1, 1], &arguments);
            let mut numbers = numbers.read();
            for (row, picked) in numbers.chunks_mut(stride).zip(&picked) {
                let x = &x[*picked as usize * columns..][..columns];
                let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / columns as f64;
                for ((number, x), weight) in row.iter().zip(x).zip(&weight) {
                    let expected = f64::from(*x) / (mean + 1e-6).sqrt() * (1.0 + f64::from(*weight));
                    assert!((f64::from(*number) - expected).abs() <= 3e-7 * expected.abs(), "{number} for {expected}");
                }
                assert!(row[columns..].iter().all(|number| *number == UNTOUCHED), "columns past the real ones");
                row[columns..].fill(0.0);
            }
            if with_integers {
                check_rounded(&numbers, &integers.read(), &blocks.read());
            }
            if with_halves {
                check_halves(&numbers, &halves.read(), are_f16);
            }
        }
    }
}

/// Integers and blocks are what rounding gives, bit for bit.
fn check_rounded(numbers: &[f32], integers: &[i8], blocks: &[BlockArguments]) {
    for ((numbers, integers), block) in numbers.chunks(32).zip(integers.chunks(32)).zip(blocks) {
        let (whole, scale) = rounded(numbers);
        assert_eq!(integers, whole, "{numbers:?}");
        let is_same = block.scale.to_bits() == scale.to_bits() || block.scale.is_nan() && scale.is_nan();
        assert!(is_same, "scale {} for {scale}", block.scale);
        assert_eq!(block.sum, whole.iter().map(|number| i32::from(*number)).sum::<i32>());
    }
}

/// Halves are what rounding to nearest gives, bit for bit; in f16 the largest number instead of infinity.
fn check_halves(numbers: &[f32], halves: &[u16], are_f16: bool) {
    for (number, half) in numbers.iter().zip(halves) {
        let finite = if number.is_finite() { number.clamp(-65504.0, 65504.0) } else { *number };
        let (wide, expected) = match are_f16 {
            true => (f16::from_bits(*half).to_f32(), f16::from_f32(finite).to_bits()),
            false => (bf16::from_bits(*half).to_f32(), bf16::from_f32(*number).to_bits()),
        };
        assert!(*half == expected || number.is_nan() && wide.is_nan(), "{number:e}: {half:04x} for {expected:04x}");
    }
}

pub fn check_round(device: &Device, random: &mut Random, _effort: Effort) {
    let specials = [0.0, -0.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-37, 1.4e-36, 1.6e-36, 1e-45, 3e38, 127.0];
    for (stride, parts) in [(128, 1), (384, 2), (1152, 3), (4096, 1)] {
        let rows = 5;
        let mut numbers: Vec<f32> = (0..rows * stride).map(|_| random.unit()).collect();
        for block in numbers.chunks_mut(32) {
            match random.below(6) {
                0 => block[random.below(32)] = specials[random.below(specials.len())],
                1 => block.fill(specials[random.below(specials.len())]),
                // Halves are ties.
                2 => block.iter_mut().enumerate().for_each(|(at, number)| *number = at as f32 * 0.5 + 111.5),
                3 => block.iter_mut().for_each(|number| *number *= 1e-36),
                // Next to ties, where every rounding step counts.
                4 => {
                    let step = (random.unit() + 1.5) / 127.0;
                    block.iter_mut().for_each(|number| *number = (random.below(254) as f32 - 126.5) * step);
                    block[random.below(32)] = 127.0 * step;
                }
                _ => {}
            }
        }
        let (there, count) = (device.array(&numbers), device.array(&[3u32]));
        for limit in [rows, 3] {
            let (integers, blocks) = (device.room::<i8>(rows * stride), device.room(rows * stride / 32));
            let halves = device.room::<u16>(rows * stride);
            // Both, and each by itself.
            let (with_integers, with_halves) = [(true, true), (true, false), (false, true)][random.below(3)];
            let are_f16 = random.below(2) == 0;
            let arguments = RoundArguments {
                numbers: there.pointer(),
                integers: if with_integers { integers.pointer_mut().cast() } else { std::ptr::null_mut() },
                blocks: blocks.pointer_mut(),
                halves: if with_halves { halves.pointer_mut() } else { std::ptr::null_mut() },
                stride: stride as u32,
                halves_are_f16: are_f16.into(),
                rows: if limit < rows { count.pointer() } else { std::ptr::null() },
            };
            device.launch("round_activations", [rows, parts, 1], &arguments);
            let (integers, blocks, halves) = (integers.read(), blocks.read(), halves.read());
            if with_integers {
                check_rounded(&numbers[..limit * stride], &integers, &blocks);
            }
            if with_halves {
                check_halves(&numbers[..limit * stride], &halves, are_f16);
            }
            let rest = limit * stride..;
            assert!(integers[rest.clone()].iter().all(|integer| *integer == -1), "a row too many");
            assert!(halves[rest].iter().all(|half| *half == u16::MAX), "a row too many");
        }
    }
}

pub fn check_log_softmax(device: &Device, random: &mut Random, _effort: Effort) {
    for vocab_size in [1, 97, 256, 1000] {
        let rows = 8;
        let mut logits: Vec<f32> = (0..rows * vocab_size).map(|_| random.unit() * 20.0).collect();
        let mut targets: Vec<u32> = (0..rows).map(|_| random.below(vocab_size) as u32).collect();
        // Of the special rows.
        let place = random.below(vocab_size);
        let special = [f32::NAN, f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
        for (row, number) in special.into_iter().enumerate() {
            logits[row * vocab_size + place] = number;
        }
        targets[0] = place as u32;
        targets[3] = place as u32;
        logits[4 * vocab_size..5 * vocab_size].fill(f32::NAN);
        logits[5 * vocab_size..6 * vocab_size].fill(f32::NEG_INFINITY);
        let out = device.room::<f32>(rows);
        let (logits_there, targets_there) = (device.array(&logits), device.array(&targets));
        let arguments = LogSoftmaxArguments {
            logits: logits_there.pointer(),
            targets: targets_there.pointer(),
            out: out.pointer_mut(),
            vocab_size: vocab_size as u32,
        };
        device.launch("log_softmax_at", [rows, 1, 1], &arguments);
        for (row, result) in out.read().into_iter().enumerate() {
            let expected = log_softmax(&logits[row * vocab_size..(row + 1) * vocab_size], targets[row] as usize);
            let is_right = result.is_nan() && expected.is_nan()
                || f64::from(result) == expected
                || (f64::from(result) - expected).abs() <= 2e-7 * (1.0 + expected.abs());
            assert!(is_right, "row {row} of {vocab_size}: {result} for {expected}");
        }
    }
}

fn log_softmax(logits: &[f32], target: usize) -> f64 {
    let known = logits.iter().filter(|logit| !logit.is_nan()).map(|logit| f64::from(*logit));
    let largest = known.clone().fold(f64::NEG_INFINITY, f64::max);
    if !largest.is_finite() {
        return f64::NAN;
    }
    let sum: f64 = known.map(|logit| (logit - largest).exp()).sum();
    let logit = f64::from(logits[target]);
    if logit.is_nan() { f64::NEG_INFINITY } else { logit - largest - sum.ln() }
}
