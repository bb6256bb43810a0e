//! What a host chooses when it makes a session.

use crate::backend::kv::{KvDtype, KvGeometry, PAGE_TOKENS};
use crate::error::{Error, Result, Status};
use crate::model::Config;

/// Tokens a prompt is cut into where the host does not say.
pub const DEFAULT_PREFILL_CHUNK: usize = 256;
/// Largest context a session gets where the host does not say; a smaller limit of the model wins.
pub const DEFAULT_CONTEXT: usize = 8192;
/// Positions whose logits a session's workspace holds while it scores tokens.
pub const SCORE_ROWS: usize = 16;

/// What a session does when its context is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// Fail with `ContextFull`.
    #[default]
    Fail,
    /// Keep the first `keep` tokens and drop the oldest after them, so that half of the rest is free again. The tokens
    /// that stay are run again at their new positions: what follows is bit for bit what a session given only them gives.
    Slide {
        /// First tokens that are never dropped; at most the context less two.
        keep: usize,
    },
}

/// What a host may choose when it makes a session. Zeros take the defaults.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionOptions {
    /// Tokens the session can hold; memory for all of them is reserved at once.
    pub context_size: usize,
    /// Most tokens of one forward pass; the workspace is sized for it.
    pub prefill_chunk: usize,
    /// How keys and values are stored; None is the dtype of the checkpoint.
    pub kv_dtype: Option<KvDtype>,
    /// What to do when the context is full.
    pub overflow: Overflow,
    /// Most bytes of keys and values; 0 is no limit. Where `context_size` is 0 the context is what fits, else one that
    /// does not fit is refused.
    pub kv_limit_bytes: usize,
    /// Tokens whose routes are kept until they are fetched; 0 keeps none.
    pub route_capacity: usize,
    /// Make no workspace: such a session runs only in batches, and takes little memory but its keys and values.
    pub batch_only: bool,
}

impl SessionOptions {
    /// The options with defaults filled in, `default_dtype` being the model's for keys and values; or an error naming the
    /// one that is out of range.
    pub fn resolve(&self, config: &Config, default_dtype: KvDtype) -> Result<SessionOptions> {
        let invalid = |key: &str, text: String| Err(Error::new(Status::InvalidArgument, text).at_key(key));
        let longest = config.max_position_embeddings;
        let kv_dtype = self.kv_dtype.unwrap_or(default_dtype);
        let page_bytes = KvGeometry::of(config, kv_dtype).page_bytes();
        let limit = if self.kv_limit_bytes == 0 { usize::MAX } else { self.kv_limit_bytes };
        let affordable = (limit / page_bytes).saturating_mul(PAGE_TOKENS);
        let context_size = match self.context_size {
            0 => longest.min(DEFAULT_CONTEXT).min(affordable),
            size => size,
        };
        if context_size > longest {
            let text = format!("context_size is {context_size}, the model's max_position_embeddings is {longest}");
            return invalid("context_size", text);
        }
        if context_size == 0 || context_size > affordable {
            let wanted = KvGeometry::pages_for(context_size.max(1)) * page_bytes;
            let text = format!("keys and values take {wanted} bytes, kv_limit_bytes is {limit}");
            return Err(Error::new(Status::KvLimit, text).at_key("kv_limit_bytes"));
        }
        if let Overflow::Slide { keep } = self.overflow
            && keep.saturating_add(2) > context_size
        {
            let text = format!("keep_tokens is {keep}, expected at most context_size ({context_size}) less two");
            return invalid("keep_tokens", text);
        }
        let chunk = if self.prefill_chunk == 0 { DEFAULT_PREFILL_CHUNK } else { self.prefill_chunk };
        let prefill_chunk = chunk.min(context_size);
        Ok(SessionOptions { context_size, prefill_chunk, kv_dtype: Some(kv_dtype), ..*self })
    }
}
