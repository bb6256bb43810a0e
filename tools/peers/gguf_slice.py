"""Writes the slice of the benches (config.json, model.safetensors) as a GGUF file of bf16 for llama.cpp.

    gguf_slice.py SLICE_DIR OUT.gguf

The architecture is `llama` with experts: the same shapes and the same bits. SiLU stands where GemMoE has GeLU, and the
embedding is not scaled, which costs the same. Norms get the 1 that Gemma's add. One tensor is in memory at a time.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

BF16 = gguf.GGMLQuantizationType.BF16
F32 = gguf.GGMLQuantizationType.F32


class Safetensors:
    def __init__(self, path):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header = json.loads(file.read(length))
        self.bytes = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)

    def words(self, name):
        """bf16 as the integers of their bits, in the tensor's shape."""
        info = self.header[name]
        if info["dtype"] != "BF16":
            raise SystemExit(f'{name} is {info["dtype"]}, expected BF16')
        start, end = info["data_offsets"]
        return self.bytes[start:end].view(np.uint16).reshape(info["shape"])


def to_f32(words):
    return (words.astype(np.uint32) << 16).view(np.float32)


def tensors(config, weights):
    """(name, type, shape, function that makes the array), in the file's order."""
    layers, experts = config["num_hidden_layers"], config["num_local_experts"]

    def matrix(name, source):
        return name, BF16, weights.header[source]["shape"], lambda: weights.words(source)

    def norm(name, source):
        return name, F32, weights.header[source]["shape"], lambda: 1 + to_f32(weights.words(source))

    yield matrix("token_embd.weight", "model.embed_tokens.weight")
    yield norm("output_norm.weight", "model.norm.weight")
    for layer in range(layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        yield norm(f"{theirs}.attn_norm.weight", f"{ours}.input_layernorm.weight")
        yield norm(f"{theirs}.ffn_norm.weight", f"{ours}.post_attention_layernorm.weight")
        for name, source in [("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("output", "o_proj")]:
            yield matrix(f"{theirs}.attn_{name}.weight", f"{ours}.self_attn.{source}.weight")
        router = f"{ours}.block_sparse_moe.gate.weight"
        shape = weights.header[router]["shape"]
        yield f"{theirs}.ffn_gate_inp.weight", F32, shape, lambda r=router: to_f32(weights.words(r))
        for name, source in [("ffn_gate_exps", "w1"), ("ffn_up_exps", "w3"), ("ffn_down_exps", "w2")]:
            sources = [f"{ours}.block_sparse_moe.experts.{expert}.{source}.weight" for expert in range(experts)]
            shape = [experts, *weights.header[sources[0]]["shape"]]
            yield f"{theirs}.{name}.weight", BF16, shape, lambda s=sources: np.stack([weights.words(one) for one in s])


def add_parameters(writer, config):
    hidden, heads = config.get("hidden_size", 3072), config.get("num_attention_heads", 16)
    head_dim = config.get("head_dim", 256)
    writer.add_context_length(config.get("max_position_embeddings", 8192))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config.get("intermediate_size", 24576))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_expert_count(config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    # llama-bench draws token ids itself: no vocabulary is needed.
    writer.add_tokenizer_model("no_vocab")


def main(slice_directory, out):
    directory = Path(slice_directory)
    config = json.loads((directory / "config.json").read_text())
    weights = Safetensors(directory / "model.safetensors")
    writer = gguf.GGUFWriter(out, "llama")
    add_parameters(writer, config)
    arrays = []
    for name, kind, shape, make in tensors(config, weights):
        size = int(np.prod(shape)) * (2 if kind == BF16 else 4)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        arrays.append(make)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for make in arrays:
        writer.write_tensor_data(make())
    writer.close()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
