"""A step of training: forward, backward, clipping and Adam; captured in a CUDA graph where that is possible."""

import gc
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from serpent_ir.training.losses import Loss
from serpent_ir.training.workers import Workers


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A CUDA stream to build and run a Trainer on; nothing on other devices.

    Graphs cannot be captured on the default stream, and autograd remembers the stream on which it met a parameter.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


Result = TypeVar("Result", Tensor, None)


class Tally:
    """Losses, and steps that were skipped, counted on the device: reading them makes the host wait for it."""

    def __init__(self, device: torch.device):
        # Sum and number of finite losses, skipped steps, those in a row until now, and most in a row.
        self.counts = torch.zeros(5, device=device)

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """Count a step; `bad` is 1 where it is skipped, else 0."""
        counts = self.counts
        counts[0] += torch.where(bad > 0, torch.zeros_like(loss), loss)
        counts[1] += 1 - bad
        counts[2] += bad
        counts[3] = (counts[3] + 1) * bad
        counts[4] = torch.maximum(counts[4], counts[3])

    def take(self) -> tuple[float, int]:
        """Mean finite loss (NaN where there was none) and number of skipped steps since the last time."""
        total, good, skipped, _, _ = self.counts.tolist()
        self.counts[:3] = 0
        return total / good if good else float("nan"), int(skipped)

    def in_a_row(self) -> int:
        """Most steps in a row that were skipped, ever."""
        return int(self.counts[4])


class Step:
    """Trains a network on a batch (degraded, clean) and returns nothing: the loss goes to `tally`.

    A step whose loss or gradient is not finite changes neither weights nor the optimiser's state. On CUDA and CPUs
    that is decided where the numbers are, by the switch that fused Adam has for loss scaling: the host need not wait.
    """

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        workers: Workers,
        *,
        clip: float,
        dtype: torch.dtype,
        parts: int,
    ):
        self.network, self.optimizer, self.loss, self.workers = network, optimizer, loss, workers
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.clip, self.dtype, self.parts = clip, dtype, parts
        self.tally = Tally(workers.device)
        self.good = torch.ones(
            (), device=workers.device
        )  # 0 where the last step was skipped; a graph writes to it, too

    def __call__(self, degraded: Tensor, clean: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        pairs = list(zip(degraded.chunk(self.parts), clean.chunk(self.parts), strict=True))
        for number, (given, target) in enumerate(pairs, 1):
            # Gradients of several processes are averaged once a step, with the last part.
            with nullcontext() if number == len(pairs) else self.workers.no_sync(self.network):
                device = self.workers.device.type
                with torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32):
                    restored = self.network(given)
                loss = self.loss(restored, target) / len(pairs)
                loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        loss = self.workers.mean(torch.stack(losses).sum())
        bad = 1 - (loss.isfinite() & norm.isfinite()).float()
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.tally.add(loss, bad)
        self.good.copy_(1 - bad)


class GraphedStep(Generic[Result]):
    """Calls `step(*tensors)` from a CUDA graph, captured anew whenever the shapes change.

    The first calls at a shape run as they are: they make the kernels and the optimiser's state that the graph goes on
    with. All calls must come on one stream that is not the default one. `step` may return a tensor; the caller gets a
    copy. A step that cannot be captured is called as it is, with a warning.
    """

    WARMUP = 3

    def __init__(self, step: Callable[..., Result]):
        self.step = step
        self.shapes: list[torch.Size] = []
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Any = None
        self.plain = False  # it was found that the step cannot be captured

    def __call__(self, *tensors: Tensor) -> Result:
        shapes = [x.shape for x in tensors]
        if shapes != self.shapes:
            torch.cuda.synchronize()  # before the memory of the old graph goes
            self.shapes, self.calls, self.graph, self.inputs, self.output = shapes, 0, None, [], None
        self.calls += 1
        if self.calls <= self.WARMUP or self.plain:
            return self.step(*tensors)
        if self.graph is None:
            try:
                self._capture(tensors)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(f"serpent_ir: the step runs without a CUDA graph, slower: {reason}", stacklevel=2)
                self.plain, self.graph, self.inputs, self.output = True, None, [], None
                with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.current_stream()):
                    torch.zeros(1, device="cuda")  # puts right what the failed capture left
                return self.step(*tensors)
        assert self.graph is not None
        for kept, x in zip(self.inputs, tensors, strict=True):
            kept.copy_(x)
        self.graph.replay()
        result: Any = None if self.output is None else self.output.clone()
        return result

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in tensors]
        self.graph = torch.cuda.CUDAGraph()
        gc.collect()  # a forgotten autograd graph would still hold nodes of its own
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.output = self.step(*self.inputs)
