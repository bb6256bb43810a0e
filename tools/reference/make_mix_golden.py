"""Writes tests/golden_mix: four small dense models, and what an independent mixer makes of the first three and of all four.

    pip install -r requirements.txt
    pip install --no-deps mixturekit==1.1.1 tqdm pyyaml
    python make_mix_golden.py ../../tests/golden_mix

The mixer is MixtureKit's method "traditional" in f32: everything but feed-forwards is averaged, those are copied. Its tensors
are renamed to GemMoE's; its routers, which are random, are left out. What routers are to be where they are made from texts is
worked out here, in float64, by the reference's forward pass, as docs/mix.md has it.
"""
import json
import pathlib
import shutil
import sys
import tempfile

import torch
from safetensors.torch import save_file

import random_checkpoint
import reference

SHAPE = {
    "vocab_size": 320, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
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


# Letters that the tests' tokenizer has no pieces for are bytes, and those begin at 6.
PROMPTS = [["abc", "cab fa"], ["xyzzy"], ["123", "4567", "89"], ["ABBA"]]
NEGATIVE = [["zz"], [], ["c", "b"], []]
LAMBDA = 0.05


def tokens_of(text):
    return [2] + [262 if letter == " " else 6 + ord(letter) for letter in text]


def router_inputs(model, text):
    """[layers][tokens but BOS, hidden_size]"""
    seen = []
    original = reference.mixture

    def watched(x, *rest):
        seen.append(x[1:])
        return original(x, *rest)

    reference.mixture = watched
    try:
        reference.forward(model, tokens_of(text))
    finally:
        reference.mixture = original
    return seen


def normalised(rows):
    return torch.stack([row / row.norm() for row in rows])


def mean_of(texts, layer, model):
    return torch.stack([router_inputs(model, text)[layer].mean(0) for text in texts]).mean(0)


def hidden(model, layer):
    rows = []
    for wanted, unwanted in zip(PROMPTS, NEGATIVE):
        rows.append(mean_of(wanted, layer, model) - (mean_of(unwanted, layer, model) if unwanted else 0))
    return normalised(rows)


def ridge(model, layer):
    inputs = [torch.cat([router_inputs(model, text)[layer] for text in texts]) for texts in PROMPTS]
    second = sum(x.T @ x / len(x) for x in inputs)
    penalty = LAMBDA * second.diagonal().mean()
    return torch.linalg.solve(second + penalty * torch.eye(len(second), dtype=torch.float64),
                              torch.stack([x.mean(0) for x in inputs]).T).T


def embedding(model, layer):
    def total(texts):
        return sum((model.embedding[tokens_of(text)[1:]].sum(0) for text in texts), torch.zeros(()))

    return normalised([total(wanted) - total(unwanted) for wanted, unwanted in zip(PROMPTS, NEGATIVE)])


def dense_mean(experts):
    """As MixtureKit averages, feed-forwards too."""
    models = [reference.read_tensors(path) for path in experts]
    mean = {}
    for name in models[0]:
        total = models[0][name] / len(models)
        for model in models[1:]:
            total = total + model[name] / len(models)
        mean[name] = total
    return mean


def routers(experts, mixture, directory):
    directory = pathlib.Path(directory)
    random_checkpoint.write(directory / "mean", CONFIG, dense_mean(experts))
    result = {"prompts": PROMPTS, "negative_prompts": NEGATIVE, "lambda": LAMBDA, "routers": {}}
    for base, path in (("mean", directory / "mean"), ("dense_1", experts[1])):
        model = reference.load(path)
        for make in (hidden, embedding, ridge):
            layers = [make(model, layer) for layer in range(SHAPE["num_hidden_layers"])]
            result["routers"][f"{base} {make.__name__}"] = [layer.flatten().tolist() for layer in layers]
    # The whole mixture with the first of these routers.
    tensors = dict(mixture)
    for layer, numbers in enumerate(result["routers"]["mean hidden"]):
        gate = torch.tensor(numbers, dtype=torch.float64).view(len(experts), -1).to(torch.float32)
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = gate
    config = {**CONFIG, "model_type": "gemmoe", "num_local_experts": len(experts), "num_experts_per_tok": 2}
    random_checkpoint.write(directory / "mixture", config, tensors)
    result["tokens"] = tokens_of("abzzyc 19")
    logits = reference.forward(reference.load(directory / "mixture"), result["tokens"]).logits[-1]
    result["logits"] = [float(f"{value:.9g}") for value in logits]
    return result


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
    with tempfile.TemporaryDirectory() as directory:
        made = json.dumps(routers(experts, tensors, directory))
        (target / "routers.json").write_text(made + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
