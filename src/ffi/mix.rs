//! `gemmoe_mix`: a GemMoE being mixed on a thread of its own, to be polled and cancelled.

use std::ffi::c_char;
use std::path::PathBuf;
use std::sync::Arc;

use super::arguments::{Out, path, text};
use super::error::GemmoeError;
use super::guard::{guard, guard_status};
use super::handles::{self, Held, Object};
use super::job::Job;
use super::load::GemmoeLoadProgress;
use super::structs::{self, Versioned, check_reserved};
use crate::error::{Error, Result, Status};
use crate::mix::{self, MixOptions, Recipe};

/// gemmoe_mix_options.flags: follow symbolic links inside the models' directories, as a download cache's layout needs. Without
/// it links are refused.
pub const GEMMOE_MIX_FOLLOW_LINKS: u32 = 1;

/// How to mix, beside the recipe; the result does not depend on it. Initialise with GEMMOE_MIX_OPTIONS_INIT; zeros are the
/// defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeMixOptions {
    /// sizeof(gemmoe_mix_options)
    pub struct_size: u32,
    /// GEMMOE_MIX_ flags.
    pub flags: u32,
    /// Threads that quantise and run the base for routers; 0 is one per core the process may use, at most 256.
    pub threads: u32,
    /// Must be 0.
    pub reserved0: u32,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, four u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeMixOptions {
    const NAME: &'static str = "gemmoe_mix_options";
    const FIRST_SIZE: usize = 48;
}

/// What a recipe makes. Initialise with GEMMOE_MIX_PLAN_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeMixPlan {
    /// sizeof(gemmoe_mix_plan)
    pub struct_size: u32,
    /// Experts of each layer.
    pub num_local_experts: u32,
    /// Experts each token is sent to.
    pub num_experts_per_tok: u32,
    /// 0.
    pub reserved0: u32,
    /// Parameters of the mixture.
    pub parameters: u64,
    /// Parameters one token meets.
    pub active_parameters: u64,
    /// Bytes of tensors that are read.
    pub bytes_read: u64,
    /// Bytes of tensors that are written.
    pub bytes_written: u64,
    /// Bytes of the dense mean that is written beside the target for a while, where routers need it run; 0 without.
    pub scratch_bytes: u64,
    /// 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, four u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeMixPlan {
    const NAME: &'static str = "gemmoe_mix_plan";
    const FIRST_SIZE: usize = 88;
}

/// A GemMoE being mixed.
pub struct GemmoeMix {
    _opaque: (),
}

pub struct MixObject {
    job: Job<()>,
}

impl Held for MixObject {
    type Opaque = GemmoeMix;
    const KIND: usize = 7;
    const NAME: &'static str = "gemmoe_mix";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Mix(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Mix(object) = object { Some(object) } else { None }
    }
}

impl GemmoeMixOptions {
    fn resolve(&self) -> Result<MixOptions> {
        check_reserved(&[self.reserved0 as u64], "options")?;
        check_reserved(&self.reserved, "options")?;
        if self.flags & !GEMMOE_MIX_FOLLOW_LINKS != 0 {
            let text = format!("options.flags is {}, expected a sum of GEMMOE_MIX_ flags", self.flags);
            return Err(Error::new(Status::InvalidArgument, text).at_key("flags"));
        }
        let threads = self.threads as usize;
        crate::backend::cpu::ThreadOptions::from(threads).check()?;
        Ok(MixOptions { threads, follow_links: self.flags & GEMMOE_MIX_FOLLOW_LINKS != 0 })
    }
}

/// What the functions that take a recipe have in common.
struct Arguments {
    recipe: Recipe,
    target: PathBuf,
    options: MixOptions,
}

impl Arguments {
    /// # Safety
    /// Pointers are NULL or good for what the functions say.
    unsafe fn read(
        recipe: *const c_char,
        recipe_bytes: usize,
        directory: *const c_char,
        target: *const c_char,
        options: *const GemmoeMixOptions,
    ) -> Result<Arguments> {
        // SAFETY: the caller's promises.
        unsafe {
            let recipe = text(recipe, recipe_bytes, "recipe")?;
            let directory = path(directory, "directory")?;
            let target = path(target, "target")?;
            let options = structs::read(options, "options")?.resolve()?;
            Ok(Arguments { recipe: Recipe::parse(recipe, "recipe", &directory)?, target, options })
        }
    }
}

