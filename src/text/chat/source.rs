//! A template's source before the engine sees it: refused where it could exhaust the stack, and changed so that every
//! list and object has been paid for.
//!
//! The engine's parser, its compiler and the destructors of its values recurse, and a stack that overflows ends the
//! process. A tree is only as deep as a tag has tokens, so those are counted. And the engine counts what it makes, but
//! not how often the same string stands in a list of lists, or in a namespace that holds itself: printing one could
//! take all memory. So whatever is put into a list, an object or a bracket, passed to a call or kept by `set` goes
//! through `values::flat`: `{% set a = [b] %}` becomes `{% set a = gemmoe_flat((gemmoe_flat([b]))) %}`. What would get
//! around that is no part of the language: `*`, and statements no chat template needs.
//!
//! Tags are found and cut into tokens exactly as the engine does it.

use crate::error::{Error, Result, Status};

use super::values::{FLAT, FLAT_MEMBER};

/// The longest source. The longest in use have about 20,000 bytes.
const MAX_SOURCE_BYTES: usize = 1 << 18;
/// The most tokens of one tag: each may be a level of the tree.
const MAX_TAG_TOKENS: usize = 512;
/// The most `elif` of a template: each is a level of the tree.
const MAX_ELIFS: usize = 256;

/// The statements a template may use.
const STATEMENTS: [&str; 12] =
    ["for", "endfor", "if", "elif", "else", "endif", "set", "endset", "macro", "endmacro", "break", "continue"];
/// Words an operand does not end with: a bracket after one begins a value.
const OPERATORS: [&str; 8] = ["in", "not", "and", "or", "if", "elif", "else", "is"];

/// The source the engine may compile. Fails with TemplateLimit, TemplateSyntax or OutOfMemory; the message names the
/// line.
pub fn prepare(source: &str) -> Result<String> {
    if source.len() > MAX_SOURCE_BYTES {
        let text = format!("the chat template has {} bytes, expected at most {MAX_SOURCE_BYTES}", source.len());
        return Err(Error::new(Status::TemplateLimit, text));
    }
    if source.contains(FLAT) {
        return Err(Error::new(Status::TemplateSyntax, format!("the chat template uses the reserved name {FLAT}")));
    }
    let mut prepared = String::new();
    // At most one pair of brackets and a name for each character.
    let most = source.len() * (FLAT_MEMBER.len() + 8);
    prepared.try_reserve(most).map_err(|_| Error::out_of_memory("chat template", most))?;
    let mut elifs = 0;
    let mut done = 0;
    while let Some(start) = find_opening(source, done) {
        prepared.push_str(&source[done..start]);
        if source.as_bytes()[start + 1] == b'#' {
            let inside = start + 2 + sign(source, start + 2);
            let length = source[inside..].find("#}").ok_or_else(|| refuse(source, start, "a comment has no end"))?;
            done = inside + length + 2;
            prepared.push_str(&source[start..done]);
            continue;
        }
        let mut tag = Tag::new(source, start, &mut prepared);
        done = tag.rewrite()?;
        elifs += usize::from(tag.word == "elif");
        if elifs > MAX_ELIFS {
            let text = format!("the chat template has more than {MAX_ELIFS} elif");
            return Err(Error::new(Status::TemplateLimit, text));
        }
    }
    prepared.push_str(&source[done..]);
    prepared.shrink_to_fit();
    Ok(prepared)
}

fn find_opening(source: &str, from: usize) -> Option<usize> {
    let bytes = source.as_bytes();
    (from..bytes.len()).find(|at| matches!(&bytes[*at..], [b'{', b'{' | b'%' | b'#', ..]))
}

/// The length of the white-space sign at `at`.
fn sign(source: &str, at: usize) -> usize {
    usize::from(matches!(source.as_bytes().get(at), Some(b'-' | b'+')))
}

