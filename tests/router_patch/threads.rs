//! Patches that come and go while sessions run on other threads: a call runs under one set of gates from its first token to its
//! last, never under a mixture.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use gemmoe::{Formats, Session, SessionOptions};

use crate::common::{Directory, Random, batch, draw_each, session};
use crate::fixture::{Gates, Patched, bits, expected, shown, tokens};

#[test]
fn what_a_call_gives_is_of_one_set_of_gates_while_others_come_and_go() {
    let patched =
        Patched::new(Directory::random_with(51, serde_json::json!({"num_hidden_layers": 4})), Formats::default());
    let given = tokens(60);
    // In several passes: a change between them must not be seen either.
    let options = SessionOptions { context_size: 128, prefill_chunk: 7, ..Default::default() };
    let score = |session: &mut Session| {
        session.rewind(0).unwrap();
        session.push(&given[..1]).unwrap();
        let mut scores = vec![0f32; given.len() - 1];
        session.score(&given[1..], &mut scores).unwrap();
        bits(&scores)
    };
    let possible =
        Gates::ALL.map(|gates| score(&mut Session::new(Arc::clone(patched.loaded(gates)), &options).unwrap()));
    let (done, seen) = (AtomicBool::new(false), [const { AtomicUsize::new(0) }; 3]);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    let mut session = Session::new(Arc::clone(&patched.model), &options).unwrap();
                    for _ in 0..150 {
                        let found = score(&mut session);
                        let of = possible.iter().position(|scores| *scores == found);
                        seen[of.expect("scores of a mixture of gates")].fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let changes = scope.spawn(|| {
            let mut random = Random::new(1);
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                patched.put(Gates::ALL[random.below(3)]);
                count += 1;
                std::thread::sleep(std::time::Duration::from_micros(random.below(3000) as u64));
            }
            count
        });
        let results: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        done.store(true, Ordering::Relaxed);
        println!("{} changes, seen {seen:?}", changes.join().unwrap());
        results.into_iter().for_each(|result| result.unwrap());
    });
    assert!(seen.iter().filter(|count| count.load(Ordering::Relaxed) > 0).count() > 1, "{seen:?}");
}

#[test]
fn sessions_and_batches_that_ran_while_gates_changed_end_where_fresh_ones_do() {
    let patched = Patched::new(Directory::random(52), Formats::default());
    let mut sessions: Vec<Session> = std::thread::scope(|scope| {
        let alone = scope.spawn(|| {
            let mut sessions = vec![session(&patched.model), session(&patched.model)];
            for round in 0..60 {
                for (index, session) in sessions.iter_mut().enumerate() {
                    session.prefill(&[round, index as u32]).unwrap();
                    session.step().unwrap();
                }
            }
            sessions
        });
        let together = scope.spawn(|| {
            let mut sessions = vec![session(&patched.model), session(&patched.model), session(&patched.model)];
            let mut batch = batch(&patched.model, 3, 16, 256);
            for (index, session) in sessions.iter_mut().enumerate() {
                session.push(&tokens(3 + 8 * index)).unwrap();
            }
            for _ in 0..50 {
                let mut members: Vec<&mut Session> = sessions.iter_mut().collect();
                let drawn = draw_each(&mut batch, &mut members);
                assert!(drawn.iter().all(Result::is_ok), "{drawn:?}");
            }
            sessions
        });
        // So many, and no more: a batch that runs a few tokens a step must come to its end between two of them.
        let changes = scope.spawn(|| {
            let mut random = Random::new(2);
            for _ in 0..200 {
                patched.put(Gates::ALL[random.below(3)]);
                std::thread::sleep(std::time::Duration::from_micros(random.below(2000) as u64));
            }
        });
        changes.join().unwrap();
        let ended = [alone.join(), together.join()];
        ended.into_iter().flat_map(|sessions| sessions.unwrap()).collect()
    });
    for gates in Gates::ALL {
        patched.put(gates);
        for session in &mut sessions {
            session.prefill(&[]).unwrap();
            assert_eq!(shown(session).unwrap(), expected(&patched, gates, session.tokens()), "{gates:?}");
        }
    }
}
