"""Finds, from the tensors of a file, the configuration of the network that they are for.

Names and shapes decide. Each reader raises KeyError, IndexError, ValueError or ZeroDivisionError if a file is almost
one for its network. What no shape tells is taken from the public releases.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serpent_ir.models import recognise_scanning as scanning
from serpent_ir.models.presets import ENLARGING, FAMILIES, PRESETS, TASK_SCALES, of_task
from serpent_ir.models.restormer import RestormerConfig
from serpent_ir.models.serpent import SerpentConfig
from serpent_ir.models.shapes import Shapes, numbered, upsampler_of
from serpent_ir.models.swinir import SwinIRConfig
from serpent_ir.models.unet import UNetConfig

JPEG_WINDOW, JPEG_RANGE = 7, 255.0
"""Window and image range of the released SwinIR weights against JPEG, which works in blocks of 8. No other release has
this window."""

FROM_FILE: dict[type, tuple[str, ...]] = {
    SerpentConfig: ("in_channels", "scale"),
    UNetConfig: ("in_channels", "out_channels"),
    SwinIRConfig: ("window_size", "resi_connection", "upsampler", "scale", "img_range", "in_channels"),
    RestormerConfig: ("norm_bias", "dual_pixel", "in_channels", "out_channels"),
    **scanning.FROM_FILE,
}
"""The fields that a file of weights decides unless the caller asks for others. The other fields make up a preset."""


def _serpent(shapes: Shapes) -> SerpentConfig | None:
    """The configuration that a state dict of these shapes is for; None if it is no Serpent."""
    if "bottleneck.0.ss2d.A_log" not in shapes:
        return None
    dim, in_channels, patch_size = shapes["patch_embed.weight"][:3]
    levels = [f"encoder.{i}." for i in range(numbered(shapes, "encoder."))]
    blocks = tuple(numbered(shapes, level) for level in [*levels, "bottleneck."])
    side = math.isqrt(shapes["head.weight"][0] // 3)  # of what the head makes of a patch
    return SerpentConfig(patch_size, dim, blocks, in_channels, scale=side // patch_size)


def _unet(shapes: Shapes) -> UNetConfig | None:
    """The configuration that a state dict of these shapes is for; None if it is no U-Net."""
    if "down_sample_layers.0.layers.0.weight" not in shapes:
        return None
    channels, in_channels = shapes["down_sample_layers.0.layers.0.weight"][:2]
    pools = numbered(shapes, "down_sample_layers.")
    return UNetConfig(channels, in_channels, shapes[f"up_conv.{pools - 1}.1.weight"][0], pools)


def _swinir(shapes: Shapes) -> SwinIRConfig | None:
    """The configuration that a state dict of these shapes is for; None if it is no SwinIR.

    No shape tells `img_range`, so that of the releases is taken.
    """
    first = "layers.0.residual_group.blocks.0"
    if f"{first}.attn.relative_position_bias_table" not in shapes:
        return None
    dim, in_channels = shapes["conv_first.weight"][:2]
    positions, heads = shapes[f"{first}.attn.relative_position_bias_table"]
    window = (round(positions**0.5) + 1) // 2
    upsampler, scale = upsampler_of(shapes, min(in_channels, 3))
    groups = range(numbered(shapes, "layers."))
    return SwinIRConfig(
        dim=dim,
        blocks=tuple(numbered(shapes, f"layers.{i}.residual_group.blocks.") for i in groups),
        heads=heads,
        window_size=window,
        mlp_ratio=shapes[f"{first}.mlp.fc1.weight"][0] / dim,
        resi_connection="3conv" if "conv_after_body.0.weight" in shapes else "1conv",
        upsampler=upsampler,
        scale=scale,
        img_range=JPEG_RANGE if window == JPEG_WINDOW else 1.0,
        in_channels=in_channels,
    )


def _restormer(shapes: Shapes) -> RestormerConfig | None:
    """The configuration that a state dict of these shapes is for; None if it is no Restormer."""
    if "encoder_level1.0.attn.temperature" not in shapes:
        return None
    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    dim, in_channels = shapes["patch_embed.proj.weight"][:2]
    return RestormerConfig(
        dim=dim,
        blocks=tuple(numbered(shapes, f"{level}.") for level in levels),
        refinement=numbered(shapes, "refinement."),
        heads=tuple(shapes[f"{level}.0.attn.temperature"][0] for level in levels),
        norm_bias="encoder_level1.0.norm1.body.bias" in shapes,
        dual_pixel="skip_conv.weight" in shapes,
        in_channels=in_channels,
        out_channels=shapes["output.weight"][0],
    )


READERS: dict[type, Callable[[Shapes], Any]] = {
    SerpentConfig: _serpent,
    UNetConfig: _unet,
    SwinIRConfig: _swinir,
    RestormerConfig: _restormer,
    **scanning.READERS,
}
"""By kind: finds the configuration that a state dict of these shapes is for; None if it is for another network."""


def recognise(shapes: Shapes) -> Any:
    """The configuration of the network with parameters of these names and shapes; None if no known network fits."""
    for read in READERS.values():
        try:
            if found := read(shapes):
                return found
        except (KeyError, IndexError, ValueError, ZeroDivisionError):  # much is missing, or shapes are impossible
            return None
    return None


def unknown(shapes: Shapes) -> str:
    """Why `recognise` finds no network: it names the network that almost fits, or the first tensors."""
    for kind, family in FAMILIES.items():
        try:
            READERS[kind](shapes)
        except KeyError as error:
            return f"looks like weights of {family}, but {error.args[0]} is missing; get the file again"
        except (IndexError, ValueError, ZeroDivisionError):
            return f"looks like weights of {family}, but of shapes that it cannot have; get the file again"
    first = ", ".join(list(shapes)[:3]) or "none"
    return f"weights of no known network (its tensors: {first}, ...); see `serpent models`"


def preset_of(config: Any) -> str:
    """Name of the preset with this configuration, apart from the fields that weights decide; "" if there is none."""
    task = getattr(config, "task", "")
    for name, (_, preset) in reversed(PRESETS.items()):
        if type(preset) is type(config) and (task not in TASK_SCALES or name in ENLARGING):
            of_that_task = replace(preset, **of_task(name, task))
            decided = {field: getattr(of_that_task, field) for field in ("task", *FROM_FILE[type(preset)])}
            if replace(config, **decided) == of_that_task:
                return name
    return ""
