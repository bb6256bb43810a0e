//! Rounding a group of weights to whole numbers and a scale, so that the squared error is least.
//!
//! A group is `scale * integers`; for a given scale the best integers are the nearest ones, so only scales are searched.
//! LANES of them are tried side by side, one a lane of a vector: first a coarse row around the scale that makes the number
//! furthest from zero the lowest or the highest whole number, then a fine row around the least-squares scale of the best
//! one's integers. Every scale is tried as it will be stored. No sum depends on the width of the vectors, and nothing is
//! fused, so every processor finds the same.

use half::f16;

use super::format::{Format, MAX_GROUP, ScaleDtype};

/// How far off rounding is, in sums over all numbers: an error of 0 where nothing was rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rounded {
    /// Numbers.
    pub count: u64,
    /// Sum of squares of what was rounded.
    pub square: f64,
    /// Sum of squares of the differences.
    pub error: f64,
    /// The largest difference.
    pub largest: f64,
}

impl Rounded {
    /// Takes other numbers in.
    pub fn add(&mut self, other: &Rounded) {
        self.count += other.count;
        self.square += other.square;
        self.error += other.error;
        self.largest = self.largest.max(other.largest);
    }

    /// The root of the mean squared difference, by that of the numbers.
    pub fn relative(&self) -> f64 {
        if self.square == 0.0 { 0.0 } else { (self.error / self.square).sqrt() }
    }
}

/// Scales tried side by side, and numbers that are taken together.
const LANES: usize = 8;

/// The coarse row: scales by the number furthest from zero; the first is what plain rounding does. Negative ones make that
/// number about the lowest whole number, which reaches one further than the highest.
type Places = [f32; LANES];

const INT4_PLACES: Places =
    [-1.0 / 8.0, -1.0 / 8.7, -1.0 / 9.6, -1.0 / 7.4, -1.0 / 6.8, 1.0 / 6.7, 1.0 / 7.4, 1.0 / 8.3];

const INT8_PLACES: Places =
    [-1.0 / 128.0, -1.0 / 127.2, -1.0 / 126.4, -1.0 / 125.5, -1.0 / 124.5, 1.0 / 127.2, 1.0 / 126.2, 1.0 / 125.0];

/// Adding this rounds what is below 2^22 to a whole number, ties to even: it is in the last bits then.
const ROUNDER: f32 = 12_582_912.0;

/// The bits of ROUNDER plus the whole number next to `scaled`, within the limits of `target`.
///
/// Positive floats are in the order of their bits and negative ones below them all, so that limits can be kept as limits
/// of whole numbers. Compilers make one instruction of those, and do not of comparisons of floats.
#[inline(always)]
fn nearest_bits(scaled: f32, target: &Target) -> i32 {
    let rounder = ROUNDER.to_bits() as i32;
    ((scaled + ROUNDER).to_bits() as i32).max(rounder + target.lowest).min(rounder + target.highest)
}

/// The whole number next to `scaled` within the limits.
#[inline(always)]
fn nearest(scaled: f32, target: &Target) -> f32 {
    f32::from_bits(nearest_bits(scaled, target) as u32) - ROUNDER
}

/// What a group is rounded to.
#[derive(Clone, Copy)]
struct Target {
    lowest: i32,
    highest: i32,
    scales: ScaleDtype,
    places: &'static Places,
    /// The last bit of a single precision number that a normal stored scale has too.
    last_bit: i32,
    /// The fine row: how much further from zero each scale is, in bits.
    steps: [i32; LANES],
    /// The least and the largest scale that keeps its own inverse and every weight finite.
    least: f32,
    most: f32,
    /// Groups whose furthest number is below have scales at which bits are not units.
    smallest: f32,
}

impl Target {
    fn new(format: Format, scales: ScaleDtype) -> Target {
        let (lowest, highest, places) = match format {
            Format::Int4(_) => (-8, 7, &INT4_PLACES),
            _ => (-128, 127, &INT8_PLACES),
        };
        let (least, most) = scales.range();
        // Of half precision, with its finer scales, every third one.
        let (last_bit, step, normal, most) = match scales {
            ScaleDtype::Bf16 => (1 << 16, 1, f32::MIN_POSITIVE, most / -lowest as f32),
            ScaleDtype::F16 => (1 << 13, 3, f16::MIN_POSITIVE.to_f32_const(), most),
        };
        let mut steps = [0; LANES];
        for (lane, bits) in steps.iter_mut().enumerate() {
            *bits = (lane as i32 - LANES as i32 / 2) * step * last_bit;
        }
        let smallest = 4.0 * normal * -lowest as f32;
        Target { lowest, highest, scales, places, last_bit, steps, least, most, smallest }
    }

