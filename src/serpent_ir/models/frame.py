"""What SwinIR and the networks made after it share: groups of blocks between convolutions, and upsamplers at the end.

Parameter names are those of SwinIR's release (Liang et al., 2021, section 3.1), which the later releases kept.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.layers import LayerNorm, channels_last
from serpent_ir.models.padding import pad_to_multiple

SCALES = {"none": (1,), "pixelshuffle": (2, 3, 4, 8), "pixelshuffledirect": (2, 3, 4, 8), "nearest+conv": (2, 4)}
"""The upsamplers of the public releases, and the factor by which each enlarges an image."""
RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean colour of the DIV2K photos. The releases subtract it from colour images."""
RECONSTRUCTION_DIM = 64
"""Channels of the maps that `pixelshuffle` and `nearest+conv` upsample."""


def check_frame(config: Any) -> None:
    """Put the fields of a frame's configuration into their form. Raises UsageError if they do not go together."""
    object.__setattr__(config, "blocks", tuple(config.blocks))  # a configuration read from JSON has a list
    object.__setattr__(config, "upsampler", config.upsampler or "none")  # the releases say "" or None
    if config.upsampler not in SCALES:
        raise UsageError(f"no upsampler {config.upsampler!r}; valid: {', '.join(SCALES)}")
    if config.scale not in SCALES[config.upsampler]:
        valid = ", ".join(map(str, SCALES[config.upsampler]))
        raise UsageError(f"scale {config.scale} with upsampler {config.upsampler}; valid: {valid}")
    if config.resi_connection not in ("1conv", "3conv"):
        raise UsageError(f"no resi_connection {config.resi_connection!r}; valid: 1conv, 3conv")


@dataclass(frozen=True)
class FrameConfig:
    dim: int = 60
    blocks: tuple[int, ...] = (6, 6, 6, 6)  # of each residual group
    d_state: int = 16  # N, states of each channel
    expand: float = 2.0  # channels inside a block, as a multiple of `dim`
    resi_connection: str = "1conv"  # at the end of each group
    upsampler: str = "none"
    scale: int = 1
    img_range: float = 1.0  # images are multiplied by it inside
    in_channels: int = 3  # one or three image channels, which are also the output's; a task may add more (a mask)
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        check_frame(self)

    @property
    def out_channels(self) -> int:
        return min(self.in_channels, 3)


def named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def draw(weight: Tensor) -> None:
    if not weight.is_meta:  # there is nothing to fill, and PyTorch would import its compiler for it
        nn.init.trunc_normal_(weight, std=0.02)


def body_convolution(config: Any) -> nn.Module:
    dim, narrow = config.dim, config.dim // 4
    if config.resi_connection == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    ends = nn.Conv2d(dim, narrow, 3, padding=1), nn.Conv2d(narrow, dim, 3, padding=1)
    return nn.Sequential(ends[0], nn.LeakyReLU(0.2), nn.Conv2d(narrow, narrow, 1), nn.LeakyReLU(0.2), ends[1])


def on_channels_last(convolution: nn.Module, x: Tensor) -> Tensor:
    return rearrange(convolution(rearrange(x, "b h w c -> b c h w")), "b c h w -> b h w c")


def pixel_shuffles(c_in: int, factors: tuple[int, ...], c_out: int) -> nn.Sequential:
    """(B, c_in, H, W) -> (B, c_out, H, W), enlarged by the product of the factors."""
    pairs = ((nn.Conv2d(c_in, c_out * p * p, 3, padding=1), nn.PixelShuffle(p)) for p in factors)
    return nn.Sequential(*(module for pair in pairs for module in pair))


def steps_of(scale: int) -> tuple[int, ...]:
    """The factors of pixel shuffles that make an image `scale` times larger: 3, or as many twos as it takes."""
    return (3,) if scale == 3 else (2,) * (scale.bit_length() - 1)


class ResidualGroup(nn.Module):
    """Blocks of channels-last maps (B, H, W, c), a convolution, and a skip."""

    def __init__(self, config: Any, blocks: nn.Module, *, name: str = "blocks"):
        super().__init__()
        self.residual_group = named(**{name: blocks})
        self.conv = body_convolution(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + on_channels_last(self.conv, self.residual_group(x))


class Frame(nn.Module):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger.

    Images are padded to multiples of `size_multiple` on the right and bottom, and cropped afterwards.

    Args:
        config: a configuration with the fields that `check_frame` and `forward` read.
        group: the groups of blocks, from the configuration and the number of a group.
        size_multiple: what both sides must be multiples of.
        norm: name of the last normalisation.
    """

    mean: Tensor

    def __init__(
        self, config: Any, group: Callable[[Any, int], nn.Module], *, size_multiple: int = 1, norm: str = "norm"
    ):
        super().__init__()
        self.config = config
        self.size_multiple, self.scale, self._norm = size_multiple, config.scale, norm
        dim, middle, out = config.dim, RECONSTRUCTION_DIM, config.out_channels
        self.conv_first = nn.Conv2d(config.in_channels, dim, 3, padding=1)
        self.patch_embed = named(norm=LayerNorm(dim))
        self.layers = nn.Sequential(*(group(config, i) for i in range(len(config.blocks))))
        self.add_module(norm, LayerNorm(dim))
        self.conv_after_body = body_convolution(config)
        if config.upsampler == "pixelshuffledirect":
            self.upsample = pixel_shuffles(dim, (config.scale,), out)
        elif config.upsampler != "none":
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, middle, 3, padding=1), nn.LeakyReLU())
        if config.upsampler == "pixelshuffle":
            self.upsample = pixel_shuffles(middle, steps_of(config.scale), middle)
        elif config.upsampler == "nearest+conv":
            self.conv_up1 = nn.Conv2d(middle, middle, 3, padding=1)
            if config.scale == 4:
                self.conv_up2 = nn.Conv2d(middle, middle, 3, padding=1)
            self.conv_hr = nn.Conv2d(middle, middle, 3, padding=1)
        if config.upsampler != "pixelshuffledirect":
            self.conv_last = nn.Conv2d(dim if config.upsampler == "none" else middle, out, 3, padding=1)
        mean = RGB_MEAN if config.in_channels == 3 else (0.0,)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                draw(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def padded(self, x: Tensor) -> Tensor:
        return pad_to_multiple(x, self.size_multiple)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (side * self.scale for side in x.shape[-2:])
        image = (self.padded(x) - self.mean) * self.config.img_range
        first = self.conv_first(channels_last(image))
        features = self.patch_embed(rearrange(first, "b c h w -> b h w c"))
        features = rearrange(self.get_submodule(self._norm)(self.layers(features)), "b h w c -> b c h w")
        restored = self._reconstructed(self.conv_after_body(features) + first)
        if self.config.upsampler == "none":
            restored = image[:, : self.config.out_channels] + restored
        return (restored / self.config.img_range + self.mean)[..., :height, :width]

    def _reconstructed(self, x: Tensor) -> Tensor:
        """Features (B, dim, H, W) -> (B, out_channels, scale H, scale W) (SwinIR's paper, section 3.1)."""
        match self.config.upsampler:
            case "none":
                return self.conv_last(x)
            case "pixelshuffledirect":
                return self.upsample(x)
            case "pixelshuffle":
                return self.conv_last(self.upsample(self.conv_before_upsample(x)))
        x = self.conv_before_upsample(x)
        for convolution in (self.conv_up1, self.conv_up2) if self.scale == 4 else (self.conv_up1,):
            x = F.leaky_relu(convolution(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
