"""Runs one pass of a network over its input, and says in one line what stands against it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from serpent_ir.degradations import Degradation, create_degradation
from serpent_ir.errors import SerpentError, UsageError, is_out_of_memory
from serpent_ir.models import preset_of
from serpent_ir.models.presets import check_scale
from serpent_ir.models.serpent import Serpent
from serpent_ir.models.wrappers import first_parameter, network_of, unwrapped
from serpent_ir.system.devices import pick_precision
from serpent_ir.system.forks import Lock, in_child

_CPU = torch.device("cpu")
_MANY = 10_000


def device_of(model: nn.Module) -> torch.device:
    """The device of a network's parameters; the CPU if it has none."""
    parameter = first_parameter(model)
    return _CPU if parameter is None else parameter.device


def undone_by(model: nn.Module) -> Degradation | None:
    """The degradation that a network's weights undo; None if it names none. A network inside a wrapper counts."""
    config = getattr(network_of(model), "config", None)
    task = getattr(config, "task", "")
    check_scale(config)
    return create_degradation(task) if task else None


def check_task(model: nn.Module, weights: Path | None) -> None:
    """Raise UsageError if weights name no known task: those of `sr8` would be run without upsampling.

    Not for the rival networks, which take an image as it is and whose `scale` gives the size they return.
    """
    if undone_by(model) is None and (isinstance(model, Serpent) or not hasattr(model, "scale")):
        known = preset_of(model.config)
        remedy = f"name it with -n, as {known}.deblur" if known else "load_model(FILE, task=TASK) takes it, in Python"
        raise UsageError(f"{weights}: does not say which task it is for; {remedy}")


def scale_of(model: nn.Module) -> int:
    """How many times larger than its input a restored image is. Either the task asks for it or the network enlarges."""
    degradation = undone_by(model)
    return own_scale(model) * (1 if degradation is None else degradation.upsampling)


def run_network(model: nn.Module, x: Tensor, *, precision: str = "auto") -> Tensor:
    """One pass of a network over its input (B, C, H, W), without gradients: float32 (B, 3, H, W), not clamped.

    The result is `model.scale` times larger if the network has a scale. A network for grey images gets each of three
    channels as a separate image. The pass runs on the model's device and in evaluation mode (restored afterwards), by
    default in float32, or with bfloat16 autocast on a CUDA device. For wrapped networks see `models.wrappers`.

    Raises SerpentError if the device has too little memory, or if the result has an unexpected size, and UsageError if
    parts of the network are on devices or of dtypes that do not go together.
    """
    model = unwrapped(model)
    parameter = first_parameter(model)
    parameter = torch.empty(0) if parameter is None else parameter
    device = parameter.device
    dtype = pick_precision(precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    with (
        says_what_does_not_fit_together(model),
        says_what_is_too_large(x.shape, device),
        _evaluation_mode(model),
        torch.inference_mode(),
        autocast,
    ):
        x = x.to(parameter)
        restored = _each_channel(model, x).float() if x.shape[1] == 3 and takes_grey(model) else model(x).float()
    _check_size(model, x, restored)
    return restored


def check_has_values(model: nn.Module) -> None:
    """Raise UsageError for a network with a parameter on `meta`, since PyTorch computes with whatever memory held."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise UsageError(f"restore: the network's {name} is on device meta, without values; load its weights")


@contextmanager
def says_what_does_not_fit_together(model: nn.Module) -> Iterator[None]:
    """Turn PyTorch's error for a network that was moved in part into one line that says so."""
    try:
        yield
    except RuntimeError as error:
        places = {(str(tensor.device), str(tensor.dtype)) for tensor in model.parameters()}
        if len(places) < 2 or is_out_of_memory(error):
            raise
        told = " and ".join(f"{dtype.removeprefix('torch.')} on {device}" for device, dtype in sorted(places))
        raise UsageError(
            f"restore: parts of the network do not go together ({told}): {str(error).splitlines()[0]}; "
            "move all of it with .to(device, dtype)"
        ) from None


def takes_grey(model: nn.Module) -> bool:
    return getattr(getattr(network_of(model), "config", None), "in_channels", 3) == 1


def _each_channel(model: nn.Module, x: Tensor) -> Tensor:
    """Pass (B, 3, H, W) through a network for grey images, channel by channel. A grey image goes through it once."""
    x = x[:, :1] if bool((x == x[:, :1]).all()) else x
    restored = model(x.flatten(0, 1)[:, None]).unflatten(0, x.shape[:2])[:, :, 0]
    return restored.repeat(1, 3 // x.shape[1], 1, 1)


class OutOfMemoryError(SerpentError):
    """A pass did not fit in the memory of its device."""


_modes_lock = Lock()

_modes: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside. Afterwards each module has its own flag again. Several threads may be inside at once."""
    with _modes_lock:
        inside, training = _modes.get(model, (0, []))
        if not inside:
            training = [module for module in _modules_of(model) if module.training]
            for module in training:
                module.training = False
        _modes[model] = inside + 1, training
    try:
        yield
    finally:
        with _modes_lock:
            inside, training = _modes.pop(model, (1, []))  # missing in a child that was forked in here
            if inside > 1:
                _modes[model] = inside - 1, training
            else:
                for module in training:
                    module.training = True


def _modules_of(model: nn.Module) -> list[nn.Module]:
    """`model.modules()` in a sixth of the time, which counts beside a small image on a GPU. Some may occur twice."""
    found = [model]
    for module in found:  # it grows
        if children := module._modules:
            found += [child for child in children.values() if child is not None]
            if len(found) > _MANY:  # or they hold each other
                return list(model.modules())
    return found


@in_child
def _leave_evaluation_mode() -> None:
    """What threads of the parent were inside of, they do not leave in a child."""
    for _, training in _modes.values():
        for module in training:
            module.training = True
    _modes.clear()


def own_scale(model: nn.Module) -> int:
    return getattr(network_of(model), "scale", 1)


def _check_size(model: nn.Module, x: Tensor, restored: Tensor) -> None:
    """Raise SerpentError where a network made another size than it says."""
    scale = own_scale(model)
    (height, width), (made_height, made_width) = x.shape[-2:], restored.shape[-2:]
    if (made_height, made_width) != (scale * height, scale * width):
        raise SerpentError(
            f"{type(model).__name__} made {made_width}x{made_height} px of {width}x{height}, and its scale is {scale}; "
            "give the network itself, or one that says its `scale`"
        )


@contextmanager
def says_what_is_too_large(shape: Sequence[int], device: torch.device) -> Iterator[None]:
    """Turn all ways in which PyTorch and numpy run out of memory into one line that names the remedy."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not is_out_of_memory(error):
            raise
    # Raised out here, since otherwise its context would keep the failed pass's tensors alive.
    raise OutOfMemoryError(
        f"not enough memory on {device} for an image of {shape[-1]}x{shape[-2]} px; "
        "make it smaller, or choose tiles, another device or a network that needs less (serpent_b)"
    )
