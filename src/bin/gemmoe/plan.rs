//! `gemmoe plan`

use std::path::PathBuf;

use gemmoe::backend::cpu::CpuOptions;
use gemmoe::backend::{Device, KvDtype};
use gemmoe::train::pass::{PassSize, TrainingBytes, training_bytes};
use gemmoe::{Formats, LoadOptions, MemoryPlan, Model, Result, SessionOptions};
use serde_json::json;

use crate::devices::parse_device;
use crate::formats::{parse_formats, parts, parts_json};
use crate::session::kv_dtypes;
use crate::units::{grouped, parse_size, size};

#[derive(clap::Args)]
pub struct Plan {
    /// Model directory.
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    /// Tokens a session can hold; by default what the model was made for, at most 8192.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    context: usize,
    /// Most tokens of one forward pass, which the workspace is sized for; by default 256.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    chunk: usize,
    /// How keys and values are stored; by default like the weights.
    #[arg(long, value_name = "DTYPE", value_parser = kv_dtypes())]
    kv: Option<KvDtype>,
    /// Sessions at the same time.
    #[arg(long, value_name = "N", default_value_t = 1)]
    sessions: u64,
    /// Where the model would run: cpu, cuda, cuda:N, or auto for a GPU where the model fits one.
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = parse_device)]
    device: Device,
    /// On a GPU, most memory that weights take there, as in 24GB; experts that do not fit stay in host memory. 0 is no limit.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "0", hide_default_value = true)]
    device_memory_limit: u64,
    /// On a GPU, the same bits whatever else is in a batch and however a prompt is cut, without tensor cores.
    #[arg(long)]
    exact: bool,
    /// Threads; by default one per core.
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Round weights while loading: experts, attention, head or embedding to int8 or int4, as in
    /// experts=int4,attention=int8,head=int8; group-size=64 or 128 and scales=f16 can be added.
    #[arg(long, value_name = "PART=FORMAT,...", value_parser = parse_formats)]
    quantize: Option<Formats>,
    /// What training its routers takes too, with batches of so many tokens; docs/training.md has recipes.
    #[arg(long, value_name = "MAX_TOKENS", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    train: Option<u64>,
    /// Follow symbolic links inside the directory, as in a download cache.
    #[arg(long)]
    follow_links: bool,
    /// Print one JSON object; free_bytes and fits are null where the machine does not tell.
    #[arg(long)]
    json: bool,
}

impl Plan {
    pub fn run(&self) -> Result<()> {
        let load = LoadOptions {
            device: self.device,
            cpu: CpuOptions { threads: self.threads.into(), ..Default::default() },
            formats: self.quantize.unwrap_or_default(),
            follow_links: self.follow_links,
            exact: self.exact,
            device_memory_limit: self.device_memory_limit,
            ..Default::default()
        };
        let session = SessionOptions {
            context_size: self.context,
            prefill_chunk: self.chunk,
            kv_dtype: self.kv,
            ..Default::default()
        };
        let plan = Model::plan(&self.directory, &load, &session)?;
        let free = free_bytes();
        let training = match self.train {
            None => None,
            Some(max_tokens) => {
                let (description, _) = Model::inspect(&self.directory, &load)?;
                let threads = (plan.residency.device_bytes == 0).then(|| load.cpu.threads.resolved_count());
                Some(training_bytes(&description.config, PassSize::new(max_tokens as usize, false), false, threads)?)
            }
        };
        if self.json {
            self.print_json(&plan, training, free)
        } else {
            self.print_table(&plan, training, free)
        }
        Ok(())
    }

    fn print_table(&self, plan: &MemoryPlan, training: Option<TrainingBytes>, free: Option<u64>) {
        let row = |name: &str, bytes: u64, note: String| {
            println!("{name:<16} {:>19} {:>9}   {note}", grouped(bytes), size(bytes));
        };
        let kv = plan.kv_dtype.name();
        println!("{:<16} {:>19}", "", "bytes");
        row("weights", plan.weight_bytes, format!("once; {} of them experts", grouped(plan.expert_bytes)));
        let residency = &plan.residency;
        if residency.device_bytes > 0 {
            let experts = |count| format!("{} experts", grouped(count));
            row("  on the device", residency.device_bytes, format!("of these, {}", experts(residency.device_experts)));
            row("  in host memory", residency.host_bytes, experts(residency.host_experts));
            row("  for copies", residency.staging_bytes, "on the device beside them".to_owned());
        }
        row("tokenizer", plan.tokenizer_bytes, "once, about".to_owned());
        row("keys and values", plan.kv_bytes_per_token, format!("a token, in {kv}"));
        row("", plan.kv_bytes, format!("a session of {} tokens", grouped(plan.context_size as u64)));
        row("workspace", plan.workspace_bytes, "a session".to_owned());
        let sessions = if self.sessions == 1 { "session" } else { "sessions" };
        let total = plan.total_bytes(self.sessions);
        row("total", total, format!("with {} {sessions}", grouped(self.sessions)));
        if let (Some(training), Some(tokens)) = (training, self.train) {
            println!();
            let batch = format!("of training, in batches of {} tokens", grouped(tokens));
            row("workspace", training.workspace, batch);
            row("optimiser", training.optimiser, "gates, reference, gradients and moments".to_owned());
            let total = plan.weight_bytes + plan.tokenizer_bytes + training.workspace + training.optimiser;
            row("total", total, "to train routers, without sessions".to_owned());
            row("checkpoint", training.checkpoint, "on the disk".to_owned());
        }
        println!("\nWeights in {}.", parts(&plan.formats));
        println!("On {}.", plan.device_name);
        match free {
            None => {}
            Some(free) if total <= free => println!("It fits: {} of memory are free.", size(free)),
            Some(free) => println!(
                "It does not fit: {} of memory are free. A shorter --context, --kv int8, a smaller --chunk, fewer \
                 --sessions and --quantize take less.",
                size(free)
            ),
        }
    }

    fn print_json(&self, plan: &MemoryPlan, training: Option<TrainingBytes>, free: Option<u64>) {
        let total = plan.total_bytes(self.sessions);
        let training = training.map(|training| {
            json!({
                "max_tokens": self.train,
                "workspace_bytes": training.workspace,
                "optimiser_bytes": training.optimiser,
                "checkpoint_bytes": training.checkpoint,
            })
        });
        let object = json!({
            "device": plan.device_name,
            "weight_bytes": plan.weight_bytes,
            "expert_bytes": plan.expert_bytes,
            "device_bytes": plan.residency.device_bytes,
            "staging_bytes": plan.residency.staging_bytes,
            "host_bytes": plan.residency.host_bytes,
            "device_experts": plan.residency.device_experts,
            "host_experts": plan.residency.host_experts,
            "formats": parts_json(&plan.formats),
            "tokenizer_bytes": plan.tokenizer_bytes,
            "context_size": plan.context_size,
            "kv_dtype": plan.kv_dtype.name(),
            "kv_bytes_per_token": plan.kv_bytes_per_token,
            "kv_bytes": plan.kv_bytes,
            "workspace_bytes": plan.workspace_bytes,
            "sessions": self.sessions,
            "total_bytes": total,
            "training": training,
            "free_bytes": free,
            "fits": free.map(|free| total <= free),
        });
        println!("{object}");
    }
}

/// Memory that programs on this machine can still have, and this process in its container.
fn free_bytes() -> Option<u64> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let container = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
    // An unknown system says 0.
    Some(system.available_memory().min(container)).filter(|free| *free > 0)
}
