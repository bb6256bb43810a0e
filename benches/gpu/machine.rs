//! The device with the bench's own kernels on it.

use std::ffi::CStr;

use gemmoe::backend::cuda::arguments::{FillArguments, MmaRateArguments, ReadArguments};
use gemmoe::backend::cuda::bench::{BenchDevice, Code, Content, DeviceBlock, Part};
use gemmoe::backend::device_bytes::DeviceBytes;
use gemmoe::quant::{Format, ScaleDtype};

use super::Result;

const CODE: &str = concat!(include_str!("../../kernels/generated/bench.ptx"), "\0");
/// Of a block of every kernel of `kernels/bench.cu`.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;

/// Multiply-adds of a round of a warp in eight chains: 16 x 8 x 16, or x 32 in int8.
const BF16_PER_ROUND: usize = 8 * 16 * 8 * 16;
const INT8_PER_ROUND: usize = 8 * 16 * 8 * 32;

pub struct Machine {
    pub device: BenchDevice,
    code: Code,
}

/// What tensor cores multiply.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Factors {
    Bf16,
    Int8,
}

impl Machine {
    pub fn open(index: usize) -> Result<Machine> {
        let device = BenchDevice::open(index)?;
        let code = device.load(CStr::from_bytes_with_nul(CODE.as_bytes())?)?;
        Ok(Machine { device, code })
    }

    /// Whether it is one, and not the shim of the tests.
    pub fn is_gpu(&self) -> bool {
        !self.device.name().starts_with("SIMT shim")
    }

    /// Blocks of 256 threads that keep all multiprocessors busy.
    fn blocks(&self) -> usize {
        // The shim runs one after the other.
        if self.is_gpu() { 8 * self.device.multiprocessors() } else { 2 }
    }

    fn launch<A: Copy>(device: &BenchDevice, code: &Code, name: &str, blocks: usize, arguments: &A) -> Result<()> {
        // SAFETY: kernels of kernels/bench.cu with what arguments.rs says they take, on memory that callers keep until they
        // have waited.
        Ok(unsafe { device.launch(code, name, (blocks, THREADS), arguments) }?)
    }

    /// Makes a part of a model's weights: products of as many of them as there are columns, with activations of one, are of
    /// one as well.
    pub fn fill_part(&self, part: &Part, seed: u32) -> gemmoe::Result<()> {
        let spread = 1.0 / (part.columns as f32).sqrt();
        let (content, scale) = match part.content {
            Content::Integers(_) => (0, 1.0),
            // The deviation of whole numbers that are all as likely.
            Content::Scales(dtype, format) => {
                let deviation = if matches!(format, Format::Int4(_)) { 4.61 } else { 73.9 };
                (if dtype == ScaleDtype::Bf16 { 4 } else { 5 }, spread / deviation)
            }
            Content::Numbers(_) if part.name.ends_with("norm.weight") => (1, 0.1),
            Content::Numbers(Format::Bf16) => (2, spread),
            Content::Numbers(Format::F16) => (3, spread),
            // A router, whose choices are to be clear.
            Content::Numbers(_) => (1, 2.0 * spread),
        };
        self.fill(part.address, part.bytes, content, seed, scale)
    }

    fn fill(&self, address: u64, bytes: usize, content: u32, seed: u32, scale: f32) -> gemmoe::Result<()> {
        let (words, blocks) = ((bytes / 4) as u64, self.blocks().min(bytes.div_ceil(4 * THREADS)).max(1));
        let arguments = FillArguments { to: address as *mut u32, words, content, seed, scale, blocks: blocks as u32 };
        // SAFETY: the address has room for as many bytes, and is waited for before it is read or freed.
        unsafe { self.device.launch(&self.code, "fill", (blocks, THREADS), &arguments) }
    }

    /// Memory with numbers in bf16.
    pub fn numbers(&self, what: &str, bytes: usize, seed: u32) -> Result<DeviceBlock> {
        let block = self.device.allocate(what, bytes)?;
        self.fill(block.address(), bytes, 2, seed, 1.0)?;
        self.device.wait()?;
        Ok(block)
    }

    /// Seconds of a copy, which moves its bytes twice.
    pub fn copy_seconds(&mut self, from: &DeviceBlock, to: &mut DeviceBlock) -> Result<f64> {
        let bytes = from.bytes().min(to.bytes());
        Ok(self.device.time(|device| device.copy(to, from, bytes))?)
    }

    /// Seconds of reading a block once.
    pub fn read_seconds(&mut self, block: &DeviceBlock) -> Result<f64> {
        let blocks = self.blocks();
        let seen = self.device.allocate("what was read", blocks * size_of::<u32>())?;
        let arguments = ReadArguments {
            from: block.address() as *const u8,
            count: (block.bytes() / 16) as u64,
            seen: seen.address() as *mut u32,
            blocks: blocks as u32,
        };
        let Machine { device, code } = self;
        time(device, |device| Machine::launch(device, code, "read", blocks, &arguments))
    }

    /// Multiply-adds a second of tensor cores, from and to registers.
    pub fn mma_rate(&mut self, factors: Factors, rounds: u32) -> Result<f64> {
        let (name, per_round) = match factors {
            Factors::Bf16 => ("mma_rate_bf16", BF16_PER_ROUND),
            Factors::Int8 => ("mma_rate_int8", INT8_PER_ROUND),
        };
        let blocks = self.blocks();
        let out = self.device.allocate("sums", blocks * THREADS * size_of::<f32>())?;
        let arguments = MmaRateArguments { out: out.address() as *mut f32, rounds, seed: 1 };
        let Machine { device, code } = self;
        let seconds = time(device, |device| Machine::launch(device, code, name, blocks, &arguments))?;
        Ok((blocks * WARPS * per_round) as f64 * f64::from(rounds) / seconds)
    }
}

/// As [`BenchDevice::time`], of work with any error.
pub fn time(device: &mut BenchDevice, work: impl FnOnce(&BenchDevice) -> Result<()>) -> Result<f64> {
    let mut failed = None;
    let seconds = device.time(|device| {
        failed = work(device).err();
        Ok(())
    });
    failed.map_or(Ok(()), Err)?;
    Ok(seconds?)
}
