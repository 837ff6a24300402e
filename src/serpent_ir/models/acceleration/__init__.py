"""Faster ways to compute what the networks define. They are put before `forward` from outside; networks know none.

`WAYS` is the table of ways, and `attach` puts it to work. `serpent_ir.acceleration` re-exports `off` and `why`.
"""

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.acceleration import as_built, cpu_inference, cpu_training, cuda, heads, replayed
from serpent_ir.models.acceleration.way import Way
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.restormer import (
    BiasFreeNorm,
    ChannelNorm,
    GatedFeedForward,
    Restormer,
    RestormerConfig,
    TransformerBlock,
    TransposedAttention,
)
from serpent_ir.models.serpent import SS2D, Serpent, SerpentConfig, VSSBlock
from serpent_ir.models.swinir import ResidualGroup, SwinIR, SwinIRConfig, SwinLayer, WindowAttention
from serpent_ir.models.unet import ConvBlock, UNet, UNetConfig, UpBlock
from serpent_ir.models.wrappers import unwrapped

Ways = Mapping[type[nn.Module], tuple[Way, ...]]

WAYS: Ways = {
    Serpent: (cuda.network, replayed.training),
    UNet: (replayed.inference, replayed.training),
    SwinIR: (replayed.inference, replayed.training),
    Restormer: (replayed.inference, replayed.training),
    VSSBlock: (cuda.block, cpu_inference.block, cpu_training.block),
    WindowAttention: (heads.padded,),
}
"""The ways of each class, in order. The first one that serves a module and its input replaces `forward`."""

MODES = {False: "gradients are asked for", True: "no gradients are asked for"}
"""Why a way does not serve that never records a tape, or always does."""

_in_force: ContextVar[Ways] = ContextVar("serpent_ir.acceleration", default=WAYS)  # per thread or asyncio task


@contextmanager
def only(ways: Ways):
    """A context in which only these ways may serve."""
    token = _in_force.set(ways)
    try:
        yield
    finally:
        _in_force.reset(token)


def off() -> AbstractContextManager[None]:
    """A context in which networks run as their files define them, by PyTorch's operators and the scan alone.

    Inside there is no kernel of ours around the scan, no CUDA graph of a pass, no choice between libraries of matrix
    products, and no padding of heads. It serves debugging (is a kernel to blame?) and counting, and it gives the
    numbers with which accelerated ones are compared: they agree up to rounding. A backward pass goes the way of its
    forward pass.

        with serpent_ir.acceleration.off():
            restored = model(image)

    It holds for what this thread (or asyncio task) calls; others are unaffected. Contexts can be nested. A program that
    `torch.compile` made holds the definition either way.
    """
    return only({})


def uncaptured() -> AbstractContextManager[None]:
    """A context in which training is not replayed pass by pass: for whole steps that somebody captures himself."""
    in_force = _in_force.get()
    return only(
        {kind: tuple(way for way in ways if way.name != replayed.training.name) for kind, ways in in_force.items()}
    )


