//! What the device can: the bandwidth of copies and of reads, the rate of its tensor cores, and cuBLAS's on the shapes of
//! prompts.

use super::Result;
use super::cublas::{Cublas, Product};
use super::geometry::Work;
use super::machine::{Factors, Machine, time};
use super::options::Sizes;
use super::report::{CublasRate, Roofs};

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let (half, rest) = (values.len() / 2, values.len() % 2);
    (values[half + rest - 1] + values[half]) / 2.0
}

/// The value that 95 of 100 do not exceed.
pub fn percentile_95(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * 95).div_ceil(100).clamp(1, values.len()) - 1]
}

/// The median of `rounds` after three that warm up.
fn repeated(rounds: usize, mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    for _ in 0..rounds.min(3) {
        measure()?;
    }
    Ok(median((0..rounds).map(|_| measure()).collect::<Result<_>>()?))
}

pub fn measure(machine: &mut Machine, sizes: &Sizes) -> Result<Roofs> {
    let rounds = sizes.roof_rounds;
    // Far more than any cache holds, and no more than is there.
    let (free, _) = machine.device.memory()?;
    let bytes = sizes.roof_bytes.min(free / 4) / 4096 * 4096;
    let (copy, read) = {
        let from = machine.numbers("what is copied and read", bytes, 1)?;
        let mut to = machine.device.allocate("copies", bytes)?;
        let copy = repeated(rounds, || machine.copy_seconds(&from, &mut to))?;
        (2.0 * bytes as f64 / copy, bytes as f64 / repeated(rounds, || machine.read_seconds(&from))?)
    };
    let mut rate = |factors| repeated(rounds, || Ok(1.0 / machine.mma_rate(factors, sizes.mma_rounds)?));
    let (bf16, int8) = (1.0 / rate(Factors::Bf16)?, 1.0 / rate(Factors::Int8)?);
    Ok(Roofs {
        bytes,
        cache_bytes: machine.device.cache_bytes()?,
        copy_gb_per_s: copy / 1e9,
        read_gb_per_s: read / 1e9,
        mma_bf16_tflops: 2.0 * bf16 / 1e12,
        mma_int8_tops: 2.0 * int8 / 1e12,
        cublas_name: None,
        cublas: Vec::new(),
    })
}

/// What cuBLAS reaches on the passes of each prompt.
pub fn of_cublas(machine: &mut Machine, library: &Cublas, sizes: &Sizes, work: &Work) -> Result<Vec<CublasRate>> {
    let mut tokens: Vec<usize> = sizes.prompts.iter().map(|prompt| (*prompt).min(sizes.chunk)).collect();
    tokens.dedup();
    tokens.into_iter().map(|tokens| cublas_rate(machine, library, work, tokens, sizes.roof_rounds)).collect()
}

/// The rate over all products of a prompt of so many tokens in one layer: queries, keys and values at once, the output
/// projection, and for each expert, with its share of the tokens, gate and up at once, and down.
fn cublas_rate(
    machine: &mut Machine,
    library: &Cublas,
    work: &Work,
    tokens: usize,
    rounds: usize,
) -> Result<CublasRate> {
    let config = work.config;
    let (hidden, inner, experts) = (config.hidden_size, config.intermediate_size, config.num_local_experts);
    let slots = (tokens * config.num_experts_per_tok).div_ceil(experts);
    let shapes = [
        (work.query_key_value_rows(), hidden, tokens, 1),
        (hidden, config.query_size(), tokens, 1),
        (2 * inner, hidden, slots, experts),
        (hidden, inner, slots, experts),
    ];
    let most = |size: fn(&(usize, usize, usize, usize)) -> usize| 2 * shapes.iter().map(size).max().unwrap_or(0);
    let weights = machine.numbers("weights for cuBLAS", most(|(rows, columns, ..)| rows * columns), 2)?;
    let x = machine.numbers("activations for cuBLAS", most(|(_, columns, tokens, _)| columns * tokens), 3)?;
    let out = machine.device.allocate("products of cuBLAS", most(|(rows, _, tokens, _)| rows * tokens))?;
    let (mut seconds, mut multiply_adds) = (0.0, 0.0);
    for (rows, columns, tokens, times) in shapes {
        let product = Product { rows, columns, tokens, weights: &weights, x: &x, out: &out };
        let once = repeated(rounds, || time(&mut machine.device, |device| library.multiply(device, &product)))?;
        seconds += times as f64 * once;
        multiply_adds += (times * rows * columns * tokens) as f64;
    }
    Ok(CublasRate { tokens, tflops: 2.0 * multiply_adds / seconds / 1e12 })
}
