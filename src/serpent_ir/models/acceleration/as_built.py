"""Whether kernels may replace a module: the right kind of tensor, and a module that is as its class made it.

Hooks, replaced or wrapped layers, parametrised weights, other settings of a layer, tracing and counting all get the
plain definition. A module is compared with what the constructor of its class makes. The check of a network is repeated
at every call, so its lists are kept and compared. They hold no reference to the network.
"""

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from itertools import chain, repeat
from operator import attrgetter, contains, is_
from typing import Any, NamedTuple

import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def looked_on(x: Tensor) -> str:
    """Why none of our kernels may take this tensor here and now, as far as all have the same conditions; "" if they
    may.

    Tracing, counting and transforming look at PyTorch's operators, which kernels hide.
    """
    if torch.compiler.is_compiling():
        return "torch.compile or torch.export traces it"
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is a {type(x).__name__}, not a plain tensor"
    if x.numel() == 0:
        return "its input is empty"
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return "torch.jit.trace traces it"
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func is at work"
    return "" if _get_current_dispatch_mode() is None else "a dispatch mode, such as one that counts, looks on"


def product_dtype(module: nn.Module, x: Tensor) -> torch.dtype | None:
    """The dtype, after autocast, of the products of a checked module with x; None if the plain path must serve."""
    of_weights = dtypes(module)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype if of_weights == {x.dtype} else None
    fits = dtype in DTYPES and x.dtype in (dtype, torch.float32) and of_weights.issubset(DTYPES)
    return dtype if fits else None


def products_of(module: nn.Module, x: Tensor) -> str:
    """A description of the products of a checked module with x, for the case that no kernel computes such products."""
    cast = "with" if torch.is_autocast_enabled(x.device.type) else "without"
    weights = " and ".join(sorted(map(name_of, dtypes(module))))
    if {x.dtype} == dtypes(module):
        return f"it is {weights}, {cast} autocast"
    return f"its input is {name_of(x.dtype)} and its parameters are {weights}, {cast} autocast"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _Kind(NamedTuple):
    """What is known about a class of modules."""

    settings: Callable[[nn.Module], Any]  # the attributes that its `forward` reads, besides parameters and modules
    argument: Callable[[Any, Tensor], Hashable] | None  # the argument of its constructor, from a module and its input
    buffers: tuple[str, ...]  # the buffers that its `forward` reads


_LINEAR = nn.Linear.forward
_kinds: dict[type[nn.Module], _Kind] = {}
_functions: list[tuple[type[nn.Module], str, Any]] = [(nn.Conv2d, "_conv_forward", nn.Conv2d._conv_forward)]
"""The functions of the known classes when they became known, since a class can also be given another `forward`."""


def know(
    kind: type[nn.Module],
    *settings: str,
    argument: Callable[[Any, Tensor], Hashable] | None = None,
    buffers: tuple[str, ...] = (),
) -> None:
    """Make a class known as one that kernels may replace. Modules of other classes get the plain definition.

    Args:
        kind: the class. Subclasses do not count.
        settings: names of what its `forward` reads besides parameters and modules.
        argument: for a class whose modules are checked: reads the constructor's argument from a module and an input. It
            serves to make a second module, with which the first one is compared.
        buffers: names of the buffers that its `forward` reads.
    """
    _kinds[kind] = _Kind(attrgetter(*settings) if settings else _nothing, argument, buffers)
    _functions.append((kind, "forward", kind.forward))


def _nothing(module: nn.Module) -> None:
    return None


_CONVOLUTION = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
know(nn.Linear)
know(nn.Conv2d, *_CONVOLUTION)
know(nn.ConvTranspose2d, *_CONVOLUTION, "output_padding")
know(nn.InstanceNorm2d, "eps", "momentum", "track_running_stats")
know(nn.LeakyReLU, "negative_slope", "inplace")
know(nn.GELU, "approximate")
know(nn.PixelShuffle, "upscale_factor")
know(nn.Identity)
know(nn.Sequential)
know(nn.ModuleList)
know(Rearrange, "pattern", "axes_lengths")


