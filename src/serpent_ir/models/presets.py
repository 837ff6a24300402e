"""The networks by name, and the sizes that each name stands for."""

from collections.abc import Callable
from typing import Any

from torch import nn

from serpent_ir.models.restormer import Restormer, RestormerConfig
from serpent_ir.models.serpent import Serpent, SerpentConfig
from serpent_ir.models.swinir import SwinIR, SwinIRConfig
from serpent_ir.models.unet import UNet, UNetConfig

NETWORKS = (Serpent, UNet, SwinIR, Restormer)

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
}

FAMILIES = {SerpentConfig: "Serpent", UNetConfig: "U-Net", SwinIRConfig: "SwinIR", RestormerConfig: "Restormer"}
"""What people call the networks of each kind of configuration, whatever their sizes."""

TASK_CHANNELS = {"inpaint": 4}
"""Input channels for tasks that need others than the image's three."""
