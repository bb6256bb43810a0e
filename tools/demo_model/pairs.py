"""Give each prompt and true continuation a rejected one: what the model itself writes, greedily, to as many tokens.

    python pairs.py GEMMOE PROMPTS TOKENIZER OUTPUT MODEL [ROUTER]

GEMMOE is the command-line tool, MODEL a model directory and ROUTER a router patch for it. Rows without a difference, and
those whose last character is cut in two, are left out.
"""
import json
import subprocess
import sys

from tokenizers import Tokenizer


def main():
    gemmoe, prompts, tokenizer, output, model, *router = sys.argv[1:]
    tokenizer = Tokenizer.from_file(tokenizer)
    written = 0
    with open(prompts, encoding="utf-8") as rows, open(output, "w", encoding="utf-8") as file:
        for row in map(json.loads, rows):
            count = len(tokenizer.encode(row["chosen"], add_special_tokens=False).ids)
            command = [gemmoe, "generate", "--model", model, "--prompt", row["prompt"], "--max-new", str(count),
                       "--threads", "1", "--ignore-eos", "--json"]
            command += [part for path in router for part in ("--router", path)]
            row["rejected"] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)["text"]
            if row["rejected"] not in ("", row["chosen"]) and "\ufffd" not in row["rejected"]:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
    print(written, "pairs in", output)


if __name__ == "__main__":
    main()
