"""Writes tests/golden_gradients: small random models, losses of training, and what autograd says of their gates' gradients.

    python make_gradient_golden.py ../../tests/golden_gradients

Documents run one by one, in float64, through the parts of `reference.py`; what the library packs, masks and recomputes
must not show. Losses are written from their papers' formulas. Models and documents are redrawn until every token's choice of
experts is unambiguous in f32.
"""
import argparse
import json
import math
import pathlib
import shutil

import torch
from safetensors.torch import save_file

import random_checkpoint
import reference

CUT_GAP = 1e-4  # between the last kept and the first dropped probability, and between kept ones

USUAL = {
    "architectures": ["GemmoeForCausalLM"], "model_type": "gemmoe", "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "max_position_embeddings": 8192, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
}
SIZE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok",
)
# name, sizes by SIZE_KEYS, tied, exact GeLU
MODELS = [
    ("grouped_heads", (61, 24, 16, 3, 4, 2, 8, 4, 2), True, False),
    ("top3_own_head_exact_gelu", (53, 20, 12, 2, 3, 1, 6, 5, 3), False, True),
]


def forward(model, tokens, routers, soft):
    """Logits of the vocabulary [positions, vocab_size] and of the routers, layer by layer [positions, experts]."""
    config, options = model.config, model.options
    scale = reference.embedding_scale(config.hidden_size, model.embedding_dtype, options.unrounded_embedding_scale)
    x = model.embedding[torch.tensor(tokens)] * scale
    router_logits = []
    for layer, router in zip(model.layers, routers):
        x = x + reference.attention(reference.rms_norm(x, layer.input_norm, config.rms_norm_eps), layer, config)
        normed = reference.rms_norm(x, layer.post_attention_norm, config.rms_norm_eps)
        logits = normed @ router.T
        probabilities = torch.softmax(logits, dim=-1)
        if not soft:
            chosen, weights = reference.route(logits, config.num_experts_per_tok)
            probabilities = torch.zeros_like(probabilities).scatter(1, chosen, weights)
        outputs = [reference.expert_output(normed, expert, options.exact_gelu) for expert in layer.experts]
        x = x + (probabilities[:, :, None] * torch.stack(outputs, dim=1)).sum(1)
        router_logits.append(logits)
    return reference.rms_norm(x, model.final_norm, config.rms_norm_eps) @ model.head.T, router_logits


def log_probabilities(model, document, routers, soft, padding):
    """Of the response's tokens, and the router logits of the document's own tokens; padding follows them."""
    tokens, is_response = document
    logits, router_logits = forward(model, tokens + [0] * padding, routers, soft)
    every = torch.log_softmax(logits, dim=-1)
    wanted = [every[at - 1, tokens[at]] for at in range(1, len(tokens)) if is_response[at]]
    return torch.stack(wanted), [layer[: len(tokens)] for layer in router_logits]


def balance(router_logits, top_k, form):
    """Switch Transformers' loss for k choices, as Mixtral's class has it over all layers' tokens at once."""
    def of(logits):
        probabilities = torch.softmax(logits, dim=-1)
        chosen = probabilities.topk(top_k, dim=-1).indices
        shares = torch.nn.functional.one_hot(chosen, logits.shape[-1]).to(logits.dtype).mean(0)  # [k, experts]
        return logits.shape[-1] * (shares * probabilities.mean(0)).sum()

    if form == "global":
        return of(torch.cat(router_logits))
    return torch.stack([of(logits) for logits in router_logits]).mean()


def z_loss(router_logits):
    return torch.stack([torch.logsumexp(logits, dim=-1).square().mean() for logits in router_logits]).mean()


def loss_of(model, case, routers, initial):
    documents = case["documents"]
    soft, padding = case.get("soft", False), case.get("padding", 0)
    runs = [log_probabilities(model, document, routers, soft, padding) for document in documents]
    per_layer = [torch.cat([logits[layer] for _, logits in runs]) for layer in range(len(routers))]
    loss = 0.0
    if case["loss"] == "sft":
        loss = loss - torch.cat([wanted for wanted, _ in runs]).mean()
    else:
        beta, smoothing = case["beta"], case.get("label_smoothing", 0.0)
        take = torch.mean if case.get("mean_log_probability", False) else torch.sum
        with torch.no_grad():
            references = [
                take(log_probabilities(model, document, initial, soft, padding)[0]) for document in documents
            ]
        policies = [take(wanted) for wanted, _ in runs]
        losses = []
        # Documents are chosen, rejected, chosen, rejected.
        for at in range(0, len(documents), 2):
            margin = (policies[at] - policies[at + 1]) - (references[at] - references[at + 1])
            if case["loss"] == "ipo":
                losses.append((margin - 1 / (2 * beta)) ** 2)
            else:
                inside = torch.nn.functional.logsigmoid
                losses.append(-(1 - smoothing) * inside(beta * margin) - smoothing * inside(-beta * margin))
        loss = loss + torch.stack(losses).mean()
    if case.get("balance"):
        loss = loss + case["balance"] * balance(per_layer, model.config.num_experts_per_tok, case.get("form", "global"))
    if case.get("z"):
        loss = loss + case["z"] * z_loss(per_layer)
    return loss, per_layer


def draw_document(generator, vocab_size, prompt, response):
    tokens = [2] + torch.randint(3, vocab_size, (prompt + response - 1,), generator=generator).tolist()
    return [tokens, [False] * prompt + [True] * response]


