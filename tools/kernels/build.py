"""Compiles kernels/*.cu to kernels/generated, which the library embeds, and makes the table of docs/kernels.md.

    build.py            write both anew                         (or: make kernels)
    build.py --check    make both again and compare             (or: make kernels-check)

Needs Python 3.11 with venv on 64-bit Linux, and PyPI the first time; no GPU and no CUDA. The compiler is NVRTC 12.1: its
PTX 8.1 and its native code are taken by every driver from R530 on. A kernel fails that spills registers, has more than
48 KiB of shared memory, or on sm_90a could not be launched while the grid before it runs.
"""

import argparse
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from measure import failures, measure, parse, unsafe_beside_others
from nvrtc import Nvrtc
from table import page, table

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
SOURCES = REPOSITORY / "kernels"
GENERATED = SOURCES / "generated"
TOOLS = REPOSITORY / "target" / "kernels"
PAGE = REPOSITORY / "docs" / "kernels.md"

# The oldest architecture with what kernels use: bf16 products, asynchronous copies.
PTX = "compute_80"
# Those with native code.
NATIVE = ["sm_80", "sm_90a"]
# Those that drivers compile the PTX for.
COMPILED_BY_DRIVERS = ["sm_100", "sm_120"]
# The architecture whose kernels may be launched while the grid before them runs.
BESIDE_OTHERS = "sm_90a"
# Sums of products are rounded as the source says, here and under the shim.
OPTIONS = ["--std=c++17", "--fmad=false", f"--include-path={SOURCES}"]
# Kernels of the bench, which the library does not have: PTX alone, and no rows of the table.
NOT_IN_LIBRARY = ["bench.cu"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with what is there instead of writing")
    options = parser.parse_args()
    nvidia = packages()
    compiler = Nvrtc(nvidia)
    # Long ones first.
    sources = sorted(SOURCES.glob("*.cu"), key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(lambda job: make(nvidia, compiler, *job), jobs(sources)))
    generated = {name: code for code_by_name, *_ in made for name, code in code_by_name.items()}
    kernels = [kernel for _, of_library, _, _ in made for kernel in of_library]
    complaints = [text for *_, texts in made for text in texts]
    complaints += failures([kernel for _, of_library, others, _ in made for kernel in of_library + others])
    new_page = page(PAGE.read_text(), table(kernels, NATIVE + COMPILED_BY_DRIVERS))
    complaints += (compare if options.check else write)(generated, new_page)
    if complaints:
        raise SystemExit("\n".join(complaints))


def jobs(sources):
    """(source, architecture), of which PTX is for all that drivers compile it for."""
    for source in sources:
        for architecture in [PTX] if source.name in NOT_IN_LIBRARY else [*NATIVE, PTX]:
            yield source, architecture


def make(nvidia, compiler, source, architecture):
    """({name in generated: code}, kernels of the library, other kernels, what is wrong)."""
    code, log = compiler.compile(source, architecture, OPTIONS)
    if architecture != PTX:
        unsafe = unsafe_beside_others(nvidia, code) if architecture == BESIDE_OTHERS else []
        complaints = [f"{text} on {architecture}" for text in unsafe]
        return {f"{architecture}/{source.stem}.cubin": code}, parse(log, architecture), [], complaints
    ptx = clean(code.decode())
    kernels = [kernel for target in COMPILED_BY_DRIVERS for kernel in measure(nvidia, ptx, target)]
    is_of_library = source.name not in NOT_IN_LIBRARY
    return {f"{source.stem}.ptx": ptx.encode()}, kernels * is_of_library, kernels * (not is_of_library), []


def packages():
    """The folder of NVIDIA's packages, installed unless they are there."""
    venv = TOOLS / "venv"
    wanted = (HERE / "requirements.txt").read_text()
    stamp = venv / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {', '.join(wanted.split())} ...", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
        stamp.unlink(missing_ok=True)
        stamp.write_text(wanted)
    return next(venv.glob("lib/python*/site-packages")) / "nvidia"


def clean(ptx):
    """Without comments, and without constants that nothing names, which the compiler's own headers have."""
    lines = [re.sub(r"//.*", "", line).rstrip() for line in ptx.splitlines()]
    names = Counter(re.findall(r"[\w$]+", "\n".join(lines)))
    constant = re.compile(r"\.global .* ([\w$]+)(\[\d+\])?( = .*)?;")
    unnamed = lambda line: (match := constant.fullmatch(line)) and names[match[1]] == 1
    return "".join(f"{line}\n" for line in lines if line and not unnamed(line))


def there():
    """The files of kernels/generated by their names in it."""
    paths = [path for path in GENERATED.rglob("*") if path.is_file()]
    return {path.relative_to(GENERATED).as_posix(): path for path in paths}


def write(generated, new_page):
    for name, path in there().items():
        if name not in generated:
            path.unlink()
    for name, code in generated.items():
        path = GENERATED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(code)
    PAGE.write_text(new_page)
    size = sum(map(len, generated.values())) / 1e6
    print(f"kernels/generated: {len(generated)} files, {size:.2f} MB; docs/kernels.md")
    return []


def compare(generated, new_page):
    found = {name: path.read_bytes() for name, path in there().items()}
    names = sorted(found.keys() | generated.keys())
    stale = [f"kernels/generated/{name}" for name in names if found.get(name) != generated.get(name)]
    if PAGE.read_text() != new_page:
        stale.append("docs/kernels.md")
    if not stale:
        print(f"kernels/generated and docs/kernels.md are what kernels/*.cu give: {len(names)} files, no spills")
    return [f"{name} is not what its source gives: make kernels" for name in stale]


if __name__ == "__main__":
    main()