class _Form(NamedTuple):
    """A module without its numbers. Two modules of the same form compute the same function of their numbers."""

    kind: type[nn.Module]
    settings: Any
    shapes: dict[str, torch.Size | None]
    children: dict[str, "_Form"]

    @classmethod
    def of(cls, module: nn.Module) -> "_Form":
        shapes = {name: None if p is None else p.shape for name, p in module._parameters.items()}
        children = {name: cls.of(child) for name, child in module._modules.items() if child is not None}
        return cls(type(module), _kinds[type(module)].settings(module), shapes, children)

    def difference(self, module: nn.Module | None, maker: str, path: str = "") -> str:
        """How a module at a path differs from the form that `maker` makes; "" if it does not.

        A module that occurs in several places is checked in each.
        """
        name = path or "it"
        if module is None:
            return f"{name} is missing"
        if type(module) is not self.kind:
            return f"{name} is a {type(module).__name__}, not the {self.kind.__name__} that {maker} makes"
        if _kinds[self.kind].settings(module) != self.settings:
            return f"{name} has other settings than {maker} makes"
        if {key: None if p is None else p.shape for key, p in module._parameters.items()} != self.shapes:
            return f"{name} has other parameters than {maker} makes"
        if list(module._modules) != list(self.children):  # the order matters where modules are called in turn
            return f"{name} has other layers than {maker} makes, or in another order"
        prefix = f"{path}." if path else ""
        below = ((form, module._modules[key], prefix + key) for key, form in self.children.items())
        return next(filter(None, (form.difference(child, maker, at) for form, child, at in below)), "")


@functools.lru_cache(64)
def _form(kind: type[nn.Module], argument: Hashable) -> _Form | None:
    """The form of what the constructor of a class makes from an argument; None if it makes nothing."""
    try:
        with torch.device("meta"):
            return _Form.of(kind(argument))
    except Exception:  # the configuration is another network's, which may hold anything
        return None


class _Parts:
    """The parts of a module, in flat lists that are quick to compare, since a call of a small network takes 0.6 ms."""

    def __init__(self, root: nn.Module, argument: Hashable):
        modules = list(root.modules())
        below = modules[1:]
        self.argument = argument
        tables: list[dict] = [table for m in modules for table in (m._modules, m._parameters)]
        self.tables = [table for table in tables if table]
        self.contents = list(self._contents())
        self.below, self.kinds = below, list(map(type, below))
        self.set = [
            (kind.settings, m) for m in below if (kind := _kinds.get(type(m))) and kind.settings is not _nothing
        ]
        self.own = [m.__dict__ for m in below]
        self.attributes = sum(map(len, self.own))
        self.empty = [table for table in tables if not table] + [
            h for m in below for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.parameters = listed(root)
        self.buffers = [(m._buffers, name) for m in modules if m._buffers for name in _buffers_of(m)]
        self.hooked, self.forwards = any(self.empty), self._forwards()
        self.settings, self.readable = self._settings(root), all(map(_is_readable, self.parameters))
        self.places = self._places()
        self.dtypes = {p.dtype for p in self.parameters}
        self.devices = {p.device for p in self.parameters}
        self.difference = self._difference(root)

    def _difference(self, root: nn.Module) -> str:
        kind, form = type(root).__name__, _form(type(root), self.argument)
        if form is None:
            return f"its configuration, or its input, is not that of a {kind}"
        if difference := form.difference(root, kind):
            return difference
        for name, m in root.named_modules():
            if m is root:
                continue
            if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
                return f"{name} has hooks"
            if own := next((key for key in m.__dict__ if callable(getattr(type(m), key, None))), ""):
                return f"{name} has a {own} of its own"
        for name, p in root.named_parameters():
            if not _is_readable(p):
                return f"{name} is no plain parameter ({type(p).__name__}, {p.layout})"
            if not _is_dense(p):
                return f"{name} is not contiguous"
        return "" if len(self.devices) == 1 else "its parameters are on several devices"

    def _contents(self) -> Iterator[nn.Module | Tensor | None]:
        return chain.from_iterable(map(dict.values, self.tables))

    def _settings(self, root: nn.Module) -> list[Any]:
        return [_kinds[type(root)].settings(root), *(get(m) for get, m in self.set)]

    def _places(self) -> list[Any]:
        """Where each parameter lies, and what else shows that it was given other data."""
        if not self.readable:
            return []
        looks = (Tensor.numel, Tensor.is_contiguous)
        of_buffers = [_address(table.get(name)) for table, name in self.buffers]
        return self.addresses() + of_buffers + list(chain.from_iterable(map(look, self.parameters) for look in looks))

    def addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.parameters))

    def _forwards(self) -> list[bool]:
        return list(map(contains, self.own, repeat("forward")))

    def unchanged(self, root: nn.Module, argument: Hashable) -> bool:
        return (
            argument == self.argument
            and sum(map(len, self.tables)) == len(self.contents)
            and all(map(is_, self._contents(), self.contents))
            and any(self.empty) == self.hooked
            and list(map(type, self.below)) == self.kinds
            and sum(map(len, self.own)) == self.attributes
            and self._forwards() == self.forwards
            and self._settings(root) == self.settings
            and self._places() == self.places
        )


