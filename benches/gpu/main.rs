//! gpu-bench: how fast gemmoe is on a GPU, and what share of the GPU that is. `make gpu-bench` bundles it for a machine that
//! has nothing but a driver.
//!
//! `machine` is the device with kernels of the bench's own, `geometry` the model and the least it costs, `model` makes its
//! weights on the device; `roofs`, `steps`, `kernels` and `prefill` measure, `report` and `plot` show.

mod cublas;
mod geometry;
mod kernels;
mod machine;
mod model;
mod options;
mod plot;
mod prefill;
mod report;
mod roofs;
mod steps;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use gemmoe::{Model, Status};

use cublas::Cublas;
use geometry::{Directory, Held, Work};
use machine::Machine;
use options::{FormatChoice, Options, Section, Sizes};
use report::{Described, Format, Report};
use steps::Sessions;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("gpu-bench: some measurements failed, see the end of the report");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("gpu-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether everything that was wanted, and fits, could be measured. Whatever fails, what was measured before it is reported.
fn run(options: &Options) -> Result<bool> {
    let started = Instant::now();
    let sizes = options.sizes()?;
    let mut machine = Machine::open(options.device)?;
    let directory = Directory::of(options.geometry)?;
    let config = gemmoe::model::Config::from_json(&std::fs::read(directory.path().join("config.json"))?)?;
    let mut report = Report {
        machine: describe(&machine)?,
        geometry: options.geometry.name().to_owned(),
        quick: options.quick,
        own_contexts: options.own_contexts,
        roofs: None,
        formats: Vec::new(),
        skipped: Vec::new(),
        seconds: 0.0,
    };
    let mut missing = Missing::default();
    let cublas = Cublas::open(&machine.device, options.cublas.as_deref())?;
    if options.wants(Section::Roofs) {
        eprintln!("roofs ...");
        let mut roofs = roofs::measure(&mut machine, &sizes)?;
        match &cublas {
            None => {
                let text = "cuBLAS is not here (--cublas says where): prompts are not compared with it";
                missing.sentences.push(text.to_owned());
            }
            Some(library) => {
                let work = Work { config: &config, format: gemmoe::quant::Format::Bf16 };
                let rates = roofs::of_cublas(&mut machine, library, &sizes, &work);
                roofs.cublas = missing.unless_failed(rates, &library.name).unwrap_or_default();
                roofs.cublas_name = (!roofs.cublas.is_empty()).then(|| library.name.clone());
            }
        }
        report.roofs = Some(roofs);
    }
    if let Some(library) = cublas {
        library.close(&machine.device)?;
    }
    if [Section::Steps, Section::Kernels, Section::Prefill].into_iter().any(|section| options.wants(section)) {
        for held in Held::ALL.into_iter().filter(|held| is_chosen(options.format, *held)) {
            eprintln!("{}: making weights ...", held.name);
            let generated = model::generate(&machine, &directory, held, options.device);
            match missing.unless_failed(generated, held.name) {
                Some(Ok(model)) => {
                    report.formats.push(measure(&machine, &model, held, (options, &sizes), &mut missing));
                }
                Some(Err(sentence)) => missing.sentences.push(sentence),
                None => {}
            }
        }
    }
    report.skipped.append(&mut missing.sentences);
    report.seconds = started.elapsed().as_secs_f64();
    print!("{}", report.text());
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    if let Some(path) = &options.svg {
        std::fs::write(path, plot::svg(&report))?;
    }
    Ok(!missing.has_failed)
}

/// What is not measured, and why.
#[derive(Default)]
struct Missing {
    sentences: Vec<String>,
    /// Whether anything else than memory was the reason.
    has_failed: bool,
}

impl Missing {
    /// What was measured; else the reason is kept.
    fn unless_failed<T>(&mut self, measured: Result<T>, what: &str) -> Option<T> {
        match measured {
            Ok(measured) => Some(measured),
            Err(error) => {
                let status = error.downcast_ref::<gemmoe::Error>().map(gemmoe::Error::status);
                self.has_failed |= status != Some(Status::DeviceOutOfMemory);
                self.sentences.push(format!("{what}: {error}"));
                None
            }
        }
    }
}

fn is_chosen(choice: FormatChoice, held: Held) -> bool {
    match choice {
        FormatChoice::All => true,
        FormatChoice::Bf16 => held.name == "bf16",
        FormatChoice::Int8 => held.name == "int8",
        FormatChoice::Int4 => held.name == "int4",
    }
}

fn describe(machine: &Machine) -> Result<Described> {
    let device = &machine.device;
    let ((major, minor), cuda) = (device.capability(), device.driver_version()?);
    Ok(Described {
        device: device.name().to_owned(),
        is_gpu: machine.is_gpu(),
        compute_capability: format!("{major}.{minor}"),
        multiprocessors: device.multiprocessors(),
        memory_bytes: device.memory()?.1,
        driver_cuda: format!("{}.{}", cuda / 1000, cuda % 1000 / 10),
        library: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

/// Everything that is wanted of one format.
fn measure(
    machine: &Machine,
    model: &Arc<Model>,
    held: Held,
    (options, sizes): (&Options, &Sizes),
    missing: &mut Missing,
) -> Format {
    let work = Work { config: model.config(), format: held.format };
    let mut format = Format {
        format: held.name.to_owned(),
        is_integer: held.is_integer(),
        weight_bytes: model.backend().weight_bytes().0,
        steps: Vec::new(),
        kernels: Vec::new(),
        prefill: Vec::new(),
    };
    let of_kernels = options.wants(Section::Kernels);
    let mut contexts = if options.wants(Section::Steps) { sizes.contexts.clone() } else { Vec::new() };
    if of_kernels && !contexts.contains(&sizes.kernel_context) {
        contexts.push(sizes.kernel_context);
    }
    for context in contexts {
        let what = format!("{}, steps at {context}", held.name);
        eprintln!("{what} ...");
        let begun = Sessions::new(model, sizes, context, options.own_contexts).map_err(Into::into);
        let Some(mut at) = missing.unless_failed(begun, &what) else { continue };
        if options.wants(Section::Steps) && sizes.contexts.contains(&context) {
            let steps = steps::measure(model, &work, sizes, &mut at);
            format.steps.extend(missing.unless_failed(steps, &what).unwrap_or_default());
        }
        if of_kernels && context == sizes.kernel_context {
            for count in sizes.batches.iter().copied().filter(|count| [1, 8].contains(count)) {
                let stage = kernels::of_step(machine, model, &work, (&mut at, count, sizes.steps));
                let what = format!("{}, kernels of a step of {count}", held.name);
                format.kernels.extend(missing.unless_failed(stage, &what));
            }
        }
    }
    if of_kernels {
        let what = format!("{}, kernels of a prompt", held.name);
        eprintln!("{what} ...");
        format.kernels.extend(missing.unless_failed(kernels::of_prompt(machine, model, &work, sizes), &what));
    }
    if options.wants(Section::Prefill) {
        for tokens in sizes.prompts.iter().copied() {
            let what = format!("{}, a prompt of {tokens}", held.name);
            eprintln!("{what} ...");
            let measured = prefill::measure(model, &work, sizes, tokens).map_err(Into::into);
            format.prefill.extend(missing.unless_failed(measured, &what));
        }
    }
    format
}
