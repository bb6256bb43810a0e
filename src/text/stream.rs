//! Bytes of tokens in, whole UTF-8 out: a character split between two tokens waits until it is complete.

use std::str::from_utf8;

use crate::error::{Error, Result};

/// What stands for bytes that are not UTF-8.
const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();

/// A decoder that holds back an incomplete character.
///
/// However the bytes are cut into pushes, the output put together equals `String::from_utf8_lossy` of all of
/// them: nothing is lost or doubled, and every push alone writes valid UTF-8.
#[derive(Clone, Debug, Default)]
pub struct TextStream {
    /// The start of a character whose end has not come; the first `held_length` bytes count.
    held: [u8; 3],
    held_length: usize,
}

impl TextStream {
    /// A stream that holds nothing back.
    pub fn new() -> Self {
        TextStream::default()
    }

    /// How many bytes wait for the rest of their character.
    pub fn held_bytes(&self) -> usize {
        self.held_length
    }

    /// Appends to `out` every character that `bytes` completes.
    ///
    /// Fails with OutOfMemory, having changed neither the stream nor `out`. It allocates only when `out` has less
    /// room left than three bytes for each byte in.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        // The worst case is a replacement for every byte; with the room taken first, nothing below can fail.
        reserve(out, bytes.len().saturating_add(self.held_length).saturating_mul(REPLACEMENT.len()))?;
        let mut rest = self.finish_held(bytes, out);
        loop {
            match from_utf8(rest) {
                Ok(text) => {
                    out.extend_from_slice(text.as_bytes());
                    return Ok(());
                }
                Err(error) => {
                    let (valid, invalid) = rest.split_at(error.valid_up_to());
                    out.extend_from_slice(valid);
                    let Some(length) = error.error_len() else {
                        self.held[..invalid.len()].copy_from_slice(invalid);
                        self.held_length = invalid.len();
                        return Ok(());
                    };
                    out.extend_from_slice(REPLACEMENT);
                    rest = &invalid[length..];
                }
            }
        }
    }

    /// Ends the text: a character still incomplete becomes one U+FFFD. The stream is then as new.
    ///
    /// Fails with OutOfMemory, having changed nothing.
    pub fn finish(&mut self, out: &mut Vec<u8>) -> Result<()> {
        if self.held_length > 0 {
            reserve(out, REPLACEMENT.len())?;
            out.extend_from_slice(REPLACEMENT);
            self.held_length = 0;
        }
        Ok(())
    }

    /// Feeds the held character byte by byte until it is complete or broken; returns the bytes not used.
    fn finish_held<'a>(&mut self, bytes: &'a [u8], out: &mut Vec<u8>) -> &'a [u8] {
        let mut rest = bytes;
        while self.held_length > 0 {
            let Some((&next, tail)) = rest.split_first() else { break };
            let mut candidate = [0; 4];
            candidate[..self.held_length].copy_from_slice(&self.held[..self.held_length]);
            candidate[self.held_length] = next;
            let candidate = &candidate[..self.held_length + 1];
            match from_utf8(candidate) {
                Ok(character) => {
                    out.extend_from_slice(character.as_bytes());
                    self.held_length = 0;
                    rest = tail;
                }
                Err(error) if error.error_len().is_none() => {
                    self.held[self.held_length] = next;
                    self.held_length += 1;
                    rest = tail;
                }
                // What was held could still have become a character, so it is the broken part, whole; `next` is not.
                Err(_) => {
                    out.extend_from_slice(REPLACEMENT);
                    self.held_length = 0;
                }
            }
        }
        rest
    }
}

fn reserve(out: &mut Vec<u8>, bytes: usize) -> Result<()> {
    out.try_reserve(bytes).map_err(|_| Error::out_of_memory("decoded text", bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;
    use crate::text::samples::Random;

    /// Pieces of bytes that make every kind of whole, cut and broken character likely.
    const FRAGMENTS: [&[u8]; 16] = [
        b"a",
        b"\n",
        "é".as_bytes(),
        "€".as_bytes(),
        "🦀".as_bytes(),
        &[0x80],
        &[0xBF, 0xBF],
        &[0xC3],
        &[0xC0, 0xAF],
        &[0xE2, 0x82],
        &[0xED, 0xA0, 0x80],
        &[0xE0, 0x80],
        &[0xF0, 0x9F, 0xA6],
        &[0xF4, 0x90, 0x80, 0x80],
        &[0xF0, 0x80],
        &[0xFF, 0xFE],
    ];

    fn random_bytes(random: &mut Random) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..random.below(24) {
            if random.below(4) == 0 {
                bytes.push(random.below(256) as u8);
            } else {
                bytes.extend_from_slice(FRAGMENTS[random.below(FRAGMENTS.len())]);
            }
        }
        bytes
    }

    #[test]
    fn any_bytes_in_any_splits_give_what_from_utf8_lossy_gives_for_the_whole() {
        let mut random = Random::new(1);
        for _ in 0..50_000 {
            let bytes = random_bytes(&mut random);
            let mut stream = TextStream::new();
            let mut out = Vec::new();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (part, tail) = rest.split_at(random.below(rest.len().min(5)) + usize::from(random.below(8) > 0));
                let before = out.len();
                stream.push(part, &mut out).unwrap();
                assert!(from_utf8(&out[before..]).is_ok(), "{bytes:x?}: a push wrote half a character");
                rest = tail;
            }
            stream.finish(&mut out).unwrap();
            assert_eq!(out, String::from_utf8_lossy(&bytes).as_bytes(), "{bytes:x?}");
        }
    }

    #[test]
    fn a_character_in_four_pushes_comes_out_with_the_fourth() {
        let mut stream = TextStream::new();
        let mut out = Vec::new();
        for (pushed, byte) in "🦀".bytes().enumerate() {
            assert_eq!((stream.held_bytes(), out.len()), (pushed, 0));
            stream.push(&[byte], &mut out).unwrap();
        }
        assert_eq!(out, "🦀".as_bytes());
        assert_eq!(stream.held_bytes(), 0);
    }

    #[test]
    fn a_finished_stream_starts_afresh() {
        let mut stream = TextStream::new();
        let mut out = Vec::new();
        stream.push(&[0xE2, 0x82], &mut out).unwrap();
        stream.finish(&mut out).unwrap();
        stream.finish(&mut out).unwrap();
        stream.push(&[0xAC, b'x'], &mut out).unwrap();
        assert_eq!(out, "\u{FFFD}\u{FFFD}x".as_bytes());
    }

    #[test]
    fn text_that_cannot_be_held_is_an_error() {
        assert_eq!(reserve(&mut Vec::new(), usize::MAX).unwrap_err().status(), Status::OutOfMemory);
    }
}
