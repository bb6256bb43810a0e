"""Proves reference.py against transformers, which has no GemMoE but has both halves of it.

The oracle is transformers' GemmaForCausalLM with the feed-forward of every layer replaced by transformers'
MixtralSparseMoeBlock (hidden_act gelu_pytorch_tanh). Its configuration defaults, tensor mapping, attention, norms,
rotary embedding, router and experts are all transformers' own. Compared on random checkpoints of several shapes, at
every position, and with --golden on the files of tests/golden. With --planted, the reference is broken in one way
after another and the check must notice each.
"""
import argparse
import contextlib
import itertools
import json
import math
import pathlib
import sys
import tempfile
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import GemmaConfig, GemmaForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import random_checkpoint
import reference

# Relative to the largest logit. Both sides compute in f64; see widened().
TOLERANCE = 1e-11
# Logits in expected.json keep 9 significant digits.
GOLDEN_TOLERANCE = 1e-8


@contextlib.contextmanager
def widened():
    """Makes transformers compute in f64 throughout: it casts norms, softmax and rotary angles to f32 by name."""
    with (
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch, "float32", torch.float64),
    ):
        yield


def lowest_index_first(values, count, dim=-1):
    """A topk that keeps the lower index on ties, GemMoE's rule; torch.topk leaves their order open."""
    ordered, indices = values.sort(dim=dim, descending=True, stable=True)
    return ordered[..., :count], indices[..., :count]


def oracle(directory, options):
    """GemmaForCausalLM in f64 holding a checkpoint of any layout, and a list that collects the chosen experts."""
    directory = pathlib.Path(directory)
    values = json.loads((directory / "config.json").read_text())
    tensors = {}
    for file in directory.glob("*.safetensors"):
        tensors.update(load_file(file))

    def given(keys, kind):
        return {key: kind(values[key]) for key in keys if values.get(key) is not None}

    # Absent keys fall to the defaults of transformers' own classes.
    sizes = given(["hidden_size", "intermediate_size"], int)
    gelu = "gelu" if options.exact_gelu else "gelu_pytorch_tanh"
    config = GemmaConfig(
        **sizes,
        **given(["vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"], int),
        **given(["rope_theta", "rms_norm_eps"], float),
        hidden_act="gelu_pytorch_tanh",
        tie_word_embeddings="lm_head.weight" not in tensors,
        attn_implementation="eager",
    )
    moe_config = MixtralConfig(**sizes, **given(["num_local_experts", "num_experts_per_tok"], int), hidden_act=gelu)
    moe_config.num_experts_per_tok = min(moe_config.num_experts_per_tok, moe_config.num_local_experts)
    moe_config._experts_implementation = "eager"
    with widened():
        model = GemmaForCausalLM(config)
    chosen = []
    for index, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{index}"
        if f"{prefix}.block_sparse_moe.gate.weight" in tensors:
            for part in ("gate", "up", "down"):
                tensors.pop(f"{prefix}.mlp.{part}_proj.weight", None)
            tensors[f"{prefix}.mlp.gate.weight"] = tensors.pop(f"{prefix}.block_sparse_moe.gate.weight")
            w1, w2, w3 = (
                torch.stack([
                    tensors.pop(f"{prefix}.block_sparse_moe.experts.{expert}.{part}.weight")
                    for expert in range(moe_config.num_local_experts)
                ])
                for part in ("w1", "w2", "w3")
            )
            tensors[f"{prefix}.mlp.experts.gate_up_proj"] = torch.cat((w1, w3), dim=1)
            tensors[f"{prefix}.mlp.experts.down_proj"] = w2
        if f"{prefix}.mlp.gate.weight" in tensors:
            layer.mlp = MixtralSparseMoeBlock(moe_config)
            layer.mlp.gate.register_forward_hook(lambda module, inputs, outputs: chosen.append(outputs[2]))
        elif options.exact_gelu:
            layer.mlp.act_fn = torch.nn.GELU()
    model = model.double().eval()
    scale = torch.tensor(config.hidden_size**0.5, dtype=torch.float64)
    if not options.unrounded_embedding_scale:
        scale = scale.to(tensors["model.embed_tokens.weight"].dtype).double()
    model.model.embed_tokens.embed_scale = scale
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    missing, unexpected = model.load_state_dict(wide, strict=False)
    tied = ["lm_head.weight"] if config.tie_word_embeddings else []
    assert missing == tied and not unexpected, (missing, unexpected)
    return model, chosen


