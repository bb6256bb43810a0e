"""Writes tests/golden_mix: four small dense models, and what an independent mixer makes of the first three and of all four.

    pip install -r requirements.txt && pip install --no-deps mixturekit==1.1.1 tqdm pyyaml
    python make_mix_golden.py ../../tests/golden_mix

The mixer is MixtureKit's method "traditional" in f32: everything but feed-forwards is averaged, those are copied. Its tensors
are renamed to GemMoE's; its routers, which are random, are left out.
"""
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file

import random_checkpoint

SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}
CONFIG = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma", **SHAPE, "hidden_act": "gelu_pytorch_tanh",
          "tie_word_embeddings": True, "torch_dtype": "float32", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
WEIGHTS = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


def renamed(name):
    """GemMoE's name of a tensor of MixtureKit; none for a router's and for the head that is the embedding."""
    if name == "lm_head.weight" or ".mlp." in name and ".experts." not in name:
        return None
    if ".experts." not in name:
        return name
    prefix, rest = name.split(".mlp.experts.")
    expert, weight, leaf = rest.split(".")
    return f"{prefix}.block_sparse_moe.experts.{expert}.{WEIGHTS[weight]}.{leaf}"


def mixed(experts):
    from MixtureKit.MoeExperts import MoeExperts

    configuration = {"moe_method": "traditional", "num_experts_per_tok": 2, "router_layers": [], "alphas": False,
                     "experts": [{"expert_name": path.name, "model_id": str(path)} for path in experts]}
    mixer = MoeExperts(configuration, torch_dtype=torch.float32)
    mixer.compose()
    entries = [(name, compute) for name, _, _, compute in mixer._plan]
    return {renamed(name): compute().contiguous() for name, compute in entries if renamed(name)}


def main(target):
    target = pathlib.Path(target)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    experts = []
    for seed in range(4):
        tensors = random_checkpoint.draw(SHAPE, "dense", 100 + seed, tied=True)
        path = target / f"dense_{seed}"
        random_checkpoint.write(path, CONFIG, random_checkpoint.cast(tensors, "f32"))
        experts.append(path)
    for count in (3, 4):
        tensors = mixed(experts[:count])
        save_file(tensors, target / f"expected_{count}.safetensors", metadata={"format": "pt"})
        print(count, "experts:", len(tensors), "tensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
