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


def without_wait(nvidia, cubin):
    """The kernels of native code that might touch memory before they wait for the grid before them.

    Such a kernel must not be launched while that grid runs. The source has the wait first; this is what the assembler made
    of it: no load, store or branch may come before the instruction that waits.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        nvdisasm = nvidia / "cu13" / "bin" / "nvdisasm"
        done = subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"nvdisasm: {done.stderr.strip()}")
    return unsafe_beginnings(done.stdout)


# griddepcontrol.launch_dependents and griddepcontrol.wait.
BEGIN, WAIT = "PREEXIT", "ACQBULK"
# Loads of arguments, which are a launch's own.
OF_ARGUMENTS = re.compile(r"(LDC|ULDC)(\.|$)")
TOUCHES = re.compile(r"LD|ST|ATOM|RED|CCTL|UBLK|BRA|BRX|JMP|JMX|CALL|RET|EXIT|BAR|MEMBAR|ERRBAR|SYNCS")


def unsafe_beginnings(listing):
    """Names of the kernels in a listing of nvdisasm that do not begin with both, in this order, before all else."""
    names = []
    for name, code in re.findall(r"^\.text\.(\w+):\n(.*?)(?=^\.text\.|\Z)", listing, re.MULTILINE | re.DOTALL):
        before = []
        for opcode in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([\w.]+)", code):
            if opcode == WAIT:
                break
            before.append(opcode)
        touching = [code for code in before if TOUCHES.match(code) and not OF_ARGUMENTS.match(code)]
        if len(before) == len(re.findall(r"/\*[0-9a-f]{4,}\*/", code)) or BEGIN not in before or touching:
            names.append(name)
    return names
