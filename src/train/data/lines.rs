//! The lines of a file, and the sections of a text: read one at a time, and again where they were.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use crate::error::{Error, Result, Status};
use crate::memory::try_vec;

/// The longest line that can be a row, in bytes: of longer ones no more is held.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// What some editors put in front of UTF-8.
pub const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Opens a file that is read more than once. Errors name it.
pub fn open(path: &Path) -> Result<(File, u64)> {
    let fault = |status, text: String| Error::new(status, text).in_file(path.display().to_string());
    let unreadable = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::NotFound => fault(Status::FileNotFound, "there is no such file".to_owned()),
        _ => fault(Status::ReadFailed, format!("cannot be read: {error}")),
    };
    // Before it is opened: opening a pipe waits for somebody who writes.
    let metadata = std::fs::metadata(path).map_err(unreadable)?;
    if metadata.is_dir() {
        return Err(fault(Status::FileNotAllowed, "is a folder, expected a file of rows".to_owned()));
    }
    if !metadata.is_file() {
        let text = "is a device or a pipe, expected a file: rows are read more than once";
        return Err(fault(Status::FileNotAllowed, text.to_owned()));
    }
    Ok((File::open(path).map_err(unreadable)?, metadata.len()))
}

/// The error of a read.
pub fn read_failed(error: std::io::Error) -> Error {
    Error::new(Status::ReadFailed, format!("cannot be read: {error}"))
}

/// Lines from some place of a file on.
pub struct Lines<R> {
    reader: R,
    /// Where the next line begins, in bytes.
    offset: u64,
    /// Lines read.
    number: u64,
    buffer: Vec<u8>,
    max_bytes: usize,
    /// What was read at once, and what of it belongs to no line yet.
    chunk: Vec<u8>,
    unused: Range<usize>,
}

/// A line without its end.
pub struct Line<'a> {
    /// Counted from 1.
    pub number: u64,
    /// Where it begins in its file, behind a byte order mark.
    pub offset: u64,
    /// Where the next one begins.
    pub end: u64,
    /// Of all its bytes.
    pub hash: u64,
    /// None where it is too long to be held.
    pub bytes: Option<&'a [u8]>,
}

impl Line<'_> {
    /// Whether there is nothing but white space.
    pub fn is_blank(&self) -> bool {
        self.bytes.is_some_and(|bytes| bytes.trim_ascii().is_empty())
    }
}

impl<'a> Lines<&'a File> {
    /// Lines from `offset` on, which are put into `buffer`. The first has number 1. The file is read in pieces of `chunk_bytes`.
    pub fn at(mut file: &'a File, offset: u64, chunk_bytes: usize, buffer: Vec<u8>) -> Result<Self> {
        file.seek(SeekFrom::Start(offset)).map_err(read_failed)?;
        Lines::new(file, offset, chunk_bytes, buffer, MAX_LINE_BYTES)
    }
}

impl<R: Read> Lines<R> {
    fn new(reader: R, offset: u64, chunk_bytes: usize, buffer: Vec<u8>, max_bytes: usize) -> Result<Self> {
        let chunk = try_vec("lines of data", chunk_bytes, 0u8)?;
        Ok(Lines { reader, offset, number: 0, buffer, max_bytes, chunk, unused: 0..0 })
    }

