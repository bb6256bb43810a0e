//! What a session does at its edges: full contexts, wrong tokens, cancels, batches with members in trouble.

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::{Directory, Random, batch, draw_each, load, session};
use gemmoe::{Budget, LoadOptions, Model, Progress, Sampling, Session, SessionOptions, Status};
use serde_json::json;

fn status<T>(result: gemmoe::Result<T>) -> Status {
    result.err().map_or(Status::Ok, |error| error.status())
}

fn short_session(model: &Arc<Model>, context_size: usize) -> Session {
    Session::new(Arc::clone(model), &SessionOptions { context_size, prefill_chunk: 4, ..Default::default() }).unwrap()
}

#[test]
fn a_full_context_is_an_error_with_the_sizes_and_the_session_works_on() {
    let directory = Directory::random(31).to_temporary();
    let mut session = short_session(&load(directory.path()), 10);
    let error = session.prefill(&[2; 11]).unwrap_err();
    assert_eq!((error.status(), error.key()), (Status::ContextFull, Some("context_size")));
    assert_eq!(error.to_string(), "11 tokens do not fit: 0 of 10 are used");
    session.prefill(&[2; 8]).unwrap();
    assert_eq!(status(session.prefill(&[2; 3])), Status::ContextFull);
    session.step().unwrap();
    session.step().unwrap();
    assert_eq!(status(session.step()), Status::ContextFull);
    assert_eq!(session.tokens().len(), 10);
    session.rewind(5).unwrap();
    session.step().unwrap();
}

#[test]
fn a_token_past_the_vocabulary_changes_nothing() {
    let directory = Directory::random(32).to_temporary();
    let mut session = short_session(&load(directory.path()), 10);
    assert_eq!(status(session.prefill(&[2, 96, 97])), Status::TokenOutOfRange);
    assert!(session.tokens().is_empty());
    assert_eq!(status(session.step()), Status::NoLogits);
    session.prefill(&[2, 96]).unwrap();
    session.step().unwrap();
}

#[test]
fn logits_and_routes_are_those_of_the_last_token_or_not_to_be_had() {
    let directory = Directory::random(33).to_temporary();
    let model = load(directory.path());
    let mut session = session(&model);
    assert_eq!(status(session.logits()), Status::NoLogits);
    session.prefill(&[2, 3, 4]).unwrap();
    let after_prompt = session.logits().unwrap().to_vec();
    session.step().unwrap();
    assert_eq!(session.logits().unwrap(), after_prompt, "after a step, those its token was drawn from");
    assert_eq!(status(session.routes(2)), Status::InvalidArgument);
    session.rewind(3).unwrap();
    assert_eq!(status(session.logits()), Status::NoLogits);
    assert_eq!(status(session.routes(0)), Status::NoLogits);
    assert_eq!(status(session.rewind(4)), Status::InvalidArgument);
    session.push(&[5]).unwrap();
    assert_eq!(status(session.logits()), Status::NoLogits);
    session.prefill(&[]).unwrap();
    assert!(session.logits().is_ok());
}

#[test]
fn a_cancel_without_a_call_stops_the_next_one_and_only_that() {
    let directory = Directory::random(34).to_temporary();
    let mut session = session(&load(directory.path()));
    session.cancel().request();
    assert_eq!(status(session.prefill(&[2, 3])), Status::Cancelled);
    assert!(session.tokens().is_empty());
    session.prefill(&[2, 3]).unwrap();
    session.cancel().request();
    assert_eq!(status(session.step()), Status::Cancelled);
    assert_eq!(session.tokens().len(), 2);
    session.step().unwrap();
}

#[test]
fn a_cancelled_prefill_keeps_whole_chunks_and_goes_on_to_the_same_logits() {
    let directory = Directory::random(35).to_temporary();
    let model = load(directory.path());
    let tokens = Random::new(35).tokens(200, 97);
    let mut whole = session(&model);
    whole.prefill(&tokens).unwrap();
    let mut stopped = 0;
    for round in 0..40 {
        let options = SessionOptions { context_size: 200, prefill_chunk: 8, ..Default::default() };
        let mut session = Session::new(Arc::clone(&model), &options).unwrap();
        let cancel = Arc::clone(session.cancel());
        let result = std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_micros(round * 250));
                cancel.request();
            });
            session.prefill(&tokens)
        });
        let held = session.tokens().len();
        match result {
            Ok(()) => assert_eq!(held, 200),
            Err(error) => {
                assert_eq!(error.status(), Status::Cancelled);
                assert_eq!(held % 8, 0);
                stopped += 1;
            }
        }
        session.cancel().take();
        session.prefill(&tokens[held..]).unwrap();
        if held < 200 {
            assert_eq!(session.logits().unwrap(), whole.logits().unwrap());
        }
    }
    println!("{stopped} of 40 prefills were stopped midway");
}

