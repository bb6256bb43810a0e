//! `gemmoe_model`: weights and tokenizer, immutable but for what a router patch replaces, shared by any number of sessions and threads.

use std::ffi::c_char;
use std::sync::Arc;

use super::arguments::{Out, copy_out};
use super::error::GemmoeError;
use super::guard::{Poison, guard, guard_status};
use super::handles::{self, Held, Object};
use super::load::format_constant;
use super::structs::{self, Versioned};
use crate::backend::kv::KvGeometry;
use crate::engine::Model;
use crate::error::{Result, Status};

/// A loaded model. Any number of threads may use it at once. Sessions keep what they need of it alive.
pub struct GemmoeModel {
    _opaque: (),
}

pub struct ModelObject {
    model: Arc<Model>,
    poison: Poison,
}

impl ModelObject {
    pub fn new(model: Arc<Model>) -> Self {
        ModelObject { model, poison: Poison::default() }
    }

    /// Uses the model; a panic in `body` poisons it.
    pub fn with<T>(&self, body: impl FnOnce(&Arc<Model>) -> Result<T>) -> Result<T> {
        self.poison.watch(|| body(&self.model))
    }
}

impl Held for ModelObject {
    type Opaque = GemmoeModel;
    const KIND: usize = 10;
    const NAME: &'static str = "gemmoe_model";
    fn wrap(object: Arc<Self>) -> Object {
        Object::Model(object)
    }
    fn unwrap(object: Object) -> Option<Arc<Self>> {
        if let Object::Model(object) = object { Some(object) } else { None }
    }
}

/// What a model is and what it takes. Initialise with GEMMOE_MODEL_INFO_INIT.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct GemmoeModelInfo {
    /// sizeof(gemmoe_model_info)
    pub struct_size: u32,
    /// Tokens there are, and logits per position.
    pub vocab_size: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Width inside one expert.
    pub intermediate_size: u32,
    /// Layers.
    pub num_hidden_layers: u32,
    /// Query heads.
    pub num_attention_heads: u32,
    /// Key and value heads.
    pub num_key_value_heads: u32,
    /// Width of one head.
    pub head_dim: u32,
    /// Experts per layer; 1 for a dense model.
    pub num_local_experts: u32,
    /// Experts each token is sent to.
    pub num_experts_per_tok: u32,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: u32,
    /// The token in front of every text.
    pub bos_token: u32,
    /// 1 if the directory had a tokenizer, else 0: text functions then return NO_TOKENIZER.
    pub has_tokenizer: u32,
    /// Must not be relied on.
    pub reserved0: u32,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Bytes of experts among them.
    pub expert_bytes: u64,
    /// Bytes of the tokenizer, about.
    pub tokenizer_bytes: u64,
    /// Bytes of keys and values a session takes for each token of its context.
    pub kv_bytes_per_token: u64,
    /// What the experts are held in: one of GEMMOE_FORMAT_ with its flags; 0 where they are of several formats.
    pub experts_format: u32,
    /// The same of queries, keys, values and output projections.
    pub attention_format: u32,
    /// The same of the head.
    pub head_format: u32,
    /// The same of the embedding.
    pub embedding_format: u32,
    /// Must not be relied on.
    pub reserved: [u64; 4],
}

// SAFETY: repr(C), begins with struct_size, fourteen u32, four u64, four u32, then u64s leave no padding, plain numbers.
unsafe impl Versioned for GemmoeModelInfo {
    const NAME: &'static str = "gemmoe_model_info";
    const FIRST_SIZE: usize = 136;
}

/// Fills in what the model is. Errors: handle errors, NULL_ARGUMENT, STRUCT_SIZE. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_get_info(
    model: *const GemmoeModel,
    info_out: *mut GemmoeModelInfo,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let info = handles::find::<ModelObject>(model, "model")?.with(|model| Ok(info(model)))?;
            structs::write(info_out, &info, "info_out")
        })
    }
}

fn info(model: &Model) -> GemmoeModelInfo {
    let config = model.config();
    let (weight_bytes, expert_bytes) = model.backend().weight_bytes();
    let tokenizer = model.tokenizer().ok();
    let kv = KvGeometry::of(config, model.backend().default_kv_dtype());
    GemmoeModelInfo {
        vocab_size: config.vocab_size as u32,
        hidden_size: config.hidden_size as u32,
        intermediate_size: config.intermediate_size as u32,
        num_hidden_layers: config.num_hidden_layers as u32,
        num_attention_heads: config.num_attention_heads as u32,
        num_key_value_heads: config.num_key_value_heads as u32,
        head_dim: config.head_dim as u32,
        num_local_experts: config.num_local_experts as u32,
        num_experts_per_tok: config.num_experts_per_tok as u32,
        max_position_embeddings: config.max_position_embeddings as u32,
        bos_token: config.bos_token_id,
        has_tokenizer: tokenizer.is_some() as u32,
        weight_bytes: weight_bytes as u64,
        expert_bytes: expert_bytes as u64,
        tokenizer_bytes: tokenizer.map_or(0, |tokenizer| tokenizer.bytes_in_use() as u64),
        kv_bytes_per_token: kv.bytes_per_token() as u64,
        experts_format: format_constant(model.formats().experts),
        attention_format: format_constant(model.formats().attention),
        head_format: format_constant(model.formats().head),
        embedding_format: format_constant(model.formats().embedding),
        ..GemmoeModelInfo::zeroed()
    }
}

/// Copies the device's description, UTF-8 without NUL, such as "CPU, 8 threads, avx2". `count_out` receives its length;
/// with `capacity` 0 nothing else is written.
/// Errors: handle errors, NULL_ARGUMENT, BUFFER_TOO_SMALL. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_device(
    model: *const GemmoeModel,
    text: *mut c_char,
    capacity: usize,
    count_out: *mut usize,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let name = handles::find::<ModelObject>(model, "model")?.with(|model| Ok(model.backend().device_name()))?;
            copy_out(name.as_bytes(), text.cast::<u8>(), capacity, count_out, "text")
        })
    }
}

/// Whether `token` ends a generation: EOS, or the end of a chat turn. `stop_out` receives 1 or 0.
/// Errors: handle errors, NULL_ARGUMENT. Any thread. Since 0.1.
///
/// # Safety
/// Pointers are NULL or good for what is said above.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gemmoe_model_is_stop_token(
    model: *const GemmoeModel,
    token: u32,
    stop_out: *mut u32,
    error_out: *mut *mut GemmoeError,
) -> Status {
    // SAFETY: the caller's promises.
    unsafe {
        guard(error_out, || {
            let stop_out = Out::new(stop_out, "stop_out")?;
            let model = handles::find::<ModelObject>(model, "model")?;
            stop_out.set(model.with(|model| Ok(model.stop_tokens().contains(&token) as u32))?);
            Ok(())
        })
    }
}

/// Destroys a model. Sessions made from it go on working. NULL is nothing.
/// Errors: STALE_HANDLE, WRONG_HANDLE_TYPE. Any thread. Since 0.1.
#[unsafe(no_mangle)]
pub extern "C" fn gemmoe_model_destroy(model: *mut GemmoeModel) -> Status {
    guard_status(|| handles::remove::<ModelObject>(model, "model"))
}
