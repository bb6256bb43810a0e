//! Rounding a group of weights to whole numbers and a scale.

use super::format::{Format, ScaleDtype};

/// How far off rounding is, in sums over all numbers: an error of 0 where nothing was rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rounded {
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
        self.square += other.square;
        self.error += other.error;
        self.largest = self.largest.max(other.largest);
    }

    /// The root of the mean squared difference, by that of the numbers.
    pub fn relative(&self) -> f64 {
        if self.square == 0.0 { 0.0 } else { (self.error / self.square).sqrt() }
    }
}

/// Rounds the `numbers` of one group to `integers`, as many, and returns the stored scale.
pub fn round_group(
    numbers: &[f32],
    _importance: Option<&[f32]>,
    format: Format,
    scales: ScaleDtype,
    integers: &mut [i32],
) -> ([u8; 2], Rounded) {
    let (lowest, highest) = format.integers().unwrap_or((0, 0));
    // The number furthest from zero becomes the lowest whole number: the side that reaches further.
    let extreme = numbers.iter().copied().fold(0f32, |extreme, n| if n.abs() > extreme.abs() { n } else { extreme });
    let stored = scales.encode(extreme / lowest as f32);
    let scale = scales.decode(stored);
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut rounded = Rounded::default();
    for (number, integer) in numbers.iter().zip(integers) {
        *integer = ((number * inverse).round_ties_even() as i32).clamp(lowest, highest);
        let difference = (*integer as f32 * scale - number).abs() as f64;
        rounded.square += (*number as f64).powi(2);
        rounded.error += difference * difference;
        rounded.largest = rounded.largest.max(difference);
    }
    (stored, rounded)
}
