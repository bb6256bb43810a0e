"""gemmoe beside llama.cpp on the slice of the benches: pairs of runs in turn, medians and ranges of their ratios.

    bench_peers.py [--only FORMAT] [--rounds N] [--json FILE]     (or: make bench-peers PEERS="...")

Needs Python 3.11.4 or newer with venv, a C++ compiler, and PyPI the first time. Both sides get the same weights in
equal bits, the same number of threads, prompt and decoded tokens, and keys and values of one type. Each run is a process
of its own that loads its model and warms up first. llama.cpp has its better setting of each test, found in a few rounds
before.
"""

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

from llama_cpp import FILES, VERSION, LlamaCpp, say

REPOSITORY = Path(__file__).resolve().parents[2]
TESTS = ["decode", "prefill"]
PEAKS = {"bf16": "bf16_dot_products", "int8": "int8_dot_products", "int4": "int8_dot_products"}


def main():
    options = parse()
    slices = REPOSITORY / "target" / "bench"
    if not (slices / "slice-bf16" / "done").exists():
        raise SystemExit("the slice is not there: cargo bench --bench slice -- --write")
    peer = LlamaCpp(REPOSITORY / "target" / "peers")
    peer.install()
    load = [os.getloadavg()[0]]
    formats = [measure(format, slices, peer, options) for format in options.only]
    load.append(os.getloadavg()[0])
    result = {
        "llama_cpp_python": VERSION,
        "llama_cpp": peer.version,
        "threads": options.threads,
        "prompt_tokens": options.prompt,
        "decode_tokens": options.decode,
        "kv_dtype": options.kv,
        "pairs": options.rounds,
        "load_average": load,
        "formats": formats,
    }
    print_table(result)
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="FORMATS", default=",".join(FILES), help="such as int8 or bf16,int4")
    parser.add_argument("--rounds", metavar="N", type=int, default=15, help="pairs of runs (15)")
    parser.add_argument("--trials", metavar="N", type=int, default=3, help="rounds to find llama.cpp's setting in (3)")
    parser.add_argument("--prompt", metavar="N", type=int, default=512)
    parser.add_argument("--decode", metavar="N", type=int, default=32)
    parser.add_argument("--threads", metavar="N", type=int, default=processors(), help="one per processor")
    parser.add_argument("--kv", choices=["f16", "bf16"], default="f16", help="keys and values of both sides (f16)")
    parser.add_argument("--gemmoe", metavar="PROGRAM", default=REPOSITORY / "target" / "release" / "gemmoe")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")
    options = parser.parse_args()
    options.only = options.only.split(",")
    for format in options.only:
        if format not in FILES:
            parser.error(f"{format!r} is not one of {', '.join(FILES)}")
    if min(options.rounds, options.trials, options.prompt, options.decode, options.threads) < 1:
        parser.error("numbers must be at least 1")
    return options


def processors():
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(format, slices, peer, options):
    """All pairs of one format."""
    ours = slices / f"slice-{format}"
    has_ours = (ours / "config.json").exists()
    if not has_ours:
        say(f"{format}: there is no {ours.relative_to(REPOSITORY)}, so only llama.cpp is measured")
    candidates = [(kind, repack) for kind in FILES[format] for repack in (0, 1)]
    paths = {kind: peer.model(slices / "slice-bf16", kind) for kind in FILES[format]}
    run = lambda kind, repack, prompt, decode: peer.bench(
        paths[kind], repack, prompt, decode, options.threads, options.kv)

    trials = {candidate: {test: [] for test in TESTS} for candidate in candidates}
    for trial in range(options.trials):
        for kind, repack in candidates:
            say(f"{format}: trial {trial + 1} of {options.trials}, llama.cpp {kind}, repack {repack}")
            for test, result in run(kind, repack, options.prompt, options.decode).items():
                trials[kind, repack][test].append(result["avg_ts"])
    best = {test: max(candidates, key=lambda candidate: statistics.median(trials[candidate][test])) for test in TESTS}

    geometry = Geometry(json.loads((slices / "slice-bf16" / "config.json").read_text()))
    rounds = []
    for pair in range(options.rounds):
        say(f"{format}: pair {pair + 1} of {options.rounds}")
        bench = run_gemmoe(ours, options) if has_ours else run_roofs(options)
        theirs = {}
        for settings in set(best.values()):
            wanted = {test: settings == best[test] for test in TESTS}
            theirs.update(run(*settings, wanted["prefill"] * options.prompt, wanted["decode"] * options.decode))
        rounds.append(one_pair(format, bench, has_ours, theirs, geometry, options))
    return {
        "format": format,
        "settings": {test: {"kind": kind, "repack": repack} for test, (kind, repack) in best.items()},
        "trials": [
            {"kind": kind, "repack": repack, **{test: figure(values) for test, values in found.items()}}
            for (kind, repack), found in trials.items()
        ],
        "tests": {test: figures([pair[test] for pair in rounds]) for test in TESTS},
        "roofs": figures([pair["roofs"] for pair in rounds]),
        "rounds": rounds,
    }


