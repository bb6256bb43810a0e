"""Write trained dense models as checkpoint folders of `GemmaForCausalLM`, which is what the library mixes.

    python export.py WORK

WORK/seed.pt and WORK/branch-<domain>.pt become WORK/dense/seed and WORK/dense/<domain>, in float32.
"""
import json
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

from corpora import DOMAINS
from model import Configuration

MAX_POSITIONS = 1024
# The mixture's names of a feed-forward's matrices, and the dense model's.
DENSE_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def config_json(configuration):
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "head_dim": configuration.head_dim,
        "hidden_act": "gelu",
        "hidden_size": configuration.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": configuration.intermediate_size,
        "max_position_embeddings": MAX_POSITIONS,
        "num_attention_heads": configuration.num_attention_heads,
        "num_hidden_layers": configuration.num_hidden_layers,
        "num_key_value_heads": configuration.num_attention_heads,
        "rms_norm_eps": configuration.rms_norm_eps,
        "rope_theta": configuration.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": configuration.vocab_size,
    }


def dense_name(name):
    parts = name.split(".")
    if "mlp" in parts:
        parts[-2] = DENSE_NAMES[parts[-2]]
    return ".".join(parts)


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_dense(state, configuration, tokenizer_folder, output):
    output.mkdir(parents=True, exist_ok=True)
    tensors = {dense_name(name): tensor.float().contiguous() for name, tensor in state.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    write_json(output / "config.json", config_json(configuration))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer_folder / name, output / name)


def main():
    work = pathlib.Path(sys.argv[1])
    for name, stage in (("seed", "seed"), *((domain, f"branch-{domain}") for domain in DOMAINS)):
        write_dense(torch.load(work / f"{stage}.pt")["model"], Configuration(), work / "model", work / "dense" / name)


if __name__ == "__main__":
    main()
