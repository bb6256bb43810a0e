//! Every kernel on every instruction set this machine has, against f64, on fresh random inputs.

use half::{bf16, f16};

use safetensors::Dtype;

use super::activations::{Activations, TILE, tiles};
use super::matmul::CACHED_BYTES;
use super::*;
use crate::quant::{BLOCK, Groups, LINE_BYTES, Shape, Source};

mod attention;
mod cache;
#[cfg(unix)]
mod speed;

/// Numbers in [-1, 1) from the clock's seed, which a failing test prints.
struct Random(u64);

impl Random {
    fn fresh() -> Self {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        println!("seed {}", now.as_nanos() as u64);
        Random(now.as_nanos() as u64 | 1)
    }

    fn unit(&mut self) -> f32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn vector(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit()).collect()
    }

    /// A matrix in each format.
    fn matrices(&mut self, rows: usize, columns: usize) -> Vec<Matrix> {
        let numbers = self.vector(rows * columns);
        formats()
            .into_iter()
            .map(|format| {
                let (dtype, bytes): (Dtype, Vec<u8>) = match format {
                    Format::Bf16 => {
                        (Dtype::BF16, numbers.iter().flat_map(|n| bf16::from_f32(*n).to_le_bytes()).collect())
                    }
                    Format::F16 => (Dtype::F16, numbers.iter().flat_map(|n| f16::from_f32(*n).to_le_bytes()).collect()),
                    _ => (Dtype::F32, numbers.iter().flat_map(|n| n.to_le_bytes()).collect()),
                };
                let source = Source { dtype, bytes: &bytes, columns, importance: None };
                Matrix::from_rows("a test", Shape { rows, columns, format }, &source).unwrap()
            })
            .collect()
    }
}

/// Every format there is.
fn formats() -> Vec<Format> {
    let mut formats = vec![Format::F32, Format::F16, Format::Bf16];
    for scales in [ScaleDtype::Bf16, ScaleDtype::F16] {
        formats.push(Format::Int8(Groups { size: 32, scales }));
        formats.extend([32, 64, 128].map(|size| Format::Int4(Groups { size, scales })));
    }
    formats
}

/// Seconds of processor time that this thread takes for something.
#[cfg(unix)]
fn processor_seconds(work: impl FnOnce()) -> f64 {
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is writable.
        assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) }, 0);
        time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
    };
    let started = now();
    work();
    now() - started
}

/// Those of every instruction set this machine has, and those it hands out to nobody because it has better ones.
fn all_kernels() -> Vec<Kernels> {
    let mut kernels: Vec<Kernels> =
        Instructions::ALL.into_iter().filter_map(|wanted| Kernels::get(wanted).ok()).collect();
    #[cfg(target_arch = "x86_64")]
    kernels.extend([x86::avx512(), x86::avx_vnni_by_avx512()].into_iter().flatten());
    kernels
}

/// Activations of `x` as the kernels take them for a format.
fn packed_for(kernels: &Kernels, format: Format, x: &TokenRows) -> (Activations, Place) {
    let mut activations = Activations::new("a test", x.count, x.columns).unwrap();
    let place = Place { precision: kernels.precision(format), tokens: 0..x.count, columns: x.columns };
    let packing = activations.packing();
    for tile in 0..tiles(x.count) {
        let tokens = tile * TILE..((tile + 1) * TILE).min(x.count);
        // SAFETY: this is the only thread, and the buffers live on.
        unsafe { kernels.pack(&packing, &place, tile, &x.part(tokens)) };
    }
    (activations, place)
}

/// The dot product of row `row` and `x` in f64, and the largest error it may have on these kernels.
fn dot(kernels: &Kernels, matrix: &Matrix, row: usize, x: &[f32]) -> (f64, f64) {
    let mut weights = vec![0.0; matrix.columns()];
    matrix.read_row(row, &mut weights);
    let terms = weights.iter().zip(x).map(|(weight, x)| *weight as f64 * *x as f64);
    let size: f64 = terms.clone().map(f64::abs).sum();
    let sums = 3e-7 * size * (1.0 + matrix.columns() as f64 / 64.0);
    let rounding = match kernels.precision(matrix.shape().format) {
        Precision::F32 => 0.0,
        Precision::Bf16 => size / 256.0,
        // Half a step of each block, whose size is the block's largest by 127.
        Precision::Int8 => (weights.chunks(BLOCK).zip(x.chunks(BLOCK)))
            .map(|(weights, x)| {
                let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs())) as f64;
                largest / 254.0 * weights.iter().map(|weight| weight.abs() as f64).sum::<f64>()
            })
            .sum(),
    };
    (terms.sum(), sums + 1.001 * rounding)
}

const SHAPES: [(usize, usize); 8] = [(1, 1), (8, 8), (13, 72), (17, 60), (9, 257), (24, 7), (70, 160), (32, 384)];

/// All products, of all rows in two parts.
fn multiply(kernels: &Kernels, matrix: &Matrix, x: &TokenRows) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.count * matrix.rows()];
    let (activations, place) = packed_for(kernels, matrix.shape().format, x);
    let panels = matrix.shape().panels();
    for part in [0..panels / 2, panels / 2..panels] {
        // SAFETY: this is the only thread, and `out` lives on.
        unsafe { kernels.matmul(matrix, part, &activations.packed(&place), &Output::new(&mut out, matrix.rows())) };
    }
    out
}

