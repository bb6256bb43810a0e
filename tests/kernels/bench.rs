//! What the bench has of its own: weights out of nothing, and the kernels behind its roofs.

use half::{bf16, f16};

use crate::Effort;
use crate::arguments::{FillArguments, MmaRateArguments, ReadArguments};
use crate::device::Device;
use crate::random::Random;

const THREADS: usize = 256;

fn fill(device: &Device, words: usize, content: u32, seed: u32, blocks: usize) -> Vec<u32> {
    // One word more than it may write.
    let there = device.array(&vec![0x5555_5555u32; words + 1]);
    let arguments = FillArguments {
        to: there.pointer_mut(),
        words: words as u64,
        content,
        seed,
        scale: 0.5,
        blocks: blocks as u32,
    };
    device.launch("fill", [blocks, 1, 1], &arguments);
    let mut filled = there.read();
    assert_eq!(filled.pop(), Some(0x5555_5555));
    filled
}

fn halves(words: &[u32], of_half: fn(u16) -> f32) -> Vec<f64> {
    let halves = words.iter().flat_map(|word| [*word as u16, (*word >> 16) as u16]);
    halves.map(|half| f64::from(of_half(half))).collect()
}

pub fn check_fill(device: &Device, random: &mut Random, effort: Effort) {
    let words = if effort == Effort::Sample { 700 } else { 5000 + random.below(100) };
    let seed = random.bits() as u32;
    let of_bf16 = |half| bf16::from_bits(half).to_f32();
    let of_f16 = |half| f16::from_bits(half).to_f32();
    let filled = |content| fill(device, words, content, seed, 3);
    let numbers = [
        filled(1).into_iter().map(|word| f64::from(f32::from_bits(word))).collect(),
        halves(&filled(2), of_bf16),
        halves(&filled(3), of_f16),
    ];
    for numbers in numbers {
        let count = numbers.len() as f64;
        let mean = numbers.iter().sum::<f64>() / count;
        let deviation = (numbers.iter().map(|number| number * number).sum::<f64>() / count).sqrt();
        // Six times what either varies by.
        let room = 6.0 * 0.5 / count.sqrt();
        assert!(mean.abs() < room && (deviation - 0.5).abs() < room, "mean {mean}, deviation {deviation}");
        assert!(numbers.iter().all(|number| number.abs() <= 1.8));
    }
    for scales in [halves(&filled(4), of_bf16), halves(&filled(5), of_f16)] {
        assert!(scales.iter().all(|scale| (0.398..=0.602).contains(scale)), "{scales:?}");
    }
    // Bits as they come: each as often set as not, other ones of another seed, the same in any grid.
    let bits = filled(0);
    let set: u32 = bits.iter().map(|word| word.count_ones()).sum();
    let (expected, room) = (16.0 * words as f64, 6.0 * (8.0 * words as f64).sqrt());
    assert!((f64::from(set) - expected).abs() < room, "{set} of {} bits", 32 * words);
    assert_eq!(bits, fill(device, words, 0, seed, 7));
    assert_ne!(bits, fill(device, words, 0, seed ^ 1, 3));
}

pub fn check_read(device: &Device, random: &mut Random, _effort: Effort) {
    for count in [1usize, 255, 257, 5000] {
        for blocks in [1usize, 2, 5] {
            let words: Vec<u32> = (0..count * 4).map(|_| random.bits() as u32).collect();
            let (there, seen) = (device.array(&words), device.array(&vec![7u32; blocks]));
            let arguments = ReadArguments {
                from: there.pointer().cast(),
                count: count as u64,
                seen: seen.pointer_mut(),
                blocks: blocks as u32,
            };
            device.launch("read", [blocks, 1, 1], &arguments);
            // Sixteen bytes after sixteen bytes to the threads of all blocks, over and over.
            let mut expected = vec![0u32; blocks];
            for (at, words) in words.chunks(4).enumerate() {
                expected[at / THREADS % blocks] ^= words.iter().fold(0, |all, word| all ^ word);
            }
            assert_eq!(seen.read(), expected, "{count} times sixteen bytes, {blocks} blocks");
        }
    }
}

pub fn check_mma_rate(device: &Device, random: &mut Random, _effort: Effort) {
    let rounds = 1 + random.below(3) as u32;
    for (name, depth) in [("mma_rate_bf16", 16), ("mma_rate_int8", 32)] {
        let run = |seed| {
            let out = device.array(&vec![-1f32; 2 * THREADS]);
            let arguments = MmaRateArguments { out: out.pointer_mut(), rounds, seed };
            device.launch(name, [2, 1, 1], &arguments);
            out.read()
        };
        // Eight chains of four sums, each of as many ones as a product is deep, in each round.
        assert_eq!(run(0), vec![(32 * depth * rounds) as f32; 2 * THREADS], "{name}");
        let random = run(1 + random.below(1000) as u32);
        assert!(random.iter().all(|sum| sum.is_finite()) && random.iter().any(|sum| *sum != random[0]), "{name}");
    }
}
