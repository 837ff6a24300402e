"""Batches from CUDA graphs: the host takes longer to launch the small kernels of a batch than a GPU to run them."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from serpent_ir.data.store import to_device
from serpent_ir.system.capture import capture

WARMUP = 2  # calls of a key that run as they are: they compile and load kernels, and fill caches
GRAPHS = 8
IDLE = 64  # calls after which a graph may go for another; sooner, captures would cost more than replays save
KEYS = 64  # without a graph that are remembered; images of many sizes bring ever new ones

Batch = tuple[Tensor, Tensor]
Run = Callable[[Tensor], Batch]


class _Graph:
    """One captured call, on the current stream. `pool` is that of another graph, or None for a new one."""

    def __init__(self, run: Run, numbers: np.ndarray, device: torch.device, pool: Any):
        self.table = to_device(numbers, device)  # not within: freeing pinned memory records an event
        self.graph, self.batch = capture(lambda: run(self.table), pool)
        self.pool = self.graph.pool()

    def __call__(self, numbers: np.ndarray) -> Batch:
        self.table.copy_(torch.from_numpy(numbers).pin_memory(), non_blocking=True)
        self.graph.replay()
        degraded, clean = self.batch
        return degraded.clone(), clean.clone()  # the next replay of any graph writes over these


@dataclass
class _Key:
    calls: int = 0
    last: int = 0  # among the calls of all keys
    graph: _Graph | None = None


class Captured:
    """Calls functions of a table of numbers, from a CUDA graph where one comes again and again.

    All calls come from one thread and on one stream, not the default one, which is also the one that is captured. So
    graphs share memory, and one may go while it runs: its memory is used by what the stream does after.

    A function that asks the host cannot be captured: from the first failure on all calls run as they are.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.keys: OrderedDict[Hashable, _Key] = OrderedDict()  # the one used longest ago comes first
        self.calls = 0
        self.able = True

    def __call__(self, run: Run, numbers: np.ndarray, key: Hashable) -> Batch:
        """run(numbers on the device). `key` holds all that `run` depends on, but for the numbers and their shape."""
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
        """Make a graph, unless there are enough that are in use."""
        others = [(key, of.last, of.graph.pool) for key, of in self.keys.items() if of.graph is not None]
        if len(others) >= GRAPHS:
            key, last, _ = others[0]
            if self.calls - last <= IDLE:
                return
            del self.keys[key]
        try:
            # Another graph holds the pool at all times: PyTorch refuses the handle of one that was let go.
            now.graph = _Graph(run, numbers, self.device, others[-1][2] if others else None)
        except RuntimeError:  # too little memory, too
            self.able = False
