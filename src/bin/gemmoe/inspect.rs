//! `gemmoe inspect`

use std::path::PathBuf;

use gemmoe::model::Description;
use gemmoe::model::router_patch::GateSizes;
use gemmoe::text::Tokenizer;
use gemmoe::{LoadOptions, Model, Result, RouterPatch};
use serde_json::json;

use crate::formats::{parts, parts_json};
use crate::units::{count, grouped};

#[derive(clap::Args)]
pub struct Inspect {
    /// Model directory, or a router patch.
    #[arg(value_name = "DIR|FILE")]
    path: PathBuf,
    /// Follow symbolic links inside the directory, as in a download cache.
    #[arg(long)]
    follow_links: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl Inspect {
    pub fn run(&self) -> Result<()> {
        if self.path.is_file() {
            self.print_patch(&RouterPatch::read(&self.path)?);
            return Ok(());
        }
        let (description, tokenizer) =
            Model::inspect(&self.path, &LoadOptions { follow_links: self.follow_links, ..Default::default() })?;
        if self.json {
            print_json(&description, tokenizer.as_ref())
        } else {
            print_text(&description, tokenizer.as_ref())
        }
        Ok(())
    }

    fn print_patch(&self, patch: &RouterPatch) {
        let GateSizes { layers, experts, hidden_size } = patch.sizes();
        let base = format!("{:016x}", patch.base());
        if self.json {
            let patch = json!({
                "base": base,
                "num_hidden_layers": layers,
                "num_local_experts": experts,
                "hidden_size": hidden_size,
            });
            println!("{}", json!({ "router_patch": patch }));
        } else {
            println!("{:<12} {layers} layers of {experts} experts, hidden size {hidden_size}", "router patch");
            println!("{:<12} a model whose stored gates have fingerprint {base}", "for");
        }
    }
}

fn print_text(description: &Description, tokenizer: Option<&Tokenizer>) {
    let config = &description.config;
    let row = |name: &str, value: String| println!("{name:<12} {value}");
    row("layout", format!("{}, {}", description.layout.name(), description.dtypes.join(" and ")));
    let experts = match config.num_local_experts {
        1 => "dense: one expert a layer".to_owned(),
        count => format!("{count} a layer, each token goes to {}", config.num_experts_per_tok),
    };
    row("experts", experts);
    row(
        "parameters",
        format!(
            "{}, {} of them active per token",
            count(description.parameters),
            count(description.active_parameters())
        ),
    );
    row("weights", format!("{} bytes", grouped(description.bytes)));
    row("formats", parts(&description.formats));
    row("layers", format!("{} of hidden size {}", config.num_hidden_layers, config.hidden_size));
    row("expert size", format!("{}", config.intermediate_size));
    row(
        "attention",
        format!(
            "{} heads of {}, {} for keys and values",
            config.num_attention_heads, config.head_dim, config.num_key_value_heads
        ),
    );
    row("vocabulary", format!("{} tokens", config.vocab_size));
    row("context", format!("{} tokens", config.max_position_embeddings));
    row(
        "tokenizer",
        tokenizer.map_or("none: token ids only".to_owned(), |tokenizer| format!("{} entries", tokenizer.len())),
    );
}

fn print_json(description: &Description, tokenizer: Option<&Tokenizer>) {
    let config = &description.config;
    let object = json!({
        "layout": description.layout.name(),
        "dtypes": description.dtypes,
        "formats": parts_json(&description.formats),
        "num_local_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "parameters": description.parameters,
        "active_parameters": description.active_parameters(),
        "weight_bytes": description.bytes,
        "num_hidden_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "tokenizer": tokenizer.is_some(),
    });
    println!("{object}");
}
