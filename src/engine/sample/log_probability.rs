//! How probable the model itself found a token, before any setting.

use crate::backend::cpu::kernels::math::{log_softmax_at, log_sum_exp};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;

/// The `ids.len()` most probable tokens and the natural logarithms of their probabilities, most probable first.
///
/// Fails with NotANumber when the largest of `logits: [vocab_size]` is not finite, and with OutOfMemory.
pub fn top_log_probabilities(logits: &[f32], ids: &mut [u32], log_probabilities: &mut [f32]) -> Result<()> {
    let normalizer = normalizer(logits)?;
    let mut tokens = try_with_capacity("candidates", logits.len())?;
    tokens.extend(0..logits.len() as u32);
    let logit = |token: u32| match logits[token as usize] {
        logit if logit.is_nan() => f32::NEG_INFINITY,
        logit => logit,
    };
    let order = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
    let count = ids.len().min(tokens.len());
    if count > 0 {
        tokens.select_nth_unstable_by(count - 1, order);
        tokens[..count].sort_unstable_by(order);
    }
    for (token, (id, log_probability)) in tokens.iter().zip(ids.iter_mut().zip(log_probabilities)) {
        *id = *token;
        *log_probability = (f64::from(logit(*token)) - normalizer) as f32;
    }
    Ok(())
}

/// The natural logarithm of a token's probability; negative infinity where its logit is that, or NaN.
///
/// Fails with NotANumber when the largest of `logits: [vocab_size]` is not finite, and with TokenOutOfRange.
pub fn log_probability(logits: &[f32], token: u32) -> Result<f32> {
    if token as usize >= logits.len() {
        let text = format!("token is {token}, the vocabulary has {}", logits.len());
        return Err(Error::new(Status::TokenOutOfRange, text).at_key("token"));
    }
    let log_probability = log_softmax_at(logits, token as usize);
    if log_probability.is_nan() { Err(no_maximum()) } else { Ok(log_probability) }
}

/// The logarithm of the sum of all `e^logit`; NaN counts as nothing.
fn normalizer(logits: &[f32]) -> Result<f64> {
    let normalizer = log_sum_exp(logits);
    if normalizer.is_nan() { Err(no_maximum()) } else { Ok(normalizer) }
}

fn no_maximum() -> Error {
    Error::new(Status::NotANumber, "the model's logits have no finite maximum to choose from").at_key("logits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_sum_to_one_and_come_sorted() {
        let logits = [0.5, -1.0, 2.0, 0.0, f32::NAN];
        let (mut ids, mut logs) = ([0; 5], [0.0; 5]);
        top_log_probabilities(&logits, &mut ids, &mut logs).unwrap();
        assert_eq!(ids, [2, 0, 3, 1, 4]);
        assert_eq!(logs[4], f32::NEG_INFINITY);
        let sum: f32 = logs.iter().map(|log| log.exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6);
    }

    #[test]
    fn one_log_probability_is_that_of_the_list_and_of_f64() {
        let logits: Vec<f32> = (0..1001).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
        let (mut ids, mut logs) = (vec![0; 1001], vec![0.0; 1001]);
        top_log_probabilities(&logits, &mut ids, &mut logs).unwrap();
        for (id, log) in ids.iter().zip(&logs) {
            assert_eq!(log_probability(&logits, *id).unwrap(), *log);
            assert!((f64::from(*log) - (f64::from(logits[*id as usize]) - sum.ln())).abs() < 1e-5);
        }
    }

    #[test]
    fn a_probability_of_nothing_is_refused() {
        assert_eq!(log_probability(&[0.0; 3], 3).unwrap_err().status(), Status::TokenOutOfRange);
        for broken in [f32::NAN, f32::NEG_INFINITY, f32::INFINITY] {
            assert_eq!(log_probability(&[broken; 3], 0).unwrap_err().status(), Status::NotANumber);
            let error = top_log_probabilities(&[broken; 3], &mut [0], &mut [0.0]).unwrap_err();
            assert_eq!(error.status(), Status::NotANumber);
        }
    }
}
