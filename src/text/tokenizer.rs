//! The tokenizer: text to ids and back.

use crate::error::{Error, Result, Status};
use crate::memory::{try_vec, try_with_capacity};

use super::added_tokens::{AddedTokens, Found};
use super::bpe::Merger;
use super::json_tree::{quoted, refusal};
use super::merges::MergeTable;
use super::stream::TextStream;
use super::tokenizer_file::{self, AddedToken, SPACE_MARK, TokenizerFile};
use super::vocabulary::{Span, Vocabulary};

/// How text becomes ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// The id to put first: Gemma degrades badly without its BOS.
    pub bos: Option<u32>,
    /// Whether markup such as `<start_of_turn>` becomes its special token. Only for text the host trusts, such as a
    /// chat template; in a user's text it would let the user speak as somebody else.
    pub parse_special: bool,
}

/// A model's tokenizer. It never changes, so threads can share it.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    merges: MergeTable,
    /// The token of each ASCII character that is a piece, and for the space that of its mark: most text is found here
    /// and not by hashing.
    ascii_tokens: [Option<u32>; 128],
    /// The token of each byte; absent only for ASCII bytes that are pieces themselves (Gemma's tab).
    byte_tokens: [Option<u32>; 256],
    /// Rising.
    special: Vec<u32>,
    /// What is found in any text, and what is found when special markup counts.
    ordinary_added: AddedTokens,
    all_added: AddedTokens,
    /// The bytes of all tokens, and where each token's are.
    bytes: Vec<u8>,
    byte_spans: Vec<Span>,
}

impl Tokenizer {
    /// Reads `bytes`, the contents of a `tokenizer.json`, for an embedding of `vocab_size` rows.
    ///
    /// Everything later calls rely on is checked here. Nothing of `bytes` is kept. Fails with TokenizerSyntax,
    /// TokenizerUnsupported, TokenizerValue, FileTooLarge, InvalidArgument (`vocab_size` is 0 or over 2^31 - 1) or
    /// OutOfMemory; the error names the key, and the caller adds the file.
    pub fn from_json(bytes: &[u8], vocab_size: usize) -> Result<Tokenizer> {
        let TokenizerFile { mut vocabulary, merges, added_tokens, unknown_token } =
            tokenizer_file::parse(bytes, vocab_size)?;
        let mut special = add_tokens(&mut vocabulary, &added_tokens)?;
        special.sort_unstable();
        let is_special = |token: u32| special.binary_search(&token).is_ok();
        if let Some(piece) = unknown_token
            && vocabulary.id_of(&piece).is_none()
        {
            let sentence = format!("is {}, which the vocabulary lacks", quoted(&piece));
            return Err(refusal(Status::TokenizerValue, "model.unk_token", sentence));
        }
        let ascii_tokens = std::array::from_fn(|code| character_token(&vocabulary, marked(code as u8 as char)));
        let byte_tokens = find_byte_tokens(&vocabulary, &ascii_tokens)?;
        check_special_tokens(&added_tokens)?;
        let merges = MergeTable::new(&merges, &vocabulary, is_special)?;
        let (bytes, byte_spans) = token_bytes(&vocabulary)?;

        let contents = added_tokens.iter().map(|token| (token.content.as_str(), token.id as u32));
        let ordinary = added_tokens.iter().filter(|token| !token.special);
        let ordinary_contents = ordinary.map(|token| (token.content.as_str(), token.id as u32));
        Ok(Tokenizer {
            ordinary_added: AddedTokens::new(ordinary_contents)?,
            all_added: AddedTokens::new(contents)?,
            vocabulary,
            merges,
            ascii_tokens,
            byte_tokens,
            special,
            bytes,
            byte_spans,
        })
    }

