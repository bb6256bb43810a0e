//! `gemmoe_load`: a model being loaded on a thread of its own, to be polled and cancelled.

use std::ffi::{c_char, c_void};
use std::ptr::NonNull;
use std::sync::Arc;

use super::arguments::{Out, path};
use super::error::GemmoeError;
use super::guard::{guard, guard_status};
use super::handles::{self, Held, Object};
use super::job::Job;
use super::model::{GemmoeModel, ModelObject};
use super::structs::{self, Versioned, check_reserved};
use crate::backend::cpu::kernels::Instructions;
use crate::backend::cpu::{CpuOptions, ParallelFor, Priority, ThreadOptions};
use crate::backend::{Device, LentContext, Variants};
use crate::engine::{LoadOptions, Model};
use crate::error::{Error, Result, Status};
use crate::model::{Formats, Progress};
use crate::quant::{BLOCK, Format, Groups, ScaleDtype};

/// gemmoe_load_options.flags: follow symbolic links inside the model directory, as a download cache's layout needs.
/// Without it links are refused.
pub const GEMMOE_LOAD_FOLLOW_LINKS: u32 = 1;
/// gemmoe_load_options.flags: multiply the embedding by the unrounded square root of hidden_size.
pub const GEMMOE_LOAD_UNROUNDED_EMBEDDING_SCALE: u32 = 2;
/// gemmoe_load_options.flags: GeLU by its definition instead of the tanh approximation GemMoE was trained with.
pub const GEMMOE_LOAD_EXACT_GELU: u32 = 4;
/// gemmoe_load_options.flags: keep each of the library's own threads on a processor of its own, among those the loading
/// thread may use; one of them is left to the calling thread, which is never pinned. INVALID_ARGUMENT where there are fewer
/// processors than threads, and on systems that cannot (all but Linux).
pub const GEMMOE_LOAD_PIN_THREADS: u32 = 8;
/// gemmoe_load_options.flags: map the matrices of a directory that `gemmoe quantize` wrote instead of reading them. Loading
/// leaves out the copy and processes share the memory, but weights are read from the disk when they are first needed. The files must not change as long as the model, or a session of it, lives: whoever changes them changes
/// results, and whoever cuts them off kills this process. What is stored row by row is read as ever.
pub const GEMMOE_LOAD_MAP: u32 = 16;
/// gemmoe_load_options.flags: on a GPU, give a sequence the same bits whatever else is in its batch and however its prompt is cut.
/// Batches of more than 8 tokens, 3 with int8 or int4 weights, prompts above all, then do without tensor cores, which round
/// activations to the dtype of the weights, and in attention to that of keys and values. On the CPU it is always so.
pub const GEMMOE_LOAD_EXACT: u32 = 32;

/// gemmoe_load_options.instructions: the best instruction set the processor has.
pub const GEMMOE_INSTRUCTIONS_DETECT: u32 = 0;
/// gemmoe_load_options.instructions: no special instructions.
pub const GEMMOE_INSTRUCTIONS_PORTABLE: u32 = 1;
/// gemmoe_load_options.instructions: AVX2, FMA and F16C; INVALID_ARGUMENT where the processor lacks them.
pub const GEMMOE_INSTRUCTIONS_AVX2: u32 = 2;
/// gemmoe_load_options.instructions: AVX2 and AVX-VNNI; INVALID_ARGUMENT as above.
pub const GEMMOE_INSTRUCTIONS_AVX_VNNI: u32 = 3;
/// gemmoe_load_options.instructions: AVX-512 with F, BW, DQ, VL and VNNI; INVALID_ARGUMENT as above. Where the processor has
/// AVX-512 BF16 too, activations are rounded to bf16 before they meet bf16 weights, which is twice as fast in prefill; the others
/// keep them in f32.
pub const GEMMOE_INSTRUCTIONS_AVX512: u32 = 4;

