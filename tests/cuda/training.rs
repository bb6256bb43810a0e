//! Routers trained on the device: gradients against autograd (`tests/golden_gradients`) and the processor, in every format;
//! cancels, and every driver call failing.

use std::sync::Arc;

use gemmoe::backend::Cancel;
use gemmoe::backend::training::{ExpertProjection, NO_SLOT, Norm, Projection, Rows, Slots, Training, TrainingLimits};
use gemmoe::quant::{Format, Groups, ScaleDtype};
use gemmoe::train::{BalanceForm, Document, RouterLosses, RouterTrainer, TrainOptions};
use gemmoe::{Formats, LoadOptions, Model, Status};
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::common::{Directory, Random, load_options};
use crate::driver::Driver;
use crate::golden_gradients::{Golden, plain, relative_error};
use crate::shim::{ORDERS, Shim};
use crate::{on_device, on_processor};

#[test]
fn every_layers_gradient_is_autograds() {
    let Some(driver) = Driver::take() else { return };
    let mut worst = 0f64;
    for golden in Golden::all() {
        let model = load_options(golden.directory(), &LoadOptions { variants: golden.variants(), ..on_device() });
        worst = worst.max(golden.check(&model));
    }
    println!("worst relative error {worst:.1e}");
    driver.assert_all_is_freed();
}

/// A small f32 model whose sizes are no multiples of anything.
fn odd_model(seed: u64, changes: Value) -> Directory {
    let mut all = json!({"hidden_size": 36, "head_dim": 6, "intermediate_size": 21, "num_hidden_layers": 2});
    changes.as_object().unwrap().iter().for_each(|(key, value)| all[key] = value.clone());
    let mut directory = Directory::random_with(seed, all);
    directory.dtype = Dtype::F32;
    directory
}

