"""GemMoE's forward pass in float64 PyTorch: slow, plain, and written from the description of the model alone.

It is the judge of the library's arithmetic, so it shares no code with it, keeps no key-value cache and rounds nowhere
after reading the weights. Prints the logits and the chosen experts of the last position:

    python reference.py MODEL_DIRECTORY --tokens 2,5,7
"""
import argparse
import json
import math
import pathlib
from dataclasses import dataclass

import torch
from safetensors import safe_open

DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}


@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    rope_theta: float
    rms_norm_eps: float


@dataclass
class Options:
    """Departures from the default arithmetic, each of which some published version makes."""
    unrounded_embedding_scale: bool = False
    exact_gelu: bool = False


def read_config(directory):
    values = json.loads((pathlib.Path(directory) / "config.json").read_text())
    fields = {}
    for key, default in DEFAULTS.items():
        value = values.get(key)
        # A null counts as absent; 4.0 counts as 4 and 10000 as 10000.0.
        fields[key] = default if value is None else type(default)(value)
    if values.get("num_experts_per_tok") is None:
        fields["num_experts_per_tok"] = min(2, fields["num_local_experts"])
    return Config(**fields)


def read_tensors(directory):
    """All tensors by name, in the dtype of the file."""
    directory = pathlib.Path(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    tensors = {}
    for name in files:
        with safe_open(directory / name, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.keys()})
    return tensors


@dataclass
class Layer:
    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    router: torch.Tensor | None  # None in a dense layer, which has one expert and nothing to choose
    experts: list  # of (w1 gate branch, w3 up, w2 down)


@dataclass
class Model:
    config: Config
    options: Options
    embedding: torch.Tensor
    embedding_dtype: torch.dtype
    layers: list
    final_norm: torch.Tensor
    head: torch.Tensor


def load(directory, options=None):
    config = read_config(directory)
    tensors = read_tensors(directory)

    def weight(name, *shape):
        tensor = tensors[name]
        assert tuple(tensor.shape) == shape, f"{name} is {tuple(tensor.shape)}, expected {shape}"
        return tensor.to(torch.float64)

    hidden, intermediate = config.hidden_size, config.intermediate_size
    query_size = config.num_attention_heads * config.head_dim
    key_value_size = config.num_key_value_heads * config.head_dim
    count = config.num_local_experts

    def feed_forward(prefix):
        # block_sparse_moe comes first: mlp tensors beside it are dead.
        if f"{prefix}.block_sparse_moe.gate.weight" in tensors:
            block = f"{prefix}.block_sparse_moe"
            experts = [
                (
                    weight(f"{block}.experts.{e}.w1.weight", intermediate, hidden),
                    weight(f"{block}.experts.{e}.w3.weight", intermediate, hidden),
                    weight(f"{block}.experts.{e}.w2.weight", hidden, intermediate),
                )
                for e in range(count)
            ]
            return weight(f"{block}.gate.weight", count, hidden), experts
        if f"{prefix}.mlp.experts.gate_up_proj" in tensors:
            gate_up = weight(f"{prefix}.mlp.experts.gate_up_proj", count, 2 * intermediate, hidden)
            down = weight(f"{prefix}.mlp.experts.down_proj", count, hidden, intermediate)
            experts = [(gate_up[e, :intermediate], gate_up[e, intermediate:], down[e]) for e in range(count)]
            return weight(f"{prefix}.mlp.gate.weight", count, hidden), experts
        return None, [
            (
                weight(f"{prefix}.mlp.gate_proj.weight", intermediate, hidden),
                weight(f"{prefix}.mlp.up_proj.weight", intermediate, hidden),
                weight(f"{prefix}.mlp.down_proj.weight", hidden, intermediate),
            )
        ]

    layers = []
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}"
        router, experts = feed_forward(prefix)
        layers.append(
            Layer(
                input_norm=weight(f"{prefix}.input_layernorm.weight", hidden),
                post_attention_norm=weight(f"{prefix}.post_attention_layernorm.weight", hidden),
                query=weight(f"{prefix}.self_attn.q_proj.weight", query_size, hidden),
                key=weight(f"{prefix}.self_attn.k_proj.weight", key_value_size, hidden),
                value=weight(f"{prefix}.self_attn.v_proj.weight", key_value_size, hidden),
                output=weight(f"{prefix}.self_attn.o_proj.weight", hidden, query_size),
                router=router,
                experts=experts,
            )
        )
    embedding = "model.embed_tokens.weight"
    # An lm_head that is present is used whatever tie_word_embeddings says.
    head = "lm_head.weight" if "lm_head.weight" in tensors else embedding
    return Model(
        config=config,
        options=options or Options(),
        embedding=weight(embedding, config.vocab_size, hidden),
        embedding_dtype=tensors[embedding].dtype,
        layers=layers,
        final_norm=weight("model.norm.weight", hidden),
        head=weight(head, config.vocab_size, hidden),
    )


