//! A template's source before the engine sees it: refused where it could exhaust the stack, and changed so that what
//! `set` keeps is flat.
//!
//! The engine's parser, its compiler and the destructors of its values recurse, and a stack that overflows ends the
//! process. A tree is only as deep as a tag has tokens, so those are counted. A value could be wrapped in another
//! again and again, or a namespace put into itself, but only through `set`: `{% set a = b %}` becomes
//! `{% set a = gemmoe_flat((b)) %}`, and `values::flat` judges what is kept.
//!
//! The engine decides where a tag begins; here every `{{` and `{%` is taken for one, also in comments, raw blocks
//! and strings. So nothing is missed, and a `set` tag quoted in a string is changed as well.

use crate::error::{Error, Result, Status};

use super::values::{FLAT, FLAT_MEMBER};

/// The longest source. The longest in use have 20,000 bytes.
const MAX_SOURCE_BYTES: usize = 1 << 18;
/// The most tokens of one tag: each may be a level of the tree.
const MAX_TAG_TOKENS: usize = 512;
/// The most `elif` of a template: each is a level of the tree.
const MAX_ELIFS: usize = 256;

/// The source the engine may compile. Fails with TemplateLimit, TemplateSyntax or OutOfMemory.
pub fn prepare(source: &str) -> Result<String> {
    if source.len() > MAX_SOURCE_BYTES {
        let text = format!("the chat template has {} bytes, expected at most {MAX_SOURCE_BYTES}", source.len());
        return Err(Error::new(Status::TemplateLimit, text));
    }
    if source.contains(FLAT) {
        return Err(Error::new(Status::TemplateSyntax, format!("the chat template uses the reserved name {FLAT}")));
    }
    let mut insertions: Vec<(usize, &str)> = Vec::new();
    let mut elifs = 0;
    for tag in tags(source) {
        let tag = tag?;
        elifs += usize::from(tag.word == "elif");
        if elifs > MAX_ELIFS {
            let text = format!("the chat template has more than {MAX_ELIFS} elif");
            return Err(Error::new(Status::TemplateLimit, text));
        }
        if let Some((start, end)) = tag.kept() {
            insertions.try_reserve(2).map_err(|_| Error::out_of_memory("chat template", 64))?;
            insertions.push((start, if tag.has_dot { FLAT_MEMBER } else { FLAT }));
            insertions.push((end, "))"));
        }
    }
    insertions.sort_by_key(|insertion| insertion.0);

    let mut prepared = String::new();
    let needed = source.len() + insertions.iter().map(|(_, text)| text.len() + 2).sum::<usize>();
    prepared.try_reserve_exact(needed).map_err(|_| Error::out_of_memory("chat template", needed))?;
    let mut done = 0;
    for (at, text) in insertions {
        prepared.push_str(&source[done..at]);
        prepared.push_str(text);
        prepared.push_str(if text == "))" { "" } else { "((" });
        done = at;
    }
    prepared.push_str(&source[done..]);
    // What was inserted may have moved the end of another tag, if tags are quoted in strings.
    for tag in tags(&prepared) {
        if !tag?.is_flat(&prepared) {
            let text = "the chat template has a set tag inside another tag";
            return Err(Error::new(Status::TemplateSyntax, text));
        }
    }
    Ok(prepared)
}

/// What may be a tag, and what matters of it.
struct Tag<'s> {
    /// Its first word, where it is a `{%` tag; else empty.
    word: &'s str,
    /// Where the value of its first `=` starts, and whether a `.` stands before.
    value: Option<usize>,
    has_dot: bool,
    /// Where its last token ends; none when the source ends first, which the engine refuses.
    end: Option<usize>,
    /// Where the first bracket after that `=` closes.
    closes: Option<usize>,
}

impl Tag<'_> {
    /// Start and end of the value a `set` tag keeps.
    fn kept(&self) -> Option<(usize, usize)> {
        self.value.zip(self.end).filter(|(start, end)| self.word == "set" && start < end)
    }

    /// Whether what the tag keeps, if anything, is passed through `flat` as a whole.
    fn is_flat(&self, source: &str) -> bool {
        let Some((start, end)) = self.kept() else { return true };
        let name = if self.has_dot { FLAT_MEMBER } else { FLAT };
        let value = &source[start..end];
        value.strip_prefix(name).is_some_and(|rest| rest.starts_with("((")) && self.closes == Some(end)
    }
}

/// Everything in the source that may be a tag.
fn tags(source: &str) -> impl Iterator<Item = Result<Tag<'_>>> {
    let opens = |at: &usize| matches!(&source.as_bytes()[*at..], [b'{', b'{' | b'%', ..]);
    (0..source.len()).filter(opens).map(|at| read_tag(source, at))
}

/// Reads a tag as the engine's lexer does.
fn read_tag(source: &str, start: usize) -> Result<Tag<'_>> {
    let bytes = source.as_bytes();
    let closer: &[u8] = if bytes[start + 1] == b'%' { b"%}" } else { b"}}" };
    let mut tag = Tag { word: "", value: None, has_dot: false, end: None, closes: None };
    let mut at = start + 2;
    at += usize::from(matches!(bytes.get(at), Some(b'-' | b'+')));
    let (mut tokens, mut depth, mut last_end, mut last) = (0usize, 0i64, at, b' ');
    loop {
        let rest = &bytes[at..];
        let Some(&byte) = rest.first() else { return Ok(tag) };
        if byte.is_ascii_whitespace() {
            at += 1;
            continue;
        }
        let sign = usize::from(matches!(byte, b'-' | b'+'));
        if depth == 0 && rest[sign..].starts_with(closer) {
            tag.end = Some(last_end);
            return Ok(tag);
        }
        tokens += 1;
        if tokens > MAX_TAG_TOKENS {
            let line = source[..start].matches('\n').count() + 1;
            let text = format!("line {line}: a tag of the chat template has more than {MAX_TAG_TOKENS} tokens");
            return Err(Error::new(Status::TemplateLimit, text));
        }
        let length = token_length(rest);
        let token = source.get(at..at + length).unwrap_or("");
        at += length;
        if tokens == 1 && closer == b"%}" {
            tag.word = token;
        }
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => {
                depth -= 1;
                if depth == 0 && tag.value.is_some() && tag.closes.is_none() {
                    tag.closes = Some(at);
                }
            }
            b'=' if length == 1 && depth == 0 && tag.value.is_none() => {
                tag.value = Some(at + bytes[at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count());
            }
            b'.' if tag.value.is_none() => tag.has_dot = true,
            _ => {}
        }
        // What `loop.changed` remembers could be the loop itself, which nothing would ever free.
        if last == b'.' && token == "changed" {
            return Err(Error::new(Status::TemplateSyntax, "the chat template uses loop.changed, which is not supported"));
        }
        last = byte;
        last_end = at;
    }
}

/// The length of the token at the start of `rest`, which is not empty.
fn token_length(rest: &[u8]) -> usize {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    match rest {
        [b'/', b'/', ..] | [b'*', b'*', ..] | [b'=' | b'!' | b'>' | b'<', b'=', ..] => 2,
        [quote @ (b'\'' | b'"'), text @ ..] => {
            let mut length = 0;
            while length < text.len() && text[length] != *quote {
                length += if text[length] == b'\\' { 2 } else { 1 };
            }
            (length + 2).min(rest.len())
        }
        [first, ..] if is_word(*first) => rest.iter().take_while(|byte| is_word(**byte)).count(),
        _ => 1,
    }
}
