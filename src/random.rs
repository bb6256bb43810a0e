//! Random numbers that are a function of a seed and a counter, the same on every system.

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser (Steele, Lea, Flood 2014).
fn finalise(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A number well mixed from another: the first of SplitMix64 from there on.
pub fn mixed(number: u64) -> u64 {
    finalise(number.wrapping_add(GOLDEN))
}

/// The random number in [0, 1) of a seed and a counter.
pub fn uniform(seed: u64, counter: u64) -> f64 {
    let bits = finalise(mixed(seed).wrapping_add(counter.wrapping_mul(GOLDEN)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The number of N(0, 1) of a seed and a counter: Box and Muller (1958) of the uniform ones at `2 * counter` and the next.
pub fn normal(seed: u64, counter: u64) -> f64 {
    let (radius, angle) = (uniform(seed, 2 * counter), uniform(seed, 2 * counter + 1));
    // 1 - radius is above 0, and its logarithm finite.
    (-2.0 * libm::log(1.0 - radius)).sqrt() * libm::cos(std::f64::consts::TAU * angle)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normal_numbers_have_the_moments_of_their_distribution() {
        let numbers: Vec<f64> = (0..40_000).map(|counter| normal(7, counter)).collect();
        let moment = |power: i32| numbers.iter().map(|x| x.powi(power)).sum::<f64>() / numbers.len() as f64;
        for (power, expected, tolerance) in [(1, 0.0, 0.02), (2, 1.0, 0.03), (3, 0.0, 0.07), (4, 3.0, 0.2)] {
            assert!((moment(power) - expected).abs() < tolerance, "moment {power} is {}", moment(power));
        }
    }
}