    /// The coarse row: stored scales that put `extreme` at their places.
    #[inline(always)]
    fn coarse(&self, extreme: f32) -> [f32; LANES] {
        if extreme.abs() < self.smallest {
            return self.places.map(|place| self.stored(extreme * place));
        }
        let (least, most) = (self.least.to_bits() as i32, self.most.to_bits() as i32);
        let mut scales = [0.0; LANES];
        for (scale, place) in scales.iter_mut().zip(self.places) {
            let bits = (extreme * place).to_bits() as i32;
            let magnitude = ((bits & i32::MAX) + self.last_bit / 2) & -self.last_bit;
            *scale = f32::from_bits((magnitude.max(least).min(most) | bits & i32::MIN) as u32);
        }
        scales
    }

    /// The fine row: stored scales around `scale`.
    #[inline(always)]
    fn fine(&self, scale: f32, extreme: f32) -> [f32; LANES] {
        if extreme.abs() < self.smallest {
            return self.steps.map(|step| self.stored(scale * (1.0 + step as f32 / self.last_bit as f32 / 256.0)));
        }
        let (least, most) = (self.least.to_bits() as i32, self.most.to_bits() as i32);
        let bits = scale.to_bits() as i32;
        let (magnitude, sign) = (((bits & i32::MAX) + self.last_bit / 2) & -self.last_bit, bits & i32::MIN);
        let mut scales = [0.0; LANES];
        for (scale, step) in scales.iter_mut().zip(self.steps) {
            // Positive floats are in the order of their bits: the next stored scale is one bit further.
            *scale = f32::from_bits(((magnitude + step).max(least).min(most) | sign) as u32);
        }
        scales
    }

    /// The stored scale next to one, whatever its size.
    #[cold]
    fn stored(&self, scale: f32) -> f32 {
        let magnitude = scale.abs().clamp(self.least, self.most);
        self.scales.decode(self.scales.encode(magnitude)).copysign(scale)
    }
}

/// Numbers of one group, and what a squared error of each counts, filled up with zeros to whole rows of LANES.
#[derive(Clone, Copy)]
struct Numbers<'a> {
    numbers: &'a [[f32; LANES]],
    /// As many where it is asked for, otherwise empty.
    importance: &'a [[f32; LANES]],
}

/// Rounds the `numbers` of one group, all finite and at most MAX_GROUP, to `integers`, as many, and returns the stored
/// scale and how far off it is. `importance`, as many, says how much a squared error of each counts; without it all count
/// the same.
pub fn round_group(
    numbers: &[f32],
    importance: Option<&[f32]>,
    format: Format,
    scales: ScaleDtype,
    integers: &mut [i8],
) -> ([u8; 2], Rounded) {
    let count = numbers.len();
    if count.is_multiple_of(LANES) {
        let importance = importance.map_or(&[][..], |importance| importance.as_chunks().0);
        let group = Numbers { numbers: numbers.as_chunks().0, importance };
        return dispatch(group, Target::new(format, scales), count, integers.as_chunks_mut().0);
    }
    let (mut padded, mut weights, mut rounded) = ([0f32; MAX_GROUP], [0f32; MAX_GROUP], [0i8; MAX_GROUP]);
    let end = count.next_multiple_of(LANES);
    padded[..count].copy_from_slice(numbers);
    if let Some(importance) = importance {
        weights[..count].copy_from_slice(importance);
    }
    let importance = importance.map_or(&[][..], |_| weights[..end].as_chunks().0);
    let group = Numbers { numbers: padded[..end].as_chunks().0, importance };
    let result = dispatch(group, Target::new(format, scales), count, rounded[..end].as_chunks_mut().0);
    integers.copy_from_slice(&rounded[..count]);
    result
}

fn dispatch(group: Numbers, target: Target, count: usize, integers: &mut [[i8; LANES]]) -> ([u8; 2], Rounded) {
    match group.importance.is_empty() {
        true => dispatch_weighted::<false>(group, target, count, integers),
        false => dispatch_weighted::<true>(group, target, count, integers),
    }
}

