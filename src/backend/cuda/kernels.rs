//! The kernels: loaded onto a device, each found by its name and called with its own struct.

use std::ffi::CString;
use std::marker::PhantomData;
use std::sync::Arc;

use super::arguments::*;
use super::context::Current;
use super::device::Device;
use super::driver;
use super::images::{Code, Target, generated};
use crate::error::{Error, Result, Status};
use crate::memory::try_with_capacity;
use crate::quant::Format;

/// The code of all that inference takes.
static FILES: [Code; 15] = [
    generated!("attention"),
    generated!("attention_tensor"),
    generated!("candidates"),
    generated!("embed"),
    generated!("experts"),
    generated!("experts_narrow"),
    generated!("experts_tensor"),
    generated!("head"),
    generated!("matmul"),
    generated!("matmul_narrow"),
    generated!("matmul_tensor"),
    generated!("norm"),
    generated!("rotate"),
    generated!("round"),
    generated!("route"),
];

/// Tokens that a tile of a product can have; each is a kernel of its own.
pub const WIDTHS: [usize; 4] = [1, 2, 4, 8];

/// Most tokens that weights are read once for on tensor cores.
pub const NARROW_TOKENS: usize = 16;

/// Panels of a block of those.
pub const NARROW_PANELS: usize = 2;

/// Tokens, or slots, of a block on tensor cores that has many.
pub const TENSOR_TOKENS: usize = 64;

/// Tokens of a block of attention on tensor cores, the fewest of one sequence that have one, and the largest head_dim there.
pub const ATTENTION_TILE: usize = 64;
pub const FEWEST_TILED_TOKENS: usize = 17;
pub const MAX_TENSOR_HEAD_DIM: usize = 256;

/// Panels of a block of those.
pub const TENSOR_PANELS: usize = 8;

/// The kinds of formats, by their names, each with kernels of its own, in the order of `EmbedArguments::format`.
pub(super) const KINDS: [&str; 5] = ["f32", "bf16", "f16", "int8", "int4"];

/// A format's place among the kinds.
pub fn kind_of(format: Format) -> usize {
    match format {
        Format::F32 => 0,
        Format::Bf16 => 1,
        Format::F16 => 2,
        Format::Int8(_) => 3,
        Format::Int4(_) => 4,
    }
}

/// The fewest tokens that weights of a kind meet on tensor cores, unless results are to be exact. Before, whole numbers are
/// multiplied four at a time, which keeps up with memory for three tokens; numbers in f32, the better precision, for as many
/// as a tile has.
pub fn fewest_on_tensor_cores(kind: usize) -> usize {
    match KINDS[kind] {
        "int8" | "int4" => 4,
        _ => WIDTHS[WIDTHS.len() - 1] + 1,
    }
}

/// The place among WIDTHS of the narrowest tile that takes `tokens` tokens, or of the widest.
pub fn width_of(tokens: usize) -> usize {
    WIDTHS.iter().position(|width| *width >= tokens).unwrap_or(WIDTHS.len() - 1)
}

/// A kernel that takes an `A`.
pub struct Kernel<A> {
    function: driver::Function,
    #[cfg(feature = "bench")]
    name: Arc<str>,
    threads: u32,
    /// Whether it may be launched while the grid before it runs.
    is_dependent: bool,
    arguments: PhantomData<fn(A)>,
}

impl<A: Copy> Kernel<A> {
    /// Enqueues it.
    ///
    /// # Safety
    /// With these arguments and this grid it reads and writes only memory that may be read and written until the stream has
    /// come past it.
    pub unsafe fn launch(&self, current: &Current, grid: [usize; 3], arguments: &A) -> Result<()> {
        // Counts past it are refused when a pass is made; this would be a defect.
        let size = |count: usize| u32::try_from(count).map_err(|_| Error::new(Status::Internal, "a grid is too large"));
        let grid = [size(grid[0])?, size(grid[1])?, size(grid[2])?];
        // SAFETY: found by its name, which says what it takes; the rest by the caller's promise.
        let launch = || unsafe { current.launch(self.function, grid, self.threads, self.is_dependent, arguments) };
        #[cfg(feature = "bench")]
        let launch = || super::bench::around(current, &self.name, grid, launch);
        launch()
    }
}

/// For each kind of format, and each width.
pub type ByKindAndWidth<A> = [[Kernel<A>; WIDTHS.len()]; KINDS.len()];

