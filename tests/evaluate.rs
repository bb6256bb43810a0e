//! Evaluation: its figures are those of scores, of sessions' statistics and of the trainer, whoever computes them.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

use std::path::Path;
use std::sync::Arc;

use common::{Directory, Random, load, session};
use gemmoe::engine::score::{perplexity, score_in_windows};
use gemmoe::evaluate::{Evaluator, PreferenceFigures, check_tokenizers};
use gemmoe::train::{Document, Pair, PreferenceLoss, PreferenceOptions, RouterTrainer, TrainOptions};
use gemmoe::{Model, RouterPatch, SessionOptions, Status};
use safetensors::Dtype;
use serde_json::json;

/// In f32: with bf16 weights sessions round keys, values and activations, which trainers do not.
fn small_model(seed: u64) -> Arc<Model> {
    load(Directory { dtype: Dtype::F32, ..Directory::random(seed) }.to_temporary().path())
}

fn evaluator(model: &Arc<Model>, context_size: usize) -> Evaluator {
    Evaluator::new(model, &SessionOptions { context_size, ..Default::default() }).unwrap()
}

/// A model with a tokenizer, and changes to its config.json.
fn with_tokenizer(seed: u64, tokenizer: &str) -> tempfile::TempDir {
    let directory = Directory::random_with(seed, json!({"vocab_size": tokenizer_sample::VOCAB_SIZE})).to_temporary();
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer).unwrap();
    directory
}

/// Documents with prompts of several lengths; one has a second response after a second prompt.
fn documents(seed: u64) -> Vec<Document> {
    let mut random = Random::new(seed);
    let mut documents: Vec<Document> =
        (1..5).map(|index| Document::new(&random.tokens(3 * index, 97), &random.tokens(5 + index, 97))).collect();
    documents[3].is_response[15] = false;
    documents.push(Document::new(&[], &random.tokens(20, 97)));
    documents
}

/// Pairs whose answers share a prompt, one of which also share an answer's beginning, and one nothing but BOS.
fn pairs(seed: u64) -> Vec<Pair> {
    let mut random = Random::new(seed);
    let mut pairs = Vec::new();
    for index in 1..7 {
        let prompt = random.tokens(2 * index, 97);
        let (chosen, rejected) = (random.tokens(4 + index, 97), random.tokens(12 - index, 97));
        pairs.push(Pair::new(Document::new(&prompt, &chosen), Document::new(&prompt, &rejected)));
    }
    let answer = random.tokens(9, 97);
    let other = [&answer[..4], &random.tokens(3, 97)].concat();
    pairs.push(Pair::new(Document::new(&[2, 5], &answer), Document::new(&[2, 5], &other)));
    let long = [&[2], &random.tokens(8, 97)[..]].concat();
    pairs.push(Pair::new(Document::new(&[2, 7], &answer), Document::new(&long, &answer)));
    pairs
}

/// The model's gates, moved.
fn moved(model: &Model, seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    model.stored_gates().unwrap().iter().map(|gate| gate + 0.2 * random.unit()).collect()
}

fn assert_near(found: f64, expected: f64, what: &str) {
    assert!((found - expected).abs() < 2e-5 * (1.0 + expected.abs()), "{what}: {found}, expected {expected}");
}

fn trainer(model: &Arc<Model>, preference: PreferenceOptions) -> RouterTrainer {
    RouterTrainer::new(model, &TrainOptions { max_tokens: 120, preference, ..Default::default() }).unwrap()
}

#[test]
fn a_text_has_the_perplexity_of_score_and_each_token_is_routed_once() {
    let model = small_model(1);
    let tokens = Random::new(1).tokens(200, 97);
    for context_size in [200, 64, 7, 2] {
        let mut done = 0;
        let found = evaluator(&model, context_size).text(&tokens, &mut |count| done += count).unwrap();
        let options = SessionOptions { context_size, ..Default::default() };
        let expected = perplexity(&model, &tokens, &options, &mut |_| {}).unwrap();
        assert_eq!((found.perplexity.tokens, done), (199, 199));
        assert_near(found.perplexity.nats, expected.nats, "nats");
        assert_eq!(found.perplexity.value(), (found.perplexity.nats / 199.0).exp());
        assert_near(found.perplexity.value(), found.nats_per_token().exp(), "perplexity");
        assert_eq!((found.routing.tokens, found.documents), (200, 1));
        for layer in found.routing.counts.chunks(4) {
            assert_eq!(layer.iter().sum::<u64>(), 2 * 200, "context {context_size}");
        }
        let shares = found.routing.shares();
        assert_near(shares[..4].iter().sum(), 2.0, "shares");
        assert_near(found.routing.mean_weights()[..4].iter().sum(), 1.0, "weights");
        // No tokenizer knows how many bytes these are.
        assert_eq!(found.nats_per_byte(), None);
    }
    let whole = evaluator(&model, 200).text(&tokens, &mut |_| {}).unwrap();
    let mut session = session(&model);
    session.prefill(&tokens).unwrap();
    let statistics = session.expert_statistics();
    assert_eq!(whole.routing.counts, statistics.counts());
    let sums = whole.routing.weight_sums.iter().zip(statistics.weight_sums());
    sums.for_each(|(found, expected)| assert_near(*found, *expected, "weight sum"));
}

