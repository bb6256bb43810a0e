"""Writes the golden checkpoints of tests/golden: small random models and what the reference makes of them.

    python make_golden.py ../../tests/golden

Seeds and prompts are redrawn until every choice is unambiguous in f32: the greedy tokens, and the routing of every
position. A test can then demand equal tokens and experts, not merely close logits.
"""
import argparse
import json
import pathlib
import shutil
from dataclasses import asdict, dataclass, field

import numpy
import torch

import random_checkpoint
import reference

GREEDY_TOKENS = 16
PROMPT_LENGTHS = (1, 7, 120)
LOGIT_GAP = 0.03  # between the two best tokens of every greedy step
KEPT_GAP = 1e-3  # between neighbouring probabilities down to the first dropped one, last prompt position
CUT_GAP = 1e-5  # between the last kept and the first dropped probability, every position
DISTINCT_TOKENS = 6  # in each greedy continuation, so that it is no mere repetition
PROMPT_DRAWS = 60

GEMMOE = {"architectures": ["GemmoeForCausalLM"], "model_type": "gemmoe"}
GEMMA = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
# As in the published files.
TOKENS = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
USUAL = {"hidden_act": "gelu", "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0}
NULLS = {"rope_scaling": None, "sliding_window": None, "hidden_activation": None}


@dataclass
class Golden:
    name: str
    description: str
    sizes: tuple  # vocab, hidden, intermediate, layers, heads, key-value heads, head_dim
    experts: tuple | None  # num_local_experts, num_experts_per_tok; None: dense
    config: dict  # the remaining keys of config.json
    layout: str = "block"
    dtype: object = "bf16"
    shards: int = 1
    tied: bool = True
    dead_mlp: bool = False
    zero_routers: bool = False
    absent: tuple = ()  # keys left to their defaults
    options: reference.Options = field(default_factory=reference.Options)


SIZE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)

