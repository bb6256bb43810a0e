//! `gemmoe devices`, and the names by which devices are chosen.

use gemmoe::Result;
use gemmoe::backend::cpu::{self, CpuOptions};
use gemmoe::backend::{Device, DeviceInfo, devices};
use serde_json::json;

use crate::units::size;

#[derive(clap::Args)]
pub struct Devices {
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Devices {
    pub fn run(&self) -> Result<()> {
        let processor = cpu::planned_device_name(&CpuOptions::default())?;
        let gpus = devices()?;
        if self.json {
            let gpus: Vec<_> = gpus.iter().map(gpu_json).collect();
            println!("{}", json!({ "cpu": processor, "cuda": gpus }));
            return Ok(());
        }
        println!("cpu      {processor}");
        for gpu in &gpus {
            let (name, (major, minor)) = (&gpu.name, gpu.capability);
            let (free, all) = (size(gpu.free_bytes), size(gpu.memory_bytes));
            println!("cuda:{:<3} {name}, compute capability {major}.{minor}, {free} of {all} free", gpu.index);
        }
        if gpus.is_empty() {
            println!("\nNo NVIDIA GPU: there is none, or no driver for it.");
        }
        Ok(())
    }
}

fn gpu_json(gpu: &DeviceInfo) -> serde_json::Value {
    json!({
        "index": gpu.index,
        "name": gpu.name,
        "capability": format!("{}.{}", gpu.capability.0, gpu.capability.1),
        "memory_bytes": gpu.memory_bytes,
        "free_bytes": gpu.free_bytes,
    })
}

/// Takes `cpu`, `auto`, `cuda` and `cuda:1`.
pub fn parse_device(name: &str) -> std::result::Result<Device, String> {
    Device::from_name(name).ok_or_else(|| "expected cpu, auto, cuda or cuda:N; `gemmoe devices` lists them".to_owned())
}
