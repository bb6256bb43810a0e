//! Tokens/s of a slice of the real geometry beside the machine's read bandwidth, measured in the same run.
//!
//! `cargo bench` (or `make bench`) writes a model of 2 layers, 4 experts, top 2, real widths and a vocabulary of 32,000
//! (4.1 GB of random bf16) below `target/bench` once, loads it, and prints medians over interleaved rounds.
//! `GEMMOE_BENCH_ROUNDS` changes their number. Decode reads each active weight once per token, so its roof is the
//! bandwidth; prefill is bound by arithmetic, so its roof is the rate of f32 multiply-adds.

mod roof;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use gemmoe::backend::cpu::CpuOptions;
use gemmoe::{LoadOptions, Model, Progress, Session, SessionOptions};
use serde_json::json;

const HIDDEN: usize = 3072;
const INTERMEDIATE: usize = 24_576;
const LAYERS: usize = 2;
const EXPERTS: usize = 4;
const TOP_K: usize = 2;
const VOCABULARY: usize = 32_000;
const QUERY: usize = 4096;
const PROMPT: usize = 128;
const DECODE: usize = 8;

fn main() {
    // `cargo test --benches` runs this too, to see that it builds and starts.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let rounds = std::env::var("GEMMOE_BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(5);
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/bench/slice-bf16");
    write_slice(&directory);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let options = LoadOptions { cpu: CpuOptions { threads, ..Default::default() }, ..Default::default() };
    let started = Instant::now();
    let model = Model::load(&directory, &options, &Progress::default()).unwrap();
    let (bytes, _) = model.backend().weight_bytes();
    let seconds = started.elapsed().as_secs_f64();
    println!("{}", model.backend().device_name());
    println!("load: {:.2} GB in {seconds:.1} s, {:.2} GB/s", bytes as f64 / 1e9, bytes as f64 / 1e9 / seconds);

    let per_expert = 3 * HIDDEN * INTERMEDIATE;
    let attention = 4 * HIDDEN * QUERY;
    let active = LAYERS * (TOP_K * per_expert + attention);
    let token_bytes = 2 * (active + VOCABULARY * HIDDEN);
    println!(
        "a decoded token reads {:.2} GB of weights, a prompt token takes {:.2} G multiply-adds",
        token_bytes as f64 / 1e9,
        active as f64 / 1e9
    );

    let mut session =
        Session::new(Arc::clone(&model), &SessionOptions { context_size: 1024, ..Default::default() }).unwrap();
    let prompt: Vec<u32> = (0..PROMPT).map(|at| (at * 7919 % VOCABULARY) as u32).collect();
    let (mut bandwidth, mut arithmetic, mut prefill, mut decode) = (vec![], vec![], vec![], vec![]);
    // The first round warms up and is not counted.
    for round in 0..=rounds {
        let roofs = (roof::read_bandwidth(threads), roof::multiply_adds(threads));
        session.rewind(0).unwrap();
        let started = Instant::now();
        session.prefill(&prompt).unwrap();
        let prefill_rate = PROMPT as f64 / started.elapsed().as_secs_f64();
        session.step().unwrap();
        let started = Instant::now();
        for _ in 0..DECODE {
            session.step().unwrap();
        }
        let decode_rate = DECODE as f64 / started.elapsed().as_secs_f64();
        if round > 0 {
            bandwidth.push(roofs.0);
            arithmetic.push(roofs.1);
            prefill.push(prefill_rate);
            decode.push(decode_rate);
        }
    }
    let decode_shares: Vec<f64> =
        decode.iter().zip(&bandwidth).map(|(rate, roof)| rate * token_bytes as f64 / roof * 100.0).collect();
    let prefill_shares: Vec<f64> =
        prefill.iter().zip(&arithmetic).map(|(rate, roof)| rate * active as f64 / roof * 100.0).collect();
    println!("{:<34} {:>9} {:>9} {:>9}", "", "median", "lowest", "highest");
    row("read bandwidth, GB/s", &bandwidth, 1e-9);
    row("f32 multiply-adds, G/s", &arithmetic, 1e-9);
    row("prefill, tokens/s", &prefill, 1.0);
    row("  share of the multiply-adds, %", &prefill_shares, 1.0);
    row("decode, tokens/s", &decode, 1.0);
    row("  share of the bandwidth, %", &decode_shares, 1.0);
}

fn row(name: &str, values: &[f64], scale: f64) {
    let mut sorted: Vec<f64> = values.iter().map(|value| value * scale).collect();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
    println!("{name:<34} {:>9.2} {low:>9.2} {high:>9.2}", sorted[sorted.len() / 2]);
}

/// Writes config.json and model.safetensors with random weights, unless they are there.
fn write_slice(directory: &Path) {
    let done = directory.join("done");
    if done.exists() {
        return;
    }
    println!("writing the slice to {} ...", directory.display());
    std::fs::create_dir_all(directory).unwrap();
    let config = json!({
        "model_type": "gemmoe", "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS, "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K
    });
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let mut tensors: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".into(), vec![HIDDEN]),
    ];
    for layer in 0..LAYERS {
        let mut add =
            |name: &str, shape: &[usize]| tensors.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
        add("input_layernorm.weight", &[HIDDEN]);
        add("post_attention_layernorm.weight", &[HIDDEN]);
        for name in ["q_proj", "k_proj", "v_proj"] {
            add(&format!("self_attn.{name}.weight"), &[QUERY, HIDDEN]);
        }
        add("self_attn.o_proj.weight", &[HIDDEN, QUERY]);
        add("block_sparse_moe.gate.weight", &[EXPERTS, HIDDEN]);
        for expert in 0..EXPERTS {
            add(&format!("block_sparse_moe.experts.{expert}.w1.weight"), &[INTERMEDIATE, HIDDEN]);
            add(&format!("block_sparse_moe.experts.{expert}.w3.weight"), &[INTERMEDIATE, HIDDEN]);
            add(&format!("block_sparse_moe.experts.{expert}.w2.weight"), &[HIDDEN, INTERMEDIATE]);
        }
    }
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for (name, shape) in &tensors {
        let end = offset + 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}));
        offset = end;
    }
    let header = serde_json::Value::from(header).to_string();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(directory.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // Random signs and mantissas with exponents around 2^-6: sums over a row stay of order one.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut words = vec![0u16; 1 << 19];
    let mut left = offset / 2;
    while left > 0 {
        let count = left.min(words.len());
        for word in &mut words[..count] {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let bits = (state >> 32) as u16;
            *word = (bits & 0x807f) | ((120 + (bits >> 7 & 1)) << 7);
        }
        let bytes: Vec<u8> = words[..count].iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all(&bytes).unwrap();
        left -= count;
    }
    file.flush().unwrap();
    std::fs::write(done, "").unwrap();
}
