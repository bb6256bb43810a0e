//! Draws on a device: what comes back of the logits, and that the tokens are those that all logits would give.

use std::sync::Arc;
use std::task::Poll;

use gemmoe::engine::sample::{Draw, Sampler};
use gemmoe::{Budget, LogitBias, Model, Sampling, Session, SessionOptions, Status};
use serde_json::json;

use crate::common::{Directory, Random, batch, draw_each, load_options, session};
use crate::driver::Driver;
use crate::on_device;
use crate::shim::Shim;

const VOCAB: usize = 3000;

/// Bytes of all logits of a token.
const ROW: u64 = 4 * VOCAB as u64;

/// Bytes of candidates and routes, at most.
const FEW: u64 = 2500;

/// Its logits are spread so far that a few tokens have most of the probability.
fn model(seed: u64) -> Arc<Model> {
    let mut directory = Directory::random_with(seed, json!({"vocab_size": VOCAB, "hidden_size": 64}));
    let (_, norm) = directory.tensors.get_mut("model.norm.weight").unwrap();
    norm.iter_mut().for_each(|weight| *weight = 2.0);
    load_options(directory.to_temporary().path(), &on_device())
}

/// The token that the processor draws from the logits the session's last token was drawn from.
fn drawn_from_all(session: &Session, bias: &LogitBias) -> u32 {
    let (token, held) = session.tokens().split_last().map(|(token, held)| (*token, held)).unwrap();
    let logits = session.logits().unwrap();
    let counter = session.dropped() + held.len() as u64;
    let draw = Draw { logits, tokens: held, counter, bias, allowed: None };
    let expected = Sampler::new(VOCAB).unwrap().draw(session.sampling(), draw).unwrap();
    assert_eq!(token, expected, "{:?}", session.sampling());
    token
}

#[test]
fn a_usual_step_copies_candidates_alone_and_draws_the_token_that_all_logits_give() {
    let Some(shim) = Shim::take() else { return };
    let model = model(1);
    let warm = Sampling { temperature: 0.8, seed: 9, ..Default::default() };
    let cases = [
        (Sampling::default(), false),
        (Sampling { top_k: 40, ..warm }, false),
        (Sampling { top_k: 1, ..warm }, false),
        (Sampling { top_p: 0.5, ..warm }, false),
        (Sampling { min_p: 0.1, ..warm }, false),
        (Sampling { top_k: 64, top_p: 0.95, min_p: 0.01, ..warm }, false),
        (Sampling { repetition_penalty: 1.3, ..Default::default() }, false),
        (Sampling { top_k: 20, frequency_penalty: 0.5, presence_penalty: 0.1, ..warm }, false),
        // The temperature alone, and more tokens than candidates.
        (warm, true),
        (Sampling { top_k: 1000, ..warm }, true),
    ];
    for (sampling, takes_all) in cases {
        let mut session = session(&model);
        session.set_sampling(sampling).unwrap();
        session.prefill(&Random::new(1).tokens(20, VOCAB)).unwrap();
        for _ in 0..6 {
            let before = shim.bytes_to_host();
            session.step().unwrap();
            let copied = shim.bytes_to_host() - before;
            let expected = if takes_all { ROW..ROW + FEW } else { 0..FEW };
            assert!(expected.contains(&copied), "{copied} bytes, {sampling:?}");
            drawn_from_all(&session, &LogitBias::default());
            // They were fetched once, by the draw or just now.
            let after = shim.bytes_to_host();
            session.logits().unwrap();
            let copied = shim.bytes_to_host() - after;
            assert_eq!((after - before - copied) / ROW, 1);
            assert_eq!(copied, 0);
        }
    }
}

#[test]
fn a_bias_is_added_to_candidates_and_where_it_lifts_others_all_logits_are_looked_at() {
    let Some(shim) = Shim::take() else { return };
    let model = model(2);
    let mut session = session(&model);
    session.prefill(&[2, 3, 4]).unwrap();
    let logits = session.logits().unwrap();
    let best = (0..VOCAB).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32;
    let worst = (0..VOCAB).min_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32;
    for (pairs, expected, takes_all) in [
        (vec![(best, f32::NEG_INFINITY)], None, false),
        (vec![(best, -0.01), (worst, -100.0)], None, false),
        (vec![(worst, 1000.0)], Some(worst), true),
    ] {
        session.rewind(2).unwrap();
        session.prefill(&[4]).unwrap();
        let bias = LogitBias::new(&pairs, VOCAB).unwrap();
        session.set_logit_bias(bias.try_clone().unwrap());
        let before = shim.bytes_to_host();
        let token = session.step().unwrap();
        assert_eq!(shim.bytes_to_host() - before >= ROW, takes_all, "{pairs:?}");
        assert_eq!(token, drawn_from_all(&session, &bias));
        assert!(expected.is_none_or(|expected| token == expected));
    }
}

