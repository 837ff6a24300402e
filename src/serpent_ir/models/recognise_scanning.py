"""Finds the configurations of networks that scan, from the tensors of a file. `models/recognise.py` uses it."""

import math
from collections.abc import Callable
from typing import Any

from serpent_ir.models.dvmsr import DVMSRConfig
from serpent_ir.models.eamamba import EAMambaConfig, EAMambaSRConfig
from serpent_ir.models.mair import MaIRConfig
from serpent_ir.models.mambair import MambaIRConfig
from serpent_ir.models.mambair_unet import MambaIRUNetConfig
from serpent_ir.models.mambairv2 import MambaIRv2Config
from serpent_ir.models.pfvm import PFVMConfig
from serpent_ir.models.shapes import Shapes, blocks_of, factor, has, levels, size, upsampler_of
from serpent_ir.models.vmambair import VmambaIRConfig

GROUPS = r"layers\."
BLOCKS = r"residual_group\.blocks\."
OF_DIM = rf"^(conv_first|conv_after_body|norm|norm_f|patch_embed\.norm|{GROUPS}\d+\.conv)\.(weight|bias)$"
"""Tensors of SwinIR's frame whose first axis has `dim` channels, but for narrow convolutions ("3conv")."""


def _frame(shapes: Shapes, inside: str = BLOCKS) -> dict[str, Any]:
    """The fields of a frame, whatever its blocks are."""
    in_channels = size(shapes, r"^conv_first\.weight$", 1, size(shapes, r"^conv_last\.", 0, 3))
    upsampler, scale = upsampler_of(shapes, min(in_channels, 3))
    return {
        "dim": size(shapes, OF_DIM, 0),
        "blocks": blocks_of(shapes, GROUPS, inside),
        "resi_connection": "3conv" if has(shapes, r"^conv_after_body\.\d") else "1conv",
        "upsampler": upsampler,
        "scale": scale,
        "in_channels": in_channels,
    }


def _ss2d(shapes: Shapes) -> dict[str, Any]:
    """The fields of `SS2D` in a block."""
    expand = factor(shapes, r"\.self_attention\.in_proj\.weight$", 2)
    return {"d_state": size(shapes, r"\.A_logs$", 1), "expand": expand}


def _mambair(shapes: Shapes) -> MambaIRConfig | None:
    if not (has(shapes, rf"^{GROUPS}\d+\.{BLOCKS}\d+\.conv_blk\.cab\.") and has(shapes, r"\.self_attention\.")):
        return None
    frame, light = _frame(shapes), has(shapes, r"\.cab\.[45]\.")
    narrow = size(shapes, r"\.conv_blk\.cab\.0\.(weight|bias)$", 0, 0)
    compress = 6 if not light and narrow == frame["dim"] // 6 else 3
    return MambaIRConfig(**frame, **_ss2d(shapes), light=light, compress=compress)


def _pfvm(shapes: Shapes) -> PFVMConfig | None:
    if not has(shapes, rf"^{GROUPS}\d+\.{BLOCKS}\d+\.(skip_scale3|conv_blk\.conv3x3)"):
        return None
    return PFVMConfig(**_frame(shapes), **_ss2d(shapes))


def _mair(shapes: Shapes) -> MaIRConfig | None:
    """No file tells the width of the stripes. In the releases it is 8 for classical SR and the tiny network, else 4."""
    if not has(shapes, rf"^{GROUPS}\d+\.{BLOCKS}\d+\.self_attention\.gating\."):
        return None
    inside = _ss2d(shapes)
    return MaIRConfig(
        **_frame(shapes),
        **inside,
        mlp_ratio=factor(shapes, r"\.conv_blk\.fc1\.weight$"),
        stripe=8 if inside["d_state"] == 1 or inside["expand"] == 2 else 4,
    )


def _dvmsr(shapes: Shapes) -> DVMSRConfig | None:
    if not has(shapes, rf"^{GROUPS}\d+\.{BLOCKS}\d+\.mixer\."):
        return None
    expand = factor(shapes, r"\.mixer\.in_proj\.weight$", 2)
    return DVMSRConfig(**_frame(shapes), d_state=size(shapes, r"\.mixer\.A_log$", 1), expand=expand)


def _mambairv2(shapes: Shapes) -> MambaIRv2Config | None:
    inside = r"residual_group\.layers\."
    if not has(shapes, rf"^{GROUPS}\d+\.{inside}\d+\.assm\."):
        return None
    frame = _frame(shapes, inside)
    table = r"\.win_mhsa\.relative_position_bias_table$"
    return MambaIRv2Config(
        **frame,
        d_state=size(shapes, r"\.selectiveScan\.A_logs$", 1),
        expand=factor(shapes, r"\.assm\.in_proj\.0\.weight$"),
        heads=size(shapes, table, 1),
        window_size=(round(size(shapes, table, 0) ** 0.5) + 1) // 2,
        inner_rank=size(shapes, r"\.embeddingA\.weight$", 0),
        classes=size(shapes, r"\.embeddingB\.weight$", 0),
        kernel=size(shapes, r"\.convffn[12]\.(sg\.conv|dwconv\.depthwise_conv\.0)\.weight$", 2),
        mlp_ratio=factor(shapes, r"\.convffn[12]\.fc1\.weight$"),
        light=has(shapes, r"\.convffn[12]\.sg\."),
    )