fn refuse(source: &str, at: usize, sentence: &str) -> Error {
    let line = source.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1;
    Error::new(Status::TemplateSyntax, format!("line {line}: {sentence}"))
}

/// What an open bracket is.
#[derive(Clone, Copy, PartialEq)]
enum Bracket {
    /// A list, an object, or an expression in brackets: to be flattened.
    Value,
    /// The arguments of a call; whether one is open.
    Call { in_argument: bool },
    /// The parameters of a macro; whether the default of one is open.
    Parameters { in_default: bool },
    /// `a[0]`, the targets of `for` and `set`.
    Plain,
}

/// A tag on its way from the source to what the engine gets.
struct Tag<'s, 'p> {
    source: &'s str,
    start: usize,
    at: usize,
    prepared: &'p mut String,
    /// Its first word, where it is a `{%` tag; else empty.
    word: &'s str,
    brackets: Vec<Bracket>,
    tokens: usize,
    /// The last token.
    last: &'s str,
    /// Whether a `.` stands before the `=` of a `set`, and whether that has come.
    has_dot: bool,
    keeps: bool,
}

impl<'s, 'p> Tag<'s, 'p> {
    fn new(source: &'s str, start: usize, prepared: &'p mut String) -> Self {
        Tag {
            source,
            start,
            at: start,
            prepared,
            word: "",
            brackets: Vec::new(),
            tokens: 0,
            last: "",
            has_dot: false,
            keeps: false,
        }
    }

    /// Writes the tag anew; returns where it ends.
    fn rewrite(&mut self) -> Result<usize> {
        let is_statement = self.source.as_bytes()[self.start + 1] == b'%';
        let closer = if is_statement { "%}" } else { "}}" };
        self.copy(2 + sign(self.source, self.start + 2));
        loop {
            let spaces = self.source.as_bytes()[self.at..].iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            self.copy(spaces);
            if self.brackets.is_empty() {
                let sign = sign(self.source, self.at);
                if self.source.as_bytes()[self.at + sign..].starts_with(closer.as_bytes()) {
                    if self.keeps && self.last == "=" {
                        return Err(self.refuse("set has no value"));
                    }
                    if self.keeps {
                        self.prepared.push_str("))");
                    }
                    self.copy(sign + closer.len());
                    return Ok(self.at);
                }
            }
            let token = self.token()?;
            self.tokens += 1;
            if self.tokens > MAX_TAG_TOKENS {
                let text = format!("a tag of the chat template has more than {MAX_TAG_TOKENS} tokens");
                return Err(Error::new(Status::TemplateLimit, text));
            }
            if is_statement && self.tokens == 1 {
                self.word = token;
                if !STATEMENTS.contains(&token) {
                    return Err(self.refuse(&format!("{token} is not a supported statement")));
                }
            }
            self.write(token)?;
            self.last = token;
        }
    }

