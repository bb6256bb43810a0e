"""Held-out loss per domain of every stage, with bfloat16-rounded weights, and the routing of the mixture.

    python evaluate.py WORK CHECKPOINT

CHECKPOINT is the exported folder: the last line of the table is computed from the file itself.
Writes WORK/results.json and prints the tables in Markdown.
"""
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

import data
from corpora import DOMAINS
from mix import average_of
from model import Configuration, GemMoE
from train import LENGTH, STAGES


def rounded(model, state):
    model.load_state_dict({name: tensor.to(torch.bfloat16).float() for name, tensor in state.items()})
    return model.eval()


def load_checkpoint(folder):
    folder = pathlib.Path(folder)
    values = json.loads((folder / "config.json").read_text())
    fields = Configuration.__dataclass_fields__
    model = GemMoE(Configuration(**{name: values[name] for name in fields}))
    return rounded(model, load_file(folder / "model.safetensors"))


def bytes_of_tokens(work):
    """How many bytes of text each id stands for; special tokens stand for none."""
    tokenizer = Tokenizer.from_file(str(work / "model" / "tokenizer.json"))
    sizes = torch.zeros(tokenizer.get_vocab_size())
    special = {identifier for identifier, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for piece, identifier in tokenizer.get_vocab().items():
        if identifier not in special:
            is_byte = len(piece) == 6 and piece.startswith("<0x")
            sizes[identifier] = 1 if is_byte else len(piece.replace("▁", " ").encode())
    return sizes


@torch.no_grad()
def held_out(model, stream, sizes):
    """Nats per token, nats per byte, and for a mixture the share of slots of each expert by layer."""
    rows = [data.row(stream, start, LENGTH) for start in range(0, len(stream) - LENGTH + 1, LENGTH)]
    nats, tokens, size, batches = 0.0, 0, 0.0, 0
    experts = model.configuration.num_local_experts
    counts = torch.zeros(model.configuration.num_hidden_layers, max(experts, 1))
    for start in range(0, len(rows), 32):
        inputs = torch.stack([row[0] for row in rows[start:start + 32]])
        targets = torch.stack([row[1] for row in rows[start:start + 32]])
        nats += F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(),
                                ignore_index=data.IGNORED, reduction="sum").item()
        kept = targets != data.IGNORED
        tokens, size, batches = tokens + int(kept.sum()), size + float(sizes[targets[kept]].sum()), batches + 1
        if experts:
            for index, layer in enumerate(model.model.layers):
                chosen = torch.topk(layer.block_sparse_moe.logits, layer.block_sparse_moe.kept, dim=-1).indices
                counts[index] += torch.bincount(chosen.flatten(), minlength=experts)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    return {"nats_per_token": nats / tokens, "nats_per_byte": nats / size, "tokens": tokens, "bytes": int(size),
            "shares": shares.tolist() if experts else None}


def main():
    work, checkpoint = pathlib.Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(2)
    sizes = bytes_of_tokens(work)
    streams = dict(zip(DOMAINS, data.all_domains(work, "heldout")))
    dense, sparse = Configuration(), Configuration(num_local_experts=len(DOMAINS))

    def stage(name):
        return torch.load(work / f"{name}.pt")["model"]

    branches = [stage(f"branch-{domain}") for domain in DOMAINS]
    models = {"seed": rounded(GemMoE(dense), stage("seed"))}
    for domain, branch in zip(DOMAINS, branches):
        models[f"branch {domain}"] = rounded(GemMoE(dense), branch)
    models["dense average of the branches"] = rounded(GemMoE(dense), average_of(branches, dense).state_dict())
    models["mixed, untrained router"] = rounded(GemMoE(sparse), stage("untrained-router"))
    models["mixed, trained router (the file)"] = load_checkpoint(checkpoint)

    print("\n| stage | steps | tokens | wall-clock s | CPU s |\n|---|---|---|---|---|")
    for name in ["seed", *(f"branch-{domain}" for domain in DOMAINS), "router"]:
        saved = torch.load(work / f"{name}.pt")
        tokens = saved["step"] * STAGES[name.split("-")[0]][0] * LENGTH
        print(f"| {name} | {saved['step']} | {tokens} | {saved['seconds']:.0f} | {saved['cpu_seconds']:.0f} |")

    results = {name: {domain: held_out(model, stream, sizes) for domain, stream in streams.items()}
               for name, model in models.items()}
    (work / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for unit in ("nats_per_token", "nats_per_byte"):
        print(f"\n| {unit} | " + " | ".join(DOMAINS) + " | mean |\n|---" + "|---" * (len(DOMAINS) + 1) + "|")
        for name, row in results.items():
            values = [row[domain][unit] for domain in DOMAINS]
            print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in values)
                  + f" | {sum(values) / len(values):.3f} |")
    print("\n| text | " + " | ".join(f"expert {index} ({domain})" for index, domain in enumerate(DOMAINS)) + " |")
    print("|---" * (len(DOMAINS) + 1) + "|")
    for domain in DOMAINS:
        shares = torch.tensor(results["mixed, trained router (the file)"][domain]["shares"])
        print(f"| {domain} | " + " | ".join(f"{value:.2f}" for value in shares.mean(dim=0)) + " |")
        for index, layer in enumerate(shares):
            print(f"| {domain}, layer {index} | " + " | ".join(f"{value:.2f}" for value in layer) + " |")
    print({domain: (streams[domain].numel(), results["seed"][domain]["bytes"]) for domain in DOMAINS})


if __name__ == "__main__":
    main()
