//! AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2, over Adam, arXiv 1412.6980), with the learning rate's schedule and
//! clipping by the norm of all gradients (Pascanu et al., arXiv 1211.5063).

use crate::error::{Error, Result, Status};
use crate::memory::try_vec;

/// What becomes of the learning rate after warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Decay {
    /// Nothing.
    #[default]
    Constant,
    /// Half a cosine, down to a share of it at the last step (SGDR, arXiv 1608.03983, equation 5, without restarts).
    Cosine {
        /// Steps in all, warm-up included; the share stays after them.
        total_steps: u64,
        /// What is left at the end, 0 to 1.
        final_share: f64,
    },
}

/// Choices of the optimiser.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OptimiserOptions {
    /// Learning rate after warm-up.
    pub learning_rate: f64,
    /// How much of the first and the second moment a step keeps.
    pub betas: (f64, f64),
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Share of each gate that a step takes away, times the learning rate.
    pub weight_decay: f64,
    /// The norm of all gradients together is at most this; 0 is no limit.
    pub clip: f64,
    /// Steps in which the learning rate rises from nothing.
    pub warmup_steps: u64,
    /// After them.
    pub decay: Decay,
}

impl Default for OptimiserOptions {
    fn default() -> Self {
        OptimiserOptions {
            learning_rate: 1e-3,
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip: 1.0,
            warmup_steps: 0,
            decay: Decay::Constant,
        }
    }
}

impl OptimiserOptions {
    /// Fails with `InvalidArgument` where a number is out of range.
    pub fn check(&self) -> Result<()> {
        let check = |is_right: bool, key: &str, value: f64, expected: &str| match is_right {
            true => Ok(()),
            false => {
                let text = format!("{key} is {value}, expected {expected}");
                Err(Error::new(Status::InvalidArgument, text).at_key(key))
            }
        };
        let positive = |value: f64| value > 0.0 && value.is_finite();
        let natural = |value: f64| value >= 0.0 && value.is_finite();
        check(positive(self.learning_rate), "learning_rate", self.learning_rate, "a number above 0")?;
        check((0.0..1.0).contains(&self.betas.0), "betas", self.betas.0, "0 to below 1")?;
        check((0.0..1.0).contains(&self.betas.1), "betas", self.betas.1, "0 to below 1")?;
        check(positive(self.epsilon), "epsilon", self.epsilon, "a number above 0")?;
        check(natural(self.weight_decay), "weight_decay", self.weight_decay, "0 or more")?;
        check(natural(self.clip), "clip", self.clip, "0 (no limit) or more")?;
        if let Decay::Cosine { total_steps, final_share } = self.decay {
            check((0.0..=1.0).contains(&final_share), "final_share", final_share, "0 to 1")?;
            let fits = total_steps > self.warmup_steps;
            check(fits, "total_steps", total_steps as f64, "more than warmup_steps")?;
        }
        Ok(())
    }

    /// The learning rate of a step; the first is 0.
    pub fn learning_rate_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.learning_rate * (step + 1) as f64 / self.warmup_steps as f64;
        }
        match self.decay {
            Decay::Constant => self.learning_rate,
            Decay::Cosine { total_steps, final_share } => {
                let along =
                    (step.min(total_steps) - self.warmup_steps) as f64 / (total_steps - self.warmup_steps) as f64;
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * along).cos());
                self.learning_rate * (final_share + (1.0 - final_share) * cosine)
            }
        }
    }
}

/// The moments of every gate, and the steps that were taken.
#[derive(Clone, Debug, PartialEq)]
pub struct AdamW {
    pub(super) first: Vec<f32>,
    pub(super) second: Vec<f32>,
    pub(super) step: u64,
}

impl AdamW {
    /// Nothing moved yet.
    pub fn new(parameters: usize) -> Result<AdamW> {
        let moments = || try_vec("moments of the optimiser", parameters, 0f32);
        Ok(AdamW { first: moments()?, second: moments()?, step: 0 })
    }

