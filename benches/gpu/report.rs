//! Figures, as people read them and as JSON, with the goal beside each that has one.

use std::fmt::Write;

use serde::Serialize;

#[derive(Serialize)]
pub struct Report {
    pub machine: Described,
    pub geometry: String,
    /// Whether it was measured with `--quick`.
    pub quick: bool,
    /// Whether every session of a batch ran its own context.
    pub own_contexts: bool,
    pub roofs: Option<Roofs>,
    pub formats: Vec<Format>,
    /// What was not measured, and why.
    pub skipped: Vec<String>,
    pub seconds: f64,
}

#[derive(Serialize)]
pub struct Described {
    pub device: String,
    pub is_gpu: bool,
    pub compute_capability: String,
    pub multiprocessors: usize,
    pub memory_bytes: usize,
    /// The CUDA version that the driver is for.
    pub driver_cuda: String,
    pub library: String,
}

#[derive(Serialize)]
pub struct Roofs {
    /// Of each buffer, and of the cache that it has to be larger than.
    pub bytes: usize,
    pub cache_bytes: usize,
    /// Bytes read and bytes written.
    pub copy_gb_per_s: f64,
    pub read_gb_per_s: f64,
    pub mma_bf16_tflops: f64,
    pub mma_int8_tops: f64,
    pub cublas_name: Option<String>,
    pub cublas: Vec<CublasRate>,
}

/// What cuBLAS reaches in bf16 on the products of a prompt.
#[derive(Serialize)]
pub struct CublasRate {
    pub tokens: usize,
    pub tflops: f64,
}

#[derive(Serialize)]
pub struct Format {
    pub format: String,
    pub is_integer: bool,
    pub weight_bytes: usize,
    pub steps: Vec<Step>,
    pub kernels: Vec<Stage>,
    pub prefill: Vec<Prefill>,
}

#[derive(Serialize)]
pub struct Step {
    pub sessions: usize,
    pub context: usize,
    /// Of all sessions together, from the median.
    pub tokens_per_s: f64,
    pub median_ms: f64,
    pub p95_ms: f64,
    /// A layer.
    pub touched_experts: f64,
    /// The least that a step must read: touched experts, dense weights, keys and values.
    pub gb: f64,
    pub gb_per_s: f64,
}

/// Kernels of one kind of pass.
#[derive(Serialize)]
pub struct Stage {
    pub name: String,
    pub kernels: Vec<Kernel>,
}

#[derive(Serialize)]
pub struct Kernel {
    pub kernel: String,
    /// What it multiplies with, where a kernel has several uses.
    pub part: String,
    /// In a pass; so below.
    pub launches: usize,
    pub ms: f64,
    /// The least it must move.
    pub mb: Option<f64>,
    pub gb_per_s: Option<f64>,
    pub tflops: Option<f64>,
}

#[derive(Serialize)]
pub struct Prefill {
    pub tokens: usize,
    /// Tokens of a pass.
    pub chunk: usize,
    pub tokens_per_s: f64,
    pub ms: f64,
    /// Of products with weights, without attention's own.
    pub tflops: f64,
}

/// Shares, ratios: of what, and at least how much.
struct Goal {
    reached: f64,
    wanted: f64,
}

impl Goal {
    fn verdict(&self) -> &'static str {
        if self.reached >= self.wanted { "reached" } else { "missed" }
    }
}

impl Roofs {
    /// Multiply-adds, twice, of tensor cores for weights in a format.
    pub fn mma(&self, is_integer: bool) -> f64 {
        if is_integer { self.mma_int8_tops } else { self.mma_bf16_tflops }
    }
}

/// Of the copy bandwidth, in percent, that decoding alone is to reach.
fn wanted_share(format: &str) -> f64 {
    match format {
        "bf16" => 90.0,
        "int8" => 85.0,
        _ => 80.0,
    }
}

/// One session's tokens a second, times this, of eight.
const WANTED_RATIO: f64 = 4.0;
/// Of cuBLAS's rate in percent, of prompts of so many tokens.
const WANTED_OF_CUBLAS: f64 = 70.0;
const PROMPT_OF_GOAL: usize = 2048;

pub fn context_name(context: usize) -> String {
    if context > 0 && context.is_multiple_of(1024) { format!("{}k", context / 1024) } else { context.to_string() }
}

