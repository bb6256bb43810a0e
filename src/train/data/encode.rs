//! Rows as token ids, with what of them is learned.

use super::report::{Fault, RowResult};
use super::row::{BETWEEN, Row, Turn, join_all};
use super::turns::Writer;
use super::{DataOptions, LongRows};
use crate::engine::Model;
use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};
use crate::text::{EncodeOptions, Tokenizer};
use crate::train::document::Document;
use crate::train::trainer::Pair;

const WHAT: &str = "the tokens of a row";

/// How rows of a model are written.
pub struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    options: &'a DataOptions,
    bos: u32,
    /// What ends a text.
    eos: Option<u32>,
    /// None where the model has no turns: prompt and response are joined.
    writer: Option<Writer<'a>>,
}

/// What became of a row.
pub struct Encoded<T> {
    pub made: T,
    /// Its end is missing.
    pub is_cut: bool,
}

impl<'a> Encoder<'a> {
    /// Fails with `NoTokenizer`, and `TemplateSyntax` and its like where the model's own template is broken.
    pub fn new(model: &'a Model, options: &'a DataOptions) -> Result<Encoder<'a>> {
        let writer = match model.chat_template() {
            Ok(_) => Some(Writer { model }),
            Err(error) if error.status() == Status::TemplateFailed => None,
            Err(error) => return Err(error),
        };
        let config = model.config();
        let (bos, eos) = (config.bos_token_id, config.eos_token_ids.first().copied());
        Ok(Encoder { tokenizer: model.tokenizer()?, options, bos, eos, writer })
    }

    /// Bytes of one section of a text: one that is tokenised by itself.
    pub fn section_bytes(&self) -> usize {
        (64 << 10).max(16 * self.options.max_tokens)
    }

    /// The tokens of a section of a text, without BOS; behind the last one is EOS.
    pub fn section(&self, text: &str, is_last: bool) -> Result<Vec<u32>> {
        let mut tokens = self.tokens(text)?;
        if let Some(eos) = self.eos.filter(|_| is_last) {
            tokens.try_reserve(1).map_err(|_| Error::out_of_memory(WHAT, size_of::<u32>()))?;
            tokens.push(eos);
        }
        Ok(tokens)
    }

    /// Documents that a section of so many tokens becomes: as few as they can be.
    pub fn parts(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.options.max_tokens - 1)
    }

    /// One of these documents: all are about as long.
    pub fn part(&self, tokens: &[u32], part: usize) -> Result<Document> {
        let parts = self.parts(tokens.len());
        let range = tokens.len() * part / parts..tokens.len() * (part + 1) / parts;
        self.document(&[], &tokens[range])
    }

    /// A conversation: what the assistant says is learned, with what ends its turns.
    pub fn conversation(&self, turns: &[Turn]) -> RowResult<Encoded<Document>> {
        let most = self.options.max_tokens;
        let mut document = match &self.writer {
            Some(writer) => writer.conversation(turns, most)?,
            None => {
                let (prompt, response) = self.joined(turns)?;
                self.document(&prompt, &response)?
            }
        };
        let tokens = document.tokens.len();
        if tokens > most && self.options.long_rows != LongRows::Cut {
            return Err(self.too_long());
        }
        document.is_response.truncate(most);
        let Some(last) = document.is_response.iter().rposition(|is_response| *is_response) else {
            let text = format!("has a prompt that leaves no room for a response in {most} tokens (max_tokens)");
            return Err(Fault::Bad(text));
        };
        // What is behind all that is learned need not be computed.
        document.tokens.truncate(last + 1);
        document.is_response.truncate(last + 1);
        if self.options.learn_prompts {
            document.is_response[1..].fill(true);
        }
        Ok(Encoded { made: document, is_cut: tokens > most })
    }

    /// Of a row that has more tokens than are taken.
    pub fn too_long(&self) -> Fault {
        Fault::Long(format!("has more than the {} tokens that are taken (max_tokens)", self.options.max_tokens))
    }

    /// Two answers to one conversation, whose tokens are the same before both.
    pub fn pair(&self, context: &[Turn], answers: [&str; 2]) -> RowResult<Encoded<Pair>> {
        let (prompt, mut answers) = self.answers(context, answers)?;
        let most = self.options.max_tokens;
        let tokens = 2 * prompt.len() + answers[0].len() + answers[1].len();
        if tokens > most {
            if self.options.long_rows != LongRows::Cut {
                let text = format!("has {tokens} tokens in both answers with their prompt, at most {most} are taken");
                return Err(Fault::Long(format!("{text} (max_tokens)")));
            }
            let room = most.saturating_sub(2 * prompt.len());
            // Each gets half, and what the other leaves of its own.
            let half = room / 2;
            let kept = [0, 1].map(|index| half.max(room.saturating_sub(answers[1 - index].len())));
            answers.iter_mut().zip(kept).for_each(|(answer, kept)| answer.truncate(kept));
            if answers.iter().any(Vec::is_empty) {
                let text = format!("has a prompt that leaves no room for two answers in {most} tokens (max_tokens)");
                return Err(Fault::Bad(text));
            }
        }
        if answers[0] == answers[1] {
            let cut = if tokens > most { " once they are cut (max_tokens)" } else { " as tokens" };
            return Fault::bad(format!("has \"chosen\" and \"rejected\" that are the same{cut}"));
        }
        let [chosen, rejected] = &answers;
        let pair = Pair::new(self.document(&prompt, chosen)?, self.document(&prompt, rejected)?);
        Ok(Encoded { made: pair, is_cut: tokens > most })
    }

    /// A prompt, BOS first, and two answers to it.
    fn answers(&self, context: &[Turn], answers: [&str; 2]) -> RowResult<(Vec<u32>, [Vec<u32>; 2])> {
        match &self.writer {
            Some(writer) => writer.answers(context, answers),
            None => {
                let prompt = self.plain_prompt(context)?;
                Ok((prompt, [self.section(answers[0], true)?, self.section(answers[1], true)?]))
            }
        }
    }

    /// A prompt, BOS first, and its response with EOS, for a model without turns.
    fn joined(&self, turns: &[Turn]) -> RowResult<(Vec<u32>, Vec<u32>)> {
        match turns {
            [context @ .., response] if response.is_assistant() => {
                Ok((self.plain_prompt(context)?, self.section(&response.text, true)?))
            }
            _ => Fault::bad(NO_TURNS),
        }
    }

    fn plain_prompt(&self, context: &[Turn]) -> RowResult<Vec<u32>> {
        let text = match context {
            [prompt] if prompt.role == "user" => join_all(&[&prompt.text])?,
            [system, prompt] if system.role == "system" && prompt.role == "user" => {
                join_all(&[&system.text, BETWEEN, &prompt.text])?
            }
            _ => return Fault::bad(NO_TURNS),
        };
        let options = EncodeOptions { bos: Some(self.bos), parse_special: false };
        Ok(self.tokenizer.encode(&text, options)?)
    }

    fn tokens(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, EncodeOptions::default())
    }

    /// A prompt, which is BOS alone where it is empty, and what is learned.
    fn document(&self, prompt: &[u32], response: &[u32]) -> Result<Document> {
        let prompt = if prompt.is_empty() { &[self.bos][..] } else { prompt };
        let length = prompt.len() + response.len();
        let mut document =
            Document { tokens: try_with_capacity(WHAT, length)?, is_response: try_vec(WHAT, length, false)? };
        document.tokens.extend_from_slice(prompt);
        document.tokens.extend_from_slice(response);
        document.is_response[prompt.len()..].fill(true);
        Ok(document)
    }
}

const NO_TURNS: &str = "has several turns, and the model has no chat template to write them with: expected one message \
                        of a user, a system's before it or none, and one answer";

/// What a row other than a text becomes.
pub enum Made {
    Document(Encoded<Document>),
    Pair(Encoded<Pair>),
}

impl Encoder<'_> {
    /// A row that is one document or pair; a text is several, section by section.
    pub fn row(&self, row: &Row) -> RowResult<Option<Made>> {
        Ok(match row {
            Row::Text(_) => None,
            Row::Conversation(turns) => Some(Made::Document(self.conversation(turns)?)),
            Row::Pair { context, chosen, rejected } => Some(Made::Pair(self.pair(context, [chosen, rejected])?)),
        })
    }
}
