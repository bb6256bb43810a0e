//! Activations laid out for the kernels, in the precision that the weights' dot products take.
//!
//! Tokens are cut into tiles of TILE, the last one narrower. Of each tile the columns follow each other in words of four
//! bytes, all of its tokens side by side: `[columns / columns of a word][tokens of the tile]`, so that a tile of products
//! reads one stream. A word is one f32, two bf16 or four int8. Columns are filled up with zeros.
//!
//! int8 has a scale for each BLOCK columns of a token: absmax / 127, rounding to nearest, ties to even. Blocks with a
//! number that is not finite have a scale that is not a number, and so have all sums they enter. Blocks whose absmax is
//! below 1.5e-36, where a scale would lose its digits, count as zeros.

use std::ops::Range;

use super::matmul::TokenRows;
use super::store::{to_bf16, to_int8};
use super::tile::{BlockScale, MAX_TOKENS, TokenPart};
use crate::error::{Error, Result};
use crate::memory::{Buffer, try_vec};
use crate::quant::BLOCK;

/// Tokens of a tile.
pub const TILE: usize = MAX_TOKENS;

/// Columns are filled up to a multiple of this: the largest group of weights.
const PADDING: usize = 128;

/// What activations are rounded to before they meet weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As they are.
    F32,
    /// bfloat16: a relative error up to 2^-8.
    Bf16,
    /// Eight bits and a scale for each block: an error up to 1/254 of the block's largest.
    Int8,
}

impl Precision {
    /// All of them.
    pub const ALL: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::Int8];

    /// Columns in a word.
    fn columns_per_word(self) -> usize {
        match self {
            Precision::F32 => 1,
            Precision::Bf16 => 2,
            Precision::Int8 => 4,
        }
    }
}

/// Room for the activations of some tokens; see the top of the file.
pub struct Activations {
    /// In words.
    words: Buffer<u32>,
    /// `[tiles][blocks][tokens of the tile]`, for int8.
    blocks: Vec<BlockScale>,
}

/// The activations of some tokens, ready to be multiplied.
#[derive(Clone, Copy)]
pub struct Packed<'a> {
    precision: Precision,
    /// Filled up.
    columns: usize,
    tokens: usize,
    words: &'a [u32],
    blocks: &'a [BlockScale],
}

/// Which tokens of those there is room for, what they are packed as, and how many columns they have.
#[derive(Clone, Debug)]
pub struct Place {
    pub precision: Precision,
    pub tokens: Range<usize>,
    pub columns: usize,
}

/// Where a job packs tokens into; each item has tiles of its own.
pub struct Packing {
    words: *mut u32,
    blocks: *mut BlockScale,
    /// Words there are.
    count: usize,
}

// SAFETY: a Packing is two pointers into buffers that outlive the job it is used in; whoever writes to different tiles writes
// to different elements (see `Packing::pack`).
unsafe impl Sync for Packing {}
// SAFETY: as above.
unsafe impl Send for Packing {}

fn padded(columns: usize) -> usize {
    columns.next_multiple_of(PADDING)
}

impl Activations {
    /// Room for `tokens` tokens of `columns` columns in any precision.
    pub fn new(what: &str, tokens: usize, columns: usize) -> Result<Activations> {
        let (words, blocks) = Self::sizes(what, tokens, columns)?;
        Ok(Activations { words: Buffer::zeroed(what, words)?, blocks: try_vec(what, blocks, BlockScale::default())? })
    }

    /// Bytes `new` would take.
    pub fn planned_bytes(what: &str, tokens: usize, columns: usize) -> Result<usize> {
        let (words, blocks) = Self::sizes(what, tokens, columns)?;
        Ok(words * size_of::<u32>() + blocks * size_of::<BlockScale>())
    }

    fn sizes(what: &str, tokens: usize, columns: usize) -> Result<(usize, usize)> {
        let words = tokens.checked_mul(padded(columns)).filter(|words| *words <= usize::MAX / 64);
        let words = words.ok_or_else(|| Error::out_of_memory(what, usize::MAX))?;
        Ok((words, words / BLOCK))
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> usize {
        self.words.bytes() + self.blocks.len() * size_of::<BlockScale>()
    }

    /// For a job that packs.
    pub fn packing(&mut self) -> Packing {
        Packing { words: self.words.as_mut_ptr(), blocks: self.blocks.as_mut_ptr(), count: self.words.len() }
    }

    /// What was packed at this very place, and not over since.
    pub fn packed(&self, place: &Place) -> Packed<'_> {
        let (word, block) = place.begin(self.words.len());
        let (words, blocks) = (&self.words[word..], &self.blocks[block..]);
        let (columns, tokens) = (padded(place.columns), place.tokens.len());
        Packed { precision: place.precision, columns, tokens, words, blocks }
    }
}

