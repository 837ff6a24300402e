"""Replays batches from CUDA graphs: the host takes longer to launch their small kernels than a GPU to run them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serpent_ir.data.store import to_device
from serpent_ir.system.capture import capture

WARMUP = 2  # calls per key that run uncaptured: they compile and load kernels, and fill caches
GRAPHS = 8
IDLE = 64  # calls after which a graph may be dropped for another; sooner, captures would cost more than replays save
KEYS = 64  # keys without a graph that are remembered; images of many sizes bring ever new ones

Batch = tuple[Tensor, Tensor]
Run = Callable[[Tensor], Batch]


class _Graph:
    """One captured call, on the current stream. `pool` is another graph's memory pool, or None for a new one."""

    def __init__(self, run: Run, numbers: np.ndarray, device: torch.device, pool: Any):
        self.table = to_device(numbers, device)  # not inside the graph, since freeing pinned memory records an event
        self.graph, self.batch = capture(lambda: run(self.table), pool)
        self.pool = self.graph.pool()

    def __call__(self, numbers: np.ndarray) -> Batch:
        self.table.copy_(torch.from_numpy(numbers).pin_memory(), non_blocking=True)
        self.graph.replay()
        degraded, clean = self.batch
        return degraded.clone(), clean.clone()  # the next replay of any graph overwrites these


@dataclass
class _Key:
    calls: int = 0
    last: int = 0  # number of its last call, counted over all keys
    graph: _Graph | None = None


class GraphedBatches:
    """Calls functions of a table of numbers, from a CUDA graph once a call has come several times.

    All calls must come from one thread and on one stream other than the default one; that stream is also the one that
    is captured. So graphs share memory, and a graph may be dropped while it runs: its memory is only used by what the
    stream does afterwards.

    A function that waits for the device on the host cannot be captured. From the first failure on all calls run
    uncaptured.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.keys: OrderedDict[Hashable, _Key] = OrderedDict()  # the least recently used one comes first
        self.calls = 0
        self.able = True

    def __call__(self, run: Run, numbers: np.ndarray, key: Hashable) -> Batch:
        """run(numbers on the device). `key` covers all that `run` depends on, except the numbers and their shape."""
        key = (numbers.shape, key)
        now = self.keys.setdefault(key, _Key())
        self.keys.move_to_end(key)
        self.calls += 1
        now.calls, now.last = now.calls + 1, self.calls
        if now.graph is None and now.calls > WARMUP and self.able:
            self._capture(now, run, numbers)
        if now.graph is not None:
            return now.graph(numbers)
        plain = [key for key, of in self.keys.items() if of.graph is None]
        if len(plain) > KEYS:
            del self.keys[plain[0]]
        return run(to_device(numbers, self.device))

    def _capture(self, now: _Key, run: Run, numbers: np.ndarray) -> None:
        """Make a graph, unless there are already enough that are in use."""
        others = [(key, of.last, of.graph.pool) for key, of in self.keys.items() if of.graph is not None]
        if len(others) >= GRAPHS:
            key, last, _ = others[0]
            if self.calls - last <= IDLE:
                return
            del self.keys[key]
        try:
            # Another graph keeps the pool alive at all times: PyTorch refuses the handle of a pool that was released.
            now.graph = _Graph(run, numbers, self.device, others[-1][2] if others else None)
        except RuntimeError:  # includes too little memory
            self.able = False
