"""The networks by name, and the sizes that each name stands for."""

from collections.abc import Callable
from typing import Any

from torch import nn

from serpent_ir.errors import UsageError
from serpent_ir.models.frame import Frame
from serpent_ir.models.mamba import presets as mamba
from serpent_ir.models.restormer import Restormer, RestormerConfig
from serpent_ir.models.serpent import Serpent, SerpentConfig
from serpent_ir.models.swinir import SwinIR, SwinIRConfig
from serpent_ir.models.unet import UNet, UNetConfig

NETWORKS = (Serpent, UNet, SwinIR, Restormer, *mamba.NETWORKS)

PRESETS: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
    "serpent_b": (Serpent, SerpentConfig(patch_size=4)),
    "serpent_l": (Serpent, SerpentConfig(patch_size=2)),
    "serpent_h": (Serpent, SerpentConfig(patch_size=1)),
    "unet_32": (UNet, UNetConfig(channels=32)),
    "unet_128": (UNet, UNetConfig(channels=128)),
    "swinir_b": (SwinIR, SwinIRConfig(dim=96)),  # the paper's two
    "swinir_l": (SwinIR, SwinIRConfig(dim=180)),
    "swinir_60": (SwinIR, SwinIRConfig(dim=60, blocks=(6, 6, 6, 6))),  # the sizes of the public releases
    "swinir_180": (SwinIR, SwinIRConfig(dim=180)),
    "swinir_240": (SwinIR, SwinIRConfig(dim=240, blocks=(6,) * 9, heads=8, resi_connection="3conv")),
    "restormer_24": (Restormer, RestormerConfig(dim=24)),  # the paper's
    "restormer_48": (Restormer, RestormerConfig(dim=48)),  # that of the public releases
    **mamba.PRESETS,
}

FAMILIES = {
    SerpentConfig: "Serpent",
    UNetConfig: "U-Net",
    SwinIRConfig: "SwinIR",
    RestormerConfig: "Restormer",
    **mamba.FAMILIES,
}
"""What people call the networks of each kind of configuration, whatever their sizes."""

TASK_CHANNELS = {"inpaint": 4}
"""Input channels for tasks that need others than the image's three."""

TASK_SCALES = {"sr2": 2, "sr4": 4, "photo_x2": 2, "photo_x4": 4}
"""How many times larger the networks of a task make images, if they do. Those of `sr8` see them upsampled."""

ENLARGING: dict[str, dict[str, Any]] = {
    "serpent_l": {"patch_size": 1, "blocks": (4, 3, 3)},
    **{
        name: {"upsampler": "pixelshuffledirect"}
        for name, (build, _) in PRESETS.items()
        if isinstance(build, type) and issubclass(build, Frame)
    },
    **{name: {} for name in ("vmambair", "eamamba_sr")},
}
"""What the networks of those tasks are, where it differs from their presets. Others have none.

A Serpent sees the small image, of which no patch can be smaller than a pixel, so there is one size. More of its blocks
are at the size of the image than in the paper's, and there is one level less."""


def of_task(network: str, task: str) -> dict[str, Any]:
    """The fields of a network's configuration that a task asks for. Raises UsageError if the network cannot undo it."""
    fields: dict[str, Any] = {"in_channels": TASK_CHANNELS[task]} if task in TASK_CHANNELS else {}
    if task in TASK_SCALES:
        if network not in ENLARGING:
            raise UsageError(f"{network} makes no image larger, as {task} asks for; valid: {', '.join(ENLARGING)}")
        fields |= {**ENLARGING[network], "scale": TASK_SCALES[task]}
    return fields


def check_scale(config: Any) -> None:
    """Raise UsageError if a network makes images larger than its task asks for, or not as large."""
    task, scale = getattr(config, "task", ""), getattr(config, "scale", 1)
    if task and scale != (needed := TASK_SCALES.get(task, 1)):
        raise UsageError(f"scale {scale} with task {task}, whose networks have scale {needed}")