impl Place {
    /// Where its tokens begin in `words` words and in their blocks: a token takes as many words as columns at the most.
    /// Panics where there is no room.
    fn begin(&self, words: usize) -> (usize, usize) {
        let columns = padded(self.columns);
        assert!(self.tokens.start <= self.tokens.end && self.tokens.end * columns <= words);
        (self.tokens.start * columns, self.tokens.start * columns / BLOCK)
    }
}

/// Tiles of some tokens.
pub fn tiles(tokens: usize) -> usize {
    tokens.div_ceil(TILE)
}

impl Packing {
    /// Packs one tile of a place: `x` are the rows of its tokens.
    ///
    /// # Safety
    /// The buffers are alive, and nobody else reads or writes this tile during the job.
    #[inline(always)]
    pub unsafe fn pack(&self, place: &Place, tile: usize, x: &TokenRows) {
        let (word, block) = place.begin(self.count);
        let (precision, columns) = (place.precision, padded(place.columns));
        let first = tile * TILE;
        let width = TILE.min(place.tokens.len() - first);
        assert!(x.count == width && x.columns == place.columns);
        let words_per_token = columns / precision.columns_per_word();
        let blocks_per_token = columns / BLOCK;
        // SAFETY: `begin` checked that all tokens fit, and a tile's part of both buffers is its own by the caller's promise.
        let (words, blocks) = unsafe {
            let words = self.words.add(word + first * words_per_token);
            let blocks = self.blocks.add(block + first * blocks_per_token);
            (
                std::slice::from_raw_parts_mut(words, width * words_per_token),
                std::slice::from_raw_parts_mut(blocks, width * blocks_per_token),
            )
        };
        for token in 0..width {
            let row = x.row(token);
            for block in 0..blocks_per_token {
                let mut numbers = [0f32; BLOCK];
                if let Some(rest) = row.get(block * BLOCK..).filter(|rest| !rest.is_empty()) {
                    let count = rest.len().min(BLOCK);
                    numbers[..count].copy_from_slice(&rest[..count]);
                }
                let at = block * BLOCK / precision.columns_per_word() * width + token;
                match precision {
                    Precision::F32 => scatter(&numbers.map(f32::to_bits), &mut words[at..], width),
                    Precision::Bf16 => scatter(&pairs(&numbers), &mut words[at..], width),
                    Precision::Int8 => {
                        let mut integers = [0i8; BLOCK];
                        let scale = to_int8(&numbers, &mut integers);
                        let sum: i32 = integers.iter().map(|integer| *integer as i32).sum();
                        blocks[block * width + token] = BlockScale { scale, negated_sum: -sum };
                        scatter(&quads(&integers), &mut words[at..], width);
                    }
                }
            }
        }
    }
}

/// Words of one token to where they are, `width` apart.
#[inline(always)]
fn scatter(from: &[u32], to: &mut [u32], width: usize) {
    for (word, place) in from.iter().zip(to.iter_mut().step_by(width)) {
        *place = *word;
    }
}

#[inline(always)]
fn pairs(numbers: &[f32; BLOCK]) -> [u32; BLOCK / 2] {
    std::array::from_fn(|pair| {
        let [low, high] = [numbers[2 * pair], numbers[2 * pair + 1]].map(|number| to_bf16(number).to_bits() as u32);
        low | high << 16
    })
}

#[inline(always)]
fn quads(integers: &[i8; BLOCK]) -> [u32; BLOCK / 4] {
    std::array::from_fn(|quad| u32::from_le_bytes(std::array::from_fn(|byte| integers[4 * quad + byte] as u8)))
}

impl<'a> Packed<'a> {
    /// Some of the tokens, whole tiles but for the last.
    pub fn part(&self, tokens: Range<usize>) -> Packed<'a> {
        let is_whole = |at: usize| at.is_multiple_of(TILE) || at == self.tokens;
        assert!(tokens.end <= self.tokens && tokens.start.is_multiple_of(TILE) && is_whole(tokens.end));
        let words = &self.words[tokens.start * (self.columns / self.precision.columns_per_word())..];
        let blocks = &self.blocks[tokens.start * (self.columns / BLOCK)..];
        Packed { words, blocks, tokens: tokens.len(), ..*self }
    }

    /// How many they are.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// What they are.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Columns, filled up.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The tokens of a tile from column `column` on, which begins a block, and how many they are.
    pub fn tile(&self, tile: usize, column: usize) -> (TokenPart, usize) {
        let first = tile * TILE;
        let width = TILE.min(self.tokens - first);
        assert!(column <= self.columns && column.is_multiple_of(BLOCK));
        let columns_per_word = self.precision.columns_per_word();
        let word = first * (self.columns / columns_per_word) + column / columns_per_word * width;
        let block = first * (self.columns / BLOCK) + column / BLOCK * width;
        let part =
            TokenPart { words: self.words[word..].as_ptr(), blocks: self.blocks[block..].as_ptr(), stride: width };
        (part, width)
    }
}
