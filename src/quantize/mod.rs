//! Quantising ahead of time: from one model directory to another, tensor by tensor.

mod calibration;
pub(crate) mod matrix;
mod report;
mod tensors;

use std::path::Path;

use serde_json::json;

pub use calibration::Importance;
pub use report::{Kind, QuantizeReport, TensorReport};

use crate::backend::cpu::ThreadOptions;
use crate::error::{Error, Result, Status};
use crate::model::loader::each_rows;
use crate::model::weights::not_finite_in;
use crate::model::writer::{DEFAULT_SHARD_BYTES, NewTensor};
use crate::model::{
    Checkpoint, Config, Description, Formats, ModelWriter, Progress, Quantization, beside, config, quantization,
};
use crate::quant::{Format, Shape, Source};
use matrix::RoundedMatrix;
use tensors::Planned;

/// What a host may choose.
#[derive(Clone, Copy, Debug)]
pub struct QuantizeOptions {
    /// What parts are rounded to; those without a format are copied as they are stored. In a model whose embedding is its
    /// head the two have one format, or the result has a head of its own.
    pub formats: Formats,
    /// Threads that round; 0 is one per core the process may use, at most 256.
    pub threads: usize,
    /// Follow symbolic links inside the source directory, as a download cache's layout needs.
    pub follow_links: bool,
    /// Bytes of one weight file, about; 0 is 5 GB.
    pub shard_bytes: u64,
}

impl Default for QuantizeOptions {
    /// Experts in int4, everything else but routers and norms in int8, in groups of 32.
    fn default() -> Self {
        let formats = Formats {
            experts: Some(Format::INT4),
            attention: Some(Format::INT8),
            head: Some(Format::INT8),
            embedding: None,
        };
        QuantizeOptions { formats, threads: 0, follow_links: false, shard_bytes: 0 }
    }
}

/// Writes the model of directory `source`, rounded, to `target`, which must not be there or be an empty directory, whose
/// permissions are kept, in the format of `docs/format.md`. With `importance` errors count by it. Experts are written one by
/// one whatever the source has.
///
/// Memory for about 50 MB of a tensor is taken. `progress` counts bytes of the source, and may be watched and cancelled from
/// another thread; after a cancel or an error nothing of the target is left.
///
/// A system that sends SIGXFSZ where a file grows beyond the process's limit ends a process that does not ignore it: a host
/// with such a limit does, and gets `WriteFailed`.
///
/// Fails as loading `source` does; with `InvalidArgument` if it is quantised already or nothing is to be, if `importance` is
/// of a model of other sizes, or `target` is a mount point; with `TensorValue` for numbers that are not finite; with
/// `AlreadyExists`, `DiskFull`, `WriteFailed`, `Cancelled`.
pub fn quantize(
    source: &Path,
    target: &Path,
    options: &QuantizeOptions,
    importance: Option<&Importance>,
    progress: &Progress,
) -> Result<QuantizeReport> {
    let Prepared { checkpoint, config_bytes, description, planned } = Prepared::new(source, options)?;
    importance.map_or(Ok(()), |importance| importance.check(&description.config))?;
    let new_config = new_config(&config_bytes, &description, options.formats)?;
    progress.begin(description.bytes);
    progress.check()?;

    let new_tensors = new_tensors(&planned);
    let mut writer = ModelWriter::create(target, &new_tensors, shard_bytes(options))?;
    writer.write_file(config::FILE, &new_config)?;
    beside::copy(&beside::FILES, &checkpoint, &writer)?;
    let threads = ThreadOptions::from(options.threads).resolved_count();
    let mut work = Work { checkpoint: &checkpoint, writer: &mut writer, importance, threads, progress };
    let mut report = QuantizeReport { bytes_before: description.bytes, ..Default::default() };
    let mut index = 0;
    for tensor in &planned {
        let bytes_after = tensor.new_tensors().iter().map(|tensor| tensor.bytes()).sum();
        report.bytes_after += bytes_after;
        report.tensors.extend(work.write(tensor, index, bytes_after)?);
        index += tensor.new_tensors().len();
    }
    writer.finish()?;
    Ok(report)
}

/// Fails where `quantize` would before its first tensor, and writes nothing: to be asked before other costly work.
pub fn check(source: &Path, target: &Path, options: &QuantizeOptions) -> Result<()> {
    let prepared = Prepared::new(source, options)?;
    ModelWriter::check(target, &new_tensors(&prepared.planned), shard_bytes(options))
}

