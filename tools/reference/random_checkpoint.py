"""Small random checkpoints, written as real model directories.

Scales are chosen so that a mistake shows: activations of order one, attention far from uniform, norm weights away from
zero, logits with a standard deviation of a few units, and layers that outweigh the embedding (otherwise a tied head
just repeats the last token).
"""
import json
import pathlib

import numpy
import torch
from safetensors.torch import save_file

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


def draw(shape, layout, seed, *, tied, dead_mlp=False):
    """Tensors by name, in float64. `shape` has the keys of config.json."""
    generator = numpy.random.default_rng(seed)
    hidden, intermediate, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    query_size = shape["num_attention_heads"] * shape["head_dim"]
    key_value_size = shape["num_key_value_heads"] * shape["head_dim"]
    count = shape.get("num_local_experts", 1)

    def normal(size, deviation):
        return torch.from_numpy(generator.standard_normal(size) * deviation)

    def feed_forward():
        w1 = normal((intermediate, hidden), 1.5 * hidden**-0.5)
        w3 = normal((intermediate, hidden), 1.2 * hidden**-0.5)
        w2 = normal((hidden, intermediate), 4.0 * intermediate**-0.5)
        return w1, w3, w2

    # The residual stream starts with a root mean square of 1.5, whatever the width.
    tensors = {"model.embed_tokens.weight": normal((vocab, hidden), 1.5 * hidden**-0.5)}
    for index in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{index}"
        tensors[f"{prefix}.input_layernorm.weight"] = normal(hidden, 0.3)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = normal(hidden, 0.3)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = normal((query_size, hidden), 1.5 * hidden**-0.5)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = normal((key_value_size, hidden), 1.5 * hidden**-0.5)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = normal((key_value_size, hidden), 2.0 * hidden**-0.5)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = normal((hidden, query_size), 2.0 * query_size**-0.5)
        if layout == "dense" or dead_mlp:
            w1, w3, w2 = feed_forward()
            tensors[f"{prefix}.mlp.gate_proj.weight"] = w1
            tensors[f"{prefix}.mlp.up_proj.weight"] = w3
            tensors[f"{prefix}.mlp.down_proj.weight"] = w2
        if layout == "block":
            tensors[f"{prefix}.block_sparse_moe.gate.weight"] = normal((count, hidden), 1.5 * hidden**-0.5)
            for expert in range(count):
                w1, w3, w2 = feed_forward()
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.w1.weight"] = w1
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.w2.weight"] = w2
                tensors[f"{prefix}.block_sparse_moe.experts.{expert}.w3.weight"] = w3
        if layout == "fused":
            tensors[f"{prefix}.mlp.gate.weight"] = normal((count, hidden), 1.5 * hidden**-0.5)
            experts = [feed_forward() for _ in range(count)]
            tensors[f"{prefix}.mlp.experts.gate_up_proj"] = torch.stack([torch.cat((w1, w3)) for w1, w3, _ in experts])
            tensors[f"{prefix}.mlp.experts.down_proj"] = torch.stack([w2 for _, _, w2 in experts])
    tensors["model.norm.weight"] = normal(hidden, 0.3)
    if not tied:
        tensors["lm_head.weight"] = normal((vocab, hidden), 2.0 * hidden**-0.5)
    return tensors


def cast(tensors, dtype):
    """`dtype` is a name, or a list of (part of a tensor name, dtype name) of which the first match counts."""
    rules = [("", dtype)] if isinstance(dtype, str) else dtype

    def dtype_of(name):
        return DTYPES[next(kind for part, kind in rules if part in name)]

    return {name: tensor.to(dtype_of(name)).contiguous() for name, tensor in tensors.items()}


def write(directory, config, tensors, shards=1):
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update({name: file for name in part})
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