@torch.no_grad()
def run_oracle(model, chosen, tokens, arithmetic=widened):
    """Logits and chosen experts at every position."""
    chosen.clear()
    with arithmetic(), mock.patch.object(torch, "topk", lowest_index_first):
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0].double()
    experts = [indices.clone() for indices in chosen]
    if not experts:
        experts = [torch.zeros(len(tokens), 1, dtype=torch.int64)] * model.config.num_hidden_layers
    return logits, experts


def difference(expected, found):
    """Largest difference relative to the largest logit."""
    return ((expected - found).abs().max() / expected.abs().max()).item()


SHAPES = [
    # layout, hidden_size, intermediate_size, layers, heads, key-value heads, head_dim, experts, top_k, dtype, shards
    ("block", 64, 96, 2, 4, 4, 16, 8, 2, "f32", 1),
    ("block", 72, 50, 3, 4, 2, 24, 4, 2, "bf16", 3),
    ("block", 60, 34, 2, 6, 2, 10, 4, 4, "f16", 1),
    ("block", 40, 18, 1, 4, 1, 32, 64, 8, "f32", 1),
    ("fused", 72, 50, 2, 4, 1, 24, 8, 3, "f32", 3),
    ("fused", 48, 20, 2, 2, 2, 40, 1, 1, "bf16", 1),
    ("dense", 72, 50, 3, 4, 2, 24, None, None, "f32", 1),
    ("dense", 96, 130, 2, 3, 3, 32, None, None, "bf16", 1),
]


@contextlib.contextmanager
def random_directories():
    """(name, directory, options, prompts) of every shape and seed, tied and untied, with and without the options."""
    with tempfile.TemporaryDirectory() as scratch:
        cases = []
        for number, (seed, row) in enumerate(itertools.product(range(3), SHAPES)):
            layout, hidden, intermediate, layers, heads, key_value_heads, head_dim, experts, top_k, dtype, shards = row
            config = {
                "model_type": "gemma" if layout == "dense" else "gemmoe",
                "vocab_size": 317,
                "hidden_size": hidden,
                "intermediate_size": intermediate,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": key_value_heads,
                "head_dim": head_dim,
                "rope_theta": [10000.0, 500000.0, 100.0][seed],
                "rms_norm_eps": [1e-6, 1e-5, 0.05][seed],
            }
            if experts:
                config.update(num_local_experts=experts, num_experts_per_tok=top_k)
            # Routers of zeros make every probability equal, which tests the rule for ties.
            zero_routers = layout == "fused" and seed == 1
            dead_mlp = layout == "block" and seed == 2
            tensors = random_checkpoint.draw(config, layout, number, tied=seed != 1, dead_mlp=dead_mlp)
            if zero_routers:
                tensors.update({name: torch.zeros_like(t) for name, t in tensors.items() if "mlp.gate." in name})
            directory = pathlib.Path(scratch) / str(number)
            random_checkpoint.write(directory, config, random_checkpoint.cast(tensors, dtype), shards)
            options = reference.Options(unrounded_embedding_scale=number % 7 == 3, exact_gelu=number % 5 == 4)
            generator = torch.Generator().manual_seed(number)
            prompts = [[2] + torch.randint(3, 317, (length,), generator=generator).tolist() for length in (0, 6, 119)]
            cases.append((f"seed {seed} {' '.join(map(str, row))}", directory, options, prompts))
        yield cases


def golden_cases(root):
    """(directory, expected.json, options) of every golden checkpoint."""
    for path in sorted(pathlib.Path(root).glob("*/expected.json")):
        expected = json.loads(path.read_text())
        yield path.parent, expected, reference.Options(**expected["options"])


