"""Networks by name. Weights that ship are named network.task, as `serpent_l.deblur`."""

import fnmatch
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.models.serpent import Serpent, SerpentConfig
from serpent_ir.models.unet import UNet, UNetConfig

PRESETS: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    "serpent_b": (Serpent, SerpentConfig(patch_size=4)),
    "serpent_l": (Serpent, SerpentConfig(patch_size=2)),
    "serpent_h": (Serpent, SerpentConfig(patch_size=1)),
    "unet_32": (UNet, UNetConfig(channels=32)),
    "unet_128": (UNet, UNetConfig(channels=128)),
}

TASK_CHANNELS = {"inpaint": 4}
"""Input channels that a task brings, where they are not the image's three."""

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
DEFAULT_WEIGHTS = "serpent_l.deblur"


def list_models(filter: str = "", *, pretrained: bool = False) -> list[str]:
    """Names that `create_model` takes: networks, or with `pretrained` the weights that ship (network.task).

    `filter` keeps the names that contain it, or that match it where it has wildcards (`serpent_*`).
    """
    names = sorted(p.stem for p in WEIGHTS_DIR.glob("*.safetensors")) if pretrained else list(PRESETS)
    pattern = filter if any(c in filter for c in "*?[") else f"*{filter}*"
    return fnmatch.filter(names, pattern)


def create_model(
    name: str, *, pretrained: bool = False, checkpoint_path: str | os.PathLike[str] | None = None, **config: Any
) -> nn.Module:
    """Build a network, in evaluation mode, on the CPU, in float32.

    Args:
        name: a network (`serpent_l`), or a network and its task (`serpent_l.deblur`); see `list_models`.
        pretrained: load the weights that ship under this name.
        checkpoint_path: load these weights instead (a safetensors file, as training writes it).
        config: fields of the network's configuration that differ from the preset.

    Raises:
        UsageError: an unknown name or configuration field, or no such weights; it lists the valid ones.
        SerpentError: a weights file that is missing, damaged or made for another network; it names what differs.
    """
    network, _, task = name.partition(".")
    if pretrained and checkpoint_path is None and name not in list_models(pretrained=True):
        raise UsageError(f"no weights {name!r} ship; valid: {', '.join(list_models(pretrained=True)) or 'none'}")
    if network not in PRESETS:
        raise UsageError(f"unknown model {network!r}; valid: {', '.join(PRESETS)}")
    if pretrained and checkpoint_path is not None:
        raise UsageError("give pretrained=True or checkpoint_path, not both")
    if pretrained:
        checkpoint_path = WEIGHTS_DIR / f"{name}.safetensors"
    build, preset = PRESETS[network]
    fields = {"task": task, **config} if task else dict(config)
    unknown = fields.keys() - vars(preset).keys()
    if unknown:
        raise UsageError(f"{network} has no option {', '.join(sorted(unknown))}; valid: {', '.join(vars(preset))}")
    if checkpoint_path is None:
        return build(replace(preset, **_with_channels(fields))).eval()
    state, metadata = load_weights(checkpoint_path)
    trained_for = metadata.get("task", "")
    if trained_for and fields.setdefault("task", trained_for) != trained_for:
        raise UsageError(
            f"{checkpoint_path}: weights for {trained_for}, not {fields['task']}; ask for {network}.{trained_for}"
        )
    model = build(replace(preset, **_with_channels(fields))).eval()
    expected = model.state_dict()
    problems = [f"{k} is missing" for k in expected.keys() - state.keys()]
    problems += [f"{k} is not a part of it" for k in state.keys() - expected.keys()]
    problems += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise SerpentError(f"{checkpoint_path}: not weights of {network}: {'; '.join(sorted(problems)[:4])}{more}")
    model.load_state_dict(state)
    return model


def _with_channels(fields: dict[str, Any]) -> dict[str, Any]:
    channels = TASK_CHANNELS.get(fields.get("task", ""))
    return {"in_channels": channels, **fields} if channels else fields


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata (`network`, `task`) of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:  # what safetensors says of a file that may not be read, too
        reason = "cannot be read (permission denied)" if Path(path).exists() else "no such weights file"
        raise SerpentError(f"{path}: {reason}") from None
    except (SafetensorError, OSError) as error:
        raise SerpentError(f"{path}: not a readable safetensors file ({error})") from None
