//! Damage nobody chose: files cut anywhere, and single bits turned over. Either an error, or a model that runs.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use gemmoe::Status;

use crate::case::{CONFIG, INDEX, TOKENIZER, WEIGHTS, sharded, tokenizer, write_good};
use crate::common::Random;

/// Statuses a step of a model from a damaged file may have.
const STEP_STATUSES: [Status; 2] = [Status::NotANumber, Status::TokenOutOfRange];

/// Loads and, if that works, runs; says what went wrong beyond an honest error.
fn fault_of(path: &Path) -> Option<String> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let model = match crate::load(path, false) {
            Ok(model) => model,
            Err(error) if error.status() == Status::Internal => return Some(format!("internal: {error}")),
            Err(_) => return None,
        };
        let result = crate::generate(&model, 2);
        let error = result.err().filter(|error| !STEP_STATUSES.contains(&error.status()))?;
        // A small context of the model's own is the one other reason not to run.
        (error.status() != Status::InvalidArgument).then(|| format!("a step failed: {error}"))
    }));
    outcome.unwrap_or_else(|_| Some("a panic".to_owned()))
}

#[test]
fn a_weight_file_cut_anywhere_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    write_good(directory.path());
    let path = directory.path().join(WEIGHTS);
    let whole = std::fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut random = Random::new(21);
    // Every length around the edges, the others drawn; half of them inside the header.
    let mut lengths: Vec<usize> = (0..20).chain(header - 20..header + 20).collect();
    lengths.extend((0..120).map(|_| random.below(header)));
    lengths.extend((0..120).map(|_| header + random.below(whole.len() - header)));
    for length in lengths {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = crate::load(directory.path(), false).err().unwrap_or_else(|| panic!("{length} bytes were enough"));
        assert_eq!((error.status(), error.file()), (Status::FileLength, Some(WEIGHTS)), "{length} bytes: {error}");
    }
}

#[test]
fn a_bit_turned_over_is_an_error_or_a_model_that_runs() {
    let sharded = |path: &Path| sharded(path, None);
    let with_tokenizer = tokenizer("/version", Some("1.0".into()));
    let unchanged = |_: &Path| ();
    type Prepare<'a> = &'a dyn Fn(&Path);
    let rows: [(&str, usize, Prepare); 4] = [
        (WEIGHTS, 500, &unchanged),
        (CONFIG, 300, &unchanged),
        (INDEX, 300, &sharded),
        (TOKENIZER, 400, &with_tokenizer),
    ];
    for (file, flips, prepare) in rows {
        let directory = tempfile::tempdir().unwrap();
        write_good(directory.path());
        prepare(directory.path());
        let path = directory.path().join(file);
        let whole = std::fs::read(&path).unwrap();
        // Of the weights only the header: a bit of a number gives another number.
        let length = match file {
            WEIGHTS => 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize,
            _ => whole.len(),
        };
        let mut random = Random::new(22);
        for flip in 0..flips {
            // All bits of the length in front, then bits anywhere.
            let at = if flip < 64 { flip } else { random.below(8 * length) };
            let mut damaged = whole.clone();
            damaged[at / 8] ^= 1 << (at % 8);
            std::fs::write(&path, damaged).unwrap();
            if let Some(fault) = fault_of(directory.path()) {
                panic!("{file}, bit {at}: {fault}");
            }
        }
    }
}
