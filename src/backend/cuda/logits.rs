//! The logits of a session on a device, and what of them comes back with every pass.

use std::sync::Arc;

use super::arguments::{CANDIDATE_PART, CANDIDATES};
use super::device::Device;
use super::memory::DeviceBlock;
use crate::backend::device_bytes::DeviceBytes;
use crate::backend::logits::{Candidates, Logits, MAX_CANDIDATES};
use crate::error::Result;
use crate::memory::view;
use crate::model::Config;

const _: () = assert!(CANDIDATES as usize == MAX_CANDIDATES);

/// In place of a candidate's token, past the last.
const NO_TOKEN: u32 = u32::MAX;

/// Bytes on the device of a session's logits.
pub fn planned_bytes(config: &Config) -> usize {
    2 * row_bytes(config)
}

fn row_bytes(config: &Config) -> usize {
    config.vocab_size * size_of::<f32>()
}

/// Memory for the logits of a session. Fails with `DeviceOutOfMemory` and `OutOfMemory`.
pub fn new_logits(device: &Arc<Device>, config: &Config) -> Result<Logits> {
    let row = || -> Result<Box<dyn DeviceBytes>> {
        Ok(Box::new(DeviceBlock::new(device, "the logits of a session", row_bytes(config))?))
    };
    Logits::on_device(config.vocab_size, [row()?, row()?])
}

/// Parts of the vocabulary.
pub fn parts_of(vocab_size: usize) -> usize {
    vocab_size.div_ceil(CANDIDATE_PART as usize)
}

/// Bytes of what comes back of a row, as `CandidateArguments::results` has it.
pub fn result_bytes(vocab_size: usize) -> usize {
    (parts_of(vocab_size) + MAX_CANDIDATES) * size_of::<u64>()
}

/// What came back of a row.
pub fn read_results(bytes: &[u8], vocab_size: usize) -> Candidates<'_> {
    let (sums, rest) = bytes.split_at(parts_of(vocab_size) * size_of::<f64>());
    let (tokens, logits) = rest.split_at(MAX_CANDIDATES * size_of::<u32>());
    let (tokens, logits) = (view::<u32>(tokens), view::<f32>(logits));
    let count = tokens.iter().position(|token| *token == NO_TOKEN).unwrap_or(tokens.len());
    Candidates {
        tokens: &tokens[..count],
        logits: &logits[..count],
        total: view::<f64>(sums).iter().sum(),
        are_all: count < MAX_CANDIDATES || count == vocab_size,
    }
}
