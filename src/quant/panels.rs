//! The layout of a weight matrix, in memory and in quantised files: panels of sixteen rows, so that a vector's lanes are
//! rows and no sum crosses lanes.
//!
//! A matrix `[rows, columns]` is cut into panels of PANEL_ROWS rows, the last one filled up with zeros. A panel is a
//! sequence of lines of LINE_BYTES bytes, each with a few columns of all its rows; a row's columns are filled up with zeros
//! to whole lines, and to whole groups where there are scales:
//!
//! | format | columns a line | a line |
//! |---|---|---|
//! | f32 | 1 | `[16 rows]` f32 |
//! | bf16 | 2 | `[16 rows][2 columns]` bf16 |
//! | f16 | 2 | `[2 columns][16 rows]` f16 |
//! | int8 | 4 | `[16 rows][4 columns]` u8: the whole number plus 128 |
//! | int4 | 8 | `[16 rows][4]` u8: the low half is column j of the line plus 8, the high half column 4 + j plus 8 |
//!
//! Scales are a second sequence: for each panel `[groups][16 rows]`. Numbers are little-endian. Whole numbers are stored
//! with what makes them unsigned added, because the processors' dot products take one unsigned side.
//! This file is the only one that knows.

use half::{bf16, f16};
use safetensors::Dtype;

use super::format::{Format, Groups};
use super::rounding::{Rounded, round_group};

/// Rows of a panel.
pub const PANEL_ROWS: usize = 16;

/// Bytes of a line: a cache line, and the widest vector.
pub const LINE_BYTES: usize = 64;

/// What is added to the whole numbers of int8 is `1 << INT8_BIAS_BITS`.
pub const INT8_BIAS_BITS: u32 = 7;

/// The same of int4.
pub const INT4_BIAS_BITS: u32 = 3;

/// Bytes of one row in one line.
const WORD: usize = LINE_BYTES / PANEL_ROWS;

/// A matrix's size and format, from which its layout follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub columns: usize,
    /// Of the numbers.
    pub format: Format,
}

impl Shape {
    /// Panels of the matrix.
    pub fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL_ROWS)
    }

    /// Columns in one line.
    pub fn columns_per_line(&self) -> usize {
        match self.format {
            Format::F32 => 1,
            Format::Bf16 | Format::F16 => 2,
            Format::Int8(_) => 4,
            Format::Int4(_) => 8,
        }
    }

    /// Columns with those that fill up the last line or group.
    pub fn padded_columns(&self) -> usize {
        let step = self.format.groups().map_or(self.columns_per_line(), |groups| groups.size);
        self.columns.next_multiple_of(step)
    }

    /// Lines of one panel.
    pub fn lines_per_panel(&self) -> usize {
        self.padded_columns() / self.columns_per_line()
    }

    /// Bytes of the lines of one panel.
    pub fn panel_bytes(&self) -> usize {
        self.lines_per_panel() * LINE_BYTES
    }

    /// Bytes of the scales of one panel; 0 in formats without.
    pub fn panel_scale_bytes(&self) -> usize {
        self.format.groups().map_or(0, |groups| self.padded_columns() / groups.size * PANEL_ROWS * 2)
    }

    /// Bytes of all lines.
    pub fn line_bytes(&self) -> usize {
        self.panels() * self.panel_bytes()
    }

    /// Bytes of all scales.
    pub fn scale_bytes(&self) -> usize {
        self.panels() * self.panel_scale_bytes()
    }

    /// Bytes of the whole matrix.
    pub fn bytes(&self) -> usize {
        self.line_bytes() + self.scale_bytes()
    }
}

/// Rows of a matrix as a file has them, row-major: `[rows, columns]`.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// BF16, F16 or F32.
    pub dtype: Dtype,
    /// Little-endian numbers.
    pub bytes: &'a [u8],
    /// Numbers in one row.
    pub columns: usize,
    /// How much an error of each column counts, `[columns]`; without it all count the same. Only rounding asks.
    pub importance: Option<&'a [f32]>,
}