    /// Writes one token, and what has to stand around it.
    fn write(&mut self, token: &'s str) -> Result<()> {
        let opens_value = self.opens_value();
        if let Some(Bracket::Call { in_argument: in_argument @ false }) = self.brackets.last_mut()
            && !matches!(token, ")" | "," | "=")
            && !is_keyword(self.source, self.at, token)
        {
            *in_argument = true;
            self.wrap(FLAT);
        }
        match token {
            "*" | "**" => return Err(self.refuse("* is not supported")),
            "(" | "[" | "{" => {
                let is_target = matches!(self.last, "for" | "set") && self.tokens == 2;
                let is_parameters = self.word == "macro" && self.tokens == 3;
                let bracket = match token {
                    _ if is_parameters => Bracket::Parameters { in_default: false },
                    _ if is_target => Bracket::Plain,
                    _ if opens_value || token == "{" => Bracket::Value,
                    "(" => Bracket::Call { in_argument: false },
                    _ => Bracket::Plain,
                };
                if bracket == Bracket::Value {
                    self.wrap(FLAT);
                }
                self.brackets.push(bracket);
                self.copy(1);
            }
            ")" | "]" | "}" => {
                let Some(bracket) = self.brackets.pop() else { return Err(self.refuse("a bracket was never opened")) };
                if let Bracket::Call { in_argument: true } | Bracket::Parameters { in_default: true } = bracket {
                    self.prepared.push_str("))");
                }
                self.copy(1);
                if bracket == Bracket::Value {
                    self.prepared.push_str("))");
                }
            }
            "," => {
                if let Some(Bracket::Call { in_argument: open } | Bracket::Parameters { in_default: open }) =
                    self.brackets.last_mut()
                    && std::mem::take(open)
                {
                    self.prepared.push_str("))");
                }
                self.copy(1);
            }
            "=" if self.brackets.last() == Some(&Bracket::Parameters { in_default: false }) => {
                self.copy(1);
                self.wrap(FLAT);
                self.brackets.pop();
                self.brackets.push(Bracket::Parameters { in_default: true });
            }
            "=" if self.word == "set" && self.brackets.is_empty() && !self.keeps => {
                self.copy(1);
                self.keeps = true;
                self.wrap(if self.has_dot { FLAT_MEMBER } else { FLAT });
            }
            _ => {
                self.has_dot |= token == ".";
                // What `loop.changed` remembers could be the loop itself, which nothing would ever free.
                if self.last == "." && token == "changed" {
                    return Err(self.refuse("loop.changed is not supported"));
                }
                self.copy(token.len());
            }
        }
        Ok(())
    }

    /// Whether a bracket here begins a value, and does not belong to an operand before it.
    fn opens_value(&self) -> bool {
        match self.last.as_bytes() {
            [] => true,
            [.., b')' | b']' | b'}' | b'"' | b'\''] => false,
            [.., last] if is_word(*last) => OPERATORS.contains(&self.last),
            _ => true,
        }
    }

    fn wrap(&mut self, name: &str) {
        self.prepared.push(' ');
        self.prepared.push_str(name);
        self.prepared.push_str("((");
    }

    fn copy(&mut self, bytes: usize) {
        // Cut where the source has characters that are no tokens: the engine refuses them.
        self.prepared.push_str(self.source.get(self.at..self.at + bytes).unwrap_or("?"));
        self.at += bytes;
    }

    /// The next token, as the engine's lexer has it.
    fn token(&self) -> Result<&'s str> {
        let length = token_length(&self.source.as_bytes()[self.at..]);
        let token = self.source.get(self.at..self.at + length);
        match token {
            Some(token) if length > 0 => Ok(token),
            _ => Err(self.refuse("a tag has no end, or a character that means nothing")),
        }
    }

    fn refuse(&self, sentence: &str) -> Error {
        refuse(self.source, self.start, sentence)
    }
}

/// Whether the token at `at` is the name of an argument: `name=`.
fn is_keyword(source: &str, at: usize, token: &str) -> bool {
    let after = source[at + token.len()..].trim_ascii_start().as_bytes();
    token.bytes().all(is_word) && after.starts_with(b"=") && after.get(1) != Some(&b'=')
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The length of the token at the start of `rest`; 0 if there is none.
fn token_length(rest: &[u8]) -> usize {
    match rest {
        [] => 0,
        [b'/', b'/', ..] | [b'*', b'*', ..] | [b'=' | b'!' | b'>' | b'<', b'=', ..] => 2,
        [quote @ (b'\'' | b'"'), text @ ..] => {
            let mut length = 0;
            while length < text.len() && text[length] != *quote {
                length += if text[length] == b'\\' { 2 } else { 1 };
            }
            // Longer than the rest when the quote is missing.
            if length < text.len() { length + 2 } else { 0 }
        }
        [first, ..] if is_word(*first) => rest.iter().take_while(|byte| is_word(**byte)).count(),
        _ => 1,
    }
}
