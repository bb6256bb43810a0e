//! Steps as one graph: the bits of their stages, a few calls of the driver, and stages where there can be no graph.

use std::sync::Arc;
use std::task::Poll;

use gemmoe::backend::{Cancel, KvDtype, Limit};
use gemmoe::{Budget, Model, Session, SessionBatch, SessionOptions, Status};
use serde_json::json;

use crate::common::{Directory, Random, batch, draw_each, load_options, session};
use crate::shim::{Order, Shim};
use crate::{on_device, with_a_token};

/// Of the driver: in and out of the context twice, the batch's block, the graph, the wait for it.
const CALLS: u64 = 7;

/// And those that fetch logits which somebody asks for.
const CALLS_OF_LOGITS: u64 = 4;

/// No graph is made for work that may stop at a layer, and none is launched.
fn by_stages() -> Budget {
    Budget::of_layers(1000)
}

fn bits(session: &Session) -> Vec<u32> {
    session.logits().unwrap().iter().map(|value| value.to_bits()).collect()
}

fn run(session: &mut Session, tokens: &[u32], budget: &Budget) -> Vec<u32> {
    assert!(matches!(session.prefill_within(tokens, budget), Poll::Ready(Ok(()))));
    bits(session)
}

/// Long contexts, small otherwise.
fn model(layers: usize) -> Arc<Model> {
    let changes = json!({"num_hidden_layers": layers, "max_position_embeddings": 1024, "num_key_value_heads": 1});
    load_options(Directory::random_with(23, changes).to_temporary().path(), &on_device())
}

fn session_of(model: &Arc<Model>, kv_dtype: KvDtype) -> Session {
    let options = SessionOptions { context_size: 640, kv_dtype: Some(kv_dtype), ..Default::default() };
    Session::new(Arc::clone(model), &options).unwrap()
}

#[test]
fn a_graph_gives_the_bits_of_stages_at_every_length_and_place() {
    let Some(shim) = Shim::take() else { return };
    let model = model(2);
    let text = Random::new(23).tokens(600, 97);
    for (kv_dtype, order) in [(KvDtype::Bf16, Order::Reverse), (KvDtype::Int8, Order::Random(1))] {
        shim.order(order);
        let (mut graphs, mut stages) = (session_of(&model, kv_dtype), session_of(&model, kv_dtype));
        // Ends of pages are at multiples of 16, of spans at 256 and 512.
        for (start, counts) in [(0, 1..=16), (250, 5..=8), (511, 1..=2), (580, 16..=16)] {
            for count in counts {
                for session in [&mut graphs, &mut stages] {
                    let held = session.tokens().len().min(start);
                    session.rewind(held).unwrap();
                    run(session, &text[held..start + 1], &by_stages());
                }
                let tokens = &text[start + 1..start + 1 + count];
                let launches = shim.launches();
                let found = run(&mut graphs, tokens, &Budget::UNLIMITED);
                let recorded = shim.launches() - launches;
                assert_eq!(found, run(&mut stages, tokens, &by_stages()), "{kv_dtype:?}, {count} from {start} on");
                assert_eq!(recorded > 0, start == 0, "{count} tokens were met before: {recorded} launches");
            }
        }
    }
}

#[test]
fn a_step_is_as_many_calls_of_the_driver_for_any_number_of_layers() {
    let Some(shim) = Shim::take() else { return };
    let mut of_layers = Vec::new();
    for layers in [1, 3] {
        let model = model(layers);
        let mut session = session_of(&model, KvDtype::F32);
        session.prefill(&Random::new(1).tokens(30, 97)).unwrap();
        let mut calls_of = |step: &mut dyn FnMut(&mut Session)| {
            let before = shim.calls();
            step(&mut session);
            shim.calls() - before
        };
        let step = &mut |session: &mut Session| session.step().map(drop).unwrap();
        // Nothing is pending yet; then the graph is made.
        let first = [calls_of(step), calls_of(step)];
        assert!(first[0] == 0 && first[1] > 20, "{first:?}");
        let launches = shim.launches();
        let calls: Vec<u64> = (0..40).map(|_| calls_of(step)).collect();
        assert!(calls.iter().all(|count| *count == calls[0]), "{calls:?}");
        assert_eq!(shim.launches(), launches, "no kernel by itself");
        of_layers.push(calls[0]);
    }
    assert_eq!(of_layers, [CALLS; 2]);
}

