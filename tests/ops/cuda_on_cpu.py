"""Runs the CUDA kernels on the CPU: the same sources through the C++ compiler, with `cuda_on_cpu.h` in front."""

import ctypes
import hashlib
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from serpent_ir.ops.cuda import nvrtc

COMPILER = shutil.which("g++") or shutil.which("clang++")
_FLAGS = ["-std=c++17", "-O1", "-w", "-fPIC"]
_folder = tempfile.TemporaryDirectory(prefix="serpent-cuda-on-cpu-")
_loaded: dict[tuple, "Kernels"] = {}


class Kernels:
    """What `serpent_ir.ops.cuda.nvrtc.Kernels` is, with tensors in the memory of the CPU."""

    def __init__(self, file: str, constants: tuple[tuple[str, int], ...]):
        text = (nvrtc.SOURCES / file).read_text()
        kernels = re.findall(r'extern "C" __global__ void LAUNCH_BOUNDS\([^)]*\) (\w+)\(const (\w+) a\)', text)
        assert kernels, file
        lines = [f'#include "{_header()}"', *(f"#define {key} {value}" for key, value in constants), text]
        lines += [f"EMULATE({name}, {args})" for name, args in kernels]
        name = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        source, library = (Path(_folder.name) / f"{name}{suffix}" for suffix in (".cpp", ".so"))
        source.write_text("\n".join(lines))
        flags = [*_FLAGS, "-shared", f"-I{nvrtc.SOURCES}"]
        subprocess.run([COMPILER or "g++", *flags, str(source), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, shared: int, args: bytes) -> None:
        getattr(self._library, f"run_{name}")(args, (ctypes.c_uint * 3)(*grid), threads, shared)


@cache
def _header() -> Path:
    """A copy of the header, compiled, which g++ then takes: most of a kernel's time would go into the library's own."""
    header = Path(_folder.name) / "cuda_on_cpu.h"
    shutil.copy(Path(__file__).with_suffix(".h"), header)
    if COMPILER and Path(COMPILER).name == "g++":
        subprocess.run([COMPILER, *_FLAGS, "-x", "c++-header", str(header), "-o", f"{header}.gch"], check=True)
    return header


class Silent:
    """Kernels that do nothing."""

    def launch(self, *_: object) -> None: ...


def load(file: str, constants: tuple[tuple[str, int], ...], device: torch.device) -> Kernels:
    key = (file, constants)
    if key not in _loaded:
        _loaded[key] = Kernels(*key)
    return _loaded[key]