#[test]
fn documents_have_the_loss_and_the_shares_of_the_trainer() {
    let model = small_model(2);
    let documents = documents(2);
    let mut done = 0;
    let found = evaluator(&model, 64).documents(documents.iter().cloned().map(Ok), &mut |count| done += count).unwrap();
    let expected = trainer(&model, Default::default()).evaluate(&documents).unwrap();
    assert_eq!((found.documents, done), (5, 5));
    assert_eq!((found.perplexity.tokens, found.routing.tokens), (expected.targets, expected.tokens as u64));
    assert_near(found.nats_per_token(), expected.text_loss, "nats per token");
    // A trainer's shares are of choices, of which each token has two.
    let shares = found.routing.shares();
    shares.iter().zip(&expected.shares).for_each(|(found, expected)| assert_near(found / 2.0, *expected, "share"));
    // One after the other or all together, in whatever session.
    let alone: f64 = documents
        .iter()
        .map(|document| evaluator(&model, 40).documents([Ok(document.clone())], &mut |_| {}).unwrap().perplexity.nats)
        .sum();
    assert_near(found.perplexity.nats, alone, "nats");
}

#[test]
fn bytes_are_those_of_the_tokens_that_are_predicted() {
    let directory = with_tokenizer(3, &tokenizer_sample::sample().to_string());
    let model = load(directory.path());
    let text = "hello ello, hello\n";
    let tokens = model.encode(text, true, false).unwrap();
    let found = evaluator(&model, 64).text(&tokens, &mut |_| {}).unwrap();
    assert_eq!(found.bytes, text.len() as u64);
    assert_near(found.nats_per_byte().unwrap(), found.perplexity.nats / text.len() as f64, "nats per byte");
    // EOS, token 1, is markup and has none.
    let prompt = model.encode("hello", true, false).unwrap();
    let response = [model.encode(" hell", false, false).unwrap(), vec![1]].concat();
    let document = Document::new(&prompt, &response);
    let found = evaluator(&model, 64).documents([Ok(document)], &mut |_| {}).unwrap();
    assert_eq!((found.bytes, found.perplexity.tokens), (5, response.len()));
}

#[test]
fn pairs_have_the_rewards_of_the_trainer_under_any_gates() {
    let model = small_model(4);
    let mut pairs = pairs(4);
    let options = [
        PreferenceOptions::default(),
        PreferenceOptions { beta: 0.7, mean_log_probability: true, ..Default::default() },
        PreferenceOptions { loss: PreferenceLoss::Ipo, beta: 0.3, ..Default::default() },
    ];
    let score = |model: &Arc<Model>, pairs: &[Pair]| {
        evaluator(model, 64).pairs(pairs.iter().cloned().map(Ok), &mut |_| {}).unwrap()
    };
    let reference = score(&model, &pairs);
    let gates = moved(&model, 5);
    let patch = RouterPatch::new(model.config(), &gates, model.gates_fingerprint().unwrap()).unwrap();
    model.apply_router_patch(&patch).unwrap();
    let scores = score(&model, &pairs);
    model.remove_router_patch().unwrap();
    assert_eq!(score(&model, &pairs), reference);
    let mut accuracies = Vec::new();
    for options in options {
        let found = PreferenceFigures::new(&scores, &reference, &options).unwrap();
        let mut trainer = trainer(&model, options);
        pairs.iter_mut().for_each(|pair| pair.reference = None);
        trainer.add_references(&mut pairs).unwrap();
        trainer.set_gates(&gates).unwrap();
        let expected = trainer.evaluate_pairs(&mut pairs).unwrap();
        assert_near(found.loss, expected.text_loss, "loss");
        assert_near(found.rewards.chosen, expected.rewards.chosen, "reward of chosen");
        assert_near(found.rewards.rejected, expected.rewards.rejected, "reward of rejected");
        assert_near(found.margin(), expected.margin(), "margin");
        assert_near(found.accuracy().unwrap(), expected.accuracy, "accuracy");
        let mut of_sums = 0.0;
        for (pair, score) in pairs.iter().zip(&reference) {
            assert_eq!(score.chosen.tokens, pair.chosen.targets());
            of_sums += score.chosen.log_probability / pairs.len() as f64;
            if !options.mean_log_probability {
                assert_near(score.chosen.log_probability, pair.reference.unwrap().chosen, "log-probability");
                assert_near(score.rejected.log_probability, pair.reference.unwrap().rejected, "log-probability");
            }
        }
        let own = PreferenceFigures::new(&reference, &reference, &options).unwrap();
        assert_near(own.log_probabilities.chosen, of_sums, "mean log-probability");
        assert_eq!((own.accuracy(), own.ties, own.margin()), (None, pairs.len(), 0.0));
        accuracies.push(found.accuracy());
    }
    assert!(accuracies.iter().all(|accuracy| *accuracy != Some(0.0) && *accuracy != Some(1.0)), "{accuracies:?}");
}

