"""A dense seed of four domains, and one feed-forward-only branch of it a domain, on bytes.

    python branches.py CORPORA WORK RANDOM_SEED

CORPORA is what tools/demo_model/corpora.py writes. WORK gets the checkpoint folders `seed` and one a domain, in float32,
and `costs.json`. The random seed is of the initial weights and of the order of all windows.
"""
import json
import pathlib
import sys
import time

import numpy
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "demo_model"))

import data
from corpora import DOMAINS
from export import write_dense, write_json
from model import Configuration, GemMoE
from tokenizer import tokenizer_file

# <pad>, <eos>, <bos> and <unk>, the mark that stands for a space, and the 256 bytes.
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")
SPACE = len(SPECIAL_TOKENS)
FIRST_BYTE = SPACE + 1
CONFIGURATION = Configuration(vocab_size=FIRST_BYTE + 256, hidden_size=128, intermediate_size=512,
                              num_hidden_layers=3, num_attention_heads=4, head_dim=32)
LENGTH, ROWS = 128, 16
SEED_STEPS, BRANCH_STEPS = 240, 300
PEAK, WARM_UP, DECAY = 3e-3, 0.05, 0.1


def tokenizer_json():
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, "▁"))}
    vocabulary.update({f"<0x{byte:02X}>": FIRST_BYTE + byte for byte in range(256)})
    return tokenizer_file(dict(enumerate(SPECIAL_TOKENS)), vocabulary, merges=[])


TOKENIZER_CONFIG = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<bos>", "eos_token": "<eos>",
                    "pad_token": "<pad>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False,
                    "tokenizer_class": "GemmaTokenizer"}


def byte_stream(path):
    """What the tokenizer makes of a file's documents, each followed by <eos>."""
    parts = []
    for line in open(path, encoding="utf-8"):
        identifiers = numpy.frombuffer(json.loads(line).encode(), dtype=numpy.uint8).astype(numpy.int64) + FIRST_BYTE
        identifiers[identifiers == FIRST_BYTE + ord(" ")] = SPACE
        parts += [identifiers, numpy.array([data.EOS])]
    return torch.from_numpy(numpy.concatenate(parts))


def train(model, trained, streams, steps, generator):
    """Mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW([
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": DECAY},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ], lr=PEAK, betas=(0.9, 0.95), fused=True)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / steps / WARM_UP, (1 - step / steps) / (1 - WARM_UP))
        inputs, targets = data.batch(streams, ROWS, LENGTH, generator)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=data.IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 20 == 0:
            print(step, round(losses[-1], 3), round(time.process_time()), flush=True)
    return sum(losses[-(steps // 10):]) / (steps // 10)


def main():
    corpora, work, random_seed = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(random_seed)
    generator = torch.Generator().manual_seed(random_seed)
    tokenizer = work / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    write_json(tokenizer / "tokenizer.json", tokenizer_json())
    write_json(tokenizer / "tokenizer_config.json", TOKENIZER_CONFIG)
    streams = {domain: byte_stream(corpora / f"{domain}.train.jsonl") for domain in DOMAINS}
    costs = {}

    model = GemMoE(CONFIGURATION)
    loss = train(model, list(model.parameters()), list(streams.values()), SEED_STEPS, generator)
    costs["seed"] = {"training_loss": loss, "cpu_seconds": time.process_time()}
    write_dense(model.state_dict(), CONFIGURATION, tokenizer, work / "seed")
    seed = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for domain in DOMAINS:
        model.load_state_dict(seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".mlp." in name)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = train(model, trained, [streams[domain]], BRANCH_STEPS, generator)
        costs[domain] = {"training_loss": loss, "cpu_seconds": time.process_time()}
        write_dense(model.state_dict(), CONFIGURATION, tokenizer, work / domain)
        print(domain, costs[domain], flush=True)
    write_json(work / "costs.json", costs)


if __name__ == "__main__":
    main()