/// Checks everything but the weights' numbers and tells what a recipe makes; writes nothing. The arguments are those of
/// gemmoe_mix_start; it takes as long as reading the models' headers and tokenizers does.
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, INVALID_UTF8, and those of gemmoe_mix_wait. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_mix_check(
    recipe: *const c_char,
    recipe_bytes: usize,
    directory: *const c_char,
    target: *const c_char,
    options: *const GemmoeMixOptions,
    plan_out: *mut GemmoeMixPlan,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            if plan_out.is_null() {
                return Err(Error::new(Status::NullArgument, "plan_out is NULL").at_key("plan_out"));
            }
            let Arguments { recipe, target, options } =
                Arguments::read(recipe, recipe_bytes, directory, target, options)?;
            let plan = mix::check(&recipe, &target, &options)?;
            let plan = GemmoeMixPlan {
                struct_size: 0,
                num_local_experts: plan.config.num_local_experts as u32,
                num_experts_per_tok: plan.config.num_experts_per_tok as u32,
                reserved0: 0,
                parameters: plan.parameters,
                active_parameters: plan.active_parameters,
                bytes_read: plan.bytes_read,
                bytes_written: plan.bytes_written,
                scratch_bytes: plan.scratch_bytes,
                reserved: [0; 4],
            };
            structs::write(plan_out, &plan, "plan_out")
        })
    }
}

/// Starts mixing and returns at once. `recipe` is the text of a recipe, TOML of `recipe_bytes` bytes, as docs/mix.md describes it;
/// relative paths in it begin at `directory`. `target` is the directory to write, which must not be there or be empty. Both are
/// NUL-terminated paths; `options` may be NULL. The mix is owned by the host and runs on a thread of its own.
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, INVALID_UTF8, RECIPE_SYNTAX, RECIPE_VALUE, FILE_TOO_LARGE (a recipe of more
/// than 1 MiB), THREAD_UNAVAILABLE; what is wrong with the models comes from gemmoe_mix_wait. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_mix_start(
    recipe: *const c_char,
    recipe_bytes: usize,
    directory: *const c_char,
    target: *const c_char,
    options: *const GemmoeMixOptions,
    mix_out: *mut *mut GemmoeMix,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let mix_out = Out::new(mix_out, "mix_out")?;
            let Arguments { recipe, target, options } =
                Arguments::read(recipe, recipe_bytes, directory, target, options)?;
            let job =
                Job::start("gemmoe-mix", move |progress| mix::mix(&recipe, &target, &options, progress).map(drop))?;
            mix_out.set(handles::insert(MixObject { job })?);
            Ok(())
        })
    }
}

/// How far the mix has come, as that of a load: bytes of the models' weights, which are counted from 0 again where a model is
/// written, loaded or run for the routers before. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread, never blocks.
/// Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_mix_poll(
    mix: *const GemmoeMix,
    progress_out: *mut GemmoeLoadProgress,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let progress = handles::find::<MixObject>(mix, "mix")?.job.progress();
            structs::write(progress_out, &progress, "progress_out")
        })
    }
}

/// Asks the mix to stop: gemmoe_mix_wait then returns CANCELLED, within the time that a tensor's 16 MiB, or 50 milliseconds of
/// running a model, take, and nothing of the target is left.
/// Errors: handle errors. Any thread, never blocks. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_mix_cancel(mix: *const GemmoeMix) -> Status {
    guard_status(|| {
        handles::find::<MixObject>(mix, "mix")?.job.cancel();
        Ok(())
    })
}

/// Waits for the mix; with OK the target is a model directory. Its outcome is told once. The mix stays to be destroyed.
/// Errors: handle errors, BUSY (another thread waits), INVALID_ARGUMENT (its outcome was told before, or the target is a mount
/// point), CANCELLED, RECIPE_VALUE, MODELS_DIFFER, WRITE_FAILED, DISK_FULL, ALREADY_EXISTS, TENSOR_VALUE, NOT_A_NUMBER, and everything
/// that can be wrong with a model directory: codes 20 to 64, OUT_OF_MEMORY. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_mix_wait(mix: *mut GemmoeMix, error_out: *mut *mut GemmoeError) -> Status {
    // SAFETY: the caller's promises.
    unsafe { guard(error_out, || handles::find::<MixObject>(mix, "mix")?.job.wait("mix")) }
}

/// Destroys a mix, stopping it if it still runs; what it has finished stays. NULL is nothing.
/// Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_mix_destroy(mix: *mut GemmoeMix) -> Status {
    guard_status(|| handles::remove::<MixObject>(mix, "mix"))
}