#[test]
fn what_cannot_be_evaluated_is_refused_and_the_next_can() {
    let model = small_model(6);
    let mut evaluator = evaluator(&model, 16);
    let text = Random::new(6).tokens(30, 97);
    let document = |prompt: usize, response: usize| Ok(Document::new(&text[..prompt], &text[prompt..][..response]));
    let mut status = |document| evaluator.documents([document], &mut |_| {}).unwrap_err().status();
    assert_eq!(status(document(4, 13)), Status::ContextFull);
    assert_eq!(status(document(17, 2)), Status::ContextFull);
    assert_eq!(status(document(4, 0)), Status::InvalidArgument);
    assert_eq!(status(document(0, 1)), Status::InvalidArgument);
    assert_eq!(status(Ok(Document::new(&[2], &[97]))), Status::TokenOutOfRange);
    for tokens in [&text[..1], &[]] {
        assert_eq!(evaluator.text(tokens, &mut |_| {}).unwrap_err().status(), Status::InvalidArgument);
    }
    let pair = Pair::new(Document::new(&text[..2], &text[2..20]), Document::new(&text[..2], &text[2..5]));
    assert_eq!(evaluator.pairs([Ok(pair.clone())], &mut |_| {}).unwrap_err().status(), Status::ContextFull);
    let swapped = Pair::new(pair.rejected, pair.chosen);
    assert_eq!(evaluator.pairs([Ok(swapped)], &mut |_| {}).unwrap_err().status(), Status::ContextFull);
    evaluator.cancel().request();
    assert_eq!(evaluator.text(&text, &mut |_| {}).unwrap_err().status(), Status::Cancelled);
    let found = evaluator.text(&text, &mut |_| {}).unwrap();
    let options = SessionOptions { context_size: 16, ..Default::default() };
    let mut scores = Vec::new();
    score_in_windows(&model, &text, &options, &mut |part| scores.extend_from_slice(part)).unwrap();
    assert_near(found.perplexity.nats, -scores.iter().map(|score| *score as f64).sum::<f64>(), "nats");
    assert_eq!(found.routing.tokens, 30);
}

#[test]
fn models_of_other_tokenizers_are_not_compared() {
    let sample = tokenizer_sample::sample();
    let first = with_tokenizer(7, &sample.to_string());
    let check = |other: &Path| check_tokenizers(first.path(), other, false);
    // The same but for white space.
    check(with_tokenizer(8, &format!("{sample:#}")).path()).unwrap();
    let mut changed = sample.clone();
    changed["model"]["merges"].as_array_mut().unwrap().pop();
    let other = with_tokenizer(8, &changed.to_string());
    let error = check(other.path()).unwrap_err();
    assert_eq!((error.status(), error.file()), (Status::ModelsDiffer, other.path().join("tokenizer.json").to_str()));
    let text = error.to_string();
    for part in ["has 4 merges, not 5", &*first.path().to_string_lossy(), &*other.path().to_string_lossy()] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let without = Directory::random(9).to_temporary();
    assert_eq!(check(without.path()).unwrap_err().status(), Status::NoTokenizer);
    let larger = Directory::random_with(8, json!({"vocab_size": 400})).to_temporary();
    std::fs::write(larger.path().join("tokenizer.json"), sample.to_string()).unwrap();
    assert!(check(larger.path()).unwrap_err().to_string().contains("is of a vocabulary of 400, not 320"));
}