/// For each kind of format; there are none for f32.
pub type ByKind<A> = [Option<Kernel<A>>; KINDS.len()];

/// For each kind of format, tiles of few tokens, and tensor cores for up to NARROW_TOKENS and for more.
pub struct Products<A> {
    pub tiled: ByKindAndWidth<A>,
    pub narrow: ByKind<A>,
    pub tensor: ByKind<A>,
}

/// All kernels, loaded onto one device.
pub struct Kernels {
    pub embed: Kernel<EmbedArguments>,
    pub norm: Kernel<NormArguments>,
    pub round_activations: Kernel<RoundArguments>,
    pub matmul: Products<MatmulArguments>,
    pub rotate_and_store: Kernel<RotateArguments>,
    pub attention: Kernel<AttentionArguments>,
    pub attention_merge: Kernel<AttentionArguments>,
    /// For keys and values in bf16, f16 and int8.
    pub attention_tensor: [Kernel<AttentionArguments>; 3],
    pub route: Kernel<RouteArguments>,
    pub group: Kernel<GroupArguments>,
    pub gate_up: Products<ExpertArguments>,
    pub down: Products<ExpertArguments>,
    pub combine: Kernel<CombineArguments>,
    pub log_softmax_at: Kernel<LogSoftmaxArguments>,
    pub select_candidates: Kernel<CandidateArguments>,
    pub merge_candidates: Kernel<CandidateArguments>,
    /// As in `CudaOptions`.
    pub dependent_launch: bool,
    /// Last, so that it is there as long as what was found in it.
    _modules: Modules,
}

// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Loads them: native code, or PTX, which the driver compiles for its device, remembering the result where it can.
    /// `dependent_launch` as in `CudaOptions`.
    pub fn load(device: &Arc<Device>, dependent_launch: bool) -> Result<Kernels> {
        let modules = Modules::load(device, &FILES)?;
        let finder = Finder::new(device, &modules, dependent_launch)?;
        Ok(Kernels {
            embed: finder.find("embed", "embed", 256)?,
            norm: finder.find("norm", "norm", 256)?,
            round_activations: finder.find("round", "round_activations", 256)?,
            matmul: finder.find_products("matmul", "matmul", 128)?,
            rotate_and_store: finder.find("rotate", "rotate_and_store", 256)?,
            attention: finder.find("attention", "attention", 128)?,
            attention_merge: finder.find("attention", "attention_merge", 128)?,
            attention_tensor: [
                finder.find("attention_tensor", "attention_tensor_bf16", 128)?,
                finder.find("attention_tensor", "attention_tensor_f16", 128)?,
                finder.find("attention_tensor", "attention_tensor_int8", 128)?,
            ],
            route: finder.find("route", "route", 256)?,
            group: finder.find("route", "group", 256)?,
            gate_up: finder.find_products("experts", "gate_up", 256)?,
            down: finder.find_products("experts", "down", 128)?,
            combine: finder.find("experts", "combine", 256)?,
            log_softmax_at: finder.find("head", "log_softmax_at", 256)?,
            select_candidates: finder.find("candidates", "select_candidates", 256)?,
            merge_candidates: finder.find("candidates", "merge_candidates", 1024)?,
            dependent_launch,
            _modules: modules,
        })
    }
}

/// Code on a device, unloaded when it is dropped.
pub(super) struct Modules {
    device: Arc<Device>,
    target: Target,
    files: &'static [Code],
    /// As `files`.
    loaded: Vec<driver::Module>,
}

impl Modules {
    /// Native code where there is some and the driver takes it, else PTX.
    pub fn load(device: &Arc<Device>, files: &'static [Code]) -> Result<Modules> {
        if let Some(native) = Target::native(device.capability()) {
            match Modules::load_for(device, files, native) {
                Err(error) if matches!(error.status(), Status::DeviceFailed | Status::DriverTooOld) => {}
                loaded => return loaded,
            }
        }
        Modules::load_for(device, files, Target::Ptx)
    }

    fn load_for(device: &Arc<Device>, files: &'static [Code], target: Target) -> Result<Modules> {
        let loaded = try_with_capacity("the kernels", files.len())?;
        let mut modules = Modules { device: Arc::clone(device), target, files, loaded };
        let current = device.enter()?;
        for code in files {
            modules.loaded.push(current.load_module(&code.image(target)?)?);
        }
        Ok(modules)
    }
}

