//! Finding added tokens in text: leftmost first, and of those the longest.

use crate::error::{Error, Result};
use crate::memory::try_with_capacity;

/// A set of texts to find, each with its id.
///
/// A sorted list halved byte by byte instead of an automaton: no memory beyond the texts, and the memory can fail.
/// A search looks ahead by the longest text at most, so it is linear in what is searched.
pub struct AddedTokens {
    /// Rising by content; contents are not empty.
    sorted: Vec<(String, u32)>,
    /// Whether any content starts with this byte.
    starts: [bool; 256],
}

/// Where an added token was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Found {
    /// Its first byte.
    pub start: usize,
    /// The byte after its last.
    pub end: usize,
    /// Its id.
    pub id: u32,
}

impl AddedTokens {
    /// A set of non-empty, unique texts. Fails with OutOfMemory.
    pub fn new<'a>(contents: impl Iterator<Item = (&'a str, u32)> + Clone) -> Result<Self> {
        let mut sorted = try_with_capacity("added tokens", contents.clone().count())?;
        let mut starts = [false; 256];
        for (content, id) in contents {
            let mut copy = String::new();
            copy.try_reserve_exact(content.len()).map_err(|_| Error::out_of_memory("added tokens", content.len()))?;
            copy.push_str(content);
            if let Some(first) = content.bytes().next() {
                starts[usize::from(first)] = true;
                sorted.push((copy, id));
            }
        }
        sorted.sort_unstable();
        Ok(AddedTokens { sorted, starts })
    }

    /// The first match at or after byte `from`. In valid UTF-8 it starts and ends between characters.
    pub fn find(&self, text: &str, from: usize) -> Option<Found> {
        let bytes = text.as_bytes();
        (from..bytes.len()).filter(|&at| self.starts[usize::from(bytes[at])]).find_map(|start| {
            let (length, id) = self.longest_prefix(&bytes[start..])?;
            Some(Found { start, end: start + length, id })
        })
    }

    /// The longest content that `bytes` starts with.
    fn longest_prefix(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        let mut longest = None;
        // All candidates begin with the first `depth` of the bytes; one of exactly that length sorts first.
        let mut candidates = &self.sorted[..];
        for (depth, byte) in bytes.iter().enumerate() {
            let start = candidates.partition_point(|(content, _)| content.as_bytes()[depth] < *byte);
            let end = candidates.partition_point(|(content, _)| content.as_bytes()[depth] <= *byte);
            candidates = &candidates[start..end];
            let Some((first, id)) = candidates.first() else { break };
            if first.len() == depth + 1 {
                longest = Some((depth + 1, *id));
                candidates = &candidates[1..];
            }
        }
        longest
    }

    /// Heap memory in bytes.
    pub fn bytes_in_use(&self) -> usize {
        let contents: usize = self.sorted.iter().map(|(content, _)| content.capacity()).sum();
        contents + self.sorted.capacity() * size_of::<(String, u32)>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::samples::Random;

    fn find_all(contents: &[&str], text: &str) -> Vec<Found> {
        let set = AddedTokens::new(contents.iter().zip(0..).map(|(content, id)| (*content, id))).unwrap();
        let mut found = Vec::new();
        while let Some(next) = set.find(text, found.last().map_or(0, |last: &Found| last.end)) {
            found.push(next);
        }
        found
    }

    #[test]
    fn the_leftmost_longest_match_wins() {
        let ids = |contents, text| find_all(contents, text).iter().map(|found| found.id).collect::<Vec<_>>();
        assert_eq!(ids(&["a", "ab", "abcd"], "abc"), [1]);
        assert_eq!(ids(&["bc", "ab"], "abc"), [1]);
        assert_eq!(ids(&["\n", "\n\n", "\n\n\n"], "\n\n\n\n\n"), [2, 1]);
        assert_eq!(ids(&["<b>", "</b>"], "<<b>x</b></b"), [0, 1]);
        assert!(ids(&[], "abc").is_empty());
    }

    #[test]
    fn matches_are_those_of_an_aho_corasick_automaton() {
        let mut random = Random::new(3);
        for _ in 0..3000 {
            let letters = ["a", "b", "▁", "é"];
            let mut word = |longest: usize| -> String {
                (0..1 + random.below(longest)).map(|_| letters[random.below(letters.len())]).collect()
            };
            let mut contents: Vec<String> = (0..6).map(|_| word(4)).collect();
            let text = word(40);
            contents.sort();
            contents.dedup();
            let contents: Vec<&str> = contents.iter().map(String::as_str).collect();
            let automaton = aho_corasick::AhoCorasick::builder()
                .match_kind(aho_corasick::MatchKind::LeftmostLongest)
                .build(&contents)
                .unwrap();
            let expected: Vec<Found> = automaton
                .find_iter(&text)
                .map(|found| Found { start: found.start(), end: found.end(), id: found.pattern().as_u32() })
                .collect();
            assert_eq!(find_all(&contents, &text), expected, "{contents:?} in {text}");
        }
    }
}
