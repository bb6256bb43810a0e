//! Data: files of rows, which are documents or pairs of answers, read from the disk when they are needed.
//!
//! [`row`] knows the shapes of rows and [`value`] their JSON; [`encode`] makes token ids of them, those of conversations with
//! [`turns`]; [`lines`] reads files, [`scan`] goes through all of them once, and [`report`] is what it found. What is held of a document is 16 bytes, so that files may be larger
//! than memory. `docs/training-data.md` says what may be in them.

mod encode;
mod lines;
mod order;
mod report;
mod row;
mod scan;
mod turns;
mod value;

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use crate::engine::Model;
use crate::error::{Error, Result, Status};
use crate::model::Progress;
use crate::train::document::Document;
use crate::train::trainer::{MAX_TOKENS, Pair};
use encode::{Encoder, Made};
use report::{Fault, RowResult};
use row::Row;
use scan::{Entry, Scan, sections};

pub use order::shuffled;
pub use report::{BadRow, DataReport};

/// What a row is learned as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rows {
    /// Documents, by their likelihood.
    #[default]
    Texts,
    /// Pairs of answers, by which is preferred.
    Pairs,
}

/// What happens to a row that is too long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LongRows {
    /// A text becomes several documents, a response is cut at its end; both are counted.
    #[default]
    Cut,
    /// It is left out, and counted.
    Skip,
    /// It is an error.
    Refuse,
}

impl LongRows {
    /// All of them, the default first.
    pub const ALL: [LongRows; 3] = [LongRows::Cut, LongRows::Skip, LongRows::Refuse];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            LongRows::Cut => "cut",
            LongRows::Skip => "skip",
            LongRows::Refuse => "refuse",
        }
    }
}

/// What happens to a row that cannot be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BadRows {
    /// It is an error, which names its file and line.
    #[default]
    Refuse,
    /// It is left out, and counted; the report has the first ones.
    Skip,
}

impl BadRows {
    /// All of them, the default first.
    pub const ALL: [BadRows; 2] = [BadRows::Refuse, BadRows::Skip];

    /// Its name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            BadRows::Refuse => "refuse",
            BadRows::Skip => "skip",
        }
    }
}

/// How data is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataOptions {
    /// Most tokens of a document; of a pair, both together. At most `TrainOptions::max_tokens`.
    pub max_tokens: usize,
    /// What happens to rows that have more.
    pub long_rows: LongRows,
    /// What happens to rows that cannot be used.
    pub bad_rows: BadRows,
    /// Prompts are learned too. Those of pairs never are.
    pub learn_prompts: bool,
}

impl Default for DataOptions {
    fn default() -> Self {
        DataOptions { max_tokens: 2048, long_rows: LongRows::Cut, bad_rows: BadRows::Refuse, learn_prompts: false }
    }
}

impl DataOptions {
    /// Fails with `InvalidArgument` where a number is out of range.
    pub fn check(&self, rows: Rows) -> Result<()> {
        // BOS and a token to learn; for two answers twice.
        let least = if rows == Rows::Texts { 2 } else { 4 };
        if (least..=MAX_TOKENS).contains(&self.max_tokens) {
            return Ok(());
        }
        let text = format!("max_tokens is {}, expected {least} to {MAX_TOKENS}", self.max_tokens);
        Err(Error::new(Status::InvalidArgument, text).at_key("max_tokens"))
    }
}

/// Files of rows, checked, of which one document or pair after the other can be had. One thread at a time.
pub struct DataSet {
    model: Arc<Model>,
    rows: Rows,
    options: DataOptions,
    files: Vec<DataFile>,
    /// Documents or pairs, in the order of the files and their rows.
    entries: Vec<Entry>,
    report: DataReport,
    fingerprint: u64,
    /// The file that was read last.
    open: Option<(usize, File)>,
    buffer: Vec<u8>,
    /// Tokens of the section that was read last: its documents are often asked for one after the other.
    held: Option<(u64, Vec<u32>)>,
}

/// One file of a data set.
struct DataFile {
    path: PathBuf,
    is_text: bool,
    /// The first of its entries.
    first: usize,
}

impl DataSet {
    /// Reads, checks and tokenises all rows of some files once: JSON Lines, or one text each where they are named `.txt`.
    /// `progress` counts their bytes, and may be cancelled.
    ///
    /// Fails with `DataRow`, which names file and line, `FileNotFound`, `FileNotAllowed`, `ReadFailed`, `NoTokenizer`, `InvalidArgument`
    /// (the options), `Cancelled`, `OutOfMemory`, and as a broken chat template does.
    pub fn open(
        model: &Arc<Model>,
        files: &[PathBuf],
        rows: Rows,
        options: &DataOptions,
        progress: &Progress,
    ) -> Result<DataSet> {
        options.check(rows)?;
        if files.is_empty() {
            return Err(Error::new(Status::InvalidArgument, "no files of data are given").at_key("files"));
        }
        let encoder = Encoder::new(model, options)?;
        let found = Scan::new(&encoder, rows, options, progress).run(files)?;
        Ok(DataSet {
            model: Arc::clone(model),
            rows,
            options: *options,
            files: found.files,
            entries: found.entries,
            report: found.report,
            fingerprint: found.hasher.digest(),
            open: None,
            buffer: found.buffer,
            held: None,
        })
    }

