"""Compiles kernels/*.cu to kernels/generated/*.ptx, which the library embeds, and makes the table of docs/kernels.md.

    build.py            write both anew                         (or: make kernels)
    build.py --check    make both again and compare             (or: make kernels-check)

Needs Python 3.11 with venv on 64-bit Linux, and PyPI the first time; no GPU and no CUDA. The compiler is NVRTC 12.1: its
PTX 8.1 is taken by every driver from R530 on. The table has what ptxas 13.0 makes of that PTX for two architectures.
A kernel that spills registers is a failure.
"""

import argparse
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from nvrtc import Nvrtc
from table import measure, table

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SOURCES = REPOSITORY / "kernels"
GENERATED = SOURCES / "generated"
TOOLS = REPOSITORY / "target" / "kernels"
TABLE = REPOSITORY / "docs" / "kernels.md"

# The oldest architecture with what kernels use: bf16 products, asynchronous copies.
ARCHITECTURE = "compute_80"
# Sums of products are rounded as the source says, here and under the shim.
OPTIONS = ["--std=c++17", "--fmad=false", f"--gpu-architecture={ARCHITECTURE}", f"--include-path={SOURCES}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    options = parser.parse_args()
    nvidia = packages()
    compiler = Nvrtc(nvidia)
    compiled = {}
    for source in sorted(SOURCES.glob("*.cu")):
        compiled[source.with_suffix(".ptx").name] = clean(compiler.compile(source, OPTIONS))
    kernels = measure(nvidia, compiled, TOOLS)
    failures = [f"{kernel.name} spills registers on {kernel.architecture}" for kernel in kernels if kernel.spills]
    failures += (compare if options.check else write)(compiled, table(kernels))
    if failures:
        raise SystemExit("\n".join(failures))


def packages():
    """The folder of NVIDIA's packages, installed unless they are there."""
    venv = TOOLS / "venv"
    wanted = (HERE / "requirements.txt").read_text()
    stamp = venv / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(wanted.split())} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pip = [venv / "bin" / "pip", "install", "-q", "--disable-pip-version-check", "-r", HERE / "requirements.txt"]
        subprocess.run(pip, check=True)
        stamp.write_text(wanted)
    return next(venv.glob("lib/python*/site-packages")) / "nvidia"


def clean(ptx):
    """Without comments, and without constants that nothing names, which the compiler's own headers have."""
    lines = [re.sub(r"//.*", "", line).rstrip() for line in ptx.splitlines()]
    names = Counter(re.findall(r"[\w$]+", "\n".join(lines)))
    constant = re.compile(r"\.global .* ([\w$]+)(\[\d+\])?( = .*)?;")
    unnamed = lambda line: (match := constant.fullmatch(line)) and names[match[1]] == 1
    return "".join(f"{line}\n" for line in lines if line and not unnamed(line))


def write(compiled, table):
    GENERATED.mkdir(exist_ok=True)
    for old in GENERATED.glob("*.ptx"):
        if old.name not in compiled:
            old.unlink()
    for name, ptx in compiled.items():
        (GENERATED / name).write_text(ptx)
    TABLE.write_text(table)
    print(f"kernels/generated: {len(compiled)} files, {sum(map(len, compiled.values())) / 1e6:.2f} MB; docs/kernels.md")
    return []


def compare(compiled, table):
    there = {path.name: path.read_text() for path in GENERATED.glob("*.ptx")}
    names = sorted(there.keys() | compiled.keys())
    stale = [f"kernels/generated/{name}" for name in names if there.get(name) != compiled.get(name)]
    if not TABLE.exists() or TABLE.read_text() != table:
        stale.append("docs/kernels.md")
    if not stale:
        print(f"kernels/generated and docs/kernels.md are what kernels/*.cu give: {len(names)} files, no spills")
    return [f"{name} is not what its source gives: make kernels" for name in stale]


if __name__ == "__main__":
    main()
