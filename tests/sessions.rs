//! What a session does at its edges: full contexts, wrong tokens, cancels, batches with members in trouble.

#[path = "common/canceller.rs"]
mod canceller;
mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use canceller::Canceller;
use common::{Directory, Random, batch, draw_each, load, load_options, session};
use gemmoe::backend::KvDtype;
use gemmoe::engine::experts::RouteArrays;
use gemmoe::text::grammar::{Grammar, GrammarKind};
use gemmoe::{
    Budget, LoadOptions, LogitBias, Model, Overflow, Pooling, Progress, Sampling, Session, SessionOptions, Status,
};
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
    // The same tokens, but as all there ever were: positions and random numbers are those of a fresh session.
    let mut slid = sliding(&model, 20, 3);
    slid.prefill(&Random::new(38).tokens(19, 97)).unwrap();
    for _ in 0..6 {
        slid.step().unwrap();
    }
    assert!(slid.dropped() > 0);
    let held = slid.tokens().to_vec();
    assert_eq!((slid.set_tokens(&held).unwrap(), slid.dropped()), (3, 0));
    let mut fresh = sliding(&model, 20, 3);
    fresh.push(&held).unwrap();
    for session in [&mut slid, &mut fresh] {
        session.set_sampling(Sampling { temperature: 1.0, seed: 5, ..Default::default() }).unwrap();
    }
    assert_eq!(slid.step().unwrap(), fresh.step().unwrap());
    assert_eq!(slid.logits().unwrap(), fresh.logits().unwrap());

    let before = session.tokens().to_vec();
    assert_eq!(status(session.set_tokens(&[5, 9999])), Status::TokenOutOfRange);
    assert_eq!(status(session.set_tokens(&[5; 61])), Status::ContextFull);
    assert_eq!(session.tokens(), before);
}

fn sliding(model: &Arc<Model>, context_size: usize, keep: usize) -> Session {
    let overflow = Overflow::Slide { keep };
    let options = SessionOptions { context_size, prefill_chunk: 4, overflow, ..Default::default() };
    Session::new(Arc::clone(model), &options).unwrap()
}

/// Bytes of a page of 16 positions of `Directory::random` as f32: of 2 layers, keys and values, 2 heads of 8.
const PAGE_BYTES: usize = 16 * 2 * 2 * 2 * 8 * 4;

#[test]
fn sessions_and_forks_share_the_models_limit_of_keys_and_values_and_give_back_what_they_took() {
    let directory = Directory::random(41).to_temporary();
    let model = load_options(
        directory.path(),
        &LoadOptions { kv_limit_bytes: 10 * PAGE_BYTES + PAGE_BYTES / 2, ..Default::default() },
    );
    let used = || model.kv_account().used() / PAGE_BYTES;
    let open = |context_size| {
        let kv_dtype = Some(KvDtype::F32);
        let options = SessionOptions { context_size, prefill_chunk: 16, kv_dtype, ..Default::default() };
        Session::new(Arc::clone(&model), &options)
    };
    let mut first = open(64).unwrap();
    first.prefill(&[2; 33]).unwrap();
    assert_eq!(used(), 4);
    // It shares two full pages; the third is copied, the fourth its own.
    let mut fork = first.fork().unwrap();
    assert_eq!((used(), fork.kv_bytes()), (6, 4 * PAGE_BYTES));
    let other = open(64).unwrap();
    assert_eq!(used(), 10);
    let refused = open(1).err().unwrap();
    assert_eq!((refused.status(), refused.key()), (Status::KvLimit, Some("kv_limit_bytes")));
    assert_eq!(status(open(64).map(drop)), Status::KvLimit);
    assert_eq!(status(first.fork().map(drop)), Status::KvLimit);
    assert_eq!(used(), 10, "what was refused took nothing");

    // A rewind into shared pages needs its own; refused, it changes nothing.
    let logits = fork.logits().unwrap().to_vec();
    assert_eq!(status(fork.rewind(20)), Status::KvLimit);
    assert_eq!((fork.tokens().len(), fork.pending(), fork.logits().unwrap()), (33, 0, &logits[..]));
    fork.rewind(33).unwrap();
    fork.rewind(32).unwrap_err();
    fork.step().unwrap();
    drop(other);
    assert_eq!(used(), 6);
    fork.rewind(20).unwrap();
    assert_eq!(used(), 7, "the first page is still shared");
    drop(first);
    assert_eq!(used(), 4, "the last of those that share a page gives it back");
    fork.rewind(0).unwrap();
    assert_eq!(used(), 4);
    fork.prefill(&[3; 64]).unwrap();
    drop(fork);
    assert_eq!(model.kv_account().used(), 0);
}

