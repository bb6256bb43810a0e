//! Byte pair encoding: of all neighbours that may merge, the pair of lowest rank does, leftmost first, until none may.
//!
//! The `tokenizers` crate's BPE gives the same ids (a test compares them), but reserves 32 bytes for each byte of text
//! and a String for each token with allocations that abort the process when they fail. Here every one can fail.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::error::{Error, Result};

use super::merges::MergeTable;

/// No neighbour on this side, or no merge with it.
const NONE: u32 = u32::MAX;

/// A token in the making, and its neighbours.
#[derive(Clone, Copy)]
struct Symbol {
    token: u32,
    previous: u32,
    next: u32,
    /// The rank of its merge with `next`.
    rank: u32,
}

/// Merges the tokens of one stretch of text after the other, in memory that it keeps.
#[derive(Default)]
pub struct Merger {
    symbols: Vec<Symbol>,
    /// Merges that are possible before any is done, and those that became possible since: rank in the upper half,
    /// position in the lower. Whether one still is, its symbol says. The first are most; sorted once, highest first,
    /// they cost a long text far fewer cache misses than in the heap.
    first: Vec<u64>,
    later: BinaryHeap<Reverse<u64>>,
}

impl Merger {
    /// Begins a stretch of at most `room` tokens, a number below 2^32 - 1. Fails with OutOfMemory.
    pub fn start(&mut self, room: usize) -> Result<()> {
        self.symbols.clear();
        self.first.clear();
        self.later.clear();
        self.symbols
            .try_reserve(room)
            .map_err(|_| Error::out_of_memory("text to tokenize", room.saturating_mul(size_of::<Symbol>())))
    }

    /// Adds a token of the stretch, before any merge.
    pub fn push(&mut self, token: u32) {
        let position = self.symbols.len() as u32;
        let previous = position.checked_sub(1).unwrap_or(NONE);
        if let Some(last) = self.symbols.last_mut() {
            last.next = position;
        }
        self.symbols.push(Symbol { token, previous, next: NONE, rank: NONE });
    }

    /// Merges the stretch and appends its tokens to `out`. Takes n log n steps. Fails with OutOfMemory.
    pub fn finish(&mut self, merges: &MergeTable, out: &mut Vec<u32>) -> Result<()> {
        let mut left_over = self.symbols.len();
        let no_memory = || Error::out_of_memory("text to tokenize", left_over * size_of::<u64>());
        self.first.try_reserve(left_over).map_err(|_| no_memory())?;
        for position in 0..left_over as u32 {
            let entry = self.look_right(position, merges);
            self.first.extend(entry);
        }
        self.first.sort_unstable_by_key(|entry| Reverse(*entry));
        while let Some(entry) = self.pop() {
            let (rank, position) = ((entry >> 32) as u32, entry as u32);
            let symbol = self.symbols[position as usize];
            // Either side has merged since; a rank belongs to one pair only, so equal ranks mean the same pair.
            if symbol.rank != rank {
                continue;
            }
            let after = self.symbols[symbol.next as usize].next;
            self.symbols[symbol.next as usize].rank = NONE;
            self.symbols[position as usize].token = merges.product(rank);
            self.symbols[position as usize].next = after;
            if after != NONE {
                self.symbols[after as usize].previous = position;
            }
            left_over -= 1;
            let right = self.look_right(position, merges);
            let left = if symbol.previous == NONE { None } else { self.look_right(symbol.previous, merges) };
            self.later.try_reserve(2).map_err(|_| Error::out_of_memory("text to tokenize", size_of::<u64>()))?;
            self.later.extend(right.into_iter().chain(left).map(Reverse));
        }

        let bytes = left_over * size_of::<u32>();
        out.try_reserve(left_over).map_err(|_| Error::out_of_memory("tokens", bytes))?;
        let mut position = if left_over > 0 { 0 } else { NONE };
        while position != NONE {
            let symbol = self.symbols[position as usize];
            out.push(symbol.token);
            position = symbol.next;
        }
        Ok(())
    }

    /// The next merge to try.
    fn pop(&mut self) -> Option<u64> {
        let first = self.first.last().copied();
        match self.later.peek() {
            Some(Reverse(later)) if first.is_none_or(|first| *later < first) => {
                self.later.pop().map(|Reverse(entry)| entry)
            }
            _ => self.first.pop(),
        }
    }

    /// Notes the rank of a symbol's merge with its right neighbour; returns the queue entry, if there is a merge.
    fn look_right(&mut self, position: u32, merges: &MergeTable) -> Option<u64> {
        let symbol = self.symbols[position as usize];
        let neighbour = self.symbols.get(symbol.next as usize);
        let rank = neighbour.and_then(|right| merges.rank_of(symbol.token, right.token));
        self.symbols[position as usize].rank = rank.unwrap_or(NONE);
        rank.map(|rank| u64::from(rank) << 32 | u64::from(position))
    }
}
