"""What the GPU benchmarks share: the training step that is timed, the timing of calls, and the machine's details."""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_ir.system.devices import device_name


def median_ms(call: Callable[[], Any], repeats: int, warmup: int = 1) -> float:
    """Median milliseconds of a call between two CUDA events, including the time that the host takes to launch it.

    Without a GPU the clock is used.
    """
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        if not torch.cuda.is_available():
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def training_step(network: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """(degraded, clean) -> loss: forward (on a GPU under bfloat16 autocast), L1, backward, clipping and Adam."""
    device = next(network.parameters()).device
    on_gpu = device.type == "cuda"
    lr = torch.tensor(1e-4, device=device) if on_gpu else 1e-4
    adam = torch.optim.Adam(network.parameters(), lr=lr, fused=on_gpu, capturable=on_gpu)

    def step(degraded: Tensor, clean: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            restored = network(degraded)
        loss = F.l1_loss(restored.float(), clean)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        return loss.detach()

    return step


def machine(device: str = "cuda") -> dict[str, Any]:
    """The hardware and software of a measurement."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {
        "device": device_name(torch.device(device)),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }
