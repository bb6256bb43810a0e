//! All rows of all files once: checked, tokenised, counted, and where they are.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::encode::{Encoder, Made};
use super::lines::{self, BYTE_ORDER_MARK, Lines, MAX_LINE_BYTES, SectionFault};
use super::report::{BadRow, DataReport, Fault, MAX_TOLD, RowResult};
use super::row::{Row, parse};
use super::{BadRows, DataFile, DataOptions, LongRows, Rows};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::model::Progress;
use crate::train::document::Document;

/// Where a document or a pair is. Documents of one section have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where its row begins in its file, in bytes; of a text file, its section.
    pub offset: u64,
    /// Where its section begins in the text of its row, in bytes.
    pub section: u32,
    /// The lower half of the hash of its row, or of a text file's section.
    pub hash: u32,
}

impl Entry {
    /// Rises from entry to entry of a file.
    pub fn place(&self) -> (u64, u32) {
        (self.offset, self.section)
    }
}

/// A part of a text that is tokenised by itself.
pub struct TextSection<'a> {
    pub start: usize,
    pub text: &'a str,
    pub is_last: bool,
}

/// The sections of a text.
pub fn sections(text: &str, most: usize) -> impl Iterator<Item = TextSection<'_>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let rest = &text[start..];
        let end = lines::section_end(rest, most);
        let section = TextSection { start, text: &rest[..end], is_last: end == rest.len() };
        start += end;
        (end > 0).then_some(section)
    })
}

/// A pass over all files, and what it has found so far.
pub struct Scan<'a> {
    encoder: &'a Encoder<'a>,
    rows: Rows,
    options: &'a DataOptions,
    progress: &'a Progress,
    pub files: Vec<DataFile>,
    pub entries: Vec<Entry>,
    pub report: DataReport,
    /// Of the hashes of all rows.
    pub hasher: Xxh3,
    pub buffer: Vec<u8>,
}

/// What there is before a row.
struct Mark {
    entries: usize,
    tokens: u64,
    targets: u64,
    longest: usize,
}

/// Where a row is.
struct Place<'a> {
    path: &'a Path,
    line: u64,
}

impl<'a> Scan<'a> {
    pub fn new(encoder: &'a Encoder, rows: Rows, options: &'a DataOptions, progress: &'a Progress) -> Scan<'a> {
        Scan {
            encoder,
            rows,
            options,
            progress,
            files: Vec::new(),
            entries: Vec::new(),
            report: DataReport::default(),
            hasher: Xxh3::new(),
            buffer: Vec::new(),
        }
    }

    /// Goes through all files.
    pub fn run(mut self, paths: &[PathBuf]) -> Result<Self> {
        self.files = try_with_capacity("files of data", paths.len())?;
        let mut bytes = 0u64;
        for path in paths {
            bytes = bytes.saturating_add(lines::open(path)?.1);
        }
        self.progress.begin(bytes);
        for path in paths {
            let is_text = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("txt"));
            self.files.push(DataFile { path: path.clone(), is_text, first: self.entries.len() });
            let rows = self.report.rows;
            let scanned = if is_text { self.scan_text(path) } else { self.scan_lines(path) };
            scanned.map_err(|error| error.in_file(path.display().to_string()))?;
            if self.report.rows == rows {
                let text = "has no rows, expected JSON Lines: an object on each line";
                return Err(Error::new(Status::DataRow, text).in_file(path.display().to_string()));
            }
        }
        if self.entries.is_empty() {
            let told = self.report.left_out.first().map_or(String::new(), |row| format!("; the first: {row}"));
            let text = format!("none of {} rows can be used{told}", self.report.rows);
            return Err(Error::new(Status::DataRow, text));
        }
        self.report.documents = self.entries.len() as u64;
        Ok(self)
    }

    fn scan_lines(&mut self, path: &Path) -> Result<()> {
        let file = lines::open(path)?.0;
        let mut lines = Lines::at(&file, 0, 128 << 10, std::mem::take(&mut self.buffer))?;
        let mut before = 0;
        while let Some(line) = lines.next()? {
            self.check_cancelled()?;
            if line.is_blank() {
                self.report.blank += 1;
            } else {
                self.report.rows += 1;
                self.hasher.update(&line.hash.to_le_bytes());
                let entry = Entry { offset: line.offset, section: 0, hash: line.hash as u32 };
                let before = self.mark();
                let added = match line.bytes {
                    Some(bytes) => self.add_row(bytes, entry),
                    None => Fault::bad(format!("is longer than {MAX_LINE_BYTES} bytes, the most a row may have")),
                };
                self.settle(added, Place { path, line: line.number }, before)?;
            }
            self.progress.advance(line.end - before);
            before = line.end;
        }
        self.buffer = lines.into_buffer();
        Ok(())
    }