#[test]
fn matrix_products_agree_with_f64_for_every_format_shape_and_number_of_tokens() {
    let mut random = Random::fresh();
    for (rows, columns) in SHAPES {
        for matrix in random.matrices(rows, columns) {
            let data = random.vector(20 * columns);
            let index: Vec<u32> = vec![8, 0, 3, 3, 7, 1, 5];
            let counts = [1, 2, 3, 4, 5, 8, 9, 15, 20].map(|count| (count, None));
            for (count, index) in counts.into_iter().chain([(7, Some(&index[..])), (1, Some(&index[..]))]) {
                let x = TokenRows { data: &data, columns, index, count };
                for kernels in all_kernels() {
                    let out = multiply(&kernels, &matrix, &x);
                    for token in 0..count {
                        for row in 0..rows {
                            let (expected, allowed) = dot(&kernels, &matrix, row, x.row(token));
                            let error = (out[token * rows + row] as f64 - expected).abs();
                            let format = matrix.shape().format;
                            assert!(error <= allowed, "{} {format:?} {error} of {allowed}", kernels.name);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn long_rows_are_cut_where_many_tokens_pass_and_give_the_same_bits() {
    let mut random = Random::fresh();
    let columns = 2 * CACHED_BYTES / LINE_BYTES * 8 + 72;
    let data = random.vector(10 * columns);
    for matrix in random.matrices(19, columns) {
        for kernels in all_kernels() {
            let run = |first: usize, count: usize| {
                let x = TokenRows { data: &data[first * columns..], columns, index: None, count };
                multiply(&kernels, &matrix, &x).into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let alone: Vec<u32> = (0..10).flat_map(|token| run(token, 1)).collect();
            assert!(run(0, 10) == alone, "{} {:?}", kernels.name, matrix.shape().format);
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_in_every_tile() {
    let mut random = Random::fresh();
    for (rows, columns) in SHAPES {
        for matrix in random.matrices(rows, columns) {
            let data = random.vector(17 * columns);
            for kernels in all_kernels() {
                let run = |first: usize, count: usize| {
                    let x = TokenRows { data: &data[first * columns..], columns, index: None, count };
                    multiply(&kernels, &matrix, &x).into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                let alone: Vec<u32> = (0..17).flat_map(|token| run(token, 1)).collect();
                for count in 2..=17 {
                    assert_eq!(run(0, count), alone[..count * rows], "{} {count}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn quantised_products_have_the_same_bits_on_every_instruction_set_with_fused_multiply_adds() {
    let mut random = Random::fresh();
    for (rows, columns) in SHAPES {
        let data = random.vector(11 * columns);
        let x = TokenRows { data: &data, columns, index: None, count: 11 };
        for matrix in random.matrices(rows, columns).iter().filter(|matrix| matrix.shape().format.groups().is_some()) {
            let mut first: Option<Vec<u32>> = None;
            for kernels in all_kernels().iter().filter(|kernels| kernels.name != "portable") {
                let bits: Vec<u32> = multiply(kernels, matrix, &x).into_iter().map(f32::to_bits).collect();
                assert_eq!(&bits, first.get_or_insert_with(|| bits.clone()), "{}", kernels.name);
            }
        }
    }
}

#[test]
fn an_activation_that_is_not_finite_makes_every_product_it_enters_not_a_number() {
    let mut random = Random::fresh();
    for matrix in random.matrices(20, 70) {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut data = random.vector(3 * 70);
            data[70 + 33] = bad;
            for kernels in all_kernels() {
                let out = multiply(&kernels, &matrix, &TokenRows { data: &data, columns: 70, index: None, count: 3 });
                let is_number = |token: usize| out[token * 20..(token + 1) * 20].iter().all(|value| value.is_finite());
                assert!(is_number(0) && is_number(2), "{}", kernels.name);
                assert!(out[20..40].iter().all(|value| !value.is_finite()), "{}", kernels.name);
            }
        }
    }
}

#[test]
fn an_experts_first_half_agrees_with_f64() {
    let mut random = Random::fresh();
    for (rows, columns) in SHAPES {
        let (gates, ups, downs) =
            (random.matrices(rows, columns), random.matrices(rows, columns), random.matrices(1, 1));
        let data = random.vector(11 * columns);
        for ((gate, up), down) in gates.into_iter().zip(ups).zip(downs) {
            let expert = ExpertWeights { gate, up, down };
            let cases = [1, 2, 5, 11].map(|count| [(count, false), (count, true)]);
            for (kernels, (count, exact)) in all_kernels()
                .into_iter()
                .flat_map(|kernels| cases.as_flattened().iter().map(move |case| (kernels, *case)))
            {
                let x = TokenRows { data: &data, columns, index: None, count };
                let (activations, place) = packed_for(&kernels, expert.gate.shape().format, &x);
                let mut out = vec![f32::NAN; count * rows];
                let panels = 0..expert.gate.shape().panels();
                // SAFETY: this is the only thread, and `out` lives on.
                unsafe {
                    let out = Output::new(&mut out, rows);
                    kernels.geglu(&expert, panels, &activations.packed(&place), exact, &out)
                };
                for token in 0..count {
                    for row in 0..rows {
                        let (gate, gate_error) = dot(&kernels, &expert.gate, row, x.row(token));
                        let (up, up_error) = dot(&kernels, &expert.up, row, x.row(token));
                        let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                        let tanh = 0.5 * gate * (1.0 + inner.tanh());
                        let erf = 0.5 * gate * (1.0 + libm::erf(gate / 2f64.sqrt()));
                        let gelu = if exact { erf } else { tanh };
                        // GeLU's slope is below 1.13.
                        let gelu_error = 1.13 * gate_error + 1e-6 * (1.0 + gate.abs());
                        let allowed = gelu_error * (up.abs() + up_error) + gelu.abs() * up_error + 1e-7;
                        let error = (out[token * rows + row] as f64 - gelu * up).abs();
                        assert!(error <= allowed, "{} {error} of {allowed}", kernels.name);
                    }
                }
            }
        }
    }
}
