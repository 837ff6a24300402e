"""The devices of this machine, and the precision in which a network computes on each."""

import torch

from serpent_ir.errors import UsageError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def available_devices() -> list[str]:
    """Names of this machine's devices, such as `cuda:0` or `cpu`. The one that `auto` takes comes first."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: `auto` (CUDA, else Apple's MPS, else the CPU), `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises UsageError for a device that is unknown or not in this machine; the message lists those that are.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    if name in available or (name == "cuda" and "cuda:0" in available):
        return torch.device(name)
    raise UsageError(f"no device {name!r} here; valid: auto, {', '.join(available)}")


def device_name(device: torch.device) -> str:
    """The name of a device in tables of figures: the GPU's product name, or the kind of device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype in which a network computes. `auto` is bfloat16 (autocast) on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in PRECISIONS:
        raise UsageError(f"no precision {name!r}; valid: auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[name]
