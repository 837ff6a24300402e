"""MambaIR (Guo et al., arXiv 2402.15648): SS2D and a convolution with channel attention, in SwinIR's frame.

Parameter names and shapes are those of the public release, so its state dicts load strictly. The function is the
release's too, except for stochastic depth, which only its training used. Maps are channels-last, (B, H, W, c).
"""

from dataclasses import dataclass

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.models.frame import Frame, FrameConfig, ResidualGroup, named, on_channels_last
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.ss2d import SS2D

SQUEEZE = 30
"""Channels per channel of the narrow layer in channel attention."""


@dataclass(frozen=True)
class MambaIRConfig(FrameConfig):
    light: bool = False  # narrow depthwise convolutions beside the scan, which the release has with pixelshuffledirect
    compress: int = 3  # how much narrower the other convolutions are inside; 6 in the light networks of early releases


class ChannelAttention(nn.Module):
    """x times a factor for each channel, from the means over the map (B, c, H, W)."""

    def __init__(self, c: int):
        super().__init__()
        narrow = nn.Conv2d(c, c // SQUEEZE, 1), nn.ReLU(), nn.Conv2d(c // SQUEEZE, c, 1)
        self.attention = nn.Sequential(nn.AdaptiveAvgPool2d(1), *narrow, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attention(x)


def channel_attention_block(c: int, *, light: bool, compress: int) -> nn.Sequential:
    """Convolutions and channel attention (paper, section 3.3, "CAB"): (B, c, H, W) -> the same."""
    if not light:
        narrow = c // compress
        convolutions = nn.Conv2d(c, narrow, 3, padding=1), nn.GELU(), nn.Conv2d(narrow, c, 3, padding=1)
        return named(cab=nn.Sequential(*convolutions, ChannelAttention(c)))
    narrow = c // 2
    return named(
        cab=nn.Sequential(
            nn.Conv2d(c, narrow, 1),
            nn.Conv2d(narrow, narrow, 3, padding=1, groups=narrow),
            nn.GELU(),
            nn.Conv2d(narrow, c, 1),
            nn.Conv2d(c, c, 3, padding=2, dilation=2, groups=c),
            ChannelAttention(c),
        )
    )


class ResidualStateSpaceBlock(nn.Module):
    """skip_scale x + SS2D(LayerNorm(x)), then skip_scale2 x + CAB(LayerNorm(x)) (paper, section 3.3, "RSSB")."""

    def __init__(self, c: int, d_state: int, expand: float, *, light: bool = False, compress: int = 3):
        super().__init__()
        self.ln_1 = LayerNorm(c)
        self.self_attention = SS2D(c, d_state, expand)
        self.skip_scale = nn.Parameter(torch.ones(c))
        self.conv_blk = channel_attention_block(c, light=light, compress=compress)
        self.ln_2 = LayerNorm(c)
        self.skip_scale2 = nn.Parameter(torch.ones(c))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.skip_scale + self.self_attention(self.ln_1(x))
        return x * self.skip_scale2 + on_channels_last(self.conv_blk, self.ln_2(x))


def group(config: MambaIRConfig, number: int) -> ResidualGroup:
    """Blocks, a convolution and a skip (paper, section 3.2, "RSSG")."""
    size = config.dim, config.d_state, config.expand
    kind = {"light": config.light, "compress": config.compress}
    blocks = (ResidualStateSpaceBlock(*size, **kind) for _ in range(config.blocks[number]))
    return ResidualGroup(config, nn.Sequential(*blocks))


class MambaIR(Frame, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger."""

    def __init__(self, config: MambaIRConfig):
        super().__init__(config, group)
