"""The networks by name, and the sizes that each name stands for."""

from collections.abc import Callable
from typing import Any

from torch import nn

from serpent_ir.errors import UsageError
from serpent_ir.models.dvmsr import DVMSR, DVMSRConfig
from serpent_ir.models.eamamba import EAMamba, EAMambaConfig, EAMambaSR, EAMambaSRConfig
from serpent_ir.models.frame import Frame
from serpent_ir.models.mair import MaIR, MaIRConfig
from serpent_ir.models.mambair import MambaIR, MambaIRConfig
from serpent_ir.models.mambair_unet import MambaIRUNet, MambaIRUNetConfig
from serpent_ir.models.mambairv2 import MambaIRv2, MambaIRv2Config
from serpent_ir.models.pfvm import PFVM, PFVMConfig
from serpent_ir.models.restormer import Restormer, RestormerConfig
from serpent_ir.models.serpent import Serpent, SerpentConfig
from serpent_ir.models.swinir import SwinIR, SwinIRConfig
from serpent_ir.models.unet import UNet, UNetConfig
from serpent_ir.models.vmambair import VmambaIR, VmambaIRConfig

NETWORKS = (
    Serpent,
    UNet,
    SwinIR,
    Restormer,
    MambaIR,
    MambaIRUNet,
    MambaIRv2,
    MaIR,
    DVMSR,
    PFVM,
    VmambaIR,
    EAMamba,
    EAMambaSR,
)

SIX = (6,) * 6

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
    "mambair_light": (MambaIR, MambaIRConfig(60, (6,) * 4, 10, 1.2, light=True)),
    "mambair_sr": (MambaIR, MambaIRConfig(180, SIX, 16, 2.0)),
    "mambair_dn": (MambaIR, MambaIRConfig(180, SIX, 16, 1.2)),  # denoising and JPEG
    "mambair_unet": (MambaIRUNet, MambaIRUNetConfig()),  # denoising of real photos
    "mambairv2_light": (
        MambaIRv2,
        MambaIRv2Config(48, (5,) * 4, 8, 1.0, heads=4, inner_rank=32, classes=64, mlp_ratio=1.0, light=True),
    ),
    "mambairv2_small": (MambaIRv2, MambaIRv2Config(132, (4,) * 6, heads=4)),
    "mambairv2_base": (MambaIRv2, MambaIRv2Config(174, SIX)),
    "mambairv2_large": (MambaIRv2, MambaIRv2Config(174, (6,) * 9)),
    "mair_tiny": (MaIR, MaIRConfig(60, (6,) * 4, 1, 1.1, mlp_ratio=1.6, stripe=8)),
    "mair_small": (MaIR, MaIRConfig(60, (6,) * 4, 16, 1.4, mlp_ratio=1.6, stripe=4)),
    "mair_sr": (MaIR, MaIRConfig(180, SIX, 16, 2.0, mlp_ratio=2.5, stripe=8)),
    "mair_dn": (MaIR, MaIRConfig(180, SIX, 16, 1.3, mlp_ratio=2.0, stripe=4)),
    "dvmsr": (DVMSR, DVMSRConfig()),
    "pfvm": (PFVM, PFVMConfig()),
    "vmambair": (VmambaIR, VmambaIRConfig()),
    "eamamba": (EAMamba, EAMambaConfig()),
    "eamamba_sr": (EAMambaSR, EAMambaSRConfig()),
}

FAMILIES = {
    SerpentConfig: "Serpent",
    UNetConfig: "U-Net",
    SwinIRConfig: "SwinIR",
    RestormerConfig: "Restormer",
    MambaIRConfig: "MambaIR",
    MambaIRUNetConfig: "MambaIR's U-Net",
    MambaIRv2Config: "MambaIRv2",
    MaIRConfig: "MaIR",
    DVMSRConfig: "DVMSR",
    PFVMConfig: "PFVM",
    VmambaIRConfig: "VmambaIR",
    EAMambaConfig: "EAMamba",
    EAMambaSRConfig: "EAMamba for super-resolution",
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
