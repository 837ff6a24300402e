"""Networks inside other modules that train, compile, average or shard them.

Such a module has no `config`, `scale` or `size_multiple` of its own, or something else by that name, so a network of
`sr8` inside it would be run without upsampling. Therefore the rules are read from the network inside (`network_of`).
Wrappers that only distribute work are removed (`unwrapped`). Anything else that holds a network is called as it is,
since it may do more. What cannot be run for one image is refused by name.
"""

import torch
from torch import nn

from serpent_ir.errors import UsageError
from serpent_ir.models.presets import NETWORKS

# Names of classes, so that nothing is imported: if a network uses a wrapper, the wrapper's module is already loaded.
_TAKEN_OFF = ("DataParallel", "DistributedDataParallel", "AveragedModel")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")
_COMPILED = "OptimizedModule"


def unwrapped(model: nn.Module, *, compiled: bool = False) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and AveragedModel, however deep. Others are returned as
    is.

    The result of `torch.compile` is unwrapped if `compiled`, or if it is around another wrapper. A module that holds a
    network in another way, as a LightningModule does, is returned as it is; `network_of` finds its rules.

    Raises:
        UsageError: a wrapper that holds only a share of the weights (FSDP, DeepSpeed), or a network as TorchScript.
    """
    names = [kind.__name__ for kind in type(model).__mro__]
    if wrapper := next((name for name in names if name in _SHARDED), ""):
        raise UsageError(_sharded(wrapper))
    if names[0] == _COMPILED:
        original = getattr(model, "_orig_mod", model)
        inside = unwrapped(original, compiled=compiled)
        return inside if compiled or inside is not original else model
    if any(name in _TAKEN_OFF for name in names) and isinstance(module := getattr(model, "module", None), nn.Module):
        return unwrapped(module, compiled=compiled)
    if type(first_parameter(model)).__name__ == "DTensor":
        raise UsageError(_sharded("DTensor"))
    if isinstance(model, torch.jit.ScriptModule):
        made_of = {getattr(module, "original_name", "") for module in model.modules()}
        if kind := next((kind.__name__ for kind in NETWORKS if kind.__name__ in made_of), ""):
            raise UsageError(f"a TorchScript of {kind} does not say which task it is for; give the network itself")
    return model


def first_parameter(model: nn.Module) -> nn.Parameter | None:
    """`next(model.parameters(), None)` in a fifth of the time: it is asked several times for each image."""
    for parameter in model._parameters.values():
        if parameter is not None:
            return parameter
    found = (first_parameter(child) for child in model._modules.values() if child is not None)
    return next((parameter for parameter in found if parameter is not None), None)


def _sharded(wrapper: str) -> str:
    return f"a {wrapper} holds a share of the weights; gather its state dict and load it into a network of its own"


def network_of(model: nn.Module) -> nn.Module:
    """The network whose `config`, `scale` and `size_multiple` are the rules of a module: the module or one inside it.

    A module that has its own `scale` or `size_multiple` is a network in its own right.

    Raises:
        UsageError: there are networks with different rules inside; the message names them.
    """
    if isinstance(model, NETWORKS):
        return model
    if any(name in vars(model) or hasattr(type(model), name) for name in ("scale", "size_multiple")):
        return model
    inside = {name: module for name, module in model.named_modules() if isinstance(module, NETWORKS)}
    if len({_rules(network) for network in inside.values()}) > 1:
        names = ", ".join(inside)
        raise UsageError(
            f"{type(model).__name__} holds several networks ({names}) of different rules; give one of them"
        )
    return next(iter(inside.values()), model)


def _rules(network: nn.Module) -> tuple[object, ...]:
    fields = [getattr(network.config, field, None) for field in ("task", "in_channels", "out_channels")]
    return (*fields, getattr(network, "scale", 1), getattr(network, "size_multiple", 1))
