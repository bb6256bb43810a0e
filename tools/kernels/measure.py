"""What kernels take of a multiprocessor, as ptxas says, and what none may do."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# What a block has without asking for more, and beside a renderer.
MAX_SHARED = 48 << 10


@dataclass
class Kernel:
    """One kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    shared: int
    spills: int


def measure(nvidia, ptx, architecture):
    """The kernels of a PTX file as ptxas 13.0, which newer drivers have the like of, compiles them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.ptx"
        source.write_text(ptx)
        ptxas = nvidia / "cu13" / "bin" / "ptxas"
        command = [ptxas, "-v", f"-arch={architecture}", source, "-o", Path(folder) / "object"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"ptxas: {done.stderr.strip()}")
    return parse(done.stderr, architecture)


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


def failures(kernels):
    """Kernels that spill registers, or whose blocks have more shared memory than they may."""
    spilling = [kernel for kernel in kernels if kernel.spills]
    large = [kernel for kernel in kernels if kernel.shared > MAX_SHARED]
    return [f"{kernel.name} spills {kernel.spills} bytes of registers on {kernel.architecture}" for kernel in spilling] + [
        f"{kernel.name} has {kernel.shared} bytes of shared memory on {kernel.architecture}, {MAX_SHARED} at most"
        for kernel in large
    ]


def unsafe_beside_others(nvidia, cubin):
    """What is wrong with kernels of native code that are launched while the grid before them runs.

    The source has the wait for that grid first, and no loads that may come from a cache which is not kept coherent: those
    are for what nobody writes from the kernel's beginning on. This looks at what the assembler made of it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        nvdisasm = nvidia / "cu13" / "bin" / "nvdisasm"
        done = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"nvdisasm: {done.stderr.strip()}")
    return [f"{name} does not begin by waiting for the grid before it" for name in without_wait(done.stdout)] + [
        f"{name} has loads that are not coherent" for name in incoherent(done.stdout)
    ]


# griddepcontrol.launch_dependents and griddepcontrol.wait.
BEGIN, WAIT = "PREEXIT", "ACQBULK"
# Loads of arguments, which are a launch's own.
OF_ARGUMENTS = re.compile(r"(LDC|ULDC)(\.|$)")
TOUCHES = re.compile(r"LD|ST|ATOM|RED|CCTL|UBLK|BRA|BRX|JMP|JMX|CALL|RET|EXIT|BAR|MEMBAR|ERRBAR|SYNCS")


# Kernels with tables of sincos, which are constants.
OF_CONSTANTS = ["rotate_and_store"]


def opcodes(listing):
    """{kernel: its instructions} of what nvdisasm lists."""
    parts = re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", listing, re.MULTILINE | re.DOTALL)
    return {name: re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([\w.]+)", code) for name, code in parts}


def without_wait(listing):
    """The kernels that do not begin with both, in this order, before they touch memory, branch or end."""
    names = []
    for name, all_codes in opcodes(listing).items():
        before = all_codes[: all_codes.index(WAIT)] if WAIT in all_codes else all_codes
        touching = [code for code in before if TOUCHES.match(code) and not OF_ARGUMENTS.match(code)]
        if WAIT not in all_codes or BEGIN not in before or touching:
            names.append(name)
    return names


def incoherent(listing):
    """The kernels with loads that a cache may answer which is not kept coherent."""
    loads = re.compile(r"LD.*\.CONSTANT")
    has_one = lambda codes: any(loads.match(code) for code in codes)
    return [name for name, codes in opcodes(listing).items() if name not in OF_CONSTANTS and has_one(codes)]
