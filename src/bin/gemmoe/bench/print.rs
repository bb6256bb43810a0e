//! The figures, as a table and as JSON.

use gemmoe::Model;
use serde_json::{Map, Value, json};

use super::Bench;
use super::figure::Figure;
use super::roof::Roof;
use super::rounds::{Decoded, Measured, Rounds};
use super::work::Work;
use crate::units::size;

pub fn table(bench: &Bench, model: &Model, work: &Work, rounds: &Rounds) {
    let backend = model.backend();
    println!("{}", backend.device_name());
    println!(
        "{} of weights, {:.1} bits each in the experts; keys and values in {}",
        size(backend.weight_bytes().0 as u64),
        work.expert_bits,
        work.kv_dtype.name()
    );
    let token = work.step(1, 0.0, model.config().num_experts_per_tok as f64);
    let multiply_adds = token.multiply_adds / 1e9;
    println!("a decoded token reads {} and does {multiply_adds:.3} G multiply-adds\n", size(token.bytes as u64));
    Figure::print_heading();
    for (roof, values) in &rounds.roofs.0 {
        Figure::of(values, 1e-9).print_row(&format!("{}, {}", roof.name(), roof.unit()), "");
    }
    let print = |name: String, measured: &Measured, scale: f64| {
        let share = Figure::of(&measured.shares, 100.0).median;
        let note = format!("{share:.0} % of the {}", measured.roof.name());
        Figure::of(&measured.values, scale).print_row(&name, &note);
    };
    print(format!("prefill of {}, tokens/s", bench.prompt), &rounds.prefill, 1.0);
    print("first token, ms".to_owned(), &rounds.first_token, 1e3);
    for Decoded { sessions, rate, .. } in &rounds.decode {
        let name = if *sessions == 1 { "1 session".to_owned() } else { format!("{sessions} sessions") };
        print(format!("decode of {name}, tokens/s"), rate, 1.0);
    }
}

pub fn json(bench: &Bench, model: &Model, work: &Work, rounds: &Rounds) -> Value {
    let mut roofs: Map<String, Value> =
        Roof::ALL.into_iter().map(|roof| (roof.key().to_owned(), Value::Null)).collect();
    for (roof, values) in &rounds.roofs.0 {
        roofs[roof.key()] = Figure::of(values, 1e-9).json(roof.unit());
    }
    let decode: Vec<Value> = rounds.decode.iter().map(decoded).collect();
    json!({
        "device": model.backend().device_name(),
        "weight_bytes": model.backend().weight_bytes().0,
        "expert_bits": work.expert_bits,
        "kv_dtype": work.kv_dtype.name(),
        "prompt_tokens": bench.prompt,
        "decode_tokens": bench.decode,
        "rounds": bench.rounds,
        "roofs": roofs,
        "prefill": measured(&rounds.prefill, "tokens/s", 1.0),
        "first_token": measured(&rounds.first_token, "ms", 1e3),
        "decode": decode,
    })
}

fn decoded(decoded: &Decoded) -> Value {
    let mut object = measured(&decoded.rate, "tokens/s", 1.0);
    object["sessions"] = json!(decoded.sessions);
    object["experts_per_layer"] = json!(Figure::of(&decoded.touched, 1.0).median);
    object["bytes_per_step"] = json!(decoded.step.bytes);
    object["multiply_adds_per_step"] = json!(decoded.step.multiply_adds);
    object
}

fn measured(measured: &Measured, unit: &str, scale: f64) -> Value {
    let mut object = Figure::of(&measured.values, scale).json(unit);
    let share = Figure::of(&measured.shares, 1.0);
    object["share"] = json!({ "median": share.median, "lowest": share.lowest, "highest": share.highest });
    object["roof"] = json!(measured.roof.key());
    object
}