impl Drop for Modules {
    fn drop(&mut self) {
        if let Some(current) = self.device.enter_to_free() {
            // SAFETY: their functions are in the same struct, or were given up before.
            self.loaded.drain(..).for_each(|module| unsafe { current.unload_module(module) });
        }
    }
}

/// Looks kernels up.
pub(super) struct Finder<'a> {
    current: Current<'a>,
    files: &'static [Code],
    /// As `files`.
    modules: Vec<driver::Module>,
    /// As in `Kernel`.
    is_dependent: bool,
}

impl<'a> Finder<'a> {
    /// Among modules of a device; `dependent_launch` as in `CudaOptions`.
    pub fn new(device: &'a Device, modules: &Modules, dependent_launch: bool) -> Result<Finder<'a>> {
        let current = device.enter()?;
        let is_dependent = dependent_launch && modules.target == Target::Sm90a && current.has_dependent_launch()?;
        Ok(Finder { current, files: modules.files, modules: modules.loaded.clone(), is_dependent })
    }

    pub fn find<A>(&self, file: &str, name: &str, threads: u32) -> Result<Kernel<A>> {
        let missing = || Error::new(Status::Internal, format!("there is no kernel \"{name}\" in \"{file}\""));
        let text = CString::new(name).map_err(|_| missing())?;
        let of_file = self.files.iter().position(|code| code.name == file).ok_or_else(missing)?;
        // SAFETY: a module of this device.
        let function = unsafe { self.current.function(self.modules[of_file], &text) }?;
        let function = function.ok_or_else(missing)?;
        Ok(Kernel {
            function,
            #[cfg(feature = "bench")]
            name: name.into(),
            threads,
            is_dependent: self.is_dependent,
            arguments: PhantomData,
        })
    }

    /// Those of a file and of its likes for tensor cores; for many tokens they have blocks of `threads` threads.
    fn find_products<A>(&self, file: &str, name: &str, threads: u32) -> Result<Products<A>> {
        let on_tensor_cores = |variant: &str, threads| {
            let mut found = try_with_capacity("the kernels", KINDS.len())?;
            for kind in KINDS {
                let find = || self.find(&format!("{file}_{variant}"), &format!("{name}_{variant}_{kind}"), threads);
                found.push(if kind == "f32" { None } else { Some(find()?) });
            }
            array(found)
        };
        Ok(Products {
            tiled: self.find_all(file, name)?,
            narrow: on_tensor_cores("narrow", 256)?,
            tensor: on_tensor_cores("tensor", threads)?,
        })
    }

    /// One for each kind of format.
    pub fn find_kinds<A>(&self, file: &str, name: &str, threads: u32) -> Result<[Kernel<A>; KINDS.len()]> {
        let mut found = try_with_capacity("the kernels", KINDS.len())?;
        for kind in KINDS {
            found.push(self.find(file, &format!("{name}_{kind}"), threads)?);
        }
        array(found)
    }

    fn find_all<A>(&self, file: &str, name: &str) -> Result<ByKindAndWidth<A>> {
        let mut found = try_with_capacity("the kernels", KINDS.len())?;
        for kind in KINDS {
            let mut of_kind = try_with_capacity("the kernels", WIDTHS.len())?;
            for width in WIDTHS {
                of_kind.push(self.find(file, &format!("{name}_{kind}_{width}"), 128)?);
            }
            found.push(array(of_kind)?);
        }
        array(found)
    }
}

fn array<T, const N: usize>(vector: Vec<T>) -> Result<[T; N]> {
    vector.try_into().map_err(|_| Error::new(Status::Internal, "a table of kernels has gaps"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_the_narrowest_that_takes_all_tokens_and_the_widest_for_more() {
        let widths = [1, 2, 3, 4, 5, 8, 9, 1000].map(|tokens| WIDTHS[width_of(tokens)]);
        assert_eq!(widths, [1, 2, 4, 4, 8, 8, 8, 8]);
    }

    #[test]
    fn tensor_cores_come_in_where_tiles_end() {
        assert_eq!([0, 1, 2, 3, 4].map(fewest_on_tensor_cores), [9, 9, 9, 4, 4]);
    }

    #[test]
    fn formats_are_the_kinds_of_their_names() {
        for format in [Format::F32, Format::Bf16, Format::F16, Format::INT8, Format::INT4] {
            assert_eq!(KINDS[kind_of(format)], format.name());
        }
    }
}