fn random_documents(seed: u64, lengths: &[(usize, usize)]) -> Vec<Document> {
    let mut random = Random::new(seed);
    let mut tokens = |count| random.tokens(count, 97);
    lengths.iter().map(|(prompt, response)| Document::new(&tokens(*prompt), &tokens(*response))).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// Loss and gradients of these documents.
fn gradient_of(model: &Arc<Model>, options: &TrainOptions, documents: &[Document]) -> (f64, Vec<f32>) {
    let mut trainer = RouterTrainer::new(model, options).unwrap();
    let metrics = trainer.gradient(documents).unwrap();
    (metrics.loss, trainer.gradients().to_vec())
}

#[test]
fn weights_of_every_format_have_the_gradients_of_the_processor() {
    let Some(_driver) = Driver::take() else { return };
    let int4 = Format::Int4(Groups { size: 128, scales: ScaleDtype::F16 });
    let formats = |experts, others| Formats {
        experts: Some(experts),
        attention: Some(others),
        head: Some(others),
        embedding: Some(others),
    };
    let models = [
        (Dtype::BF16, Formats::default()),
        (Dtype::F16, Formats::default()),
        (Dtype::F32, formats(Format::INT8, Format::INT4)),
        (Dtype::BF16, formats(int4, Format::INT8)),
    ];
    let documents = random_documents(4, &[(3, 40), (20, 12)]);
    let mut worst = 0f64;
    for (dtype, formats) in models {
        let mut directory = odd_model(21, json!({"intermediate_size": 75, "num_experts_per_tok": 3}));
        directory.dtype = dtype;
        let directory = directory.to_temporary();
        let of = |options| {
            let model = load_options(directory.path(), &LoadOptions { formats, ..options });
            gradient_of(&model, &plain(), &documents)
        };
        let ((loss, found), (expected_loss, expected)) = (of(on_device()), of(on_processor()));
        let error = relative_error(&found, &expected);
        assert!(error < 2e-5, "{dtype:?}, {formats:?}: off by {error}");
        assert!((loss - expected_loss).abs() < 1e-6 * expected_loss, "{loss} {expected_loss}");
        worst = worst.max(error);
    }
    println!("worst relative error {worst:.1e}");
}

/// More queries than a block of them, more tokens than a part of the vocabulary, and key-value heads that are shared.
#[test]
fn long_documents_and_large_vocabularies_have_the_gradients_of_the_processor() {
    let Some(_driver) = Driver::take() else { return };
    let changes = json!({"vocab_size": 2100, "hidden_size": 12, "intermediate_size": 5, "num_key_value_heads": 1});
    let directory = odd_model(22, changes).to_temporary();
    let mut random = Random::new(5);
    let mut tokens = |count| random.tokens(count, 2100);
    let documents = [Document::new(&tokens(128), &tokens(9)), Document::new(&tokens(3), &tokens(20))];
    let options = TrainOptions { max_tokens: 170, fill: true, ..plain() };
    let of = |options_of_load| gradient_of(&load_options(directory.path(), &options_of_load), &options, &documents);
    let ((loss, found), (expected_loss, expected)) = (of(on_device()), of(on_processor()));
    let error = relative_error(&found, &expected);
    assert!(error < 2e-5, "off by {error}");
    assert!((loss - expected_loss).abs() < 1e-6 * expected_loss, "{loss} {expected_loss}");
}

#[test]
fn neither_the_order_of_blocks_nor_what_fills_a_batch_up_changes_a_bit() {
    let Some(driver) = Driver::take() else { return };
    let directory = odd_model(7, json!({"num_local_experts": 6})).to_temporary();
    let model = load_options(directory.path(), &on_device());
    let documents = random_documents(13, &[(3, 30), (2, 9)]);
    let router = RouterLosses { balance: 0.1, form: BalanceForm::Global, z: 0.01 };
    let options = TrainOptions { max_tokens: 70, router, ..plain() };
    let of = |options: &TrainOptions| {
        let (loss, gradients) = gradient_of(&model, options, &documents);
        (loss.to_bits(), bits(&gradients))
    };
    let expected = of(&options);
    assert_eq!(of(&TrainOptions { fill: true, ..options }), expected);
    for order in ORDERS {
        driver.order(order);
        assert_eq!(of(&options), expected, "{order:?}");
    }
    // A batch a document: sums over tokens are taken in two parts.
    let (loss, found) =
        gradient_of(&model, &TrainOptions { max_tokens: 35, router: plain().router, ..options }, &documents);
    let (whole_loss, whole) = gradient_of(&model, &TrainOptions { router: plain().router, ..options }, &documents);
    assert!((loss - whole_loss).abs() < 1e-6 && relative_error(&found, &whole) < 1e-5);
}

#[test]
fn steps_on_the_device_are_those_of_the_processor_and_leave_the_model_as_it_is() {
    let Some(driver) = Driver::take() else { return };
    let directory = odd_model(3, json!({})).to_temporary();
    let documents = random_documents(6, &[(3, 20), (4, 12)]);
    let of = |load: &LoadOptions| {
        let model = load_options(directory.path(), load);
        let mut trainer = RouterTrainer::new(&model, &plain()).unwrap();
        let before = trainer.gates().to_vec();
        let losses: Vec<f64> = (0..3).map(|_| trainer.step(&documents).unwrap().loss).collect();
        let other = RouterTrainer::new(&model, &plain()).unwrap();
        assert_eq!(bits(other.gates()), bits(&before));
        (before, trainer.gates().to_vec(), losses)
    };
    let (found, expected) = (of(&on_device()), of(&on_processor()));
    assert_eq!(bits(&found.0), bits(&expected.0));
    let moved = |(before, after, _): &(Vec<f32>, Vec<f32>, Vec<f64>)| -> Vec<f32> {
        after.iter().zip(before).map(|(after, before)| after - before).collect()
    };
    assert!(relative_error(&moved(&found), &moved(&expected)) < 1e-3);
    assert!(found.2.iter().zip(&expected.2).all(|(a, b)| (a - b).abs() < 1e-5), "{:?} {:?}", found.2, expected.2);
    driver.assert_all_is_freed();
}

/// Sizes so small that a step has few blocks.
fn tiny_model() -> Directory {
    odd_model(9, json!({"hidden_size": 8, "head_dim": 2, "intermediate_size": 5, "num_local_experts": 2}))
}

fn tiny_options() -> TrainOptions {
    TrainOptions { max_tokens: 16, ..plain() }
}

#[test]
fn a_cancelled_step_changes_nothing_and_the_next_one_works() {
    let Some(driver) = Driver::take() else { return };
    let directory = tiny_model().to_temporary();
    let model = load_options(directory.path(), &on_device());
    let documents = random_documents(1, &[(2, 5), (1, 4)]);
    let [mut trainer, mut other] = [(); 2].map(|()| RouterTrainer::new(&model, &tiny_options()).unwrap());
    let before = trainer.state().unwrap();
    trainer.cancel().request();
    assert_eq!(trainer.step(&documents).unwrap_err().status(), Status::Cancelled);
    assert_eq!(trainer.state().unwrap(), before);
    assert_eq!(trainer.step(&documents).unwrap(), other.step(&documents).unwrap());
    assert_eq!(trainer.state().unwrap(), other.state().unwrap());
    drop((trainer, other, model));
    driver.assert_all_is_freed();
}

#[test]
fn a_model_with_experts_in_host_memory_is_refused_with_what_to_do() {
    let Some(_driver) = Driver::take() else { return };
    let directory = Directory::random(1).to_temporary();
    let model = load_options(directory.path(), &on_device());
    let whole = model.residency();
    let mut trainer = RouterTrainer::new(&model, &tiny_options()).unwrap();
    let documents = random_documents(1, &[(2, 5)]);
    trainer.gradient(&documents).unwrap();
    // While a trainer is there, too: its next step is refused, and goes on when they are back.
    model.set_device_memory_limit(whole.device_bytes - 1).unwrap();
    let refused = [RouterTrainer::new(&model, &tiny_options()).err(), trainer.gradient(&documents).err()];
    for error in refused.map(Option::unwrap) {
        assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("device_memory_limit")));
        let text = error.to_string();
        assert!(text.contains("experts are in host memory") && text.contains("int8 or int4"), "{text}");
    }
    let before = bits(trainer.gradients());
    model.set_device_memory_limit(0).unwrap();
    trainer.gradient(&documents).unwrap();
    assert_eq!(bits(trainer.gradients()), before);
}

