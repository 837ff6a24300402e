"""A step of training: forward, backward, clipping, Adam and the averaged weights.

Runs from a CUDA graph if possible.
"""

import gc
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from serpent_ir.models.acceleration import uncaptured
from serpent_ir.system.capture import capture
from serpent_ir.training.losses import Loss
from serpent_ir.training.workers import Workers


def own_stream(device: torch.device) -> AbstractContextManager[object]:
    """A CUDA stream to build and run a Trainer on; nothing on other devices.

    Graphs cannot be captured on the default stream, and autograd remembers the stream on which it first saw a
    parameter.
    """
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


Result = TypeVar("Result", Tensor, None)


class Tally:
    """Losses, and skipped steps, counted on the device, because reading them makes the host wait."""

    def __init__(self, device: torch.device):
        # Sum of finite losses, their number, skipped steps, those in a row until now, and the most in a row.
        self.counts = torch.zeros(5, device=device)

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """Count a step. `bad` is 1 if it is skipped, else 0."""
        counts = self.counts
        counts[0] += torch.where(bad > 0, torch.zeros_like(loss), loss)
        counts[1] += 1 - bad
        counts[2] += bad
        counts[3] = (counts[3] + 1) * bad
        counts[4] = torch.maximum(counts[4], counts[3])

    def take(self) -> tuple[float, int]:
        """Mean finite loss (NaN if there was none) and number of skipped steps since the last call."""
        total, good, skipped, _, _ = self.counts.tolist()
        self.counts[:3] = 0
        return total / good if good else float("nan"), int(skipped)

    def in_a_row(self) -> int:
        """The most steps in a row that were ever skipped."""
        return int(self.counts[4])


class Step:
    """Trains a network on a batch (degraded, clean). It returns nothing: the loss goes to `tally`.

    `average`, weights that follow the network's, moves the share `follow`, which the caller sets, of the way to them. A
    step whose loss or gradient is not finite changes neither weights nor average nor the optimiser's state. On CUDA and
    CPUs that is decided on the device, for Adam by the switch that its fused form has for loss scaling, and for the
    average by a factor, so that the host need not wait.

    Several processes that train together use its two halves instead: each calls `gradients` for its share of the batch,
    and passes the mean over all processes to `go`.
    """

    def __init__(
        self,
        network: nn.Module,
        average: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        device: torch.device,
        *,
        clip: float,
        dtype: torch.dtype,
        parts: int,
    ):
        self.network, self.optimizer, self.loss, self.device = network, optimizer, loss, device
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.clip, self.dtype, self.parts = clip, dtype, parts
        self.tally = Tally(device)
        # A tensor, since a number would be frozen into a graph.
        self.follow = torch.zeros((), device=device)
        # `.data`, since otherwise autograd would keep a graph of all steps.
        self.averages, self.weights = ([p.data for p in each.parameters()] for each in (average, network))

    def __call__(self, degraded: Tensor, clean: Tensor) -> None:
        self._go(self.backward(degraded, clean))

    def gradients(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """The gradients of all weights, concatenated, then the loss: one float32 vector."""
        loss = self.backward(degraded, clean)
        # A weight on which no output depends has no gradient.
        made = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([*(gradient.flatten() for gradient in made), loss[None]])

    def go(self, numbers: Tensor) -> None:
        """Finish the step with what `gradients` returned."""
        *parts, loss = numbers.split([*(p.numel() for p in self.parameters), 1])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        self._go(loss[0])

    def _go(self, loss: Tensor) -> None:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.clip)
        bad = 1 - (loss.isfinite() & norm.isfinite()).float()
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = bad  # pyright: ignore[reportAttributeAccessIssue]
            self.optimizer.step()
        elif not bad:
            self.optimizer.step()
        self.tally.add(loss, bad)
        change = torch._foreach_sub(self.weights, self.averages)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(change, self.follow * (1 - bad))  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(self.averages, change)  # pyright: ignore[reportPrivateImportUsage]

    def backward(self, degraded: Tensor, clean: Tensor) -> Tensor:
        """Compute gradients, and return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        pairs = list(zip(degraded.chunk(self.parts), clean.chunk(self.parts), strict=True))
        for given, target in pairs:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                restored = self.network(given)
            loss = self.loss(restored, target) / len(pairs)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()


class GraphedStep(Generic[Result]):
    """Calls `step(*tensors)` from a CUDA graph, which is captured anew whenever the shapes change.

    The first calls at a shape run uncaptured: they create the kernels and the optimiser's state that the graph uses.
    All calls must come on one stream that is not the default one. `step` may return a tensor, of which the caller gets
    a copy. A step that cannot be captured is called uncaptured, with a warning. At other shapes capture is tried again.

    Args:
        step: what to call.
        workers: the processes that train together; before a capture this process catches up with them. `step` must
            contain none of their collectives.
    """

    WARMUP = 3

    def __init__(self, step: Callable[..., Result], workers: Workers | None = None):
        self.step = step
        self.workers = workers
        self.shapes: list[torch.Size] = []
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Any = None
        self.plain = False  # true if the step turned out not to be capturable at these shapes

    def __call__(self, *tensors: Tensor) -> Result:
        shapes = [x.shape for x in tensors]
        if shapes != self.shapes:
            self._synchronize()  # before the memory of the old graph is released
            self.release()
            self.shapes, self.calls, self.plain = shapes, 0, False
        self.calls += 1
        if self.calls > self.WARMUP and self.graph is None and not self.plain:
            self._try_capture(tensors)
        if self.graph is None:
            # Graphs of the network alone would take memory beside that of the step. Without one they are the next best.
            with nullcontext() if self.plain else uncaptured():
                return self.step(*tensors)
        for kept, x in zip(self.inputs, tensors, strict=True):
            kept.copy_(x)
        self.graph.replay()
        result: Any = None if self.output is None else self.output.clone()
        return result

    def release(self) -> None:
        """Drop the graph."""
        self.graph, self.inputs, self.output = None, [], None

    def _synchronize(self) -> None:
        if self.workers:
            self.workers.catch_up()
        torch.cuda.synchronize()

    def _try_capture(self, tensors: tuple[Tensor, ...]) -> None:
        """Make the graph, or find out that there can be none."""
        self._synchronize()
        try:
            self._capture(tensors)
        except torch.OutOfMemoryError:
            self.release()  # what was captured is half a step
            raise
        except RuntimeError as error:
            self.release()
            self.plain = True
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            warnings.warn(f"serpent_ir: the step runs without a CUDA graph, slower: {reason}", stacklevel=3)

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        self.inputs = [x.clone() for x in tensors]
        gc.collect()  # a forgotten autograd graph would still hold its nodes
        torch.cuda.empty_cache()  # the graph cannot use cached memory
        self.graph, self.output = capture(lambda: self.step(*self.inputs))
