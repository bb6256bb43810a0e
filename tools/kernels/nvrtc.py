"""NVRTC by its C interface: CUDA C++ to PTX or to native code, without a GPU."""

import ctypes
import re


class Nvrtc:
    def __init__(self, nvidia):
        """`nvidia` is the folder of NVIDIA's packages."""
        self.library = ctypes.CDLL(str(nvidia / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def compile(self, source, architecture, options):
        """The code of a file, and what its assembler says of each kernel: PTX for compute_80 and the like, of which it says
        nothing, native code for sm_80. A file's name in messages is its file name alone."""
        is_native = architecture.startswith("sm_")
        options = [*options, f"--gpu-architecture={architecture}"] + ["--ptxas-options=-v"] * is_native
        program = ctypes.c_void_p()
        text, name = source.read_bytes(), source.name.encode()
        self._must(self.library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = self.library.nvrtcCompileProgram(program, len(options), given)
            log = self._get(program, "ProgramLog").rstrip(b"\0").decode().strip()
            # A warning is a failure too.
            complaints = [line for line in log.splitlines() if not re.match(r"ptxas (info\b|  +\.)", line)]
            if result != 0 or complaints:
                raise SystemExit(f"{source.name}: {log or self._message(result)}")
            return (self._get(program, "CUBIN") if is_native else self._get(program, "PTX").rstrip(b"\0")), log
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, program, what):
        size = ctypes.c_size_t()
        self._must(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._must(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _must(self, result):
        if result != 0:
            raise SystemExit(f"NVRTC: {self._message(result)}")

    def _message(self, result):
        return self.library.nvrtcGetErrorString(result).decode()
