//! Every kernel on every instruction set this machine has, against f64, on fresh random inputs.

use half::{bf16, f16};

use super::*;
use crate::memory::Buffer;

mod attention;
mod cache;

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

    /// A matrix in each dtype.
    fn matrices(&mut self, rows: usize, columns: usize) -> [Matrix; 3] {
        let mut bf16s = Buffer::zeroed("a test", rows * columns).unwrap();
        let mut f16s = Buffer::zeroed("a test", rows * columns).unwrap();
        let mut f32s = Buffer::zeroed("a test", rows * columns).unwrap();
        bf16s.iter_mut().for_each(|element| *element = bf16::from_f32(self.unit()));
        f16s.iter_mut().for_each(|element| *element = f16::from_f32(self.unit()));
        f32s.iter_mut().for_each(|element| *element = self.unit());
        [Elements::Bf16(bf16s), Elements::F16(f16s), Elements::F32(f32s)].map(|elements| Matrix {
            rows,
            columns,
            elements,
        })
    }
}

fn all_kernels() -> Vec<Kernels> {
    [Instructions::Portable, Instructions::Avx2, Instructions::Avx512]
        .into_iter()
        .filter_map(|wanted| Kernels::get(wanted).ok())
        .collect()
}

/// The dot product of row `row` and `x` in f64, and the sum of its terms' sizes, which bounds its error in f32.
fn dot(matrix: &Matrix, row: usize, x: &[f32]) -> (f64, f64) {
    let mut weights = vec![0.0; matrix.columns];
    matrix.read_row(row, &mut weights);
    let terms = weights.iter().zip(x).map(|(weight, x)| *weight as f64 * *x as f64);
    (terms.clone().sum(), terms.map(f64::abs).sum())
}

const SHAPES: [(usize, usize); 6] = [(1, 1), (8, 8), (13, 72), (17, 60), (9, 257), (24, 7)];

#[test]
fn matrix_products_agree_with_f64_for_every_dtype_shape_and_number_of_tokens() {
    let mut random = Random::fresh();
    for (rows, columns) in SHAPES {
        for matrix in random.matrices(rows, columns) {
            let data = random.vector(9 * columns);
            let index: Vec<u32> = vec![8, 0, 3, 3, 7, 1, 5];
            for (count, index) in
                [(1, None), (2, None), (3, None), (9, None), (7, Some(&index[..])), (1, Some(&index[..]))]
            {
                let x = TokenRows { data: &data, columns, index, count };
                for kernels in all_kernels() {
                    let mut out = vec![f32::NAN; count * rows];
                    let half = rows / 2;
                    for part in [0..half, half..rows] {
                        // SAFETY: this is the only thread, and `out` lives on.
                        unsafe { kernels.matmul(&matrix, part, &x, &Output::new(&mut out, rows)) };
                    }
                    for token in 0..count {
                        let at = index.map_or(token, |index| index[token] as usize) * columns;
                        for row in 0..rows {
                            let (expected, size) = dot(&matrix, row, &data[at..at + columns]);
                            let error = (out[token * rows + row] as f64 - expected).abs();
                            assert!(error <= 3e-7 * size * (1.0 + columns as f64 / 64.0), "{}", kernels.name);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_token_gets_the_same_bits_in_every_tile() {
    let mut random = Random::fresh();
    for (rows, columns) in SHAPES {
        for matrix in random.matrices(rows, columns) {
            let data = random.vector(8 * columns);
            for kernels in all_kernels() {
                let run = |first: usize, count: usize| {
                    let x = TokenRows { data: &data[first * columns..], columns, index: None, count };
                    let mut out = vec![0.0; count * rows];
                    // SAFETY: this is the only thread, and `out` lives on.
                    unsafe { kernels.matmul(&matrix, 0..rows, &x, &Output::new(&mut out, rows)) };
                    out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                let alone: Vec<u32> = (0..8).flat_map(|token| run(token, 1)).collect();
                for count in 2..=8 {
                    assert_eq!(run(0, count), alone[..count * rows], "{} {count}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn an_experts_first_half_agrees_with_f64() {
    let mut random = Random::fresh();
    for (rows, columns) in SHAPES {
        let gates = random.matrices(rows, columns);
        let ups = random.matrices(rows, columns);
        let downs = random.matrices(1, 1);
        let data = random.vector(5 * columns);
        for ((gate, up), down) in gates.into_iter().zip(ups).zip(downs) {
            let expert = ExpertWeights { gate, up, down };
            for (kernels, exact) in all_kernels().into_iter().flat_map(|kernels| [(kernels, false), (kernels, true)]) {
                let x = TokenRows { data: &data, columns, index: None, count: 5 };
                let mut out = vec![f32::NAN; 5 * rows];
                // SAFETY: this is the only thread, and `out` lives on.
                unsafe { kernels.geglu(&expert, 0..rows, &x, exact, &Output::new(&mut out, rows)) };
                for token in 0..5 {
                    let x = &data[token * columns..(token + 1) * columns];
                    for row in 0..rows {
                        let ((gate, gate_size), (up, up_size)) = (dot(&expert.gate, row, x), dot(&expert.up, row, x));
                        let inner = (2.0 / std::f64::consts::PI).sqrt() * (gate + 0.044715 * gate.powi(3));
                        let tanh = 0.5 * gate * (1.0 + inner.tanh());
                        let erf = 0.5 * gate * (1.0 + libm::erf(gate / 2f64.sqrt()));
                        let expected = if exact { erf } else { tanh } * up;
                        let size = (1.0 + gate_size) * (1.0 + up_size);
                        let error = (out[token * rows + row] as f64 - expected).abs();
                        assert!(error <= 1e-6 * size * (1.0 + columns as f64 / 64.0), "{} {error}", kernels.name);
                    }
                }
            }
        }
    }
}
