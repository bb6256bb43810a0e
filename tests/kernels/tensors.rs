//! Random weights and activations as kernels take them, and as plain numbers.

use half::{bf16, f16};

use crate::arguments::{ActivationArguments, BlockArguments, MatrixArguments};
use crate::device::{Array, Device};
use crate::random::Random;

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Format {
    F32,
    Bf16,
    F16,
    Int8,
    Int4,
}

impl Format {
    pub const ALL: [Format; 5] = [Format::F32, Format::Bf16, Format::F16, Format::Int8, Format::Int4];

    pub fn name(self) -> &'static str {
        ["f32", "bf16", "f16", "int8", "int4"][self as usize]
    }

    pub fn is_scaled(self) -> bool {
        matches!(self, Format::Int8 | Format::Int4)
    }

    fn columns_per_line(self) -> usize {
        [1, 2, 2, 4, 8][self as usize]
    }
}

/// A format with what its scales are.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub format: Format,
    pub group: usize,
    pub half_scales: bool,
}

/// Every format with every size of groups and type of scales.
pub fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for format in Format::ALL {
        for group in if format.is_scaled() { vec![32, 64, 128] } else { vec![32] } {
            for half_scales in if format.is_scaled() { vec![false, true] } else { vec![false] } {
                kinds.push(Kind { format, group, half_scales });
            }
        }
    }
    kinds
}

/// A matrix `[rows, columns]`, columns filled up as its format asks.
pub struct Matrix {
    pub kind: Kind,
    pub rows: usize,
    pub columns: usize,
    /// `[rows, columns]`: whole numbers where there are scales.
    numbers: Vec<f32>,
    /// `[rows, groups]`; none in formats without.
    scales: Vec<f32>,
}

/// The same on the device.
pub struct DeviceMatrix<'a> {
    lines: Array<'a, u8>,
    scales: Array<'a, u16>,
    arguments: MatrixArguments,
}

impl Matrix {
    pub fn random(random: &mut Random, rows: usize, columns: usize, kind: Kind) -> Matrix {
        let step = if kind.format.is_scaled() { kind.group } else { kind.format.columns_per_line() };
        let padded = columns.next_multiple_of(step);
        let mut numbers = vec![0f32; rows * padded];
        for row in numbers.chunks_mut(padded) {
            for number in &mut row[..columns] {
                *number = match kind.format {
                    Format::F32 => random.unit(),
                    Format::Bf16 => bf16::from_f32(random.unit()).to_f32(),
                    Format::F16 => f16::from_f32(random.unit()).to_f32(),
                    Format::Int8 => random.below(256) as f32 - 128.0,
                    Format::Int4 => random.below(16) as f32 - 8.0,
                };
            }
        }
        let mut scales = vec![0f32; if kind.format.is_scaled() { rows * padded / kind.group } else { 0 }];
        for scale in &mut scales {
            let wide = (random.unit() + 1.1) / 100.0;
            *scale = if kind.half_scales { f16::from_f32(wide).to_f32() } else { bf16::from_f32(wide).to_f32() };
        }
        Matrix { kind, rows, columns: padded, numbers, scales }
    }

    /// One of its numbers without its scale.
    pub fn number(&self, row: usize, column: usize) -> f32 {
        self.numbers[row * self.columns + column]
    }

    pub fn scale(&self, row: usize, column: usize) -> f32 {
        if !self.kind.format.is_scaled() {
            return 1.0;
        }
        self.scales[row * (self.columns / self.kind.group) + column / self.kind.group]
    }

    pub fn value(&self, row: usize, column: usize) -> f64 {
        f64::from(self.number(row, column)) * f64::from(self.scale(row, column))
    }

    /// Makes a row that of another matrix of the same kind.
    pub fn copy_row_of(&mut self, other: &Matrix, row: usize) {
        let columns = row * self.columns..(row + 1) * self.columns;
        self.numbers[columns.clone()].copy_from_slice(&other.numbers[columns]);
        let groups = self.scales.len() / self.rows;
        let groups = row * groups..(row + 1) * groups;
        self.scales[groups.clone()].copy_from_slice(&other.scales[groups]);
    }

