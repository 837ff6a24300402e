"""Training passes replayed on the device at hand: from CUDA graphs on a GPU, on a CPU by a stand-in for graphs."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from serpent_ir.models import Serpent, create_model
from serpent_ir.models.acceleration import WAYS, captured, only
from serpent_ir.models.acceleration.captured import Captured
from serpent_ir.models.acceleration.replayed import training

WHERE = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: real graphs"),
        ],
    ),
]


class Graph:
    """Runs again what was captured, and writes the results over the first ones, as the replay of a graph does."""

    def __init__(self, run: Callable[[], Any], pool: Any):
        self.run, self.result, self.memory = run, run(), pool or object()

    def replay(self) -> None:
        with torch.enable_grad():
            made = self.run()
        if isinstance(made, Tensor):
            self.result.copy_(made)
            return
        for kept, new in zip(self.result, made, strict=True):
            if kept is not None:
                kept.copy_(new)

    def pool(self) -> Any:
        return self.memory


class Turns:
    def __init__(self):
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        assert self.lock.acquire(blocking=False), "two replays at once"

    def __exit__(self, *_: object) -> None:
        self.lock.release()

    def finish(self) -> None:
        assert not self.lock.locked()


class StandIn(captured.Cuda):
    """A device without graphs. `broken` says why no capture succeeds; `free` is the memory that is left."""

    def __init__(self):
        self.broken, self.free, self.held, self.captures = "", 1 << 40, 0, 0

    def capturing(self) -> bool:
        return False

    def on(self, device: torch.device) -> Any:
        return nullcontext()

    aside = on

    def settle(self, device: torch.device) -> None:
        pass

    def capture(self, run: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        if self.broken:
            raise RuntimeError(self.broken)
        self.captures += 1
        graph = Graph(run, pool)
        return graph, graph.result

    def allocated(self, device: torch.device) -> int:
        self.held += 1000
        return self.held

    def available(self, device: torch.device) -> int:
        return self.free

    def turns(self) -> Any:
        return Turns()


@contextmanager
def replaying(where: str, patch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A context in which training is replayed there. Yields what stands in for the device, or the device."""
    machine: Any = StandIn() if where == "cpu" else captured.machine
    with patch.context() as p:
        p.setattr(captured, "machine", machine)
        if where == "cuda":
            p.setattr(torch.backends.cudnn, "deterministic", True)
            yield machine
            return
        ways = {kind: tuple(replace(way, device="cpu") if way == training else way for way in ways)
                for kind, ways in WAYS.items()}  # fmt: skip
        with only(ways):
            yield machine


class Counter:
    """How many forward and backward passes were replayed."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.forward = self.backward = 0
        ahead, back = Captured.forward, Captured.backward

        def forward(graph: Captured, x: Tensor) -> Tensor:
            self.forward += 1
            return ahead(graph, x)

        def backward(graph: Captured, grad: Tensor) -> list[Tensor]:
            self.backward += 1
            return back(graph, grad)

        patch.setattr(Captured, "forward", forward)
        patch.setattr(Captured, "backward", backward)


def network(name: str, where: str, seed: int = 0) -> nn.Module:
    """A small network with weights of its own."""
    sizes: dict[str, dict[str, Any]] = {
        "serpent_b": {"dim": 8, "blocks": (1, 1)},
        "unet_32": {"channels": 4, "pools": 2},
        "swinir_60": {"dim": 12, "blocks": (2,), "heads": 2, "window_size": 4},
        "restormer_48": {"dim": 4, "blocks": (1, 1, 1, 1), "refinement": 1, "heads": (1, 1, 1, 1)},
    }
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_model(name, **sizes[name])
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    assert not isinstance(model, Serpent) or model.config.dim == 8
    return model.to(where).train()


def images(where: str, count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(shape or (2, 3, 16, 16), generator=generator).to(where) for _ in range(count)]


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.fixture
def replayed(where: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with replaying(where, monkeypatch) as machine:
        yield machine
    gc.collect()
