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

use std::ops::Range;

use half::{bf16, f16};
use safetensors::Dtype;

use super::format::{Format, Groups, MAX_GROUP};
use super::rounding::{Rounded, round_group};
use crate::parallel::share_out;

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
        columns_per_line(self.format)
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

fn columns_per_line(format: Format) -> usize {
    match format {
        Format::F32 => 1,
        Format::Bf16 | Format::F16 => 2,
        Format::Int8(_) => 4,
        Format::Int4(_) => 8,
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
    /// Rows there are.
    pub fn rows(&self) -> usize {
        self.bytes.len() / self.row_bytes().max(1)
    }

    /// Bytes of one row.
    fn row_bytes(&self) -> usize {
        self.columns * self.dtype.bitsize() / 8
    }

    /// The numbers of row `row` from `column` on, widened, as many as `out` takes.
    pub fn read(&self, row: usize, column: usize, out: &mut [f32]) {
        let size = self.dtype.bitsize() / 8;
        let at = row * self.row_bytes() + column * size;
        let bytes = &self.bytes[at..at + out.len() * size];
        match self.dtype {
            Dtype::BF16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    // Without bf16's care for NaN, whose bits may stay as they are.
                    *out = f32::from_bits((u16::from_le_bytes(*bytes) as u32) << 16);
                }
            }
            Dtype::F16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f16::from_le_bytes(*bytes).to_f32();
                }
            }
            _ => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
        }
    }
}

/// Where a number is that is infinite or none at all, which no scale can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite {
    /// Its row.
    pub row: usize,
    /// Its column.
    pub column: usize,
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// Lays rows out as panels: `source` holds the rows of whole panels (the last panel of a matrix may lack rows), `lines` and
/// `scales` are exactly their bytes, all zeros. Rounds where the format is a quantised one, and otherwise only copies or
/// widens: every format but those holds what `source` has, or this panics. Returns how far off rounding is, in all.
pub fn pack(source: &Source, shape: &Shape, lines: &mut [u8], scales: &mut [u8]) -> Result<Rounded, NotFinite> {
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
                let panel = round_panel(&rows, shape.format, groups, lines, scales);
                rounded.add(&panel.map_err(|at| NotFinite { row: index * PANEL_ROWS + at.row, ..at })?);
            }
            (Format::Bf16 | Format::F16, dtype) => panic!("{dtype} numbers do not fit {}", shape.format.name()),
        }
    }
    Ok(rounded)
}

/// Weights that a thread takes at once.
const SHARE_WEIGHTS: usize = 1 << 18;

/// As [`pack`], with the panels shared out to as many as `threads` threads.
pub fn pack_on(
    threads: usize,
    source: &Source,
    shape: &Shape,
    lines: &mut [u8],
    scales: &mut [u8],
) -> Result<Rounded, NotFinite> {
    // Of one size whatever the number of threads, so that errors are added up in one order.
    let share = (SHARE_WEIGHTS / (PANEL_ROWS * source.columns).max(1)).max(1);
    let rows = source.bytes.chunks((share * PANEL_ROWS * source.row_bytes()).max(1));
    let mut rounded = vec![Rounded::default(); rows.len()];
    let mut scales = scales.chunks_mut((share * shape.panel_scale_bytes()).max(1));
    let parts = rows.zip(lines.chunks_mut((share * shape.panel_bytes()).max(1))).zip(&mut rounded).enumerate();
    let parts = parts.map(|(index, part)| (index, part, scales.next().unwrap_or_default()));
    share_out(threads, parts, |_: &mut (), (index, ((bytes, lines), rounded), scales)| {
        let packed = pack(&Source { bytes, ..*source }, shape, lines, scales);
        *rounded = packed.map_err(|at| NotFinite { row: index * share * PANEL_ROWS + at.row, ..at })?;
        Ok(())
    })?;
    let mut all = Rounded::default();
    rounded.iter().for_each(|part| all.add(part));
    Ok(all)
}

