//! One matrix on its way into a directory, rounded: a few panels at a time.

use crate::error::{Error, Result};
use crate::memory::try_vec;
use crate::model::ModelWriter;
use crate::model::names;
use crate::model::writer::NewTensor;
use crate::quant::{LINE_BYTES, NotFinite, PANEL_ROWS, Rounded, Shape, Source, pack_on};

use safetensors::Dtype;

/// The tensors a matrix is stored as: itself, or its lines and its scales where its format is a quantised one.
pub fn stored_tensors(matrix: NewTensor, shape: Option<&Shape>) -> Vec<NewTensor> {
    let Some((shape, groups)) = shape.and_then(|shape| Some((shape, shape.format.groups()?))) else {
        return vec![matrix];
    };
    let lines = vec![shape.panels(), shape.lines_per_panel(), LINE_BYTES];
    let scales = vec![shape.panels(), shape.padded_columns() / groups.size, PANEL_ROWS];
    let name = names::scales(&matrix.name);
    vec![
        NewTensor { dtype: Dtype::U8, shape: lines, ..matrix },
        NewTensor { name, dtype: groups.scales.dtype(), shape: scales },
    ]
}

/// Rounds a matrix of `shape` to tensors `index` and `index + 1` of a writer.
pub struct RoundedMatrix<'a> {
    name: &'a str,
    shape: Shape,
    index: usize,
    threads: usize,
    lines: Vec<u8>,
    scales: Vec<u8>,
    /// How far off it is, up to now.
    pub rounded: Rounded,
}

impl<'a> RoundedMatrix<'a> {
    /// One of which nothing is written yet. `name` is for messages.
    pub fn new(name: &'a str, shape: Shape, index: usize, threads: usize) -> RoundedMatrix<'a> {
        RoundedMatrix {
            name,
            shape,
            index,
            threads,
            lines: Vec::new(),
            scales: Vec::new(),
            rounded: Rounded::default(),
        }
    }

    /// Writes rows from the first of panel `first` on; the first call has most. `not_finite` makes the error of a number that
    /// cannot be rounded, its row counted from the matrix's first.
    pub fn write(
        &mut self,
        writer: &mut ModelWriter,
        first: usize,
        source: &Source,
        not_finite: &dyn Fn(NotFinite) -> Error,
    ) -> Result<()> {
        let (shape, panels) = (self.shape, source.rows().div_ceil(PANEL_ROWS));
        if self.lines.is_empty() {
            self.lines = try_vec(self.name, panels * shape.panel_bytes(), 0u8)?;
            self.scales = try_vec(self.name, panels * shape.panel_scale_bytes(), 0u8)?;
        }
        let lines = &mut self.lines[..panels * shape.panel_bytes()];
        let scales = &mut self.scales[..panels * shape.panel_scale_bytes()];
        // Rows that fill up the last panel are not written.
        lines.fill(0);
        scales.fill(0);
        let rounded = pack_on(self.threads, source, &shape, lines, scales)
            .map_err(|at| not_finite(NotFinite { row: first * PANEL_ROWS + at.row, ..at }))?;
        self.rounded.add(&rounded);
        writer.write(self.index, (first * shape.panel_bytes()) as u64, lines)?;
        writer.write(self.index + 1, (first * shape.panel_scale_bytes()) as u64, scales)
    }
}