/// gemmoe_load_options.device: the CPU. Later versions may choose a GPU where there is one.
pub const GEMMOE_DEVICE_DEFAULT: u32 = 0;
/// gemmoe_load_options.device: the CPU.
pub const GEMMOE_DEVICE_CPU: u32 = 1;
/// gemmoe_load_options.device: the NVIDIA GPU number device_index; NO_DEVICE where there is no such.
pub const GEMMOE_DEVICE_CUDA: u32 = 2;
/// gemmoe_load_options.device: the GPU with most free memory if the weights and a session of default options fit there, else
/// the CPU.
pub const GEMMOE_DEVICE_AUTO: u32 = 3;

/// gemmoe_load_options.priority: the library's own threads have that of the loading thread.
pub const GEMMOE_PRIORITY_NORMAL: u32 = 0;
/// gemmoe_load_options.priority: a nice value higher by 5; a quarter of the processor time where they compete with others of the
/// host. INVALID_ARGUMENT on systems without priorities of single threads (all but Linux).
pub const GEMMOE_PRIORITY_LOW: u32 = 1;
/// gemmoe_load_options.priority: the nice value 19; what others leave. INVALID_ARGUMENT as above.
pub const GEMMOE_PRIORITY_LOWEST: u32 = 2;

/// Formats of weights: as they are stored; in gemmoe_model_info, of several formats.
pub const GEMMOE_FORMAT_AS_STORED: u32 = 0;
/// Formats of weights, in gemmoe_model_info: bfloat16.
pub const GEMMOE_FORMAT_BF16: u32 = 1;
/// Formats of weights, in gemmoe_model_info: half precision.
pub const GEMMOE_FORMAT_F16: u32 = 2;
/// Formats of weights, in gemmoe_model_info: single precision.
pub const GEMMOE_FORMAT_F32: u32 = 3;
/// Formats of weights: whole numbers of 4 bits with a bf16 scale for each 32 of a row, unless one of the flags below is
/// added. 4.5 bits a weight.
pub const GEMMOE_FORMAT_INT4: u32 = 4;
/// Formats of weights: the same with 8 bits. 8.5 bits a weight.
pub const GEMMOE_FORMAT_INT8: u32 = 8;
/// Added to GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8: a scale for each 64.
pub const GEMMOE_FORMAT_GROUP_64: u32 = 0x100;
/// Added to GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8: a scale for each 128.
pub const GEMMOE_FORMAT_GROUP_128: u32 = 0x200;
/// Added to GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8: scales in half precision.
pub const GEMMOE_FORMAT_SCALES_F16: u32 = 0x1000;

/// gemmoe_load_progress.state: still loading.
pub const GEMMOE_LOAD_RUNNING: u32 = 0;
/// gemmoe_load_progress.state: over; gemmoe_load_wait returns at once.
pub const GEMMOE_LOAD_OVER: u32 = 1;

/// What a gemmoe_parallel_for calls, with the task_context it was given and an index below its count. It returns soon when
/// there is nothing left to do, and never unwinds.
pub type GemmoeTask = unsafe extern "C" fn(task_context: *mut c_void, index: u32);

/// A host's way to spread work over threads of its own: calls `task` once with `task_context` and each index below `count`, from
/// any threads, at the same time or one after the other, and returns when all calls have returned. One after the other
/// works, and is as slow as one thread.
///
/// It is called from whatever thread computes with the model, many times per token, with a count of 2 to
/// gemmoe_load_options.threads; it must not unwind, longjmp or block on another call of this library. Results are those of
/// the library's own threads, to the last bit. While one call of the library is in it, others with the same model compute on
/// their own threads alone: calls of the library may run on the threads that run tasks.
///
/// A task takes part in whatever is left to do, so mistakes are harmless: what was not called the calling thread does itself;
/// a wrong or repeated index does nothing; a call that still runs when this function returns is waited for; one that begins
/// later does nothing, or helps with the work then at hand, also when the model is gone, as long as the library is there.
pub type GemmoeParallelFor =
    Option<unsafe extern "C" fn(context: *mut c_void, count: u32, task: GemmoeTask, task_context: *mut c_void)>;

