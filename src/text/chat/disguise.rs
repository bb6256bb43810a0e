//! Message texts on their way through a template: disguised so that no special token can be found in them, and
//! recognised afterwards.
//!
//! Each character a special token begins or ends with is replaced by a stand-in, a private-use character that occurs
//! nowhere in the conversation and the template; one more stands before the white space at the end of a text. Whatever
//! a template puts beside a text, a special token cannot begin in it, end in it or reach across it. Of a piece that a
//! template cuts out of a text, only that none begins or ends in it: one that writes half a markup, such a piece and the
//! other half, means what comes of it.

use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};

use super::super::tokenizer::{EncodeOptions, Tokenizer, push_token};
use super::Message;

/// The private-use characters, in the order they are taken.
const PRIVATE_USE: [std::ops::RangeInclusive<u32>; 3] = [0xE000..=0xF8FF, 0xF_0000..=0xF_FFFD, 0x10_0000..=0x10_FFFD];

/// The stand-ins of one conversation.
pub struct Disguise {
    /// (character, its stand-in), rising in both.
    pairs: Vec<(char, char)>,
    separator: char,
    /// Whether a special token could reach across a text of nothing but white space.
    specials_have_space: bool,
}

impl Disguise {
    /// Chooses the stand-ins. Fails with TemplateLimit when too few private-use characters are left, and OutOfMemory.
    pub fn new(tokenizer: &Tokenizer, template: &str, messages: &[Message]) -> Result<Disguise> {
        let mut edges = Vec::new();
        let mut specials_have_space = false;
        for special in tokenizer.special_texts() {
            edges.try_reserve(2).map_err(|_| Error::out_of_memory("special tokens", 8))?;
            edges.extend(special.chars().next());
            edges.extend(special.chars().next_back());
            specials_have_space |= special.contains(char::is_whitespace);
        }
        edges.sort_unstable();
        edges.dedup();

        let mut taken = try_vec("private-use characters", 0x11_0000 / 64, 0u64)?;
        let mut take = |text: &str| {
            for character in text.chars().filter(|character| *character >= '\u{E000}') {
                taken[character as usize / 64] |= 1 << (character as usize % 64);
            }
        };
        take(template);
        tokenizer.special_texts().for_each(&mut take);
        messages.iter().for_each(|message| take(message.text));
        let mut free = PRIVATE_USE
            .into_iter()
            .flatten()
            .filter(|code| taken[*code as usize / 64] >> (code % 64) & 1 == 0)
            .filter_map(char::from_u32);
        let mut next = || {
            let text = "the messages and the template use too many private-use characters";
            free.next().ok_or_else(|| Error::new(Status::TemplateLimit, text))
        };
        let separator = next()?;
        let mut pairs = try_with_capacity("special tokens", edges.len())?;
        for edge in edges {
            pairs.push((edge, next()?));
        }
        Ok(Disguise { pairs, separator, specials_have_space })
    }

    /// The disguised text. Fails with OutOfMemory.
    pub fn put_on(&self, text: &str) -> Result<String> {
        let mut disguised = String::new();
        let replaced = text.chars().filter(|character| self.stand_in(*character).is_some()).count();
        // A stand-in has at most four bytes, one at least is not there any more.
        let needed = text.len() + 3 * replaced + 4;
        disguised.try_reserve_exact(needed).map_err(|_| Error::out_of_memory("chat text", needed))?;
        let visible = text.trim_end().len();
        let separate = visible > 0 || (self.specials_have_space && !text.is_empty());
        let disguise = |character| self.stand_in(character).unwrap_or(character);
        disguised.extend(text[..visible].chars().map(disguise));
        disguised.extend(separate.then_some(self.separator));
        disguised.extend(text[visible..].chars().map(disguise));
        Ok(disguised)
    }

    /// The ids of a rendered template: special tokens where the template wrote their markup, and plain text, without
    /// its disguise, between them. Fails with OutOfMemory.
    pub fn encode(&self, rendered: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        let mut start = 0;
        let mut stretch = String::new();
        loop {
            let found = tokenizer.find_special(rendered, start);
            let end = found.map_or(rendered.len(), |found| found.start);
            self.take_off(&rendered[start..end], &mut stretch)?;
            tokenizer.encode_to(&stretch, EncodeOptions::default(), &mut tokens)?;
            let Some(found) = found else { return Ok(tokens) };
            push_token(&mut tokens, found.id)?;
            start = found.end;
        }
    }

    fn take_off(&self, text: &str, out: &mut String) -> Result<()> {
        out.clear();
        // A stand-in has three bytes or four, as many as any character.
        let needed = text.len().saturating_add(text.len() / 3);
        out.try_reserve(needed).map_err(|_| Error::out_of_memory("chat text", needed))?;
        for character in text.chars().filter(|character| *character != self.separator) {
            out.push(self.original(character).unwrap_or(character));
        }
        Ok(())
    }

    fn stand_in(&self, character: char) -> Option<char> {
        let index = self.pairs.binary_search_by_key(&character, |pair| pair.0).ok()?;
        Some(self.pairs[index].1)
    }

    fn original(&self, stand_in: char) -> Option<char> {
        if stand_in < '\u{E000}' {
            return None;
        }
        let index = self.pairs.binary_search_by_key(&stand_in, |pair| pair.1).ok()?;
        Some(self.pairs[index].0)
    }
}
