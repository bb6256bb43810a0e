//! Figures printed for people and, where `GEMMOE_BENCH_JSON` names a file, written there as JSON.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::figure::Figure;

/// The rows of one bench.
pub struct Report {
    figures: Map<String, Value>,
}

impl Report {
    /// Prints the heading.
    pub fn new() -> Report {
        Figure::print_heading();
        Report { figures: Map::new() }
    }

    /// Prints a row, its values multiplied by `scale`, and keeps it under `key`.
    pub fn row(&mut self, key: &str, name: &str, unit: &str, values: &[f64], scale: f64) {
        let figure = Figure::of(values, scale);
        figure.print_row(&format!("{name}, {unit}"), "");
        self.figures.insert(key.to_owned(), figure.json(unit));
    }

    /// Writes `{key: {"median": ..., "lowest": ..., "highest": ..., "unit": ...}, ...}` to the file that is asked for.
    pub fn write(self) {
        let Some(path) = std::env::var_os("GEMMOE_BENCH_JSON").map(PathBuf::from) else { return };
        let text = format!("{:#}\n", Value::Object(self.figures));
        std::fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