#[test]
fn logits_are_those_of_their_own_session_whatever_others_did_since() {
    let Some(_driver) = Driver::take() else { return };
    let model = model(3);
    let prompts: Vec<Vec<u32>> = [5, 9, 2].map(|length| Random::new(length as u64).tokens(length, VOCAB)).into();
    let prepare = |index: usize| {
        let mut session = session(&model);
        session.push(&prompts[index]).unwrap();
        session
    };
    let bits = |session: &Session| session.logits().unwrap().iter().map(|logit| logit.to_bits()).collect::<Vec<_>>();
    // Each step's logits, alone.
    let alone: Vec<Vec<Vec<u32>>> = (0..prompts.len())
        .map(|index| {
            let mut session = prepare(index);
            let step = |_| {
                session.step().unwrap();
                bits(&session)
            };
            (0..4).map(step).collect()
        })
        .collect();
    let mut batch = batch(&model, prompts.len(), 24, 256);
    let mut sessions: Vec<Session> = (0..prompts.len()).map(prepare).collect();
    let step = |sessions: &mut [Session], batch: &mut gemmoe::SessionBatch, members: &[usize]| {
        let members = sessions.iter_mut().enumerate().filter(|(index, _)| members.contains(index));
        let mut members: Vec<&mut Session> = members.map(|(_, session)| session).collect();
        draw_each(batch, &mut members).into_iter().for_each(|token| assert!(token.is_ok()));
    };
    step(&mut sessions, &mut batch, &[0, 1, 2]);
    // The others go on in the same pass's workspace; the first one's logits are not asked for before that.
    step(&mut sessions, &mut batch, &[1, 2]);
    step(&mut sessions, &mut batch, &[2]);
    for (index, steps) in [1, 2, 3].into_iter().enumerate() {
        assert_eq!(bits(&sessions[index]), alone[index][steps - 1], "session {index} after {steps} steps");
    }
    // Alone and together in turn.
    sessions[0].step().unwrap();
    step(&mut sessions, &mut batch, &[0, 1]);
    assert_eq!(bits(&sessions[0]), alone[0][2]);
    assert_eq!(bits(&sessions[1]), alone[1][2]);
    assert_eq!(bits(&sessions[2]), alone[2][2]);
    let mut fork = sessions[0].fork().unwrap();
    sessions[0].step().unwrap();
    assert_eq!((bits(&fork), bits(&sessions[0])), (alone[0][2].clone(), alone[0][3].clone()));
    fork.step().unwrap();
    assert_eq!(bits(&fork), alone[0][3]);
    fork.rewind(3).unwrap();
    assert_eq!(fork.logits().unwrap_err().status(), Status::NoLogits);
}

#[test]
fn logits_stay_until_the_next_pass_is_done() {
    let Some(shim) = Shim::take() else { return };
    let model = model(4);
    let mut session = session(&model);
    session.prefill(&[2, 3, 4]).unwrap();
    session.step().unwrap();
    let before = session.logits().unwrap().to_vec();
    let token = session.tokens()[3];
    // One layer of two, and the head is not begun.
    assert!(matches!(session.step_within(&Budget::of_layers(1)), Poll::Pending));
    assert_eq!(session.logits().unwrap(), before);
    // The last calls of a pass: what it wrote before one failed is not the session's.
    let calls = shim.calls();
    let mut other = session.fork().unwrap();
    other.step().unwrap();
    let most = shim.calls() - calls;
    for nth in 1..most {
        let mut fork = session.fork().unwrap();
        shim.fail(nth, 1);
        let stepped = fork.step();
        shim.fail(0, 0);
        match stepped {
            Err(_) => assert_eq!(fork.logits().unwrap(), before, "call {nth}"),
            Ok(_) => assert_eq!(fork.tokens(), other.tokens()),
        }
    }
    assert_eq!(session.tokens(), [2, 3, 4, token]);
}

#[test]
fn forks_snapshots_and_batches_draw_alike_with_any_setting() {
    let Some(_driver) = Driver::take() else { return };
    let model = model(5);
    let mut batch = batch(&model, 1, 16, 256);
    let warm = Sampling { temperature: 1.0, seed: 4, ..Default::default() };
    for sampling in [warm, Sampling { top_p: 0.7, ..warm }, Sampling { top_k: 300, min_p: 0.02, ..warm }] {
        let mut first = session(&model);
        first.set_sampling(sampling).unwrap();
        first.prefill(&[2, 3, 4]).unwrap();
        let mut bytes = vec![0; first.snapshot_bytes()];
        first.snapshot(&mut bytes).unwrap();
        let mut restored = Session::restore(Arc::clone(&model), &bytes, first.options()).unwrap();
        let mut again = restored.fork().unwrap();
        let (mut fork, mut batched) = (first.fork().unwrap(), first.fork().unwrap());
        for _ in 0..5 {
            let token = first.step().unwrap();
            assert_eq!(fork.step().unwrap(), token, "{sampling:?}");
            assert_eq!(restored.step().unwrap(), token, "{sampling:?}");
            assert_eq!(again.step().unwrap(), token, "{sampling:?}");
            assert_eq!(draw_each(&mut batch, &mut [&mut batched]).remove(0).unwrap(), token, "{sampling:?}");
        }
    }
}

#[test]
fn plans_count_the_logits_of_a_session() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random(6).to_temporary();
    let model = load_options(directory.path(), &on_device());
    for batch_only in [false, true] {
        let options = SessionOptions { context_size: 40, batch_only, ..Default::default() };
        let plan = Model::plan(directory.path(), &on_device(), &options).unwrap();
        let session = Session::new(Arc::clone(&model), &options).unwrap();
        assert_eq!(plan.workspace_bytes, (session.bytes() - session.kv_bytes()) as u64);
        assert!(!batch_only || plan.workspace_bytes == 2 * 4 * 97);
    }
}
