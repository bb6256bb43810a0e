//! Loading, and other readings of a model, with a progress bar.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use gemmoe::backend::Variants;
use gemmoe::backend::cpu::kernels::Instructions;
use gemmoe::backend::cpu::{self, CpuOptions, ThreadOptions};
use gemmoe::{LoadOptions, Model, Progress, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::interrupt::cancelling;
use crate::{LoadArgs, ModelArgs, Priority};

/// A bar on stderr that is not there where stderr is not a terminal.
pub fn bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(length).with_style(style)
}

/// Loads the model, showing how far it is.
pub fn load(args: &ModelArgs) -> Result<Arc<Model>> {
    load_directory(&args.model, &args.load)
}

/// The same with the directory apart.
pub fn load_directory(directory: &Path, args: &LoadArgs) -> Result<Arc<Model>> {
    let options = options(args);
    watch("loading", |progress| Model::load(directory, &options, progress))
}

/// Takes the names of instruction sets.
pub fn instruction_sets() -> impl TypedValueParser<Value = Instructions> {
    PossibleValuesParser::new(Instructions::ALL.map(Instructions::name)).try_map(|name| {
        let found = Instructions::ALL.into_iter().find(|instructions| instructions.name() == name);
        found.ok_or("it is no instruction set")
    })
}

/// How the arguments say that the model is to be loaded.
pub fn options(args: &LoadArgs) -> LoadOptions {
    let priority = match args.priority {
        Priority::Normal => cpu::Priority::Normal,
        Priority::Low => cpu::Priority::Low,
        Priority::Lowest => cpu::Priority::Lowest,
    };
    LoadOptions {
        device: args.device,
        cpu: CpuOptions {
            instructions: args.instructions.unwrap_or_default(),
            threads: ThreadOptions { count: args.threads, pin: args.pin, priority, ..Default::default() },
        },
        variants: Variants { unrounded_embedding_scale: args.unrounded_embedding_scale, exact_gelu: args.exact_gelu },
        formats: args.quantize.unwrap_or_default(),
        follow_links: args.follow_links,
        map: args.map,
        exact: args.exact,
        device_memory_limit: args.device_memory_limit,
        ..Default::default()
    }
}

/// Does what reads a model, showing how far it is.
pub fn watch<T: Send>(doing: &str, work: impl FnOnce(&Progress) -> Result<T> + Send) -> Result<T> {
    let progress = Arc::new(Progress::default());
    let bar = bar(0, "{prefix} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
        .with_prefix(doing.to_owned());
    let watching = || {
        thread::scope(|scope| {
            let working = scope.spawn(|| work(&progress));
            while !working.is_finished() {
                // Nothing is drawn before the files are checked and the total is known.
                if progress.bytes_total() > 0 {
                    bar.set_length(progress.bytes_total());
                    bar.set_position(progress.bytes_read());
                }
                thread::sleep(Duration::from_millis(20));
            }
            working.join()
        })
    };
    let result = cancelling(&progress, watching);
    bar.finish_and_clear();
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
