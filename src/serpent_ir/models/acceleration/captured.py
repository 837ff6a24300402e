"""A training pass in CUDA graphs: the forward pass of a whole network in one, its backward pass in another.

They are captured from a twin of the network, whose parameters are other tensors on the same memory. So nothing that
hangs on the network's own parameters takes part: hooks, gradients, and the streams on which autograd first saw them.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from serpent_ir.models.acceleration.graphs import make_handles, side_stream
from serpent_ir.system.capture import capture
from serpent_ir.system.memory import available

Definition = Callable[[Any, Tensor], Tensor]
MOST_GAPS = 4
"""A tensor that is a part of a larger one is copied with what lies between, up to this many times its own size."""


class Cuda:
    """What a captured pass asks of the device. Tests on a CPU put another in its place (`captured.machine`)."""

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def on(self, device: torch.device) -> AbstractContextManager[Any]:
        return torch.cuda.device(device)

    @contextmanager
    def aside(self, device: torch.device):
        """A stream for captures. Nothing else is at work on the device when it is entered."""
        make_handles(device)
        self.settle(device)
        with torch.cuda.stream(side_stream(device)):
            yield

    def settle(self, device: torch.device) -> None:
        """Wait for the device, and give memory back that nobody uses: a graph cannot use what is cached."""
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()

    def capture(self, run: Callable[[], Any], pool: Any) -> tuple[Any, Any]:
        return capture(run, pool)

    def allocated(self, device: torch.device) -> int:
        # `memory_allocated` sorts all that is told beside it.
        return torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["current"]

    def available(self, device: torch.device) -> int:
        return available(device)

    def turns(self) -> "Turns":
        return Turns()


class Turns:
    """A context for replays that share memory: the device does them one after the other, from whatever streams."""

    def __init__(self):
        self.done: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        if self.done is None:
            self.done = torch.cuda.Event()
        torch.cuda.current_stream().wait_event(self.done)

    def __exit__(self, *_: object) -> None:
        assert self.done is not None
        self.done.record()

    def finish(self) -> None:
        """Wait for the last one, since the memory of a graph may only be released after it has run."""
        if self.done is not None:
            self.done.synchronize()


machine = Cuda()


class Mode(NamedTuple):
    """What a backward pass depends on besides its forward pass."""

    shape: torch.Size  # this and the next two are those of the gradient that it is given
    stride: tuple[int, ...]
    dtype: torch.dtype
    autocast: bool
    settings: tuple[Any, ...]

    @classmethod
    def of(cls, grad: Tensor) -> "Mode":
        cast = torch.is_autocast_enabled(grad.device.type)
        return cls(grad.shape, grad.stride(), grad.dtype, cast, settings())


def settings() -> tuple[Any, ...]:
    """Those of PyTorch that decide which kernels run, and with what precision."""
    backends: Any = torch.backends
    return (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.enabled,
        backends.cudnn.deterministic,
        backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
    )


def span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """How many elements lie from the first one of a tensor to its last one."""
    return 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))


def is_loose(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether too much lies between the elements of a tensor to be copied with them."""
    return span(shape, stride) > MOST_GAPS * math.prod(shape)


class Slot:
    """Where a graph reads a tensor. It has that tensor's strides, so that the same kernels run as without a graph."""

    def __init__(self, shape: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.flat = torch.zeros(span(shape, stride), dtype=dtype, device=device)
        self.tensor = self.flat.as_strided(shape, stride)

    def fill(self, x: Tensor) -> None:
        self.flat.copy_(x.detach().as_strided(self.flat.shape, (1,)))


def twin(module: nn.Module, parameters: dict[int, Tensor]) -> Any:
    """A module of the same classes and settings, with other parameters (by the id of each) and the same buffers."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_parameters"] = {k: p if p is None else parameters[id(p)] for k, p in module._parameters.items()}
    made.__dict__["_modules"] = {k: m if m is None else twin(m, parameters) for k, m in module._modules.items()}
    return made


def aliases(parameters: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    """Other parameters on the same memory."""
    return [nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in parameters]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Copies in few launches."""
    clone = getattr(torch, "_foreach_clone", None)  # not in PyTorch 2.9
    return list(clone(tensors) if clone else torch._foreach_mul(tensors, 1))  # pyright: ignore[reportPrivateImportUsage]


class Captured:
    """A network's forward and backward pass for inputs of one kind, from CUDA graphs.

    `forward` and `backward` are called by turns, both within the same `Turns`. What they return is nobody else's
    memory. Gradients are those of the input, if it requires one, and then of the parameters at `trained`.

    Args:
        definition: what to capture, as a function of the network and its input.
        model, parameters: the network and all that it has.
        x: an input. The current autocast counts as it would in a call.
        mode: what the backward pass was given when it ran without a graph.
        pool: the memory of other graphs that never run between this one's forward and backward pass, or None.
    """

    def __init__(
        self,
        definition: Definition,
        model: nn.Module,
        parameters: list[nn.Parameter],
        x: Tensor,
        mode: Mode,
        pool: Any,
    ):
        self.mode = mode
        kind = x.device.type
        dtype, autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def cast(*, enabled: bool) -> torch.autocast:
            # What a cache holds was cast before the capture, and would be out of date in a replay.
            return torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)

        # Graphs hold addresses alone, so that moved weights would leave them dangling before the next backward pass.
        self.weights = [p.detach() for p in parameters]
        needs = [x.requires_grad, *(p.requires_grad for p in parameters)]

        def passes() -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor | None, ...]]]:
            others, image = aliases(parameters), self.input.tensor.detach().requires_grad_(x.requires_grad)
            network = twin(model, {id(p): other for p, other in zip(parameters, others, strict=True)})
            wanted = [t for t, needed in zip([image, *others], needs, strict=True) if needed]
            tape: list[Tensor] = []

            def forward() -> Tensor:
                with cast(enabled=autocast):
                    tape[:] = [definition(network, image)]
                return tape[0].detach()

            def backward() -> tuple[Tensor | None, ...]:
                with cast(enabled=mode.autocast):
                    return torch.autograd.grad(tape.pop(), wanted, self.grad.tensor, allow_unused=True)

            return forward, backward

        with torch.inference_mode(False), torch.enable_grad(), machine.aside(x.device):
            self.input = Slot(x.shape, x.stride(), x.dtype, x.device)
            self.grad = Slot(mode.shape, mode.stride, mode.dtype, x.device)
            self.input.fill(x)
            forward, backward = passes()
            forward()  # on this stream, where the libraries' workspaces are made
            backward()
            machine.settle(x.device)
            forward, backward = passes()
            self.ahead, self.output = machine.capture(forward, pool)
            self.pool = self.ahead.pool()
            self.back, found = machine.capture(backward, self.pool)
        made: list[Tensor | None] = [None] * len(needs)
        for index, grad in zip((i for i, needed in enumerate(needs) if needed), found, strict=True):
            made[index] = grad
        self.gradients = [grad for grad in made if grad is not None]
        self.trained = [i for i, grad in enumerate(made[1:]) if grad is not None]
        self.of_input = made[0] is not None

    def forward(self, x: Tensor) -> Tensor:
        self.input.fill(x)
        self.ahead.replay()
        return torch.empty_strided(
            self.output.shape, self.output.stride(), dtype=self.output.dtype, device=self.output.device
        ).copy_(self.output)

    def backward(self, grad: Tensor) -> list[Tensor]:
        self.grad.fill(grad)
        self.back.replay()
        return copies(self.gradients)
