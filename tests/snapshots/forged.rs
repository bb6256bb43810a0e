//! Snapshots whose checksum is right and whose fields are not.

use std::sync::Arc;

use gemmoe::backend::KvDtype;
use gemmoe::text::grammar::{Grammar, GrammarKind};
use gemmoe::{Error, LogitBias, Model, Overflow, Session, SessionOptions, Status};
use xxhash_rust::xxh3::xxh3_64;

use crate::common::{Random, load};
use crate::counting::peak_bytes;
use crate::{bytes_of, directory, restored, small, small_directory, status_of, written};

/// The snapshot with length and checksum made right.
fn sealed(mut body: Vec<u8>) -> Vec<u8> {
    let length = body.len() as u64 + 8;
    body[12..20].copy_from_slice(&length.to_le_bytes());
    let checksum = xxh3_64(&body);
    body.extend_from_slice(&checksum.to_le_bytes());
    body
}

/// The snapshot with other bytes at a place.
fn forged(bytes: &[u8], at: usize, part: &[u8]) -> Vec<u8> {
    let mut body = bytes[..bytes.len() - 8].to_vec();
    body[at..at + part.len()].copy_from_slice(part);
    sealed(body)
}

// Places of fields, up to those of varying length.
const VERSION: usize = 8;
const CONTEXT_SIZE: usize = 28;
const DTYPE: usize = 32;
const OVERFLOW: usize = 36;
const KEEP: usize = 40;
const SETTINGS: usize = 44;
const TOP_K: usize = 68;
const BIASES: usize = 84;
/// After one bias.
const DROPPED: usize = BIASES + 4 + 8;
const COUNT: usize = DROPPED + 8;
const PROCESSED: usize = COUNT + 4;
const FLAGS: usize = PROCESSED + 4;
const TOKENS: usize = FLAGS + 4;
/// After two tokens and the logits of a vocabulary of 11.
const ROUTES: usize = TOKENS + 2 * 4 + 11 * 4;
/// After routes of two layers to two experts.
const CONTROL: usize = ROUTES + 2 * 2 * 2 * 4;
/// After masks and biases of two layers of four experts.
const GRAMMAR: usize = CONTROL + 4 + 2 * 8 + 2 * 4 * 4;

/// Uses a session that a forged snapshot gave: whatever it holds, calls answer.
fn use_up(session: &mut Session) {
    let answers = |error: &Error| {
        let expected = [Status::ContextFull, Status::NotANumber, Status::NoLogits, Status::GrammarViolation];
        assert!(expected.contains(&error.status()), "{error}");
    };
    let _ = session.logits().map(|logits| logits.len());
    for _ in 0..3 {
        let _ = session.step().inspect_err(answers);
    }
    let half = session.tokens().len() / 2;
    session.rewind(half).unwrap();
    let _ = session.prefill(&[1]).inspect_err(answers);
    let _ = session.step().inspect_err(answers);
    restored(session.model(), &bytes_of(session)).unwrap();
}

#[test]
fn another_version_is_told_apart_from_damage() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let bytes = small(&model);
    for version in [0, 2, 3, 1 << 24, u32::MAX] {
        let other = forged(&bytes, VERSION, &version.to_le_bytes());
        assert_eq!(status_of(&model, &other), Status::SnapshotVersion, "{version}");
    }
    assert_eq!(forged(&bytes, VERSION, &1u32.to_le_bytes()), bytes);
}

