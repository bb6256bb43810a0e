//! What training does to single rows and numbers, each gradient beside what it is the gradient of.

use crate::backend::cpu::kernels::math::{exp, gelu_erf, gelu_tanh};

/// The inverse root mean square of `x`, as `math::rms_norm` has it, in f64.
fn inverse_root_mean_square(x: &[f32], eps: f64) -> f64 {
    let sum: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    1.0 / (sum / x.len() as f64 + eps).sqrt()
}

/// Adds to `out` the gradient of `x` where that of `x r (1 + w)` is `gradient`, r the inverse root mean square of x:
/// `r (g (1 + w)) - x r^3 / n <g (1 + w), x>` (Zhang and Sennrich, arXiv 1910.07467, section 4, without its centring).
pub fn add_rms_norm_gradient(x: &[f32], weight: &[f32], eps: f64, gradient: &[f32], out: &mut [f32]) {
    let scale = inverse_root_mean_square(x, eps);
    let products = gradient.iter().zip(weight).map(|(gradient, w)| f64::from(*gradient) * (1.0 + f64::from(*w)));
    let sum: f64 = products.zip(x).map(|(product, x)| product * f64::from(*x)).sum();
    let along = scale * scale * scale * sum / x.len() as f64;
    for (((out, x), w), gradient) in out.iter_mut().zip(x).zip(weight).zip(gradient) {
        let straight = scale * f64::from(*gradient) * (1.0 + f64::from(*w));
        *out += (straight - along * f64::from(*x)) as f32;
    }
}

/// GeLU and its derivative. By the tanh approximation, with `s = 1 / (1 + e^-u)` and `u = 2 sqrt(2/pi) (x + 0.044715 x^3)`,
/// they are `x s` and `s + x s (1 - s) u'`; by its definition `x P(x)` and `P(x) + x p(x)`, P and p of the normal distribution.
pub fn gelu_and_derivative(x: f32, exact: bool) -> (f32, f32) {
    const TWICE_ROOT: f32 = 1.595_769_2; // 2 sqrt(2/pi)
    const INVERSE_ROOT: f32 = 0.398_942_3; // 1 / sqrt(2 pi)
    if exact {
        let below = 0.5 * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2));
        return (gelu_erf(x), below + x * INVERSE_ROOT * exp(-0.5 * x * x));
    }
    let s = 1.0 / (1.0 + exp(-TWICE_ROOT * (x + 0.044715 * x * x * x)));
    let slope = TWICE_ROOT * (1.0 + 3.0 * 0.044715 * x * x);
    (gelu_tanh(x), s + x * s * (1.0 - s) * slope)
}

/// Turns `gate` and `up` into their gradients where that of `gelu(gate) * up` is `gradient`.
pub fn geglu_gradient(gradient: &[f32], exact: bool, gate: &mut [f32], up: &mut [f32]) {
    for ((gate, up), gradient) in gate.iter_mut().zip(up).zip(gradient) {
        let (value, derivative) = gelu_and_derivative(*gate, exact);
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

/// The product of two rows, summed in f64.
pub fn product(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32
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

    /// The largest logit of a part, and the sum relative to it.
    pub fn of_part(logits: &[f32]) -> (f32, f32) {
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(exp(logit - largest))).sum();
        (largest, sum as f32)
    }

    /// Takes in a part.
    pub fn add(&mut self, (largest, sum): (f32, f32)) {
        let both = self.largest.max(f64::from(largest));
        self.sum = self.sum * (self.largest - both).exp() + f64::from(sum) * (f64::from(largest) - both).exp();
        self.largest = both;
    }

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
        add_rms_norm_gradient(&x, &weight, 1e-6, &gradient, &mut found);
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
                geglu_gradient(&[1.5], exact, &mut gates, &mut ups);
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
            logits.chunks(size).for_each(|part| sum.add(LogSum::of_part(part)));
            assert!((sum.value() - expected).abs() < 1e-6);
        }
    }
}
