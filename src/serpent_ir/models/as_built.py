"""Whether the fused kernels may stand in for a module: the right kind of tensor, and a module as its class made it.

Hooks, exchanged or wrapped layers, parametrised weights, tracing and counting all get the plain definition. The check
of a network is repeated at every call, so its lists are kept and compared; they hold no reference to the network.
"""

import functools
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import contains, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _get_current_dispatch_mode

DEVICES = {"cuda"}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def runs_on(x: Tensor) -> bool:
    """Whether a Triton kernel may take this tensor here and now: not while tracing, counting or transforming."""
    return runs_eagerly(x, DEVICES) and _has_triton(x.device)


def runs_eagerly(x: Tensor, devices: set[str]) -> bool:
    """Whether a kernel of ours for these kinds of devices may take this tensor, as far as all of them ask alike."""
    return runs_or_counts(x, devices) and _get_current_dispatch_mode() is None


def runs_or_counts(x: Tensor, devices: set[str]) -> bool:
    """The same where a dispatch mode, such as one that counts, may look on."""
    return (
        not torch.compiler.is_compiling()  # first: what is traced should see no more than this
        and x.device.type in devices
        and type(x) in (Tensor, nn.Parameter)
        and x.numel() > 0
        and not torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
        and not torch._C._are_functorch_transforms_active()
    )


@functools.cache
def _has_triton(device: torch.device) -> bool:
    """Triton, and a device that it multiplies bfloat16 on."""
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type != "cuda" or bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def product_dtype(module: Any, x: Tensor) -> torch.dtype | None:
    """The dtype of the module's products with x, as autocast says; None where the plain path has to serve."""
    parts = _parts.get(module)
    weight = next(module.parameters(), x) if parts is None else parts.parameters[0]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype if x.dtype == weight.dtype else None
    fits = dtype in DTYPES and x.dtype in (dtype, torch.float32) and weight.dtype in DTYPES
    return dtype if fits and weight.device == x.device else None


class _Parts:
    """What a module is made of, in flat lists that are quick to compare: a call of a small network takes 0.6 ms."""

    def __init__(self, root: nn.Module):
        modules = list(root.modules())
        below = modules[1:]
        tables: list[dict] = [table for m in modules for table in (m._modules, m._parameters)]
        self.tables = [table for table in tables if table]
        self.contents = list(self._contents())
        self.below, self.kinds = below, list(map(type, below))
        self.own = [m.__dict__ for m in below]
        self.empty = [table for table in tables if not table] + [
            h for m in below for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        ]
        self.parameters = [p for m in modules for p in m._parameters.values() if p is not None]
        biased = [m for m in below if type(m) is nn.Linear and m.bias is not None]
        self.plain = (
            all(self._plain(m) for m in modules)
            and biased == ([root.head] if "head" in root._modules else [])
            and set(map(type, self.parameters)) == {nn.Parameter}
        )

    @staticmethod
    def _plain(m: nn.Module) -> bool:
        weights = {k for k, v in m._parameters.items() if v is not None}
        return type(m) in _kinds() and getattr(m, "padding_mode", "zeros") == "zeros" and weights in _kinds()[type(m)]

    def _contents(self) -> Iterator[nn.Module | Tensor | None]:
        return chain.from_iterable(map(dict.values, self.tables))

    def unchanged(self) -> bool:
        return (
            sum(map(len, self.tables)) == len(self.contents)
            and all(map(is_, self._contents(), self.contents))
            and not any(self.empty)
            and list(map(type, self.below)) == self.kinds
            and not any(map(contains, self.own, repeat("forward")))
        )

    def pointers(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.parameters))


_parts: "weakref.WeakKeyDictionary[nn.Module, _Parts]" = weakref.WeakKeyDictionary()


@functools.cache
def _kinds() -> dict[type[nn.Module], list[set[str]]]:
    """The kinds of modules that the kernels know, and the parameters that each may have."""
    from serpent_ir.models import serpent

    scan = {"dt_weight", "dt_bias", "A_log", "D"}
    both: set[str] = {"weight", "bias"}
    none: set[str] = set()
    return {
        serpent.Serpent: [none], serpent.VSSBlock: [none], serpent.SS2D: [scan], serpent.LayerNorm: [both],
        nn.Linear: [both, {"weight"}], nn.Conv2d: [both], nn.Sequential: [none], nn.ModuleList: [none],
        serpent.Rearrange: [none],
    }  # fmt: skip


_GLOBAL_HOOKS = (  # dictionaries that PyTorch fills and empties in place
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


def check(root: nn.Module) -> bool:
    """Whether no part of a module was exchanged, wrapped, hooked or given another `forward`, nor forward-mode
    derivatives are being taken, which kernels would drop."""
    if any(_GLOBAL_HOOKS) or forward_ad._current_level >= 0:
        return False
    parts = _parts.get(root)
    if parts is None or not parts.unchanged():
        parts = _parts[root] = _Parts(root)
        return parts.plain and parts.unchanged()
    return parts.plain


def once(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward that no second one can go through: where a graph of it is wanted it raises RuntimeError.

    `once_differentiable` would not: its node that raises is passed by where gradients of the input alone are asked for.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "second derivatives (create_graph=True) of a Serpent need float64: model.double(), and the image too"
            )
        return backward(ctx, *grads)

    return checked


def pointers(root: nn.Module) -> list[int]:
    """Where the parameters of a checked module lie."""
    return _parts[root].pointers()