/// Words of four bytes, `[rows][words]` to `[words][16 rows]`.
fn copy_words(rows: &Source, lines: &mut [u8]) {
    // Sixteen words of a row are a line of the cache: each is fetched once.
    const BLOCK_WORDS: usize = LINE_BYTES / WORD;
    let row_bytes = rows.row_bytes();
    for (block, lines) in lines.chunks_mut(BLOCK_WORDS * LINE_BYTES).enumerate() {
        for (row, numbers) in rows.bytes.chunks_exact(row_bytes.max(1)).enumerate() {
            let numbers = &numbers[block * LINE_BYTES..((block + 1) * LINE_BYTES).min(row_bytes)];
            let (words, rest) = numbers.as_chunks::<WORD>();
            let lines = lines.as_chunks_mut::<LINE_BYTES>().0;
            for (word, line) in words.iter().zip(&mut *lines) {
                line[row * WORD..(row + 1) * WORD].copy_from_slice(word);
            }
            // The last word of an odd number of columns is half as long.
            if !rest.is_empty() {
                lines[words.len()][row * WORD..row * WORD + rest.len()].copy_from_slice(rest);
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
    let mut numbers = [0f32; LINE_BYTES];
    for row in 0..rows.rows() {
        for (block, lines) in lines.chunks_mut(numbers.len() * LINE_BYTES).enumerate() {
            let numbers = &mut numbers[..lines.len() / LINE_BYTES];
            rows.read(row, block * LINE_BYTES, numbers);
            for (number, line) in numbers.iter().zip(lines.chunks_exact_mut(LINE_BYTES)) {
                line[WORD * row..WORD * (row + 1)].copy_from_slice(&number.to_le_bytes());
            }
        }
    }
}

/// Rounds one panel, group by group.
fn round_panel(
    rows: &Source,
    format: Format,
    groups: Groups,
    lines: &mut [u8],
    scales: &mut [u8],
) -> Result<Rounded, NotFinite> {
    let mut rounded = Rounded::default();
    let mut numbers = [0f32; MAX_GROUP];
    let row_count = rows.rows();
    let lines = lines.chunks_exact_mut(LINE_BYTES * groups.size / columns_per_line(format));
    for (group, (lines, scales)) in lines.zip(scales.chunks_exact_mut(2 * PANEL_ROWS)).enumerate() {
        let first = group * groups.size;
        let numbers = &mut numbers[..groups.size.min(rows.columns - first)];
        let importance = rows.importance.map(|importance| &importance[first..first + numbers.len()]);
        for row in 0..PANEL_ROWS {
            let mut integers = [0i8; MAX_GROUP];
            if row < row_count {
                rows.read(row, first, numbers);
                if let Some(column) = first_not_finite(numbers) {
                    return Err(NotFinite { row, column: first + column });
                }
                let integers = &mut integers[..numbers.len()];
                let (scale, error) = round_group(numbers, importance, format, groups.scales, integers);
                scales[2 * row..2 * row + 2].copy_from_slice(&scale);
                rounded.add(&error);
            }
            put_integers(format, lines, row, &integers[..groups.size]);
        }
    }
    Ok(rounded)
}

fn first_not_finite(numbers: &[f32]) -> Option<usize> {
    // An infinity or NaN times 0 is NaN, and stays so in a sum.
    let zero: f32 = numbers.iter().map(|number| number * 0.0).sum();
    if zero == 0.0 { None } else { numbers.iter().position(|number| !number.is_finite()) }
}

/// Writes a group of one row to its `lines`: a word in each.
fn put_integers(format: Format, lines: &mut [u8], row: usize, integers: &[i8]) {
    let words = lines.chunks_exact_mut(LINE_BYTES).map(|line| &mut line[row * WORD..(row + 1) * WORD]);
    match format {
        Format::Int8(_) => {
            for (word, integers) in words.zip(integers.as_chunks::<4>().0) {
                word.copy_from_slice(&integers.map(|integer| (integer as u8).wrapping_add(1 << INT8_BIAS_BITS)));
            }
        }
        _ => {
            for (word, integers) in words.zip(integers.as_chunks::<8>().0) {
                let unsigned = integers.map(|integer| (integer + (1 << INT4_BIAS_BITS)) as u8);
                for (column, byte) in word.iter_mut().enumerate() {
                    *byte = unsigned[column] | unsigned[4 + column] << 4;
                }
            }
        }
    }
}

/// Copies lines of f16, `[2 columns][16 rows]` each, to `[16 rows][2 columns]`, as bf16 has them: so devices want both.
pub fn pair_halves(lines: &[u8], out: &mut [u8]) {
    const HALF: usize = size_of::<f16>();
    for (line, out) in lines.as_chunks::<LINE_BYTES>().0.iter().zip(out.as_chunks_mut::<LINE_BYTES>().0) {
        let (first, second) = line.split_at(LINE_BYTES / 2);
        let columns = first.as_chunks::<HALF>().0.iter().zip(second.as_chunks::<HALF>().0);
        for (word, (first, second)) in out.as_chunks_mut::<WORD>().0.iter_mut().zip(columns) {
            *word = [first[0], first[1], second[0], second[1]];
        }
    }
}

/// Takes [`pair_halves`] back, in place.
pub fn unpair_halves(lines: &mut [u8]) {
    for line in lines.as_chunks_mut::<LINE_BYTES>().0 {
        let paired = *line;
        let (first, second) = line.split_at_mut(LINE_BYTES / 2);
        let columns = first.as_chunks_mut::<2>().0.iter_mut().zip(second.as_chunks_mut::<2>().0);
        for ([a, b, c, d], (first, second)) in paired.as_chunks::<WORD>().0.iter().zip(columns) {
            (*first, *second) = ([*a, *b], [*c, *d]);
        }
    }
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

/// Some columns of panel `panel` of a packed matrix, widened to f32: `out[column][row]`, zeros in rows that fill up the last
/// panel.
pub fn unpack_columns(
    shape: &Shape,
    lines: &[u8],
    scales: &[u8],
    panel: usize,
    columns: Range<usize>,
    out: &mut [[f32; PANEL_ROWS]],
) {
    assert!(columns.end <= shape.columns && out.len() == columns.len());
    let lines = &lines[panel * shape.panel_bytes()..(panel + 1) * shape.panel_bytes()];
    let scales = &scales[panel * shape.panel_scale_bytes()..(panel + 1) * shape.panel_scale_bytes()];
    let (lines, per_line) = (lines.as_chunks::<LINE_BYTES>().0, shape.columns_per_line());
    match shape.format {
        Format::F32 => {
            for (out, line) in out.iter_mut().zip(&lines[columns]) {
                for (out, bytes) in out.iter_mut().zip(line.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
        }
        Format::Bf16 => {
            for (out, column) in out.iter_mut().zip(columns) {
                let shift = 16 * (1 - column % per_line) as u32;
                for (out, word) in out.iter_mut().zip(lines[column / per_line].as_chunks().0) {
                    // The upper half of an f32 is a bf16; the second column of a word is its upper half.
                    *out = f32::from_bits(u32::from_le_bytes(*word) << shift & 0xffff_0000);
                }
            }
        }
        Format::F16 => {
            for (out, column) in out.iter_mut().zip(columns) {
                let halves = &lines[column / per_line][column % per_line * LINE_BYTES / 2..][..LINE_BYTES / 2];
                for (out, bytes) in out.iter_mut().zip(halves.as_chunks().0) {
                    *out = f16::from_le_bytes(*bytes).to_f32();
                }
            }
        }
        Format::Int8(groups) | Format::Int4(groups) => {
            let mask = if matches!(shape.format, Format::Int8(_)) { 0xff } else { 0x0f };
            let mut factors = [0f32; PANEL_ROWS];
            let mut group = usize::MAX;
            for (out, column) in out.iter_mut().zip(columns) {
                if group != column / groups.size {
                    group = column / groups.size;
                    let scales = scales[2 * group * PANEL_ROWS..][..2 * PANEL_ROWS].as_chunks().0;
                    for (factor, bytes) in factors.iter_mut().zip(scales) {
                        *factor = groups.scales.decode(*bytes);
                    }
                }
                let (at, shift, bias) = integer_place(shape.format, 0, column);
                let (line, byte) = (&lines[at / LINE_BYTES], at % LINE_BYTES);
                for ((out, word), factor) in out.iter_mut().zip(line.as_chunks::<WORD>().0).zip(&factors) {
                    *out = factor * ((word[byte] >> shift & mask) as i32 - bias) as f32;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{GROUP_SIZES, ScaleDtype};

    /// Numbers that differ, as a file has them.
    fn source_bytes(dtype: Dtype, count: usize) -> Vec<u8> {
        let number = |index: usize| ((index * 2_654_435_761 % 4093) as f32 - 2046.0) / 1024.0;
        let numbers = (0..count).map(number);
        match dtype {
            Dtype::BF16 => numbers.flat_map(|number| bf16::from_f32(number).to_le_bytes()).collect(),
            Dtype::F16 => numbers.flat_map(|number| f16::from_f32(number).to_le_bytes()).collect(),
            _ => numbers.flat_map(f32::to_le_bytes).collect(),
        }
    }

    fn formats() -> Vec<Format> {
        let mut formats = vec![Format::Bf16, Format::F16, Format::F32];
        for size in GROUP_SIZES {
            for scales in ScaleDtype::ALL {
                formats.extend([Format::Int8(Groups { size, scales }), Format::Int4(Groups { size, scales })]);
            }
        }
        formats
    }

    fn packed(source: &Source, shape: &Shape) -> Result<(Vec<u8>, Vec<u8>, Rounded), NotFinite> {
        let (mut lines, mut scales) = (vec![0; shape.line_bytes()], vec![0; shape.scale_bytes()]);
        let rounded = pack(source, shape, &mut lines, &mut scales)?;
        Ok((lines, scales, rounded))
    }

    #[test]
    fn every_row_comes_out_as_it_was_packed() {
        let sizes = [(1, 1), (1, 33), (13, 72), (16, 257), (17, 60), (32, 128), (33, 31), (40, 256), (5, 130), (3, 0)];
        for (rows, columns) in sizes {
            for format in formats() {
                for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
                    let plain = Format::of_dtype(dtype) == Some(format) || format == Format::F32;
                    if !plain && format.groups().is_none() {
                        continue;
                    }
                    let bytes = source_bytes(dtype, rows * columns);
                    let source = Source { dtype, bytes: &bytes, columns, importance: None };
                    let shape = Shape { rows, columns, format };
                    let (lines, scales, rounded) = packed(&source, &shape).unwrap();
                    assert_eq!(lines.len(), shape.panels() * shape.lines_per_panel() * LINE_BYTES);
                    let mut sums = Rounded::default();
                    let first = columns / 3;
                    let mut transposed = vec![[7f32; PANEL_ROWS]; columns - first];
                    let (mut expected, mut found) = (vec![0f32; columns], vec![0f32; columns]);
                    for row in 0..rows {
                        source.read(row, 0, &mut expected);
                        unpack_row(&shape, &lines, &scales, row, &mut found);
                        unpack_columns(&shape, &lines, &scales, row / PANEL_ROWS, first..columns, &mut transposed);
                        let of_row = transposed.iter().map(|column| column[row % PANEL_ROWS]);
                        assert!(of_row.eq(found[first..].iter().copied()), "{format}, {rows} x {columns}, row {row}");
                        if plain {
                            assert_eq!(found, expected, "{format} of {dtype}, {rows} x {columns}, row {row}");
                        }
                        for (found, expected) in found.iter().zip(&expected) {
                            let difference = (*found as f64 - *expected as f64).abs();
                            sums.largest = sums.largest.max(difference);
                            sums.error += difference * difference;
                        }
                    }
                    let name = format!("{format} of {dtype}, {rows} x {columns}");
                    assert!((sums.error - rounded.error).abs() <= 1e-6 * rounded.error, "{name}");
                    assert!((sums.largest - rounded.largest).abs() <= 1e-6 * rounded.largest, "{name}");
                    // The largest number is 2; half a step, and what a better scale for the others takes from it.
                    let most = if format.name() == "int4" { 0.5 } else { 0.02 };
                    assert!(rounded.largest < most, "{name}: {}", rounded.largest);
                }
            }
        }
    }

    #[test]
    fn what_fills_up_panels_lines_and_groups_is_zero_and_changes_nothing() {
        for format in formats().into_iter().filter(|format| format.groups().is_some()) {
            // The same numbers with 3 rows and columns of zeros more have the same bytes where both have something.
            let (rows, columns) = (13, 93);
            let bytes = source_bytes(Dtype::F32, rows * columns);
            let mut padded = vec![0u8; 16 * 128 * 4];
            for row in 0..rows {
                let numbers = &bytes[4 * row * columns..4 * (row + 1) * columns];
                padded[4 * row * 128..][..4 * columns].copy_from_slice(numbers);
            }
            let source = Source { dtype: Dtype::F32, bytes: &bytes, columns, importance: None };
            let padded = Source { bytes: &padded, columns: 128, ..source };
            let (lines, scales, _) = packed(&source, &Shape { rows, columns, format }).unwrap();
            let (all_lines, all_scales, _) = packed(&padded, &Shape { rows: 16, columns: 128, format }).unwrap();
            assert_eq!(lines, all_lines[..lines.len()], "{format}");
            assert_eq!(scales, all_scales[..scales.len()], "{format}");
        }
    }

    #[test]
    fn halves_in_pairs_are_laid_out_as_brains_are() {
        // Numbers both formats hold: the same lines but for the two bytes of each.
        let (rows, columns) = (21, 7);
        let numbers: Vec<f32> = (0..rows * columns).map(|index| index as f32 - 70.0).collect();
        let halves: Vec<u8> = numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes()).collect();
        let brains: Vec<u8> = numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()).collect();
        let of = |format, dtype, bytes: &[u8]| {
            packed(&Source { dtype, bytes, columns, importance: None }, &Shape { rows, columns, format }).unwrap().0
        };
        let (halves, brains) = (of(Format::F16, Dtype::F16, &halves), of(Format::Bf16, Dtype::BF16, &brains));
        let mut pairs = vec![0; halves.len()];
        pair_halves(&halves, &mut pairs);
        let mut back = pairs.clone();
        unpair_halves(&mut back);
        assert_eq!(back, halves);
        let halves = pairs.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32());
        let brains = brains.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32());
        assert!(halves.eq(brains));
    }

    #[test]
    fn any_number_of_threads_gives_the_same_bytes_and_the_same_error() {
        let (rows, columns) = (1203, 1500);
        let mut bytes = source_bytes(Dtype::BF16, rows * columns);
        for format in [Format::INT4, Format::INT8, Format::Bf16, Format::F32] {
            let source = Source { dtype: Dtype::BF16, bytes: &bytes, columns, importance: None };
            let shape = Shape { rows, columns, format };
            let (lines, scales, rounded) = packed(&source, &shape).unwrap();
            for threads in [2, 3, 64] {
                let (mut its_lines, mut its_scales) = (vec![0; lines.len()], vec![0; scales.len()]);
                let error = pack_on(threads, &source, &shape, &mut its_lines, &mut its_scales).unwrap();
                assert!(its_lines == lines && its_scales == scales, "{format}, {threads} threads");
                assert!((error.error - rounded.error).abs() <= 1e-9 * rounded.error);
                assert_eq!((error.count, error.largest), (rounded.count, rounded.largest));
            }
        }
        bytes[2 * (1100 * columns + 7)..][..2].copy_from_slice(&bf16::NAN.to_le_bytes());
        let source = Source { dtype: Dtype::BF16, bytes: &bytes, columns, importance: None };
        let shape = Shape { rows, columns, format: Format::INT8 };
        let (mut lines, mut scales) = (vec![0; shape.line_bytes()], vec![0; shape.scale_bytes()]);
        let refused = pack_on(2, &source, &shape, &mut lines, &mut scales);
        assert_eq!(refused, Err(NotFinite { row: 1100, column: 7 }));
    }

    #[test]
    fn a_number_that_is_not_finite_is_named_by_row_and_column() {
        let (rows, columns) = (37, 70);
        for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for (row, column) in [(0, 0), (36, 69), (17, 31), (16, 64)] {
                let mut bytes = source_bytes(Dtype::BF16, rows * columns);
                bytes[2 * (row * columns + column)..][..2].copy_from_slice(&bf16::from_f32(number).to_le_bytes());
                let source = Source { dtype: Dtype::BF16, bytes: &bytes, columns, importance: None };
                let shape = Shape { rows, columns, format: Format::INT4 };
                assert_eq!(packed(&source, &shape).err(), Some(NotFinite { row, column }));
                assert!(packed(&source, &Shape { format: Format::Bf16, ..shape }).is_ok());
            }
        }
    }

    /// Files carry the layout: these bytes may never change within a version of the format.
    #[test]
    fn the_layout_is_the_one_that_files_have() {
        // Row 0: 1 to 9; row 1: -8 to 0, both with a scale of 1 as they are.
        let numbers: Vec<f32> = (1..10).chain(-8..1).map(|number| number as f32).collect();
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let halves: Vec<u8> = numbers.iter().flat_map(|number| f16::from_f32(*number).to_le_bytes()).collect();
        let brains: Vec<u8> = numbers.iter().flat_map(|number| bf16::from_f32(*number).to_le_bytes()).collect();
        let of = |format, dtype, bytes: &[u8]| {
            let source = Source { dtype, bytes, columns: 9, importance: None };
            packed(&source, &Shape { rows: 2, columns: 9, format }).unwrap()
        };
        let (lines, _, _) = of(Format::F32, Dtype::F32, &bytes);
        assert_eq!(lines.len(), 9 * 64);
        assert_eq!(lines[..8], [1f32.to_le_bytes(), (-8f32).to_le_bytes()].concat());
        assert_eq!(lines[8 * 64..][..8], [9f32.to_le_bytes(), 0f32.to_le_bytes()].concat());

        let (lines, _, _) = of(Format::Bf16, Dtype::BF16, &brains);
        assert_eq!(lines.len(), 5 * 64);
        // 1, 2; -8, -7; then 9 and nothing; 0.
        assert_eq!(lines[..8], [0x80, 0x3f, 0x00, 0x40, 0x00, 0xc1, 0xe0, 0xc0]);
        assert_eq!(lines[4 * 64..][..8], [0x10, 0x41, 0, 0, 0, 0, 0, 0]);

        let (lines, _, _) = of(Format::F16, Dtype::F16, &halves);
        assert_eq!(lines.len(), 5 * 64);
        // Column 0 of sixteen rows, then column 1.
        assert_eq!((&lines[..4], &lines[32..36]), (&[0x00, 0x3c, 0x00, 0xc8][..], &[0x00, 0x40, 0x00, 0xc7][..]));

        let groups = Groups { size: 32, scales: ScaleDtype::Bf16 };
        let exact: Vec<u8> = (-128..-119).chain(-128..-119).flat_map(|n| (n as f32).to_le_bytes()).collect();
        let (lines, scales, rounded) = of(Format::Int8(groups), Dtype::F32, &exact);
        assert_eq!((lines.len(), scales.len(), rounded.error), (8 * 64, 32, 0.0));
        // Four columns of row 0, of row 1, and of rows that are not there; the ninth column; columns that are not there.
        assert_eq!(lines[..12], [0, 1, 2, 3, 0, 1, 2, 3, 128, 128, 128, 128]);
        assert_eq!(lines[2 * 64..][..8], [8, 128, 128, 128, 8, 128, 128, 128]);
        assert_eq!(lines[3 * 64..], [128; 5 * 64]);
        assert_eq!(scales[..6], [0x80, 0x3f, 0x80, 0x3f, 0, 0]);

        let groups = Groups { size: 32, scales: ScaleDtype::F16 };
        let exact: Vec<u8> =
            (-8..1).chain([-16, -14, -12, -10, -8, -6, -4, -2, 14]).flat_map(|n| (n as f32).to_le_bytes()).collect();
        let (lines, scales, rounded) = of(Format::Int4(groups), Dtype::F32, &exact);
        assert_eq!((lines.len(), scales.len(), rounded.error), (4 * 64, 32, 0.0));
        // Columns 0 and 4, 1 and 5, 2 and 6, 3 and 7 of row 0, of row 1, and of rows that are not there; the ninth column.
        assert_eq!(lines[..12], [0x40, 0x51, 0x62, 0x73, 0x40, 0x51, 0x62, 0x73, 0x88, 0x88, 0x88, 0x88]);
        assert_eq!(lines[64..][..8], [0x88, 0x88, 0x88, 0x88, 0x8f, 0x88, 0x88, 0x88]);
        assert_eq!(lines[2 * 64..], [0x88; 2 * 64]);
        assert_eq!(scales[..6], [0x00, 0x3c, 0x00, 0x40, 0, 0]);
    }
}