#[test]
fn a_sessions_own_limit_of_keys_and_values_bounds_its_context() {
    let directory = Directory::random(42).to_temporary();
    let model = load(directory.path());
    let open = |context_size, kv_limit_bytes| {
        let options =
            SessionOptions { context_size, kv_limit_bytes, kv_dtype: Some(KvDtype::F32), ..Default::default() };
        Session::new(Arc::clone(&model), &options)
    };
    assert_eq!(open(0, 3 * PAGE_BYTES + 1).unwrap().context_size(), 48);
    assert_eq!(open(0, usize::MAX).unwrap().context_size(), 512);
    assert_eq!(open(48, 3 * PAGE_BYTES).unwrap().context_size(), 48);
    for (context_size, limit) in [(49, 3 * PAGE_BYTES), (48, 3 * PAGE_BYTES - 1), (0, PAGE_BYTES - 1), (1, 1)] {
        assert_eq!(status(open(context_size, limit).map(drop)), Status::KvLimit, "{context_size} in {limit}");
    }
}

#[test]
fn a_long_prompt_in_a_batch_keeps_nobody_from_a_token_each_step() {
    let directory = Directory::random(43).to_temporary();
    let model = load(directory.path());
    let mut batch = batch(&model, 4, 20, 256);
    let mut sessions: Vec<Session> = (0..4).map(|_| session(&model)).collect();
    let prompts: Vec<Vec<u32>> = [3, 200, 1, 150].map(|length| Random::new(43).tokens(length, 97)).into();
    sessions.iter_mut().zip(&prompts).for_each(|(session, prompt)| session.push(prompt).unwrap());
    let mut results = Vec::new();
    let mut drawn = [0; 4];
    let mut steps = 0;
    while drawn.contains(&0) {
        let before: Vec<usize> = sessions.iter().map(|session| session.pending()).collect();
        let mut members: Vec<&mut Session> = sessions.iter_mut().collect();
        batch.step(&mut members, &Budget::UNLIMITED, &mut results).unwrap();
        for (index, result) in results.drain(..).enumerate() {
            match result {
                Poll::Ready(token) => {
                    token.unwrap();
                    drawn[index] += 1;
                }
                Poll::Pending => {
                    assert!(before[index] > 1, "step {steps}: session {index} waits with {} to run", before[index]);
                    assert!(sessions[index].pending() < before[index], "step {steps}: a prompt gets on too");
                }
            }
        }
        steps += 1;
    }
    assert!((18..24).contains(&steps), "350 tokens of prompts, 16 or more a step, took {steps}");
    assert!(drawn[0] + 1 >= steps && drawn[2] == steps, "{drawn:?} of {steps}");
    for (index, session) in sessions.iter().enumerate() {
        let mut alone = common::session(&model);
        alone.prefill(&prompts[index]).unwrap();
        let tokens: Vec<u32> = (0..drawn[index]).map(|_| alone.step().unwrap()).collect();
        assert_eq!(session.tokens()[prompts[index].len()..], tokens);
    }
}

/// What a ring of routes gives for up to `room` tokens: their positions and tokens, and how many were lost.
fn fetch(session: &mut Session, room: usize) -> (Vec<u64>, Vec<u32>, u64) {
    let (mut positions, mut tokens) = (vec![0; room], vec![0; room]);
    let (mut experts, mut weights) = (vec![0; room * 4], vec![0.0; room * 4]);
    let mut arrays =
        RouteArrays { positions: &mut positions, tokens: &mut tokens, experts: &mut experts, weights: &mut weights };
    let (count, lost) = session.fetch_routes(&mut arrays);
    assert!(weights[..count * 4].chunks(2).all(|pair| (pair[0] + pair[1] - 1.0).abs() < 1e-5 && pair[0] >= pair[1]));
    assert!(experts[..count * 4].iter().all(|expert| *expert < 4));
    positions.truncate(count);
    tokens.truncate(count);
    (positions, tokens, lost)
}

