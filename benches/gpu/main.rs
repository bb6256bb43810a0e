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

use geometry::{Directory, Held, Work};
use machine::Machine;
use options::{FormatChoice, Options, Section, Sizes};
use report::{Described, Format, Report};
use steps::Sessions;

pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("gpu-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
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
    if options.wants(Section::Roofs) {
        eprintln!("roofs ...");
        let work = Work { config: &config, format: gemmoe::quant::Format::Bf16 };
        let roofs = roofs::measure(&mut machine, &sizes, &work, options.cublas.as_deref())?;
        if roofs.cublas_name.is_none() {
            report
                .skipped
                .push("cuBLAS is not here (--cublas says where): prompts are not compared with it".to_owned());
        }
        report.roofs = Some(roofs);
    }
    if [Section::Steps, Section::Kernels, Section::Prefill].into_iter().any(|section| options.wants(section)) {
        for held in Held::ALL.into_iter().filter(|held| is_chosen(options.format, *held)) {
            eprintln!("{}: making weights ...", held.name);
            match model::generate(&machine, &directory, held, options.device)? {
                Err(sentence) => report.skipped.push(sentence),
                Ok(model) => {
                    let format = measure(&machine, &model, held, (options, &sizes), &mut report.skipped)?;
                    report.formats.push(format);
                }
            }
        }
    }
    report.seconds = started.elapsed().as_secs_f64();
    print!("{}", report.text());
    if let Some(path) = &options.json {
        std::fs::write(path, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    if let Some(path) = &options.svg {
        std::fs::write(path, plot::svg(&report))?;
    }
    Ok(())
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

/// Everything that is wanted of one format. What there is no memory for is left out, with a sentence in `skipped`.
fn measure(
    machine: &Machine,
    model: &Arc<Model>,
    held: Held,
    (options, sizes): (&Options, &Sizes),
    skipped: &mut Vec<String>,
) -> Result<Format> {
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
        eprintln!("{}: steps at {context} ...", held.name);
        let begun = Sessions::new(model, sizes, context, options.own_contexts);
        let Some(mut at) = fitting(begun, &format!("{}, steps at {context}", held.name), skipped)? else { continue };
        if options.wants(Section::Steps) && sizes.contexts.contains(&context) {
            format.steps.extend(steps::measure(model, &work, sizes, &mut at)?);
        }
        if of_kernels && context == sizes.kernel_context {
            let batches = sizes.batches.iter().copied();
            for count in batches.filter(|count| [1, 8].contains(count)) {
                format.kernels.push(kernels::of_step(machine, model, &work, (&mut at, count, sizes.steps))?);
            }
        }
    }
    if of_kernels {
        eprintln!("{}: kernels of a prompt ...", held.name);
        format.kernels.push(kernels::of_prompt(machine, model, &work, sizes)?);
    }
    if options.wants(Section::Prefill) {
        for tokens in sizes.prompts.iter().copied() {
            eprintln!("{}: a prompt of {tokens} ...", held.name);
            let measured = prefill::measure(model, &work, sizes, tokens);
            format.prefill.extend(fitting(measured, &format!("{}, a prompt of {tokens}", held.name), skipped)?);
        }
    }
    Ok(format)
}

/// None where the device has no memory for it.
fn fitting<T>(measured: gemmoe::Result<T>, what: &str, skipped: &mut Vec<String>) -> Result<Option<T>> {
    match measured {
        Ok(measured) => Ok(Some(measured)),
        Err(error) if error.status() == Status::DeviceOutOfMemory => {
            skipped.push(format!("{what}: {error}"));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