    /// Steps that were taken.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// Moves the parameters. Fails with `NotANumber`, and moves nothing, where the gradients' `norm` is not finite, or a number that
    /// it would come to is not.
    pub fn update(
        &mut self,
        options: &OptimiserOptions,
        norm: f64,
        gradients: &[f32],
        parameters: &mut [f32],
    ) -> Result<()> {
        let step = self.step + 1;
        if !norm.is_finite() {
            let text = format!(
                "the gradient of step {step} is not finite; the gates are as they were: lower the learning rate, or what \
                 losses and noise are multiplied by"
            );
            return Err(Error::new(Status::NotANumber, text));
        }
        let rate = options.learning_rate_at(self.step);
        let scale = if options.clip > 0.0 && norm > options.clip { options.clip / norm } else { 1.0 };
        let (keep_first, keep_second) = options.betas;
        let steps = i32::try_from(step).unwrap_or(i32::MAX);
        // What zeros at the start take from the moments.
        let (first_share, second_share) = (1.0 - keep_first.powi(steps), 1.0 - keep_second.powi(steps));
        // The parameter and its moments.
        let moved = |[parameter, first, second]: [f32; 3], gradient: f32| {
            let gradient = f64::from(gradient) * scale;
            let first = (keep_first * f64::from(first) + (1.0 - keep_first) * gradient) as f32;
            let second = (keep_second * f64::from(second) + (1.0 - keep_second) * gradient * gradient) as f32;
            let root = (f64::from(second) / second_share).sqrt() + options.epsilon;
            let kept = f64::from(parameter) * (1.0 - rate * options.weight_decay);
            [(kept - rate * f64::from(first) / first_share / root) as f32, first, second]
        };
        let now = parameters.iter().zip(&self.first).zip(&self.second).zip(gradients);
        let mut moves =
            now.map(|(((parameter, first), second), gradient)| moved([*parameter, *first, *second], *gradient));
        if !moves.all(|numbers| numbers.iter().all(|number| number.is_finite())) {
            let text = format!(
                "step {step} would move a gate, or a moment of it, past what f32 can hold; the gates are as they were: lower \
                 the learning rate"
            );
            return Err(Error::new(Status::NotANumber, text));
        }
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((parameter, gradient), (first, second)) in parameters.iter_mut().zip(gradients).zip(moments) {
            [*parameter, *first, *second] = moved([*parameter, *first, *second], *gradient);
        }
        self.step = step;
        Ok(())
    }
}

/// The Euclidean norm of all gradients.
pub fn norm(gradients: &[f32]) -> f64 {
    gradients.iter().map(|gradient| f64::from(*gradient) * f64::from(*gradient)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_rises_then_falls_and_stays() {
        let decay = Decay::Cosine { total_steps: 10, final_share: 0.2 };
        let options = OptimiserOptions { learning_rate: 2.0, warmup_steps: 4, decay, ..Default::default() };
        let rates: Vec<f64> = [0, 3, 4, 7, 10, 1000].map(|step| options.learning_rate_at(step)).to_vec();
        for (rate, expected) in rates.iter().zip([0.5, 2.0, 2.0, 1.2, 0.4, 0.4]) {
            assert!((rate - expected).abs() < 1e-12, "{rates:?}");
        }
    }

    #[test]
    fn what_is_not_finite_moves_nothing() {
        let (mut optimiser, mut parameters) = (AdamW::new(2).unwrap(), [1.0, 2.0]);
        let gradients = [f32::NAN, 1.0];
        let result = optimiser.update(&OptimiserOptions::default(), norm(&gradients), &gradients, &mut parameters);
        assert_eq!(result.unwrap_err().status(), Status::NotANumber);
        assert_eq!((optimiser, parameters), (AdamW::new(2).unwrap(), [1.0, 2.0]));
    }

    #[test]
    fn what_would_not_be_finite_moves_nothing() {
        let usual = OptimiserOptions::default();
        // A step that f32 cannot hold, a decay that it cannot, and a moment.
        for (options, gradients) in [
            (OptimiserOptions { learning_rate: 1e39, ..usual }, [0.0, 1.0]),
            (OptimiserOptions { weight_decay: 1e300, ..usual }, [0.0, 1.0]),
            (OptimiserOptions { clip: 0.0, ..usual }, [0.0, 1e30]),
        ] {
            let (mut optimiser, mut parameters) = (AdamW::new(2).unwrap(), [1.0, 2.0]);
            let result = optimiser.update(&options, norm(&gradients), &gradients, &mut parameters);
            assert_eq!(result.unwrap_err().status(), Status::NotANumber);
            assert_eq!((optimiser, parameters), (AdamW::new(2).unwrap(), [1.0, 2.0]));
        }
    }

    #[test]
    fn choices_out_of_range_are_named() {
        let refused = |options: OptimiserOptions| options.check().unwrap_err().key().unwrap().to_owned();
        let usual = OptimiserOptions::default();
        usual.check().unwrap();
        assert_eq!(refused(OptimiserOptions { learning_rate: f64::NAN, ..usual }), "learning_rate");
        assert_eq!(refused(OptimiserOptions { betas: (0.9, 1.0), ..usual }), "betas");
        assert_eq!(refused(OptimiserOptions { epsilon: 0.0, ..usual }), "epsilon");
        assert_eq!(refused(OptimiserOptions { clip: -1.0, ..usual }), "clip");
        let decay = Decay::Cosine { total_steps: 3, final_share: 0.0 };
        assert_eq!(refused(OptimiserOptions { warmup_steps: 3, decay, ..usual }), "total_steps");
    }
}