#[test]
fn routes_wait_in_order_until_they_are_fetched_and_the_oldest_are_lost_and_counted() {
    let directory = Directory::random(44).to_temporary();
    let model = load(directory.path());
    let options = SessionOptions { context_size: 40, prefill_chunk: 4, route_capacity: 6, ..Default::default() };
    let mut session = Session::new(Arc::clone(&model), &options).unwrap();
    assert_eq!(fetch(&mut session, 3), (vec![], vec![], 0));
    session.prefill(&[10, 11, 12, 13]).unwrap();
    assert_eq!(fetch(&mut session, 3), (vec![0, 1, 2], vec![10, 11, 12], 0));
    session.prefill(&[14, 15, 16, 17, 18]).unwrap();
    assert_eq!(fetch(&mut session, 2), (vec![3, 4], vec![13, 14], 0), "six waited, and fit");
    session.prefill(&[19, 20, 21]).unwrap();
    assert_eq!(fetch(&mut session, 9), (vec![6, 7, 8, 9, 10, 11], vec![16, 17, 18, 19, 20, 21], 1));
    assert_eq!(fetch(&mut session, 9), (vec![], vec![], 0), "losses are counted once");
    // What is run again is there again; what was pushed and not run is not.
    session.rewind(10).unwrap();
    session.prefill(&[30]).unwrap();
    session.push(&[31]).unwrap();
    assert_eq!(fetch(&mut session, 9), (vec![9, 10], vec![19, 30], 0));
    let mut fork = session.fork().unwrap();
    fork.prefill(&[32]).unwrap();
    assert_eq!(fetch(&mut fork, 9), (vec![11, 12], vec![31, 32], 0), "a fork's are its own");
    assert_eq!(fetch(&mut session, 9), (vec![], vec![], 0));
    let mut none = short_session(&model, 10);
    none.prefill(&[2, 3]).unwrap();
    assert_eq!(fetch(&mut none, 4), (vec![], vec![], 0));
    assert_eq!(none.expert_statistics().counts().iter().sum::<u64>(), 2 * 2 * 2, "statistics need no ring");
}

#[test]
fn positions_of_routes_count_what_a_window_dropped_and_where() {
    let directory = Directory::random(45).to_temporary();
    let options = SessionOptions { overflow: Overflow::Slide { keep: 2 }, route_capacity: 20, ..Default::default() };
    let options = SessionOptions { context_size: 10, prefill_chunk: 4, ..options };
    let mut session = Session::new(load(directory.path()), &options).unwrap();
    // Of 15 tokens the first two and the last four are kept, before any is run.
    session.prefill(&(10..25).collect::<Vec<u32>>()).unwrap();
    assert_eq!(session.tokens(), [10, 11, 21, 22, 23, 24]);
    assert_eq!(fetch(&mut session, 20), (vec![0, 1, 11, 12, 13, 14], vec![10, 11, 21, 22, 23, 24], 0));
}

#[test]
fn a_session_for_batches_runs_in_them_alone_and_refuses_everything_else_unchanged() {
    let directory = Directory::random(46).to_temporary();
    let model = load(directory.path());
    let options = SessionOptions { context_size: 40, batch_only: true, ..Default::default() };
    let mut member = Session::new(Arc::clone(&model), &options).unwrap();
    assert_eq!(member.bytes(), member.kv_bytes(), "it has no workspace");
    let mut batch = batch(&model, 2, 8, 64);
    member.push(&[2, 3, 4]).unwrap();
    draw_each(&mut batch, &mut [&mut member])[0].as_ref().unwrap();
    let (tokens, logits) = (member.tokens().to_vec(), member.logits().unwrap().to_vec());
    let (mut scores, mut state) = ([0.0; 2], [0.0; 40]);
    let refused = [
        status(member.prefill(&[5])),
        status(member.step()),
        status(member.score(&[5, 6], &mut scores)),
        status(member.embed(&[5, 6], Pooling::Last, &mut state)),
    ];
    assert_eq!(refused, [Status::InvalidArgument; 4]);
    assert_eq!((member.tokens(), member.logits().unwrap()), (&tokens[..], &logits[..]));
    let mut fork = member.fork().unwrap();
    let mut alone = short_session(&model, 40);
    alone.prefill(&tokens).unwrap();
    let expected = alone.step().unwrap();
    for result in draw_each(&mut batch, &mut [&mut member, &mut fork]) {
        assert_eq!(result.unwrap(), expected);
    }
}