#[test]
fn the_work_of_a_graph_is_the_same_wherever_it_was_recorded() {
    let Some(shim) = Shim::take() else { return };
    let model = model(1);
    let text = Random::new(1).tokens(260, 97);
    // In the second span of a context attention is split, and merged by another kernel.
    let recorded = [3, 260].map(|length| {
        let mut session = session_of(&model, KvDtype::F32);
        session.prefill(&text[..length]).unwrap();
        let before = shim.launches();
        session.prefill(&[1]).unwrap();
        shim.launches() - before
    });
    assert_eq!(recorded[0], recorded[1]);
}

#[test]
fn batches_of_any_size_replay_what_was_recorded_for_others() {
    let Some(shim) = Shim::take() else { return };
    let model = model(2);
    let dtypes = [KvDtype::Int8, KvDtype::F32, KvDtype::Bf16, KvDtype::F16];
    let mut random = Random::new(29);
    let mut sessions: Vec<Session> = (0..6).map(|index| session_of(&model, dtypes[index % 4])).collect();
    for (index, session) in sessions.iter_mut().enumerate() {
        session.set_allowed_experts(Some(1), 0b1101 >> (index % 2) | 2).unwrap();
        run(session, &random.tokens(250 + 3 * index, 97), &by_stages());
    }
    let mut batch = batch(&model, 6, 16, 640);
    // Other sessions each time, in other places of the batch, back and forth over the end of a span.
    let mut seen = Vec::new();
    for round in 0..12 {
        let chosen: Vec<usize> =
            (0..6).filter(|index| round % 6 == *index || (round + 1) * (index + 3) % 5 > 1).collect();
        let mut expected = Vec::new();
        for index in &chosen {
            let session = &mut sessions[*index];
            let (token, held) = (random.tokens(1, 97), session.tokens().len());
            expected.push(run(session, &token, &by_stages()));
            session.rewind(held).unwrap();
            session.push(&token).unwrap();
        }
        let launches = shim.launches();
        step_all(&mut batch, &mut sessions, &chosen);
        assert_eq!(shim.launches() == launches, seen.contains(&chosen.len()), "round {round}");
        seen.push(chosen.len());
        for (index, expected) in chosen.iter().zip(&expected) {
            let session = &mut sessions[*index];
            assert_eq!(&bits(session), expected, "round {round}, session {index}");
            let held = session.tokens().len();
            session.rewind(held - round % 3).unwrap();
        }
    }
    assert!(seen.iter().any(|count| *count != seen[0]), "{seen:?}");
}

fn step_all(batch: &mut SessionBatch, sessions: &mut [Session], chosen: &[usize]) {
    let members = sessions.iter_mut().enumerate().filter(|(index, _)| chosen.contains(index));
    draw_each(batch, &mut members.map(|(_, session)| session).collect::<Vec<_>>());
}

#[test]
fn more_shapes_than_are_kept_replace_the_oldest() {
    let Some(shim) = Shim::take() else { return };
    let model = model(1);
    let options = SessionOptions { context_size: 64, prefill_chunk: 16, ..Default::default() };
    let mut session = Session::new(Arc::clone(&model), &options).unwrap();
    let text = Random::new(31).tokens(17, 97);
    let mut recorded = |count: usize| {
        session.rewind(0).unwrap();
        let before = shim.launches();
        session.prefill(&text[..count]).unwrap();
        shim.launches() > before
    };
    assert!((1..=16).all(&mut recorded));
    assert!(!(1..=16).any(&mut recorded));
    // Sixteen without logits in place of one, and one in place of two.
    assert!(recorded(17));
    assert!(!(3..=16).any(&mut recorded));
    assert!(!recorded(1) && recorded(2) && recorded(3));
}

