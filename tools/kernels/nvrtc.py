"""NVRTC by its C interface: CUDA C++ to PTX, without a GPU."""

import ctypes


class Nvrtc:
    def __init__(self, nvidia):
        """`nvidia` is the folder of NVIDIA's packages."""
        self.library = ctypes.CDLL(str(nvidia / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"))
        self.library.nvrtcGetErrorString.restype = ctypes.c_char_p

    def compile(self, source, options):
        """The PTX of a file. Its name in messages is its file name alone."""
        program = ctypes.c_void_p()
        text, name = source.read_bytes(), source.name.encode()
        self._must(self.library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = self.library.nvrtcCompileProgram(program, len(options), given)
            log = self._text(program, "ProgramLog").strip()
            if result != 0 or log:
                # A warning is a failure too.
                raise SystemExit(f"{source.name}: {log or self._message(result)}")
            return self._text(program, "PTX")
        finally:
            self.library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program, what):
        size = ctypes.c_size_t()
        self._must(getattr(self.library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._must(getattr(self.library, f"nvrtcGet{what}")(program, buffer))
        return buffer.value.decode()

    def _must(self, result):
        if result != 0:
            raise SystemExit(f"NVRTC: {self._message(result)}")

    def _message(self, result):
        return self.library.nvrtcGetErrorString(result).decode()
