"""Small networks of the field that scan, for the tests of all of them."""

from typing import Any

import torch
from torch import nn

DIRECT: dict[str, Any] = {"upsampler": "pixelshuffledirect", "scale": 2}
FRAME: dict[str, Any] = {"dim": 12, "blocks": (2, 1), "d_state": 3, "expand": 1.5}
LEVELS: dict[str, Any] = {"dim": 8, "blocks": (1, 1, 1, 1), "refinement": 1, "d_state": 2}
ROUTES: dict[str, Any] = {"heads": 2, "window_size": 4, "inner_rank": 3, "classes": 5, "kernel": 3}
TINY: dict[str, dict[str, Any]] = {
    "mambair_light": {**FRAME, **DIRECT, "dim": 30},
    "mambair_dn": {**FRAME, "dim": 30, "in_channels": 1},
    "mambair_unet": {**LEVELS, "dim": 30},
    "mambairv2_light": {**FRAME, **ROUTES, **DIRECT},
    "mambairv2_base": {**FRAME, **ROUTES},
    "mair_tiny": {**FRAME, **DIRECT, "d_state": 1},
    "mair_small": FRAME,
    "dvmsr": {**FRAME, **DIRECT},
    "pfvm": {**FRAME, **DIRECT},
    "vmambair": {**LEVELS, "scale": 2},
    "eamamba": LEVELS,
    "eamamba_sr": {"dim": 8, "blocks": (1, 1), "d_state": 2, "ffn_expand": 2.0, "scale": 3},
}
SIZES = {"mambair_unet": (8, 8), "vmambair": (8, 16), "eamamba": (16, 8)}


def stirred(model: nn.Module) -> nn.Module:
    """With parameters that nothing cancels or repeats, in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3)
            if "norm" in name and name.endswith("weight"):
                drawn += 1
            parameter.copy_(drawn)
    return model.double()
