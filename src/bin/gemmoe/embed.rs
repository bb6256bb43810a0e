//! `gemmoe embed`

use std::sync::Arc;

use clap::ValueEnum;
use gemmoe::{Result, Session, SessionOptions};
use serde_json::json;

use crate::load::load;
use crate::session::context_size;
use crate::{ModelArgs, parse_tokens};

#[derive(clap::Args)]
pub struct Embed {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to embed. BOS goes before it and is not pooled.
    #[arg(long, value_name = "TEXT", required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<String>,
    /// Token ids to embed instead, such as 2,17,5; all are pooled, and none is put in front.
    #[arg(long, value_name = "LIST", value_parser = parse_tokens)]
    tokens: Option<std::vec::Vec<u32>>,
    /// How the tokens' hidden states become one vector.
    #[arg(long, value_enum, default_value_t = Pooling::Mean)]
    pooling: Pooling,
}

#[derive(Clone, Copy, ValueEnum)]
enum Pooling {
    /// Their mean.
    Mean,
    /// The last token's.
    Last,
}

impl Embed {
    /// Prints {"embedding": [hidden_size numbers], "tokens": how many were pooled over}.
    pub fn run(&self) -> Result<()> {
        let model = load(&self.model)?;
        let (bos, tokens) = match (&self.text, &self.tokens) {
            (Some(text), _) => (vec![model.config().bos_token_id], model.encode(text, false, false)?),
            (None, tokens) => (Vec::new(), tokens.clone().unwrap_or_default()),
        };
        let context_size = context_size(bos.len() + tokens.len(), &model);
        let mut session = Session::new(Arc::clone(&model), &SessionOptions { context_size, ..Default::default() })?;
        session.prefill(&bos)?;
        let mut embedding = vec![0.0; model.config().hidden_size];
        let pooling = match self.pooling {
            Pooling::Mean => gemmoe::Pooling::Mean,
            Pooling::Last => gemmoe::Pooling::Last,
        };
        session.embed(&tokens, pooling, &mut embedding)?;
        println!("{}", json!({"embedding": embedding, "tokens": tokens.len()}));
        Ok(())
    }
}