#[test]
fn absurd_fields_are_refused_in_bounded_memory() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let bytes = small(&model);
    let number = |value: u32| value.to_le_bytes().to_vec();
    let float = |value: f32| value.to_le_bytes().to_vec();
    let mut cases = vec![
        (CONTEXT_SIZE, number(1), Status::InvalidArgument),
        (CONTEXT_SIZE, number(65), Status::InvalidArgument),
        (CONTEXT_SIZE, number(u32::MAX), Status::InvalidArgument),
        (DTYPE, number(4), Status::SnapshotDamaged),
        (DTYPE, number(u32::MAX), Status::SnapshotDamaged),
        // Of another width: the rest has not the right length.
        (DTYPE, number(1), Status::SnapshotDamaged),
        (OVERFLOW, number(2), Status::SnapshotDamaged),
        (OVERFLOW, [number(1), number(u32::MAX)].concat(), Status::InvalidArgument),
        (OVERFLOW, [number(1), number(19)].concat(), Status::InvalidArgument),
        (TOP_K, number(12), Status::SnapshotDamaged),
        (BIASES, number(12), Status::SnapshotDamaged),
        (BIASES, number(u32::MAX), Status::SnapshotDamaged),
        (BIASES + 4, number(11), Status::SnapshotDamaged),
        (BIASES + 8, float(f32::NAN), Status::SnapshotDamaged),
        (BIASES + 8, float(f32::INFINITY), Status::SnapshotDamaged),
        (DROPPED, u64::MAX.to_le_bytes().to_vec(), Status::SnapshotDamaged),
        (COUNT, number(21), Status::InvalidArgument),
        (COUNT, number(u32::MAX), Status::InvalidArgument),
        (COUNT, number(0), Status::SnapshotDamaged),
        (COUNT, number(20), Status::SnapshotDamaged),
        (PROCESSED, number(3), Status::SnapshotDamaged),
        (PROCESSED, number(u32::MAX), Status::SnapshotDamaged),
        (PROCESSED, number(0), Status::SnapshotDamaged),
        (FLAGS, number(0), Status::SnapshotDamaged),
        (FLAGS, number(4), Status::SnapshotDamaged),
        (FLAGS, number(u32::MAX), Status::SnapshotDamaged),
        (TOKENS, number(11), Status::SnapshotDamaged),
        (TOKENS + 4, number(u32::MAX), Status::SnapshotDamaged),
        (ROUTES, number(4), Status::SnapshotDamaged),
        (CONTROL, number(2), Status::SnapshotDamaged),
        (CONTROL, number(0), Status::SnapshotDamaged),
        (CONTROL + 4, vec![0; 8], Status::SnapshotDamaged),
        (CONTROL + 4, vec![0xff; 8], Status::SnapshotDamaged),
        (CONTROL + 12, vec![0x10, 0, 0, 0, 0, 0, 0, 0], Status::SnapshotDamaged),
        (CONTROL + 20, float(f32::NAN), Status::SnapshotDamaged),
        (CONTROL + 48, float(f32::NEG_INFINITY), Status::SnapshotDamaged),
        (GRAMMAR, number(4), Status::SnapshotDamaged),
        (GRAMMAR, number(u32::MAX), Status::SnapshotDamaged),
        // A grammar, where the model has no tokenizer or the source goes past the end.
        (GRAMMAR, [number(2), number(u32::MAX)].concat(), Status::SnapshotDamaged),
        (GRAMMAR, [number(2), number(0)].concat(), Status::NoTokenizer),
    ];
    for setting in 0..6 {
        for value in [f32::NAN, f32::INFINITY, -3.0, 1e9] {
            cases.push((SETTINGS + 4 * setting, float(value), Status::SnapshotDamaged));
        }
    }
    for (at, part, expected) in cases {
        let forged = forged(&bytes, at, &part);
        let (status, peak) = peak_bytes(|| status_of(&model, &forged));
        assert_eq!(status, expected, "{part:?} at {at}");
        // A session of the model's longest context, and no more. Other tests of the file run beside this one.
        assert!(peak < 64 << 20, "{part:?} at {at}: {peak} bytes");
    }
    // With a window that slides by itself it is a good snapshot.
    assert_eq!(status_of(&model, &forged(&bytes, OVERFLOW, &number(1))), Status::Ok);
    assert_eq!(status_of(&model, &forged(&bytes, KEEP, &number(99))), Status::Ok, "unused without sliding");
}

#[test]
fn any_bit_changed_under_a_right_checksum_is_an_error_or_a_session_that_answers() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let bytes = small(&model);
    let mut sessions = 0;
    for at in 8..bytes.len() - 8 {
        for bit in 0..8 {
            let changed = forged(&bytes, at, &[bytes[at] ^ 1 << bit]);
            if let Ok(mut session) = restored(&model, &changed) {
                use_up(&mut session);
                sessions += 1;
            }
        }
    }
    println!("{sessions} of {} snapshots with one bit changed were sessions", (bytes.len() - 16) * 8);
    assert!(sessions > 1000);
}