LEVELS = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")


def _four_levels(shapes: Shapes) -> dict[str, Any]:
    """The fields of Restormer's levels, whatever their blocks are."""
    counts = [levels(shapes, rf"{level}\.") for level in LEVELS]
    most = max(counts)
    return {
        "dim": size(shapes, r"^encoder_level1\.\d+\.(norm1\.body|ln_1)\.", 0),
        "blocks": tuple(n or most for n in counts),
        "refinement": levels(shapes, r"refinement\.") or most,
        "in_channels": size(shapes, r"^patch_embed\.proj\.weight$", 1, 3),
    }


def _ends(shapes: Shapes) -> dict[str, Any]:
    """The fields of what is around these levels in `FourLevelNetwork`."""
    return {"dual_pixel": has(shapes, r"^skip_conv\."), "out_channels": size(shapes, r"^output\.", 0, 3)}


def _mambair_unet(shapes: Shapes) -> MambaIRUNetConfig | None:
    if not has(shapes, r"^(encoder_level\d|latent)\.\d+\.self_attention\."):
        return None
    return MambaIRUNetConfig(**_four_levels(shapes), **_ends(shapes), **_ss2d(shapes))


def _vmambair(shapes: Shapes) -> VmambaIRConfig | None:
    if not has(shapes, r"^(encoder_level\d|latent)\.\d+\.attn\.(Ac_logs|Dsc|xc_proj|channel_norm)"):
        return None
    states = size(shapes, r"\.attn\.Ac_logs$", 1)
    return VmambaIRConfig(**_four_levels(shapes), d_state=states, scale=2 ** len(_stages(shapes, r"tail\.0\.")))


def _all_around(shapes: Shapes) -> dict[str, Any]:
    """The fields of EAMamba's block."""
    return {
        "d_state": size(shapes, r"\.mamba\.A_logs$", 1),
        "expand": factor(shapes, r"\.mamba\.in_proj\.weight$", 2),
        "ffn_expand": factor(shapes, r"\.ffn\.project_in\.weight$"),
    }


def _eamamba(shapes: Shapes) -> EAMambaConfig | None:
    if not has(shapes, r"^(encoder_level\d|latent)\.\d+\.mamba\."):
        return None
    return EAMambaConfig(
        **_four_levels(shapes),
        **_ends(shapes),
        **_all_around(shapes),
    )


def _eamamba_sr(shapes: Shapes) -> EAMambaSRConfig | None:
    if not has(shapes, rf"^{GROUPS}\d+\.blocks\.\d+\.mamba\."):
        return None
    dim = size(shapes, OF_DIM, 0)
    stages = (size(shapes, rf"^upsample\.{i}\.", 0) / dim for i in _stages(shapes, r"upsample\."))
    return EAMambaSRConfig(
        dim=dim,
        blocks=blocks_of(shapes, GROUPS, r"blocks\."),
        **_all_around(shapes),
        scale=round(math.prod(stages) ** 0.5),
        in_channels=size(shapes, r"^conv_first\.weight$", 1, 3),
        out_channels=size(shapes, r"^conv_last\.", 0, 3),
    )


def _stages(shapes: Shapes, prefix: str) -> list[int]:
    """The numbers of the convolutions in a chain of pixel shuffles."""
    return [i for i in (0, 2, 4) if has(shapes, rf"^{prefix}{i}\.")]


READERS: dict[type, Callable[[Shapes], Any]] = {
    PFVMConfig: _pfvm,
    MaIRConfig: _mair,
    MambaIRConfig: _mambair,
    MambaIRv2Config: _mambairv2,
    DVMSRConfig: _dvmsr,
    MambaIRUNetConfig: _mambair_unet,
    VmambaIRConfig: _vmambair,
    EAMambaConfig: _eamamba,
    EAMambaSRConfig: _eamamba_sr,
}

_OF_FRAME = ("resi_connection", "upsampler", "scale", "img_range", "in_channels")

FROM_FILE: dict[type, tuple[str, ...]] = {
    MambaIRConfig: _OF_FRAME,
    PFVMConfig: _OF_FRAME,
    MaIRConfig: (*_OF_FRAME, "stripe"),
    DVMSRConfig: _OF_FRAME,
    MambaIRv2Config: (*_OF_FRAME, "window_size", "routing_seed"),
    MambaIRUNetConfig: ("dual_pixel", "in_channels", "out_channels"),
    VmambaIRConfig: ("scale", "in_channels"),
    EAMambaConfig: ("dual_pixel", "in_channels", "out_channels"),
    EAMambaSRConfig: ("scale", "in_channels", "out_channels"),
}