/// A source that can be quantised, and what is to be written.
struct Prepared {
    checkpoint: Checkpoint,
    config_bytes: Vec<u8>,
    description: Description,
    planned: Vec<Planned>,
}

impl Prepared {
    fn new(source: &Path, options: &QuantizeOptions) -> Result<Prepared> {
        check_formats(&options.formats)?;
        ThreadOptions::from(options.threads).check()?;
        let mut checkpoint = Checkpoint::open(source, options.follow_links)?;
        let config_bytes = beside::read_config(&checkpoint, source)?;
        let config = Config::from_json(&config_bytes)?;
        if config.quantization.is_some() {
            let text = format!("{} is quantised already: begin from the model it was made from", source.display());
            return Err(Error::new(Status::InvalidArgument, text).at_key("source"));
        }
        checkpoint.read_headers()?;
        let description = Description::new(&config, &checkpoint, options.formats)?;
        let planned = tensors::plan(&description, &checkpoint)?;
        Ok(Prepared { checkpoint, config_bytes, description, planned })
    }
}

fn new_tensors(planned: &[Planned]) -> Vec<NewTensor> {
    planned.iter().flat_map(Planned::new_tensors).collect()
}

fn shard_bytes(options: &QuantizeOptions) -> u64 {
    if options.shard_bytes == 0 { DEFAULT_SHARD_BYTES } else { options.shard_bytes }
}

fn check_formats(formats: &Formats) -> Result<()> {
    formats.check()?;
    let asked: Vec<Format> = formats.parts().into_iter().flatten().collect();
    match asked.iter().find(|format| format.groups().is_none()) {
        None if !asked.is_empty() => Ok(()),
        None => {
            Err(Error::new(Status::InvalidArgument, "nothing is to be quantised: give a part a format")
                .at_key("formats"))
        }
        Some(plain) => {
            let text = format!("{plain} is no format to quantise to, expected int8 or int4");
            Err(Error::new(Status::InvalidArgument, text).at_key("formats"))
        }
    }
}

struct Work<'a> {
    checkpoint: &'a Checkpoint,
    writer: &'a mut ModelWriter,
    importance: Option<&'a Importance>,
    threads: usize,
    progress: &'a Progress,
}

impl Work<'_> {
    /// Writes a planned tensor, which is tensor `index` of the new directory and, if it is rounded, `index + 1` too.
    fn write(&mut self, planned: &Planned, index: usize, bytes_after: u64) -> Result<Option<TensorReport>> {
        let Some(format) = planned.format else {
            self.copy(planned, index)?;
            return Ok(None);
        };
        let part = &planned.source;
        let shape = Shape { rows: part.rows, columns: part.columns, format };
        let importance = self.importance.zip(planned.input).and_then(|(importance, input)| importance.of(input));
        let mut rounded = RoundedMatrix::new(&part.tensor, shape, index, self.threads);
        let mut bytes_before = 0;
        each_rows(part, self.checkpoint, self.progress, |first, source| {
            let source = Source { importance: importance.as_deref(), ..*source };
            bytes_before += source.bytes.len() as u64;
            rounded.write(self.writer, first, &source, &|at| not_finite_in(part, at, self.checkpoint))
        })?;
        Ok(Some(TensorReport {
            name: planned.name.clone(),
            kind: planned.kind,
            layer: planned.layer,
            expert: planned.expert,
            format,
            rounded: rounded.rounded,
            bytes_before,
            bytes_after,
        }))
    }

    fn copy(&mut self, planned: &Planned, index: usize) -> Result<()> {
        let mut skip = 0;
        each_rows(&planned.source, self.checkpoint, self.progress, |_, source| {
            self.writer.write(index, skip, source.bytes)?;
            skip += source.bytes.len() as u64;
            Ok(())
        })
    }
}

/// The new config.json: all keys of the source's in their order, and what was quantised.
fn new_config(bytes: &[u8], description: &Description, asked: Formats) -> Result<Vec<u8>> {
    let own_head = description.head_part().is_some();
    let quantization = Quantization { source_dtype: description.embedding_dtype, formats: asked.resolved(!own_head) };
    let mut changes = vec![(quantization::KEY, Some(quantization.to_json()))];
    if own_head {
        changes.insert(0, ("tie_word_embeddings", Some(json!(false))));
    }
    beside::changed_config(bytes, changes)
}
