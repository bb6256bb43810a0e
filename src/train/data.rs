//! What is learned from, file by file and row by row.

use std::path::{Path, PathBuf};

use super::document::Document;
use super::trainer::Pair;
use crate::engine::Model;
use crate::error::{Error, Result, Status};
use crate::model::Progress;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    Texts,
    Pairs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LongRows {
    Cut,
    Skip,
    Refuse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadRows {
    Refuse,
    Skip,
}

#[derive(Clone, Copy, Debug)]
pub struct DataOptions {
    pub max_tokens: usize,
    pub long_rows: LongRows,
    pub bad_rows: BadRows,
    pub learn_prompts: bool,
}

#[derive(Clone, Debug, Default)]
pub struct DataReport {
    pub tokens: u64,
    pub targets: u64,
}

pub struct DataSet {
    documents: Vec<Document>,
    pairs: Vec<Pair>,
    report: DataReport,
    fingerprint: u64,
}

impl DataSet {
    pub fn open(
        model: &Model,
        files: &[PathBuf],
        rows: Rows,
        options: &DataOptions,
        _progress: &Progress,
    ) -> Result<DataSet> {
        let mut set =
            DataSet { documents: Vec::new(), pairs: Vec::new(), report: DataReport::default(), fingerprint: 0 };
        for file in files {
            let text = read(file)?;
            set.fingerprint ^= xxhash_rust::xxh3::xxh3_64(text.as_bytes());
            for line in text.lines() {
                let row: serde_json::Value =
                    serde_json::from_str(line).map_err(|error| Error::new(Status::DataRow, error.to_string()))?;
                let text = |key: &str| model.encode(row[key].as_str().unwrap_or_default(), false, false);
                let bos = [model.config().bos_token_id];
                let cut = |tokens: Vec<u32>| tokens.into_iter().take(options.max_tokens - 1).collect::<Vec<u32>>();
                match rows {
                    Rows::Texts => set.documents.push(Document::new(&bos, &cut(text("text")?))),
                    Rows::Pairs => {
                        let prompt = [&bos[..], &text("prompt")?].concat();
                        let of = |key: &str| Ok::<Document, Error>(Document::new(&prompt, &text(key)?));
                        set.pairs.push(Pair::new(of("chosen")?, of("rejected")?));
                    }
                }
            }
        }
        Ok(set)
    }

    pub fn len(&self) -> usize {
        self.documents.len() + self.pairs.len()
    }

    pub fn report(&self) -> &DataReport {
        &self.report
    }

    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    pub fn document(&mut self, index: usize) -> Result<Document> {
        Ok(self.documents[index].clone())
    }

    pub fn pair(&mut self, index: usize) -> Result<Pair> {
        Ok(self.pairs[index].clone())
    }
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path)
        .map_err(|error| Error::new(Status::ReadFailed, error.to_string()).in_file(path.display().to_string()))
}

/// The order of an epoch: a permutation of 0..len that depends on seed and epoch alone.
pub fn shuffled(len: usize, seed: u64, epoch: u64) -> Result<Vec<u32>> {
    let mut order: Vec<u32> = (0..len as u32).collect();
    order.sort_by_key(|row| crate::random::mixed(seed ^ crate::random::mixed(epoch) ^ u64::from(*row)));
    Ok(order)
}