GOLDEN = [
    Golden(
        "block_bf16_gqa",
        "BF16, block_sparse_moe, 4 experts top 2, grouped queries, null keys, tied by default",
        (317, 60, 50, 2, 4, 2, 24), (4, 2), {**GEMMOE, **TOKENS, **USUAL, **NULLS, "router_aux_loss_coef": 0.02},
    ),
    Golden(
        "block_f32_mha_untied",
        "F32, block_sparse_moe, 4 experts top 2, as many key-value heads as heads, head of its own",
        (97, 24, 20, 2, 2, 2, 16), (4, 2), {**GEMMOE, **TOKENS, **USUAL, "tie_word_embeddings": False},
        dtype="f32", tied=False,
    ),
    Golden(
        "block_f16_mqa_shards",
        "F16 in 3 shards, block_sparse_moe, 2 experts top 1, one key-value head, 3 layers, hidden size 72",
        (317, 72, 26, 3, 4, 1, 16), (2, 1), {**GEMMOE, **TOKENS, **USUAL}, dtype="f16", shards=3,
    ),
    Golden(
        "block_f16_e8_top1",
        "F16, block_sparse_moe, 8 experts top 1, rope_theta 1000000, rms_norm_eps 0.001",
        (131, 40, 18, 2, 2, 1, 20), (8, 1),
        {**GEMMOE, **TOKENS, **USUAL, "rope_theta": 1000000.0, "rms_norm_eps": 0.001, "tie_word_embeddings": True},
        dtype="f16",
    ),
    Golden(
        "block_f32_all_experts",
        "F32 in 3 shards, block_sparse_moe, all 4 of 4 experts kept, odd head_dim / 2",
        (101, 40, 22, 1, 3, 1, 14), (4, 4), {**GEMMOE, **TOKENS, **USUAL}, dtype="f32", shards=3,
    ),
    Golden(
        "block_bf16_one_expert",
        "BF16, block_sparse_moe with a single expert and a router that has nothing to choose",
        (131, 48, 36, 2, 2, 2, 20), (1, 1), {**GEMMOE, **TOKENS, **USUAL, **NULLS},
    ),
    Golden(
        "block_bf16_e64_top8",
        "BF16, block_sparse_moe, 64 experts top 8",
        (97, 24, 16, 1, 2, 1, 16), (64, 8), {**GEMMOE, **TOKENS, **USUAL},
    ),
    Golden(
        "block_f16_dead_mlp",
        "F16, block_sparse_moe with an unused dense mlp beside it in every layer",
        (131, 40, 22, 2, 4, 2, 12), (4, 2), {**GEMMOE, **TOKENS, **USUAL}, dtype="f16", dead_mlp=True,
    ),
    Golden(
        "block_bf16_tied_but_head",
        "BF16, tie_word_embeddings true, yet an lm_head.weight is present and must be used",
        (131, 40, 24, 2, 2, 2, 24), (4, 2), {**GEMMOE, **TOKENS, **USUAL, "tie_word_embeddings": True}, tied=False,
    ),
    Golden(
        "block_mixed_dtypes_shards",
        "3 shards, block_sparse_moe: F16 embedding, F32 norms and routers, F16 attention, BF16 experts and head",
        (131, 60, 30, 2, 4, 1, 20), (4, 3), {**GEMMOE, **TOKENS, **USUAL, "tie_word_embeddings": False},
        dtype=[("norm", "f32"), ("gate.weight", "f32"), ("experts", "bf16"), ("lm_head", "bf16"), ("", "f16")],
        shards=3, tied=False,
    ),
    Golden(
        "block_bf16_defaults",
        "BF16, 8 experts top 2, 16 heads: every absent key relies on its default",
        (97, 24, 12, 2, 16, 16, 4), (8, 2), GEMMOE,
        absent=("num_attention_heads", "num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
    ),
    Golden(
        "block_f16_numbers",
        "F16, integers written as floats, a float written as integer, rope_theta 500000, rms_norm_eps 0.05",
        (127.0, 40.0, 20.0, 2.0, 4.0, 2.0, 12.0), (4.0, 2.0),
        {
            **GEMMOE, "bos_token_id": 2.0, "eos_token_id": 1.0, **NULLS, "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192.0, "rms_norm_eps": 0.05, "rope_theta": 500000, "attention_bias": False,
        },
        dtype="f16",
    ),
    Golden(
        "block_bf16_head_dim_256",
        "BF16, block_sparse_moe, one head of 256 as in the published models, hidden size 24, 2 experts top 2",
        (97, 24, 50, 1, 1, 1, 256), (2, 2), {**GEMMOE, **TOKENS, **USUAL},
    ),
    Golden(
        "block_bf16_unrounded_scale",
        "BF16, block_sparse_moe, expected values with the embedding scale not rounded",
        (131, 40, 20, 2, 2, 1, 20), (4, 2), {**GEMMOE, **TOKENS, **USUAL},
        options=reference.Options(unrounded_embedding_scale=True),
    ),
    Golden(
        "block_bf16_exact_gelu",
        "BF16, block_sparse_moe, expected values with the exact (erf) GeLU",
        (131, 40, 20, 2, 2, 1, 20), (4, 2), {**GEMMOE, **TOKENS, **USUAL},
        options=reference.Options(exact_gelu=True),
    ),
    Golden(
        "block_bf16_zero_routers",
        "BF16, block_sparse_moe, routers of zeros: all probabilities equal, so the lowest indices must be kept",
        (97, 24, 20, 2, 2, 2, 12), (5, 2), {**GEMMOE, **TOKENS, **USUAL}, zero_routers=True,
    ),
    Golden(
        "fused_bf16_e8_top3",
        "BF16, fused mlp.experts layout, 8 experts top 3",
        (131, 40, 18, 2, 4, 2, 12), (8, 3), {**GEMMOE, **TOKENS, **USUAL}, layout="fused",
    ),
    Golden(
        "fused_f32_shards",
        "F32 in 3 shards, fused mlp.experts layout, both of 2 experts kept, 3 layers",
        (101, 40, 20, 3, 2, 1, 24), (2, 2), {**GEMMOE, **TOKENS, **USUAL, "rope_theta": 500.0},
        layout="fused", dtype="f32", shards=3,
    ),
    Golden(
        "fused_f16_untied",
        "F16, fused mlp.experts layout, 4 experts top 2, head of its own",
        (317, 60, 50, 1, 4, 4, 20), (4, 2), {**GEMMOE, **TOKENS, **USUAL, "tie_word_embeddings": False},
        layout="fused", dtype="f16", tied=False,
    ),
    Golden(
        "dense_gemma_bf16",
        "BF16, plain GemmaForCausalLM: mlp.* and no experts",
        (317, 72, 50, 2, 4, 4, 24), None, {**GEMMA, **TOKENS, **USUAL, "hidden_activation": None}, layout="dense",
    ),
    Golden(
        "dense_gemma_f32_shards",
        "F32 in 3 shards, plain GemmaForCausalLM, rope_theta and rms_norm_eps absent, one key-value head",
        (317, 40, 30, 1, 4, 1, 12), None,
        {**GEMMA, **TOKENS, "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
        layout="dense", dtype="f32", shards=3,
    ),
    Golden(
        "dense_named_gemmoe_bf16",
        "BF16, model_type gemmoe without expert keys and with dense mlp.* tensors: one expert, no router",
        (211, 60, 44, 2, 2, 2, 20), None, {**GEMMOE, **TOKENS, **USUAL}, layout="dense",
    ),
]


def config_of(golden):
    config = {**golden.config, **dict(zip(SIZE_KEYS, golden.sizes))}
    if golden.experts:
        config["num_local_experts"], config["num_experts_per_tok"] = golden.experts
    dtype = golden.dtype if isinstance(golden.dtype, str) else golden.dtype[-1][1]
    config["torch_dtype"] = str(random_checkpoint.DTYPES[dtype]).removeprefix("torch.")
    return config


def logits_are_clear(logits):
    best, second = logits.topk(2).values.tolist()
    return best - second > LOGIT_GAP


def is_tied(probabilities):
    """Exactly equal everywhere, as a router of zeros makes them in any arithmetic: clear by the rule for ties."""
    return (probabilities == probabilities[0, 0]).all() and probabilities.shape[1] > 1


def order_is_clear(result, top_k):
    """Of the kept experts and the first dropped one, at the last position."""
    for probabilities in result.probabilities:
        if probabilities is not None and not is_tied(probabilities):
            ordered = probabilities[-1].sort(descending=True).values[: top_k + 1]
            if (ordered[:-1] - ordered[1:] < KEPT_GAP).any():
                return False
    return True


def cut_is_clear(result, top_k):
    for probabilities in result.probabilities:
        if probabilities is not None and not is_tied(probabilities) and top_k < probabilities.shape[1]:
            kept_and_dropped = probabilities.topk(top_k + 1).values[:, -2:]
            if (kept_and_dropped[:, 0] - kept_and_dropped[:, 1] < CUT_GAP).any():
                return False
    return True


def case(model, tokens):
    """The entry of expected.json for a prompt, or None where a choice is too close."""
    top_k = model.config.num_experts_per_tok
    result = reference.forward(model, tokens)
    if not order_is_clear(result, top_k):
        return None
    greedy = []
    while len(greedy) < GREEDY_TOKENS:
        step = reference.forward(model, tokens + greedy)
        if not (logits_are_clear(step.logits[-1]) and cut_is_clear(step, top_k)):
            return None
        greedy.append(step.logits[-1].argmax().item())
    if len(set(greedy)) < DISTINCT_TOKENS:
        return None
    return {
        "tokens": tokens,
        "logits": [float(f"{logit:.9g}") for logit in result.logits[-1].tolist()],
        "experts": [chosen[-1].tolist() for chosen in result.experts],
        "greedy": greedy,
    }


def cases(model, seed):
    """A case of every prompt length, or None where this checkpoint yields none."""
    generator = numpy.random.default_rng(seed)
    found = []
    for length in PROMPT_LENGTHS:
        for _ in range(1 if length == 1 else PROMPT_DRAWS):
            tokens = [2] + generator.integers(0, model.config.vocab_size, length - 1).tolist()
            entry = case(model, tokens)
            if entry:
                found.append(entry)
                break
        else:
            return None
    return found


def make(golden, root, first_seed):
    config = config_of(golden)
    shape = {key: int(value) for key, value in config.items() if key in SIZE_KEYS or key == "num_local_experts"}
    written = {key: value for key, value in config.items() if key not in golden.absent}
    directory = root / golden.name
    seed = first_seed
    while True:
        shutil.rmtree(directory, ignore_errors=True)
        tensors = random_checkpoint.draw(shape, golden.layout, seed, tied=golden.tied, dead_mlp=golden.dead_mlp)
        if golden.zero_routers:
            tensors.update({name: torch.zeros_like(t) for name, t in tensors.items() if "moe.gate" in name})
        random_checkpoint.write(directory, written, random_checkpoint.cast(tensors, golden.dtype), golden.shards)
        model = reference.load(directory, golden.options)
        entries = cases(model, seed)
        if entries:
            break
        seed += 1
    options = {name: True for name, value in asdict(golden.options).items() if value}
    write_expected(directory / "expected.json", golden.description, options, entries)
    deviation = torch.tensor(entries[-1]["logits"]).std().item()
    size = sum(file.stat().st_size for file in directory.iterdir())
    print(f"{golden.name:28} seed {seed:5}  {size / 1024:5.0f} KiB  logit deviation {deviation:.2f}", flush=True)


def write_expected(path, description, options, entries):
    """One list per line, to keep differences readable and the file small."""
    lines = [f'  "description": {json.dumps(description)},', f'  "options": {json.dumps(options)},', '  "cases": [']
    for number, entry in enumerate(entries):
        members = [f'"{key}": {json.dumps(value, separators=(",", ":"))}' for key, value in entry.items()]
        lines.append("    {" + ",\n     ".join(members) + "}" + ("," if number + 1 < len(entries) else ""))
    path.write_text("{\n" + "\n".join(lines) + "\n  ]\n}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--only", help="make this checkpoint alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for number, golden in enumerate(GOLDEN):
        if arguments.only in (None, golden.name):
            make(golden, arguments.directory, first_seed=1000 * (number + 1))


if __name__ == "__main__":
    main()