    /// The next line. Fails with `ReadFailed` and `OutOfMemory`.
    pub fn next(&mut self) -> Result<Option<Line<'_>>> {
        let mut offset = self.offset;
        self.buffer.clear();
        // Of a line that is too long, what is not held.
        let mut rest: Option<Xxh3> = None;
        let mut ended = false;
        while !ended {
            if self.unused.is_empty() {
                self.unused = match self.reader.read(&mut self.chunk) {
                    Ok(0) => break,
                    Ok(bytes) => 0..bytes,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(read_failed(error)),
                };
            }
            let chunk = &self.chunk[self.unused.clone()];
            let newline = chunk.iter().position(|byte| *byte == b'\n');
            ended = newline.is_some();
            let part = &chunk[..newline.unwrap_or(chunk.len())];
            if self.buffer.len() + part.len() > self.max_bytes && rest.is_none() {
                let mut hasher = Xxh3::new();
                hasher.update(&self.buffer);
                rest = Some(hasher);
                self.buffer.clear();
            }
            match &mut rest {
                Some(hasher) => hasher.update(part),
                None => {
                    self.buffer
                        .try_reserve(part.len())
                        .map_err(|_| Error::out_of_memory("a line of data", self.buffer.len() + part.len()))?;
                    self.buffer.extend_from_slice(part);
                }
            }
            let consumed = part.len() + usize::from(ended);
            self.unused.start += consumed;
            self.offset += consumed as u64;
        }
        if self.offset == offset {
            return Ok(None);
        }
        self.number += 1;
        let (number, end) = (self.number, self.offset);
        if let Some(hasher) = rest {
            return Ok(Some(Line { number, offset, end, hash: hasher.digest(), bytes: None }));
        }
        let mut bytes = self.buffer.strip_suffix(b"\r").unwrap_or(&self.buffer);
        if offset == 0
            && let Some(rest) = bytes.strip_prefix(BYTE_ORDER_MARK)
        {
            (bytes, offset) = (rest, BYTE_ORDER_MARK.len() as u64);
        }
        Ok(Some(Line { number, offset, end, hash: xxh3_64(bytes), bytes: Some(bytes) }))
    }

    /// The buffer, for the next of these.
    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }
}

/// Where the part of a text of at most `most` bytes that is one section ends: behind its last line, or before its last
/// space, so that no token reaches across, or else behind its last character.
pub fn section_end(text: &str, most: usize) -> usize {
    if text.len() <= most {
        return text.len();
    }
    let end = text.floor_char_boundary(most);
    let bytes = text.as_bytes();
    // Several line ends may be one token.
    let from = end / 2 + 1;
    let line = (from..=end).rev().find(|at| bytes[at - 1] == b'\n' && bytes[*at] != b'\n');
    // As may several spaces; a space and the word after it are one.
    let space = || (from..end).rev().find(|at| bytes[*at] == b' ' && bytes[at - 1] != b' ');
    line.or_else(space).unwrap_or(end.max(text.chars().next().map_or(0, char::len_utf8)))
}

/// A section of a text file.
pub struct Section<'a> {
    pub text: &'a str,
    /// Nothing follows.
    pub is_last: bool,
    pub hash: u64,
}

/// Why a section cannot be read.
pub enum SectionFault {
    /// It is not UTF-8 from this byte of it on.
    Utf8(usize),
    Stop(Error),
}

/// Reads the section of a text file that begins at `offset`, of at most `most` bytes.
pub fn read_section<'a>(
    file: &mut File,
    offset: u64,
    most: usize,
    buffer: &'a mut Vec<u8>,
) -> std::result::Result<Section<'a>, SectionFault> {
    buffer.clear();
    // A character more tells whether there is any.
    let wanted = most + 4;
    let no_memory = |_| SectionFault::Stop(Error::out_of_memory("a section of a text", wanted));
    buffer.try_reserve(wanted).map_err(no_memory)?;
    let stop = |error| SectionFault::Stop(read_failed(error));
    file.seek(SeekFrom::Start(offset)).map_err(stop)?;
    file.take(wanted as u64).read_to_end(buffer).map_err(stop)?;
    let is_end = buffer.len() < wanted;
    let text = match std::str::from_utf8(buffer) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() && !is_end => {
            std::str::from_utf8(&buffer[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(error) => return Err(SectionFault::Utf8(error.valid_up_to())),
    };
    let section = &text[..section_end(text, most)];
    let is_last = is_end && section.len() == text.len();
    Ok(Section { text: section, is_last, hash: xxh3_64_with_seed(section.as_bytes(), u64::from(is_last)) })
}
