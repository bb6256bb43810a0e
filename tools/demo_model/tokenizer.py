"""Train a small tokenizer of exactly Gemma's `tokenizer.json` shape: byte-pair encoding with byte fallback.

    python tokenizer.py CORPORA OUTPUT

While training, a pre-tokenizer keeps merges inside words, so that pieces are word-like. The written file has no such
pre-tokenizer (Gemma has none either): the ids are defined by the written file, and every later step uses that file.
"""
import json
import pathlib
import random
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from corpora import DOMAINS

VOCABULARY_SIZE = 4096
SAMPLE_SEED = 1
SAMPLE_BYTES_PER_DOMAIN = 2_500_000
SPECIAL_TOKENS = {0: "<pad>", 1: "<eos>", 2: "<bos>", 3: "<unk>", 106: "<start_of_turn>", 107: "<end_of_turn>"}
FIRST_BYTE_TOKEN = 108
# Runs of spaces (indentation), words with the space before them, single digits, line ends, runs of punctuation.
WORDS = r"▁{2,}|▁?\p{L}+|\d|\n|▁?[^\p{L}\d\n▁]+|▁"


def read_documents(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def balanced_sample(corpora):
    sample = []
    for domain in DOMAINS:
        documents = read_documents(corpora / f"{domain}.train.jsonl")
        random.Random(SAMPLE_SEED).shuffle(documents)
        size = 0
        for document in documents:
            size += len(document.encode())
            if size > SAMPLE_BYTES_PER_DOMAIN:
                break
            sample.append(document)
    return sample


def train(sample):
    """The pieces in order of learning, and the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    pieces = VOCABULARY_SIZE - len(SPECIAL_TOKENS) - 256
    tokenizer.train_from_iterator(sample, trainers.BpeTrainer(
        vocab_size=pieces, limit_alphabet=180, max_token_length=20, special_tokens=[], show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    ordered = sorted(model["vocab"], key=model["vocab"].get)
    assert len(ordered) == pieces, len(ordered)
    return ordered, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def tokenizer_file(special_tokens, vocabulary, merges):
    """The file's content, key by key as in Gemma's. Special tokens are by id, the vocabulary has the id of every piece."""
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": identifier, "content": content, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for identifier, content in special_tokens.items()],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<bos>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocabulary, "merges": merges},
    }


def gemma_shaped(pieces, merges):
    by_id = dict(SPECIAL_TOKENS)
    by_id.update({FIRST_BYTE_TOKEN + byte: f"<0x{byte:02X}>" for byte in range(256)})
    remaining = iter(pieces)
    for identifier in range(VOCABULARY_SIZE):
        if identifier not in by_id:
            by_id[identifier] = next(remaining)
    vocabulary = {by_id[identifier]: identifier for identifier in range(VOCABULARY_SIZE)}
    return tokenizer_file(SPECIAL_TOKENS, vocabulary, merges)


TOKENIZER_CONFIG = {
    "add_bos_token": True, "add_eos_token": False,
    "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
    "added_tokens_decoder": {str(identifier): {
        "content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        "special": True} for identifier, content in SPECIAL_TOKENS.items()},
    "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    # No turns: messages follow each other as one text, which is all that the model has learned from.
    "chat_template": "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "clean_up_tokenization_spaces": False, "model_max_length": 1024,
    "tokenizer_class": "GemmaTokenizer",
}


def verify(path, corpora):
    """Every held-out document must decode to itself; prints how many bytes a token covers."""
    tokenizer = Tokenizer.from_file(str(path))
    for domain in DOMAINS:
        documents = read_documents(corpora / f"{domain}.heldout.jsonl")
        encodings = tokenizer.encode_batch(documents)
        for document, encoding in zip(documents, encodings):
            assert encoding.ids[0] == 2 and 3 not in encoding.ids
            assert tokenizer.decode(encoding.ids, skip_special_tokens=True) == document
        tokens = sum(len(encoding.ids) - 1 for encoding in encodings)
        print(domain, len(documents), "documents decode to themselves,",
              round(sum(len(document.encode()) for document in documents) / tokens, 3), "bytes per token")


def main():
    corpora, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    pieces, merges = train(balanced_sample(corpora))
    for name, content in (("tokenizer.json", gemma_shaped(pieces, merges)),
                          ("tokenizer_config.json", TOKENIZER_CONFIG)):
        with open(output / name, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")
    verify(output / "tokenizer.json", corpora)


if __name__ == "__main__":
    main()