#[test]
fn whichever_driver_call_of_training_fails_it_is_an_error_and_everything_is_freed() {
    let Some(shim) = Shim::take() else { return };
    let directory = tiny_model().to_temporary();
    let model = load_options(directory.path(), &on_device());
    let documents = random_documents(1, &[(1, 3), (1, 2)]);
    let step = |model: &Arc<Model>| -> gemmoe::Result<Vec<u32>> {
        let mut trainer = RouterTrainer::new(model, &tiny_options())?;
        trainer.step(&documents)?;
        Ok(bits(trainer.gates()))
    };
    let live = || (shim.live_allocations(), shim.live_objects());
    let before = (live(), shim.calls());
    let expected = step(&model).unwrap();
    assert_eq!(live(), before.0);
    let calls = shim.calls() - before.1;
    // A failure that is not the end leaves the model as good as it was; few of the calls only free.
    let (mut failed, mut unharmed) = (0, 0);
    for nth in 1..=calls {
        for (code, statuses) in
            [(1, &[Status::DeviceFailed][..]), (2, &[Status::DeviceOutOfMemory, Status::OutOfMemory])]
        {
            // Each call with one of them, in turn.
            if nth % 2 != code as u64 % 2 {
                continue;
            }
            shim.fail(nth, code);
            match step(&model) {
                Ok(gates) => {
                    assert_eq!(gates, expected, "call {nth} of {calls} failed with {code}, unnoticed");
                    unharmed += 1;
                }
                Err(error) => {
                    let status = error.status();
                    assert!(statuses.contains(&status), "call {nth} of {calls}, {code}: {status:?}, {error}");
                    failed += 1;
                }
            }
            shim.fail(0, 0);
            assert_eq!(live(), before.0, "left after call {nth} of {calls} failed with {code}");
        }
    }
    println!("{calls} calls: {failed} failures were errors, {unharmed} did no harm");
    assert!(failed > 2 * unharmed, "{failed} failures were errors, {unharmed} did no harm");
    assert_eq!(step(&model).unwrap(), expected);
    drop(model);
    // After some everything is lost.
    for nth in (1..=calls).step_by(41) {
        let model = load_options(directory.path(), &on_device());
        shim.fail(nth, 719);
        match step(&model) {
            Ok(gates) => assert_eq!(gates, expected),
            Err(error) => assert!(matches!(error.status(), Status::DeviceLost | Status::DeviceFailed), "{error}"),
        }
        drop(model);
        shim.fail(0, 0);
        assert_eq!(live(), (0, 0), "left after call {nth} of {calls}");
    }
}