fn dispatch_weighted<const WEIGHTED: bool>(
    group: Numbers,
    target: Target,
    count: usize,
    integers: &mut [[i8; LANES]],
) -> ([u8; 2], Rounded) {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the instruction set was just found.
            return unsafe { round_avx2::<WEIGHTED>(group, target, count, integers) };
        }
    }
    round::<WEIGHTED>(group, target, count, integers)
}

/// The same loops, compiled for wider vectors.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn round_avx2<const WEIGHTED: bool>(
    group: Numbers,
    target: Target,
    count: usize,
    integers: &mut [[i8; LANES]],
) -> ([u8; 2], Rounded) {
    round::<WEIGHTED>(group, target, count, integers)
}

#[inline(always)]
fn round<const WEIGHTED: bool>(
    group: Numbers,
    target: Target,
    count: usize,
    integers: &mut [[i8; LANES]],
) -> ([u8; 2], Rounded) {
    let extreme = group.extreme();
    // A group of zeros has nothing to find, and its scale is 0.
    let scale = if extreme == 0.0 { 0.0 } else { search::<WEIGHTED>(&group, extreme, &target) };
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let (mut squares, mut errors, mut largest) = ([0f64; LANES], [0f64; LANES], [0f64; LANES]);
    for (numbers, integers) in group.numbers.iter().zip(integers) {
        for lane in 0..LANES {
            let bits = nearest_bits(numbers[lane] * inverse, &target);
            integers[lane] = bits as i8;
            let nearest = f32::from_bits(bits as u32) - ROUNDER;
            let number = numbers[lane] as f64;
            let difference = (nearest as f64 * scale as f64 - number).abs();
            squares[lane] += number * number;
            errors[lane] += difference * difference;
            largest[lane] = if difference > largest[lane] { difference } else { largest[lane] };
        }
    }
    let rounded = Rounded {
        count: count as u64,
        square: tree(squares, |a, b| a + b),
        error: tree(errors, |a, b| a + b),
        largest: tree(largest, |a, b| if a > b { a } else { b }),
    };
    (target.scales.encode(scale), rounded)
}

/// The best stored scale that was found.
#[inline(always)]
fn search<const WEIGHTED: bool>(group: &Numbers, extreme: f32, target: &Target) -> f32 {
    let coarse = target.coarse(extreme);
    let (best, error) = least(&coarse, &group.errors::<WEIGHTED>(&coarse, extreme, target));
    let fine = target.fine(group.fitted::<WEIGHTED>(best, target), extreme);
    let (finer, finer_error) = least(&fine, &group.errors::<WEIGHTED>(&fine, extreme, target));
    if finer_error < error { finer } else { best }
}

/// The scale with the least error, to 20 bits, and the first of several; and that error.
#[inline(always)]
fn least(scales: &[f32; LANES], errors: &[f32; LANES]) -> (f32, f32) {
    // Floats that are not negative are in the order of their bits, of which the last name the lane. NaN comes last.
    let mut keys = [0u32; LANES];
    for lane in 0..LANES {
        keys[lane] = errors[lane].to_bits() & !(LANES as u32 - 1) | lane as u32;
    }
    let lane = tree(keys, u32::min) as usize % LANES;
    (scales[lane], errors[lane])
}