#[test]
fn a_window_keeps_the_first_and_half_of_the_rest_at_every_edge() {
    let directory = Directory::random(47).to_temporary();
    let model = load(directory.path());
    let all: Vec<u32> = (1..90).collect();
    for context_size in 2..8 {
        for keep in 0..=context_size - 2 {
            for held in 0..=context_size {
                for more in [context_size - held + 1, context_size, 3 * context_size] {
                    let mut session = sliding(&model, context_size, keep);
                    session.push(&all[..held]).unwrap();
                    session.push(&all[held..held + more]).unwrap();
                    let (total, tail) = (held + more, ((context_size - keep) / 2).max(1));
                    let expected = if total > context_size {
                        [&all[..keep], &all[total - tail..total]].concat()
                    } else {
                        all[..total].to_vec()
                    };
                    assert_eq!(session.tokens(), expected, "{context_size} {keep} {held} {more}");
                    assert_eq!(session.dropped() as usize, total - expected.len());
                    let mut alone = short_session(&model, 8);
                    alone.prefill(&expected).unwrap();
                    session.prefill(&[]).unwrap();
                    assert_eq!(session.logits().unwrap(), alone.logits().unwrap());
                    for _ in 0..2 * context_size {
                        session.step().unwrap();
                    }
                }
            }
        }
    }
    for (context_size, keep) in [(1, 0), (10, 9), (10, usize::MAX)] {
        let options = SessionOptions { context_size, overflow: Overflow::Slide { keep }, ..Default::default() };
        let error = Session::new(Arc::clone(&model), &options).err().unwrap();
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("keep_tokens")));
    }
    let mut scored = sliding(&model, 6, 2);
    scored.prefill(&[2, 3, 4]).unwrap();
    assert_eq!(status(scored.score(&[5; 4], &mut [0.0; 4])), Status::ContextFull, "no window slides while scoring");
    assert_eq!(scored.tokens(), [2, 3, 4]);
}

#[test]
fn a_cancelled_prefill_that_made_the_window_slide_takes_back_its_own_tokens() {
    let directory = Directory::random(48).to_temporary();
    let model = load(directory.path());
    let tokens = Random::new(48).tokens(60, 97);
    // How many of 40 tokens are left in front of the new ones, of which 12 stay.
    for (more, left) in [(5, 23), (12, 16), (20, 16)] {
        let mut session = sliding(&model, 40, 16);
        session.prefill(&tokens[..40]).unwrap();
        // Its pages are shared, the last of those kept among them.
        let mut fork = session.fork().unwrap();
        session.cancel().request();
        assert_eq!(status(session.prefill(&tokens[40..40 + more])), Status::Cancelled);
        let expected = [&tokens[..16], &tokens[40 - (left - 16)..40]].concat();
        assert_eq!(session.tokens(), expected);
        let token = session.step().unwrap();
        let mut alone = short_session(&model, 40);
        alone.prefill(&expected).unwrap();
        assert_eq!(alone.step().unwrap(), token);
        assert_eq!(session.logits().unwrap(), alone.logits().unwrap());
        alone.rewind(0).unwrap();
        alone.prefill(&tokens[..40]).unwrap();
        fork.rewind(30).unwrap();
        fork.prefill(&tokens[30..40]).unwrap();
        assert_eq!(fork.logits().unwrap(), alone.logits().unwrap(), "the fork saw nothing of it");
    }
}

#[test]
fn a_session_rewound_to_before_what_its_window_dropped_draws_as_a_new_one() {
    let directory = Directory::random(49).to_temporary();
    let model = load(directory.path());
    let sampling = Sampling { temperature: 1.0, seed: 9, ..Default::default() };
    let draws = |session: &mut Session| {
        session.set_sampling(sampling).unwrap();
        session.prefill(&[5, 6, 7]).unwrap();
        (0..10).map(|_| session.step().unwrap()).collect::<Vec<_>>()
    };
    let fresh = draws(&mut sliding(&model, 20, 4));
    for back in [0, 4] {
        let mut session = sliding(&model, 20, 4);
        session.prefill(&[8; 50]).unwrap();
        assert!(session.dropped() > 0);
        session.rewind(back).unwrap();
        assert_eq!(session.dropped(), 0);
        let mut other = sliding(&model, 20, 4);
        other.push(&vec![8; back]).unwrap();
        assert_eq!(draws(&mut session), draws(&mut other));
        if back == 0 {
            session.rewind(0).unwrap();
            assert_eq!(draws(&mut session), fresh);
        }
    }
}

