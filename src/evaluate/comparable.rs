//! Whether figures of two models can stand side by side.

use std::path::Path;

use crate::error::{Error, Result, Status};
use crate::model::{Checkpoint, beside, config, config::Config};
use crate::text::difference;

const TOKENIZER: &str = "tokenizer.json";

/// Fails with `ModelsDiffer` unless two model directories have the same tokenizer: figures per token are of the same tokens only
/// then. Fails with `NoTokenizer` where one has none, and as opening a directory does.
pub fn check_tokenizers(first: &Path, other: &Path, follow_links: bool) -> Result<()> {
    let read = |directory: &Path| -> Result<(Vec<u8>, Config)> {
        let checkpoint = Checkpoint::open(directory, follow_links)?;
        let missing = |file: &str, status| Error::new(status, "it is not there").in_file(file).in_directory(directory);
        let bytes = checkpoint.read_small_file(TOKENIZER, beside::MAX_BYTES)?;
        let bytes = bytes.ok_or_else(|| missing(TOKENIZER, Status::NoTokenizer))?;
        let config = checkpoint.read_small_file(config::FILE, config::MAX_BYTES)?;
        let config = config.ok_or_else(|| missing(config::FILE, Status::FileNotFound))?;
        Ok((bytes, Config::from_json(&config)?))
    };
    let ((first_bytes, first_config), (bytes, config)) = (read(first)?, read(other)?);
    let place = |error: Error| error.in_file(TOKENIZER).in_directory(other);
    let (own, others) = (config.vocab_size, first_config.vocab_size);
    let found = match own == others {
        true => difference(&first_bytes, &bytes, own).map_err(place)?,
        false => Some(format!("is of a vocabulary of {own}, not {others}")),
    };
    match found {
        None => Ok(()),
        Some(text) => {
            let text = format!("{text} as {} has: figures per token could not be compared", first.display());
            Err(place(Error::new(Status::ModelsDiffer, text)))
        }
    }
}