/// A workspace for an operation's parts, one after the other, all of them random.
struct Bench {
    training: Box<dyn Training>,
    random: Random,
    used: usize,
}

const TOKENS: usize = 70;
const CHOICES: usize = 2;

impl Bench {
    fn new(model: &Model) -> Bench {
        let limits = TrainingLimits { numbers: 1 << 18, max_tokens: TOKENS, max_targets: TOKENS };
        let training = model.backend().new_training(limits, &Arc::new(Cancel::default())).unwrap();
        Bench { training, random: Random::new(77), used: 0 }
    }

    fn rows(&mut self, rows: usize, columns: usize) -> Rows {
        let part = Rows { start: self.used, rows, columns };
        self.used = part.range().end.next_multiple_of(16);
        let numbers: Vec<f32> = (0..part.count()).map(|_| self.random.unit()).collect();
        self.training.write(&numbers, part).unwrap();
        part
    }

    fn read(&mut self, part: Rows) -> Vec<f32> {
        let mut numbers = vec![0f32; part.count()];
        self.training.read(part, &mut numbers).unwrap();
        numbers
    }
}

/// All tokens but the last go to two of the experts, none to the last expert.
fn some_slots(random: &mut Random, experts: usize) -> Slots {
    let mut slots = Slots { choices: CHOICES, of_tokens: vec![NO_SLOT; TOKENS * CHOICES], ..Slots::default() };
    let first: Vec<usize> = (0..TOKENS - 1).map(|_| random.below(experts - 1)).collect();
    for expert in 0..experts {
        slots.starts.push(slots.tokens.len() as u32);
        for (token, first) in first.iter().enumerate() {
            let second = (first + 1) % (experts - 1);
            if let Some(choice) = [*first, second].iter().position(|chosen| *chosen == expert) {
                slots.of_tokens[token * CHOICES + choice] = slots.tokens.len() as u32;
                slots.tokens.push(token as u32);
                slots.weights.push(random.unit());
            }
        }
    }
    slots.starts.push(slots.tokens.len() as u32);
    slots
}

