"""These networks by name, in the sizes of their public releases. A file of weights decides the upsampler."""

from collections.abc import Callable
from typing import Any

from torch import nn

from serpent_ir.models.mamba.dvmsr import DVMSR, DVMSRConfig
from serpent_ir.models.mamba.eamamba import EAMamba, EAMambaConfig, EAMambaSR, EAMambaSRConfig
from serpent_ir.models.mamba.mair import MaIR, MaIRConfig
from serpent_ir.models.mamba.mambair import MambaIR, MambaIRConfig
from serpent_ir.models.mamba.mambair_unet import MambaIRUNet, MambaIRUNetConfig
from serpent_ir.models.mamba.mambairv2 import MambaIRv2, MambaIRv2Config
from serpent_ir.models.mamba.pfvm import PFVM, PFVMConfig
from serpent_ir.models.mamba.vmambair import VmambaIR, VmambaIRConfig

NETWORKS = (MambaIR, MambaIRUNet, MambaIRv2, MaIR, DVMSR, PFVM, VmambaIR, EAMamba, EAMambaSR)

SIX = (6,) * 6

PRESETS: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
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
