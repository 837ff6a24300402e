"""How much memory this process can still take, on the host and on a GPU, limits included."""

import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # code that asks whether there is memory to load PyTorch should not load it
    import torch

SHARE = 0.8
"""Share of the available memory that an image may take by prediction. The rest is for what predictions do not cover."""

WORK = 64 << 20
"""Bytes that Python's threads and a small network take at least."""


def available(device: "torch.device") -> int:
    """Bytes that this process can still allocate on a device."""
    if device.type != "cuda":  # Apple's GPU shares the host's memory
        return host_available()
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_stats_as_nested_dict(device)  # `memory_reserved` sorts all of it, a small image's time
    reserved, allocated = (held[kind]["all"]["current"] for kind in ("reserved_bytes", "allocated_bytes"))
    return free + reserved - allocated


def host_available() -> int:
    """Bytes of main memory that this process can still take without swapping.

    Limits count: those of control groups (containers, systemd, Slurm), and those of the process (`ulimit -v`).
    """
    if sys.platform == "win32":
        return _available_on_windows()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS does not tell: half of all memory
    return min(free, free_in_groups(Path("/proc/self")), free_of_process())


def free_in_groups(process: Path) -> int:
    """The memory that the control groups of a process leave it; `sys.maxsize` if none has a limit.

    It is the least of its own group and all groups above, in either version of Linux's control groups. `process` is the
    process's folder in /proc; its `cgroup` says in which groups it is, and its `mountinfo` where their files are.
    """
    try:
        folders = _groups((process / "cgroup").read_text(), (process / "mountinfo").read_text())
    except OSError:
        return sys.maxsize
    return min((_free_in_group(folder, *_FILES[kind]) for folder, kind in folders), default=sys.maxsize)


@functools.lru_cache(8)
def _groups(cgroup: str, mountinfo: str) -> list[tuple[Path, str]]:
    """The folders of the control groups that a process is in, and of those above, with their version."""
    groups = [line.split(":", 2) for line in cgroup.splitlines()]
    found = []
    for where, what in (line.split(" - ", 1) for line in mountinfo.splitlines()):
        kind, _, options = what.split(" ", 2)
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        root, mount = (Path(field.replace("\\040", " ")) for field in where.split(" ")[3:5])
        controller = "" if kind == "cgroup2" else "memory"
        own = next((Path(path) for _, names, path in groups if controller in names.split(",")), root)
        # A container may see its own group as the root of what is mounted, but under the name that the host uses.
        below = own.relative_to(root) if own.is_relative_to(root) else Path()
        above = (mount / below, *(mount / below).parents)
        found += [(folder, kind) for folder in above if folder.is_relative_to(mount)]
    return found


# For each version: limits, usage, and the entry of memory.stat for cached files, which the system releases on demand.
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
    """The number in a file; None if there is no such file, or if it says "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def free_of_process() -> int:
    """What `ulimit -v` and `-d` leave; `sys.maxsize` if they are unlimited or unknown."""
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
    """Raise MemoryError if the limits of this process leave it less than `least` bytes."""
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
