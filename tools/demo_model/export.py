"""Write the mixture with its trained router as a checkpoint folder.

    python export.py WORK OUTPUT
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


def config_json(configuration):
    return {
        "architectures": ["GemmoeForCausalLM"],
        "model_type": "gemmoe",
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
        "num_experts_per_tok": configuration.num_experts_per_tok,
        "num_hidden_layers": configuration.num_hidden_layers,
        "num_key_value_heads": configuration.num_attention_heads,
        "num_local_experts": configuration.num_local_experts,
        "output_router_logits": False,
        "rms_norm_eps": configuration.rms_norm_eps,
        "rope_theta": configuration.rope_theta,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": configuration.vocab_size,
    }


GENERATION_CONFIG = {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0,
                     "do_sample": True, "temperature": 0.7, "top_k": 40}


def write_json(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main():
    work, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    state = torch.load(work / "router.pt")["model"]
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in state.items()}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    configuration = Configuration(num_local_experts=len(DOMAINS))
    write_json(output / "config.json", config_json(configuration))
    write_json(output / "generation_config.json", GENERATION_CONFIG)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / "model" / name, output / name)
    print(sum(tensor.numel() for tensor in tensors.values()), "parameters")


if __name__ == "__main__":
    main()
