"""CUDA C++ compiled at run time, through two libraries that torch's CUDA builds bring or need: NVRTC and the driver.

No compiler and no CUDA toolkit: NVRTC is a Python package that torch depends on. Compiled code is kept on disk.
"""

import ctypes
import functools
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch

from serpent_ir import __version__
from serpent_ir.forks import Lock

SOURCES = Path(__file__).parent / "cuda_src"
_INVALID_CONTEXT = 201
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernels:
    """The kernels of one source file, compiled with given constants and loaded on one device."""

    def __init__(self, file: str, constants: tuple[tuple[str, int], ...], device: int):
        self.device = device
        cuda = _driver()
        code = cubin(file, constants, torch.cuda.get_device_capability(device))
        module = ctypes.c_void_p()
        with torch.cuda.device(device):
            _make_current(device)
            _check(cuda.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
        self._module = module
        self._functions: dict[tuple[str, int], ctypes.c_void_p] = {}

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, shared: int, args: bytes) -> None:
        """Launch a kernel that takes one struct, on the current stream; `shared` is in bytes."""
        function = self._functions.get((name, shared)) or self._function(name, shared)
        struct = ctypes.create_string_buffer(args, len(args))
        params = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        call = (function, *grid, threads, 1, 1, shared, stream, params, None)
        status = _driver().cuLaunchKernel(*call)
        if status == _INVALID_CONTEXT:  # a thread that has not called CUDA yet, as autograd's may be
            _make_current(self.device)
            status = _driver().cuLaunchKernel(*call)
        _check(status, name)

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        _check(_driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
        if shared > 48 << 10:
            _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), name)
        self._functions[name, shared] = function
        return function


def _make_current(device: int) -> None:
    """The context that PyTorch uses on a device becomes this thread's."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


_lock = Lock()
_loaded: dict[tuple, Kernels] = {}


def load(file: str, constants: tuple[tuple[str, int], ...], device: torch.device) -> Kernels:
    """The kernels of `cuda_src/<file>` with preprocessor constants; compiled once, then from disk or memory.

    Raises ValueError for a device that is no GPU, RuntimeError where the kernels cannot run on it.
    """
    if device.type != "cuda":
        raise ValueError(f"ss2d: the backend 'cuda' reads tensors on NVIDIA GPUs, not on {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (file, constants, index)
    kernels = _loaded.get(key)
    if kernels is None:
        if reason := unavailable(device):
            raise RuntimeError(f"ss2d: the backend 'cuda' does not run on {device}: {reason}")
        with _lock:
            kernels = _loaded.get(key) or Kernels(file, constants, index)
            _loaded[key] = kernels
    return kernels


def compile_source(file: str, constants: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    """Machine code (a cubin) of one source file. Needs NVRTC, no GPU. Raises RuntimeError with the compiler's log."""
    nvrtc = _nvrtc()
    text = (SOURCES / file).read_bytes()
    headers = {path.name.encode(): path.read_bytes() for path in _headers()}
    array = ctypes.c_char_p * len(headers)
    program = ctypes.c_void_p()
    status = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), text, file.encode(), len(headers), array(*headers.values()), array(*headers)
    )
    if status:
        raise RuntimeError(f"nvrtcCreateProgram failed with status {status}")
    try:
        options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}", "--std=c++17"]
        options += [f"--define-macro={key}={value}" for key, value in constants]
        array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), array):
            raise RuntimeError(f"{file} with {dict(constants)}:\n{_text(nvrtc, program, 'ProgramLog').decode()}")
        return _text(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, buffer)
    return buffer.raw


def _headers() -> list[Path]:
    return sorted(SOURCES.glob("*.cuh"))


def cubin(file: str, constants: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
    """`compile_source`, or what it gave an earlier process."""
    digest = hashlib.sha256(repr((file, constants, capability, nvrtc_version(), __version__)).encode())
    for source in (SOURCES / file, *_headers()):
        digest.update(source.read_bytes())
    path = cache_folder() / f"{file.partition('.')[0]}-{digest.hexdigest()[:32]}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        code = compile_source(file, constants, capability)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
            temporary.write(code)
        Path(temporary.name).replace(path)
    except OSError:
        pass  # a home that cannot be written costs the next process the compilation, no more
    return code


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/serpent-ir, or ~/.cache/serpent-ir."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serpent-ir"


def unavailable(device: torch.device | None = None) -> str:
    """Why kernels cannot be compiled here for a GPU, by default the current one; empty where they can."""
    if torch.version.cuda is None:
        return "this PyTorch is not built for NVIDIA GPUs"
    try:
        nvrtc = _nvrtc()
        _driver()
    except OSError as error:
        return f"NVRTC or the CUDA driver is missing ({error})"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        count = ctypes.c_int()
        nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        nvrtc.nvrtcGetSupportedArchs(known)
        if (major, minor) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        if 10 * major + minor not in known:
            return f"NVRTC {'.'.join(map(str, nvrtc_version()))} is older than the GPU"
    return ""


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC of the CUDA version that torch was built for: from Python's packages, or from the system."""
    version = (torch.version.cuda or "13.0").split(".")[0]
    names = {"linux": f"libnvrtc.so.{version}", "win32": f"nvrtc64_{version}0_0.dll"}
    name = names.get(sys.platform, "libnvrtc.so")
    roots = [Path(torch.__file__).parent / "lib", *sorted(Path(torch.__file__).parents[1].glob("nvidia/*/[bl]i[bn]*"))]
    for path in (root / name for root in roots):
        if path.exists():
            return ctypes.CDLL(str(path))
    return ctypes.CDLL(name)


@functools.cache
def _driver() -> ctypes.CDLL:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    p, u = ctypes.c_void_p, ctypes.c_uint
    cuda.cuLaunchKernel.argtypes = [p, u, u, u, u, u, u, u, p, p, p]
    return cuda


def _check(status: int, what: str) -> None:
    if status:
        message = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(message))
        raise RuntimeError(f"CUDA: {what}: {(message.value or b'unknown error').decode()} ({status})")