def draw_cases(generator, vocab_size):
    def draw(*lengths):
        return [draw_document(generator, vocab_size, prompt, response) for prompt, response in lengths]

    turns = draw((30, 40))[0]
    turns[1] = [at > 0 and (at // 9) % 2 == 1 for at in range(len(turns[0]))]
    one, two = draw((4, 19)), draw((5, 9), (3, 17))
    pairs = draw((4, 6), (4, 9), (7, 12), (7, 3))
    return [
        {"name": "sft", "loss": "sft", "documents": one},
        {"name": "sft_packed", "loss": "sft", "documents": two},
        {"name": "sft_padded", "loss": "sft", "documents": two, "padding": 7, "balance": 0.5, "z": 0.1},
        {"name": "sft_turns", "loss": "sft", "documents": [turns]},
        {"name": "sft_soft", "loss": "sft", "documents": two, "soft": True, "balance": 0.3},
        {"name": "balance_global", "loss": "sft", "documents": two, "balance": 3.0, "form": "global"},
        {"name": "balance_per_layer", "loss": "sft", "documents": two, "balance": 3.0, "form": "per_layer"},
        {"name": "z_loss", "loss": "sft", "documents": two, "z": 2.0},
        {"name": "dpo_sigmoid", "loss": "sigmoid", "documents": pairs, "beta": 0.4},
        {"name": "dpo_smoothed", "loss": "sigmoid", "documents": pairs, "beta": 0.4, "label_smoothing": 0.2,
         "balance": 0.1},
        {"name": "dpo_ipo", "loss": "ipo", "documents": pairs, "beta": 0.3},
        {"name": "dpo_ipo_means", "loss": "ipo", "documents": pairs, "beta": 0.3, "mean_log_probability": True},
    ]


def is_ambiguous(per_layer, top_k):
    ordered = torch.softmax(torch.cat(per_layer), dim=-1).sort(dim=-1, descending=True).values
    return bool((ordered[:, :top_k] - ordered[:, 1 : top_k + 1] < CUT_GAP).any())


def write_model(target, seed, name, sizes, tied, exact_gelu):
    config = {**dict(zip(SIZE_KEYS, sizes)), **USUAL, "tie_word_embeddings": tied}
    directory = target / name
    tensors = random_checkpoint.cast(random_checkpoint.draw(config, "block", seed, tied=tied), "f32")
    random_checkpoint.write(directory, config, tensors)
    model = reference.load(directory, reference.Options(exact_gelu=exact_gelu))
    generator = torch.Generator().manual_seed(seed)
    initial = [layer.router for layer in model.layers]
    # Gates that are being trained: near the initial ones, which are the reference of DPO.
    step = [torch.randn(router.shape, generator=generator, dtype=torch.float64) for router in initial]
    trained = [(router + 0.05 * part).to(torch.float32).double() for router, part in zip(initial, step)]
    results, cases = {"gates": torch.stack(trained).float()}, draw_cases(generator, config["vocab_size"])
    for case in cases:
        routers = [router.clone().requires_grad_() for router in trained]
        loss, per_layer = loss_of(model, case, routers, initial)
        if is_ambiguous(per_layer, model.config.num_experts_per_tok):
            return False
        loss.backward()
        case["value"] = loss.item()
        results[case["name"]] = torch.stack([router.grad for router in routers]).float()
    save_file(results, directory / "gradients.safetensors")
    text = json.dumps({"exact_gelu": exact_gelu, "cases": cases}, separators=(",", ":"))
    (directory / "cases.json").write_text(text.replace('},{"name"', '},\n{"name"') + "\n")
    return True


def write_optimiser(target):
    """Twenty steps of torch's AdamW with clipping, linear warm-up and a cosine, in f32."""
    generator = torch.Generator().manual_seed(20)
    parameters = torch.randn(13, generator=generator)
    values = torch.nn.Parameter(parameters.clone())
    settings = {"learning_rate": 0.03, "betas": [0.9, 0.98], "epsilon": 1e-7, "weight_decay": 0.1, "clip": 1.5,
                "warmup_steps": 4, "total_steps": 20, "final_share": 0.1}
    optimiser = torch.optim.AdamW(
        [values], lr=settings["learning_rate"], betas=tuple(settings["betas"]), eps=settings["epsilon"],
        weight_decay=settings["weight_decay"],
    )

    def share(step):
        if step < settings["warmup_steps"]:
            return (step + 1) / settings["warmup_steps"]
        along = (step - settings["warmup_steps"]) / (settings["total_steps"] - settings["warmup_steps"])
        final = settings["final_share"]
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * along))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, share)
    steps = []
    for _ in range(20):
        gradient = torch.randn(13, generator=generator)
        values.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([values], settings["clip"])
        optimiser.step()
        schedule.step()
        steps.append({"gradient": gradient.tolist(), "norm": norm.item(), "parameters": values.tolist()})
    text = json.dumps({"settings": settings, "parameters": parameters.tolist(), "steps": steps}, separators=(",", ":"))
    (target / "adamw.json").write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description="Golden gradients.")
    parser.add_argument("target")
    target = pathlib.Path(parser.parse_args().target)
    for index, (name, sizes, tied, exact_gelu) in enumerate(MODELS):
        for seed in range(1000 * index, 1000 * index + 999):
            shutil.rmtree(target / name, ignore_errors=True)
            if write_model(target, seed, name, sizes, tied, exact_gelu):
                print(name, "seed", seed)
                break
        else:
            raise SystemExit(f"{name}: every seed is ambiguous")
    write_optimiser(target)


if __name__ == "__main__":
    main()
