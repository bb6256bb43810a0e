//! Stop strings: text comes in piece by piece and goes out up to the first of them; what may be the beginning of one
//! waits.

use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};

/// The most stop strings at once.
pub const MAX_STOP_STRINGS: usize = 64;
/// The longest stop string, in bytes.
pub const MAX_STOP_STRING_BYTES: usize = 4096;

/// A set of stop strings, and how far the text seen so far has come in each.
///
/// The one that ends first is found; of those that end together the longest. Each byte of text takes a constant number
/// of steps for each string, on average, however the text repeats itself.
#[derive(Debug, Default)]
pub struct Stops {
    patterns: Vec<Pattern>,
    /// The last bytes in, as many as may be the beginning of a stop string.
    held: Vec<u8>,
}

/// One stop string, found as Knuth, Morris and Pratt do.
#[derive(Debug)]
struct Pattern {
    text: Vec<u8>,
    /// For each length of a beginning: the longest shorter beginning that it ends in.
    fallback: Vec<u32>,
    /// How much of `text` the bytes seen so far end in.
    matched: usize,
}

impl Pattern {
    fn new(text: &str) -> Result<Pattern> {
        let mut copy = try_with_capacity("stop strings", text.len())?;
        copy.extend_from_slice(text.as_bytes());
        let mut pattern = Pattern { fallback: try_vec("stop strings", text.len() + 1, 0)?, text: copy, matched: 0 };
        for length in 1..text.len() {
            let byte = pattern.text[length];
            pattern.advance(byte);
            pattern.fallback[length + 1] = pattern.matched as u32;
        }
        pattern.matched = 0;
        Ok(pattern)
    }

    /// Takes the next byte; `matched` is below the whole length when this is called.
    fn advance(&mut self, byte: u8) {
        while self.matched > 0 && self.text[self.matched] != byte {
            self.matched = self.fallback[self.matched] as usize;
        }
        if self.text[self.matched] == byte {
            self.matched += 1;
        }
    }
}

impl Stops {
    /// A set of stop strings.
    ///
    /// Fails with InvalidArgument (more than `MAX_STOP_STRINGS`, one that is empty or longer than
    /// `MAX_STOP_STRING_BYTES`) or OutOfMemory.
    pub fn new(strings: &[&str]) -> Result<Stops> {
        if strings.len() > MAX_STOP_STRINGS {
            let text = format!("{} stop strings, expected at most {MAX_STOP_STRINGS}", strings.len());
            return Err(Error::new(Status::InvalidArgument, text).at_key("strings"));
        }
        let mut patterns = try_with_capacity("stop strings", strings.len())?;
        for (index, string) in strings.iter().enumerate() {
            if !(1..=MAX_STOP_STRING_BYTES).contains(&string.len()) {
                let key = format!("strings[{index}]");
                let text = format!("{key} has {} bytes, expected 1 to {MAX_STOP_STRING_BYTES}", string.len());
                return Err(Error::new(Status::InvalidArgument, text).at_key(key));
            }
            patterns.push(Pattern::new(string)?);
        }
        let longest = strings.iter().map(|string| string.len()).max().unwrap_or_default();
        Ok(Stops { patterns, held: try_with_capacity("stop strings", longest)? })
    }

    /// How many bytes wait.
    pub fn held_bytes(&self) -> usize {
        self.held.len()
    }