#[test]
fn a_budget_of_nothing_gets_on_by_one_piece_a_call_and_gives_the_same() {
    let directory = Directory::random(50).to_temporary();
    let model = load(directory.path());
    let tokens = Random::new(50).tokens(30, 97);
    let mut whole = session(&model);
    whole.prefill(&tokens).unwrap();
    let after_prompt = whole.logits().unwrap().to_vec();
    let drawn = whole.step().unwrap();
    let nothing =
        [Budget::of_layers(0), Budget::of_time(Duration::ZERO), Budget { time: Some(Duration::ZERO), layers: Some(0) }];
    for budget in nothing {
        let mut session = session(&model);
        let mut calls = 1;
        let mut given = &tokens[..];
        while session.prefill_within(given, &budget).map(Result::unwrap).is_pending() {
            given = &[];
            calls += 1;
            assert!(calls < 1000, "{budget:?} gets on");
        }
        assert!(calls > 10, "{budget:?}: {calls} calls");
        assert_eq!(session.logits().unwrap(), after_prompt);
        let mut batch = batch(&model, 1, 64, 256);
        let mut results = Vec::new();
        let mut other = common::session(&model);
        other.push(&tokens).unwrap();
        let mut calls = 0;
        let token = loop {
            batch.step(&mut [&mut other], &budget, &mut results).unwrap();
            calls += 1;
            assert!(calls < 1000, "{budget:?} gets on");
            if let Poll::Ready(token) = results.remove(0) {
                break token.unwrap();
            }
        };
        assert_eq!((token, session.step_within(&budget).map(Result::unwrap)), (drawn, Poll::Ready(drawn)));
    }
}

#[test]
fn a_budget_of_layers_ends_after_so_many_and_the_head_is_one() {
    let directory = Directory::random_with(55, json!({"num_hidden_layers": 5})).to_temporary();
    let model = load(directory.path());
    for (layers, expected) in [(1, 6), (2, 3), (3, 2), (5, 2), (6, 1), (7, 1)] {
        let mut session = session(&model);
        let budget = Budget::of_layers(layers);
        let mut calls = 1;
        while session
            .prefill_within(if calls == 1 { &[2, 3, 4] } else { &[] }, &budget)
            .map(Result::unwrap)
            .is_pending()
        {
            calls += 1;
        }
        assert_eq!(calls, expected, "{layers} layers a call");
        // A budget that is spent with the pass leaves the draw to the next call.
        session.push(&[5]).unwrap();
        let mut calls = 1;
        while session.step_within(&budget).map(Result::unwrap).is_pending() {
            calls += 1;
        }
        assert_eq!(calls, if 6 % layers == 0 { expected + 1 } else { expected }, "{layers} layers a call");
    }
}

#[test]
fn a_pass_suspended_under_other_experts_is_begun_anew() {
    let directory = Directory::random(56).to_temporary();
    let model = load(directory.path());
    let tokens = Random::new(56).tokens(20, 97);
    let restrict = |session: &mut Session, by_mask: bool| match by_mask {
        true => session.set_allowed_experts(None, 0b0110).unwrap(),
        false => session.set_expert_bias(Some(0), &[0.0, 3.0, -3.0, 1.0]).unwrap(),
    };
    for by_mask in [true, false] {
        let mut fresh = session(&model);
        restrict(&mut fresh, by_mask);
        fresh.prefill(&tokens).unwrap();
        let mut alone = session(&model);
        assert!(alone.prefill_within(&tokens, &Budget::of_layers(1)).is_pending());
        restrict(&mut alone, by_mask);
        alone.prefill(&[]).unwrap();
        assert_eq!(alone.logits().unwrap(), fresh.logits().unwrap());

        let mut member = session(&model);
        member.push(&tokens).unwrap();
        let (mut batch, mut results) = (batch(&model, 1, 64, 256), Vec::new());
        batch.step(&mut [&mut member], &Budget::of_layers(1), &mut results).unwrap();
        restrict(&mut member, by_mask);
        draw_each(&mut batch, &mut [&mut member])[0].as_ref().unwrap();
        assert_eq!(member.logits().unwrap(), fresh.logits().unwrap());
    }
}