impl Report {
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a text does not fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let Described { device, compute_capability, multiprocessors, memory_bytes, driver_cuda, library, .. } =
            &self.machine;
        writeln!(out, "{device}, compute capability {compute_capability}, {multiprocessors} multiprocessors,")?;
        writeln!(out, "{:.1} GB, driver for CUDA {driver_cuda}; gemmoe {library}", *memory_bytes as f64 / 1e9)?;
        if !self.machine.is_gpu {
            writeln!(out, "NOT A GPU: a processor plays one, and no figure below says anything about speed")?;
        }
        writeln!(out, "geometry {}{}", self.geometry, if self.quick { ", quick" } else { "" })?;
        if let Some(roofs) = &self.roofs {
            self.write_roofs(out, roofs)?;
        }
        for format in &self.formats {
            writeln!(out, "\n== {}, {:.2} GB of weights", format.format, format.weight_bytes as f64 / 1e9)?;
            self.write_steps(out, format)?;
            format.kernels.iter().try_for_each(|stage| self.write_kernels(out, format, stage))?;
            self.write_prefill(out, format)?;
        }
        if !self.skipped.is_empty() {
            writeln!(out, "\nNot measured")?;
            self.skipped.iter().try_for_each(|sentence| writeln!(out, "  {sentence}"))?;
        }
        writeln!(out, "\n{:.0} s in all", self.seconds)
    }

    fn write_roofs(&self, out: &mut String, roofs: &Roofs) -> std::fmt::Result {
        writeln!(out, "\nRoofs, medians of the same run")?;
        let megabytes = |bytes: usize| bytes as f64 / 1e6;
        let (buffer, cache) = (megabytes(roofs.bytes), megabytes(roofs.cache_bytes));
        writeln!(out, "  copies of {buffer:.0} MB (the cache has {cache:.0})   {:>9.1} GB/s", roofs.copy_gb_per_s)?;
        writeln!(out, "  reads of the same                   {:>9.1} GB/s", roofs.read_gb_per_s)?;
        writeln!(out, "  mma.sync on registers, bf16         {:>9.1} TFLOP/s", roofs.mma_bf16_tflops)?;
        writeln!(out, "  mma.sync on registers, int8         {:>9.1} TOP/s", roofs.mma_int8_tops)?;
        if let Some(name) = &roofs.cublas_name {
            writeln!(out, "  {name}, bf16, the products of a layer of a prompt")?;
        }
        for rate in &roofs.cublas {
            writeln!(out, "    of {:>5} tokens                   {:>9.1} TFLOP/s", rate.tokens, rate.tflops)?;
        }
        Ok(())
    }

    fn write_steps(&self, out: &mut String, format: &Format) -> std::fmt::Result {
        if format.steps.is_empty() {
            return Ok(());
        }
        let copy = self.roofs.as_ref().map(|roofs| roofs.copy_gb_per_s);
        writeln!(out, "\nSteps: GB is the least a step must read (touched experts, dense weights, keys and values)")?;
        if !self.own_contexts {
            writeln!(out, "Sessions of a batch share the pages of their context, which are counted once")?;
        }
        writeln!(
            out,
            "{:>9} {:>8} {:>10} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9}  goal",
            "context", "sessions", "tokens/s", "median ms", "p95 ms", "experts", "GB", "GB/s", "of copy", "ceiling"
        )?;
        for step in &format.steps {
            let share = copy.map(|copy| 100.0 * step.gb_per_s / copy);
            // Tokens a second if a step took no longer than a copy that moves as much.
            let ceiling = copy.map(|copy| step.sessions as f64 * copy / step.gb);
            write!(
                out,
                "{:>9} {:>8} {:>10.1} {:>9.3} {:>9.3} {:>8.2} {:>8.3} {:>8.1} {:>8} {:>9}",
                context_name(step.context),
                step.sessions,
                step.tokens_per_s,
                step.median_ms,
                step.p95_ms,
                step.touched_experts,
                step.gb,
                step.gb_per_s,
                percent(share),
                ceiling.map_or("-".to_owned(), |ceiling| format!("{ceiling:.1}")),
            )?;
            writeln!(out, "{}", goal_of_step(format, step, share))?;
        }
        Ok(())
    }

    fn write_kernels(&self, out: &mut String, format: &Format, stage: &Stage) -> std::fmt::Result {
        let roofs = self.roofs.as_ref();
        writeln!(
            out,
            "\nKernels of {}: times between events on both sides, launch gaps of short ones included",
            stage.name
        )?;
        writeln!(
            out,
            "  {:<26} {:<17} {:>8} {:>9} {:>7} {:>9} {:>8} {:>8} {:>8} {:>7}",
            "", "", "launches", "ms", "of all", "MB, least", "GB/s", "of copy", "TFLOP/s", "of mma"
        )?;
        let all: f64 = stage.kernels.iter().map(|kernel| kernel.ms).sum();
        for kernel in &stage.kernels {
            let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
            let of_copy = kernel.gb_per_s.zip(roofs).map(|(rate, roofs)| 100.0 * rate / roofs.copy_gb_per_s);
            let of_mma = kernel.tflops.zip(roofs).map(|(rate, roofs)| 100.0 * rate / roofs.mma(format.is_integer));
            writeln!(
                out,
                "  {:<26} {:<17} {:>8} {:>9.3} {:>7} {:>9} {:>8} {:>8} {:>8} {:>7}",
                kernel.kernel,
                kernel.part,
                kernel.launches,
                kernel.ms,
                percent(Some(100.0 * kernel.ms / all)),
                number(kernel.mb),
                number(kernel.gb_per_s),
                percent(of_copy),
                kernel.tflops.map_or("-".to_owned(), |rate| format!("{rate:.2}")),
                percent(of_mma),
            )?;
        }
        writeln!(out, "  {:<26} {:<17} {:>8} {all:>9.3}", "all", "", "")
    }

    fn write_prefill(&self, out: &mut String, format: &Format) -> std::fmt::Result {
        if format.prefill.is_empty() {
            return Ok(());
        }
        writeln!(out, "\nPrompts: TFLOP/s are those of products with weights, without attention's own")?;
        writeln!(
            out,
            "{:>9} {:>8} {:>10} {:>10} {:>9} {:>8} {:>10}  goal",
            "tokens", "a pass", "tokens/s", "ms", "TFLOP/s", "of mma", "of cuBLAS"
        )?;
        for row in &format.prefill {
            let of_mma = self.roofs.as_ref().map(|roofs| 100.0 * row.tflops / roofs.mma(format.is_integer));
            let cublas = self.roofs.iter().flat_map(|roofs| &roofs.cublas).find(|rate| rate.tokens == row.chunk);
            let of_cublas = cublas.map(|rate| 100.0 * row.tflops / rate.tflops);
            write!(
                out,
                "{:>9} {:>8} {:>10.1} {:>10.2} {:>9.3} {:>8} {:>10}",
                row.tokens,
                row.chunk,
                row.tokens_per_s,
                row.ms,
                row.tflops,
                percent(of_mma),
                percent(of_cublas)
            )?;
            let goal = of_cublas.filter(|_| row.tokens == PROMPT_OF_GOAL);
            let goal = goal.map(|reached| Goal { reached, wanted: WANTED_OF_CUBLAS });
            let text = goal.map_or(String::new(), |goal| format!("  {} % of cuBLAS: {}", goal.wanted, goal.verdict()));
            writeln!(out, "{text}")?;
        }
        Ok(())
    }
}

fn goal_of_step(format: &Format, step: &Step, share: Option<f64>) -> String {
    let alone = || format.steps.iter().find(|other| other.sessions == 1 && other.context == step.context);
    let (goal, of) = match (step.sessions, share) {
        (1, Some(reached)) => (Goal { reached, wanted: wanted_share(&format.format) }, "% of copy"),
        (8, _) => match alone() {
            Some(alone) => {
                (Goal { reached: step.tokens_per_s / alone.tokens_per_s, wanted: WANTED_RATIO }, "times one session")
            }
            None => return String::new(),
        },
        _ => return String::new(),
    };
    let reached = if step.sessions == 8 { format!(" ({:.2})", goal.reached) } else { String::new() };
    format!("  {} {of}: {}{reached}", goal.wanted, goal.verdict())
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".to_owned(), |share| if share < 10.0 { format!("{share:.1} %") } else { format!("{share:.0} %") })
}
