"""How much memory there is, and how much a network needs for an image: what decides between whole images and tiles.

The figures of `BYTES_PER_PIXEL` were measured with `benchmarks/memory.py`: `benchmarks/results/memory.*.json`.
"""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what asks whether there is memory to load PyTorch should not load it
    import torch
    from torch import nn

SHARE = 0.8
"""Of the available memory, what an image may take by prediction; the rest is for what a prediction does not see."""

WORK = 64 << 20
"""Bytes that Python's threads and a small network take, at the least."""

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


def network_bytes(model: "nn.Module", pixels: int, device: "torch.device", dtype: "torch.dtype") -> int:
    """Predicted peak memory on `device` of one pass of `model` over an input of so many pixels (images counted in).

    `dtype` is what the network computes in: on CUDA the table holds bfloat16, and float32 takes twice as much.
    """
    import torch

    config = getattr(model, "config", None)
    kind = "cpu" if device.type == "cpu" else "cuda"
    maps, each = BYTES_PER_PIXEL.get((type(model).__name__, kind), _UNKNOWN)
    width = getattr(config, "dim", None) or getattr(config, "channels", None) or 32
    width /= getattr(config, "patch_size", 1) ** 2
    wider = 2 if kind == "cuda" and dtype == torch.float32 else 1
    if (scale := getattr(model, "scale", 1)) > 1:
        maps += _ENLARGED[kind] * scale**2
    return round(pixels * (IMAGE + wider * (maps + each * width)))


def available(device: "torch.device") -> int:
    """Bytes that this process can still allocate on a device."""
    if device.type != "cuda":  # Apple's GPU shares the memory of the host
        return host_available()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def host_available() -> int:
    """Bytes of main memory that this process can still take without swapping.

    Limits count: those of control groups (containers, systemd, Slurm), and of the process (`ulimit -v`).
    """
    if sys.platform == "win32":
        return _available_on_windows()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS does not say: half of all there is
    return min(free, free_in_groups(Path("/proc/self")), free_of_process())


def free_in_groups(process: Path) -> int:
    """What the control groups of a process leave it, the least of its own and all above, in either version of Linux's
    control groups; `sys.maxsize` where none has a limit.

    `process` is its folder of /proc, whose `cgroup` says in which groups it is and `mountinfo` where their files are.
    """
    try:
        groups = [line.split(":", 2) for line in (process / "cgroup").read_text().splitlines()]
        mounts = [line.split(" - ", 1) for line in (process / "mountinfo").read_text().splitlines()]
    except OSError:
        return sys.maxsize
    free = sys.maxsize
    for where, what in mounts:
        kind, _, options = what.split(" ", 2)
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, mount = (Path(field.replace("\\040", " ")) for field in where.split(" ")[3:5])
        controller = "" if kind == "cgroup2" else "memory"
        own = next((Path(path) for _, names, path in groups if controller in names.split(",")), root)
        # A container may see its own group as the root of what is mounted, and yet hear its name on the host.
        below = own.relative_to(root) if own.is_relative_to(root) else Path()
        for folder in (mount / below, *(mount / below).parents):
            if folder.is_relative_to(mount):
                free = min(free, _free_in_group(folder, *_FILES[kind]))
    return free


# Of each version: limits, usage, and of memory.stat the cache of files, which the system gives back when asked.
_FILES = {
    "cgroup2": (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    "cgroup": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
}


def _free_in_group(folder: Path, limits: tuple[str, ...], used: str, cache: str) -> int:
    bounds = [bound for limit in limits if (bound := _number(folder / limit)) is not None]
    if not bounds or (usage := _number(folder / used)) is None:
        return sys.maxsize
    try:
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        usage -= int(stats.get(cache, 0))
    except (OSError, ValueError):
        pass
    return max(0, min(bounds) - usage)


def _number(file: Path) -> int | None:
    """None where there is no such file, or it says "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def free_of_process() -> int:
    """What `ulimit -v` and `-d` leave; `sys.maxsize` where they are unlimited, or nobody says."""
    if sys.platform != "linux":
        return sys.maxsize
    import resource

    free = sys.maxsize
    pages = Path("/proc/self/statm").read_text().split()
    for limit, held in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
        bound = resource.getrlimit(limit)[0]
        if bound != resource.RLIM_INFINITY:
            free = min(free, max(0, bound - int(held) * resource.getpagesize()))
    return free


def check_process(least: int) -> None:
    """Raise MemoryError where the limits of this process leave it less than so many bytes."""
    if (free := free_of_process()) < least:
        raise MemoryError(f"{free >> 20} MB of it are left to this process")


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