    /// Makes a row the same as another.
    pub fn repeat_row(&mut self, from: usize, to: usize) {
        let columns = self.columns;
        self.numbers.copy_within(from * columns..(from + 1) * columns, to * columns);
        let groups = self.scales.len() / self.rows;
        self.scales.copy_within(from * groups..(from + 1) * groups, to * groups);
    }

    /// Its words in panels of sixteen rows, lines of one word each.
    fn lines(&self) -> Vec<u8> {
        let per_line = self.kind.format.columns_per_line();
        let mut bytes = Vec::new();
        for panel in 0..self.rows.div_ceil(16) {
            for line in 0..self.columns / per_line {
                for row in panel * 16..panel * 16 + 16 {
                    let number = |column: usize| {
                        if row < self.rows { self.number(row, line * per_line + column) } else { 0.0 }
                    };
                    bytes.extend(word(self.kind.format, number).to_le_bytes());
                }
            }
        }
        bytes
    }

    fn scale_bits(&self) -> Vec<u16> {
        let mut bits = Vec::new();
        for panel in 0..self.rows.div_ceil(16) {
            for column in (0..self.columns).step_by(self.kind.group) {
                for row in panel * 16..panel * 16 + 16 {
                    let scale = if row < self.rows { self.scale(row, column) } else { 0.0 };
                    let (half, brain) = (f16::from_f32(scale).to_bits(), bf16::from_f32(scale).to_bits());
                    bits.push(if self.kind.half_scales { half } else { brain });
                }
            }
        }
        bits
    }

    pub fn upload<'a>(&self, device: &'a Device) -> DeviceMatrix<'a> {
        let is_scaled = self.kind.format.is_scaled();
        let lines = device.array(&self.lines());
        let scales = device.array(&if is_scaled { self.scale_bits() } else { Vec::new() });
        let arguments = MatrixArguments {
            lines: lines.pointer(),
            scales: if is_scaled { scales.pointer().cast() } else { std::ptr::null() },
            rows: self.rows as u32,
            columns: self.columns as u32,
            group_shift: (self.kind.group / 32).trailing_zeros(),
            half_scales: self.kind.half_scales.into(),
        };
        DeviceMatrix { lines, scales, arguments }
    }
}

impl DeviceMatrix<'_> {
    pub fn arguments(&self) -> MatrixArguments {
        assert!(self.lines.address() != 0 && self.scales.address() != 0);
        self.arguments
    }

    pub fn panels(&self) -> usize {
        self.arguments.rows.div_ceil(16) as usize
    }
}

/// The columns of one row in one line.
fn word(format: Format, number: impl Fn(usize) -> f32) -> u32 {
    let whole = |column: usize| number(column) as i32;
    match format {
        Format::F32 => number(0).to_bits(),
        Format::Bf16 => (0..2).map(|column| u32::from(bf16::from_f32(number(column)).to_bits()) << (16 * column)).sum(),
        Format::F16 => (0..2).map(|column| u32::from(f16::from_f32(number(column)).to_bits()) << (16 * column)).sum(),
        Format::Int8 => (0..4).map(|column| ((whole(column) + 128) as u32) << (8 * column)).sum(),
        Format::Int4 => {
            let place = |column: usize| 8 * (column % 4) + if column < 4 { 0 } else { 4 };
            (0..8).map(|column| ((whole(column) + 8) as u32) << place(column)).sum()
        }
    }
}

/// `[rows, stride]` on the device, in f32, int8, bf16 and f16, zeros past `columns`.
pub struct Activations<'a> {
    pub rows: usize,
    pub stride: usize,
    pub numbers: Vec<f32>,
    pub integers: Vec<i8>,
    pub blocks: Vec<(f32, i32)>,
    on_device: (Array<'a, f32>, Array<'a, i8>, Array<'a, BlockArguments>),
    bf16_on_device: Array<'a, u16>,
    f16_on_device: Array<'a, u16>,
}

