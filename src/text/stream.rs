//! Bytes of tokens in, whole UTF-8 out: a character split between two tokens waits until it is complete, and so does
//! what may become a stop string.

use std::str::from_utf8;

use crate::error::{Error, Result};

use super::stops::Stops;

/// What stands for bytes that are not UTF-8.
const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();

/// Why a stream gives no more text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// `stop_at_token` was called.
    Token,
    /// The stop string of this index was completed.
    String(usize),
}

/// A decoder that holds back an incomplete character, and what may become a stop string.
///
/// However the bytes are cut into pushes, the output put together equals `String::from_utf8_lossy` of all of
/// them, up to the first stop string: nothing is lost or doubled, and every push alone writes valid UTF-8. First is the
/// stop string that ends first, and of those that end together the longest.
#[derive(Debug, Default)]
pub struct TextStream {
    stops: Stops,
    stopped: Option<Stopped>,
    /// The start of a character whose end has not come; the first `held_length` bytes count.
    held: [u8; 3],
    held_length: usize,
}

impl TextStream {
    /// A stream that holds nothing back.
    pub fn new() -> Self {
        TextStream::default()
    }

    /// Replaces the stop strings; they count for text that is pushed from now on. What waits comes with the next push.
    ///
    /// Fails with InvalidArgument (more than 64, or one that is empty or longer than 4096 bytes) or OutOfMemory,
    /// having changed nothing.
    pub fn set_stop_strings(&mut self, strings: &[&str]) -> Result<()> {
        let mut stops = Stops::new(strings)?;
        stops.take_over(&mut self.stops)?;
        self.stops = stops;
        Ok(())
    }

    /// Whether the stream has stopped, and why. Until `finish`, it then gives no more text.
    pub fn stopped(&self) -> Option<Stopped> {
        self.stopped
    }

    /// Stops the stream, unless it has stopped already; `finish` still gives what waits.
    pub fn stop_at_token(&mut self) {
        self.stopped.get_or_insert(Stopped::Token);
    }

    /// How many bytes wait: for the rest of their character or of a stop string.
    pub fn held_bytes(&self) -> usize {
        self.held_length + self.stops.held_bytes()
    }

    /// Appends to `out` the text that is certain with `bytes`: up to a stop string, or to what may become one.
    ///
    /// Fails with OutOfMemory, having changed neither the stream nor `out`. It allocates only when `out` has less
    /// room left than three bytes for each byte in, and as many as wait.
    pub fn push(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Result<()> {
        if self.stopped.is_some() {
            return Ok(());
        }
        // The worst case is a replacement for every byte; with the room taken first, nothing below can fail.
        let decoded = bytes.len().saturating_add(self.held_length).saturating_mul(REPLACEMENT.len());
        reserve(out, decoded.saturating_add(self.stops.held_bytes()))?;
        let start = out.len();
        self.decode(bytes, out);
        self.stopped = self.stops.filter(out, start).map(Stopped::String);
        Ok(())
    }

    /// Appends to `out`, which has room for it, every character that `bytes` completes.
    fn decode(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        let mut rest = self.finish_held(bytes, out);
        loop {
            match from_utf8(rest) {
                Ok(text) => {
                    out.extend_from_slice(text.as_bytes());
                    return;
                }
                Err(error) => {
                    let (valid, invalid) = rest.split_at(error.valid_up_to());
                    out.extend_from_slice(valid);
                    let Some(length) = error.error_len() else {
                        self.held[..invalid.len()].copy_from_slice(invalid);
                        self.held_length = invalid.len();
                        return;
                    };
                    out.extend_from_slice(REPLACEMENT);
                    rest = &invalid[length..];
                }
            }
        }
    }

    /// Ends the text: a character still incomplete becomes one U+FFFD, and what waited comes out, unless a stop string
    /// has ended the text before. The stream is then as new, with the same stop strings.
    ///
    /// Fails with OutOfMemory, having changed nothing.
    pub fn finish(&mut self, out: &mut Vec<u8>) -> Result<()> {
        reserve(out, REPLACEMENT.len() + self.stops.held_bytes())?;
        if !matches!(self.stopped, Some(Stopped::String(_))) {
            let start = out.len();
            if self.held_length > 0 {
                out.extend_from_slice(REPLACEMENT);
            }
            if self.stops.filter(out, start).is_none() {
                self.stops.finish(out);
            }
        }
        self.stops.restart();
        self.held_length = 0;
        self.stopped = None;
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
