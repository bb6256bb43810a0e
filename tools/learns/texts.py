"""The texts that the mixtures' routers learn from and are measured with: rows of {"text"} that are one window each.

    python texts.py CORPORA OUTPUT
"""
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "demo_model"))

from corpora import DOMAINS

# Characters of a window and bytes of a file. <bos> and <eos> are a window's too, and not every character is one byte.
WINDOW = 110
SIZES = {"train": 100_000, "heldout": 16_000}


def windows(path):
    for line in open(path, encoding="utf-8"):
        document = json.loads(line)
        for start in range(0, len(document), WINDOW):
            window = document[start:start + WINDOW]
            if window.strip():
                yield window


def main():
    corpora, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for part, size in SIZES.items():
            with open(output / f"{domain}.{part}.jsonl", "w", encoding="utf-8") as file:
                written = 0
                for text in windows(corpora / f"{domain}.{part}.jsonl"):
                    if written >= size:
                        break
                    written += len(text.encode())
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