    /// Takes the text at the end of `out`, from byte `start` on, and leaves there what is certain: up to a stop
    /// string, and nothing that may become one. Returns the index of the stop string that was found.
    ///
    /// `out` must have room for `held_bytes` more.
    pub fn filter(&mut self, out: &mut Vec<u8>, start: usize) -> Option<usize> {
        if self.patterns.is_empty() && self.held.is_empty() {
            return None;
        }
        let held = self.held.len();
        let mut found = None;
        let mut seen = start;
        while seen < out.len() && found.is_none() {
            let byte = out[seen];
            seen += 1;
            let mut longest = 0;
            for (index, pattern) in self.patterns.iter_mut().enumerate() {
                pattern.advance(byte);
                if pattern.matched == pattern.text.len() && pattern.matched > longest {
                    longest = pattern.matched;
                    found = Some(index);
                }
            }
        }
        // What waited stands in front again. `seen` now counts it too.
        out.splice(start..start, self.held.drain(..));
        let seen = seen + held;
        let kept = match found {
            Some(index) => self.patterns[index].text.len(),
            None => self.patterns.iter().map(|pattern| pattern.matched).max().unwrap_or_default(),
        };
        let certain = seen - kept;
        if found.is_none() {
            // At most one byte less than the longest string: there is room.
            self.held.extend_from_slice(&out[certain..]);
        } else {
            self.restart();
        }
        out.truncate(certain);
        found
    }

    /// Takes what waits in `earlier`, a set that is given up: it is part of no stop string. Fails with OutOfMemory.
    pub fn take_over(&mut self, earlier: &mut Stops) -> Result<()> {
        let bytes = earlier.held.len();
        self.held.try_reserve(bytes).map_err(|_| Error::out_of_memory("stop strings", bytes))?;
        self.held.append(&mut earlier.held);
        Ok(())
    }

    /// Ends the text: gives what waits. `out` must have room for `held_bytes` more.
    pub fn finish(&mut self, out: &mut Vec<u8>) {
        out.append(&mut self.held);
        self.restart();
    }

    /// Begins a new text.
    pub fn restart(&mut self) {
        self.held.clear();
        self.patterns.iter_mut().for_each(|pattern| pattern.matched = 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::samples::Random;
    use crate::text::{Stopped, TextStream};

    /// The text up to the stop string that ends first, of those the longest, and its index.
    fn naive<'t>(text: &'t str, stops: &[&str]) -> (&'t str, Option<usize>) {
        for end in 0..=text.len() {
            let ending = (0..stops.len()).filter(|index| text.as_bytes()[..end].ends_with(stops[*index].as_bytes()));
            // Of equal strings the first.
            if let Some(index) = ending.max_by_key(|index| (stops[*index].len(), usize::MAX - index)) {
                return (&text[..end - stops[index].len()], Some(index));
            }
        }
        (text, None)
    }

    #[test]
    fn any_bytes_splits_and_stop_strings_give_what_a_search_of_the_whole_gives() {
        let mut random = Random::new(11);
        let letters: [&[u8]; 9] =
            [b"a", b"a", b"b", b"\n", "é".as_bytes(), "🦀".as_bytes(), &[0xC3], &[0x80], &[0xF0, 0x9F]];
        let words = ["a", "b", "\n", "é", "🦀", "\u{FFFD}", "aa", "ab"];
        let mut stopped = 0;
        for round in 0..60_000 {
            let bytes: Vec<u8> =
                (0..random.below(30)).flat_map(|_| letters[random.below(letters.len())].iter().copied()).collect();
            let stops: Vec<String> = (0..random.below(5))
                .map(|_| (0..1 + random.below(4)).map(|_| words[random.below(words.len())]).collect())
                .collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let mut stream = TextStream::new();
            stream.set_stop_strings(&stops).unwrap();
            let whole = String::from_utf8_lossy(&bytes).into_owned();
            let (expected, index) = naive(&whole, &stops);
            for _ in 0..2 {
                let mut out = Vec::new();
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (part, tail) = rest.split_at(random.below(rest.len().min(6) + 1));
                    let before = out.len();
                    stream.push(part, &mut out).unwrap();
                    assert!(std::str::from_utf8(&out[before..]).is_ok(), "{round}: a push wrote half a character");
                    rest = tail;
                }
                let reason = stream.stopped();
                stream.finish(&mut out).unwrap();
                assert_eq!(String::from_utf8(out).unwrap(), expected, "{round}: {bytes:x?} {stops:?}");
                // A broken character at the end of the text completes a stop string only when the text is finished.
                if reason.is_some() || !whole.ends_with('\u{FFFD}') {
                    assert_eq!(reason, index.map(Stopped::String), "{round}: {bytes:x?} {stops:?}");
                }
                assert_eq!((stream.held_bytes(), stream.stopped()), (0, None));
                stopped += usize::from(reason.is_some());
            }
        }
        assert!(stopped > 10_000, "{stopped}");
    }

