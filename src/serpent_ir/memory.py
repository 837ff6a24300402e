"""How much memory there is, and how much a network needs for an image: what decides between whole images and tiles.

The figures of `BYTES_PER_PIXEL` were measured with `benchmarks/memory.py`: `benchmarks/results/memory.*.json`.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

SHARE = 0.8
"""Of the available memory, what an image may take by prediction; the rest is for what a prediction does not see."""

IMAGE = 72
"""Bytes for each pixel of a network's input that hold the image itself: its pixels, the input and output in float32 and
what turns one into the other."""

# Peak bytes for each pixel of the network's input, beyond the weights and `IMAGE`: (in any case, for each channel of
# the first level and pixel). A patch of P x P pixels is one position of Serpent's first level.
BYTES_PER_PIXEL: dict[tuple[str, str], tuple[float, float]] = {
    ("Serpent", "cpu"): (0, 40),
    ("Serpent", "cuda"): (0, 25),
    ("UNet", "cpu"): (0, 25),
    ("UNet", "cuda"): (0, 13),
    ("SwinIR", "cpu"): (0, 56),
    ("SwinIR", "cuda"): (528, 25),  # heads are padded, which costs narrow networks more
    ("Restormer", "cpu"): (0, 145),
    ("Restormer", "cuda"): (0, 65),
}
_ENLARGED = {"cpu": 520, "cuda": 260}
"""Bytes for each pixel of the output of a network that makes images larger: two maps of SwinIR's 64 channels there.

Measured on a CPU 480 (`pixelshuffle`), 320 (`nearest+conv`).
"""
_UNKNOWN = (0, 128)  # a network that nobody measured, 32 channels wide: 4 KB a pixel


# What the allocators of the CPU and of MPS, and NVIDIA's libraries, say in a plain RuntimeError; and PyTorch of a size
# that no number holds.
_MEMORY_SIGNS = (
    "not enough memory", "can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED",
    "Storage size calculation overflowed",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is one of the ways in which PyTorch runs out of memory."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _MEMORY_SIGNS))


def network_bytes(model: nn.Module, pixels: int, device: torch.device, dtype: torch.dtype) -> int:
    """Predicted peak memory on `device` of one pass of `model` over an input of so many pixels (images counted in).

    `dtype` is what the network computes in: on CUDA the table holds bfloat16, and float32 takes twice as much.
    """
    config = getattr(model, "config", None)
    kind = "cpu" if device.type == "cpu" else "cuda"
    maps, each = BYTES_PER_PIXEL.get((type(model).__name__, kind), _UNKNOWN)
    width = getattr(config, "dim", None) or getattr(config, "channels", None) or 32
    width /= getattr(config, "patch_size", 1) ** 2
    wider = 2 if kind == "cuda" and dtype == torch.float32 else 1
    if (scale := getattr(model, "scale", 1)) > 1:
        maps += _ENLARGED[kind] * scale**2
    return round(pixels * (IMAGE + wider * (maps + each * width)))


def available(device: torch.device) -> int:
    """Bytes that this process can still allocate on a device."""
    if device.type != "cuda":  # Apple's GPU shares the memory of the host
        return host_available()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def host_available() -> int:
    """Bytes of main memory that this process can still take without swapping; respects a container's limit."""
    if sys.platform == "win32":
        return _available_on_windows()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS does not say: half of all there is
    return min(free, _free_in_container())


def _free_in_container() -> int:
    """What the control group of this process leaves, in either version of Linux's control groups."""
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            bound = int(Path(folder, limit).read_text())  # "max" where there is none
            stats = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            cache = int(stats.get("inactive_file", 0))  # file cache that the system gives back when asked
            return max(0, bound - int(Path(folder, used).read_text()) + cache)
        except (OSError, ValueError):
            continue
    return sys.maxsize


def _available_on_windows() -> int:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = (
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "free", "page", "page_free", "virtual", "virtual_free")),
            ("extended", ctypes.c_uint64),
        )

    status = Status(length=ctypes.sizeof(Status))
    ctypes.WinDLL("kernel32").GlobalMemoryStatusEx(ctypes.byref(status))  # pyright: ignore[reportAttributeAccessIssue]
    return status.free