impl<'a> Activations<'a> {
    pub fn random(device: &'a Device, random: &mut Random, rows: usize, columns: usize) -> Activations<'a> {
        let stride = columns.next_multiple_of(128);
        let mut numbers = vec![0f32; rows * stride];
        for row in numbers.chunks_mut(stride) {
            row[..columns].fill_with(|| random.unit() * 3.0);
        }
        Activations::of(device, numbers, stride)
    }

    pub fn of(device: &'a Device, numbers: Vec<f32>, stride: usize) -> Activations<'a> {
        let (mut integers, mut blocks) = (Vec::new(), Vec::new());
        for block in numbers.chunks(32) {
            let (whole, scale) = rounded(block);
            blocks.push((scale, whole.iter().map(|number| i32::from(*number)).sum()));
            integers.extend(whole);
        }
        let arguments: Vec<_> = blocks.iter().map(|(scale, sum)| BlockArguments { scale: *scale, sum: *sum }).collect();
        let on_device = (device.array(&numbers), device.array(&integers), device.array(&arguments));
        let halves = |to_half: fn(f32) -> u16| device.array(&numbers.iter().copied().map(to_half).collect::<Vec<_>>());
        let bf16_on_device = halves(|number| bf16::from_f32(number).to_bits());
        let f16_on_device = halves(|number| f16::from_f32(number).to_bits());
        let rows = numbers.len() / stride;
        Activations { rows, stride, numbers, integers, blocks, on_device, bf16_on_device, f16_on_device }
    }

    /// As weights of a format take them.
    pub fn arguments(&self, index: Option<&Array<u32>>, format: Format) -> ActivationArguments {
        let (numbers, integers, blocks) = &self.on_device;
        ActivationArguments {
            numbers: numbers.pointer(),
            integers: integers.pointer().cast(),
            blocks: blocks.pointer(),
            halves: match format {
                Format::Bf16 => self.bf16_on_device.pointer(),
                Format::F16 => self.f16_on_device.pointer(),
                _ => std::ptr::null(),
            },
            index: index.map_or(std::ptr::null(), |index| index.pointer()),
            stride: self.stride as u32,
        }
    }

    /// What a matrix of a format meets.
    pub fn value(&self, row: usize, column: usize, format: Format) -> f64 {
        let at = row * self.stride + column;
        if format.is_scaled() {
            f64::from(self.integers[at]) * f64::from(self.blocks[at / 32].0)
        } else {
            f64::from(self.numbers[at])
        }
    }
}

/// Columns of one row as they meet weights of a format on tensor cores.
pub fn tensor_row(x: &Activations, row: usize, format: Format) -> Vec<f64> {
    let column = |column: usize| {
        let number = x.numbers[row * x.stride + column];
        match format {
            Format::Bf16 => bf16::from_f32(number).to_f64(),
            Format::F16 => f16::from_f32(number).to_f64(),
            _ => x.value(row, column, format),
        }
    };
    (0..x.stride).map(column).collect()
}

/// Whole numbers and their scale.
pub fn rounded(numbers: &[f32]) -> (Vec<i8>, f32) {
    if numbers.iter().any(|number| !number.is_finite()) {
        return (vec![0; numbers.len()], f32::NAN);
    }
    let absmax = numbers.iter().fold(0f32, |max, number| max.max(number.abs()));
    let scale = absmax / 127.0;
    if scale < f32::MIN_POSITIVE {
        return (vec![0; numbers.len()], 0.0);
    }
    let inverse = 127.0 / absmax;
    (numbers.iter().map(|number| (number * inverse).round_ties_even() as i8).collect(), scale)
}

/// `weights[row] . x[token]`, and the sum of magnitudes, which says how far rounding may go.
pub fn product(weights: &Matrix, row: usize, x: &Activations, token: usize) -> (f64, f64) {
    let terms =
        (0..weights.columns).map(|column| weights.value(row, column) * x.value(token, column, weights.kind.format));
    terms.fold((0.0, 0.0), |(sum, magnitude), term| (sum + term, magnitude + term.abs()))
}

/// What products may be off, as a part of the sum of magnitudes: two dozen roundings of f32 one after the other at
/// most, and those of the two scales.
pub const PRODUCT_ERROR: f64 = 2e-6;
