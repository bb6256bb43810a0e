//! What training does to single rows, each gradient beside what it is the gradient of. Plain Rust, compiled for each
//! instruction set through [`RowWork`]: no operation is contracted, so that all of them give the same bits.

use super::math::{exp, gelu_erf, gelu_tanh};

/// Work on a row, for `Kernels::run_row`.
pub enum RowWork<'a> {
    /// `out = gelu(gate) * up`
    Geglu { gate: &'a [f32], up: &'a [f32], exact: bool, out: &'a mut [f32] },
    /// Turns `gate` and `up` into their gradients where that of `gelu(gate) * up` is `gradient`.
    GegluGradient { gradient: &'a [f32], exact: bool, gate: &'a mut [f32], up: &'a mut [f32] },
    /// Adds to `out` the gradient of `x` where that of `x r (1 + w)` is `gradient`, r the inverse root mean square of x.
    NormGradient { x: &'a [f32], weight: &'a [f32], eps: f64, gradient: &'a [f32], out: &'a mut [f32] },
    /// `out = <a, b>`
    Product { a: &'a [f32], b: &'a [f32], out: &'a mut f32 },
    /// Turns scores into `softmax(scores * scale)`, and writes the logarithm of the sum of all e^(score * scale).
    Softmax { scores: &'a mut [f32], scale: f32, log_sum: &'a mut f32 },
    /// Turns scores into their softmax again, by its `log_sum`, and the gradients of the weights into those of the scores;
    /// `mean` is the sum of weights times their gradients.
    SoftmaxGradient { scores: &'a mut [f32], gradients: &'a mut [f32], scale: f32, log_sum: f32, mean: f32 },
    /// Writes the largest logit, and the sum of all e^(logit - largest).
    LogSum { logits: &'a [f32], out: &'a mut [f32] },
    /// Turns logits into `-e^(logit - largest)`, and writes the largest of them and `floor`, and the sum without its sign.
    LogSumGradient { logits: &'a mut [f32], floor: f32, out: &'a mut [f32] },
    /// Turns logits into `factor * e^(logit - shift)`.
    Exponentials { logits: &'a mut [f32], shift: f32, factor: f32 },
}

impl RowWork<'_> {
    /// Does the work.
    #[inline(always)]
    pub fn run(self) {
        match self {
            RowWork::Geglu { gate, up, exact, out } => {
                // Two loops, for one that decides in each step is not made of vectors.
                if exact {
                    out.iter_mut().zip(gate).zip(up).for_each(|((out, gate), up)| *out = gelu_erf(*gate) * up);
                } else {
                    out.iter_mut().zip(gate).zip(up).for_each(|((out, gate), up)| *out = gelu_tanh(*gate) * up);
                }
            }
            RowWork::GegluGradient { gradient, exact, gate, up } => {
                if exact {
                    geglu_gradient(gradient, gelu_erf_and_derivative, gate, up);
                } else {
                    geglu_gradient(gradient, gelu_tanh_and_derivative, gate, up);
                }
            }
            RowWork::NormGradient { x, weight, eps, gradient, out } => {
                add_rms_norm_gradient(x, weight, eps, gradient, out);
            }
            RowWork::Product { a, b, out } => *out = product(a, b) as f32,
            RowWork::Softmax { scores, scale, log_sum } => {
                let largest = largest(scores);
                scores.iter_mut().for_each(|score| *score = exp((*score - largest) * scale));
                let sum = sum(scores);
                let norm = (1.0 / sum) as f32;
                scores.iter_mut().for_each(|weight| *weight *= norm);
                *log_sum = (f64::from(largest * scale) + libm::log(sum)) as f32;
            }
            RowWork::SoftmaxGradient { scores, gradients, scale, log_sum, mean } => {
                for (weight, gradient) in scores.iter_mut().zip(gradients) {
                    *weight = exp(*weight * scale - log_sum);
                    *gradient = *weight * (*gradient - mean) * scale;
                }
            }
            RowWork::LogSum { logits, out } => {
                let largest = largest(logits);
                (out[0], out[1]) = (largest, sum_of_exponentials(logits, largest) as f32);
            }
            RowWork::LogSumGradient { logits, floor, out } => {
                let largest = largest(logits).max(floor);
                logits.iter_mut().for_each(|logit| *logit = -exp(*logit - largest));
                (out[0], out[1]) = (largest, -sum(logits) as f32);
            }
            RowWork::Exponentials { logits, shift, factor } => {
                logits.iter_mut().for_each(|logit| *logit = factor * exp(*logit - shift));
            }
        }
    }
}

/// Partial sums, added up in one order.
const PARTIAL: usize = 16;

#[inline(always)]
fn total(partial: [f64; PARTIAL]) -> f64 {
    partial.iter().sum()
}

/// The sum of all numbers, in f64.
#[inline(always)]
fn sum(numbers: &[f32]) -> f64 {
    let mut partial = [0f64; PARTIAL];
    let (blocks, rest) = numbers.as_chunks::<PARTIAL>();
    for block in blocks {
        partial.iter_mut().zip(block).for_each(|(sum, number)| *sum += f64::from(*number));
    }
    partial.iter_mut().zip(rest).for_each(|(sum, number)| *sum += f64::from(*number));
    total(partial)
}

/// The product of two rows, in f64.
#[inline(always)]
fn product(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut partial = [0f64; PARTIAL];
    let ((blocks, rest), (other_blocks, other_rest)) = (a.as_chunks::<PARTIAL>(), b.as_chunks::<PARTIAL>());
    for (a, b) in blocks.iter().zip(other_blocks) {
        for ((sum, a), b) in partial.iter_mut().zip(a).zip(b) {
            *sum += f64::from(*a) * f64::from(*b);
        }
    }
    for ((sum, a), b) in partial.iter_mut().zip(rest).zip(other_rest) {
        *sum += f64::from(*a) * f64::from(*b);
    }
    total(partial)
}

/// The largest number, of those that are numbers.
#[inline(always)]
fn largest(numbers: &[f32]) -> f32 {
    let mut partial = [f32::NEG_INFINITY; PARTIAL];
    let (blocks, rest) = numbers.as_chunks::<PARTIAL>();
    let larger = |largest: &mut f32, number: f32| *largest = if number > *largest { number } else { *largest };
    for block in blocks {
        partial.iter_mut().zip(block).for_each(|(largest, number)| larger(largest, *number));
    }
    partial.iter_mut().zip(rest).for_each(|(largest, number)| larger(largest, *number));
    partial.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

/// The sum of all e^(number - shift), in f64.
#[inline(always)]
fn sum_of_exponentials(numbers: &[f32], shift: f32) -> f64 {
    let mut partial = [0f64; PARTIAL];
    let (blocks, rest) = numbers.as_chunks::<PARTIAL>();
    for block in blocks {
        // `array::map` is not compiled into its caller, and so not for its instruction set.
        let mut weights = [0f32; PARTIAL];
        weights.iter_mut().zip(block).for_each(|(weight, number)| *weight = exp(number - shift));
        partial.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += f64::from(weight));
    }
    partial.iter_mut().zip(rest).for_each(|(sum, number)| *sum += f64::from(exp(number - shift)));
    total(partial)
}

/// `r (g (1 + w)) - x r^3 / n <g (1 + w), x>` (Zhang and Sennrich, arXiv 1910.07467, section 4, without its centring).
#[inline(always)]
fn add_rms_norm_gradient(x: &[f32], weight: &[f32], eps: f64, gradient: &[f32], out: &mut [f32]) {
    let scale = 1.0 / (product(x, x) / x.len() as f64 + eps).sqrt();
    let mut partial = [0f64; PARTIAL];
    for ((x, weight), gradient) in x.chunks(PARTIAL).zip(weight.chunks(PARTIAL)).zip(gradient.chunks(PARTIAL)) {
        for (((sum, x), w), gradient) in partial.iter_mut().zip(x).zip(weight).zip(gradient) {
            *sum += f64::from(*gradient) * (1.0 + f64::from(*w)) * f64::from(*x);
        }
    }
    let along = scale * scale * scale * total(partial) / x.len() as f64;
    for (((out, x), w), gradient) in out.iter_mut().zip(x).zip(weight).zip(gradient) {
        let straight = scale * f64::from(*gradient) * (1.0 + f64::from(*w));
        *out += (straight - along * f64::from(*x)) as f32;
    }
}

/// GeLU by the tanh approximation and its derivative: with `s = 1 / (1 + e^-u)` and `u = 2 sqrt(2/pi) (x + 0.044715 x^3)`, they
/// are `x s` and `s + x s (1 - s) u'`.
#[inline(always)]
fn gelu_tanh_and_derivative(x: f32) -> (f32, f32) {
    const TWICE_ROOT: f32 = 1.595_769_2; // 2 sqrt(2/pi)
    let u = TWICE_ROOT * (x + 0.044715 * x * x * x);
    let s = 1.0 / (1.0 + exp(-u));
    let slope = TWICE_ROOT * (1.0 + 3.0 * 0.044715 * x * x);
    // The bits of `gelu_tanh`.
    (x / (1.0 + exp(-u)), s + x * s * (1.0 - s) * slope)
}

/// GeLU by its definition and its derivative: `x P(x)` and `P(x) + x p(x)`, P and p of the normal distribution.
#[inline(always)]
fn gelu_erf_and_derivative(x: f32) -> (f32, f32) {
    const INVERSE_ROOT: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    let below = 0.5 * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2));
    (gelu_erf(x), below + x * INVERSE_ROOT * exp(-0.5 * x * x))
}