    /// The ids of `text`.
    ///
    /// Without `parse_special` no text gives a special token: its markup is read as ordinary characters. Takes time
    /// in proportion to n log n. Fails with TokenOutOfRange (`bos`), InvalidArgument (4 GiB of text or more) or
    /// OutOfMemory.
    pub fn encode(&self, text: &str, options: EncodeOptions) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        self.encode_to(text, options, &mut tokens)?;
        Ok(tokens)
    }

    /// As `encode`, appending to `tokens`, which after a failure holds some of the ids.
    pub(super) fn encode_to(&self, text: &str, options: EncodeOptions, tokens: &mut Vec<u32>) -> Result<()> {
        if text.len() >= u32::MAX as usize {
            let sentence = format!("text has {} bytes, expected fewer than {}", text.len(), u32::MAX);
            return Err(Error::new(Status::InvalidArgument, sentence));
        }
        if let Some(bos) = options.bos {
            self.check_token(bos)?;
            push_token(tokens, bos)?;
        }
        let added = if options.parse_special { &self.all_added } else { &self.ordinary_added };
        let mut merger = Merger::default();
        let mut start = 0;
        while let Some(found) = added.find(text, start) {
            self.encode_plain(&text[start..found.start], &mut merger, tokens)?;
            push_token(tokens, found.id)?;
            start = found.end;
        }
        self.encode_plain(&text[start..], &mut merger, tokens)
    }

    /// The first special token at or after byte `from` that `encode` with `parse_special` would find.
    pub(super) fn find_special(&self, text: &str, mut from: usize) -> Option<Found> {
        loop {
            let found = self.all_added.find(text, from)?;
            if self.is_special(found.id) {
                return Some(found);
            }
            from = found.end;
        }
    }

    /// The texts of all special tokens.
    pub(super) fn special_texts(&self) -> impl Iterator<Item = &str> {
        self.special.iter().map(|token| self.vocabulary.piece(*token))
    }

    /// The bytes a token stands for; empty for an id without an entry, and for a special token unless `keep_special`.
    ///
    /// The bytes of one token need not be whole UTF-8: pass them through a `TextStream`. Fails with TokenOutOfRange.
    pub fn token_bytes(&self, token: u32, keep_special: bool) -> Result<&[u8]> {
        self.check_token(token)?;
        if !keep_special && self.is_special(token) {
            return Ok(&[]);
        }
        Ok(&self.bytes[self.byte_spans[token as usize].range()])
    }

    /// The text of `tokens`, valid UTF-8: what a `TextStream` gives for their bytes. Fails with TokenOutOfRange or
    /// OutOfMemory.
    pub fn decode(&self, tokens: &[u32], keep_special: bool) -> Result<Vec<u8>> {
        let mut stream = TextStream::new();
        let mut text = Vec::new();
        for &token in tokens {
            stream.push(self.token_bytes(token, keep_special)?, &mut text)?;
        }
        stream.finish(&mut text)?;
        Ok(text)
    }

    /// Whether the file marks this token as special.
    pub fn is_special(&self, token: u32) -> bool {
        self.special.binary_search(&token).is_ok()
    }

    /// The id of a vocabulary entry or added token, written as in the file: `▁` for a space, `<0x0A>` for a byte.
    pub fn token_id(&self, piece: &str) -> Option<u32> {
        self.vocabulary.id_of(piece)
    }

    /// How many tokens have an entry; ids can be larger, up to the rows of the embedding.
    pub fn len(&self) -> usize {
        self.vocabulary.count()
    }

    /// Whether no token has an entry. Never so: there are byte tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Heap memory in bytes.
    pub fn bytes_in_use(&self) -> usize {
        self.vocabulary.bytes_in_use()
            + self.merges.bytes_in_use()
            + self.ordinary_added.bytes_in_use()
            + self.all_added.bytes_in_use()
            + self.special.capacity() * size_of::<u32>()
            + self.bytes.capacity()
            + self.byte_spans.capacity() * size_of::<Span>()
    }

    /// Encodes a stretch without added tokens.
    fn encode_plain(&self, text: &str, merger: &mut Merger, tokens: &mut Vec<u32>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        merger.start(text.len())?;
        for character in text.chars() {
            let token = match self.ascii_tokens.get(character as usize) {
                Some(token) => *token,
                None => character_token(&self.vocabulary, character),
            };
            if let Some(token) = token {
                merger.push(token);
                continue;
            }
            for byte in marked(character).encode_utf8(&mut [0; 4]).bytes() {
                // Every byte of a character that is no piece has a token: `find_byte_tokens` made sure.
                self.byte_tokens[usize::from(byte)].into_iter().for_each(|token| merger.push(token));
            }
        }
        merger.finish(&self.merges, tokens)
    }

    fn check_token(&self, token: u32) -> Result<()> {
        if (token as usize) < self.vocabulary.size() {
            return Ok(());
        }
        let text = format!("token {token}, expected an id below {}", self.vocabulary.size());
        Err(Error::new(Status::TokenOutOfRange, text))
    }
}

