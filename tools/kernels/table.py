"""The table of kernels in docs/kernels.md: what each takes of a multiprocessor, as ptxas says, and what it moves."""

import re
import subprocess
from dataclasses import dataclass

ARCHITECTURES = ["sm_80", "sm_90a"]

# What each kernel moves of memory, and the least it must. Small things beside these are left out.
MOVES = {
    "embed": ("32 bytes for each 4 of a row (a sector for a word), 4 written a column", "the row, 4 written a column"),
    "norm": ("4 read and 4 written a column, 1.25 more in int8, 2 more in halves", "the same"),
    "round_activations": ("4 read and 1.25 or 2 written a column", "the same"),
    "matmul_tensor": ("weights once per 64 tokens, activations per 128 rows", "weights and activations once"),
    "matmul": ("weights once per tile of tokens", "weights once"),
    "rotate_and_store": ("query and key once each way, value once, page elements once", "the same"),
    "attention": ("keys and values of all positions once per head and token", "once per key-value head and sequence"),
    "attention_merge": ("4 (head_dim + 2) a span of 256 positions, 4 written a column", "the same"),
    "route": ("the router's rows, filled up to 4, 8 or 16, once per token", "its rows once"),
    "group": ("4 read a choice twice, 8 written", "4 read, 8 written"),
    "gate_up": ("gate and up of each touched expert once per tile of its tokens", "once"),
    "down": ("down of each touched expert once per tile of its tokens", "once"),
    "gate_up_tensor": ("gate and up of each touched expert once per 64 of its slots, activations per 128 rows", "once"),
    "down_tensor": ("down of each touched expert once per 64 of its slots, activations per 128 rows", "once"),
    "combine": ("4 a slot and column, 8 a column of x", "the same"),
    "log_softmax_at": ("4 a logit twice", "4 a logit"),
    "fill": ("4 written a word (of the bench, not in the library)", "the same"),
    "read": ("the bytes it is told (of the bench)", "the same"),
    "mma_rate": ("nothing (of the bench)", "nothing"),
}

HEAD = """# Kernels

What is in `kernels/*.cu`, each with its shapes, layouts and formulas in the head comment of its file. `make kernels`
writes this page: registers of a thread, bytes of shared memory of a block and bytes spilled as ptxas 13.0 has them from
the committed PTX, for {architectures}. Where a row has several kernels, for tiles of {tiles} tokens, registers are in
the same order. The last two columns are by hand: bytes of memory moved, and the least that would do.

| kernel | registers, {first} | registers, {second} | shared memory | spills | moves | least |
|---|---|---|---|---|---|---|
"""


@dataclass
class Kernel:
    """One kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    shared: int
    spills: int


def measure(nvidia, compiled, folder):
    """All kernels of {name: PTX} on all architectures. `folder` is for files nobody needs after."""
    kernels = []
    for name, ptx in compiled.items():
        source = folder / name
        source.write_text(ptx)
        for architecture in ARCHITECTURES:
            ptxas = nvidia / "cu13" / "bin" / "ptxas"
            command = [ptxas, "-v", f"-arch={architecture}", source, "-o", folder / "object"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{name}: {done.stderr.strip()}")
            kernels += parse(done.stderr, architecture)
    return kernels


def parse(log, architecture):
    """What `ptxas -v` says of each kernel."""
    parts = re.split(r"Compiling entry function '(\w+)'", log)[1:]
    kernels = []
    for name, text in zip(parts[::2], parts[1::2]):
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()
        shared = re.search(r"(\d+) bytes smem", text)
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        kernels.append(Kernel(name, architecture, registers, int(shared[1]) if shared else 0, int(stores) + int(loads)))
    return kernels


def table(kernels):
    """The page."""
    # {row: {architecture: kernels}}; a row's kernels differ in the tile, the number at the end.
    rows = {}
    for kernel in kernels:
        tile = re.fullmatch(r"(.*)_(\d+)", kernel.name)
        row = rows.setdefault(tile[1] if tile else kernel.name, {})
        row.setdefault(kernel.architecture, []).append((int(tile[2]) if tile else 0, kernel))
    tiles = sorted({tile for row in rows.values() for kernels in row.values() for tile, _ in kernels if tile})
    first, second = ARCHITECTURES
    tiles = ", ".join(map(str, tiles))
    lines = [HEAD.format(architectures=f"{first} and {second}", tiles=tiles, first=first, second=second)]
    for name in sorted(rows, key=lambda name: (order(name), name)):
        by_tile = {a: [kernel for _, kernel in sorted(rows[name][a], key=lambda pair: pair[0])] for a in ARCHITECTURES}
        every = by_tile[first] + by_tile[second]
        registers = [", ".join(str(kernel.registers) for kernel in by_tile[a]) for a in ARCHITECTURES]
        moves, least = MOVES[family(name)]
        shared, spills = max(kernel.shared for kernel in every), sum(kernel.spills for kernel in every)
        lines.append(f"| `{name}` | {registers[0]} | {registers[1]} | {shared} | {spills} | {moves} | {least} |\n")
    return "".join(lines)


def family(name):
    """What MOVES calls a row."""
    return name if name in MOVES else re.sub(r"_(f32|bf16|f16|int8|int4)$", "", name)


def order(name):
    return list(MOVES).index(family(name))
