//! What was found in data: how much of it is used, and why the rest is not.

use std::fmt;

use crate::error::{Error, Status};

/// The most left-out rows that are told one by one.
pub const MAX_TOLD: usize = 20;

/// What was found in all files of a data set. `good + skipped` is `rows`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataReport {
    /// Lines that are not blank, and text files.
    pub rows: u64,
    /// Rows that are used.
    pub good: u64,
    /// Blank lines, which are no rows.
    pub blank: u64,
    /// Good rows whose responses were cut at their end, for they were too long.
    pub cut: u64,
    /// Good rows that became several documents.
    pub split: u64,
    /// Rows that are left out.
    pub skipped: u64,
    /// Those among them that are left out for their length.
    pub too_long: u64,
    /// The first of the rows that are left out.
    pub left_out: Vec<BadRow>,
    /// Documents or pairs.
    pub documents: u64,
    /// Tokens of all of them.
    pub tokens: u64,
    /// Tokens that are learned.
    pub targets: u64,
    /// Tokens of the longest document; of a pair, both together.
    pub longest: usize,
}

/// A row that is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRow {
    /// Its file's path.
    pub file: String,
    /// Its line, counted from 1.
    pub line: u64,
    /// What is wrong with it.
    pub reason: String,
}

impl BadRow {
    /// The error of it.
    pub fn error(&self) -> Error {
        Error::new(Status::DataRow, format!("line {}: {}", self.line, self.reason)).in_file(&*self.file)
    }
}

impl fmt::Display for BadRow {
    /// `FILE: line 3: what is wrong`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error().fmt(f)
    }
}

/// What a row gives.
pub type RowResult<T> = std::result::Result<T, Fault>;

/// Why a row is not used.
pub enum Fault {
    /// It is wrong.
    Bad(String),
    /// It is longer than it may be.
    Long(String),
    /// Nothing of the row's: there is no memory, for instance.
    Stop(Error),
}

impl Fault {
    /// A row that is wrong; `text` says what.
    pub fn bad<T>(text: impl Into<String>) -> RowResult<T> {
        Err(Fault::Bad(text.into()))
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Fault {
        Fault::Stop(error)
    }
}
