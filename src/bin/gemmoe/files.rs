//! Texts the user names.

use std::io::Read;
use std::path::Path;

use gemmoe::{Error, Result, Status};

/// The text of a file.
pub fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| unreadable(path, &error))?;
    into_text(bytes, path)
}

/// The text of a file, or of what is piped in where the path is `-`.
pub fn read_or_piped(path: &Path) -> Result<String> {
    if path != Path::new("-") {
        return read(path);
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes).map_err(|error| unreadable(path, &error))?;
    into_text(bytes, path)
}

/// The error of a path that cannot be read.
pub fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::new(Status::ReadFailed, format!("cannot be read: {error}")).in_file(path.display().to_string())
}

fn into_text(bytes: Vec<u8>, path: &Path) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let text = format!("is not UTF-8 from byte {at} on: convert it, for example with iconv");
        Error::new(Status::InvalidUtf8, text).in_file(path.display().to_string())
    })
}