/// What each operation makes of the same random numbers.
fn every_operation(model: &Model) -> Vec<(&'static str, Vec<f32>)> {
    let config = model.config();
    let (hidden, inner, experts) = (config.hidden_size, config.intermediate_size, config.num_local_experts);
    let (query, key_value) = (config.query_size(), config.key_value_size());
    let mut bench = Bench::new(model);
    let mut results = Vec::new();
    let [x, normed, gradient] = [(); 3].map(|()| bench.rows(TOKENS, hidden));
    let mut random = Random::new(5);
    let tokens = random.tokens(TOKENS, config.vocab_size);
    let positions: Vec<u32> = (0..TOKENS).map(|_| random.below(TOKENS) as u32).collect();
    macro_rules! check {
        ($name:literal, $out:expr, $call:ident($($argument:expr),*)) => {{
            let out = $out;
            bench.training.$call($($argument),*).unwrap();
            results.push(($name, bench.read(out)));
        }};
    }
    check!("embed", normed, embed(&tokens, normed));
    check!("copy", gradient, copy(normed, gradient));
    check!("norm", normed, norm(Norm::PostAttention(1), x, normed));
    let out = bench.rows(TOKENS, hidden);
    check!("add_norm_gradient", out, add_norm_gradient(Norm::Input(1), x, gradient, out));
    check!("add_norm_gradient of the last", out, add_norm_gradient(Norm::Final, x, gradient, out));
    for (projection, inputs, outputs) in [
        (Projection::Query, hidden, query),
        (Projection::Key, hidden, key_value),
        (Projection::Value, hidden, key_value),
        (Projection::Output, query, hidden),
    ] {
        let (wide, narrow) = (bench.rows(TOKENS, inputs), bench.rows(TOKENS, outputs));
        check!("add_product", narrow, add_product(1, projection, wide, narrow));
        check!("add_product_gradient", wide, add_product_gradient(1, projection, narrow, wide));
    }
    let qkv = [bench.rows(TOKENS, query), bench.rows(TOKENS, key_value), bench.rows(TOKENS, key_value)];
    check!("rotate", qkv[0], rotate(&positions, false, qkv[0]));
    check!("rotate back", qkv[1], rotate(&positions, true, qkv[1]));
    let documents = [0..1, 1..30, 30..33, 33..TOKENS];
    let (attended, log_sums) = (bench.rows(TOKENS, query), bench.rows(TOKENS, config.num_attention_heads));
    check!("attention", attended, attention(&documents, qkv, attended, log_sums));
    results.push(("attention's log-sums", bench.read(log_sums)));
    let of_attended = bench.rows(TOKENS, query);
    let of_qkv = [bench.rows(TOKENS, query), bench.rows(TOKENS, key_value), bench.rows(TOKENS, key_value)];
    check!(
        "add_attention_gradient, query",
        of_qkv[0],
        add_attention_gradient(&documents, qkv, attended, log_sums, of_attended, of_qkv)
    );
    results.push(("add_attention_gradient, key", bench.read(of_qkv[1])));
    results.push(("add_attention_gradient, value", bench.read(of_qkv[2])));

    let (gate, logits) = (bench.rows(experts, hidden), bench.rows(TOKENS, experts));
    check!("add_gate_product", logits, add_gate_product(x, gate, logits));
    check!("add_gate_input_gradient", out, add_gate_input_gradient(logits, gate, out));
    check!("add_gate_gradient", gate, add_gate_gradient(logits, x, gate));
    let slots = some_slots(&mut random, experts);
    let count = slots.count();
    let [inputs, outputs] = [(); 2].map(|()| bench.rows(count, hidden));
    check!("gather", outputs, gather(&slots, false, x, outputs));
    check!("gather, weighted", inputs, gather(&slots, true, x, inputs));
    check!("add_combined", out, add_combined(&slots, false, inputs, out));
    check!("add_combined, weighted", out, add_combined(&slots, true, outputs, out));
    let products = bench.rows(count, 1);
    check!("row_products", products, row_products(inputs, outputs, products));
    let [gates, ups, activated] = [(); 3].map(|()| bench.rows(count, inner));
    check!("gate", gates, add_expert_product(0, ExpertProjection::Gate, &slots, inputs, gates));
    check!("up", ups, add_expert_product(1, ExpertProjection::Up, &slots, inputs, ups));
    check!("geglu", activated, geglu(gates, ups, activated));
    check!("down", outputs, add_expert_product(0, ExpertProjection::Down, &slots, activated, outputs));
    let of_down = ExpertProjection::Down;
    check!("down's gradient", activated, add_expert_product_gradient(0, of_down, &slots, outputs, activated));
    check!("geglu_gradient, gate", gates, geglu_gradient(activated, gates, ups));
    results.push(("geglu_gradient, up", bench.read(ups)));
    check!("gate's gradient", inputs, add_expert_product_gradient(1, ExpertProjection::Gate, &slots, gates, inputs));
    check!("up's gradient", inputs, add_expert_product_gradient(0, ExpertProjection::Up, &slots, ups, inputs));

    let sums = bench.rows(TOKENS, 2);
    check!("log_probabilities", sums, log_probabilities(&tokens, x, sums));
    let derivatives: Vec<f32> = (0..TOKENS).map(|_| random.unit()).collect();
    let of_x = bench.rows(TOKENS, hidden);
    check!("add_log_probability_gradient", of_x, add_log_probability_gradient(&tokens, x, sums, &derivatives, of_x));
    check!("clear", out, clear(out));
    let mut gates = vec![0f32; config.num_hidden_layers * experts * hidden];
    bench.training.read_gates(&mut gates).unwrap();
    results.push(("read_gates", gates));
    results
}

