//! Several measurements of one thing: the median, the lowest and the highest. The repository's benches share this file.

use serde_json::{Value, json};

/// A figure as it is reported.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figure {
    pub median: f64,
    pub lowest: f64,
    pub highest: f64,
}

impl Figure {
    /// Of at least one value, each multiplied by `scale`.
    pub fn of(values: &[f64], scale: f64) -> Figure {
        let mut sorted: Vec<f64> = values.iter().map(|value| value * scale).collect();
        sorted.sort_by(f64::total_cmp);
        let (lowest, highest) = (sorted[0], sorted[sorted.len() - 1]);
        // The mean of the two in the middle where there are two.
        let (half, rest) = (sorted.len() / 2, sorted.len() % 2);
        Figure { median: (sorted[half + rest - 1] + sorted[half]) / 2.0, lowest, highest }
    }

    pub fn json(&self, unit: &str) -> Value {
        json!({ "median": self.median, "lowest": self.lowest, "highest": self.highest, "unit": unit })
    }

    /// Names the columns of rows.
    pub fn print_heading() {
        println!("{:<42} {:>9} {:>9} {:>9}", "", "median", "lowest", "highest");
    }

    pub fn print_row(&self, name: &str, note: &str) {
        let row = format!("{name:<42} {:>9.2} {:>9.2} {:>9.2}   {note}", self.median, self.lowest, self.highest);
        println!("{}", row.trim_end());
    }
}