def check_random(cases, oracle_results, verbose):
    """Largest logit difference over all positions, and whether the experts agree everywhere."""
    worst, experts_agree = 0.0, True
    for (name, directory, options, prompts), results in zip(cases, oracle_results):
        model = reference.load(directory, options)
        error = 0.0
        for tokens, (logits, experts) in zip(prompts, results):
            found = reference.forward(model, tokens)
            error = max(error, difference(logits, found.logits))
            experts_agree &= all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(experts, found.experts))
        worst = max(worst, error)
        if verbose:
            print(f"{error:.1e}  {name}")
    return worst, experts_agree


def check_golden(root):
    """transformers in f64 and in f32 against expected.json: last logits, last experts, greedy continuation."""
    worst, failed = 0.0, []
    for directory, expected, options in golden_cases(root):
        errors = {}
        for precision in ("f64", "f32"):
            model, chosen = oracle(directory, options)
            if precision == "f32":
                model.float()
                model.model.embed_tokens.embed_scale = model.model.embed_tokens.embed_scale.float()
            arithmetic = widened if precision == "f64" else contextlib.nullcontext
            errors[precision] = 0.0
            for case in expected["cases"]:
                tokens, greedy = case["tokens"], case["greedy"]
                logits, experts = run_oracle(model, chosen, tokens, arithmetic)
                wanted = torch.tensor(case["logits"], dtype=torch.float64)
                errors[precision] = max(errors[precision], difference(wanted, logits[-1]))
                # One pass over prompt and continuation: the choice at each position must be the next greedy token.
                continued, _ = run_oracle(model, chosen, tokens + greedy, arithmetic)
                if continued[len(tokens) - 1 : -1].argmax(-1).tolist() != greedy:
                    failed.append(f"{directory.name}, {len(tokens)} tokens, {precision}: other greedy tokens")
                if [layer[-1].tolist() for layer in experts] != case["experts"]:
                    failed.append(f"{directory.name}, {len(tokens)} tokens, {precision}: other experts")
        print(f"{errors['f64']:.1e}  golden {directory.name} ({errors['f32']:.1e} in f32)", flush=True)
        worst = max(worst, errors["f64"])
    return worst, failed


def interleaved_rotate(x, theta):
    half = x.shape[-1] // 2
    paired = torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)
    turned = ORIGINAL["rotate"](paired, theta)
    return torch.stack((turned[..., :half], turned[..., half:]), dim=-1).flatten(-2)


def route_without_sum(logits, top_k):
    weights, indices = torch.softmax(logits, dim=-1).sort(dim=-1, descending=True, stable=True)
    return indices[:, :top_k], weights[:, :top_k]


def route_ties_to_higher_index(logits, top_k):
    indices, weights = ORIGINAL["route"](logits.flip(-1), top_k)
    return logits.shape[-1] - 1 - indices, weights


def expert_with_branches_swapped(x, expert, exact_gelu):
    w1, w3, w2 = expert
    return ORIGINAL["expert_output"](x, (w3, w1, w2), exact_gelu)


def load_with_embedding_as_head(directory, options=None):
    model = ORIGINAL["load"](directory, options)
    model.head = model.embedding
    return model


def attention_scale_of_another_width(config):
    return (config.hidden_size / config.num_attention_heads) ** -0.5


def config_with(**overrides):
    def read(directory):
        config = ORIGINAL["read_config"](directory)
        for key, value in overrides.items():
            setattr(config, key, min(value, config.num_local_experts) if key == "num_experts_per_tok" else value)
        return config

    return read


PATCHED = ("rms_norm", "rotate", "expert_output", "load", "read_config", "gelu", "route")
ORIGINAL = {name: getattr(reference, name) for name in PATCHED}

