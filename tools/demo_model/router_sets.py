"""The small texts that `examples/router-training` trains routers with, and the prompts of its pairs.

    python router_sets.py PACKAGES CORPORA OUTPUT

OUTPUT gets `sft/<domain>.jsonl` and `heldout/<domain>.jsonl`, rows of {"text"}, and `prompts.jsonl` and
`heldout-prompts.jsonl`, rows of {"prompt", "chosen"}: the true continuation, which `pairs.py` gives a rejected one. `all-heldout/<domain>.jsonl`
has all held-out documents, in the same pieces.

Only sources whose licence lets a part of them be passed on beside code of another licence are used: the Debian handbook in
English and German, Python's standard library, and set.mm. Training rows are training documents of corpora.py, held-out
rows held-out ones; no document gives both a text and a prompt.
"""
import json
import pathlib
import random
import sys

import corpora

SAMPLE_SEED = 6
TEXT_BYTES = {"sft": {"english": 64_000, "german": 62_000, "python": 56_000, "mathematics": 40_000},
              "heldout": {"english": 13_000, "german": 13_000, "python": 12_000, "mathematics": 8_000}}
# Prompts of a domain, and of one document at most.
PROMPTS = {"sft": 60, "heldout": 30}
PROMPTS_OF_DOCUMENT = 3
# Characters of a prompt and of its continuation, about: mathematics has fewer to a token.
PROMPT_CHARACTERS = {"english": 110, "german": 110, "python": 110, "mathematics": 70}
CHOSEN_CHARACTERS = {"english": 150, "german": 150, "python": 140, "mathematics": 90}
# Characters of a text, about: none has more than the 256 tokens that the demo model has learned to use.
TEXT_CHARACTERS = {"english": 700, "german": 640, "python": 560, "mathematics": 400}
FILES = {"sft": ("sft", "prompts.jsonl", "train"), "heldout": ("heldout", "heldout-prompts.jsonl", "heldout")}


def handbook(packages, language, words):
    folder = packages / f"debian-handbook/usr/share/doc/debian-handbook/html/{language}"
    for path in sorted(folder.glob("*.html")):
        yield from corpora.prose_documents(corpora.html_paragraphs(path), words)


def flat(documents):
    return (document for part in documents for document in part)


def sources(packages):
    """The documents of each domain that may be passed on, by the name of its corpus."""
    return {
        "english": ("english", set(handbook(packages, "en-US", corpora.ENGLISH_WORDS))),
        "german": ("german", set(handbook(packages, "de-DE", corpora.GERMAN_WORDS))),
        "python": ("python", set(flat(corpora.python(packages)))),
        "mathematics": ("metamath", set(flat(corpora.metamath(packages)))),
    }


def cut(text, start, length):
    """text[start:] up to about `length` characters, ended before a space; what follows then begins with the space."""
    end = text.find(" ", start + length)
    return text[start:end] if end >= 0 else None


def pieces(text, length):
    """`text` in pieces of about `length` characters, cut between words."""
    while len(text) > 1.2 * length:
        piece = cut(text, 0, length)
        if not piece:
            break
        yield piece
        text = text[len(piece):]
    yield text


def prompts_of(document, domain):
    start = 0
    for _ in range(PROMPTS_OF_DOCUMENT):
        prompt = cut(document, start, PROMPT_CHARACTERS[domain])
        chosen = prompt and cut(document, start + len(prompt), CHOSEN_CHARACTERS[domain])
        if not chosen:
            return
        yield {"prompt": prompt, "chosen": chosen}
        # The next one begins at a line of its own.
        start = document.find("\n", start + len(prompt) + len(chosen)) + 1
        if start == 0:
            return


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main():
    packages, corpus, output = (pathlib.Path(argument) for argument in sys.argv[1:4])
    prompts = {part: [] for part in FILES}
    for domain, (name, allowed) in sources(packages).items():
        for part, (folder, _, suffix) in FILES.items():
            documents = [json.loads(line) for line in open(corpus / f"{name}.{suffix}.jsonl", encoding="utf-8")]
            documents = [document for document in documents if document in allowed]
            random.Random(SAMPLE_SEED).shuffle(documents)
            found = []
            while len(found) < PROMPTS[part]:
                found += prompts_of(documents.pop(), domain)
            prompts[part] += found[:PROMPTS[part]]
            texts = []
            while sum(len(text.encode()) for text in texts) < TEXT_BYTES[part][domain]:
                texts.append(documents.pop())
            texts = [piece for text in texts for piece in pieces(text, TEXT_CHARACTERS[domain])]
            write(output / folder / f"{domain}.jsonl", ({"text": text} for text in texts))
            print(domain, part, len(texts), "texts")
        documents = [json.loads(line) for line in open(corpus / f"{name}.heldout.jsonl", encoding="utf-8")]
        rows = (piece for document in documents for piece in pieces(document, TEXT_CHARACTERS[domain]))
        write(output / "all-heldout" / f"{domain}.jsonl", ({"text": piece} for piece in rows if piece.strip()))
    for part, (_, file, _) in FILES.items():
        random.Random(SAMPLE_SEED).shuffle(prompts[part])
        write(output / file, prompts[part])


if __name__ == "__main__":
    main()
