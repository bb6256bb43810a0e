//! Weights on their way from host memory to a device, through pinned memory: while one block is on its way the next is
//! filled.

use std::sync::Arc;

use super::context::Current;
use super::device::Device;
use super::driver::Address;
use super::memory::{Mark, PinnedBlock};
use super::residency::ExpertLayout;
use crate::error::Result;
use crate::model::weights::{ExpertPart, ExpertWeights, Matrix};
use crate::quant::{Format, LINE_BYTES, pair_halves};

/// Bytes that are copied to the device at once.
const BLOCK_BYTES: usize = 16 << 20;

/// Two blocks of pinned memory. Whoever drops it waits for what is on its way first.
pub struct Upload {
    blocks: [(PinnedBlock, Mark); 2],
    /// Which of them is filled next.
    next: usize,
}

impl Upload {
    /// For parts of at most `largest` bytes, or for longer ones in pieces.
    pub fn new(device: &Arc<Device>, largest: usize) -> Result<Upload> {
        let bytes = largest.next_multiple_of(LINE_BYTES).clamp(LINE_BYTES, BLOCK_BYTES);
        let block = || Ok((PinnedBlock::new(device, "weights on their way", bytes)?, Mark::new(device)?));
        Ok(Upload { blocks: [block()?, block()?], next: 0 })
    }

    /// Has bytes copied to `to`; `fill` writes them, or what becomes of them in as many bytes, to where they are copied
    /// from. The bytes are not needed any more afterwards.
    ///
    /// # Safety
    /// `to` has room for them, and nobody uses it until the stream has come past the copy.
    pub unsafe fn send(
        &mut self,
        current: &Current,
        bytes: &[u8],
        to: Address,
        fill: impl Fn(&[u8], &mut [u8]),
    ) -> Result<()> {
        let step = self.blocks[0].0.bytes() / LINE_BYTES * LINE_BYTES;
        for (index, bytes) in bytes.chunks(step).enumerate() {
            let (block, mark) = &mut self.blocks[self.next];
            // What was in it last has arrived.
            mark.wait(current)?;
            fill(bytes, &mut block.as_mut_slice()[..bytes.len()]);
            // SAFETY: the block is not touched before the mark is passed; the rest is the caller's promise.
            unsafe { block.send(current, bytes.len(), to + (index * step) as Address) }?;
            mark.set(current)?;
            self.next = 1 - self.next;
        }
        Ok(())
    }

    /// The same of a matrix, as devices have it: its lines, and its scales if there are any.
    ///
    /// # Safety
    /// As `send`.
    pub unsafe fn send_matrix(
        &mut self,
        current: &Current,
        matrix: &Matrix,
        lines: Address,
        scales: Address,
    ) -> Result<()> {
        let copy = |bytes: &[u8], out: &mut [u8]| out.copy_from_slice(bytes);
        // SAFETY: the caller's promise.
        unsafe {
            match matrix.shape().format {
                Format::F16 => self.send(current, matrix.lines(), lines, pair_halves)?,
                _ => self.send(current, matrix.lines(), lines, copy)?,
            }
            self.send(current, matrix.scales(), scales, copy)
        }
    }

    /// The same of all matrices of an expert, to a block of this layout that begins at `block`.
    ///
    /// # Safety
    /// As `send`.
    pub unsafe fn send_expert(
        &mut self,
        current: &Current,
        expert: &ExpertWeights,
        layout: &ExpertLayout,
        block: Address,
    ) -> Result<()> {
        let parts = [(ExpertPart::Gate, &expert.gate), (ExpertPart::Up, &expert.up), (ExpertPart::Down, &expert.down)];
        for (part, matrix) in parts {
            let place = layout.of(part);
            let (lines, scales) = (block + place.lines as Address, block + place.scales as Address);
            // SAFETY: the caller's promise.
            unsafe { self.send_matrix(current, matrix, lines, scales) }?;
        }
        Ok(())
    }
}