/// Appends one token. Fails with OutOfMemory.
pub(super) fn push_token(tokens: &mut Vec<u32>, token: u32) -> Result<()> {
    tokens.try_reserve(1).map_err(|_| Error::out_of_memory("tokens", size_of::<u32>()))?;
    tokens.push(token);
    Ok(())
}

/// Brings added tokens and vocabulary together; returns the ids of the special ones.
///
/// An added token is either an entry of the vocabulary with that id, or it is new and so is its id.
fn add_tokens(vocabulary: &mut Vocabulary, added_tokens: &[AddedToken]) -> Result<Vec<u32>> {
    let mut seen = try_vec("added tokens", vocabulary.size(), false)?;
    let mut special = try_with_capacity("special tokens", added_tokens.len())?;
    for (index, token) in added_tokens.iter().enumerate() {
        let content = quoted(&token.content);
        let refuse = |error: Error| {
            refusal(error.status(), &format!("added_tokens[{index}]"), format_args!("{content} {error}"))
        };
        match vocabulary.id_of(&token.content) {
            None => vocabulary.insert(&token.content, token.id).map_err(refuse)?,
            Some(id) if u64::from(id) == token.id => {}
            Some(id) => {
                let text = format!("has id {}, expected {id}, its id in model.vocab", token.id);
                return Err(refuse(Error::new(Status::TokenizerValue, text)));
            }
        }
        // The vocabulary holds this id now, so it is below the size.
        if std::mem::replace(&mut seen[token.id as usize], true) {
            return Err(refuse(Error::new(Status::TokenizerValue, "is there twice")));
        }
        if token.special {
            special.push(token.id as u32);
        }
    }
    Ok(special)
}

/// Refuses special tokens that plain text could become without a merge. Merges are `MergeTable`'s to refuse.
fn check_special_tokens(added_tokens: &[AddedToken]) -> Result<()> {
    for (index, token) in added_tokens.iter().enumerate() {
        if token.special && (token.content.chars().count() == 1 || byte_of(&token.content).is_some()) {
            let sentence = format!("{} cannot be special: plain text gives it", quoted(&token.content));
            return Err(refusal(Status::TokenizerValue, &format!("added_tokens[{index}]"), sentence));
        }
    }
    Ok(())
}

/// The normalisation: a space becomes its mark.
fn marked(character: char) -> char {
    if character == ' ' { SPACE_MARK } else { character }
}

/// The token of a single character.
fn character_token(vocabulary: &Vocabulary, character: char) -> Option<u32> {
    vocabulary.id_of(character.encode_utf8(&mut [0; 4]))
}

/// The tokens of bytes, one for each byte that a character without a piece may have.
fn find_byte_tokens(vocabulary: &Vocabulary, ascii_tokens: &[Option<u32>; 128]) -> Result<[Option<u32>; 256]> {
    let mut tokens = [None; 256];
    for (byte, token) in (0u8..=255).zip(&mut tokens) {
        let piece = format!("<0x{byte:02X}>");
        *token = vocabulary.id_of(&piece);
        let as_character = ascii_tokens.get(usize::from(byte)).copied().flatten();
        if token.is_none() && as_character.is_none() {
            let sentence = format!("lacks {piece}, expected a token for every byte");
            return Err(refusal(Status::TokenizerValue, "model.vocab", sentence));
        }
    }
    Ok(tokens)
}

