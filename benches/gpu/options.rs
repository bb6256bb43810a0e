//! What the user may choose.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use super::geometry::Geometry;

/// Measures gemmoe on a GPU, on a model of the real size whose weights are made there, beside what the device can: its
/// copy bandwidth and tensor rates, in the same run. A figure that is not measured is left out.
#[derive(Parser)]
#[command(name = "gpu-bench", version)]
pub struct Options {
    /// The model's sizes.
    #[arg(long, value_enum, default_value_t = Geometry::Gemmoe)]
    pub geometry: Geometry,
    /// What weights are held in. A format that does not fit is skipped.
    #[arg(long, value_enum, default_value_t = FormatChoice::All)]
    pub format: FormatChoice,
    /// Only these measurements.
    #[arg(long, value_enum, value_delimiter = ',')]
    pub only: Vec<Section>,
    /// Which device, of those the kernels run on.
    #[arg(long, default_value_t = 0)]
    pub device: usize,
    /// Fewer sizes and steps: two minutes instead of eight.
    #[arg(long)]
    pub quick: bool,
    /// Sessions in a batch.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub batch: Option<Vec<usize>>,
    /// Tokens that each session holds when steps are measured.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub context: Option<Vec<usize>>,
    /// Tokens of a prompt.
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub prompt: Option<Vec<usize>>,
    /// Measured steps of each batch at each context.
    #[arg(long)]
    pub steps: Option<usize>,
    /// Steps before them.
    #[arg(long)]
    pub warm_up: Option<usize>,
    /// Most tokens of one pass of a prompt.
    #[arg(long)]
    pub chunk: Option<usize>,
    /// Every session of a batch runs its own context instead of sharing the pages of one. Takes its time, and memory.
    #[arg(long)]
    pub own_contexts: bool,
    /// Where cuBLAS is: its library, its folder, or Python's site-packages. Looked for where libraries are without it.
    #[arg(long, value_name = "PATH")]
    pub cublas: Option<PathBuf>,
    /// Write all figures there.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw shares and rates there.
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FormatChoice {
    Bf16,
    Int8,
    Int4,
    All,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Section {
    /// What the device can.
    Roofs,
    /// Tokens a second of batches at contexts.
    Steps,
    /// The time of each kernel.
    Kernels,
    /// Prompts.
    Prefill,
}

/// The sizes that are measured.
pub struct Sizes {
    pub batches: Vec<usize>,
    pub contexts: Vec<usize>,
    pub prompts: Vec<usize>,
    pub steps: usize,
    pub warm_up: usize,
    pub chunk: usize,
    /// Of a prompt, after one that warms up.
    pub rounds: usize,
    /// What the kernels of a step are timed at, and those of a prompt.
    pub kernel_context: usize,
    pub kernel_prompt: usize,
    /// How much of itself each roof takes: bytes, and rounds of products.
    pub roof_bytes: usize,
    pub mma_rounds: u32,
    pub roof_rounds: usize,
}

impl Options {
    pub fn wants(&self, section: Section) -> bool {
        self.only.is_empty() || self.only.contains(&section)
    }

    /// Defaults filled in. Those of the tiny geometry are for trying the program out.
    pub fn sizes(&self) -> Result<Sizes, String> {
        let mut sizes = match (self.geometry, self.quick) {
            (Geometry::Tiny, _) => Sizes {
                batches: vec![1, 2],
                contexts: vec![0, 40],
                prompts: vec![16, 40],
                steps: 3,
                warm_up: 1,
                chunk: 32,
                rounds: 1,
                kernel_context: 40,
                kernel_prompt: 40,
                roof_bytes: 1 << 18,
                mma_rounds: 2,
                roof_rounds: 1,
            },
            (_, true) => Sizes {
                batches: vec![1, 8],
                contexts: vec![0, 4096],
                prompts: vec![512, 2048],
                steps: 40,
                warm_up: 10,
                chunk: 2048,
                rounds: 3,
                kernel_context: 4096,
                kernel_prompt: 2048,
                roof_bytes: 1 << 30,
                mma_rounds: 20_000,
                roof_rounds: 10,
            },
            (_, false) => Sizes {
                batches: vec![1, 2, 4, 8, 16],
                contexts: vec![0, 1024, 4096, 8192],
                prompts: vec![128, 256, 512, 1024, 2048, 4096, 8192],
                steps: 100,
                warm_up: 20,
                roof_bytes: 2 << 30,
                roof_rounds: 20,
                ..Options { quick: true, ..self.plain() }.sizes()?
            },
        };
        sizes.batches = self.batch.clone().unwrap_or(sizes.batches);
        sizes.contexts = self.context.clone().unwrap_or(sizes.contexts);
        sizes.prompts = self.prompt.clone().unwrap_or(sizes.prompts);
        sizes.steps = self.steps.unwrap_or(sizes.steps);
        sizes.warm_up = self.warm_up.unwrap_or(sizes.warm_up);
        sizes.chunk = self.chunk.unwrap_or(sizes.chunk);
        for (name, list, least) in
            [("batch", &sizes.batches, 1), ("prompt", &sizes.prompts, 1), ("context", &sizes.contexts, 0)]
        {
            if list.is_empty() || list.iter().any(|size| *size < least || *size > 1 << 16) {
                return Err(format!("--{name} takes numbers from {least} to 65536"));
            }
        }
        if sizes.steps == 0 || sizes.chunk < sizes.batches.iter().copied().max().unwrap_or(1) {
            return Err("--steps is at least 1, and --chunk at least the largest batch".to_owned());
        }
        Ok(sizes)
    }

    /// The same geometry with nothing else chosen.
    fn plain(&self) -> Options {
        Options { geometry: self.geometry, ..Options::parse_from(["gpu-bench"]) }
    }
}