/// All lanes together, in halves.
#[inline(always)]
fn tree<T: Copy>(mut lanes: [T; LANES], join: impl Fn(T, T) -> T) -> T {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

impl Numbers<'_> {
    /// The number furthest from zero.
    #[inline(always)]
    fn extreme(&self) -> f32 {
        let (mut lowest, mut highest) = ([0f32; LANES], [0f32; LANES]);
        for numbers in self.numbers {
            for lane in 0..LANES {
                let number = numbers[lane];
                lowest[lane] = if number < lowest[lane] { number } else { lowest[lane] };
                highest[lane] = if number > highest[lane] { number } else { highest[lane] };
            }
        }
        let lowest = tree(lowest, |a, b| if a < b { a } else { b });
        let highest = tree(highest, |a, b| if a > b { a } else { b });
        if -lowest > highest { lowest } else { highest }
    }

    /// The weighted squared error with each of some scales, in units of `unit` squared, so that it is neither too small
    /// nor too large to compare.
    #[inline(always)]
    fn errors<const WEIGHTED: bool>(&self, scales: &[f32; LANES], unit: f32, target: &Target) -> [f32; LANES] {
        let inverses = scales.map(|scale| 1.0 / scale);
        // Two sums, so that neither has to wait for its last addition.
        let mut halves = [[0f32; LANES]; 2];
        for (row, numbers) in self.numbers.iter().enumerate() {
            let weights = if WEIGHTED { &self.importance[row] } else { &[1.0; LANES] };
            for (at, (number, weight)) in numbers.iter().zip(weights).enumerate() {
                let sums = &mut halves[at % 2];
                for lane in 0..LANES {
                    let scaled = number * inverses[lane];
                    let difference = nearest(scaled, target) - scaled;
                    sums[lane] += weight * (difference * difference);
                }
            }
        }
        let mut sums = [0f32; LANES];
        for lane in 0..LANES {
            let scale = scales[lane] / unit;
            sums[lane] = (halves[0][lane] + halves[1][lane]) * (scale * scale);
        }
        sums
    }

    /// The scale that fits the integers of `scale` best.
    #[inline(always)]
    fn fitted<const WEIGHTED: bool>(&self, scale: f32, target: &Target) -> f32 {
        let inverse = 1.0 / scale;
        // One step after the other: compilers make vectors of each, and not of all together.
        let mut weighted = [[0f32; LANES]; MAX_GROUP / LANES];
        let (mut products, mut squares) = ([0f32; LANES], [0f32; LANES]);
        for (row, numbers) in self.numbers.iter().enumerate() {
            let mut integers = [0f32; LANES];
            for lane in 0..LANES {
                integers[lane] = nearest(numbers[lane] * inverse, target);
            }
            for lane in 0..LANES {
                weighted[row][lane] = integers[lane] * if WEIGHTED { self.importance[row][lane] } else { 1.0 };
            }
            for lane in 0..LANES {
                squares[lane] += weighted[row][lane] * integers[lane];
            }
        }
        for (weighted, numbers) in weighted.iter().zip(self.numbers) {
            for lane in 0..LANES {
                products[lane] += weighted[lane] * (numbers[lane] * inverse);
            }
        }
        let (products, squares) = (tree(products, |a, b| a + b), tree(squares, |a, b| a + b));
        if squares > 0.0 && products > 0.0 && products.is_finite() { scale * (products / squares) } else { scale }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{GROUP_SIZES, Groups};

    /// Deterministic numbers, about normal, seldom far out.
    struct Random(u64);

    impl Random {
        fn unit(&mut self) -> f64 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 11) as f64 / (1u64 << 53) as f64
        }

        fn normal(&mut self) -> f32 {
            ((0..12).map(|_| self.unit()).sum::<f64>() - 6.0) as f32
        }
    }

    fn formats() -> Vec<(Format, ScaleDtype)> {
        let mut formats = Vec::new();
        for scales in ScaleDtype::ALL {
            for size in GROUP_SIZES {
                let groups = Groups { size, scales };
                formats.extend([(Format::Int8(groups), scales), (Format::Int4(groups), scales)]);
            }
        }
        formats
    }

    /// The weighted squared error with a scale, in f64, every number being rounded to its nearest.
    fn error_with(scale: f32, numbers: &[f32], importance: &[f32], format: Format) -> f64 {
        let (lowest, highest) = format.integers().unwrap();
        let term = |(number, weight): (&f32, &f32)| {
            let (number, scale) = (*number as f64, scale as f64);
            let nearest = (number / scale).round_ties_even().clamp(lowest as f64, highest as f64);
            *weight as f64 * (nearest * scale - number).powi(2)
        };
        numbers.iter().zip(importance).map(term).sum()
    }

    /// The least error of all stored scales that could have it.
    fn brute_force(numbers: &[f32], importance: &[f32], format: Format, scales: ScaleDtype) -> f64 {
        let (lowest, _) = format.integers().unwrap();
        let extreme = numbers.iter().fold(0f32, |most, number| most.max(number.abs()));
        let (from, to) = (0.4 * extreme / -lowest as f32, 1.6 * extreme / -lowest as f32);
        let (mut best, mut last) = (f64::INFINITY, 0.0);
        for step in 0..6000 {
            let scale = scales.decode(scales.encode(from + (to - from) * step as f32 / 6000.0));
            if scale != last {
                best = best.min(error_with(scale, numbers, importance, format));
                best = best.min(error_with(-scale, numbers, importance, format));
            }
            last = scale;
        }
        best
    }

    fn plain(numbers: &[f32], format: Format, scales: ScaleDtype) -> f32 {
        let extreme = numbers.iter().fold(0f32, |most, number| if number.abs() > most.abs() { *number } else { most });
        scales.decode(scales.encode(extreme / format.integers().unwrap().0 as f32))
    }

    /// The weighted error of what `round_group` makes of numbers, after checks of what must always hold.
    fn rounded_error(numbers: &[f32], importance: Option<&[f32]>, format: Format, scales: ScaleDtype) -> f64 {
        let (lowest, highest) = format.integers().unwrap();
        let mut integers = vec![0i8; numbers.len()];
        let (stored, rounded) = round_group(numbers, importance, format, scales, &mut integers);
        let scale = scales.decode(stored);
        assert!(scale.is_finite(), "{numbers:?}");
        let mut error = 0.0;
        let mut sums = Rounded { count: numbers.len() as u64, ..Rounded::default() };
        for (index, (number, integer)) in numbers.iter().zip(&integers).enumerate() {
            assert!((lowest..=highest).contains(&(*integer as i32)));
            let difference = *integer as f64 * scale as f64 - *number as f64;
            error += importance.map_or(1.0, |importance| importance[index]) as f64 * difference * difference;
            sums.square += (*number as f64).powi(2);
            sums.error += difference * difference;
            sums.largest = sums.largest.max(difference.abs());
        }
        assert_eq!((rounded.count, rounded.largest), (sums.count, sums.largest));
        assert!((rounded.square - sums.square).abs() <= 1e-12 * sums.square);
        assert!((rounded.error - sums.error).abs() <= 1e-12 * sums.error, "{rounded:?}, {sums:?}, {scale:e}");
        error
    }

    #[test]
    fn the_error_of_weights_is_never_above_plain_rounding_and_near_the_least_there_is() {
        let mut random = Random(1);
        for (format, scales) in formats() {
            let size = format.groups().unwrap().size;
            let (mut found, mut least, mut simple) = (0.0, 0.0, 0.0);
            for round in 0..100 {
                let numbers: Vec<f32> = (0..size).map(|_| 0.02 * random.normal()).collect();
                let importance: Vec<f32> = (0..size).map(|_| random.normal().exp()).collect();
                let importance = (round % 2 == 1).then_some(&importance[..]);
                let ones = vec![1.0; size];
                let error = rounded_error(&numbers, importance, format, scales);
                let of_plain =
                    error_with(plain(&numbers, format, scales), &numbers, importance.unwrap_or(&ones), format);
                assert!(error <= of_plain * (1.0 + 1e-5), "{format}: {error:e}, plain {of_plain:e}");
                found += error;
                simple += of_plain;
                least += brute_force(&numbers, importance.unwrap_or(&ones), format, scales);
            }
            // int8 has a good deal of luck in it: each scale rounds its numbers anew.
            let most = if format.name() == "int4" { 1.04 } else { 1.2 };
            assert!(found <= most * least, "{format}: {found:e}, least {least:e}");
            assert!(found <= 0.93 * simple, "{format}: {found:e}, plain {simple:e}");
            println!("{format}: {:.3} of the least error, plain rounding {:.3}", found / least, simple / least);
        }
    }

    /// Plain rounding may take smaller scales, below 2^-126 in bf16, and be better there. Those have no finite inverse, and
    /// nothing a model multiplies is so small.
    #[test]
    fn the_error_is_never_above_plain_rounding_with_a_scale_that_may_be_used() {
        let mut random = Random(5);
        for (format, scales) in formats() {
            let size = format.groups().unwrap().size;
            let powers = if scales == ScaleDtype::F16 { -28..20 } else { -140..119 };
            let mut compared = 0;
            for power in powers.clone() {
                let spread = 60.0 * random.unit();
                let number = |_| (random.normal() as f64 * (power as f64 - spread * random.unit()).exp2()) as f32;
                let numbers: Vec<f32> = (0..size).map(number).collect();
                let importance: Vec<f32> = (0..size).map(|_| random.normal().exp()).collect();
                let plain = plain(&numbers, format, scales);
                if plain.abs() < scales.range().0 {
                    continue;
                }
                compared += 1;
                for importance in [None, Some(&importance[..])] {
                    let error = rounded_error(&numbers, importance, format, scales);
                    let of_plain = error_with(plain, &numbers, importance.unwrap_or(&vec![1.0; size]), format);
                    assert!(error <= of_plain * (1.0 + 1e-4), "{format}, 2^{power}: {error:e}, plain {of_plain:e}");
                }
            }
            assert!(2 * compared > powers.len(), "{format}: {compared}");
        }
    }

    #[test]
    fn numbers_of_any_size_get_a_finite_scale_and_are_rounded_as_well_as_that_allows() {
        for (format, scales) in formats() {
            let (lowest, highest) = format.integers().unwrap();
            let mut integers = [0i8; 40];
            for count in [1, 2, 7, 8, 9, 31, 32, 33, 40] {
                let (stored, rounded) = round_group(&vec![0.0; count], None, format, scales, &mut integers[..count]);
                assert_eq!((stored, rounded.error, rounded.relative()), ([0, 0], 0.0, 0.0));
                assert_eq!(integers[..count], vec![0; count]);
            }
            // One number, and a row of them, from the least there is to the largest.
            for power in -145..128 {
                for sign in [1.0, -1.0] {
                    let size = sign * (1.25 * 2f64.powi(power)) as f32;
                    for numbers in [vec![size], vec![size; 32], (0..40).map(|n| size * (n as f32 / 40.0)).collect()] {
                        rounded_error(&numbers, None, format, scales);
                        let (stored, rounded) =
                            round_group(&numbers, None, format, scales, &mut integers[..numbers.len()]);
                        let (least, most) = scales.range();
                        let scale = scales.decode(stored).abs();
                        assert!(scale >= least && scale <= most, "{format}, {size:e}: {scale:e}");
                        // Where the scales reach, an error is at most about half of a scale.
                        let step = size.abs() / -lowest as f32;
                        if step > 4.0 * least && size.abs() < most {
                            let bound = 0.52 * size.abs() as f64 / highest as f64 * 1.25;
                            assert!(rounded.largest <= bound, "{format}, {size:e}: {:e}", rounded.largest);
                        }
                    }
                }
            }
            for extreme in [f32::MAX, f32::MIN, f32::MIN_POSITIVE, -f32::from_bits(1)] {
                rounded_error(&[extreme, 0.5 * extreme, 0.0, -0.25 * extreme], None, format, scales);
                rounded_error(&[extreme, 1.0, 0.0, -1e-30], Some(&[1.0, 0.0, 2.0, 1e30]), format, scales);
            }
        }
    }

    #[test]
    fn what_lies_on_the_grid_of_plain_rounding_stays_exactly_as_it_is() {
        for (format, scales) in formats() {
            let (lowest, highest) = format.integers().unwrap();
            for (scale, step) in [(0.25, 1), (-3.0, 1), (0.0009765625, 2)] {
                let integers = (lowest..=highest).step_by(step).take(31).chain([lowest]);
                let numbers: Vec<f32> = integers.map(|integer| scale * integer as f32).collect();
                assert_eq!(rounded_error(&numbers, None, format, scales), 0.0, "{format}");
            }
        }
    }

    #[test]
    fn what_matters_more_is_rounded_better() {
        let mut random = Random(3);
        for (format, scales) in formats() {
            let size = format.groups().unwrap().size;
            let (mut weighted, mut unweighted) = (0.0, 0.0);
            for _ in 0..100 {
                let numbers: Vec<f32> = (0..size).map(|_| random.normal()).collect();
                let importance: Vec<f32> = (0..size).map(|_| (2.0 * random.normal()).exp()).collect();
                weighted += rounded_error(&numbers, Some(&importance), format, scales);
                let mut integers = vec![0i8; size];
                let (stored, _) = round_group(&numbers, None, format, scales, &mut integers);
                let scale = scales.decode(stored);
                let terms = numbers.iter().zip(&integers).zip(&importance);
                unweighted += terms.map(|((n, i), w)| (*w * (*i as f32 * scale - n).powi(2)) as f64).sum::<f64>();
            }
            assert!(weighted < 0.93 * unweighted, "{format}: {weighted:e}, without importance {unweighted:e}");
            // A number that does not count at all cannot spoil the others' scale.
            let mut numbers: Vec<f32> = (0..size).map(|_| random.normal()).collect();
            numbers[size / 2] = 11.0;
            let mut importance = vec![1.0; size];
            importance[size / 2] = 0.0;
            let error = rounded_error(&numbers, Some(&importance), format, scales);
            let counted = rounded_error(&numbers, None, format, scales);
            assert!(error < counted, "{format}");
        }
    }
}
