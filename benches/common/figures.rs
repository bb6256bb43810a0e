//! Medians, percentiles, and the rows they are printed in.

use std::time::Duration;

use super::figure::Figure;

pub fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

pub fn median(values: &[f64]) -> f64 {
    let sorted = sorted(values);
    sorted[sorted.len() / 2]
}

/// The smallest value that `share` of the values do not exceed.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let count = (sorted.len() as f64 * share).ceil() as usize;
    sorted[count.clamp(1, sorted.len()) - 1]
}

pub fn median_heading() {
    Figure::print_heading();
}

pub fn median_row(name: &str, values: &[f64], scale: f64) {
    Figure::of(values, scale).print_row(name, "");
}

const SHARES: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

pub fn percentile_heading(unit: &str) {
    println!("{unit:<42} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}", "p50", "p90", "p99", "p99.9", "max", "count");
}

pub fn percentile_row(name: &str, values: &[f64]) {
    print!("{name:<42}");
    if values.is_empty() {
        return println!(" none");
    }
    let sorted = sorted(values);
    for share in SHARES {
        print!(" {:>9.3}", percentile(&sorted, share));
    }
    println!(" {:>9.3} {:>9}", sorted[sorted.len() - 1], sorted.len());
}

/// Share of the values above a bound, in percent.
pub fn percent_above(values: &[f64], bound: f64) -> f64 {
    100.0 * values.iter().filter(|value| **value > bound).count() as f64 / values.len().max(1) as f64
}

/// Counts per class, a bar each whose length is the logarithm, so that rare ones are seen.
pub fn histogram(values: &[f64], edges: &[f64]) {
    let mut counts = vec![0usize; edges.len() + 1];
    for value in values {
        counts[edges.iter().position(|edge| value <= edge).unwrap_or(edges.len())] += 1;
    }
    for (class, count) in counts.iter().enumerate() {
        let label = match edges.get(class) {
            Some(edge) => format!("up to {edge:.2}"),
            None => format!("over {:.2}", edges[edges.len() - 1]),
        };
        let bar = "#".repeat((10.0 * (*count as f64 + 1.0).log10()).round() as usize);
        println!("  {label:>12} {count:>7} {bar}");
    }
}

pub fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