#[inline(always)]
fn geglu_gradient(gradient: &[f32], gelu_and_derivative: impl Fn(f32) -> (f32, f32), gate: &mut [f32], up: &mut [f32]) {
    for ((gate, up), gradient) in gate.iter_mut().zip(up).zip(gradient) {
        let (value, derivative) = gelu_and_derivative(*gate);
        (*gate, *up) = (gradient * *up * derivative, gradient * value);
    }
}

/// The inverse of `math::rotate`, which is its transpose.
pub fn rotate_back(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (first, second) = head.split_at_mut(cosines.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        let (x, y) = (*a, *b);
        *a = x * cos + y * sin;
        *b = y * cos - x * sin;
    }
}

/// The logarithm of the sum of e^logit over a vocabulary that comes in parts: the largest logit so far, and the sum relative to
/// it (Milakov and Gimelshein, arXiv 1805.02867).
#[derive(Clone, Copy)]
pub struct LogSum {
    largest: f64,
    sum: f64,
}

impl LogSum {
    pub const EMPTY: LogSum = LogSum { largest: f64::NEG_INFINITY, sum: 0.0 };

    /// Takes in a part: its largest logit, and the sum relative to it.
    pub fn add(&mut self, (largest, sum): (f32, f32)) {
        let both = self.largest.max(f64::from(largest));
        self.sum = self.sum * (self.largest - both).exp() + f64::from(sum) * (f64::from(largest) - both).exp();
        self.largest = both;
    }

