"""llama.cpp as a peer: installed from the source package of llama-cpp-python, fed with the slice, timed by llama-bench.

Everything lands in one directory. What is there already is used again.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PIN = HERE / "llama-cpp-python.txt"
VERSION = PIN.read_text().split("==")[1].split()[0]

# Its candidates per format, of equal bits: 16, 8.5, and 4.5 twice.
FILES = {"bf16": ["BF16"], "int8": ["Q8_0"], "int4": ["Q4_0", "Q4_K"]}

CMAKE = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON", "-DGGML_CCACHE=OFF",
    "-DGGML_CUDA=OFF", "-DGGML_METAL=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_SERVER=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_TOOLS=ON",
]


def say(text):
    print(text, file=sys.stderr, flush=True)


class LlamaCpp:
    def __init__(self, directory):
        self.directory = Path(directory)
        self.venv = self.directory / "venv" / "bin"
        self.build = self.directory / "build"
        self.version = None

    def install(self):
        """Some minutes the first time."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self._make_venv()
        stamp = self.build / "version"
        if stamp.exists() and stamp.read_text() == VERSION:
            return
        source = self._fetch_source()
        shutil.rmtree(self.build, ignore_errors=True)
        say(f"building llama.cpp of llama-cpp-python {VERSION}, some minutes ...")
        self._logged("configure", self.venv / "cmake", "-S", source, "-B", self.build, "-G", "Ninja", *CMAKE)
        jobs = str(os.cpu_count() or 1)
        self._logged("build", self.venv / "ninja", "-C", self.build, "-j", jobs, "llama-bench", "llama-quantize")
        stamp.write_text(VERSION)

    def _make_venv(self):
        wanted = (HERE / "requirements.txt").read_text()
        stamp = self.directory / "venv" / "requirements.txt"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        subprocess.run([sys.executable, "-m", "venv", self.directory / "venv"], check=True)
        subprocess.run([self.venv / "pip", "install", "-q", "-r", HERE / "requirements.txt"], check=True)
        stamp.write_text(wanted)

    def _fetch_source(self):
        folder = self.directory / "source"
        unpacked = folder / f"llama_cpp_python-{VERSION}"
        source = unpacked / "vendor" / "llama.cpp"
        if source.is_dir():
            return source
        # Only this package as source: with :all: pip would build the tools that read its metadata as well.
        pip = [self.venv / "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "--require-hashes"]
        subprocess.run([*pip, "-r", PIN, "-d", folder], check=True)
        with tarfile.open(folder / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
        return source

    def _logged(self, name, *command):
        log = self.directory / f"{name}.log"
        path = f'{self.venv}{os.pathsep}{os.environ["PATH"]}'
        with open(log, "w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "PATH": path})
        if done.returncode != 0:
            raise SystemExit(f"{name} of llama.cpp failed: see {log}")

    def model(self, slice_directory, kind):
        """The GGUF file of a kind with the slice's weights, written unless it is there."""
        path = self.directory / f"slice-{kind.lower()}.gguf"
        if path.exists():
            return path
        unfinished = path.with_suffix(".unfinished")
        say(f"writing {path.name} ...")
        if kind == "BF16":
            subprocess.run([self.venv / "python", HERE / "gguf_slice.py", slice_directory, unfinished], check=True)
        else:
            whole = self.model(slice_directory, "BF16")
            name = "Q4_K_S" if kind == "Q4_K" else kind
            # Pure: every matrix in that type, none in a better one.
            quantize = self.build / "bin" / "llama-quantize"
            self._logged(f"quantize-{kind.lower()}", quantize, "--pure", whole, unfinished, name)
        unfinished.rename(path)
        return path

    def bench(self, path, repack, prompt, decode, threads, kv):
        """One run after one that warms up: {"prefill": result, "decode": result}, tests of 0 tokens left out."""
        command = [
            self.build / "bin" / "llama-bench", "-m", path, "-p", prompt, "-n", decode, "-r", 1, "-t", threads,
            "-ctk", kv, "-ctv", kv, "--repack", repack, "-lm", "none", "-o", "json",
        ]
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"llama-bench failed: {done.stderr.strip()[-2000:]}")
        results = json.loads(done.stdout)
        self.version = results[0]["build_commit"]
        return {"prefill" if result["n_prompt"] else "decode": result for result in results}