#[test]
fn random_bytes_after_a_right_beginning_are_an_error_or_a_session_that_answers() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let bytes = small(&model);
    let mut random = Random::new(93);
    for _ in 0..3000 {
        let mut body = bytes[..bytes.len() - 8].to_vec();
        for _ in 0..1 + random.below(6) {
            let at = CONTEXT_SIZE + 4 * random.below((body.len() - CONTEXT_SIZE) / 4);
            let value = [0, 1, 2, 3, 7, 11, 20, u32::MAX, random.bits() as u32][random.below(9)];
            body[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        if random.below(4) == 0 {
            body.truncate(28 + random.below(body.len() - 28));
        }
        if let Ok(mut session) = restored(&model, &sealed(body)) {
            use_up(&mut session);
        }
    }
}

/// A snapshot under a grammar, and the places of its source and of the number of its tokens.
fn constrained(model: &Arc<Model>, source: &str) -> (Vec<u8>, usize, usize) {
    let grammar = Grammar::new(model.grammar_vocabulary().unwrap(), GrammarKind::Regex, source).unwrap();
    let options = SessionOptions { context_size: 20, kv_dtype: Some(KvDtype::F32), ..Default::default() };
    let mut session = Session::new(Arc::clone(model), &options).unwrap();
    session.push(&[2]).unwrap();
    session.set_grammar(Some(&grammar)).unwrap();
    session.push(&[263]).unwrap();
    let bytes = bytes_of(&session);
    let source_at = bytes.windows(source.len()).position(|part| part == source.as_bytes()).unwrap();
    (bytes, source_at, source_at + source.len())
}

#[test]
fn a_grammar_that_does_not_compile_or_did_not_allow_its_tokens_is_refused() {
    let directory = written(&directory());
    let model = load(directory.path());
    let (bytes, source_at, count_at) = constrained(&model, "h?(el|lo)*");
    assert_eq!(status_of(&model, &bytes), Status::Ok);
    let kind_at = source_at - 8;
    let number = |value: u32| value.to_le_bytes().to_vec();
    let cases = [
        (source_at, b"h?(el|lo(*".to_vec(), Status::GrammarSyntax),
        (source_at, b"(((((((((h".to_vec(), Status::GrammarSyntax),
        (source_at, vec![0xff; 10], Status::SnapshotDamaged),
        (kind_at, number(1), Status::GrammarSyntax),
        (kind_at, number(3), Status::GrammarSyntax),
        (kind_at, number(4), Status::SnapshotDamaged),
        (kind_at + 4, number(u32::MAX), Status::SnapshotDamaged),
        (count_at, number(u32::MAX), Status::SnapshotDamaged),
        (count_at, number(2), Status::SnapshotDamaged),
        (count_at + 4, number(30), Status::GrammarViolation),
        (count_at + 4, number(320), Status::SnapshotDamaged),
    ];
    for (at, part, expected) in cases {
        let (status, peak) = peak_bytes(|| status_of(&model, &forged(&bytes, at, &part)));
        assert_eq!(status, expected, "{part:?} at {at}");
        assert!(peak < 64 << 20, "{part:?} at {at}: {peak} bytes");
    }
    let mut random = Random::new(94);
    for at in kind_at..count_at + 8 {
        let changed = forged(&bytes, at, &[bytes[at] ^ 1 << random.below(8)]);
        if let Ok(mut session) = restored(&model, &changed) {
            use_up(&mut session);
        }
    }
}

#[test]
fn a_window_that_slides_past_any_number_of_tokens_goes_on() {
    let directory = small_directory().to_temporary();
    let model = load(directory.path());
    let options = SessionOptions { context_size: 6, overflow: Overflow::Slide { keep: 1 }, ..Default::default() };
    let mut session = Session::new(Arc::clone(&model), &options).unwrap();
    session.set_logit_bias(LogitBias::new(&[(9, -1.0)], 11).unwrap());
    session.prefill(&[2, 3]).unwrap();
    let bytes = bytes_of(&session);
    for (dropped, expected) in [(1 << 62, Status::Ok), ((1 << 62) + 1, Status::SnapshotDamaged)] {
        let changed = forged(&bytes, DROPPED, &u64::to_le_bytes(dropped));
        assert_eq!(status_of(&model, &changed), expected, "{dropped}");
        if let Ok(mut session) = restored(&model, &changed) {
            for _ in 0..40 {
                session.step().unwrap();
            }
        }
    }
}