    #[test]
    fn text_waits_only_as_long_as_it_may_become_a_stop_string() {
        let mut stream = TextStream::new();
        stream.set_stop_strings(&["User:", "\n\n"]).unwrap();
        let mut push = |bytes: &[u8]| {
            let mut out = Vec::new();
            stream.push(bytes, &mut out).unwrap();
            (String::from_utf8(out).unwrap(), stream.held_bytes(), stream.stopped())
        };
        assert_eq!(push(b"one\n"), ("one".into(), 1, None));
        assert_eq!(push(b"two"), ("\ntwo".into(), 0, None));
        assert_eq!(push(b"UUse"), ("U".into(), 3, None));
        assert_eq!(push(b"r"), ("".into(), 4, None));
        assert_eq!(push(b": what"), ("".into(), 0, Some(Stopped::String(0))));
        assert_eq!(push(b"never seen"), ("".into(), 0, Some(Stopped::String(0))));
    }

    #[test]
    fn other_stop_strings_and_stop_tokens_lose_no_text() {
        let mut stream = TextStream::new();
        let mut out = Vec::new();
        stream.set_stop_strings(&["abc"]).unwrap();
        stream.push(b"xab", &mut out).unwrap();
        stream.set_stop_strings(&["bcd"]).unwrap();
        stream.push(b"cbcd!", &mut out).unwrap();
        assert_eq!((&out[..], stream.stopped()), (&b"xabc"[..], Some(Stopped::String(0))));
        stream.finish(&mut out).unwrap();
        stream.push(b"ybc", &mut out).unwrap();
        stream.set_stop_strings(&[]).unwrap();
        stream.push(b"", &mut out).unwrap();
        assert_eq!(out, b"xabcybc");
        stream.set_stop_strings(&["zz"]).unwrap();
        stream.push(b"z\xC3", &mut out).unwrap();
        stream.stop_at_token();
        stream.push(b"not seen", &mut out).unwrap();
        assert_eq!(stream.stopped(), Some(Stopped::Token));
        stream.finish(&mut out).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "xabcybcz\u{FFFD}");
    }

    #[test]
    fn a_stop_string_that_cannot_be_is_refused_and_changes_nothing() {
        let long = "x".repeat(MAX_STOP_STRING_BYTES + 1);
        let many = vec!["x"; MAX_STOP_STRINGS + 1];
        let mut stream = TextStream::new();
        stream.set_stop_strings(&["ab"]).unwrap();
        for strings in [&["a", ""][..], &[&long], &many] {
            assert_eq!(stream.set_stop_strings(strings).unwrap_err().status(), Status::InvalidArgument);
        }
        let mut out = Vec::new();
        stream.push(b"xab", &mut out).unwrap();
        assert_eq!(out, b"x");
        stream.set_stop_strings(&vec![&long[1..]; MAX_STOP_STRINGS]).unwrap();
    }

    #[test]
    fn repetitive_text_takes_no_quadratic_time() {
        let stop = "a".repeat(MAX_STOP_STRING_BYTES - 1) + "b";
        let mut stream = TextStream::new();
        stream.set_stop_strings(&[&stop]).unwrap();
        let start = std::time::Instant::now();
        let mut out = Vec::new();
        for _ in 0..1 << 14 {
            stream.push(&[b'a'; 64], &mut out).unwrap();
        }
        // About 20 ms; a search from every byte would take 4096 times the steps.
        let seconds = start.elapsed().as_secs_f64();
        assert!(seconds < 5.0, "{seconds} s");
        assert_eq!(out.len() + stream.held_bytes(), 1 << 20);
    }
}