    /// Adds what a row becomes. After a fault some of it may have been added, which `settle` takes out again.
    fn add_row(&mut self, bytes: &[u8], entry: Entry) -> RowResult<()> {
        let row = parse(bytes, self.rows)?;
        let Row::Text(text) = &row else {
            let (documents, is_cut) = match &self.encoder.row(&row)? {
                Some(Made::Document(encoded)) => ([Some(size(&encoded.made)), None], encoded.is_cut),
                Some(Made::Pair(encoded)) => {
                    ([Some(size(&encoded.made.chosen)), Some(size(&encoded.made.rejected))], encoded.is_cut)
                }
                None => ([None, None], false),
            };
            let sizes = documents.into_iter().flatten();
            let (tokens, targets) = sizes.fold((0, 0), |sum, size| (sum.0 + size.0, sum.1 + size.1));
            self.report.cut += u64::from(is_cut);
            return Ok(self.add(entry, tokens, targets)?);
        };
        let mut documents = 0;
        for section in sections(text, self.encoder.section_bytes()) {
            // Lines are at most 16 MiB long.
            let entry = Entry { section: section.start as u32, ..entry };
            documents += self.add_section(section.text, section.is_last, entry)?;
            if documents > 1 && self.options.long_rows != LongRows::Cut {
                return Err(self.encoder.too_long());
            }
        }
        self.report.split += u64::from(documents > 1);
        Ok(())
    }

    /// Adds the documents of a section; tells how many they are.
    fn add_section(&mut self, text: &str, is_last: bool, entry: Entry) -> Result<usize> {
        let tokens = self.encoder.section(text, is_last)?.len();
        let parts = self.encoder.parts(tokens);
        for part in 0..parts {
            let length = tokens * (part + 1) / parts - tokens * part / parts;
            self.add(entry, length + 1, length)?;
        }
        Ok(parts)
    }

    fn add(&mut self, entry: Entry, tokens: usize, targets: usize) -> Result<()> {
        if self.entries.len() == u32::MAX as usize {
            let text = format!("there are more than {} documents", u32::MAX);
            return Err(Error::new(Status::InvalidArgument, text));
        }
        self.entries.try_reserve(1).map_err(|_| {
            Error::out_of_memory("the index of data", self.entries.len().saturating_mul(size_of::<Entry>()))
        })?;
        self.entries.push(entry);
        self.report.tokens += tokens as u64;
        self.report.targets += targets as u64;
        self.report.longest = self.report.longest.max(tokens);
        Ok(())
    }

    fn mark(&self) -> Mark {
        let DataReport { tokens, targets, longest, .. } = self.report;
        Mark { entries: self.entries.len(), tokens, targets, longest }
    }

    /// Counts a row, or leaves it out, or refuses it, as it is asked for. `before` is what there was before it.
    fn settle(&mut self, added: RowResult<()>, place: Place, before: Mark) -> Result<()> {
        let (reason, is_long) = match added {
            Ok(()) => {
                self.report.good += 1;
                return Ok(());
            }
            Err(Fault::Stop(error)) => return Err(error),
            Err(Fault::Bad(reason)) => (reason, false),
            Err(Fault::Long(reason)) => (reason, true),
        };
        let row = BadRow { file: place.path.display().to_string(), line: place.line, reason };
        let is_refused = match is_long {
            true => self.options.long_rows == LongRows::Refuse,
            false => self.options.bad_rows == BadRows::Refuse,
        };
        if is_refused {
            return Err(row.error());
        }
        self.entries.truncate(before.entries);
        let Mark { tokens, targets, longest, .. } = before;
        (self.report.tokens, self.report.targets, self.report.longest) = (tokens, targets, longest);
        self.report.skipped += 1;
        self.report.too_long += u64::from(is_long);
        if self.report.left_out.len() < MAX_TOLD {
            self.report.left_out.push(row);
        }
        Ok(())
    }

    fn scan_text(&mut self, path: &Path) -> Result<()> {
        let before = self.mark();
        self.report.rows += 1;
        if self.rows == Rows::Pairs {
            return self.settle(Fault::bad("is a text, expected JSON Lines of pairs"), Place { path, line: 1 }, before);
        }
        let (mut file, bytes) = lines::open(path)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        let before_bytes = self.progress.bytes_read();
        let (mut offset, mut line, mut documents) = (0u64, 1, 0);
        let added = loop {
            self.check_cancelled()?;
            let section = match lines::read_section(&mut file, offset, self.encoder.section_bytes(), &mut buffer) {
                Ok(section) => section,
                Err(SectionFault::Stop(error)) => return Err(error),
                Err(SectionFault::Utf8(at)) => {
                    line += line_ends(&buffer[..at]);
                    break Fault::bad(format!("is not UTF-8 from byte {} of the file on", offset + at as u64));
                }
            };
            if offset == 0 && section.text.as_bytes().starts_with(BYTE_ORDER_MARK) {
                offset = BYTE_ORDER_MARK.len() as u64;
                continue;
            }
            if section.is_last && documents == 0 && section.text.trim().is_empty() {
                break Fault::bad("is empty, expected a text");
            }
            self.hasher.update(&section.hash.to_le_bytes());
            let entry = Entry { offset, section: 0, hash: section.hash as u32 };
            documents += self.add_section(section.text, section.is_last, entry)?;
            offset += section.text.len() as u64;
            line += line_ends(section.text.as_bytes());
            self.progress.advance(section.text.len() as u64);
            if section.is_last {
                self.report.split += u64::from(documents > 1);
                break Ok(());
            }
        };
        self.buffer = buffer;
        // The rest of a bad one, or the byte order mark.
        self.progress.advance((before_bytes + bytes).saturating_sub(self.progress.bytes_read()));
        self.settle(added, Place { path, line }, before)
    }

    fn check_cancelled(&self) -> Result<()> {
        self.progress.check().map_err(|error| Error::new(error.status(), "reading the data was cancelled"))
    }
}

/// Tokens of a document, and those that are learned.
fn size(document: &Document) -> (usize, usize) {
    (document.tokens.len(), document.targets())
}

fn line_ends(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}
