"""Token ids of the corpora, and training rows cut from them."""
import json
import pathlib

import numpy
import torch
from tokenizers import Tokenizer

from corpora import DOMAINS

BOS, EOS = 2, 1
IGNORED = -100


def token_stream(work, domain, part):
    """One stream a domain and part: every document between <bos> and <eos>. Cached beside the corpora."""
    work = pathlib.Path(work)
    cache = work / "corpora" / f"{domain}.{part}.npy"
    if not cache.exists():
        tokenizer = Tokenizer.from_file(str(work / "model" / "tokenizer.json"))
        documents = [json.loads(line) for line in open(work / "corpora" / f"{domain}.{part}.jsonl", encoding="utf-8")]
        identifiers = []
        for encoding in tokenizer.encode_batch(documents):
            identifiers += encoding.ids + [EOS]
        numpy.save(cache, numpy.array(identifiers, dtype=numpy.uint16))
    return torch.from_numpy(numpy.load(cache).astype(numpy.int64))


def row(stream, start, length):
    """Inputs and targets. Every row begins with <bos>, as every prompt will; what follows it here is arbitrary."""
    window = stream[start:start + length]
    inputs = torch.cat((torch.tensor([BOS]), window[:-1]))
    targets = window.clone()
    targets[0] = IGNORED
    return inputs, targets


def batch(streams, rows, length, generator):
    """`rows` random rows, the same number from each stream."""
    inputs, targets = [], []
    for index in range(rows):
        stream = streams[index % len(streams)]
        start = int(torch.randint(len(stream) - length, (1,), generator=generator))
        row_inputs, row_targets = row(stream, start, length)
        inputs.append(row_inputs)
        targets.append(row_targets)
    return torch.stack(inputs), torch.stack(targets)


def all_domains(work, part):
    return [token_stream(work, domain, part) for domain in DOMAINS]