def embedding_scale(hidden_size, dtype, unrounded):
    """The root of the width, rounded to the checkpoint's dtype: Gemma was trained with 55.5, not 55.43."""
    root = math.sqrt(hidden_size)
    return root if unrounded else torch.tensor(root, dtype=torch.float64).to(dtype).item()


def rms_norm(x, weight, eps):
    """Gemma stores the weight as an offset from one."""
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * (1.0 + weight)


def rotate(x, theta):
    """Rotary position embedding of x [heads, positions, head_dim]; element i is paired with i + head_dim / 2."""
    positions, head_dim = x.shape[-2:]
    half = head_dim // 2
    frequencies = theta ** (-2.0 * torch.arange(half, dtype=torch.float64) / head_dim)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )


def repeat_heads(x, repeats):
    """Grouped-query attention: consecutive query heads share a key-value head."""
    return x.repeat_interleave(repeats, dim=0)


def attention_scale(config):
    return 1.0 / math.sqrt(config.head_dim)


def causal_mask(positions):
    """True where a query (row) must not see a key (column)."""
    return torch.ones(positions, positions, dtype=torch.bool).triu(1)


def attention(x, layer, config):
    positions = x.shape[0]

    def heads(weight, count):
        return (x @ weight.T).view(positions, count, config.head_dim).transpose(0, 1)

    groups = config.num_attention_heads // config.num_key_value_heads
    query = rotate(heads(layer.query, config.num_attention_heads), config.rope_theta)
    key = repeat_heads(rotate(heads(layer.key, config.num_key_value_heads), config.rope_theta), groups)
    value = repeat_heads(heads(layer.value, config.num_key_value_heads), groups)
    scores = query @ key.transpose(1, 2) * attention_scale(config)
    scores = scores.masked_fill(causal_mask(positions), -math.inf)
    mixed = torch.softmax(scores, dim=-1) @ value
    return mixed.transpose(0, 1).reshape(positions, -1) @ layer.output.T


def gelu(x, exact):
    """The tanh approximation unless exact: the published code uses it even where hidden_act says "gelu"."""
    if exact:
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


def expert_output(x, expert, exact_gelu):
    w1, w3, w2 = expert
    return (gelu(x @ w1.T, exact_gelu) * (x @ w3.T)) @ w2.T


def route(logits, top_k):
    """Chosen experts [positions, top_k], highest weight first, and their weights; equal ones by lower index."""
    probabilities = torch.softmax(logits, dim=-1)
    # A stable descending sort leaves equal probabilities in the order of their index; topk promises no order.
    ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
    weights = ordered[:, :top_k]
    return indices[:, :top_k], weights / weights.sum(-1, keepdim=True)


def mixture(x, layer, config, options):
    """Feed-forward output, chosen experts and all router probabilities (None in a dense layer)."""
    if layer.router is None:
        chosen = torch.zeros(x.shape[0], 1, dtype=torch.int64)
        return expert_output(x, layer.experts[0], options.exact_gelu), chosen, None
    logits = x @ layer.router.T
    chosen, weights = route(logits, config.num_experts_per_tok)
    result = torch.zeros_like(x)
    for index, expert in enumerate(layer.experts):
        position, slot = torch.where(chosen == index)
        if len(position):
            output = expert_output(x[position], expert, options.exact_gelu)
            result[position] += weights[position, slot, None] * output
    return result, chosen, torch.softmax(logits, dim=-1)


@dataclass
class Result:
    logits: torch.Tensor  # [positions, vocab_size]
    experts: list  # per layer [positions, top_k]
    probabilities: list  # per layer [positions, num_local_experts], or None


@torch.no_grad()
def forward(model, tokens):
    config, options = model.config, model.options
    scale = embedding_scale(config.hidden_size, model.embedding_dtype, options.unrounded_embedding_scale)
    x = model.embedding[torch.tensor(tokens)] * scale
    experts, probabilities = [], []
    for layer in model.layers:
        x = x + attention(rms_norm(x, layer.input_norm, config.rms_norm_eps), layer, config)
        normed = rms_norm(x, layer.post_attention_norm, config.rms_norm_eps)
        update, chosen, probability = mixture(normed, layer, config, options)
        x = x + update
        experts.append(chosen)
        probabilities.append(probability)
    logits = rms_norm(x, model.final_norm, config.rms_norm_eps) @ model.head.T
    return Result(logits, experts, probabilities)


def main():
    parser = argparse.ArgumentParser(description="Logits and experts of the last position, as JSON.")
    parser.add_argument("directory")
    parser.add_argument("--tokens", required=True, help="comma-separated token ids, BOS (2) included")
    parser.add_argument("--unrounded-embedding-scale", action="store_true")
    parser.add_argument("--exact-gelu", action="store_true")
    arguments = parser.parse_args()
    options = Options(arguments.unrounded_embedding_scale, arguments.exact_gelu)
    result = forward(load(arguments.directory, options), [int(token) for token in arguments.tokens.split(",")])
    print(
        json.dumps(
            {"logits": result.logits[-1].tolist(), "experts": [chosen[-1].tolist() for chosen in result.experts]}
        )
    )


if __name__ == "__main__":
    main()