def run_gemmoe(model, options):
    """One round after one that warms up."""
    return gemmoe_json(
        options, model, "--prompt", options.prompt, "--decode", options.decode, "--chunk", options.prompt,
        "--kv", options.kv)


def run_roofs(options):
    """The roofs alone, beside a model that takes no time."""
    return gemmoe_json(options, REPOSITORY / "examples" / "demo-model", "--prompt", 1, "--decode", 1)


def gemmoe_json(options, model, *arguments):
    command = [options.gemmoe, "bench", "--model", model, "--threads", options.threads, "--batch", 1, "--rounds", 1,
               "--json", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr.strip() or f"{options.gemmoe} failed")
    return json.loads(done.stdout)


class Geometry:
    """What a pass costs, as far as the slice's config.json and the published defaults say."""

    def __init__(self, config):
        get = lambda key, default: config.get(key, default)
        hidden, inner = get("hidden_size", 3072), get("intermediate_size", 24576)
        heads = get("num_attention_heads", 16)
        head_dim, kv_heads = get("head_dim", 256), get("num_key_value_heads", heads)
        layers, experts = config["num_hidden_layers"], config["num_local_experts"]
        chosen = config["num_experts_per_tok"]
        attention = 2 * hidden * head_dim * (heads + kv_heads)
        self.head = config["vocab_size"] * hidden
        self.layers = layers * (chosen * 3 * hidden * inner + attention)
        self.all = self.head + layers * (experts * 3 * hidden * inner + attention)

    def decode_bytes(self, model_size):
        """Of one token, where all weights have equal bits."""
        return model_size * (self.head + self.layers) / self.all

    def prefill_multiply_adds(self, tokens):
        return tokens * self.layers + self.head


def one_pair(format, bench, has_ours, theirs, geometry, options):
    roofs = {name: roof["median"] for name, roof in bench["roofs"].items() if roof}
    peak = PEAKS[format] if PEAKS[format] in roofs else "f32_multiply_adds"
    rates = {test: theirs[test]["avg_ts"] for test in TESTS}
    costs = {
        "decode": geometry.decode_bytes(theirs["decode"]["model_size"]) / 1e9 / roofs["read_bandwidth"],
        "prefill": geometry.prefill_multiply_adds(options.prompt) / options.prompt / 1e9 / roofs[peak],
    }
    pair = {"roofs": {"read_bandwidth": roofs["read_bandwidth"], peak: roofs[peak]}}
    for test in TESTS:
        pair[test] = {"llama_cpp": rates[test], "llama_cpp_share": rates[test] * costs[test]}
        if has_ours:
            rate = (bench["decode"][0] if test == "decode" else bench["prefill"])["median"]
            pair[test].update(gemmoe=rate, gemmoe_share=rate * costs[test], ratio=rate / rates[test])
    return pair


def figure(values):
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def figures(rows):
    return {key: figure([row[key] for row in rows]) for key in rows[0]}


def print_table(result):
    low, high = min(result["load_average"]), max(result["load_average"])
    print(f'llama.cpp {result["llama_cpp"]} of llama-cpp-python {result["llama_cpp_python"]}; '
          f'{result["threads"]} threads, keys and values in {result["kv_dtype"]}')
    print(f'pairs: {result["pairs"]}; median (lowest to highest); load average {low:.1f} to {high:.1f}\n')
    columns = "{:<6} {:<12} {:<26} {:<26} {:<14} {:<24} {:>9} {:>9}"
    row = lambda *cells: print(columns.format(*cells).rstrip())
    row("", "tokens/s", "gemmoe", "llama.cpp", "its setting", "gemmoe / llama.cpp", "of roof:", "its")
    for format in result["formats"]:
        for test in TESTS:
            found, setting = format["tests"][test], format["settings"][test]
            name = f'prefill {result["prompt_tokens"]}' if test == "prefill" else test
            setting = f'{setting["kind"]}{", repack" if setting["repack"] else ""}'
            row(format["format"], name, span(found, "gemmoe", 1), span(found, "llama_cpp", 1), setting,
                span(found, "ratio", 2), percent(found, "gemmoe_share"), percent(found, "llama_cpp_share"))
    print()
    for format in result["formats"]:
        roofs = [f'{name.replace("_", " ")} {span(format["roofs"], name, 1)}' for name in format["roofs"]]
        print(f'{format["format"]}: {"; ".join(roofs)} (1e9 a second)')


def span(found, key, digits):
    if key not in found:
        return "-"
    median, lowest, highest = (found[key][part] for part in ("median", "lowest", "highest"))
    return f"{median:.{digits}f} ({lowest:.{digits}f} to {highest:.{digits}f})"


def percent(found, key):
    return f'{100 * found[key]["median"]:.0f} %' if key in found else "-"


if __name__ == "__main__":
    main()
