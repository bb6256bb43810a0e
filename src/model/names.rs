//! Which tensor of a checkpoint is which weight: the three layouts Gemma mixtures are published in.

use super::checkpoint::Checkpoint;
use super::config::Config;
use crate::error::{Error, Result, Status};

/// How a checkpoint stores its feed-forward weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `block_sparse_moe.experts.{e}.w1/w3/w2.weight`, as GemMoE and Mixtral were published.
    BlockSparseMoe,
    /// `mlp.experts.gate_up_proj` [E, 2f, d] and `mlp.experts.down_proj` [E, d, f], as newer tools write.
    Fused,
    /// `mlp.gate_proj/up_proj/down_proj.weight`: plain Gemma, one expert and no router.
    Dense,
}

impl Layout {
    /// The layout's name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Layout::BlockSparseMoe => "block_sparse_moe",
            Layout::Fused => "fused experts",
            Layout::Dense => "dense",
        }
    }

    /// Tells the layout from the tensors of all layers, which must have the same. Dense tensors beside experts are dead
    /// weight an older class saved.
    pub fn detect(checkpoint: &Checkpoint) -> Result<Layout> {
        let in_layer = |name: &str, start: &str| {
            let rest = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
            rest.is_some_and(|(_, rest)| rest.starts_with(start))
        };
        let has = |start: &str| checkpoint.tensor_names().any(|name| in_layer(name, start));
        match (has("block_sparse_moe."), has("mlp.experts.")) {
            (true, true) => Err(Error::new(
                Status::TensorDuplicate,
                "experts are stored twice, as \"block_sparse_moe\" and as \"mlp.experts\"; expected one of them",
            )
            .in_file(checkpoint.table_of_contents())
            .at_key("mlp.experts")),
            (true, false) => Ok(Layout::BlockSparseMoe),
            (false, true) => Ok(Layout::Fused),
            (false, false) if has("mlp.gate_proj.") => Ok(Layout::Dense),
            (false, false) => {
                let name = "model.layers.0.block_sparse_moe.gate.weight";
                let text = format!("tensor \"{name}\" is missing, and no other layout's experts are there either");
                Err(Error::new(Status::TensorMissing, text).in_file(checkpoint.table_of_contents()).at_key(name))
            }
        }
    }
}

/// What a part of a model is for: formats are chosen by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A norm's weights: always f32.
    Norm,
    /// A router: always f32.
    Router,
    /// Queries, keys, values, or the output projection.
    Attention,
    /// An expert's gate, up or down.
    Expert,
    /// The rows tokens are looked up in.
    Embedding,
    /// The rows logits are computed from.
    Head,
}

/// A matrix inside a tensor: `[rows, columns]`, `first_row` rows below the tensor's start when its leading
/// dimensions are flattened into rows.
#[derive(Clone, Debug)]
pub struct Part {
    /// What it is for.
    pub role: Role,
    /// The tensor's name.
    pub tensor: String,
    /// The whole tensor's shape.
    pub shape: Vec<usize>,
    /// What the shape's dimensions are, for messages.
    pub meaning: &'static str,
    /// First row of this matrix.
    pub first_row: usize,
    /// Rows of this matrix.
    pub rows: usize,
    /// Columns of this matrix and of the tensor.
    pub columns: usize,
}

impl Part {
    fn whole(role: Role, tensor: String, rows: usize, columns: usize, meaning: &'static str) -> Part {
        Part { role, tensor, shape: vec![rows, columns], meaning, first_row: 0, rows, columns }
    }

    /// A vector, as a matrix of one row.
    fn vector(tensor: String, length: usize, meaning: &'static str) -> Part {
        Part { role: Role::Norm, tensor, shape: vec![length], meaning, first_row: 0, rows: 1, columns: length }
    }
}

/// One expert's three matrices.
pub struct ExpertParts {
    /// [intermediate_size, hidden_size], the branch that gets the GeLU.
    pub gate: Part,
    /// [intermediate_size, hidden_size].
    pub up: Part,
    /// [hidden_size, intermediate_size].
    pub down: Part,
}

