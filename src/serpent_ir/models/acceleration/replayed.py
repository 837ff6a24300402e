"""Replays whole networks from CUDA graphs: what their `forward` says, with the ways of their blocks.

Launching hundreds of small kernels takes the host longer than the GPU takes to run them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from serpent_ir.models.acceleration import as_built, captured, graphs, replays
from serpent_ir.models.acceleration.way import Way
from serpent_ir.models.serpent import Serpent

POSITIONS = 1 << 19
"""Positions of the first map up to which a pass of a Serpent is captured; longer ones keep the GPU busy without."""
PIXELS = 1 << 18
"""Pixels up to which a pass of another network is captured."""


def _definition(model: nn.Module) -> Callable[[Any, Tensor], Tensor]:
    return getattr(type(model).forward, "__wrapped__", type(model).forward)


def _refuses(model: Any, x: Tensor) -> str:
    if reason := as_built.looked_on(x):
        return reason
    if captured.machine.capturing():
        return "a CUDA graph is being captured"
    if reason := as_built.difference(model, x):
        return reason
    if as_built.product_dtype(model, x) is None:
        return as_built.products_of(model, x)
    pixels = x.numel() // x.shape[1]
    most = POSITIONS * model.config.patch_size**2 if isinstance(model, Serpent) else PIXELS
    if pixels > most:
        return f"{pixels} pixels keep a GPU busy without graphs"
    if captured.is_loose(x.shape, x.stride()):
        return "its input is a small part of a large tensor"
    return ""


def _refuses_training(model: Any, x: Tensor) -> str:
    if torch.is_anomaly_enabled():
        return "anomalies are looked for"
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return "hooks for saved tensors, such as those of checkpoints, are set"
    if x.is_inference():
        return "its input was made in inference mode"
    if reason := _refuses(model, x):
        return reason
    if not x.requires_grad and not any(p.requires_grad for p in as_built.parameters(model)):
        return "nothing requires a gradient"
    return replays.of(model).refuses(model, x)


def _train(model: nn.Module, x: Tensor) -> Tensor:
    return replays.of(model)(_definition(model), model, x)


def _infer(model: nn.Module, x: Tensor) -> Tensor:
    definition, kind = _definition(model), x.device.type
    dtype, cast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def run(x: Tensor) -> Tensor:
        # What the cache of autocast holds was cast before a capture, and would be out of date in a replay.
        with torch.autocast(kind, dtype, enabled=cast, cache_enabled=False):
            return definition(model, x)

    key = (cast and dtype, captured.settings())
    return graphs.of(model)(run, x, key=key, weights=as_built.places(model))


training = Way("replayed.training", "cuda", True, _refuses_training, _train)
inference = Way("replayed.inference", "cuda", False, _refuses, _infer)


def moved(model: nn.Module) -> None:
    """Give back the memory of a model's graphs if its weights lie elsewhere now."""
    if not as_built.lies_as_checked(model):
        graphs.release(model)
        replays.release(model)
