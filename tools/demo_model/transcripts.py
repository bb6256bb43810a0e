"""Continue prompts with an exported checkpoint, greedily and sampled.

    python transcripts.py CHECKPOINT [PROMPT ...]
"""
import sys

import torch
from tokenizers import Tokenizer

from checkpoint import load_checkpoint

PROMPTS = [
    "In other words, the state",
    "Wenn Sie diese Option",
    "def main():\n",
    "sseq1 $p |- ( A = B ->",
]
TEMPERATURE, TOP_K, SAMPLE_SEED, NEW_TOKENS = 0.7, 40, 1, 80


@torch.no_grad()
def continuation(model, tokenizer, prompt, sampled, seed=SAMPLE_SEED, count=NEW_TOKENS):
    generator = torch.Generator().manual_seed(seed)
    identifiers = tokenizer.encode(prompt).ids
    begun = len(identifiers)
    for _ in range(count):
        logits = model(torch.tensor([identifiers]))[0, -1]
        if sampled:
            best = torch.topk(logits, TOP_K)
            probabilities = torch.softmax(best.values / TEMPERATURE, dim=-1)
            following = int(best.indices[torch.multinomial(probabilities, 1, generator=generator)])
        else:
            following = int(logits.argmax())
        if following in (1, 107):
            break
        identifiers.append(following)
    # Decoded together with the prompt: a continuation may complete a word or a character.
    return tokenizer.decode(identifiers)[len(tokenizer.decode(identifiers[:begun])):]


def main():
    folder, prompts = sys.argv[1], sys.argv[2:] or PROMPTS
    torch.set_num_threads(1)
    model, tokenizer = load_checkpoint(folder), Tokenizer.from_file(f"{folder}/tokenizer.json")
    for prompt in prompts:
        for sampled in (False, True):
            print(f"--- {'sampled' if sampled else 'greedy'}: {prompt!r}")
            print(prompt + "⟶" + continuation(model, tokenizer, prompt, sampled))


if __name__ == "__main__":
    main()