/// The byte a piece of the form `<0x0A>` stands for.
fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_upper_hex = |digit: u8| digit.is_ascii_digit() || (b'A'..=b'F').contains(&digit);
    let valid = digits.len() == 2 && digits.bytes().all(is_upper_hex);
    valid.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The bytes every token stands for.
fn token_bytes(vocabulary: &Vocabulary) -> Result<(Vec<u8>, Vec<Span>)> {
    // A piece never has fewer bytes than it stands for.
    let mut bytes: Vec<u8> = try_with_capacity("token bytes", vocabulary.text_bytes())?;
    let mut spans = try_vec("token bytes", vocabulary.size(), Span::default())?;
    for (id, span) in (0..).zip(&mut spans) {
        let piece = vocabulary.piece(id);
        let start = bytes.len();
        match byte_of(piece) {
            Some(byte) => bytes.push(byte),
            None => {
                for (index, part) in piece.split(SPACE_MARK).enumerate() {
                    bytes.extend_from_slice(if index > 0 { b" " } else { b"" });
                    bytes.extend_from_slice(part.as_bytes());
                }
            }
        }
        let length = bytes.len() - start;
        *span = Span::at_end(bytes.len(), length).ok_or_else(|| Error::out_of_memory("token bytes", length))?;
    }
    Ok((bytes, spans))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::samples::{Random, VOCAB_SIZE, sample};
    use serde_json::{Value, json};

    const PLAIN: EncodeOptions = EncodeOptions { bos: None, parse_special: false };
    const TRUSTED: EncodeOptions = EncodeOptions { bos: None, parse_special: true };

    fn load(file: &Value) -> Result<Tokenizer> {
        Tokenizer::from_json(file.to_string().as_bytes(), VOCAB_SIZE)
    }

    fn tokenizer() -> Tokenizer {
        load(&sample()).unwrap()
    }

    /// The pieces of a text, by their names in the file.
    fn pieces(tokenizer: &Tokenizer, text: &str, options: EncodeOptions) -> Vec<String> {
        let tokens = tokenizer.encode(text, options).unwrap();
        tokens.iter().map(|token| tokenizer.vocabulary.piece(*token).to_owned()).collect()
    }

    #[test]
    fn text_becomes_the_pieces_its_merges_make() {
        let tokenizer = tokenizer();
        let cases: [(&str, &[&str]); 10] = [
            (" hello", &["▁hello"]),
            ("hello", &["h", "e", "ll", "o"]),
            ("  hello", &["▁", "▁hello"]),
            ("   ", &["▁▁", "▁"]),
            ("\n\n\n", &["\n\n", "\n"]),
            ("\té", &["\t", "é"]),
            ("x", &["<0x78>"]),
            ("😀e", &["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "e"]),
            ("<b>bos<b", &["<b>", "bos", "<", "b"]),
            ("", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(pieces(&tokenizer, text, PLAIN), expected, "{text:?}");
        }
    }

    #[test]
    fn ids_are_those_of_the_tokenizers_crate() {
        use tokenizers::Model;
        let file = sample();
        let tokenizer = load(&file).unwrap();
        let merges = file["model"]["merges"].as_array().unwrap().iter().map(|merge| {
            let (left, right) = merge.as_str().unwrap().split_once(' ').unwrap();
            (left.to_owned(), right.to_owned())
        });
        let vocabulary = file["model"]["vocab"].as_object().unwrap();
        let vocabulary = vocabulary.iter().map(|(piece, id)| (piece.clone(), id.as_u64().unwrap() as u32));
        let reference = tokenizers::models::bpe::BPE::builder()
            .vocab_and_merges(vocabulary.collect::<tokenizers::models::bpe::Vocab>(), merges.collect())
            .byte_fallback(true)
            .fuse_unk(true)
            .unk_token("<unk>".into())
            .cache_capacity(0)
            .build()
            .unwrap();
        let mut random = Random::new(5);
        let letters: Vec<char> = "▁▁▁hello<bos>x😀".chars().collect();
        for _ in 0..20_000 {
            let text: String = (0..random.below(40)).map(|_| letters[random.below(letters.len())]).collect();
            let text = text.replace("<b>", "");
            let expected: Vec<u32> = reference.tokenize(&text).unwrap().iter().map(|token| token.id).collect();
            assert_eq!(tokenizer.encode(&text, PLAIN).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn ids_are_those_of_the_definition_for_any_merges() {
        let mut random = Random::new(6);
        for _ in 0..300 {
            let mut file = sample();
            random_merges(&mut file, &mut random);
            let tokenizer = load(&file).unwrap();
            for _ in 0..30 {
                let text: String = (0..random.below(30)).map(|_| ["h", "e", "l", "o"][random.below(4)]).collect();
                let expected = merge_by_definition(&tokenizer, &file, &text);
                assert_eq!(tokenizer.encode(&text, PLAIN).unwrap(), expected, "{text} {}", file["model"]["merges"]);
            }
        }
    }

    /// Merges in random order, so that a piece can be ready long before the merge that would use it.
    fn random_merges(file: &mut Value, random: &mut Random) {
        let mut known: Vec<String> = ["h", "e", "l", "o"].map(String::from).to_vec();
        let mut merges: Vec<String> = Vec::new();
        for _ in 0..20 {
            let (left, right) = (known[random.below(known.len())].clone(), known[random.below(known.len())].clone());
            let (product, merge) = (format!("{left}{right}"), format!("{left} {right}"));
            if merges.contains(&merge) || product.len() > 8 {
                continue;
            }
            if file["model"]["vocab"].get(&product).is_none() {
                let id = file["model"]["vocab"].as_object().unwrap().len();
                file["model"]["vocab"][&product] = json!(id);
            }
            known.push(product);
            merges.insert(random.below(merges.len() + 1), merge);
        }
        file["model"]["merges"] = json!(merges);
    }

    /// Byte pair encoding as it is defined: again and again the leftmost pair of the lowest rank.
    fn merge_by_definition(tokenizer: &Tokenizer, file: &Value, text: &str) -> Vec<u32> {
        let merges: Vec<&str> =
            file["model"]["merges"].as_array().unwrap().iter().map(|merge| merge.as_str().unwrap()).collect();
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let rank = |pair: &[String]| merges.iter().position(|merge| *merge == format!("{} {}", pair[0], pair[1]));
            let best = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((rank(pair)?, at))).min();
            let Some((_, at)) = best else { break };
            let right = parts.remove(at + 1);
            parts[at].push_str(&right);
        }
        parts.iter().map(|part| tokenizer.token_id(part).unwrap()).collect()
    }

    #[test]
    fn plain_text_never_gives_a_special_token() {
        let tokenizer = tokenizer();
        let mut random = Random::new(7);
        let parts = ["<bos>", "<start_of_turn>", "<eos>", "<", "bos>", "start", "_of_turn>", " ", "\n", "<pad>", "é"];
        for _ in 0..20_000 {
            let text: String = (0..random.below(8)).map(|_| parts[random.below(parts.len())]).collect();
            let tokens = tokenizer.encode(&text, PLAIN).unwrap();
            assert!(!tokens.iter().any(|token| tokenizer.is_special(*token)), "{text:?} gave {tokens:?}");
            assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text.as_bytes(), "nothing of it is lost");
        }
    }

    #[test]
    fn trusted_markup_gives_its_special_token() {
        let tokenizer = tokenizer();
        let text = "<start_of_turn> hello<end_of_turn>\n<bos";
        let expected = ["<start_of_turn>", "▁hello", "<end_of_turn>", "\n", "<bos"];
        assert_eq!(pieces(&tokenizer, text, TRUSTED), expected);
    }

    #[test]
    fn the_bos_comes_first_and_alone_for_empty_text() {
        let tokenizer = tokenizer();
        let options = EncodeOptions { bos: Some(2), parse_special: false };
        assert_eq!(tokenizer.encode("", options).unwrap(), [2]);
        assert_eq!(pieces(&tokenizer, " hello", options), ["<bos>", "▁hello"]);
        let beyond = EncodeOptions { bos: Some(VOCAB_SIZE as u32), parse_special: false };
        assert_eq!(tokenizer.encode("", beyond).unwrap_err().status(), Status::TokenOutOfRange);
    }

    #[test]
    fn any_text_comes_back_from_its_tokens() {
        let tokenizer = tokenizer();
        let mut random = Random::new(8);
        for _ in 0..5000 {
            let bytes: Vec<u8> = (0..random.below(60)).map(|_| random.below(256) as u8).collect();
            let text = String::from_utf8_lossy(&bytes).replace('x', " hello\n\n");
            let tokens = tokenizer.encode(&text, PLAIN).unwrap();
            assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn a_token_stands_for_its_bytes() {
        let tokenizer = tokenizer();
        let id = |piece| tokenizer.token_id(piece).unwrap();
        assert_eq!(tokenizer.token_bytes(id("▁hello"), false).unwrap(), b" hello");
        assert_eq!(tokenizer.token_bytes(id("<0xF0>"), false).unwrap(), [0xF0]);
        assert_eq!(tokenizer.token_bytes(2, false).unwrap(), b"");
        assert_eq!(tokenizer.token_bytes(2, true).unwrap(), b"<bos>");
        assert_eq!(tokenizer.token_bytes(VOCAB_SIZE as u32 - 1, true).unwrap(), b"", "a row without an entry");
        for token in [VOCAB_SIZE as u32, u32::MAX] {
            assert_eq!(tokenizer.token_bytes(token, true).unwrap_err().status(), Status::TokenOutOfRange);
            assert!(!tokenizer.is_special(token));
        }
        let half = [2, id("<0xF0>"), id("<0x9F>"), id("e")];
        assert_eq!(tokenizer.decode(&half, false).unwrap(), "\u{FFFD}e".as_bytes());
        assert_eq!(tokenizer.decode(&half, true).unwrap(), "<bos>\u{FFFD}e".as_bytes());
    }

    #[test]
    fn an_added_token_may_lie_beyond_the_vocabulary() {
        let mut file = sample();
        let added = json!({"id": 399, "content": "<|im_start|>", "special": true});
        file["added_tokens"].as_array_mut().unwrap().push(added);
        let tokenizer = load(&file).unwrap();
        assert_eq!(tokenizer.encode("<|im_start|>", TRUSTED).unwrap(), [399]);
        assert_eq!(tokenizer.token_id("<|im_start|>"), Some(399));
        assert_eq!(tokenizer.len(), load(&sample()).unwrap().len() + 1);
    }

    #[test]
    fn a_file_whose_parts_do_not_fit_together_is_refused() {
        let id_of = |file: &Value, piece: &str| file["model"]["vocab"][piece].clone();
        let add = |file: &mut Value, id: Value, content: &str| {
            let token = json!({"id": id, "content": content, "special": true});
            file["added_tokens"].as_array_mut().unwrap().push(token);
        };
        type Break<'a> = &'a dyn Fn(&mut Value);
        let value = Status::TokenizerValue;
        let cases: [(&str, Break, Status, &str); 15] = [
            ("merge of an unknown left", &|f| f["model"]["merges"][2] = json!("q l"), value, "model.merges[2]"),
            ("merge of an unknown right", &|f| f["model"]["merges"][2] = json!("l q"), value, "model.merges[2]"),
            ("merge to an unknown piece", &|f| f["model"]["merges"][2] = json!("h h"), value, "model.merges[2]"),
            ("merge twice", &|f| f["model"]["merges"][3] = json!("l l"), value, "model.merges[3]"),
            ("merge to a special token", &|f| f["model"]["merges"][11] = json!("<bos >"), value, "model.merges[11]"),
            ("unknown token missing", &|f| f["model"]["unk_token"] = json!("<none>"), value, "model.unk_token"),
            ("byte token missing", &|f| drop(vocabulary(f).remove("<0x80>")), value, "model.vocab"),
            ("ASCII byte token missing", &|f| drop(vocabulary(f).remove("<0x78>")), value, "model.vocab"),
            ("added id differs", &|f| f["added_tokens"][7]["id"] = json!(399), value, "added_tokens[7]"),
            ("added id is taken", &|f| add(f, json!(20), "<new>"), value, "added_tokens[9]"),
            ("added id is too large", &|f| add(f, json!(400), "<new>"), value, "added_tokens[9]"),
            ("added id is huge", &|f| add(f, json!(u64::MAX), "<new>"), value, "added_tokens[9]"),
            ("added twice", &|f| add(f, json!(2), "<bos>"), value, "added_tokens[9]"),
            ("special character", &|f| add(f, id_of(f, "é"), "é"), value, "added_tokens[9]"),
            ("special byte", &|f| add(f, id_of(f, "<0x41>"), "<0x41>"), value, "added_tokens[9]"),
        ];
        for (name, break_it, status, key) in cases {
            let mut file = sample();
            break_it(&mut file);
            let error = load(&file).err().unwrap_or_else(|| panic!("{name}: accepted"));
            assert_eq!((error.status(), error.key()), (status, Some(key)), "{name}: {error}");
            assert!(error.to_string().starts_with(key), "{name}: the sentence names the key: {error}");
        }
    }

    fn vocabulary(file: &mut Value) -> &mut serde_json::Map<String, Value> {
        file["model"]["vocab"].as_object_mut().unwrap()
    }

    #[test]
    fn a_broken_byte_anywhere_never_panics() {
        let text = sample().to_string();
        let mut random = Random::new(9);
        let mut accepted = 0;
        for _ in 0..20_000 {
            let mut bytes = text.clone().into_bytes();
            for _ in 0..1 + random.below(3) {
                let at = random.below(bytes.len());
                match random.below(3) {
                    0 => bytes[at] = random.below(256) as u8,
                    1 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, b"\"[]{},: 0-\\"[random.below(11)]),
                }
            }
            if let Ok(tokenizer) = Tokenizer::from_json(&bytes, VOCAB_SIZE) {
                accepted += 1;
                let tokens = tokenizer.encode(" hello<bos>\n\n\t<b>😀", TRUSTED).unwrap();
                tokenizer.decode(&tokens, true).unwrap();
            }
        }
        assert!(accepted > 0, "some changes do no harm");
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let text = sample().to_string();
        for length in 0..text.len() {
            let error = Tokenizer::from_json(&text.as_bytes()[..length], VOCAB_SIZE).err().unwrap();
            // A cut inside a number leaves another number, which can be the id of another piece.
            let expected = [Status::TokenizerSyntax, Status::TokenizerValue];
            assert!(expected.contains(&error.status()), "{length}: {error}");
        }
    }

    #[test]
    fn a_megabyte_of_one_character_takes_no_quadratic_time() {
        let tokenizer = tokenizer();
        for character in ["l", " ", "\n", "x", "<", "\u{FFFD}"] {
            let text = character.repeat((1 << 20) / character.len());
            let start = std::time::Instant::now();
            let tokens = tokenizer.encode(&text, PLAIN).unwrap();
            let seconds = start.elapsed().as_secs_f64();
            // About 0.1 s; quadratic time would be hours, and a busy machine should not fail the test.
            assert!(seconds < 10.0, "{character:?} took {seconds} s");
            assert_eq!(tokenizer.decode(&tokens, false).unwrap(), text.as_bytes());
        }
    }

    #[test]
    fn a_tokenizer_is_shared_between_threads() {
        fn assert_shared<T: Send + Sync>(_: &T) {}
        let tokenizer = tokenizer();
        assert_shared(&tokenizer);
        assert!(!tokenizer.is_empty());
        assert!(tokenizer.bytes_in_use() > tokenizer.vocabulary.text_bytes());
    }
}