/// How to load a model. Initialise with GEMMOE_LOAD_OPTIONS_INIT; zeros are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeLoadOptions {
    /// sizeof(gemmoe_load_options)
    pub struct_size: u32,
    /// GEMMOE_LOAD_ flags.
    pub flags: u32,
    /// Threads that compute, the calling one included; 0 is one per core the process may use, at most 256. With a
    /// parallel_for, the most tasks of one call of it; with 1 it is never called.
    pub threads: u32,
    /// One of GEMMOE_INSTRUCTIONS_.
    pub instructions: u32,
    /// Most bytes of keys and values that all sessions of the model hold together; 0 is no limit.
    pub kv_limit_bytes: u64,
    /// One of GEMMOE_PRIORITY_.
    pub priority: u32,
    /// Microseconds that an idle thread of the library spins before it sleeps; 0 is 50. One that sleeps takes tens of
    /// microseconds to wake.
    pub spin_us: u32,
    /// The host's own threads instead of the library's, which then starts none; NULL is the library's. With it,
    /// GEMMOE_LOAD_PIN_THREADS, priority and spin_us must be 0. Called as long as the model, or a session of it, lives.
    pub parallel_for: GemmoeParallelFor,
    /// What parallel_for is called with. Must be usable from any thread.
    pub parallel_for_context: *mut c_void,
    /// What the experts are rounded to while they are loaded: GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8 with flags, or 0: as
    /// they are stored. Weights that `gemmoe quantize` rounded stay in their format: another is INVALID_ARGUMENT.
    pub experts_format: u32,
    /// The same for queries, keys, values and output projections.
    pub attention_format: u32,
    /// The same for the head, and for the embedding where that is the head.
    pub head_format: u32,
    /// The same for the embedding. An embedding that is the head is held twice where the two have formats that differ; where one
    /// of them is 0 both have the other's.
    pub embedding_format: u32,
    /// One of GEMMOE_DEVICE_.
    pub device: u32,
    /// Which GPU, below what gemmoe_device_count says; 0 unless device is GEMMOE_DEVICE_CUDA.
    pub device_index: u32,
    /// On a GPU, most bytes of its memory that weights take; 0 is no limit. Experts that do not fit stay in host memory: for up
    /// to 16 tokens at a time they are computed by `threads` on the CPU, for more, and with GEMMOE_LOAD_EXACT always, they are
    /// copied to the GPU each time they are needed, through buffers that the limit counts. Keys, values and workspaces of
    /// sessions are not counted: gemmoe_plan_memory tells them, and what goes where. Below the least that the model
    /// takes, which the error names, INVALID_ARGUMENT, or with GEMMOE_DEVICE_AUTO the CPU. gemmoe_model_set_device_memory_limit
    /// changes it later.
    pub device_memory_limit: u64,
    /// A CUcontext of the host's for the model to use on a GPU instead of the device's primary context; NULL is that one.
    /// device must be GEMMOE_DEVICE_CUDA, and device_index that of the context's device, or 0. The host keeps the context,
    /// which is neither retained nor destroyed here, until the model and its sessions and batches are destroyed. Where it
    /// does not, calls with them fail, and destroying them is safe, as far as the driver tells contexts that are gone.
    /// Kernels take at most 48 KiB of shared memory, all of it static, so they run beside any renderer without a setting.
    pub cuda_context: *mut c_void,
    /// A CUstream of cuda_context, kept as that is, onto which all work of the model goes in order; NULL gives each session
    /// and batch a stream of its own in the context. Calls still wait for their own work before they return. Sessions on
    /// several threads are as correct with it as without, but wait for each other, and for whatever else the host puts
    /// there. It must not be capturing during a call. A stream without a context is INVALID_ARGUMENT.
    pub cuda_stream: *mut c_void,
    /// Must be 0.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size; even numbers of u32 and of pointers before u64s leave no padding; numbers, and
// pointers that may be NULL.
unsafe impl Versioned for GemmoeLoadOptions {
    const NAME: &'static str = "gemmoe_load_options";
    const FIRST_SIZE: usize = 96 + 4 * size_of::<usize>();
}

