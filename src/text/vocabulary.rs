//! The pieces of a vocabulary, found by id and by text.

use std::hash::{BuildHasher, RandomState};

use crate::error::{Error, Result, Status};
use crate::memory::try_vec;

use super::json_tree::quoted;

/// Where a piece lies in the text of all pieces. No piece is empty, so length 0 means there is none.
#[derive(Clone, Copy, Default)]
pub struct Span {
    start: u32,
    length: u32,
}

impl Span {
    /// The span of the `length` bytes that end where `all` ends now.
    pub fn at_end(all: usize, length: usize) -> Option<Span> {
        Some(Span { start: u32::try_from(all - length).ok()?, length: u32::try_from(length).ok()? })
    }

    /// The range of bytes.
    pub fn range(self) -> std::ops::Range<usize> {
        self.start as usize..self.start as usize + self.length as usize
    }
}

/// Pieces with unique texts and unique ids.
pub struct Vocabulary {
    /// The pieces, one after the other, in the order they came.
    text: String,
    /// By id.
    spans: Vec<Span>,
    /// An open hash table of ids + 1, 0 where empty; at most half of it is ever full.
    slots: Vec<u32>,
    /// Keyed at random, so that no file can be made to collide.
    hasher: RandomState,
    count: usize,
}

impl Vocabulary {
    /// No pieces, with room for ids below `vocab_size`.
    ///
    /// Fails with InvalidArgument when ids would not fit in 31 bits, and with OutOfMemory.
    pub fn new(vocab_size: usize) -> Result<Self> {
        if vocab_size == 0 || vocab_size > i32::MAX as usize {
            let text = format!("vocabulary size is {vocab_size}, expected 1 to {}", i32::MAX);
            return Err(Error::new(Status::InvalidArgument, text));
        }
        Ok(Vocabulary {
            text: String::new(),
            spans: try_vec("vocabulary", vocab_size, Span::default())?,
            slots: try_vec("vocabulary index", (vocab_size * 2).next_power_of_two(), 0)?,
            hasher: RandomState::new(),
            count: 0,
        })
    }

    /// How many pieces there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Ids are below this; some may have no piece.
    pub fn size(&self) -> usize {
        self.spans.len()
    }

    /// Bytes of all pieces together.
    pub fn text_bytes(&self) -> usize {
        self.text.len()
    }

    /// Heap memory in bytes.
    pub fn bytes_in_use(&self) -> usize {
        self.text.capacity() + self.spans.capacity() * size_of::<Span>() + self.slots.capacity() * size_of::<u32>()
    }

    /// Adds a piece. The sentence of a failure goes on after the piece's key.
    ///
    /// Fails with TokenizerSyntax when the piece is there already, and with TokenizerValue when it is empty, or the
    /// id is too large or taken.
    pub fn insert(&mut self, piece: &str, id: u64) -> Result<()> {
        if piece.is_empty() {
            return Err(Error::new(Status::TokenizerValue, "is an empty piece, expected at least one character"));
        }
        let span = usize::try_from(id).ok().and_then(|id| self.spans.get(id));
        let Some(span) = span else {
            let text = format!("has id {id}, expected an id below {}, the rows of the embedding", self.spans.len());
            return Err(Error::new(Status::TokenizerValue, text));
        };
        let id = id as u32;
        let slot = self.slot_of(piece);
        if self.slots[slot] != 0 {
            return Err(Error::new(Status::TokenizerSyntax, "is there twice"));
        }
        if span.length != 0 {
            let text = format!("has id {id}, which {} has already", quoted(&self.text[span.range()]));
            return Err(Error::new(Status::TokenizerValue, text));
        }
        self.text.try_reserve(piece.len()).map_err(|_| Error::out_of_memory("vocabulary", piece.len()))?;
        self.text.push_str(piece);
        let span = Span::at_end(self.text.len(), piece.len());
        self.spans[id as usize] = span.ok_or_else(|| Error::out_of_memory("vocabulary", self.text.len()))?;
        self.slots[slot] = id + 1;
        self.count += 1;
        Ok(())
    }

    /// The text of an id; empty when the id has none.
    pub fn piece(&self, id: u32) -> &str {
        self.spans.get(id as usize).map_or("", |span| &self.text[span.range()])
    }

    /// The id of a text.
    pub fn id_of(&self, piece: &str) -> Option<u32> {
        self.slots[self.slot_of(piece)].checked_sub(1)
    }

    /// The slot that holds `piece`, or the empty one where it belongs.
    fn slot_of(&self, piece: &str) -> usize {
        let mask = self.slots.len() - 1;
        let mut slot = self.hasher.hash_one(piece) as usize & mask;
        // Ids are unique and below half the slots' number, so there is always an empty one.
        while let Some(id) = self.slots[slot].checked_sub(1)
            && self.piece(id) != piece
        {
            slot = (slot + 1) & mask;
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_found_by_text_and_by_id() {
        let mut vocabulary = Vocabulary::new(1000).unwrap();
        for id in 0..1000 {
            vocabulary.insert(&format!("piece {id}"), id).unwrap();
        }
        assert_eq!(vocabulary.count(), 1000);
        for id in 0..1000 {
            assert_eq!(vocabulary.id_of(&format!("piece {id}")), Some(id));
            assert_eq!(vocabulary.piece(id), format!("piece {id}"));
        }
        assert_eq!(vocabulary.id_of("piece 1000"), None);
        assert_eq!(vocabulary.id_of(""), None);
        assert_eq!(vocabulary.piece(1000), "");
    }

    #[test]
    fn a_piece_that_cannot_be_added_is_refused() {
        let mut vocabulary = Vocabulary::new(3).unwrap();
        vocabulary.insert("a", 0).unwrap();
        let cases = [
            ("a", 1, Status::TokenizerSyntax),
            ("a", 0, Status::TokenizerSyntax),
            ("b", 0, Status::TokenizerValue),
            ("b", 3, Status::TokenizerValue),
            ("b", u64::MAX, Status::TokenizerValue),
            ("", 1, Status::TokenizerValue),
        ];
        for (piece, id, status) in cases {
            assert_eq!(vocabulary.insert(piece, id).unwrap_err().status(), status, "{piece:?} {id}");
        }
        assert_eq!(vocabulary.count(), 1);
    }

    #[test]
    fn a_size_no_id_can_have_is_refused() {
        for size in [0, i32::MAX as usize + 1, usize::MAX] {
            assert_eq!(Vocabulary::new(size).err().unwrap().status(), Status::InvalidArgument, "{size}");
        }
    }
}
