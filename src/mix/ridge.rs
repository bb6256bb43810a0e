//! Ridge regression in closed form, in f64.

use crate::error::{Error, Result, Status};
use crate::memory::try_vec;
use crate::model::Progress;

const WHAT: &str = "the second moments of router inputs";

/// Sums over rows `x` of `n` numbers that belong to one of several classes.
pub struct Moments {
    n: usize,
    /// The sum of `x x^T`, its lower half row by row: row i has i + 1 numbers.
    second: Vec<f64>,
    /// The sum of `x` for each class, `[classes][n]`.
    firsts: Vec<Vec<f64>>,
}

impl Moments {
    /// Of no rows yet.
    pub fn new(n: usize, classes: usize) -> Result<Moments> {
        let firsts = (0..classes).map(|_| try_vec(WHAT, n, 0f64)).collect::<Result<_>>()?;
        Ok(Moments { n, second: try_vec(WHAT, n * (n + 1) / 2, 0f64)?, firsts })
    }

    /// Takes rows of one class in, `[rows, n]`, each counting `weight`.
    pub fn add(&mut self, class: usize, rows: &[f32], weight: f64) {
        let first = &mut self.firsts[class];
        for row in rows.chunks_exact(self.n) {
            first.iter_mut().zip(row).for_each(|(sum, x)| *sum += weight * *x as f64);
        }
        let mut sums = self.second.as_mut_slice();
        for i in 0..self.n {
            let (own, rest) = sums.split_at_mut(i + 1);
            for row in rows.chunks_exact(self.n) {
                let factor = weight * row[i] as f64;
                own.iter_mut().zip(row).for_each(|(sum, x)| *sum += factor * *x as f64);
            }
            sums = rest;
        }
    }

    /// For each class the weights `w` that are least in `sum of weight (w x - [x is of the class])^2 + penalty |w|^2`,
    /// `penalty` being `lambda` by the mean of the diagonal of the second moments: `(second + penalty I)^-1 first`.
    /// Fails with `NotANumber` where rows have numbers beyond all measure.
    pub fn solve(mut self, lambda: f64, progress: &Progress) -> Result<Vec<Vec<f64>>> {
        let n = self.n;
        let start = |i: usize| i * (i + 1) / 2;
        let penalty = lambda * (0..n).map(|i| self.second[start(i) + i]).sum::<f64>() / n as f64;
        // Cholesky: L L^T = second + penalty I, row by row in place of it.
        for i in 0..n {
            progress.check()?;
            let (above, own) = self.second.split_at_mut(start(i));
            let own = &mut own[..=i];
            own[i] += penalty;
            for j in 0..i {
                let other = &above[start(j)..=start(j) + j];
                own[j] = (own[j] - dot(&own[..j], &other[..j])) / other[j];
            }
            let square = own[i] - dot(&own[..i], &own[..i]);
            if !(square > 0.0 && square.is_finite()) {
                let text = "the ridge regression of router inputs has no solution in f64: take a larger lambda";
                return Err(Error::new(Status::NotANumber, text).at_key("router.lambda"));
            }
            own[i] = square.sqrt();
        }
        let row = |i: usize| &self.second[start(i)..=start(i) + i];
        for w in &mut self.firsts {
            for i in 0..n {
                w[i] = (w[i] - dot(&w[..i], &row(i)[..i])) / row(i)[i];
            }
            for i in (0..n).rev() {
                let (rest, last) = w.split_at_mut(i);
                last[0] /= row(i)[i];
                rest.iter_mut().zip(row(i)).for_each(|(w, x)| *w -= last[0] * x);
            }
        }
        Ok(self.firsts)
    }
}

/// In eight sums side by side, as wide as a vector.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<8>(), b.as_chunks::<8>());
    let mut sums = [0f64; 8];
    for (a, b) in a.iter().zip(b) {
        sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, (a, b))| *sum += a * b);
    }
    sums.iter().sum::<f64>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::normal;

    #[test]
    fn the_solution_satisfies_the_normal_equations() {
        for (n, rows) in [(1, 3), (7, 40), (33, 20), (64, 200)] {
            let lambda = 0.03;
            let numbers: Vec<f32> = (0..n * rows).map(|at| normal(5, at as u64) as f32).collect();
            let mut moments = Moments::new(n, 3).unwrap();
            let class = |row: usize| row % 3;
            let weight = |class: usize| 0.5 + class as f64;
            for (row, numbers) in numbers.chunks(n).enumerate() {
                moments.add(class(row), numbers, weight(class(row)));
            }
            let trace: f64 = (0..n * rows).map(|at| weight(class(at / n)) * (numbers[at] as f64).powi(2)).sum();
            let solution = moments.solve(lambda, &Progress::default()).unwrap();
            for (wanted, w) in solution.iter().enumerate() {
                let mut gradient: Vec<f64> = w.iter().map(|w| lambda * trace / n as f64 * w).collect();
                for (row, x) in numbers.chunks(n).enumerate() {
                    let product: f64 = w.iter().zip(x).map(|(w, x)| w * *x as f64).sum();
                    let target = if class(row) == wanted { 1.0 } else { 0.0 };
                    let error = weight(class(row)) * (product - target);
                    gradient.iter_mut().zip(x).for_each(|(sum, x)| *sum += error * *x as f64);
                }
                assert!(gradient.iter().all(|g| g.abs() < 1e-9), "{n}: {gradient:?}");
            }
        }
    }

    #[test]
    fn moments_that_are_no_numbers_are_refused() {
        let mut moments = Moments::new(2, 2).unwrap();
        moments.add(0, &[f32::NAN, 1.0], 1.0);
        assert_eq!(moments.solve(0.1, &Progress::default()).unwrap_err().status(), Status::NotANumber);
    }
}
