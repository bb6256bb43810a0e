//! Which two tokens become one, and how early.

use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};

use super::json_tree::{quoted, refusal};
use super::tokenizer_file::MergeTexts;
use super::vocabulary::Vocabulary;

/// The merges of a vocabulary, found by their two sides. A merge is named by its rank: lower ranks go first.
///
/// A sorted table, not a hash map: 12 bytes a merge, and no file can make it slow.
pub struct MergeTable {
    /// `[vocab_size + 1]`: the merges with left side t are at `starts[t]..starts[t + 1]` of the next two.
    starts: Vec<u32>,
    /// Right sides, rising within each left side.
    rights: Vec<u32>,
    ranks: Vec<u32>,
    /// The token each merge makes, by rank.
    products: Vec<u32>,
}

impl MergeTable {
    /// Finds the sides and the product of every merge in the vocabulary.
    ///
    /// Fails with TokenizerValue when one of them is not there, when two merges have the same sides, or when
    /// `is_special` of the product: plain text must never become a special token. Fails with OutOfMemory.
    pub fn new(texts: &MergeTexts, vocabulary: &Vocabulary, is_special: impl Fn(u32) -> bool) -> Result<Self> {
        let refuse = |rank: usize, sentence: String| {
            Err(refusal(Status::TokenizerValue, &format!("model.merges[{rank}]"), sentence))
        };
        let count = texts.count();
        let mut merges: Vec<(u32, u32, u32)> = try_with_capacity("merges", count)?;
        let mut products = try_with_capacity("merges", count)?;
        let mut product = String::new();
        for rank in 0..count {
            let (left, right) = texts.sides(rank);
            product.clear();
            product.try_reserve(left.len() + right.len()).map_err(|_| Error::out_of_memory("merges", left.len()))?;
            product.push_str(left);
            product.push_str(right);
            let mut ids = [0; 3];
            for (id, piece) in ids.iter_mut().zip([left, right, &product]) {
                let Some(found) = vocabulary.id_of(piece) else {
                    return refuse(rank, format!("needs the piece {}, which the vocabulary lacks", quoted(piece)));
                };
                *id = found;
            }
            if is_special(ids[2]) {
                return refuse(rank, format!("makes the special token {} from plain text", quoted(&product)));
            }
            merges.push((ids[0], ids[1], rank as u32));
            products.push(ids[2]);
        }
        merges.sort_unstable();
        if let Some(pair) = merges.windows(2).find(|pair| (pair[0].0, pair[0].1) == (pair[1].0, pair[1].1)) {
            return refuse(pair[1].2 as usize, format!("is the same as merge {}", pair[0].2));
        }

        let mut table = MergeTable {
            starts: try_vec("merges", vocabulary.size() + 1, 0)?,
            rights: try_with_capacity("merges", count)?,
            ranks: try_with_capacity("merges", count)?,
            products,
        };
        for &(left, right, rank) in &merges {
            table.starts[left as usize + 1] += 1;
            table.rights.push(right);
            table.ranks.push(rank);
        }
        for token in 1..table.starts.len() {
            table.starts[token] += table.starts[token - 1];
        }
        Ok(table)
    }

    /// The rank of the merge of two neighbours, if they have one.
    pub fn rank_of(&self, left: u32, right: u32) -> Option<u32> {
        let range = self.starts[left as usize] as usize..self.starts[left as usize + 1] as usize;
        let found = self.rights[range.clone()].binary_search(&right).ok()?;
        Some(self.ranks[range.start + found])
    }

    /// The token the merge of this rank makes.
    pub fn product(&self, rank: u32) -> u32 {
        self.products[rank as usize]
    }

    /// Heap memory in bytes.
    pub fn bytes_in_use(&self) -> usize {
        let numbers = [&self.starts, &self.rights, &self.ranks, &self.products];
        numbers.iter().map(|numbers| numbers.capacity() * size_of::<u32>()).sum()
    }
}