#[test]
fn a_member_of_a_batch_in_trouble_does_not_disturb_the_others() {
    let directory = Directory::random(36).to_temporary();
    let model = load(directory.path());
    let mut batch = batch(&model, 3, 8, 64);
    let (mut empty, mut full, mut fine) =
        (short_session(&model, 9), short_session(&model, 3), short_session(&model, 9));
    full.prefill(&[2, 3, 4]).unwrap();
    fine.push(&[2, 3, 4]).unwrap();
    let results = draw_each(&mut batch, &mut [&mut empty, &mut full, &mut fine]);
    let statuses: Vec<Status> = results.into_iter().map(status).collect();
    assert_eq!(statuses, [Status::NoLogits, Status::ContextFull, Status::Ok]);
    let mut alone = short_session(&model, 9);
    alone.prefill(&[2, 3, 4]).unwrap();
    alone.step().unwrap();
    assert_eq!(alone.tokens(), fine.tokens());

    let other = load(directory.path());
    let mut stranger = short_session(&other, 9);
    let mut results = Vec::new();
    let mut step = |session: &mut Session| status(batch.step(&mut [session], &Budget::UNLIMITED, &mut results));
    assert_eq!(step(&mut stranger), Status::InvalidArgument);
    batch.cancel().request();
    let mut step = |session: &mut Session| status(batch.step(&mut [session], &Budget::UNLIMITED, &mut results));
    assert_eq!(step(&mut fine), Status::Cancelled);
    assert!(draw_each(&mut batch, &mut [&mut fine])[0].is_ok());
}

#[test]
fn weights_that_are_not_numbers_give_an_error_when_a_token_is_drawn() {
    let mut directory = Directory::random(37);
    directory.tensors.get_mut("model.norm.weight").unwrap().1.fill(f32::NAN);
    let directory = directory.to_temporary();
    let mut session = session(&load(directory.path()));
    session.prefill(&[2, 3]).unwrap();
    for temperature in [0.0, 1.0] {
        session.set_sampling(Sampling { temperature, ..Default::default() }).unwrap();
        assert_eq!(status(session.step()), Status::NotANumber);
    }
    assert_eq!(session.tokens().len(), 2);
}

#[test]
fn a_load_can_be_cancelled_and_reports_its_bytes() {
    let directory = Directory::random(38).to_temporary();
    let progress = Progress::default();
    Model::load(directory.path(), &LoadOptions::default(), &progress).unwrap();
    assert!(progress.bytes_total() > 0);
    assert_eq!(progress.bytes_read(), progress.bytes_total());
    let cancelled = Progress::default();
    cancelled.cancel();
    assert_eq!(status(Model::load(directory.path(), &LoadOptions::default(), &cancelled)), Status::Cancelled);
}

#[test]
fn a_context_past_the_models_is_refused() {
    let directory = Directory::random_with(39, json!({"max_position_embeddings": 1 << 24})).to_temporary();
    let model = load(directory.path());
    let open = |context_size| {
        status(
            Session::new(Arc::clone(&model), &SessionOptions { context_size, prefill_chunk: 1, ..Default::default() })
                .map(drop),
        )
    };
    assert_eq!(open((1 << 24) + 1), Status::InvalidArgument);
    assert_eq!(open(64), Status::Ok);
}

#[test]
fn a_model_lives_as_long_as_its_sessions() {
    let directory = Directory::random(40).to_temporary();
    let model = load(directory.path());
    let mut session = session(&model);
    drop(model);
    drop(directory);
    session.prefill(&[2, 3]).unwrap();
    session.step().unwrap();
}

#[test]
fn a_session_given_other_tokens_keeps_what_they_have_in_common() {
    let directory = Directory::random(38).to_temporary();
    let model = load(directory.path());
    let mut session = short_session(&model, 60);
    session.prefill(&[2, 3, 4, 5, 6]).unwrap();
    for (tokens, reused) in [
        (vec![2, 3, 4, 5, 6, 7, 8], 5),
        (vec![2, 3, 4, 9], 3),
        (vec![2, 3, 4, 9], 4),
        (vec![2, 3], 2),
        (vec![5], 0),
        (vec![], 0),
        (vec![5, 5], 0),
    ] {
        assert_eq!(session.set_tokens(&tokens).unwrap(), reused);
        assert_eq!(session.tokens(), tokens);
        session.prefill(&[]).unwrap();
        if !tokens.is_empty() {
            let mut fresh = short_session(&model, 60);
            fresh.prefill(&tokens).unwrap();
            assert_eq!(session.logits().unwrap(), fresh.logits().unwrap(), "{tokens:?}");
        }
    }
    let before = session.tokens().to_vec();
    assert_eq!(status(session.set_tokens(&[5, 9999])), Status::TokenOutOfRange);
    assert_eq!(status(session.set_tokens(&[5; 61])), Status::ContextFull);
    assert_eq!(session.tokens(), before);
}
