//! A model whose weights are made on the device, and sessions of it.

use std::sync::Arc;

use gemmoe::backend::Device;
use gemmoe::backend::cuda::planned_residency;
use gemmoe::{LoadOptions, Model, Session, SessionOptions};

use super::Result;
use super::geometry::{Directory, Held};
use super::machine::Machine;

/// Of the device's memory that is left to sessions when a format is said to fit.
const LEFT_FOR_SESSIONS: usize = 4 << 30;

/// The model in a format, or the sentence that says why there is none.
pub fn generate(
    machine: &Machine,
    directory: &Directory,
    held: Held,
    index: usize,
) -> Result<std::result::Result<Arc<Model>, String>> {
    let options = LoadOptions { device: Device::Cuda(index), formats: held.formats(), ..Default::default() };
    let (description, _) = Model::inspect(directory.path(), &options)?;
    let planned = planned_residency(&description, 0)?.device_bytes as usize;
    let (free, _) = machine.device.memory()?;
    let left = if description.loaded_bytes.0 > 1 << 30 { LEFT_FOR_SESSIONS } else { 0 };
    if planned + left > free {
        return Ok(Err(format!(
            "{}: {:.1} GB of weights and {:.1} for sessions do not fit into the {:.1} GB that are free",
            held.name,
            planned as f64 / 1e9,
            left as f64 / 1e9,
            free as f64 / 1e9
        )));
    }
    let mut seed = 0;
    let model = Model::generate(directory.path(), &options, index, &mut |part| {
        seed += 1;
        machine.fill_part(part, seed)
    })?;
    machine.device.wait()?;
    Ok(Ok(model))
}

/// A session that holds at most `context` tokens, and runs prompts in passes of `chunk`; 0 where it is for batches.
pub fn session(model: &Arc<Model>, context: usize, chunk: usize) -> gemmoe::Result<Session> {
    let options =
        SessionOptions { context_size: context, prefill_chunk: chunk, batch_only: chunk == 0, ..Default::default() };
    Session::new(Arc::clone(model), &options)
}

/// Tokens from all over the vocabulary; `number` tells prompts of one length apart.
pub fn prompt(model: &Model, number: usize, length: usize) -> Vec<u32> {
    let vocabulary = model.config().vocab_size;
    (0..length).map(|at| ((at + 31 * number + 1) * 7919 % vocabulary) as u32).collect()
}
