"""The table of kernels in docs/kernels.md: what each takes of a multiprocessor, and what it moves."""

import re

from moves import MOVES, order, readable, split, step

MARK = "| kernel |"


def table(kernels, architectures):
    """The table, of kernels that differ in the tile, the number at the end, in one row."""
    rows = {}
    for kernel in kernels:
        tile = re.fullmatch(r"(.*)_(\d+)", kernel.name)
        row = rows.setdefault(tile[1] if tile else kernel.name, {})
        row.setdefault(kernel.architecture, []).append((int(tile[2]) if tile else 0, kernel))
    heads = ["kernel", *architectures, "shared memory", "spills", "moves", "least", "1 token", "least"]
    lines = [heads, ["---"] * len(heads)]
    for name in sorted(rows, key=lambda name: (order(name), name)):
        by_tile = {a: [kernel for _, kernel in sorted(rows[name][a], key=lambda pair: pair[0])] for a in architectures}
        every = [kernel for kernels in by_tile.values() for kernel in kernels]
        registers = [", ".join(str(kernel.registers) for kernel in by_tile[a]) for a in architectures]
        shared, spills = max(kernel.shared for kernel in every), sum(kernel.spills for kernel in every)
        moves, (moved, least) = MOVES[split(name)[0]], step(name)
        in_bytes = [readable(moved), readable(least)]
        lines.append([f"`{name}`", *registers, str(shared), str(spills), moves.moved, moves.least, *in_bytes])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page(text, table):
    """The page with its table replaced: everything from there on."""
    before, found, _ = text.partition(MARK)
    if not found:
        raise SystemExit(f"docs/kernels.md: no line begins with {MARK!r}")
    return before + table
