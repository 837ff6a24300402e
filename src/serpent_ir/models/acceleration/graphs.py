"""Replays inference from CUDA graphs: the host launches hundreds of small kernels more slowly than a GPU runs them.

A call at a new shape runs uncaptured, which compiles what must be compiled. The second call is captured, and it and all
later ones are replayed. So a folder of images of different sizes never pays for captures.
"""

import functools
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from serpent_ir.system.capture import capture
from serpent_ir.system.forks import Lock

# Graphs, and remembered shapes, per model. The least recently used one is dropped first.
GRAPHS = 4
SHAPES = 64

Run = Callable[[Tensor], Tensor]


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for captures.

    It is always the same, as cuBLAS keeps 32 MiB or more for every stream that it has seen.
    """
    return torch.cuda.Stream(device)


def make_handles(device: torch.device) -> None:
    """Make what cuBLAS and cuDNN keep per thread. This thread may have none yet, and a capture cannot make it."""
    torch.cuda.current_blas_handle()
    one = torch.zeros(1, 1, 1, 1, device=device)
    nn.functional.conv2d(one, one)


class _Graph:
    """One captured pass. Its input lies outside the pool, which its model's other graphs share."""

    def __init__(self, run: Run, x: Tensor, pool: Any):
        # Ordinary tensors, also in inference mode, since they may later be written in any mode.
        with torch.inference_mode(False), torch.no_grad():
            self.input = torch.empty_like(x, memory_format=torch.contiguous_format)
            make_handles(x.device)
            torch.cuda.synchronize()
            with torch.cuda.stream(side_stream(x.device)):
                self.graph, self.output = capture(lambda: run(self.input), pool)
        self.pool = self.graph.pool()


class Graphs:
    """The graphs of one model. Calls from several threads and streams take turns, also on the device."""

    def __init__(self):
        self.lock = Lock()
        self.graphs: OrderedDict[Hashable, _Graph | None] = OrderedDict()  # None: seen once, or cannot be captured
        self.uncapturable: set[Hashable] = set()
        self.weights: list[Any] = []
        self.done: torch.cuda.Event | None = None

    def __call__(self, run: Run, x: Tensor, *, key: Hashable, weights: list[Any]) -> Tensor:
        """run(x). `key` holds what run depends on besides x's shape and dtype; `weights` where what it reads lies."""
        key = self._key(x, key)
        with self.lock, torch.cuda.device_of(x):
            if weights != self.weights:
                self.clear()
            self.weights = weights
            if key not in self.graphs:
                self.graphs[key] = None
                if len(self.graphs) > SHAPES:
                    self._drop(next(iter(self.graphs)))
                return run(x)  # inside the lock, so that no other thread captures what is being compiled here
            graph = self._find(run, x, key)
            if graph is not None:
                return self._replay(graph, x)
        return run(x)

    def again(self, x: Tensor, *, key: Hashable, weights: list[Any]) -> Tensor | None:
        """What a graph that is there makes of x. None if there is none, or if `weights` is not the last call's list."""
        key = self._key(x, key)
        with self.lock, torch.cuda.device_of(x):
            if weights is not self.weights or (graph := self.graphs.get(key)) is None:
                return None
            self.graphs.move_to_end(key)
            return self._replay(graph, x)

    @staticmethod
    def _key(x: Tensor, key: Hashable) -> Hashable:
        precisions = (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)  # pyright: ignore[reportAttributeAccessIssue]
        return x.shape, x.dtype, x.device, precisions, key

    def clear(self) -> None:
        """Drop all graphs. The lock is held."""
        if self.done is not None:
            self.done.synchronize()  # a graph's memory may only be released after it has run
            self.done = None  # it belongs to one device, and the weights may have moved to another
        self.graphs.clear()
        self.uncapturable.clear()

    def _find(self, run: Run, x: Tensor, key: Hashable) -> _Graph | None:
        """The graph of a shape that was seen before. Captures it if there is none yet."""
        self.graphs.move_to_end(key)
        if self.graphs[key] is None and key not in self.uncapturable:
            captured = [k for k, graph in self.graphs.items() if graph is not None]
            if len(captured) >= GRAPHS:
                self._drop(captured[0])
            # The pool of an existing graph, since PyTorch refuses the handle of a pool that was released.
            pool = next((graph.pool for graph in self.graphs.values() if graph is not None), None)
            try:
                self.graphs[key] = _Graph(run, x, pool)
            except RuntimeError as error:  # for example too little memory, or an operation that cannot be captured
                self.uncapturable.add(key)
                reason = str(error).splitlines()[0]
                warnings.warn(f"serpent_ir: no CUDA graph of this pass, calls are slower ({reason})", stacklevel=2)
        return self.graphs[key]

    def _drop(self, key: Hashable) -> None:
        if self.done is not None:
            self.done.synchronize()
        del self.graphs[key]
        self.uncapturable.discard(key)

    def _replay(self, graph: _Graph, x: Tensor) -> Tensor:
        stream = torch.cuda.current_stream()
        if self.done is None:
            self.done = torch.cuda.Event()
        stream.wait_event(self.done)  # wait for the previous replay, on whatever stream, since graphs share memory
        graph.input.record_stream(stream)
        graph.input.copy_(x)
        graph.graph.replay()
        output = graph.output.clone()
        self.done.record(stream)
        return output


class _Clears(Protocol):
    lock: Lock

    def clear(self) -> None: ...


Kept = TypeVar("Kept", bound=_Clears)


class Beside(Generic[Kept]):
    """The graphs of each model, made when they are first asked for.

    They are kept beside it, so that it is copied, pickled and saved without them.
    """

    def __init__(self, make: Callable[[], Kept]):
        self._make, self._making = make, Lock()
        self._of: weakref.WeakKeyDictionary[nn.Module, Kept] = weakref.WeakKeyDictionary()

    def __call__(self, model: nn.Module) -> Kept:
        kept = self._of.get(model)
        if kept is None:
            with self._making:
                kept = self._of.setdefault(model, self._make())
        return kept

    def release(self, model: nn.Module) -> None:
        """Give back the memory of a model's graphs."""
        if kept := self._of.get(model):
            with kept.lock:
                kept.clear()


of = Beside(Graphs)
release = of.release
