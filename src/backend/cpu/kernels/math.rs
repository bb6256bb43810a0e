//! Scalar functions of the forward pass. Built from plain arithmetic, so that every path and every system gives
//! the same bits and loops over them vectorise.

/// e^x with a relative error below 2e-7; 0 below -87.3, and never infinite.
///
/// Cody-Waite reduction to `2^n * e^r`, |r| <= ln2/2, and the degree-5 polynomial of Cephes `expf`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding and subtracting it rounds to a whole number.
    let clamped = x.clamp(-87.3, 88.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = p * r * r + r + 1.0;
    // The last bits of `shifted` are n, in two's complement. A conversion would not vectorise.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    if x < -87.3 { 0.0 } else { e * scale }
}

/// GeLU by the tanh approximation, `x/2 (1 + tanh(u))` = `x / (1 + e^(-2u))`, `u = sqrt(2/pi) (x + 0.044715 x^3)`.
#[inline(always)]
pub fn gelu_tanh(x: f32) -> f32 {
    const TWICE_ROOT: f32 = 1.595_769_2; // 2 sqrt(2/pi)
    let u = TWICE_ROOT * (x + 0.044715 * x * x * x);
    x / (1.0 + exp(-u))
}

/// GeLU by its definition, `x/2 (1 + erf(x / sqrt 2))`.
#[inline(always)]
pub fn gelu_erf(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The softmax of `logits`, in place, in f64: what the router computes over a few dozen experts. Answers the largest logit and
/// the sum of all `e^(logit - largest)`.
pub fn softmax_f64(logits: &mut [f64]) -> (f64, f64) {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    for logit in logits.iter_mut() {
        *logit = (*logit - max).exp();
        sum += *logit;
    }
    for probability in logits.iter_mut() {
        *probability /= sum;
    }
    (max, sum)
}

/// The logarithm of the sum of all `e^logit`, NaN counting as nothing; NaN where the largest is not finite.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return f64::NAN;
    }
    // Four partial sums in f64: exact enough for any width, and one fixed order.
    let mut partial = [0f64; 4];
    for quad in logits.chunks(4) {
        for (sum, logit) in partial.iter_mut().zip(quad) {
            let weight = exp(logit - max);
            *sum += f64::from(if logit.is_nan() { 0.0 } else { weight });
        }
    }
    let sum = (partial[0] + partial[1]) + (partial[2] + partial[3]);
    f64::from(max) + libm::log(sum)
}

/// The natural logarithm of the softmax of `logits` at `index`, negative infinity where the logit is NaN; NaN where the
/// logits have no finite maximum. It is also what the engine says of logits it holds: the same bits.
pub fn log_softmax_at(logits: &[f32], index: usize) -> f32 {
    let logit = if logits[index].is_nan() { f32::NEG_INFINITY } else { logits[index] };
    (f64::from(logit) - log_sum_exp(logits)) as f32
}

/// `x / sqrt(mean(x^2) + eps) * (1 + w)` into `out`; all of length hidden_size. Gemma's RMSNorm.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f64, out: &mut [f32]) {
    // Four partial sums in f64: exact enough for any width, and one fixed order.
    let mut partial = [0f64; 4];
    let (quads, rest) = x.as_chunks::<4>();
    for quad in quads {
        for (sum, value) in partial.iter_mut().zip(quad) {
            *sum += *value as f64 * *value as f64;
        }
    }
    for (sum, value) in partial.iter_mut().zip(rest) {
        *sum += *value as f64 * *value as f64;
    }
    let mean = (partial[0] + partial[1] + partial[2] + partial[3]) / x.len() as f64;
    let scale = (1.0 / (mean + eps).sqrt()) as f32;
    for ((out, x), w) in out.iter_mut().zip(x).zip(weight) {
        *out = x * scale * (1.0 + w);
    }
}

/// Rotates one head `[head_dim]` by the angles of its position: pairs are `(i, i + head_dim/2)`.
pub fn rotate(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (first, second) = head.split_at_mut(cosines.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        let (x, y) = (*a, *b);
        *a = x * cos - y * sin;
        *b = y * cos + x * sin;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_f64_over_its_whole_range() {
        let mut worst = 0f64;
        for step in -870_000..880_000 {
            let x = step as f32 * 1e-4;
            let expected = (x as f64).exp();
            worst = worst.max(((exp(x) as f64) - expected).abs() / expected);
        }
        assert!(worst < 2e-7, "{worst}");
        assert_eq!(exp(-100.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(1000.0).is_finite());
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn both_gelus_agree_with_f64() {
        for step in -12_000..12_000 {
            let x = step as f32 * 1e-3;
            let wide = x as f64;
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let tanh = 0.5 * wide * (1.0 + inner.tanh());
            assert!((gelu_tanh(x) as f64 - tanh).abs() < 1e-6 * (1.0 + wide.abs()), "{x}");
            let erf = 0.5 * wide * (1.0 + libm::erf(wide / 2f64.sqrt()));
            assert!((gelu_erf(x) as f64 - erf).abs() < 1e-6 * (1.0 + wide.abs()), "{x}");
        }
        assert!(gelu_tanh(-200.0).abs() < 1e-30);
        assert_eq!(gelu_tanh(200.0), 200.0);
        assert!(gelu_tanh(f32::NAN).is_nan());
    }

    #[test]
    fn a_norm_of_zeros_is_zeros_and_the_weight_counts_from_one() {
        let mut out = [9.0f32; 6];
        rms_norm(&[0.0; 6], &[1.0; 6], 1e-6, &mut out);
        assert_eq!(out, [0.0; 6]);
        rms_norm(&[2.0; 6], &[0.5; 6], 0.0, &mut out);
        assert_eq!(out, [1.5; 6]);
    }
}