    /// Documents, or pairs.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none. Never so: that is an error of `open`.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What rows are learned as.
    pub fn rows(&self) -> Rows {
        self.rows
    }

    /// What was found in the files.
    pub fn report(&self) -> &DataReport {
        &self.report
    }

    /// Of the bytes of all rows in their order, those left out among them. Names of files and blank lines make no difference.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// The document of this index, in `0..len()`. Fails with `DataChanged` where its row is another than it was, `InvalidArgument`
    /// (pairs, or no such index), `ReadFailed`, and as `open` does.
    pub fn document(&mut self, index: usize) -> Result<Document> {
        match self.read(index, Rows::Texts)? {
            Read::Document(document) => Ok(document),
            Read::Pair(_) => Err(self.changed(index)),
        }
    }

    /// The pair of this index, in `0..len()`, without its reference. Errors as `document`.
    pub fn pair(&mut self, index: usize) -> Result<Pair> {
        match self.read(index, Rows::Pairs)? {
            Read::Pair(pair) => Ok(pair),
            Read::Document(_) => Err(self.changed(index)),
        }
    }

    fn read(&mut self, index: usize, wanted: Rows) -> Result<Read> {
        if wanted != self.rows {
            let text = format!("the data is read as {:?}, and {wanted:?} are asked for", self.rows);
            return Err(Error::new(Status::InvalidArgument, text));
        }
        if index >= self.entries.len() {
            let text = format!("index is {index}, expected less than {}", self.entries.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("index"));
        }
        // Files without entries have the same first one as the next.
        let file = self.files.partition_point(|file| file.first <= index) - 1;
        let path = self.files[file].path.display().to_string();
        self.read_entry(file, index).map_err(|fault| match fault {
            Fault::Stop(error) => error.in_file(path),
            // It was good when it was first read.
            Fault::Bad(_) | Fault::Long(_) => self.changed(index),
        })
    }

    fn read_entry(&mut self, file: usize, index: usize) -> RowResult<Read> {
        let first = self.files[file].first;
        let entry = self.entries[index];
        // Documents of one section have entries that are all the same.
        let part =
            index - first - self.entries[first..index].partition_point(|earlier| earlier.place() < entry.place());
        let encoder = Encoder::new(&self.model, &self.options)?;
        // The first entry of a section is what it is known by.
        if let Some((held, tokens)) = &self.held
            && *held == (index - part) as u64
        {
            return Ok(Read::Document(encoder.part(tokens, part)?));
        }
        if self.open.as_ref().is_none_or(|(opened, _)| *opened != file) {
            self.open = Some((file, lines::open(&self.files[file].path)?.0));
        }
        let Some((_, opened)) = &mut self.open else { return Err(self.changed(index).into()) };
        let tokens = if self.files[file].is_text {
            let read = lines::read_section(opened, entry.offset, encoder.section_bytes(), &mut self.buffer);
            match read {
                Ok(section) if section.hash as u32 == entry.hash => encoder.section(section.text, section.is_last)?,
                Err(lines::SectionFault::Stop(error)) => return Err(error.into()),
                _ => return Err(self.changed(index).into()),
            }
        } else {
            let mut lines = lines::Lines::at(opened, entry.offset, 8 << 10, std::mem::take(&mut self.buffer))?;
            let row = match lines.next()? {
                Some(line) if line.hash as u32 == entry.hash => line.bytes.map(|bytes| row::parse(bytes, self.rows)),
                _ => None,
            };
            self.buffer = lines.into_buffer();
            let Some(row) = row else { return Err(self.changed(index).into()) };
            match row? {
                Row::Text(text) => {
                    let mut sections = sections(&text, encoder.section_bytes());
                    let section = sections.find(|section| section.start == entry.section as usize);
                    let Some(section) = section else { return Err(self.changed(index).into()) };
                    encoder.section(section.text, section.is_last)?
                }
                row => {
                    return match encoder.row(&row)? {
                        Some(Made::Document(encoded)) => Ok(Read::Document(encoded.made)),
                        Some(Made::Pair(encoded)) => Ok(Read::Pair(encoded.made)),
                        None => Err(self.changed(index).into()),
                    };
                }
            }
        };
        if part >= encoder.parts(tokens.len()) {
            return Err(self.changed(index).into());
        }
        let document = encoder.part(&tokens, part)?;
        self.held = Some(((index - part) as u64, tokens));
        Ok(Read::Document(document))
    }

    /// The error of a row that is another than it was.
    fn changed(&self, index: usize) -> Error {
        let offset = self.entries[index].offset;
        let file = self.files.partition_point(|file| file.first <= index) - 1;
        let text = format!("has changed since it was opened: the row at byte {offset} is another one");
        Error::new(Status::DataChanged, text).in_file(self.files[file].path.display().to_string())
    }
}

enum Read {
    Document(Document),
    Pair(Pair),
}
