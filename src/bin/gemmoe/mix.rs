//! `gemmoe mix`

use std::path::PathBuf;

use gemmoe::mix::{self, Base, MixOptions, MixPlan, MixReport, Recipe};
use gemmoe::{Formats, Result};
use serde_json::json;

use crate::formats::{parts, parts_json};
use crate::load::watch;
use crate::units::{count, grouped, size};

#[derive(clap::Args)]
pub struct Mix {
    /// The recipe, a TOML file; paths in it are relative to its directory. docs/mix.md lists its keys.
    #[arg(value_name = "RECIPE")]
    recipe: PathBuf,
    /// Directory to write; it must not be there, or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Check everything but the weights' numbers, print what would be made, and write nothing.
    #[arg(long)]
    check: bool,
    /// Threads; by default one per core.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Follow symbolic links inside the models' directories, as in a download cache.
    #[arg(long)]
    follow_links: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Mix {
    pub fn run(&self) -> Result<()> {
        let recipe = Recipe::read(&self.recipe)?;
        let options = MixOptions { threads: self.threads, follow_links: self.follow_links };
        let plan = mix::check(&recipe, &self.out, &options)?;
        if !self.json {
            print_plan(&recipe, &plan);
        }
        let mut report = None;
        if !self.check {
            report = Some(watch("mixing", |progress| mix::mix(&recipe, &self.out, &options, progress))?);
        }
        if self.json {
            print_json(&recipe, &plan, report.as_ref());
        } else if let Some(report) = report {
            if let Some(rounded) = report.rounded {
                println!(
                    "\nThe root mean square of the error by that of the weights: {:.3} %",
                    100.0 * rounded.relative()
                );
            }
            println!("\nwritten to {}", self.out.display());
        } else {
            println!("\nall checks passed; nothing was written");
        }
        Ok(())
    }
}

fn print_plan(recipe: &Recipe, plan: &MixPlan) {
    println!("experts, of which each token is sent to {}:", plan.config.num_experts_per_tok);
    for (index, expert) in recipe.experts.iter().enumerate() {
        let of = expert.expert.map(|number| format!(", expert {number}")).unwrap_or_default();
        let tokens = plan.text_tokens.get(index).map(|tokens| format!(", {} tokens of text", grouped(*tokens as u64)));
        println!("  {index:>2}  {:<16} {}{of}{}", expert.name, expert.model.display(), tokens.unwrap_or_default());
    }
    match (&recipe.base, plan.base.as_slice()) {
        (Base::Model(directory), _) => println!("everything else from {}", directory.display()),
        (Base::Mean, shares) => {
            let shares: Vec<String> = shares.iter().map(|(_, share)| format!("{:.1} %", 100.0 * share)).collect();
            println!("everything else is their mean: {}", shares.join(", "));
        }
    }
    println!("routers: {}, scale {}", recipe.router.method.name(), recipe.router.scale);
    println!();
    let active = count(plan.active_parameters);
    println!("{:<12} {}, {active} of them per token", "parameters", count(plan.parameters));
    println!("{:<12} {}", "dtype", plan.dtypes.join(", "));
    if plan.formats != Formats::default() {
        println!("{:<12} {}", "quantised", parts(&plan.formats));
    }
    println!("{:<12} {:>18} bytes {:>9}", "read", grouped(plan.bytes_read), size(plan.bytes_read));
    println!("{:<12} {:>18} bytes {:>9}", "written", grouped(plan.bytes_written), size(plan.bytes_written));
    if plan.scratch_bytes > 0 {
        let bytes = grouped(plan.scratch_bytes);
        println!(
            "{:<12} {bytes:>18} bytes {:>9}, the mean, to be run for the routers",
            "for a while",
            size(plan.scratch_bytes)
        );
    }
}

fn print_json(recipe: &Recipe, plan: &MixPlan, report: Option<&MixReport>) {
    let experts = recipe.experts.iter().enumerate().map(|(index, expert)| {
        json!({
            "name": expert.name,
            "model": expert.model.display().to_string(),
            "expert": expert.expert,
            "text_tokens": plan.text_tokens.get(index),
        })
    });
    let base = plan.base.iter().map(|(model, share)| json!({"model": model.display().to_string(), "share": share}));
    let object = json!({
        "experts": experts.collect::<Vec<_>>(),
        "base": base.collect::<Vec<_>>(),
        "router": {"method": recipe.router.method.name(), "scale": recipe.router.scale},
        "num_experts_per_tok": plan.config.num_experts_per_tok,
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "dtypes": plan.dtypes,
        "formats": parts_json(&plan.formats),
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "scratch_bytes": plan.scratch_bytes,
        "written": report.is_some(),
        "relative_error": report.and_then(|report| report.rounded).map(|rounded| rounded.relative()),
    });
    println!("{object}");
}