    /// The largest logit so far.
    pub fn largest(&self) -> f32 {
        self.largest as f32
    }

    /// What makes numbers relative to the largest logit shares of all.
    pub fn inverse_sum(&self) -> f32 {
        (1.0 / self.sum) as f32
    }

    /// The logarithm of the whole sum.
    pub fn value(&self) -> f64 {
        self.largest + libm::log(self.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::kernels::math::rms_norm;

    #[test]
    fn the_norms_gradient_is_what_differences_say() {
        let number = |index: usize| ((index * 7919 % 101) as f32 - 50.0) / 25.0;
        let x: Vec<f32> = (0..23).map(number).collect();
        let weight: Vec<f32> = (0..23).map(|index| number(index + 31) / 4.0).collect();
        let gradient: Vec<f32> = (0..23).map(|index| number(index + 77)).collect();
        let loss = |x: &[f32]| {
            let mut normed = vec![0f32; 23];
            rms_norm(x, &weight, 1e-6, &mut normed);
            normed.iter().zip(&gradient).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>()
        };
        let mut found = vec![1f32; 23];
        RowWork::NormGradient { x: &x, weight: &weight, eps: 1e-6, gradient: &gradient, out: &mut found }.run();
        for index in 0..23 {
            let at = |step: f32| {
                let mut x = x.clone();
                x[index] += step;
                loss(&x)
            };
            let expected = (at(0.01) - at(-0.01)) / 0.02;
            assert!((f64::from(found[index]) - 1.0 - expected).abs() < 1e-3, "{index}: {} {expected}", found[index]);
        }
    }

    #[test]
    fn geglus_gradient_is_what_differences_say() {
        for exact in [false, true] {
            for step in -40..40 {
                let (gate, up) = (step as f32 * 0.15, 0.7 - step as f32 * 0.04);
                let gelu = |x: f32| if exact { gelu_erf(x) } else { gelu_tanh(x) };
                let expected = (gelu(gate + 0.01) - gelu(gate - 0.01)) / 0.02;
                let (mut gates, mut ups) = ([gate], [up]);
                RowWork::GegluGradient { gradient: &[1.5], exact, gate: &mut gates, up: &mut ups }.run();
                assert!((gates[0] - 1.5 * up * expected).abs() < 5e-4, "{gate}: {} {expected}", gates[0]);
                assert_eq!(ups[0], 1.5 * gelu(gate));
            }
        }
    }

    #[test]
    fn a_log_sum_in_parts_is_that_of_the_whole() {
        let logits: Vec<f32> = (0..100).map(|index| (index * 31 % 17) as f32 * 3.0 - 20.0).collect();
        let expected = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
        for size in [1, 7, 100] {
            let mut sum = LogSum::EMPTY;
            for logits in logits.chunks(size) {
                let mut out = [0f32; 2];
                RowWork::LogSum { logits, out: &mut out }.run();
                sum.add((out[0], out[1]));
            }
            assert!((sum.value() - expected).abs() < 1e-6);
        }
    }
}