#[test]
fn a_cancelled_step_of_a_batch_loses_no_token_that_was_drawn_and_no_cancel() {
    let directory = Directory::random_with(52, json!({"intermediate_size": 512})).to_temporary();
    let model = load(directory.path());
    let canceller = Canceller::start();
    let prompt = Random::new(52).tokens(200, 97);
    let mut drawn_before_the_cancel = 0;
    for round in 0..200 {
        let mut batch = batch(&model, 2, 256, 256);
        let (mut ready, mut long) = (session(&model), session(&model));
        ready.prefill(&[2, 3, 4]).unwrap();
        long.push(&prompt).unwrap();
        let cancel = Arc::clone(batch.cancel());
        let mut results = Vec::new();
        let after = Duration::from_micros(20 * round);
        let stopped = canceller.around(&cancel, Some(after), || {
            let outcome = batch.step(&mut [&mut ready, &mut long], &Budget::UNLIMITED, &mut results);
            (outcome.map_err(|error| error.status()), cancel.is_requested())
        });
        match stopped {
            (Err(status), _) => {
                assert_eq!(status, Status::Cancelled);
                assert_eq!((ready.tokens(), long.tokens()), (&[2, 3, 4][..], &prompt[..]));
            }
            (Ok(()), is_requested) => {
                let Poll::Ready(Ok(token)) = &results[0] else { panic!("a session that was ready waits") };
                assert_eq!(ready.tokens(), [2, 3, 4, *token]);
                if results[1].is_pending() {
                    assert!(is_requested, "the next step answers the cancel");
                    drawn_before_the_cancel += 1;
                }
            }
        }
    }
    assert!(drawn_before_the_cancel > 0);
}

#[test]
fn a_member_whose_draws_fail_leaves_the_others_their_share_of_the_smallest_budget() {
    let directory = Directory::random(53).to_temporary();
    let model = load(directory.path());
    let mut batch = batch(&model, 3, 64, 256);
    let (mut failing, mut ready, mut waiting) = (session(&model), session(&model), session(&model));
    let nothing: Vec<(u32, f32)> = (0..97).map(|token| (token, f32::NEG_INFINITY)).collect();
    failing.set_logit_bias(LogitBias::new(&nothing, 97).unwrap());
    failing.prefill(&[2, 3, 4]).unwrap();
    ready.prefill(&[2, 3]).unwrap();
    waiting.push(&[2, 3, 4, 5]).unwrap();
    let (mut results, mut calls) = (Vec::new(), 0);
    while ready.tokens().len() < 4 || waiting.tokens().len() < 6 {
        let budget = Budget::of_time(Duration::ZERO);
        batch.step(&mut [&mut failing, &mut ready, &mut waiting], &budget, &mut results).unwrap();
        let failed = matches!(&results[0], Poll::Ready(Err(error)) if error.status() == Status::NotANumber);
        assert!(failed, "{:?}", results[0]);
        calls += 1;
        assert!(calls < 1000, "the others get on");
    }
}

#[test]
fn a_grammar_forgets_with_the_session_what_its_window_dropped() {
    let sizes = json!({"vocab_size": tokenizer_sample::VOCAB_SIZE});
    let directory = Directory::random_with(54, sizes).to_temporary();
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer_sample::sample().to_string()).unwrap();
    let model = load(directory.path());
    let grammar = Grammar::new(model.grammar_vocabulary().unwrap(), GrammarKind::Regex, "[a-z]{200}").unwrap();
    let accepted = |session: &Session| session.grammar().unwrap().accepted().to_vec();
    // The grammar is set before the last of the tokens that the window keeps.
    let started = || {
        let mut session = sliding(&model, 12, 5);
        session.prefill(&[2, 9, 16]).unwrap();
        session.set_grammar(Some(&grammar)).unwrap();
        session
    };
    let mut session = started();
    let drawn: Vec<u32> = (0..20).map(|_| session.step().unwrap()).collect();
    assert!(session.dropped() > 0);
    let held = session.tokens().len();
    session.rewind(held - 1).unwrap();
    assert_eq!(accepted(&session), drawn[..19], "what is dropped stays accepted, as long as anything after it is held");
    for (count, left) in [(5, 2), (4, 1), (3, 0), (0, 0)] {
        session.rewind(count).unwrap();
        assert_eq!((accepted(&session), session.dropped()), (drawn[..left].to_vec(), 0));
    }
    // A prompt that makes the window drop most of itself, cancelled before any of it is run.
    let mut session = started();
    let letter = model.encode("a", false, false).unwrap()[0];
    session.cancel().request();
    assert_eq!(status(session.prefill(&[letter; 40])), Status::Cancelled);
    assert_eq!((session.tokens(), accepted(&session)), (&[2, 9, 16][..], vec![]));
}