/// How far a load has come. Initialise with GEMMOE_LOAD_PROGRESS_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeLoadProgress {
    /// sizeof(gemmoe_load_progress)
    pub struct_size: u32,
    /// GEMMOE_LOAD_RUNNING or GEMMOE_LOAD_OVER.
    pub state: u32,
    /// Bytes of weights to read; 0 until the files have been checked.
    pub bytes_total: u64,
    /// Bytes of weights read.
    pub bytes_read: u64,
}

// SAFETY: repr(C), begins with struct_size, two u32 then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeLoadProgress {
    const NAME: &'static str = "gemmoe_load_progress";
    const FIRST_SIZE: usize = 24;
}

/// A model being loaded.
pub struct GemmoeLoad {
    _opaque: (),
}

pub struct LoadObject {
    job: Job<Arc<Model>>,
}

impl Held for LoadObject {
    type Opaque = GemmoeLoad;
    const KIND: usize = 9;
    const NAME: &'static str = "gemmoe_load";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Load(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Load(object) = object { Some(object) } else { None }
    }
}

impl GemmoeLoadOptions {
    /// What the fields say, checked. Their pointers are the host's promise.
    pub fn resolve(&self) -> Result<LoadOptions> {
        check_reserved(&self.reserved, "options")?;
        let invalid = |key: &str, found: u32, expected: &str| {
            let text = format!("options.{key} is {found}, expected {expected}");
            Err(Error::new(Status::InvalidArgument, text).at_key(key))
        };
        let known = GEMMOE_LOAD_FOLLOW_LINKS
            | GEMMOE_LOAD_UNROUNDED_EMBEDDING_SCALE
            | GEMMOE_LOAD_EXACT_GELU
            | GEMMOE_LOAD_PIN_THREADS
            | GEMMOE_LOAD_MAP
            | GEMMOE_LOAD_EXACT;
        if self.flags & !known != 0 {
            return invalid("flags", self.flags, "a sum of GEMMOE_LOAD_ flags");
        }
        let instructions = match self.instructions {
            GEMMOE_INSTRUCTIONS_DETECT => Instructions::Detect,
            GEMMOE_INSTRUCTIONS_PORTABLE => Instructions::Portable,
            GEMMOE_INSTRUCTIONS_AVX2 => Instructions::Avx2,
            GEMMOE_INSTRUCTIONS_AVX_VNNI => Instructions::AvxVnni,
            GEMMOE_INSTRUCTIONS_AVX512 => Instructions::Avx512,
            other => return invalid("instructions", other, "one of GEMMOE_INSTRUCTIONS_"),
        };
        let priority = match self.priority {
            GEMMOE_PRIORITY_NORMAL => Priority::Normal,
            GEMMOE_PRIORITY_LOW => Priority::Low,
            GEMMOE_PRIORITY_LOWEST => Priority::Lowest,
            other => return invalid("priority", other, "one of GEMMOE_PRIORITY_"),
        };
        // SAFETY: the host's promises about the field.
        let parallel_for = |function| unsafe { ParallelFor::new(function, self.parallel_for_context) };
        let threads = ThreadOptions {
            count: self.threads as usize,
            pin: self.flags & GEMMOE_LOAD_PIN_THREADS != 0,
            spin_us: self.spin_us,
            priority,
            parallel_for: self.parallel_for.map(parallel_for),
        };
        let device = match self.device {
            GEMMOE_DEVICE_DEFAULT | GEMMOE_DEVICE_CPU => Device::Cpu,
            GEMMOE_DEVICE_CUDA => Device::Cuda(self.device_index as usize),
            GEMMOE_DEVICE_AUTO => Device::Auto,
            other => return invalid("device", other, "one of GEMMOE_DEVICE_"),
        };
        if self.device_index != 0 && self.device != GEMMOE_DEVICE_CUDA {
            return invalid("device_index", self.device_index, "0 unless options.device is GEMMOE_DEVICE_CUDA");
        }
        // SAFETY: the host's promises about the two fields.
        let lend = |context| unsafe { LentContext::new(context, NonNull::new(self.cuda_stream)) };
        let cuda_context = NonNull::new(self.cuda_context).map(lend);
        if cuda_context.is_none() && !self.cuda_stream.is_null() {
            let text = "options.cuda_stream is given without options.cuda_context, the context it is of";
            return Err(Error::new(Status::InvalidArgument, text).at_key("cuda_stream"));
        }
        let cpu = CpuOptions { threads, instructions };
        let variants = Variants {
            unrounded_embedding_scale: self.flags & GEMMOE_LOAD_UNROUNDED_EMBEDDING_SCALE != 0,
            exact_gelu: self.flags & GEMMOE_LOAD_EXACT_GELU != 0,
        };
        let kv_limit_bytes = usize::try_from(self.kv_limit_bytes).unwrap_or(usize::MAX);
        let follow_links = self.flags & GEMMOE_LOAD_FOLLOW_LINKS != 0;
        let map = self.flags & GEMMOE_LOAD_MAP != 0;
        let exact = self.flags & GEMMOE_LOAD_EXACT != 0;
        let formats = Formats {
            experts: format("experts_format", self.experts_format)?,
            attention: format("attention_format", self.attention_format)?,
            head: format("head_format", self.head_format)?,
            embedding: format("embedding_format", self.embedding_format)?,
        };
        let options = LoadOptions {
            device,
            cuda_context,
            cpu,
            variants,
            exact,
            formats,
            follow_links,
            map,
            kv_limit_bytes,
            device_memory_limit: self.device_memory_limit,
        };
        options.check()?;
        Ok(options)
    }
}