#[test]
fn every_operation_is_the_processors() {
    let Some(driver) = Driver::take() else { return };
    let directory = odd_model(31, json!({"num_key_value_heads": 2})).to_temporary();
    let of = |load: &LoadOptions| every_operation(&load_options(directory.path(), load));
    let mut worst = ("", 0f64);
    for ((name, found), (_, expected)) in of(&on_device()).iter().zip(&of(&on_processor())) {
        let error =
            if *name == "clear" { difference_of_zeros(found, expected) } else { relative_error(found, expected) };
        assert!(error < 2e-6, "{name}: off by {error}");
        worst = if error > worst.1 { (name, error) } else { worst };
    }
    println!("worst relative error {:.1e}, of {}", worst.1, worst.0);
    driver.assert_all_is_freed();
}

fn difference_of_zeros(found: &[f32], expected: &[f32]) -> f64 {
    f64::from(u8::from(found.iter().chain(expected).any(|number| *number != 0.0)))
}

#[test]
fn parts_that_overlap_or_are_not_in_the_workspace_are_refused() {
    let Some(_driver) = Driver::take() else { return };
    let directory = tiny_model().to_temporary();
    let model = load_options(directory.path(), &on_device());
    let mut bench = Bench::new(&model);
    let part = |start| Rows { start, rows: 2, columns: 8 };
    for (x, out) in [(part(0), part(15)), (part(0), part((1 << 18) - 15))] {
        assert_eq!(bench.training.copy(x, out).unwrap_err().status(), Status::Internal);
    }
    assert_eq!(bench.training.write(&[1.0; 15], part(0)).unwrap_err().status(), Status::Internal);
    bench.training.copy(part(0), part(16)).unwrap();
}

#[test]
fn native_code_launches_that_overlap_and_ptx_train_with_the_same_bits() {
    let Some(shim) = Shim::take() else { return };
    let directory = tiny_model().to_temporary();
    let documents = random_documents(1, &[(1, 5), (1, 4)]);
    let mut expected = None;
    // The first whose graphs know such launches.
    shim.driver_version(12_030);
    for (capability, is_native) in [(80, true), (87, false), (90, true)] {
        shim.compute_capability(capability);
        let model = load_options(directory.path(), &on_device());
        let before = (shim.native_modules(), shim.launches(), shim.dependent_launches());
        let (loss, gradients) = gradient_of(&model, &tiny_options(), &documents);
        let found = (loss.to_bits(), bits(&gradients));
        assert_eq!(expected.get_or_insert_with(|| found.clone()), &found, "{capability}");
        // Loaded with the trainer, not with the model.
        assert_eq!(shim.native_modules() - before.0, if is_native { 4 } else { 0 }, "{capability}");
        let launches = shim.launches() - before.1;
        let overlapping = shim.dependent_launches() - before.2;
        assert_eq!(overlapping, if capability == 90 { launches } else { 0 }, "{capability}");
    }
}
