//! What commands that make a session take.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use gemmoe::backend::KvDtype;
use gemmoe::{Model, SessionOptions};

#[derive(Args)]
pub struct SessionArgs {
    /// Tokens the session can hold; by default what is needed, as far as the model goes.
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// How keys and values are stored; by default like the weights. int8 takes least memory.
    #[arg(long, value_name = "DTYPE", value_parser = kv_dtypes())]
    pub kv: Option<KvDtype>,
}

impl SessionArgs {
    /// Options with room for `tokens`.
    pub fn options(&self, tokens: usize, model: &Model) -> SessionOptions {
        let context_size = self.context.unwrap_or_else(|| context_size(tokens, model));
        SessionOptions { context_size, kv_dtype: self.kv, ..Default::default() }
    }
}

/// Room for `tokens`, as far as the model goes; at least one.
pub fn context_size(tokens: usize, model: &Model) -> usize {
    tokens.clamp(1, model.config().max_position_embeddings)
}

/// Takes the names of the dtypes of keys and values.
pub fn kv_dtypes() -> impl TypedValueParser<Value = KvDtype> {
    PossibleValuesParser::new(KvDtype::ALL.map(KvDtype::name)).try_map(|name| {
        let dtype = KvDtype::ALL.into_iter().find(|dtype| dtype.name() == name);
        dtype.ok_or("it is no dtype of keys and values")
    })
}