def listed(root: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module and of those inside. One that occurs in several modules is listed for each."""
    return [p for m in root.modules() for p in m._parameters.values() if p is not None]


def _buffers_of(module: nn.Module) -> tuple[str, ...]:
    kind = _kinds.get(type(module))
    return kind.buffers if kind else ()


def _address(buffer: Tensor | None) -> int:
    return 0 if buffer is None else buffer.data_ptr()


def _is_readable(p: Tensor) -> bool:
    """Whether a parameter is plain numbers in memory: no subclass (quantized, sharded), and not sparse."""
    return type(p) is nn.Parameter and p.layout == torch.strided


def _is_dense(p: Tensor) -> bool:
    """Contiguous, or in channels_last order, as `model.to(memory_format=...)` leaves the weights of convolutions."""
    return p.is_contiguous() or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))


_parts: "weakref.WeakKeyDictionary[nn.Module, _Parts]" = weakref.WeakKeyDictionary()


_GLOBAL_HOOKS = (  # dictionaries that PyTorch fills and empties in place
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def difference(root: nn.Module, x: Tensor) -> str:
    """How a module differs from what its class makes for such an input, on its device; "" if nothing was replaced.

    That covers layers, shapes, settings and `forward`, of modules and classes, as well as wrappers and hooks. It also
    covers forward-mode derivatives in progress, which kernels would drop. Modules and parameters may occur several
    times.
    """
    kind = _kinds.get(type(root))
    if kind is None or kind.argument is None:
        return f"it is a {type(root).__name__}, a class that no way is made for"
    if any(_GLOBAL_HOOKS):
        return "hooks for all modules are registered"
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives are taken"
    if x.ndim != 4:
        return f"its input has {x.ndim} dimensions, not 4"
    if any(getattr(of, name) is not function for of, name, function in _functions):
        names = (f"{of.__name__}.{name}" for of, name, function in _functions if getattr(of, name) is not function)
        return f"{next(names)} was exchanged"
    argument = kind.argument(root, x)
    parts = _parts.get(root)
    if parts is None or not parts.unchanged(root, argument):
        parts = _parts[root] = _Parts(root, argument)
    if parts.difference or x.device in parts.devices:
        return parts.difference
    return f"its input is on {x.device}, its parameters on {', '.join(map(str, parts.devices))}"


def forget(root: nn.Module) -> None:
    """Check a module afresh at its next check, for messages that describe its present state."""
    _parts.pop(root, None)


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether a layer is PyTorch's plain linear layer with a bias, so that its weights may be used directly."""
    return (
        type(layer) is nn.Linear
        and type(layer._parameters.get("weight")) is type(layer._parameters.get("bias")) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)
        and "forward" not in layer.__dict__
        and not any(_GLOBAL_HOOKS)
        and nn.Linear.forward is _LINEAR
    )


def dtypes(root: nn.Module) -> set[torch.dtype]:
    """The dtypes of the parameters of a checked module."""
    return _parts[root].dtypes


def parameters(root: nn.Module) -> list[nn.Parameter]:
    """The parameters of a checked module, as `listed` lists them."""
    return _parts[root].parameters


def places(root: nn.Module) -> list[Any]:
    """Where the parameters of a checked module lie, and the buffers that it reads. It is another list if one was given
    other data.
    """
    return _parts[root].places


def lies_as_checked(root: nn.Module) -> bool:
    """Whether a module was found to be as built, and the parameters that it had then lie where they lay."""
    parts = _parts.get(root)
    return parts is not None and not parts.difference and parts.addresses() == parts.places[: len(parts.parameters)]


def once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward function that cannot be differentiated again: it raises RuntimeError if a graph of it is wanted.

    It also raises if many gradients are taken at once (`is_grads_batched`), which kernels do not support.
    `once_differentiable` would not do: its node that raises is skipped if only gradients of the input are wanted.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_derivatives(*grads)
        return backward(ctx, *grads)

    return checked


def is_batched(grad: Tensor) -> bool:
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.is_legacy_batchedtensor(grad) or functorch.is_batchedtensor(grad)


def refuse_derivatives(*grads: Tensor) -> None:
    """Raise for derivatives that the kernels of a Serpent do not give: second ones, or many at once."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "second derivatives (create_graph=True) of a Serpent need float64: model.double(), and the image too"
        )
    if any(map(is_batched, grads)):
        raise RuntimeError(
            "batched gradients (is_grads_batched, vectorize=True) of a Serpent need float64, or torch.func.jacrev"
        )
