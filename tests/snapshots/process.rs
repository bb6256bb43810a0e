//! A snapshot read by another process: this test runs itself again.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use gemmoe::{Model, Session, SessionOptions};

use crate::common::{load, load_with};
use crate::{bytes_of, directory, sessions, written};

/// Names the folder the other process reads from.
const FOLDER: &str = "GEMMOE_SNAPSHOTS";
const THIS_TEST: &str = "process::a_session_goes_on_in_another_process_bit_for_bit";

/// What a session gives from here on.
fn continued(session: &mut Session) -> String {
    let mut lines = String::new();
    if session.tokens().is_empty() {
        session.prefill(&[2, 5, 7]).unwrap();
    }
    if let Ok(logits) = session.logits() {
        writeln!(lines, "logits {:x?}", logits.iter().map(|logit| logit.to_bits()).collect::<Vec<_>>()).unwrap();
    }
    for _ in 0..15 {
        let token = session.step().unwrap();
        let logits: Vec<u32> = session.logits().unwrap().iter().map(|logit| logit.to_bits()).collect();
        let routes: Vec<(&[u32], &[f32])> =
            (0..2).map(|layer| session.routes(layer).unwrap()).map(|r| (r.experts, r.weights)).collect();
        writeln!(lines, "{token} {logits:x?} {routes:?}").unwrap();
    }
    let is_complete = session.is_grammar_complete().unwrap();
    writeln!(lines, "{:?} {} {is_complete:?}", session.tokens(), session.dropped()).unwrap();
    lines
}

fn file(folder: &Path, index: usize, ending: &str) -> PathBuf {
    folder.join(format!("{index}.{ending}"))
}

/// In the other process: goes on with every snapshot, in a session with another workspace.
fn go_on(folder: &Path) {
    let model: Arc<Model> = load_with(&folder.join("model"), 1, gemmoe::backend::cpu::kernels::Instructions::Detect);
    for index in 0.. {
        let Ok(bytes) = std::fs::read(file(folder, index, "snapshot")) else { return };
        let options = SessionOptions { prefill_chunk: 1 + index, ..Default::default() };
        let mut session = Session::restore(Arc::clone(&model), &bytes, &options).unwrap();
        std::fs::write(file(folder, index, "result"), continued(&mut session)).unwrap();
    }
}

#[test]
fn a_session_goes_on_in_another_process_bit_for_bit() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return go_on(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let model_directory = written(&directory());
    std::fs::rename(model_directory.path(), folder.path().join("model")).unwrap();
    let mut sessions = sessions(&load(&folder.path().join("model")));
    for (index, (_, session)) in sessions.iter().enumerate() {
        std::fs::write(file(folder.path(), index, "snapshot"), bytes_of(session)).unwrap();
    }
    let mut command = Command::new(std::env::current_exe().unwrap());
    let output = command.args(["--exact", THIS_TEST]).env(FOLDER, folder.path()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    for (index, (name, session)) in sessions.iter_mut().enumerate() {
        let result = std::fs::read_to_string(file(folder.path(), index, "result")).unwrap();
        assert_eq!(result, continued(session), "{name}");
    }
}
