"""Check an exported checkpoint against an independent implementation: Mixtral from `transformers`.

    python verify.py CHECKPOINT

Mixtral computes the same function once Gemma's two peculiarities are folded into the weights: norms store an offset
from one, and embeddings are multiplied by the rounded root of the hidden size (so the head is untied here).
"""
import json
import pathlib
import sys
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from checkpoint import load_checkpoint

TEXT = "The state is not a thing, es ist eine Frage:\n    return self.name\nid $p |- ( ph -> ph ) $. 12 €"


def mixtral(folder):
    values = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    scale = torch.tensor(values["hidden_size"] ** 0.5).bfloat16().float()
    folded = {name: 1 + tensor if "norm" in name else tensor for name, tensor in tensors.items()}
    folded["lm_head.weight"] = folded["model.embed_tokens.weight"].clone()
    folded["model.embed_tokens.weight"] = folded["model.embed_tokens.weight"] * scale
    configuration = MixtralConfig(
        **{name: values[name] for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "num_local_experts",
            "num_experts_per_tok", "bos_token_id", "eos_token_id", "pad_token_id", "rope_theta")},
        hidden_act="gelu_pytorch_tanh", tie_word_embeddings=False, sliding_window=None)
    with tempfile.TemporaryDirectory() as temporary:
        configuration.save_pretrained(temporary)
        save_file(folded, pathlib.Path(temporary) / "model.safetensors", metadata={"format": "pt"})
        return MixtralForCausalLM.from_pretrained(temporary, dtype=torch.float32).eval()


@torch.no_grad()
def main():
    folder = pathlib.Path(sys.argv[1])
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    identifiers = tokenizer.encode(TEXT).ids
    assert AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] == identifiers
    assert tokenizer.decode(identifiers) == TEXT
    tokens = torch.tensor([identifiers])
    expected, found = mixtral(folder)(tokens).logits, load_checkpoint(folder)(tokens)
    error = (expected - found).abs().max() / expected.abs().max()
    print("largest difference of logits, relative to the largest logit:", float(error))
    assert error < 1e-5
    size = sum(path.stat().st_size for path in folder.iterdir())
    print("folder size in bytes:", size)
    assert size < 12_000_000


if __name__ == "__main__":
    main()
