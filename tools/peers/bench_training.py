"""Router training beside PyTorch's: steps in turn, medians and ranges of their ratios, and each side's peak memory.

    bench_training.py [--only demo] [--rounds N] [--json FILE]     (or: make bench-training TRAINING="...")

Needs torch, safetensors and numpy for the Python that runs it (tools/reference/requirements.txt). Both sides get the same
weights, documents and threads, and are first asked for one loss and its gradients, which must agree. PyTorch has the
fastest of its ways on each model: frozen weights in f32 or in bf16, compiled or not, found in a few steps before.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = {"demo": ("examples/demo-model", 8), "slice": ("target/bench/slice-bf16", 2)}
TOLERANCE = 1e-4


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, command, environment={}):
        self.process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=REPOSITORY, env={**os.environ, **environment})

    def ask(self, order):
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args[0]} ended")

    def step(self):
        return self.ask("step")

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def ours(model, options):
    command = ["cargo", "bench", "--quiet", "--locked", "--bench", "training", "--", "--serve", model]
    return Side(command, {"GEMMOE_BENCH_THREADS": str(options.threads)})


def peer(model, options, way):
    storage, compiled = way
    directory, documents = MODELS[model]
    script = Path(__file__).with_name("training_step.py")
    return Side([sys.executable, script, REPOSITORY / directory, documents, options.threads, storage, int(compiled)])


def main():
    options = parse()
    result = {"torch": torch.__version__, "threads": options.threads, "pairs": options.rounds, "models": {}}
    load = [os.getloadavg()[0]]
    for model in options.only:
        result["models"][model] = measure(model, options)
        print_model(model, result["models"][model], options)
    result["load_average"] = load + [os.getloadavg()[0]]
    print(f'torch {result["torch"]}, {options.threads} threads, {options.rounds} pairs, load average '
          f'{min(result["load_average"]):.1f} to {max(result["load_average"]):.1f}')
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", metavar="MODELS", default=",".join(MODELS), help="demo, slice")
    parser.add_argument("--rounds", metavar="N", type=int, default=15, help="pairs of steps (15)")
    parser.add_argument("--trials", metavar="N", type=int, default=3, help="steps to find PyTorch's best way in (3)")
    parser.add_argument("--way", metavar="WAY", help="PyTorch's way: f32, bf16, f32,compiled or bf16,compiled")
    parser.add_argument("--threads", metavar="N", type=int, default=len(os.sched_getaffinity(0)), help="one per processor")
    parser.add_argument("--json", metavar="FILE", help="write all figures there as well")
    options = parser.parse_args()
    options.only = options.only.split(",")
    return options


def measure(model, options):
    tried = {way: try_way(model, options, way) for way in ways(options)}
    way = min(tried, key=lambda way: tried[way])
    own, other = ours(model, options), peer(model, options, way)
    start = own.ask("start")
    agreement = compare(own, other)
    for side in (own, other):
        side.step()
    pairs = []
    for _ in range(options.rounds):
        pairs.append({"roof": own.ask("roof")["multiply_adds"], "gemmoe": own.step(), "torch": other.step()})
    memory = {"gemmoe": own.ask("memory")["bytes"], "torch": other.ask("memory")["bytes"]}
    own.close()
    other.close()
    return {
        "way": name(way), "trials": {name(way): seconds for way, seconds in tried.items()}, **start,
        **agreement, "pairs": pairs, "peak_memory": memory,
    }


def ways(options):
    if options.way:
        storage, *compiled = options.way.split(",")
        return [(storage, bool(compiled))]
    return [(storage, compiled) for storage in ("f32", "bf16") for compiled in (False, True)]


def name(way):
    return ",".join([way[0]] + ["compiled"] * way[1])


def try_way(model, options, way):
    if options.way:
        return 0.0
    side = peer(model, options, way)
    [side.step() for _ in range(2)]
    seconds = statistics.median(side.step()["seconds"] for _ in range(options.trials))
    side.close()
    return seconds


def compare(own, other):
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory) / name for name in ("own", "other")]
        losses = [side.ask(f"gradient {file}")["loss"] for side, file in zip((own, other), files)]
        found, expected = (numpy.fromfile(file, dtype=numpy.float32).astype(numpy.float64) for file in files)
    loss = abs(losses[0] - losses[1]) / abs(losses[1])
    gradient = numpy.linalg.norm(found - expected) / numpy.linalg.norm(expected)
    if not max(loss, gradient) < TOLERANCE:
        raise SystemExit(f"the two differ: losses {losses[0]} and {losses[1]}, gradients by {gradient:.1e}")
    return {"loss": losses[0], "loss_error": loss, "gradient_error": gradient}


def print_model(model, found, options):
    tokens, pairs = found["tokens"], found["pairs"]
    seconds = lambda side, kind="seconds": [pair[side][kind] for pair in pairs]
    rate = lambda side: [tokens / each for each in seconds(side)]
    roofs = [pair["roof"] for pair in pairs]
    share = lambda side: 100 * statistics.median(
        found["multiply_adds"] / each / roof for each, roof in zip(seconds(side), roofs))
    ratios = lambda kind: [theirs / own for own, theirs in zip(seconds("gemmoe", kind), seconds("torch", kind))]
    print(f'{model}: {tokens} tokens a step, {found["multiply_adds"] / 1e9:.1f} G multiply-adds at least; '
          f'losses agree to {found["loss_error"]:.0e}, gradients to {found["gradient_error"]:.0e}')
    trials = ", ".join(f"{way} {tokens / seconds:.0f}" for way, seconds in found["trials"].items() if seconds)
    print(f'  PyTorch: {found["way"]}{" of " + trials + " tokens/s" if trials else ""}')
    for side in ("gemmoe", "torch"):
        print(f'  {side:<8} {span(rate(side), 1)} tokens/s, {share(side):.0f} % of the multiply-adds, '
              f'{found["peak_memory"][side] / 1e6:.0f} MB at most')
    print(f'  ratio    {span(ratios("seconds"), 2)}, by processor time {span(ratios("processor_seconds"), 2)}; '
          f'roof {span([roof / 1e9 for roof in roofs], 1)} G multiply-adds/s', flush=True)


def span(values, digits):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
