//! The time of each kernel in a step and in a prompt, beside the least bytes it must move and its multiply-adds.

use std::sync::Arc;

use gemmoe::Model;
use gemmoe::backend::KvGeometry;
use gemmoe::backend::cuda::bench::{Launch, profile};
use gemmoe::quant::PANEL_ROWS;

use super::Result;
use super::geometry::Work;
use super::machine::Machine;
use super::model::{prompt, session};
use super::options::Sizes;
use super::report::{Kernel, Stage};
use super::roofs::median;
use super::steps::Sessions;

/// Steps that are timed kernel by kernel, and prompts.
const STEPS: usize = 10;
const PROMPTS: usize = 3;

/// What a pass is about.
struct Pass<'a> {
    work: &'a Work<'a>,
    tokens: usize,
    /// Experts a layer that it reads.
    touched: f64,
    /// Bytes of keys and values of one layer that it must read; none where that is not simply so.
    cache_bytes: Option<f64>,
}

pub fn of_step(
    machine: &Machine,
    model: &Arc<Model>,
    work: &Work,
    (at, count, steps): (&mut Sessions, usize, usize),
) -> Result<Stage> {
    at.warm_up(model, count, steps.min(4))?;
    let mut passes = Vec::new();
    let rounds = steps.min(STEPS);
    for _ in 0..rounds {
        passes.push(profile(&machine.device, || at.step(count))?);
    }
    let config = model.config();
    let kv_bytes = KvGeometry::of(config, model.backend().default_kv_dtype()).bytes_per_token();
    let of_layer = (at.positions(count) * kv_bytes) as f64 / config.num_hidden_layers as f64;
    let pass = Pass { work, tokens: count, touched: at.touched(), cache_bytes: Some(of_layer) };
    let name = format!("a step of {count} at {}", at.context);
    Ok(Stage { name, kernels: rows(&pass, &passes) })
}

pub fn of_prompt(machine: &Machine, model: &Arc<Model>, work: &Work, sizes: &Sizes) -> Result<Stage> {
    let tokens = sizes.kernel_prompt.min(sizes.chunk);
    let mut session = session(model, tokens + 8, tokens)?;
    let prompt = prompt(model, 0, tokens);
    session.prefill(&prompt)?;
    let mut passes = Vec::new();
    for _ in 0..PROMPTS.min(sizes.rounds) {
        session.rewind(0)?;
        passes.push(profile(&machine.device, || session.prefill(&prompt))?);
    }
    let touched = work.config.num_local_experts as f64;
    let pass = Pass { work, tokens, touched, cache_bytes: None };
    Ok(Stage { name: format!("a prompt of {tokens}"), kernels: rows(&pass, &passes) })
}

/// A row for each kernel and what it multiplies, those that take longest first; medians over passes.
fn rows(pass: &Pass, passes: &[Vec<Launch>]) -> Vec<Kernel> {
    let part = |launch: &Launch| (launch.kernel.to_string(), part_of(pass, launch));
    let mut names: Vec<(String, &str)> = Vec::new();
    for launch in passes.iter().flatten() {
        if !names.contains(&part(launch)) {
            names.push(part(launch));
        }
    }
    let mut rows: Vec<Kernel> = names
        .into_iter()
        .map(|name| {
            let of_pass = |launches: &Vec<Launch>| {
                launches.iter().filter(|launch| part(launch) == name).map(|launch| launch.seconds).sum::<f64>()
            };
            let seconds = median(passes.iter().map(of_pass).collect());
            let launches = passes.iter().flatten().filter(|launch| part(launch) == name).count() / passes.len();
            let (bytes, multiply_adds) = least(pass, &name.0, name.1);
            Kernel {
                kernel: name.0,
                part: name.1.to_owned(),
                launches,
                ms: seconds * 1e3,
                mb: bytes.map(|bytes| bytes * launches as f64 / 1e6),
                gb_per_s: bytes.map(|bytes| bytes * launches as f64 / seconds / 1e9),
                tflops: multiply_adds.map(|each| 2.0 * each * launches as f64 / seconds / 1e12),
            }
        })
        .collect();
    rows.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    rows
}

/// Which matrices a dense product is with, told from its panels: a grid of them, or of twos or eights of each matrix.
fn part_of(pass: &Pass, launch: &Launch) -> &'static str {
    if !launch.kernel.starts_with("matmul") {
        return "";
    }
    let config = pass.work.config;
    let key_value = config.key_value_size();
    let parts: [(&str, &[usize]); 3] = [
        ("query, key, value", &[config.query_size(), key_value, key_value]),
        ("output", &[config.hidden_size]),
        ("head", &[config.vocab_size]),
    ];
    let panels = |rows: &usize| rows.div_ceil(PANEL_ROWS);
    let found = parts.into_iter().find(|(_, matrices)| {
        let groups_of = |size: usize| matrices.iter().map(|rows| panels(rows).div_ceil(size)).sum::<usize>() as u32;
        if launch.kernel.contains("tensor") {
            launch.grid[1] == groups_of(8)
        } else if launch.kernel.contains("narrow") {
            launch.grid[0] == groups_of(2)
        } else {
            launch.grid[0] == groups_of(1)
        }
    });
    found.map_or("", |(name, _)| name)
}

/// Of one launch: bytes it must move at least, and multiply-adds; none where this program does not know the kernel.
fn least(pass: &Pass, kernel: &str, part: &str) -> (Option<f64>, Option<f64>) {
    let Pass { work, tokens, touched, cache_bytes } = *pass;
    let (hidden, inner) = (work.config.hidden_size, work.config.intermediate_size);
    let slots = tokens * work.config.num_experts_per_tok;
    let of = |bytes: f64, multiply_adds: usize| (Some(bytes), Some(multiply_adds as f64));
    match (kernel, part) {
        (_, "query, key, value") => {
            of(work.query_key_value_bytes() as f64, tokens * hidden * work.query_key_value_rows())
        }
        (_, "output") => of(work.output_bytes() as f64, tokens * hidden * work.config.query_size()),
        // Of a prompt the last token alone.
        (_, "head") => (Some(work.head_bytes() as f64), None),
        _ if kernel.starts_with("gate_up") => of(touched * work.gate_up_bytes() as f64, 2 * slots * hidden * inner),
        _ if kernel.starts_with("down") => of(touched * work.down_bytes() as f64, slots * hidden * inner),
        ("attention_merge", _) => (None, None),
        _ if kernel.starts_with("attention") => (cache_bytes, None),
        _ => (None, None),
    }
}
