"""The cache of compiled kernels, and what is asked of the driver, with a driver that needs no GPU."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from serpent_ir import ops
from serpent_ir.ops import backends
from serpent_ir.ops.cuda import nvrtc

CODE = b"\x7fELF" + bytes(range(200))


class Compiler:
    """Counts what it is asked for, as `compile_source` and `nvrtc_version`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls = 0
        monkeypatch.setattr(nvrtc, "compile_source", self.compile)
        monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))

    def compile(self, *_: object) -> bytes:
        self.calls += 1
        return CODE

    def cubin(self) -> bytes:
        return nvrtc.cubin("combine.cu", (("TILE", 4),), (9, 0))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    return Compiler(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "serpent-ir"


def test_damaged_files_are_made_again(cache: Path, compiler: Compiler) -> None:
    assert compiler.cubin() == compiler.cubin() == CODE
    assert compiler.calls == 1
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    flipped = whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:]
    for i, damaged in enumerate((b"", whole[:20], whole[:32], whole[:-1], whole[:100], flipped, whole + b"0", CODE)):
        path.write_bytes(damaged)
        assert compiler.cubin() == CODE
        assert compiler.calls == 2 + i
        assert path.read_bytes() == whole
    assert list(cache.iterdir()) == [path]


def test_a_full_disk_leaves_nothing_and_stops_nothing(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert compiler.cubin() == CODE
    assert list(cache.iterdir()) == []


def test_without_a_home(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwd = pytest.importorskip("pwd")

    def nobody(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert nvrtc.cache_folder() is None
    assert compiler.cubin() == CODE
    assert list(tmp_path.iterdir()) == []


class Driver:
    """Loads nothing but CODE; a kernel's limit of shared memory is what was set last, as in CUDA."""

    def __init__(self, loads: tuple[bytes, ...] = (CODE,)):
        self.loads = loads
        self.limit = 48 << 10

    def cuModuleLoadData(self, module, code: bytes) -> int:  # noqa: N802
        module._obj.value = 1
        return 0 if code in self.loads else 200

    def cuModuleGetFunction(self, function, *_: object) -> int:  # noqa: N802
        function._obj.value = 7
        return 0

    def cuFuncSetAttribute(self, function, attribute: int, value: int) -> int:  # noqa: N802
        assert (function.value, attribute) == (7, 8)
        self.limit = value
        return 0

    def cuLaunchKernel(self, function, *rest: object) -> int:  # noqa: N802
        assert function.value == 7
        shared = rest[6]
        assert isinstance(shared, int)
        return 0 if shared <= self.limit else 1

    def cuGetErrorString(self, status: int, message) -> int:  # noqa: N802
        message._obj.value = b"invalid argument" if status == 1 else b"invalid image"
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    monkeypatch.setattr(nvrtc, "_make_current", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    return driver


def test_a_limit_of_shared_memory_only_rises(cache: Path, compiler: Compiler, driver: Driver) -> None:
    kernels = nvrtc.Kernels("combine.cu", (), 0)
    for kilobytes in (10, 96, 51, 96, 0, 48, 90, 96, 51):
        kernels.launch("combine", (1, 1, 1), 64, kilobytes << 10, b"arguments")
    assert driver.limit == 96 << 10


def test_code_that_does_not_load_is_compiled_once_more(cache: Path, compiler: Compiler, driver: Driver) -> None:
    nvrtc.Kernels("combine.cu", (), 0)
    assert compiler.calls == 1
    nvrtc.Kernels("combine.cu", (), 0)
    assert compiler.calls == 1
    (path,) = cache.iterdir()
    with pytest.MonkeyPatch.context() as patch:  # what another driver's NVRTC left, whole but not for this one
        patch.setattr(nvrtc, "compile_source", lambda *_: b"other")
        nvrtc.cubin("combine.cu", (), (9, 0), anew=True)
    nvrtc.Kernels("combine.cu", (), 0)
    assert compiler.calls == 2
    assert path.read_bytes().endswith(CODE)
    driver.loads = ()
    with pytest.raises(RuntimeError, match="cuModuleLoadData: invalid image"):
        nvrtc.Kernels("combine.cu", (), 0)
    assert compiler.calls == 3


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    backends.fast_backend.cache_clear()
    backends.warn_once.cache_clear()
    yield
    backends.fast_backend.cache_clear()
    backends.warn_once.cache_clear()


def test_each_gpu_of_a_host_is_asked_what_it_can(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(number) -> None:
        number._obj.value = 2

    def known(numbers: ctypes.Array) -> None:
        numbers[:] = [75, 90]

    compiler = SimpleNamespace(nvrtcGetNumSupportedArchs=count, nvrtcGetSupportedArchs=known)
    current = 0

    def capability(device: torch.device | None = None) -> tuple[int, int]:
        return ((9, 0), (7, 5), (12, 0))[current if device is None or device.index is None else device.index]

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: compiler)
    monkeypatch.setattr(nvrtc, "_driver", lambda: None)
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    assert ops.default_backend(torch.device("cuda")) == "cuda"
    with pytest.warns(RuntimeWarning, match="older than compute capability"):
        assert ops.default_backend(torch.device("cuda:1")) in ("triton", "torch")
    with pytest.warns(RuntimeWarning, match="NVRTC 13.0 is older than the GPU"):
        assert ops.default_backend(torch.device("cuda:2")) in ("triton", "torch")
    assert ops.default_backend(torch.device("cuda:0")) == "cuda"
    current = 1
    assert ops.default_backend(torch.device("cuda")) in ("triton", "torch")
    assert ops.default_backend(torch.device("cuda:0")) == "cuda"
