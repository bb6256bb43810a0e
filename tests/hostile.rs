//! Model directories somebody else wrote: every one is refused with its own status and a message that names the
//! culprit, in bounded memory, and leaves the library usable; or it is a model and runs.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

#[path = "hostile/case.rs"]
mod case;
#[path = "hostile/config.rs"]
mod config;
#[path = "hostile/damage.rs"]
mod damage;
#[path = "hostile/file.rs"]
mod file;
#[path = "hostile/files.rs"]
mod files;
#[path = "hostile/header.rs"]
mod header;
#[path = "hostile/index.rs"]
mod index;
#[path = "hostile/memory.rs"]
mod memory;
#[path = "hostile/quantised.rs"]
mod quantised;
#[path = "hostile/tensors.rs"]
mod tensors;
#[path = "hostile/tokenizer.rs"]
mod tokenizer;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use case::Case;
use gemmoe::{LoadOptions, MemoryPlan, Model, Progress, Result, Session, SessionOptions, Status};

/// No refusal takes seconds; only a hang takes this long.
const HANG: Duration = Duration::from_secs(120);

/// The longest message a person should have to read, in bytes, beside the directory's path.
const LONGEST_MESSAGE: usize = 1500;

pub fn load(path: &Path, follow_links: bool) -> Result<Arc<Model>> {
    let mut options = LoadOptions { follow_links, ..Default::default() };
    options.cpu.threads = 1.into();
    Model::load(path, &options, &Progress::default())
}

/// The same as far as the memory plan goes.
pub fn plan(path: &Path, follow_links: bool) -> Result<MemoryPlan> {
    Model::plan(path, &LoadOptions { follow_links, ..Default::default() }, &SessionOptions::default())
}

/// Prefills and steps; what a model from a damaged file must survive.
pub fn generate(model: &Arc<Model>, steps: usize) -> Result<Vec<u32>> {
    let options = SessionOptions { context_size: 16, prefill_chunk: 8, ..Default::default() };
    let mut session = Session::new(Arc::clone(model), &options)?;
    session.prefill(&[2, 3, 5, 7])?;
    (0..steps).map(|_| session.step()).collect()
}

/// Breaks a good directory, loads it and says what was not as the row has it.
fn faults_of(case: &Case) -> Vec<String> {
    let temporary = tempfile::tempdir().unwrap();
    let directory = temporary.path();
    case::write_good(directory);
    (case.break_it)(directory);
    let path = (case.path)(directory);
    let allowed = memory::allowed_to_refuse(&path);
    memory::start();
    let outcome = catch_unwind(AssertUnwindSafe(|| load(&path, case.follow_links).map(drop)));
    let peak = memory::peak();
    let mut faults = Vec::new();
    let error = match outcome {
        Ok(Err(error)) => error,
        Ok(Ok(())) => return vec![format!("it was loaded, expected {:?}", case.status)],
        Err(_) => return vec!["it panicked".to_owned()],
    };
    let text = error.to_string();
    let planned = catch_unwind(AssertUnwindSafe(|| plan(&path, case.follow_links).map(drop)));
    let as_expected = match &planned {
        // A plan asks for no memory.
        Ok(Ok(())) => error.status() == Status::OutOfMemory,
        Ok(Err(planned)) => *planned == error,
        Err(_) => false,
    };
    if !as_expected {
        faults.push(format!("its memory plan gives {planned:?}, loading {error:?}"));
    }
    let mut check = |right: bool, fault: String| {
        if !right {
            faults.push(fault);
        }
    };
    check(error.status() == case.status, format!("status {:?}, expected {:?}", error.status(), case.status));
    if case.file.is_some() {
        check(error.file() == case.file.as_deref(), format!("file {:?}, expected {:?}", error.file(), case.file));
    }
    if case.key.is_some() {
        check(error.key() == case.key.as_deref(), format!("key {:?}, expected {:?}", error.key(), case.key));
    }
    for part in &case.says {
        check(text.contains(part), format!("the message lacks {part:?}"));
    }
    let shown = text.replace(&*path.to_string_lossy(), "").replace(&*directory.to_string_lossy(), "");
    let elsewhere = [std::env::temp_dir(), common::repository()];
    for outside in elsewhere.iter().map(|path| path.to_string_lossy()) {
        check(!shown.contains(&*outside), format!("the message names {outside}"));
    }
    check(shown.len() <= LONGEST_MESSAGE, format!("the message has {} bytes", shown.len()));
    check(error.key().is_none_or(|key| key.len() <= LONGEST_MESSAGE), "the key is too long".to_owned());
    check(error.file().is_none_or(|file| file.len() <= LONGEST_MESSAGE), "the file name is too long".to_owned());
    check(!text.contains(char::is_control), "the message has control characters".to_owned());
    check(peak <= allowed, format!("{peak} bytes at once, allowed are {allowed}"));
    if !faults.is_empty() {
        faults.push(format!("the message: {}", text.chars().take(400).collect::<String>()));
    }
    faults
}