#[test]
fn a_cancel_is_heard_before_a_graph_is_recorded_or_launched() {
    let Some(shim) = Shim::take() else { return };
    let model = model(1);
    with_a_token(model.backend(), |pass, batch| {
        let (none, wish) = (Cancel::default(), Cancel::default());
        wish.request();
        let (unlimited, cancelled) = (Limit::none(&none), Limit::none(&wish));
        pass.begin(batch).unwrap();
        assert!(!pass.begin_recording(&cancelled).unwrap());
        assert!(pass.begin_recording(&unlimited).unwrap());
        assert!(pass.embed(batch, &cancelled).map(Result::unwrap).is_ready(), "a recording is not stopped");
        pass.end_recording(Ok(())).unwrap();
        let calls = shim.calls();
        assert!(!pass.replay(batch, &cancelled).unwrap());
        assert_eq!(shim.calls(), calls, "nothing was begun");
        let Poll::Ready(Err(error)) = pass.embed(batch, &cancelled) else { panic!("a stage is not stopped") };
        assert_eq!(error.status(), Status::Cancelled);
        assert!(pass.replay(batch, &unlimited).unwrap());
    });
}

#[test]
fn where_no_graph_can_be_made_steps_go_on_by_stages_and_it_is_not_tried_again() {
    let Some(shim) = Shim::take() else { return };
    let model = model(1);
    let text = Random::new(41).tokens(8, 97);
    let mut stages = session(&model);
    run(&mut stages, &text[..3], &by_stages());
    let expected: Vec<_> = text[3..7].iter().map(|token| run(&mut stages, &[*token], &by_stages())).collect();
    let before = shim.calls();
    run(&mut stages, &text[7..8], &by_stages());
    let calls_of_stages = shim.calls() - before;
    let mut calls_of_making = 0;
    let mut outcomes = [0; 2];
    for nth in 0.. {
        let mut session = session(&model);
        run(&mut session, &text[..3], &by_stages());
        let before = shim.calls();
        // The first calls are those of `begin`; the last ones launch and wait.
        shim.fail(nth, 1);
        let first = session.prefill(&text[3..4]);
        let calls = shim.calls() - before;
        shim.fail(0, 0);
        if nth == 0 {
            calls_of_making = calls;
        } else if nth > calls_of_making {
            break;
        }
        let made_up = first.is_ok();
        match first {
            Ok(()) => outcomes[0] += 1,
            Err(error) => {
                assert_eq!(error.status(), Status::DeviceFailed, "call {nth}: {error}");
                outcomes[1] += 1;
                session.prefill(&text[3..4]).unwrap();
            }
        }
        assert_eq!(bits(&session), expected[0], "call {nth} of {calls_of_making}");
        let mut later = Vec::new();
        for (token, expected) in text[4..7].iter().zip(&expected[1..]) {
            let before = shim.calls();
            assert_eq!(&run(&mut session, &[*token], &Budget::UNLIMITED), expected, "call {nth}, later");
            later.push(shim.calls() - before);
        }
        // After an error the last token held was run again with the next: that was another shape.
        let same = &later[made_up as usize ^ 1..];
        assert!(same.iter().all(|calls| *calls == same[0]), "call {nth}: {later:?}");
        assert!(same[0] == CALLS + CALLS_OF_LOGITS || made_up && same[0] == calls_of_stages, "call {nth}: {later:?}");
    }
    println!("{calls_of_making} calls: {} failures were made up for, {} were errors", outcomes[0], outcomes[1]);
    // Entering the context twice, the copy, the wait.
    assert_eq!(outcomes[1], 4);
}

#[test]
fn a_device_that_is_lost_while_a_graph_is_made_is_lost() {
    let Some(shim) = Shim::take() else { return };
    let directory = Directory::random(43).to_temporary();
    for nth in [4, 9, 30] {
        let model = load_options(directory.path(), &on_device());
        let mut session = session(&model);
        run(&mut session, &[1, 2, 3], &by_stages());
        shim.fail(nth, 719);
        assert_eq!(session.prefill(&[4]).unwrap_err().status(), Status::DeviceLost, "call {nth}");
        drop((session, model));
        assert_eq!((shim.live_allocations(), shim.live_objects()), (0, 0), "call {nth}");
    }
}
