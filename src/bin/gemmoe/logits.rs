//! `gemmoe logits`

use std::sync::Arc;

use gemmoe::{Result, Session, SessionOptions};
use serde_json::json;

use crate::load::load;
use crate::session::context_size;
use crate::{ModelArgs, parse_tokens};

#[derive(clap::Args)]
pub struct Logits {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, such as 2,17,5.
    #[arg(long, value_name = "LIST", value_parser = parse_tokens)]
    tokens: std::vec::Vec<u32>,
    /// Print {"logits": [of the last position], "experts": [[ids of the last position, highest weight first] per layer]}.
    #[arg(long)]
    json: bool,
}

impl Logits {
    pub fn run(&self) -> Result<()> {
        let model = load(&self.model)?;
        let options = SessionOptions { context_size: context_size(self.tokens.len(), &model), ..Default::default() };
        let mut session = Session::new(Arc::clone(&model), &options)?;
        session.prefill(&self.tokens)?;
        let layers = 0..model.config().num_hidden_layers;
        if self.json {
            let experts = layers.map(|layer| Ok(session.routes(layer)?.experts)).collect::<Result<Vec<_>>>()?;
            println!("{}", json!({"logits": session.logits()?, "experts": experts}));
            return Ok(());
        }
        let (mut ids, mut logs) = ([0; 10], [0.0; 10]);
        session.top_log_probabilities(&mut ids, &mut logs)?;
        println!("{:>8} {:>12}  text", "token", "probability");
        for (id, log) in ids.iter().zip(logs).take(model.config().vocab_size) {
            let text = match model.tokenizer() {
                Ok(tokenizer) => format!("{:?}", String::from_utf8_lossy(tokenizer.token_bytes(*id, true)?)),
                Err(_) => String::new(),
            };
            println!("{id:>8} {:>11.2} %  {text}", log.exp() * 100.0);
        }
        for layer in layers {
            let routes = session.routes(layer)?;
            let shares = routes.experts.iter().zip(routes.weights);
            let shares: Vec<String> = shares.map(|(id, weight)| format!("{id} ({:.0} %)", weight * 100.0)).collect();
            println!("layer {layer:>3}: experts {}", shares.join(", "));
        }
        Ok(())
    }
}
