"""CUDA C++ compiled at run time, through NVRTC and the CUDA driver.

This needs neither a compiler nor a CUDA toolkit: NVRTC is a Python package that torch's CUDA builds depend on, and they
need the driver anyway. Compiled code is kept on disk.
"""

import ctypes
import functools
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch

from serpent_ir import __version__
from serpent_ir.system.forks import Lock
from serpent_ir.system.whole_file import whole_file

SOURCES = Path(__file__).parent / "src"
_INVALID_CONTEXT = 201
_ALWAYS_SHARED = 48 << 10  # bytes of shared memory that every kernel may use without asking
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


class Kernels:
    """The kernels of one source file, compiled with given constants and loaded on one device."""

    def __init__(self, file: str, constants: tuple[tuple[str, int], ...], device: int):
        self.device = device
        capability = torch.cuda.get_device_capability(device)
        with torch.cuda.device(device):
            _make_current(device)
            code = cubin(file, constants, capability)
            try:
                self._module = _load_module(code)
            except RuntimeError:  # the kept code may be for another driver version; if new code fails, it is an error
                self._module = _load_module(cubin(file, constants, capability, anew=True))
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._shared: dict[str, int] = {}  # bytes of shared memory that launches of a kernel may ask for so far
        self._lock = Lock()

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, shared: int, args: bytes) -> None:
        """Launch a kernel that takes one struct, on the current stream; `shared` is in bytes."""
        function = self._functions[name] if shared <= self._shared.get(name, -1) else self._function(name, shared)
        struct = ctypes.create_string_buffer(args, len(args))
        params = (ctypes.c_void_p * 1)(ctypes.addressof(struct))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        call = (function, *grid, threads, 1, 1, shared, stream, params, None)
        status = _driver().cuLaunchKernel(*call)
        if status == _INVALID_CONTEXT:  # a thread that has not called CUDA yet, for example one of autograd's
            _make_current(self.device)
            status = _driver().cuLaunchKernel(*call)
        _check(status, name)

    def _function(self, name: str, shared: int) -> ctypes.c_void_p:
        """The kernel, allowed to use this much shared memory. The limit belongs to the kernel and only rises."""
        with self._lock:
            function = self._functions.get(name)
            if function is None:
                function = ctypes.c_void_p()
                _check(_driver().cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()), name)
                self._functions[name] = function
                self._shared[name] = _ALWAYS_SHARED
            if shared > self._shared[name]:
                _check(_driver().cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), name)
                self._shared[name] = shared
        return function


def _load_module(code: bytes) -> ctypes.c_void_p:
    module = ctypes.c_void_p()
    _check(_driver().cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
    return module


def _make_current(device: int) -> None:
    """Make the context that PyTorch uses on a device the current one of this thread."""
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_driver().cuDeviceGet(ctypes.byref(handle), device), "cuDeviceGet")
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


_lock = Lock()
_loaded: dict[tuple, Kernels] = {}


def load(file: str, constants: tuple[tuple[str, int], ...], device: torch.device) -> Kernels:
    """The kernels of `src/<file>` with preprocessor constants. They are compiled once, then come from disk or memory.

    Raises ValueError for a device that is not a GPU, RuntimeError if the kernels cannot run on it.
    """
    operator = "selective_scan_fn" if file.startswith("sequence") else "ss2d"
    if device.type != "cuda":
        raise ValueError(f"{operator}: the backend 'cuda' reads tensors on NVIDIA GPUs, not on {device}")
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (file, constants, index)
    kernels = _loaded.get(key)
    if kernels is None:
        if reason := unavailable(device):
            raise RuntimeError(f"{operator}: the backend 'cuda' does not run on {device}: {reason}")
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


def cubin(
    file: str, constants: tuple[tuple[str, int], ...], capability: tuple[int, int], *, anew: bool = False
) -> bytes:
    """`compile_source`, or its result from an earlier process; `anew` compiles even if a result is kept.

    A cache file holds the SHA-256 of the code, then the code. If they do not agree, the file is made again.
    """
    digest = hashlib.sha256(repr((file, constants, capability, nvrtc_version(), __version__)).encode())
    for source in (SOURCES / file, *_headers()):
        digest.update(source.read_bytes())
    folder = cache_folder()
    path = folder / f"{file.partition('.')[0]}-{digest.hexdigest()[:32]}.cubin" if folder else None
    if path and not anew:
        with suppress(OSError):
            kept = path.read_bytes()
            its_hash, code = kept[:32], kept[32:]
            if hashlib.sha256(code).digest() == its_hash:
                return code
    code = compile_source(file, constants, capability)
    if path:
        with suppress(OSError):  # if the home cannot be written, the next process compiles again; nothing else is lost
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as target:
                target.write(hashlib.sha256(code).digest() + code)
    return code


def cache_folder() -> Path | None:
    """The folder of compiled kernels: $XDG_CACHE_HOME/serpent-ir, or ~/.cache/serpent-ir; None without a home."""
    if wanted := os.environ.get("XDG_CACHE_HOME"):
        return Path(wanted) / "serpent-ir"
    try:
        return Path.home() / ".cache" / "serpent-ir"
    except RuntimeError:  # neither HOME nor a passwd entry, as in containers that run under an arbitrary user number
        return None


def unavailable(device: torch.device | None = None) -> str:
    """The reason why kernels cannot be compiled here for a GPU (by default the current one); empty if they can."""
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
    """NVRTC of the CUDA version that torch was built for, from Python's packages or from the system."""
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
