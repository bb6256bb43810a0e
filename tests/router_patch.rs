//! Router patches: which model they fit, and what sessions of a model that takes them show, whatever they were in the middle of:
//! what sessions of a model show whose directory has the patch's gates.

mod common;
#[path = "router_patch/fixture.rs"]
mod fixture;
#[path = "router_patch/programs.rs"]
mod programs;
#[path = "router_patch/threads.rs"]
mod threads;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

use std::sync::Arc;
use std::task::Poll;

use common::{Directory, batch, load, load_options, session};
use fixture::{Gates, Patched, bits, expected, shown, status, tokens};
use gemmoe::quant::Format;
use gemmoe::text::grammar::{Grammar, GrammarKind};
use gemmoe::{Budget, Formats, LoadOptions, Overflow, Pooling, RouterPatch, Session, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;

#[test]
fn stored_gates_are_those_of_the_directory_whatever_the_other_weights_are_loaded_in() {
    for experts in [4, 23] {
        let changes = json!({"num_local_experts": experts, "num_hidden_layers": 3});
        let directory = Directory { dtype: Dtype::F32, ..Directory::random_with(3, changes) };
        let path = directory.to_temporary();
        let mut fingerprints = Vec::new();
        for format in [None, Some(Format::INT8), Some(Format::INT4)] {
            let formats = Formats { experts: format, attention: format, head: format, embedding: None };
            let model = load_options(path.path(), &LoadOptions { formats, ..Default::default() });
            assert_eq!(model.stored_gates().unwrap(), fixture::gates_of(&directory));
            fingerprints.push(model.gates_fingerprint().unwrap());
        }
        assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
        let other = load(Directory::random_with(4, json!({"num_local_experts": experts})).to_temporary().path());
        assert_ne!(other.gates_fingerprint().unwrap(), fingerprints[0]);
    }
}

#[test]
fn a_patched_model_gives_the_bits_of_one_loaded_with_those_gates_in_every_format() {
    for (experts, top_k, dtype, format) in [
        (4, 2, Dtype::F32, None),
        (4, 2, Dtype::BF16, None),
        (17, 3, Dtype::F16, None),
        (4, 2, Dtype::BF16, Some(Format::INT8)),
        (5, 5, Dtype::BF16, Some(Format::INT4)),
    ] {
        let sizes = json!({"num_local_experts": experts, "num_experts_per_tok": top_k});
        let formats = Formats { experts: format, attention: format, head: format, embedding: None };
        let patched = Patched::new(Directory { dtype, ..Directory::random_with(31, sizes) }, formats);
        let numbers = |model: &Arc<gemmoe::Model>| {
            let mut session = session(model);
            session.prefill(&tokens(30)).unwrap();
            let shown = shown(&session).unwrap();
            let drawn: Vec<u32> = (0..5).map(|_| session.step().unwrap()).collect();
            let mut scores = vec![0f32; 20];
            session.score(&tokens(20), &mut scores).unwrap();
            let mut embedding = vec![0f32; 40];
            session.embed(&tokens(9), Pooling::Mean, &mut embedding).unwrap();
            (shown, drawn, bits(&scores), bits(&embedding))
        };
        let mut seen = Vec::new();
        for gates in Gates::ALL.into_iter().chain(Gates::ALL) {
            patched.put(gates);
            let found = numbers(&patched.model);
            assert_eq!(found, numbers(patched.loaded(gates)), "{gates:?}, {experts} experts, {dtype}");
            assert_eq!(patched.model.has_router_patch(), gates != Gates::Stored);
            // What is stored stays what it is, and so does what other patches are checked against.
            assert_eq!(patched.model.stored_gates().unwrap(), patched.gates[0]);
            seen.push(found.0);
        }
        assert_eq!(seen[..3], seen[3..]);
        assert!(top_k == experts || seen[0] != seen[1] && seen[1] != seen[2], "the patches changed nothing");
    }
}

#[test]
fn a_patch_of_another_model_is_refused_with_both_sides_numbers_and_changes_nothing() {
    let patched = Patched::new(Directory::random(32), Formats::default());
    let model = &patched.model;
    patched.put(Gates::A);
    let before = expected(&patched, Gates::A, &tokens(12));
    let refusal = |patch: &RouterPatch| {
        let error = model.apply_router_patch(patch).unwrap_err();
        assert_eq!(error.status(), Status::PatchModel, "{error}");
        let mut session = session(model);
        session.prefill(&tokens(12)).unwrap();
        assert_eq!(shown(&session).unwrap(), before);
        error.to_string()
    };
    let base = model.gates_fingerprint().unwrap();
    for (key, value, theirs) in [
        ("num_hidden_layers", 3, "3 layers of 4 experts, hidden_size 40"),
        ("num_local_experts", 5, "2 layers of 5 experts, hidden_size 40"),
        ("hidden_size", 48, "2 layers of 4 experts, hidden_size 48"),
    ] {
        let other = load(Directory::random_with(32, json!({ key: value })).to_temporary().path());
        let patch = RouterPatch::new(other.config(), &other.stored_gates().unwrap(), base).unwrap();
        let text = refusal(&patch);
        assert!(text.contains(theirs) && text.contains("2 layers of 4 experts, hidden_size 40"), "{text}");
        assert_eq!(status(other.apply_router_patch(&patched.patches[0])), Status::PatchModel);
    }
    let text = refusal(&RouterPatch::new(model.config(), &patched.gates[1], base ^ 1).unwrap());
    assert!(text.contains(&format!("{base:016x}")) && text.contains(&format!("{:016x}", base ^ 1)), "{text}");
    let dense = load(
        Directory::random_with(32, json!({"num_local_experts": 1, "num_experts_per_tok": 1})).to_temporary().path(),
    );
    assert_eq!(status(dense.apply_router_patch(&patched.patches[0])), Status::PatchModel);
    assert_eq!(status(dense.stored_gates()), Status::PatchModel);
    dense.remove_router_patch().unwrap();
    session(&dense).prefill(&tokens(3)).unwrap();
}

#[test]
fn a_session_runs_its_tokens_again_under_new_gates_and_until_then_has_no_logits() {
    let patched = Patched::new(Directory::random(33), Formats::default());
    let mut session = session(&patched.model);
    session.prefill(&tokens(20)).unwrap();
    let token = session.step().unwrap();
    let mut held = tokens(20);
    held.push(token);
    assert_eq!(session.pending(), 1);
    // Read before, and kept: a borrow ends, the numbers stay where the session has them.
    let read = session.logits().unwrap().to_vec();
    patched.put(Gates::A);
    assert_eq!((session.pending(), session.tokens()), (21, &held[..]));
    assert_eq!(status(session.logits()), Status::NoLogits);
    assert_eq!(status(session.routes(0)), Status::NoLogits);
    assert_eq!(status(session.top_log_probabilities(&mut [0], &mut [0.0])), Status::NoLogits);
    // Taken off before it was run: nothing was lost.
    patched.put(Gates::Stored);
    assert_eq!((session.pending(), bits(session.logits().unwrap())), (1, bits(&read)));
    // As long as that may take: this one applies the same gates anew.
    patched.put(Gates::B);
    session.prefill(&[]).unwrap();
    assert_eq!(session.pending(), 0);
    assert_eq!(shown(&session).unwrap(), expected(&patched, Gates::B, &held));
    // Run under the patch: coming back to the stored gates takes running again, and ends at the same bits.
    patched.put(Gates::Stored);
    session.prefill(&[7, 8]).unwrap();
    held.extend([7, 8]);
    assert_eq!(shown(&session).unwrap(), expected(&patched, Gates::Stored, &held));
    // An empty session has nothing to run.
    session.rewind(0).unwrap();
    patched.put(Gates::A);
    assert_eq!(status(session.step()), Status::NoLogits);
    session.prefill(&tokens(3)).unwrap();
    assert_eq!(shown(&session).unwrap(), expected(&patched, Gates::A, &tokens(3)));
}

#[test]
fn a_pass_that_a_budget_suspended_under_other_gates_is_begun_anew() {
    let patched = Patched::new(Directory::random_with(34, json!({"num_hidden_layers": 4})), Formats::default());
    for stops in 1..12 {
        patched.put(Gates::Stored);
        let mut session = session(&patched.model);
        let given = tokens(100);
        assert!(session.prefill_within(&given, &Budget::of_layers(1)).is_pending());
        for _ in 1..stops {
            if session.prefill_within(&[], &Budget::of_layers(1)).is_ready() {
                break;
            }
        }
        patched.put(Gates::A);
        let calls = |session: &mut Session, tokens: &[u32]| {
            let first = session.prefill_within(tokens, &Budget::of_layers(1));
            assert!(first.is_pending());
            1 + (1..).take_while(|_| session.prefill_within(&[], &Budget::of_layers(1)).is_pending()).count()
        };
        let mut fresh = common::session(patched.loaded(Gates::A));
        assert_eq!(calls(&mut session, &[]), calls(&mut fresh, &given), "after {stops} stops");
        assert_eq!(shown(&session).unwrap(), expected(&patched, Gates::A, &given), "after {stops} stops");
    }
}

#[test]
fn a_draw_that_a_budget_put_off_is_one_under_the_gates_in_force_when_it_comes() {
    let patched = Patched::new(Directory::random(35), Formats::default());
    let mut differs = 0;
    for length in 5..25 {
        patched.put(Gates::Stored);
        let mut waiting = session(&patched.model);
        waiting.push(&tokens(length)).unwrap();
        while waiting.pending() > 0 {
            assert!(waiting.step_within(&Budget::of_layers(1)).is_pending());
        }
        patched.put(Gates::A);
        let drawn = waiting.step().unwrap();
        let draw = |gates| {
            let mut fresh = session(patched.loaded(gates));
            fresh.prefill(&tokens(length)).unwrap();
            fresh.step().unwrap()
        };
        assert_eq!(drawn, draw(Gates::A));
        differs += (drawn != draw(Gates::Stored)) as u32;
    }
    assert!(differs > 0, "the gates make no difference to draws");
}

#[test]
fn a_cancel_takes_back_only_the_tokens_of_its_call_and_the_rest_is_run_again() {
    let patched = Patched::new(Directory::random(36), Formats::default());
    let mut session = session(&patched.model);
    session.prefill(&tokens(70)).unwrap();
    patched.put(Gates::A);
    session.cancel().request();
    assert_eq!(status(session.prefill(&[1, 2, 3])), Status::Cancelled);
    assert_eq!((session.tokens(), session.pending()), (&tokens(70)[..], 70));
    session.cancel().request();
    assert_eq!(status(session.step()), Status::Cancelled);
    session.cancel().request();
    let mut score = [0.0; 2];
    assert_eq!(status(session.score(&[5, 6], &mut score)), Status::Cancelled);
    assert_eq!(session.tokens(), tokens(70));
    let token = session.step().unwrap();
    let mut held = tokens(70);
    assert_eq!(shown(&session).unwrap(), expected(&patched, Gates::A, &held));
    held.push(token);
    session.prefill(&[]).unwrap();
    assert_eq!(shown(&session).unwrap(), expected(&patched, Gates::A, &held));
}

#[test]
fn forks_that_share_pages_each_run_again_and_what_that_takes_is_refused_before_anything_changes() {
    let directory = Directory::random(37);
    let patched = Patched::new(directory.clone(), Formats::default());
    let mut first = session(&patched.model);
    first.prefill(&tokens(50)).unwrap();
    let mut second = first.fork().unwrap();
    patched.put(Gates::A);
    // Forked while it is still of the old gates.
    let mut third = first.fork().unwrap();
    assert_eq!((third.pending(), third.tokens()), (50, &tokens(50)[..]));
    second.prefill(&[9]).unwrap();
    first.prefill(&[3]).unwrap();
    third.prefill(&[]).unwrap();
    for (session, more) in [(&second, &[9][..]), (&first, &[3]), (&third, &[])] {
        assert_eq!(shown(session).unwrap(), expected(&patched, Gates::A, &[&tokens(50), more].concat()));
    }
    drop((first, second, third));
    assert_eq!(patched.model.kv_account().used(), 0);

    // A limit that has room for both while they share three pages, of 16 each.
    let path = directory.to_temporary();
    let page = {
        let model = load(path.path());
        session(&model).kv_bytes() / 16
    };
    let model = load_options(path.path(), &LoadOptions { kv_limit_bytes: 30 * page, ..Default::default() });
    let patch = RouterPatch::new(model.config(), &patched.gates[1], model.gates_fingerprint().unwrap()).unwrap();
    let mut first = session(&model);
    first.prefill(&tokens(50)).unwrap();
    let logits = bits(first.logits().unwrap());
    let mut second = first.fork().unwrap();
    model.apply_router_patch(&patch).unwrap();
    assert_eq!(status(first.step()), Status::KvLimit);
    assert_eq!(status(first.prefill(&[4])), Status::KvLimit);
    assert_eq!((first.tokens(), first.pending()), (&tokens(50)[..], 50));
    let mut batch = batch(&model, 2, 64, 256);
    let mut results = Vec::new();
    batch.step(&mut [&mut first, &mut second], &Budget::UNLIMITED, &mut results).unwrap();
    assert!(
        results.iter().all(|result| matches!(result, Poll::Ready(Err(error)) if error.status() == Status::KvLimit))
    );
    // What was run is still there for the gates it was run under.
    model.remove_router_patch().unwrap();
    assert_eq!(bits(first.logits().unwrap()), logits);
    model.apply_router_patch(&patch).unwrap();
    drop(second);
    first.prefill(&[]).unwrap();
    assert_eq!(shown(&first).unwrap(), expected(&patched, Gates::A, &tokens(50)));
}

#[test]
fn members_of_a_batch_are_run_again_together_and_a_pass_in_flight_is_begun_anew() {
    let patched = Patched::new(Directory::random_with(38, json!({"num_hidden_layers": 4})), Formats::default());
    let model = &patched.model;
    let lengths = [3, 40, 1, 17];
    for stops in 0..8 {
        patched.put(Gates::Stored);
        let mut sessions: Vec<Session> = lengths.iter().map(|_| session(model)).collect();
        for (session, length) in sessions.iter_mut().zip(lengths) {
            session.push(&tokens(length)).unwrap();
        }
        // Two that were run, two that were not.
        sessions[1].prefill(&[]).unwrap();
        sessions[2].prefill(&[]).unwrap();
        let mut batch = batch(model, 4, 64, 256);
        let mut results = Vec::new();
        for _ in 0..stops {
            let mut members: Vec<&mut Session> = sessions.iter_mut().collect();
            batch.step(&mut members, &Budget::of_layers(1), &mut results).unwrap();
        }
        patched.put(Gates::A);
        let held: Vec<Vec<u32>> = sessions.iter().map(|session| session.tokens().to_vec()).collect();
        // One that is not let in keeps its stamp of before; the pass must not go on all the same.
        sessions[0].cancel().request();
        {
            let mut members: Vec<&mut Session> = sessions.iter_mut().collect();
            batch.step(&mut members, &Budget::of_layers(1), &mut results).unwrap();
        }
        assert!(matches!(&results[0], Poll::Ready(Err(error)) if error.status() == Status::Cancelled));
        let mut drawn: Vec<Option<u32>> = vec![None; 4];
        for _ in 0..200 {
            let waiting: Vec<usize> = (0..4).filter(|index| drawn[*index].is_none()).collect();
            let mut members: Vec<&mut Session> =
                sessions.iter_mut().enumerate().filter(|(index, _)| drawn[*index].is_none()).map(|(_, s)| s).collect();
            if members.is_empty() {
                break;
            }
            batch.step(&mut members, &Budget::of_layers(2), &mut results).unwrap();
            for (index, result) in waiting.into_iter().zip(results.drain(..)) {
                if let Poll::Ready(result) = result {
                    drawn[index] = Some(result.unwrap());
                }
            }
        }
        for ((session, held), drawn) in sessions.iter().zip(&held).zip(drawn) {
            assert_eq!(shown(session).unwrap(), expected(&patched, Gates::A, held), "{} after {stops}", held.len());
            let mut fresh = common::session(patched.loaded(Gates::A));
            fresh.prefill(held).unwrap();
            assert_eq!(drawn, Some(fresh.step().unwrap()));
        }
    }
}

#[test]
fn a_pass_of_a_batch_whose_only_session_is_not_let_in_is_not_gone_on_with_under_other_gates() {
    let patched = Patched::new(Directory::random_with(39, json!({"num_hidden_layers": 4})), Formats::default());
    let mut only = session(&patched.model);
    only.push(&tokens(30)).unwrap();
    let mut batch = batch(&patched.model, 1, 64, 256);
    let mut results = Vec::new();
    batch.step(&mut [&mut only], &Budget::of_layers(2), &mut results).unwrap();
    patched.put(Gates::A);
    only.cancel().request();
    batch.step(&mut [&mut only], &Budget::UNLIMITED, &mut results).unwrap();
    assert!(matches!(&results[0], Poll::Ready(Err(error)) if error.status() == Status::Cancelled));
    assert_eq!((only.pending(), status(only.logits())), (30, Status::NoLogits));
    batch.step(&mut [&mut only], &Budget::UNLIMITED, &mut results).unwrap();
    assert_eq!(shown(&only).unwrap(), expected(&patched, Gates::A, &tokens(30)));
}

#[test]
fn scores_and_embeddings_of_a_session_that_was_run_under_other_gates_are_those_of_a_fresh_one() {
    let patched = Patched::new(Directory::random(40), Formats::default());
    for pending in [false, true] {
        let mut old = session(&patched.model);
        patched.put(Gates::Stored);
        old.prefill(&tokens(20)).unwrap();
        if pending {
            old.push(&[5, 6]).unwrap();
        }
        patched.put(Gates::B);
        let mut fresh = session(patched.loaded(Gates::B));
        fresh.push(old.tokens()).unwrap();
        let (mut found, mut expected) = ([0f32; 70], [0f32; 70]);
        old.score(&tokens(70), &mut found).unwrap();
        fresh.score(&tokens(70), &mut expected).unwrap();
        assert_eq!(bits(&found), bits(&expected));
        patched.put(Gates::A);
        let mut fresh = session(patched.loaded(Gates::A));
        fresh.push(old.tokens()).unwrap();
        let (mut found, mut expected) = ([0f32; 40], [0f32; 40]);
        old.embed(&tokens(9), Pooling::Mean, &mut found).unwrap();
        fresh.embed(&tokens(9), Pooling::Mean, &mut expected).unwrap();
        assert_eq!(bits(&found), bits(&expected));
        assert_eq!(shown(&old), shown(&fresh));
    }
}

#[test]
fn a_snapshot_belongs_to_the_gates_it_was_taken_under() {
    let patched = Patched::new(Directory::random(41), Formats::default());
    let model = &patched.model;
    let snapshot = |session: &Session| {
        let mut bytes = vec![0; session.snapshot_bytes()];
        session.snapshot(&mut bytes).unwrap();
        bytes
    };
    let restore = |bytes: &[u8]| Session::restore(Arc::clone(model), bytes, &SessionOptions::default());
    let mut session = session(model);
    session.prefill(&tokens(20)).unwrap();
    let plain = snapshot(&session);
    patched.put(Gates::A);
    // Of a session that was not run under them yet: its tokens are there, all pending.
    let early = snapshot(&session);
    assert!(early.len() < plain.len());
    session.prefill(&[]).unwrap();
    let late = snapshot(&session);
    assert_eq!(status(restore(&plain)), Status::SnapshotModel);
    for (bytes, pending) in [(&early, 20), (&late, 0)] {
        let mut restored = restore(bytes).unwrap();
        assert_eq!(restored.pending(), pending);
        restored.prefill(&[]).unwrap();
        assert_eq!(shown(&restored).unwrap(), expected(&patched, Gates::A, &tokens(20)));
    }
    for gates in [Gates::Stored, Gates::B] {
        patched.put(gates);
        assert_eq!(status(restore(&early)), Status::SnapshotModel);
        assert_eq!(status(restore(&late)), Status::SnapshotModel);
        assert_eq!(status(restore(&plain)) == Status::Ok, gates == Gates::Stored);
    }
    // Applied again, and in another process of the same model, as its fingerprint says.
    patched.put(Gates::A);
    assert_eq!(shown(&restore(&late).unwrap()).unwrap(), expected(&patched, Gates::A, &tokens(20)));
    let other = patched.load_again();
    assert_eq!(status(Session::restore(Arc::clone(&other), &late, &SessionOptions::default())), Status::SnapshotModel);
    other.apply_router_patch(&patched.patches[0]).unwrap();
    assert_eq!(other.fingerprint(), model.fingerprint());
    let restored = Session::restore(other, &late, &SessionOptions::default()).unwrap();
    assert_eq!(shown(&restored).unwrap(), expected(&patched, Gates::A, &tokens(20)));
}

#[test]
fn a_grammar_and_a_sliding_window_go_on_where_they_stood() {
    let sizes = json!({"vocab_size": tokenizer_sample::VOCAB_SIZE});
    let patched = Patched::with_tokenizer(Directory::random_with(42, sizes), tokenizer_sample::sample().to_string());
    let options = SessionOptions { context_size: 24, overflow: Overflow::Slide { keep: 3 }, ..Default::default() };
    let run = |change: bool| {
        patched.put(if change { Gates::Stored } else { Gates::A });
        let mut session = Session::new(Arc::clone(&patched.model), &options).unwrap();
        session.prefill(&tokens(10)).unwrap();
        patched.put(Gates::A);
        let grammar =
            Grammar::new(patched.model.grammar_vocabulary().unwrap(), GrammarKind::Regex, "[ab]{40}").unwrap();
        session.set_grammar(Some(&grammar)).unwrap();
        let mut drawn = Vec::new();
        for step in 0..30 {
            if change && step % 7 == 3 {
                // Elsewhere and back, with a step that is taken back there.
                patched.put(Gates::B);
                let held = session.tokens().len();
                if held < 23 {
                    session.step().unwrap();
                    session.rewind(held).unwrap();
                }
                patched.put(Gates::A);
            }
            drawn.push(session.step().unwrap());
        }
        assert_eq!(session.grammar().unwrap().accepted(), drawn);
        (drawn, session.tokens().to_vec(), session.dropped())
    };
    let plain = run(false);
    assert!(plain.2 > 0, "the window never slid");
    assert_eq!(run(true), plain);
}

#[test]
fn statistics_and_metrics_go_on_and_count_what_is_run_again() {
    let patched = Patched::new(Directory::random(43), Formats::default());
    let options = SessionOptions { context_size: 64, route_capacity: 64, ..Default::default() };
    let mut session = Session::new(Arc::clone(&patched.model), &options).unwrap();
    session.set_allowed_experts(Some(0), 0b0111).unwrap();
    session.prefill(&tokens(10)).unwrap();
    let count = |session: &Session| session.expert_statistics().counts().iter().sum::<u64>();
    assert_eq!(count(&session), 40);
    patched.put(Gates::A);
    assert_eq!(count(&session), 40);
    session.prefill(&[]).unwrap();
    assert_eq!(count(&session), 80);
    // Masks stay.
    assert!(session.routes(0).unwrap().experts.iter().all(|expert| *expert < 3));
    let mut fresh = Session::new(Arc::clone(patched.loaded(Gates::A)), &options).unwrap();
    fresh.set_allowed_experts(Some(0), 0b0111).unwrap();
    fresh.prefill(&tokens(10)).unwrap();
    assert_eq!(shown(&session), shown(&fresh));
}