impl Source<'_> {
    /// Bytes of one row.
    fn row_bytes(&self) -> usize {
        self.columns * self.dtype.bitsize() / 8
    }

    /// Number `column` of row `row`, widened.
    fn number(&self, row: usize, column: usize) -> f32 {
        let at = row * self.row_bytes();
        match self.dtype {
            Dtype::BF16 => bf16::from_le_bytes(bytes_at(self.bytes, at + 2 * column)).to_f32(),
            Dtype::F16 => f16::from_le_bytes(bytes_at(self.bytes, at + 2 * column)).to_f32(),
            _ => f32::from_le_bytes(bytes_at(self.bytes, at + 4 * column)),
        }
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// Lays rows out as panels: `source` holds the rows of whole panels (the last panel of a matrix may lack rows), `lines` and
/// `scales` are exactly their bytes, all zeros. Rounds where the format is a quantised one, and otherwise only copies or
/// widens: every format but those holds what `source` has, or this panics. Returns how far off rounding is, in all.
pub fn pack(source: &Source, shape: &Shape, lines: &mut [u8], scales: &mut [u8]) -> Rounded {
    assert_eq!(source.columns, shape.columns);
    let row_bytes = source.row_bytes();
    let mut rounded = Rounded::default();
    let panels = lines.chunks_exact_mut(shape.panel_bytes().max(1));
    for (index, lines) in panels.enumerate() {
        let start = index * PANEL_ROWS * row_bytes;
        let end = (start + PANEL_ROWS * row_bytes).min(source.bytes.len());
        let rows = Source { bytes: &source.bytes[start..end], ..*source };
        match (shape.format, source.dtype) {
            (Format::Bf16, Dtype::BF16) | (Format::F32, Dtype::F32) => copy_words(&rows, lines),
            (Format::F16, Dtype::F16) => copy_halves(&rows, lines),
            (Format::F32, _) => widen(&rows, lines),
            (Format::Int8(groups) | Format::Int4(groups), _) => {
                let scale_bytes = shape.panel_scale_bytes();
                let scales = &mut scales[index * scale_bytes..(index + 1) * scale_bytes];
                rounded.add(&round_panel(&rows, shape.format, groups, lines, scales));
            }
            (Format::Bf16 | Format::F16, dtype) => panic!("{dtype} numbers do not fit {}", shape.format.name()),
        }
    }
    rounded
}

/// Words of four bytes, `[rows][words]` to `[words][16 rows]`.
fn copy_words(rows: &Source, lines: &mut [u8]) {
    // Sixteen words of a row are a line of the cache: each is fetched once.
    const BLOCK_WORDS: usize = LINE_BYTES / WORD;
    let row_bytes = rows.row_bytes();
    for (block, lines) in lines.chunks_mut(BLOCK_WORDS * LINE_BYTES).enumerate() {
        for (row, numbers) in rows.bytes.chunks_exact(row_bytes.max(1)).enumerate() {
            let numbers = &numbers[block * LINE_BYTES..((block + 1) * LINE_BYTES).min(row_bytes)];
            for (word, line) in numbers.chunks(WORD).zip(lines.chunks_exact_mut(LINE_BYTES)) {
                // The last word of an odd number of columns is half as long.
                line[row * WORD..row * WORD + word.len()].copy_from_slice(word);
            }
        }
    }
}

/// Halves, `[rows][columns]` to `[columns][16 rows]`.
fn copy_halves(rows: &Source, lines: &mut [u8]) {
    for (row, numbers) in rows.bytes.chunks_exact(rows.row_bytes().max(1)).enumerate() {
        for (number, column) in numbers.chunks_exact(2).zip(lines.chunks_exact_mut(2 * PANEL_ROWS)) {
            column[2 * row..2 * row + 2].copy_from_slice(number);
        }
    }
}

fn widen(rows: &Source, lines: &mut [u8]) {
    for row in 0..rows.bytes.len() / rows.row_bytes().max(1) {
        for (column, line) in lines.chunks_exact_mut(LINE_BYTES).take(rows.columns).enumerate() {
            line[WORD * row..WORD * (row + 1)].copy_from_slice(&rows.number(row, column).to_le_bytes());
        }
    }
}

/// Rounds one panel, group by group.
fn round_panel(rows: &Source, format: Format, groups: Groups, lines: &mut [u8], scales: &mut [u8]) -> Rounded {
    let mut rounded = Rounded::default();
    let (mut numbers, mut integers) = ([0f32; MAX_GROUP], [0i32; MAX_GROUP]);
    let row_count = rows.bytes.len() / rows.row_bytes().max(1);
    for (group, scales) in scales.chunks_exact_mut(2 * PANEL_ROWS).enumerate() {
        let first = group * groups.size;
        let count = groups.size.min(rows.columns - first);
        let importance = rows.importance.map(|importance| &importance[first..first + count]);
        for row in 0..PANEL_ROWS {
            integers.fill(0);
            if row < row_count {
                for (column, number) in numbers[..count].iter_mut().enumerate() {
                    *number = rows.number(row, first + column);
                }
                let (scale, error) =
                    round_group(&numbers[..count], importance, format, groups.scales, &mut integers[..count]);
                scales[2 * row..2 * row + 2].copy_from_slice(&scale);
                rounded.add(&error);
            }
            for (column, integer) in integers[..groups.size].iter().enumerate() {
                put_integer(format, lines, row, first + column, *integer);
            }
        }
    }
    rounded
}

/// The largest group there is.
const MAX_GROUP: usize = 128;

fn put_integer(format: Format, lines: &mut [u8], row: usize, column: usize, integer: i32) {
    let (at, shift, bias) = integer_place(format, row, column);
    lines[at] |= ((integer + bias) as u8) << shift;
}

/// The byte of a panel's lines a whole number is in, the bits it is shifted by, and what is added to it.
fn integer_place(format: Format, row: usize, column: usize) -> (usize, u32, i32) {
    match format {
        Format::Int8(_) => (column / 4 * LINE_BYTES + row * WORD + column % 4, 0, 1 << INT8_BIAS_BITS),
        _ => {
            (column / 8 * LINE_BYTES + row * WORD + column % 4, if column % 8 < 4 { 0 } else { 4 }, 1 << INT4_BIAS_BITS)
        }
    }
}

/// Row `row` of a packed matrix, widened to f32 into `out: [columns]`.
pub fn unpack_row(shape: &Shape, lines: &[u8], scales: &[u8], row: usize, out: &mut [f32]) {
    let (panel, row) = (row / PANEL_ROWS, row % PANEL_ROWS);
    let lines = &lines[panel * shape.panel_bytes()..(panel + 1) * shape.panel_bytes()];
    let scales = &scales[panel * shape.panel_scale_bytes()..(panel + 1) * shape.panel_scale_bytes()];
    let out = &mut out[..shape.columns];
    match shape.format {
        Format::F32 => {
            for (out, line) in out.iter_mut().zip(lines.chunks_exact(LINE_BYTES)) {
                *out = f32::from_le_bytes(bytes_at(line, WORD * row));
            }
        }
        Format::Bf16 => {
            for (out, line) in out.chunks_mut(2).zip(lines.chunks_exact(LINE_BYTES)) {
                for (column, out) in out.iter_mut().enumerate() {
                    *out = bf16::from_le_bytes(bytes_at(line, WORD * row + 2 * column)).to_f32();
                }
            }
        }
        Format::F16 => {
            for (out, column) in out.iter_mut().zip(lines.chunks_exact(2 * PANEL_ROWS)) {
                *out = f16::from_le_bytes(bytes_at(column, 2 * row)).to_f32();
            }
        }
        Format::Int8(groups) | Format::Int4(groups) => {
            let mask = if matches!(shape.format, Format::Int8(_)) { 0xff } else { 0x0f };
            for (column, out) in out.iter_mut().enumerate() {
                let (at, shift, bias) = integer_place(shape.format, row, column);
                let integer = (lines[at] >> shift & mask) as i32 - bias;
                let scale = bytes_at(scales, 2 * (column / groups.size * PANEL_ROWS + row));
                *out = groups.scales.decode(scale) * integer as f32;
            }
        }
    }
}