/// The parts of one layer.
pub struct LayerParts {
    /// [hidden_size]
    pub input_norm: Part,
    /// [query_size, hidden_size]
    pub query: Part,
    /// [key_value_size, hidden_size]
    pub key: Part,
    /// [key_value_size, hidden_size]
    pub value: Part,
    /// [hidden_size, query_size]
    pub output: Part,
    /// [hidden_size]
    pub post_attention_norm: Part,
    /// [num_local_experts, hidden_size]; none in a dense model.
    pub router: Option<Part>,
    /// num_local_experts of them.
    pub experts: Vec<ExpertParts>,
}

impl LayerParts {
    /// Every part of the layer.
    pub fn all(&self) -> impl Iterator<Item = &Part> {
        [&self.input_norm, &self.query, &self.key, &self.value, &self.output, &self.post_attention_norm]
            .into_iter()
            .chain(&self.router)
            .chain(self.expert_parts())
    }

    /// The parts of the layer's experts.
    pub fn expert_parts(&self) -> impl Iterator<Item = &Part> {
        self.experts.iter().flat_map(|expert| [&expert.gate, &expert.up, &expert.down])
    }
}

/// The head's tensor; absent where the embedding is the head.
pub const HEAD: &str = "lm_head.weight";

/// [vocab_size, hidden_size]
pub fn embedding(config: &Config) -> Part {
    let name = "model.embed_tokens.weight".to_owned();
    Part::whole(Role::Embedding, name, config.vocab_size, config.hidden_size, "vocab_size x hidden_size")
}

/// [hidden_size]
pub fn final_norm(config: &Config) -> Part {
    Part::vector("model.norm.weight".to_owned(), config.hidden_size, "hidden_size")
}

/// [vocab_size, hidden_size]
pub fn head(config: &Config) -> Part {
    Part::whole(Role::Head, HEAD.to_owned(), config.vocab_size, config.hidden_size, "vocab_size x hidden_size")
}

/// The parts of layer `layer`; `config` is the dense one if the layout is.
pub fn layer(config: &Config, layout: Layout, layer: usize) -> LayerParts {
    let name = |rest: &str| format!("model.layers.{layer}.{rest}");
    let (hidden, query, key_value) = (config.hidden_size, config.query_size(), config.key_value_size());
    let router = match layout {
        Layout::BlockSparseMoe => Some("block_sparse_moe.gate.weight"),
        Layout::Fused => Some("mlp.gate.weight"),
        Layout::Dense => None,
    };
    LayerParts {
        input_norm: Part::vector(name("input_layernorm.weight"), hidden, "hidden_size"),
        query: Part::whole(
            Role::Attention,
            name("self_attn.q_proj.weight"),
            query,
            hidden,
            "heads * head_dim x hidden_size",
        ),
        key: Part::whole(
            Role::Attention,
            name("self_attn.k_proj.weight"),
            key_value,
            hidden,
            "kv heads * head_dim x hidden_size",
        ),
        value: Part::whole(
            Role::Attention,
            name("self_attn.v_proj.weight"),
            key_value,
            hidden,
            "kv heads * head_dim x hidden_size",
        ),
        output: Part::whole(
            Role::Attention,
            name("self_attn.o_proj.weight"),
            hidden,
            query,
            "hidden_size x heads * head_dim",
        ),
        post_attention_norm: Part::vector(name("post_attention_layernorm.weight"), hidden, "hidden_size"),
        router: router.map(|router| {
            Part::whole(Role::Router, name(router), config.num_local_experts, hidden, "num_local_experts x hidden_size")
        }),
        experts: (0..config.num_local_experts).map(|index| expert(config, layout, layer, index)).collect(),
    }
}

