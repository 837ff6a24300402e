"""What the benchmarks of GPUs share: how a call is timed, and what it was timed on."""

import platform
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def median_ms(call: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median of a call between two CUDA events, with the time that the host takes to launch it."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """What a measurement was made with."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }
