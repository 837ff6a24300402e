"""Training in a plain loop, replayed from CUDA graphs: when passes are captured, and who may use what was captured.

Two steps at a shape run as they are. The third forward pass captures itself and its backward pass. The maps between
the two lie in the memory of the graphs, once for a model. So between a replayed forward pass and its backward pass
another forward pass runs uncaptured. A backward pass whose maps are gone makes them again first.
"""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from serpent_ir.errors import is_out_of_memory
from serpent_ir.models.acceleration import as_built, captured
from serpent_ir.models.acceleration.captured import Captured, Definition, Mode, aliases, is_loose, settings, twin
from serpent_ir.models.acceleration.graphs import Beside
from serpent_ir.models.serpent import Serpent
from serpent_ir.system.forks import Lock

# Graphs, and remembered kinds of input, per model. The least recently used one is dropped first.
GRAPHS = 4
KINDS = 64
SEEN = 2
"""Steps that run as they are before a capture. They become twice as many each time that a graph turned out useless."""
MOST_SEEN = 1 << 10
PATIENCE = 16
"""Forward passes that run uncaptured for the sake of one that still waits for its backward pass."""


@dataclass
class _Kind:
    """What is known of the passes of one kind of input."""

    seen: int = 0
    mode: Mode | None = None
    kept: int = 0  # bytes that the forward pass keeps for the backward pass
    graph: Captured | None = None
    reason: str = ""  # why there will be no graph

    def notice(self, mode: Mode) -> None:
        self.seen = self.seen + 1 if mode == self.mode else 1
        self.mode = mode


class Replays:
    """The training graphs of one model. Calls from several threads and streams take turns, also on the device."""

    def __init__(self):
        self.lock = Lock()
        self.needed = SEEN
        self.turns = captured.machine.turns()
        self.clear()

    def clear(self) -> None:
        """Forget all. Graphs whose backward pass is still to come live until then. The lock is held."""
        self.turns.finish()
        self.kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self.places: list[Any] = []
        self.turns = captured.machine.turns()
        self.waits: weakref.ref[Lease] | None = None  # the forward pass whose maps lie in the graphs' memory
        self.passed = 0  # forward passes that ran uncaptured for its sake

    def __call__(self, definition: Definition, model: nn.Module, x: Tensor) -> Tensor:
        parameters, places = as_built.parameters(model), as_built.places(model)
        key = key_of(parameters, x)
        with captured.machine.on(x.device):
            with self.lock:
                kind = self._kind(key, places)
                pool = self._begin(kind)
            if pool:
                kind.reason = self._capture(kind, definition, model, parameters, x, pool[0])
            with self.lock:
                if (graph := kind.graph) and self._is_free() and places == self.places:
                    lease = Lease(self, kind, graph, definition, model, x)
                    return _Replayed.apply(lease, x, *parameters)  # pyright: ignore[reportReturnType]
        return _watched(kind, definition, model, x)

    def wait_for(self, lease: "Lease") -> None:
        """From now on the maps of this forward pass lie in the graphs' memory. The lock is held."""
        self.waits, self.passed = weakref.ref(lease), 0

    def refuses(self, model: nn.Module, x: Tensor) -> str:
        """Why passes of this kind are not captured; "" if they are, or may be."""
        if not any(kind.reason for kind in self.kinds.values()):
            return ""
        kind = self.kinds.get(key_of(as_built.parameters(model), x))
        return kind.reason if kind else ""

    def _kind(self, key: Hashable, places: list[Any]) -> _Kind:
        if places != self.places:
            useless = any(kind.graph for kind in self.kinds.values())
            self.clear()
            self.places = places
            self.needed = min(2 * self.needed, MOST_SEEN) if useless else self.needed
        kind = self.kinds.setdefault(key, _Kind())
        self.kinds.move_to_end(key)
        if len(self.kinds) > KINDS:
            self.kinds.popitem(last=False)
        return kind

    def unfit(self, kind: _Kind, graph: Captured, mode: Mode) -> None:
        """Note that a graph was asked for a backward pass of another mode than its own. The lock is held."""
        if kind.graph is graph:
            kind.graph, kind.seen = None, 0
            self.needed = min(2 * self.needed, MOST_SEEN)
        kind.notice(mode)

    def _is_free(self) -> bool:
        """Whether a forward pass may use the graphs' memory. The lock is held."""
        if self.waits is None or self.waits() is None or self.passed >= PATIENCE:
            return True
        self.passed += 1
        return False

    def _begin(self, kind: _Kind) -> tuple[Any] | None:
        """Begin a capture if it is time: returns the pool for it, or None in its place. The lock is held."""
        if kind.graph or kind.reason or kind.mode is None or kind.seen < self.needed:
            return None
        if self.waits is not None and self.waits() is not None:
            return None
        kind.reason = "it is being captured"  # so that no other thread begins
        have = [other for other in self.kinds.values() if other.graph is not None]
        if len(have) >= GRAPHS:
            self.turns.finish()
            have[0].graph, have[0].seen = None, 0
            self.needed = min(2 * self.needed, MOST_SEEN)
        return (next((other.graph.pool for other in have if other.graph is not None), None),)

    def _capture(
        self,
        kind: _Kind,
        definition: Definition,
        model: nn.Module,
        parameters: list[nn.Parameter],
        x: Tensor,
        pool: Any,
    ) -> str:
        """Make the graph of a kind. Returns the reason if there can be none.

        The lock is not held: on a GPU backward passes run in one thread, which might wait for it.
        """
        mode = kind.mode
        assert mode is not None
        if is_loose(mode.shape, mode.stride):
            return "the gradient of its output is a small part of a large tensor"
        captured.machine.settle(x.device)
        if 2 * kind.kept > captured.machine.available(x.device):
            return f"its graph would hold {kind.kept / 1e9:.1f} GB, more than half of what is free"
        try:
            kind.graph = Captured(definition, model, parameters, x, mode, pool)
            return ""
        except Exception as error:  # those of Triton are no RuntimeErrors
            short = is_out_of_memory(error)
            reason = "too little memory is free" if short else (str(error).strip() or type(error).__name__)
        except BaseException:
            kind.reason = ""
            raise
        reason = f"it cannot be captured ({reason.splitlines()[0]})"
        captured.machine.settle(x.device)
        warnings.warn(f"serpent_ir: no CUDA graph of this training pass, steps are slower: {reason}", stacklevel=2)
        return reason


def key_of(parameters: list[nn.Parameter], x: Tensor) -> Hashable:
    """What a forward pass depends on besides numbers."""
    cast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
    needs = tuple([p.requires_grad for p in parameters])
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, cast, settings(), needs


def _watched(kind: _Kind, definition: Definition, model: nn.Module, x: Tensor) -> Tensor:
    """An uncaptured pass. Its backward pass, when it comes, is what counts as a step seen."""
    if kind.reason or kind.graph is not None:
        return definition(model, x)
    before = captured.machine.allocated(x.device)
    output = definition(model, x)
    kind.kept = captured.machine.allocated(x.device) - before
    counted = False

    def look(grads: tuple[Tensor | None, ...]) -> None:
        nonlocal counted
        grad = grads[0]
        if grad is None or counted or not _is_plain(grad):
            return
        counted = True
        kind.notice(Mode.of(grad))

    if output.grad_fn is not None:
        output.grad_fn.register_prehook(look)
    return output


def _is_plain(grad: Tensor) -> bool:
    """Whether a backward pass is of the usual sort: its gradients are numbers of one pass, which nobody derives."""
    return not torch.is_grad_enabled() and type(grad) is Tensor and not as_built.is_batched(grad)


class Lease:
    """A replayed forward pass, from the call to its last backward pass."""

    def __init__(
        self, replays: Replays, kind: _Kind, graph: Captured, definition: Definition, model: nn.Module, x: Tensor
    ):
        self.replays, self.kind, self.graph, self.turns = replays, kind, graph, replays.turns
        self.definition, self.model = definition, model
        self.x, self.version = x, x._version
        device = x.device.type
        self.cast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def forward(self, x: Tensor) -> Tensor:
        """Replay, while the lock is held."""
        self.replays.wait_for(self)  # first, since an interruption may come at any point
        with self.turns:
            return self.graph.forward(x)

    def backward(self, grad: Tensor, parameters: tuple[nn.Parameter, ...]) -> list[Tensor | None]:
        """The gradients of the input and of the parameters."""
        if not _is_plain(grad):
            if isinstance(self.model, Serpent):
                as_built.refuse_derivatives(grad)
            return self._defined(grad, parameters)
        if (mode := Mode.of(grad)) != self.graph.mode:
            with self.replays.lock:
                self.replays.unfit(self.kind, self.graph, mode)
            return self._defined(grad, parameters)
        with self.replays.lock, captured.machine.on(grad.device), self.turns:
            intact = self.replays.waits is not None and self.replays.waits() is self
            self.replays.waits = None
            if not intact:  # another pass took the memory
                self.graph.forward(self._input())
            found = iter(self.graph.backward(grad))
        self._done()
        result: list[Tensor | None] = [None] * (1 + len(parameters))
        if self.graph.of_input:
            result[0] = next(found)
        for index in self.graph.trained:
            result[1 + index] = next(found)
        return result

    def _input(self) -> Tensor:
        if self.x._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                "network's input. Clone it before, or call backward before the change"
            )
        return self.x

    def _done(self) -> None:
        if not torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            self.x = self.x.detach().new_empty(0)  # others may keep this tape

    def _defined(self, grad: Tensor, parameters: tuple[nn.Parameter, ...]) -> list[Tensor | None]:
        """The same by the definition, from the start: graphs give no second derivatives, and take one kind of grad."""
        derived, x = torch.is_grad_enabled(), self._input()
        now = as_built.listed(self.model)
        if len(now) != len(parameters):
            raise RuntimeError("the network was given other layers between its forward and its backward pass")
        if derived:
            image, others = x.view_as(x), [p.view_as(p) for p in parameters]
        else:
            image, others = x.detach().requires_grad_(x.requires_grad), aliases(parameters)
        with torch.enable_grad(), torch.autocast(*self.cast):
            network = twin(self.model, {id(p): other for p, other in zip(now, others, strict=True)})
            output = self.definition(network, image)
            needs = [t.requires_grad for t in (x, *parameters)]
            wanted = [t for t, needed in zip((image, *others), needs, strict=True) if needed]
        found = iter(torch.autograd.grad(output, wanted, grad, create_graph=derived, allow_unused=True))
        self._done()
        return [next(found) if needed else None for needed in needs]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lease: Lease, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.lease = lease
        ctx.save_for_backward(*parameters)  # so that PyTorch notices if one is changed before the backward pass
        return lease.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.lease.backward(grad, ctx.saved_tensors)


of = Beside(Replays)
release = of.release