fn expert(config: &Config, layout: Layout, layer: usize, index: usize) -> ExpertParts {
    let (hidden, intermediate, experts) = (config.hidden_size, config.intermediate_size, config.num_local_experts);
    let inner = |name: String| Part::whole(Role::Expert, name, intermediate, hidden, "intermediate_size x hidden_size");
    let outer = |name: String| Part::whole(Role::Expert, name, hidden, intermediate, "hidden_size x intermediate_size");
    match layout {
        Layout::BlockSparseMoe => {
            let name = |weight: &str| format!("model.layers.{layer}.block_sparse_moe.experts.{index}.{weight}.weight");
            ExpertParts { gate: inner(name("w1")), up: inner(name("w3")), down: outer(name("w2")) }
        }
        Layout::Dense => {
            let name = |weight: &str| format!("model.layers.{layer}.mlp.{weight}.weight");
            ExpertParts { gate: inner(name("gate_proj")), up: inner(name("up_proj")), down: outer(name("down_proj")) }
        }
        Layout::Fused => {
            let gate_up = |first_row| Part {
                role: Role::Expert,
                tensor: format!("model.layers.{layer}.mlp.experts.gate_up_proj"),
                shape: vec![experts, 2 * intermediate, hidden],
                meaning: "num_local_experts x 2 * intermediate_size x hidden_size",
                first_row,
                rows: intermediate,
                columns: hidden,
            };
            let first_row = index * 2 * intermediate;
            ExpertParts {
                gate: gate_up(first_row),
                up: gate_up(first_row + intermediate),
                down: Part {
                    role: Role::Expert,
                    tensor: format!("model.layers.{layer}.mlp.experts.down_proj"),
                    shape: vec![experts, hidden, intermediate],
                    meaning: "num_local_experts x hidden_size x intermediate_size",
                    first_row: index * hidden,
                    rows: hidden,
                    columns: intermediate,
                },
            }
        }
    }
}

/// The name of the scales that belong to a quantised tensor.
pub fn scales(tensor: &str) -> String {
    format!("{tensor}_scale")
}

/// Refuses scales of tensors that are not quantised, if config.json is to be believed.
pub fn check_scales(expected: &[String], checkpoint: &Checkpoint) -> Result<()> {
    let is_extra = |name: &&str| name.ends_with("_scale") && !expected.iter().any(|expected| expected == name);
    let Some(name) = checkpoint.tensor_names().filter(is_extra).min() else { return Ok(()) };
    let file = checkpoint.tensor(name).map(|tensor| checkpoint.file_of(tensor)).unwrap_or_default();
    let text = format!("tensor \"{name}\" has no place: by config.json nothing is quantised that it belongs to");
    Err(Error::new(Status::TensorUnexpected, text).in_file(file).at_key(name))
}

/// Refuses tensors that would change the model but that config.json has no place for: layers and experts
/// past its counts, and biases.
pub fn check_no_extra(config: &Config, layout: Layout, checkpoint: &Checkpoint) -> Result<()> {
    let reason = |name: &str| {
        let (layer, rest) = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'))?;
        if layer.parse().ok().is_none_or(|layer: usize| layer >= config.num_hidden_layers) {
            Some(format!("num_hidden_layers is {}", config.num_hidden_layers))
        } else if rest.ends_with(".bias") {
            Some("biases are not supported".to_owned())
        } else if layout == Layout::BlockSparseMoe
            && let Some(rest) = rest.strip_prefix("block_sparse_moe.experts.")
            && rest.split('.').next().and_then(|e| e.parse().ok()).is_none_or(|e: usize| e >= config.num_local_experts)
        {
            Some(format!("num_local_experts is {}", config.num_local_experts))
        } else {
            None
        }
    };
    // The names come in no order: the first of several is named, so that the same directory gives the same error.
    let extra = checkpoint.tensor_names().filter_map(|name| Some((name, reason(name)?)));
    let Some((name, reason)) = extra.min() else { return Ok(()) };
    let file = checkpoint.tensor(name).map(|tensor| checkpoint.file_of(tensor)).unwrap_or_default();
    let error = Error::new(Status::TensorUnexpected, format!("tensor \"{name}\" has no place: {reason}"));
    Err(error.in_file(file).at_key(name))
}