/// A format that weights can be rounded to while they are loaded.
fn format(key: &str, constant: u32) -> Result<Option<Format>> {
    const GROUPS: u32 = GEMMOE_FORMAT_GROUP_64 | GEMMOE_FORMAT_GROUP_128;
    let size = match constant & GROUPS {
        0 => Some(BLOCK),
        GEMMOE_FORMAT_GROUP_64 => Some(64),
        GEMMOE_FORMAT_GROUP_128 => Some(128),
        _ => None,
    };
    let scales = if constant & GEMMOE_FORMAT_SCALES_F16 == 0 { ScaleDtype::Bf16 } else { ScaleDtype::F16 };
    match (constant, constant & !(GROUPS | GEMMOE_FORMAT_SCALES_F16), size) {
        (GEMMOE_FORMAT_AS_STORED, ..) => Ok(None),
        (_, GEMMOE_FORMAT_INT4, Some(size)) => Ok(Some(Format::Int4(Groups { size, scales }))),
        (_, GEMMOE_FORMAT_INT8, Some(size)) => Ok(Some(Format::Int8(Groups { size, scales }))),
        _ => {
            let text = format!(
                "options.{key} is {constant:#x}, expected 0, GEMMOE_FORMAT_INT4 or GEMMOE_FORMAT_INT8 with flags"
            );
            Err(Error::new(Status::InvalidArgument, text).at_key(key))
        }
    }
}

/// The constant of what a part is held in.
pub(super) fn format_constant(format: Option<Format>) -> u32 {
    let flags = |groups: Groups| {
        let size = match groups.size {
            64 => GEMMOE_FORMAT_GROUP_64,
            128 => GEMMOE_FORMAT_GROUP_128,
            _ => 0,
        };
        size | if groups.scales == ScaleDtype::F16 { GEMMOE_FORMAT_SCALES_F16 } else { 0 }
    };
    match format {
        None => GEMMOE_FORMAT_AS_STORED,
        Some(Format::Bf16) => GEMMOE_FORMAT_BF16,
        Some(Format::F16) => GEMMOE_FORMAT_F16,
        Some(Format::F32) => GEMMOE_FORMAT_F32,
        Some(Format::Int4(groups)) => GEMMOE_FORMAT_INT4 | flags(groups),
        Some(Format::Int8(groups)) => GEMMOE_FORMAT_INT8 | flags(groups),
    }
}

