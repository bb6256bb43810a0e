"""Builds what runs on a machine that has a GPU and an NVIDIA driver but no Rust, no compiler, no Python and no network.

    bundle.py test      target/gpu-test and target/gpu-test.tar.gz      (or: make gpu-test)
    bundle.py bench     target/gpu-bench and target/gpu-bench.tar.gz    (or: make gpu-bench)

Copy the archive there, unpack it, and call its run.sh. The programs are linked with this system's C library: there it must
not be older. CARGO says how cargo is called.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TARGET = REPOSITORY / "target"
CARGO = shlex.split(os.environ.get("CARGO", "cargo"))

# What still goes through where files are passed around.
MOST_BYTES = 64 << 20


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["test", "bench"])
    what = parser.parse_args().what
    folder = TARGET / f"gpu-{what}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "bin").mkdir(parents=True)
    {"test": fill_test, "bench": fill_bench}[what](folder)
    shutil.copy(HERE / "machine.sh", folder)
    shutil.copy(HERE / f"{what}.sh", folder / "run.sh")
    archive = pack(folder)
    print(f"{archive.relative_to(REPOSITORY)}: {archive.stat().st_size / 1e6:.1f} MB; unpack it there and call run.sh")


def fill_test(folder):
    """The tests of the kernels and of the backend, and what they read of the repository."""
    names = ["kernels", "cuda"]
    targets = [argument for name in names for argument in ("--test", name)]
    built = build(["test", "--no-run", "--locked", *targets])
    for name in names:
        add_program(built[name], folder / "bin" / name)
    for path in ["kernels/generated", "tests/golden", "tests/golden_gradients", "examples/demo-model"]:
        shutil.copytree(REPOSITORY / path, folder / path)


def fill_bench(folder):
    """The bench, which has all it needs inside."""
    built = build(["build", "--profile", "bench", "--locked", "--features", "bench", "--bin", "gpu-bench"])
    add_program(built["gpu-bench"], folder / "bin" / "gpu-bench")


def build(arguments):
    """{target: its executable}"""
    command = [*CARGO, *arguments, "--message-format", "json-render-diagnostics"]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(done.returncode)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    return {message["target"]["name"]: message["executable"] for message in messages if message.get("executable")}


def add_program(built, path):
    """Without what only a debugger reads; names of functions stay for backtraces."""
    subprocess.run(["strip", "--strip-debug", "-o", path, built], check=True)
    path.chmod(0o755)


def pack(folder):
    """The folder as an archive that does not tell who made it."""
    def anonymous(entry):
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    archive = folder.with_suffix(".tar.gz")
    with tarfile.open(archive, "w:gz") as file:
        file.add(folder, folder.name, filter=anonymous)
    if archive.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{archive} is {archive.stat().st_size} bytes, expected at most {MOST_BYTES}")
    return archive


if __name__ == "__main__":
    main()
