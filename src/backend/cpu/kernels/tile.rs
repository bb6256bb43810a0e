//! The one inner loop of every matrix product: a few panels of weights by a few tokens.
//!
//! A panel's sixteen rows are lanes (`quant/panels.rs` has the layout), so each dot product is one running f32 sum over the
//! columns in rising order, block after block where there are scales, whatever tile it is in: any batch gives the same
//! bits as each token alone. Every format on every instruction set is an implementation of [`Dot`].
//!
//! Moves each line of weights into registers once per tile of tokens. Limit: with one token, memory; with several, the
//! rate of the instruction set's dot products.

use super::activations::Precision;
use super::lanes::Lanes;
use crate::quant::{LINE_BYTES, PANEL_ROWS};

/// How far ahead of its use a line is asked for.
const AHEAD_BYTES: usize = 256;

/// Tokens of a tile at the most.
pub const MAX_TOKENS: usize = 8;

/// The products of one format's weights with activations on one instruction set.
///
/// # Safety
/// All methods need the instruction set of the implementing type to be present, and pointers to be readable (writable) for
/// what each says; no alignment is needed.
pub trait Dot {
    /// What activations are.
    const PRECISION: Precision;
    /// Words of activations that a line takes.
    const WORDS: usize;
    /// Lines of a block, after which scales are applied; usize::MAX in formats without.
    const BLOCK_LINES: usize;
    /// The instruction set.
    type Lanes: Lanes;
    /// What the lines of a block are summed up in.
    type Block: Copy;
    /// A line ready to be multiplied: what the tokens of a tile share.
    type Line: Copy;

    /// Begins a block.
    unsafe fn open(sums: Self::Lanes, negated_sum: i32) -> Self::Block;
    /// Loads LINE_BYTES bytes.
    unsafe fn line(from: *const u8) -> Self::Line;
    /// Adds the products of a line with WORDS words of one token, `stride` words apart.
    unsafe fn multiply(block: Self::Block, line: Self::Line, words: *const u32, stride: usize) -> Self::Block;
    /// Ends a block: its sum times the scales, sixteen of two bytes, joins the sums. Nothing is read in formats without.
    unsafe fn close(sums: Self::Lanes, block: Self::Block, scales: *const u8, x: BlockScale) -> Self::Lanes;
}

/// A block of one token's activations, in formats with scales.
#[derive(Clone, Copy, Default)]
pub struct BlockScale {
    /// What its whole numbers are to be multiplied by.
    pub scale: f32,
    /// Minus their sum.
    pub negated_sum: i32,
}

/// Some lines of one panel, and the scales that belong to them.
#[derive(Clone, Copy)]
pub struct PanelPart {
    pub lines: *const u8,
    pub scales: *const u8,
}

/// The same columns of some tokens' activations: see activations.rs for the layout.
#[derive(Clone, Copy)]
pub struct TokenPart {
    pub words: *const u32,
    pub blocks: *const BlockScale,
    /// Tokens of the tile they are in: how far apart the words and the blocks of one token are.
    pub stride: usize,
}

impl TokenPart {
    /// Without the first `tokens` tokens.
    ///
    /// # Safety
    /// There are that many.
    pub unsafe fn skip(self, tokens: usize) -> TokenPart {
        // SAFETY: the caller's promise; `blocks` may be dangling where there are none, so it is not offset as a place.
        TokenPart { words: unsafe { self.words.add(tokens) }, blocks: self.blocks.wrapping_add(tokens), ..self }
    }
}

/// Sums of one panel's rows: `[tokens][16 rows]`.
pub type PanelSums = [[f32; PANEL_ROWS]; MAX_TOKENS];

/// How much of a panel a tile goes through.
#[derive(Clone, Copy)]
pub struct Span {
    /// Lines.
    pub lines: usize,
    /// A group of weights has `1 << group_shift` blocks.
    pub group_shift: u32,
}

/// Adds the products of R panels with T tokens to the sums of tokens `first..first + T`.
///
/// # Safety
/// The instruction set of D is present; each panel has `lines` lines and their scales, and `x` T tokens' words and blocks
/// for them.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // Panels and tokens number several arrays alike.
pub unsafe fn tile<D: Dot, const R: usize, const T: usize>(
    panels: [PanelPart; R],
    x: TokenPart,
    span: Span,
    first: usize,
    sums: &mut [PanelSums; R],
) {
    // SAFETY: all offsets stay below the span's lines, their words and their blocks, which the caller promises; sums are
    // arrays of sixteen; a prefetch may be of any address.
    unsafe {
        let mut running = [[D::Lanes::load(sums[0][first].as_ptr()); T]; R];
        for r in 0..R {
            for t in 0..T {
                running[r][t] = D::Lanes::load(sums[r][first + t].as_ptr());
            }
        }
        let scaled = D::BLOCK_LINES != usize::MAX;
        let (mut line, mut index) = (0, 0);
        let mut words = x.words;
        while line < span.lines {
            let mut scales = [BlockScale::default(); T];
            if scaled {
                for (t, scale) in scales.iter_mut().enumerate() {
                    *scale = *x.blocks.add(index * x.stride + t);
                }
            }
            let mut blocks = [[D::open(running[0][0], 0); T]; R];
            for r in 0..R {
                for t in 0..T {
                    blocks[r][t] = D::open(running[r][t], scales[t].negated_sum);
                }
            }
            for _ in 0..D::BLOCK_LINES.min(span.lines) {
                let mut ready = [D::line(panels[0].lines.add(line * LINE_BYTES)); R];
                for r in 0..R {
                    let from = panels[r].lines.add(line * LINE_BYTES);
                    // Several tokens leave the processor's own prefetching time enough.
                    if T == 1 {
                        D::Lanes::prefetch(from.wrapping_add(AHEAD_BYTES));
                    }
                    ready[r] = D::line(from);
                }
                for t in 0..T {
                    for r in 0..R {
                        blocks[r][t] = D::multiply(blocks[r][t], ready[r], words.add(t), x.stride);
                    }
                }
                words = words.add(D::WORDS * x.stride);
                line += 1;
            }
            for r in 0..R {
                let row_scales = panels[r].scales.wrapping_add((index >> span.group_shift) * 2 * PANEL_ROWS);
                for t in 0..T {
                    running[r][t] = D::close(running[r][t], blocks[r][t], row_scales, scales[t]);
                }
            }
            index += 1;
        }
        for r in 0..R {
            for t in 0..T {
                running[r][t].store(sums[r][first + t].as_mut_ptr());
            }
        }
    }
}