def why(model: nn.Module, x: Tensor) -> dict[str, str]:
    """Which way serves a network and each of its blocks for this input, here and now; or the reason why none does.

    Runs one pass of the definition without gradients, to see what each block receives. Under `torch.no_grad()` it tells
    about inference, otherwise about training. Autocast counts as it would in a call.

    Args:
        model: a network of `serpent_ir.models`, or a module that holds some, as DistributedDataParallel does.
        x: its input, as the network takes it: (B, C, H, W) in [0, 1], on its device.

    Returns:
        A dict by the names of `model.named_modules()` ("" is the model itself). A value is the name of a way, such as
        "cpu_inference.block", or "definition: " and the reasons. If a way serves a whole network, its blocks are not
        called one by one; their entries say what would serve them.

    Raises:
        UsageError: not a module, or one that holds only a share of the weights.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"acceleration.why takes a network (a torch.nn.Module), not a {type(model).__name__}")
    inside = unwrapped(model, compiled=True)
    compiled, ways, taped = inside is not unwrapped(model), _in_force.get(), torch.is_grad_enabled()
    found: dict[nn.Module, str] = {}

    def look(kind: type[nn.Module]) -> Callable[[Any, Tensor], str]:
        def refuses(module: nn.Module, x: Tensor) -> str:
            with torch.set_grad_enabled(taped):
                found.setdefault(module, _told(kind, ways, module, x, compiled=compiled))
            return "looks only"

        return refuses

    with torch.no_grad(), only({kind: (Way("", x.device.type, None, look(kind), _never),) for kind in WAYS}):
        inside(x)
    kinds, told = tuple(WAYS), {}
    for name, module in inside.named_modules():
        if module in found:
            told[name] = found[module]
        elif isinstance(module, kinds):
            told[name] = f"definition: {type(module).__name__}'s own forward was not called"
        elif not name:
            told[name] = f"definition: no way is made for {type(module).__name__}"
    return told


def _told(kind: type[nn.Module], ways: Ways, module: nn.Module, x: Tensor, *, compiled: bool) -> str:
    if not ways:
        return "definition: acceleration.off()"
    device, of_kind = x.device.type, ways.get(kind, ())
    here = [way for way in of_kind if way.device == device]
    if not here:
        devices = ", ".join(dict.fromkeys(way.device for way in of_kind)) or "no device"
        return f"definition: for a {kind.__name__} there are ways on {devices}, not on {device}"
    as_built.forget(module)
    reasons = []
    for way in here:
        if compiled and not way.traced:
            reasons.append("torch.compile traces it")
        elif not way.in_mode():
            reasons.append(MODES[bool(way.tape)])
        elif reason := way.refuses(module, x):
            reasons.append(reason)
        else:
            return way.name
    # Ways for the other mode are not mentioned if there is one for this mode.
    told = [reason for reason in reasons if reason not in MODES.values()] or reasons
    return f"definition: {'; '.join(dict.fromkeys(told))}"


def _never(module: nn.Module, x: Tensor) -> Tensor:
    raise AssertionError


def attach() -> None:
    """Put the ways before the `forward` of their classes, once."""
    for kind, ways in WAYS.items():
        if not hasattr(kind.forward, "__wrapped__"):
            setattr(kind, "forward", _accelerated(kind, ways, kind.forward))  # noqa: B010
            if replayed.training in ways:
                setattr(kind, "_apply", _releasing(kind._apply))  # noqa: B010
    as_built.know(LayerNorm, "normalized_shape", "eps")
    as_built.know(SS2D)
    as_built.know(VSSBlock, argument=lambda block, x: x.shape[-1])
    as_built.know(Serpent, "config", "size_multiple", "residual", "scale", argument=_config_of(SerpentConfig))
    as_built.know(UNet, "config", "size_multiple", "scale", argument=_config_of(UNetConfig))
    of_frame = ("config", "size_multiple", "scale", "_norm")
    as_built.know(SwinIR, *of_frame, argument=_config_of(SwinIRConfig), buffers=("mean",))
    as_built.know(Restormer, "config", "size_multiple", "scale", argument=_config_of(RestormerConfig))
    as_built.know(WindowAttention, "heads", "window", "shift", buffers=("relative_position_index", "strangers"))
    for kind in (ConvBlock, UpBlock, ResidualGroup, SwinLayer):
        as_built.know(kind)
    for kind in (BiasFreeNorm, ChannelNorm, GatedFeedForward, TransformerBlock, TransposedAttention):
        as_built.know(kind)


def _accelerated(kind: type[nn.Module], ways: tuple[Way, ...], definition: Callable[..., Tensor]) -> Any:
    traced = tuple(way for way in ways if way.traced)

    @functools.wraps(definition)
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        # This comes first, since compilers take the answer for a constant: tracing sees only this and the definition.
        candidates = traced if torch.compiler.is_compiling() else _in_force.get().get(kind, ())
        for way in candidates:
            begun = way.ahead(self, x) if way.ahead else None
            if way.serves(self, x):
                return way.run(self, x) if begun is None else begun
        return definition(self, x)

    return forward


def _releasing(apply: Callable[..., Any]) -> Any:
    """What `to`, `cpu`, `half` and others are made of, which may give a model other weights."""

    @functools.wraps(apply)
    def releasing(self: nn.Module, *args: Any, **options: Any) -> Any:
        result = apply(self, *args, **options)
        replayed.moved(self)
        return result

    return releasing


def _config_of(kind: type) -> Callable[[Any, Tensor], Any]:
    def read(model: Any, x: Tensor) -> Any:
        fits = type(model.config) is kind and x.shape[1] == model.config.in_channels
        return model.config if fits else None

    return read