/// Starts loading a model directory and returns at once. `directory` is a NUL-terminated path, `options` may be NULL.
/// The load is owned by the host and runs on a thread of its own.
/// Errors: NULL_ARGUMENT, STRUCT_SIZE, INVALID_ARGUMENT, THREAD_UNAVAILABLE; what is wrong with the directory comes from
/// gemmoe_load_wait. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_load_start(
    directory: *const c_char,
    options: *const GemmoeLoadOptions,
    load_out: *mut *mut GemmoeLoad,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let directory = path(directory, "directory")?;
            let options = structs::read(options, "options")?.resolve()?;
            let load_out = Out::new(load_out, "load_out")?;
            let job = Job::start("gemmoe-load", move |progress| Model::load(&directory, &options, progress))?;
            load_out.set(handles::insert(LoadObject { job })?);
            Ok(())
        })
    }
}

/// How far the load has come. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread, never blocks. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_load_poll(
    load: *const GemmoeLoad,
    progress_out: *mut GemmoeLoadProgress,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let progress = handles::find::<LoadObject>(load, "load")?.job.progress();
            structs::write(progress_out, &progress, "progress_out")
        })
    }
}

/// Asks the load to stop: gemmoe_load_wait then returns CANCELLED when each thread has done its chunk of 1 MiB, or of 16 rows
/// where those are more.
/// Errors: handle errors. Any thread, never blocks. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_load_cancel(load: *const GemmoeLoad) -> Status {
    guard_status(|| {
        handles::find::<LoadObject>(load, "load")?.job.cancel();
        Ok(())
    })
}

/// Waits for the load and hands the model over, once; the host owns it. The load stays to be destroyed.
/// Errors: handle errors, BUSY (another thread waits), INVALID_ARGUMENT (the model was handed over before, or a format was
/// asked for that its weights are not stored in), CANCELLED, THREAD_UNAVAILABLE (a thread that computes could not be started),
/// and everything that can be wrong with a model directory: codes 20 to 62, OUT_OF_MEMORY. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_load_wait(
    load: *mut GemmoeLoad,
    model_out: *mut *mut GemmoeModel,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let load = handles::find::<LoadObject>(load, "load")?;
            let model_out = Out::new(model_out, "model_out")?;
            let model = load.job.wait("load")?;
            model_out.set(handles::insert(ModelObject::new(model))?);
            Ok(())
        })
    }
}

/// Destroys a load, stopping it if it still runs. A model it handed over lives on. NULL is nothing.
/// Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_load_destroy(load: *mut GemmoeLoad) -> Status {
    guard_status(|| handles::remove::<LoadObject>(load, "load"))
}

/// Loads a model directory and returns when it is loaded: gemmoe_load_start and gemmoe_load_wait in one.
/// Errors: as those two. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said at those two.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_load(
    directory: *const c_char,
    options: *const GemmoeLoadOptions,
    model_out: *mut *mut GemmoeModel,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let directory = path(directory, "directory")?;
            let options = structs::read(options, "options")?.resolve()?;
            let model_out = Out::new(model_out, "model_out")?;
            let model = Model::load(&directory, &options, &Progress::default())?;
            model_out.set(handles::insert(ModelObject::new(model))?);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_a_constant_of_its_own_and_comes_back_from_it() {
        let mut constants = Vec::new();
        for base in [GEMMOE_FORMAT_INT4, GEMMOE_FORMAT_INT8] {
            for group in [0, GEMMOE_FORMAT_GROUP_64, GEMMOE_FORMAT_GROUP_128] {
                constants.extend([0, GEMMOE_FORMAT_SCALES_F16].map(|scales| base | group | scales));
            }
        }
        for constant in &constants {
            let read = format("head_format", *constant).unwrap();
            assert_eq!(format_constant(read), *constant);
        }
        assert_eq!(format("head_format", 0), Ok(None));
        for wrong in [1, 2, 3, 5, 12, 0x104 | 0x200, 0x100, 0x1000, 0x10000 | 4, u32::MAX] {
            let error = format("head_format", wrong).unwrap_err();
            assert_eq!((error.status(), error.key()), (Status::InvalidArgument, Some("head_format")), "{wrong:#x}");
        }
    }
}