# Function of reference.py to replace, and the wrong version. Each is a mistake a GemMoE implementation could make.
PLANTED = {
    "norm weight without its one": ("rms_norm", lambda x, w, eps: ORIGINAL["rms_norm"](x, w - 1.0, eps)),
    "norm epsilon ignored": ("rms_norm", lambda x, w, eps: ORIGINAL["rms_norm"](x, w, 0.0)),
    "GeLU of the other kind": ("gelu", lambda x, exact: ORIGINAL["gelu"](x, not exact)),
    "SiLU for GeLU": ("gelu", lambda x, exact: x * torch.sigmoid(x)),
    "GeLU on the up branch": ("expert_output", expert_with_branches_swapped),
    "embedding not scaled": ("embedding_scale", lambda hidden, dtype, unrounded: 1.0),
    "embedding scale never rounded": ("embedding_scale", lambda hidden, dtype, unrounded: math.sqrt(hidden)),
    "embedding scale always rounded": (
        "embedding_scale",
        lambda hidden, dtype, unrounded: torch.tensor(hidden**0.5).to(dtype).item(),
    ),
    "rotary pairs interleaved": ("rotate", interleaved_rotate),
    "every token at position 0": ("rotate", lambda x, theta: x),
    "rope_theta ignored": ("read_config", config_with(rope_theta=10000.0)),
    "attention scaled for another width": ("attention_scale", attention_scale_of_another_width),
    "key-value heads tiled": ("repeat_heads", lambda x, repeats: x.repeat(repeats, 1, 1)),
    "no causal mask": ("causal_mask", lambda n: torch.zeros(n, n, dtype=torch.bool)),
    "kept weights not divided by their sum": ("route", route_without_sum),
    "equal probabilities to the higher index": ("route", route_ties_to_higher_index),
    "top 2 hard-coded": ("read_config", config_with(num_experts_per_tok=2)),
    "lm_head ignored": ("load", load_with_embedding_as_head),
}


def run_planted(cases, oracle_results, golden):
    """Plants every mistake in turn; returns those that went unnoticed."""
    unnoticed = []
    for name, (function, wrong) in PLANTED.items():
        with mock.patch.object(reference, function, wrong):
            error, _ = check_random(cases, oracle_results, verbose=False)
            seen_by = []
            for directory, expected, options in golden_cases(golden) if golden else ():
                model = reference.load(directory, options)
                seen_by.append(max(
                    difference(
                        torch.tensor(case["logits"], dtype=torch.float64),
                        reference.forward(model, case["tokens"]).logits[-1],
                    )
                    for case in expected["cases"]
                ))
        line = f"{error:.1e}  planted: {name}"
        if golden:
            noticed = [value for value in seen_by if value > 1e-4]
            line += f"; golden checkpoints off by more than 1e-4: {len(noticed)} of {len(seen_by)}"
            line += f" (largest {max(seen_by):.1e})"
        print(line, flush=True)
        if error <= TOLERANCE or golden and not noticed:
            unnoticed.append(name)
    return unnoticed


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", help="also check the checkpoints under this directory")
    parser.add_argument("--planted", action="store_true", help="check that planted mistakes are noticed")
    parser.add_argument("--break-reference", choices=list(PLANTED), help="plant one mistake: the check must then fail")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failures = []
    with random_directories() as cases, contextlib.ExitStack() as broken:
        oracle_results = []
        for _, directory, options, prompts in cases:
            model, chosen = oracle(directory, options)
            oracle_results.append([run_oracle(model, chosen, tokens) for tokens in prompts])
        if arguments.break_reference:
            broken.enter_context(mock.patch.object(reference, *PLANTED[arguments.break_reference]))
        worst, experts_agree = check_random(cases, oracle_results, verbose=True)
        if worst > TOLERANCE:
            failures.append(f"logits differ by {worst:.1e}")
        if not experts_agree:
            failures.append("other experts chosen")
        print(f"{worst:.1e}  largest difference relative to the largest logit; tolerance {TOLERANCE:.0e}")
        if arguments.golden:
            golden_worst, golden_failed = check_golden(arguments.golden)
            failures += golden_failed
            if golden_worst > GOLDEN_TOLERANCE:
                failures.append(f"golden logits differ by {golden_worst:.1e}")
        if arguments.planted:
            failures += [f"unnoticed: {name}" for name in run_planted(cases, oracle_results, arguments.golden)]
    for failure in failures:
        print(f"FAILED: {failure}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