/// Runs a table, then proves that the process is none the worse for it.
fn refuse_all(cases: Vec<Case>, at_least: usize) {
    assert!(cases.len() >= at_least, "only {} cases", cases.len());
    println!("{} cases", cases.len());
    let mut report = Vec::new();
    for case in cases {
        let name = case.name.clone();
        let (send, receive) = channel();
        let thread = std::thread::spawn(move || send.send(faults_of(&case)));
        match receive.recv_timeout(HANG) {
            Ok(faults) => report.extend(faults.iter().map(|fault| format!("{name}: {fault}"))),
            Err(RecvTimeoutError::Disconnected) => report.push(format!("{name}: the case itself failed")),
            Err(RecvTimeoutError::Timeout) => panic!("{name}: hangs"),
        }
        drop(thread.join());
    }
    assert!(report.is_empty(), "\n{}\n", report.join("\n"));
    let good = tempfile::tempdir().unwrap();
    case::write_good(good.path());
    let tokens = generate(&load(good.path(), false).unwrap(), 8).unwrap();
    assert_eq!(tokens.len(), 8);
}

#[test]
fn a_config_that_cannot_be_is_refused() {
    refuse_all(config::cases(), 150);
}

#[test]
fn a_header_that_cannot_be_is_refused() {
    refuse_all(header::cases(), 90);
}

#[test]
fn tensors_that_do_not_make_the_model_are_refused() {
    refuse_all(tensors::cases(), 130);
}

#[test]
fn quantised_directories_that_are_not_what_they_say_are_refused() {
    refuse_all(quantised::cases(), 75);
}

#[test]
fn an_index_that_is_not_true_is_refused() {
    refuse_all(index::cases(), 55);
}

#[test]
fn what_is_no_plain_file_of_the_directory_is_refused() {
    refuse_all(files::cases(), 50);
}

#[test]
fn a_tokenizer_of_another_shape_is_refused() {
    refuse_all(tokenizer::cases(), 60);
}

/// The other side of the tables: what they start from, and what looks odd, is accepted and gives the same tokens.
#[test]
fn odd_directories_that_are_right_are_loaded() {
    type Change = Box<dyn Fn(&Path) + Send>;
    let rows: Vec<(&str, bool, Change)> = vec![
        ("nothing", false, Box::new(|_| ())),
        ("two shards", false, Box::new(|path| case::sharded(path, None))),
        ("a tokenizer", false, Box::new(case::tokenizer("/version", Some("1.0".into())))),
        ("a followed link to inside", true, Box::new(case::moved_behind_link(case::WEIGHTS))),
        ("a followed link to outside", true, Box::new(linked_to_outside)),
        ("a folder nobody asks for", false, Box::new(case::folder("folder"))),
        ("a pipe nobody asks for", false, Box::new(case::pipe("pipe"))),
        ("a broken index beside the single file", false, Box::new(case::bytes(case::INDEX, "{"))),
        ("metadata in the header", false, {
            Box::new(case::header(|header| header["__metadata__"] = serde_json::json!({"format": "pt"})))
        }),
        ("spaces after the header", false, Box::new(case::header_text(|text| text + "        "))),
        ("a tensor of another use and kind", false, {
            Box::new(case::header(|header| {
                let nothing = serde_json::json!({"dtype": "I64", "shape": [0], "data_offsets": [0, 0]});
                header["rotary.inv_freq"] = nothing;
            }))
        }),
    ];
    let mut expected = None;
    for (name, follow_links, change) in rows {
        let temporary = tempfile::tempdir().unwrap();
        let directory = temporary.path().join("model");
        std::fs::create_dir(&directory).unwrap();
        case::write_good(&directory);
        change(&directory);
        let model = load(&directory, follow_links).unwrap_or_else(|error| panic!("{name}: {error}"));
        let tokens = generate(&model, 8).unwrap();
        assert_eq!(expected.get_or_insert_with(|| tokens.clone()), &tokens, "{name}");
    }
}

/// As a download cache keeps its files: beside the directory, with links inside it.
fn linked_to_outside(path: &Path) {
    std::fs::rename(path.join(case::WEIGHTS), path.with_file_name("blob")).unwrap();
    std::os::unix::fs::symlink("../blob", path.join(case::WEIGHTS)).unwrap();
}

#[test]
fn weights_that_are_not_numbers_are_an_error_of_the_step_and_not_of_the_process() {
    for name in ["model.embed_tokens.weight", "model.layers.0.block_sparse_moe.gate.weight", "model.norm.weight"] {
        for bits in [0x7fc0u16, 0x7f80, 0xff80] {
            let directory = tempfile::tempdir().unwrap();
            case::write_good(directory.path());
            let poison = case::weights(move |file| {
                let data = &mut file.get(name).data;
                data.chunks_exact_mut(2).for_each(|number| number.copy_from_slice(&bits.to_le_bytes()));
            });
            poison(directory.path());
            let model = load(directory.path(), false).unwrap();
            match catch_unwind(AssertUnwindSafe(|| generate(&model, 3))).unwrap() {
                Ok(tokens) => assert!(tokens.iter().all(|token| *token < 320), "{name} {bits:x}"),
                Err(error) => assert_eq!(error.status(), Status::NotANumber, "{name} {bits:x}: {error}"),
            }
        }
    }
}
