"""CUDA graphs: a function is captured whole, or nothing is left of the attempt."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from serpent_ir.system.forks import Lock

Result = TypeVar("Result")

_capturing = Lock()  # PyTorch's generator of random numbers knows one capture at a time
# PyTorch's allocator of pinned memory goes on asking the graphs that failed, and takes no more captures of their pools.
_failed: list[torch.cuda.CUDAGraph] = []
_spoilt: set[Any] = set()


def capture(run: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A graph of all that `run` queues on the current stream, and what `run` returned. It has not run by then.

    Other threads may allocate and launch meanwhile, and nothing is waited for. Memory that the allocator keeps for
    others does not serve the graph.

    Args:
        run: what to capture. What it returns lies in the graph's memory, and every replay writes over it.
        pool: that of a graph that still exists (`graph.pool()`), to share its memory; None for a new one, which also
            is taken where a capture with this one has failed.

    Raises:
        Exception: what `run` raised, or a RuntimeError of the capture. The stream, PyTorch's allocator and its
            generator of random numbers are as before.
    """
    # Not torch.cuda.graph, which empties the cache, and leaves open what failed.
    graph = torch.cuda.CUDAGraph()
    if pool is None or pool in _spoilt:
        pool = torch.cuda.graph_pool_handle()
    with _capturing:
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            result = run()
            graph.capture_end()
        except BaseException:
            _end(graph, pool)
            raise
    return graph, result


def _end(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End what PyTorch ends only after a capture that succeeds."""
    with suppress(RuntimeError):  # says again that it failed
        graph.capture_end()
    # While the allocator waits for the end of a capture, memory that two streams use, as batches, is never free again.
    with suppress(RuntimeError):  # where it did end
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    graph.reset()
    _failed.append(graph)
    _spoilt.add(pool)
    # The generator waits until some capture succeeds.
    number, other = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    other.capture_begin(capture_error_mode="thread_local")
    number.zero_()
    other.capture_end()
