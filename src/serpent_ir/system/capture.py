"""Capture of CUDA graphs: a function is captured whole, or nothing is left of the attempt."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch

from serpent_ir.system.forks import Lock

Result = TypeVar("Result")

_capturing = Lock()  # PyTorch's random number generator supports one capture at a time
# PyTorch's allocator of pinned memory keeps asking failed graphs, and accepts no more captures with their pools.
_failed: list[torch.cuda.CUDAGraph] = []
_spoilt: set[Any] = set()


def capture(run: Callable[[], Result], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Result]:
    """Capture all that `run` queues on the current stream. Returns the graph and what `run` returned; it has not run
    yet.

    Other threads may allocate and launch meanwhile, and nothing is waited for. The graph does not use memory that the
    allocator has cached for others.

    Args:
        run: what to capture. Its result lies in the graph's memory, and every replay overwrites it.
        pool: the memory pool of a graph that still exists (`graph.pool()`), to share its memory; None for a new pool. A
            new one is also used if a capture with this pool has failed before.

    Raises:
        Exception: what `run` raised, or a RuntimeError from the capture. The stream, PyTorch's allocator and its random
            number generator are as before.
    """
    # torch.cuda.graph is not used, because it empties the cache and leaves a failed capture open.
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
    """End what PyTorch only ends after a successful capture."""
    with suppress(RuntimeError):  # it reports again that the capture failed
        graph.capture_end()
    # While the allocator waits for the end of a capture, memory that two streams use, such as batches, is never freed.
    with suppress(RuntimeError):  # raised if the capture did end
        device = torch.cuda.current_device()
        torch._C._cuda_endAllocateToPool(device, pool)
        torch._C._cuda_releasePool(device, pool)
    graph.reset()
    _failed.append(graph)
    _spoilt.add(pool)
    # The random number generator waits until some capture succeeds.
    number, other = torch.zeros(1, device="cuda"), torch.cuda.CUDAGraph()
    other.capture_begin(capture_error_mode="thread_local")
    number.zero_()
    other.capture_end()
